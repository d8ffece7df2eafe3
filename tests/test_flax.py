"""The ``flax.linen`` layer and the adapter for Flax's own attention layers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import generator

from jax_natten import Neighborhood, reference

nn = pytest.importorskip("flax.linen")

from jax_natten.flax import NeighborhoodAttention, attention_fn  # noqa: E402

F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
WHOLE_GRIDS = [(6,), (3, 4), (2, 3, 4)]
WINDOWS = [
    ((12,), {"kernel_size": 4, "stride": 2, "dilation": 3}),
    ((12,), {"kernel_size": 5, "is_causal": True}),
    ((7, 8), {"kernel_size": (3, 4), "stride": (1, 2), "dilation": (2, 1), "is_causal": (False, True)}),
    ((3, 6, 4), {"kernel_size": (2, 3, 3), "dilation": (1, 2, 1), "is_causal": (True, False, False)}),
]


def inputs(*shape, words="", dtype=np.float64):
    return jnp.asarray(generator("layer", words, shape).standard_normal(shape), dtype)


def drawn_params(layer, *args, **options):
    """Parameters of a layer, all of them random: initial biases are zero and would hide a mistake."""
    shapes = jax.eval_shape(functools.partial(layer.init, **options), jax.random.key(0), *args)
    leaves, tree = jax.tree.flatten(shapes)
    drawn = [inputs(*leaf.shape, words=i, dtype=leaf.dtype) * 0.3 for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


def apply(layer, params, *args, **options):
    return jax.jit(functools.partial(layer.apply, **options))(params, *args)


def flattened(x, grid):
    return x.reshape(*x.shape[: -len(grid) - 1], -1, x.shape[-1])


def assert_equal(result, expected):
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-11)


def test_has_the_fields_of_flax_with_the_same_defaults():
    ours = {field.name: field for field in dataclasses.fields(NeighborhoodAttention)}
    # Not meaningful here, always so here, or marked deprecated by Flax.
    absent = {"attention_fn", "decode", "force_fp32_for_softmax"}
    for field in dataclasses.fields(nn.MultiHeadDotProductAttention):
        if field.name in absent or "dot_general" in field.name or "einsum" in field.name:
            continue
        assert field.name in ours
        default = ours[field.name].default
        assert callable(field.default) or default == field.default, field.name


@pytest.mark.parametrize(
    "options", [{}, {"qkv_features": 12, "out_features": 5, "normalize_qk": True}, {"use_bias": False}]
)
def test_parameters_have_the_names_and_shapes_of_flax(options):
    x = inputs(2, 6, 8)
    theirs = drawn_params(nn.MultiHeadDotProductAttention(num_heads=4, **options), x)
    ours = drawn_params(NeighborhoodAttention(num_heads=4, kernel_size=3, **options), x)
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)


@pytest.mark.parametrize("grid", WHOLE_GRIDS)
@pytest.mark.parametrize("normalize_qk", [False, True])
def test_checkpoint_of_flax_attention_gives_the_same_output_when_the_window_is_the_grid(grid, normalize_qk):
    x = inputs(2, *grid, 8)
    theirs = nn.MultiHeadDotProductAttention(num_heads=4, normalize_qk=normalize_qk, **F64)
    params = drawn_params(theirs, flattened(x, grid))
    ours = NeighborhoodAttention(num_heads=4, kernel_size=grid, normalize_qk=normalize_qk, **F64)
    assert_equal(flattened(apply(ours, params, x), grid), apply(theirs, params, flattened(x, grid)))


@pytest.mark.parametrize(("grid", "window"), WINDOWS)
def test_equals_flax_attention_under_the_neighborhoods_mask(grid, window):
    q, k, v = (inputs(2, *grid, 8, words=name) for name in "qkv")
    mask = reference.mask(Neighborhood.make(**window), grid)
    theirs = nn.MultiHeadDotProductAttention(num_heads=2, **F64)
    ours = NeighborhoodAttention(num_heads=2, **window, **F64)
    params = drawn_params(ours, q)

    def with_gradient(apply, *args, **kwargs):
        def loss(params):
            out = apply(params, *args, **kwargs)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    gradient, out = with_gradient(ours.apply, q, k, v)
    expected_gradient, expected = with_gradient(theirs.apply, *(flattened(x, grid) for x in (q, k, v)), mask=mask)
    assert_equal(flattened(out, grid), expected)
    jax.tree.map(assert_equal, gradient, expected_gradient)


def test_any_number_of_batch_axes():
    layer = NeighborhoodAttention(num_heads=2, kernel_size=(3, 3), **F64)
    x = inputs(2, 3, 5, 4, 8)
    params = drawn_params(layer, x)
    out = apply(layer, params, x)
    assert_equal(apply(layer, params, x[1, 2]), out[1, 2])
    assert_equal(jax.vmap(lambda x: apply(layer, params, x))(x), out)


def test_kv_heads_are_shared_by_groups_of_query_heads():
    x = inputs(2, 9, 8)
    grouped = NeighborhoodAttention(num_heads=4, num_kv_heads=2, kernel_size=3, **F64)
    params = drawn_params(grouped, x)["params"]
    assert params["key"]["kernel"].shape == params["value"]["kernel"].shape == (8, 2, 2)
    repeated = dict(params)
    for name in ("key", "value"):
        repeated[name] = {"kernel": params[name]["kernel"].repeat(2, 1), "bias": params[name]["bias"].repeat(2, 0)}
    full = NeighborhoodAttention(num_heads=4, kernel_size=3, **F64)
    assert_equal(apply(grouped, {"params": params}, x), apply(full, {"params": repeated}, x))


def natten_layer(x, weights, heads, kernel_size, dilation):
    """The layer of NAT and DiNAT as its authors define it, one query at a time, for PyTorch's weights."""
    height, width, dim = x.shape
    qkv = x @ weights["qkv.weight"].T + weights["qkv.bias"]
    q, k, v = np.moveaxis(qkv.reshape(height, width, 3, heads, dim // heads), (2, 3), (0, 1))
    q = q * (dim // heads) ** -0.5
    out = np.zeros((height, width, heads, dim // heads))

    def window(position, length):
        group = np.arange(position % dilation, length, dilation)
        here = position // dilation
        begin = min(max(here - kernel_size // 2, 0), len(group) - kernel_size)
        return [(group[i], i - here + kernel_size - 1) for i in range(begin, begin + kernel_size)]

    for h, y, x_ in np.ndindex(heads, height, width):
        keys = [(a, b) for a in window(y, height) for b in window(x_, width)]
        scores = np.array([q[h, y, x_] @ k[h, a, b] + weights["rpb"][h, i, j] for (a, i), (b, j) in keys])
        attn = np.exp(scores - scores.max())
        out[y, x_, h] = sum(w * v[h, a, b] for w, ((a, _), (b, _)) in zip(attn / attn.sum(), keys, strict=True))
    return out.reshape(height, width, dim) @ weights["proj.weight"].T + weights["proj.bias"]


def natten_weights(dim, heads, kernel_size):
    shapes = {
        "qkv.weight": (3 * dim, dim),
        "qkv.bias": (3 * dim,),
        "rpb": (heads, 2 * kernel_size - 1, 2 * kernel_size - 1),
        "proj.weight": (dim, dim),
        "proj.bias": (dim,),
    }
    return {name: generator("natten", name).standard_normal(shape) * 0.5 for name, shape in shapes.items()}


def test_checkpoint_of_nat_maps_as_documented():
    dim, heads, kernel_size, dilation = 8, 2, 3, 2
    weights = natten_weights(dim, heads, kernel_size)
    params = {
        "qkv": {
            "kernel": weights["qkv.weight"].T.reshape(dim, 3 * heads, dim // heads),
            "bias": weights["qkv.bias"].reshape(3 * heads, dim // heads),
        },
        "rpb": weights["rpb"],
        "out": {"kernel": weights["proj.weight"].T.reshape(heads, dim // heads, dim), "bias": weights["proj.bias"]},
    }
    layer = NeighborhoodAttention(
        heads, (kernel_size, kernel_size), dilation=dilation, fused_qkv=True, rel_pos_bias=True, **F64
    )
    x = np.asarray(inputs(7, 6, dim))
    initial = drawn_params(layer, x)["params"]
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, params)
    assert_equal(apply(layer, {"params": params}, x), natten_layer(x, weights, heads, kernel_size, dilation))


def test_fused_projection_holds_query_key_and_value_heads_in_this_order():
    x = inputs(2, 9, 8)
    separate = NeighborhoodAttention(num_heads=4, num_kv_heads=2, kernel_size=3, normalize_qk=True, **F64)
    params = drawn_params(separate, x)["params"]
    stacked = {
        name: jnp.concatenate([params[part][name] for part in ("query", "key", "value")], axis=-2)
        for name in ("kernel", "bias")
    }
    rest = {name: value for name, value in params.items() if name not in ("query", "key", "value")}
    fused = separate.clone(fused_qkv=True)
    assert_equal(apply(fused, {"params": {"qkv": stacked, **rest}}, x), apply(separate, {"params": params}, x))


def test_relative_position_bias_starts_small_and_learns():
    layer = NeighborhoodAttention(num_heads=8, kernel_size=(5, 3), rel_pos_bias=True)
    x = inputs(1, 6, 6, 16, dtype=np.float32)
    params = jax.jit(layer.init)(jax.random.key(1), x)
    rpb = params["params"]["rpb"]
    assert rpb.shape == (8, 9, 5) and rpb.dtype == jnp.float32
    assert 0.01 < np.std(rpb) < 0.02 and np.abs(rpb).max() <= 0.04 + 1e-6
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply(p, x) ** 2)))(params)["params"]["rpb"]
    assert np.all(np.abs(gradient) > 0)


@pytest.mark.parametrize("broadcast_dropout", [True, False])
def test_dropout_on_attention_weights_equals_that_of_flax(broadcast_dropout):
    x = inputs(3, 6, 8)
    options = {"num_heads": 2, "dropout_rate": 0.4, "broadcast_dropout": broadcast_dropout, **F64}
    theirs = nn.MultiHeadDotProductAttention(**options)
    ours = NeighborhoodAttention(kernel_size=6, **options)
    params = drawn_params(theirs, x, deterministic=True)
    key = jax.random.key(7)
    dropped = jax.jit(lambda key: ours.apply(params, x, deterministic=False, rngs={"dropout": key}))
    out = dropped(key)
    assert_equal(dropped(key), out)
    assert np.all(np.abs(out - apply(ours, params, x, deterministic=True)) > 0)
    if broadcast_dropout:  # otherwise the order of Flax's axes (heads before queries) draws another mask
        expected = apply(theirs, params, x, deterministic=False, dropout_rng=key)
        assert_equal(apply(ours, params, x, deterministic=False, dropout_rng=key), expected)


def test_dropout_keeps_the_mean():
    x = jnp.broadcast_to(inputs(8), (4000, 4, 8))
    layer = NeighborhoodAttention(2, 3, dropout_rate=0.5, broadcast_dropout=False, **F64)
    params = drawn_params(layer, x[:1], deterministic=True)
    out = apply(layer, params, x, deterministic=False, rngs={"dropout": jax.random.key(2)})
    expected = apply(layer, params, x[:1], deterministic=True)
    np.testing.assert_allclose(out.mean(0, keepdims=True), expected, atol=6 * np.max(out.std(0)) / 4000**0.5)


def test_sown_weights_are_those_of_flax():
    x = inputs(2, 3, 4, 8)
    theirs, ours = nn.MultiHeadDotProductAttention(2, **F64), NeighborhoodAttention(2, (3, 4), **F64)
    params = drawn_params(ours, x)
    out, state = apply(ours, params, x, sow_weights=True, mutable=["intermediates"])
    _, expected = apply(theirs, params, flattened(x, (3, 4)), sow_weights=True, mutable=["intermediates"])
    (weights,), (expected,) = (s["intermediates"]["attention_weights"] for s in (state, expected))
    assert weights.shape == (2, 3, 4, 2, 12)
    assert_equal(jnp.moveaxis(weights.reshape(2, 12, 2, 12), 1, 2), expected)
    assert_equal(out, apply(ours, params, x))


@pytest.mark.parametrize(
    ("dtype", "dropout_rate"), [(jnp.bfloat16, 0.0), (jnp.float16, 0.0), (None, 0.0), (jnp.bfloat16, 0.1)]
)
def test_computes_in_the_dtype_asked_for(dtype, dropout_rate):
    layer = NeighborhoodAttention(
        2, (3, 3), dtype=dtype, rel_pos_bias=True, normalize_qk=True, dropout_rate=dropout_rate, deterministic=False
    )
    x = inputs(1, 4, 4, 8, dtype=jnp.bfloat16)
    params = drawn_params(layer.clone(deterministic=True), x)
    out = apply(layer, params, x, rngs={"dropout": jax.random.key(1)})
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert out.dtype == (jnp.float32 if dtype is None else dtype)
    assert np.all(np.isfinite(out.astype(np.float32)))


def test_scale_multiplies_the_products_also_when_it_is_zero():
    x = inputs(1, 5, 8)
    layer = NeighborhoodAttention(2, 5, scale=0.0, **F64)
    params = drawn_params(layer, x)
    out, state = apply(layer, params, x, sow_weights=True, mutable=["intermediates"])
    assert_equal(state["intermediates"]["attention_weights"][0], jnp.full((1, 5, 2, 5), 0.2))
    assert_equal(apply(layer, params, x), out)


X2D = np.ones((1, 5, 6, 8), np.float32)
BAD_LAYERS = [
    ({"kernel_size": (3, 7)}, {}, ValueError, "kernel_size"),
    ({"kernel_size": (3, 3, 3, 3)}, {}, ValueError, "kernel_size"),
    ({"kernel_size": (3, 3), "stride": 4}, {}, ValueError, "stride"),
    ({"kernel_size": (3, 3), "dilation": (2, 1)}, {}, ValueError, "dilation"),
    ({"kernel_size": (3, 3.0)}, {}, TypeError, "kernel_size"),
    ({"kernel_size": (3, 3), "num_heads": 3}, {}, ValueError, "qkv_features"),
    ({"kernel_size": (3, 3), "num_kv_heads": 3}, {}, ValueError, "num_kv_heads"),
    ({"kernel_size": (3, 3), "is_causal": True, "rel_pos_bias": True}, {}, ValueError, "rpb"),
    ({"kernel_size": (3, 3), "implementation": "fast"}, {}, ValueError, "implementation"),
    ({"kernel_size": (3, 3)}, {"mask": X2D}, NotImplementedError, "mask"),
    ({"kernel_size": (3, 3)}, {"inputs_v": X2D}, ValueError, "none for key"),
    ({"kernel_size": (3, 3)}, {"inputs_k": X2D[:, :4]}, ValueError, "key"),
    ({"kernel_size": (3, 3), "fused_qkv": True}, {"inputs_k": X2D}, ValueError, "fused_qkv"),
    ({"kernel_size": (3, 3), "dropout_rate": 0.1}, {}, ValueError, "deterministic"),
]


@pytest.mark.parametrize(("options", "call", "error", "words"), BAD_LAYERS)
def test_bad_layers_name_what_is_wrong(options, call, error, words):
    with pytest.raises(error, match=words):
        NeighborhoodAttention(**{"num_heads": 2, **options}).init(jax.random.key(0), X2D, **call)


def test_input_without_a_whole_grid_is_refused():
    with pytest.raises(ValueError, match="grid"):
        NeighborhoodAttention(2, (3, 3)).init(jax.random.key(0), np.ones((5, 8), np.float32))


@pytest.mark.parametrize(("grid", "window"), WINDOWS)
@pytest.mark.parametrize("flat", [False, True])
def test_adapter_in_flax_layer_equals_our_layer(grid, window, flat):
    x = inputs(2, *grid, 8)
    ours = NeighborhoodAttention(num_heads=2, **window, **F64)
    params = drawn_params(ours, x)
    function = attention_fn(**window, grid=grid if flat else None)
    stock = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=function, **F64)
    out = apply(stock, params, flattened(x, grid) if flat else x)
    assert_equal(out.reshape(x.shape), apply(ours, params, x))


def test_adapter_honours_dropout_and_sowing():
    x = inputs(2, 12, 8)
    options = {"num_heads": 2, "dropout_rate": 0.3, "deterministic": False, **F64}
    ours = NeighborhoodAttention(kernel_size=(3, 2), **options)
    stock = nn.MultiHeadDotProductAttention(attention_fn=attention_fn((3, 2), grid=(3, 4)), **options)
    key = jax.random.key(3)
    params = drawn_params(ours.clone(deterministic=True), x.reshape(2, 3, 4, 8))
    call = {"dropout_rng": key, "sow_weights": True, "mutable": ["intermediates"]}
    expected, expected_state = apply(ours, params, x.reshape(2, 3, 4, 8), **call)
    out, state = apply(stock, params, x, **call)
    assert_equal(out.reshape(2, 3, 4, 8), expected)
    jax.tree.map(assert_equal, state, expected_state)


Q = np.ones((2, 12, 2, 4), np.float32)
BAD_CALLS = [
    ({"mask": np.ones((2, 1, 12, 12), bool)}, NotImplementedError, "mask"),
    ({"bias": np.ones((2, 1, 12, 12))}, NotImplementedError, "bias"),
    ({"is_causal": True}, NotImplementedError, "is_causal"),
    ({"qk_attn_weights_einsum": jnp.einsum}, NotImplementedError, "qk_attn_weights_einsum"),
    ({"dropout_rate": 0.1}, ValueError, "dropout"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD_CALLS)
def test_adapter_refuses_what_it_cannot_honour(call, error, words):
    with pytest.raises(error, match=words):
        attention_fn((3, 3), grid=(3, 4))(Q, Q, Q, **call)


def test_adapter_checks_windows_and_length():
    with pytest.raises(ValueError, match="kernel_size"):
        attention_fn((3, 5), grid=(3, 4))
    with pytest.raises(ValueError, match=r"key must have length 12"):
        attention_fn((3, 3), grid=(3, 4))(Q, Q[:, :11], Q)


@pytest.mark.parametrize("extra", ["flax", "haiku"])
def test_missing_framework_names_the_extra_to_install(monkeypatch, extra):
    for name in [name for name in sys.modules if name.startswith(f"jax_natten.{extra}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ImportError, match=rf"jax_natten\[{extra}\]"):
        importlib.import_module(f"jax_natten.{extra}")


def test_importing_the_package_imports_no_framework():
    code = "import sys, jax_natten; assert not {'flax', 'haiku'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
