// Packed columns of a panel: one tensor's rows (keys, values, ..), converted to the accumulation type and stored
// transposed for `dots`, as rows for `accumulate`, or both.
#pragma once

#include "matmul.h"
#include "rows.h"
#include "sweep.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

template <typename Real>
class Columns {
  static constexpr int W = kLanes<Real>;

 public:
  enum Layout { kTransposed = 1, kRows = 2, kBoth = 3 };

  Columns(const Boxes& boxes, int dim, Layout layout, Arena& arena)
      : layout_(layout), dim_(dim), width_(padded<Real>(dim)), capacity_(padded<Real>(boxes.panel[2])) {
    // Vectors start at any column and may run over the last one. An odd number of cache lines between the rows of a
    // transposed line spreads them over the sets of the cache.
    constexpr int kCacheLine = 64 / int(sizeof(Real));
    stride_ = ((boxes.panel[2] + W - 1 + kCacheLine - 1) / kCacheLine | 1) * kCacheLine;
    const int64_t slots = int64_t(boxes.panel[0]) * boxes.panel[1];
    if (layout & kTransposed) transposed_ = arena.take<Real>(slots * dim * stride_);
    if (layout & kRows) rows_ = arena.take<Real>(slots * capacity_ * width_);
  }

  static JAX_NATTEN_INLINE int64_t bytes_per_column(int dim, Layout layout) {
    return ((layout & kTransposed ? dim : 0) + (layout & kRows ? padded<Real>(dim) : 0)) * int64_t(sizeof(Real));
  }

  JAX_NATTEN_INLINE void begin_panel() { finite_ = true; }

  // Packs one line, times `factor`: `count` columns, the first at element `offset` of the tensor, `stride` elements
  // apart. The line at `next` will be packed next.
  void pack(const Tensor& tensor, int slot, int64_t offset, int64_t next, int64_t stride, int count, Real factor) {
    with_storage<Real>(tensor.dtype, [&](auto element) {
      using T = decltype(element);
      const T* first = static_cast<const T*>(tensor.data) + offset;
      Vec<Real> zeros = {};  // becomes NaN if any element is not finite
      for (int column = 0; column < count; column += W) {
        const T* from[W];  // the last block repeats the last column
        for (int j = 0; j < W; ++j) from[j] = first + imin(column + j, count - 1) * stride;
        const int ahead = column + kPrefetched;
        const T* coming = ahead < count ? first + ahead * stride : first + (next - offset) + (ahead - count) * stride;
        for (int j = 0; j < W; ++j) prefetch(coming + j * stride, dim_);
        Real* rows = layout_ & kRows ? rows_ + (int64_t(slot) * capacity_ + column) * width_ : nullptr;
        Real* transposed = layout_ & kTransposed ? transposed_ + int64_t(slot) * dim_ * stride_ + column : nullptr;
        int d = 0;
        for (; d + W <= dim_; d += W) {
          Vec<Real> square[W];
#pragma GCC unroll 16
          for (int j = 0; j < W; ++j) square[j] = factor * load_as_real(from[j] + d);
          zeros += pack_square(square, d, W, rows, transposed);
        }
        if (d < dim_) {
          Vec<Real> square[W];
          for (int j = 0; j < W; ++j) square[j] = factor * load_some_as_real<Real>(from[j] + d, dim_ - d);
          zeros += pack_square(square, d, dim_ - d, rows, transposed);
        }
      }
      finite_ &= sum_of_lanes<Real>(zeros) == 0;
    });
  }

  // Whether all of the panel's columns are finite. Only known of those that are packed as rows.
  JAX_NATTEN_INLINE bool finite() const { return finite_; }

  JAX_NATTEN_INLINE const Real* transposed(int slot, int column) const {
    return transposed_ + int64_t(slot) * dim_ * stride_ + column;
  }
  JAX_NATTEN_INLINE const Real* rows(int slot, int column) const {
    return rows_ + (int64_t(slot) * capacity_ + column) * width_;
  }
  JAX_NATTEN_INLINE int dim() const { return dim_; }
  JAX_NATTEN_INLINE int width() const { return width_; }
  JAX_NATTEN_INLINE int stride() const { return stride_; }

