"""Unfused neighborhood attention: scores and weighted sums as separate operations, the weights in between are yours.

Slots of a query are its window's keys, row-major over the window axes: slot ``(k0, k1, ..)`` of the query at x is the
key at ``x % dilation + (start + k) * dilation`` per axis. The slots of additional keys come last.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jax_natten import checks, dispatch
from jax_natten.attention import Bools, Ints
from jax_natten.checks import with_rank
from jax_natten.neighborhood import Neighborhood
from jax_natten.primitives import unfused


def neighborhood_qk(
    query: jax.Array,
    key: jax.Array,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    additional_keys: jax.Array | None = None,
    rpb: jax.Array | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
    precision: str | jax.lax.Precision | None = None,
) -> jax.Array:
    """Scores of every query with the keys of its window, before the softmax and unscaled (scale the query).

    Differentiable to any order and in both modes.

    Args:
      query: ``[*batch, *X, Hq, D]``.
      key: ``[*batch, *X, Hkv, D]``; Hkv divides Hq.
      kernel_size, stride, dilation, is_causal: see :func:`neighborhood_attention`.
      additional_keys: ``[*batch, S, Hkv, D]``, seen by every query.
      rpb: relative position bias ``[Hq, *(2 * kernel_size - 1)]``, added to the scores. Not with causal axes.
      implementation, precision: see :func:`neighborhood_attention`. Here derivatives of every order run on what is
        named.

    Returns:
      ``[*batch, *X, Hq, prod(kernel_size) + S]`` in the dtype of ``query``. Causal slots past the query hold -inf.

    Raises:
      TypeError, ValueError, NotImplementedError: see :func:`neighborhood_attention`.
    """
    window = Neighborhood.make(kernel_size, stride, dilation, is_causal)
    query, key = checks.arrays(query=query, key=key).values()
    batch, _ = checks.split("query", query, window)
    checks.same_grid("key", key, "query", query)
    heads, (kv_heads, dim) = query.shape[-2], key.shape[-2:]
    checks.channels("key", key, "query", query.shape[-1])
    checks.groups("query", heads, "key", kv_heads)
    additional_keys = checks.additional("additional_keys", additional_keys, "query", query, batch, kv_heads, dim)
    bias = checks.bias(rpb, batch, heads, window, query.dtype)
    precision = checks.precision(precision)
    requested = dispatch.parse(implementation)
    extra = 0 if additional_keys is None else additional_keys.shape[-3]
    dispatch.check(unfused.problem("pn", query.dtype, heads, kv_heads, dim, extra, rpb is not None, window), requested)
    return unfused.pn(
        query,
        key,
        additional_keys,
        bias,
        neighborhood=window,
        fill_negative_infinity=True,
        precision=precision,
        implementation=requested,
    )


def neighborhood_av(
    attn: jax.Array,
    value: jax.Array,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    additional_values: jax.Array | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
    precision: str | jax.lax.Precision | None = None,
) -> jax.Array:
    """Sum of the values of every query's window, weighted by ``attn``.

    Differentiable to any order and in both modes.

    Args:
      attn: ``[*batch, *X, Hq, prod(kernel_size) + S]``. Causal slots past the query do not count, whatever they hold.
      value: ``[*batch, *X, Hkv, Dv]``; Hkv divides Hq.
      kernel_size, stride, dilation, is_causal: see :func:`neighborhood_attention`.
      additional_values: ``[*batch, S, Hkv, Dv]``.
      implementation, precision: see :func:`neighborhood_attention`. Here derivatives of every order run on what is
        named.

    Returns:
      ``[*batch, *X, Hq, Dv]`` in the dtype of ``attn``.

    Raises:
      TypeError, ValueError, NotImplementedError: see :func:`neighborhood_attention`.
    """
    window = Neighborhood.make(kernel_size, stride, dilation, is_causal)
    attn, value = checks.arrays(attn=attn, value=value).values()
    batch, _ = checks.split("attn", attn, window)
    checks.same_grid("value", value, "attn", attn)
    heads, (kv_heads, dim) = attn.shape[-2], value.shape[-2:]
    checks.groups("attn", heads, "value", kv_heads)
    if dim == 0:
        raise ValueError(f"value must have at least one channel; got shape {value.shape}")
    additional_values = checks.additional("additional_values", additional_values, "attn", attn, batch, kv_heads, dim)
    extra = 0 if additional_values is None else additional_values.shape[-3]
    if attn.shape[-1] != window.window_size + extra:
        raise ValueError(
            f"the last axis of attn must be prod(kernel_size) + additional values = {window.window_size} + {extra}; "
            f"got shape {attn.shape}"
        )
    precision = checks.precision(precision)
    requested = dispatch.parse(implementation)
    dispatch.check(unfused.problem("nn", attn.dtype, heads, kv_heads, dim, extra, False, window), requested)
    operands = (attn, value, additional_values)
    return unfused.nn(*operands, neighborhood=window, precision=precision, implementation=requested)


na1d_qk = with_rank(1, neighborhood_qk, "na1d_qk")
na2d_qk = with_rank(2, neighborhood_qk, "na2d_qk")
na3d_qk = with_rank(3, neighborhood_qk, "na3d_qk")
na1d_av = with_rank(1, neighborhood_av, "na1d_av")
na2d_av = with_rank(2, neighborhood_av, "na2d_av")
na3d_av = with_rank(3, neighborhood_av, "na3d_av")
