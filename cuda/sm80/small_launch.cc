#include "small_launch.h"

#include <algorithm>

#include "forward_shape.h"
#include "fused_setup.h"
#include "small_instances.h"
#include "small_params.h"
#include "small_setup.h"
#include "small_shape.h"

namespace jax_natten::sm80 {
namespace {

const char* why_not_boxes(const FusedShape& shape, const int (&list)[kMaxRank], const int (&box)[kMaxRank]) {
  for (const int keys : list) {  // the product may be large
    if (keys > kSmallLists[1]) return "a warp's queries see too many keys";
  }
  if (product(list) > kSmallLists[1]) return "a warp's queries see too many keys";
  const KernelInstance kernel = small_forward(shape.dtype, small_dim(shape), kSmallLists[1]);
  if (kernel.shared_bytes + 2 * bytes_of_box(shape, box) > kSharedBytesOfAnyDevice) {
    return "the keys of a query tile do not fit into shared memory";
  }
  return nullptr;
}

}  // namespace

const char* why_not_small(const FusedShape& shape, const Plan& plan) {
  if (const char* reason = why_not_any_small(shape)) return reason;
  if (plan.rows != kSmallRows) return "tiles have 64 queries";
  if (const char* reason = why_not_tiles(shape, plan, kSmallTiles)) return reason;
  int list[kMaxRank], box[kMaxRank];
  find_box(shape, plan.query_part, Walk::kKeysOfQueries, list);
  find_box(shape, plan.query_tile, Walk::kKeysOfQueries, box);
  return why_not_boxes(shape, list, box);
}

bool plan_small(const FusedShape& shape, Plan& plan) {
  if (why_not_any_small(shape) != nullptr || shape.neighborhood.window_size() > kSmallLists[1]) return false;
  const auto cost = [&](const Plan&, const int (&list)[kMaxRank], const int (&box)[kMaxRank]) {
    if (why_not_boxes(shape, list, box) != nullptr) return -1.;
    // Copying a key of the box takes about as long as multiplying half a key of the four lists.
    return small_list(product(list)) + 0.5 * product(box);
  };
  return search_small(shape, Walk::kKeysOfQueries, cost, plan);
}

cudaError_t launch_small(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  SmallParams params;
  int box[kMaxRank];
  find_box(problem, plan.query_tile, Walk::kKeysOfQueries, box);
  set_up_box(problem, box, params);
  find_box(problem, plan.query_part, Walk::kKeysOfQueries, params.list);
  const int list = small_list(product(params.list));
  Plan of_list = plan;
  std::copy(params.list, params.list + kMaxRank, of_list.key_tile);
  set_up_tiles(problem, of_list, kSmallRows / kSmallWarps, list, problem.heads, params);
  set_up_forward_arrays(problem, params);
  params.scale = float(problem.scale * kLog2E);
  params.query_factor = 1;
  KernelInstance kernel = small_forward(problem.dtype, small_dim(problem), list);
  kernel.shared_bytes += 2 * params.box_bytes;
  return launch(kernel, params.schedule.tiles, params, stream);
}

}  // namespace jax_natten::sm80
