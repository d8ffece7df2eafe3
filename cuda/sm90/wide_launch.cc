#include "wide_launch.h"

#include <algorithm>

#include "wide_instances.h"
#include "wide_params.h"

namespace jax_natten::sm90 {
namespace {

WideInstance find_instance(int dim, DType dtype, int rank) {
  switch (dim) {
    case 32:
      return wide_d32(dtype, rank);
    case 64:
      return wide_d64(dtype, rank);
    case 96:
      return wide_d96(dtype, rank);
    case 128:
      return wide_d128(dtype, rank);
    case 192:
      return wide_d192(dtype, rank);
    default:
      return wide_d256(dtype, rank);
  }
}

}  // namespace

const char* why_not_wide(const FusedShape& shape, const Plan& plan) {
  if (const char* reason = why_not_any(shape)) return reason;
  if (const char* reason = why_not_tiles(shape, plan)) return reason;
  if (plan.heads != 1) return "tiles have one head";
  if (product(plan.query_tile) != kWideGroups * product(plan.query_part)) return "query tiles must have two parts";
  if (product(plan.query_part) > kWideGroupRows) return "a warpgroup has at most 64 queries";
  if (product(plan.key_tile) > wide_shape(compiled_head_dim(shape.dim)).keys) return "key tiles have too many keys";
  return nullptr;
}

cudaError_t launch_wide(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  if (why_not_wide(problem, plan) != nullptr) return cudaErrorInvalidValue;
  if (problem.batch * problem.neighborhood.positions() * problem.heads == 0) return cudaSuccess;

  const WideShape compiled = wide_shape(compiled_head_dim(problem.dim));
  WideParams params;
  cudaError_t error = set_up_forward(problem, plan, compiled.chunk, /*query_box_is_part=*/true, params);
  if (error != cudaSuccess) return error;
  params.mask_layout = KeyMaskLayout(plan.key_tile[0], plan.key_tile[1], plan.key_tile[2]);
  fill_key_mask(params.mask_layout, params.mask_table);
  params.padded = product(plan.key_tile) < compiled.keys;

  const WideInstance instance = find_instance(compiled.dim, problem.dtype, problem.neighborhood.rank);
  const void* kernel = reinterpret_cast<const void*>(instance.kernel);
  int device = 0, processors = 0;
  if (error = current_device(device, processors); error != cudaSuccess) return error;
  if (error = allow_shared_memory(kernel, device, int(instance.shared_bytes)); error != cudaSuccess) return error;
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(std::min(params.schedule.tiles, processors)), dim3(kWideThreads), arguments,
                          instance.shared_bytes, stream);
}

}  // namespace jax_natten::sm90
