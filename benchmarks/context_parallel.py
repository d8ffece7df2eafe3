"""Weak scaling of context parallelism: what the halo exchange moves, and how many queries a device computes.

    python benchmarks/context_parallel.py [--csv FILE]

Compiles for eight fake CPU devices and runs nothing. The shard stays, the mesh grows. Halo: bytes of keys and values
that the windows of a shard reach beyond it, of all devices the most. Moved: bytes that the collective-permutes of the
compiled program bring to a device, of all devices the most; the backward pass moves the halo once to attend and its
gradient once back. Queries: those that a device computes over those of its shard, with overlap and without.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path

DEVICES = 8
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import report  # noqa: E402
from checks import QUICK_COMPILE  # noqa: E402
from hlo import Program, halo_bytes  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from jax_natten import Neighborhood, distributed, halo  # noqa: E402

# float32: on CPUs XLA widens shorter types to it before it sends them.
HEADS, DIM, DTYPE = 4, 32, jnp.float32


@dataclasses.dataclass(frozen=True)
class Problem:
    """A shard that every device holds, and the meshes that it is put on."""

    name: str
    shard: tuple[int, ...]
    kernel_size: tuple[int, ...]
    meshes: tuple[tuple[int, ...], ...]
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False

    @property
    def window(self) -> Neighborhood:
        return Neighborhood.make(self.kernel_size, self.stride, self.dilation, self.is_causal, rank=len(self.shard))


LINE = ((1,), (2,), (4,), (8,))
SQUARE = ((1, 1), (2, 1), (2, 2), (4, 2))
PROBLEMS = (
    Problem("1-D", (4096,), (127,), LINE),
    Problem("1-D causal", (4096,), (127,), LINE, is_causal=True),
    Problem("1-D several hops", (16,), (63,), LINE[2:]),
    Problem("2-D", (64, 64), (7, 7), SQUARE),
    Problem("2-D dilated", (64, 64), (7, 7), SQUARE, dilation=4),
    Problem("2-D blocked", (64, 64), (16, 16), SQUARE, stride=8),
    Problem("3-D", (16, 24, 24), (5, 7, 7), ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2))),
    Problem("3-D large window", (16, 24, 24), (9, 15, 15), ((1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 2, 2))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=report.ROOT / "results" / "context_parallel.csv")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    report.publish([measure(problem, mesh) for problem in PROBLEMS for mesh in problem.meshes], arguments.csv)


def measure(problem: Problem, shape: tuple[int, ...]) -> dict:
    window, names = problem.window, ("x", "y", "z")[: len(shape)]
    grid = tuple(n * p for n, p in zip(problem.shard, shape))
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    attention = distributed.sharded_attention(mesh, grid=names, overlap=True)

    def forward(*x):
        return attention(*x, window.kernel_size, window.stride, window.dilation, window.is_causal)

    sharding = NamedSharding(mesh, P(None, *names))
    x = jax.ShapeDtypeStruct((1, *grid, HEADS, DIM), DTYPE, sharding=sharding)
    moved = {
        name: Program(jax.jit(function).lower(*operands).compile(QUICK_COMPILE).as_text()).received_bytes()
        for name, function, operands in (
            ("forward", forward, (x, x, x)),
            ("backward", lambda ct, *x: jax.vjp(forward, *x)[1](ct), (x, x, x, x)),
        )
    }
    plans = [halo.plan_axis(axis, p, n) for axis, p, n in zip(window.axes(grid), shape, problem.shard)]
    queries = math.prod(problem.shard)
    return {
        "problem": problem.name,
        "shard": "x".join(map(str, problem.shard)),
        "window": "x".join(map(str, problem.kernel_size)),
        "stride": problem.stride,
        "dilation": problem.dilation,
        "devices": math.prod(shape),
        "mesh": "x".join(map(str, shape)),
        "halo bytes": halo_bytes(problem.shard, grid, window, 2 * HEADS * DIM, jnp.dtype(DTYPE).itemsize),
        "moved forward": moved["forward"],
        "moved backward": moved["backward"],
        "queries overlap": halo.attended(plans, split=True) / queries,
        "queries": halo.attended(plans, split=False) / queries,
        "interior": math.prod(p.interior.end - p.interior.begin if p.interior else 0 for p in plans) / queries,
    }


if __name__ == "__main__":
    main()
