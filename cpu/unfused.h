// The unfused operations: PN (query-key products), NN (weighted sums of keys) and IN (weighted sums of queries, the
// transpose of NN). Weights are stored slot by slot of each query's own window.
#pragma once

#include "bias.h"
#include "columns.h"
#include "cuda/common/workspace.h"
#include "run_boxes.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// Where a query's weights are: slots of the columns of a window, row-major.
class Slots {
 public:
  explicit Slots(const UnfusedShape& shape) : axes_(shape.neighborhood.axes), size_(shape.neighborhood.window_size()) {}

  // First slot of the window's additional keys.
  JAX_NATTEN_INLINE int64_t additional() const { return size_; }

  // First slot of a line of keys for a query on a line, (i0, i1) of the box's groups.
  JAX_NATTEN_INLINE int64_t of_line(const Box& box, int i0, int i1, int j0, int j1) const {
    const int begin0 = window_of_query(axes_[0], i0, box.length[0]).begin;
    const int begin1 = window_of_query(axes_[1], i1, box.length[1]).begin;
    return (int64_t(j0 - begin0) * axes_[1].window + (j1 - begin1)) * axes_[2].window;
  }

  // Slot of key 0 of a line, relative to the line's first slot.
  JAX_NATTEN_INLINE int in_line(const Box& box, int i2) const {
    return -window_of_query(axes_[2], i2, box.length[2]).begin;
  }

 private:
  const Axis* axes_;
  int64_t size_;
};

template <typename Real>
class PointwiseNeighborhood {
  using C = Columns<Real>;

 public:
  static Boxes boxes(const PnParams& p) {
    BoxCost cost;
    cost.slices = p.batch * p.kv_heads;
    cost.row_bytes = p.group() * int64_t(sizeof(Real)) * p.dim;
    cost.column_bytes = C::bytes_per_column(p.dim, C::kTransposed);
    cost.row_work = p.neighborhood.window_size() * p.group() * p.dim;
    cost.additional = p.additional;
    return make_boxes<false, Real>(p.neighborhood, cost);
  }

  PointwiseNeighborhood(const PnParams& p, const Boxes& boxes, Arena& arena)
      : p_(p),
        boxes_(boxes),
        group_(p.group()),
        bias_(p.neighborhood),
        slots_(p),
        sweep_(p.neighborhood, boxes, group_, arena),
        keys_(boxes, p.dim, C::kTransposed, arena),
        product_stride_(Sweep<false, Real, PointwiseNeighborhood>::step_width(boxes)) {
    query_ = arena.take<Real>(int64_t(boxes.size[2]) * group_ * p.dim);
    products_ = arena.take<Real>(kTileRows * product_stride_);
    fill_ = arena.take<Real>(p.neighborhood.axes[2].window);
    for (int a = 0; a < kMaxRank; ++a) has_masked_slots_ |= p.neighborhood.axes[a].causal;
  }

  void run(int64_t task) {
    box_ = box_at(p_.neighborhood, boxes_, task % boxes_.total);
    if (is_empty(box_)) return;
    task /= boxes_.total;
    kv_head_ = int(task % p_.kv_heads);
    batch_ = task / p_.kv_heads;
    for (int k = 0; k < p_.neighborhood.axes[2].window; ++k) {
      fill_[k] = p_.fill_negative_infinity ? -kInfinity<Real> : Real(0);
    }
    sweep_.begin_box(box_);
    if (has_masked_slots_) fill_slots();
    sweep_.neighbors(*this);
    sweep_.additional(*this, p_.additional);
  }

  void pack(const Panel& panel) {
    const Tensor keys = {p_.dtype, panel.additional ? p_.additional_keys : p_.keys,
                         panel.additional ? p_.additional : p_.neighborhood.positions(), p_.kv_heads, p_.dim};
    pack_panel(keys_, keys, p_.neighborhood, box_, panel, batch_, kv_head_);
    panel_begin_ = panel.begin[2];
  }

