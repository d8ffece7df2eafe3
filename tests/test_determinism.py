"""Two runs give the same bits, forward and backward, with any number of threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from checks import Case, draw, generator, jitted_fused, jitted_unfused
from problems import problem

from jax_natten import native

needs_cpu = pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")

# Large enough that every thread of a pool gets work; sums over all queries (bias, additional keys) included.
CASES = (
    Case(problem("plane", 2, 4, 2, 16, [24, 24], [7, 6], [2, 1], [1, 2]), additional=5, bias=True),
    Case(problem("causal", 1, 4, 1, 8, [300], [65], [1], [2], True), "bfloat16", additional=3),
    Case(problem("volume", 1, 2, 2, 8, [6, 9, 10], [3, 4, 3], [1, 2, 1], [1, 1, 2]), "float64", bias=True),
)


def _digest(tree) -> str:
    bits = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        bits.update(np.ascontiguousarray(leaf).tobytes())
    return bits.hexdigest()


def _unfused_operands(case):
    p, rng = case.problem, generator("determinism", case.name)
    rows, slots = (p.batch, *p.grid, p.heads), int(np.prod(p.kernel_size)) + case.additional
    operands, (d_out, _) = draw(case)
    return operands, *(rng.standard_normal((*rows, slots)).astype(d_out.dtype) for _ in range(2)), d_out


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_repeated_calls_give_the_same_bits(case, implementation):
    fused, unfused = jitted_fused(case, implementation), jitted_unfused(case, implementation)
    digests = {
        _digest((fused(*draw(case)), unfused(*_unfused_operands(case))))
        for _ in range(6 if implementation == "cpu" else 2)
    }
    assert len(digests) == 1


_PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
import test_determinism as t
for case in t.CASES:
    fused, unfused = t.jitted_fused(case, "cpu"), t.jitted_unfused(case, "cpu")
    print(t._digest((fused(*t.draw(case)), unfused(*t._unfused_operands(case)))))
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(sum("XLAEigen" in name for name in names))
"""


@needs_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_number_of_threads_does_not_change_a_bit():
    """One process per size of XLA's thread pool, which follows the environment variable NPROC."""
    here = os.path.dirname(__file__)
    digests = {}
    for threads in ("1", "2", "7"):
        environment = os.environ | {"NPROC": threads, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, here], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        *digests[threads], pool = done.stdout.split()
        assert pool == threads, "the environment did not set the size of the pool"
        assert len(digests[threads]) == len(CASES)
    assert digests["1"] == digests["2"] == digests["7"]


@needs_cpu
def test_a_batch_element_has_the_same_bits_alone_and_in_a_batch():
    case = CASES[0]
    operands, cotangents = draw(case)
    together = jitted_fused(case, "cpu")(operands, cotangents)
    alone_operands = {n: x if n == "rpb" else x[1:] for n, x in operands.items()}
    alone = jitted_fused(case, "cpu")(alone_operands, tuple(ct[1:] for ct in cotangents))
    for name in ("out", "lse", "d_query", "d_key", "d_value", "d_additional_keys"):
        np.testing.assert_array_equal(alone[name], together[name][1:], err_msg=name)
