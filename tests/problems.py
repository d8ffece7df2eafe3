"""The one table of named problems, shared by the tests and the benchmarks. Imports neither JAX nor the package.

``HARD`` are window problems that have broken kernels: odd remainders, windows as long as the axis, strides that do not
divide, dilations that leave ragged groups. ``HARD_SMALL`` keeps their structure at a size that a CPU and a float64
oracle take in a moment; the tests run each with every combination of causal axes. The other tables are the attention
layers of published models.
"""

from __future__ import annotations

import dataclasses
import itertools
import math


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and window of one neighborhood attention call."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def rank(self) -> int:
        return len(self.grid)

    @property
    def positions(self) -> int:
        return math.prod(self.grid)

    @property
    def window(self) -> dict:
        """Keyword arguments of the public functions that say which keys a query sees."""
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
        }

    def with_causal(self, is_causal: tuple[bool, ...]) -> Problem:
        suffix = "".join("nc"[c] for c in is_causal)
        return dataclasses.replace(self, name=f"{self.name}-{suffix}", is_causal=tuple(is_causal))

    def every_causal(self) -> list[Problem]:
        """This problem with every combination of causal axes."""
        return [self.with_causal(c) for c in itertools.product((False, True), repeat=self.rank)]


def problem(name, batch, heads, kv_heads, dim, grid, kernel_size, stride=1, dilation=1, is_causal=False) -> Problem:
    """A problem whose window arguments may be scalars."""

    def per_axis(value):
        return tuple(value) if isinstance(value, list | tuple) else (value,) * len(grid)

    return Problem(
        name,
        batch,
        heads,
        kv_heads,
        dim,
        tuple(grid),
        per_axis(kernel_size),
        per_axis(stride),
        per_axis(dilation),
        per_axis(is_causal),
    )


def _table(*rows) -> dict[str, Problem]:
    table = {row[0]: problem(*row) for row in rows}
    assert len(table) == len(rows), "two problems share a name"
    return table


# Columns: name, batch, heads, kv_heads, dim, grid, kernel_size, stride, dilation[, is_causal].
HARD = _table(
    ("1d_almost_dense", 4, 3, 1, 128, [256], [255], [82], [1]),
    ("1d_half_window", 2, 4, 2, 128, [128], [63], [31], [1]),
    ("1d_tiny_window_dilated", 1, 1, 1, 32, [128], [3], [2], [10]),
    ("1d_stride_below_window", 1, 1, 1, 64, [128], [8], [7], [5]),
    ("1d_short", 1, 1, 1, 32, [17], [12], [1], [1]),
    ("1d_stride_127", 1, 1, 1, 128, [256], [128], [127], [1]),
    ("1d_sliding", 1, 2, 2, 64, [125], [15], [1], [1]),
    ("1d_groups_of_one", 1, 1, 1, 24, [7], [1], [1], [7]),
    ("1d_one_block", 2, 2, 1, 40, [33], [33], [33], [1]),
    ("2d_one_axis_blocked", 1, 4, 1, 32, [5, 25], [5, 16], [1, 16], [1, 1]),
    ("2d_one_axis_dilated", 1, 1, 1, 32, [84, 19], [7, 3], [1, 1], [5, 1]),
    ("2d_even_ragged", 1, 1, 1, 128, [19, 29], [8, 8], [1, 1], [2, 3]),
    ("2d_exact_fit", 1, 1, 1, 128, [48, 17], [24, 16], [1, 1], [2, 1]),
    ("2d_everything", 1, 1, 1, 128, [67, 80], [12, 7], [8, 4], [5, 11]),
    ("2d_blocked", 1, 1, 1, 128, [44, 80], [24, 16], [8, 16], [1, 1]),
    ("2d_dense_strided", 1, 1, 1, 64, [36, 40], [36, 40], [12, 13], [1, 1]),
    ("2d_grouped_heads", 1, 12, 4, 64, [17, 16], [3, 8], [1, 2], [1, 1]),
    ("2d_almost_dense", 2, 4, 4, 56, [32, 32], [31, 31], [1, 1], [1, 1]),
    ("2d_sliding", 1, 2, 2, 88, [28, 46], [11, 13], [1, 1], [1, 1]),
    ("3d_small_window", 1, 4, 1, 32, [8, 8, 16], [3, 3, 3], [2, 1, 2], [2, 2, 4]),
    ("3d_large_window", 1, 1, 1, 64, [18, 37, 12], [14, 16, 12], [12, 8, 1], [1, 2, 1]),
    ("3d_odd_everything", 1, 1, 1, 64, [13, 11, 9], [3, 4, 3], [2, 3, 3], [3, 2, 2]),
    ("3d_long", 2, 3, 3, 64, [57, 20, 88], [19, 4, 6], [13, 1, 6], [2, 2, 7]),
    ("3d_many_groups", 1, 1, 1, 64, [30, 48, 18], [3, 2, 8], [1, 1, 1], [8, 18, 2]),
    ("3d_almost_dense", 1, 1, 1, 64, [8, 4, 8], [7, 3, 7], [1, 1, 1], [1, 1, 1]),
    ("3d_mixed", 1, 2, 1, 64, [68, 64, 8], [14, 32, 2], [3, 4, 1], [1, 2, 3]),
)

