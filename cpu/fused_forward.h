// Fused forward: out = softmax(scale * query key^T + bias) value over the neighborhood and the additional keys, and the
// logarithm of the sum of exponentials, in one pass over the keys with a running maximum.
#pragma once

#include <math.h>

#include "bias.h"
#include "columns.h"
#include "run_boxes.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

JAX_NATTEN_INLINE float logarithm(float x) { return ::logf(x); }
JAX_NATTEN_INLINE double logarithm(double x) { return ::log(x); }

template <typename Real>
class FusedForward {
  static constexpr int W = kLanes<Real>;
  using C = Columns<Real>;

 public:
  static Boxes boxes(const FusedForwardParams& p) {
    BoxCost cost;
    cost.slices = p.batch * p.kv_heads;
    cost.row_bytes = p.group() * int64_t(sizeof(Real)) * (p.dim + padded<Real>(p.value_dim) + 2);
    cost.column_bytes = C::bytes_per_column(p.dim, C::kTransposed) + C::bytes_per_column(p.value_dim, C::kRows);
    cost.row_work = p.neighborhood.window_size() * p.group() * (p.dim + p.value_dim);
    cost.additional = p.additional;
    return make_boxes<false, Real>(p.neighborhood, cost);
  }

  FusedForward(const FusedForwardParams& p, const Boxes& boxes, Arena& arena)
      : p_(p),
        boxes_(boxes),
        group_(p.group()),
        bias_(p.neighborhood),
        sweep_(p.neighborhood, boxes, group_, arena),
        keys_(boxes, p.dim, C::kTransposed, arena),
        values_(boxes, p.value_dim, C::kRows, arena),
        score_stride_(Sweep<false, Real, FusedForward>::step_width(boxes)) {
    const int64_t line_rows = int64_t(boxes.size[2]) * group_;
    const int64_t rows = line_rows * boxes.size[0] * boxes.size[1];
    query_ = arena.take<Real>(line_rows * p.dim);
    scores_ = arena.take<Real>(kTileRows * score_stride_);
    out_ = arena.take<Real>(rows * values_.width());
    max_ = arena.take<Real>(rows);
    sum_ = arena.take<Real>(rows);
  }

  // A task is a box of a batch element and key head.
  void run(int64_t task) {
    box_ = box_at(p_.neighborhood, boxes_, task % boxes_.total);
    if (is_empty(box_)) return;
    task /= boxes_.total;
    kv_head_ = int(task % p_.kv_heads);
    batch_ = task / p_.kv_heads;

    const int64_t rows = int64_t(box_.extent(0)) * box_.extent(1) * box_.extent(2) * group_;
    for (int64_t i = 0; i < rows * values_.width(); i += W) store(out_ + i, Vec<Real>{});
    for (int64_t row = 0; row < rows; ++row) {
      max_[row] = -kInfinity<Real>;
      sum_[row] = 0;
    }
    sweep_.begin_box(box_);
    sweep_.neighbors(*this);
    sweep_.additional(*this, p_.additional);
    finish();
  }

  void pack(const Panel& panel) {
    const int64_t positions = panel.additional ? p_.additional : p_.neighborhood.positions();
    const Tensor keys = {p_.dtype, panel.additional ? p_.additional_keys : p_.key, positions, p_.kv_heads, p_.dim};
    const Tensor values = {p_.dtype, panel.additional ? p_.additional_values : p_.value, positions, p_.kv_heads,
                           p_.value_dim};
    pack_panel(keys_, keys, p_.neighborhood, box_, panel, batch_, kv_head_);
    pack_panel(values_, values, p_.neighborhood, box_, panel, batch_, kv_head_);
  }

  JAX_NATTEN_INLINE bool has_nonfinite() const { return !values_.finite(); }

  void begin_line(const Line& line) {
    const int64_t step = int64_t(group_) * p_.dim;
    for (int i = 0; i < box_.extent(2); ++i) {
      const int64_t x = position(p_.neighborhood, box_, line.i0, line.i1, box_.begin[2] + i);
      load_row(p_.dtype, p_.query, query(x), int(step), query_ + i * step);
    }
  }

