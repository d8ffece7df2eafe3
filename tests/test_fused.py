"""Fused attention, forward and every gradient, against the float64 oracle."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import EDGE_CASES, HARD_CASES, with_dtypes
from checks import Case, check_fused, draw, expected_fused, fused, generator, run_fused
from problems import HARD, HARD_SMALL, problem
from tolerance import assert_as_good_as_plain, relative_error

import jax_natten

IMPLEMENTATIONS = ("cpu", "xla")

FEATURES = problem("features", 2, 4, 2, 9, [6, 11], [3, 4], [2, 1], [2, 2])


def _name(x):
    return x.name if isinstance(x, Case) else str(x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)  # varies fastest: both use one result of the oracle
@pytest.mark.parametrize("case", HARD_CASES, ids=_name)
def test_hard_problem_with_its_gradients(case, implementation):
    check_fused(case, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", EDGE_CASES, ids=_name)
def test_edge_of_the_definition_with_its_gradients(case, implementation):
    check_fused(case, implementation)


@pytest.mark.parametrize("case", with_dtypes(Case(FEATURES, value_dim=7, additional=3, bias=True)), ids=_name)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_everything_at_once_in_every_dtype(case, implementation):
    check_fused(case, implementation, quick=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.0, -0.75, 1, np.float32(0.25)])
def test_scale_is_honoured(scale, implementation):
    check_fused(Case(FEATURES, scale=float(scale)), implementation)
    case = Case(FEATURES, scale=scale)
    operands, cotangents = draw(Case(FEATURES, scale=float(scale)))
    out, _ = jax.jit(fused(case, implementation))(operands)
    assert out.dtype == jnp.float32
    if scale == 0:
        # Softmax of zeros: the mean of the window's values.
        mask = oracle.mask(FEATURES.grid, *FEATURES.window.values())
        value = np.repeat(operands["value"].reshape(2, 66, 2, 9), 2, axis=2)
        mean = np.einsum("xy,byhd->bxhd", mask / mask.sum(1, keepdims=True), value)
        assert relative_error(np.reshape(out, mean.shape), mean) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dim, value_dim", [(1, 1), (3, 130), (65, 2), (160, 33), (256, 256)])
def test_any_head_dim(dim, value_dim, implementation):
    shape = problem(f"dims{dim}_{value_dim}", 1, 2, 1, dim, [72], [4])
    check_fused(Case(shape, value_dim=value_dim, additional=2), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
    """Scores of a thousand, whose exponentials no dtype holds."""
    case = Case(FEATURES, scale=100.0)
    operands, cotangents, exact, plain, magnitudes = expected_fused(case)
    results = run_fused(case, implementation, operands, cotangents)
    for name in ("out", "lse"):
        assert_as_good_as_plain(results[name], exact[name], plain[name], name=name, dtype="float32")
    # The backward computes the weights again from the LSE, and one rounding of a score of a thousand is 6e-5 of them.
    for name in ("d_query", "d_key", "d_value"):
        assert relative_error(results[name], exact[name], magnitudes.get(name, 0)) < 1e-4, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batch_may_have_any_number_of_axes(implementation):
    shape = problem("batches", 6, 2, 1, 4, [5, 4], [3, 2])
    operands, _ = draw(Case(shape, additional=2))
    attention = jax.jit(fused(Case(shape, additional=2), implementation))
    out, lse = attention(operands)
    folded = {name: x.reshape(3, 2, *x.shape[1:]) for name, x in operands.items()}
    out_2, lse_2 = attention(folded)
    assert out_2.shape == (3, 2, *out.shape[1:]) and lse_2.shape == (3, 2, *lse.shape[1:])
    np.testing.assert_array_equal(out_2.reshape(out.shape), out)
    np.testing.assert_array_equal(lse_2.reshape(lse.shape), lse)
    out_0, lse_0 = attention({name: x[2] for name, x in operands.items()})
    assert out_0.shape == out.shape[1:] and lse_0.shape == lse.shape[1:]
    assert relative_error(out_0, out[2]) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch, grid", [(0, (4, 5)), (2, (0, 5)), (2, (4, 0)), (0, (0, 0))])
def test_empty_batch_or_axis_gives_an_empty_result(batch, grid, implementation):
    case = Case(problem("empty", batch, 2, 1, 3, grid, [3, 2]), additional=2, bias=True)
    operands, cotangents = draw(case)
    results = run_fused(case, implementation, operands, cotangents)
    assert results["out"].shape == (batch, *grid, 2, 3) and results["lse"].shape == (batch, *grid, 2)
    for name, x in operands.items():
        assert results[f"d_{name}"].shape == x.shape
        np.testing.assert_array_equal(results[f"d_{name}"], np.zeros_like(x))  # also what is not empty: the bias


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rank_functions_are_the_general_one(implementation):
    for rank in (1, 2, 3):
        shape = problem(f"rank{rank}", 1, 2, 2, 4, [4] * rank, [3] * rank)
        operands, _ = draw(Case(shape))
        ranked = getattr(jax_natten, f"na{rank}d")
        short = jax.jit(lambda q, k, v, f=ranked: f(q, k, v, 3, implementation=implementation))(*operands.values())
        out, _ = jax.jit(fused(Case(shape), implementation))(operands)
        assert isinstance(short, jax.Array)  # without return_lse: no tuple
        np.testing.assert_array_equal(short, out)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_window_over_the_whole_axis_is_causal_attention(implementation):
    shape = problem("causal", 2, 2, 2, 16, [24], [24], is_causal=True)
    operands, _ = draw(Case(shape))
    out, _ = jax.jit(fused(Case(shape), implementation))(operands)
    expected = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))(*operands.values())
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bias_may_have_another_dtype_and_is_not_rounded(implementation):
    case = Case(FEATURES, "bfloat16", bias=True)
    operands, cotangents = draw(case)
    operands = dict(operands, rpb=generator("bias").standard_normal(operands["rpb"].shape).astype(np.float32))
    results = run_fused(case, implementation, operands, cotangents)
    assert results["d_rpb"].dtype == jnp.float32
    arguments = (operands, FEATURES.window, case.effective_scale, *cotangents)
    exact, _ = oracle.attention(*arguments)
    plain, _ = oracle.attention(*arguments, compute=np.float32, storage=jnp.bfloat16)
    for name in ("out", "lse", "d_query", "d_rpb"):
        dtype = "bfloat16" if name != "lse" else "float32"
        assert_as_good_as_plain(results[name], exact[name], plain[name], name=name, dtype=dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_gradients_asked_for(implementation):
    """The gradient of one operand is the same alone as among all of them."""
    case = Case(FEATURES, additional=2, bias=True)
    operands, cotangents = draw(case)
    together = run_fused(case, implementation, operands, cotangents)
    attention = fused(case, implementation)
    for name in ("value", "rpb", "additional_keys"):

        def alone(x, name=name):
            out, lse = attention(operands | {name: x})
            return (out * cotangents[0]).sum() + (lse * cotangents[1]).sum()

        assert relative_error(jax.jit(jax.grad(alone))(operands[name]), together[f"d_{name}"]) < 1e-6, name


def test_without_an_implementation_the_best_one_runs():
    case = Case(FEATURES)
    operands, _ = draw(case)
    default = jax.jit(fused(case, None))(operands)[0]
    named = jax.jit(fused(case, ("sm90", "naive", "cpu", "xla")))(operands)[0]
    np.testing.assert_array_equal(default, named)


def test_the_cases_cover_every_combination_that_matters():
    assert list(HARD) == list(HARD_SMALL)
    assert {(c.problem.rank, c.dtype) for c in HARD_CASES} == set(
        itertools.product((1, 2, 3), ("float16", "bfloat16", "float32", "float64"))
    )
    for rank in (1, 2, 3):
        cases = [c for c in HARD_CASES if c.problem.rank == rank]
        assert {c.problem.is_causal for c in cases} == set(itertools.product((False, True), repeat=rank))
        assert {True, False} == {c.bias for c in cases if not any(c.problem.is_causal)}
        assert any(c.additional for c in cases) and any(c.value_dim for c in cases)
        assert {c.scale for c in cases} >= {None, 0.3, -0.5}
    assert any(c.scale == 0 for c in HARD_CASES)
    for name, full in HARD.items():
        small = HARD_SMALL[name]
        assert (small.heads > small.kv_heads) or (full.heads == full.kv_heads), name
        for field in ("kernel_size", "stride"):
            for a, b in zip(getattr(full, field), getattr(small, field)):
                assert (a == 1) == (b == 1), name
