"""The commands ``simulate``, ``profile`` and ``tune`` of ``python -m jax_natten``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import jax_natten
from jax_natten import dispatch, tiles, tuned_tiles, tuning
from jax_natten.neighborhood import Neighborhood

CALLS = 20  # in a chain that is timed


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """What describes fused attention, with sizes per axis written as 256x256."""
    parser.add_argument("rank", choices=("1d", "2d", "3d"))
    parser.add_argument("grid", type=_sizes, help="positions per axis, e.g. 256x256")
    parser.add_argument("-k", "--kernel-size", type=_sizes, required=True, metavar="KxK")
    parser.add_argument("-s", "--stride", type=_sizes, default=(1,), metavar="SxS")
    parser.add_argument("-d", "--dilation", type=_sizes, default=(1,), metavar="DxD")
    parser.add_argument("--causal", type=_flags, default=(False,), metavar="0x1", help="1 for a causal axis, else 0")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, help="by default as many as --heads")
    parser.add_argument("--dim", type=int, default=128, help="head dimension")
    parser.add_argument("--dtype", default="bfloat16")


def add_tile_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which kernel, and its tiles."""
    parser.add_argument("--backward", action="store_true", help="the backward, instead of the forward")
    parser.add_argument(
        "--tiles",
        metavar="STRUCTURE:QUERYTILE:QUERYPART[:KEYTILE[:HEADS,SLOTS,STAGES|:ROWS]]",
        help="instead of the default choice, e.g. wide:16x8:8x8:16x8 or sm80_tiles:16x8:8x4:8x8:128",
    )


def simulate(arguments: argparse.Namespace) -> int:
    """Prints what is expected of tiles: of "sm90" by its cost model, of "sm80" by counts alone."""
    problem, asked = _problem(arguments), _tiles(arguments)
    if asked is not None and arguments.implementation not in (None, asked.implementation):
        raise ValueError(f"tiles of structure {asked.structure} are for {asked.implementation!r}")
    implementation = arguments.implementation or ("sm90" if asked is None else asked.implementation)
    if implementation == "sm80":
        return _simulate_sm80(problem, asked, arguments)
    if arguments.backward:
        return _simulate_backward(problem, asked, arguments)
    found = tiles.simulate(problem, asked, processors=arguments.processors, count=arguments.count)
    best = found[0]
    print(_describe(problem))
    print("\n".join(_table([("best" if n == 0 and asked is None else "", each) for n, each in enumerate(found)])))
    print(
        f"\n{best.query_tiles:.6g} query tiles; visited: key tiles per query tile. Dense attention: "
        f"{1e3 * best.dense_seconds:.4g} ms. {best.pairs:.4g} pairs in windows, "
        f"{4e-12 * best.pairs * problem.head_dim / best.seconds:.4g} useful TFLOP/s. Counts are exact, "
        "times those of a model of an H100."
    )
    return 0


def _simulate_sm80(problem: dispatch.Problem, asked, arguments: argparse.Namespace) -> int:
    if arguments.backward:
        raise ValueError("of 'sm80' only the forward is simulated")
    if arguments.processors is not None:
        raise ValueError("processors matter to times, and 'sm80' has no model of times")
    found = tiles.simulate_sm80(problem, asked, count=arguments.count)
    print(_describe(problem))
    rows = [["", "tiles", "speed-up", "visited", "useful", "masked"]]
    for n, each in enumerate(found):
        rows.append(["default" if n == 0 and asked is None else "", *_counts(each)])
    print("\n".join(align(rows)))
    print(
        f"\n{found[0].query_tiles:.6g} query tiles; visited: key tiles per query tile. {found[0].pairs:.4g} pairs in "
        "windows. Counts are exact; of times 'sm80' has no model. Speed-up over dense attention: by the pairs that are "
        "computed, and as many as masks, copies and idle warps are estimated to take. Kernels (small windows, of 64 "
        "rows, of 128) take turns, each with its best tiles first: pairs do not tell which is faster."
    )
    return 0


def _simulate_backward(problem: dispatch.Problem, asked, arguments: argparse.Namespace) -> int:
    problem = _backward_of(problem, asked)
    found = tiles.simulate_backward(problem, processors=arguments.processors, count=arguments.count)
    print(_describe(problem))
    names = {"query": "dQ", "key": "dK, dV"}
    rows = [(names[name] if n == 0 else "", each) for name in found for n, each in enumerate(found[name])]
    print("\n".join(_table(rows)))
    best = [each[0] for each in found.values()]
    seconds = sum(each.seconds for each in best)
    print(
        f"\nTwo passes: tiles are of rows, which stay, and of columns, which stream past: of queries and keys, and of "
        f"keys and queries; visited: column tiles per row tile. Best tiles of both: {1e3 * seconds:.4g} ms, "
        f"{10e-12 * best[0].pairs * problem.head_dim / seconds:.4g} useful TFLOP/s; dense attention: "
        f"{1e3 * sum(each.dense_seconds for each in best):.4g} ms. Counts are exact, times those of a model of an H100."
    )
    return 0


