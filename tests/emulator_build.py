"""Builds the programs of ``tests/emulator``, one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"


def make(target: str) -> None:
    """Builds a target of the Makefile; skips the test where there is no compiler."""
    missing = [tool for tool in ("g++", "make") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes, which share the objects
        subprocess.run(["make", "-C", DIRECTORY, f"-j{os.cpu_count()}", target, f"PYTHON={sys.executable}"], check=True)
