"""Every public function as a function of one tree of operands, and what each promises under JAX transformations.

Every check takes the implementation as an argument, so that the CPU suite and ``tests/gpu`` hold them to the same
promises. What is expected comes from the definitions in :mod:`jax_natten.reference`, transformed by JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from checks import generator, jit
from problems import Problem, problem
from tolerance import relative_error

import jax_natten
from jax_natten import Neighborhood, reference

ADDITIONAL = 2
# Programs that earlier versions wrote, by version: see data/write_exports.py.
_DATA = Path(__file__).parent / "data"
ARTEFACTS = sorted(path.stem for path in _DATA.glob("*.npz"))
# Grouped heads, a stride, and windows that shift at both borders; small, since most of the time goes into compiling.
TINY = problem("tiny", 1, 2, 1, 2, [5], [3], [2], [1])
SHAPE = problem("transforms", 2, 4, 2, 5, [4, 6], [3, 2], [2, 1], [1, 2])


@dataclasses.dataclass(frozen=True)
class Function:
    """A public function.

    Attributes:
      operands: their names, see :func:`shapes`.
      call: ``(problem, operands, options) -> result``; options are keyword arguments.
      definition: ``(problem, operands) -> result``, in plain JAX.
    """

    name: str
    operands: tuple[str, ...]
    call: Callable[[Problem, dict, dict], Any]
    definition: Callable[[Problem, dict], Any]

    def of(self, shape: Problem, implementation: str | None, **options) -> Callable[[dict], Any]:
        """``operands -> result`` of one implementation."""
        options |= {} if self.name == "merge" else {"implementation": implementation}
        return lambda operands: self.call(shape, operands, options)

    def draw(self, shape: Problem, *words, dtype="float64") -> dict[str, np.ndarray]:
        """Random operands."""
        rng = generator(self.name, shape.name, words)
        return {name: rng.standard_normal(shapes(shape)[name]).astype(dtype) for name in self.operands}


def shapes(shape: Problem) -> dict[str, tuple[int, ...]]:
    """Of every operand of every function."""
    rows, value_dim = (shape.batch, *shape.grid, shape.heads), shape.dim + 1
    kv = (shape.batch, *shape.grid, shape.kv_heads)
    more = (shape.batch, ADDITIONAL, shape.kv_heads)
    return {
        "query": (*rows, shape.dim),
        "key": (*kv, shape.dim),
        "value": (*kv, value_dim),
        "additional_keys": (*more, shape.dim),
        "additional_values": (*more, value_dim),
        "rpb": (shape.heads, *(2 * k - 1 for k in shape.kernel_size)),
        "attn": (*rows, int(np.prod(shape.kernel_size)) + ADDITIONAL),
        "near": (*rows, value_dim),
        "far": (*rows, value_dim),
        "near_lse": rows,
        "far_lse": rows,
    }


def _split(operands, *names):
    """The named operands, and the others as keyword arguments."""
    rest = dict(operands)
    return [rest.pop(name) for name in names], rest


def _neighborhood(shape: Problem) -> Neighborhood:
    return Neighborhood.make(**shape.window, rank=shape.rank)


def _attention(shape, operands, options):
    arrays, more = _split(operands, "query", "key", "value")
    return jax_natten.neighborhood_attention(*arrays, **shape.window, **more, **options, return_lse=True)


def _qk(shape, operands, options):
    arrays, more = _split(operands, "query", "key")
    return jax_natten.neighborhood_qk(*arrays, **shape.window, **more, **options)


def _av(shape, operands, options):
    arrays, more = _split(operands, "attn", "value")
    return jax_natten.neighborhood_av(*arrays, **shape.window, **more, **options)


def _merge(shape, operands, options):
    x = operands
    return jax_natten.merge_attentions((x["near"], x["far"]), (x["near_lse"], x["far_lse"]), **options)


def _define_attention(shape, operands):
    arrays, more = _split(operands, "query", "key", "value")
    return reference.attention(*arrays, _neighborhood(shape), shape.dim**-0.5, **more)


def _define_qk(shape, operands):
    arrays, more = _split(operands, "query", "key")
    return reference.qk(*arrays, _neighborhood(shape), **more)


def _define_av(shape, operands):
    arrays, more = _split(operands, "attn", "value")
    return reference.av(*arrays, _neighborhood(shape), **more)


def _define_merge(shape, operands):
    near, far = (jnp.exp(operands[name])[..., None] for name in ("near_lse", "far_lse"))
    total = near + far
    return (near * operands["near"] + far * operands["far"]) / total, jnp.log(total)[..., 0]


_FUSED = ("query", "key", "value", "additional_keys", "additional_values", "rpb")
FUNCTIONS = {
    function.name: function
    for function in (
        Function("fused", _FUSED, _attention, _define_attention),  # out and LSE
        Function("qk", ("query", "key", "additional_keys", "rpb"), _qk, _define_qk),
        Function("av", ("attn", "value", "additional_values"), _av, _define_av),
        Function("merge", ("near", "far", "near_lse", "far_lse"), _merge, _define_merge),
    )
}
# merge_attentions has no implementations: it is JAX code.
CASES = [(name, i) for name in FUNCTIONS if name != "merge" for i in ("cpu", "xla")] + [("merge", "xla")]


def close(one, other, tolerance=2e-6):
    """Equal trees of arrays, up to rounding."""
    other = dict(jax.tree.leaves_with_path(other))
    mine = jax.tree.leaves_with_path(one)
    assert [path for path, _ in mine] == list(other)
    for path, a in mine:
        b = other[path]
        assert a.shape == b.shape and a.dtype == b.dtype, (path, a.shape, b.shape, a.dtype, b.dtype)
        # Derivatives that vanish do so up to rounding.
        assert relative_error(a, np.asarray(b, np.float64), magnitude=1.0) < tolerance, path


def check_derivatives(name: str, implementation: str) -> None:
    """Jacobians and Hessians in every mode equal those of the definition, with respect to every operand at once."""
    function, shape = FUNCTIONS[name], TINY
    operands, tangents = function.draw(shape, "primals"), function.draw(shape, "tangents")
    weights = generator("weights", name).standard_normal(8)

    def loss_of(f):
        return lambda x: sum((w * jnp.sin(r)).sum() for w, r in zip(weights, jax.tree.leaves(f(x))))

    def every_mode(x, t):
        f = function.of(shape, implementation)
        loss = loss_of(f)

        def directional(x):
            return sum(jnp.vdot(g, t[n]) for n, g in jax.grad(loss)(x).items())

        return {
            "jvp": jax.jvp(f, (x,), (t,))[1],
            "linearize": jax.linearize(f, x)[1](t),
            "jacfwd": jax.jacfwd(f)(x),
            "jacrev": jax.jacrev(f)(x),
            "hessian": jax.hessian(loss)(x),
            "forward over reverse": jax.jvp(jax.grad(loss), (x,), (t,))[1],
            "reverse over reverse": jax.grad(directional)(x),
        }

    def definition(x, t):
        f = functools.partial(function.definition, shape)
        hessian = jax.jacrev(jax.grad(loss_of(f)))(x)
        pushed, jacobian = jax.jvp(f, (x,), (t,))[1], jax.jacrev(f)(x)
        product = {n: sum(jnp.tensordot(row[m], t[m], t[m].ndim) for m in t) for n, row in hessian.items()}
        return {
            "jvp": pushed,
            "linearize": pushed,
            "jacfwd": jacobian,
            "jacrev": jacobian,
            "hessian": hessian,
            "forward over reverse": product,
            "reverse over reverse": product,
        }

    # Second derivatives are pure JAX for every implementation: compile with little effort.
    close(jit(every_mode, "xla")(operands, tangents), jit(definition, "xla")(operands, tangents), 1e-9)


def total(result):
    """The sum of the squares of a result."""
    return sum((r**2).sum() for r in jax.tree.leaves(result))


def masks(function: Function) -> list[tuple[bool, ...]]:
    """Every choice of operands that a vmap may map."""
    return [m for m in itertools.product((False, True), repeat=len(function.operands)) if any(m)]


def with_gradients(f):
    """``operands -> (result, gradients)`` with a cotangent that has no symmetry."""

    def run(operands):
        result, pullback = jax.vjp(f, operands)
        return result, pullback(jax.tree.map(lambda r: jnp.cos(3 * r), result))[0]

    return run


def mapped(function: Function, mask, size: int, *words, dtype="float32"):
    """Operands, those in the mask with another axis anywhere: ``(operands, in_axes, operands of each element)``."""
    rng = generator("mapped", function.name, mask, words)
    operands, in_axes = function.draw(SHAPE, words, dtype=dtype), {}
    for name, has_axis in zip(function.operands, mask):
        x = operands[name]
        in_axes[name] = int(rng.integers(x.ndim + 1)) if has_axis else None
        if has_axis:
            shape = (*x.shape[: in_axes[name]], size, *x.shape[in_axes[name] :])
            operands[name] = rng.standard_normal(shape).astype(dtype)
    elements = [
        {n: x if in_axes[n] is None else np.take(x, i, in_axes[n]) for n, x in operands.items()} for i in range(size)
    ]
    return operands, in_axes, elements


def stacked(results):
    return jax.tree.map(lambda *x: np.stack(x), *results)


def check_vmap(name: str, implementation: str, some_masks=None) -> None:
    """vmap, with gradients, over every subset of the operands is a loop."""
    function = FUNCTIONS[name]
    run = with_gradients(function.of(SHAPE, implementation))
    one = jit(run, implementation)
    for mask in some_masks or masks(function):
        operands, in_axes, elements = mapped(function, mask, 3)
        results = jit(jax.vmap(run, in_axes=(in_axes,)), implementation)(operands)
        close(results, stacked([one(x) for x in elements]))


def check_vmap_of_derivatives(name: str, implementation: str) -> None:
    """vmap of jvp and of grad, nested: over the first operand outside, over the last inside."""
    function, shape = FUNCTIONS[name], TINY
    f = function.of(shape, implementation)
    first, last = function.operands[0], function.operands[-1]

    def derivatives(x, t):
        loss = lambda x: sum(jnp.sin(r).sum() for r in jax.tree.leaves(f(x)))  # noqa: E731
        return jax.jvp(f, (x,), (t,)), jax.grad(loss)(x)

    operands, tangents = function.draw(shape), function.draw(shape, "tangents")
    rng = generator("nested", name)
    for tree in (operands, tangents):
        tree[first] = rng.standard_normal((2, *tree[first].shape))
        tree[last] = rng.standard_normal((*tree[last].shape, 3))
    outer = {n: 0 if n == first else None for n in operands}
    inner = {n: -1 if n == last else None for n in operands}
    nested = jax.vmap(jax.vmap(derivatives, (inner, inner)), (outer, outer))
    one = jit(derivatives, "xla")

    def element(tree, i, j):
        return tree | {first: tree[first][i], last: tree[last][..., j]}

    expected = [stacked([one(element(operands, i, j), element(tangents, i, j)) for j in range(3)]) for i in range(2)]
    close(jit(nested, "xla")(operands, tangents), stacked(expected), 1e-10)


def check_vmap_over_an_empty_axis(name: str, implementation: str) -> None:
    """Results and gradients of no elements."""
    function = FUNCTIONS[name]
    for mask in (masks(function)[0], masks(function)[-1]):
        operands, in_axes, _ = mapped(function, mask, 0)
        run = jax.vmap(with_gradients(function.of(SHAPE, implementation)), in_axes=(in_axes,))
        results, gradients = jit(run, implementation)(operands)
        expected = jax.eval_shape(function.of(SHAPE, implementation), function.draw(SHAPE, dtype="float32"))
        assert jax.tree.map(lambda r: (0, *r.shape), expected) == jax.tree.map(lambda r: r.shape, results)
        assert all(g.shape[0] == 0 for g in gradients.values())


def check_artefact(version: str, name: str) -> None:
    """A stored program gives the stored numbers."""
    exported = jax.export.deserialize((_DATA / f"{version}.{name}.jax_export").read_bytes())
    with np.load(_DATA / f"{version}.npz") as stored:
        operands = [stored[n] for n in ("query", "key", "value", "additional_keys", "additional_values", "rpb")]
        results, cotangents, gradients = (
            [stored[f"{name}_{what}_{i}"] for i in range(sum(n.startswith(f"{name}_{what}_") for n in stored.files))]
            for what in ("result", "cotangent", "gradient")
        )
    got, pullback = jax.vjp(exported.call, *operands)
    for mine, expected in zip((*got, *pullback(tuple(cotangents))), (*results, *gradients), strict=True):
        assert mine.dtype == expected.dtype
        assert relative_error(mine, expected) < 1e-5
