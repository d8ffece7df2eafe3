"""How a problem is cut into blocks: tiles of queries, the slab of keys each one sees, and how many run in one step.

Everything here is numpy, computed while tracing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from jax_natten.neighborhood import Axis, Neighborhood

# Scores alive in one step. Bounds the memory beyond operands and results to a few dozen MiB.
STEP_SCORES = 2**22
# The cost of one step of the loop over blocks and of one score's softmax, both in multiply-adds.
STEP_COST = 2**21
SCORE_COST = 64


@dataclasses.dataclass(frozen=True, eq=False)
class TiledAxis:
    """One axis of the grid, split into dilation groups and cut into tiles of queries.

    Attributes:
      axis: length and window.
      length: in-group positions of the longest dilation group.
      tile, tiles: queries in a tile, and tiles; the last tile may reach past ``length``.
      slab: keys that a tile sees at most, over all tiles and groups.
      start: int32 ``[tiles]``, first in-group key of the slab of every tile.
      begin, end: int32 ``[1 or 2, tiles, tile]``, in-group windows of every query: row 0 in the long dilation groups,
        row 1 in the groups that are one position shorter. Padding has the empty window ``[0, 0)``.
    """

    axis: Axis
    length: int
    tile: int
    tiles: int
    slab: int
    start: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    @property
    def long_groups(self) -> int:
        """Number of dilation groups that row 0 of the windows describes."""
        return self.axis.length % self.axis.dilation or self.axis.dilation

    @property
    def bias_start(self) -> np.ndarray:
        """``[tiles]``: entry of the bias that belongs to the first key of the slab and the last query of the tile."""
        return self.start - (np.arange(self.tiles) + 1) * self.tile + self.axis.window


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A whole problem cut into blocks.

    One step handles a tile of queries for ``batch_block`` batch elements, ``group_block`` dilation groups and
    ``head_block`` key and value heads, which divide their axes.
    """

    axes: tuple[TiledAxis, ...]
    batch_block: int
    group_block: int
    head_block: int


@functools.lru_cache(maxsize=256)
def choose(
    neighborhood: Neighborhood,
    grid: tuple[int, ...],
    batch: int,
    kv_heads: int,
    group: int,
    channels: int,
    additional: int,
) -> Tiling:
    """The cheapest tiling whose steps stay within ``STEP_SCORES`` (or hold a single query position).

    Args:
      neighborhood: the window.
      grid: lengths of its axes, none of them zero.
      batch: batch elements that may share a step.
      kv_heads: key and value heads.
      group: query heads per key and value head.
      channels: head dims that a query-key pair is multiplied with, D + Dv.
      additional: additional keys.
    """
    padding = (Axis(1, 1, 1, 1, False),) * (3 - neighborhood.rank)
    axes = padding + neighborhood.axes(grid)
    windows = [_windows(axis) for axis in axes]
    tiles = [_tile_lengths(len(begin[0])) for begin, _ in windows]
    counts = [[-(-len(begin[0]) // t) for t in lengths] for (begin, _), lengths in zip(windows, tiles)]
    slabs = [[_slab(*bounds, t)[1] for t in lengths] for bounds, lengths in zip(windows, tiles)]

    queries, keys, blocks = (_outer(values) for values in (tiles, slabs, counts))
    dilation_groups = math.prod(axis.dilation for axis in axes)
    lanes = batch * dilation_groups * kv_heads
    scores = group * queries * (keys + additional)
    # Lanes beyond one are only worth their memory together with the slabs they load.
    live = scores + (group * queries + keys) * channels
    lanes_per_step = np.clip(STEP_SCORES // live, 1, lanes)
    work = scores * (channels + SCORE_COST) + keys * channels
    cost = blocks * (lanes * work + np.ceil(lanes / lanes_per_step) * STEP_COST)
    cost = np.where((scores <= STEP_SCORES) | (queries == 1), cost, np.inf)
    best = np.unravel_index(np.argmin(cost), cost.shape)
    limit = int(lanes_per_step[best])
    return Tiling(
        tuple(_tiled(axis, *bounds, lengths[i]) for axis, bounds, lengths, i in zip(axes, windows, tiles, best)),
        *_lane_blocks(limit, batch, dilation_groups, kv_heads),
    )


def _windows(axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """In-group windows ``(begin, end)`` of every position, ``[1 or 2, length]``: of the long groups and the short."""
    longest = axis.group_length(0)
    lengths = [longest] if axis.length % axis.dilation == 0 else [longest, longest - 1]
    begin, end = np.zeros((2, len(lengths), longest), np.int64)
    for row, length in enumerate(lengths):
        begin[row, :length], end[row, :length] = axis.window_of_query(np.arange(length), length)
    return begin, end


def _slab(begin: np.ndarray, end: np.ndarray, tile: int) -> tuple[np.ndarray, int]:
    """First key that each tile of queries sees, and the number of keys that the widest of them spans."""
    edges = np.arange(0, begin.shape[1], tile)
    first = np.where(begin < end, begin, np.iinfo(begin.dtype).max).min(0)
    start = np.minimum.reduceat(first, edges)
    extent = int((np.maximum.reduceat(end.max(0), edges) - start).max())
    return np.minimum(start, begin.shape[1] - extent), extent


def _tiled(axis: Axis, begin: np.ndarray, end: np.ndarray, tile: int) -> TiledAxis:
    rows, length = begin.shape
    tiles = -(-length // tile)
    start, slab = _slab(begin, end, tile)
    padding = ((0, 0), (0, tiles * tile - length))
    begin, end = (np.pad(x, padding).astype(np.int32).reshape(rows, tiles, tile) for x in (begin, end))
    return TiledAxis(axis, length, tile, tiles, slab, start.astype(np.int32), begin, end)


def _tile_lengths(length: int) -> list[int]:
    """Tile lengths to consider: about three per octave, each the smallest for its number of tiles."""
    wanted = {min(round(2 ** (i / 3)), length) for i in range(3 * length.bit_length() + 1)}
    return sorted({-(-length // -(-length // t)) for t in wanted})


def _outer(values: list[list[int]]) -> np.ndarray:
    """Products of one entry per axis, for every combination."""
    a, b, c = (np.asarray(v, np.float64) for v in values)
    return a[:, None, None] * b[:, None] * c


def _lane_blocks(limit: int, batch: int, groups: int, heads: int) -> tuple[int, int, int]:
    """Divisors of the three numbers with the largest product within the limit; heads fill up first."""
    choices = itertools.product(*(_divisors(n) for n in (heads, batch, groups)))
    head, instance, group = max((c for c in choices if math.prod(c) <= limit), key=lambda c: (math.prod(c), c))
    return instance, group, head


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
