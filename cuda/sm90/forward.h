// Fused neighborhood attention forward on Hopper (compute capability 9.0): the entry points.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "forward_setup.h"

namespace jax_natten::sm90 {

// Enqueues a problem's computation under a plan. Neither allocates nor synchronises.
cudaError_t launch(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream);

}  // namespace jax_natten::sm90