# The same problems with fewer channels and heads; the few whose grids are too large for a dense float64 oracle keep
# the parity of their windows, the remainders of their strides and the raggedness of their dilation groups.
HARD_SMALL = _table(
    ("1d_almost_dense", 2, 3, 1, 17, [256], [255], [82], [1]),
    ("1d_half_window", 2, 4, 2, 32, [128], [63], [31], [1]),
    ("1d_tiny_window_dilated", 1, 2, 1, 5, [128], [3], [2], [10]),
    ("1d_stride_below_window", 1, 1, 1, 64, [128], [8], [7], [5]),
    ("1d_short", 3, 1, 1, 1, [17], [12], [1], [1]),
    ("1d_stride_127", 1, 1, 1, 128, [256], [128], [127], [1]),
    ("1d_sliding", 1, 2, 2, 40, [125], [15], [1], [1]),
    ("1d_groups_of_one", 1, 3, 1, 24, [7], [1], [1], [7]),
    ("1d_one_block", 2, 2, 1, 33, [33], [33], [33], [1]),
    ("2d_one_axis_blocked", 1, 4, 1, 16, [5, 25], [5, 16], [1, 16], [1, 1]),
    ("2d_one_axis_dilated", 1, 1, 1, 7, [84, 19], [7, 3], [1, 1], [5, 1]),
    ("2d_even_ragged", 2, 2, 2, 8, [19, 29], [8, 8], [1, 1], [2, 3]),
    ("2d_exact_fit", 1, 1, 1, 24, [48, 17], [24, 16], [1, 1], [2, 1]),
    ("2d_everything", 1, 1, 1, 12, [67, 80], [12, 7], [8, 4], [5, 11]),
    ("2d_blocked", 1, 1, 1, 16, [22, 24], [12, 8], [4, 8], [1, 1]),
    ("2d_dense_strided", 1, 1, 1, 8, [24, 28], [24, 28], [8, 9], [1, 1]),
    ("2d_grouped_heads", 1, 6, 2, 11, [17, 16], [3, 8], [1, 2], [1, 1]),
    ("2d_almost_dense", 1, 2, 2, 7, [18, 18], [17, 17], [1, 1], [1, 1]),
    ("2d_sliding", 1, 2, 2, 22, [17, 29], [11, 13], [1, 1], [1, 1]),
    ("3d_small_window", 1, 4, 1, 8, [8, 8, 16], [3, 3, 3], [2, 1, 2], [2, 2, 4]),
    ("3d_large_window", 1, 1, 1, 8, [10, 19, 6], [8, 8, 6], [6, 4, 1], [1, 2, 1]),
    ("3d_odd_everything", 2, 1, 1, 9, [13, 11, 9], [3, 4, 3], [2, 3, 3], [3, 2, 2]),
    ("3d_long", 1, 1, 1, 6, [27, 9, 19], [9, 4, 6], [7, 1, 6], [2, 2, 3]),
    ("3d_many_groups", 1, 1, 1, 8, [14, 22, 18], [3, 2, 8], [1, 1, 1], [4, 9, 2]),
    ("3d_almost_dense", 1, 1, 1, 16, [8, 4, 8], [7, 3, 7], [1, 1, 1], [1, 1, 1]),
    ("3d_mixed", 1, 2, 1, 4, [13, 17, 8], [8, 8, 2], [3, 4, 1], [1, 2, 3]),
)

# Cases beyond the table that once failed or sit on an edge of the definition.
EDGE = _table(
    ("1d_single_position", 2, 2, 2, 4, [1], [1], [1], [1]),
    ("1d_window_one", 1, 2, 1, 8, [19], [1], [1], [1]),
    ("1d_window_two_dilated", 1, 1, 1, 3, [13], [2], [2], [6]),
    ("1d_blocked", 1, 2, 2, 8, [24], [6], [6], [1]),
    ("2d_axis_of_one", 1, 2, 1, 8, [1, 9], [1, 5], [1, 2], [1, 1]),
    ("2d_window_one_and_all", 1, 1, 1, 5, [7, 6], [1, 6], [1, 1], [3, 1]),
    ("3d_axes_of_one", 2, 1, 1, 6, [1, 7, 1], [1, 3, 1], [1, 3, 1], [1, 2, 1]),
    ("3d_single_position", 1, 1, 1, 1, [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]),
    ("1d_many_query_heads", 1, 8, 1, 16, [21], [5], [1], [2]),
)

