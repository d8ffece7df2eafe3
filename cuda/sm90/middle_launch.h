// Host side of the middle kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "forward_setup.h"

namespace jax_natten::sm90 {

// Enqueues the kernel. Neither allocates nor synchronises. cudaErrorInvalidValue if plan and problem do not fit.
cudaError_t launch_middle(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream);

}  // namespace jax_natten::sm90
