"""Tiles of the Hopper kernels ("sm90"): asking for them, and what the cost model expects of them.

Everything here asks the compiled library (``cuda/sm90/choose.h``), which needs neither CUDA nor a GPU for it: the tile
geometry, the limits of the kernels and the cost model are written once, in C++. Counts of tiles are exact; times are
those of a model fitted to measurements on an H100.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_natten import native
from jax_natten.neighborhood import MAX_RANK, Neighborhood

if TYPE_CHECKING:
    from jax_natten.dispatch import Problem

# Structures of kernels, at the place of their number in the wire format (cuda/sm90/plan.h).
STRUCTURES = ("wide", "warp", "middle")
_MISSING = "needs the compiled library of jax_natten, which was not built"


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a fused forward is cut into pieces of work. Immutable and hashable.

    Which tiles fit depends on the case; those that do not are refused with the reason.

    Attributes:
      structure: "wide", two warpgroups of up to 64 queries each (large windows); "middle", one such warpgroup, two or
        three to a multiprocessor (windows of middling size, head dims up to 128); or "warp", up to 16 queries per warp
        (small windows, head dims up to 64).
      query_tile: queries that one thread block works on, per grid axis.
      query_part: of those, queries of one warpgroup or warp, per grid axis.
      key_tile: keys that are loaded together, per grid axis.
      heads: "warp" only: neighboring heads in one box of keys, 1 or 2.
      slots, stages: "warp" only: boxes of queries and of keys in shared memory at once, 1 to 4.
    """

    structure: str
    query_tile: tuple[int, ...]
    query_part: tuple[int, ...]
    key_tile: tuple[int, ...]
    heads: int = 1
    slots: int = 2
    stages: int = 2

    def __post_init__(self):
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure must be among {', '.join(STRUCTURES)}; got {self.structure!r}")
        for name in ("query_tile", "query_part", "key_tile"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        rank = len(self.query_tile)
        if not 1 <= rank <= MAX_RANK or len(self.query_part) != rank or len(self.key_tile) != rank:
            raise ValueError(
                "query_tile, query_part and key_tile must have one entry per grid axis; got "
                f"{self.query_tile}, {self.query_part} and {self.key_tile}"
            )
        for name in ("heads", "slots", "stages"):
            object.__setattr__(self, name, _integers(name, (getattr(self, name),))[0])

    def fields(self) -> list[int]:
        """The numbers that a custom call carries, in the order of ``cuda/sm90/plan.h``."""
        front = [1] * (MAX_RANK - len(self.query_tile))
        padded = [x for tile in (self.query_tile, self.query_part, self.key_tile) for x in (*front, *tile)]
        return [STRUCTURES.index(self.structure), *padded, self.heads, self.slots, self.stages]

    @classmethod
    def from_fields(cls, fields: Sequence[int], rank: int) -> Tiles:
        """The inverse of :meth:`fields`."""
        query_tile, query_part, key_tile = (tuple(fields[n + MAX_RANK - rank : n + MAX_RANK]) for n in (1, 4, 7))
        return cls(STRUCTURES[fields[0]], query_tile, query_part, key_tile, *fields[10:])


@dataclasses.dataclass(frozen=True)
class PassTiles:
    """How one of the two passes of the fused backward is cut.

    Rows are what stays in shared memory, columns what streams past: queries and keys in the pass that computes the
    gradient of the queries, keys and queries in the one that computes those of the keys and values.

    Attributes:
      structure: "large" or "small", the variant for small windows.
      query_tile: rows that one thread block works on, per grid axis.
      query_part: of those, rows of one warpgroup.
      key_tile: columns that are loaded together.
    """

    structure: str
    query_tile: tuple[int, ...]
    query_part: tuple[int, ...]
    key_tile: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What the cost model expects of tiles. Counts are of all heads and batch elements.

    Attributes:
      tiles: the tiles. Of a pass of the backward read, below, row for query and column for key.
      seconds: expected time of the kernel.
      compute, shared_memory, memory: seconds that products and softmax need, that copies of keys and values to shared
        memory need, and to read inputs and write outputs once; ``bound`` names the largest.
      query_tiles: tiles of queries.
      visited: key tiles that are loaded.
      computed: key tiles that warpgroups or warps compute.
      masked: of those, the ones that the edge of a window crosses.
      pairs: query-key pairs inside windows.
      computed_pairs: pairs that are computed, padding included.
      dense_seconds: expected time of attention without windows.
    """

    tiles: Tiles | PassTiles
    seconds: float
    compute: float
    shared_memory: float
    memory: float
    query_tiles: float
    visited: float
    computed: float
    masked: float
    pairs: float
    computed_pairs: float
    dense_seconds: float

    @property
    def useful_fraction(self) -> float:
        """Pairs inside windows, of those that are computed."""
        return self.pairs / self.computed_pairs

    @property
    def masked_fraction(self) -> float:
        """Tiles under a mask, of those that are computed."""
        return self.masked / self.computed

    @property
    def speedup(self) -> float:
        """Over attention without windows, by the same model."""
        return self.dense_seconds / self.seconds

    @property
    def bound(self) -> str:
        times = {"compute": self.compute, "shared memory": self.shared_memory, "memory": self.memory}
        return max(times, key=lambda name: times[name])


def why_not(problem: Problem, tiles: Tiles | None = None) -> str | None:
    """Why the Hopper kernels do not take a problem (or take it, but not with these tiles); None if they do."""
    if native.model is None:
        return _MISSING
    if tiles is not None and len(tiles.query_tile) != problem.neighborhood.rank:
        return f"tiles must have {problem.neighborhood.rank} entries, one per grid axis"
    described = _described(problem)
    try:
        if tiles is None:
            return native.model.sm90_why_not(*described, problem.operation)
        return native.model.sm90_why_not_tiles(*described, tiles.fields())
    except ValueError as error:  # sizes that no kernel could be told
        return str(error)


def why_not_sm80(problem: Problem) -> str | None:
    """Why the sm_80 kernels do not take a problem, of any operation; None if they do."""
    if native.model is None:
        return _MISSING
    try:
        return native.model.sm80_why_not(*_described(problem), problem.operation)
    except ValueError as error:  # sizes that no kernel could be told
        return str(error)


def simulate(
    problem: Problem, tiles: Tiles | None = None, *, processors: int | None = None, count: int = 1
) -> list[Simulation]:
    """What the cost model expects of a problem, for given tiles or for the ``count`` best ones, best first.

    Args:
      problem: a fused forward.
      tiles: tiles to be simulated instead of the model's choice.
      processors: multiprocessors of the GPU, by default those of an H100.
      count: how many tiles at most.

    Raises:
      RuntimeError: the library was not built.
      ValueError: no Hopper kernel takes the problem, or not with these tiles.
    """
    library = _library()
    reason = why_not(problem, tiles)
    if reason is not None:
        raise ValueError(f"cannot be simulated: 'sm90' {reason}")
    processors = library.sm90_processors if processors is None else processors
    choice = [tiles] if tiles is not None else _rank(problem, processors, count)
    dense = _dense(problem)
    dense_seconds = _predict(dense, _rank(dense, processors, 1)[0], processors)["seconds"]
    return [Simulation(t, dense_seconds=dense_seconds, **_predict(problem, t, processors)) for t in choice]


def simulate_backward(
    problem: Problem, *, processors: int | None = None, count: int = 1
) -> dict[str, list[Simulation]]:
    """What the cost model expects of the two passes of a backward, for the ``count`` best tiles of each.

    Args:
      problem: a fused backward.
      processors: multiprocessors of the GPU, by default those of an H100.
      count: how many tiles at most, per pass.

    Returns:
      By pass, "query" and "key"; best first. The time of a backward is the sum of its passes.

    Raises:
      RuntimeError: the library was not built.
      ValueError: no Hopper kernel takes the problem.
    """
    library = _library()
    reason = why_not(problem)
    if reason is not None:
        raise ValueError(f"cannot be simulated: 'sm90' {reason}")
    processors = library.sm90_processors if processors is None else processors
    rank = problem.neighborhood.rank
    dense = _dense(problem)
    found = {}
    for name in ("query", "key"):
        ranked = library.sm90_rank_pass(*_described(problem), name, processors, count)
        if not ranked:
            raise ValueError("cannot be simulated: there is nothing to compute")
        ((_, of_dense),) = library.sm90_rank_pass(*_described(dense), name, processors, 1)
        found[name] = [
            Simulation(_pass_tiles(fields, rank), dense_seconds=of_dense["seconds"], **expected)
            for fields, expected in ranked
        ]
    return found


def _pass_tiles(fields: Sequence[int], rank: int) -> PassTiles:
    small, *sizes = fields
    row_tile, row_part, column_tile = (tuple(sizes[n + MAX_RANK - rank : n + MAX_RANK]) for n in (0, 3, 6))
    return PassTiles("small" if small else "large", row_tile, row_part, column_tile)


def _rank(problem: Problem, processors: int, count: int) -> list[Tiles]:
    ranked = _library().sm90_rank(*_described(problem), processors, count)
    if not ranked:
        raise ValueError("cannot be simulated: there is nothing to compute")
    return [Tiles.from_fields(fields, problem.neighborhood.rank) for fields in ranked]


def _predict(problem: Problem, tiles: Tiles, processors: int) -> dict[str, float]:
    return _library().sm90_predict(*_described(problem), tiles.fields(), processors)


def _library() -> Any:
    if native.model is None:
        raise RuntimeError(f"the simulator {_MISSING}")
    return native.model


def _dense(problem: Problem) -> Problem:
    """The same arrays without windows, as one axis."""
    positions = int(np.prod(problem.grid))
    window = Neighborhood.make((positions,))
    return dataclasses.replace(problem, neighborhood=window, grid=(positions,))


def _described(problem: Problem) -> tuple:
    window = problem.neighborhood
    return (
        np.dtype(problem.dtype).name,
        problem.batch,
        problem.heads,
        problem.kv_heads,
        problem.head_dim,
        problem.value_dim,
        problem.additional_keys,
        problem.has_bias,
        problem.grid or (0,) * window.rank,  # not known yet: no limit is hit
        window.kernel_size,
        window.stride,
        window.dilation,
        window.is_causal,
    )


def _integers(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or not all(_is_positive_integer(v) for v in values):
        raise ValueError(f"{name} of tiles must hold integers of at least 1; got {values!r}")
    return tuple(int(v) for v in values)


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1
