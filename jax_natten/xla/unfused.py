"""The three operations of unfused attention in pure JAX.

Operands and results as in :mod:`jax_natten.primitives.unfused`. Whatever lies outside a query's window, and whatever a
causal slot past the query holds, does not influence any result, NaN and infinity included.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_natten.neighborhood import Neighborhood
from jax_natten.xla.blocks import ADDITIONAL, BIAS, KEYS, QUERIES, Block, Blocks


def pn(
    queries: jax.Array,
    keys: jax.Array,
    additional_keys: jax.Array,
    bias: jax.Array,
    *,
    neighborhood: Neighborhood,
    precision: lax.Precision,
    fill_negative_infinity: bool,
) -> tuple[jax.Array]:
    """Weights ``[B, *X, Hq, slots]``: products with the keys of the window (plus bias), then with the additional keys.

    A causal slot past the query holds -inf or zero.
    """
    kv_heads, additional = keys.shape[-2], additional_keys.shape[1]
    if 0 in queries.shape[:-1]:
        return (jnp.zeros((*queries.shape[:-1], neighborhood.window_size + additional), queries.dtype),)
    bias_batch = bias.shape[0] if bias.size else 1
    blocks = Blocks.make(
        queries,
        kv_heads,
        neighborhood,
        precision=precision,
        channels=keys.shape[-1],
        additional=additional,
        bias_batch=bias_batch,
    )
    fill = -jnp.inf if fill_negative_infinity else 0

    def evaluate(block: Block, folded):
        q, k, extra = (block.take(layout, x) for layout, x in zip((QUERIES, KEYS, ADDITIONAL), folded))
        local = block.einsum("bnhgqd,bnhkd->bnhgqk", q, k)
        if bias.size:
            local += block.take(BIAS, folded[3])
        slots = jnp.take_along_axis(local, block.key_of_slot[None], -1)
        slots = jnp.where(block.slot_mask, slots, fill)
        weights = jnp.concatenate([slots, block.einsum("bnhgqd,bhsd->bnhgqs", q, extra)], -1)
        return (weights.astype(queries.dtype),), ()

    folded = (
        blocks.fold_queries(queries),
        blocks.fold_keys(keys),
        blocks.fold_additional(additional_keys),
        blocks.fold_bias(bias),
    )
    _, (weights,) = blocks.run(evaluate, folded)
    return (blocks.unfold_queries(weights),)


def nn(
    weights: jax.Array,
    keys: jax.Array,
    additional_keys: jax.Array,
    *,
    neighborhood: Neighborhood,
    precision: lax.Precision,
) -> tuple[jax.Array]:
    """Queries ``[B, *X, Hq, D]``: sums of the keys of the window and the additional keys, weighted."""
    kv_heads, dim = keys.shape[-2:]
    if 0 in weights.shape[:-1]:
        return (jnp.zeros((*weights.shape[:-1], dim), weights.dtype),)
    blocks = Blocks.make(
        weights, kv_heads, neighborhood, precision=precision, channels=dim, additional=additional_keys.shape[1]
    )

    def evaluate(block: Block, folded):
        local, extra = _split(block, neighborhood, folded[0])
        queries = block.contract("bnhgqk,bnhkd->bnhgqd", local, block.take(KEYS, folded[1]))
        queries += block.einsum("bnhgqs,bhsd->bnhgqd", extra, block.take(ADDITIONAL, folded[2]))
        return (queries.astype(weights.dtype),), ()

    folded = (blocks.fold_queries(weights), blocks.fold_keys(keys), blocks.fold_additional(additional_keys))
    _, (queries,) = blocks.run(evaluate, folded)
    return (blocks.unfold_queries(queries),)


def inverse(
    weights: jax.Array,
    queries: jax.Array,
    *,
    neighborhood: Neighborhood,
    precision: lax.Precision,
    kv_heads: int,
    additional: int,
) -> tuple[jax.Array, jax.Array]:
    """``(keys, additional_keys)``: sums over the queries that see a key, weighted, and over the heads of its group."""
    batch, *grid, _, dim = queries.shape
    key_shape, extra_shape = (batch, *grid, kv_heads, dim), (batch, additional, kv_heads, dim)
    if 0 in weights.shape[:-1]:
        return jnp.zeros(key_shape, queries.dtype), jnp.zeros(extra_shape, queries.dtype)
    blocks = Blocks.make(weights, kv_heads, neighborhood, precision=precision, channels=dim, additional=additional)

    def evaluate(block: Block, folded):
        local, extra = _split(block, neighborhood, folded[0])
        q = block.take(QUERIES, folded[1])
        return (), (
            block.contract("bnhgqk,bnhgqd->bnhkd", local, q),
            block.sum_over_queries(extra, q),
        )

    # Like the queries, so that they vary over the same mesh axes inside shard_map.
    keys, extra = (jnp.zeros_like(queries, shape=shape) for shape in (key_shape, extra_shape))
    sums = ((KEYS, blocks.fold_keys(keys)), (ADDITIONAL, blocks.fold_additional(extra)))
    folded = (blocks.fold_queries(weights), blocks.fold_queries(queries))
    (keys, extra), _ = blocks.run(evaluate, folded, sums)
    return (
        blocks.unfold_keys(keys).astype(queries.dtype),
        blocks.unfold_additional(extra).astype(queries.dtype),
    )


def _split(block: Block, neighborhood: Neighborhood, folded: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights of the block's slab, zero where a query does not see the key, and weights of the additional keys."""
    slots = block.take(QUERIES, folded)
    local = jnp.take_along_axis(slots, block.slot_of_key[None], -1)
    return jnp.where(block.mask, local, 0), slots[..., neighborhood.window_size :]
