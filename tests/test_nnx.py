"""The ``flax.nnx`` layer."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import generator

from jax_natten import Neighborhood, reference

nnx = pytest.importorskip("flax.nnx")

from jax_natten.flax import attention_fn  # noqa: E402
from jax_natten.flax import nnx as natten_nnx  # noqa: E402

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
WINDOWS = [
    ((12,), {"kernel_size": 4, "stride": 2, "dilation": 3}),
    ((7, 8), {"kernel_size": [3, 4], "stride": (1, 2), "dilation": (2, 1), "is_causal": (False, True)}),
    ((3, 6, 4), {"kernel_size": (2, 3, 3), "dilation": (1, 2, 1), "is_causal": (True, False, False)}),
]


def inputs(*shape, words="", dtype=np.float64):
    return jnp.asarray(generator("nnx", words, shape).standard_normal(shape), dtype)


def flattened(x, grid):
    return x.reshape(*x.shape[: -len(grid) - 1], -1, x.shape[-1])


def assert_equal(result, expected):
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-11)


def drawn(make, **options):
    """A module with all parameters random: initial biases are zero and would hide a mistake."""
    module = nnx.eval_shape(lambda: make(in_features=8, rngs=nnx.Rngs(0), **F64, **options))
    leaves, tree = jax.tree.flatten(nnx.state(module, nnx.Param))
    nnx.update(module, jax.tree.unflatten(tree, [inputs(*x.shape, words=i) * 0.3 for i, x in enumerate(leaves)]))
    return module


def theirs(**options):
    return drawn(nnx.MultiHeadAttention, decode=False, **options)


def ours(**options):
    return drawn(natten_nnx.NeighborhoodAttention, **options)


def apply(module, *args, **options):
    return nnx.jit(lambda module, *args: module(*args, **options))(module, *args)


def shapes(module):
    return {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def test_takes_the_arguments_of_flax_in_the_same_order():
    parameters = inspect.signature(natten_nnx.NeighborhoodAttention.__init__).parameters
    absent = {"attention_fn", "decode"}  # not meaningful here; Flax marks its dot_general arguments deprecated
    expected = [
        (name, p.kind)
        for name, p in inspect.signature(nnx.MultiHeadAttention.__init__).parameters.items()
        if name not in absent and "dot_general" not in name
    ]
    names = [name for name, _ in expected]
    assert expected == [(name, p.kind) for name, p in parameters.items() if name in names]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_features": 12, "out_features": 5, "normalize_qk": True},
        {"use_bias": False, "num_kv_heads": 2},
        {"in_kv_features": 3},
    ],
)
def test_parameters_have_the_names_and_shapes_of_flax(options):
    assert shapes(ours(num_heads=4, kernel_size=3, **options)) == shapes(theirs(num_heads=4, **options))


@pytest.mark.parametrize("grid", [(6,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("options", [{}, {"normalize_qk": True}, {"num_kv_heads": 2}])
def test_checkpoint_of_flax_attention_gives_the_same_output_when_the_window_is_the_grid(grid, options):
    stock, layer = theirs(num_heads=4, **options), ours(num_heads=4, kernel_size=grid, **options)
    nnx.update(layer, nnx.state(stock, nnx.Param))
    x = inputs(2, *grid, 8)
    # Flax's own fast path computes in float32 in places.
    out, expected = apply(layer, x), apply(stock, flattened(x, grid))
    np.testing.assert_allclose(flattened(out, grid), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("grid", "window"), WINDOWS)
def test_equals_flax_attention_under_the_neighborhoods_mask(grid, window):
    stock, layer = theirs(num_heads=2), ours(num_heads=2, **window)
    nnx.update(layer, nnx.state(stock, nnx.Param))
    mask = reference.mask(Neighborhood.make(**window), grid)[None, None]
    q, k, v = (inputs(2, *grid, 8, words=name) for name in "qkv")
    flat = [flattened(x, grid) for x in (q, k, v)]
    out, expected = apply(layer, q, k, v), apply(stock, *flat, mask=mask)
    np.testing.assert_allclose(flattened(out, grid), expected, rtol=1e-5, atol=1e-6)
    adapted = theirs(num_heads=2, attention_fn=attention_fn(**window, grid=grid))
    nnx.update(adapted, nnx.state(stock, nnx.Param))
    assert_equal(apply(adapted, *flat), flattened(out, grid))


def test_linen_layer_with_the_same_parameters_gives_the_same_output():
    options = {"kernel_size": (3, 5), "dilation": (2, 1), "rel_pos_bias": True, "fused_qkv": True, "normalize_qk": True}
    layer = ours(num_heads=4, num_kv_heads=2, **options)
    from jax_natten.flax import NeighborhoodAttention

    linen = NeighborhoodAttention(num_heads=4, num_kv_heads=2, **options, **F64)
    x = inputs(2, 6, 7, 8)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    initial = jax.eval_shape(linen.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, initial)
    assert_equal(apply(layer, x), jax.jit(linen.apply)({"params": params}, x))


def test_trains_under_nnx_transforms():
    layer = natten_nnx.NeighborhoodAttention(2, 8, kernel_size=(3, 3), rel_pos_bias=True, rngs=nnx.Rngs(0))
    x = inputs(2, 4, 5, 8, dtype=np.float32)

    @nnx.jit
    def step(layer, x):
        return nnx.value_and_grad(lambda layer: jnp.mean((layer(x) - x) ** 2))(layer)

    first, gradient = step(layer, x)
    assert set(shapes(layer)) == {path for path, _ in nnx.to_flat_state(gradient)}
    for _ in range(20):
        loss, gradient = step(layer, x)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(layer, nnx.Param), gradient))
    assert loss < first


def test_dropout_follows_calls_views_and_streams():
    layer = natten_nnx.NeighborhoodAttention(2, 8, kernel_size=3, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = inputs(1, 6, 8, dtype=np.float32)
    with pytest.raises(ValueError, match="deterministic"):
        layer(x)
    clean = layer(x, deterministic=True)
    first, second = layer(x, deterministic=False), layer(x, deterministic=False)
    assert not np.allclose(first, second) and not np.allclose(first, clean)
    assert_equal(layer(x, deterministic=False, rngs=nnx.Rngs(3)), layer(x, deterministic=False, rngs=nnx.Rngs(3)))
    assert_equal(nnx.view(layer, deterministic=True)(x), clean)
    layer.eval()
    assert_equal(layer(x), clean)
    bare = natten_nnx.NeighborhoodAttention(2, 8, kernel_size=3, dropout_rate=0.5, rngs=nnx.Rngs(0), keep_rngs=False)
    with pytest.raises(ValueError, match="rngs"):
        bare(x, deterministic=False)


@pytest.mark.parametrize("adapter", [False, True])
def test_sows_attention_weights(adapter):
    x = inputs(2, 12, 8)
    if adapter:
        layer = theirs(num_heads=2, attention_fn=attention_fn((3, 2), grid=(3, 4)))
    else:
        layer, x = ours(num_heads=2, kernel_size=(3, 2)), x.reshape(2, 3, 4, 8)
    out, state = nnx.capture(lambda layer: layer(x, sow_weights=True), nnx.Intermediate)(layer)
    (weights,) = jax.tree.leaves(state)
    assert weights.shape == (2, 3, 4, 2, 6)
    assert_equal(weights.sum(-1), jnp.ones((2, 3, 4, 2)))
    assert_equal(out, layer(x))


def test_is_causal_of_the_flax_layer_needs_a_causal_adapter():
    x = inputs(2, 6, 8)
    with pytest.raises(NotImplementedError, match="is_causal"):
        theirs(num_heads=2, attention_fn=attention_fn(6))(x, is_causal=True)
    layer = theirs(num_heads=2, attention_fn=attention_fn(6, is_causal=True))
    assert_equal(layer(x, is_causal=True), layer(x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kernel_size": (3, 3, 3, 3)}, ValueError, "kernel_size"),
        ({"kernel_size": 3, "stride": 4}, ValueError, "stride"),
        ({"kernel_size": 3, "num_heads": 3}, ValueError, "qkv_features"),
        ({"kernel_size": 3, "num_kv_heads": 3}, ValueError, "num_kv_heads"),
    ],
)
def test_bad_layers_name_what_is_wrong(options, error, words):
    with pytest.raises(error, match=words):
        ours(**{"num_heads": 2, **options})


@pytest.mark.parametrize(("shape", "words"), [((8,), "grid"), ((1, 2, 8), "kernel_size"), ((1, 6, 7), "features")])
def test_bad_inputs_name_what_is_wrong(shape, words):
    with pytest.raises(ValueError, match=words):
        ours(num_heads=2, kernel_size=3)(inputs(*shape))
