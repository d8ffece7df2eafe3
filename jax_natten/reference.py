"""The oracle: neighborhood attention written out from its definition, slow and memory hungry.

Every score of every query-key pair is computed and pairs outside the window are masked, in the accumulation dtype of
the inputs. Feed float64 inputs for an oracle; differentiate it with JAX as usual. Nothing in the library calls it:
tests and benchmarks compare with it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_natten.neighborhood import Neighborhood

_EXACT = jax.lax.Precision.HIGHEST


def mask(neighborhood: Neighborhood, grid: tuple[int, ...]) -> np.ndarray:
    """Boolean ``[N, N]`` over flattened positions: query sees key."""
    dense = np.ones((1, 1), bool)
    for axis in neighborhood.axes(grid):
        dense = np.kron(dense, axis.mask())
    return dense.astype(bool)


def slot_positions(neighborhood: Neighborhood, grid: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For every query and window slot: the flattened key position and whether the slot is inside the causal limit.

    Both ``[N, prod(kernel_size)]``; slots are row-major over the window axes.
    """
    positions, valid = np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
    for axis in neighborhood.axes(grid):
        position = np.arange(axis.length)
        begin, end = axis.window_bounds()
        index = begin[:, None] + np.arange(axis.window)
        # A causal window near its start runs past the query: those slots are clamped here and masked by `valid`.
        key = np.minimum((position % axis.dilation)[:, None] + index * axis.dilation, axis.length - 1)
        inside = index < end[:, None]
        positions = (positions[:, None, :, None] * axis.length + key[None, :, None, :]).reshape(
            len(positions) * axis.length, -1
        )
        valid = (valid[:, None, :, None] & inside[None, :, None, :]).reshape(len(positions), -1)
    return positions, valid


def dense_bias(rpb: jax.Array, neighborhood: Neighborhood, grid: tuple[int, ...]) -> jax.Array:
    """Relative position bias ``[H, N, N]`` of every pair; entries outside the windows are meaningless."""
    index = []
    for axis in neighborhood.axes(grid):
        position = np.arange(axis.length) // axis.dilation
        index.append(np.clip(position[None, :] - position[:, None] + axis.window - 1, 0, 2 * axis.window - 2))
    rank, count = len(grid), math.prod(grid)
    # Broadcast each axis' [X, X] index to [X0.., X0..] (queries' axes first, then keys').
    full = []
    for a, table in enumerate(index):
        shape = [1] * (2 * rank)
        shape[a], shape[rank + a] = grid[a], grid[a]
        full.append(np.broadcast_to(table.reshape(shape), grid + grid).reshape(count, count))
    return rpb[(slice(None), *full)]


def attention(
    query, key, value, neighborhood, scale, additional_keys=None, additional_values=None, rpb=None
) -> tuple[jax.Array, jax.Array]:
    """Dense masked attention; shapes as in :func:`jax_natten.neighborhood_attention`, with one batch axis.

    Returns:
      ``(out, lse)``: ``[B, *X, Hq, Dv]`` in the dtype of ``query`` and ``[B, *X, Hq]`` in the accumulation dtype.
    """
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    batch, *grid, heads, dim = query.shape
    grid, kv_heads = tuple(grid), key.shape[-2]
    count = math.prod(grid)

    def flat(x, h):
        return x.reshape(batch, count, h, x.shape[-1])

    q = flat(query, heads).reshape(batch, count, kv_heads, heads // kv_heads, dim)
    k, v = flat(key, kv_heads), flat(value, kv_heads)
    visible = jnp.asarray(mask(neighborhood, grid))
    scores = scale * jnp.einsum("bxhgd,byhd->bhgxy", q, k, preferred_element_type=accumulate, precision=_EXACT)
    if rpb is not None:
        bias = dense_bias(rpb, neighborhood, grid).astype(accumulate)
        scores += bias.reshape(kv_heads, heads // kv_heads, count, count)
    scores = jnp.where(visible, scores, -jnp.inf)
    if additional_keys is not None:
        extra = scale * jnp.einsum(
            "bxhgd,bshd->bhgxs", q, additional_keys, preferred_element_type=accumulate, precision=_EXACT
        )
        scores = jnp.concatenate([scores, extra], -1)
        v = jnp.concatenate([v, additional_values], 1)
    lse = jax.scipy.special.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(query.dtype)
    out = jnp.einsum("bhgxy,byhe->bxhge", weights, v, preferred_element_type=accumulate, precision=_EXACT)
    out = out.reshape(batch, *grid, heads, v.shape[-1]).astype(query.dtype)
    return out, jnp.moveaxis(lse, -1, 1).reshape(batch, *grid, heads)


def qk(query, key, neighborhood, additional_keys=None, rpb=None) -> jax.Array:
    """Unscaled attention scores ``[B, *X, Hq, prod(kernel_size) + S]``; causal slots past the query hold -inf."""
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    batch, *grid, heads, _ = query.shape
    grid, group = tuple(grid), heads // key.shape[-2]
    count = math.prod(grid)
    positions, valid = slot_positions(neighborhood, grid)
    q = query.reshape(batch, count, heads, -1).astype(accumulate)
    k = jnp.repeat(key.reshape(batch, count, heads // group, -1), group, axis=2).astype(accumulate)
    scores = jnp.einsum("bxhd,bxshd->bxhs", q, k[:, positions], precision=_EXACT)
    if rpb is not None:
        bias = dense_bias(rpb, neighborhood, grid)[:, np.arange(count)[:, None], positions]
        scores += jnp.moveaxis(bias, 0, 1).astype(accumulate)
    scores = jnp.where(jnp.asarray(valid)[:, None, :], scores, -jnp.inf)
    if additional_keys is not None:
        extra = jnp.repeat(additional_keys, group, axis=2).astype(accumulate)
        scores = jnp.concatenate([scores, jnp.einsum("bxhd,bshd->bxhs", q, extra, precision=_EXACT)], -1)
    return scores.astype(query.dtype).reshape(batch, *grid, heads, -1)


def av(attn, value, neighborhood, additional_values=None) -> jax.Array:
    """Weighted sum of the window's values ``[B, *X, Hq, Dv]``; causal slots past the query are ignored."""
    accumulate = jnp.promote_types(attn.dtype, jnp.float32)
    batch, *grid, heads, slots = attn.shape
    grid, group = tuple(grid), heads // value.shape[-2]
    count = math.prod(grid)
    positions, valid = slot_positions(neighborhood, grid)
    weights = attn.reshape(batch, count, heads, slots).astype(accumulate)
    window, extra = weights[..., : positions.shape[1]], weights[..., positions.shape[1] :]
    window = jnp.where(jnp.asarray(valid)[:, None, :], window, 0)
    v = jnp.repeat(value.reshape(batch, count, heads // group, -1), group, axis=2).astype(accumulate)
    out = jnp.einsum("bxhs,bxshd->bxhd", window, v[:, positions], precision=_EXACT)
    if additional_values is not None:
        values = jnp.repeat(additional_values, group, axis=2).astype(accumulate)
        out += jnp.einsum("bxhs,bshd->bxhd", extra, values, precision=_EXACT)
    return out.astype(attn.dtype).reshape(batch, *grid, heads, -1)
