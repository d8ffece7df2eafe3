"""Times implementations on a GPU, fused attention beside attention under a dense mask as XLA runs it.

    python benchmarks/gpu.py [--groups small unfused] [--only nat_56] [--implementations naive xla] [--dtype bfloat16]

A time is that of one call in a chain of calls inside one jitted function, each fed by the one before: launches overlap
with the work of the call before, as in a model. Rates are those of the first implementation. Useful operations are
those of the pairs inside windows, bandwidth counts every tensor once, and both are given as fractions of the device's
peak (tensor cores, dense, for 16-bit types). Results are checked in the same run: outputs against float64 on random
rows, fused gradients against those of "xla" in float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import report
from report import problems

import jax_natten

CALLS = 10  # per chain
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
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    tables = {"small": problems.SMALL, "unfused": problems.UNFUSED, "large": problems.LARGE}
    rows = []
    for group in arguments.groups:
        compare = compare_unfused if group == "unfused" else compare_fused
        for problem in tables[group].values():
            if not arguments.only or problem.name in arguments.only:
                for row in compare(problem, arguments.implementations, jnp.dtype(arguments.dtype), arguments.repeats):
                    print(row, flush=True)
                    rows.append(row)
    name = jax.devices()[0].device_kind.lower().replace(" ", "_")
    report.publish(rows, arguments.csv or report.ROOT / "results" / f"{name}_{arguments.dtype}.csv")


def compare_fused(problem, implementations, dtype, repeats: int):
    """A row for the forward and one for forward and backward."""
    arrays = report.draw(problem, dtype, seed=0)
    attentions = {name: report.ours(problem, name) for name in implementations}
    if problem.batch * problem.heads * problem.positions**2 <= DENSE_LIMIT:
        attentions["dense"] = report.dense_mask(problem)
    for direction, step, operations in (
        ("forward", forward_step, ["forward"]),
        ("forward+backward", gradient_step, ["forward", "backward"]),
    ):
        times = time_chains({name: step(f) for name, f in attentions.items()}, arrays, repeats)
        error = check_fused(problem, arrays, attentions[implementations[0]], gradients=len(operations) > 1)
        yield row(
            problem, direction, times, implementations[0], *report.cost(problem, dtype, *operations), error, dtype
        )


def compare_unfused(problem, implementations, dtype, repeats: int):
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
    """Seconds of one step of each chain, or why there is no time."""
    candidates, notes = {}, {}
    for name, step in steps.items():
        try:
            compiled = jax.jit(chain(step)).lower(*arrays).compile()
            jax.block_until_ready(compiled(*arrays))
            candidates[name] = lambda f=compiled: jax.block_until_ready(f(*arrays))
        except jax.errors.JaxRuntimeError as failure:
            notes[name] = str(failure).split(":")[0].lower()
    times = {name: seconds / CALLS for name, seconds in report.interleaved(candidates, repeats).items()}
    return {name: times.get(name, notes.get(name, "-")) for name in steps}


def chain(step):
    def run(*arrays):
        for _ in range(CALLS):
            arrays = step(*arrays)
        return arrays

    return run


def forward_step(attention):
    return lambda q, k, v, d_out: (attention(q, k, v), k, v, d_out)


def gradient_step(attention):
    run = report.with_gradients(attention)

    def step(q, k, v, d_out):
        _, *gradients = run(q, k, v, d_out)
        # Every gradient feeds the next call, so that none can be left out.
        return (*(x + 1e-3 * g for x, g in zip((q, k, v), gradients)), d_out)

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
