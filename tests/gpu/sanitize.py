"""Runs every direct CUDA kernel once on ragged problems: a short program for ``compute-sanitizer``.

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_NATTEN_TEST_SEED", "0")
# The pool would hide an access past the end of a buffer, and a captured graph the kernel that made it.
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from checks import Case, draw, expected_unfused, jitted_fused, jitted_unfused
from problems import problem

CASES = (
    Case(problem("1d", 2, 4, 2, 9, [23], [5], [2], [3]), "float16", value_dim=7, additional=3, bias=True),
    Case(problem("2d", 1, 2, 1, 64, [9, 11], [4, 3], [3, 1], [2, 3]), "bfloat16", additional=2, bias=True),
    Case(problem("2d_causal", 1, 2, 2, 32, [9, 11], [4, 3], [3, 1], [2, 3], [True, False]), "float32"),
    Case(problem("3d", 1, 2, 1, 40, [5, 7, 6], [2, 3, 3], [1, 2, 1], [2, 1, 1]), "float64", value_dim=12, bias=True),
    Case(problem("wide", 1, 1, 1, 520, [9], [3]), "float32", value_dim=1030),
)


def main() -> None:
    for case in CASES:
        operands, cotangents = draw(case)
        jax.block_until_ready(jitted_fused(case, "naive")(operands, cotangents))
        more, weights, *_ = expected_unfused(case)
        jax.block_until_ready(jitted_unfused(case, "naive")(more, *weights))
        print(case.name, flush=True)


if __name__ == "__main__":
    main()
