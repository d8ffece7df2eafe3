"""What the Flax and Haiku layers share: the attention between their projections.

Knows no framework; calls the public functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jax_natten
from jax_natten.neighborhood import Neighborhood

# Standard deviation of the truncated normal that starts a relative position bias, as in NAT and DiNAT.
RPB_STDDEV = 0.02


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    neighborhood: Neighborhood,
    *,
    scale: float | None = None,
    rpb: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    broadcast_dropout: bool = True,
    record: Callable[[jax.Array], object] | None = None,
    implementation: str | Sequence[str] | None = None,
    precision: str | jax.lax.Precision | None = None,
    attention: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Neighborhood attention, with dropout on the attention weights if asked for.

    Fused unless somebody needs the attention weights themselves: dropout and ``record`` do. Those two take the unfused
    operations, which hold ``prod(kernel_size)`` weights per query and head in memory.

    Args:
      query: ``[*batch, *grid, num_heads, head_dim]``; key and value: ``[*batch, *grid, num_kv_heads, head_dim]``.
      neighborhood: the windows; its rank is the number of grid axes.
      scale: multiplies query-key products; by default ``head_dim ** -0.5``.
      rpb: relative position bias ``[num_heads, 2 * K0 - 1, ...]``, added after the scale.
      dropout_rate: probability to drop an attention weight; 0 for none.
      dropout_rng: needed if ``dropout_rate`` is above 0.
      broadcast_dropout: drop the same (query, slot) pairs in every batch element and head.
      record: called with the attention weights before dropout, ``[*batch, *grid, num_heads, prod(kernel_size)]``.
      implementation, precision: as in :func:`jax_natten.neighborhood_attention`.
      attention: called in the place of :func:`jax_natten.neighborhood_attention`.

    Returns:
      ``[*batch, *grid, num_heads, value_dim]``.

    Raises:
      NotImplementedError: the attention weights are needed, and the attention is the caller's.
    """
    kernels: dict[str, Any] = {"implementation": implementation, "precision": precision}
    windows = (neighborhood.kernel_size, neighborhood.stride, neighborhood.dilation, neighborhood.is_causal)
    if dropout_rate == 0.0 and record is None:
        attention = attention or jax_natten.neighborhood_attention
        return attention(query, key, value, *windows, scale=scale, rpb=rpb, **kernels)
    if attention is not None:
        raise NotImplementedError(
            "dropout on the attention weights and recording them take the unfused operations: not with an attention of "
            f"the caller's; got {attention}"
        )
    if dropout_rate and dropout_rng is None:
        raise ValueError("dropout on the attention weights needs a random key; got dropout_rng=None")

    rank = neighborhood.rank
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jax_natten.neighborhood_qk(query * scale, key, *windows, rpb=rpb, **kernels)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32))).astype(value.dtype)
    if record is not None:
        record(weights)
    if dropout_rate:
        shape = weights.shape
        if broadcast_dropout:
            shape = (1,) * (len(shape) - rank - 2) + shape[-rank - 2 : -2] + (1, shape[-1])
        keep = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, shape)
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0)
    return jax_natten.neighborhood_av(weights, value, *windows, **kernels)


def check_inputs(inputs: jax.Array, neighborhood: Neighborhood) -> None:
    """Raises ValueError unless an input of a layer has a grid of the right rank and a feature axis."""
    if inputs.ndim < neighborhood.rank + 1:
        raise ValueError(
            f"inputs must be [*batch, *grid, features] with {neighborhood.rank} grid axes, one per entry of "
            f"kernel_size {neighborhood.kernel_size}; got shape {inputs.shape}"
        )


def heads(num_heads: int, num_kv_heads: int | None, qkv_features: int | None = None) -> tuple[int, int]:
    """Checked number of key and value heads, and the features of one head (0 without ``qkv_features``).

    Raises:
      ValueError: ``num_heads`` is no multiple of ``num_kv_heads``, or ``qkv_features`` none of ``num_heads``.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads; got num_heads {num_heads}, {num_kv_heads=}")
    features = qkv_features or 0
    if features % num_heads:
        raise ValueError(f"qkv_features must be a multiple of num_heads; got {features} and {num_heads}")
    return kv_heads, features // num_heads


def key_value_inputs(
    inputs_q: jax.Array, inputs_k: jax.Array | None, inputs_v: jax.Array | None, fused_qkv: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Sources of keys and values: keys default to the queries' source, values to the keys' one.

    Raises:
      ValueError: values without keys, or either of them for a fused projection, which has one source.
    """
    if fused_qkv and (inputs_k is not None or inputs_v is not None):
        raise ValueError("fused_qkv projects query, key and value from one input; got another input for key or value")
    if inputs_k is None:
        if inputs_v is not None:
            raise ValueError("got an input for value but none for key; to use one input for both, give it as the key's")
        inputs_k = inputs_q
    return inputs_k, inputs_k if inputs_v is None else inputs_v


def check_mask(mask: object) -> None:
    """Raises NotImplementedError if a layer is given a mask."""
    if mask is not None:
        raise NotImplementedError(
            "neighborhood attention takes no mask: which keys a query sees follows from kernel_size, stride, dilation "
            "and is_causal alone"
        )
