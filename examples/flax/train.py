"""Trains a small neighborhood attention transformer on handwritten digits and draws what it learned.

    python examples/flax/train.py                       # about a minute on a CPU with two cores
    python examples/flax/train.py --device gpu --implementation naive --steps 2000

Needs ``pip install 'jax_natten[demo]'``.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plots
from data import digits, shift
from model import NAT
from tqdm import tqdm

import jax_natten
from jax_natten import dispatch

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
EVALUATE_EVERY = 25


def main(arguments: list[str] | None = None) -> float:
    """Runs the demo and returns the test accuracy."""
    options = parse(arguments)
    use_device(options.device)
    model = NAT(implementation=options.implementation)
    train, test = digits(seed=0)
    print(f"jax_natten {jax_natten.__version__}: {describe(model)}")

    params = jax.jit(model.init)(jax.random.key(options.seed), jnp.asarray(train[0][:1]))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"Training {count:,} parameters on {len(train[0])} digits for {options.steps} steps of {BATCH_SIZE}")
    start = time.perf_counter()
    params, history = fit(model, params, train, test, steps=options.steps, seed=options.seed)
    seconds = time.perf_counter() - start

    logits = np.asarray(jax.jit(model.apply)({"params": params}, test[0]))
    accuracy = float(np.mean(logits.argmax(-1) == test[1]))
    print(f"Test accuracy {accuracy:.2%} on {len(test[0])} digits, after {seconds:.0f} s of training")

    options.output.mkdir(parents=True, exist_ok=True)
    for picture in (
        plots.training(history, options.output / "training.png"),
        plots.predictions(test, logits, options.output / "predictions.png"),
        plots.neighborhoods(model, params, test, options.output / "neighborhoods.png"),
    ):
        print(f"Wrote {picture}")
    return accuracy


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small neighborhood attention transformer on handwritten digits."
    )
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="where to train")
    parser.add_argument(
        "--implementation", choices=dispatch.IMPLEMENTATIONS, help="of the attention; default: the best"
    )
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the order of the digits")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def use_device(device: str) -> None:
    if device != "auto":
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[device])
    try:
        jax.devices()
    except RuntimeError as error:
        raise SystemExit(f"No {device} device: {error}") from error


def describe(model: NAT) -> str:
    """Names the device and the implementation of the attention that will run there."""
    device = jax.devices()[0]
    window = jax_natten.Neighborhood.make(model.kernel_size, rank=2)
    heads = model.features // model.head_dim
    platform = {"gpu": "cuda"}.get(device.platform, device.platform)
    problem = dispatch.Problem(
        "fused_forward", window, np.dtype(np.float32), heads, heads, model.head_dim, model.head_dim, 0, True
    )
    try:
        best = dispatch.candidates(problem, platform, dispatch.parse(model.implementation))[0]
    except NotImplementedError as error:
        raise SystemExit(f"Cannot run: {error}") from error
    return f"implementation {best!r} on {device.platform} ({device.device_kind})"


def fit(model: NAT, params, train, test, *, steps: int, seed: int):
    """Trains; returns the parameters and ``{"loss": [steps], "step": [...], "train": [...], "test": [...]}``."""
    optimizer = optimizer_for(steps)
    state = optimizer.init(params)
    images, labels = jnp.asarray(train[0]), jnp.asarray(train[1])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, key, batch):
        return step_of(model, optimizer, params, state, shift(key, images[batch]), labels[batch])

    @jax.jit
    def test_accuracy(params):
        return jnp.mean(model.apply({"params": params}, test[0]).argmax(-1) == test[1])

    history: dict[str, list[float]] = {"loss": [], "accuracy": [], "test_step": [], "test_accuracy": []}
    key = jax.random.key(seed)
    batches = shuffled(len(train[0]), np.random.default_rng(seed))
    with tqdm(range(1, steps + 1), unit="step", desc="training") as bar:
        for step in bar:
            params, state, loss, accuracy = update(params, state, jax.random.fold_in(key, step), next(batches))
            history["loss"].append(float(loss))
            history["accuracy"].append(float(accuracy))
            if step % EVALUATE_EVERY == 0 or step == steps:
                history["test_step"].append(step)
                history["test_accuracy"].append(float(test_accuracy(params)))
                bar.set_postfix(loss=f"{loss:.3f}", test=f"{history['test_accuracy'][-1]:.1%}")
    return params, history


def optimizer_for(steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(steps // 10, 1), steps, LEARNING_RATE / 100)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY))


def step_of(model: NAT, optimizer: optax.GradientTransformation, params, state, images, labels):
    """One step of the optimizer; returns the parameters, the optimizer's state, the loss and the accuracy."""

    def loss_of(params):
        logits = model.apply({"params": params}, images)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, model.num_classes), LABEL_SMOOTHING)
        return optax.softmax_cross_entropy(logits, targets).mean(), jnp.mean(logits.argmax(-1) == labels)

    (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss, accuracy


def shuffled(count: int, random: np.random.Generator):
    """Endless batches of indices; every epoch has another order and drops the incomplete batch at its end."""
    while True:
        order = random.permutation(count)
        for begin in range(0, count - BATCH_SIZE + 1, BATCH_SIZE):
            yield order[begin : begin + BATCH_SIZE]


if __name__ == "__main__":
    main()
