"""JAX transformations: jit, grad, vmap, scan, remat, jvp, export; on every operand and in combination."""

from __future__ import annotations

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Case, draw, fused, fused_with_gradients, generator, jit, jitted_fused
from problems import problem
from tolerance import relative_error

import jax_natten
from jax_natten import native

IMPLEMENTATIONS = ("cpu", "xla")
TARGETS = ("jax_natten_fused_forward", "jax_natten_fused_backward", "jax_natten_pn", "jax_natten_nn", "jax_natten_in")

SHAPE = problem("transforms", 2, 4, 2, 5, [4, 6], [3, 2], [2, 1], [1, 2])
FULL = Case(SHAPE, value_dim=3, additional=2, bias=True)
NAMES = ("query", "key", "value", "additional_keys", "additional_values", "rpb")

needs_cpu = pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")


def close(one, other, tolerance=2e-6):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative_error(a, np.asarray(b, np.float64)) < tolerance


def scalar(case, implementation):
    """A scalar function of the operands that depends on out and LSE without symmetry."""
    attention = fused(case, implementation)

    def loss(operands):
        out, lse = attention(operands)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

    return loss


def _mapped_inputs(mask, axis, size, rng):
    """Operands of which those in the mask have a new axis (None: anywhere), and each element's operands."""
    operands, cotangents = draw(FULL)
    mapped, in_axes = {}, {}
    for name, has_axis in zip(NAMES, mask):
        x = operands[name]
        at = None
        if has_axis:
            at = int(rng.integers(x.ndim + 1)) if axis is None else axis
            x = rng.standard_normal((*x.shape[:at], size, *x.shape[at:])).astype(x.dtype)
        mapped[name], in_axes[name] = x, at
    elements = [
        {n: x if in_axes[n] is None else np.take(x, i, in_axes[n]) for n, x in mapped.items()} for i in range(size)
    ]
    return mapped, in_axes, elements, cotangents


@needs_cpu
@pytest.mark.parametrize("part", range(4))
def test_vmap_over_every_subset_of_the_operands_with_gradients(part):
    """Each subset of the six operands, the mapped axis anywhere in each of them."""
    masks = [m for m in itertools.product((False, True), repeat=6) if any(m)]
    run = jitted_fused(FULL, "cpu")
    for mask in masks[part::4]:
        rng = generator("vmap", mask)
        mapped, in_axes, elements, cotangents = _mapped_inputs(mask, None, 3, rng)
        results = jax.jit(jax.vmap(run, in_axes=(in_axes, None)))(mapped, cotangents)
        expected = [run(operands, cotangents) for operands in elements]
        close(results, jax.tree.map(lambda *x: np.stack(x), *expected))


