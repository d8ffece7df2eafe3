// Packed columns of a panel: one tensor's rows (keys, values, ..), converted to the accumulation type and stored
// transposed for `dots`, as rows for `accumulate`, or both.
#pragma once

#include "matmul.h"
#include "sweep.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// A tensor [batch, positions, heads, dim].
struct Tensor {
  DType dtype;
  const void* data;
  int64_t positions;
  int heads, dim;

  JAX_NATTEN_INLINE int64_t offset(int64_t batch, int64_t position, int head) const {
    return ((batch * positions + position) * heads + head) * dim;
  }
};

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
    rows_ = arena.take<Real>(layout & kRows ? slots * capacity_ * width_ : int64_t(W) * width_);
  }

  static JAX_NATTEN_INLINE int64_t bytes_per_column(int dim, Layout layout) {
    return ((layout & kTransposed ? dim : 0) + (layout & kRows ? padded<Real>(dim) : 0)) * int64_t(sizeof(Real));
  }

  JAX_NATTEN_INLINE void begin_panel() { finite_ = true; }

  // Packs one line: `count` columns, the first at element `offset` of the tensor, `stride` elements apart.
  void pack(const Tensor& tensor, int slot, int64_t offset, int64_t stride, int count) {
    Vec<Real> zeros = {};  // becomes NaN if any element is not finite
    for (int first = 0; first < count; first += W) {
      Real* rows = layout_ & kRows ? rows_ + (int64_t(slot) * capacity_ + first) * width_ : rows_;
      const int filled = imin(W, count - first);
      for (int j = 0; j < W; ++j) {
        Real* row = rows + j * width_;
        const int from_tensor = j < filled ? dim_ : 0;
        if (from_tensor) load_row(tensor.dtype, tensor.data, offset + (first + j) * stride, dim_, row);
        for (int d = from_tensor; d < width_; ++d) row[d] = 0;
      }
      if (layout_ & kRows) {
        for (int i = 0; i < filled * width_; i += W) zeros += load(rows + i) * Real(0);
      }
      if (layout_ & kTransposed) transpose_block(rows, transposed_ + int64_t(slot) * dim_ * stride_ + first);
    }
    finite_ &= sum_of_lanes<Real>(zeros) == 0;
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
  JAX_NATTEN_INLINE void transpose_block(const Real* rows, Real* to) {
    for (int d = 0; d < dim_; d += W) {
      Vec<Real> square[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) square[j] = load(rows + j * width_ + d);
      transpose<Real>(square);
      const int filled = imin(W, dim_ - d);
      if (filled == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + int64_t(d + i) * stride_, square[i]);
      } else {
        for (int i = 0; i < filled; ++i) store(to + int64_t(d + i) * stride_, square[i]);
      }
    }
  }

  Layout layout_;
  int dim_, width_, capacity_, stride_;
  bool finite_ = true;
  Real* transposed_ = nullptr;
  Real* rows_;
};

// Packs a panel of a tensor. Additional columns are those of the tensor itself, without a grid.
template <typename Real>
JAX_NATTEN_INLINE void pack_panel(Columns<Real>& columns, const Tensor& tensor, const Neighborhood& neighborhood,
                                  const Box& box, const Panel& panel, int64_t batch, int head) {
  columns.begin_panel();
  const int64_t stride = int64_t(tensor.heads) * tensor.dim;
  if (panel.additional) {
    columns.pack(tensor, 0, tensor.offset(batch, panel.begin[2], head), stride, panel.extent(2));
    return;
  }
  int slot = 0;
  for (int j0 = panel.begin[0]; j0 < panel.end[0]; ++j0) {
    for (int j1 = panel.begin[1]; j1 < panel.end[1]; ++j1, ++slot) {
      const int64_t first = position(neighborhood, box, j0, j1, panel.begin[2]);
      columns.pack(tensor, slot, tensor.offset(batch, first, head), stride * neighborhood.axes[2].dilation,
                   panel.extent(2));
    }
  }
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