  // A product outside of the window is computed, but never stored.
  JAX_NATTEN_INLINE bool has_nonfinite() const { return false; }

  void begin_line(const Line& line) {
    first_head_ = first_head(position(p_.neighborhood, box_, line.i0, line.i1, box_.begin[2]));
    load_line({p_.dtype, p_.queries, p_.neighborhood.positions(), p_.heads, p_.dim}, p_.neighborhood, box_, line,
              batch_, kv_head_ * group_, group_, query_);
  }

  template <int rows>
  void tile(const Step& step) {
    keys_.template dots_of<rows>(step, query_ + int64_t(step.row) * p_.dim, p_.dim, products_, product_stride_);
    const int line_stride = padded<Real>(step.count);
    const int64_t stride = int64_t(p_.heads) * p_.neighborhood.axes[2].dilation;
    for (int r = 0; r < rows; ++r) {
      const int i = (step.row + r) / group_, head = (step.row + r) % group_, i2 = box_.begin[2] + i;
      Real* products = products_ + r * product_stride_;
      if (p_.has_bias() && !step.additional) {
        const int64_t bias_head = batch_ / (p_.batch / p_.bias_batch) * p_.heads + int64_t(kv_head_) * group_ + head;
        const Real* table = static_cast<const Real*>(p_.bias) + bias_head * bias_.size();
        bias_.add_to<false>(step, r, i2, table, products, line_stride);
      }
      const int64_t to = (first_head_ + i * stride + head) * p_.slots();
      const int count = step.end[r] - step.begin[r];
      for (int l = 0; l < step.line_count; ++l) {
        const ColumnLine& column = step.columns[l];
        const int64_t slot = step.additional
                                 ? slots_.additional() + panel_begin_
                                 : slots_.of_line(box_, step.line->i0, step.line->i1, column.j0, column.j1) +
                                       slots_.in_line(box_, i2) + step.position;
        store_row(p_.dtype, p_.weights, to + slot + step.begin[r], count, products + l * line_stride + step.begin[r]);
      }
    }
  }

 private:
  JAX_NATTEN_INLINE int64_t first_head(int64_t x) const {
    return (batch_ * p_.neighborhood.positions() + x) * p_.heads + int64_t(kv_head_) * group_;
  }

  // Slots past the query of causal axes get a constant: fill all, before the others are overwritten.
  void fill_slots() {
    const int line = p_.neighborhood.axes[2].window;
    for (int i0 = box_.begin[0]; i0 < box_.end[0]; ++i0) {
      for (int i1 = box_.begin[1]; i1 < box_.end[1]; ++i1) {
        for (int i2 = box_.begin[2]; i2 < box_.end[2]; ++i2) {
          const int64_t head = first_head(position(p_.neighborhood, box_, i0, i1, i2));
          for (int64_t row = head; row < head + group_; ++row) {
            for (int64_t slot = 0; slot < slots_.additional(); slot += line) {
              store_row(p_.dtype, p_.weights, row * p_.slots() + slot, line, fill_);
            }
          }
        }
      }
    }
  }

  const PnParams& p_;
  const Boxes& boxes_;
  Box box_;
  int64_t batch_ = 0, first_head_ = 0;
  int kv_head_ = 0, group_, panel_begin_ = 0;
  bool has_masked_slots_ = false;
  BiasTable bias_;
  Slots slots_;
  Sweep<false, Real, PointwiseNeighborhood> sweep_;
  C keys_;
  int64_t product_stride_;
  Real *query_, *products_, *fill_;
};

template <typename Real>
class NeighborhoodNeighborhood {
  using C = Columns<Real>;

 public:
  static Boxes boxes(const NnParams& p) {
    BoxCost cost;
    cost.slices = p.batch * p.kv_heads;
    cost.row_bytes = p.group() * int64_t(sizeof(Real)) * padded<Real>(p.dim);
    cost.column_bytes = C::bytes_per_column(p.dim, C::kRows);
    cost.row_work = p.neighborhood.window_size() * p.group() * p.dim;
    cost.additional = p.additional;
    return make_boxes<false, Real>(p.neighborhood, cost);
  }

