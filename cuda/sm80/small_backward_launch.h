// Host side of the backward's passes for small windows.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "backward_params.h"
#include "backward_shape.h"
#include "plan.h"

namespace jax_natten::sm80 {

// Why a plan of Structure::kSmall does not fit a pass; nullptr if it does.
const char* why_not_small_backward(const FusedShape& shape, const Plan& plan, Pass pass);

// The plan for a pass: the best one of that structure if it is estimated to take less time than `tiles`, which has
// tiles as `limits` says; else that one.
Plan plan_backward_pass(const FusedShape& shape, Pass pass, const Plan& tiles, const TileLimits& limits);

// The plan as set_up_tiles() takes it: with key tiles that are the segments of the lists (small_backward.cuh), of up to
// kMostColumns keys.
Plan with_segments(const FusedShape& shape, const Plan& plan, Pass pass);

// `params`: set up for with_segments().
cudaError_t launch_small_backward(const FusedShape& shape, const Plan& plan, Pass pass, const BackwardParams& params,
                                  cudaStream_t stream);

}  // namespace jax_natten::sm80
