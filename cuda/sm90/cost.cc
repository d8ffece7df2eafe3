#include "cost.h"

#include <algorithm>
#include <cmath>

#include "middle_shape.h"
#include "warp_shape.h"
#include "wide_shape.h"

namespace jax_natten::sm90 {
namespace {

// All constants are fitted to times of the kernels on an H100 (docs/kernels.md has the table). An H200, whose memory is
// faster, takes up to a third less where windows are small; the choice is the same.
constexpr double kMicrosecond = 1e-6;

// The wide kernel on one multiprocessor.
struct WideCost {
  double tile;    // both warpgroups, one key tile each
  double masked;  // more for a masked tile of one warpgroup
};

constexpr WideCost wide_cost(int dim) {
  return dim == 32    ? WideCost{0.96 * kMicrosecond, 0.11 * kMicrosecond}
         : dim == 64  ? WideCost{1.22 * kMicrosecond, 0.14 * kMicrosecond}
         : dim == 96  ? WideCost{1.40 * kMicrosecond, 0.15 * kMicrosecond}
         : dim == 128 ? WideCost{1.68 * kMicrosecond, 0.19 * kMicrosecond}
         : dim == 192 ? WideCost{1.85 * kMicrosecond, 0.15 * kMicrosecond}
                      : WideCost{1.62 * kMicrosecond, 0.10 * kMicrosecond};
}

// Of a tile that only one warpgroup computes, beyond the half of WideCost::tile: nothing overlaps its softmax.
constexpr double kWideAlone = 0.9;
// Prologue and epilogue of a query tile.
constexpr double wide_query_tile(int dim) { return (0.6 + 0.4 * dim / 128) * kMicrosecond; }

// The middle kernel on one multiprocessor, all of whose CTAs are busy.
struct MiddleCost {
  double tile;    // a key tile, whatever its columns
  double column;  // of it
};

constexpr MiddleCost middle_cost(int dim) {
  return dim == 32   ? MiddleCost{0.11 * kMicrosecond, 4.6e-3 * kMicrosecond}
         : dim == 64 ? MiddleCost{0.16 * kMicrosecond, 4.8e-3 * kMicrosecond}
         : dim == 96 ? MiddleCost{0.10 * kMicrosecond, 7.6e-3 * kMicrosecond}  // not measured
                     : MiddleCost{0, 10.6e-3 * kMicrosecond};
}

constexpr double middle_query_tile(int dim) { return (dim == 32 ? 0.22 : 0.40) * kMicrosecond; }

// The warp kernel on one multiprocessor.
struct WarpCost {
  double key;               // one warp, one key of its list
  double general;           // by so much more where windows have strides or boxes are slices in the plane
  double part;              // prologue and epilogue of one warp
  double query_tile;        // of all of them
  double busy;              // warps that keep a multiprocessor busy
  double bytes_per_second;  // TMA from the L2 cache
};

constexpr WarpCost warp_cost(int dim) {
  return dim == 32 ? WarpCost{1.73e-3 * kMicrosecond, 1.3,  0.012 * kMicrosecond,
                              0.29 * kMicrosecond,    10.5, 4.8e12 / kProcessors}
                   : WarpCost{1.94e-3 * kMicrosecond, 1.0, 0.365 * kMicrosecond, 0, 7.0, 5.2e12 / kProcessors};
}

TileCounts repeated(const TileCounts& counts, double times) {
  return {counts.query_tiles * times, counts.parts * times, counts.visited * times, counts.computed * times,
          counts.masked * times};
}

}  // namespace

double join_bounds(double a, double b, double c) {
  const auto cube = [](double x) { return x * x * x; };
  return std::cbrt(std::sqrt(cube(a * a) + cube(b * b) + cube(c * c)));
}

double most_tiles_of_processor(double tiles, int processors, int blocks) {
  const double resident = std::min<double>(blocks, std::ceil(tiles / processors));
  return std::ceil(tiles / (processors * resident)) * resident;
}

CostModel::CostModel(const FusedShape& shape, int processors) : shape(shape), processors(processors) {
  repeats = double(shape.batch) * shape.heads;
  pairs = repeats * count_pairs(shape.neighborhood);
  const double rows = double(shape.batch) * shape.neighborhood.positions(), element = 2;
  const double bytes = element * rows * shape.dim * 2 * (double(shape.heads) + shape.kv_heads) + 4 * rows * shape.heads;
  memory = bytes / kMemoryBytesPerSecond;
}

// Of kernels of whole warpgroups. compute(tiles, resident): seconds of one multiprocessor for all tiles, if so many
// CTAs share it, of up to `blocks`.
template <typename Compute>
Prediction CostModel::warpgroups(const Plan& plan, const TileCounts& counts, const WarpgroupShape& compiled, int blocks,
                                 Compute compute) const {
  Prediction p;
  p.tiles = repeated(counts, repeats);
  p.pairs = pairs;
  p.computed_pairs = p.tiles.computed * kWarpgroupRows * compiled.keys;
  p.memory = memory;
  const double resident = std::min<double>(blocks, std::ceil(p.tiles.query_tiles / processors));
  const double per_tile = most_tiles_of_processor(p.tiles.query_tiles, processors, blocks) / p.tiles.query_tiles;
  p.compute = per_tile * compute(p.tiles, resident);
  const double key_bytes = 2.0 * product(plan.key_tile) * compiled.chunks() * compiled.row_bytes();
  p.shared_memory = per_tile * p.tiles.visited * key_bytes / kSharedBytesPerSecond;
  p.seconds = kLaunch + join_bounds(p.compute, p.shared_memory, p.memory);
  return p;
}

Prediction CostModel::wide(const Plan& plan, const TileCounts& counts) const {
  const WarpgroupShape compiled = wide_shape(compiled_head_dim(shape.dim));
  const WideCost cost = wide_cost(compiled.dim);
  return warpgroups(plan, counts, compiled, /*blocks=*/1, [&](const TileCounts& tiles, double) {
    const double alone = std::max(2 * tiles.visited - tiles.computed, 0.0);
    return cost.tile / 2 * (tiles.computed + kWideAlone * alone) + cost.masked * tiles.masked +
           wide_query_tile(compiled.dim) * tiles.query_tiles;
  });
}

Prediction CostModel::middle(const Plan& plan, const TileCounts& counts) const {
  const int dim = compiled_head_dim(shape.dim), blocks = middle_blocks(dim);
  const WarpgroupShape compiled = middle_shape(dim, middle_variant(dim, product(plan.key_tile)));
  const MiddleCost cost = middle_cost(dim);
  return warpgroups(plan, counts, compiled, blocks, [&](const TileCounts& tiles, double resident) {
    return blocks / resident *
           ((cost.tile + cost.column * compiled.keys) * tiles.computed + middle_query_tile(dim) * tiles.query_tiles);
  });
}

Prediction CostModel::warp(const Plan& plan, const TileCounts& counts, int list, int blocks) const {
  const int dim = warp_compiled_dim(shape.dim);
  Prediction p;
  p.tiles = repeated(counts, repeats / plan.heads);
  p.pairs = pairs;
  p.computed_pairs = p.tiles.computed * plan.heads * kWarpRows * list;
  // Rows of half a cache line whose other half lies in another dilation group or head are fetched in part for nothing.
  const bool half_lines = dim * plan.heads < 64 && shape.neighborhood.axes[kMaxRank - 1].dilation > 1;
  p.memory = memory * (half_lines ? 1.6 : 1.0);
  const double resident = std::min<double>(blocks, std::ceil(p.tiles.query_tiles / processors));
  const double per_tile = most_tiles_of_processor(p.tiles.query_tiles, processors, blocks) / p.tiles.query_tiles;
  const int row_bytes = 2 * dim * plan.heads;
  const WarpCost cost = warp_cost(dim);
  const double key = cost.key * (warp_case(shape, plan) == WarpCase::kGeneral ? cost.general : 1);
  // Warps whose part of a tile lies past the end of the grid do nothing.
  const double busy = p.tiles.parts * plan.heads / p.tiles.query_tiles;
  const double idle = std::max(cost.busy / (resident * busy), 1.0);
  const double keys = list * p.tiles.computed * plan.heads;
  p.compute =
      per_tile * (idle * (key * keys + cost.part * p.tiles.parts * plan.heads) + cost.query_tile * p.tiles.query_tiles);
  p.shared_memory = per_tile * p.tiles.visited * 2.0 * product(plan.key_tile) * row_bytes / cost.bytes_per_second;
  p.seconds = kLaunch + join_bounds(p.compute, p.shared_memory, p.memory);
  return p;
}

double CostModel::least_warp() const {
  // Every warp computes at least the windows of its queries.
  return kLaunch + warp_cost(warp_compiled_dim(shape.dim)).key * pairs / kWarpRows / processors;
}

}  // namespace jax_natten::sm90
