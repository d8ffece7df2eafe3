"""Two oracles written apart agree: ``jax_natten.reference`` under JAX's differentiation, and numpy by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checks import Case, draw, generator, operand_shapes
from problems import EDGE, problem
from tolerance import allowed_error, relative_error

from jax_natten import Neighborhood, reference

PROBLEMS = [
    problem("1d", 2, 4, 2, 5, [13], [4], [3], [2]),
    problem("2d", 1, 2, 1, 4, [6, 7], [3, 4], [2, 1], [2, 1], [False, True]),
    problem("3d", 1, 2, 2, 3, [3, 4, 5], [3, 2, 2], [1, 2, 1], [1, 2, 2], [True, False, True]),
    problem("2d_plain", 2, 2, 1, 3, [5, 6], [3, 2], [2, 2], [1, 3]),
    *EDGE.values(),
]


def _ids(x):
    return x.name


@pytest.mark.parametrize("case_problem", PROBLEMS, ids=_ids)
def test_fused_reference_and_its_gradients_equal_the_numpy_oracle(case_problem):
    extra, bias = PROBLEMS.index(case_problem) % 3, not any(case_problem.is_causal)
    case = Case(case_problem, "float64", value_dim=3, additional=extra, bias=bias, scale=0.7)
    operands, (d_out, d_lse) = draw(case)
    expected, magnitudes = oracle.attention(operands, case_problem.window, 0.7, d_out, d_lse)
    neighborhood = Neighborhood.make(**case_problem.window)

    def attention(query, key, value, **more):
        return reference.attention(query, key, value, neighborhood, 0.7, **more)

    @jax.jit  # one compilation instead of one per operation
    def run(operands, cotangents):
        (out, lse), pullback = jax.vjp(lambda x: attention(**x), operands)
        (grads,) = pullback(cotangents)
        return {"out": out, "lse": lse} | {f"d_{name}": g for name, g in grads.items()}

    results = run(operands, (d_out, d_lse))
    assert results.keys() == expected.keys()
    for name in expected:
        assert relative_error(results[name], expected[name], magnitudes.get(name, 0)) < 1e-12, name


@pytest.mark.parametrize("case_problem", PROBLEMS, ids=_ids)
def test_unfused_reference_equals_the_numpy_oracle(case_problem):
    rng = generator("unfused reference", case_problem.name)
    case = Case(case_problem, "float64", value_dim=3, additional=2, bias=not any(case_problem.is_causal))
    shapes = operand_shapes(case)
    operands = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    neighborhood = Neighborhood.make(**case_problem.window)
    bias = operands.get("rpb")
    run = jax.jit(lambda query, key, more, bias: reference.qk(query, key, neighborhood, more, bias))
    scores = run(operands["query"], operands["key"], operands["additional_keys"], bias)
    expected = oracle.pn(operands["query"], operands["key"], case_problem.window, operands["additional_keys"], bias)
    assert relative_error(scores, expected) < 1e-12
    weights = rng.standard_normal(expected.shape)
    run = jax.jit(lambda attn, value, more: reference.av(attn, value, neighborhood, more))
    mixed = run(weights, operands["value"], operands["additional_values"])
    expected = oracle.nn(weights, operands["value"], case_problem.window, operands["additional_values"])
    assert relative_error(mixed, expected) < 1e-12


def test_inverse_of_the_oracle_is_the_transpose_of_its_weighted_sum():
    case_problem = problem("transposed", 2, 4, 2, 5, [7, 6], [3, 4], [2, 1], [2, 1], [False, True])
    rng = generator("inverse oracle")
    weights = rng.standard_normal((2, 7, 6, 4, 12 + 3))
    keys, additional = rng.standard_normal((2, 7, 6, 2, 5)), rng.standard_normal((2, 3, 2, 5))
    queries = rng.standard_normal((2, 7, 6, 4, 5))
    forward = np.vdot(oracle.nn(weights, keys, case_problem.window, additional), queries)
    d_keys, d_additional = oracle.inverse(weights, queries, case_problem.window, 2)
    np.testing.assert_allclose(forward, np.vdot(d_keys, keys) + np.vdot(d_additional, additional), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_yardstick_is_plain_jax_attention(dtype):
    """The numpy stand-in for plain attention errs as much as jax.nn.dot_product_attention and its gradients."""
    dense = problem("dense", 2, 2, 2, 16, [64], [64])
    case = Case(dense, dtype)
    operands, (d_out, d_lse) = draw(case)
    d_lse = np.zeros_like(d_lse)
    scale = 16**-0.5
    expected, _ = oracle.attention(operands, dense.window, scale, d_out, d_lse)
    plain, _ = oracle.attention(
        operands, dense.window, scale, d_out, d_lse, compute=np.float32, storage=jnp.dtype(dtype)
    )

    def attention(x):
        return jax.nn.dot_product_attention(x["query"], x["key"], x["value"])

    out, pullback = jax.vjp(attention, {k: jnp.asarray(v) for k, v in operands.items()})
    (grads,) = pullback(jnp.asarray(d_out))
    for name, result in {"out": out, **{f"d_{k}": g for k, g in grads.items()}}.items():
        theirs, ours = relative_error(result, expected[name]), relative_error(plain[name], expected[name])
        assert 0.5 < theirs / ours < 2, (name, theirs, ours)
    assert allowed_error(0.0, dtype) == 1e-7
