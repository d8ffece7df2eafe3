// The loops that all operations share: over a box's columns, panel by panel, and over its rows, tile by tile.
//
// An operation is a `Body` with
//   void pack(const Panel&)                      pack these columns
//   bool has_nonfinite()                         whether a packed column holds an infinity or a NaN
//   void begin_line(const Line&)                 rows of a line of the box come next
//   template <int rows> void tile(const Step&)   the products of a tile of rows and some lines of columns
// Adjacent rows share most of their columns, so a tile multiplies its rows with the union of their columns on the
// innermost axis, and takes products of a row with columns outside its own window for zeros. That is right unless the
// columns hold infinities or NaNs: then tiles are single rows, which have no such columns.
#pragma once

#include "arena.h"
#include "boxes.h"
#include "matmul.h"
#include "storage.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// Columns to pack: a block of in-group coordinates, or of additional columns (the first two axes are then trivial).
struct Panel {
  bool additional;
  int begin[kMaxRank], end[kMaxRank];

  JAX_NATTEN_INLINE int extent(int axis) const { return end[axis] - begin[axis]; }
  JAX_NATTEN_INLINE int lines() const { return extent(0) * extent(1); }
};

// Rows that differ on the innermost axis only (and in their head, if several share the columns).
struct Line {
  int i0, i1;
  int index;  // of the line in its box
};

struct ColumnLine {
  int slot;    // of the line in the panel
  int j0, j1;  // in-group coordinates
};

struct Step {
  const Line* line;
  bool additional;
  int row;                    // first row of the tile in its line
  const ColumnLine* columns;  // the lines of the step
  int line_count;
  int first;                             // first column, counted in the panel
  int position;                          // its in-group coordinate
  int count;                             // columns per line: the union of the rows' columns
  int begin[kTileRows], end[kTileRows];  // each row's columns in the union
};

// A tile of the plan for the lines of a box: rows and the union of their columns on the innermost axis.
struct Tile {
  int row, rows;
  Interval columns;
};

template <bool inverse, typename Real, typename Body>
class Sweep {
 public:
  // `heads` rows, one per head, share the columns of each position of a line.
  Sweep(const Neighborhood& neighborhood, const Boxes& boxes, int heads, Arena& arena)
      : neighborhood_(neighborhood), boxes_(boxes), heads_(heads) {
    const int64_t rows = int64_t(boxes.size[2]) * heads;
    columns_ = arena.take<Interval>(rows);
    tiles_ = arena.take<Tile>(rows);
    lines_ = arena.take<ColumnLine>(int64_t(boxes.panel[0]) * boxes.panel[1]);
  }

  // Reals that a row of products of one step can have.
  static JAX_NATTEN_INLINE int64_t step_width(const Boxes& boxes) {
    return int64_t(boxes.step_lines) * padded<Real>(boxes.panel[2]);
  }

  void begin_box(const Box& box) {
    box_ = &box;
    int rows = 0;
    for (int i = box.begin[2]; i < box.end[2]; ++i) {
      const Interval columns = columns_of_row<inverse>(neighborhood_.axes[2], i, box.length[2]);
      for (int head = 0; head < heads_; ++head) columns_[rows++] = columns;
    }
    tile_count_ = 0;
    for (int row = 0; row < rows;) {
      const Tile tile = best_tile(row, rows);
      tiles_[tile_count_++] = tile;
      row += tile.rows;
    }
  }

  // Sums over the neighborhoods of the box's rows.
  void neighbors(Body& body) {
    const Box& box = *box_;
    Interval all[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) {
      all[a] = {columns_of_row<inverse>(neighborhood_.axes[a], box.begin[a], box.length[a]).begin,
                columns_of_row<inverse>(neighborhood_.axes[a], box.end[a] - 1, box.length[a]).end};
    }
    Panel panel;
    panel.additional = false;
    const int* size = boxes_.panel;
    for (int p0 = all[0].begin; p0 < all[0].end; p0 += size[0]) {
      panel.begin[0] = p0;
      panel.end[0] = imin(p0 + size[0], all[0].end);
      for (int p1 = all[1].begin; p1 < all[1].end; p1 += size[1]) {
        panel.begin[1] = p1;
        panel.end[1] = imin(p1 + size[1], all[1].end);
        for (int p2 = all[2].begin; p2 < all[2].end; p2 += size[2]) {
          panel.begin[2] = p2;
          panel.end[2] = imin(p2 + size[2], all[2].end);
          body.pack(panel);
          neighbors_in_panel(body, panel);
        }
      }
    }
  }

