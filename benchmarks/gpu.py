"""Times implementations on a GPU, fused attention beside what JAX itself offers (stock.py).

    python benchmarks/gpu.py [--groups small unfused] [--only nat_56] [--implementations naive xla] [--dtype bfloat16]
    python benchmarks/gpu.py --groups large small --peers PEERS.csv

A time is that of one more call in a chain of calls inside one jitted function, each fed by the one before: launches
overlap with the work of the call before, as in a model, and what a jitted function costs as such drops out. Rates are
those of the first implementation that has a kernel, named in the table. Useful operations are those of the pairs inside
windows, bandwidth counts every tensor once, and both are given as fractions of the device's peak (tensor cores, dense,
for 16-bit types). "of cuDNN" is the useful rate over that of cuDNN's dense attention, forward or backward, on
`dense16k_d128`, timed in turns with it, since clocks differ between machines and fall under load. JAX's own ways are
timed afterwards; "stock / sm90" is the time of the fastest of them over that of "sm90", and so on. --peers names a CSV
file with the columns problem, peer, and forward_kernel_ms, forward_call_ms, backward_kernel_ms, backward_call_ms; each
peer gets a column with its time. Results are checked in the same run: outputs against float64 on random rows, fused
gradients of one head against those of the direct kernels in float32; outputs of JAX's own ways like ours.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import report
import stock
from report import problems

import jax_natten
from jax_natten import dispatch, tiles
from jax_natten.commands import spell
from jax_natten.primitives import fused as primitives

# Calls of the short chain; and how much longer the long one lasts, about, in seconds, with the fewest and most calls.
SHORT, SECONDS, FEWEST, MOST = 2, 0.01, 4, 48
# What is compared, by group of problems: all that do not take seconds.
IMPLEMENTATIONS = {
    "large": ("sm90", "sm80"),
    "small": ("sm90", "sm80", "naive"),
    "unfused": ("sm80", "naive"),
}
# Vendor's figures by jax.Device.device_kind: bytes per second, and operations per second by bytes of the dtype.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": (2.04e12, {2: 312e12, 4: 19.5e12, 8: 9.7e12}),
    "NVIDIA H100 80GB HBM3": (3.35e12, {2: 989e12, 4: 66.9e12, 8: 33.5e12}),
    "NVIDIA H200": (4.8e12, {2: 989e12, 4: 66.9e12, 8: 33.5e12}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="*", default=[*IMPLEMENTATIONS], choices=[*IMPLEMENTATIONS])
    parser.add_argument("--only", nargs="*", help="names of problems in tests/problems.py")
    parser.add_argument("--implementations", nargs="*", help=f"by default {IMPLEMENTATIONS}")
    parser.add_argument("--forward-only", action="store_true", help="leave gradients out")
    parser.add_argument("--ours-only", action="store_true", help="leave out JAX's own ways, most of the time")
    parser.add_argument("--peers", type=Path, help="CSV file of other libraries' times on this GPU model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows = []
    peers = read_peers(arguments.peers)
    try:
        for line in compare(arguments):
            line |= {f"{peer} ms": time for peer, time in peers.get((line["problem"], line["direction"]), {}).items()}
            print(line, flush=True)
            rows.append(line)
    except KeyboardInterrupt:
        print("interrupted: what has been measured follows")
    name = "_".join([jax.devices()[0].device_kind.lower().replace(" ", "_"), arguments.dtype])
    report.publish(rows, arguments.csv or report.ROOT / "results" / f"{name}.csv")


def compare(arguments):
    """The rows of the table."""
    tables = {"small": problems.SMALL, "unfused": problems.UNFUSED, "large": problems.LARGE}
    yardstick = None if arguments.groups == ["unfused"] else find_yardstick(arguments.dtype)
    for group in arguments.groups:
        rows = compare_unfused if group == "unfused" else functools.partial(compare_fused, yardstick=yardstick)
        for problem in tables[group].values():
            if not arguments.only or problem.name in arguments.only:
                names = arguments.implementations or IMPLEMENTATIONS[group]
                yield from rows(problem, names, arguments, jnp.dtype(arguments.dtype))


def compare_fused(problem, implementations, arguments, dtype, yardstick=None):
    """A row for the forward and, unless it is not wanted, one for the backward."""
    repeats = arguments.repeats
    arrays = report.draw(problem, dtype, seed=0)
    attentions = {name: report.ours(problem, name) for name in implementations}
    alternatives = {} if arguments.ours_only else stock.alternatives(problem, dtype.itemsize)
    for direction, chain in (("forward", forward_chain), ("backward", backward_chain)):
        forward = direction == "forward"
        if arguments.forward_only and not forward:
            return
        chains = {name: chain(f) for name, f in attentions.items()}
        times = time_chains(chains, arrays, repeats, {"yardstick": yardstick.chains[direction]} if yardstick else {})
        cudnn = times.pop("yardstick", None)
        first = first_timed(implementations, times)
        # On their own, because they keep a GPU so busy that its clocks fall.
        times |= time_chains({name: chain(f) for name, f in alternatives.items()}, arrays, repeats)
        timed = isinstance(times[first], float)
        error = check_fused(problem, arrays, attentions[first], gradients=not forward) if timed else math.nan
        line = row(problem, direction, times, first, *report.cost(problem, dtype, direction), error, dtype)
        if isinstance(cudnn, float):
            line["of cuDNN"] = 1e12 * line["useful TFLOP/s"] * cudnn / yardstick.operations[direction]
        line |= speed_ups(implementations, times)
        timed = [f for name, f in alternatives.items() if forward and isinstance(times[name], float)]
        if timed:
            line["stock error"] = max(report.error(problem, arrays, jax.jit(f)(*arrays[:3])) for f in timed)
        yield line | (tile_columns(problem, dtype) if first == "sm90" and forward else {})


def first_timed(names, times: dict) -> str:
    return next((name for name in names if isinstance(times[name], float)), names[0])


def speed_ups(implementations, times: dict) -> dict:
    """Over the fastest of JAX's own ways."""
    fastest = min(
        (t for name, t in times.items() if name not in implementations and isinstance(t, float)), default=None
    )
    ours = {name: times[name] for name in implementations if isinstance(times[name], float)}
    return {f"stock / {name}": fastest / seconds for name, seconds in ours.items()} if fastest else {}


