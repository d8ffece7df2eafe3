"""The GPU suite, or the part of it that is not too slow, passes where there is no GPU: on the emulator.

The custom-call handlers of ``cuda/ffi`` and their kernels run unmodified; operands and results lie between guard pages,
so that this is a memory check as well.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from emulator_build import BUILD, DIRECTORY, ROOT, make


@pytest.fixture(scope="module")
def environment():
    """Of a process that can load the plugin ``emulated``."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs pybind11")
    make("_emulated")
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (BUILD, DIRECTORY, ROOT / "tests")))}


def run(environment, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "emulated", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_direct_kernels(environment):
    dims = "(any_head_dim and not 1000 and not 512 and not 256)"
    chosen = f"everything_at_once or {dims} or scale_is or nothing or empty or default"
    run(environment, "tests/gpu/test_naive.py", "-k", chosen)


def test_hopper_kernels(environment):
    """Through JAX and the choice of tiles; test_emulator.py runs them on more problems."""
    chosen = "tiles_that or two_heads or scale or poison or empty or (every_head_dim and bfloat16 and (64 or 136))"
    run(environment, "tests/gpu/test_sm90.py", "-k", f"({chosen}) and not two_to_the_31")


def test_hopper_backward_kernels(environment):
    cases = "(scale and 32) or (shared and 8-float16) or (every_head_dim and bfloat16 and (64 or 200))"
    # With a bias only head dims whose gradient of it the module has, see below.
    more = "(keys_and_bias and ([24- or [96-) and bfloat16) or (any_number and (64-65 or 128-700))"
    chosen = f"{cases} or {more} or (small_problem and 128) or (hard_problems and d128) or (output_alone and 64)"
    run(
        environment,
        "tests/gpu/test_sm90_backward.py",
        "-k",
        f"({chosen} or refused or empty or vmap) and not two_to_the_31",
    )


def test_sm80_kernels(environment):
    # Of head dims only those whose kernels the module has: compiling all takes minutes.
    dims = "(every_head_dim and ([8- or [24- or [128- or [256- or (([80- or [96-) and not float32)))"
    chosen = f"everything_at_once or {dims} or small_windows or scale_is or bits or empty or limits or tiles_"
    run(environment, "tests/gpu/test_sm80.py", "-k", chosen)


def test_tuning(environment):
    run(environment, "tests/gpu/test_cuda_tuning.py")
