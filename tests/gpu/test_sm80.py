"""The sm_80 tensor-core kernels keep the promises that the CPU suite holds the other implementations to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import EDGE_CASES, HARD_CASES
from checks import Case, check_fused, check_unfused, draw, expected_unfused, generator, jitted_fused, jitted_unfused
from problems import problem

import jax_natten
from jax_natten import native

pytestmark = pytest.mark.gpu

DTYPES = ("float16", "bfloat16", "float32")
FEATURES = problem("features", 2, 4, 2, 9, [6, 11], [3, 4], [2, 1], [2, 2])
DIMS = (8, 24, 32, 40, 64, 80, 96, 128, 160, 192, 256)


def _name(x):
    return x.name if isinstance(x, Case) else str(x)


def without_float64(case: Case) -> Case:
    return dataclasses.replace(case, dtype="bfloat16") if case.dtype == "float64" else case


CASES = [without_float64(case) for case in HARD_CASES + EDGE_CASES]


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_fused_with_its_gradients(case):
    check_fused(case, "sm80")


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_unfused_with_its_gradients(case):
    check_unfused(case, "sm80")


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_at_once(dtype):
    case = Case(FEATURES, dtype, value_dim=7, additional=3, bias=True)
    check_fused(case, "sm80")
    check_unfused(case, "sm80")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_every_head_dim(dim, dtype):
    shape = problem(f"dim{dim}", 1, 2, 1, dim, [40], [9])
    check_fused(Case(shape, dtype, value_dim=dim - 3, additional=2), "sm80")
    check_unfused(Case(shape, dtype, value_dim=dim - 3, additional=2), "sm80")


SMALL_WINDOWS = [
    Case(problem("square", 2, 4, 2, 32, [20, 18], [7, 7]), "float16", bias=True),
    Case(problem("dilated", 1, 2, 2, 24, [23, 30], [5, 7], [1, 3], [2, 1]), "bfloat16", value_dim=17, bias=True),
    Case(problem("causal", 1, 4, 1, 40, [26, 19], [9, 5], is_causal=[True, False]), "float16"),
    Case(problem("cube", 1, 2, 1, 24, [6, 11, 14], [3, 5, 7]), "bfloat16", value_dim=32),
    Case(problem("line", 2, 2, 1, 64, [300], [63]), "float16"),
]


@pytest.mark.parametrize("case", SMALL_WINDOWS, ids=_name)
def test_small_windows(case):
    """They have kernels of their own, forward and backward."""
    check_fused(case, "sm80")


@pytest.mark.parametrize("scale", [0.0, -0.75])
def test_scale_is_honoured(scale):
    check_fused(Case(FEATURES, "bfloat16", scale=scale), "sm80")


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_run(dtype):
    case = Case(problem("repeat", 2, 4, 2, 32, [14, 12], [5, 5], [2, 1], [1, 2]), dtype, additional=3, bias=True)
    operands, cotangents = draw(case)
    run = jitted_fused(case, "sm80")
    first = run(operands, cotangents)
    more, weights, *_ = expected_unfused(case)
    run_unfused = jitted_unfused(case, "sm80")
    first_unfused = run_unfused(more, *weights)
    for name, x in run(operands, cotangents).items():
        np.testing.assert_array_equal(x, first[name], err_msg=name)
    for name, x in run_unfused(more, *weights).items():
        np.testing.assert_array_equal(x, first_unfused[name], err_msg=name)


@pytest.mark.parametrize("batch, grid", [(0, (4, 5)), (2, (0, 5))])
def test_empty_batch_or_axis_gives_an_empty_result(batch, grid):
    case = Case(problem("empty", batch, 2, 1, 3, grid, [3, 2]), "bfloat16", additional=2, bias=True)
    operands, cotangents = draw(case)
    results = jitted_fused(case, "sm80")(operands, cotangents)
    for name, x in operands.items():
        np.testing.assert_array_equal(results[f"d_{name}"], np.zeros_like(x))


def test_limits_are_named():
    x = np.zeros((1, 8, 1, 4))
    with pytest.raises(NotImplementedError, match="'sm80' takes float16, bfloat16 and float32"):
        jax_natten.na1d(x, x, x, 3, implementation="sm80")
    x = np.zeros((1, 8, 1, 257), np.float32)
    with pytest.raises(NotImplementedError, match="'sm80' takes head dimensions up to 256"):
        jax_natten.na1d(x, x, x, 3, implementation="sm80")


def test_tiles_of_another_implementation_are_left_to_it():
    """On a GPU that is no Hopper, or an emulated one, as here: there "sm80" runs what "sm90" has tiles for."""
    emulator = native.cuda if hasattr(native.cuda, "is_emulated") else None
    asked = jax_natten.Tiles("wide", (16, 8), (8, 8), (16, 8))
    x = np.asarray(generator("tiles").standard_normal((3, 1, 20, 12, 2, 32)), np.float16)
    if emulator:
        emulator.configure(seed=7, major=8, minor=6)
    try:
        out = jax_natten.na2d(*x, (7, 5), implementation=("sm90", "sm80"), tiles=asked)
    finally:
        if emulator:
            emulator.configure(seed=7)
    expected = jax_natten.na2d(*x, (7, 5), implementation="sm80")
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=5e-3, atol=5e-3)
