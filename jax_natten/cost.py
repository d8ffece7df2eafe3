"""What a call costs, since XLA reports neither operations nor bytes of a custom call."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_natten.attention import Bools, Ints, neighborhood_attention
from jax_natten.neighborhood import Neighborhood
from jax_natten.primitives import cost


def flops(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    additional_keys: Any = None,
    additional_values: Any = None,
    *,
    operation: str = "forward",
) -> int:
    """Useful floating-point operations of a call: those of its matrix products, a multiply-add counting two.

    Exactly the query-key pairs that attend are counted, with windows that shift or shrink at borders, strides and
    causal axes; neither the softmax nor the bias is. Tiled kernels compute more pairs, and mask them.

    Args:
      query, key, value, kernel_size, stride, dilation, is_causal, additional_keys, additional_values: as for
        :func:`neighborhood_attention`. Arrays may be anything with a shape and a dtype, ``jax.ShapeDtypeStruct`` for
        instance.
      operation: "forward" or "backward" of fused attention, ``2 (D + Dv)`` and ``2 (3 D + 2 Dv)`` per pair (the
        backward computes the scores again); "qk" or "av" of unfused attention, ``2 D`` and ``2 Dv``, whose gradients
        cost the same once for each of their two operands.

    Raises:
      TypeError, ValueError: as :func:`neighborhood_attention`; or ``operation`` is unknown.
    """
    arrays = (query, key, value, additional_keys, additional_values)
    window = (kernel_size, stride, dilation, is_causal)
    neighborhood, (query, _, value, more, _, _), _ = _traced(arrays, None, window, operation)
    return cost.flops(
        operation,
        neighborhood,
        query.shape[:-1],
        additional=0 if more is None else more.shape[-3],
        dim=query.shape[-1],
        value_dim=value.shape[-1],
    )


def bytes_accessed(
    query: Any,
    key: Any,
    value: Any,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    additional_keys: Any = None,
    additional_values: Any = None,
    *,
    rpb: Any = None,
    operation: str = "forward",
) -> int:
    """Bytes of a call's operands and results, each counted once: the least that a kernel moves.

    Args:
      query, key, value, kernel_size, stride, dilation, is_causal, additional_keys, additional_values, operation: as for
        :func:`flops`.
      rpb: as for :func:`neighborhood_attention`; only its shape and dtype count.

    Raises:
      TypeError, ValueError: as for :func:`flops`.
    """
    arrays = (query, key, value, additional_keys, additional_values)
    window = (kernel_size, stride, dilation, is_causal)
    neighborhood, operands, (out, lse) = _traced(arrays, rpb, window, operation)
    query, key, value, more_keys, more_values, bias = operands
    slots = neighborhood.window_size + (0 if more_keys is None else more_keys.shape[-3])
    weights = jax.ShapeDtypeStruct((*query.shape[:-1], slots), query.dtype)
    moved = {
        "forward": (*operands, out, lse),
        "backward": (*operands, out, lse, out, lse, *operands),
        "qk": (query, key, more_keys, bias, weights),
        "av": (weights, value, more_values, out),
    }
    return cost.array_bytes(moved[operation])


def _traced(arrays, rpb, window, operation):
    """The neighborhood, the six operands (None for absent ones) and the two results as ``jax.ShapeDtypeStruct``."""
    if operation not in cost.OPERATIONS:
        raise ValueError(f"operation must be among {', '.join(cost.OPERATIONS)}; got {operation!r}")
    operands: list[Any] = [None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, rpb)]
    query, key, value, more_keys, more_values, bias = operands
    call = functools.partial(neighborhood_attention, return_lse=True)
    options = {"additional_keys": more_keys, "additional_values": more_values, "rpb": bias}
    results = jax.eval_shape(lambda q, k, v, options: call(q, k, v, *window, **options), query, key, value, options)
    if bias is not None:  # which kernels take in the accumulation dtype
        operands[5] = jax.ShapeDtypeStruct(bias.shape, jnp.promote_types(query.dtype, jnp.float32))
    return Neighborhood.make(*window), operands, results
