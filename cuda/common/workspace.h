// Sizes of the workspaces that the operations with two-stage reductions get as an extra result.
//
// jax_natten/primitives/workspace.py reserves exactly these sizes; the FFI layer checks that what it needs is there.
// Reductions over all positions of the grid (the gradients of the relative position bias and of the additional keys and
// values) are done in two stages so that they are deterministic: stage one writes one partial sum for each of
// `reduction_chunks` contiguous chunks of flattened positions, stage two adds the partials in order.
#pragma once

#include "params.h"

namespace jax_natten {

JAX_NATTEN_HD int reduction_chunks(int64_t positions) {
  return positions < 1 ? 1 : positions < 64 ? int(positions) : 64;
}

// First position of a chunk; chunk `reduction_chunks(positions)` begins at the end.
JAX_NATTEN_HD int64_t chunk_begin(int64_t positions, int chunk) {
  const int chunks = reduction_chunks(positions);
  return positions / chunks * chunk + imin(chunk, int(positions % chunks));
}

// Elements (accumulation dtype) of the fused backward's workspace that every program reserves: delta [batch, X, heads],
// then the partial sums of d_bias and of d_additional_keys and d_additional_values.
JAX_NATTEN_HD int64_t least_fused_backward_workspace(const FusedShape& shape) {
  const int64_t positions = shape.neighborhood.positions();
  const int64_t chunks = reduction_chunks(positions);
  const int64_t bias = shape.has_bias() ? shape.bias_batch * shape.heads * shape.neighborhood.bias_size() : 0;
  const int64_t additional = shape.batch * shape.additional * shape.kv_heads * (shape.dim + shape.value_dim);
  return shape.batch * positions * shape.heads + chunks * (bias + additional);
}

// The same for programs of this version: a second number per query and head for float16 and bfloat16 ("sm90"). Programs
// of earlier versions lack it, and name no implementation that needs it.
JAX_NATTEN_HD int64_t fused_backward_workspace(const FusedShape& shape) {
  const bool half = shape.dtype == DType::kFloat16 || shape.dtype == DType::kBFloat16;
  const int64_t second = half ? shape.batch * shape.neighborhood.positions() * shape.heads : 0;
  return least_fused_backward_workspace(shape) + second;
}

// Elements (accumulation dtype) of the IN operation's workspace: the partial sums of the additional keys.
JAX_NATTEN_HD int64_t in_workspace(const UnfusedShape& shape) {
  return reduction_chunks(shape.neighborhood.positions()) * shape.batch * shape.additional * shape.kv_heads * shape.dim;
}

}  // namespace jax_natten
