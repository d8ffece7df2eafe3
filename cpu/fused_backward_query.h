// First half of the fused backward: gradients summed over keys, dq, and what is summed over all queries in two stages
// (relative position bias, additional keys and values).
#pragma once

#include "bias.h"
#include "columns.h"
#include "cuda/common/workspace.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// s = exp(s - lse), the probabilities, and dp = s (dp - delta), the gradients of the scores, both zero outside
// of the row's window. `lse` and `delta` hold vectors for each column, or constants for the row.
template <typename Real, typename Lse, typename Delta>
JAX_NATTEN_INLINE void score_gradients(const Step& step, int r, Lse lse, Delta delta, Real* s, Real* dp) {
  constexpr int W = kLanes<Real>;
  const int vectors = padded<Real>(step.count) / W;
  for (int v = 0; v < vectors; ++v) {
    const Mask<Real> own = lanes_between<Real>(step.begin[r] - v * W, step.end[r] - v * W);
    for (int l = 0; l < step.line_count; ++l) {
      const int at = (l * vectors + v) * W;
      const Vec<Real> p = exp<Real>(load(s + at) - lse(l, v * W));
      const Vec<Real> ds = p * (load(dp + at) - delta(l, v * W));
      store(s + at, own ? p : Vec<Real>{});
      store(dp + at, own ? ds : Vec<Real>{});
    }
  }
}

template <typename Real>
class FusedBackwardQuery {
  using C = Columns<Real>;

 public:
  // The partial sums of the two-stage reductions: one for each of `parts` runs of boxes.
  struct Partials {
    int64_t parts;
    const Real* delta;
    Real *bias, *additional;

    Partials(const FusedBackwardParams& p, const Boxes& boxes) {
      const bool reduces = p.has_bias() || p.additional > 0;
      parts = reduces ? min64(boxes.total, reduction_chunks(p.neighborhood.positions())) : boxes.total;
      Real* workspace = static_cast<Real*>(p.workspace);
      delta = workspace;
      bias = workspace + p.batch * p.neighborhood.positions() * p.heads;
      additional = bias + (p.has_bias() ? parts * bias_elements(p) : 0);
    }

    static JAX_NATTEN_INLINE int64_t bias_elements(const FusedShape& p) {
      return p.bias_batch * p.heads * p.neighborhood.bias_size();
    }
    // Per batch element and key head: [additional, dim + value_dim].
    static JAX_NATTEN_INLINE int64_t additional_elements(const FusedShape& p) {
      return int64_t(p.additional) * (p.dim + p.value_dim);
    }
  };

  static Boxes boxes(const FusedBackwardParams& p) {
    BoxCost cost;
    cost.slices = p.batch * p.kv_heads;
    cost.row_bytes = p.group() * int64_t(sizeof(Real)) * (p.dim + p.value_dim + padded<Real>(p.dim) + 2);
    cost.column_bytes = C::bytes_per_column(p.dim, C::kBoth) + C::bytes_per_column(p.value_dim, C::kTransposed);
    cost.row_work = p.neighborhood.window_size() * p.group() * (2 * p.dim + p.value_dim);
    cost.additional = p.additional;
    return make_boxes<false, Real>(p.neighborhood, cost);
  }

  static JAX_NATTEN_INLINE int64_t tasks(const FusedBackwardParams& p, const Partials& partials) {
    return (p.has_bias() ? p.bias_batch : p.batch) * p.kv_heads * partials.parts;
  }

  FusedBackwardQuery(const FusedBackwardParams& p, const Boxes& boxes, const Partials& partials, Arena& arena)
      : p_(p),
        boxes_(boxes),
        partials_(partials),
        group_(p.group()),
        bias_(p.neighborhood),
        sweep_(p.neighborhood, boxes, group_, arena),
        keys_(boxes, p.dim, C::kBoth, arena),
        values_(boxes, p.value_dim, C::kTransposed, arena),
        score_stride_(Sweep<false, Real, FusedBackwardQuery>::step_width(boxes)) {
    const int64_t line_rows = int64_t(boxes.size[2]) * group_;
    query_ = arena.take<Real>(line_rows * p.dim);
    d_out_ = arena.take<Real>(line_rows * p.value_dim);
    lse_ = arena.take<Real>(line_rows);
    delta_ = arena.take<Real>(line_rows);
    scores_ = arena.take<Real>(kTileRows * score_stride_);
    d_scores_ = arena.take<Real>(kTileRows * score_stride_);
    d_query_ = arena.take<Real>(line_rows * boxes.size[0] * boxes.size[1] * keys_.width());
  }

  // A task is a run of boxes of a key head and of the batch elements that share a bias: it alone writes their partial
  // sums.
  void run(int64_t task) {
    part_ = task % partials_.parts;
    task /= partials_.parts;
    kv_head_ = int(task % p_.kv_heads);
    const int64_t shared = task / p_.kv_heads;
    const int64_t batches = p_.has_bias() ? p_.batch / p_.bias_batch : 1;
    if (p_.has_bias()) {
      bias_offset_ = (shared * p_.heads + int64_t(kv_head_) * group_) * bias_.size();
      d_bias_ = partials_.bias + part_ * Partials::bias_elements(p_) + bias_offset_;
      for (int64_t i = 0; i < group_ * bias_.size(); ++i) d_bias_[i] = 0;
    }
    for (batch_ = shared * batches; batch_ < (shared + 1) * batches; ++batch_) {
      const int64_t elements = Partials::additional_elements(p_);
      d_additional_ = partials_.additional + ((part_ * p_.batch + batch_) * p_.kv_heads + kv_head_) * elements;
      for (int64_t i = 0; i < elements; ++i) d_additional_[i] = 0;
      const int64_t end = boxes_.total * (part_ + 1) / partials_.parts;
      for (int64_t index = boxes_.total * part_ / partials_.parts; index < end; ++index) box(index);
    }
  }

