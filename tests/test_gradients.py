"""Float64 derivatives against finite differences, first and second order, forward and reverse mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Case, draw, fused, generator, jit
from problems import problem

import jax_natten

IMPLEMENTATIONS = ("cpu", "xla")

PROBLEMS = {
    p.name: p
    for p in (
        problem("1d", 1, 2, 1, 2, [7], [3], [2], [2]),
        problem("1d_causal", 1, 1, 1, 3, [6], [4], [1], [1], True),
        problem("2d", 1, 2, 2, 2, [4, 3], [3, 2], [1, 2], [1, 1]),
        problem("3d_partly_causal", 1, 1, 1, 2, [3, 2, 4], [2, 2, 2], [1, 2, 1], [1, 1, 2], [False, True, False]),
    )
}


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS)
def shape(request):
    return request.param


def _case(shape, additional=2):
    return Case(shape, "float64", value_dim=3, additional=additional, bias=not any(shape.is_causal), scale=0.8)


def _dot(one, other) -> float:
    return sum(float(np.vdot(a, b)) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def _difference(function, x, direction, step=1e-5):
    """Central difference of a function of a tree along a direction."""
    after, before = (function(jax.tree.map(lambda a, t, s=sign: a + s * step * t, x, direction)) for sign in (1, -1))
    return jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / (2 * step), after, before)


def _assert_equal(derivative, expected, what):
    for a, b in zip(jax.tree.leaves(derivative), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7 * (1 + np.abs(b).max(initial=0)), err_msg=what)


def check_derivatives(function, x, name, order=1):
    """Compares both modes, and for the second order their four combinations, with central differences.

    Random tangents and cotangents in all entries of all operands: a wrong or missing entry shows. Few and quick
    compilations, where ``jax.test_util.check_grads`` runs the derivatives one operation at a time.
    """
    rng = generator("gradients", name)

    def random(tree):
        return jax.tree.map(lambda a: rng.standard_normal(a.shape), tree)

    def compiled(f):
        return jit(f, "xla")  # quickly: second derivatives are pure JAX whatever the implementation

    value = compiled(function)
    tangent, cotangent = random(x), random(jax.eval_shape(function, x))

    def derivatives(x):
        pushed = jax.jvp(function, (x,), (tangent,))[1]
        return pushed, jax.vjp(function, x)[1](cotangent)[0]

    pushed, pulled = compiled(derivatives)(x)
    expected = _difference(value, x, tangent)
    _assert_equal(pushed, expected, "forward mode")
    np.testing.assert_allclose(_dot(pulled, tangent), _dot(cotangent, expected), rtol=1e-6, err_msg="reverse mode")
    if order == 1:
        return

    other, back = random(x), random(x)

    def second(x):
        def reverse(x):
            return jax.vjp(function, x)[1](cotangent)[0]

        def forward(x):
            return jax.jvp(function, (x,), (tangent,))[1]

        return {
            "forward over reverse": jax.jvp(reverse, (x,), (other,))[1],
            "reverse over reverse": jax.vjp(reverse, x)[1](back)[0],
            "forward over forward": jax.jvp(forward, (x,), (other,))[1],
            "reverse over forward": jax.vjp(forward, x)[1](cotangent)[0],
        }

    results = compiled(second)(x)
    first = compiled(derivatives)
    d_pushed, d_pulled = _difference(first, x, other)
    _assert_equal(results["forward over reverse"], d_pulled, "forward over reverse")
    _assert_equal(results["forward over forward"], d_pushed, "forward over forward")
    for mode, expected in (
        ("reverse over reverse", _dot(back, d_pulled)),
        ("reverse over forward", _dot(cotangent, d_pushed)),
    ):
        np.testing.assert_allclose(_dot(results[mode], other), expected, rtol=1e-6, atol=1e-7, err_msg=mode)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fused_derivatives_of_out_and_lse_by_every_operand(shape, implementation):
    case = _case(shape)
    operands, _ = draw(case)
    check_derivatives(fused(case, implementation), operands, (shape.name, implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["1d", "1d_causal"])
def test_fused_second_derivatives_of_out_and_lse(name, implementation):
    case = _case(PROBLEMS[name], additional=1)
    operands, _ = draw(case)
    check_derivatives(fused(case, implementation), operands, (name, implementation), order=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_lse_alone_has_derivatives(implementation):
    case = _case(PROBLEMS["2d"])
    operands, _ = draw(case)
    attention = fused(case, implementation)
    check_derivatives(lambda x: attention(x)[1], operands, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["query", "key", "value", "additional_keys", "additional_values", "rpb"])
def test_fused_derivatives_by_each_operand_alone(name, implementation):
    case = _case(PROBLEMS["2d"], additional=1)
    operands, _ = draw(case)
    attention = fused(case, implementation)
    check_derivatives(lambda x: attention(operands | {name: x}), operands[name], (name, implementation))


def unfused(shape, implementation):
    """Scores, and weighted sums, of a tree of operands."""

    def scores(x):
        result = jax_natten.neighborhood_qk(
            x["query"],
            x["key"],
            **shape.window,
            additional_keys=x["additional_keys"],
            rpb=x.get("rpb"),
            implementation=implementation,
        )
        return jnp.where(jnp.isfinite(result), result, 0)  # no differences of infinities

    def mixed(x):
        return jax_natten.neighborhood_av(
            x["attn"],
            x["value"],
            **shape.window,
            additional_values=x["additional_values"],
            implementation=implementation,
        )

    return scores, mixed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unfused_derivatives_to_second_order(shape, implementation):
    operands, _ = draw(_case(shape))
    rng = generator("weights", shape.name)
    slots = int(np.prod(shape.kernel_size)) + 2
    scores, mixed = unfused(shape, implementation)
    operands["attn"] = rng.standard_normal((1, *shape.grid, shape.heads, slots))
    of_scores = {n: operands[n] for n in ("query", "key", "additional_keys", "rpb") if n in operands}
    of_mixed = {n: operands[n] for n in ("attn", "value", "additional_values")}
    check_derivatives(scores, of_scores, ("qk", shape.name), order=2)
    check_derivatives(mixed, of_mixed, ("av", shape.name), order=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unfused_pipeline_with_a_causal_axis_to_second_order(implementation):
    shape = PROBLEMS["1d_causal"]
    operands, _ = draw(_case(shape, additional=1))

    def attention(x):
        scores = jax_natten.na1d_qk(
            x["query"], x["key"], *shape.window.values(), x["additional_keys"], implementation=implementation
        )
        return jax_natten.na1d_av(
            jax.nn.softmax(scores), x["value"], *shape.window.values(), x["additional_values"],
            implementation=implementation,
        )  # fmt: skip

    check_derivatives(attention, operands, implementation, order=2)
