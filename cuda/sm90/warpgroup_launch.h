// Launches of the kernels whose consumers are whole warpgroups, for wide_launch.cc and middle_launch.cc.
#pragma once

#include <cuda_runtime.h>

#include "../common/params.h"
#include "plan.h"
#include "warpgroup_params.h"
#include "warpgroup_shape.h"

namespace jax_natten::sm90 {

// For a plan that fits the problem and the kernel, and a problem that is not empty. blocks: CTAs of a multiprocessor.
cudaError_t launch_warpgroups(const FusedForwardParams& problem, const Plan& plan, const WarpgroupShape& compiled,
                              const WarpgroupInstance& instance, int threads, int blocks, cudaStream_t stream);

}  // namespace jax_natten::sm90