  NeighborhoodNeighborhood(const NnParams& p, const Boxes& boxes, Arena& arena)
      : p_(p),
        boxes_(boxes),
        group_(p.group()),
        slots_(p),
        sweep_(p.neighborhood, boxes, group_, arena),
        keys_(boxes, p.dim, C::kRows, arena),
        weight_stride_(Sweep<false, Real, NeighborhoodNeighborhood>::step_width(boxes)) {
    weights_ = arena.take<Real>(kTileRows * weight_stride_);
    out_ = arena.take<Real>(int64_t(boxes.size[0]) * boxes.size[1] * boxes.size[2] * group_ * keys_.width());
  }

  void run(int64_t task) {
    box_ = box_at(p_.neighborhood, boxes_, task % boxes_.total);
    if (is_empty(box_)) return;
    task /= boxes_.total;
    kv_head_ = int(task % p_.kv_heads);
    batch_ = task / p_.kv_heads;
    const int64_t rows = int64_t(box_.extent(0)) * box_.extent(1) * box_.extent(2) * group_;
    fill_zero(out_, rows * keys_.width());
    sweep_.begin_box(box_);
    sweep_.neighbors(*this);
    sweep_.additional(*this, p_.additional);

    store_box({p_.dtype, p_.queries, p_.neighborhood.positions(), p_.heads, p_.dim}, p_.neighborhood, box_, batch_,
              kv_head_ * group_, group_, out_, keys_.width());
  }

  void pack(const Panel& panel) {
    const Tensor keys = {p_.dtype, panel.additional ? p_.additional_keys : p_.keys,
                         panel.additional ? p_.additional : p_.neighborhood.positions(), p_.kv_heads, p_.dim};
    pack_panel(keys_, keys, p_.neighborhood, box_, panel, batch_, kv_head_);
    panel_begin_ = panel.begin[2];
  }

  JAX_NATTEN_INLINE bool has_nonfinite() const { return !keys_.finite(); }

  void begin_line(const Line& line) {
    first_head_ = first_head(position(p_.neighborhood, box_, line.i0, line.i1, box_.begin[2]));
  }

  template <int rows>
  void tile(const Step& step) {
    const int line_stride = padded<Real>(step.count);
    const int64_t stride = int64_t(p_.heads) * p_.neighborhood.axes[2].dilation;
    for (int r = 0; r < rows; ++r) {
      const int i = (step.row + r) / group_, head = (step.row + r) % group_;
      const int64_t from = (first_head_ + i * stride + head) * p_.slots();
      for (int l = 0; l < step.line_count; ++l) {
        const ColumnLine& column = step.columns[l];
        const int64_t slot = step.additional
                                 ? slots_.additional() + panel_begin_
                                 : slots_.of_line(box_, step.line->i0, step.line->i1, column.j0, column.j1) +
                                       slots_.in_line(box_, box_.begin[2] + i) + step.position;
        Real* weights = weights_ + r * weight_stride_ + l * line_stride;
        fill_zero(weights, step.count);
        load_row(p_.dtype, p_.weights, from + slot + step.begin[r], step.end[r] - step.begin[r],
                 weights + step.begin[r]);
      }
    }
    const Real ones[kTileRows] = {1, 1, 1, 1};
    const int64_t row = int64_t(step.line->index) * box_.extent(2) * group_ + step.row;
    keys_.template accumulate_to<rows>(step, weights_, weight_stride_, out_ + row * keys_.width(), keys_.width(), ones);
  }

 private:
  JAX_NATTEN_INLINE int64_t first_head(int64_t x) const {
    return (batch_ * p_.neighborhood.positions() + x) * p_.heads + int64_t(kv_head_) * group_;
  }

