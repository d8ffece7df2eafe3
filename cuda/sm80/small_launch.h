// Host side of the kernel for small windows.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "plan.h"

namespace jax_natten::sm80 {

// `plan` fits the problem.
cudaError_t launch_small(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream);

}  // namespace jax_natten::sm80
