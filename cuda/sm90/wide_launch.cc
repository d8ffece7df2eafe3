#include "wide_launch.h"

#include <algorithm>

#include "wide_instances.h"
#include "wide_params.h"

namespace jax_natten::sm90 {
namespace {

WideInstance find_instance(int dim, DType dtype, int rank, bool extended) {
  switch (dim) {
    case 32:
      return wide_d32(dtype, rank, extended);
    case 64:
      return wide_d64(dtype, rank, extended);
    case 96:
      return wide_d96(dtype, rank, extended);
    case 128:
      return wide_d128(dtype, rank, extended);
    case 192:
      return wide_d192(dtype, rank, extended);
    default:
      return wide_d256(dtype, rank, extended);
  }
}

}  // namespace

cudaError_t launch_wide(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  if (why_not_wide(problem, plan) != nullptr) return cudaErrorInvalidValue;
  if (is_empty(problem)) return cudaSuccess;

  const WideShape compiled = wide_shape(compiled_head_dim(problem.dim));
  WideParams params;
  cudaError_t error = set_up_forward(problem, plan, compiled.chunk, /*query_box_is_part=*/true, params);
  if (error != cudaSuccess) return error;
  params.mask_layout = KeyMaskLayout(plan.key_tile[0], plan.key_tile[1], plan.key_tile[2]);
  fill_key_mask(params.mask_layout, params.mask_table);
  params.padded = product(plan.key_tile) < compiled.keys;
  const bool extended = is_extended(problem);
  if (extended) {
    error = set_up_extension(problem, plan, compiled.chunk, product(plan.key_tile), params);
    if (error != cudaSuccess) return error;
  }

  const WideInstance instance = find_instance(compiled.dim, problem.dtype, problem.neighborhood.rank, extended);
  const void* kernel = reinterpret_cast<const void*>(instance.kernel);
  int device = 0, processors = 0;
  if (error = current_device(device, processors); error != cudaSuccess) return error;
  if (error = allow_shared_memory(kernel, device, int(instance.shared_bytes)); error != cudaSuccess) return error;
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(std::min(params.schedule.tiles, processors)), dim3(kWideThreads), arguments,
                          instance.shared_bytes, stream);
}

}  // namespace jax_natten::sm90