  const NnParams& p_;
  const Boxes& boxes_;
  Box box_;
  int64_t batch_ = 0, first_head_ = 0;
  int kv_head_ = 0, group_, panel_begin_ = 0;
  Slots slots_;
  Sweep<false, Real, NeighborhoodNeighborhood> sweep_;
  C keys_;
  int64_t weight_stride_;
  Real *weights_, *out_;
};

template <typename Real>
class InverseNeighborhood {
  using C = Columns<Real>;

 public:
  static Boxes boxes(const InParams& p) {
    BoxCost cost;
    cost.slices = p.batch * p.kv_heads;
    cost.row_bytes = int64_t(sizeof(Real)) * padded<Real>(p.dim);
    cost.column_bytes = C::bytes_per_column(p.dim, C::kRows);
    cost.row_work = p.neighborhood.window_size() * p.group() * p.dim;
    cost.additional = 0;
    return make_boxes<true, Real>(p.neighborhood, cost);
  }

  InverseNeighborhood(const InParams& p, const Boxes& boxes, Arena& arena)
      : p_(p),
        boxes_(boxes),
        slots_(p),
        sweep_(p.neighborhood, boxes, 1, arena),
        queries_(boxes, p.dim, C::kRows, arena),
        weight_stride_(Sweep<true, Real, InverseNeighborhood>::step_width(boxes)) {
    weights_ = arena.take<Real>(kTileRows * weight_stride_);
    keys_ = arena.take<Real>(int64_t(boxes.size[0]) * boxes.size[1] * boxes.size[2] * queries_.width());
    slot_in_line_ = arena.take<int>(boxes.panel[2]);
  }

  void run(int64_t task) {
    box_ = box_at(p_.neighborhood, boxes_, task % boxes_.total);
    if (is_empty(box_)) return;
    task /= boxes_.total;
    kv_head_ = int(task % p_.kv_heads);
    batch_ = task / p_.kv_heads;
    const int64_t rows = int64_t(box_.extent(0)) * box_.extent(1) * box_.extent(2);
    fill_zero(keys_, rows * queries_.width());
    sweep_.begin_box(box_);
    for (head_ = kv_head_ * p_.group(); head_ < (kv_head_ + 1) * p_.group(); ++head_) sweep_.neighbors(*this);

    store_box({p_.dtype, p_.keys, p_.neighborhood.positions(), p_.kv_heads, p_.dim}, p_.neighborhood, box_, batch_,
              kv_head_, 1, keys_, queries_.width());
  }

  void pack(const Panel& panel) {
    const Tensor queries = {p_.dtype, p_.queries, p_.neighborhood.positions(), p_.heads, p_.dim};
    pack_panel(queries_, queries, p_.neighborhood, box_, panel, batch_, head_);
    panel_begin_ = panel.begin[2];
    for (int i2 = panel.begin[2]; i2 < panel.end[2]; ++i2) {
      slot_in_line_[i2 - panel_begin_] = slots_.in_line(box_, i2);
    }
  }

  JAX_NATTEN_INLINE bool has_nonfinite() const { return !queries_.finite(); }

  void begin_line(const Line&) {}

  template <int rows>
  void tile(const Step& step) {
    const int line_stride = padded<Real>(step.count);
    const int64_t stride = int64_t(p_.heads) * p_.neighborhood.axes[2].dilation * p_.slots();
    with_storage<Real>(p_.dtype, [&](auto element) {
      using T = decltype(element);
      for (int l = 0; l < step.line_count; ++l) {
        // Columns are queries, (j0, j1) a line of them, and the rows keys on the line (i0, i1).
        const ColumnLine& column = step.columns[l];
        const int64_t x = position(p_.neighborhood, box_, column.j0, column.j1, step.position);
        const int64_t line = slots_.of_line(box_, column.j0, column.j1, step.line->i0, step.line->i1);
        const T* from = static_cast<const T*>(p_.weights) +
                        ((batch_ * p_.neighborhood.positions() + x) * p_.heads + head_) * p_.slots() + line;
        for (int r = 0; r < rows; ++r) {
          Real* weights = weights_ + r * weight_stride_ + l * line_stride;
          const int key = box_.begin[2] + step.row + r;
          fill_zero(weights, step.count);
          for (int n = step.begin[r]; n < step.end[r]; ++n) {
            weights[n] = as_real<Real>(from[n * stride + slot_in_line_[step.first + n] + key]);
          }
        }
      }
    });
    const Real ones[kTileRows] = {1, 1, 1, 1};
    const int64_t row = int64_t(step.line->index) * box_.extent(2) + step.row;
    queries_.template accumulate_to<rows>(step, weights_, weight_stride_, keys_ + row * queries_.width(),
                                          queries_.width(), ones);
  }

