"""Context parallelism equals the single-device result, forward and backward, and exchanges no more than the halo."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_natten
from jax_natten import distributed
from jax_natten.neighborhood import Axis

HEADS, DIM = 2, 3


@functools.cache
def mesh(shape):
    return jax.make_mesh(shape, ("rows", "columns")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


@st.composite
def axes(draw, shards):
    """One grid axis: length, window, stride, dilation, causal. Not always a multiple of the shards."""
    length = draw(st.integers(shards, 5 * shards))
    dilation = draw(st.integers(1, 3))
    window = draw(st.integers(1, max(1, length // dilation)))
    dilation = dilation if window * dilation <= length else 1
    return length, window, draw(st.integers(1, window)), dilation, draw(st.booleans())


def sharded(function, names, padded, grid):
    """``function`` on whole arrays, run on shards of arrays padded to the shards."""
    spec = P(None, *names)
    local = jax.shard_map(function, mesh=mesh(padded["mesh"]), in_specs=(spec,) * 3, out_specs=(spec, spec))

    def run(*arrays):
        widths = [(0, 0), *((0, target - n) for target, n in zip(padded["grid"], grid)), (0, 0), (0, 0)]
        results = local(*(jnp.pad(a, widths) for a in arrays))
        return tuple(r[(slice(None), *(slice(n) for n in grid))] for r in results)

    return run


def check(mesh_shape, problem, seed):
    grid, window, stride, dilation, causal = (tuple(column) for column in zip(*problem))
    names = ("rows", "columns")[: len(mesh_shape)]
    rng = np.random.default_rng(seed)
    query, key, value = (jnp.asarray(rng.normal(size=(1, *grid, HEADS, DIM))) for _ in range(3))
    cotangents = [jnp.asarray(rng.normal(size=(1, *grid, HEADS, *tail))) for tail in ((DIM,), ())]

    def whole(*arrays):
        return jax_natten.neighborhood_attention(*arrays, window, stride, dilation, causal, return_lse=True)

    def shard(*arrays):
        return distributed.neighborhood_attention(
            *arrays, window, stride, dilation, causal, mesh_axes=names, grid=grid, return_lse=True
        )

    padded = {"mesh": mesh_shape, "grid": [-(-n // p) * p for n, p in zip(grid, mesh_shape)]}
    both = [whole, sharded(shard, names, padded, grid)]
    (expected, pull), (got, pull_sharded) = (jax.jit(functools.partial(jax.vjp, f))(query, key, value) for f in both)
    for g, e in zip(got, expected):
        np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-10)
    for g, e in zip(pull_sharded(tuple(cotangents)), pull(tuple(cotangents))):
        np.testing.assert_allclose(g, e, rtol=1e-8, atol=1e-9)


@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(axes(4), st.integers(0, 99))
def test_one_sharded_axis_equals_one_device(axis, seed):
    check((4,), [axis], seed)


@hypothesis.settings(max_examples=3, deadline=None)
@hypothesis.given(axes(4), axes(2), st.integers(0, 99))
def test_two_sharded_axes_equal_one_device(first, second, seed):
    check((4, 2), [first, second], seed)


def test_windows_wider_than_a_shard_take_several_hops():
    check((8,), [(24, 11, 2, 2, False)], 0)


@pytest.mark.parametrize("causal", [False, True])
def test_only_the_halo_travels(causal):
    """The communication volume per device is what the windows of a shard reach beyond it, no more."""
    plan = distributed.plan_axis(Axis(1024, 63, 1, 2, causal), 8, 128)
    assert (plan.left, plan.right) == ((124, 0) if causal else (62, 62))
    assert plan.size <= 128 + plan.exchanged + 2

    names = ("rows",)
    local = jax.shard_map(
        lambda *a: distributed.neighborhood_attention(*a, 63, dilation=2, is_causal=causal, mesh_axes=names),
        mesh=mesh((8,)),
        in_specs=(P(None, "rows"),) * 3,
        out_specs=P(None, "rows"),
    )
    array = jax.ShapeDtypeStruct((1, 1024, HEADS, DIM), jnp.float32)
    text = jax.jit(local).lower(array, array, array).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text and "all-to-all" not in text


def test_second_derivatives():
    spec = P(None, "rows")
    arrays = [jax.random.normal(jax.random.key(i), (1, 16, 1, 2), jnp.float64) for i in range(3)]

    def local(*a):
        return distributed.neighborhood_attention(*a, 5, 2, mesh_axes=("rows",))

    def product(f):
        gradient = jax.grad(lambda *a: jnp.sin(f(*a)).sum())
        return jax.jit(lambda *a: jax.jvp(lambda q: gradient(q, *a[1:]), a[:1], a[1:2])[1])(*arrays)

    got = product(jax.shard_map(local, mesh=mesh((4,)), in_specs=(spec,) * 3, out_specs=spec))
    expected = product(lambda *a: jax_natten.na1d(*a, 5, 2))
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mesh_axes": ("rows", None)}, "mesh_axes must have 1 entries"),
        ({"grid": (99,)}, "do not hold a grid axis of length 99"),
        ({"kernel_size": 65}, "kernel_size"),
        ({"mesh_axes": (None,), "grid": (64,)}, "not sharded"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    arguments = {"kernel_size": 5, "mesh_axes": ("rows",)} | change
    local = jax.shard_map(
        lambda x: distributed.neighborhood_attention(x, x, x, **arguments),
        mesh=mesh((4,)),
        in_specs=P(None, "rows"),
        out_specs=P(None, "rows"),
    )
    with pytest.raises(ValueError, match=words):
        local(jnp.ones((1, 64, 1, 2)))
