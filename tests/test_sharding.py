"""Sharded programs on eight fake devices: equal results, no gathers, and the sums over replicated operands."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Case, draw, fused_with_gradients, generator
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import problem
from tolerance import relative_error

import jax_natten
from jax_natten import native

pytestmark = [
    pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built"),
    pytest.mark.skipif(len(jax.devices("cpu")) < 8, reason="needs eight CPU devices (XLA_FLAGS, see conftest.py)"),
]

SHAPE = problem("sharded", 4, 4, 2, 5, [6, 8], [3, 4], [2, 1], [1, 1])
CASE = Case(SHAPE, value_dim=3, additional=2, bias=True)

# Batch over four devices, heads over two.
SPECS = {
    "query": P("b", None, None, "h"),
    "key": P("b", None, None, "h"),
    "value": P("b", None, None, "h"),
    "additional_keys": P("b", None, "h"),
    "additional_values": P("b", None, "h"),
    "rpb": P("h"),
}
OUT, LSE = P("b", None, None, "h"), P("b", None, None, "h")


def _mesh(kind=AxisType.Auto):
    devices = np.array(jax.devices("cpu")[:8]).reshape(4, 2)
    return jax.sharding.Mesh(devices, ("b", "h"), axis_types=(kind, kind))


def _put(mesh, tree, specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def _sharded(mesh, specs=SPECS):
    operands, cotangents = draw(CASE)
    return _put(mesh, operands, specs), _put(mesh, cotangents, (OUT, LSE))


def _gathers(compiled) -> list[str]:
    return [
        line.strip()[:120] for line in compiled.as_text().splitlines() if "all-gather" in line or "all-to-all" in line
    ]


def _close(results, expected, tolerance=2e-6):
    for path, a in jax.tree.leaves_with_path(results):
        b = functools.reduce(lambda tree, key: tree[key.key], path, expected)
        assert relative_error(a, np.asarray(b, np.float64)) < tolerance, path


@functools.cache
def _expected():
    return jax.jit(fused_with_gradients(CASE, None))(*draw(CASE))


def _is_sharded_like(x, mesh, spec):
    return x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def test_batch_and_heads_stay_sharded_without_any_gather():
    mesh = _mesh()
    arguments = _sharded(mesh)
    compiled = jax.jit(fused_with_gradients(CASE, None)).lower(*arguments).compile()
    assert _gathers(compiled) == []
    results = compiled(*arguments)
    _close(results, _expected())
    assert _is_sharded_like(results["out"], mesh, OUT) and _is_sharded_like(results["lse"], mesh, LSE)
    for name, spec in SPECS.items():
        assert _is_sharded_like(results[f"d_{name}"], mesh, spec), name


def test_batch_alone_stays_sharded():
    mesh = _mesh()
    specs = {name: P() if name == "rpb" else P("b") for name in SPECS}
    operands, cotangents = draw(CASE)
    arguments = _put(mesh, operands, specs), _put(mesh, cotangents, (P("b"), P("b")))
    compiled = jax.jit(fused_with_gradients(CASE, None)).lower(*arguments).compile()
    assert _gathers(compiled) == []
    _close(compiled(*arguments), _expected())


def test_batch_over_two_mesh_axes():
    mesh = _mesh()
    case = Case(problem("both", 8, 2, 2, 4, [9], [4]), additional=1)
    operands, cotangents = draw(case)
    run = jax.jit(fused_with_gradients(case, None))
    both = P(("b", "h"))
    arguments = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, both)), (operands, cotangents))
    assert _gathers(run.lower(*arguments).compile()) == []
    _close(run(*arguments), run(operands, cotangents))


@pytest.mark.parametrize(
    "specs",
    [
        {"query": P(None, None, "h"), "key": P(None, "h"), "value": P()},
        {"query": P("b", "h"), "key": P("b", "h"), "value": P("b", "h")},
        {"query": P(None, None, None, None, None), "key": P("b"), "value": P(None, None, None, "h")},
        {"query": P("h", None, None, "b"), "key": P(), "value": P("b")},
    ],
    ids=["grid", "batch and grid", "only keys", "groups cut across"],
)
def test_any_other_sharding_gives_the_same_result(specs):
    mesh = _mesh()
    operands, cotangents = draw(CASE)
    sharded = {name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P()))) for name, x in operands.items()}
    _close(jax.jit(fused_with_gradients(CASE, None))(sharded, cotangents), _expected())


def test_axes_that_do_not_divide_are_gathered():
    """Three batch elements on four devices and three heads on two."""
    mesh = _mesh()
    case = Case(problem("odd", 3, 3, 3, 4, [9], [4]))
    operands, cotangents = draw(case)
    run = jax.jit(fused_with_gradients(case, None))
    constrained = jax.jit(
        lambda x, ct: fused_with_gradients(case, None)(
            jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P("b", None, "h"))), x), ct
        )
    )
    _close(constrained(operands, cotangents), run(operands, cotangents))


def test_unfused_attention_stays_sharded():
    mesh = _mesh()
    operands, (d_out, _) = draw(CASE)
    window = SHAPE.window

    def run(x, d_out):
        def attention(x):
            scores = jax_natten.neighborhood_qk(
                x["query"], x["key"], **window, additional_keys=x["additional_keys"], rpb=x["rpb"]
            )
            return jax_natten.neighborhood_av(
                jax.nn.softmax(scores), x["value"], **window, additional_values=x["additional_values"]
            )

        out, pullback = jax.vjp(attention, x)
        return {"out": out} | pullback(d_out)[0]

    arguments = _put(mesh, operands, SPECS), jax.device_put(d_out, NamedSharding(mesh, OUT))
    # How gradients of keys are sharded is for those who use them to say (parameters, in a model): of the operands that
    # they are computed from, none has the keys' heads.
    specs = {"out": OUT} | SPECS
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    compiled = jax.jit(run, out_shardings=shardings).lower(*arguments).compile()
    assert _gathers(compiled) == []
    _close(compiled(*arguments), jax.jit(run)(operands, d_out))


def test_eager_calls_keep_the_sharding():
    mesh = _mesh()
    operands, _ = _sharded(mesh)
    out = jax_natten.na2d(operands["query"], operands["key"], operands["value"], **SHAPE.window)
    assert _is_sharded_like(out, mesh, OUT)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_batch_and_heads(check_vma):
    mesh = _mesh()

    def local(operands, cotangents):
        results = fused_with_gradients(CASE, None)(operands, cotangents)
        if not check_vma:  # JAX does not track what varies, so the sum over the batch is ours to write
            results["d_rpb"] = jax.lax.psum(results["d_rpb"], "b")
        return results

    out_specs = {"out": OUT, "lse": LSE} | {f"d_{name}": spec for name, spec in SPECS.items()}
    run = jax.shard_map(local, mesh=mesh, in_specs=(SPECS, (OUT, LSE)), out_specs=out_specs, check_vma=check_vma)
    _close(jax.jit(run)(*draw(CASE)), _expected())


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
def test_gradients_of_replicated_keys_and_values_are_summed(check_vma, unfused):
    """Query heads on eight devices share one replicated key head: its gradient is the sum over the devices."""
    devices = jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]), ("h",))
    rng = generator("replicated")
    query = rng.standard_normal((2, 9, 8, 4))
    key, value = rng.standard_normal((2, 9, 1, 4)), rng.standard_normal((2, 9, 1, 3))
    more_keys, more_values = rng.standard_normal((2, 2, 1, 4)), rng.standard_normal((2, 2, 1, 3))

    def attention(query, key, value, more_keys, more_values):
        if unfused:
            scores = jax_natten.na1d_qk(query, key, 4, additional_keys=more_keys)
            out = jax_natten.na1d_av(jax.nn.softmax(scores), value, 4, additional_values=more_values)
            return out, jax.nn.logsumexp(scores, -1)
        return jax_natten.na1d(
            query, key, value, 4, additional_keys=more_keys, additional_values=more_values, return_lse=True
        )

    heads = P(None, None, "h")
    split = jax.shard_map(
        attention, mesh=devices, in_specs=(heads, P(), P(), P(), P()), out_specs=(heads, heads), check_vma=check_vma
    )

    def gradients(function):
        def loss(*x):
            out, lse = function(*x)
            return (jnp.sin(out) * jnp.arange(8.0)[:, None]).sum() + (lse**2).sum()

        return jax.jit(jax.grad(loss, range(5)))(query, key, value, more_keys, more_values)

    for one, other in zip(gradients(split), gradients(attention)):
        assert relative_error(one, other) < 1e-12


def test_explicit_sharding_shows_in_the_types_and_costs_no_gather():
    mesh = _mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        arguments = _sharded(mesh)
        types = {}

        def run(*x):
            results = fused_with_gradients(CASE, None)(*x)
            types.update({name: jax.typeof(r).sharding.spec for name, r in results.items()})
            return results

        compiled = jax.jit(run).lower(*arguments).compile()
        assert _gathers(compiled) == []
        results = compiled(*arguments)
    assert types["out"] == P("b", None, None, "h", None) and types["lse"] == P("b", None, None, "h")
    _close(results, _expected())


def test_partly_manual_shard_map():
    """The batch is split by hand, the heads by the automatic partitioner."""
    mesh = _mesh()
    by_hand = {name: P() if name == "rpb" else P("b") for name in SPECS}

    def attention(operands):
        x = dict(operands)
        return jax_natten.na2d(x.pop("query"), x.pop("key"), x.pop("value"), **SHAPE.window, **x)

    run = jax.shard_map(attention, mesh=mesh, in_specs=(by_hand,), out_specs=P("b"), axis_names={"b"})
    operands, _ = _sharded(mesh)
    assert relative_error(jax.jit(run)(operands), np.asarray(_expected()["out"], np.float64)) < 2e-6


def test_vmap_of_a_sharded_call():
    mesh = _mesh()
    rng = generator("vmap sharded")
    x = rng.standard_normal((2, 4, 9, 2, 4)).astype(np.float32)
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, "b", None, "h")))
    run = jax.jit(jax.vmap(lambda x: jax_natten.na1d(x, x, x, 4)))
    assert relative_error(run(sharded), run(x)) < 1e-6
