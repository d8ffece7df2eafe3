"""Context parallelism equals the single-device result in every derivative, exchanges no more than the halo, waits for
it only at the border, and needs memory for its shard and the halo alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import QUICK_COMPILE, generator
from hlo import Program, halo_bytes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_natten
from jax_natten import distributed, halo, native
from jax_natten.neighborhood import Axis, Neighborhood

NAMES = ("x", "y", "z")


@functools.cache
def mesh(*shape):
    return jax.make_mesh(shape, NAMES[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


@st.composite
def axes(draw, shards, longest=6):
    """One grid axis: length, window, stride, dilation, causal. Not always a multiple of the shards."""
    length = draw(st.integers(shards, longest * shards))
    dilation = draw(st.integers(1, min(3, length)))
    # Small windows leave an interior, large ones take several hops.
    window = draw(st.one_of(st.integers(1, min(4, length // dilation)), st.integers(1, length // dilation)))
    return length, window, draw(st.integers(1, window)), dilation, draw(st.booleans())


# The plan, without JAX.


@hypothesis.settings(max_examples=400)
@hypothesis.given(st.integers(1, 8).flatmap(lambda shards: st.tuples(st.just(shards), axes(shards, 12))), st.booleans())
def test_every_slab_shows_its_queries_their_windows(case, spare):
    shards, description = case
    axis = Axis(*description)
    shard = -(-axis.length // shards) + spare
    plan = distributed.plan_axis(axis, shards, shard)
    assert plan.whole.begin == 0 and plan.whole.end == shard
    assert bool(plan.border) == (plan.interior not in (None, plan.whole))
    if plan.interior:
        runs = sorted((part.begin, part.end) for part in (plan.interior, *plan.border))
        assert runs[0][0] == 0 and runs[-1][1] == shard
        assert all(before[1] == after[0] for before, after in itertools.pairwise(runs))

    mask = axis.mask()
    for part in filter(None, (plan.whole, plan.interior, *plan.border)):
        seen_on_slab = dataclasses.replace(axis, length=part.size).mask()
        for device, offset in enumerate(part.offsets):
            first, start = device * shard, device * shard + offset
            left, right = (0, 0) if part is plan.interior else (plan.left, plan.right)
            for query in range(first + part.begin, min(first + part.end, axis.length)):
                keys = np.flatnonzero(mask[query])
                np.testing.assert_array_equal(keys, start + np.flatnonzero(seen_on_slab[query - start]))
                assert first - left <= keys[0] and keys[-1] < first + shard + right


@hypothesis.given(axes(4, 12), axes(2, 12), st.booleans())
def test_boxes_hold_every_query_of_a_shard_once(first, second, split):
    plans = [halo.plan_axis(Axis(*a), n, -(-a[0] // n)) for a, n in ((first, 4), (second, 2))]
    count = np.zeros([plan.shard for plan in plans], int)
    box, borders = halo.cover(plans, split)
    for parts in (box, *borders):
        count[tuple(slice(part.begin, part.end) for part in parts)] += 1
    np.testing.assert_array_equal(count, 1)


def test_the_interior_is_as_wide_as_its_windows_allow():
    plan = distributed.plan_axis(Axis(1024, 7, 1, 1, False), 8, 128)
    assert (plan.left, plan.right) == (3, 3) and (plan.interior.begin, plan.interior.end) == (3, 125)
    assert plan.interior.size == 128 and [part.size for part in plan.border] == [9, 9]
    causal = distributed.plan_axis(Axis(1024, 7, 1, 1, True), 8, 128)
    assert (causal.left, causal.right) == (6, 0) and (causal.interior.begin, causal.interior.end) == (6, 128)
    assert len(causal.border) == 1
    # Blocked attention whose blocks the shards do not cut exchanges nothing.
    blocked = distributed.plan_axis(Axis(1024, 16, 16, 1, False), 8, 128)
    assert (blocked.left, blocked.right) == (0, 0) and blocked.interior is blocked.whole


def test_a_long_axis_is_planned_at_once():
    plan = distributed.plan_axis(Axis(2**20, 4095, 1, 1, False), 64, 2**14)
    assert plan.whole.size == 2**14 + 2 * 2047 and plan.interior.size == 2**14


@pytest.mark.parametrize(("kernel_size", "splits"), [((3, 3), True), ((7, 7), True), ((33, 33), False)])
def test_small_windows_overlap_and_large_ones_do_not_compute_twice(kernel_size, splits):
    window = Neighborhood.make(kernel_size)
    plans = [halo.plan_axis(axis, 2, 64) for axis in window.axes((128, 128))]
    assert distributed._hiding_pays(plans, 2 * window.window_size, itemsize=2) == splits


# Values and derivatives.


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem on a mesh; the windows are one ``axes`` tuple per grid axis."""

    mesh: tuple[int, ...]
    problem: tuple[tuple[int, int, int, int, bool], ...]
    overlap: bool | None
    kv_heads: int = 1
    additional: int = 0
    bias: bool = False

    @property
    def window(self) -> tuple[tuple, ...]:
        """kernel_size, stride, dilation, is_causal."""
        return tuple(zip(*(axis[1:] for axis in self.problem)))

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(axis[0] for axis in self.problem)

    def draw(self):
        """Operands and cotangents."""
        rng, heads, dim = generator(self), 2, 2
        kv = (1, *self.grid, self.kv_heads, dim)
        shapes = {"query": (1, *self.grid, heads, dim), "key": kv, "value": kv}
        if self.additional:
            extra = (1, self.additional, self.kv_heads, dim)
            shapes |= {"additional_keys": extra, "additional_values": extra}
        if self.bias and not any(self.window[3]):
            shapes["rpb"] = (heads, *(2 * k - 1 for k in self.window[0]))
        operands = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        return operands, tuple(jnp.asarray(rng.normal(size=(1, *self.grid, heads, *tail))) for tail in ((dim,), ()))

    def on_one_device(self, operands):
        return _call(jax_natten.neighborhood_attention, operands, self.window)

    def on_the_mesh(self, operands):
        names = NAMES[: len(self.mesh)] + (None,) * (len(self.grid) - len(self.mesh))
        attention = distributed.sharded_attention(mesh(*self.mesh), grid=names, overlap=self.overlap)
        return _call(attention, operands, self.window)


