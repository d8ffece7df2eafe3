"""What a call costs: the products of its query-key pairs, and the bytes of its operands and results.

XLA knows neither of a custom call. Users ask :mod:`jax_natten.cost`, and ``jax.experimental.roofline`` the primitives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.experimental import roofline
from jax.extend.core import Primitive

from jax_natten.neighborhood import Neighborhood

# Dot products per query-key pair, over the head dim of the keys and over that of the values.
_PRODUCTS = {
    "forward": (1, 1),  # scores; out
    "backward": (3, 2),  # scores, d_query, d_key; d_weights, d_value
    "tangent": (3, 2),  # scores and their two tangents; the tangents of the weights and of the values
    "qk": (1, 0),
    "av": (0, 1),
}
OPERATIONS = ("forward", "backward", "qk", "av")


def flops(
    operation: str,
    neighborhood: Neighborhood,
    rows: Sequence[int],
    *,
    additional: int,
    dim: int = 0,
    value_dim: int = 0,
) -> int:
    """Floating-point operations of the products of those pairs that attend; a multiply-add counts two.

    Args:
      operation: see ``_PRODUCTS``.
      neighborhood: the window.
      rows: ``[*batch, *X, heads]`` of the queries.
      additional: additional keys.
      dim, value_dim: head dims of keys and values.
    """
    *batch, heads = rows
    batch, grid = batch[: len(batch) - neighborhood.rank], batch[len(batch) - neighborhood.rank :]
    pairs = math.prod(batch) * heads * (neighborhood.pairs(grid) + math.prod(grid) * additional)
    of_keys, of_values = _PRODUCTS[operation]
    return 2 * pairs * (of_keys * dim + of_values * value_dim)


def array_bytes(arrays) -> int:
    """Bytes of arrays, or of anything else with a shape and a dtype; None counts nothing."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays if x is not None)


def register(primitive: Primitive, of_call: Callable[..., int]) -> None:
    """Tells ``jax.experimental.roofline`` what a primitive costs.

    Args:
      primitive: an outer primitive.
      of_call: ``(operands, results, present, neighborhood) -> flops``, from abstract values.
    """

    @roofline.register_roofline(primitive)
    def rule(ctx, *_, present, neighborhood, **__):
        work = of_call(ctx.avals_in, ctx.avals_out, present, neighborhood)
        moved = array_bytes((*ctx.avals_in, *ctx.avals_out))
        return roofline.RooflineResult(flops=work, unfused_flops=work, hbm_bytes=moved, unfused_hbm_bytes=moved)
