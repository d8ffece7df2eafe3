"""Random problems: shapes, windows, heads, dtypes and options that nobody thought of, against the float64 oracle.

The examples follow this run's seed (JAX_NATTEN_TEST_SEED, printed in pytest's header); a failure is minimised and
printed as a ``Case`` that can be pasted into a test. JAX_NATTEN_TEST_EXAMPLES sets their number.
"""

from __future__ import annotations

import os

import hypothesis
import numpy as np
import oracle
import pytest
from checks import DTYPES, Case, check_fused, check_unfused, expected_fused, expected_unfused, generator
from hypothesis import strategies as st
from problems import Problem
from tolerance import relative_error

from jax_natten import Neighborhood, native
from jax_natten.neighborhood import Axis

needs_cpu = pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")
SEED = hypothesis.seed(int(os.environ["JAX_NATTEN_TEST_SEED"]))
EXAMPLES = hypothesis.settings().max_examples

# Longest axis by rank: a few hundred positions.
LONGEST = {1: 150, 2: 18, 3: 8}


@st.composite
def axes(draw, longest: int):
    """Length, window, stride, dilation and causal of one axis; every allowed one can be drawn."""
    length = draw(st.integers(1, longest))
    dilation = draw(st.one_of(st.just(1), st.integers(1, length)))
    window = draw(st.integers(1, length // dilation))
    stride = draw(st.one_of(st.just(1), st.integers(1, window)))
    return length, window, stride, dilation, draw(st.booleans())


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 3))
    grid, kernel_size, stride, dilation, is_causal = zip(*(draw(axes(LONGEST[rank])) for _ in range(rank)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 5]))
    return Problem(
        name="random",
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 40, 64, 72]))),
        grid=grid,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal if draw(st.booleans()) else (False,) * rank,
    )


@st.composite
def cases(draw):
    problem = draw(problems())
    scale = draw(st.one_of(st.none(), st.floats(-1, 1).map(lambda s: s * problem.dim**-0.5)))
    return Case(
        problem,
        dtype=draw(st.sampled_from(DTYPES)),
        value_dim=draw(st.one_of(st.none(), st.integers(1, 24), st.just(64))),
        additional=draw(st.sampled_from([0, 0, 1, 2, 7, 33])),
        bias=not any(problem.is_causal) and draw(st.booleans()),
        # No subnormal scales, whose products no dtype holds.
        scale=None if scale is None else round(scale, 3),
    )


@needs_cpu
@SEED
@hypothesis.settings(max_examples=3 * EXAMPLES)
@hypothesis.given(cases())
def test_fused_on_the_cpu(case):
    expected_fused.cache_clear()
    check_fused(case, "cpu")


@SEED
@hypothesis.settings(max_examples=EXAMPLES // 3)
@hypothesis.given(cases())
def test_fused_in_pure_jax(case):
    expected_fused.cache_clear()
    check_fused(case, "xla")


@needs_cpu
@SEED
@hypothesis.settings(max_examples=2 * EXAMPLES)
@hypothesis.given(cases())
def test_unfused_on_the_cpu(case):
    expected_unfused.cache_clear()
    check_unfused(case, "cpu")


@SEED
@hypothesis.settings(max_examples=EXAMPLES // 3)
@hypothesis.given(cases())
def test_unfused_in_pure_jax(case):
    expected_unfused.cache_clear()
    check_unfused(case, "xla")


@SEED
@hypothesis.settings(max_examples=20 * EXAMPLES)
@hypothesis.given(axes(300))
def test_window_formulas_on_long_axes(axis):
    length, _, _, dilation, _ = axis
    described, mask = Axis(*axis), oracle.axis_mask.__wrapped__(*axis) if length <= 40 else None
    begin, end = described.window_bounds()
    position = np.arange(length)
    group_length = described.group_length(position % dilation)
    first, last = described.queries_of_key(position // dilation, group_length)
    for x in generator("axis", axis).integers(0, length, 8):
        assert oracle.window_of(int(x), *axis) == (x % dilation, begin[x], end[x])
        group = position[x % dilation :: dilation]
        seen_by = group[(begin[group] <= x // dilation) & (x // dilation < end[group])] // dilation
        np.testing.assert_array_equal(seen_by, np.arange(np.broadcast_to(first, length)[x], last[x]))
    if mask is not None:
        np.testing.assert_array_equal(described.mask(), mask)


@SEED
@hypothesis.given(problems())
def test_counted_pairs_are_those_of_the_mask(problem):
    neighborhood = Neighborhood.make(**problem.window)
    neighborhood.check_grid(problem.grid)
    counts = [oracle.axis_mask(*axis).sum() for axis in zip(problem.grid, *problem.window.values())]
    assert neighborhood.pairs(problem.grid) == np.prod(counts)
    assert relative_error(neighborhood.window_size, np.prod(problem.kernel_size)) == 0
