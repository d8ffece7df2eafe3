// Host side of the kernel for small windows.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "plan.h"

namespace jax_natten::sm80 {

// Why a plan of Structure::kSmall does not fit a problem; nullptr if it does.
const char* why_not_small(const FusedShape& shape, const Plan& plan);

// The best plan of that structure; false if none fits.
bool plan_small(const FusedShape& shape, Plan& plan);

cudaError_t launch_small(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream);

}  // namespace jax_natten::sm80
