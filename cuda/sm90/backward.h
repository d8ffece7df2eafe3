// Fused neighborhood attention backward on Hopper (compute capability 9.0): the entry points.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "plan.h"

namespace jax_natten::sm90 {

// How one of the two passes (backward_params.h) is computed. The tiles of the key pass are those of the walk over the
// queries of keys: there `query_tile` holds keys and `key_tile` queries.
struct PassPlan : Tiles {
  bool small = false;  // the variant for small windows
};

struct BackwardPlan {
  PassPlan query, key;
};

// Why a plan does not fit a problem; nullptr if it does.
const char* why_not(const FusedShape& shape, const BackwardPlan& plan);

// Elements of float that the workspace needs.
int64_t backward_workspace(const FusedShape& shape);

// Enqueues both passes. Neither allocates nor synchronises. cudaErrorInvalidValue if plan and problem do not fit.
cudaError_t launch_backward(const FusedBackwardParams& problem, const BackwardPlan& plan, cudaStream_t stream);

// One of them: the key pass reads what the query pass has written to the workspace.
cudaError_t launch_backward_pass(Walk pass, const FusedBackwardParams& problem, const BackwardPlan& plan,
                                 cudaStream_t stream);

}  // namespace jax_natten::sm90
