"""Moves shards between devices and cuts slabs from them: the JAX side of a plan of ``halo``, inside ``shard_map``."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from jax_natten.halo import AxisPlan

Names = Hashable  # of a mesh axis, a tuple of them, or None
Starts = Sequence[Sequence[int]]  # for every sharded axis, for every device


@dataclasses.dataclass(frozen=True)
class ShardedAxis:
    """An array axis that is sharded.

    Attributes:
      axis: number of the array axis.
      name: of the mesh axis, or a tuple of names.
      length: of the whole axis.
      plan: of the exchange.
    """

    axis: int
    name: Names
    length: int
    plan: AxisPlan

    def on_this_device(self, values: Sequence[int]) -> jax.Array:
        """Of one number per device the one of this device."""
        return jnp.asarray(values, jnp.int32)[jax.lax.axis_index(self.name)]

    def clear_padding(self, x: jax.Array) -> jax.Array:
        """The shard with zeros at positions past the end of the grid."""
        shard, devices = self.plan.shard, len(self.plan.whole.offsets)
        if self.length == devices * shard:
            return x
        valid = jnp.arange(shard) < self.on_this_device([self.length - device * shard for device in range(devices)])
        shape = [1] * x.ndim
        shape[self.axis] = shard
        return jnp.where(valid.reshape(shape), x, jnp.zeros((), x.dtype))


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A local array, perhaps with the halo that was received, kept apart: a slab copies only what it is made of.

    Attributes:
      array: the local array.
      axes: its sharded axes.
      halos: for every axis that was exchanged ``(start, positions)`` of each received array; starts count from that of
        the shard. They span the halos of the axes before, and only the shard on the axes after.
    """

    array: jax.Array
    axes: tuple[ShardedAxis, ...]
    halos: tuple[tuple[tuple[int, jax.Array], ...], ...] = ()

    def exchanged(self) -> Pieces:
        """This shard with its halo, corners included: one exchange per axis, each with what came before."""
        extended = self
        for number in range(len(self.axes)):
            extended = dataclasses.replace(extended, halos=(*extended.halos, extended._received(number)))
        return extended

    def cut(self, starts: Starts, sizes: Sequence[int]) -> jax.Array:
        """The box ``[start, start + size)`` with every device's own starts, and zeros where nothing is known."""
        ranges = [(min(own), max(own) + size) for own, size in zip(starts, sizes)]
        known = [self._extent(number) for number in range(len(self.axes))]
        x = self._assemble([(max(b, first), min(e, last)) for (b, e), (first, last) in zip(ranges, known)])
        padding = [(0, 0)] * x.ndim
        for axis, (begin, end), (first, last) in zip(self.axes, ranges, known):
            padding[axis.axis] = (max(first - begin, 0), max(end - last, 0))
        if any(before or after for before, after in padding):
            x = jnp.pad(x, padding)
        for axis, own, (begin, _), size in zip(self.axes, starts, ranges, sizes):
            if len(set(own)) > 1:
                start = axis.on_this_device([o - begin for o in own])
                x = jax.lax.dynamic_slice_in_dim(x, start, size, axis.axis)
        return x

    def _extent(self, number: int) -> tuple[int, int]:
        """First and last known position of an axis, half open, from the start of the shard."""
        axis = self.axes[number]
        own = (0, self.array.shape[axis.axis])
        if number >= len(self.halos):
            return own
        spans = [own, *((start, start + x.shape[axis.axis]) for start, x in self.halos[number])]
        return min(begin for begin, _ in spans), max(end for _, end in spans)

    def _assemble(self, ranges: Sequence[tuple[int, int]]) -> jax.Array:
        """The box of these known positions."""
        if not self.halos:
            return _box(self.array, self.axes, ranges, [0] * len(self.axes))
        *earlier, halos = self.halos
        inner, number = dataclasses.replace(self, halos=tuple(earlier)), len(earlier)
        axis, (begin, end) = self.axes[number], ranges[number]
        origins = [self._extent(n)[0] if n < number else 0 for n in range(len(self.axes))]
        pieces = []
        for start, x in sorted([*halos, (0, None)], key=lambda piece: piece[0]):
            stop = start + (self.array if x is None else x).shape[axis.axis]
            if max(begin, start) < min(end, stop):
                box = [*ranges[:number], (max(begin, start), min(end, stop)), *ranges[number + 1 :]]
                origins[number] = start
                pieces.append(inner._assemble(box) if x is None else _box(x, self.axes, box, origins))
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis.axis)

    def _received(self, number: int) -> tuple[tuple[int, jax.Array], ...]:
        """What comes along an axis: one array per hop and side; zeros past the border of the grid."""
        axis = self.axes[number]
        plan, devices = axis.plan, len(axis.plan.whole.offsets)
        ranges = [self._extent(n) for n in range(len(self.axes))]
        received = []
        for width, direction in ((plan.left, 1), (plan.right, -1)):
            for hop in range(1, -(-width // plan.shard) + 1):
                count = min(plan.shard, width - (hop - 1) * plan.shard)
                ranges[number] = (plan.shard - count, plan.shard) if direction > 0 else (0, count)
                pairs = [(p, p + direction * hop) for p in range(devices) if 0 <= p + direction * hop < devices]
                start = ranges[number][0] - direction * hop * plan.shard
                received.append((start, jax.lax.ppermute(self._assemble(ranges), axis.name, pairs)))
        return tuple(received)


def _box(x: jax.Array, axes: Sequence[ShardedAxis], ranges, origins: Sequence[int]) -> jax.Array:
    """A static slice; ranges and origins as positions from the start of the shard."""
    begins, ends = [0] * x.ndim, list(x.shape)
    for axis, (begin, end), origin in zip(axes, ranges, origins):
        begins[axis.axis], ends[axis.axis] = begin - origin, end - origin
    return jax.lax.slice(x, begins, ends)
