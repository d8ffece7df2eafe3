#include "warp_launch.h"

#include <algorithm>

#include "warp_instances.h"

namespace jax_natten::sm90 {
cudaError_t launch_warp(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  if (why_not_warp(problem, plan) != nullptr) return cudaErrorInvalidValue;
  if (is_empty(problem)) return cudaSuccess;

  const int dim = warp_compiled_dim(problem.dim), row_bytes = 2 * dim * plan.heads;
  WarpParams params;
  cudaError_t error = set_up_forward(problem, plan, row_bytes / 2, /*query_box_is_part=*/false, params);
  if (error != cudaSuccess) return error;
  params.slots = plan.slots;
  params.stages = plan.stages;
  params.warps = count_warps(plan);
  params.layout = make_warp_layout(problem, plan);
  find_warp_list(problem, plan, params.list);
  const int (&list)[kMaxRank] = params.list;
  params.mask_layout = KeyMaskLayout(list[0], list[1], list[2]);
  fill_key_mask(params.mask_layout, params.mask_table);
  const WarpCase which = warp_case(problem, plan);
  const int outer = warp_outer_axis(problem), rank = kMaxRank - outer;
  if (which == WarpCase::kSliced || which == WarpCase::kSingle) {
    for (int a = which == WarpCase::kSliced ? outer + 1 : 0; a < kMaxRank; ++a) {
      fill_whole_windows(params.mask_layout, params.mask_table, a, problem.neighborhood.axes[a].window);
    }
  }
  params.outer_keys = product(plan.key_tile) / plan.key_tile[outer];
  for (int n = 0; n < kWarpMostListed; ++n) {
    const int key = n < product(list) ? n : 0;  // masked, but it must be one that the box holds
    const int x[kMaxRank] = {key / (list[1] * list[2]), key / list[2] % list[1], key % list[2]};
    params.key_offset[n] = ((x[0] * plan.key_tile[1] + x[1]) * plan.key_tile[2] + x[2]) * row_bytes;
  }

  const int compiled = warp_compiled_list(product(list));
  if (which == WarpCase::kExtended) {
    error = set_up_extension(problem, plan, row_bytes / 2, std::min(compiled, product(plan.key_tile)), params);
    if (error != cudaSuccess) return error;
  }
  const void* kernel = reinterpret_cast<const void*>(plan.heads == 2 ? warp_pair(problem.dtype, rank, which)
                                                     : dim == 32     ? warp_d32(problem.dtype, compiled, rank, which)
                                                                     : warp_d64(problem.dtype, compiled, rank, which));
  int device = 0, processors = 0;
  if (error = current_device(device, processors); error != cudaSuccess) return error;
  if (error = allow_shared_memory(kernel, device, params.layout.bytes); error != cudaSuccess) return error;
  const int threads = 32 * (params.warps + 1);
  const int blocks = warp_blocks_of_processor(problem, plan);
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(std::min(params.schedule.tiles, processors * blocks)), dim3(threads), arguments,
                          params.layout.bytes, stream);
}

}  // namespace jax_natten::sm90
