"""The only place that touches JAX names without a stability promise."""

from __future__ import annotations

import math

import jax
from jax._src import core
from jax._src import dispatch as _jax_dispatch
from jax.extend.core import Primitive
from jax.sharding import AxisType, PartitionSpec


def lower_with_devices(primitive: Primitive) -> None:
    """custom_partitioning asks for the device assignment while a primitive that uses it is lowered."""
    _jax_dispatch.prim_requires_devices_during_lowering.add(primitive)


def min_dim(a, b):
    """``min`` that also takes symbolic dimensions."""
    return core.min_dim(a, b)


def max_dim(a, b):
    """``max`` that also takes symbolic dimensions."""
    return core.max_dim(a, b)


def is_constant(shape) -> bool:
    """Whether a shape has no symbolic dimensions."""
    return core.is_constant_shape(tuple(shape))


def derive(aval, shape, dtype=None, axes=None):
    """An abstract value like ``aval`` of another shape: keeps its varying mesh axes and its explicit sharding.

    Args:
      aval: the value to derive from.
      shape: the new shape.
      dtype: the new dtype; by default that of ``aval``.
      axes: for every new axis the axis of ``aval`` whose sharding it inherits (where its length allows), or None.
    """
    spec = tuple(aval.sharding.spec) + (None,) * (aval.ndim - len(aval.sharding.spec))
    axes = range(len(shape)) if axes is None else axes

    def inherited(length, axis):
        entry = None if axis is None else spec[axis]
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return entry if length % math.prod(aval.sharding.mesh.shape[name] for name in names) == 0 else None

    entries = (inherited(length, axis) for length, axis in zip(shape, axes))
    sharding = aval.sharding.update(spec=PartitionSpec(*entries))
    return aval.update(shape=tuple(shape), dtype=dtype or aval.dtype, sharding=sharding)


def reshape(array, shape):
    """``array.reshape``, which of explicitly sharded axes merges none but the first of those it merges."""
    if array.shape == tuple(shape):
        return array
    sharding = jax.typeof(array).sharding
    if any(kind == AxisType.Explicit for kind in sharding.mesh.axis_types):
        merged = array.ndim - len(shape)  # batch axes beyond the first
        spec = [None if 1 <= axis <= merged else entry for axis, entry in enumerate(sharding.spec)]
        array = jax.sharding.reshard(array, PartitionSpec(*spec))
    return array.reshape(shape)


def local():
    """Context to lower what one device computes, whatever mesh is set.

    Under an explicit mesh JAX annotates even the scalars that a reduction or a scatter adds with shardings, which XLA
    refuses in a partitioned program.
    """
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


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
