#include "warpgroup_launch.h"

#include <algorithm>

#include "forward_setup.h"
#include "tile_setup.h"

namespace jax_natten::sm90 {

cudaError_t launch_warpgroups(const FusedForwardParams& problem, const Plan& plan, const WarpgroupShape& compiled,
                              const WarpgroupInstance& instance, int threads, int blocks, cudaStream_t stream) {
  WarpgroupParams params;
  cudaError_t error = set_up_forward(problem, plan, compiled.chunk, /*query_box_is_part=*/true, params);
  if (error != cudaSuccess) return error;
  params.mask_layout = KeyMaskLayout(plan.key_tile[0], plan.key_tile[1], plan.key_tile[2]);
  fill_key_mask(params.mask_layout, params.mask_table);
  params.padded = product(plan.key_tile) < compiled.keys;
  if (is_extended(problem)) {
    error = set_up_extension(problem, plan, compiled.chunk, product(plan.key_tile), params);
    if (error != cudaSuccess) return error;
  }

  const void* kernel = reinterpret_cast<const void*>(instance.kernel);
  int device = 0, processors = 0;
  if (error = current_device(device, processors); error != cudaSuccess) return error;
  if (error = allow_shared_memory(kernel, device, int(instance.shared_bytes)); error != cudaSuccess) return error;
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(std::min<int64_t>(params.schedule.tiles, int64_t(processors) * blocks)),
                          dim3(threads), arguments, instance.shared_bytes, stream);
}

}  // namespace jax_natten::sm90
