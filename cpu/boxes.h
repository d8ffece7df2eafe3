// How the work on a grid is cut into boxes, the tasks that threads take.
//
// All coordinates are in-group indices (cuda/common/neighborhood.h): keys and queries of different dilation groups
// never meet, and inside a group there is no dilation. A box is a block of rows of one group. Rows are what an
// operation computes results for, columns what it sums over: rows are queries and columns are keys, or the other way
// round with inverse windows.
//
// Boxes depend on the problem only, never on the number of threads: results are the same bits on every run.
#pragma once

#include "cuda/common/params.h"
#include "simd.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

JAX_NATTEN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
JAX_NATTEN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
JAX_NATTEN_INLINE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Budgets, in bytes of packed columns. A panel should stay in the second-level cache of a core, what a step of tiles
// reads should about fit the first level. Rows' accumulators share the second level with the panel.
constexpr int64_t kPanelBytes = 768 << 10, kStepBytes = 24 << 10, kRowBytes = 384 << 10;
// Boxes grow, to pack fewer columns more than once, while there are more than enough of them for many threads, or
// while they hold less work (multiply-adds) than pays for being scheduled.
constexpr int64_t kEnoughBoxes = 32, kLeastWork = 1 << 20;

struct Box {
  int group[kMaxRank], length[kMaxRank];  // dilation groups and their lengths
  int begin[kMaxRank], end[kMaxRank];     // rows

  JAX_NATTEN_INLINE int extent(int axis) const { return end[axis] - begin[axis]; }
};

// Columns that `inverse ? key : query` index i of a group sees, or is seen by.
template <bool inverse>
JAX_NATTEN_INLINE Interval columns_of_row(const Axis& axis, int i, int length) {
  return inverse ? queries_of_key(axis, i, length) : window_of_query(axis, i, length);
}

// The boxes of a grid and the largest panel of columns that is packed at once. Plain data.
struct Boxes {
  int size[kMaxRank], count[kMaxRank];
  int64_t total;        // boxes per batch element and head
  int panel[kMaxRank];  // lines on axes 0 and 1, columns on axis 2
  int step_lines;       // lines that a tile takes at once
};

// What the sizes of boxes depend on besides the grid.
struct BoxCost {
  int64_t slices;        // batch elements times heads: every one has these boxes
  int64_t row_bytes;     // scratch per row position
  int64_t column_bytes;  // scratch per packed column
  int64_t row_work;      // multiply-adds per row position
  int additional;        // additional columns, packed through the same panel
};

// Positions of the union of the columns of `rows` adjacent rows; about, at the borders of a grid.
template <bool inverse>
JAX_NATTEN_INLINE int64_t columns_of_rows(const Axis& axis, int64_t rows) {
  const int64_t columns = rows + axis.window - 1 + axis.stride - 1 + (inverse ? axis.window / 2 : 0);
  return min64(group_length(axis, 0), columns);
}

template <bool inverse, typename Real>
Boxes make_boxes(const Neighborhood& neighborhood, const BoxCost& cost) {
  Boxes boxes;
  int64_t size[kMaxRank] = {1, 1, 1}, columns[kMaxRank], length[kMaxRank];
  int64_t groups = 1, rows = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    length[a] = group_length(neighborhood.axes[a], 0);
    groups *= neighborhood.axes[a].dilation;
  }
  size[2] = max64(1, min64(length[2], min64(64, kRowBytes / cost.row_bytes)));
  rows = size[2];
  const auto box_count = [&] {
    return groups * ceil_divide(length[0], size[0]) * ceil_divide(length[1], size[1]) * ceil_divide(length[2], size[2]);
  };
  const auto panel_bytes = [&] {
    int64_t bytes = cost.column_bytes;
    for (int a = 0; a < kMaxRank; ++a) bytes *= columns_of_rows<inverse>(neighborhood.axes[a], size[a]);
    return bytes;
  };
  // Grow along the axis where it saves most.
  while (true) {
    int best = -1;
    double best_ratio = 1;
    for (int a = 0; a < kMaxRank; ++a) {
      if (size[a] >= length[a]) continue;
      const int64_t before = columns_of_rows<inverse>(neighborhood.axes[a], size[a]);
      const int64_t after = columns_of_rows<inverse>(neighborhood.axes[a], 2 * size[a]);
      const double ratio = double(after) / double(2 * before);
      if (ratio < best_ratio) {
        best_ratio = ratio;
        best = a;
      }
    }
    if (best < 0) break;
    size[best] *= 2;
    const bool fits = panel_bytes() <= kPanelBytes && 2 * rows * cost.row_bytes <= kRowBytes;
    const bool enough = box_count() * cost.slices >= kEnoughBoxes || rows * cost.row_work < kLeastWork;
    if (!fits || !enough) {
      size[best] /= 2;
      break;
    }
    rows *= 2;
  }
  boxes.total = groups;
  for (int a = 0; a < kMaxRank; ++a) {
    const int64_t count = max64(1, ceil_divide(length[a], size[a]));
    boxes.size[a] = int(max64(1, ceil_divide(length[a], count)));
    boxes.count[a] = int(count);
    boxes.total *= count;
    columns[a] = columns_of_rows<inverse>(neighborhood.axes[a], boxes.size[a]);
  }

  // The panel: whole lines if they are short, and as many as fit.
  const int64_t fitting = max64(kLanes<Real>, kPanelBytes / cost.column_bytes);
  columns[2] = max64(columns[2], min64(cost.additional, 64));
  boxes.panel[2] = int(min64(columns[2] <= 192 ? columns[2] : 128, fitting));
  const int64_t lines = max64(1, fitting / boxes.panel[2]);
  boxes.panel[1] = int(ceil_divide(columns[1], ceil_divide(columns[1], lines)));
  boxes.panel[0] = int(max64(1, min64(columns[0], lines / boxes.panel[1])));
  const int64_t seen = min64(boxes.panel[2], neighborhood.axes[2].window + 1);
  boxes.step_lines = int(min64(max64(1, kStepBytes / (seen * cost.column_bytes)), 64));
  boxes.step_lines = int(min64(boxes.step_lines, max64(1, 2048 / boxes.panel[2])));
  return boxes;
}

// The box of an index below `boxes.total`. It may be empty, because some groups are shorter.
JAX_NATTEN_INLINE Box box_at(const Neighborhood& neighborhood, const Boxes& boxes, int64_t index) {
  Box box;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int block = int(index % boxes.count[a]);
    index /= boxes.count[a];
    box.group[a] = int(index % neighborhood.axes[a].dilation);
    index /= neighborhood.axes[a].dilation;
    box.length[a] = group_length(neighborhood.axes[a], box.group[a]);
    box.begin[a] = imin(block * boxes.size[a], box.length[a]);
    box.end[a] = imin(box.begin[a] + boxes.size[a], box.length[a]);
  }
  return box;
}

JAX_NATTEN_INLINE bool is_empty(const Box& box) {
  return box.begin[0] >= box.end[0] || box.begin[1] >= box.end[1] || box.begin[2] >= box.end[2];
}

// Position on the grid, flattened, of in-group coordinates.
JAX_NATTEN_INLINE int64_t position(const Neighborhood& neighborhood, const Box& box, int i0, int i1, int i2) {
  const Axis* axes = neighborhood.axes;
  const int64_t x0 = box.group[0] + int64_t(i0) * axes[0].dilation;
  const int64_t x1 = box.group[1] + int64_t(i1) * axes[1].dilation;
  const int64_t x2 = box.group[2] + int64_t(i2) * axes[2].dilation;
  return (x0 * axes[1].length + x1) * axes[2].length + x2;
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
