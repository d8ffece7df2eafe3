"""Times implementations on a GPU beside attention under a dense mask, as XLA runs it.

    python benchmarks/gpu.py [--groups small unfused] [--implementations naive xla] [--dtype bfloat16] [--csv FILE]

A time is that of one call in a chain of calls inside one jitted function, each fed by the one before: launches overlap
with the work of the call before, as in a model. Bandwidth counts every tensor once. Outputs are checked in the same run
against float64 on random queries, gradients against those of "xla".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import report
from report import problems

CALLS = 10  # per chain
DENSE_LIMIT = 2**33  # scores: more than that does not fit a GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="*", default=["small"], choices=["small", "unfused", "large"])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--implementations", nargs="*", default=["naive"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    tables = {"small": problems.SMALL, "unfused": problems.UNFUSED, "large": problems.LARGE}
    rows = []
    for group in arguments.groups:
        for problem in tables[group].values():
            if not arguments.only or problem.name in arguments.only:
                rows += compare(problem, arguments.implementations, jnp.dtype(arguments.dtype), arguments.repeats)
                print(rows[-1], flush=True)
    name = jax.devices()[0].device_kind.lower().replace(" ", "_")
    report.publish(rows, arguments.csv or report.ROOT / "results" / f"{name}_{arguments.dtype}.csv")


def compare(problem, implementations, dtype, repeats: int) -> list[dict]:
    arrays = report.draw(problem, dtype, seed=0)
    attentions = {name: report.ours(problem, name) for name in implementations}
    if problem.batch * problem.heads * problem.positions**2 <= DENSE_LIMIT and problem.heads == problem.kv_heads:
        attentions["dense"] = report.dense_mask(problem)
    row_bytes = arrays[0].nbytes + arrays[1].nbytes
    rows = []
    for direction, work, moved in (("forward", 1.0, 2 * row_bytes), ("forward+backward", 3.5, 6 * row_bytes)):
        step = forward_step if work == 1 else gradient_step
        candidates, notes = {}, {}
        for name, attention in attentions.items():
            try:
                compiled = jax.jit(chain(step(attention))).lower(*arrays).compile()
                jax.block_until_ready(compiled(*arrays))
                candidates[name] = lambda f=compiled: jax.block_until_ready(f(*arrays))
            except jax.errors.JaxRuntimeError as failure:
                notes[name] = str(failure).split(":")[0].lower()
        error = check(problem, arrays, attentions[implementations[0]], gradients=work > 1)
        seconds = {name: value / CALLS for name, value in report.interleaved(candidates, repeats).items()}
        first = implementations[0]
        rows.append(
            {"problem": problem.name, "direction": direction}
            | {f"{name} ms": 1e3 * seconds[name] if name in seconds else notes[name] for name in attentions}
            | ({} if "dense" in attentions else {"dense ms": "too large"})
            | {"dense / " + first: seconds["dense"] / seconds[first] if "dense" in seconds else "-"}
            | {"useful TFLOP/s": work * report.flops(problem) / seconds[first] / 1e12}
            | {"GB/s": moved / seconds[first] / 1e9, "error": error}
        )
    return rows


def forward_step(attention):
    return lambda q, k, v, d_out: (attention(q, k, v), k, v, d_out)


def gradient_step(attention):
    run = report.with_gradients(attention)

    def step(q, k, v, d_out):
        _, *gradients = run(q, k, v, d_out)
        # Every gradient feeds the next call, so that none can be left out.
        return (*(x + 1e-3 * g for x, g in zip((q, k, v), gradients)), d_out)

    return step


def chain(step):
    def run(*arrays):
        for _ in range(CALLS):
            arrays = step(*arrays)
        return arrays[:3]

    return run


def check(problem, arrays, attention, *, gradients: bool) -> float:
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
