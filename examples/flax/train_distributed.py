"""Trains the demo's transformer on several processes: data parallelism, and context parallelism over image rows.

    python examples/flax/train_distributed.py --processes 4 --context 2
        # four processes on this machine's CPU: two halves of the batch, two halves of every image
    python examples/flax/train_distributed.py --processes 16 --context 4 --coordinator node0:1234 --process 3
        # one of 16 processes on a cluster, each started like this

Needs ``pip install 'jax_natten[demo]'``. The losses are those of ``train.py``, which trains on one device.
"""

from __future__ import annotations

import argparse
import csv
import functools
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from data import digits, shift
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model import NAT
from tqdm import tqdm
from train import BATCH_SIZE, optimizer_for, shuffled, step_of

from jax_natten.distributed import sharded_attention

SIZES: dict[str, dict] = {"demo": {}, "tiny": {"features": 16, "head_dim": 8, "dilations": ((3,), (1,))}}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.processes > 1 and options.coordinator is None:
        launch(options.processes, sys.argv[1:] if arguments is None else arguments)
        return
    if options.coordinator is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no effect on GPUs, which take NCCL
        jax.distributed.initialize(options.coordinator, options.processes, options.process)

    data = jax.device_count() // options.context
    if data * options.context != jax.device_count() or BATCH_SIZE % data:
        raise SystemExit(f"{jax.device_count()} devices cannot share {options.context} contexts of {BATCH_SIZE} images")
    mesh = jax.make_mesh((data, options.context), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    first = jax.process_index() == 0
    if first:
        print(f"{jax.process_count()} processes, {data} shards of the batch, {options.context} of every image")

    train, test = digits(seed=0)
    params, losses = fit(mesh, SIZES[options.model], train, steps=options.steps, seed=options.seed, progress=first)
    if first:
        logits = jax.jit(NAT(**SIZES[options.model]).apply)({"params": params}, test[0])
        print(f"Test accuracy {np.mean(logits.argmax(-1) == test[1]):.2%} on {len(test[0])} digits")
        options.output.mkdir(parents=True, exist_ok=True)
        with (options.output / "losses.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *enumerate(losses, 1)])
        print(f"Wrote {options.output / 'losses.csv'}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the demo's transformer on several processes.")
    parser.add_argument("--processes", type=int, default=1, help="number of processes (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1, help="devices that share an image (default: %(default)s)")
    parser.add_argument("--model", choices=SIZES, default="demo", help="its size (default: %(default)s)")
    parser.add_argument("--coordinator", help="address of process 0; without it all processes are started here")
    parser.add_argument("--process", type=int, help="number of this process, with --coordinator")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of losses.csv")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the order of the digits")
    return parser.parse_args(arguments)


def launch(processes: int, arguments: list[str]) -> None:
    """Starts the processes on this machine and waits for them; ends all of them when one fails."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, *arguments, "--coordinator", f"localhost:{port}"]
    children = [subprocess.Popen([*command, "--process", str(number)]) for number in range(processes)]
    try:
        waiting = list(children)
        while waiting:
            for child in list(waiting):
                try:
                    code = child.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
                if code:
                    raise SystemExit(f"A process ended with code {code}")
                waiting.remove(child)
    finally:
        for child in children:
            child.kill()


def fit(mesh: Mesh, size: dict, train, *, steps: int, seed: int, progress: bool):
    """Trains; returns the parameters, whole on this process, and the loss of every step."""
    # XLA's partitioner shards convolutions and perceptrons as their inputs are, halos included. Attention is told how.
    model = NAT(**size, attention=sharded_attention(mesh, batch="data", grid=("context", None)))
    everywhere = NamedSharding(mesh, P())
    optimizer = optimizer_for(steps)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def start():
        params = NAT(**size).init(jax.random.key(seed), jnp.zeros((1, *train[0].shape[1:])))["params"]
        return params, optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=everywhere)
    def update(params, state, images, labels):
        return step_of(model, optimizer, params, state, images, labels)

    params, state = start()
    losses = []
    batches = shuffled(len(train[0]), np.random.default_rng(seed))
    augment = jax.jit(shift)
    for step in tqdm(range(1, steps + 1), unit="step", desc="training", disable=not progress):
        batch = next(batches)
        images = augment(jax.random.fold_in(jax.random.key(seed), step), train[0][batch])
        images = place(np.asarray(images), NamedSharding(mesh, P("data", "context")))
        labels = place(train[1][batch], NamedSharding(mesh, P("data")))
        params, state, loss, _ = update(params, state, images, labels)
        losses.append(float(loss))
    return jax.device_get(params), losses


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array of which every process gives its own devices their shards."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


if __name__ == "__main__":
    main()
