"""The Hopper kernels keep the promises of "sm90", through JAX: right, the same in every run, and beside "naive"."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import Case, draw, fused
from hopper import (
    CHUNK,
    DIMS,
    DTYPES,
    HARD_CASES,
    MARKS,
    RANDOM,
    captured_and_plain,
    ends_of_long_results,
    every_rank,
    extended,
    random_cases,
)
from problems import HARD, LARGE, SMALL, problem
from tolerance import allowed_error, assert_as_good_as_plain, relative_error

import jax_natten
from jax_natten import Neighborhood, Tiles, dispatch, tiles
from jax_natten.primitives import fused as primitives

# The log-sum-exp is single precision throughout, but the tensor cores truncate where plain attention rounds, and the
# exponentials are those of the hardware.
LSE_ERROR = 4e-6
# Against the same attention in float32, of outputs that are rounded once and weights that are.
OUT_ERROR = {"bfloat16": 6e-3, "float16": 1e-3}


pytestmark = MARKS


def described(case: Case) -> dispatch.Problem:
    operands, _ = draw(case)
    arrays = (operands.get(name) for name in ("query", "key", "value", "additional_keys", "rpb"))
    return primitives.problem("fused_forward", *arrays, Neighborhood.make(**case.problem.window))


def forward(case: Case, operands, asked: Tiles | None = None):
    """``(out, lse)`` of the Hopper kernels."""

    def attend(x):
        return jax_natten.neighborhood_attention(
            **x, **case.problem.window, scale=case.scale, return_lse=True, implementation="sm90", tiles=asked
        )

    return jax.jit(attend)(operands)


def check(case: Case, asked: Tiles | None = None) -> None:
    """One case against the float64 oracle."""
    operands, _ = draw(case)
    arguments = (operands, case.problem.window, case.effective_scale)
    exact, _ = oracle.attention(*arguments)
    plain, _ = oracle.attention(*arguments, compute=np.float32, storage=jnp.dtype(case.dtype))
    out, lse = forward(case, operands, asked)
    assert out.dtype == jnp.dtype(case.dtype) and lse.dtype == jnp.float32
    assert_as_good_as_plain(out, exact["out"], plain["out"], name="out", dtype=case.dtype)
    error = relative_error(lse, exact["lse"])
    allowed = allowed_error(relative_error(plain["lse"], exact["lse"]), jnp.float32, lse.size < 256)
    assert error <= max(allowed, LSE_ERROR), f"lse: error {error:.3g} exceeds {allowed:.3g} and {LSE_ERROR}"


@pytest.mark.parametrize("case", HARD_CASES, ids=lambda c: c.name)
def test_hard_problems(case):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_every_head_dim_in_every_rank(dim, dtype):
    for case in every_rank(dim, dtype):
        check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 32, 64, 96, 128, 192, 256])
def test_additional_keys_and_bias(dim, dtype):
    for case in extended(dim, dtype):
        check(case)


@pytest.mark.parametrize("shape", HARD.values(), ids=lambda p: p.name)
def test_hard_problems_at_their_published_size(shape):
    """Against "naive" in float32 on the same device."""
    for causal, dtype in itertools.product(shape.every_causal(), DTYPES):
        case = Case(causal, dtype)
        operands, _ = draw(case)
        out, lse = forward(case, operands)
        wide = {name: x.astype(np.float32) for name, x in operands.items()}
        expected, expected_lse = jax.jit(fused(dataclasses.replace(case, dtype="float32"), "naive"))(wide)
        assert relative_error(out, expected) < OUT_ERROR[dtype], case.name
        assert relative_error(lse, expected_lse) < LSE_ERROR, case.name


@pytest.mark.parametrize("chunk", range(RANDOM // CHUNK))
def test_random_problems(chunk):
    """A thousand of them, of this run's seed; each under the chosen tiles or one of the next best."""
    for case, rng in random_cases("sm90", chunk):
        ranked = tiles.simulate(described(case), count=4)
        asked = None if rng.integers(2) else ranked[rng.integers(len(ranked))].tiles
        try:
            check(case, asked)
        except BaseException as error:
            error.add_note(f"{case}, {asked}")
            raise


TILES = (
    Tiles("wide", (16, 8), (8, 8), (16, 8)),
    Tiles("wide", (8, 10), (8, 5), (5, 25)),
    Tiles("wide", (2, 64), (1, 64), (4, 32)),
    Tiles("warp", (8, 8), (4, 4), (8, 16)),
    Tiles("warp", (8, 8), (4, 4), (5, 16), 1, 1, 4),
    Tiles("warp", (10, 10), (2, 5), (16, 18), 1, 3, 2),
    Tiles("middle", (8, 8), (8, 8), (5, 16)),
    Tiles("middle", (4, 16), (4, 16), (14, 8)),
    Tiles("middle", (9, 7), (9, 7), (1, 25)),
)


@pytest.mark.parametrize("asked", TILES, ids=str)
def test_tiles_that_are_asked_for_change_nothing_but_rounding(asked):
    for dilation in (1, 2):
        check(Case(problem("tiles", 1, 2, 1, 64, [28, 26], [7, 9], dilation=dilation), "bfloat16"), asked)


