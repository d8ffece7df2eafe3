"""Pictures of the training, of predictions, and of neighborhoods with their attention weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

import jax_natten


def training(history: dict[str, list[float]], path: Path) -> Path:
    """Curves of the loss and of the accuracy."""
    steps = np.arange(1, len(history["loss"]) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(steps, history["loss"], color="tab:blue", alpha=0.25, linewidth=0.8)
    left.plot(steps, _smooth(history["loss"]), color="tab:blue")
    left.set(title="Training loss", xlabel="step", ylabel="cross entropy, smoothed labels")
    right.plot(steps, _smooth(history["accuracy"]), color="tab:blue", label="training (shifted digits)")
    right.plot(history["test_step"], history["test_accuracy"], "o-", color="tab:orange", markersize=3, label="test")
    right.axhline(history["test_accuracy"][-1], color="tab:orange", linewidth=0.6, linestyle=":")
    right.set(title=f"Accuracy: test {history['test_accuracy'][-1]:.1%}", xlabel="step", ylim=(0, 1.02))
    right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return _save(figure, path)


def predictions(test: tuple[np.ndarray, np.ndarray], logits: np.ndarray, path: Path) -> Path:
    """The 12 test digits whose true class got the lowest probabilities, then 12 others at random."""
    images, labels = test
    probabilities = np.asarray(jax.nn.softmax(logits))
    certainty = np.take_along_axis(probabilities, labels[:, None], 1)[:, 0]
    hardest = np.argsort(certainty)[:12]
    others = np.random.default_rng(0).choice(np.setdiff1d(np.arange(len(labels)), hardest), 12, replace=False)
    figure, axes = plt.subplots(3, 8, figsize=(11, 5.2), layout="constrained")
    for axis, index in zip(axes.flat, [*hardest, *others], strict=True):
        guess = probabilities[index].argmax()
        right = guess == labels[index]
        axis.imshow(images[index, ..., 0], cmap="gray_r")
        title = f"{guess} ({probabilities[index, guess]:.0%})" + ("" if right else f", is {labels[index]}")
        axis.set_title(title, color="tab:green" if right else "tab:red", fontsize=10)
        axis.set_axis_off()
    wrong = int(np.sum(probabilities.argmax(-1) != labels))
    figure.suptitle(f"Test digits: the 12 hardest, then 12 at random. {wrong} of {len(labels)} are wrong.")
    return _save(figure, path)


def neighborhoods(model, params, test: tuple[np.ndarray, np.ndarray], path: Path) -> Path:
    """One query's window in every block of the first stage, and the attention weights of each head there."""
    image = test[0][0]
    query = _darkest(image[..., 0])
    blocks = list(enumerate(model.dilations[0]))
    heads = model.features // model.head_dim
    figure, axes = plt.subplots(
        len(blocks), 1 + heads, figsize=(3.1 * (1 + heads), 3.2 * len(blocks)), layout="constrained", squeeze=False
    )
    for (block, dilation), row in zip(blocks, axes, strict=True):
        weights, keys = attention_weights(model, params, image, block, query)
        window, *maps = row
        window.imshow(image[..., 0], cmap="gray_r")
        _outline(window, keys, "tab:blue")
        window.set_title(f"Block {block}: {model.kernel_size}x{model.kernel_size} window,\ndilation {dilation}")
        for head, axis in enumerate(maps):
            axis.imshow(image[..., 0], cmap="gray_r", alpha=0.35)
            shown = np.full(image.shape[:2], np.nan)
            shown[tuple(keys.T)] = weights[head]
            mesh = axis.imshow(shown, cmap="viridis", vmin=0)
            axis.set_title(f"attention of head {head}")
            figure.colorbar(mesh, ax=axis, shrink=0.8)
        for axis in row:
            _outline(axis, np.array([query]), "tab:red", linewidth=2)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(f"The keys that the query at {query} (red) sees in a {test[1][0]}, and its attention weights")
    return _save(figure, path)


def attention_weights(model, params, image: np.ndarray, block: int, query: tuple[int, int]):
    """Attention weights of one query in a block of the first stage, by the unfused operations.

    Returns:
      ``(weights [heads, kernel_size ** 2], keys [kernel_size ** 2, 2])``: positions of the keys as row and column.
    """
    name, window, dilation = f"stage0_block{block}", (model.kernel_size,) * 2, model.dilations[0][block]
    # What the layer's projection put out: the heads of the query, of the key and of the value.
    _, captured = model.apply(
        {"params": params},
        image[None],
        capture_intermediates=lambda module, _: module.path == (name, "attention", "qkv"),
        mutable=["intermediates"],
    )
    (projected,) = captured["intermediates"][name]["attention"]["qkv"]["__call__"]
    q, k, _ = jnp.split(projected, 3, axis=-2)
    rpb = params[name]["attention"]["rpb"]
    scores = jax_natten.na2d_qk(q * model.head_dim**-0.5, k, window, dilation=dilation, rpb=rpb)
    weights = jax.nn.softmax(scores)[0, query[0], query[1]]

    neighborhood = jax_natten.Neighborhood.make(window, dilation=dilation)
    positions = []
    for axis, x in zip(neighborhood.axes(image.shape[:2]), query, strict=True):
        begin, end = axis.window_bounds()
        positions.append(x % dilation + dilation * np.arange(begin[x], end[x]))
    keys = np.stack(np.meshgrid(*positions, indexing="ij"), -1).reshape(-1, 2)
    return np.asarray(weights), keys


def _darkest(image: np.ndarray) -> tuple[int, int]:
    """The pixel with the most ink in the middle of the image."""
    middle = slice(image.shape[0] // 4, 3 * image.shape[0] // 4)
    row, column = np.unravel_index(image[middle, middle].argmax(), image[middle, middle].shape)
    return int(row + middle.start), int(column + middle.start)


def _outline(axis, positions: np.ndarray, color: str, linewidth: float = 1.0) -> None:
    for row, column in positions:
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=color, linewidth=linewidth))


def _smooth(values: list[float], window: int = 20) -> np.ndarray:
    """Mean of the last ``window`` values, of fewer at the start."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    return (total[end] - total[begin]) / (end - begin)


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
