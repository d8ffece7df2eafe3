"""Walks over the blocks of a :class:`~jax_natten.xla.tiling.Tiling`: folds arrays, slices them, masks, adds results up.

Folded layouts, with N = prod(dilation) dilation groups, L in-group positions and Q those padded to whole tiles:

- queries ``[B, N, Hkv, G, Q0, Q1, Q2, C]`` and whatever else queries have (out, lse, weights)
- keys ``[B, N, Hkv, L0, L1, L2, C]``, in the accumulation dtype
- additional keys ``[B, Hkv, S, C]``, in the accumulation dtype
- bias ``[Gb, Hkv, G, P0, P1, P2]``, with zeros around the table where blocks reach past it

Keys are accumulated here and not in every block so that their cotangents add up in that dtype, too. Letters of the
einsums: ``b`` batch, ``n`` dilation group, ``h`` key and value head, ``g`` query head of its group, ``q`` query of the
tile, ``k`` key of the slab, ``s`` additional key, ``d`` head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_natten.neighborhood import Neighborhood
from jax_natten.xla import tiling
from jax_natten.xla.tiling import TiledAxis

QUERIES, KEYS, ADDITIONAL, BIAS = "queries", "keys", "additional", "bias"


def accumulation_dtype(dtype) -> np.dtype:
    """float64 for float64, else float32."""
    return jnp.promote_types(dtype, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A problem and its tiling. Grid axes are padded in front to three."""

    rank: int
    grid: tuple[int, int, int]
    batch: int
    bias_batch: int
    kv_heads: int
    group: int
    dtype: np.dtype
    precision: lax.Precision
    tiling: tiling.Tiling

    @classmethod
    def make(
        cls, queries, kv_heads, neighborhood: Neighborhood, *, precision, channels, additional, bias_batch=1
    ) -> Blocks:
        """The blocks for queries ``[B, *X, Hq, C]``, of which no axis but the last may be empty.

        Args:
          queries: gives batch, grid, heads and dtype.
          kv_heads: key and value heads.
          neighborhood: the window.
          precision: of the products.
          channels: multiply-adds per query-key pair, for the choice of the tiling.
          additional: additional keys.
          bias_batch: number of biases, which divides the batch.
        """
        batch, *grid, heads, _ = queries.shape
        group = heads // kv_heads
        return cls(
            rank=len(grid),
            grid=(1,) * (3 - len(grid)) + tuple(grid),
            batch=batch,
            bias_batch=bias_batch,
            kv_heads=kv_heads,
            group=group,
            dtype=accumulation_dtype(queries.dtype),
            precision=precision,
            tiling=tiling.choose(neighborhood, tuple(grid), batch // bias_batch, kv_heads, group, channels, additional),
        )

    @property
    def axes(self) -> tuple[TiledAxis, ...]:
        return self.tiling.axes

    @property
    def dilation(self) -> tuple[int, ...]:
        return tuple(a.axis.dilation for a in self.axes)

    @property
    def lanes(self) -> tuple[int, int, int]:
        """Batch elements, dilation groups and key heads in a block."""
        return self.tiling.batch_block, self.tiling.group_block, self.tiling.head_block

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks along batch, dilation groups, key heads and the three grid axes."""
        lanes = zip((self.batch, math.prod(self.dilation), self.kv_heads), self.lanes)
        return (*(whole // block for whole, block in lanes), *(a.tiles for a in self.axes))

    def fold_queries(self, x: jax.Array) -> jax.Array:
        """``[B, *X, Hq, C]`` to the folded layout."""
        x = x.reshape(self.batch, *self.grid, self.kv_heads, self.group, x.shape[-1])
        return self._fold(x, [a.tiles * a.tile for a in self.axes])

    def fold_keys(self, x: jax.Array) -> jax.Array:
        """``[B, *X, Hkv, C]`` to the folded layout."""
        x = x.reshape(self.batch, *self.grid, self.kv_heads, 1, x.shape[-1])
        return self._fold(x, [a.length for a in self.axes])[:, :, :, 0].astype(self.dtype)

    def fold_additional(self, x: jax.Array) -> jax.Array:
        """``[B, S, Hkv, C]`` to the folded layout."""
        return jnp.moveaxis(x, 2, 1).astype(self.dtype)

    def fold_bias(self, x: jax.Array) -> jax.Array:
        """``[Gb, Hq, 2 K0 - 1, ..]`` to the folded layout; a bias without heads stays without."""
        table = [2 * a.axis.window - 1 for a in self.axes]
        x = x.reshape(x.shape[0], *((self.kv_heads, self.group) if x.shape[1] else (0, 0)), *table)
        return jnp.pad(x, [(0, 0)] * 3 + self._bias_padding()).astype(self.dtype)

    def unfold_queries(self, x: jax.Array) -> jax.Array:
        """Outputs of :meth:`run`, ``[steps, b, n, h, g, q, C]``, to ``[B, *X, Hq, C]``."""
        tiles, channels = tuple(a.tile for a in self.axes), x.shape[-1]
        x = x.reshape(*self.counts, *self.lanes, self.group, *tiles, channels)
        x = x.transpose(0, 6, 1, 7, 2, 8, 9, 3, 10, 4, 11, 5, 12, 13)
        padded = (a.tiles * a.tile for a in self.axes)
        return self._unfold(x.reshape(self.batch, -1, self.kv_heads, self.group, *padded, channels))

    def unfold_keys(self, x: jax.Array) -> jax.Array:
        """The folded layout to ``[B, *X, Hkv, C]``."""
        return self._unfold(x[:, :, :, None])

    def unfold_additional(self, x: jax.Array) -> jax.Array:
        """The folded layout to ``[B, S, Hkv, C]``."""
        return jnp.moveaxis(x, 1, 2)

    def unfold_bias(self, x: jax.Array) -> jax.Array:
        """The folded layout to ``[Gb, Hq, 2 K0 - 1, ..]``."""
        table = [2 * a.axis.window - 1 for a in self.axes]
        for axis, (before, _) in enumerate(self._bias_padding()):
            x = lax.slice_in_dim(x, before, before + table[axis], axis=3 + axis)
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *table[3 - self.rank :])

    def run(
        self,
        function: Callable[[Block, Sequence[jax.Array]], tuple[tuple, tuple]],
        operands: Sequence[jax.Array],
        sums: Sequence[tuple[str, jax.Array]] = (),
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Evaluates a function on every block, one after the other.

        Differentiable in bounded memory: the derivative evaluates every block again.

        Args:
          function: ``(block, operands) -> (outputs, terms)``: arrays ``[b, n, h, g, q, C]``, and what the block adds to
            every sum.
          operands: folded arrays, handed to ``function``.
          sums: layout and initial value of every sum.

        Returns:
          ``(sums, outputs)``; outputs are for :meth:`unfold_queries`.
        """
        layouts = [layout for layout, _ in sums]

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def evaluate(place, operands):
            return function(Block(self, place), operands)

        def body(totals, place):
            outputs, terms = evaluate(place, operands)
            block = Block(self, place)
            return tuple(map(block.add, layouts, totals, terms)), outputs

        return lax.scan(body, tuple(total for _, total in sums), self._places())

    def _fold(self, x, lengths):
        """``[B, X0, X1, X2, Hkv, G, C]`` to ``[B, N, Hkv, G, *lengths, C]``."""
        (d0, d1, d2), (l0, l1, l2) = self.dilation, lengths
        padding = [(0, n * d - size) for n, d, size in zip(lengths, self.dilation, self.grid)]
        x = jnp.pad(x, [(0, 0), *padding, (0, 0), (0, 0), (0, 0)])
        batch, *_, heads, group, channels = x.shape
        x = x.reshape(batch, l0, d0, l1, d1, l2, d2, heads, group, channels)
        return x.transpose(0, 2, 4, 6, 7, 8, 1, 3, 5, 9).reshape(batch, -1, heads, group, *lengths, channels)

    def _unfold(self, x):
        """``[B, N, Hkv, G, L0, L1, L2, C]`` to ``[B, *X, Hkv * G, C]``."""
        batch, _, heads, group, *lengths, channels = x.shape
        x = x.reshape(batch, *self.dilation, heads, group, *lengths, channels)
        x = x.transpose(0, 6, 1, 7, 2, 8, 3, 4, 5, 9)
        x = x.reshape(batch, *(n * d for n, d in zip(lengths, self.dilation)), heads * group, channels)
        x = x[:, : self.grid[0], : self.grid[1], : self.grid[2]]
        return x.reshape(batch, *self.grid[3 - self.rank :], heads * group, channels)

    def _places(self) -> dict[str, np.ndarray]:
        """Where every block lies, an int32 array ``[steps]`` or ``[steps, 3]`` per name. Indices are in folded arrays.

        Tables, and not arithmetic in the loop, which compilers repeat in every kernel that depends on it.
        """
        batch, group, head, *tiles = np.indices(self.counts).reshape(6, -1)
        batch, group, head = (index * size for index, size in zip((batch, group, head), self.lanes))
        padding = [before for before, _ in self._bias_padding()]
        places = {
            "lane": np.stack([batch, group, head], -1),
            "tile": np.stack(tiles, -1),
            "query": np.stack([i * a.tile for i, a in zip(tiles, self.axes)], -1),
            "slab": np.stack([a.start[i] for i, a in zip(tiles, self.axes)], -1),
            "bias_batch": batch // (self.batch // self.bias_batch),
            "bias": np.stack([a.bias_start[i] + p for i, a, p in zip(tiles, self.axes, padding)], -1),
        }
        return {name: place.astype(np.int32) for name, place in places.items()}

    def _windows(self, axis: int) -> np.ndarray:
        """int32 ``[tiles, N or 1, tile, 2]``: in keys of the slab, the window ``[begin, end)`` of every query.

        One row for all dilation groups if they are equally long.
        """
        tiled = self.axes[axis]
        windows = np.stack([tiled.begin, tiled.end], -1) - tiled.start[:, None, None]
        if len(windows) > 1:
            group = np.indices(self.dilation).reshape(3, -1)[axis]
            windows = windows[(group >= tiled.long_groups).astype(int)]
        return windows.swapaxes(0, 1)

    def _bias_padding(self):
        ends = (a.bias_start.max() + a.tile + a.slab - 2 * a.axis.window for a in self.axes)
        return [(max(0, -int(a.bias_start.min())), max(0, int(end))) for a, end in zip(self.axes, ends)]


class Block:
    """One step of :meth:`Blocks.run`: a tile of queries and the slab of keys that it sees, for some lanes.

    Where it lies is traced; every shape is static. Masks and indices are ``[n or 1, 1, 1, q, k]`` and broadcast against
    scores ``[b, n, h, g, q, k]``.
    """

    def __init__(self, blocks: Blocks, place: dict[str, jax.Array]):
        self._blocks = blocks
        self._place = place

    def take(self, layout: str, array: jax.Array) -> jax.Array:
        """This block's part of a folded array, in the accumulation dtype.

        Queries become ``[b, n, h, g, q, C]``, keys ``[b, n, h, k, C]``, additional keys ``[b, h, s, C]`` and the bias,
        one entry per pair, ``[h, g, q, k]``.
        """
        start, size = self._span(layout, array)
        part = lax.dynamic_slice(array, start, size, allow_negative_indices=False).astype(self._blocks.dtype)
        if layout == QUERIES:
            return part.reshape(*size[:4], -1, size[-1])
        if layout == KEYS:
            return part.reshape(*size[:3], -1, size[-1])
        if layout == BIAS:
            return self._expand_diagonals(part[0])
        return part

    def add(self, layout: str, total: jax.Array, term: jax.Array) -> jax.Array:
        """Adds this block's term, shaped as :meth:`take` returns it, to a folded sum."""
        start, size = self._span(layout, total)
        if layout == BIAS:
            term = self._sum_diagonals(term)
        # One window of a scatter, and not a dynamic_update_slice, since its transpose copies no whole array.
        dims = tuple(range(total.ndim))
        return lax.scatter_add(
            total,
            jnp.stack(start),
            term.reshape(size),
            lax.ScatterDimensionNumbers(dims, (), dims),
            indices_are_sorted=True,
            unique_indices=True,
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )

    def einsum(self, subscripts: str, *operands: jax.Array) -> jax.Array:
        """``jnp.einsum`` in the precision asked for."""
        return jnp.einsum(subscripts, *operands, precision=self._blocks.precision)

    def contract(self, subscripts: str, weights: jax.Array, values: jax.Array) -> jax.Array:
        """``einsum(subscripts, weights, values)`` over the pairs of the mask, see :func:`contract`."""
        return contract(subscripts, weights, values, self.mask, self._blocks.precision)

    def sum_over_queries(self, weights: jax.Array, queries: jax.Array) -> jax.Array:
        """``einsum("bnhgqs,bnhgqd->bhsd", ...)`` in two stages: one long sum would lose too many roundings."""
        count = weights.shape[4]
        length = max(n for n in range(1, min(count, 32) + 1) if count % n == 0)
        split = (*weights.shape[:4], count // length, length, -1)
        parts = self.einsum("bnhgcqs,bnhgcqd->bnhgcsd", weights.reshape(split), queries.reshape(split))
        return parts.sum((1, 3, 4))

    @functools.cached_property
    def inside(self) -> jax.Array:
        """``[n or 1, 1, 1, q, 1]``: the query is a position of the grid and not padding."""
        return self._combine([(end > begin)[..., None] for begin, end in self._bounds], jnp.logical_and)

    @functools.cached_property
    def mask(self) -> jax.Array:
        """``[n or 1, 1, 1, q, k]``: the query sees the key."""
        factors = []
        for axis, (begin, end) in zip(self._blocks.axes, self._bounds):
            key = np.arange(axis.slab, dtype=np.int32)
            factors.append((key >= begin[..., None]) & (key < end[..., None]))
        return self._combine(factors, jnp.logical_and)

    @functools.cached_property
    def slot_of_key(self) -> jax.Array:
        """``[n or 1, 1, 1, q, k]``: window slot of a key; any slot where the mask is False."""
        slots = []
        for axis, (begin, _) in zip(self._blocks.axes, self._bounds):
            key = np.arange(axis.slab, dtype=np.int32)
            slots.append(jnp.clip(key - begin[..., None], 0, axis.axis.window - 1))
        return self._combine(slots, jnp.add, [a.axis.window for a in self._blocks.axes])

    @functools.cached_property
    def key_of_slot(self) -> jax.Array:
        """``[n or 1, 1, 1, q, slots]``: key in the slab of a window slot; any key where the slot is masked."""
        keys = []
        for axis, (begin, _) in zip(self._blocks.axes, self._bounds):
            slot = np.arange(axis.axis.window, dtype=np.int32)
            keys.append(jnp.clip(begin[..., None] + slot, 0, axis.slab - 1))
        return self._combine(keys, jnp.add, [a.slab for a in self._blocks.axes])

    @functools.cached_property
    def slot_mask(self) -> jax.Array:
        """``[n or 1, 1, 1, q, slots]``: the slot holds a key that the query sees. False past a causal query."""
        factors = []
        for axis, (begin, end) in zip(self._blocks.axes, self._bounds):
            slot = np.arange(axis.axis.window, dtype=np.int32)
            factors.append(begin[..., None] + slot < end[..., None])
        return self._combine(factors, jnp.logical_and)

    @functools.cached_property
    def _bounds(self):
        """Per axis ``(begin, end)``, ``[n or 1, tile]``: windows of the tile's queries in keys of the slab."""
        bounds = []
        for axis in range(3):
            table = jnp.asarray(self._blocks._windows(axis))
            _, groups, tile, _ = table.shape
            group, size = (0, 1) if groups == 1 else (self._place["lane"][1], self._blocks.lanes[1])
            start = [jnp.asarray(i, jnp.int32) for i in (self._place["tile"][axis], group, 0, 0)]
            window = lax.dynamic_slice(table, start, (1, size, tile, 2), allow_negative_indices=False)[0]
            bounds.append((window[..., 0], window[..., 1]))
        return bounds

    @staticmethod
    def _combine(factors, operation, lengths=None):
        """Arrays ``[n or 1, t_a, x_a]`` of the three axes to one, ``[n or 1, 1, 1, t0 t1 t2, x0 x1 x2]``.

        Given ``lengths``, they are indices into axes of these lengths and are combined to row-major ones.
        """
        spread = []
        for axis, x in enumerate(factors):
            shape = [x.shape[0], 1, 1, 1, 1, 1, 1]
            shape[1 + axis], shape[4 + axis] = x.shape[1:]
            stride = 1 if lengths is None else math.prod(lengths[axis + 1 :])
            spread.append((x if stride == 1 else x * stride).reshape(shape))
        full = functools.reduce(operation, spread)
        n, *rest = full.shape
        return full.reshape(n, 1, 1, math.prod(rest[:3]), math.prod(rest[3:]))

    def _span(self, layout, array):
        """Start and size of this block's part of a folded array."""
        blocks, axes, place = self._blocks, self._blocks.axes, self._place
        b, n, h = blocks.lanes
        zero = jnp.zeros((), jnp.int32)
        batch, group, head = place["lane"]
        if layout == QUERIES:
            start = (batch, group, head, zero, *place["query"], zero)
            size = (b, n, h, blocks.group, *(a.tile for a in axes), array.shape[-1])
        elif layout == KEYS:
            start = (batch, group, head, *place["slab"], zero)
            size = (b, n, h, *(a.slab for a in axes), array.shape[-1])
        elif layout == ADDITIONAL:
            start = (batch, head, zero, zero)
            size = (b, h, *array.shape[2:])
        else:
            start = (place["bias_batch"], head, zero, *place["bias"])
            size = (1, h, blocks.group, *(a.tile + a.slab - 1 for a in axes))
        return start, size

    def _expand_diagonals(self, x):
        """Bias ``[h, g, *(t_a + u_a - 1)]`` to pairs ``[h, g, q, k]``: pair (i, j) reads entry j - i + t_a - 1.

        Reads it by reshaping rows of length c + 1 to rows of length c, which shifts every row by one. Nothing is
        gathered or multiplied, so gradients are deterministic and NaN stays in its own pairs.
        """
        for axis in self._blocks.axes:
            t, u = axis.tile, axis.slab
            c = t + u - 1
            x = jnp.moveaxis(x, 2, -1)
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
            x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], t, c + 1))
            x = x.reshape(*x.shape[:-2], t * (c + 1))[..., : t * c].reshape(*x.shape[:-2], t, c)[..., t - 1 :]
        h, g, t0, u0, t1, u1, t2, u2 = x.shape
        return x.transpose(0, 1, 2, 4, 6, 3, 5, 7).reshape(h, g, t0 * t1 * t2, u0 * u1 * u2)

    def _sum_diagonals(self, x):
        """The transpose of :meth:`_expand_diagonals`."""
        axes = self._blocks.axes
        x = x.reshape(*x.shape[:2], *(a.tile for a in axes), *(a.slab for a in axes))
        x = x.transpose(0, 1, 2, 5, 3, 6, 4, 7)
        for axis in reversed(axes):
            t, c = axis.tile, axis.tile + axis.slab - 1
            unpadded = [(0, 0)] * (x.ndim - 2)
            x = jnp.pad(x, [*unpadded, (0, 0), (t - 1, 0)]).reshape(*x.shape[:-2], t * c)
            x = jnp.pad(x, [*unpadded, (0, t)]).reshape(*x.shape[:-1], t, c + 1).sum(-2)[..., :c]
            x = jnp.moveaxis(x, -1, 2)
        return x


