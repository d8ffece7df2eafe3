"""Every public function, under every transformation, on eight fake devices: batch and heads stay sharded.

``test_sharding.py`` has what only fused attention needs; this file holds all functions to the same.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from checks import QUICK_COMPILE, generator, jit
from functions import CASES, FUNCTIONS, close, with_gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import problem

from jax_natten import native

pytestmark = [
    pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built"),
    pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs eight CPU devices (XLA_FLAGS, see conftest.py)"),
]

# Four query heads share two key heads, over two devices; the batch lies on four.
SHAPE = problem("spmd", 4, 4, 2, 3, [6, 4], [3, 2], [2, 1], [1, 2])
MORE = {"additional_keys": P("b", None, "h"), "additional_values": P("b", None, "h"), "rpb": P("h")}
ROWS = P("b", None, None, "h")

by_function = pytest.mark.parametrize("name", FUNCTIONS)


def mesh_of(kind=AxisType.Auto):
    devices = np.array(jax.devices("cpu")[:8]).reshape(4, 2)
    return jax.sharding.Mesh(devices, ("b", "h"), axis_types=(kind, kind))


def specs(name):
    return {operand: MORE.get(operand, ROWS) for operand in FUNCTIONS[name].operands}


def put(mesh, operands, specs):
    return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in operands.items()}


def gathers(compiled) -> list[str]:
    moves = ("all-gather", "all-to-all", "collective-permute")
    return [line.strip()[:120] for line in compiled.as_text().splitlines() if any(move in line for move in moves)]


def results_like(name, spec, operand_specs, with_operands=True):
    """Shardings of a function's result, and of the gradients of its operands."""
    result = spec if name in ("qk", "av") else (spec, spec)
    return (result, operand_specs) if with_operands else result


def check(run, arguments, out_specs=None, mesh=None) -> None:
    """Equal to the unsharded run, and nothing is gathered."""
    shardings = None if out_specs is None else jax.tree.map(lambda s: NamedSharding(mesh, s), out_specs)
    compiled = jax.jit(run, out_shardings=shardings, compiler_options=QUICK_COMPILE).lower(*arguments).compile()
    assert gathers(compiled) == []
    whole = jax.tree.map(np.asarray, arguments)
    close(compiled(*arguments), jit(run, "xla")(*whole), 1e-5)


@pytest.mark.parametrize("name, implementation", CASES)
def test_forward_and_backward_gather_nothing(name, implementation):
    function, mesh = FUNCTIONS[name], mesh_of()
    arguments = put(mesh, function.draw(SHAPE, dtype="float32"), specs(name))
    run = with_gradients(function.of(SHAPE, implementation))
    check(run, (arguments,), results_like(name, ROWS, specs(name)), mesh)


@by_function
def test_forward_mode_gathers_nothing(name):
    function, mesh = FUNCTIONS[name], mesh_of()
    primals, tangents = (
        put(mesh, function.draw(SHAPE, word, dtype="float32"), specs(name)) for word in ("primals", "tangents")
    )
    f = function.of(SHAPE, None)
    check(lambda x, t: jax.jvp(f, (x,), (t,)), (primals, tangents))


@by_function
@pytest.mark.parametrize("over", ["whole", "sharded"])
def test_vmap_keeps_the_shardings_of_all_axes(name, over):
    """The mapped axis is whole and the batch sharded below it; or it is sharded, with ``spmd_axis_name``."""
    function, mesh = FUNCTIONS[name], mesh_of()
    axis = None if over == "whole" else "b"
    shape = SHAPE if over == "whole" else problem("spmd one", 1, *(getattr(SHAPE, f) for f in _FIELDS))
    rng = generator("spmd", name, over)
    operands = {n: rng.standard_normal((4, *x.shape)).astype("float32") for n, x in function.draw(shape).items()}

    def below(spec):
        return P(axis, *(None if entry == axis else entry for entry in spec))

    mapped_specs = {n: below(s) for n, s in specs(name).items()}
    run = jax.vmap(with_gradients(function.of(shape, None)), spmd_axis_name=axis)
    out_specs = results_like(name, below(ROWS), mapped_specs)
    check(run, (put(mesh, operands, mapped_specs),), out_specs, mesh)


_FIELDS = ("heads", "kv_heads", "dim", "grid", "kernel_size", "stride", "dilation")


