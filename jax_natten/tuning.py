"""Measured tuning: times tiles worth trying on the GPU at hand and remembers the fastest on disk.

The cost model of the Hopper kernels ("sm90") chooses within a tenth of the best tiles for most problems; "sm80" chooses
by an estimate. Where that matters, :func:`tune` measures, once per problem, implementation, kind of GPU and version of
the package, and :func:`enable` has programs use what it found. Nothing is ever measured, or looked up, unasked. Forward
only: tiles of the backward, and of the other implementations, cannot be asked for.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_natten import dispatch, tiles, tuned_tiles
from jax_natten.attention import Bools, Ints, neighborhood_attention
from jax_natten.dispatch import Problem
from jax_natten.neighborhood import Neighborhood
from jax_natten.primitives import fused
from jax_natten.tuned_tiles import disable, enable

__all__ = ["Measurement", "Tuned", "disable", "enable", "tune", "tune_problem"]

# A chain of calls lasts about so many seconds; it is run so many times.
SECONDS, FEWEST_CALLS, MOST_CALLS, ROUNDS = 4e-3, 2, 64, 7
# How much faster than the default choice others must be to replace it, lest chance decide.
MARGIN = 0.01


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Tiles, the seconds of a call with them, and the seconds that the cost model expected; None: "sm80" has none."""

    tiles: tiles.Tiles
    seconds: float
    expected: float | None


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What is known of a problem.

    Attributes:
      tiles: the fastest.
      measured: all that were timed, the default choice first; empty if the file was there already.
      path: the file.
    """

    tiles: tiles.Tiles
    measured: tuple[Measurement, ...]
    path: Path


def tune(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    additional_keys: Any = None,
    additional_values: Any = None,
    *,
    rpb: Any = None,
    implementation: str | None = None,
    count: int = 16,
    again: bool = False,
    device: jax.Device | None = None,
) -> Tuned:
    """Finds the fastest tiles of the forward of "sm90" or "sm80" for arrays of these shapes, and stores them.

    Takes seconds. Programs use the result after :func:`enable`. The shapes are those of one device: under ``vmap`` with
    the mapped axis among the batch axes, under sharding those of a shard. How many batch axes there are does not
    matter, only their product.

    Args:
      query, key, value, kernel_size, stride, dilation, is_causal, additional_keys, additional_values, rpb: as for
        :func:`neighborhood_attention`. Arrays may be anything with a shape and a dtype, ``jax.ShapeDtypeStruct`` for
        instance: what is computed with is drawn at random.
      implementation: "sm90" or "sm80"; by default the one that a call runs on this device if none is named.
      count: how many tiles to time, at least 1: those that :func:`jax_natten.tiles.simulate` ranks highest, or
        :func:`jax_natten.tiles.simulate_sm80`.
      again: whether to measure what is stored already.
      device: the GPU to measure on, by default the first one.

    Returns:
      The fastest tiles, and what was measured.

    Raises:
      TypeError, ValueError: as :func:`neighborhood_attention`; or ``implementation`` is neither "sm90" nor "sm80",
        ``count`` is not a positive integer, or ``device`` no GPU; or there is nothing to compute.
      NotImplementedError: the implementation does not take the case; if none is named, neither of them.
      RuntimeError: there is no GPU that it runs on, or the library was not built.
    """
    arrays: list[Any] = [
        None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in (query, key, value, additional_keys, additional_values, rpb)
    ]
    windows = (kernel_size, stride, dilation, is_causal)

    def check(q, k, v, more_keys, more_values, bias):
        more = {"additional_keys": more_keys, "additional_values": more_values, "rpb": bias}
        return neighborhood_attention(q, k, v, *windows, **more)

    jax.eval_shape(check, *arrays)
    query, key, value, additional_keys, _, rpb = arrays
    window = Neighborhood.make(*windows)
    problem = fused.problem("fused_forward", query, key, value, additional_keys, rpb, window)
    return tune_problem(problem, implementation=implementation, count=count, again=again, device=device)


def tune_problem(
    problem: Problem,
    *,
    implementation: str | None = None,
    count: int = 16,
    again: bool = False,
    device: jax.Device | None = None,
) -> Tuned:
    """:func:`tune` for a case as :mod:`jax_natten.dispatch` describes it; of a bias only that there is one is known."""
    if not isinstance(count, int | np.integer) or isinstance(count, bool):
        raise TypeError(f"count must be an integer; got {count!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    device = tuned_tiles.find_gpu(device)
    gpu = tuned_tiles.gpu_name(device)
    implementation = _choose(problem, implementation, gpu)
    known = None if again else tuned_tiles.read(problem, implementation, gpu)
    if known is not None:
        return Tuned(known, (), tuned_tiles.path_of(problem, implementation, gpu))
    expected = _candidates(problem, implementation, int(count), device)
    candidates = list(expected)
    seconds_of_call = expected[candidates[0]]
    if seconds_of_call is None:  # a short chain tells
        (seconds_of_call,) = _measure(problem, candidates[:1], FEWEST_CALLS, device)
    calls = min(max(math.ceil(SECONDS / seconds_of_call), FEWEST_CALLS), MOST_CALLS)
    seconds = _measure(problem, candidates, calls, device)
    measured = tuple(Measurement(asked, took, expected[asked]) for asked, took in zip(candidates, seconds))
    best = min(measured, key=lambda each: each.seconds)
    if best.seconds > (1 - MARGIN) * measured[0].seconds:
        best = measured[0]
    path = tuned_tiles.write(problem, gpu, best.tiles, [dataclasses.asdict(each) for each in measured])
    return Tuned(best.tiles, measured, path)


def _choose(problem: Problem, implementation: str | None, gpu: str) -> str:
    """The implementation to be tuned: as asked for, or the first that runs on the GPU and takes the problem."""
    if implementation not in (None, *tiles.ATTRIBUTES):
        raise ValueError(f"implementation must be among {', '.join(tiles.ATTRIBUTES)}; got {implementation!r}")
    names = tuple(tiles.ATTRIBUTES) if implementation is None else (implementation,)
    running = tuple(name for name in names if tiles.runs_on(name, tuned_tiles.compute_capability(gpu)))
    if not running:
        raise RuntimeError(f"tiles are those of {' and '.join(map(repr, names))}, which cannot run on {gpu}")
    dispatch.check(problem, running)
    return next(name for name in running if dispatch.why_not(name, problem) is None)


def _candidates(
    problem: Problem, implementation: str, count: int, device: jax.Device
) -> dict[tiles.Tiles, float | None]:
    """Tiles to be timed, the default ones first, each with the seconds that a model expects, if there is one."""
    if implementation == "sm80":
        ranked: Sequence[tiles.Work] = tiles.simulate_sm80(problem, count=count)
    else:
        ranked = tiles.simulate(problem, processors=getattr(device, "core_count", None), count=count)
    seconds = {each.tiles: each.seconds if isinstance(each, tiles.Simulation) else None for each in ranked}
    return {asked: expected for asked, expected in seconds.items() if isinstance(asked, tiles.Tiles)}


def _measure(problem: Problem, candidates: Sequence[tiles.Tiles], calls: int, device: jax.Device) -> list[float]:
    """Median seconds of a call with each of the tiles, in chains of calls, each fed by the one before.

    All candidates take turns, so that a change of clocks meets all of them.
    """
    with jax.default_device(device):
        operands = jax.device_put(draw_operands(problem), device)  # committed: programs run there
    window = problem.neighborhood
    windows = (window.kernel_size, window.stride, window.dilation, window.is_causal)

    def chain_of(asked: tiles.Tiles) -> Callable[[], None]:
        def chain(query, key, value, more):
            for _ in range(calls):
                out = neighborhood_attention(
                    query, key, value, *windows, **more, implementation=asked.implementation, tiles=asked
                )
                query = _as_query(out, query)
            return query

        compiled = jax.jit(chain).lower(*operands).compile()
        return lambda: jax.block_until_ready(compiled(*operands))

    runs = [chain_of(asked) for asked in candidates]
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, of_run in zip(runs, times):
            begin = time.perf_counter()
            run()
            of_run.append((time.perf_counter() - begin) / calls)
    return list(map(statistics.median, times))


def _as_query(out: Any, query: jax.Array) -> jax.Array:
    """The output of a call as the query of the next one, also where values have another head dim than keys."""
    if out.shape == query.shape:
        return out
    return jnp.concatenate([out, query[..., out.shape[-1] :]], axis=-1)[..., : query.shape[-1]]


def draw_operands(problem: Problem) -> tuple:
    """Standard normal query, key and value, and a dict of the other arguments."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def draw(*shape, dtype=problem.dtype):
        return jax.random.normal(next(keys), shape, dtype)

    front = (problem.batch, *problem.grid)
    heads = (problem.heads, problem.kv_heads, problem.kv_heads)
    dims = (problem.head_dim, problem.head_dim, problem.value_dim)
    more = {}
    if problem.additional_keys:
        for name, dim in (("additional_keys", problem.head_dim), ("additional_values", problem.value_dim)):
            more[name] = draw(problem.batch, problem.additional_keys, problem.kv_heads, dim)
    if problem.has_bias:
        more["rpb"] = draw(problem.heads, *problem.neighborhood.bias_shape, dtype=jnp.float32)
    return (*(draw(*front, h, dim) for h, dim in zip(heads, dims)), more)
