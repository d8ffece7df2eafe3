"""Context parallelism: neighborhood attention whose grid axes are sharded over mesh axes.

:func:`neighborhood_attention` is for the inside of ``jax.shard_map``, :func:`sharded_attention` for whole arrays under
``jit``. Keys and values near a shard's border come from the neighboring devices by ``ppermute`` (the halo exchange), as
many hops as the window is wide; queries never travel. Derivatives of every order follow, since the exchange is ordinary
JAX code.

Queries whose windows lie inside the shard (the interior) are attended by a call that does not wait for the exchange, so
that XLA may run both at once; the others (the border) by calls on slabs of the shard and its halo. ``halo`` plans them.
Slab positions that no local query sees are zeros. A call computes all queries of its slab: those outside of its part
are dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jax_natten import checks, halo
from jax_natten.attention import Bools, Ints
from jax_natten.attention import neighborhood_attention as _attention
from jax_natten.exchange import Names, Pieces, ShardedAxis
from jax_natten.halo import AxisPlan, Box, plan_axis
from jax_natten.neighborhood import Neighborhood

__all__ = ["neighborhood_attention", "plan_axis", "sharded_attention"]

# Splitting off the interior hides the exchange but computes queries at the border in vain. It pays while that takes
# less time than the exchange. This many operations of attention take as long as receiving a byte: small windows reach
# 58 to 175 TFLOP/s on an H200, NVLink about 350 GB/s, which makes 170 to 500. Slower networks allow more.
FLOPS_PER_BYTE = 300


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    *,
    mesh_axes: Sequence[Names],
    grid: Sequence[int] | None = None,
    overlap: bool | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """:func:`jax_natten.neighborhood_attention` on one device's shard of the grid, inside ``jax.shard_map``.

    Memory per device is that of its shard and its halo. Each call attends from whole slabs, so the work grows with the
    halo as well: shards should be wide against ``kernel_size * dilation``.

    Args:
      query, key, value: local shards ``[*batch, *X_local, heads, dim]``.
      kernel_size, stride, dilation, is_causal: windows on the whole grid.
      mesh_axes: for every grid axis the name of the mesh axis (or a tuple of names) that shards it, or None.
      grid: lengths of the whole grid. By default the local lengths times the number of shards; a smaller one says that
        the last shards end in padding, which is never read and whose outputs are zero.
      overlap: whether the interior is attended while the halo travels. It costs additional work at the border, so that
        None does it only where that takes less time than the exchange over NVLink, which is for small windows; True
        also helps larger ones on slower networks. Where a shard has no interior, nothing overlaps.
      return_lse: whether to return the log-sum-exp as well; padding has zero there.
      **kwargs: scale, additional keys and values (whole on every device), rpb, implementation, precision.

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
    checks.same_grid("key", key, "query", query)
    checks.same_grid("value", value, "key", key)
    local = query.shape[query.ndim - rank - 2 : -2]
    shards = [1 if name is None else jax.lax.axis_size(name) for name in mesh_axes]
    whole = tuple(n * p for n, p in zip(local, shards)) if grid is None else tuple(grid)
    window.check_grid(whole)
    for number, (name, length, total) in enumerate(zip(mesh_axes, local, whole)):
        if name is None and length != total:
            raise ValueError(
                f"grid axis {number} is not sharded: its local length {length} must be that of grid {whole}"
            )

    axes = tuple(
        ShardedAxis(query.ndim - rank - 2 + number, name, axis.length, plan_axis(axis, shards[number], local[number]))
        for number, (name, axis) in enumerate(zip(mesh_axes, window.axes(whole)))
        if name is not None
    )
    plans = [axis.plan for axis in axes]
    if overlap is None:
        group = query.shape[-2] // max(key.shape[-2], 1)
        overlap = _hiding_pays(plans, 2 * window.window_size * group, query.dtype.itemsize)
    for sharded in axes:
        query, key, value = (sharded.clear_padding(x) for x in (query, key, value))
    alone = [Pieces(x, axes) for x in (query, key, value)]
    extended = [alone[0], *(pieces.exchanged() for pieces in alone[1:])]

    def attend(sources: Sequence[Pieces], box: Box, keep: Box) -> list[jax.Array]:
        """Output and LSE of the queries of ``keep``, from the slab of a box."""
        slab = [part.offsets for part in box], [part.size for part in box]
        q, k, v = (source.cut(*slab) for source in sources)
        results = _attention(q, k, v, kernel_size, stride, dilation, is_causal, return_lse=True, **kwargs)
        starts = [[run.begin - offset for offset in part.offsets] for part, run in zip(box, keep)]
        return [Pieces(x, axes).cut(starts, [run.end - run.begin for run in keep]) for x in results]

    first, borders = halo.cover(plans, overlap)
    unaided = all(part is plan.interior for part, plan in zip(first, plans))
    # The whole shard, of which the border is wrong and written over.
    results = attend(alone if unaided else extended, first, tuple(plan.whole for plan in plans))
    for box in borders:
        begins = [0] * query.ndim
        for sharded, part in zip(axes, box):
            begins[sharded.axis] = part.begin
        pieces = attend(extended, box, box)
        results = [jax.lax.dynamic_update_slice(x, p, begins[: x.ndim]) for x, p in zip(results, pieces)]
    for sharded in axes:
        results = [sharded.clear_padding(x) for x in results]
    return (results[0], results[1]) if return_lse else results[0]


