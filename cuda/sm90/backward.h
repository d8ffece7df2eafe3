// Fused neighborhood attention backward on Hopper (compute capability 9.0): the entry points.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "backward_plan.h"

namespace jax_natten::sm90 {

// Enqueues both passes. Neither allocates nor synchronises. cudaErrorInvalidValue if plan and problem do not fit.
cudaError_t launch_backward(const FusedBackwardParams& problem, const BackwardPlan& plan, cudaStream_t stream);

// One of them: the key pass reads what the query pass has written to the workspace.
cudaError_t launch_backward_pass(Walk pass, const FusedBackwardParams& problem, const BackwardPlan& plan,
                                 cudaStream_t stream);

}  // namespace jax_natten::sm90
