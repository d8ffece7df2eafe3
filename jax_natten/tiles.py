"""Tiles of the tensor-core kernels, "sm90" and "sm80": asking for them, and what is expected of them.

Everything here asks the compiled library (``cuda/sm90/choose.h``, ``cuda/sm80/forward_rank.h``), which needs neither
CUDA nor a GPU for it: the tile geometry, the limits of the kernels and their costs are written once, in C++. Counts of
tiles are exact. Times are those of a model of "sm90" that was fitted to measurements on an H100; "sm80" has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_natten import native
from jax_natten.neighborhood import MAX_RANK, Neighborhood

if TYPE_CHECKING:
    from jax_natten.dispatch import Problem

# Structures of kernels by implementation, at the place of their number in the wire format (cuda/sm90/plan.h,
# cuda/sm80/plan.h).
STRUCTURES = {"sm90": ("wide", "warp", "middle"), "sm80": ("sm80_tiles", "sm80_small")}
# The implementations that can be told their tiles, and the attribute of the custom call that tells them.
ATTRIBUTES = {"sm90": "tiles", "sm80": "sm80_tiles"}
# Fields of Tiles that few structures have.
_OWN_FIELDS = {"heads": ("warp",), "slots": ("warp",), "stages": ("warp",), "rows": ("sm80_tiles",)}
_MISSING = "needs the compiled library of jax_natten, which was not built"


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a fused forward is cut into pieces of work, for one implementation. Immutable and hashable.

    Which tiles fit depends on the case; those that do not are refused with the reason.

    Attributes:
      structure: of "sm90": "wide", two warpgroups of up to 64 queries each (large windows); "middle", one such
        warpgroup, two or three to a multiprocessor (windows of middling size, head dims up to 128); or "warp", up to 16
        queries per warp (small windows, head dims up to 64). Of "sm80": "sm80_tiles", for all windows; or "sm80_small",
        four warps of up to 16 queries each (windows of up to 112 keys, float16 and bfloat16, head dims up to 64).
      query_tile: queries that one thread block works on, per grid axis.
      query_part: of those, queries of one warpgroup or warp, per grid axis.
      key_tile: keys that are loaded together, per grid axis. "sm80_small" has none: it loads all that a query tile
        sees.
      heads: "warp" only: neighboring heads in one box of keys, 1 or 2.
      slots, stages: "warp" only: boxes of queries and of keys in shared memory at once, 1 to 4.
      rows: "sm80_tiles" only: queries that the kernel is compiled for. 64, four warps of up to 16 queries each; 128, of
        up to 32 (float16 and bfloat16, head dims up to 128, no additional keys and no bias); or, in float32 with head
        dims over 192, 32: two warps of up to 16.
    """

    structure: str
    query_tile: tuple[int, ...]
    query_part: tuple[int, ...]
    key_tile: tuple[int, ...] = ()
    heads: int = 1
    slots: int = 2
    stages: int = 2
    rows: int = 64

    def __post_init__(self):
        every = [name for names in STRUCTURES.values() for name in names]
        if self.structure not in every:
            raise ValueError(f"structure must be among {', '.join(every)}; got {self.structure!r}")
        for name in ("query_tile", "query_part", "key_tile"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        rank = len(self.query_tile)
        if self.structure == "sm80_small":
            if self.key_tile not in ((), (1,) * rank):
                raise ValueError(f"key_tile must be left out for structure sm80_small; got {self.key_tile}")
            object.__setattr__(self, "key_tile", (1,) * rank)
        if not 1 <= rank <= MAX_RANK or len(self.query_part) != rank or len(self.key_tile) != rank:
            raise ValueError(
                "query_tile, query_part and key_tile must have one entry per grid axis; got "
                f"{self.query_tile}, {self.query_part} and {self.key_tile}"
            )
        for field in dataclasses.fields(self):
            if field.name not in _OWN_FIELDS:
                continue
            (value,) = _integers(field.name, (getattr(self, field.name),))
            if value != field.default and self.structure not in _OWN_FIELDS[field.name]:
                owners = ", ".join(_OWN_FIELDS[field.name])
                raise ValueError(f"{field.name} is for structure {owners}; got {value} for {self.structure}")
            object.__setattr__(self, field.name, value)

    @property
    def implementation(self) -> str:
        """The implementation that they are for, "sm90" or "sm80"."""
        return next(name for name, structures in STRUCTURES.items() if self.structure in structures)

    def fields(self) -> list[int]:
        """The numbers that a custom call carries, in the order of ``plan.h`` of the implementation."""
        front = [1] * (MAX_RANK - len(self.query_tile))
        padded = [x for tile in (self.query_tile, self.query_part, self.key_tile) for x in (*front, *tile)]
        structure = STRUCTURES[self.implementation].index(self.structure)
        if self.implementation == "sm80":
            return [structure, self.rows, *padded]
        return [structure, *padded, self.heads, self.slots, self.stages]

    @classmethod
    def from_fields(cls, implementation: str, fields: Sequence[int], rank: int) -> Tiles:
        """The inverse of :meth:`fields`."""
        own: dict[str, int] = {}
        if implementation == "sm80":
            structure, own["rows"], *sizes = fields
        else:
            structure, *sizes, own["heads"], own["slots"], own["stages"] = fields
        query_tile, query_part, key_tile = (tuple(sizes[n + MAX_RANK - rank : n + MAX_RANK]) for n in (0, 3, 6))
        return cls(STRUCTURES[implementation][structure], query_tile, query_part, key_tile, **own)


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
class Work:
    """The work that tiles make. Counts are of all heads and batch elements.

    Attributes:
      tiles: the tiles. Of a pass of the backward read, below, row for query and column for key.
      query_tiles: tiles of queries.
      visited: key tiles that are loaded. Of "sm80_small" all that a query tile sees is one.
      computed: key tiles that warpgroups or warps compute.
      masked: of those, the ones that the edge of a window crosses, or that have fewer keys than the kernel computes.
      pairs: query-key pairs inside windows.
      computed_pairs: pairs that are computed, padding included.
      cost: what tiles of a kernel are compared by. Of "sm90" the expected seconds; of "sm80" an estimate, in pairs that
        could be computed in the time: those that are, and as many as masks, copies and idle warps take.
      dense_cost: the cost of attention without windows.
    """

    tiles: Tiles | PassTiles
    query_tiles: float
    visited: float
    computed: float
    masked: float
    pairs: float
    computed_pairs: float
    cost: float
    dense_cost: float

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
        """Over attention without windows, by the same costs."""
        return self.dense_cost / self.cost


@dataclasses.dataclass(frozen=True)
class Simulation(Work):
    """What the cost model of "sm90" expects of tiles.

    Attributes:
      compute, shared_memory, memory: seconds that products and softmax need, that copies of keys and values to shared
        memory need, and to read inputs and write outputs once; ``bound`` names the largest.
    """

    compute: float
    shared_memory: float
    memory: float

    @property
    def seconds(self) -> float:
        """Expected time of the kernel."""
        return self.cost

    @property
    def dense_seconds(self) -> float:
        """Expected time of attention without windows."""
        return self.dense_cost

    @property
    def bound(self) -> str:
        times = {"compute": self.compute, "shared memory": self.shared_memory, "memory": self.memory}
        return max(times, key=lambda name: times[name])


def why_not(implementation: str, problem: Problem) -> str | None:
    """Why the kernels of "sm90" or "sm80" do not take a problem; None if they do. "sm90": a fused one."""
    if native.model is None:
        return _MISSING
    try:
        return _function(implementation, "why_not")(*_described(problem), problem.operation)
    except ValueError as error:  # sizes that no kernel could be told
        return str(error)


def why_not_tiles(problem: Problem, tiles: Tiles) -> str | None:
    """Why the kernels that tiles are for do not take a fused forward, or not with these tiles; None if they do."""
    if native.model is None:
        return _MISSING
    if len(tiles.query_tile) != problem.neighborhood.rank:
        return f"tiles must have {problem.neighborhood.rank} entries, one per grid axis"
    try:
        return _function(tiles.implementation, "why_not_tiles")(*_described(problem), tiles.fields())
    except ValueError as error:
        return str(error)


def runs_on(implementation: str, compute_capability: str) -> bool:
    """Whether the kernels of "sm90" or "sm80" run on a GPU, whose compute capability is like "9.0"."""
    major, _, minor = compute_capability.partition(".")
    return major.isdigit() and minor.isdigit() and _function(implementation, "runs_on")(10 * int(major) + int(minor))


def simulate(
    problem: Problem, tiles: Tiles | None = None, *, processors: int | None = None, count: int = 1
) -> list[Simulation]:
    """What the cost model of "sm90" expects of a problem, for given tiles or for the ``count`` best ones, best first.

    Args:
      problem: a fused forward.
      tiles: tiles to be simulated instead of the model's choice.
      processors: multiprocessors of the GPU, by default those of an H100.
      count: how many tiles at most.

    Raises:
      RuntimeError: the library was not built.
      ValueError: no Hopper kernel takes the problem, or not with these tiles; or they are for another implementation.
    """
    library = _library()
    _check("sm90", problem, tiles)
    processors = library.sm90_processors if processors is None else processors
    choice = [tiles] if tiles is not None else _rank("sm90", problem, processors, count)
    dense = _dense(problem)
    dense_cost = _predict(dense, _rank("sm90", dense, processors, 1)[0], processors)["cost"]
    return [Simulation(t, dense_cost=dense_cost, **_predict(problem, t, processors)) for t in choice]


def simulate_sm80(problem: Problem, tiles: Tiles | None = None, *, count: int = 1) -> list[Work]:
    """The work that a problem makes for "sm80", under given tiles or under ``count`` ones worth trying.

    The default ones are first. How fast the kernels (for small windows; of 64, of 128 rows) get through their work is
    not known, so that they take turns in what follows, each with its cheapest tiles first.

    Args:
      problem: a fused forward.
      tiles: tiles to be simulated instead of these.
      count: how many tiles at most.

    Raises:
      RuntimeError: the library was not built.
      ValueError: "sm80" does not take the problem, or not with these tiles; or they are for another implementation.
    """
    library = _library()
    _check("sm80", problem, tiles)
    choice = [tiles] if tiles is not None else _rank("sm80", problem, count)
    dense = _dense(problem)
    dense_cost = library.sm80_count(*_described(dense), _rank("sm80", dense, 1)[0].fields())["cost"]
    return [Work(t, dense_cost=dense_cost, **library.sm80_count(*_described(problem), t.fields())) for t in choice]


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
    _check("sm90", problem, None)
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
            Simulation(_pass_tiles(fields, rank), dense_cost=of_dense["cost"], **expected)
            for fields, expected in ranked
        ]
    return found


