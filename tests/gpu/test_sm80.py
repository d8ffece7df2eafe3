"""The sm_80 tensor-core kernels keep the promises that the CPU suite holds the other implementations to."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from cases import EDGE_CASES, HARD_CASES
from checks import (
    Case,
    check_fused,
    check_unfused,
    draw,
    expected_fused,
    expected_unfused,
    fused,
    generator,
    jitted_fused,
    jitted_unfused,
)
from problems import problem
from tolerance import assert_as_good_as_plain

import jax_natten
from jax_natten import Neighborhood, Tiles, native, tiles
from jax_natten.primitives import fused as primitives

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


PLANE = problem("tiles", 1, 4, 2, 24, [20, 22], [5, 7])
DILATED = problem("tiles_d", 2, 2, 1, 32, [23, 30], [7, 5], [3, 1], [1, 2])
LINE = problem("tiles_1d", 1, 2, 2, 32, [300], [63], is_causal=[True])
VOLUME = problem("tiles_3d", 1, 2, 1, 20, [6, 11, 14], [3, 3, 3])
WIDE = dataclasses.replace(PLANE, name="tiles_wide", dim=250)
ASKED = (
    *(
        (Case(shape, dtype), asked)
        for shape, dtype in ((PLANE, "bfloat16"), (DILATED, "float16"))
        for asked in (
            Tiles("sm80_small", (8, 8), (4, 4)),
            Tiles("sm80_small", (4, 16), (2, 8)),
            Tiles("sm80_small", (12, 5), (3, 5)),
            Tiles("sm80_tiles", (8, 8), (4, 4), (8, 8)),
            Tiles("sm80_tiles", (4, 16), (4, 4), (3, 21)),
            Tiles("sm80_tiles", (3, 20), (3, 5), (6, 10)),
            Tiles("sm80_tiles", (4, 4), (2, 2), (2, 3)),
            Tiles("sm80_tiles", (16, 8), (8, 4), (8, 8), rows=128),
            Tiles("sm80_tiles", (5, 24), (5, 6), (4, 15), rows=128),
        )
    ),
    (Case(PLANE, "float16", value_dim=17, bias=True), Tiles("sm80_small", (16, 4), (4, 4))),
    (Case(PLANE, "float16", value_dim=32, additional=5, bias=True), Tiles("sm80_tiles", (8, 8), (2, 8), (4, 15))),
    (Case(PLANE, "float32", value_dim=17, additional=5, bias=True), Tiles("sm80_tiles", (5, 12), (5, 3), (8, 8))),
    (Case(WIDE, "bfloat16"), Tiles("sm80_tiles", (8, 8), (8, 2), (4, 7))),
    (Case(WIDE, "float32"), Tiles("sm80_tiles", (8, 4), (4, 4), (3, 5), rows=32)),
    (Case(LINE, "bfloat16"), Tiles("sm80_small", (64,), (16,))),
    (Case(LINE, "bfloat16"), Tiles("sm80_tiles", (60,), (15,), (50,))),
    (Case(LINE, "bfloat16"), Tiles("sm80_tiles", (128,), (32,), (64,), rows=128)),
    (Case(VOLUME, "float16"), Tiles("sm80_small", (2, 4, 4), (1, 2, 4))),
    (Case(VOLUME, "float16"), Tiles("sm80_tiles", (4, 4, 4), (2, 2, 4), (2, 5, 6))),
    (Case(VOLUME, "float16"), Tiles("sm80_tiles", (2, 6, 10), (1, 6, 5), (4, 4, 4), rows=128)),
)


def check_forward(case: Case, asked: Tiles) -> np.ndarray:
    """The forward alone: the backward has tiles of its own choice. Returns the log-sum-exp."""
    operands, _, exact, plain, magnitudes = expected_fused(case)
    out, lse = jax.jit(fused(case, "sm80", asked))(operands)
    for name, result in (("out", out), ("lse", lse)):
        dtype = case.accumulation if name == "lse" else np.dtype(jax.numpy.dtype(case.dtype))
        magnitude = magnitudes.get(name, 0.0)
        assert_as_good_as_plain(result, exact[name], plain[name], name=name, dtype=dtype, magnitude=magnitude)
    return np.asarray(lse)


@pytest.mark.parametrize("case, asked", ASKED, ids=str)
def test_tiles_that_are_asked_for_change_nothing_but_rounding(case, asked):
    check_forward(case, asked)


@pytest.mark.parametrize("case", (Case(DILATED, "bfloat16"), Case(VOLUME, "float16", bias=True)), ids=_name)
def test_tiles_that_are_worth_tuning_do_so_too(case):
    operands, _ = draw(case)
    arrays = (operands.get(name) for name in ("query", "key", "value", "additional_keys", "rpb"))
    described = primitives.problem("fused_forward", *arrays, Neighborhood.make(**case.problem.window))
    ranked = tiles.simulate_sm80(described, count=8)
    assert len({each.tiles.structure for each in ranked}) == 2
    results = [check_forward(case, each.tiles) for each in ranked]
    assert any((results[0] != each).any() for each in results)  # sums in another order: the tiles were used


def test_tiles_that_do_not_fit_are_an_error_of_the_call_too(monkeypatch):
    """Python refuses them before, for the shapes that it knows."""
    monkeypatch.setattr(tiles, "why_not_tiles", lambda *_: None)
    case = Case(PLANE, "bfloat16")
    for asked, words in (
        (Tiles("sm80_tiles", (16, 8), (8, 4), (8, 8)), "parts have too many queries"),
        (Tiles("sm80_small", (64, 1), (16, 1)), "a warp's queries see too many keys"),
        (Tiles("sm80_tiles", (256, 1), (64, 1), (8, 8)), "tiles must hold numbers from 1 to 128"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f'INVALID_ARGUMENT: implementation "sm80" {words}'):
            jax.block_until_ready(jax.jit(fused(case, "sm80", asked))(draw(case)[0]))


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


@pytest.mark.skipif(hasattr(native.cuda, "is_emulated"), reason="runs another process, whose GPU is not emulated")
def test_profile_prints_what_it_reaches(tmp_path):
    command = [sys.executable, "-P", "-m", "jax_natten", "profile", "2d", "64x64", "-k", "13x13", "--heads", "8"]
    command += ["--batch", "4", "--dim", "64", "--implementation", "sm80"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for word in ("TFLOP/s", "structure", "sm80_tiles"):
        assert word in text
