"""The Python snippets of README.md and of the pages in docs/ run as they are when pasted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    for number, snippet in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize(("page", "least"), [("README", 4), ("distributed", 2)])
def test_pages_have_snippets(page, least):
    assert sum(parameter.id.startswith(f"{page}-") for parameter in SNIPPETS) >= least


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, tmp_path):
    # A process of its own, without the settings of the test suite (float64, several devices).
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_ENABLE_X64", "XLA_FLAGS")}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", snippet]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
