"""Neighborhood attention behind the interface of Flax's ``dot_product_attention``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_natten import layers
from jax_natten.neighborhood import Neighborhood


def attention_fn(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    grid: Sequence[int] | None = None,
    scale: float | None = None,
    implementation: str | Sequence[str] | None = None,
    attention: Callable[..., jax.Array] | None = None,
) -> Callable[..., jax.Array]:
    """Makes an ``attention_fn`` for Flax's own attention layers.

    For ``nn.MultiHeadDotProductAttention`` and ``nnx.MultiHeadAttention``::

        images = jnp.ones((8, 32, 32, 64))
        nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn((7, 7)))   # takes [batch, 32, 32, 64]

        tokens = images.reshape(8, 32 * 32, 64)
        nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn((7, 7), grid=(32, 32)))

    The returned function takes ``query, key, value`` of shape ``[batch..., *grid, heads, dim]``, or, if ``grid`` is
    given, ``[batch..., prod(grid), heads, dim]`` with the grid flattened in row-major order. It honours dropout on the
    attention weights and recording them (``sow_weights=True``), through the unfused operations; recorded weights are
    ``[batch..., *grid, heads, prod(kernel_size)]``, one per key of the window. The softmax is always taken in float32
    (float64 for float64) and products are accumulated in it too, so ``force_fp32_for_softmax`` changes nothing.

    Args:
      kernel_size: window size per axis; its length is the number of grid axes (an int: one).
      stride, dilation, is_causal: as in :func:`jax_natten.neighborhood_attention`.
      grid: shape of the grid that the layer's ``length`` axis flattens; None if the layer is given the grid's own axes.
      scale: multiplies query-key products; by default ``head_dim ** -0.5`` as in Flax.
      implementation: as in :func:`jax_natten.neighborhood_attention`.
      attention: takes the place of :func:`jax_natten.neighborhood_attention`, with its arguments: for example
        :func:`jax_natten.distributed.sharded_attention` (context parallelism). Not with dropout or ``sow_weights``.

    Returns:
      A function with the signature of ``flax.linen.dot_product_attention``. It raises NotImplementedError if it is
      given a mask, a bias or an einsum of the caller's, which neighborhood attention cannot honour.

    Raises:
      TypeError, ValueError: window arguments that are no neighborhood, or that do not fit into ``grid``.
    """
    neighborhood = Neighborhood.make(kernel_size, stride, dilation, is_causal)
    shape = None if grid is None else tuple(grid)
    if shape is not None:
        neighborhood.check_grid(shape)
    names = implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)

    def neighborhood_attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., jax.Array] | None = None,
        qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
        attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
        is_causal: bool = False,
    ) -> jax.Array:
        del force_fp32_for_softmax
        refused = {
            "mask": mask,
            "bias": bias,
            "einsum_dot_general": einsum_dot_general,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
        }
        for name, argument in refused.items():
            if argument is not None:
                raise NotImplementedError(
                    f"neighborhood attention cannot honour {name}: which keys a query sees follows from kernel_size, "
                    f"stride, dilation and is_causal alone; got {name} of type {type(argument).__name__}"
                )
        # Flax's flag means "no later position of the flattened sequence", which is our flag in 1-D only.
        if is_causal and neighborhood.is_causal != (True,):
            raise NotImplementedError(
                "neighborhood attention is causal per grid axis: pass is_causal to jax_natten.flax.attention_fn, not "
                "to the layer"
            )

        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
        output_shape = query.shape[:-1] + value.shape[-1:]
        if shape is not None:
            query, key, value = (_unflatten(n, x, shape) for n, x in (("query", query), ("key", key), ("value", value)))
        out = layers.attention(
            query,
            key,
            value,
            neighborhood,
            scale=scale,
            dropout_rate=0.0 if deterministic else dropout_rate,
            dropout_rng=dropout_rng,
            broadcast_dropout=broadcast_dropout,
            record=None if module is None else lambda weights: _sow(module, weights),
            implementation=names,
            precision=precision,
            attention=attention,
        )
        return out.reshape(output_shape)

    return neighborhood_attention_fn


def _unflatten(name: str, x: jax.Array, grid: tuple[int, ...]) -> jax.Array:
    if x.shape[-3] != math.prod(grid):
        raise ValueError(f"{name} must have length {math.prod(grid)} = prod(grid {grid}); got shape {x.shape}")
    return x.reshape(x.shape[:-3] + grid + x.shape[-2:])


def _sow(module: Any, weights: jax.Array) -> None:
    collection = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(collection, "attention_weights", weights)