def _backward_of(problem: dispatch.Problem, asked) -> dispatch.Problem:
    if asked is not None:
        raise ValueError("tiles are those of a forward; the backward's cannot be asked for")
    return dataclasses.replace(problem, operation="fused_backward")


def _table(found: list[tuple[str, tiles.Simulation]]) -> list[str]:
    rows = [["", "tiles", "time", "speed-up", "visited", "useful", "masked", "bound"]]
    for label, each in found:
        name, *counts = _counts(each)
        rows.append([label, name, f"{1e3 * each.seconds:.4g} ms", *counts, each.bound])
    return align(rows)


def _counts(each: tiles.Work) -> tuple[str, ...]:
    return (
        spell(each.tiles),
        f"{each.speedup:.2f}x",
        f"{each.visited / each.query_tiles:.4g}",
        f"{each.useful_fraction:.1%}",
        f"{each.masked_fraction:.1%}",
    )


def profile(arguments: argparse.Namespace) -> int:
    """Runs a problem on the GPU at hand and prints what it reaches."""
    problem, asked = _problem(arguments), _tiles(arguments)
    if arguments.backward:
        problem = _backward_of(problem, asked)
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if not gpus:
        print("profile needs a GPU; jax has none here: " + ", ".join(map(str, jax.devices())), file=sys.stderr)
        return 1
    requested = dispatch.parse(arguments.implementation.split(",") if arguments.implementation else None)
    dispatch.check(problem, requested)
    dispatch.check_tiles(problem, requested, asked)
    names = dispatch.candidates(problem, "cuda", requested)
    capability = str(getattr(gpus[0], "compute_capability", ""))
    runs = next((n for n in names if n not in tiles.ATTRIBUTES or tiles.runs_on(n, capability)), "none")
    own = dispatch.own_tiles(problem, runs, asked)
    seconds = (_measure_backward if arguments.backward else _measure)(problem, requested, asked)
    flops = 10 if arguments.backward else 4  # per pair and channel: two products, or five
    pairs = problem.batch * problem.heads * problem.neighborhood.pairs(problem.grid)
    rows = [
        ("device", f"{gpus[0].device_kind}, compute capability {capability}"),
        ("implementation", f"{runs} (of {', '.join(names)})"),
        ("time", f"{1e3 * seconds:.4g} ms per call, {CALLS} calls in one jitted function"),
        ("useful", f"{1e-12 * flops * pairs * problem.head_dim / seconds:.4g} TFLOP/s"),
    ]
    if runs == "sm90" and arguments.backward:
        passes = tiles.simulate_backward(problem)
        rows += [(f"tiles of the {name} pass", spell(best.tiles)) for name, (best,) in passes.items()]
        rows.append(("model", f"expects {1e3 * sum(best.seconds for (best,) in passes.values()):.4g} ms"))
    elif runs == "sm90":
        (expected,) = tiles.simulate(problem, own)
        rows += [
            ("structure", expected.tiles.structure),
            ("tiles", spell(expected.tiles)),
            ("bound", f"{expected.bound}; the model expects {1e3 * expected.seconds:.4g} ms"),
        ]
    elif runs == "sm80" and not arguments.backward:
        (work,) = tiles.simulate_sm80(problem, own)
        rows += [("structure", work.tiles.structure), ("tiles", spell(work.tiles))]
    print(_describe(problem))
    print("\n".join(align(rows)))
    return 0


def tune(arguments: argparse.Namespace) -> int:
    """Finds the fastest tiles of a problem on the GPU at hand, stores them and prints what was measured."""
    problem = _problem(arguments)
    found = tuning.tune_problem(
        problem, implementation=arguments.implementation, count=arguments.count, again=arguments.again
    )
    rows = [("", "tiles", "time", "the model expects")]
    for each in found.measured:
        best = "best" if each.tiles == found.tiles else ""
        expected = "no model" if each.expected is None else f"{1e3 * each.expected:.4g} ms"
        rows.append((best, spell(each.tiles), f"{1e3 * each.seconds:.4g} ms", expected))
    print(f"{_describe(problem)}; {found.tiles.implementation}")
    if found.measured:
        print("\n".join(align(rows)))
        (best_seconds,) = (each.seconds for each in found.measured if each.tiles == found.tiles)
        gain = found.measured[0].seconds / best_seconds - 1
        print(f"\n{gain:.1%} faster than the default choice, which is the first one. Stored in {found.path}.")
    else:
        print(f"{spell(found.tiles)} is stored in {found.path}; --again measures anew.")
    print(f"Programs use it after jax_natten.tuning.enable(), or with {tuned_tiles.ENABLED_VARIABLE}=1.")
    return 0


def align(rows) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def spell(asked: tiles.Tiles | tiles.PassTiles) -> str:
    """Tiles as the command line takes them, and those of the backward likewise."""
    query_tile, query_part, key_tile = (
        "x".join(map(str, box)) for box in (asked.query_tile, asked.query_part, asked.key_tile)
    )
    text = f"{asked.structure}:{query_tile}:{query_part}"
    if asked.structure == "sm80_small":
        return text
    text = f"{text}:{key_tile}"
    if isinstance(asked, tiles.PassTiles) or asked.structure not in ("warp", "sm80_tiles"):
        return text
    return f"{text}:{asked.rows if asked.structure == 'sm80_tiles' else f'{asked.heads},{asked.slots},{asked.stages}'}"


