"""The direct CUDA kernels keep the promises that the CPU suite holds the other implementations to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EDGE_CASES, HARD_CASES, with_dtypes
from checks import Case, check_fused, check_unfused, draw, expected_unfused, fused, jitted_fused, jitted_unfused
from problems import problem

import jax_natten

pytestmark = pytest.mark.gpu

FEATURES = problem("features", 2, 4, 2, 9, [6, 11], [3, 4], [2, 1], [2, 2])


def _name(x):
    return x.name if isinstance(x, Case) else str(x)


@pytest.mark.parametrize("case", HARD_CASES + EDGE_CASES, ids=_name)
def test_fused_with_its_gradients(case):
    check_fused(case, "naive")


@pytest.mark.parametrize("case", HARD_CASES + EDGE_CASES, ids=_name)
def test_unfused_with_its_gradients(case):
    check_unfused(case, "naive")


@pytest.mark.parametrize("case", with_dtypes(Case(FEATURES, value_dim=7, additional=3, bias=True)), ids=_name)
def test_everything_at_once_in_every_dtype(case):
    check_fused(case, "naive")
    check_unfused(case, "naive")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dim, value_dim", [(1, 1), (3, 130), (64, 64), (65, 2), (256, 256), (1000, 24), (512, 512)])
def test_any_head_dim(dim, value_dim, dtype):
    shape = problem(f"dims{dim}_{value_dim}", 1, 2, 1, dim, [10], [4])
    check_fused(Case(shape, dtype, value_dim=value_dim, additional=2), "naive")
    check_unfused(Case(shape, dtype, value_dim=value_dim, additional=2), "naive")


@pytest.mark.parametrize("scale", [0.0, -0.75])
def test_scale_is_honoured(scale):
    check_fused(Case(FEATURES, scale=scale), "naive")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_same_bits_in_every_run(dtype):
    case = Case(problem("repeat", 2, 4, 2, 32, [40, 36], [7, 7], [2, 1], [1, 2]), dtype, additional=3, bias=True)
    operands, cotangents = draw(case)
    run = jitted_fused(case, "naive")
    first = run(operands, cotangents)
    more, (attn, d_attn, d_out), *_ = expected_unfused(case)
    run_unfused = jitted_unfused(case, "naive")
    first_unfused = run_unfused(more, attn, d_attn, d_out)
    for _ in range(5):
        for name, x in run(operands, cotangents).items():
            np.testing.assert_array_equal(x, first[name], err_msg=name)
        for name, x in run_unfused(more, attn, d_attn, d_out).items():
            np.testing.assert_array_equal(x, first_unfused[name], err_msg=name)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_outside_the_window_reaches_a_query(poison, causal):
    """All keys and values outside one query's window are poisoned, and all other queries for the gradients."""
    window = {"kernel_size": (5, 3), "stride": (2, 1), "dilation": (1, 2), "is_causal": (causal, False)}
    grid, at = (9, 8), (4, 3)
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, *grid, 2, 16)).astype(np.float32) for _ in range(3))
    axes = jax_natten.Neighborhood.make(**window, rank=2).axes(grid)
    seen = axes[0].mask()[at[0]][:, None] & axes[1].mask()[at[1]][None, :]
    sees = axes[0].mask()[:, at[0]][:, None] & axes[1].mask()[:, at[1]][None, :]

    def attend(q, k, v):
        return jax_natten.na2d(q, k, v, **window, return_lse=True, implementation="naive")

    clean_out, clean_lse = attend(query, key, value)
    hidden = ~seen[None, :, :, None, None]
    out, lse = attend(query, np.where(hidden, poison, key), np.where(hidden, poison, value))
    np.testing.assert_array_equal(out[0, *at], clean_out[0, *at])
    np.testing.assert_array_equal(lse[0, *at], clean_lse[0, *at])

    # The gradients of one key take from the queries that see it, and from nothing else.
    d_out = rng.standard_normal(query.shape).astype(np.float32)
    blind = ~sees[None, :, :, None, None]

    def key_gradients(q, d):
        return jax.vjp(lambda k, v: attend(q, k, v)[0], key, value)[1](d)

    for got, clean in zip(
        key_gradients(np.where(blind, poison, query), np.where(blind, poison, d_out)), key_gradients(query, d_out)
    ):
        np.testing.assert_array_equal(got[0, *at], clean[0, *at])


@pytest.mark.parametrize("batch, grid", [(0, (4, 5)), (2, (0, 5))])
def test_empty_batch_or_axis_gives_an_empty_result(batch, grid):
    case = Case(problem("empty", batch, 2, 1, 3, grid, [3, 2]), additional=2, bias=True)
    operands, cotangents = draw(case)
    results = jitted_fused(case, "naive")(operands, cotangents)
    for name, x in operands.items():
        np.testing.assert_array_equal(results[f"d_{name}"], np.zeros_like(x))


def test_the_default_on_a_gpu_is_a_cuda_kernel():
    case = Case(FEATURES)
    operands, _ = draw(case)
    text = jax.jit(fused(case, None)).lower(operands).as_text()
    assert "jax_natten_fused_forward" in text and "naive" in text


def test_offsets_past_two_to_the_31():
    """A key tensor of over 2^31 elements; the last positions are compared with attention over a slice of them."""
    length, heads, dim, window = 2**22 + 64, 4, 128, 9
    shape = (1, length, heads, dim)
    try:
        query, key, value = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
        run = jax.jit(lambda *a: jax.vjp(lambda *b: jax_natten.na1d(*b, window, implementation="naive"), *a)[1](a[0]))
        grads = jax.block_until_ready(run(query, key, value))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        pytest.skip("not enough GPU memory")
    tail = 64
    part = [x[:, -tail:] for x in (query, key, value)]
    expected = run(*part)
    for got, want in zip(grads, expected):
        # The slice shifts the windows of its first queries, which the last keys never meet.
        np.testing.assert_array_equal(got[:, -tail // 2 :], want[:, -tail // 2 :])