def tile_columns(problem, dtype) -> dict:
    """What the Hopper kernels ran with, and what their cost model expected."""
    (expected,) = tiles.simulate(described(problem, dtype))
    return {"tiles": spell(expected.tiles), "model ms": 1e3 * expected.seconds}


def described(problem, dtype) -> dispatch.Problem:
    query, key = (
        jax.ShapeDtypeStruct((problem.batch, *problem.grid, heads, problem.dim), dtype)
        for heads in (problem.heads, problem.kv_heads)
    )
    return primitives.problem("fused_forward", query, key, key, None, None, report.neighborhood(problem))


class Yardstick:
    """cuDNN's dense attention on `dense16k_d128`, timed in turns with what is compared with it."""

    def __init__(self, dtype):
        problem = problems.LARGE["dense16k_d128"]
        arrays = report.draw(problem, dtype, seed=0)
        dense = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        self.chains = {"forward": Chain(forward_chain(dense), arrays), "backward": Chain(backward_chain(dense), arrays)}
        self.operations = {direction: report.cost(problem, dtype, direction)[0] for direction in self.chains}


def find_yardstick(dtype) -> Yardstick | None:
    try:
        return Yardstick(jnp.dtype(dtype))
    except (ValueError, RuntimeError) as failure:
        print(f"no cuDNN attention to compare with: {failure}", flush=True)
        return None


def read_peers(path: Path | None) -> dict[tuple[str, str], dict[str, float]]:
    """Milliseconds of other libraries by problem and direction: of their kernels, or of the call where that is all."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    if path is not None:
        with path.open() as file:
            for line in csv.DictReader(file):
                for direction in ("forward", "backward"):
                    time = line[f"{direction}_kernel_ms"] or line[f"{direction}_call_ms"]
                    if time:
                        found.setdefault((line["problem"], direction), {})[line["peer"]] = float(time)
    return found


def compare_unfused(problem, implementations, arguments, dtype):
    """A row for each of the three kernels: QK, AV, and the gradient of AV's value."""
    query, key, value, d_out = report.draw(problem, dtype, seed=0)
    window = problem.window
    shape = (*query.shape[:-1], math.prod(problem.kernel_size))
    weights = jax.random.normal(jax.random.key(1), shape, dtype)

    def pn(implementation):
        return lambda q, k: jax_natten.neighborhood_qk(q, k, **window, implementation=implementation)

    def nn(implementation):
        return lambda a, v: jax_natten.neighborhood_av(a, v, **window, implementation=implementation)

    def inverse(implementation):
        return lambda a, d: jax.vjp(lambda v: nn(implementation)(a, v), value)[1](d)[0]

    for name, make, arrays, operation in (
        ("PN", pn, (query, key), "qk"),
        ("NN", nn, (weights, value), "av"),
        ("IN", inverse, (weights, d_out), "av"),
    ):
        functions = {i: make(i) for i in implementations}
        times = time_chains({i: last_operand_chain(f) for i, f in functions.items()}, arrays, arguments.repeats)
        first = first_timed(implementations, times)
        error = report.unfused_error(name, problem, arrays, jax.jit(functions[first])(*arrays))
        yield row(problem, name, times, first, *report.cost(problem, dtype, operation), error, dtype)