  void pack(const Panel& panel) {
    const int64_t positions = panel.additional ? p_.additional : p_.neighborhood.positions();
    const Tensor keys = {p_.dtype, panel.additional ? p_.additional_keys : p_.key, positions, p_.kv_heads, p_.dim};
    const Tensor values = {p_.dtype, panel.additional ? p_.additional_values : p_.value, positions, p_.kv_heads,
                           p_.value_dim};
    pack_panel(keys_, keys, p_.neighborhood, box_, panel, batch_, kv_head_);
    pack_panel(values_, values, p_.neighborhood, box_, panel, batch_, kv_head_);
    panel_begin_ = panel.begin[2];
  }

  JAX_NATTEN_INLINE bool has_nonfinite() const { return !keys_.finite(); }

  void begin_line(const Line& line) {
    const int64_t positions = p_.neighborhood.positions();
    load_line({p_.dtype, p_.query, positions, p_.heads, p_.dim}, p_.neighborhood, box_, line, batch_, kv_head_ * group_,
              group_, query_, Real(p_.scale));
    load_line({p_.dtype, p_.d_out, positions, p_.heads, p_.value_dim}, p_.neighborhood, box_, line, batch_,
              kv_head_ * group_, group_, d_out_);
    for (int i = 0; i < box_.extent(2); ++i) {
      const int64_t x = position(p_.neighborhood, box_, line.i0, line.i1, box_.begin[2] + i);
      const int64_t head = (batch_ * positions + x) * p_.heads + kv_head_ * group_;
      for (int g = 0; g < group_; ++g) {
        lse_[i * group_ + g] = static_cast<const Real*>(p_.lse)[head + g];
        delta_[i * group_ + g] = partials_.delta[head + g];
      }
    }
  }

  template <int rows>
  void tile(const Step& step) {
    const Real* query = query_ + int64_t(step.row) * p_.dim;
    const Real* d_out = d_out_ + int64_t(step.row) * p_.value_dim;
    keys_.template dots_of<rows>(step, query, p_.dim, scores_, score_stride_);
    values_.template dots_of<rows>(step, d_out, p_.value_dim, d_scores_, score_stride_);
    const bool biased = p_.has_bias() && !step.additional;
    const int line_stride = padded<Real>(step.count);
    for (int r = 0; r < rows; ++r) {
      const int row = step.row + r, i2 = box_.begin[2] + row / group_, head = row % group_;
      Real *s = scores_ + r * score_stride_, *ds = d_scores_ + r * score_stride_;
      if (biased) {
        const Real* table = static_cast<const Real*>(p_.bias) + bias_offset_ + head * bias_.size();
        bias_.add_to<false>(step, r, i2, table, s, line_stride);
      }
      const Vec<Real> lse = broadcast(lse_[row]), delta = broadcast(delta_[row]);
      score_gradients(step, r, [&](int, int) { return lse; }, [&](int, int) { return delta; }, s, ds);
      if (biased) bias_.add_gradient(step, r, i2, ds, line_stride, d_bias_ + head * bias_.size());
    }
    if (step.additional) add_additional<rows>(step, query, d_out);
    const Real ones[kTileRows] = {1, 1, 1, 1};
    const int64_t row = int64_t(step.line->index) * box_.extent(2) * group_ + step.row;
    keys_.template accumulate_to<rows>(step, d_scores_, score_stride_, d_query_ + row * keys_.width(), keys_.width(),
                                       ones);
  }

 private:
  void box(int64_t index) {
    box_ = box_at(p_.neighborhood, boxes_, index);
    if (is_empty(box_)) return;
    const int64_t rows = int64_t(box_.extent(0)) * box_.extent(1) * box_.extent(2) * group_;
    fill_zero(d_query_, rows * keys_.width());
    sweep_.begin_box(box_);
    sweep_.neighbors(*this);
    sweep_.additional(*this, p_.additional);

    store_box({p_.dtype, p_.d_query, p_.neighborhood.positions(), p_.heads, p_.dim}, p_.neighborhood, box_, batch_,
              kv_head_ * group_, group_, d_query_, keys_.width(), Real(p_.scale));
  }

  template <int rows>
  void add_additional(const Step& step, const Real* query, const Real* d_out) {
    Real* to = d_additional_ + int64_t(panel_begin_) * (p_.dim + p_.value_dim);
    for (int n = 0; n < step.count; ++n) {
      for (int r = 0; r < rows; ++r) {
        const Real p = scores_[r * score_stride_ + n], ds = d_scores_[r * score_stride_ + n];
        for (int d = 0; d < p_.dim; ++d) to[d] += ds * query[r * p_.dim + d];
        for (int d = 0; d < p_.value_dim; ++d) to[p_.dim + d] += p * d_out[r * p_.value_dim + d];
      }
      to += p_.dim + p_.value_dim;
    }
  }

  const FusedBackwardParams& p_;
  const Boxes& boxes_;
  const Partials& partials_;
  Box box_;
  int64_t batch_ = 0, part_ = 0, bias_offset_ = 0;
  int kv_head_ = 0, group_, panel_begin_ = 0;
  BiasTable bias_;
  Sweep<false, Real, FusedBackwardQuery> sweep_;
  C keys_, values_;
  int64_t score_stride_;
  Real *query_, *d_out_, *lse_, *delta_, *scores_, *d_scores_, *d_query_;
  Real *d_bias_ = nullptr, *d_additional_ = nullptr;
};

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
