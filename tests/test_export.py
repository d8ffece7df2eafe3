"""jax.export: programs that run elsewhere, later, and with sizes that were unknown when they were written."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import generator, jit
from functions import ARTEFACTS, FUNCTIONS, TINY, check_artefact, close, shapes, with_gradients
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_natten
from jax_natten import native

needs_cpu = pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")


@pytest.fixture(autouse=True)
def a_cuda_extension(monkeypatch):
    """Lowering only writes the calls down: where the extension was not built, pretend that it was."""
    monkeypatch.setattr(native, "cuda", native.cuda or object())


def export(function, *arguments, platforms=("cpu", "cuda", "tpu")):
    checks = jax_natten.EXPORT_DISABLED_CHECKS
    return jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*arguments)


def structs(name, batch):
    """Operands of a function with another batch, which may be symbolic."""
    every = shapes(TINY)
    sizes = {n: every[n] if n == "rpb" else (batch, *every[n][1:]) for n in FUNCTIONS[name].operands}
    return {n: jax.ShapeDtypeStruct(size, jnp.float32) for n, size in sizes.items()}


def filled(tree):
    rng = generator("export")
    return {n: rng.standard_normal(s.shape).astype(s.dtype) for n, s in tree.items()}


def test_the_allow_list_names_every_target_and_is_needed():
    assert len(jax_natten.EXPORT_DISABLED_CHECKS) == len(native.TARGETS)
    x = jax.ShapeDtypeStruct((1, 5, 2, 3), jnp.float32)
    with pytest.raises(ValueError, match="jax_natten_fused_forward"):
        jax.export.export(jax.jit(lambda x: jax_natten.na1d(x, x, x, 3)))(x)


@needs_cpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_round_trip_through_bytes_for_any_batch_on_every_platform_with_its_derivative(name):
    (batch,) = jax.export.symbolic_shape("b")
    f = FUNCTIONS[name].of(TINY, None)
    written = export(f, structs(name, batch)).serialize(vjp_order=1)
    read = jax.export.deserialize(written)
    assert read.platforms == ("cpu", "cuda", "tpu")
    if name != "merge":
        module = read.mlir_module()
        assert 'implementation = "cpu"' in module and 'implementation = "sm80,naive"' in module

    def with_derivative(operands):
        return with_gradients(read.call)(operands)

    for size in (1, 3):
        operands = filled(structs(name, size))
        close(jax.jit(with_derivative)(operands), jax.jit(with_gradients(f))(operands), 1e-5)


@needs_cpu
def test_a_batch_that_is_unknown_runs_on_pure_jax_too():
    (batch,) = jax.export.symbolic_shape("b")
    run = with_gradients(FUNCTIONS["fused"].of(TINY, "xla"))
    exported = export(run, structs("fused", batch), platforms=("cpu",))
    assert "custom_call @jax_natten" not in exported.mlir_module()
    operands = filled(structs("fused", 3))
    close(jit(exported.call, "xla")(operands), jit(run, "xla")(operands), 1e-5)


@needs_cpu
def test_grid_sizes_may_be_unknown_where_kernels_run():
    height, width = jax.export.symbolic_shape("h, w", constraints=["h >= 6", "w >= 4"])
    window = (3, 4), (2, 1), (2, 1), (False, True)

    def run(*x):
        def every(q, k, v):
            scores = jax_natten.na2d_qk(q, k, *window[:-1])
            mixed = jax_natten.na2d_av(scores, v, *window[:-1])
            return *jax_natten.na2d(q, k, v, *window, return_lse=True), scores, mixed

        results, pullback = jax.vjp(every, *x)
        return results, pullback(results)

    def operands(*grid):
        return [jax.ShapeDtypeStruct((1, *grid, heads, 3), jnp.float32) for heads in (4, 2, 2)]

    exported = export(run, *operands(height, width), platforms=("cpu", "cuda"))
    for grid in ((6, 4), (9, 7)):
        rng = generator("grid", grid)
        x = [rng.standard_normal(s.shape).astype(np.float32) for s in operands(*grid)]
        close(exported.call(*x), jax.jit(run)(*x))
    halves = [jax.ShapeDtypeStruct((1, height, width, 2, 64), jnp.bfloat16)] * 3
    named = lambda *x: jax_natten.na2d(*x, (3, 4), implementation=("sm90", "naive"))  # noqa: E731
    assert 'implementation = "sm90,naive"' in export(named, *halves, platforms=("cuda",)).mlir_module()
    with pytest.raises(NotImplementedError, match="constant grid"):
        export(run, *operands(height, width), platforms=("tpu",))
    with pytest.raises(ValueError, match=r"\(6, 4\)"):
        export(run, *operands(*jax.export.symbolic_shape("h, w")), platforms=("cpu",))


@needs_cpu
@pytest.mark.skipif(len(jax.devices("cpu")) < 2, reason="needs two CPU devices (XLA_FLAGS, see conftest.py)")
def test_programs_for_several_devices_are_exported_under_shard_map():
    mesh = Mesh(jax.devices("cpu")[:2], ("b",))
    sharding = NamedSharding(mesh, P("b"))
    x = jax.device_put(generator("devices").standard_normal((2, 9, 2, 4)).astype(np.float32), sharding)

    def attend(x):
        return jax_natten.na1d(x, x, x, 3)

    def written(function):
        jitted = jax.jit(function, in_shardings=sharding)
        checks = jax_natten.EXPORT_DISABLED_CHECKS
        return jax.export.export(jitted, disabled_checks=checks)(x).serialize(vjp_order=1)

    local = jax.shard_map(attend, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
    close(jax.jit(jax.export.deserialize(written(local)).call)(x), attend(x))
    # What the partitioner asks Python for cannot be written down.
    with pytest.raises(NotImplementedError, match="host_callbacks"):
        written(attend)


def test_there_are_artefacts():
    assert ARTEFACTS


@needs_cpu
@pytest.mark.parametrize("version", ARTEFACTS)
@pytest.mark.parametrize("name", ["fused", "unfused"])
def test_programs_written_by_every_earlier_version_give_the_same_numbers(version, name):
    check_artefact(version, name)
