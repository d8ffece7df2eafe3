"""The CPU kernels are right whatever the instruction set that the processor has, not only the best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_natten import native

PROGRAM = """
from cases import HARD_CASES, with_dtypes
from checks import Case, check_fused, check_unfused
from problems import problem
from jax_natten import native

shape = problem("features", 2, 4, 2, 19, [6, 11], [3, 4], [2, 1], [2, 2])
features = Case(shape, value_dim=35, additional=2, bias=True)
for case in (*with_dtypes(features), *HARD_CASES[::24]):
    check_fused(case, "cpu")
    check_unfused(case, "cpu")
print(native.cpu.instruction_set())
"""


@pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_every_instruction_set_gives_right_results(instruction_set):
    best = native.cpu.instruction_set()
    if best == "baseline" and instruction_set != "baseline":
        pytest.skip(f"this processor lacks {instruction_set}")
    environment = os.environ | {"JAX_NATTEN_CPU_ISA": instruction_set, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [instruction_set]