def _call(attention, operands, window):
    operands = dict(operands)
    arrays = [operands.pop(name) for name in ("query", "key", "value")]
    return attention(*arrays, *window, **operands, return_lse=True)


def check(case: Case) -> None:
    operands, cotangents = case.draw()

    def run(function):
        @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
        def both(operands, cotangents):
            results, pullback = jax.vjp(function, operands)
            return results, pullback(cotangents)

        return both(operands, cotangents)

    _assert_equal(run(case.on_the_mesh), run(case.on_one_device))


def _assert_equal(got, expected):
    for (path, g), e in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-8, atol=1e-9, err_msg=str(path))


@st.composite
def cases(draw, *shards):
    problem = tuple(draw(axes(n)) for n in shards)
    options = [draw(st.sampled_from(choice)) for choice in ((True, True, False, None), (1, 2), (0, 1), (False, True))]
    return Case(shards, problem, *options)


@hypothesis.settings(max_examples=5)
@hypothesis.given(cases(8))
def test_one_sharded_axis_equals_one_device(case):
    check(case)


@hypothesis.settings(max_examples=4)
@hypothesis.given(cases(4, 2))
def test_two_sharded_axes_equal_one_device(case):
    check(case)


SPLIT = {
    "wide": Case((4,), ((33, 3, 2, 2, False),), True, additional=2),
    "causal": Case((4,), ((40, 4, 2, 1, True),), True),
    "groups and bias": Case((2, 2), ((14, 3, 1, 1, False), (11, 3, 1, 1, False)), True, bias=True),
    "cube": Case((2, 2, 2), ((9, 3, 1, 1, False), (8, 2, 2, 1, True), (10, 3, 2, 1, False)), True, kv_heads=2),
    "one axis of two": Case((4,), ((20, 3, 1, 1, False), (5, 3, 1, 1, False)), True),
    "several hops": Case((8,), ((24, 11, 2, 2, False),), True),
}


