"""Plans of the halo exchange: which keys a shard needs from its neighbors, and in which slabs it attends.

A *shard* is the run of positions that one device holds of a grid axis. A *part* is a run of its queries, and the *slab*
of keys that they are attended from by a single-device call. The slab must show each of these queries the window that it
has on the whole grid. Windows shift at the borders of the grid, and strides and dilation count from its origin, so
slabs start at multiples of ``stride * dilation`` and end at the border wherever the whole slab would run past it.

One program runs on all devices, so every size is the same on all of them; only the starts of the slabs differ.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from jax_natten.neighborhood import Axis


@dataclasses.dataclass(frozen=True)
class Part:
    """Queries ``[begin, end)`` of every shard, and the slab that they are attended from.

    Attributes:
      begin, end: positions in the shard.
      size: positions of the slab.
      offsets: for every device the start of its slab, counted from the start of its shard.
    """

    begin: int
    end: int
    size: int
    offsets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AxisPlan:
    """How one grid axis is exchanged and attended.

    Attributes:
      shard: positions per device.
      left, right: halo widths: positions that a device receives from the devices before and after it.
      whole: all queries of the shard in one part; its slab reaches into the halo.
      interior: the queries whose windows lie inside the shard on every device; None if there are none.
      border: the other queries, before and after the interior; their slabs reach into the halo.
    """

    shard: int
    left: int
    right: int
    whole: Part
    interior: Part | None
    border: tuple[Part, ...]

    @property
    def extended(self) -> int:
        """Positions of a shard with its halo."""
        return self.left + self.shard + self.right


def received(plans: Sequence[AxisPlan]) -> int:
    """Grid positions that a device receives, corners included: what it moves per array, head and channel."""
    return math.prod(plan.extended for plan in plans) - math.prod(plan.shard for plan in plans)


Box = tuple[Part, ...]


def cover(plans: Sequence[AxisPlan], split: bool) -> tuple[Box, list[Box]]:
    """Boxes of queries that hold every query of a shard once, each given by its part of every axis.

    Returns:
      The interior and the boxes of the border: those before and after the interior of one axis span the interior of the
      axes before and the whole of the axes after that axis. Without ``split``, or if an axis has no interior, one box
      and no others.
    """
    whole = tuple(plan.whole for plan in plans)
    interior = tuple(plan.interior for plan in plans if plan.interior is not None)
    if not split or len(interior) < len(plans):
        return whole, []
    return interior, [
        (*interior[:axis], part, *whole[axis + 1 :]) for axis, plan in enumerate(plans) for part in plan.border
    ]


def attended(plans: Sequence[AxisPlan], split: bool) -> int:
    """Queries that a device computes: the positions of all slabs."""
    first, borders = cover(plans, split)
    return sum(math.prod(part.size for part in box) for box in (first, *borders))


@functools.cache
def plan_axis(axis: Axis, shards: int, shard: int) -> AxisPlan:
    """Plans the exchange of one grid axis.

    Args:
      axis: the axis of the whole grid.
      shards: number of devices along it.
      shard: positions per device, ``shards * shard >= axis.length``; what exceeds the length is padding at the end.

    Raises:
      ValueError: the shards do not hold the axis.
    """
    if not shards * shard >= axis.length > 0:
        raise ValueError(f"{shards} shards of {shard} positions do not hold a grid axis of length {axis.length}")
    left = right = 0
    inside = np.ones(shard, bool)  # on every device; padding needs no keys
    for begin in range(0, axis.length, shard):
        positions = np.arange(begin, min(begin + shard, axis.length))
        first, last = _reach(axis, positions)
        left = max(left, begin - int(first.min()))
        right = max(right, int(last.max()) + 1 - (begin + shard))
        inside[: len(positions)] &= (first >= begin) & (last < begin + shard)
    part = functools.partial(_part, axis, shards, shard)
    whole = part(0, shard)
    if not (left or right):
        return AxisPlan(shard, 0, 0, whole, whole, ())
    begin, end = _longest_run(inside)
    if begin == end:
        return AxisPlan(shard, left, right, whole, None, ())
    border = tuple(part(*run) for run in ((0, begin), (end, shard)) if run[0] < run[1])
    return AxisPlan(shard, left, right, whole, part(begin, end), border)


def _windows(axis: Axis, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In-group windows ``(begin, end)`` of these positions of an axis."""
    return axis.window_of_query(positions // axis.dilation, axis.group_length(positions % axis.dilation))


def _reach(axis: Axis, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the first and of the last key that these positions see."""
    begin, end = _windows(axis, positions)
    group = positions % axis.dilation
    return group + begin * axis.dilation, group + (end - 1) * axis.dilation


def _part(axis: Axis, shards: int, shard: int, begin: int, end: int) -> Part:
    """Queries ``[begin, end)`` of every shard in the smallest slabs that show them their windows."""
    step = axis.stride * axis.dilation
    runs: list[np.ndarray] = []
    starts: list[int | None] = []
    size = axis.window * axis.dilation
    for device in range(shards):
        run = np.arange(*(min(device * shard + position, axis.length) for position in (begin, end)))
        start = None
        if len(run):
            first, last = _reach(axis, run)
            start = int(first.min()) // step * step
            size = max(size, int(last.max()) + 1 - start)
        runs.append(run)
        starts.append(start)
    # Of the sizes, those that let a slab at a multiple of the step end at the border of the grid.
    size += (axis.length - size) % step
    while True:
        size = min(size, axis.length)
        clamped = [None if start is None else min(start, axis.length - size) for start in starts]
        if all(start is None or _same_windows(axis, run, start, size) for run, start in zip(runs, clamped)):
            break
        size += step
    offsets = [None if start is None else start - device * shard for device, start in enumerate(clamped)]
    # A device whose queries are all padding takes any slab.
    spare = next(offset for offset in offsets if offset is not None)
    return Part(begin, end, size, tuple(spare if offset is None else offset for offset in offsets))


def _same_windows(axis: Axis, queries: np.ndarray, start: int, size: int) -> bool:
    """Whether these global positions see on the slab what they see on the whole axis."""
    if queries[0] < start or queries[-1] >= start + size:
        return False
    whole, slab = _windows(axis, queries), _windows(dataclasses.replace(axis, length=size), queries - start)
    return all(np.array_equal(w, s + start // axis.dilation) for w, s in zip(whole, slab))


def _longest_run(mask: np.ndarray) -> tuple[int, int]:
    """Bounds of the longest run of True; ``(0, 0)`` if there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return max(((int(b), int(e)) for b, e in edges.reshape(-1, 2)), key=lambda run: run[1] - run[0], default=(0, 0))
