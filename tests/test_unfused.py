"""Unfused attention, QK and AV with every gradient, against the float64 oracle."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import EDGE_CASES, HARD_CASES, with_dtypes
from checks import Case, check_unfused, draw, fused, generator, jit, jitted_unfused, run_unfused
from problems import problem
from tolerance import relative_error

import jax_natten

IMPLEMENTATIONS = ("cpu", "xla")

FEATURES = problem("features", 2, 4, 2, 9, [6, 11], [3, 4], [2, 1], [2, 2])
CAUSAL = FEATURES.with_causal((False, True))


def _name(x):
    return x.name if isinstance(x, Case) else str(x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)  # varies fastest: both use one result of the oracle
@pytest.mark.parametrize("case", HARD_CASES, ids=_name)
def test_hard_problem_with_its_gradients(case, implementation):
    check_unfused(case, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", EDGE_CASES, ids=_name)
def test_edge_of_the_definition_with_its_gradients(case, implementation):
    check_unfused(case, implementation)


@pytest.mark.parametrize("case", with_dtypes(Case(FEATURES, value_dim=7, additional=3, bias=True)), ids=_name)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_everything_at_once_in_every_dtype(case, implementation):
    check_unfused(case, implementation, quick=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dim, value_dim", [(1, 1), (3, 130), (65, 2), (160, 33)])
def test_any_head_dim(dim, value_dim, implementation):
    shape = problem(f"dims{dim}_{value_dim}", 1, 2, 1, dim, [72], [4])
    check_unfused(Case(shape, value_dim=value_dim, additional=2), implementation)


def _causal_slots(p, extra):
    """Which slots lie inside the causal limit, ``[*X, 1, P + S]``; the additional ones always do."""
    ones = np.ones((1, *p.grid, 1, 1))
    scores = oracle.pn(ones, ones, p.window, np.ones((1, extra, 1, 1)))
    return np.isfinite(scores[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_slots_past_the_query_hold_minus_infinity_and_take_no_gradient(implementation):
    case = Case(CAUSAL, additional=2)
    operands, (attn, d_attn, d_out) = draw(case)[0], _cotangents(case)
    valid = np.broadcast_to(_causal_slots(CAUSAL, 2), attn.shape)
    assert not valid.all() and valid.any(-1).all()
    results = run_unfused(case, implementation, operands, attn, d_attn, d_out)
    scores = np.asarray(results["qk"])
    assert np.isneginf(scores[~valid]).all() and np.isfinite(scores[valid]).all()
    np.testing.assert_array_equal(np.asarray(results["d_attn"])[~valid], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_what_causal_slots_past_the_query_hold_does_not_matter(junk, implementation):
    case = Case(CAUSAL, additional=2)
    operands, (attn, d_attn, d_out) = draw(case)[0], _cotangents(case)
    valid = _causal_slots(CAUSAL, 2)
    run = jitted_unfused(case, implementation)
    clean = run(operands, attn, d_attn, d_out)
    filled = [np.where(valid, x, junk).astype(x.dtype) for x in (attn, d_attn)]
    dirty = run(operands, *filled, d_out)
    for name in clean:
        np.testing.assert_array_equal(dirty[name], clean[name], err_msg=name)


def _cotangents(case):
    p, rng = case.problem, generator("cotangents", case.name)
    rows = (p.batch, *p.grid, p.heads)
    slots = int(np.prod(p.kernel_size)) + case.additional
    shapes = ((*rows, slots), (*rows, slots), (*rows, case.value_dim or p.dim))
    return [rng.standard_normal(shape).astype(case.dtype) for shape in shapes]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("features", [Case(FEATURES, additional=3, bias=True), Case(CAUSAL, additional=1)], ids=_name)
def test_scores_softmax_and_weighted_sum_make_fused_attention(features, implementation):
    case = dataclasses.replace(features, dtype="float64", scale=0.4)
    operands, (d_out, _) = draw(case)
    window = case.problem.window

    def unfused_attention(operands):
        x = dict(operands)
        scores = jax_natten.neighborhood_qk(
            0.4 * x["query"], x["key"], **window, additional_keys=x["additional_keys"], rpb=x.get("rpb"),
            implementation=implementation,
        )  # fmt: skip
        return jax_natten.neighborhood_av(
            jax.nn.softmax(scores, axis=-1),
            x["value"],
            **window,
            additional_values=x["additional_values"],
            implementation=implementation,
        )

    def with_gradients(attention):
        def run(operands):
            out, pullback = jax.vjp(attention, operands)
            return {"out": out} | pullback(d_out)[0]

        return jit(run, implementation)(operands)

    one = with_gradients(unfused_attention)
    other = with_gradients(lambda x: fused(case, implementation)(x)[0])
    for name in one:
        assert relative_error(one[name], other[name]) < 1e-12, name


def test_slots_are_row_major_and_name_the_keys_of_the_definition():
    grid, size, stride, dilation, causal = (5, 8), (2, 3), (2, 1), (2, 2), (False, False)
    positions = np.arange(40, dtype=np.float64).reshape(1, 5, 8, 1, 1)
    slots = jax_natten.na2d_qk(np.ones_like(positions), positions, size, stride, dilation, implementation="xla")
    for x0 in range(5):
        for x1 in range(8):
            expected = []
            rows, columns = (
                [g + i * d for i in range(b, e)]
                for (g, b, e), d in (
                    (oracle.window_of(x, n, k, s, d, c), d)
                    for x, n, k, s, d, c in zip((x0, x1), grid, size, stride, dilation, causal)
                )
            )
            expected = [8 * y0 + y1 for y0 in rows for y1 in columns]
            np.testing.assert_array_equal(slots[0, x0, x1, 0], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rank_functions_are_the_general_ones(implementation):
    for rank in (1, 2, 3):
        shape = problem(f"rank{rank}", 1, 2, 2, 4, [4] * rank, [3] * rank)
        operands, _ = draw(Case(shape))
        qk, av = getattr(jax_natten, f"na{rank}d_qk"), getattr(jax_natten, f"na{rank}d_av")

        def both(qk, av, size, query, key, value):
            scores = qk(query, key, size, implementation=implementation)
            return scores, av(scores, value, size, implementation=implementation)

        ranked = jit(lambda *x, f=qk, g=av: both(f, g, 3, *x), implementation)(*operands.values())
        general = jit(
            lambda *x, n=rank: both(jax_natten.neighborhood_qk, jax_natten.neighborhood_av, (3,) * n, *x),
            implementation,
        )(*operands.values())
        jax.tree.map(np.testing.assert_array_equal, ranked, general)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch, grid", [(0, (4, 5)), (2, (0, 5)), (2, (4, 0))])
def test_empty_batch_or_axis_gives_an_empty_result(batch, grid, implementation):
    case = Case(problem("empty", batch, 2, 1, 3, grid, [3, 2]), additional=2, bias=True)
    operands, _ = draw(case)
    results = run_unfused(case, implementation, operands, *_cotangents(case))
    assert results["qk"].shape == (batch, *grid, 2, 8) and results["av"].shape == (batch, *grid, 2, 3)
    for name, x in operands.items():
        np.testing.assert_array_equal(results[f"d_{name}"], np.zeros_like(x), err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batch_may_have_any_number_of_axes(implementation):
    case = Case(problem("batches", 6, 2, 1, 4, [5, 4], [3, 2]), additional=2)
    operands, _ = draw(case)
    arguments = (case.problem.kernel_size,)

    def both(x):
        scores = jax_natten.neighborhood_qk(
            x["query"], x["key"], *arguments, additional_keys=x["additional_keys"], implementation=implementation
        )
        return scores, jax_natten.neighborhood_av(
            scores, x["value"], *arguments, additional_values=x["additional_values"], implementation=implementation
        )

    run = jit(both, implementation)
    flat = run(operands)
    folded = run({name: x.reshape(3, 2, *x.shape[1:]) for name, x in operands.items()})
    single = run({name: x[2] for name, x in operands.items()})
    for a, b, c in zip(flat, folded, single):
        assert b.shape == (3, 2, *a.shape[1:]) and c.shape == a.shape[1:]
        np.testing.assert_array_equal(b.reshape(a.shape), a)
        assert relative_error(c, a[2]) < 1e-6


def test_results_have_the_dtype_of_the_inputs():
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        x = jax.ShapeDtypeStruct((2, 7, 3, 4), dtype)
        scores = jax.eval_shape(lambda q, k: jax_natten.na1d_qk(q, k, 3), x, x)
        assert scores.shape == (2, 7, 3, 3) and scores.dtype == dtype
        out = jax.eval_shape(lambda a, v: jax_natten.na1d_av(a, v, 3), scores, x)
        assert out.shape == x.shape and out.dtype == dtype