def row(problem, direction, times, first, operations, moved, error, dtype) -> dict:
    """A line of the table. Fractions of the peak are left out for a device that PEAKS does not list."""
    seconds = times[first]
    line = {"problem": problem.name, "direction": direction, "implementation": first}
    line |= {f"{name} ms": 1e3 * t if isinstance(t, float) else t for name, t in times.items()}
    timed = isinstance(seconds, float)
    bandwidth, rates = PEAKS.get(jax.devices()[0].device_kind, (math.nan, {}))
    rate, flow = (operations / seconds, moved / seconds) if timed else (math.nan, math.nan)
    line |= {"useful TFLOP/s": rate / 1e12, "of peak": rate / rates.get(dtype.itemsize, math.nan)}
    return line | {"GB/s": flow / 1e9, "of bandwidth": flow / bandwidth, "error": error}


class Chain:
    """A step repeated inside one jitted function, in a short and in a long version.

    ``start(*arrays)`` returns the step and what the first one gets; a step returns what the next one gets.
    """

    def __init__(self, start, arrays):
        self.short = _compiled(start, SHORT, arrays)
        (seconds,) = report.interleaved({"": self.short}, 1).values()
        self.more = min(max(round(SECONDS * SHORT / seconds), FEWEST), MOST)  # steps of the long one
        self.long = _compiled(start, SHORT + self.more, arrays)
        self.long()  # it may need memory that there is not


def _compiled(start, calls: int, arrays) -> Callable[[], None]:
    def run(*arrays):
        step, state = start(*arrays)
        for _ in range(calls):
            state = step(state)
        return state

    compiled = jax.jit(run).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def time_chains(starts: dict[str, Callable], arrays, repeats: int, more: dict[str, Chain] | None = None):
    """Seconds of one more step of each chain, or why there is no time."""
    chains, notes = dict(more or {}), {}
    for name, start in starts.items():
        try:
            chains[name] = Chain(start, arrays)
        except jax.errors.JaxRuntimeError as failure:
            notes[name] = str(failure).split(":")[0].lower()
        except NotImplementedError:
            notes[name] = "no kernel"
    candidates = {(name, kind): getattr(chain, kind) for name, chain in chains.items() for kind in ("short", "long")}
    seconds = report.interleaved(candidates, repeats)
    times = {name: (seconds[name, "long"] - seconds[name, "short"]) / chain.more for name, chain in chains.items()}
    return {**notes, **times}


def forward_chain(attention):
    return lambda q, k, v, d_out: (lambda query: attention(query, k, v), q)


def backward_chain(attention):
    def start(q, k, v, d_out):
        _, pullback = jax.vjp(attention, q, k, v)

        def step(d_out):
            return feed(d_out, *pullback(d_out))

        return step, d_out

    return start


def last_operand_chain(function):
    def start(*arrays):
        *rest, last = arrays
        return (lambda x: feed(x, function(*rest, x))), last

    return start


def feed(x, *results):
    """``x`` with an element that depends on all results; the barrier keeps XLA from computing only that one."""
    results = jax.lax.optimization_barrier(results)
    return x.at[(0,) * x.ndim].set(sum(1e-3 * r[(0,) * r.ndim] for r in results).astype(x.dtype))


def check_fused(problem, arrays, attention, *, gradients: bool) -> float:
    """The largest relative error of the output on random queries, or of the gradients of one key head."""
    if not gradients:
        return report.error(problem, arrays, jax.jit(attention)(*arrays[:3]))

    def one(arrays):
        return [x[:1, ..., : x.shape[-2] // problem.kv_heads, :].astype(jnp.float32) for x in arrays]

    direct = report.ours(problem, ("naive", "xla"))
    exact = jax.jit(report.with_gradients(direct))(*one(arrays))
    got = one(jax.jit(report.with_gradients(attention))(*arrays))
    pairs = [(np.asarray(g, np.float64), np.asarray(e, np.float64)) for g, e in zip(got, exact)]
    return max(float(np.linalg.norm(g - e) / np.linalg.norm(e)) for g, e in pairs)


if __name__ == "__main__":
    main()
