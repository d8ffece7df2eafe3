"""Gradient of the relative position bias from the gradient of attention weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_natten.neighborhood import Neighborhood


def bias_gradient(weights: jax.Array, shape: tuple[int, ...], neighborhood: Neighborhood) -> jax.Array:
    """Sums attention weights (or their gradient) over all queries, by relative position of the key.

    Args:
      weights: ``[*B, *X, H, prod(kernel_size) + S]``; the slots of additional keys do not count.
      shape: of the result, ``[*G, H, *(2 * kernel_size - 1)]`` where each batch axis of G is that of B, or 1.
      neighborhood: the windows, without causal axes.

    Returns:
      An array of that shape in the accumulation dtype. Matrix products only, no scatter: deterministic on every device.
    """
    rank, kernel_size = neighborhood.rank, neighborhood.kernel_size
    first = weights.ndim - rank - 2  # grid axis
    batch, grid = weights.shape[:first], weights.shape[first:-2]
    dtype = jnp.promote_types(weights.dtype, jnp.float32)
    if 0 in (*batch, *grid):
        return jnp.zeros(shape, dtype)
    shared = tuple(axis for axis in range(first) if shape[axis] != batch[axis])
    total = jnp.sum(weights[..., : neighborhood.window_size], axis=shared, dtype=dtype, keepdims=True)
    total = total.reshape(*total.shape[:-1], *kernel_size)
    for number, axis in enumerate(neighborhood.axes(grid)):
        # Slot k of query x is offset + K - 1 = shift(x) + k with shift in [0, K). Group the queries by their shift ...
        begin, _ = axis.window_bounds()
        shift = begin - np.arange(axis.length) // axis.dilation + axis.window - 1
        grouping = (jnp.asarray(shift)[:, None] == jnp.arange(axis.window)).astype(dtype)
        # (the first grid axis left is contracted, the shifts go last)
        total = jnp.tensordot(total, grouping, axes=[[first], [0]], precision=jax.lax.Precision.HIGHEST)
        # ... then sum along the diagonals of (shift, slot).
        left = rank - number - 1
        total = jnp.moveaxis(total, first + left + 1, -1)
        total = _diagonal_sums(total)
    return total


def _diagonal_sums(x: jax.Array) -> jax.Array:
    """``y[..., o] = sum of x[..., a, b] over a + b == o`` for ``x`` of shape ``[..., K, K]``; o runs to 2 K - 2."""
    *lead, size, _ = x.shape
    # Padding every row to 2 K entries and cutting the flat array into rows of 2 K - 1 shifts row a right by a.
    skewed = jnp.pad(x, [(0, 0)] * (len(lead) + 1) + [(0, size)]).reshape(*lead, -1)
    return skewed[..., : size * (2 * size - 1)].reshape(*lead, size, 2 * size - 1).sum(-2)