def _pass_tiles(fields: Sequence[int], rank: int) -> PassTiles:
    small, *sizes = fields
    row_tile, row_part, column_tile = (tuple(sizes[n + MAX_RANK - rank : n + MAX_RANK]) for n in (0, 3, 6))
    return PassTiles("small" if small else "large", row_tile, row_part, column_tile)


def _check(implementation: str, problem: Problem, tiles: Tiles | None) -> None:
    if tiles is not None and tiles.implementation != implementation:
        raise ValueError(f"cannot be simulated: {tiles} are not for {implementation!r}")
    reason = why_not(implementation, problem) if tiles is None else why_not_tiles(problem, tiles)
    if reason is not None:
        raise ValueError(f"cannot be simulated: {implementation!r} {reason}")


def _rank(implementation: str, problem: Problem, *arguments: int) -> list[Tiles]:
    ranked = _function(implementation, "rank")(*_described(problem), *arguments)
    if not ranked:
        raise ValueError("cannot be simulated: there is nothing to compute")
    return [Tiles.from_fields(implementation, fields, problem.neighborhood.rank) for fields in ranked]


def _predict(problem: Problem, tiles: Tiles, processors: int) -> dict[str, float]:
    return _library().sm90_predict(*_described(problem), tiles.fields(), processors)


def _function(implementation: str, name: str) -> Callable:
    """A function of the library that each implementation has one of."""
    return getattr(_library(), f"{implementation}_{name}")


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