  // s[r, (line, column)] = <a[r], column>, in rows of `lds` reals.
  template <int rows>
  JAX_NATTEN_INLINE void dots_of(const Step& step, const Real* a, int lda, Real* s, ptrdiff_t lds) const {
    const Real* lines[kMaxLines];
    for (int l = 0; l < step.line_count; ++l) lines[l] = transposed(step.columns[l].slot, step.first);
    dots<rows>(a, lda, dim_, lines, step.line_count, padded<Real>(step.count) / W, stride_, s, lds);
  }

  // c[r] = factors[r] c[r] + sum of w[r, (line, column)] times column.
  template <int rows>
  JAX_NATTEN_INLINE void accumulate_to(const Step& step, const Real* w, ptrdiff_t ldw, Real* c, ptrdiff_t ldc,
                                       const Real* factors) const {
    constexpr int kRowsAtOnce = rows < kAccumulateRows ? rows : kAccumulateRows;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r += kRowsAtOnce) {
      int begin = step.begin[r], end = step.end[r];
      for (int n = r + 1; n < r + kRowsAtOnce; ++n) {
        begin = imin(begin, step.begin[n]);
        end = imax(end, step.end[n]);
      }
      const int columns = imax(end - begin, 0);
      const Real* lines[kMaxLines];
      for (int l = 0; l < step.line_count; ++l) lines[l] = this->rows(step.columns[l].slot, step.first + begin);
      accumulate<kRowsAtOnce>(lines, step.line_count, columns, width_, width_, w + r * ldw + begin, ldw,
                              padded<Real>(step.count), c + r * ldc, ldc, factors + r);
    }
  }

 private:
  // Stores W columns of the elements d .. d + W - 1, of which `filled` exist.
  JAX_NATTEN_INLINE Vec<Real> pack_square(Vec<Real> (&square)[W], int d, int filled, Real* rows,
                                          Real* transposed) const {
    Vec<Real> zeros = {};
    if (rows) {
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) {
        zeros += square[j] * Real(0);
        store(rows + int64_t(j) * width_ + d, square[j]);
      }
    }
    if (transposed) {
      transpose<Real>(square);
      for (int i = 0; i < filled; ++i) store(transposed + int64_t(d + i) * stride_, square[i]);
    }
    return zeros;
  }

  Layout layout_;
  int dim_, width_, capacity_, stride_;
  bool finite_ = true;
  Real *transposed_ = nullptr, *rows_ = nullptr;
};

// Packs a panel of a tensor. Additional columns are those of the tensor itself, without a grid.
template <typename Real>
JAX_NATTEN_INLINE void pack_panel(Columns<Real>& columns, const Tensor& tensor, const Neighborhood& neighborhood,
                                  const Box& box, const Panel& panel, int64_t batch, int head, Real factor = 1) {
  columns.begin_panel();
  const int64_t stride = int64_t(tensor.heads) * tensor.dim;
  if (panel.additional) {
    const int64_t offset = tensor.offset(batch, panel.begin[2], head);
    columns.pack(tensor, 0, offset, offset, stride, panel.extent(2), factor);
    return;
  }
  const auto offset_of = [&](int j0, int j1) {
    return tensor.offset(batch, position(neighborhood, box, j0, j1, panel.begin[2]), head);
  };
  int slot = 0;
  for (int j0 = panel.begin[0]; j0 < panel.end[0]; ++j0) {
    for (int j1 = panel.begin[1]; j1 < panel.end[1]; ++j1, ++slot) {
      const int64_t next = j1 + 1 < panel.end[1] ? offset_of(j0, j1 + 1) : offset_of(j0 + 1, panel.begin[1]);
      columns.pack(tensor, slot, offset_of(j0, j1), next, stride * neighborhood.axes[2].dilation, panel.extent(2),
                   factor);
    }
  }
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
