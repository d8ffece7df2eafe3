// Fused backward. The probabilities are recomputed from the log-sum-exp, once for the gradients of the queries and once
// for those of the keys and values, so that every output has one writer and no sum depends on the order of threads.
#pragma once

#include "fused_backward_key.h"
#include "fused_backward_query.h"
#include "run_boxes.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// delta = sum(out * d_out) - d_lse of every query and head, at the start of the workspace.
template <typename Real>
void backward_delta(const FusedBackwardParams& p, Executor& executor) {
  constexpr int64_t kRowsPerTask = 1024;
  const int64_t rows = p.batch * p.neighborhood.positions() * p.heads;
  const int width = padded<Real>(p.value_dim);
  parallel(executor, ceil_divide(rows, kRowsPerTask), 2 * width * sizeof(Real), [&](int64_t task, void* scratch) {
    Real *out = static_cast<Real*>(scratch), *d_out = out + width;
    for (int64_t row = task * kRowsPerTask; row < min64((task + 1) * kRowsPerTask, rows); ++row) {
      load_row(p.dtype, p.out, row * p.value_dim, p.value_dim, out);
      load_row(p.dtype, p.d_out, row * p.value_dim, p.value_dim, d_out);
      Vec<Real> sum = {};
      for (int d = 0; d < width; d += kLanes<Real>) sum += load(out + d) * load(d_out + d);
      static_cast<Real*>(p.workspace)[row] = sum_of_lanes<Real>(sum) - static_cast<const Real*>(p.d_lse)[row];
    }
  });
}

// Second stage of the reductions: adds the partial sums in order.
template <typename Real>
void backward_reduce(const FusedBackwardParams& p, const typename FusedBackwardQuery<Real>::Partials& partials,
                     Executor& executor) {
  using Partials = typename FusedBackwardQuery<Real>::Partials;
  constexpr int64_t kBiasPerTask = 1024;
  const int64_t bias_elements = p.has_bias() ? Partials::bias_elements(p) : 0;
  parallel(executor, ceil_divide(bias_elements, kBiasPerTask), 0, [&](int64_t task, void*) {
    Real* d_bias = static_cast<Real*>(p.d_bias);
    for (int64_t i = task * kBiasPerTask; i < min64((task + 1) * kBiasPerTask, bias_elements); ++i) {
      Real sum = 0;
      for (int64_t part = 0; part < partials.parts; ++part) sum += partials.bias[part * bias_elements + i];
      d_bias[i] = sum;
    }
  });

  // A task is an additional key of a batch element and key head.
  const int64_t heads = p.batch * p.kv_heads, width = p.dim + p.value_dim;
  const int64_t padded_sums = width + kLanes<Real>;  // for reads of whole vectors
  parallel(executor, heads * p.additional, padded_sums * sizeof(Real), [&](int64_t task, void* scratch) {
    const int64_t head = task / p.additional, key = task % p.additional;
    Real* sum = static_cast<Real*>(scratch);
    for (int64_t d = 0; d < width; ++d) sum[d] = 0;
    for (int64_t part = 0; part < partials.parts; ++part) {
      const Real* partial = partials.additional + ((part * heads + head) * p.additional + key) * width;
      for (int64_t d = 0; d < width; ++d) sum[d] += partial[d];
    }
    const int64_t row = (head / p.kv_heads * p.additional + key) * p.kv_heads + head % p.kv_heads;
    store_row(p.dtype, p.d_additional_keys, row * p.dim, p.dim, sum);
    store_row(p.dtype, p.d_additional_values, row * p.value_dim, p.value_dim, sum + p.dim);
  });
}

// Without queries there are only the gradients of what all queries share.
template <typename Real>
void backward_of_nothing(const FusedBackwardParams& p) {
  const int64_t additional = p.batch * p.additional * p.kv_heads * element_size(p.dtype);
  if (additional > 0) {
    __builtin_memset(p.d_additional_keys, 0, size_t(additional * p.dim));
    __builtin_memset(p.d_additional_values, 0, size_t(additional * p.value_dim));
  }
  if (p.has_bias()) {
    const int64_t elements = p.bias_batch * p.heads * p.neighborhood.bias_size();
    __builtin_memset(p.d_bias, 0, size_t(elements) * sizeof(Real));
  }
}

template <typename Real>
void fused_backward(const FusedBackwardParams& params, Executor& executor) {
  if (params.batch * params.neighborhood.positions() == 0) return backward_of_nothing<Real>(params);
  using Query = FusedBackwardQuery<Real>;
  using Key = FusedBackwardKey<Real>;
  const Boxes query_boxes = Query::boxes(params), key_boxes = Key::boxes(params);
  const typename Query::Partials partials(params, query_boxes);
  Arena query_scratch(nullptr), key_scratch(nullptr);
  Query(params, query_boxes, partials, query_scratch);
  Key(params, key_boxes, partials.delta, key_scratch);

  backward_delta<Real>(params, executor);
  const int64_t key_tasks = Key::tasks(params, key_boxes), query_tasks = Query::tasks(params, partials);
  const size_t scratch_bytes = query_scratch.used() > key_scratch.used() ? query_scratch.used() : key_scratch.used();
  parallel(executor, key_tasks + query_tasks, scratch_bytes, [&](int64_t task, void* scratch) {
    Arena arena(scratch);
    if (task < key_tasks) {
      Key(params, key_boxes, partials.delta, arena).run(task);
    } else {
      Query(params, query_boxes, partials, arena).run(task - key_tasks);
    }
  });
  backward_reduce<Real>(params, partials, executor);
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
