"""The only place that touches JAX names without a stability promise."""

from __future__ import annotations

import jax
from jax._src import core
from jax._src import dispatch as _jax_dispatch
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec


def lower_with_devices(primitive: Primitive) -> None:
    """custom_partitioning asks for the device assignment while a primitive that uses it is lowered."""
    _jax_dispatch.prim_requires_devices_during_lowering.add(primitive)


def min_dim(a, b):
    """``min`` that also takes symbolic dimensions."""
    return core.min_dim(a, b)


def max_dim(a, b):
    """``max`` that also takes symbolic dimensions."""
    return core.max_dim(a, b)


def derive(aval, shape, dtype=None, axes=None):
    """An abstract value like ``aval`` of another shape: keeps its varying mesh axes and its explicit sharding.

    Args:
      aval: the value to derive from.
      shape: the new shape.
      dtype: the new dtype; by default that of ``aval``.
      axes: for every new axis the axis of ``aval`` whose sharding it inherits, or None.
    """
    old = tuple(aval.sharding.spec) + (None,) * (aval.ndim - len(aval.sharding.spec))
    axes = range(len(shape)) if axes is None else axes
    spec = PartitionSpec(*(None if a is None else old[a] for a in axes))
    return aval.update(shape=tuple(shape), dtype=dtype or aval.dtype, sharding=aval.sharding.update(spec=spec))


def align(*arrays):
    """Makes every operand vary over the union of their mesh axes.

    Inside ``shard_map(check_vma=True)`` a primitive must see this on all operands, or the cotangents of replicated
    operands are not summed; the transpose of the cast inserts the sum.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(a, tuple(union - axes), to="varying") if union - axes else a for a, axes in zip(arrays, varying)
    ]
