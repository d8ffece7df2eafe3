#include "small_backward_launch.h"

#include <algorithm>
#include <cstdint>

#include "../common/remembered.h"
#include "../common/tile_model.h"
#include "forward_shape.h"
#include "fused_setup.h"
#include "small_instances.h"
#include "small_params.h"
#include "small_setup.h"
#include "small_shape.h"

namespace jax_natten::sm80 {
namespace {

// The instance, with the shared memory for boxes.
KernelInstance kernel_of(const FusedShape& shape, Pass pass, const int (&box)[kMaxRank]) {
  const bool keys = pass == Pass::kKeys;
  KernelInstance kernel = (keys ? small_backward_key : small_backward_query)(shape.dtype, small_dim(shape));
  int64_t bytes = 2 * int64_t(bytes_of_box(shape, box));
  if (keys) bytes += 2 * sizeof(float) * (int64_t(box[0]) * box[1] * box[2]);  // lse and delta
  kernel.shared_bytes = int(std::min<int64_t>(kernel.shared_bytes + bytes, INT32_MAX));
  return kernel;
}

// Whole along the inner axes as far as kMostColumns allows: then the columns of a segment at the end of a list that
// somebody sees come first, and groups behind them are skipped.
void find_segment(const int (&list)[kMaxRank], int (&segment)[kMaxRank]) {
  int left = kMostColumns;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    segment[a] = std::min(list[a], left);
    left /= segment[a];
  }
}

// Groups of 16 columns of a list that fits into a box.
double groups_of_list(const int (&list)[kMaxRank]) {
  int segment[kMaxRank], groups = 0;
  find_segment(list, segment);
  for (int x0 = 0; x0 < list[0]; x0 += segment[0]) {
    for (int x1 = 0; x1 < list[1]; x1 += segment[1]) {
      for (int x2 = 0; x2 < list[2]; x2 += segment[2]) {
        const int columns = std::min(segment[0], list[0] - x0) * std::min(segment[1], list[1] - x1) *
                            std::min(segment[2], list[2] - x2);
        groups += (columns + 15) / 16;
      }
    }
  }
  return groups;
}

// Everything that the choice of a plan depends on.
ProblemKey key_of(const FusedShape& shape, Pass pass, const Plan& tiles, const TileLimits& limits) {
  ProblemKey key = {shape.neighborhood.rank, small_dim(shape), int64_t(pass), limits.queries, limits.keys};
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = shape.neighborhood.axes[a];
    key.insert(key.end(), {axis.length, axis.window, axis.stride, axis.dilation, axis.causal, tiles.query_tile[a],
                           tiles.query_part[a], tiles.key_tile[a]});
  }
  return key;
}

Plan choose(const FusedShape& shape, Pass pass, const Plan& tiles, const TileLimits& limits) {
  const Walk walk = walk_of(pass);
  const auto fits = [&](const int (&box)[kMaxRank]) {
    return kernel_of(shape, pass, box).shared_bytes <= kSharedBytesOfAnyDevice;
  };
  Plan small;
  const auto cost_of_tile = [&](const int (&list)[kMaxRank], const int (&box)[kMaxRank]) {
    return fits(box) ? 16 * groups_of_list(list) + kSmallCopyCost * product(box) : -1.;
  };
  if (!search_small(shape, walk, cost_of_tile, small)) return tiles;

  // Both in pairs of a row and a column.
  int list[kMaxRank], box[kMaxRank];
  find_box(shape, small.query_part, walk, list);
  find_box(shape, small.query_tile, walk, box);
  const TileCounts of_small =
      count_tiles(shape.neighborhood, small.query_tile, small.query_part, small.key_tile, false, walk);
  const double small_cost = of_small.parts * 16 * 16 * groups_of_list(list) +
                            of_small.query_tiles * kSmallRows * kSmallCopyCost * product(box);
  const TileCounts of_tiles =
      count_tiles(shape.neighborhood, tiles.query_tile, tiles.query_part, tiles.key_tile, false, walk);
  const double tiles_cost =
      limits.queries * limits.keys * (of_tiles.computed + limits.warps * kTileCopyCost * of_tiles.visited);
  return small_cost < tiles_cost ? small : tiles;
}

}  // namespace

const char* why_not_small_backward(const FusedShape& shape, const Plan& plan, Pass pass) {
  if (const char* reason = why_not_any_small(shape)) return reason;
  if (plan.rows != kSmallRows) return "tiles have 64 rows";
  if (const char* reason = why_not_tiles(shape, plan, kSmallTiles)) return reason;
  int box[kMaxRank];
  find_box(shape, plan.query_tile, walk_of(pass), box);
  if (kernel_of(shape, pass, box).shared_bytes > kSharedBytesOfAnyDevice) {
    return "what a tile sees does not fit into shared memory";
  }
  return nullptr;
}

Plan plan_backward_pass(const FusedShape& shape, Pass pass, const Plan& tiles, const TileLimits& limits) {
  // A box that cannot hold one window need not be looked for.
  if (why_not_any_small(shape) != nullptr || shape.neighborhood.window_size() > kSharedBytesOfAnyDevice) return tiles;
  static Remembered<Plan> known;
  return known.find(key_of(shape, pass, tiles, limits), [&] { return choose(shape, pass, tiles, limits); });
}

Plan with_segments(const FusedShape& shape, const Plan& plan, Pass pass) {
  Plan of_segments = plan;
  int list[kMaxRank];
  find_box(shape, plan.query_part, walk_of(pass), list);
  find_segment(list, of_segments.key_tile);
  return of_segments;
}

cudaError_t launch_small_backward(const FusedShape& shape, const Plan& plan, Pass pass, const BackwardParams& params,
                                  cudaStream_t stream) {
  SmallBackwardParams small;
  static_cast<BackwardParams&>(small) = params;
  set_up_box(shape, plan, walk_of(pass), small);
  const TiledAxis* axes = params.schedule.axes;
  small.groups = (axes[0].key_tile * axes[1].key_tile * axes[2].key_tile + 15) / 16;
  return launch(kernel_of(shape, pass, small.box), params.schedule.tiles, small, stream);
}

}  // namespace jax_natten::sm80