def _hiding_pays(plans: Sequence[AxisPlan], flops: int, itemsize: int) -> bool:
    """Whether splitting off the interior costs less time than receiving the halo.

    Args:
      flops: operations per query and channel of a key head.
      itemsize: bytes per channel.
    """
    queries = halo.attended(plans, split=True) - halo.attended(plans, split=False)
    return queries * flops <= FLOPS_PER_BYTE * halo.received(plans) * itemsize


def sharded_attention(
    mesh: Mesh,
    *,
    grid: Sequence[Names],
    batch: Names = None,
    heads: Names = None,
    overlap: bool | None = None,
) -> Callable[..., Any]:
    """Neighborhood attention of whole arrays under ``jit``, with the grid sharded over a mesh.

    A ``jax.shard_map`` around :func:`neighborhood_attention`, to be used as it is or as the ``attention`` of a layer::

        mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
        attention = sharded_attention(mesh, batch="data", grid=("context", None))
        out = jax.jit(attention, static_argnums=3)(query, key, value, (7, 7))  # [batch, height, width, heads, dim]

    Grid axes that the shards do not divide are padded.

    Args:
      mesh: the devices.
      grid: for every grid axis the mesh axis (or a tuple of them) that shards it, or None.
      batch: the same for the first batch axis, whose length it must divide.
      heads: the same for the heads, of queries and of keys and values.
      overlap: as in :func:`neighborhood_attention`.

    Returns:
      A function with the arguments (but tiles) and results of :func:`jax_natten.neighborhood_attention`.
    """
    names = tuple(grid)

    def attention(
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
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        window = Neighborhood.make(kernel_size, stride, dilation, is_causal)
        if window.rank != len(names):
            raise ValueError(f"this attention has {len(names)} grid axes, {names}; got kernel_size {kernel_size}")
        leading, whole = checks.split("query", query, window)
        pads = [-length % _devices(mesh, name) for length, name in zip(whole, names)]
        batches = (batch, *[None] * (len(leading) - 1)) if leading else ()

        grid_spec, extra_spec = PartitionSpec(*batches, *names, heads), PartitionSpec(*batches, None, heads)
        operands = {
            "query": (query, grid_spec),
            "key": (key, grid_spec),
            "value": (value, grid_spec),
            "additional_keys": (additional_keys, extra_spec),
            "additional_values": (additional_values, extra_spec),
            "rpb": (rpb, PartitionSpec(heads)),
        }
        arrays = {name: array for name, (array, _) in operands.items() if array is not None}
        specs = {name: operands[name][1] for name in arrays}
        if any(pads):
            widths = [(0, 0)] * len(leading) + [(0, pad) for pad in pads] + [(0, 0)] * 2
            arrays |= {name: jnp.pad(arrays[name], widths) for name in ("query", "key", "value")}

        def local(arrays: dict[str, jax.Array]) -> Any:
            return neighborhood_attention(
                **arrays,
                **dataclasses.asdict(window),
                mesh_axes=names,
                grid=whole,
                overlap=overlap,
                scale=scale,
                return_lse=True,
                implementation=implementation,
                precision=precision,
            )

        results = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=(grid_spec, grid_spec))(arrays)
        if any(pads):
            kept = (slice(None),) * len(leading) + tuple(slice(length) for length in whole)
            results = tuple(x[kept] for x in results)
        return results if return_lse else results[0]

    return attention


def _devices(mesh: Mesh, names: Names) -> int:
    """Number of devices along a mesh axis, or along several."""
    if names is None:
        return 1
    return math.prod(mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)))
