"""The window formulas, in Python and in C++, against the definition one query at a time."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest

from jax_natten import Neighborhood, native
from jax_natten.neighborhood import Axis

LONGEST = 24


def every_axis(longest: int = LONGEST):
    """All ``(length, window, stride, dilation, causal)`` that are allowed."""
    for length in range(1, longest + 1):
        for dilation in range(1, length + 1):
            for window in range(1, length // dilation + 1):
                for stride in range(1, window + 1):
                    for causal in (False, True):
                        yield length, window, stride, dilation, causal


def definition(length, window, stride, dilation, causal):
    """Window of every position, ``[(start, end)]``, and the key positions that it holds."""
    bounds, seen = [], []
    for x in range(length):
        group, start, end = oracle.window_of(x, length, window, stride, dilation, causal)
        bounds.append((start, end))
        seen.append([group + index * dilation for index in range(start, end)])
    return bounds, seen


def inverse(length, dilation, seen):
    """In-group indices of the queries that see every key position: the definition, turned round."""
    queries = [[] for _ in range(length)]
    for x, keys in enumerate(seen):
        for y in keys:
            queries[y].append(x // dilation)
    return queries


def library_bounds(axis):
    length, _, _, dilation, _ = axis
    described = Axis(*axis)
    position = np.arange(length)
    group_length = described.group_length(position % dilation)
    inverse_bounds = described.queries_of_key(position // dilation, group_length)
    return [np.broadcast_to(b, (length,)).tolist() for b in (*described.window_bounds(), *inverse_bounds)]


def assert_bounds_follow_the_definition(axis, begin, end, query_begin, query_end):
    length, _, _, dilation, _ = axis
    bounds, seen = definition(*axis)
    assert list(zip(begin, end, strict=True)) == bounds, axis
    for y, queries in enumerate(inverse(length, dilation, seen)):
        assert queries == list(range(query_begin[y], query_end[y])), (axis, y)


def test_python_formulas_equal_the_definition_for_every_short_axis():
    count = 0
    for axis in every_axis():
        assert_bounds_follow_the_definition(axis, *library_bounds(axis))
        count += 1
    assert count > 7500


@pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")
def test_cpp_header_equals_the_definition_for_every_short_axis():
    for axis in every_axis():
        assert_bounds_follow_the_definition(axis, *(list(b) for b in native.cpu.window_bounds(*axis)))


@pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")
def test_cpp_header_equals_python_on_long_axes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        length, dilation = int(rng.integers(500, 3000)), int(rng.integers(1, 12))
        window = int(rng.integers(1, length // dilation + 1))
        axis = (length, window, int(rng.integers(1, window + 1)), dilation, bool(rng.integers(2)))
        for cpp, python in zip(native.cpu.window_bounds(*axis), library_bounds(axis), strict=True):
            np.testing.assert_array_equal(cpp, python, err_msg=str(axis))


def test_every_query_is_in_its_own_window_and_every_key_is_seen():
    for axis in every_axis(16):
        mask = Axis(*axis).mask()
        assert mask.diagonal().all(), axis
        assert mask.any(0).all(), axis
        if not axis[-1]:
            assert (mask.sum(1) == axis[1]).all(), axis


def test_windows_and_their_inverses_are_monotone():
    for axis in every_axis(16):
        length, _, _, dilation, _ = axis
        for bounds in library_bounds(axis):
            for group in range(dilation):
                assert (np.diff(np.asarray(bounds)[group::dilation]) >= 0).all(), axis


def test_mask_of_an_axis_is_the_definition():
    for axis in every_axis(10):
        np.testing.assert_array_equal(Axis(*axis).mask(), oracle.axis_mask(*axis), err_msg=str(axis))


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_special_cases_have_their_well_known_masks(length):
    whole = Axis(length, length, 1, 1, False).mask()
    assert whole.all()
    causal = Axis(length, length, 1, 1, True).mask()
    np.testing.assert_array_equal(causal, np.tril(np.ones((length, length), bool)))
    np.testing.assert_array_equal(Axis(length, 1, 1, 1, False).mask(), np.eye(length, dtype=bool))
    if length == 12:
        block = np.arange(length) // 4
        np.testing.assert_array_equal(Axis(length, 4, 4, 1, False).mask(), block[:, None] == block[None, :])


def test_even_windows_reach_one_key_further_left():
    begin, end = Axis(20, 6, 1, 1, False).window_bounds()
    assert (begin[10], end[10]) == (7, 13)


def test_a_window_at_a_border_shifts_and_does_not_shrink():
    begin, end = Axis(9, 5, 1, 1, False).window_bounds()
    assert begin.tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4]
    assert (end - begin == 5).all()


def test_scalars_hold_for_every_axis():
    made = Neighborhood.make(3, 2, [1, 2], True, rank=2)
    assert made == Neighborhood((3, 3), (2, 2), (1, 2), (True, True))
    assert hash(made) == hash(Neighborhood.make((3, 3), (2, 2), (1, 2), (True, True)))
    assert Neighborhood.make(5).rank == 1
    assert Neighborhood.make(np.int64(5)).kernel_size == (5,)


def test_neighborhood_is_frozen():
    made = Neighborhood.make((3, 5))
    with pytest.raises(AttributeError):
        made.kernel_size = (1, 1)


def test_counts_of_a_neighborhood():
    made = Neighborhood.make((3, 4), is_causal=(False, True))
    assert made.window_size == 12
    assert made.bias_shape == (5, 7)
    for grid in itertools.product((3, 5), (4, 6)):
        pairs = oracle.mask(grid, made.kernel_size, made.stride, made.dilation, made.is_causal).sum()
        assert made.pairs(grid) == pairs


def test_an_empty_axis_always_fits():
    Neighborhood.make((7, 7), dilation=3).check_grid((0, 21))
    with pytest.raises(ValueError, match="axis 1"):
        Neighborhood.make((7, 7), dilation=3).check_grid((0, 20))
