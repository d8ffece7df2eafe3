"""Times implementations on a GPU, fused attention beside attention under a dense mask as XLA runs it.

    python benchmarks/gpu.py [--groups small unfused] [--only nat_56] [--implementations naive xla] [--dtype bfloat16]
    python benchmarks/gpu.py --groups large small --implementations sm90 --forward-only --peers PEERS.csv

A time is that of one more call in a chain of calls inside one jitted function, each fed by the one before: launches
overlap with the work of the call before, as in a model, and what a jitted function costs as such drops out. Rates are those of the first implementation that has a kernel. Useful
operations are those of the pairs inside windows, bandwidth counts every tensor once, and both are given as fractions of
the device's peak (tensor cores, dense, for 16-bit types). "of cuDNN" is the useful rate over that of cuDNN's dense
attention on `dense16k_d128`, timed in the same run, since clocks differ between machines. --peers names a CSV file with
the columns problem, peer, forward_kernel_ms and forward_call_ms; each peer gets a column with its time. Results are
checked in the same run: outputs against float64 on random rows, fused gradients against those of "xla" in float32.
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
from report import problems

import jax_natten
from jax_natten import dispatch, tiles
from jax_natten.commands import spell
from jax_natten.primitives import fused as primitives

# Calls of the short chain; and how much longer the long one lasts, about: seconds, and at least and at most so many calls.
SHORT, SECONDS, FEWEST, MOST = 2, 0.01, 4, 48
DENSE_LIMIT = 2**33  # scores: more than that does not fit a GPU
# Vendor's figures by jax.Device.device_kind: bytes per second, and operations per second by bytes of the dtype.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": (2.04e12, {2: 312e12, 4: 19.5e12, 8: 9.7e12}),
    "NVIDIA H100 80GB HBM3": (3.35e12, {2: 989e12, 4: 66.9e12, 8: 33.5e12}),
    "NVIDIA H200": (4.8e12, {2: 989e12, 4: 66.9e12, 8: 33.5e12}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="*", default=["small", "unfused"], choices=["small", "unfused", "large"])
    parser.add_argument("--only", nargs="*", help="names of problems in tests/problems.py")
    parser.add_argument("--implementations", nargs="*", default=["naive"])
    parser.add_argument("--forward-only", action="store_true", help="leave gradients out")
    parser.add_argument("--peers", type=Path, help="CSV file of other libraries' times on this GPU model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    tables = {"small": problems.SMALL, "unfused": problems.UNFUSED, "large": problems.LARGE}
    rows = []
    peers = read_peers(arguments.peers)
    yardstick = None if arguments.groups == ["unfused"] else cudnn_rate(arguments.dtype, arguments.repeats)
    for group in arguments.groups:
        compare = compare_unfused if group == "unfused" else compare_fused
        for problem in tables[group].values():
            if arguments.only and problem.name not in arguments.only:
                continue
            for line in compare(problem, arguments, jnp.dtype(arguments.dtype)):
                if line["direction"] == "forward":
                    line |= {"of cuDNN": line["useful TFLOP/s"] / yardstick} if yardstick else {}
                    line |= {f"{peer} ms": time for peer, time in peers.get(problem.name, {}).items()}
                print(line, flush=True)
                rows.append(line)
    name = "_".join([jax.devices()[0].device_kind.lower().replace(" ", "_"), arguments.dtype])
    name += "" if arguments.implementations == ["naive"] else "_" + "_".join(arguments.implementations)
    report.publish(rows, arguments.csv or report.ROOT / "results" / f"{name}.csv")


def compare_fused(problem, arguments, dtype):
    """A row for the forward and, unless it is not wanted, one for forward and backward."""
    implementations, repeats = arguments.implementations, arguments.repeats
    arrays = report.draw(problem, dtype, seed=0)
    attentions = {name: report.ours(problem, name) for name in implementations}
    if problem.batch * problem.heads * problem.positions**2 <= DENSE_LIMIT:
        attentions["dense"] = report.dense_mask(problem)
    for direction, step, operations in (
        ("forward", forward_step, ["forward"]),
        ("forward+backward", gradient_step, ["forward", "backward"]),
    ):
        if len(operations) > 1 and arguments.forward_only:
            return
        times = time_chains({name: step(f) for name, f in attentions.items()}, arrays, repeats)
        first = next((name for name in implementations if isinstance(times[name], float)), implementations[0])
        timed = isinstance(times[first], float)
        error = check_fused(problem, arrays, attentions[first], gradients=len(operations) > 1) if timed else math.nan
        line = row(problem, direction, times, first, *report.cost(problem, dtype, *operations), error, dtype)
        yield line | (tile_columns(problem, dtype) if first == "sm90" and len(operations) == 1 else {})


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


def cudnn_rate(dtype, repeats: int) -> float | None:
    """TFLOP/s of cuDNN's dense attention on `dense16k_d128`; None where it cannot run."""
    problem = problems.LARGE["dense16k_d128"]
    arrays = report.draw(problem, jnp.dtype(dtype), seed=0)
    dense = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        seconds = time_chains({"cudnn": forward_step(dense)}, arrays, repeats)["cudnn"]
    except (ValueError, RuntimeError) as failure:
        seconds = str(failure)
    if not isinstance(seconds, float):
        print(f"no cuDNN attention to compare with: {seconds}", flush=True)
        return None
    rate = report.cost(problem, jnp.dtype(dtype), "forward")[0] / seconds / 1e12
    print(f"cuDNN dense attention, dense16k_d128: {1e3 * seconds:.3f} ms, {rate:.0f} TFLOP/s", flush=True)
    return rate


