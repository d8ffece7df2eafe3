// Direct kernels: every case, every GPU from sm_80 on. A group of lanes works on one query (or one key, in the inverse
// passes) of one head and walks its neighbors; nothing is shared between groups but the caches. They are the
// correctness net under the tensor-core kernels.
//
// All of them: every element of every result is written, also where batch, grid or heads are empty; sums have a fixed
// order, so repeated calls return the same bits; no memory is allocated and nothing is read back to the host.
#pragma once

#include <cuda_runtime.h>

#include "../common/params.h"

namespace jax_natten::naive {

cudaError_t fused_forward(const FusedForwardParams& params, cudaStream_t stream);

// Workspace: workspace_elements(params) elements of the accumulation type.
cudaError_t fused_backward(const FusedBackwardParams& params, cudaStream_t stream);

cudaError_t pn(const PnParams& params, cudaStream_t stream);
cudaError_t nn(const NnParams& params, cudaStream_t stream);
cudaError_t in(const InParams& params, cudaStream_t stream);

}  // namespace jax_natten::naive
