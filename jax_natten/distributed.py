"""Context parallelism: neighborhood attention whose grid axes are sharded over mesh axes.

To be called inside ``jax.shard_map``. Keys and values near a shard's border come from the neighboring devices by
``ppermute`` (the halo exchange), as many hops as the window is wide; queries never travel. Each device then runs the
single-device attention on its *slab*: its own positions and the halo. Derivatives of every order follow, since the
exchange is ordinary JAX code.

A slab must show every local query the window that it has on the whole grid. Windows shift at the borders of the grid
and strides and dilation count from its origin, so slabs start at multiples of ``stride * dilation`` and end at the
border wherever the whole slab would run past it. Slab positions that no local query sees are zeros, and the slab's
queries outside of the shard are zeros whose outputs are dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_natten import checks
from jax_natten.attention import Bools, Ints
from jax_natten.attention import neighborhood_attention as _attention
from jax_natten.neighborhood import Axis, Neighborhood


@dataclasses.dataclass(frozen=True)
class AxisPlan:
    """How one sharded grid axis is exchanged: the same static sizes on every device, and one slab start per device.

    Attributes:
      shard: positions per device.
      left, right: halo widths, in positions.
      size: positions of a slab.
      starts: global position at which each device's slab starts.
    """

    shard: int
    left: int
    right: int
    size: int
    starts: tuple[int, ...]

    @property
    def exchanged(self) -> int:
        """Positions that a device receives (and sends): the communication volume."""
        return self.left + self.right


@functools.cache
def plan_axis(axis: Axis, shards: int, shard: int) -> AxisPlan:
    """Plans the exchange of one grid axis.

    Args:
      axis: the axis of the whole grid.
      shards: number of devices along it.
      shard: positions per device, ``shards * shard >= axis.length``; what exceeds the length is padding at the end.

    Raises:
      ValueError: the shards do not cover the axis, or cover it twice.
    """
    if not shards * shard >= axis.length > 0:
        raise ValueError(f"{shards} shards of {shard} positions do not hold a grid axis of length {axis.length}")
    position = np.arange(axis.length)
    begin, end = axis.window_bounds()
    first_key = position % axis.dilation + begin * axis.dilation
    last_key = position % axis.dilation + (end - 1) * axis.dilation
    # Shards that hold padding alone need nothing.
    owners = [np.arange(p * shard, min((p + 1) * shard, axis.length)) for p in range(shards)]
    spans = [(int(first_key[own].min()), int(last_key[own].max()) + 1) if len(own) else None for own in owners]
    left = max(p * shard - span[0] for p, span in enumerate(spans) if span)
    right = max(span[1] - (p + 1) * shard for p, span in enumerate(spans) if span)

    step = axis.stride * axis.dilation
    size = axis.length % step
    while True:
        size = min(size, axis.length)
        starts = tuple(min(span[0] // step * step, axis.length - size) if span else 0 for span in spans)
        if all(_same_windows(axis, own, start, size) for own, start in zip(owners, starts)):
            return AxisPlan(shard, max(left, 0), max(right, 0), size, starts)
        size += step


def _same_windows(axis: Axis, queries: np.ndarray, start: int, size: int) -> bool:
    """Whether these global positions see on the slab what they see on the whole axis."""
    if axis.window * axis.dilation > size:
        return False
    if not len(queries):
        return True
    if queries[0] < start or queries[-1] >= start + size:
        return False
    slab = dataclasses.replace(axis, length=size)
    offset = start // axis.dilation
    return all(
        np.array_equal(whole[queries], part[queries - start] + offset)
        for whole, part in zip(axis.window_bounds(), slab.window_bounds())
    )


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    *,
    mesh_axes: Sequence[Hashable],
    grid: Sequence[int] | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """:func:`jax_natten.neighborhood_attention` on one device's shard of the grid, inside ``jax.shard_map``.

    Memory per device is that of its shard and its halo. Each device attends from its whole slab, so the work grows with
    the halo as well: shards should be wide against ``kernel_size * dilation``.

    Args:
      query, key, value: local shards ``[*batch, *X_local, heads, dim]``.
      kernel_size, stride, dilation, is_causal: windows on the whole grid.
      mesh_axes: for every grid axis the name of the mesh axis (or a tuple of names) that shards it, or None.
      grid: lengths of the whole grid. By default the local lengths times the number of shards; a smaller one says that
        the last shards end in padding, whose outputs are zero.
      return_lse: whether to return the log-sum-exp as well; padding has zero there.
      **kwargs: scale, additional keys and values (whole on every device), rpb, implementation.

    Returns:
      The local shard of the output, and of the LSE.

    Raises:
      ValueError: ``mesh_axes`` or ``grid`` does not fit, and as :func:`jax_natten.neighborhood_attention`.
    """
    window = Neighborhood.make(kernel_size, stride, dilation, is_causal)
    rank = window.rank
    if len(mesh_axes) != rank:
        raise ValueError(f"mesh_axes must have {rank} entries, a mesh axis or None per grid axis; got {mesh_axes!r}")
    named = checks.arrays(query=query, key=key, value=value)
    query, key, value = named.values()
    if query.ndim < rank + 2:
        raise ValueError(f"query must have at least {rank + 2} axes for kernel_size {kernel_size}; got {query.shape}")
    local = query.shape[query.ndim - rank - 2 : -2]
    shards = [1 if name is None else jax.lax.axis_size(name) for name in mesh_axes]
    whole = tuple(n * p for n, p in zip(local, shards)) if grid is None else tuple(grid)
    window.check_grid(whole)
    for axis, (name, length, total) in enumerate(zip(mesh_axes, local, whole)):
        if name is None and length != total:
            raise ValueError(f"grid axis {axis} is not sharded: its local length {length} must be that of grid {whole}")

    slabs = []
    for axis, (name, description) in enumerate(zip(mesh_axes, window.axes(whole))):
        if name is None:
            continue
        slab = _Slab(query.ndim - rank - 2 + axis, name, plan_axis(description, shards[axis], local[axis]))
        slabs.append(slab)
        key, value, query = slab.gather(key), slab.gather(value), slab.embed(query)
    out, lse = _attention(query, key, value, kernel_size, stride, dilation, is_causal, return_lse=True, **kwargs)
    for slab in slabs:
        out, lse = slab.extract(out), slab.extract(lse)
    return (out, lse) if return_lse else out


@dataclasses.dataclass(frozen=True)
class _Slab:
    """Moves one array axis between shard and slab."""

    axis: int
    name: Hashable
    plan: AxisPlan

    @property
    def _offsets(self) -> tuple[int, ...]:
        """Of every device: where its slab starts, from the start of its shard."""
        return tuple(start - device * self.plan.shard for device, start in enumerate(self.plan.starts))

    def gather(self, x: jax.Array) -> jax.Array:
        """The slab of keys or values: own positions, halo, and zeros where no local query looks."""
        plan = self.plan
        parts = [*self._received(x, plan.left, from_left=True), x, *self._received(x, plan.right, from_left=False)]
        extended = jnp.concatenate(parts, self.axis)
        return self._cut(extended, [plan.left + offset for offset in self._offsets], plan.size)

    def embed(self, x: jax.Array) -> jax.Array:
        """The slab of queries: the own positions, zeros elsewhere."""
        return self._cut(x, self._offsets, self.plan.size)

    def extract(self, x: jax.Array) -> jax.Array:
        """The own positions of a slab; zeros for padding."""
        return self._cut(x, [-offset for offset in self._offsets], self.plan.shard)

    def _cut(self, x: jax.Array, starts: Sequence[int], size: int) -> jax.Array:
        """``x[start : start + size]`` with every device's own start, and zeros where that runs past either end."""
        before, after = max(0, -min(starts)), max(0, max(starts) + size - x.shape[self.axis])
        padding = [(0, 0)] * x.ndim
        padding[self.axis] = (before, after)
        start = jnp.asarray(starts, jnp.int32)[jax.lax.axis_index(self.name)]
        return jax.lax.dynamic_slice_in_dim(jnp.pad(x, padding), before + start, size, self.axis)

    def _received(self, x: jax.Array, width: int, *, from_left: bool) -> list[jax.Array]:
        """The ``width`` positions next to the shard, in order; zeros past the border of the grid."""
        devices, shard = len(self.plan.starts), self.plan.shard
        parts = []
        for hop in range(1, -(-width // shard) + 1):
            count = min(shard, width - (hop - 1) * shard)
            if from_left:
                part = jax.lax.slice_in_dim(x, shard - count, shard, axis=self.axis)
                pairs = [(p, p + hop) for p in range(devices - hop)]
            else:
                part = jax.lax.slice_in_dim(x, 0, count, axis=self.axis)
                pairs = [(p + hop, p) for p in range(devices - hop)]
            parts.append(jax.lax.ppermute(part, self.name, pairs))
        return parts[::-1] if from_left else parts
