"""The demo: it trains, draws its pictures, and says what it ran."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import generator

for package in ("flax", "matplotlib", "optax", "sklearn", "tqdm"):
    pytest.importorskip(package)

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "flax"


@pytest.fixture
def example(monkeypatch):
    """Imports a module of the demo as its own script does, and forgets it afterwards."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    monkeypatch.syspath_prepend(str(FOLDER))
    # The demo computes in float32, as it does for a user.
    with jax.enable_x64(False):
        yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_demo_trains_and_draws(example, tmp_path, capsys):
    options = ["--steps", "3", "--device", "auto", "--output", str(tmp_path / "pictures")]
    accuracy = example("train").main(options)
    printed = capsys.readouterr().out
    assert re.search(r"implementation '\w+' on \w+", printed)
    assert f"Test accuracy {accuracy:.2%} on 360 digits" in printed
    for name in ("training", "predictions", "neighborhoods"):
        picture = tmp_path / "pictures" / f"{name}.png"
        assert f"Wrote {picture}" in printed
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_refuses_an_implementation_that_cannot_run_here(example, tmp_path):
    with pytest.raises(SystemExit, match="sm90"):
        example("train").main(["--implementation", "sm90", "--output", str(tmp_path)])


def test_drawn_attention_weights_are_those_of_the_layer(example):
    plots, model = example("plots"), example("model").NAT()
    image = np.asarray(generator("image").standard_normal((16, 16, 1)), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), image[None])["params"]
    (block, dilation), query = (1, model.dilations[0][1]), (1, 9)
    weights, keys = plots.attention_weights(model, params, image, block, query)
    assert weights.shape == (2, 25) and keys.shape == (25, 2)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert np.all(keys % dilation == np.array(query) % dilation) and np.all((keys >= 0) & (keys < 16))

    # The output of attention at the query is made of the values at the keys, with these weights.
    _, state = model.apply(
        {"params": params},
        image[None],
        capture_intermediates=lambda module, _: "attention" in module.path,
        mutable=True,
    )
    layer = state["intermediates"][f"stage0_block{block}"]["attention"]
    value = jnp.split(layer["qkv"]["__call__"][0], 3, axis=-2)[2][0]
    attended = jnp.einsum("hk,khd->hd", weights, value[tuple(keys.T)])
    out = params[f"stage0_block{block}"]["attention"]["out"]
    expected = jnp.einsum("hd,hdf->f", attended, out["kernel"]) + out["bias"]
    np.testing.assert_allclose(layer["__call__"][0][0, query[0], query[1]], expected, rtol=1e-4, atol=1e-5)


def test_digits_are_split_by_class_and_shifts_move_whole_images(example):
    data = example("data")
    (images, labels), (test_images, test_labels) = data.digits()
    assert images.shape == (1437, 16, 16, 1) and test_images.shape == (360, 16, 16, 1)
    assert images.dtype == np.float32 and abs(images.mean()) < 1e-4 and abs(images.std() - 1) < 1e-4
    assert np.bincount(test_labels).min() >= 34
    again = data.digits()
    np.testing.assert_array_equal(again[1][0], test_images)

    moved = np.asarray(data.shift(jax.random.key(0), images[:64]))[..., 0]
    crops = np.pad(images[:64, ..., 0], ((0, 0), (2, 2), (2, 2)), mode="edge")
    offsets = set()
    for image, crop in zip(moved, crops, strict=True):
        found = [(i, j) for i in range(5) for j in range(5) if np.array_equal(crop[i : i + 16, j : j + 16], image)]
        assert found
        offsets.update(found)
    assert len(offsets) > 10
