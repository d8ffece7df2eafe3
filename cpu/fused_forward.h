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
    fill_zero(out_, rows * values_.width());
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
    load_line({p_.dtype, p_.query, p_.neighborhood.positions(), p_.heads, p_.dim}, p_.neighborhood, box_, line, batch_,
              kv_head_ * group_, group_, query_, Real(p_.scale));
  }

  template <int rows>
  void tile(const Step& step) {
    keys_.template dots_of<rows>(step, query_ + int64_t(step.row) * p_.dim, p_.dim, scores_, score_stride_);
    const int64_t row = int64_t(step.line->index) * box_.extent(2) * group_ + step.row;
    if (p_.has_bias() && !step.additional) add_bias<rows>(step);
    Real factors[kTileRows + W] = {};
    softmax<rows>(step, max_ + row, sum_ + row, factors);
    values_.template accumulate_to<rows>(step, scores_, score_stride_, out_ + row * values_.width(), values_.width(),
                                         factors);
  }

 private:
  // Turns products into exponentials under the new maximum, and says by what to multiply what was summed before. Goes
  // over the rows together, because exponentials of one row alone would wait for each other.
  template <int rows>
  JAX_NATTEN_INLINE void softmax(const Step& step, Real* max, Real* sum, Real* factors) {
    const int vectors = padded<Real>(step.count) / W;
    const int line_stride = vectors * W;
    Vec<Real> largest[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) largest[r] = broadcast(-kInfinity<Real>);
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Mask<Real> own = lanes_between<Real>(step.begin[r] - v * W, step.end[r] - v * W);
        for (int l = 0; l < step.line_count; ++l) {
          Real* at = scores_ + r * score_stride_ + l * line_stride + v * W;
          const Vec<Real> score = own ? load(at) : broadcast(-kInfinity<Real>);
          largest[r] = maximum(largest[r], score);
          store(at, score);
        }
      }
    }
    Real shift[rows];
    Vec<Real> total[rows] = {};
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Real old = max[r];
      max[r] = maximum(old, largest_lane<Real>(largest[r]));
      shift[r] = max[r] == -kInfinity<Real> ? 0 : max[r];  // no key yet, or only scores of -infinity
      factors[r] = old - shift[r];
    }
    for (int i = 0; i < step.line_count * line_stride; i += W) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        Real* at = scores_ + r * score_stride_ + i;
        const Vec<Real> weight = exp<Real>(load(at) - shift[r]);
        total[r] += weight;
        store(at, weight);
      }
    }
    for (int r = 0; r < rows; r += W) store(factors + r, exp<Real>(load(factors + r)));
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) sum[r] = sum[r] * factors[r] + sum_of_lanes<Real>(total[r]);
  }

  template <int rows>
  void add_bias(const Step& step) {
    for (int r = 0; r < rows; ++r) {
      const int row = step.row + r;
      const int64_t shared = p_.batch / p_.bias_batch;
      const int64_t head = batch_ / shared * p_.heads + int64_t(kv_head_) * group_ + row % group_;
      const Real* table = static_cast<const Real*>(p_.bias) + head * bias_.size();
      bias_.add_to<false>(step, r, box_.begin[2] + row / group_, table, scores_ + r * score_stride_,
                          padded<Real>(step.count));
    }
  }

  void finish() {
    const int64_t positions = p_.neighborhood.positions();
    store_box({p_.dtype, p_.out, positions, p_.heads, p_.value_dim}, p_.neighborhood, box_, batch_, kv_head_ * group_,
              group_, out_, values_.width(), [&](int64_t row) { return 1 / sum_[row]; });
    int64_t row = 0;
    for (int i0 = box_.begin[0]; i0 < box_.end[0]; ++i0) {
      for (int i1 = box_.begin[1]; i1 < box_.end[1]; ++i1) {
        for (int i2 = box_.begin[2]; i2 < box_.end[2]; ++i2) {
          const int64_t x = batch_ * positions + position(p_.neighborhood, box_, i0, i1, i2);
          Real* lse = static_cast<Real*>(p_.lse) + x * p_.heads + kv_head_ * group_;
          for (int g = 0; g < group_; ++g, ++row) lse[g] = max_[row] + logarithm(sum_[row]);
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
