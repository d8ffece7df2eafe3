"""Times a training step of attention layers: those of a NAT-Tiny, and one of an image generator.

    python benchmarks/step.py [--only nat_tiny nat_tiny_rpb flux] [--implementations sm90 sm80 naive xla] [--batch 128]

A layer is the projection to query, key and value, neighborhood attention, and the projection of its output, with a
residual connection. A step is ``jax.value_and_grad`` of all parameters and the input, in bfloat16, inside ``jax.jit``.
"/ first" compares with the first implementation. "attention" is the time of the step less that of
the same step with query + key + value in the place of the attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import report

import jax_natten

IMPLEMENTATIONS = ("sm90", "sm80", "naive", "xla")
REPEATS, PATIENCE = 9, 2.0  # at most so many, and so many seconds of them


@dataclasses.dataclass(frozen=True)
class Stage:
    """Layers on one grid; between stages the grid is halved and the heads are doubled."""

    layers: int
    heads: int
    grid: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Model:
    stages: tuple[Stage, ...]
    dim: int
    window: int
    bias: bool = False
    batch: int | None = None


NAT_TINY = tuple(Stage(n, 2 << s, (56 >> s, 56 >> s)) for s, n in enumerate((3, 4, 18, 5)))
MODELS = {
    "nat_tiny": Model(NAT_TINY, 32, 7),
    "nat_tiny_rpb": Model(NAT_TINY, 32, 7, bias=True),
    "flux": Model((Stage(1, 24, (256, 256)),), 128, 80, batch=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--implementations", nargs="*", default=IMPLEMENTATIONS)
    parser.add_argument("--batch", type=int, default=128, help="images, where the model does not say")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows: list[dict] = []
    try:
        for name in arguments.only:
            model = MODELS[name]
            if model.batch is None:
                model = dataclasses.replace(model, batch=arguments.batch)
            compare(name, model, arguments.implementations, rows)
    except KeyboardInterrupt:
        print("interrupted: what has been measured follows")
    device = jax.devices()[0].device_kind.lower().replace(" ", "_")
    report.publish(rows, arguments.csv or report.ROOT / "results" / f"{device}_step.csv")


def compare(name: str, model: Model, implementations, rows: list[dict]) -> None:
    """Appends a row for each implementation."""
    operands = draw(model)
    baseline, _ = time_step(model, None, operands)
    first = len(rows)
    for implementation in implementations:
        seconds, loss = time_step(model, implementation, operands)
        times = {"step ms": 1e3 * seconds, "attention ms": 1e3 * (seconds - baseline)}
        row = {"model": name, "implementation": implementation} | times | {"loss": loss}
        rows.append(row)
        row |= {f"{what} / first": row[key] / rows[first][key] for what, key in (("step", "step ms"), ("loss", "loss"))}
        print(row, flush=True)


def draw(model: Model) -> tuple:
    """Parameters of all layers, and the input."""
    keys = iter(jax.random.split(jax.random.key(0), 3 * sum(stage.layers for stage in model.stages) + 1))

    def normal(*shape, scale):
        return (scale * jax.random.normal(next(keys), shape)).astype(jnp.bfloat16)

    params = []
    for stage in model.stages:
        width = stage.heads * model.dim
        for _ in range(stage.layers):
            params.append(
                {
                    "qkv": normal(width, 3, stage.heads, model.dim, scale=width**-0.5),
                    "out": normal(stage.heads, model.dim, width, scale=0.2 * width**-0.5),
                }
            )
            if model.bias:
                sides = (2 * model.window - 1,) * 2
                params[-1]["rpb"] = 0.02 * jax.random.normal(next(keys), (stage.heads, *sides))
    first = model.stages[0]
    return params, normal(model.batch, *first.grid, first.heads * model.dim, scale=1)


def loss(model: Model, implementation: str | None, params: list, x: jax.Array) -> jax.Array:
    layers = iter(params)
    for n, stage in enumerate(model.stages):
        if n:
            x = jnp.concatenate([x, x], -1)[:, ::2, ::2]
        for _ in range(stage.layers):
            x = x + attend(model, implementation, next(layers), x)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def attend(model: Model, implementation: str | None, layer: dict, x: jax.Array) -> jax.Array:
    query, key, value = (jnp.einsum("bxyc,chd->bxyhd", x, layer["qkv"][:, i]) for i in range(3))
    # Without attention the products of all three must still be computed.
    out = query + key + value
    if implementation is not None:
        out = jax_natten.na2d(query, key, value, model.window, rpb=layer.get("rpb"), implementation=implementation)
    return jnp.einsum("bxyhd,hdc->bxyc", out, layer["out"])


def time_step(model: Model, implementation: str | None, operands) -> tuple[float, float]:
    """Seconds of a step, and its loss; both are nan where there is not enough memory."""
    step = jax.jit(jax.value_and_grad(functools.partial(loss, model, implementation), argnums=(0, 1)))
    try:
        value, _ = jax.block_until_ready(step(*operands))
    except jax.errors.JaxRuntimeError as failure:
        if "RESOURCE_EXHAUSTED" not in str(failure):
            raise
        return math.nan, math.nan
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < PATIENCE:
        begin = time.perf_counter()
        jax.block_until_ready(step(*operands))
        times.append(time.perf_counter() - begin)
    return statistics.median(times), float(value)


if __name__ == "__main__":
    main()
