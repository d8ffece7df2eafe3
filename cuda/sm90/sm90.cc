#include "sm90.h"

#include "choose.h"
#include "forward.h"

namespace jax_natten::sm90 {

const char* why_not_forward(const FusedForwardParams& params) {
  if (params.tile_fields == 0) return why_not(params);
  Plan plan;
  if (const char* reason = decode_plan(params.tiles, params.tile_fields, plan)) return reason;
  return why_not(params, plan);
}

cudaError_t fused_forward(const FusedForwardParams& params, cudaStream_t stream) {
  if (is_empty(params)) return cudaSuccess;
  Plan plan;
  if (params.tile_fields > 0) {
    if (decode_plan(params.tiles, params.tile_fields, plan) != nullptr) return cudaErrorInvalidValue;
  } else {
    int device = 0, processors = 0;
    if (const cudaError_t error = current_device(device, processors); error != cudaSuccess) return error;
    if (!choose_plan(params, processors, plan)) return cudaErrorInvalidValue;
  }
  return launch(params, plan, stream);
}

}  // namespace jax_natten::sm90