  template <int rows>
  void tile(const Step& step) {
    keys_.template dots_of<rows>(step, query_ + int64_t(step.row) * p_.dim, p_.dim, scores_, score_stride_);
    const int64_t row = int64_t(step.line->index) * box_.extent(2) * group_ + step.row;
    Real factors[kTileRows];
    softmax<rows>(step, max_ + row, sum_ + row, factors);
    values_.template accumulate_to<rows>(step, scores_, score_stride_, out_ + row * values_.width(), values_.width(),
                                         factors);
  }

 private:
  JAX_NATTEN_INLINE int64_t query(int64_t x) const {
    return ((batch_ * p_.neighborhood.positions() + x) * p_.heads + int64_t(kv_head_) * group_) * p_.dim;
  }

  // Turns products into exponentials under the new maximum, and says by what to multiply what was summed before.
  template <int rows>
  JAX_NATTEN_INLINE void softmax(const Step& step, Real* max, Real* sum, Real* factors) {
    const int vectors = padded<Real>(step.count) / W;
    const int count = step.line_count * vectors;
    const int line_stride = vectors * W;
    const bool biased = p_.has_bias() && !step.additional;
    const Real scale = biased ? 1 : Real(p_.scale);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      Real* s = scores_ + r * score_stride_;
      if (biased) add_bias(step, r, s, line_stride);
      Vec<Real> largest = broadcast(-kInfinity<Real>);
      for (int v = 0; v < vectors; ++v) {
        const Mask<Real> own = lanes_between<Real>(step.begin[r] - v * W, step.end[r] - v * W);
        for (int l = 0; l < step.line_count; ++l) {
          Real* at = s + l * line_stride + v * W;
          const Vec<Real> score = own ? load(at) * scale : broadcast(-kInfinity<Real>);
          largest = maximum(largest, score);
          store(at, score);
        }
      }
      const Real old = max[r];
      const Real next = maximum(old, largest_lane<Real>(largest));
      const Real shift = next == -kInfinity<Real> ? 0 : next;  // no key yet, or only scores of -infinity
      Vec<Real> total = {};
      for (int i = 0; i < count; ++i) {
        const Vec<Real> weight = exp<Real>(load(s + i * W) - shift);
        total += weight;
        store(s + i * W, weight);
      }
      factors[r] = exp<Real>(broadcast(old - shift))[0];
      max[r] = next;
      sum[r] = sum[r] * factors[r] + sum_of_lanes<Real>(total);
    }
  }

  void add_bias(const Step& step, int r, Real* s, int line_stride) const {
    const int row = step.row + r;
    const int64_t group = p_.batch / p_.bias_batch;
    const int64_t head = batch_ / group * p_.heads + int64_t(kv_head_) * group_ + row % group_;
    const Real* table = static_cast<const Real*>(p_.bias) + head * bias_.size();
    bias_.add_to<false>(step, r, box_.begin[2] + row / group_, table, Real(p_.scale), s, line_stride);
  }

  void finish() {
    int64_t row = 0;
    for (int i0 = box_.begin[0]; i0 < box_.end[0]; ++i0) {
      for (int i1 = box_.begin[1]; i1 < box_.end[1]; ++i1) {
        for (int i2 = box_.begin[2]; i2 < box_.end[2]; ++i2) {
          const int64_t x = batch_ * p_.neighborhood.positions() + position(p_.neighborhood, box_, i0, i1, i2);
          const int64_t first_head = x * p_.heads + int64_t(kv_head_) * group_;
          for (int g = 0; g < group_; ++g, ++row) {
            store_row(p_.dtype, p_.out, (first_head + g) * p_.value_dim, p_.value_dim, out_ + row * values_.width(),
                      1 / sum_[row]);
            static_cast<Real*>(p_.lse)[first_head + g] = max_[row] + logarithm(sum_[row]);
          }
        }
      }
    }
  }

  const FusedForwardParams& p_;
  const Boxes& boxes_;
  Box box_;
  int64_t batch_ = 0;
  int kv_head_ = 0, group_;
  BiasTable bias_;
  Sweep<false, Real, FusedForward> sweep_;
  C keys_, values_;
  int64_t score_stride_;
  Real *query_, *scores_, *out_, *max_, *sum_;
};

template <typename Real>
void fused_forward(const FusedForwardParams& params, Executor& executor) {
  run_boxes<FusedForward, Real>(params, executor);
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
