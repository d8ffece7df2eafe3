#include "sm90.h"

#include "../common/workspace.h"
#include "../naive/fused_backward.h"
#include "backward.h"
#include "backward_choose.h"
#include "choose.h"
#include "forward.h"

namespace jax_natten::sm90 {

const char* why_not_forward(const FusedForwardParams& params) {
  if (!params.sm90_tiles.any()) return why_not(params);
  Plan plan;
  if (const char* reason = decode_plan(params.sm90_tiles, plan)) return reason;
  return why_not(params, plan);
}

cudaError_t fused_forward(const FusedForwardParams& params, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  Plan plan;
  if (params.sm90_tiles.any()) {
    if (decode_plan(params.sm90_tiles, plan) != nullptr) return cudaErrorInvalidValue;
  } else {
    int device = 0, processors = 0;
    if (const cudaError_t error = current_device(device, processors); error != cudaSuccess) return error;
    if (!choose_plan(params, processors, plan)) return cudaErrorInvalidValue;
  }
  return launch(params, plan, stream);
}

const char* why_not_backward_call(const FusedBackwardParams& params) {
  if (const char* reason = why_not_backward(params)) return reason;
  if (params.workspace_size < fused_backward_workspace(params))
    return "needs two numbers per query and head of workspace";
  return nullptr;
}

cudaError_t fused_backward(const FusedBackwardParams& params, cudaStream_t stream) {
  if (is_empty(params)) return naive::fill_sums_with_zeros(params, stream);
  int device = 0, processors = 0;
  if (const cudaError_t error = current_device(device, processors); error != cudaSuccess) return error;
  BackwardPlan plan;
  if (!choose_backward_plan(params, processors, plan)) return cudaErrorInvalidValue;
  return launch_backward(params, plan, stream);
}

}  // namespace jax_natten::sm90