LARGE = _table(
    ("flux_s1", 1, 24, 24, 128, [256, 256], [80, 80], [1, 1], [1, 1]),
    ("flux_s16", 1, 24, 24, 128, [256, 256], [80, 80], [16, 16], [1, 1]),
    ("hunyuan_s1", 1, 24, 24, 128, [30, 48, 80], [18, 24, 24], [1, 1, 1], [1, 1, 1]),
    ("hunyuan_s16_8_8", 1, 24, 24, 128, [30, 48, 80], [18, 24, 24], [16, 8, 8], [1, 1, 1]),
    ("cosmos_s1", 1, 32, 32, 128, [16, 44, 80], [16, 24, 16], [1, 1, 1], [1, 1, 1]),
    ("cosmos_s1_8_16", 1, 32, 32, 128, [16, 44, 80], [16, 24, 16], [1, 8, 16], [1, 1, 1]),
    ("cosmos_w16_32_48", 1, 32, 32, 128, [16, 44, 80], [16, 32, 48], [1, 1, 1], [1, 1, 1]),
    ("cosmos2_s1_4_8", 1, 16, 16, 128, [16, 44, 80], [16, 12, 24], [1, 4, 8], [1, 1, 1]),
    ("seq32k_w2048", 1, 16, 16, 128, [32768], [2048], [1], [1]),
    ("seq32k_w2048_s256", 1, 16, 16, 128, [32768], [2048], [256], [1]),
    ("seq32k_w2048_causal", 1, 16, 16, 128, [32768], [2048], [1], [1], True),
    ("seq32k_gqa8", 1, 32, 4, 128, [32768], [2048], [1], [1], True),
    ("dense16k_d128", 1, 16, 16, 128, [16384], [16384], [1], [1]),
    ("dense16k_d64", 1, 32, 32, 64, [16384], [16384], [1], [1]),
)

SMALL = _table(
    ("nat_56", 128, 2, 2, 32, [56, 56], [7, 7], [1, 1], [1, 1]),
    ("nat_28", 128, 4, 4, 32, [28, 28], [7, 7], [1, 1], [1, 1]),
    ("nat_14", 128, 8, 8, 32, [14, 14], [7, 7], [1, 1], [1, 1]),
    ("nat_7", 128, 16, 16, 32, [7, 7], [7, 7], [1, 1], [1, 1]),
    ("dinat_56_d8", 128, 2, 2, 32, [56, 56], [7, 7], [1, 1], [8, 8]),
    ("dinat_28_d4", 128, 4, 4, 32, [28, 28], [7, 7], [1, 1], [4, 4]),
    ("hdit_64_k13", 32, 8, 8, 64, [64, 64], [13, 13], [1, 1], [1, 1]),
    ("hdit_64_k13_d4", 32, 8, 8, 64, [64, 64], [13, 13], [1, 1], [4, 4]),
    ("seq4k_w127", 8, 16, 16, 64, [4096], [127], [1], [1]),
    ("weather", 1, 6, 6, 32, [14, 90, 180], [5, 7, 7], [1, 1, 1], [1, 1, 1]),
    ("vae_k3_7_7", 1, 16, 16, 64, [21, 34, 60], [3, 7, 7], [1, 1, 1], [1, 1, 1]),
)

UNFUSED = _table(
    ("seq", 8, 4, 4, 32, [8192], [63], [1], [1]),
    ("seq_d8", 8, 4, 4, 32, [8192], [63], [1], [8]),
    ("plane_k7", 16, 4, 4, 32, [56, 56], [7, 7], [1, 1], [1, 1]),
    ("plane_k13", 16, 4, 4, 32, [56, 56], [13, 13], [1, 1], [1, 1]),
    ("plane_k25", 4, 4, 4, 64, [64, 64], [25, 25], [1, 1], [1, 1]),
    ("volume_k3", 4, 4, 4, 32, [16, 28, 28], [3, 3, 3], [1, 1, 1], [1, 1, 1]),
    ("volume_k5_7_7", 1, 4, 4, 32, [14, 90, 90], [5, 7, 7], [1, 1, 1], [1, 1, 1]),
)

# What benchmarks/cpu.py compares, float32.
CPU = _table(
    ("plane_64_k7", 1, 4, 4, 32, [64, 64], [7, 7], [1, 1], [1, 1]),
    ("plane_32_k13_d2", 1, 4, 4, 64, [32, 32], [13, 13], [1, 1], [2, 2]),
    ("seq_4096_k63", 1, 4, 4, 64, [4096], [63], [1], [1]),
    ("volume_8_32_32_k3_7_7", 1, 4, 4, 32, [8, 32, 32], [3, 7, 7], [1, 1, 1], [1, 1, 1]),
)
