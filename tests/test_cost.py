"""flops and bytes_accessed count what a call needs, and jax.experimental.roofline finds the same."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import roofline

import jax_natten
from jax_natten import Neighborhood, bytes_accessed, flops, reference


def arrays(batch, grid, heads, kv_heads, dim, value_dim, additional=0, dtype=jnp.float32):
    """Query, key, value, and additional keys and values or None."""
    kv = [(*batch, *grid, kv_heads, d) for d in (dim, value_dim)]
    more = [(*batch, additional, kv_heads, d) for d in (dim, value_dim)] if additional else [None, None]
    sizes = [(*batch, *grid, heads, dim), *kv, *more]
    return [None if size is None else jax.ShapeDtypeStruct(size, dtype) for size in sizes]


@st.composite
def windows(draw):
    rank = draw(st.integers(1, 3))
    axis = lambda low, high: [draw(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
    kernel_size, dilation = axis(1, 4), axis(1, 2)
    grid = tuple(k * d + extra for k, d, extra in zip(kernel_size, dilation, axis(0, 3)))
    stride = [draw(st.integers(1, k)) for k in kernel_size]
    return (kernel_size, stride, dilation, [draw(st.booleans()) for _ in range(rank)]), grid


@given(windows(), st.integers(0, 3))
def test_flops_are_those_of_the_pairs_that_attend(window, additional):
    (kernel_size, *rest), grid = window
    q, k, v, *more = arrays((2, 3), grid, 4, 2, 5, 7, additional)
    mask = reference.mask(Neighborhood.make(kernel_size, *rest), grid)
    pairs = 2 * 3 * 4 * (int(mask.sum()) + math.prod(grid) * additional)
    for operation, products in (("forward", 5 + 7), ("backward", 3 * 5 + 2 * 7), ("qk", 5), ("av", 7)):
        assert flops(q, k, v, kernel_size, *rest, *more, operation=operation) == 2 * pairs * products


def test_bytes_are_those_of_operands_and_results():
    q, k, v, *more = arrays((2,), (6, 5), 4, 2, 3, 7, 2, jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((4, 5, 3), jnp.bfloat16)

    def count(operation):
        return bytes_accessed(q, k, v, (3, 2), 1, 1, False, *more, rpb=bias, operation=operation)

    rows, positions = 2 * 6 * 5 * 4, 2 * 6 * 5 * 2
    inputs = 2 * (rows * 3 + positions * (3 + 7) + 2 * 2 * 2 * (3 + 7)) + 4 * 4 * 5 * 3
    results = 2 * rows * 7 + 4 * rows
    assert count("forward") == inputs + results
    assert count("backward") == 2 * inputs + 2 * results
    weights = 2 * rows * (6 + 2)
    assert count("qk") == 2 * (rows * 3 + positions * 3 + 2 * 2 * 2 * 3) + 4 * 4 * 5 * 3 + weights
    assert count("av") == weights + 2 * (positions * 7 + 2 * 2 * 2 * 7) + 2 * rows * 7


def test_roofline_knows_the_cost_of_every_primitive():
    q, k, v, *more = arrays((2,), (9,), 4, 2, 3, 5, 2)
    window = (4, 2, 2, False)
    cost = {name: flops(q, k, v, *window, *more, operation=name) for name in ("forward", "backward", "qk", "av")}

    def fused(q, k, v, *more):
        return jax_natten.na1d(q, k, v, *window, None, *more)

    def unfused(q, k, v, more_keys, more_values):
        weights = jax_natten.na1d_qk(q, k, *window, more_keys)
        return jax_natten.na1d_av(weights, v, *window, more_values)

    def with_gradients(function):
        def run(*x):
            out, pullback = jax.vjp(function, *x)
            return out, pullback(out)

        return run

    def count(function):
        return roofline.roofline(function)(q, k, v, *more)[1]

    assert count(fused).flops == cost["forward"]
    assert count(fused).unfused_hbm_bytes == bytes_accessed(q, k, v, *window, *more)
    assert count(with_gradients(fused)).flops == cost["forward"] + cost["backward"]
    assert count(unfused).flops == cost["qk"] + cost["av"]
    assert count(with_gradients(unfused)).flops == 3 * (cost["qk"] + cost["av"])


def test_arrays_serve_as_well_as_their_shapes_and_mistakes_are_named():
    structs = arrays((1,), (8,), 2, 2, 4, 4)[:3]
    filled = [np.zeros(s.shape, s.dtype) for s in structs]
    assert flops(*filled, 3) == flops(*structs, 3) == 2 * 8 * 3 * 2 * (4 + 4)
    with pytest.raises(ValueError, match="operation must be among"):
        flops(*structs, 3, operation="sideways")
    with pytest.raises(ValueError, match="kernel_size"):
        flops(*structs, 9)
    with pytest.raises(ValueError, match="key must have"):
        bytes_accessed(structs[0], structs[1].update(shape=(1, 9, 2, 4)), structs[2], 3)
