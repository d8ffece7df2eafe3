// The Hopper kernels as the custom-call handlers see them.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "plan.h"

namespace jax_natten::sm90 {

// Why the kernels do not take a call, in words that follow the name of the implementation; nullptr if they do.
const char* why_not_forward(const FusedForwardParams& params);

// Computes with the tiles that the caller asks for, else with those that the cost model prefers. Neither allocates on
// the device nor synchronises.
cudaError_t fused_forward(const FusedForwardParams& params, cudaStream_t stream);

// The same for the backward, whose tiles are always those of the cost model. Programs that reserve less workspace than
// fused_backward_workspace() are refused: versions before these kernels wrote such.
const char* why_not_backward_call(const FusedBackwardParams& params);
cudaError_t fused_backward(const FusedBackwardParams& params, cudaStream_t stream);

}  // namespace jax_natten::sm90
