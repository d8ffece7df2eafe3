"""What only the XLA implementation promises: many blocks give one result, memory is bounded, every order is exact."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import QUICK_COMPILE, Case, check_fused, check_unfused, generator
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from problems import problem
from tolerance import relative_error

from jax_natten import Neighborhood, reference
from jax_natten.xla import fused, tiling, unfused
from jax_natten.xla.blocks import contract

EXACT = jax.lax.Precision.HIGHEST
quick = QUICK_COMPILE if jax.default_backend() == "cpu" else None


@pytest.fixture
def small_steps(monkeypatch):
    """Cuts problems so small that they would be a single block into many."""
    monkeypatch.setattr(tiling, "STEP_SCORES", 2**9)
    monkeypatch.setattr(tiling, "STEP_COST", 2**8)
    tiling.choose.cache_clear()
    yield
    tiling.choose.cache_clear()


def draw(neighborhood, grid, *, batch=2, heads=2, kv_heads=1, dim=3, value_dim=2, additional=2, bias_batch=1):
    """Operands in float64; ``bias_batch=0``: no bias."""
    rng = generator(neighborhood, grid, batch)
    shapes = (
        (batch, *grid, heads, dim),
        (batch, *grid, kv_heads, dim),
        (batch, *grid, kv_heads, value_dim),
        (batch, additional, kv_heads, dim),
        (batch, additional, kv_heads, value_dim),
        (bias_batch or 1, heads if bias_batch else 0, *neighborhood.bias_shape),
    )
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


def like(arrays):
    """Random arrays of the same shapes."""
    rng = generator("like", [x.shape for x in arrays])
    return tuple(jnp.asarray(rng.standard_normal(x.shape)) for x in arrays)


def run(function, *operands):
    return jax.jit(function, compiler_options=quick)(*operands)


def assert_close(results, expected, tolerance=1e-11):
    for result, oracle in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert relative_error(result, np.asarray(oracle), magnitude=1.0) < tolerance


@st.composite
def problems(draw_from):
    rank = draw_from(st.integers(1, 3))
    integers = lambda low, high: [draw_from(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
    kernel_size, dilation = integers(1, 9), integers(1, 4)
    grid = tuple(k * d + extra for k, d, extra in zip(kernel_size, dilation, integers(0, 20)))
    stride = [draw_from(st.integers(1, k)) for k in kernel_size]
    causal = [draw_from(st.booleans()) for _ in range(rank)]
    return Neighborhood.make(kernel_size, stride, dilation, causal), grid


@given(
    problems(),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 20),
    st.sampled_from([2**6, 2**10, 2**14]),
)
def test_blocks_cover_every_query_and_its_window_within_the_budget(case, batch, kv_heads, group, additional, budget):
    neighborhood, grid = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "STEP_SCORES", budget)
        patch.setattr(tiling, "STEP_COST", budget)
        chosen = tiling.choose.__wrapped__(neighborhood, grid, batch, kv_heads, group, 8, additional)
    groups = math.prod(neighborhood.dilation)
    lanes = (chosen.batch_block, chosen.group_block, chosen.head_block)
    assert [n % block for n, block in zip((batch, groups, kv_heads), lanes)] == [0, 0, 0]
    queries = math.prod(axis.tile for axis in chosen.axes)
    scores = group * queries * (math.prod(axis.slab for axis in chosen.axes) + additional)
    assert math.prod(lanes) * scores <= budget or math.prod(lanes) == queries == 1
    for tiled, axis in zip(chosen.axes[3 - neighborhood.rank :], neighborhood.axes(grid)):
        assert tiled.start.min() >= 0 and tiled.start.max() + tiled.slab <= tiled.length
        begin, end = axis.window_bounds()
        for x in range(axis.length):
            dilation_group, index = x % axis.dilation, x // axis.dilation
            row, (tile, offset) = int(dilation_group >= tiled.long_groups), divmod(index, tiled.tile)
            assert (tiled.begin[row, tile, offset], tiled.end[row, tile, offset]) == (begin[x], end[x])
            assert tiled.start[tile] <= begin[x] and end[x] <= tiled.start[tile] + tiled.slab
        seen = sum(
            (tiled.end[row] - tiled.begin[row]).sum() * n
            for row, n in zip(range(len(tiled.begin)), (tiled.long_groups, axis.dilation - tiled.long_groups))
        )
        assert seen == (end - begin).sum(), "padding sees a key"


MANY_BLOCKS = (
    problem("1d", 3, 4, 2, 5, [61], [7], [3], [3]),
    problem("1d_causal", 2, 2, 1, 4, [53], [9], [4], [2], True),
    problem("2d", 2, 2, 2, 4, [17, 14], [4, 5], [2, 1], [2, 1]),
    problem("2d_causal", 1, 3, 1, 3, [13, 19], [5, 3], [1, 2], [1, 3], [True, False]),
    problem("3d", 1, 2, 1, 3, [9, 8, 7], [3, 2, 3], [1, 2, 2], [2, 1, 2]),
)


@pytest.mark.parametrize("shape", MANY_BLOCKS, ids=lambda p: p.name)
def test_many_small_blocks_give_the_result_of_one(small_steps, shape):
    # In float64: a sum over many more blocks than usual rounds more often than plain attention does.
    case = Case(shape, "float64", value_dim=2, additional=3, bias=not any(shape.is_causal), scale=-0.7)
    check_fused(case, "xla")
    check_unfused(case, "xla")


def test_each_bias_serves_its_part_of_the_batch(small_steps):
    neighborhood, grid = Neighborhood.make((3, 4), (1, 2), (2, 1)), (7, 9)
    operands = draw(neighborhood, grid, batch=6, bias_batch=3)
    parts = [(*(x[2 * i : 2 * i + 2] for x in operands[:5]), operands[5][i : i + 1]) for i in range(3)]

    def both(*operands):
        out, lse = fused.forward(*operands, neighborhood=neighborhood, scale=0.5, precision=EXACT)
        d_out, d_lse = jnp.sin(out), jnp.cos(lse)
        grads = fused.backward(*operands, out, lse, d_out, d_lse, neighborhood=neighborhood, scale=0.5, precision=EXACT)
        queries, keys, _, additional, _, bias = operands
        options = {"neighborhood": neighborhood, "precision": EXACT, "fill_negative_infinity": False}
        return out, lse, *grads, *unfused.pn(queries, keys, additional, bias, **options)

    separate = [run(both, *part) for part in parts]
    assert_close(run(both, *operands), [jnp.concatenate(results) for results in zip(*separate)])


SECOND_ORDER = (
    (Neighborhood.make((3,), (2,), (2,)), (9,), {}),
    (Neighborhood.make((3, 2), (1, 2), (2, 1), (False, True)), (7, 5), {"bias_batch": 0, "additional": 0}),
)


@pytest.mark.parametrize("case", SECOND_ORDER, ids=["1d", "2d_causal"])
def test_derivatives_of_every_function_match_those_of_the_definition(small_steps, case):
    neighborhood, grid, options = case
    operands = draw(neighborhood, grid, **options)
    parameters = {"neighborhood": neighborhood, "scale": -0.6, "precision": EXACT}

    def definition(*operands):
        *tensors, extra_keys, extra_values, bias = operands
        extra = (extra_keys, extra_values) if extra_keys.size else (None, None)
        return reference.attention(*tensors, neighborhood, -0.6, *extra, bias[0] if bias.size else None)

    def by_hand(*arguments):
        operands, cotangents, tangents = arguments[:6], arguments[6:8], arguments[8:]
        residuals = fused.forward(*operands, **parameters)
        return (
            residuals,
            fused.backward(*operands, *residuals, *cotangents, **parameters),
            fused.tangent(*operands, *residuals, *tangents, **parameters),
        )

    def by_jax(*arguments):
        operands, cotangents, tangents = arguments[:6], arguments[6:8], arguments[8:]
        results, pullback = jax.vjp(definition, *operands)
        return results, pullback(cotangents), jax.jvp(definition, operands, tangents)[1]

    def second(function):
        """Both modes of differentiation, which between them need the derivative of every result."""

        def derivatives(*arguments):
            results, pullback = jax.vjp(function, *arguments)
            return results, pullback(jax.tree.map(jnp.sin, results)), jax.jvp(function, arguments, like(arguments))[1]

        return derivatives

    out, lse = definition(*operands)
    arguments = (*operands, *like((out, lse)), *like(operands))
    assert_close(run(second(by_hand), *arguments), run(second(by_jax), *arguments))


def test_memory_stays_that_of_operands_and_results_at_every_order():
    neighborhood, grid, heads, dim = Neighborhood.make((7, 7)), (128, 128), 2, 8
    shape = (1, *grid, heads, dim)
    x, row = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape[:-1]))
    extra, bias = jnp.zeros((1, 0, heads, dim)), jnp.zeros((1, 0, *neighborhood.bias_shape))
    parameters = {"neighborhood": neighborhood, "scale": 0.3, "precision": EXACT}

    def forward(*qkv):
        return fused.forward(*qkv, extra, extra, bias, **parameters)

    def backward(query, key, value, *rest):
        return fused.backward(query, key, value, extra, extra, bias, *rest, **parameters)[:3]

    def tangent(query, key, value, out, lse, *tangents):
        operands = (query, key, value, extra, extra, bias, out, lse, *tangents, extra, extra, bias)
        return fused.tangent(*operands, **parameters)

    def vjp(function):
        return lambda *arguments: jax.vjp(function, *arguments)[1](function(*arguments))

    for function, operands in (
        (forward, [x] * 3),
        (backward, [*[x] * 4, row, x, row]),
        (vjp(backward), [*[x] * 4, row, x, row]),
        (vjp(tangent), [*[x] * 4, row, *[x] * 3]),
    ):
        memory = jax.jit(function, compiler_options=quick).lower(*operands).compile().memory_analysis()
        interface = memory.argument_size_in_bytes + memory.output_size_in_bytes
        assert memory.temp_size_in_bytes < 2 * interface + 2**25
        assert memory.temp_size_in_bytes < 4 * heads * math.prod(grid) ** 2 / 50


@pytest.mark.parametrize("values", list(itertools.product((1.0, np.inf, -np.inf, np.nan), repeat=2)), ids=str)
def test_contraction_treats_infinity_and_nan_as_a_sum_over_the_mask_would(values):
    rng = generator("contract")
    mask = rng.random((4, 1, 1, 6, 5)) < 0.6
    weights = np.where(mask & (rng.random(mask.shape) < 0.7), rng.standard_normal((1, 4, 3, 2, 6, 5)), 0)
    v = rng.standard_normal((1, 4, 3, 5, 2))
    v[:, :, :, 1, 0], v[:, :, :, 3, 0] = values
    with np.errstate(invalid="ignore"):
        expected = np.where(mask[..., None], weights[..., None] * v[:, :, :, None, None], 0).sum(-2)
    result = contract("bnhgqk,bnhkd->bnhgqd", jnp.asarray(weights), jnp.asarray(v), jnp.asarray(mask), EXACT)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch, grid", [(0, (4, 4)), (2, (0, 4))])
def test_empty_problems_have_empty_results_and_zero_gradients(batch, grid):
    neighborhood = Neighborhood.make((3, 3))
    window = {"neighborhood": neighborhood, "precision": EXACT}
    operands = draw(neighborhood, grid, batch=batch)
    out, lse = fused.forward(*operands, **window, scale=1.0)
    assert (out.shape, lse.shape) == ((batch, *grid, 2, 2), (batch, *grid, 2))
    grads = fused.backward(*operands, out, lse, out, lse, **window, scale=1.0)
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, operands))
    query, key, _, extra, _, bias = operands
    (weights,) = unfused.pn(query, key, extra, bias, **window, fill_negative_infinity=True)
    assert weights.shape == (batch, *grid, 2, 11)
    assert unfused.nn(weights, key, extra, **window)[0].shape == query.shape
    keys, extra_sum = unfused.inverse(weights, query, **window, kv_heads=1, additional=2)
    assert keys.shape == key.shape and extra_sum.shape == extra.shape and not extra_sum.any()


def test_every_function_types_its_results_as_varying_inside_shard_map():
    neighborhood, grid = Neighborhood.make((3, 2), 1, (1, 2)), (4, 5)
    operands = draw(neighborhood, grid, batch=2)
    window = {"neighborhood": neighborhood, "precision": EXACT}
    parameters = window | {"scale": 0.5}

    def every(*operands):
        bias = (
            jax.lax.pcast(operands[5], "x", to="varying")
            if jax.typeof(operands[0]).manual_axis_type.varying
            else operands[5]
        )
        operands = (*operands[:5], bias)
        query, key, _, extra, _, bias = operands
        residuals = fused.forward(*operands, **parameters)
        (weights,) = unfused.pn(query, key, extra, bias, **window, fill_negative_infinity=False)
        return (
            residuals,
            fused.backward(*operands, *residuals, *residuals, **parameters)[:5],
            fused.tangent(*operands, *residuals, *operands, **parameters),
            unfused.nn(weights, key, extra, **window),
            unfused.inverse(weights, query, **window, kv_heads=1, additional=2),
        )

    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    batch, whole = PartitionSpec("x"), PartitionSpec()
    mapped = jax.shard_map(every, mesh=mesh, in_specs=(*[batch] * 5, whole), out_specs=batch)
    assert_close(run(mapped, *operands), run(every, *operands))
