// Second stages of the backward's sums over all queries.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"

namespace jax_natten::sm80 {

// d_additional_keys and d_additional_values from their partial sums in the workspace, `chunks` of each.
cudaError_t sum_additional(const FusedBackwardParams& problem, int chunks, cudaStream_t stream);

// d_bias from its partial tables.
cudaError_t sum_bias(const FusedBackwardParams& problem, const float* partials, int chunks, cudaStream_t stream);

}  // namespace jax_natten::sm80