def read_peers(path: Path | None) -> dict[str, dict[str, float]]:
    """Milliseconds of other libraries' forward kernels by problem and library; of their call where that is all."""
    found: dict[str, dict[str, float]] = {}
    if path is not None:
        with path.open() as file:
            for line in csv.DictReader(file):
                time = line["forward_kernel_ms"] or line["forward_call_ms"]
                if time:
                    found.setdefault(line["problem"], {})[line["peer"]] = float(time)
    return found


def compare_unfused(problem, arguments, dtype):
    """A row for each of the three kernels: QK, AV, and the gradient of AV's value."""
    implementations, repeats = arguments.implementations, arguments.repeats
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
        times = time_chains({i: feed_last(f) for i, f in functions.items()}, arrays, repeats)
        error = report.unfused_error(name, problem, arrays, jax.jit(functions[implementations[0]])(*arrays))
        yield row(problem, name, times, implementations[0], *report.cost(problem, dtype, operation), error, dtype)


def row(problem, direction, times, first, operations, moved, error, dtype) -> dict:
    """A line of the table. Fractions of the peak are left out for a device that PEAKS does not list."""
    seconds = times[first]
    line = {"problem": problem.name, "direction": direction}
    line |= {f"{name} ms": 1e3 * t if isinstance(t, float) else t for name, t in times.items() if name != "dense"}
    dense = times.get("dense", "-")
    timed = isinstance(seconds, float)
    line["dense ms"] = 1e3 * dense if isinstance(dense, float) else dense
    line[f"dense / {first}"] = dense / seconds if timed and isinstance(dense, float) else "-"
    bandwidth, rates = PEAKS.get(jax.devices()[0].device_kind, (math.nan, {}))
    rate, flow = (operations / seconds, moved / seconds) if timed else (math.nan, math.nan)
    line |= {"useful TFLOP/s": rate / 1e12, "of peak": rate / rates.get(dtype.itemsize, math.nan)}
    return line | {"GB/s": flow / 1e9, "of bandwidth": flow / bandwidth, "error": error}


def time_chains(steps: dict[str, Callable], arrays, repeats: int) -> dict[str, float | str]:
    """Seconds of one more step of each chain, or why there is no time."""
    candidates, calls, notes = {}, {}, {}
    for name, step in steps.items():
        try:
            short = compiled_chain(step, SHORT, arrays)
            (seconds,) = report.interleaved({name: short}, 1).values()
            calls[name] = min(max(round(SECONDS * SHORT / seconds), FEWEST), MOST)
            candidates[name, SHORT] = short
            candidates[name, calls[name]] = compiled_chain(step, SHORT + calls[name], arrays)
        except jax.errors.JaxRuntimeError as failure:
            notes[name] = str(failure).split(":")[0].lower()
        except NotImplementedError:
            notes[name] = "no kernel"
    seconds = report.interleaved(candidates, repeats)
    times = {name: (seconds[name, more] - seconds[name, SHORT]) / more for name, more in calls.items()}
    return {name: notes.get(name, times.get(name, "-")) for name in steps}


def compiled_chain(step, calls: int, arrays) -> Callable[[], None]:
    def run(*arrays):
        for _ in range(calls):
            arrays = step(*arrays)
        return arrays

    compiled = jax.jit(run).lower(*arrays).compile()
    return lambda: jax.block_until_ready(compiled(*arrays))


def forward_step(attention):
    return lambda q, k, v, d_out: (attention(q, k, v), k, v, d_out)


def gradient_step(attention):
    run = report.with_gradients(attention)

    def step(q, k, v, d_out):
        # Feeds one element of each gradient to the next call; the barrier keeps XLA from computing only those.
        _, *gradients = jax.lax.optimization_barrier(run(q, k, v, d_out))
        first = sum(g[(0,) * g.ndim] for g in gradients)
        return q.at[(0,) * q.ndim].set(1e-3 * first), k, v, d_out

    return step


def feed_last(function):
    """Feeds one element of the result to the last operand; the barrier keeps XLA from computing only that one."""

    def step(*arrays):
        result = jax.lax.optimization_barrier(function(*arrays))
        last = arrays[-1].at[(0,) * arrays[-1].ndim].set(result[(0,) * result.ndim])
        return (*arrays[:-1], last)

    return step


def check_fused(problem, arrays, attention, *, gradients: bool) -> float:
    """The largest relative error of the output on random queries, or of the gradients of one batch element."""
    if not gradients:
        return report.error(problem, arrays, jax.jit(attention)(*arrays[:3]))
    one = [x[:1].astype(jnp.float32) for x in arrays]
    exact = jax.jit(report.with_gradients(report.ours(problem, "xla")))(*one)
    got = jax.jit(report.with_gradients(attention))(*(x[:1] for x in arrays))
    pairs = [(np.asarray(g, np.float64), np.asarray(e, np.float64)) for g, e in zip(got, exact)]
    return max(float(np.linalg.norm(g - e) / np.linalg.norm(e)) for g, e in pairs)


if __name__ == "__main__":
    main()
