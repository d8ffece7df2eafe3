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

// Cuts what a CTA sees into boxes that fit into shared memory, along the outermost axes and as equal as can be.
void cut_box(const FusedShape& shape, Pass pass, int (&box)[kMaxRank]) {
  for (int& side : box) {
    const int whole = side;
    for (int boxes = 2; side > 1 && kernel_of(shape, pass, box).shared_bytes > kSmallBackwardBytes; ++boxes) {
      side = (whole + boxes - 1) / boxes;
    }
  }
}

void find_box_in_memory(const FusedShape& shape, const Plan& plan, Pass pass, int (&box)[kMaxRank]) {
  find_box(shape, plan.query_tile, walk_of(pass), box);
  cut_box(shape, pass, box);
}

// The segments of a warp's list in a box: whole along the inner axes as far as kMostColumns allows, so that the columns
// of a segment at the end of a list come first, and groups behind them are skipped.
void find_segment(const int (&list)[kMaxRank], const int (&box)[kMaxRank], int (&segment)[kMaxRank]) {
  int left = kMostColumns;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    segment[a] = std::min(std::min(list[a], box[a]), left);
    left /= segment[a];
  }
}

// Groups of 16 columns up to the last one of a list in each of its segments.
int64_t groups_of_list(const int (&list)[kMaxRank], const int (&segment)[kMaxRank]) {
  int64_t groups = 0;
  for (int x0 = 0; x0 < list[0]; x0 += segment[0]) {
    for (int x1 = 0; x1 < list[1]; x1 += segment[1]) {
      for (int x2 = 0; x2 < list[2]; x2 += segment[2]) {
        const int last0 = std::min(segment[0], list[0] - x0) - 1, last1 = std::min(segment[1], list[1] - x1) - 1;
        const int last2 = std::min(segment[2], list[2] - x2) - 1;
        groups += ((last0 * segment[1] + last1) * segment[2] + last2) / 16 + 1;
      }
    }
  }
  return groups;
}

// Columns that runs of 1, 2, 4, .. 64 rows see along each axis, on average: at the borders it may be many more.
struct AverageColumns {
  int columns[kMaxRank][7];

  AverageColumns(const Neighborhood& neighborhood, Walk walk) {
    for (int a = 0; a < kMaxRank; ++a) {
      for (int n = 0; n < 7; ++n) {
        const AxisTileCounts counts = count_axis_tiles(neighborhood.axes[a], 1 << n, 1 << n, 1, walk);
        columns[a][n] = int((counts.computed + counts.parts / 2) / counts.parts);
      }
    }
  }
  int of(int axis, int rows) const { return columns[axis][log2_of(rows)]; }
};

// Everything that the choice of a plan depends on.
ProblemKey key_of(const FusedShape& shape, Pass pass, const Plan& tiles, const TileLimits& limits) {
  ProblemKey key = {shape.neighborhood.rank, small_dim(shape), int64_t(pass), limits.warps,
                    limits.queries,          limits.keys};
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = shape.neighborhood.axes[a];
    key.insert(key.end(), {axis.length, axis.window, axis.stride, axis.dilation, axis.causal, tiles.query_tile[a],
                           tiles.query_part[a], tiles.key_tile[a]});
  }
  return key;
}

Plan choose(const FusedShape& shape, Pass pass, const Plan& tiles, const TileLimits& limits) {
  const Walk walk = walk_of(pass);
  const AverageColumns average(shape.neighborhood, walk);
  // Of 64 rows, in columns that all of them multiply.
  const auto cost = [&](const Plan& plan, const int (&list)[kMaxRank], const int (&box)[kMaxRank]) {
    int in_memory[kMaxRank], segment[kMaxRank], average_list[kMaxRank];
    std::copy(box, box + kMaxRank, in_memory);
    cut_box(shape, pass, in_memory);
    if (kernel_of(shape, pass, in_memory).shared_bytes > kSharedBytesOfAnyDevice) return -1.;
    find_segment(list, in_memory, segment);
    double copied = 1;
    for (int a = 0; a < kMaxRank; ++a) {
      average_list[a] = average.of(a, plan.query_part[a]);
      copied *= (average.of(a, plan.query_tile[a]) + in_memory[a] - 1) / in_memory[a] * in_memory[a];
    }
    return 16. * groups_of_list(average_list, segment) + kTileCopyCost * copied;
  };
  Plan small;
  if (!search_small(shape, walk, cost, small)) return tiles;

  int list[kMaxRank], box[kMaxRank];
  find_box(shape, small.query_part, walk, list);
  find_box(shape, small.query_tile, walk, box);
  const double small_tiles =
      count_tiles(shape.neighborhood, small.query_tile, small.query_part, small.key_tile, false, walk).query_tiles;
  const TileCounts counts =
      count_tiles(shape.neighborhood, tiles.query_tile, tiles.query_part, tiles.key_tile, false, walk);
  const double small_cost = small_tiles * kSmallRows * cost(small, list, box);
  const double tiles_cost =
      limits.queries * limits.keys * (counts.computed + limits.warps * kTileCopyCost * counts.visited);
  return small_cost < tiles_cost ? small : tiles;
}

}  // namespace

const char* why_not_small_backward(const FusedShape& shape, const Plan& plan, Pass pass) {
  if (const char* reason = why_not_any_small(shape)) return reason;
  if (shape.neighborhood.window_size() > kMostKeysOfSmallBackward) return "takes windows of up to 256 keys";
  if (plan.rows != kSmallRows) return "tiles have 64 rows";
  if (const char* reason = why_not_tiles(shape, plan, kSmallTiles)) return reason;
  int box[kMaxRank];
  find_box_in_memory(shape, plan, pass, box);
  if (kernel_of(shape, pass, box).shared_bytes > kSharedBytesOfAnyDevice) return "needs more shared memory";
  return nullptr;
}

Plan plan_backward_pass(const FusedShape& shape, Pass pass, const Plan& tiles, const TileLimits& limits) {
  if (why_not_any_small(shape) != nullptr || shape.neighborhood.window_size() > kMostKeysOfSmallBackward) return tiles;
  if (shape.neighborhood.positions() == 0) return tiles;  // there are no averages
  static Remembered<Plan> known;
  return known.find(key_of(shape, pass, tiles, limits), [&] { return choose(shape, pass, tiles, limits); });
}

Plan with_segments(const FusedShape& shape, const Plan& plan, Pass pass) {
  Plan of_segments = plan;
  int list[kMaxRank], box[kMaxRank];
  find_box(shape, plan.query_part, walk_of(pass), list);
  find_box_in_memory(shape, plan, pass, box);
  find_segment(list, box, of_segments.key_tile);
  return of_segments;
}

cudaError_t launch_small_backward(const FusedShape& shape, const Plan& plan, Pass pass, const BackwardParams& params,
                                  cudaStream_t stream) {
  SmallBackwardParams small;
  static_cast<BackwardParams&>(small) = params;
  int box[kMaxRank];
  find_box_in_memory(shape, plan, pass, box);
  set_up_box(shape, box, small);
  const TiledAxis* axes = params.schedule.axes;
  small.groups = (axes[0].key_tile * axes[1].key_tile * axes[2].key_tile + 15) / 16;
  return launch(kernel_of(shape, pass, box), params.schedule.tiles, small, stream);
}

}  // namespace jax_natten::sm80
