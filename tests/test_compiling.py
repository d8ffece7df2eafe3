"""Around compilation: ahead of time, the persistent cache, what is kept and recomputed, donation, debugging."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Case, draw, fused, jit, jitted_fused
from functions import FUNCTIONS, SHAPE, close

from jax_natten import native

FULL = Case(SHAPE, value_dim=3, additional=2, bias=True)
BOTH = pytest.mark.parametrize("implementation", ["cpu", "xla"])

needs_cpu = pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")

# Compiles gradients for one device, for several by shard_map and for several by jit; prints hits and misses of each.
CACHED_PROGRAM = """
import sys, jax, jax.numpy as jnp, jax_natten
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
x = jnp.ones((2, 9, 2, 4))
def attend(x):
    return jax_natten.na1d(x, x, x, 3) + jax_natten.na1d_av(jax_natten.na1d_qk(x, x, 3), x, 3)
mesh = Mesh(jax.devices()[:2], ("b",))
for f, x in (
    (attend, x),
    (jax.shard_map(attend, mesh=mesh, in_specs=P("b"), out_specs=P("b")), x),
    (attend, jax.device_put(x, NamedSharding(mesh, P("b")))),
):
    events.clear()
    jax.jit(jax.grad(lambda x: (f(x) ** 2).sum())).lower(x).compile()
    print(*(sum(e == f"/jax/compilation_cache/{name}" for e in events) for name in ("cache_hits", "cache_misses")))
"""


def check_persistent_cache(folder, devices: int) -> None:
    """A second process compiles nothing but what ``jit`` partitions over several devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

    def counts():
        command = [sys.executable, "-P", "-c", CACHED_PROGRAM, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    first, second = counts(), counts()
    # On one device the other two may be the first program again.
    assert all(hits == 0 for hits, _ in (first if devices > 1 else first[:1]))
    alone, by_shard_map, by_jit = second
    assert alone == by_shard_map == (1, 0)
    if devices > 1:
        assert by_jit == (0, 1), "JAX now caches these, too: say so in docs/transformations.md"


@needs_cpu
def test_the_persistent_cache_serves_another_process(tmp_path):
    check_persistent_cache(tmp_path, devices=2)


@pytest.mark.parametrize("name", ["fused", "qk", "av"])
@BOTH
def test_programs_compiled_ahead_of_time_run(name, implementation):
    function = FUNCTIONS[name]
    f, operands = function.of(SHAPE, implementation), function.draw(SHAPE, dtype="float32")
    structs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in operands.items()}
    close(jit(f, implementation).lower(structs).compile()(operands), jit(f, implementation)(operands))


@BOTH
def test_operands_are_left_as_they_were_and_may_be_donated(implementation):
    case = Case(SHAPE, additional=2, bias=True)  # out is as large as the query and may take its place
    operands, cotangents = draw(case)
    device = {n: jnp.array(x) for n, x in operands.items()}
    run = jitted_fused(case, implementation)
    expected = run(device, cotangents)
    for n, x in device.items():
        np.testing.assert_array_equal(x, operands[n])

    def attend(query, rest):
        return fused(case, implementation)(rest | {"query": query})[0]

    rest = {n: x for n, x in device.items() if n != "query"}
    donated = jnp.array(operands["query"])
    out = jax.jit(attend, donate_argnums=0)(donated, rest)
    assert donated.is_deleted()
    close(out, expected["out"])
    for n, x in rest.items():
        np.testing.assert_array_equal(x, operands[n])


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("name", ["qk", "av"])
@BOTH
def test_operands_of_unfused_attention_may_be_donated(name, implementation):
    function = FUNCTIONS[name]
    f, operands = function.of(SHAPE, implementation), function.draw(SHAPE, dtype="float32")
    expected = jit(f, implementation)(operands)
    donated = {n: jnp.array(x) for n, x in operands.items()}
    close(jax.jit(f, donate_argnums=0)(donated), expected)


def test_checkpoint_policies_know_the_residuals():
    operands, _ = draw(FULL)
    attention = fused(FULL, None)
    policies = jax.checkpoint_policies

    def block(x):
        out, lse = attention(x)
        return out.sum() + lse.sum()

    def remat(policy):
        return jax.checkpoint(block, policy=policy)

    names = ["na_out", "na_lse"]
    saved = remat(policies.save_only_these_names(*names))
    nothing = remat(policies.nothing_saveable)
    offloaded = remat(
        policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=names,
            offload_src="device",
            offload_dst="pinned_host",
        )
    )

    def jaxpr(f):
        return str(jax.make_jaxpr(jax.grad(lambda x: jnp.sin(f(x))))(operands))

    def calls(f):
        return jaxpr(f).count("natten_fused_forward["), jaxpr(f).count("natten_fused_backward[")

    assert calls(block) == (1, 1)
    assert calls(saved) == (1, 1)
    assert calls(offloaded) == (1, 1)
    assert calls(nothing) == (2, 1)
    # Out and LSE go to the host and come back.
    assert jaxpr(offloaded).count("device_put[") == 4 and jaxpr(saved).count("device_put[") == 0
    expected = jax.jit(jax.grad(block))(operands)
    for f in (saved, nothing):
        close(jax.jit(jax.grad(f))(operands), expected)


@pytest.mark.parametrize("name", ["fused", "qk", "av"])
@BOTH
def test_debug_nans_finds_a_nan_and_nothing_else(name, implementation):
    """Masked pairs have scores of minus infinity; no NaN of ours may raise a false alarm, jitted or not."""
    shape = SHAPE.with_causal((True, False))
    function = FUNCTIONS[name]
    f, operands = function.of(shape, implementation), function.draw(shape, dtype="float32")
    operands.pop("rpb", None)  # not with causal axes

    def run(x):
        result, pullback = jax.vjp(f, x)
        return result, pullback(jax.tree.map(jnp.ones_like, result))

    with jax.debug_nans(True):
        jit(run, implementation)(operands)
        if implementation == "cpu":  # one operation at a time takes pure JAX a minute to compile
            run(operands)
        broken = operands | {n: np.full_like(operands[n], np.nan) for n in ("key", "value") if n in operands}
        with pytest.raises(FloatingPointError):
            jit(f, implementation)(broken)


@needs_cpu
def test_value_and_grad_costs_one_forward_and_one_backward_call():
    operands, _ = draw(FULL)

    def loss(x):
        out, lse = fused(FULL, None)(x)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

    def calls(f, x):
        text = jax.jit(f).lower(x).compile().as_text()
        return {t: n for t in native.TARGETS if (n := text.count(f'custom_call_target="{t}"'))}

    once = {"jax_natten_fused_forward": 1, "jax_natten_fused_backward": 1}
    assert calls(loss, operands) == {"jax_natten_fused_forward": 1}
    batched = {n: x[None] for n, x in operands.items()}
    for gradient, x in (
        (jax.grad(loss), operands),
        (jax.value_and_grad(loss), operands),
        (jax.vmap(jax.grad(loss)), batched),
        (jax.grad(jax.checkpoint(loss, policy=jax.checkpoint_policies.everything_saveable)), operands),
    ):
        assert calls(gradient, x) == once
    # Forward mode takes its primal from the kernel and its tangent from pure JAX, whatever implementation is named.
    assert calls(lambda x: jax.jvp(loss, (x,), (x,)), operands) == {"jax_natten_fused_forward": 1}