 private:
  const InParams& p_;
  const Boxes& boxes_;
  Box box_;
  int64_t batch_ = 0;
  int kv_head_ = 0, head_ = 0, panel_begin_ = 0;
  Slots slots_;
  Sweep<true, Real, InverseNeighborhood> sweep_;
  C queries_;
  int64_t weight_stride_;
  Real *weights_, *keys_;
  int* slot_in_line_;
};

// The part of IN that every query adds to, in two stages: partial sums over chunks of positions, then their sum.
template <typename Real>
void inverse_additional(const InParams& p, Executor& executor) {
  const int64_t positions = p.neighborhood.positions(), heads = p.batch * p.kv_heads;
  const int64_t chunks = reduction_chunks(positions), elements = int64_t(p.additional) * p.dim;
  const int width = padded<Real>(p.dim);
  Real* workspace = static_cast<Real*>(p.workspace);
  parallel(executor, heads * chunks, (width + padded<Real>(p.additional)) * sizeof(Real),
           [&](int64_t task, void* scratch) {
             const int chunk = int(task % chunks);
             const int64_t head = task / chunks, batch = head / p.kv_heads;
             Real *query = static_cast<Real*>(scratch), *weights = query + width;
             Real* sum = workspace + (chunk * heads + head) * elements;
             for (int64_t i = 0; i < elements; ++i) sum[i] = 0;
             for (int64_t x = chunk_begin(positions, chunk); x < chunk_begin(positions, chunk + 1); ++x) {
               for (int g = 0; g < p.group(); ++g) {
                 const int64_t row = (batch * positions + x) * p.heads + head % p.kv_heads * p.group() + g;
                 load_row(p.dtype, p.queries, row * p.dim, p.dim, query);
                 load_row(p.dtype, p.weights, row * p.slots() + p.neighborhood.window_size(), p.additional, weights);
                 for (int s = 0; s < p.additional; ++s) {
                   for (int d = 0; d < p.dim; ++d) sum[int64_t(s) * p.dim + d] += weights[s] * query[d];
                 }
               }
             }
           });
  parallel(executor, heads * p.additional, width * sizeof(Real), [&](int64_t task, void* scratch) {
    const int64_t head = task / p.additional, key = task % p.additional;
    Real* sum = static_cast<Real*>(scratch);
    for (int d = 0; d < p.dim; ++d) sum[d] = 0;
    for (int64_t chunk = 0; positions > 0 && chunk < chunks; ++chunk) {
      const Real* partial = workspace + (chunk * heads + head) * elements + key * p.dim;
      for (int d = 0; d < p.dim; ++d) sum[d] += partial[d];
    }
    const int64_t row = (head / p.kv_heads * p.additional + key) * p.kv_heads + head % p.kv_heads;
    store_row(p.dtype, p.additional_keys, row * p.dim, p.dim, sum);
  });
}

template <typename Real>
void pointwise_neighborhood(const PnParams& params, Executor& executor) {
  run_boxes<PointwiseNeighborhood, Real>(params, executor);
}

template <typename Real>
void neighborhood_neighborhood(const NnParams& params, Executor& executor) {
  run_boxes<NeighborhoodNeighborhood, Real>(params, executor);
}

template <typename Real>
void inverse_neighborhood(const InParams& params, Executor& executor) {
  run_boxes<InverseNeighborhood, Real>(params, executor);
  inverse_additional<Real>(params, executor);
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
