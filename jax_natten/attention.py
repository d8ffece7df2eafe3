"""Fused neighborhood attention: the public interface."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_natten import checks, dispatch
from jax_natten.checks import with_rank
from jax_natten.neighborhood import Neighborhood
from jax_natten.primitives import fused
from jax_natten.tiles import Tiles

Ints = int | Sequence[int]
Bools = bool | Sequence[bool]


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    additional_keys: jax.Array | None = None,
    additional_values: jax.Array | None = None,
    *,
    rpb: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    precision: str | jax.lax.Precision | None = None,
    tiles: Tiles | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Attention of every token of a 1-D, 2-D or 3-D grid to its nearest neighbors.

    ``out = softmax(scale * query . key + rpb) value`` over the keys in the window of the query and the additional keys.
    A window holds exactly ``kernel_size`` keys on every axis: at a border it shifts, it does not shrink (a causal one
    does). The semantics are those of NATTEN (Hassani et al., arXiv 2403.04690; stride: arXiv 2504.16922). Accumulation
    and softmax are in float32, in float64 for float64 inputs.

    Differentiable in both modes with respect to every array, and through the returned LSE.

    Args:
      query: ``[*batch, *X, Hq, D]`` of float16, bfloat16, float32 or float64, with any number of batch axes and as many
        grid axes X as ``kernel_size`` has entries.
      key: ``[*batch, *X, Hkv, D]``; Hkv divides Hq (grouped-query attention: key head ``h // (Hq // Hkv)`` serves query
        head h, never repeated in memory).
      value: ``[*batch, *X, Hkv, Dv]``.
      kernel_size: window size per axis, in keys; an int means rank 1.
      stride: queries per block that shares one window, at most ``kernel_size``: 1 is a sliding window,
        ``kernel_size`` is blocked attention.
      dilation: distance between neighboring keys; ``kernel_size * dilation`` is at most the axis length.
      is_causal: per axis, whether keys after the query are hidden.
      scale: factor of the scores, a number known at trace time; by default ``D ** -0.5``.
      additional_keys: ``[*batch, S, Hkv, D]``, seen by every query inside the same softmax.
      additional_values: ``[*batch, S, Hkv, Dv]``.
      rpb: relative position bias ``[Hq, *(2 * kernel_size - 1)]`` of any floating dtype, added to the scaled scores at
        index ``key - query + kernel_size - 1`` (in-group indices). Not with causal axes.
      return_lse: whether to return the log-sum-exp of the scores as well, see :func:`merge_attentions`.
      implementation: None picks the best that applies on each platform; or a name ("sm90", "sm80", "naive", "cpu",
        "xla"), or a sequence of names tried in order. Tangents (``jax.jvp``) and derivatives of derivatives run on
        "xla" whatever is named, in bounded memory: there are no kernels for them.
      precision: how far float32 products may be rounded, as in ``jax.lax.dot``: "highest" not at all, "high" to
        TensorFloat32, "default" as far as the device is fastest. A kernel may always be more exact: "cpu" and "naive"
        are exact whatever is asked. "xla" hands it to XLA, for 16-bit inputs as well, which it multiplies as float32.
        None follows ``jax.default_matmul_precision`` at trace time; where that is not set either, it is "highest", on
        GPUs and TPUs too, unlike in ``jax.numpy``.
      tiles: how "sm90" or "sm80", whichever they are for, cuts the forward into pieces, instead of its own choice (see
        ``python -m jax_natten simulate``) or of what was measured (:mod:`jax_natten.tuning`, if enabled). The result is
        the same up to rounding. Other implementations, and derivatives, do as they like.

    Returns:
      ``out`` ``[*batch, *X, Hq, Dv]`` in the dtype of ``query``; with ``return_lse`` also the natural logarithm of the
      softmax denominator, ``[*batch, *X, Hq]`` in the accumulation dtype.

    Raises:
      TypeError: a dtype or an argument's type is not supported.
      ValueError: shapes do not match, a window does not fit the grid, or tiles do not fit the case.
      NotImplementedError: a named implementation cannot take the case, and says which limit was hit; or tiles are asked
        for, but not the implementation that they are for.
    """
    window = Neighborhood.make(kernel_size, stride, dilation, is_causal)
    named = checks.arrays(query=query, key=key, value=value)
    query, key, value = named.values()
    batch, grid = checks.split("query", query, window)
    checks.same_grid("key", key, "query", query)
    checks.same_grid("value", value, "key", key)
    heads, kv_heads, dim, value_dim = query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1]
    checks.channels("key", key, "query", dim)
    checks.groups("query", heads, "key", kv_heads)
    if value.shape[-2] != kv_heads:
        raise ValueError(f"value must have as many heads as key, {kv_heads}; got shape {value.shape}")
    if value_dim == 0:
        raise ValueError(f"value must have at least one channel; got shape {value.shape}")
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    additional_keys = checks.additional("additional_keys", additional_keys, "query", query, batch, kv_heads, dim)
    additional_values = checks.additional(
        "additional_values", additional_values, "query", query, batch, kv_heads, value_dim
    )
    lengths = [0 if x is None else x.shape[-3] for x in (additional_keys, additional_values)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"additional_keys and additional_values must have the same length; got {lengths}")
    bias = checks.bias(rpb, batch, heads, window, query.dtype)
    scale = checks.scale(scale, dim)
    precision = checks.precision(precision)
    requested = dispatch.parse(implementation)

    problem = fused.problem("fused_forward", query, key, value, additional_keys, bias, window)
    # The batch of one device is not known yet: vmap makes it larger, sharding smaller.
    problem = dataclasses.replace(problem, batch=0 if problem.batch == 0 else 1)
    dispatch.check(problem, requested)
    dispatch.check_tiles(problem, requested, tiles)
    operands = (query, key, value, additional_keys, additional_values, bias)
    out, lse = fused.attention(
        *operands, neighborhood=window, scale=scale, precision=precision, implementation=requested, tiles=tiles
    )
    return (out, lse) if return_lse else out


na1d = with_rank(1, neighborhood_attention, "na1d")
na2d = with_rank(2, neighborhood_attention, "na2d")
na3d = with_rank(3, neighborhood_attention, "na3d")


def merge_attentions(outputs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Joins attentions of the same queries over disjoint sets of keys into the attention over their union.

    Ordinary differentiable JAX code; exact up to rounding, in value and in every gradient.

    Args:
      outputs: attention outputs, each ``[..., heads, Dv]``, all of one shape.
      lses: their log-sum-exps, each ``[..., heads]``.

    Returns:
      ``(out, lse)`` of the union, ``out`` in the dtype of the first output.

    Raises:
      ValueError: no outputs, another number of LSEs, or shapes that do not match.
    """
    outputs, lses = list(outputs), list(lses)
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"outputs and lses must be as many, at least one; got {len(outputs)} and {len(lses)}")
    for out, lse in zip(outputs, lses):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outputs must have one shape {outputs[0].shape}, and lses that shape without its last axis; got "
                f"{out.shape} and {lse.shape}"
            )
    total = functools.reduce(jnp.logaddexp, lses)
    # Where no part saw a key, every LSE is -inf: the weights are zero, not NaN.
    reference = jnp.where(jnp.isneginf(total), 0, total)
    weighted = [out * jnp.exp(lse - reference)[..., None] for out, lse in zip(outputs, lses)]
    return functools.reduce(jnp.add, weighted).astype(outputs[0].dtype), total
