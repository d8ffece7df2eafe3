"""Several processes train the demo to the losses of one; layers of every framework take a sharded attention."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import QUICK_COMPILE, generator
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

from jax_natten import distributed, native
from jax_natten import flax as natten
from jax_natten import haiku as natten_haiku

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "flax"
STEPS = 4


@pytest.fixture(scope="module")
def losses_of_one_device():
    """``examples/flax/train.py`` on one device, without any sharding."""
    for package in ("matplotlib", "optax", "sklearn", "tqdm"):
        pytest.importorskip(package)
    modules = {path.stem for path in EXAMPLES.glob("*.py")}
    sys.path.insert(0, str(EXAMPLES))
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes most of the time
    try:
        with jax.enable_x64(False):
            train, data, model, sizes = (
                importlib.import_module(name) for name in ("train", "data", "model", "train_distributed")
            )
            small = model.NAT(**sizes.SIZES["tiny"])
            train_set, test_set = data.digits(seed=0)
            params = jax.jit(small.init)(jax.random.key(0), train_set[0][:1])["params"]
            return train.fit(small, params, train_set, test_set, steps=STEPS, seed=0)[1]["loss"]
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        sys.path.remove(str(EXAMPLES))
        for name in modules:
            sys.modules.pop(name, None)


@pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")
@pytest.mark.parametrize(("processes", "context"), [(2, 2), (4, 2)])
def test_several_processes_train_to_the_losses_of_one(losses_of_one_device, processes, context, tmp_path):
    """Two processes share every image; four share the batch as well."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_ENABLE_X64", "XLA_FLAGS")}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    options = {"processes": processes, "context": context, "steps": STEPS, "model": "tiny", "output": tmp_path}
    command = [sys.executable, EXAMPLES / "train_distributed.py", *(f"--{k}={v}" for k, v in options.items())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert (
        f"{processes} processes, {processes // context} shards of the batch, {context} of every image" in result.stdout
    )
    with (tmp_path / "losses.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == STEPS and np.ptp(losses) > 0.05
    np.testing.assert_allclose(losses, losses_of_one_device, rtol=2e-5)


def _attention(**options):
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    return distributed.sharded_attention(mesh, batch="data", grid=("context", None), **options)


WINDOW = {"kernel_size": (3, 3), "num_heads": 2}


def _linen(attention):
    layer = natten.NeighborhoodAttention(**WINDOW, rel_pos_bias=True, attention=attention)
    return lambda x: layer.init_with_output(jax.random.key(0), x)[0]


def _nnx(attention):
    layer = natten.nnx.NeighborhoodAttention(in_features=8, **WINDOW, attention=attention, rngs=nnx.Rngs(0))
    return layer


def _adapter(attention):
    function = natten.attention_fn(WINDOW["kernel_size"], attention=attention)
    layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=function)
    return lambda x: layer.init_with_output(jax.random.key(0), x)[0]


def _haiku(attention):
    module = hk.transform(lambda x: natten_haiku.NeighborhoodAttention(**WINDOW, key_size=4, attention=attention)(x))
    return lambda x: module.apply(module.init(jax.random.key(0), x), None, x)


LAYERS = {"linen": _linen, "nnx": _nnx, "adapter": _adapter, "haiku": _haiku}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_a_sharded_attention(name):
    x = jnp.asarray(generator(name).normal(size=(2, 7, 5, 8)))  # seven rows on two devices: padded
    expected, got = (
        jax.jit(LAYERS[name](attention), compiler_options=QUICK_COMPILE)(x) for attention in (None, _attention())
    )
    assert not np.allclose(expected, expected[:, :1], atol=1e-3)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_dropout_is_refused_with_an_attention_of_the_callers():
    layer = natten.NeighborhoodAttention(**WINDOW, dropout_rate=0.5, deterministic=False, attention=_attention())
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(NotImplementedError, match="not with an attention of the caller's"):
        layer.init(rngs, jnp.ones((2, 8, 5, 8)))