def _measure(problem: dispatch.Problem, requested, asked) -> float:
    """Seconds of one call in a chain of calls, each fed by the one before."""
    query, key, value, _ = tuning.draw_operands(problem)

    def chain(query, key, value):
        for _ in range(CALLS):
            query = _attend(problem, requested, asked, query, key, value)
        return query

    return _seconds_per_call(chain, query, key, value)


def _measure_backward(problem: dispatch.Problem, requested, asked) -> float:
    """The same for the backward alone; between the calls cotangents are added, so that they do not fade away."""
    out, pullback = jax.jit(lambda *x: jax.vjp(functools.partial(_attend, problem, requested, asked), *x))(
        *tuning.draw_operands(problem)[:3]
    )

    def chain(pullback, cotangent):
        gradient = cotangent
        for _ in range(CALLS):
            gradient = cotangent + pullback(gradient)[0]
        return gradient

    return _seconds_per_call(chain, pullback, jax.random.normal(jax.random.key(3), out.shape, out.dtype))


def _attend(problem: dispatch.Problem, requested, asked, query, key, value) -> jax.Array:
    window = problem.neighborhood
    return jax_natten.neighborhood_attention(
        query,
        key,
        value,
        window.kernel_size,
        window.stride,
        window.dilation,
        window.is_causal,
        implementation=requested,
        tiles=asked,
    )


def _seconds_per_call(chain, *arguments) -> float:
    jitted, times = jax.jit(chain), []
    for _ in range(6):  # the first one compiles
        begin = time.perf_counter()
        jax.block_until_ready(jitted(*arguments))
        times.append(time.perf_counter() - begin)
    return min(times[1:]) / CALLS


def _tiles(arguments: argparse.Namespace) -> tiles.Tiles | None:
    return None if arguments.tiles is None else parse_tiles(arguments.tiles)


def _problem(arguments: argparse.Namespace) -> dispatch.Problem:
    rank = int(arguments.rank[0])

    def along(name: str) -> tuple:
        values = getattr(arguments, name)
        if len(values) not in (1, rank):
            raise ValueError(f"{name} must have one entry or {rank}; got {values}")
        return values * rank if len(values) == 1 else values

    grid = along("grid")
    window = Neighborhood.make(along("kernel_size"), along("stride"), along("dilation"), along("causal"))
    window.check_grid(grid)
    kv_heads = arguments.heads if arguments.kv_heads is None else arguments.kv_heads
    if min(arguments.batch, arguments.heads, kv_heads, arguments.dim) < 1 or arguments.heads % kv_heads:
        raise ValueError("batch, heads, kv-heads and dim must be positive, and kv-heads divide heads")
    return dispatch.Problem(
        "fused_forward",
        window,
        jnp.dtype(arguments.dtype),
        arguments.heads,
        kv_heads,
        arguments.dim,
        arguments.dim,
        0,
        False,
        arguments.batch,
        grid,
    )


def parse_tiles(text: str) -> tiles.Tiles:
    """The inverse of :func:`spell`."""
    structure, *parts = text.split(":")
    rest = [int(x) for x in parts[3].split(",")] if len(parts) == 4 else []
    names = ("rows",) if structure == "sm80_tiles" else ("heads", "slots", "stages")
    if len(parts) not in (2, 3, 4) or len(rest) > len(names):
        raise ValueError(
            "tiles must be like wide:16x8:8x8:16x8, warp:28x4:4x4:34x10:1,2,2, sm80_tiles:8x8:4x4:8x8:64 or "
            f"sm80_small:8x8:4x4; got {text!r}"
        )
    boxes = [_sizes(part) for part in parts[:3]]
    own: dict[str, Any] = dict(zip(names, rest))
    return tiles.Tiles(structure, boxes[0], boxes[1], boxes[2] if len(boxes) > 2 else (), **own)


def _describe(problem: dispatch.Problem) -> str:
    window = problem.neighborhood
    axes = ", ".join(
        f"{length} (window {k}{f', stride {s}' * (s > 1)}{f', dilation {d}' * (d > 1)}{', causal' * c})"
        for length, k, s, d, c in zip(
            problem.grid, window.kernel_size, window.stride, window.dilation, window.is_causal
        )
    )
    heads = f"{problem.heads}" + f"/{problem.kv_heads}" * (problem.kv_heads != problem.heads)
    density = window.pairs(problem.grid) / math.prod(problem.grid) ** 2
    return (
        f"{axes}; batch {problem.batch}, heads {heads}, head dim {problem.head_dim}, {jnp.dtype(problem.dtype).name}; "
        f"{density:.3%} of dense attention"
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split("x"))


def _flags(text: str) -> tuple[bool, ...]:
    if any(x not in ("0", "1") for x in text.split("x")):
        raise ValueError(text)
    return tuple(x == "1" for x in text.split("x"))