@pytest.mark.parametrize("mask", [(1, 0, 0, 0, 0, 0), (0, 1, 1, 0, 0, 1), (1, 1, 1, 1, 1, 1)])
def test_vmap_of_pure_jax_with_gradients(mask):
    rng = generator("vmap", mask)
    run = jitted_fused(FULL, "xla")
    mapped, in_axes, elements, cotangents = _mapped_inputs(mask, 1, 2, rng)
    vmapped = jax.vmap(fused_with_gradients(FULL, "xla"), in_axes=(in_axes, None))
    results = jit(vmapped, "xla")(mapped, cotangents)
    expected = [run(operands, cotangents) for operands in elements]
    close(results, jax.tree.map(lambda *x: np.stack(x), *expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_an_empty_axis(implementation):
    rng = generator("empty")
    for mask in [(1, 1, 1, 1, 1, 1), (0, 0, 1, 0, 1, 0), (0, 0, 0, 0, 0, 1)]:
        mapped, in_axes, _, cotangents = _mapped_inputs(mask, 0, 0, rng)
        vmapped = jax.vmap(fused_with_gradients(FULL, implementation), (in_axes, None))
        results = jit(vmapped, implementation)(mapped, cotangents)
        assert all(x.shape[0] == 0 for x in jax.tree.leaves(results))


@needs_cpu
def test_nested_vmap():
    rng = generator("nested")
    operands, _ = draw(FULL)
    query = rng.standard_normal((2, 3, *operands["query"].shape)).astype(np.float32)
    value = rng.standard_normal((*operands["value"].shape, 3)).astype(np.float32)
    attention = jax.jit(fused(FULL, "cpu"))

    def call(query, value):
        return attention(operands | {"query": query, "value": value})

    both = jax.vmap(jax.vmap(call, in_axes=(0, -1)), in_axes=(0, None))
    expected = [[call(query[i, j], value[..., j]) for j in range(3)] for i in range(2)]
    stacked = [np.stack([np.stack([e[n] for e in row]) for row in expected]) for n in range(2)]
    close(jax.jit(both)(query, value), tuple(stacked))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_a_shared_operand_sums_over_the_mapped_axis(implementation):
    rng = generator("shared")
    operands, _ = draw(FULL)
    queries = rng.standard_normal((3, *operands["query"].shape)).astype(np.float32)
    loss = scalar(FULL, implementation)

    def total(rest):
        return jax.vmap(lambda q: loss(rest | {"query": q}))(queries).sum()

    rest = {n: x for n, x in operands.items() if n != "query"}
    together = jit(jax.grad(total), implementation)(rest)
    one = jit(jax.grad(lambda rest, q: loss(rest | {"query": q})), implementation)
    separate = [one(rest, q) for q in queries]
    close(together, jax.tree.map(lambda *x: np.sum(x, 0), *separate), 1e-5)


@needs_cpu
@pytest.mark.parametrize("mask", [m for m in itertools.product((False, True), repeat=4) if any(m)])
def test_vmap_of_unfused_attention(mask):
    """Query, key, value and bias; scores and weighted sum together, with gradients."""
    rng = generator("unfused", mask)
    operands, (d_out, _) = draw(FULL)
    names = ("query", "key", "value", "rpb")

    def run(x):
        def attention(x):
            scores = jax_natten.na2d_qk(x["query"], x["key"], (3, 2), (2, 1), (1, 2), rpb=x["rpb"])
            return jax_natten.na2d_av(jax.nn.softmax(scores), x["value"], (3, 2), (2, 1), (1, 2))

        out, pullback = jax.vjp(attention, x)
        return out, *pullback(d_out)

    mapped, in_axes = {}, {}
    for name, has_axis in zip(names, mask):
        x = operands[name]
        in_axes[name] = int(rng.integers(x.ndim + 1)) if has_axis else None
        shape = (*x.shape[: in_axes[name]], 3, *x.shape[in_axes[name] :]) if has_axis else x.shape
        mapped[name] = rng.standard_normal(shape).astype(np.float32)
    one = jax.jit(run)
    expected = [
        one({n: x if in_axes[n] is None else np.take(x, i, in_axes[n]) for n, x in mapped.items()}) for i in range(3)
    ]
    results = jax.jit(jax.vmap(run, in_axes=(in_axes,)))(mapped)
    close(results, jax.tree.map(lambda *x: np.stack(x), *expected))


def custom_calls(compiled) -> dict[str, int]:
    text = compiled.as_text()
    return {t: n for t in TARGETS if (n := text.count(f'custom_call_target="{t}"'))}


@needs_cpu
def test_value_and_grad_costs_one_forward_and_one_backward_call():
    operands, _ = draw(FULL)
    loss = scalar(FULL, None)
    once = {"jax_natten_fused_forward": 1, "jax_natten_fused_backward": 1}
    assert custom_calls(jax.jit(loss).lower(operands).compile()) == {"jax_natten_fused_forward": 1}
    batched = {n: x[None] for n, x in operands.items()}
    for gradient, x in (
        (jax.grad(loss), operands),
        (jax.value_and_grad(loss), operands),
        (jax.vmap(jax.grad(loss)), batched),
        (jax.grad(jax.checkpoint(loss, policy=jax.checkpoint_policies.everything_saveable)), operands),
    ):
        assert custom_calls(jax.jit(gradient).lower(x).compile()) == once


def test_checkpoint_policies_know_the_residuals():
    operands, _ = draw(FULL)
    attention = fused(FULL, None)

    def block(x):
        out, lse = attention(x)
        return out.sum() + lse.sum()

    saved = jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names("na_out", "na_lse"))
    nothing = jax.checkpoint(block, policy=jax.checkpoint_policies.nothing_saveable)

    def calls(f):
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sin(f(x))))(operands))
        return jaxpr.count("natten_fused_forward["), jaxpr.count("natten_fused_backward[")

    assert calls(block) == (1, 1)
    assert calls(saved) == (1, 1)
    assert calls(nothing) == (2, 1)
    expected = jax.jit(jax.grad(block))(operands)
    for f in (saved, nothing):
        close(jax.jit(jax.grad(f))(operands), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_over_layers_with_gradients(implementation):
    shape = problem("layers", 1, 2, 1, 6, [5, 4], [3, 2])
    rng = generator("scan")
    x = rng.standard_normal((1, 5, 4, 12)).astype(np.float32)
    weights = 0.3 * rng.standard_normal((3, 12, 24)).astype(np.float32)

    def layer(x, w):
        y = x @ w
        query, key, value = y[..., :12], y[..., 12:18], y[..., 18:]
        heads = (a.reshape(1, 5, 4, -1, 6) for a in (query, key, value))
        out = jax_natten.na2d(*heads, **shape.window, implementation=implementation)
        return x + out.reshape(x.shape)

    def scanned(x, weights):
        return jax.lax.scan(lambda c, w: (jax.checkpoint(layer)(c, w), None), x, weights)[0].sum()

    def unrolled(x, weights):
        for w in weights:
            x = layer(x, w)
        return x.sum()

    grads = [jit(jax.grad(f, (0, 1)), implementation)(x, weights) for f in (scanned, unrolled)]
    close(*grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_mode_is_the_transpose_of_reverse_mode(implementation):
    case = Case(SHAPE, "float64", value_dim=3, additional=2, bias=True)
    operands, cotangents = draw(case)
    rng = generator("tangents")
    tangents = {n: rng.standard_normal(x.shape) for n, x in operands.items()}
    attention = fused(case, implementation)

    def both(operands, tangents, cotangents):
        _, pushed = jax.jvp(attention, (operands,), (tangents,))
        _, pullback = jax.vjp(attention, operands)
        return pushed, pullback(cotangents)[0]

    pushed, pulled = jit(both, implementation)(operands, tangents, cotangents)
    forward = sum(np.vdot(a, b) for a, b in zip(pushed, cotangents))
    backward = sum(np.vdot(pulled[n], tangents[n]) for n in operands)
    np.testing.assert_allclose(forward, backward, rtol=1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hessian_vector_products_of_every_kind_agree(implementation):
    case = Case(problem("hvp", 1, 2, 1, 3, [7], [3], [2]), "float64", additional=1, bias=True)
    operands, _ = draw(case)
    rng = generator("hvp")
    tangents = {n: rng.standard_normal(x.shape) for n, x in operands.items()}
    loss = scalar(case, implementation)

    def products(operands, tangents):
        forward_over_reverse = jax.jvp(jax.grad(loss), (operands,), (tangents,))[1]
        reverse_over_forward = jax.grad(lambda x: jax.jvp(loss, (x,), (tangents,))[1])(operands)

        def directional(x):
            return sum(jnp.vdot(g, t) for g, t in zip(jax.tree.leaves(jax.grad(loss)(x)), jax.tree.leaves(tangents)))

        return forward_over_reverse, reverse_over_forward, jax.grad(directional)(operands)

    one, two, three = jit(products, "xla")(operands, tangents)  # second order is pure JAX for every implementation
    close(one, two, 1e-10)
    close(one, three, 1e-10)


def test_eager_calls_on_numpy_arrays():
    rng = generator("eager")
    x = rng.standard_normal((6, 2, 4)).astype(np.float32)
    out, lse = jax_natten.na1d(x, x, x, 3, return_lse=True)
    traced = jax.jit(lambda x: jax_natten.na1d(x, x, x, 3, return_lse=True))(x)
    close((out, lse), traced)
    gradient = jax.grad(lambda x: (jax_natten.na1d(x, x, x, 3) ** 2).sum())
    close(gradient(x), jax.jit(gradient)(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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
    out = jax.jit(attend, donate_argnums=0)(jnp.array(operands["query"]), rest)
    close(out, expected["out"])
    for n, x in rest.items():
        np.testing.assert_array_equal(x, operands[n])


@needs_cpu
def test_one_function_lowers_for_several_platforms_and_runs_here():
    operands, _ = draw(FULL)
    attention = jax.jit(lambda x: fused(FULL, None)(x))
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
    exported = jax.export.export(attention, platforms=("cpu", "tpu"), disabled_checks=checks)(operands)
    close(exported.call(operands), attention(operands))
    assert "jax_natten_fused_forward" in exported.mlir_module()


@needs_cpu
def test_exported_gradients_take_any_batch_size():
    (batch,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, 6, heads, 4), jnp.float32) for heads in (4, 2, 2)]

    def gradient(q, k, v):
        return jax.grad(lambda *x: jnp.sum(jax_natten.na1d(*x, 3, 2) ** 2), (0, 1, 2))(q, k, v)

    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
    exported = jax.export.export(jax.jit(gradient), platforms=("cpu",), disabled_checks=checks)(*shapes)
    rng = generator("export")
    for size in (1, 3):
        x = [rng.standard_normal((size, *s.shape[1:])).astype(np.float32) for s in shapes]
        close(exported.call(*x), jax.jit(gradient)(*x))


def test_without_64_bit_types_everything_works_too():
    """The suite enables them; the default, which users have, is without."""
    program = """
import jax, jax.numpy as jnp, numpy as np, jax_natten
assert not jax.config.jax_enable_x64
x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 2, 4)), jnp.float32)
for implementation in ("cpu", "xla") if jax_natten.native.cpu else ("xla",):
    def loss(x, bias):
        out, lse = jax_natten.na1d(x, x, x, 3, 2, rpb=bias, additional_keys=x[:, :2], additional_values=x[:, 2:4],
                                   return_lse=True, implementation=implementation)
        scores = jax_natten.na1d_qk(x, x, 3, implementation=implementation)
        mixed = jax_natten.na1d_av(scores, x, 3, implementation=implementation)
        return (out ** 2).sum() + lse.sum() + (mixed ** 2).sum()
    grads = jax.jit(jax.grad(loss, (0, 1)))(x, jnp.ones((2, 5)))
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in grads), grads
print("fine")
"""
    code = f"import os; os.environ.pop('JAX_ENABLE_X64', None); import jax_natten.native{program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
