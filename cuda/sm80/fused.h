// Fused neighborhood attention on tensor cores (mma.sync), for every GPU from compute capability 8.0 on: the entry
// points.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "backward_params.h"
#include "forward_plan.h"
#include "fused_params.h"
#include "limits.h"
#include "plan.h"

namespace jax_natten::sm80 {

// Why the kernels do not take a call, or not with the tiles that it asks for; nullptr if they do.
const char* why_not_forward(const FusedForwardParams& problem);

// Enqueue a problem's computation. They neither allocate nor synchronise. cudaErrorInvalidValue if there is a reason
// why not. `precision` is that of float32. Without a plan: with the tiles that the call asks for, or the default ones.
cudaError_t fused_forward(const FusedForwardParams& problem, Precision precision, const Plan& plan,
                          cudaStream_t stream);
cudaError_t fused_forward(const FusedForwardParams& problem, Precision precision, cudaStream_t stream);

// The backward's passes: tiles of queries, tiles of keys, for which `query` in a plan reads as key, and tiles of
// queries again for the gradient of the bias.
struct BackwardPlan {
  Plan queries, keys, bias;
};

const char* why_not_backward_plan(const FusedShape& shape, const BackwardPlan& plan);
BackwardPlan plan_backward(const FusedShape& shape);

// The workspace is that of ../common/workspace.h.
cudaError_t fused_backward(const FusedBackwardParams& problem, Precision precision, const BackwardPlan& plan,
                           cudaStream_t stream);
cudaError_t fused_backward(const FusedBackwardParams& problem, Precision precision, cudaStream_t stream);

// What its bias pass finds and uses in the workspace.
struct BiasWorkspace {
  DeltaArray delta;
  float* partials;  // [chunks, bias_batch, heads, bias_size]
  int chunks;
};

// That pass alone, in both stages, for who has computed delta otherwise. Fewer than 2^31 partial tables.
cudaError_t backward_of_bias(const FusedBackwardParams& problem, Precision precision, const Plan& plan,
                             const BiasWorkspace& workspace, cudaStream_t stream);
cudaError_t backward_of_bias(const FusedBackwardParams& problem, Precision precision, const BiasWorkspace& workspace,
                             cudaStream_t stream);

}  // namespace jax_natten::sm80
