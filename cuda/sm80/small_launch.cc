#include "small_launch.h"

#include <algorithm>
#include <cstdint>

#include "../common/tile_model.h"
#include "../common/tiling.h"
#include "factorisations.h"
#include "forward_shape.h"
#include "fused_setup.h"
#include "small_instances.h"
#include "small_params.h"
#include "small_shape.h"

namespace jax_natten::sm80 {
namespace {

int compiled_dim(const FusedShape& shape) { return std::max(shape.dim, shape.value_dim) <= 32 ? 32 : 64; }

// What a CTA or a warp sees at most along each axis.
void find_box(const FusedShape& shape, const int (&queries)[kMaxRank], int (&box)[kMaxRank]) {
  for (int a = 0; a < kMaxRank; ++a) box[a] = most_keys_of_queries(shape.neighborhood.axes[a], queries[a]);
}

int bytes_of_box(const FusedShape& shape, const int (&box)[kMaxRank]) {
  const int64_t bytes = int64_t(box[0]) * box[1] * box[2] * compiled_dim(shape) * element_bytes(shape.dtype);
  return int(std::min<int64_t>((bytes + 127) / 128 * 128, INT32_MAX / 4));
}

const char* why_not_any_small(const FusedShape& shape) {
  if (shape.dtype != DType::kFloat16 && shape.dtype != DType::kBFloat16) return "takes float16 and bfloat16 only";
  if (std::max(shape.dim, shape.value_dim) > 64) return "takes head dimensions up to 64";
  if (shape.additional > 0) return "takes no additional keys";
  return nullptr;
}

const char* why_not_boxes(const FusedShape& shape, const int (&list)[kMaxRank], const int (&box)[kMaxRank]) {
  if (list[0] * list[1] * list[2] > kSmallLists[1]) return "a warp's queries see too many keys";
  const KernelInstance kernel = small_forward(shape.dtype, compiled_dim(shape), kSmallLists[1]);
  if (kernel.shared_bytes + 2 * bytes_of_box(shape, box) > kSharedBytesOfAnyDevice) {
    return "the keys of a query tile do not fit into shared memory";
  }
  return nullptr;
}

}  // namespace

const char* why_not_small(const FusedShape& shape, const Plan& plan) {
  if (const char* reason = why_not_any_small(shape)) return reason;
  if (plan.rows != kSmallRows) return "tiles have 64 queries";
  if (const char* reason = why_not_tiles(shape, plan, {kSmallWarps, kSmallRows / kSmallWarps, INT32_MAX}))
    return reason;
  int list[kMaxRank], box[kMaxRank];
  find_box(shape, plan.query_part, list);
  for (const int keys : list) {
    if (keys > kSmallLists[1]) return "a warp's queries see too many keys";
  }
  find_box(shape, plan.query_tile, box);
  return why_not_boxes(shape, list, box);
}

bool plan_small(const FusedShape& shape, Plan& plan) {
  if (why_not_any_small(shape) != nullptr || shape.neighborhood.window_size() > kSmallLists[1]) return false;
  const int first = kMaxRank - shape.neighborhood.rank;
  constexpr int kLogQueries = 4, kLogTile = 6;
  int seen[kMaxRank][kLogTile + 1];  // keys that 2^n queries see
  double tiles[kMaxRank][kLogTile + 1];
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = shape.neighborhood.axes[a];
    const int length = group_length(axis, 0);
    for (int n = 0; n <= (a < first ? 0 : kLogTile); ++n) {
      seen[a][n] = most_keys_of_queries(axis, 1 << n);
      tiles[a][n] = double((length + (1 << n) - 1) >> n) * (1 << n) / length;
    }
  }
  double best = -1;
  for_each_factorisation(kLogQueries, first, [&](const int (&part)[kMaxRank]) {
    for_each_factorisation(log2_of(kSmallWarps), first, [&](const int (&warps)[kMaxRank]) {
      int list[kMaxRank], box[kMaxRank];
      double waste = 1;
      for (int a = 0; a < kMaxRank; ++a) {
        list[a] = seen[a][part[a]];
        box[a] = seen[a][part[a] + warps[a]];
        waste *= tiles[a][part[a] + warps[a]];
        if (list[a] > kSmallLists[1]) return;
      }
      if (why_not_boxes(shape, list, box) != nullptr) return;
      // Copying a key of the box takes about as long as multiplying half a key of the four lists.
      const double cost = waste * (small_list(list[0] * list[1] * list[2]) + 0.5 * box[0] * box[1] * box[2]);
      if (best >= 0 && cost >= best) return;
      best = cost;
      plan.structure = Structure::kSmall;
      plan.rows = kSmallRows;
      for (int a = 0; a < kMaxRank; ++a) {
        plan.query_part[a] = 1 << part[a];
        plan.query_tile[a] = 1 << (part[a] + warps[a]);
        plan.key_tile[a] = 1;
      }
    });
  });
  return best >= 0;
}

cudaError_t launch_small(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  SmallParams params;
  find_box(problem, plan.query_tile, params.box);
  find_box(problem, plan.query_part, params.list);
  const int list = small_list(product(params.list)), dim = compiled_dim(problem);
  Plan of_list = plan;
  std::copy(params.list, params.list + kMaxRank, of_list.key_tile);
  set_up_tiles(problem, of_list, kSmallRows / kSmallWarps, list, problem.heads, params);
  set_up_forward_arrays(problem, params);
  params.scale = float(problem.scale * kLog2E);
  params.query_factor = 1;
  params.by_box1 = FastDivisor(params.box[1]);
  params.by_box2 = FastDivisor(params.box[2]);
  params.boxes = kSmallRows * dim * element_bytes(problem.dtype);
  params.box_bytes = bytes_of_box(problem, params.box);
  KernelInstance kernel = small_forward(problem.dtype, dim, list);
  kernel.shared_bytes += 2 * params.box_bytes;
  return launch(kernel, params.schedule.tiles, params, stream);
}

}  // namespace jax_natten::sm80
