// The relative position bias of a head, [2 K0 - 1, 2 K1 - 1, 2 K2 - 1]: entry (key - query) + K - 1 on each axis.
#pragma once

#include "sweep.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

class BiasTable {
 public:
  explicit BiasTable(const Neighborhood& neighborhood)
      : size_(neighborhood.bias_size()),
        extent1_(2 * neighborhood.axes[1].window - 1),
        extent2_(2 * neighborhood.axes[2].window - 1),
        center_((int64_t(neighborhood.axes[0].window - 1) * extent1_ + neighborhood.axes[1].window - 1) * extent2_ +
                neighborhood.axes[2].window - 1) {}

  // Entry of the key that is this far from the query.
  JAX_NATTEN_INLINE int64_t entry(int d0, int d1, int d2) const {
    return center_ + (int64_t(d0) * extent1_ + d1) * extent2_ + d2;
  }

  JAX_NATTEN_INLINE int64_t size() const { return size_; }

  // Adds the bias to the scores of row `r` of a tile and the columns in its window. `row` is the row's in-group
  // coordinate on the innermost axis, `table` the table of its head.
  template <bool inverse, typename Real>
  JAX_NATTEN_INLINE void add_to(const Step& step, int r, int row, const Real* table, Real* s, int line_stride) const {
    for (int l = 0; l < step.line_count; ++l, s += line_stride) {
      const ColumnLine& column = step.columns[l];
      const int d0 = column.j0 - step.line->i0, d1 = column.j1 - step.line->i1, d2 = step.position - row;
      const Real* bias = table + (inverse ? entry(-d0, -d1, -d2) : entry(d0, d1, d2));
      for (int n = step.begin[r]; n < step.end[r]; ++n) s[n] += bias[inverse ? -n : n];
    }
  }

  // Adds gradients with respect to the scores to the gradient of the table. Rows are queries.
  template <typename Real>
  JAX_NATTEN_INLINE void add_gradient(const Step& step, int r, int row, const Real* ds, int line_stride,
                                      Real* d_table) const {
    for (int l = 0; l < step.line_count; ++l, ds += line_stride) {
      const ColumnLine& column = step.columns[l];
      Real* d_bias = d_table + entry(column.j0 - step.line->i0, column.j1 - step.line->i1, step.position - row);
      for (int n = step.begin[r]; n < step.end[r]; ++n) d_bias[n] += ds[n];
    }
  }

 private:
  int64_t size_;
  int extent1_, extent2_;
  int64_t center_;
};

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
