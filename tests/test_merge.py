"""merge_attentions: attention over disjoint key sets, joined, is attention over their union."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Case, draw, generator, jit
from problems import problem
from tolerance import relative_error

import jax_natten
from jax_natten import Neighborhood, merge_attentions, reference

IMPLEMENTATIONS = ("cpu", "xla")
SHAPE = problem("merge", 2, 4, 2, 6, [5, 7], [3, 4], [2, 1], [1, 1])


def _with_gradients(function, implementation):
    def run(operands, cotangents):
        results, pullback = jax.vjp(function, operands)
        return results, pullback(cotangents)[0]

    return jit(run, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_window_and_additional_keys_merged_are_attention_over_both(implementation):
    """NATTEN computes additional keys so; here the one call must equal the merge of two, gradients included."""
    case = Case(SHAPE, "float64", value_dim=3, additional=5)
    operands, cotangents = draw(case)

    def call(x, **more):
        return jax_natten.na2d(
            x["query"], x["key"], x["value"], **SHAPE.window, return_lse=True, implementation=implementation, **more
        )

    def together(x):
        return call(x, additional_keys=x["additional_keys"], additional_values=x["additional_values"])

    def merged(x):
        window, window_lse = call(x)
        scale, group = 6**-0.5, 2
        keys, values = (jnp.repeat(x[n], group, axis=2) for n in ("additional_keys", "additional_values"))
        scores = scale * jnp.einsum("bxyhd,bshd->bxyhs", x["query"], keys)
        dense = jnp.einsum("bxyhs,bshd->bxyhd", jax.nn.softmax(scores), values)
        return merge_attentions([window, dense], [window_lse, jax.nn.logsumexp(scores, -1)])

    one = _with_gradients(together, implementation)(operands, cotangents)
    two = _with_gradients(merged, implementation)(operands, cotangents)
    for path, a in jax.tree.leaves_with_path(one):
        b = dict(jax.tree.leaves_with_path(two))[path]
        assert relative_error(a, b) < 1e-12, path


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("parts", [1, 3])
def test_disjoint_blocks_of_keys_merge_to_dense_attention(parts, implementation):
    rng = generator("blocks", parts)
    operands = {n: rng.standard_normal((2, 12, 2, 5)) for n in ("query", "key", "value")}
    cotangents = rng.standard_normal((2, 12, 2, 5)), rng.standard_normal((2, 12, 2))
    size = 12 // parts

    def merged(x):
        results = []
        for part in range(parts):
            keys, values = (x[n][:, part * size : (part + 1) * size] for n in ("key", "value"))
            scores = jnp.einsum("bxhd,bshd->bxhs", x["query"], keys) * 5**-0.5
            results.append(
                (jnp.einsum("bxhs,bshd->bxhd", jax.nn.softmax(scores), values), jax.nn.logsumexp(scores, -1))
            )
        return merge_attentions(*zip(*results))

    def dense(x):
        arrays = (x[n] for n in ("query", "key", "value"))
        return jax_natten.na1d(*arrays, 12, return_lse=True, implementation=implementation)

    one = _with_gradients(merged, "xla")(operands, cotangents)
    two = _with_gradients(dense, implementation)(operands, cotangents)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert relative_error(a, b) < 1e-12


def test_merging_is_the_oracle_of_the_union():
    """A block of keys and the rest of them."""
    rng = generator("oracle")
    query, key, value = (rng.standard_normal((1, 20, 2, 4)) for _ in range(3))
    outputs, lses, masks = [], [], []
    for neighborhood in (Neighborhood.make(4, 4), Neighborhood.make(20)):
        masks.append(reference.mask(neighborhood, (20,)))
        out, lse = jax.jit(reference.attention, static_argnums=(3, 4))(query, key, value, neighborhood, 0.5)
        outputs.append(out)
        lses.append(lse)
    # Remove the block from the whole: merge(block, rest) must be the whole.
    rest = masks[1] & ~masks[0]
    scores = np.where(rest, 0.5 * np.einsum("bxhd,byhd->bhxy", query, key), -np.inf)
    rest_lse = np.moveaxis(jax.nn.logsumexp(scores, -1), 1, 2)
    rest_out = np.einsum("bhxy,byhd->bxhd", jax.nn.softmax(scores, -1), value)
    out, lse = merge_attentions([outputs[0], rest_out], [lses[0], rest_lse])
    assert relative_error(out, outputs[1]) < 1e-12 and relative_error(lse, lses[1]) < 1e-12


def test_order_does_not_matter_and_one_part_is_itself():
    rng = generator("order")
    outputs = [rng.standard_normal((2, 3, 4)) for _ in range(3)]
    lses = [rng.standard_normal((2, 3)) for _ in range(3)]
    out, lse = merge_attentions(outputs, lses)
    out_2, lse_2 = merge_attentions(outputs[::-1], lses[::-1])
    assert relative_error(out, out_2) < 1e-14 and relative_error(lse, lse_2) < 1e-14
    nested = merge_attentions([merge_attentions(outputs[:2], lses[:2])[0], outputs[2]],
                              [merge_attentions(outputs[:2], lses[:2])[1], lses[2]])  # fmt: skip
    assert relative_error(nested[0], out) < 1e-14
    itself, same = merge_attentions(outputs[:1], lses[:1])
    np.testing.assert_array_equal(itself, outputs[0])
    np.testing.assert_array_equal(same, lses[0])


def test_a_part_that_saw_no_key_adds_nothing():
    rng = generator("nothing")
    out, lse = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3))
    nothing = np.zeros_like(out), np.full_like(lse, -np.inf)
    merged, total = merge_attentions([out, nothing[0]], [lse, nothing[1]])
    np.testing.assert_allclose(merged, out, rtol=1e-14)
    np.testing.assert_allclose(total, lse, rtol=1e-14)
    empty, total = merge_attentions([nothing[0]] * 2, [nothing[1]] * 2)
    np.testing.assert_array_equal(empty, 0)
    assert np.isneginf(total).all()

    def loss(lse):
        merged, total = merge_attentions([out, nothing[0]], [lse, nothing[1]])
        return merged.sum() + total.sum()

    gradient = jax.grad(loss)(lse)
    assert np.isfinite(gradient).all()


def test_large_scores_merge_without_overflow():
    lses = np.float32([[800.0], [801.0]])
    out, lse = merge_attentions([np.float32([[1.0]]), np.float32([[2.0]])], [lses[0], lses[1]])
    weight = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(out, [[1 + weight]], rtol=1e-4)
    np.testing.assert_allclose(lse, [801 + np.log1p(np.exp(-1.0))], rtol=1e-6)


def test_the_result_has_the_dtype_of_the_first_output_and_an_exact_lse():
    out, lse = merge_attentions([jnp.ones((3, 2), jnp.bfloat16)] * 2, [jnp.zeros(3, jnp.float32)] * 2)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, rtol=1e-2)
    np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)