def test_tiles_that_make_as_many_warps_as_a_block_may_have():
    shape = problem("many", 1, 2, 2, 32, [8, 80], [3, 3])
    check(Case(shape, "float16"), Tiles("warp", (4, 76), (4, 4), (6, 78)))


def test_boxes_of_two_heads():
    shape = problem("two", 2, 4, 4, 32, [14, 14], [7, 5], dilation=2)
    check(Case(shape, "bfloat16"), Tiles("warp", (8, 8), (4, 4), (7, 7), 2, 2, 2))


@pytest.mark.parametrize("scale", [0.0, -0.75, 2.0])
@pytest.mark.parametrize("dim", [32, 128])
def test_scale_is_honoured(scale, dim):
    check(Case(problem("scale", 2, 4, 2, dim, [21, 19], [7, 5], [2, 1], [1, 2]), "float16", scale=scale))


@pytest.mark.parametrize(
    "name", ["nat_28", "dinat_28_d4", "hdit_64_k13", "vae_k3_7_7", "seq32k_gqa8", "cosmos2_s1_4_8"]
)
def test_same_bits_in_every_run(name):
    case = Case({**SMALL, **LARGE}[name], "bfloat16")
    operands = {n: jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, (n, x) in enumerate(_structs(case))}
    first = forward(case, operands)
    for _ in range(10):
        for a, b in zip(forward(case, operands), first):
            np.testing.assert_array_equal(a, b)


def _structs(case: Case):
    p = case.problem
    for name, heads in (("query", p.heads), ("key", p.kv_heads), ("value", p.kv_heads)):
        yield name, jax.ShapeDtypeStruct((p.batch, *p.grid, heads, p.dim), case.dtype)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_a_poisoned_key_outside_of_the_window_reaches(poison):
    """A key never; a value the queries of tiles that hold it, since a zero probability times infinity is no number."""
    case = Case(problem("poison", 1, 2, 2, 64, [40, 40], [7, 7]), "bfloat16")
    operands, _ = draw(case)
    clean, clean_lse = forward(case, operands)
    hidden = np.ones((40, 40), bool)
    hidden[17:24, 17:24] = False
    poisoned = dict(operands, key=_poisoned(operands["key"], hidden, poison))
    out, lse = forward(case, poisoned)
    np.testing.assert_array_equal(out[0, 20, 20], clean[0, 20, 20])
    np.testing.assert_array_equal(lse[0, 20, 20], clean_lse[0, 20, 20])
    far = np.zeros((40, 40), bool)
    far[39, 39] = True
    poisoned = dict(operands, value=_poisoned(operands["value"], far, poison))
    out, _ = forward(case, poisoned)
    np.testing.assert_array_equal(out[0, :4, :4], clean[0, :4, :4])


def _poisoned(x: np.ndarray, where: np.ndarray, poison: float) -> np.ndarray:
    return np.where(where[None, :, :, None, None], np.asarray(poison, x.dtype), x)


def test_empty_batch_gives_an_empty_result():
    case = Case(problem("empty", 0, 2, 1, 64, [12, 12], [3, 3]), "bfloat16")
    out, lse = forward(case, draw(case)[0])
    assert out.shape == (0, 12, 12, 2, 64) and lse.shape == (0, 12, 12, 2)


@pytest.mark.parametrize("name", ["nat_28", "hdit_64_k13_d4", "cosmos2_s1_4_8"])
def test_calls_can_be_captured_into_a_graph(name):
    """The same bits with every call in a command buffer and with none, also on other buffers than those captured."""
    case = Case({**SMALL, **LARGE}[name], "bfloat16")

    def chain(query, key, value):
        for _ in range(3):
            query = forward(case, {"query": query, "key": key, "value": value})[0] + 1
        return query

    captured, plain = captured_and_plain(chain)
    for seed in range(4):
        arrays = [
            jax.random.normal(jax.random.key(7 * seed + i), x.shape, x.dtype) for i, (_, x) in enumerate(_structs(case))
        ]
        np.testing.assert_array_equal(captured(*arrays), plain(*arrays))


def test_offsets_past_two_to_the_31():
    """Tensors of over 2^31 elements; the last positions are compared with attention over a slice of them."""

    def run(*arrays):
        return jax_natten.na1d(*arrays, 9, return_lse=True, implementation="sm90")

    for got, want in ends_of_long_results(run):
        assert relative_error(got, want) < 1e-5


def test_profile_prints_what_it_reaches(tmp_path):
    command = [sys.executable, "-P", "-m", "jax_natten", "profile", "2d", "64x64", "-k", "13x13", "--heads", "8"]
    command += ["--batch", "4", "--dim", "64", "--implementation", "sm90"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for word in ("TFLOP/s", "structure", "tiles", "bound", "H"):
        assert word in text


def test_the_sanitizer_program_runs():
    program = Path(__file__).with_name("sanitize.py")
    result = subprocess.run([sys.executable, program, "sm90"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
