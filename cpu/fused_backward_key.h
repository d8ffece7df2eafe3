// Second half of the fused backward: dk and dv, summed over the queries that see a key, the inverse window.
#pragma once

#include "fused_backward_query.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

template <typename Real>
class FusedBackwardKey {
  using C = Columns<Real>;

 public:
  static Boxes boxes(const FusedBackwardParams& p) {
    BoxCost cost;
    cost.slices = p.batch * p.kv_heads;
    cost.row_bytes = int64_t(sizeof(Real)) * (p.dim + p.value_dim + padded<Real>(p.dim) + padded<Real>(p.value_dim));
    cost.column_bytes = C::bytes_per_column(p.dim, C::kBoth) + C::bytes_per_column(p.value_dim, C::kBoth);
    cost.row_work = 2 * p.neighborhood.window_size() * p.group() * (p.dim + p.value_dim);
    cost.additional = 0;
    return make_boxes<true, Real>(p.neighborhood, cost);
  }

  static JAX_NATTEN_INLINE int64_t tasks(const FusedBackwardParams& p, const Boxes& boxes) {
    return p.batch * p.kv_heads * boxes.total;
  }

  FusedBackwardKey(const FusedBackwardParams& p, const Boxes& boxes, const Real* delta, Arena& arena)
      : p_(p),
        boxes_(boxes),
        delta_(delta),
        bias_(p.neighborhood),
        sweep_(p.neighborhood, boxes, 1, arena),
        queries_(boxes, p.dim, C::kBoth, arena),
        d_outs_(boxes, p.value_dim, C::kBoth, arena),
        score_stride_(Sweep<true, Real, FusedBackwardKey>::step_width(boxes)) {
    const int64_t line_rows = boxes.size[2];
    const int64_t rows = line_rows * boxes.size[0] * boxes.size[1];
    const int64_t slots = int64_t(boxes.panel[0]) * boxes.panel[1];
    key_ = arena.take<Real>(line_rows * p.dim);
    value_ = arena.take<Real>(line_rows * p.value_dim);
    lses_ = arena.take<Real>(slots * queries_.stride());
    deltas_ = arena.take<Real>(slots * queries_.stride());
    scores_ = arena.take<Real>(kTileRows * score_stride_);
    d_scores_ = arena.take<Real>(kTileRows * score_stride_);
    d_key_ = arena.take<Real>(rows * queries_.width());
    d_value_ = arena.take<Real>(rows * d_outs_.width());
  }

  // A task is a box of keys of a batch element and key head. Its query heads come one after the other.
  void run(int64_t task) {
    box_ = box_at(p_.neighborhood, boxes_, task % boxes_.total);
    if (is_empty(box_)) return;
    task /= boxes_.total;
    kv_head_ = int(task % p_.kv_heads);
    batch_ = task / p_.kv_heads;
    const int64_t rows = int64_t(box_.extent(0)) * box_.extent(1) * box_.extent(2);
    fill_zero(d_key_, rows * queries_.width());
    fill_zero(d_value_, rows * d_outs_.width());
    sweep_.begin_box(box_);
    for (head_ = kv_head_ * p_.group(); head_ < (kv_head_ + 1) * p_.group(); ++head_) sweep_.neighbors(*this);
    const int64_t positions = p_.neighborhood.positions();
    store_box({p_.dtype, p_.d_key, positions, p_.kv_heads, p_.dim}, p_.neighborhood, box_, batch_, kv_head_, 1, d_key_,
              queries_.width());
    store_box({p_.dtype, p_.d_value, positions, p_.kv_heads, p_.value_dim}, p_.neighborhood, box_, batch_, kv_head_, 1,
              d_value_, d_outs_.width());
  }

  void pack(const Panel& panel) {
    const int64_t positions = p_.neighborhood.positions();
    const Tensor queries = {p_.dtype, p_.query, positions, p_.heads, p_.dim};
    const Tensor d_outs = {p_.dtype, p_.d_out, positions, p_.heads, p_.value_dim};
    pack_panel(queries_, queries, p_.neighborhood, box_, panel, batch_, head_, Real(p_.scale));
    pack_panel(d_outs_, d_outs, p_.neighborhood, box_, panel, batch_, head_);
    const int64_t stride = int64_t(p_.neighborhood.axes[2].dilation) * p_.heads;
    int64_t slot = 0;
    for (int j0 = panel.begin[0]; j0 < panel.end[0]; ++j0) {
      for (int j1 = panel.begin[1]; j1 < panel.end[1]; ++j1, slot += queries_.stride()) {
        const int64_t first = position(p_.neighborhood, box_, j0, j1, panel.begin[2]);
        const int64_t from = (batch_ * positions + first) * p_.heads + head_;
        for (int n = 0; n < panel.extent(2); ++n) {
          lses_[slot + n] = static_cast<const Real*>(p_.lse)[from + n * stride];
          deltas_[slot + n] = delta_[from + n * stride];
        }
      }
    }
  }

  JAX_NATTEN_INLINE bool has_nonfinite() const { return !queries_.finite() || !d_outs_.finite(); }

  void begin_line(const Line& line) {
    const int64_t positions = p_.neighborhood.positions();
    load_line({p_.dtype, p_.key, positions, p_.kv_heads, p_.dim}, p_.neighborhood, box_, line, batch_, kv_head_, 1,
              key_);
    load_line({p_.dtype, p_.value, positions, p_.kv_heads, p_.value_dim}, p_.neighborhood, box_, line, batch_, kv_head_,
              1, value_);
  }

  template <int rows>
  void tile(const Step& step) {
    queries_.template dots_of<rows>(step, key_ + int64_t(step.row) * p_.dim, p_.dim, scores_, score_stride_);
    d_outs_.template dots_of<rows>(step, value_ + int64_t(step.row) * p_.value_dim, p_.value_dim, d_scores_,
                                   score_stride_);
    const int line_stride = padded<Real>(step.count);
    const auto column = [&](const Real* columns) {
      return [&step, at = columns + step.first, stride = queries_.stride()](int line, int n) {
        return load(at + int64_t(step.columns[line].slot) * stride + n);
      };
    };
    for (int r = 0; r < rows; ++r) {
      Real *s = scores_ + r * score_stride_, *ds = d_scores_ + r * score_stride_;
      if (p_.has_bias()) {
        const int64_t head = batch_ / (p_.batch / p_.bias_batch) * p_.heads + head_;
        const Real* table = static_cast<const Real*>(p_.bias) + head * bias_.size();
        bias_.add_to<true>(step, r, box_.begin[2] + step.row + r, table, s, line_stride);
      }
      score_gradients(step, r, column(lses_), column(deltas_), s, ds);
    }
    const Real ones[kTileRows] = {1, 1, 1, 1};
    const int64_t row = int64_t(step.line->index) * box_.extent(2) + step.row;
    d_outs_.template accumulate_to<rows>(step, scores_, score_stride_, d_value_ + row * d_outs_.width(),
                                         d_outs_.width(), ones);
    queries_.template accumulate_to<rows>(step, d_scores_, score_stride_, d_key_ + row * queries_.width(),
                                          queries_.width(), ones);
  }

 private:
  const FusedBackwardParams& p_;
  const Boxes& boxes_;
  const Real* delta_;
  Box box_;
  int64_t batch_ = 0;
  int kv_head_ = 0, head_ = 0;
  BiasTable bias_;
  Sweep<true, Real, FusedBackwardKey> sweep_;
  C queries_, d_outs_;
  int64_t score_stride_;
  Real *key_, *value_, *lses_, *deltas_, *scores_, *d_scores_, *d_key_, *d_value_;
};

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
