"""NaN and infinity stay inside the outputs whose window holds them, and do come out there."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
from checks import Case, draw, fused, generator, jit, jitted_fused, jitted_unfused
from problems import problem

IMPLEMENTATIONS = ("cpu", "xla")

PROBLEMS = {
    p.name: p
    for p in (
        problem("1d_sliding", 1, 2, 1, 8, [45], [7], [1], [1]),
        problem("1d_strided_dilated", 2, 2, 2, 5, [50], [6], [4], [3]),
        problem("1d_causal", 1, 2, 1, 16, [40], [9], [2], [2], True),
        problem("2d", 1, 2, 1, 8, [9, 13], [3, 4], [2, 1], [2, 1]),
        problem("2d_causal", 1, 1, 1, 9, [10, 11], [4, 5], [1, 3], [1, 2], [True, False]),
        problem("3d", 1, 2, 1, 4, [5, 6, 7], [3, 2, 3], [1, 2, 1], [1, 1, 2], [False, False, True]),
    )
}
POISONS = (np.nan, np.inf, -np.inf)


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS)
def shape(request):
    return request.param


def _seen(p):
    """Boolean ``[N, N]``: query sees key."""
    return oracle.mask(p.grid, *p.window.values())


def _poisoned(x, keep, poison):
    """``x`` of shape ``[B, *X, ...]`` with every position outside ``keep`` (flat, boolean) replaced."""
    keep = keep.reshape(x.shape[1 : 1 + len(x.shape) - 3] if x.ndim > 2 else keep.shape)
    return np.where(keep[None, ..., None, None], x, np.asarray(poison, x.dtype))


def _rows(x, p, positions):
    x = np.asarray(x)
    return x.reshape(p.batch, math.prod(p.grid), *x.shape[1 + p.rank :])[:, positions]


def _some_positions(p, count=4):
    """The corners, which have the windows that shift, and a few others."""
    n = p.positions
    return {0, n - 1, n // 2, *generator("positions", p.name).integers(0, n, count - 3).tolist()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_outside_a_query_s_window_reaches_its_output_or_gradient(shape, implementation):
    case = Case(shape)
    operands, (d_out, d_lse) = draw(case)
    run = jitted_fused(case, implementation)
    clean = run(operands, (d_out, d_lse))
    seen = _seen(shape)
    for number, x in enumerate(_some_positions(shape)):
        poison = POISONS[number % 3]
        itself = np.arange(shape.positions) == x
        dirty = {
            "query": _poisoned(operands["query"], itself, poison),
            "key": _poisoned(operands["key"], seen[x], poison),
            "value": _poisoned(operands["value"], seen[x], poison),
        }
        cotangents = _poisoned(d_out, itself, poison), _poisoned(d_lse[..., None], itself, poison)[..., 0]
        results = run(dirty, cotangents)
        for name in ("out", "lse", "d_query"):
            np.testing.assert_allclose(
                _rows(results[name], shape, x),
                _rows(clean[name], shape, x),
                rtol=1e-5,
                atol=0,
                err_msg=f"{name} at {x}",
            )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_query_that_does_not_see_a_key_reaches_its_gradients(shape, implementation):
    case = Case(shape)
    operands, (d_out, d_lse) = draw(case)
    run = jitted_fused(case, implementation)
    clean = run(operands, (d_out, d_lse))
    seen = _seen(shape)
    for number, y in enumerate(_some_positions(shape)):
        poison = POISONS[number % 3]
        queries = seen[:, y]
        keys = seen[queries].any(0)
        dirty = {
            "query": _poisoned(operands["query"], queries, poison),
            "key": _poisoned(operands["key"], keys, poison),
            "value": _poisoned(operands["value"], keys, poison),
        }
        cotangents = _poisoned(d_out, queries, poison), _poisoned(d_lse[..., None], queries, poison)[..., 0]
        results = run(dirty, cotangents)
        for name in ("d_key", "d_value"):
            np.testing.assert_allclose(
                _rows(results[name], shape, y),
                _rows(clean[name], shape, y),
                rtol=1e-5,
                atol=0,
                err_msg=f"{name} at {y}",
            )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_poisoned_value_comes_out_in_exactly_the_windows_that_hold_it(shape, dtype, implementation):
    case = Case(shape, dtype, additional=1)
    operands, _ = draw(case)
    run = jit(fused(case, implementation), implementation)
    seen = _seen(shape)
    for y in _some_positions(shape):
        value = np.array(operands["value"])
        value.reshape(shape.batch, shape.positions, -1, shape.dim)[0, y, 0, 1] = np.nan
        out, lse = run(operands | {"value": value})
        hit = np.isnan(_rows(out, shape, slice(None)).astype(np.float32))
        expected = np.zeros_like(hit)
        expected[0, seen[:, y], : shape.heads // shape.kv_heads, 1] = True
        np.testing.assert_array_equal(hit, expected)
        assert np.isfinite(lse).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_poisoned_key_comes_out_in_exactly_the_windows_that_hold_it(shape, implementation):
    case = Case(shape, additional=1)
    operands, cotangents = draw(case)
    run = jitted_fused(case, implementation)
    seen = _seen(shape)
    for y in _some_positions(shape):
        key = np.array(operands["key"])
        key.reshape(shape.batch, shape.positions, -1, shape.dim)[0, y, 0, 1] = np.nan
        results = run(operands | {"key": key}, cotangents)
        expected = np.zeros((shape.batch, shape.positions, shape.heads), bool)
        expected[0, seen[:, y], : shape.heads // shape.kv_heads] = True
        np.testing.assert_array_equal(np.isnan(_rows(results["lse"], shape, slice(None))), expected)
        for name in ("out", "d_query"):
            rows = np.isnan(_rows(results[name], shape, slice(None)))
            np.testing.assert_array_equal(rows.any(-1), expected, err_msg=name)
            np.testing.assert_array_equal(rows.all(-1), expected, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_poisoned_query_stays_in_its_own_row(shape, implementation):
    case = Case(shape)
    operands, _ = draw(case)
    run = jit(fused(case, implementation), implementation)
    clean = run(operands)
    for x in _some_positions(shape):
        query = np.array(operands["query"])
        query.reshape(shape.batch, shape.positions, -1, shape.dim)[0, x, 0, 0] = np.nan
        for dirty, pure in zip(run(operands | {"query": query}), clean):
            dirty, pure = (np.array(_rows(r, shape, slice(None))) for r in (dirty, pure))
            assert np.isnan(dirty[0, x, 0]).all()
            dirty[0, x, 0] = pure[0, x, 0]
            np.testing.assert_allclose(dirty, pure, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinite_scores_behave_as_in_plain_attention(implementation):
    p = PROBLEMS["1d_sliding"]
    case = Case(p)
    operands, _ = draw(case)
    query, key = np.abs(operands["query"]), np.array(operands["key"])
    key[0, 20, 0, 0] = -np.inf  # a score of -inf: the key is not there
    out, lse = jit(fused(case, implementation), implementation)(operands | {"query": query, "key": key})
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    key[0, 20, 0, 0] = np.inf  # a score of inf: no softmax exists
    out, _ = jit(fused(case, implementation), implementation)(operands | {"query": query, "key": key})
    np.testing.assert_array_equal(np.isnan(_rows(out, p, slice(None))).all((0, 2, 3)), _seen(p)[:, 20])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_outside_the_window_reaches_unfused_results(shape, implementation):
    """QK, AV and their gradients: one query's from what it sees, one key's from the queries that see it."""
    case = Case(shape)
    operands, _ = draw(case)
    rng = generator("unfused poison", shape.name)
    rows = (shape.batch, *shape.grid, shape.heads)
    slots = math.prod(shape.kernel_size)
    attn, d_attn, d_out = (rng.standard_normal((*rows, n)).astype(np.float32) for n in (slots, slots, shape.dim))
    run = jitted_unfused(case, implementation)
    clean = run(operands, attn, d_attn, d_out)
    seen = _seen(shape)

    def compare(names, position, queries, keys, poison):
        dirty = {
            "query": _poisoned(operands["query"], queries, poison),
            "key": _poisoned(operands["key"], keys, poison),
            "value": _poisoned(operands["value"], keys, poison),
        }
        per_query = (_poisoned(x, queries, poison) for x in (attn, d_attn, d_out))
        results = run(dirty, *per_query)
        for name in names:
            np.testing.assert_allclose(
                _rows(results[name], shape, position), _rows(clean[name], shape, position), rtol=1e-5, err_msg=name
            )

    middle = shape.positions // 2
    only = np.arange(shape.positions) == middle
    compare(("qk", "d_query", "av", "d_attn"), middle, only, seen[middle], np.nan)
    compare(("d_key", "d_value"), middle, seen[:, middle], np.zeros(shape.positions, bool), np.inf)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_additional_keys_reach_every_query(implementation):
    p = PROBLEMS["2d"]
    case = Case(p, additional=2)
    operands, _ = draw(case)
    values = np.array(operands["additional_values"])
    values[0, 1, 0, 2] = np.nan
    out, _ = jit(fused(case, implementation), implementation)(operands | {"additional_values": values})
    hit = np.isnan(out)
    assert hit[..., 2].all() and not np.delete(hit, 2, -1).any()


def test_the_poison_of_these_tests_poisons():
    """Guards the tests themselves: poisoned arrays differ everywhere but at the kept positions."""
    p = PROBLEMS["2d"]
    keep = np.arange(p.positions) == 17
    x = _poisoned(np.ones((1, *p.grid, 2, 8), np.float32), keep, np.nan)
    assert np.isfinite(x).sum() == 16 and np.isfinite(_rows(x, p, 17)).all()
