"""The Haiku module."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import generator

from jax_natten import Neighborhood, reference

hk = pytest.importorskip("haiku")

from jax_natten.haiku import NeighborhoodAttention  # noqa: E402

W_INIT = hk.initializers.VarianceScaling()
WINDOWS = [
    ((6,), {"kernel_size": 6}),
    ((12,), {"kernel_size": 4, "stride": 2, "dilation": 3}),
    ((7, 8), {"kernel_size": (3, 4), "stride": (1, 2), "dilation": (2, 1), "is_causal": (False, True)}),
    ((3, 6, 4), {"kernel_size": (2, 3, 3), "dilation": (1, 2, 1), "is_causal": (True, False, False)}),
]


def inputs(*shape, words="", dtype=np.float64):
    return jnp.asarray(generator("haiku", words, shape).standard_normal(shape), dtype)


def flattened(x, grid):
    return x.reshape(*x.shape[: -len(grid) - 1], -1, x.shape[-1])


def assert_equal(result, expected):
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-11)


def module(cls, **options):
    return hk.transform(lambda *args, **kwargs: cls(**options, name="attention")(*args, **kwargs))


def apply(transformed, params, key, *args, **options):
    return jax.jit(functools.partial(transformed.apply, **options))(params, key, *args)


def drawn_params(transformed, *args):
    """Parameters of a module, all of them random: initial biases are zero and would hide a mistake."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(transformed.init, jax.random.key(0), *args))
    return jax.tree.unflatten(tree, [inputs(*x.shape, words=i) * 0.3 for i, x in enumerate(leaves)])


@pytest.mark.parametrize(("grid", "window"), WINDOWS)
@pytest.mark.parametrize("sizes", [{}, {"value_size": 3, "model_size": 5, "with_bias": False}])
def test_parameters_of_haiku_attention_load_and_give_its_output_under_the_mask(grid, window, sizes):
    q, k, v = (inputs(2, *grid, 8, words=name) for name in "qkv")
    theirs = module(hk.MultiHeadAttention, num_heads=2, key_size=4, w_init=W_INIT, **sizes)
    ours = module(NeighborhoodAttention, num_heads=2, key_size=4, **window, **sizes)
    flat = [flattened(x, grid) for x in (q, k, v)]
    params = drawn_params(theirs, *flat)
    assert jax.tree.map(jnp.shape, drawn_params(ours, q, k, v)) == jax.tree.map(jnp.shape, params)
    mask = jnp.asarray(reference.mask(Neighborhood.make(**window), grid))[None, None]
    expected = apply(theirs, params, None, *flat, mask)
    assert_equal(flattened(apply(ours, params, None, q, k, v), grid), expected)
    assert_equal(apply(ours, params, None, q), apply(ours, params, None, q, q, q))


def test_equals_the_flax_layer_with_mapped_parameters():
    pytest.importorskip("flax")
    from jax_natten.flax import NeighborhoodAttention as FlaxAttention

    options = {"num_heads": 4, "num_kv_heads": 2, "kernel_size": (3, 3), "rel_pos_bias": True, "fused_qkv": True}
    x = inputs(2, 5, 4, 8)
    ours = module(NeighborhoodAttention, key_size=2, **options)
    params = drawn_params(ours, x)
    assert params["attention"]["rpb"].shape == (4, 5, 5)
    qkv, out = params["attention/qkv"], params["attention/linear"]
    mapped = {
        "qkv": {"kernel": qkv["w"].reshape(8, 8, 2), "bias": qkv["b"].reshape(8, 2)},
        "out": {"kernel": out["w"].reshape(4, 2, 8), "bias": out["b"]},
        "rpb": params["attention"]["rpb"],
    }
    flax_layer = FlaxAttention(**options, dtype=jnp.float64)
    assert_equal(apply(ours, params, None, x), jax.jit(flax_layer.apply)({"params": mapped}, x))


def test_trains_under_jit():
    x = inputs(2, 5, 4, 8, dtype=np.float32)
    ours = module(NeighborhoodAttention, num_heads=2, key_size=4, kernel_size=(3, 3), rel_pos_bias=True)
    params = jax.tree.map(lambda p: p.astype(np.float32), drawn_params(ours, x))
    step = jax.jit(jax.value_and_grad(lambda p: jnp.mean((ours.apply(p, None, x) - x) ** 2)))
    first, _ = step(params)
    for _ in range(20):
        loss, gradient = step(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert loss < first


@pytest.mark.parametrize("broadcast_dropout", [True, False])
def test_dropout_acts_in_training_only(broadcast_dropout):
    x = jnp.broadcast_to(inputs(6, 8), (3, 6, 8))
    options = {"num_heads": 2, "key_size": 4, "kernel_size": 3, "broadcast_dropout": broadcast_dropout}
    ours = module(NeighborhoodAttention, dropout_rate=0.5, **options)
    params = drawn_params(ours, x)
    dropped = jax.jit(lambda key: ours.apply(params, key, x, is_training=True))
    first, second = dropped(jax.random.key(1)), dropped(jax.random.key(2))
    assert not np.allclose(first, apply(ours, params, None, x)) and not np.allclose(first, second)
    assert np.allclose(first[0], first[1]) == broadcast_dropout
    assert_equal(first, dropped(jax.random.key(1)))


X = np.ones((1, 5, 6, 8), np.float32)


@pytest.mark.parametrize(
    ("options", "args", "error", "words"),
    [
        ({"kernel_size": (3, 7)}, (X,), ValueError, "kernel_size"),
        ({"kernel_size": (3, 3), "stride": 4}, (X,), ValueError, "stride"),
        ({"kernel_size": (3, 3), "num_kv_heads": 3}, (X,), ValueError, "num_kv_heads"),
        ({"kernel_size": (3, 3)}, (X, X, X, X), NotImplementedError, "mask"),
        ({"kernel_size": (3, 3)}, (X, None, X), ValueError, "none for key"),
        ({"kernel_size": (3, 3), "fused_qkv": True}, (X, X), ValueError, "fused_qkv"),
        ({"kernel_size": (3, 3)}, (X[0, 0],), ValueError, "grid"),
    ],
)
def test_bad_modules_name_what_is_wrong(options, args, error, words):
    with pytest.raises(error, match=words):
        module(NeighborhoodAttention, num_heads=2, key_size=4, **options).init(jax.random.key(0), *args)
