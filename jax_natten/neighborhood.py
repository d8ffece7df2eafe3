"""The description of a neighborhood and the window formulas.

This module and ``cuda/common/neighborhood.h`` are the only two places that know the formulas; a test compares them
exhaustively. Semantics are those of NATTEN (Hassani et al., arXiv 2403.04690; stride: arXiv 2504.16922).

Dilation splits an axis of length X into ``dilation`` groups: position x belongs to group ``x % dilation`` at in-group
index ``x // dilation``. Windows are half-open intervals of in-group indices.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence

import numpy as np

MAX_RANK = 3
# Kernels keep positions in 32-bit integers; products of sizes are 64-bit everywhere.
MAX_AXIS_LENGTH = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Neighborhood:
    """Which keys each query sees, per axis of the grid. Immutable and hashable.

    Build one with :meth:`make`, which broadcasts scalars over the axes and validates.

    Attributes:
      kernel_size: window size per axis, in keys.
      stride: queries in one block of ``stride`` share a window; 1 is a sliding window, ``kernel_size`` blocked
        attention.
      dilation: distance between neighboring keys, in positions.
      is_causal: whether a query sees only keys at or before itself on that axis.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @classmethod
    def make(
        cls,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
        rank: int | None = None,
    ) -> Neighborhood:
        """Broadcasts scalars to the rank and validates.

        Args:
          kernel_size: window size; an int (needs ``rank``, or means rank 1) or one int per axis.
          stride, dilation, is_causal: a scalar for every axis, or one value per axis.
          rank: number of grid axes (1, 2 or 3); by default the length of ``kernel_size``.

        Raises:
          TypeError: a window argument is not an integer (or a bool, for ``is_causal``).
          ValueError: wrong number of entries, values below 1, or ``stride > kernel_size``.
        """
        if rank is None:
            rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"kernel_size must have 1, 2 or 3 entries, one per axis of the grid; got {kernel_size!r}")
        made = cls(
            _integers("kernel_size", kernel_size, rank),
            _integers("stride", stride, rank),
            _integers("dilation", dilation, rank),
            _booleans("is_causal", is_causal, rank),
        )
        for axis, (window, step) in enumerate(zip(made.kernel_size, made.stride)):
            if step > window:
                raise ValueError(
                    f"stride must be at most kernel_size on every axis; got stride {step} > kernel_size {window} "
                    f"on axis {axis}"
                )
        return made

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    @property
    def window_size(self) -> int:
        """Keys in a whole window, prod(kernel_size)."""
        return math.prod(self.kernel_size)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of one head's relative position bias, 2 K - 1 per axis."""
        return tuple(2 * k - 1 for k in self.kernel_size)

    def check_grid(self, grid: Sequence) -> None:
        """Raises ValueError unless the windows fit in a grid of this shape. An empty axis always fits."""
        if len(grid) != self.rank:
            raise ValueError(f"kernel_size {self.kernel_size} needs {self.rank} grid axes; got grid {tuple(grid)}")
        for axis, (length, window, dilation) in enumerate(zip(grid, self.kernel_size, self.dilation)):
            if length and window * dilation > length:
                raise ValueError(
                    f"kernel_size * dilation must be at most the axis length; got {window} * {dilation} > {length} "
                    f"on axis {axis} of grid {tuple(grid)}"
                )
            # A symbolic length (jax.export) has no bound; the kernels look when they know it.
            if isinstance(length, int | np.integer) and length > MAX_AXIS_LENGTH:
                raise ValueError(f"axis {axis} of grid {tuple(grid)} is longer than {MAX_AXIS_LENGTH}")

    def axes(self, grid: Sequence[int]) -> tuple[Axis, ...]:
        """The axes of this neighborhood on a concrete grid."""
        return tuple(
            Axis(*values) for values in zip(grid, self.kernel_size, self.stride, self.dilation, self.is_causal)
        )

    def pairs(self, grid: Sequence[int]) -> int:
        """Number of query-key pairs on a grid: the useful work of one head of one batch element."""
        return math.prod(int((end - begin).sum()) for begin, end in (axis.window_bounds() for axis in self.axes(grid)))


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a problem: its length and its window."""

    length: int
    window: int
    stride: int
    dilation: int
    is_causal: bool

    def group_length(self, group):
        """Number of positions in a dilation group."""
        return (self.length - group + self.dilation - 1) // self.dilation

    def window_of_query(self, index, length):
        """Keys ``[begin, end)`` seen by the query at in-group ``index`` of a group of ``length``. Vectorised."""
        block = index // self.stride * self.stride
        if self.is_causal:
            leader = np.minimum(block + self.stride - 1, length - 1)
            return np.maximum(leader - self.window + 1, 0), index + 1
        leader = np.minimum(block + self.stride // 2, length - 1)
        begin = np.clip(leader - self.window // 2, 0, length - self.window)
        return begin, begin + self.window

    def queries_of_key(self, index, length):
        """Queries ``[begin, end)`` that see the key at in-group ``index``: the inverse window. Vectorised."""
        window, stride = self.window, self.stride
        if self.is_causal:
            blocks = (index + window) // stride + (index + window >= length)
            return index, np.minimum(blocks * stride, length)
        offset = stride - stride // 2 - 1
        left, right = window // 2, window // 2 + window % 2 - 1
        begin = np.where(index >= window, (index - right + offset) // stride * stride, 0)
        end = np.where(index >= length - window, length, (index + left + offset + 1) // stride * stride)
        return begin, np.minimum(end, length)

    def window_bounds(self):
        """In-group window ``(begin, end)`` of every position of the axis, two int arrays of shape ``[length]``."""
        position = np.arange(self.length)
        return self.window_of_query(position // self.dilation, self.group_length(position % self.dilation))

    def mask(self):
        """Boolean ``[length, length]``: query position x sees key position y."""
        begin, end = self.window_bounds()
        position = np.arange(self.length)
        group, index = position % self.dilation, position // self.dilation
        same_group = group[:, None] == group[None, :]
        return same_group & (index[None, :] >= begin[:, None]) & (index[None, :] < end[:, None])


def _per_axis(name: str, value, rank: int) -> tuple:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != rank:
            raise ValueError(f"{name} must be a scalar or have {rank} entries, one per axis; got {value!r}")
        return tuple(value)
    return (value,) * rank


def _integers(name: str, value, rank: int) -> tuple[int, ...]:
    values = _per_axis(name, value, rank)
    for v in values:
        if isinstance(v, bool) or not isinstance(v, numbers.Integral):
            raise TypeError(f"{name} must hold Python integers known at trace time; got {value!r}")
        if v < 1:
            raise ValueError(f"{name} must be at least 1 on every axis; got {value!r}")
    return tuple(int(v) for v in values)


def _booleans(name: str, value, rank: int) -> tuple[bool, ...]:
    values = _per_axis(name, value, rank)
    for v in values:
        if not isinstance(v, bool | np.bool_):
            raise TypeError(f"{name} must hold bools; got {value!r}")
    return tuple(bool(v) for v in values)
