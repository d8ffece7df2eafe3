#include "warp_launch.h"

#include <algorithm>

#include "warp_instances.h"

namespace jax_natten::sm90 {
namespace {

constexpr int kSharedBytes = 227 * 1024, kSharedBytesOfProcessor = 228 * 1024, kReservedBytes = 1024;

int compiled_dim(int dim) { return dim <= 32 ? 32 : 64; }

int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// What a warp gathers from a box: all that one part can see on an axis, or the whole box.
void find_list(const FusedShape& shape, const Plan& plan, int (&list)[kMaxRank]) {
  for (int a = 0; a < kMaxRank; ++a) {
    list[a] = std::min(plan.key_tile[a], most_keys_of_queries(shape.neighborhood.axes[a], plan.query_part[a]));
  }
}

// The shortest compiled list that holds `keys`; 0: none.
int compiled_list(int keys) {
  for (const int compiled : kWarpLists) {
    if (keys <= compiled) return compiled;
  }
  return 0;
}

int count_warps(const Plan& plan) { return product(plan.query_tile) / product(plan.query_part) * plan.heads; }

WarpLayout make_layout(const FusedShape& shape, const Plan& plan) {
  const int dim = compiled_dim(shape.dim), row_bytes = 2 * dim * plan.heads;
  WarpLayout layout;
  layout.query_bytes = round_up(product(plan.query_tile) * row_bytes, 1024);
  layout.key_bytes = round_up(product(plan.key_tile) * row_bytes, 1024);
  layout.keys = plan.slots * layout.query_bytes;
  layout.staging = layout.keys + plan.stages * 2 * layout.key_bytes;
  layout.tables = layout.staging + count_warps(plan) * kWarpRows * 2 * dim;
  layout.bytes = layout.tables + kWarpTableBytes;
  return layout;
}

}  // namespace

const char* why_not_warp(const FusedShape& shape, const Plan& plan) {
  if (const char* reason = why_not_any(shape)) return reason;
  if (shape.dim > 64) return "takes head dimensions up to 64";
  if (plan.heads > 1 && shape.dim != 32) return "boxes of two heads need a head dimension of 32";
  if (const char* reason = why_not_tiles(shape, plan)) return reason;
  if (product(plan.query_part) > kWarpRows) return "a warp has at most 16 queries";
  if (32 * (count_warps(plan) + 1) > warp_most_threads(compiled_dim(shape.dim))) return "has too many warps";
  if (plan.slots < 1 || plan.slots > kWarpMostStages || plan.stages < 1 || plan.stages > kWarpMostStages) {
    return "rings have 1 to 4 stages";
  }
  for (int a = 0; a < kMaxRank; ++a) {
    if (most_keys_of_queries(shape.neighborhood.axes[a], plan.query_tile[a]) > kWarpMostKeys)
      return "sees too many keys";
  }
  int list[kMaxRank];
  find_list(shape, plan, list);
  if (compiled_list(product(list)) == 0) return "a warp's queries see too many keys of a box";
  if (make_layout(shape, plan).bytes > kSharedBytes) return "boxes do not fit into shared memory";
  return nullptr;
}

cudaError_t launch_warp(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  if (why_not_warp(problem, plan) != nullptr) return cudaErrorInvalidValue;
  if (problem.batch * problem.neighborhood.positions() * problem.heads == 0) return cudaSuccess;

  const int dim = compiled_dim(problem.dim), row_bytes = 2 * dim * plan.heads;
  WarpParams params;
  cudaError_t error = set_up_forward(problem, plan, row_bytes / 2, /*query_box_is_part=*/false, params);
  if (error != cudaSuccess) return error;
  params.plain = true;
  for (const Axis& axis : problem.neighborhood.axes) params.plain = params.plain && axis.stride == 1 && !axis.causal;
  params.slots = plan.slots;
  params.stages = plan.stages;
  params.warps = count_warps(plan);
  params.layout = make_layout(problem, plan);
  find_list(problem, plan, params.list);
  const int (&list)[kMaxRank] = params.list;
  params.mask_layout = KeyMaskLayout(list[0], list[1], list[2]);
  fill_key_mask(params.mask_layout, params.mask_table);
  for (int n = 0; n < kWarpMostListed; ++n) {
    const int key = n < product(list) ? n : 0;  // masked, but it must be one that the box holds
    const int x[kMaxRank] = {key / (list[1] * list[2]), key / list[2] % list[1], key % list[2]};
    params.key_offset[n] = ((x[0] * plan.key_tile[1] + x[1]) * plan.key_tile[2] + x[2]) * row_bytes;
  }

  const int compiled = compiled_list(product(list)), rank = problem.neighborhood.rank;
  const void* kernel = reinterpret_cast<const void*>(dim == 32 ? warp_d32(problem.dtype, compiled, plan.heads, rank)
                                                               : warp_d64(problem.dtype, compiled, rank));
  int device = 0, processors = 0;
  if (error = current_device(device, processors); error != cudaSuccess) return error;
  if (error = allow_shared_memory(kernel, device, params.layout.bytes); error != cudaSuccess) return error;
  const int threads = 32 * (params.warps + 1);
  const int blocks = std::min(kSharedBytesOfProcessor / (params.layout.bytes + kReservedBytes),
                              65536 / (warp_registers(dim) * threads));  // of a multiprocessor
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(std::min(params.schedule.tiles, processors * std::max(blocks, 1))),
                          dim3(threads), arguments, params.layout.bytes, stream);
}

}  // namespace jax_natten::sm90