  // Sums over the additional columns, which all rows see.
  void additional(Body& body, int count) {
    for (int first = 0; first < count; first += boxes_.panel[2]) {
      const Panel panel = {true, {0, 0, first}, {1, 1, imin(first + boxes_.panel[2], count)}};
      body.pack(panel);
      lines_[0] = {0, 0, 0};
      Line line = {0, 0, 0};
      for (line.i0 = box_->begin[0]; line.i0 < box_->end[0]; ++line.i0) {
        for (line.i1 = box_->begin[1]; line.i1 < box_->end[1]; ++line.i1, ++line.index) {
          body.begin_line(line);
          tiles(body, panel, line, 1);
        }
      }
    }
  }

 private:
  // Takes as many rows together as is cheapest per row: the more rows, the more columns are not shared by all.
  Tile best_tile(int row, int rows) const {
    Tile best = {};
    float best_cost = 0;
    for (int count = 1; count <= kTileRows && row + count <= rows; count *= 2) {
      const Tile tile = {row, count, {columns_[row].begin, columns_[row + count - 1].end}};
      const int summed = imin(count, kAccumulateRows);
      const int products = padded<Real>(tile.columns.end - tile.columns.begin);
      const int sums = columns_[row + summed - 1].end - tile.columns.begin;
      const float cost = count == 1 ? 1.5f * products + 1.8f * sums : (count == 2 ? 1.05f : 1.0f) * products + sums;
      if (best.rows == 0 || cost <= best_cost) {
        best = tile;
        best_cost = cost;
      }
    }
    return best;
  }

  void neighbors_in_panel(Body& body, const Panel& panel) {
    const Box& box = *box_;
    Line line = {0, 0, 0};
    for (line.i0 = box.begin[0]; line.i0 < box.end[0]; ++line.i0) {
      const Interval c0 = columns_of_row<inverse>(neighborhood_.axes[0], line.i0, box.length[0]);
      for (line.i1 = box.begin[1]; line.i1 < box.end[1]; ++line.i1, ++line.index) {
        const Interval c1 = columns_of_row<inverse>(neighborhood_.axes[1], line.i1, box.length[1]);
        int count = 0;
        for (int j0 = imax(c0.begin, panel.begin[0]); j0 < imin(c0.end, panel.end[0]); ++j0) {
          for (int j1 = imax(c1.begin, panel.begin[1]); j1 < imin(c1.end, panel.end[1]); ++j1) {
            const int slot = (j0 - panel.begin[0]) * panel.extent(1) + j1 - panel.begin[1];
            lines_[count++] = {slot, j0, j1};
          }
        }
        if (count == 0) continue;
        body.begin_line(line);
        tiles(body, panel, line, count);
      }
    }
  }

  // All tiles of a line of rows with the first `count` of lines_. Tiles in the inner loop: neighboring tiles find the
  // columns that they share in the first-level cache.
  void tiles(Body& body, const Panel& panel, const Line& line, int count) {
    const bool single_rows = body.has_nonfinite() && !panel.additional;
    Step step;
    step.line = &line;
    step.additional = panel.additional;
    int steps = (count + boxes_.step_lines - 1) / boxes_.step_lines;
    for (int done = 0; done < count; --steps) {
      step.columns = lines_ + done;
      step.line_count = (count - done + steps - 1) / steps;
      done += step.line_count;
      if (single_rows) {
        for (int row = 0; row < box_->extent(2) * heads_; ++row) tile(body, panel, step, {row, 1, columns_[row]});
      } else {
        for (int t = 0; t < tile_count_; ++t) tile(body, panel, step, tiles_[t]);
      }
    }
  }

  void tile(Body& body, const Panel& panel, Step& step, const Tile& tile) {
    const Interval in_panel = {panel.begin[2], panel.end[2]};
    const Interval all = panel.additional ? in_panel : intersect(tile.columns, in_panel);
    if (all.begin >= all.end) return;
    step.row = tile.row;
    step.position = all.begin;
    step.first = all.begin - panel.begin[2];
    step.count = all.end - all.begin;
    for (int r = 0; r < tile.rows; ++r) {
      const Interval own = panel.additional ? all : columns_[tile.row + r];
      step.begin[r] = imin(imax(own.begin, all.begin), all.end) - all.begin;
      step.end[r] = imin(imax(own.end, all.begin), all.end) - all.begin;
    }
    if (tile.rows == 4) {
      body.template tile<4>(step);
    } else if (tile.rows == 2) {
      body.template tile<2>(step);
    } else {
      body.template tile<1>(step);
    }
  }

  static JAX_NATTEN_INLINE Interval intersect(Interval a, Interval b) {
    return {imax(a.begin, b.begin), imin(a.end, b.end)};
  }

  const Neighborhood& neighborhood_;
  const Boxes& boxes_;
  const Box* box_ = nullptr;
  int heads_;
  Interval* columns_;  // of each row of a line
  Tile* tiles_;
  int tile_count_ = 0;
  ColumnLine* lines_;
};

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
