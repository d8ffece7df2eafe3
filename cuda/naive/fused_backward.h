// The passes of the fused backward, in the order in which they run.
//
// Workspace (accumulation dtype): delta [batch, X, heads], which the query pass writes and the others read; partial
// sums of d_bias [chunks, bias_batch, heads, table]; partial sums of the additional keys and values [batch, chunks,
// additional, kv_heads, dim + value_dim]. Chunks are those of ../common/workspace.h.
#pragma once

#include <cuda_runtime.h>

#include "../common/params.h"
#include "../common/workspace.h"

namespace jax_natten::naive {

// d_query, delta.
cudaError_t backward_of_queries(const FusedBackwardParams& params, cudaStream_t stream);

// d_key, d_value, and the sums of the additional keys and values in both stages.
cudaError_t backward_of_keys(const FusedBackwardParams& params, cudaStream_t stream);

// d_bias in both stages.
cudaError_t backward_of_bias(const FusedBackwardParams& params, cudaStream_t stream);

// What remains to be written of a problem without queries: the gradients of what all queries share.
cudaError_t fill_sums_with_zeros(const FusedBackwardParams& params, cudaStream_t stream);

// Elements of d_bias.
JAX_NATTEN_HD int64_t bias_gradient_size(const FusedShape& p) {
  return p.bias_batch * p.heads * p.neighborhood.bias_size();
}

// Where the partial sums begin in the workspace.
JAX_NATTEN_HD int64_t bias_partials(const FusedShape& p) { return p.batch * p.neighborhood.positions() * p.heads; }
JAX_NATTEN_HD int64_t additional_partials(const FusedShape& p) {
  return bias_partials(p) + (p.has_bias() ? reduction_chunks(p.neighborhood.positions()) * bias_gradient_size(p) : 0);
}

}  // namespace jax_natten::naive
