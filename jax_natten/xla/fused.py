"""Fused attention in pure JAX: forward, backward and tangent.

Operands as in :mod:`jax_natten.primitives.fused`. Each function is differentiable in both modes to any order in bounded
memory. Whatever lies outside a query's window does not influence it, NaN and infinity included; in derivatives of these
functions only finite operands are treated exactly.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_natten.neighborhood import Neighborhood
from jax_natten.xla.blocks import (
    ADDITIONAL,
    BIAS,
    KEYS,
    QUERIES,
    Block,
    Blocks,
    accumulation_dtype,
)

_LAYOUTS = (QUERIES, KEYS, KEYS, ADDITIONAL, ADDITIONAL, BIAS)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    additional_keys: jax.Array,
    additional_values: jax.Array,
    bias: jax.Array,
    *,
    neighborhood: Neighborhood,
    scale: float,
    precision: lax.Precision,
) -> tuple[jax.Array, jax.Array]:
    """``(out, lse)``: ``[B, *X, Hq, Dv]`` in the dtype of ``query``, ``[B, *X, Hq]`` in the accumulation dtype."""
    operands = (query, key, value, additional_keys, additional_values, bias)
    blocks = _blocks(*operands, neighborhood, precision)
    if blocks is None:
        return _empty_forward(query, value)

    def evaluate(block: Block, folded):
        q, k, v, extra_k, extra_v, table = _take(block, folded)
        local, extra = _scores(block, q, k, extra_k, table, scale)
        highest = lax.stop_gradient(jnp.maximum(_max(local), _max(extra)))
        highest = jnp.where(highest == -jnp.inf, 0, highest)
        local, extra = jnp.exp(local - highest), jnp.exp(extra - highest)
        # Rows of padding see no key; any finite number does for them.
        total = jnp.where(block.inside, local.sum(-1, keepdims=True) + extra.sum(-1, keepdims=True), 1)
        out = block.contract("bnhgqk,bnhkd->bnhgqd", local, v) + block.einsum("bnhgqs,bhsd->bnhgqd", extra, extra_v)
        return ((out / total).astype(query.dtype), highest + jnp.log(total)), ()

    _, (out, lse) = blocks.run(evaluate, _fold(blocks, operands))
    return blocks.unfold_queries(out), blocks.unfold_queries(lse)[..., 0]


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    additional_keys: jax.Array,
    additional_values: jax.Array,
    bias: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    *,
    neighborhood: Neighborhood,
    scale: float,
    precision: lax.Precision,
) -> tuple[jax.Array, ...]:
    """Cotangents of the first six operands, from those of ``out`` and ``lse``."""
    operands = (query, key, value, additional_keys, additional_values, bias)
    blocks = _blocks(*operands, neighborhood, precision)
    if blocks is None:
        return tuple(map(jnp.zeros_like, operands))

    def evaluate(block: Block, folded):
        q, k, v, extra_k, extra_v, table = _take(block, folded[:6])
        o, row_lse, d_o, d_row_lse = (block.take(QUERIES, x) for x in folded[6:])
        scores, extra_scores = _scores(block, q, k, extra_k, table, scale)
        local, extra = _weights(block, scores, extra_scores, row_lse)
        delta = (o * d_o).sum(-1, keepdims=True) - d_row_lse
        d_local = block.einsum("bnhgqd,bnhkd->bnhgqk", d_o, v) - delta
        d_local = jnp.where(block.mask, local * d_local, 0)
        d_extra = block.einsum("bnhgqd,bhsd->bnhgqs", d_o, extra_v) - delta
        d_extra = jnp.where(block.inside, extra * d_extra, 0)

        d_q = block.contract("bnhgqk,bnhkd->bnhgqd", d_local, k)
        d_q += block.einsum("bnhgqs,bhsd->bnhgqd", d_extra, extra_k)
        terms = (
            scale * block.contract("bnhgqk,bnhgqd->bnhkd", d_local, q),
            block.contract("bnhgqk,bnhgqd->bnhkd", local, d_o),
            scale * block.sum_over_queries(d_extra, q),
            block.sum_over_queries(extra, d_o),
            d_local.sum((0, 1)),
        )
        return ((scale * d_q).astype(query.dtype),), terms[: len(sums)]

    folded = _fold(blocks, operands)
    rows = tuple(blocks.fold_queries(x) for x in (out, lse[..., None], d_out, d_lse[..., None]))
    layouts = _LAYOUTS[1:] if bias.size else _LAYOUTS[1:-1]
    sums = tuple((layout, jnp.zeros_like(x)) for layout, x in zip(layouts, folded[1:]))
    totals, (d_query,) = blocks.run(evaluate, folded + rows, sums)
    grads = (
        blocks.unfold_queries(d_query),
        *map(blocks.unfold_keys, totals[:2]),
        *map(blocks.unfold_additional, totals[2:4]),
        blocks.unfold_bias(totals[4]) if bias.size else jnp.zeros_like(bias),
    )
    return tuple(grad.astype(x.dtype) for grad, x in zip(grads, operands))


def tangent(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    additional_keys: jax.Array,
    additional_values: jax.Array,
    bias: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    t_query: jax.Array,
    t_key: jax.Array,
    t_value: jax.Array,
    t_additional_keys: jax.Array,
    t_additional_values: jax.Array,
    t_bias: jax.Array,
    *,
    neighborhood: Neighborhood,
    scale: float,
    precision: lax.Precision,
) -> tuple[jax.Array, jax.Array]:
    """Tangents of ``out`` and ``lse``, linear in those of the first six operands."""
    operands = (query, key, value, additional_keys, additional_values, bias)
    tangents = (t_query, t_key, t_value, t_additional_keys, t_additional_values, t_bias)
    blocks = _blocks(*operands, neighborhood, precision)
    if blocks is None:
        return _empty_forward(query, value)

    def evaluate(block: Block, folded):
        q, k, v, extra_k, extra_v, table = _take(block, folded[:6])
        t_q, t_k, t_v, t_extra_k, t_extra_v, t_table = _take(block, folded[6:12])
        scores, extra_scores = _scores(block, q, k, extra_k, table, scale)
        local, extra = _weights(block, scores, extra_scores, block.take(QUERIES, folded[12]))
        t_local, t_extra = (
            scale * (a + b) for a, b in zip(_products(block, t_q, k, extra_k), _products(block, q, t_k, t_extra_k))
        )
        t_local = jnp.where(block.mask, local * _plus(t_local, t_table), 0)
        t_extra = jnp.where(block.inside, extra * t_extra, 0)
        t_lse = t_local.sum(-1, keepdims=True) + t_extra.sum(-1, keepdims=True)

        def mean(local, extra, v, extra_v):
            mean = block.contract("bnhgqk,bnhkd->bnhgqd", local, v)
            return mean + block.einsum("bnhgqs,bhsd->bnhgqd", extra, extra_v)

        t_local = jnp.where(block.mask, t_local - local * t_lse, 0)
        t_out = mean(t_local, t_extra - extra * t_lse, v, extra_v) + mean(local, extra, t_v, t_extra_v)
        return (t_out.astype(query.dtype), t_lse), ()

    folded = (*_fold(blocks, operands), *_fold(blocks, tangents), blocks.fold_queries(lse[..., None]))
    _, (t_out, t_lse) = blocks.run(evaluate, folded)
    return blocks.unfold_queries(t_out), blocks.unfold_queries(t_lse)[..., 0]


def _blocks(query, key, value, additional_keys, additional_values, bias, neighborhood, precision) -> Blocks | None:
    """The blocks of a problem; None if it has no queries."""
    if 0 in query.shape[:-1]:
        return None
    return Blocks.make(
        query,
        key.shape[-2],
        neighborhood,
        precision=precision,
        channels=key.shape[-1] + value.shape[-1],
        additional=additional_keys.shape[1],
        bias_batch=bias.shape[0] if bias.size else 1,
    )


def _empty_forward(query, value):
    return (
        jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype),
        jnp.zeros(query.shape[:-1], accumulation_dtype(query.dtype)),
    )


def _fold(blocks: Blocks, operands) -> tuple[jax.Array, ...]:
    query, key, value, additional_keys, additional_values, bias = operands
    return (
        blocks.fold_queries(query),
        blocks.fold_keys(key),
        blocks.fold_keys(value),
        blocks.fold_additional(additional_keys),
        blocks.fold_additional(additional_values),
        blocks.fold_bias(bias),
    )


def _take(block: Block, folded) -> list[jax.Array | None]:
    """The block's part of the folded operands; None for an absent bias."""
    return [block.take(layout, x) if layout != BIAS or x.size else None for layout, x in zip(_LAYOUTS, folded)]


def _products(block: Block, q, k, extra_k):
    """Dot products of the queries with the slab and with the additional keys."""
    return block.einsum("bnhgqd,bnhkd->bnhgqk", q, k), block.einsum("bnhgqd,bhsd->bnhgqs", q, extra_k)


def _plus(scores, table):
    return scores if table is None else scores + table


def _scores(block: Block, q, k, extra_k, table, scale):
    """Scores of the slab and of the additional keys, -inf for pairs that do not attend."""
    local, extra = _products(block, q, k, extra_k)
    local = jnp.where(block.mask, _plus(scale * local, table), -jnp.inf)
    return local, jnp.where(block.inside, scale * extra, -jnp.inf)


def _weights(block: Block, local, extra, lse):
    """Attention weights, from the scores and the LSE of their rows."""
    return (
        jnp.where(block.mask, jnp.exp(local - lse), 0),
        jnp.where(block.inside, jnp.exp(extra - lse), 0),
    )


def _max(scores):
    return scores.max(-1, keepdims=True, initial=-jnp.inf)
