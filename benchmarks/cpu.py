"""Times the "cpu" implementation beside attention under a dense mask and the gather formulation, all jitted, float32.

    python benchmarks/cpu.py [--repeats N] [--csv FILE]

Peak is what a large matrix product reaches through JAX on the same cores in the same run. A ratio is the time of the
faster alternative over ours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import report
import stock
from report import problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=report.ROOT / "results" / "cpu.csv")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    peak = measured_peak(arguments.repeats)
    rows = [row for problem in problems.CPU.values() for row in compare(problem, peak, arguments.repeats)]
    report.publish(rows, arguments.csv)


def compare(problem, peak: float, repeats: int) -> list[dict]:
    """A row for the forward and one for forward and backward."""
    arrays = report.draw(problem, jnp.float32, seed=0)
    attentions = {
        "cpu": report.ours(problem, "cpu"),
        "dense": stock.dense_mask(problem),
        "gather": stock.gather(problem),
    }
    rows = []
    for direction, operations in (("forward", ["forward"]), ("forward+backward", ["forward", "backward"])):
        candidates = {}
        for name, attention in attentions.items():
            function = attention if len(operations) == 1 else report.with_gradients(attention)
            operands = arrays[: 2 + len(operations)]
            compiled = jax.jit(function).lower(*operands).compile()
            candidates[name] = lambda f=compiled, x=operands: jax.block_until_ready(f(*x))
        out = candidates["cpu"]()
        error = report.error(problem, arrays, out if len(operations) == 1 else out[0])
        seconds = report.interleaved(candidates, repeats)
        rate = report.cost(problem, jnp.float32, *operations)[0] / seconds["cpu"]
        rows.append(
            {"problem": problem.name, "direction": direction}
            | {f"{name} ms": 1e3 * value for name, value in seconds.items()}
            | {"ratio": min(seconds["dense"], seconds["gather"]) / seconds["cpu"]}
            | {"GFLOP/s": rate / 1e9, "of peak": rate / peak, "peak GFLOP/s": peak / 1e9, "error": error}
        )
    return rows


def measured_peak(repeats: int) -> float:
    size = 2048
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    seconds = report.interleaved({"matmul": lambda: jax.block_until_ready(product(x, x))}, repeats)
    return 2 * size**3 / seconds["matmul"]


if __name__ == "__main__":
    main()
