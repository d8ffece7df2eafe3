"""Sizes of the scratch buffers that kernels get as an extra result.

A custom call may not allocate (it would not run inside a captured CUDA graph), so the lowering reserves the scratch and
drops it afterwards. Elements are of the accumulation dtype. Sizes are part of the wire format: kernels check that they
fit and may use less.
"""

from __future__ import annotations

import math

from jax_natten.primitives.shim import max_dim, min_dim

# Sums over all queries (gradients of the bias and of the additional keys) are taken in two stages: this many partial
# sums over chunks of the grid positions, then their sum in a fixed order. Deterministic, and parallel enough.
CHUNKS = 64


def _chunks(positions):
    return min_dim(max_dim(positions, 1), CHUNKS)


def fused_backward(query, value, additional_keys, bias) -> int:
    """``delta`` per query and head, then the partial sums of d_bias, d_additional_keys and d_additional_values.

    In float16 and bfloat16 a second number per query and head: "sm90" keeps ``lse``, too, in the order it reads it.
    """
    batch, *grid, heads, dim = query.shape
    positions = math.prod(grid)
    _, additional, kv_heads, _ = additional_keys.shape
    partial = math.prod(bias.shape) + batch * additional * kv_heads * (dim + value.shape[-1])
    numbers = 2 if query.dtype.itemsize == 2 else 1
    return numbers * batch * positions * heads + _chunks(positions) * partial


def inverse(queries, kv_heads: int, additional: int) -> int:
    """The partial sums of the additional keys' result."""
    batch, *grid, _, dim = queries.shape
    return _chunks(math.prod(grid)) * batch * additional * kv_heads * dim