@by_function
def test_vmap_with_an_axis_name_of_shard_map(name):
    function, mesh = FUNCTIONS[name], mesh_of()
    rng = generator("spmd shard_map", name)
    operands = {n: rng.standard_normal((4, *x.shape)).astype("float32") for n, x in function.draw(SHAPE).items()}
    heads = {n: P(*(entry if entry == "h" else None for entry in s)) for n, s in specs(name).items()}
    mapped_specs = {n: P("b", *s) for n, s in heads.items()}
    result = results_like(name, P(None, None, None, "h"), None, with_operands=False)
    f = function.of(SHAPE, None)
    local = jax.shard_map(f, mesh=mesh, in_specs=(heads,), out_specs=result)
    arguments = put(mesh, operands, mapped_specs)
    compiled = jax.jit(jax.vmap(local, spmd_axis_name="b")).lower(arguments).compile()
    assert gathers(compiled) == []
    close(compiled(arguments), jit(jax.vmap(f), "xla")(operands), 1e-5)


@by_function
def test_a_sharded_grid_axis_is_gathered_and_not_computed_locally(name):
    function, mesh = FUNCTIONS[name], mesh_of()
    operands = function.draw(SHAPE, dtype="float32")
    on_grid = {n: P() if n in MORE else P(None, "h") for n in operands}
    run = jax.jit(with_gradients(function.of(SHAPE, None)))
    close(run(put(mesh, operands, on_grid)), run(operands), 1e-5)


@by_function
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_forward_reverse_and_forward_mode(name, check_vma):
    function, mesh = FUNCTIONS[name], mesh_of()
    f = function.of(SHAPE, None)

    def run(x, t):
        pushed = jax.jvp(f, (x,), (t,))[1]
        result, gradients = with_gradients(f)(x)
        if "rpb" in gradients and not check_vma:  # JAX does not track what varies, so the sum over the batch is ours
            gradients["rpb"] = jax.lax.psum(gradients["rpb"], "b")
        return pushed, result, gradients

    result = results_like(name, ROWS, None, with_operands=False)
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(specs(name),) * 2, out_specs=(result, result, specs(name)), check_vma=check_vma
    )
    arguments = [function.draw(SHAPE, word, dtype="float32") for word in ("primals", "tangents")]

    def whole(x, t):
        return jax.jvp(f, (x,), (t,))[1], *with_gradients(f)(x)

    close(jit(mapped, "xla")(*arguments), jit(whole, "xla")(*arguments), 1e-5)


@by_function
def test_explicit_meshes_type_every_result_and_gather_nothing(name):
    function, mesh = FUNCTIONS[name], mesh_of(AxisType.Explicit)
    operands = function.draw(SHAPE, dtype="float32")
    types = []

    def run(x):
        result, gradients = with_gradients(function.of(SHAPE, None))(x)
        types.extend(jax.typeof(r).sharding.spec for r in jax.tree.leaves(result))
        return result, gradients

    with jax.set_mesh(mesh):
        arguments = put(mesh, operands, specs(name))
        compiled = jax.jit(run).lower(arguments).compile()
        assert gathers(compiled) == []
        results = compiled(arguments)
        pushed = jit(lambda x: jax.jvp(function.of(SHAPE, None), (x,), (x,))[1], "xla")(arguments)
    assert all(tuple(spec[:4]) == ("b", None, None, "h") for spec in types)
    close(results, jit(with_gradients(function.of(SHAPE, None)), "xla")(operands), 1e-5)
    close(pushed, jit(lambda x: jax.jvp(function.of(SHAPE, None), (x,), (x,))[1], "xla")(operands), 1e-5)


@by_function
def test_vmap_on_an_explicit_mesh(name):
    """A whole axis mapped above a sharded batch: axes that cannot be merged without moving data."""
    function, mesh = FUNCTIONS[name], mesh_of(AxisType.Explicit)
    rng = generator("explicit", name)
    operands = {n: rng.standard_normal((2, *x.shape)).astype("float32") for n, x in function.draw(SHAPE).items()}
    run = jax.vmap(with_gradients(function.of(SHAPE, None)))
    with jax.set_mesh(mesh):
        arguments = put(mesh, operands, {n: P(None, *s) for n, s in specs(name).items()})
        compiled = jax.jit(run).lower(arguments).compile()
        assert gathers(compiled) == []
        results = compiled(arguments)
    close(results, jit(run, "xla")(operands), 1e-5)


@by_function
def test_partly_manual_shard_map_gives_the_right_result(name):
    """The batch is split by hand. Heads, left to the partitioner, are gathered: see docs/transformations.md."""
    function, mesh = FUNCTIONS[name], mesh_of()
    operands = function.draw(SHAPE, dtype="float32")
    by_hand = {n: P() if n == "rpb" else P("b") for n in operands}
    result = results_like(name, P("b"), None, with_operands=False)
    f = function.of(SHAPE, None)
    run = jax.shard_map(f, mesh=mesh, in_specs=(by_hand,), out_specs=result, axis_names={"b"})
    close(jax.jit(run)(put(mesh, operands, specs(name))), jit(f, "xla")(operands), 1e-5)
