"""Transformations of fused attention with everything that a call may be given; scan, eager calls, the default float32.

The other functions and promises: test_derivatives, test_batching, test_spmd, test_compiling, test_export.
"""

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


def test_eager_calls_on_numpy_arrays():
    rng = generator("eager")
    x = rng.standard_normal((6, 2, 4)).astype(np.float32)
    out, lse = jax_natten.na1d(x, x, x, 3, return_lse=True)
    traced = jax.jit(lambda x: jax_natten.na1d(x, x, x, 3, return_lse=True))(x)
    close((out, lse), traced)
    gradient = jax.grad(lambda x: (jax_natten.na1d(x, x, x, 3) ** 2).sum())
    close(gradient(x), jax.jit(gradient)(x))


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