@pytest.mark.parametrize("name", SPLIT)
def test_border_and_interior_equal_one_device(name):
    case = SPLIT[name]
    shards = case.mesh + (1,) * (len(case.grid) - len(case.mesh))
    plans = [halo.plan_axis(Axis(*a), n, -(-a[0] // n)) for a, n in zip(case.problem, shards)]
    assert all(plan.interior for plan in plans) == (name != "several hops")
    check(case)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_heads_and_batch_are_sharded_too(kind):
    """Grouped heads, bias and additional keys with the heads; of two batch axes the first; the grid over two axes."""
    devices = jax.make_mesh((2, 1, 2, 2), ("b", "x", "y", "h"), axis_types=(kind,) * 4)
    attention = distributed.sharded_attention(devices, batch="b", grid=(("x", "y"),), heads="h", overlap=True)
    rng, window = generator("heads"), ((5,), (1,), (1,), (False,))
    shapes = {name: (2, 3, 12, heads, 2) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    shapes |= {"additional_keys": (2, 3, 1, 2, 2), "additional_values": (2, 3, 1, 2, 2), "rpb": (4, 9)}
    operands = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def gradients(function, operands):
        def loss(x):
            return sum(jnp.sin(r).sum() for r in _call(function, x, window))

        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK_COMPILE)(operands)

    grid, extra = P("b", None, ("x", "y"), "h"), P("b", None, None, "h")
    specs = {"rpb": P("h"), "additional_keys": extra, "additional_values": extra}
    placed = {name: jax.device_put(x, NamedSharding(devices, specs.get(name, grid))) for name, x in operands.items()}
    _assert_equal(gradients(attention, placed), gradients(jax_natten.neighborhood_attention, operands))


def _second_derivatives(function, reverse=True):
    """Forward over reverse and, if asked for, reverse over reverse, of ``arrays -> (out, lse)``."""

    def gradient(*arrays):
        def loss(*arrays):
            return sum(jnp.sin(r).sum() for r in function(*arrays))

        return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    def run(*arrays):
        products = jax.jvp(gradient, arrays, tuple(map(jnp.cos, arrays)))[1]
        if not reverse:
            return products
        norm = lambda *arrays: sum(jnp.vdot(g, g) for g in gradient(*arrays))  # noqa: E731
        return products + jax.grad(norm, argnums=(0, 1, 2))(*arrays)

    return run


@pytest.mark.parametrize("inside", [True, False])
def test_second_derivatives(inside):
    """Through interior and border, taken inside of shard_map or around it.

    Reverse over reverse around any shard_map of the attention crashes the compiler of jaxlib 0.11.2 (in its Shardy
    pass), so there it is taken inside only.
    """
    axis, shard = Axis(13, 3, 2, 1, False), 7
    assert halo.plan_axis(axis, 2, shard).border
    reverse = inside or jax.__version_info__ < (0, 11)
    rng, spec = generator("second"), P(None, "x")
    arrays = [jnp.asarray(rng.normal(size=(1, 13, heads, 2))) for heads in (2, 1, 1)]

    def local(*x):
        return distributed.neighborhood_attention(*x, 3, 2, mesh_axes=("x",), grid=(13,), overlap=True, return_lse=True)

    shard_map = functools.partial(jax.shard_map, mesh=mesh(2), in_specs=(spec,) * 3)
    if inside:
        run = shard_map(_second_derivatives(local), out_specs=(spec,) * 6)
    else:
        run = _second_derivatives(shard_map(local, out_specs=(spec, spec)), reverse)
    whole = _second_derivatives(lambda *x: jax_natten.na1d(*x, 3, 2, return_lse=True), reverse)
    padded = [jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in arrays]
    got, expected = (jax.jit(f, compiler_options=QUICK_COMPILE)(*x) for f, x in ((run, padded), (whole, arrays)))
    _assert_equal([g[:, :13] for g in got], list(expected))


def test_padding_is_never_read():
    """NaN in the padding reaches neither outputs nor gradients, and gets zeros itself."""
    case = Case((4,), ((21, 5, 1, 1, False),), True)
    operands, cotangents = case.draw()
    spec = P(None, "x")

    def local(*x):
        return distributed.neighborhood_attention(*x, 5, mesh_axes=("x",), grid=(21,), overlap=True, return_lse=True)

    sharded = jax.shard_map(local, mesh=mesh(4), in_specs=(spec,) * 3, out_specs=(spec, spec))

    def poisoned(x):
        return jnp.pad(x, [(0, 0), (0, 3)] + [(0, 0)] * (x.ndim - 2), constant_values=jnp.nan)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(arrays, cotangents):
        results, pullback = jax.vjp(sharded, *arrays)
        return *results, *pullback(cotangents)

    arrays = [operands[name] for name in ("query", "key", "value")]
    one_device, pullback = jax.vjp(lambda *x: jax_natten.na1d(*x, 5, return_lse=True), *arrays)
    expected = (*one_device, *pullback(cotangents))
    got = run([poisoned(x) for x in arrays], tuple(poisoned(x) for x in cotangents))
    for g, e in zip(got, expected):
        np.testing.assert_allclose(g[:, :21], e, rtol=1e-8, atol=1e-9)
        np.testing.assert_array_equal(g[:, 21:], 0)


# What XLA makes of it.


def _abstract(devices, shard, heads=2, dim=4, dtype=jnp.float32):
    """Abstract query of a 1-D problem on ``devices`` devices, sharded."""
    sharding = NamedSharding(mesh(devices), P(None, "x"))
    return jax.ShapeDtypeStruct((1, devices * shard, heads, dim), dtype, sharding=sharding)


def _compiled(devices, shard, kernel_size, backward, overlap=True, dilation=1, **array):
    attention = distributed.sharded_attention(mesh(devices), grid=("x",), overlap=overlap)

    def forward(*x):
        return attention(*x, kernel_size, 1, dilation)

    x = _abstract(devices, shard, **array)
    if not backward:
        return jax.jit(forward).lower(x, x, x).compile()
    return jax.jit(lambda ct, *x: jax.vjp(forward, *x)[1](ct)).lower(x, x, x, x).compile()


@pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")
@pytest.mark.parametrize("dilation", [1, 3])  # slabs start at multiples of it, so with 3 not with the shard
def test_the_interior_waits_for_no_exchange(dilation):
    """In the compiled program, forward and backward: only the calls at the border have a ppermute before them."""
    program = Program(_compiled(8, 16, 5, backward=True, dilation=dilation).as_text())
    waiting = {}
    for target in ("jax_natten_fused_forward", "jax_natten_fused_backward"):
        calls = program.calls(target)
        waiting[target] = sorted(program.waits_for(call, "collective-permute") for call in calls)
    assert waiting == {target: [False, True, True] for target in waiting}
    # The exchange in turn waits for no attention: both may run at once.
    permutes = [i for i in program.entry.values() if i.opcode == "collective-permute"]
    halos = [p for p in permutes if not program.waits_for(p, "custom-call")]
    assert len(permutes) == 8 and len(halos) == 4  # keys and values to both sides; their gradients back

    together = Program(_compiled(8, 16, 5, backward=True, overlap=False, dilation=dilation).as_text())
    for target in waiting:
        (call,) = together.calls(target)
        assert together.waits_for(call, "collective-permute")


@pytest.mark.parametrize(("causal", "halos"), [(False, (62, 62)), (True, (124, 0))])
def test_only_the_halo_travels(causal, halos):
    """The communication volume is what the windows of a shard reach beyond it; backward it is twice that."""
    plan = distributed.plan_axis(Axis(1024, 63, 1, 2, causal), 8, 128)
    assert (plan.left, plan.right) == halos and plan.whole.size <= 128 + 2 * 124 + 2
    window = Neighborhood.make(63, dilation=2, is_causal=causal)
    attention = distributed.sharded_attention(mesh(8), grid=("x",))

    def forward(*x):
        return attention(*x, 63, 1, 2, causal)

    x = _abstract(8, 128)
    program = Program(jax.jit(lambda ct, *x: jax.vjp(forward, *x)[1](ct)).lower(x, x, x, x).compile().as_text())
    assert program.received_bytes() == 2 * halo_bytes((128,), (1024,), window, channels=2 * 2 * 4, itemsize=4)
    assert not {i.opcode for i in program.every} & {"all-gather", "all-to-all", "all-reduce"}


# Copies of the shard that a program may hold: none forward, for XLA writes the border into the interior's output; for
# its three gradients two and a little; without overlap the slabs of the operands, and in the backward pass all of them.
@pytest.mark.parametrize(
    ("backward", "overlap", "copies"), [(False, True, 0.1), (False, False, 5), (True, True, 3), (True, False, 12)]
)
def test_memory_per_device_is_that_of_shard_and_halo(backward, overlap, copies):
    """Of one problem on ever more devices: arguments and outputs are the shard's, temporaries that and a few halos."""
    length, kernel_size, heads, dim = 4096, 33, 2, 16
    position = heads * dim * 4
    for devices in (1, 2, 4, 8):
        memory = _compiled(devices, length // devices, kernel_size, backward, overlap, dim=dim).memory_analysis()
        shard = length // devices * position
        exchanged = 2 * (kernel_size // 2) * position
        assert memory.argument_size_in_bytes == (4 if backward else 3) * shard
        assert memory.output_size_in_bytes <= (3 if backward else 1) * shard + 64
        assert memory.temp_size_in_bytes <= copies * shard + 40 * exchanged, (devices, memory)


# Errors.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mesh_axes": ("x", None)}, "mesh_axes must have 1 entries"),
        ({"grid": (99,)}, "do not hold a grid axis of length 99"),
        ({"kernel_size": 65}, "kernel_size"),
        ({"mesh_axes": (None,), "grid": (64,)}, "not sharded"),
        ({"value": jnp.ones((1, 8, 1, 2))}, "value must have the batch and grid axes of key"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    arguments = {"kernel_size": 5, "mesh_axes": ("x",)} | change

    def local(x):
        return distributed.neighborhood_attention(**({"query": x, "key": x, "value": x} | arguments))

    with pytest.raises(ValueError, match=words):
        jax.shard_map(local, mesh=mesh(4), in_specs=P(None, "x"), out_specs=P(None, "x"))(jnp.ones((1, 64, 1, 2)))


def test_a_sharded_attention_has_the_rank_of_its_grid():
    attention = distributed.sharded_attention(mesh(4), grid=("x",))
    with pytest.raises(ValueError, match="1 grid axes"):
        attention(*[jnp.ones((1, 8, 8, 1, 2))] * 3, (3, 3))