def contract(
    subscripts: str, weights: jax.Array, values: jax.Array, mask: jax.Array, precision: lax.Precision
) -> jax.Array:
    """``einsum(subscripts, weights, values)`` in which pairs outside the mask do not count, whatever ``values`` holds.

    ``weights`` must be zero outside the mask. Zero times infinity would be NaN, so non-finite values are set to zero
    here, and what they contribute inside the mask is added afterwards, without a derivative.
    """
    finite = jnp.isfinite(values)
    product = jnp.einsum(subscripts, weights, jnp.where(finite, values, 0), precision=precision)
    operands = map(lax.stop_gradient, (weights, values, mask))
    return product + lax.cond(
        jnp.all(finite),
        lambda *_: jnp.zeros_like(product),
        functools.partial(_non_finite_terms, subscripts),
        *operands,
    )


def _non_finite_terms(subscripts, weights, values, mask):
    """The sum of those terms whose value is not finite. A reduction that XLA fuses: no term is stored."""
    inputs, result = subscripts.split("->")
    letters = (*result, *sorted(set(inputs) - set(result) - {","}))

    def spread(x, names):
        x = x.transpose(sorted(range(x.ndim), key=lambda i: letters.index(names[i])))
        sizes = iter(x.shape)
        return x.reshape([next(sizes) if letter in names else 1 for letter in letters])

    names = inputs.split(",")
    weights, values, mask = spread(weights, names[0]), spread(values, names[1]), spread(mask[None], names[0])
    terms = jnp.where(mask & ~jnp.isfinite(values), weights * values, 0)
    return terms.sum(tuple(range(len(result), len(letters))))
