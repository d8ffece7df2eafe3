"""JAX transformations of the CUDA kernels: the checks of the CPU suite; two GPUs where there are two, else one."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Case, draw, fused
from functions import (
    ARTEFACTS,
    FUNCTIONS,
    SHAPE,
    check_artefact,
    check_derivatives,
    check_vmap,
    check_vmap_of_derivatives,
    check_vmap_over_an_empty_axis,
    close,
    shapes,
    total,
    with_gradients,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_compiling import check_persistent_cache

import jax_natten
from jax_natten import native

pytestmark = pytest.mark.gpu

NAMES = [name for name in FUNCTIONS if name != "merge"]
FULL = Case(SHAPE, value_dim=3, additional=2, bias=True)

by_function = pytest.mark.parametrize("name", NAMES)


def mesh_of(kind=AxisType.Auto):
    devices = np.array(jax.devices("gpu")[:2])
    return jax.sharding.Mesh(devices, ("b",), axis_types=(kind,))


def specs(name):
    """The batch lies on the devices."""
    return {n: P() if n == "rpb" else P("b") for n in FUNCTIONS[name].operands}


def put(mesh, operands, specs):
    return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in operands.items()}


@by_function
def test_jacobians_and_hessians_in_every_mode(name):
    check_derivatives(name, "naive")


@by_function
def test_vmap_over_every_subset_of_the_operands_with_gradients(name):
    check_vmap(name, "naive")


@by_function
def test_vmap_of_jvp_and_of_grad_nested(name):
    check_vmap_of_derivatives(name, "naive")


@by_function
def test_vmap_over_an_empty_axis(name):
    check_vmap_over_an_empty_axis(name, "naive")


def test_value_and_grad_costs_one_forward_and_one_backward_call():
    operands, _ = draw(FULL)

    def loss(x):
        return total(fused(FULL, "naive")(x))

    def calls(f):
        text = jax.jit(f).lower(operands).compile().as_text()
        return {t: n for t in native.TARGETS if (n := text.count(f'custom_call_target="{t}"'))}

    once = {"jax_natten_fused_forward": 1, "jax_natten_fused_backward": 1}
    assert calls(jax.grad(loss)) == calls(jax.value_and_grad(loss)) == once
    assert calls(lambda x: jax.jvp(loss, (x,), (x,))) == {"jax_natten_fused_forward": 1}


def test_residuals_are_saved_offloaded_or_recomputed_by_name():
    operands, _ = draw(FULL)
    policies, names = jax.checkpoint_policies, ["na_out", "na_lse"]

    def block(x):
        return total(fused(FULL, "naive")(x))

    expected = jax.jit(jax.grad(block))(operands)
    for policy in (
        policies.save_only_these_names(*names),
        policies.nothing_saveable,
        policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=names,
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ):
        close(jax.jit(jax.grad(jax.checkpoint(block, policy=policy)))(operands), expected)


@by_function
def test_a_scan_with_gradients_is_a_loop(name):
    function = FUNCTIONS[name]
    f = function.of(SHAPE, "naive")
    operands = function.draw(SHAPE, dtype="float32")
    scales = jnp.asarray([0.5, 1.0, 2.0])

    def one(x, scale):
        return total(f({n: scale * a for n, a in x.items()}))

    def scanned(x):
        return jax.lax.scan(lambda total, s: (total + jax.checkpoint(one)(x, s), None), 0.0, scales)[0]

    close(jax.jit(jax.grad(scanned))(operands), jax.jit(jax.grad(lambda x: sum(one(x, s) for s in scales)))(operands))


@by_function
def test_compiled_ahead_of_time_with_donated_operands(name):
    function = FUNCTIONS[name]
    f, operands = function.of(SHAPE, "naive"), function.draw(SHAPE, dtype="float32")
    structs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in operands.items()}
    compiled = jax.jit(f, donate_argnums=0).lower(structs).compile()
    expected = jax.jit(f)(operands)
    close(compiled({n: jnp.array(x) for n, x in operands.items()}), expected)


def test_debug_nans_finds_a_nan_and_nothing_else():
    case = Case(SHAPE.with_causal((True, False)), value_dim=3, additional=2)
    operands, _ = draw(case)
    with jax.debug_nans(True):
        with_gradients(fused(case, "naive"))(operands)
        with pytest.raises(FloatingPointError):
            jax.jit(fused(case, "naive"))(operands | {"key": np.full_like(operands["key"], np.nan)})


@by_function
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_batch_stays_sharded_forward_and_backward(name, kind):
    function, mesh = FUNCTIONS[name], mesh_of(kind)
    operands = function.draw(SHAPE, dtype="float32")
    run = with_gradients(function.of(SHAPE, "naive"))
    with jax.set_mesh(mesh):
        arguments = put(mesh, operands, specs(name))
        compiled = jax.jit(run).lower(arguments).compile()
        assert "all-gather" not in compiled.as_text()
        results = compiled(arguments)
    close(results, jax.jit(run)(operands), 1e-5)


@by_function
def test_a_sharded_grid_axis_is_gathered_and_not_computed_locally(name):
    function, mesh = FUNCTIONS[name], mesh_of()
    operands = function.draw(SHAPE, dtype="float32")
    whole = ("rpb", "additional_keys", "additional_values")
    on_grid = {n: P() if n in whole else P(None, "b") for n in operands}
    run = jax.jit(with_gradients(function.of(SHAPE, "naive")))
    close(run(put(mesh, operands, on_grid)), run(operands), 1e-5)


@by_function
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_forward_reverse_and_forward_mode(name, check_vma):
    function, mesh = FUNCTIONS[name], mesh_of()
    f = function.of(SHAPE, "naive")

    def run(x, t):
        result, gradients = with_gradients(f)(x)
        if "rpb" in gradients and not check_vma:  # JAX does not track what varies, so the sum over the batch is ours
            gradients["rpb"] = jax.lax.psum(gradients["rpb"], "b")
        return jax.jvp(f, (x,), (t,))[1], result, gradients

    out_specs = (P("b"), P("b"), specs(name))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs(name),) * 2, out_specs=out_specs, check_vma=check_vma)
    arguments = [function.draw(SHAPE, word, dtype="float32") for word in ("primals", "tangents")]
    whole = jax.jit(lambda x, t: (jax.jvp(f, (x,), (t,))[1], *with_gradients(f)(x)))
    close(jax.jit(mapped)(*arguments), whole(*arguments), 1e-5)


@by_function
def test_exported_programs_take_any_batch(name):
    function = FUNCTIONS[name]
    (batch,) = jax.export.symbolic_shape("b")
    sizes = {n: s if n == "rpb" else (batch, *s[1:]) for n, s in shapes(SHAPE).items() if n in function.operands}
    structs = {n: jax.ShapeDtypeStruct(size, jnp.float32) for n, size in sizes.items()}
    f = function.of(SHAPE, "naive")
    exported = jax.export.export(jax.jit(f), platforms=("cuda",), disabled_checks=jax_natten.EXPORT_DISABLED_CHECKS)(
        structs
    )
    read = jax.export.deserialize(exported.serialize(vjp_order=1))
    operands = function.draw(SHAPE, dtype="float32")
    close(jax.jit(with_gradients(read.call))(operands), jax.jit(with_gradients(f))(operands), 1e-5)


@pytest.mark.parametrize("version", ARTEFACTS)
@pytest.mark.parametrize("name", ["fused", "unfused"])
def test_programs_written_by_every_earlier_version_give_the_same_numbers(version, name):
    check_artefact(version, name)


def test_the_persistent_cache_serves_another_process(tmp_path):
    check_persistent_cache(tmp_path, len(jax.devices("gpu")))


@by_function
def test_the_direct_kernels_compute_in_float32_whatever_is_asked(name):
    function = FUNCTIONS[name]
    operands = function.draw(SHAPE, dtype="float32")
    results = [jax.jit(function.of(SHAPE, "naive", precision=p))(operands) for p in ("default", "high", "highest")]
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
