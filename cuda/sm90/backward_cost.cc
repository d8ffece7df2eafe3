#include "backward_cost.h"

#include <algorithm>

#include "cost.h"

namespace jax_natten::sm90 {
namespace {

// Fitted to times on an H100: of these kernels. Head dimensions 96, 192 and 256 are estimates.
constexpr double kMicrosecond = 1e-6;

struct PassCost {
  double tile;      // all parts, one column tile each
  double masked;    // more for a masked tile of one part
  double row_tile;  // prologue and epilogue

  constexpr PassCost(double tile, double masked, double row_tile)
      : tile(tile * kMicrosecond), masked(masked * kMicrosecond), row_tile(row_tile * kMicrosecond) {}
};

// For large windows: of a CTA that has its multiprocessor for itself.
constexpr PassCost large_pass_cost(Walk pass, int dim) {
  if (pass == kQueryPass) {
    return dim == 32    ? PassCost(1.25, 0.14, 2.5)
           : dim == 64  ? PassCost(1.36, 0.14, 2.5)
           : dim == 96  ? PassCost(2.10, 0.14, 2.0)
           : dim == 128 ? PassCost(2.16, 0.14, 2.0)
           : dim == 192 ? PassCost(2.65, 0.10, 2.5)
                        : PassCost(2.00, 0.04, 3.0);
  }
  return dim == 32    ? PassCost(1.60, 0.12, 2.5)
         : dim == 64  ? PassCost(1.69, 0.12, 2.5)
         : dim == 96  ? PassCost(1.45, 0.06, 2.0)
         : dim == 128 ? PassCost(1.63, 0.06, 2.0)
         : dim == 192 ? PassCost(2.20, 0.10, 2.5)
                      : PassCost(2.90, 0.10, 3.0);
}

// For small ones: of one of the CTAs that share a multiprocessor, over their number.
constexpr PassCost small_pass_cost(Walk pass, int dim) {
  if (pass == kQueryPass) return dim == 32 ? PassCost(0.31, 0.08, 0.60) : PassCost(0.41, 0.08, 0.80);
  return dim == 32 ? PassCost(0.38, 0.06, 0.72) : PassCost(0.55, 0.06, 1.00);
}

// Of a column tile that only one of two parts computes, beyond the half of PassCost::tile: nothing overlaps its
// exponentials.
constexpr double alone(Walk pass) { return pass == kQueryPass ? 0.4 : 1.0; }

// In the key pass, of a sector of memory that start values of a column tile are gathered from.
constexpr double kSector = 0.003 * kMicrosecond;
constexpr int kSectorFloats = 8;

// A tile's time on one axis, over that on more.
constexpr double one_axis(Walk pass) { return pass == kQueryPass ? 0.92 : 0.86; }

}  // namespace

PassCostModel::PassCostModel(Walk pass, const FusedShape& shape, int processors)
    : pass(pass), rank(shape.neighborhood.rank), dim(compiled_head_dim(shape.dim)), processors(processors) {
  repeats = double(shape.batch) * row_heads(pass, shape);
  group = pass == kQueryPass ? 1 : shape.group();
  pairs = repeats * group * count_pairs(shape.neighborhood);
  // The query pass reads queries, keys, values, out and d_out and writes d_query; the key pass reads queries, d_out,
  // keys and values and writes d_key and d_value. Of the four floats per query and head each reads two; the query pass
  // writes the other two.
  const double positions = double(shape.batch) * shape.neighborhood.positions();
  const double of_queries = pass == kQueryPass ? 4 : 2, of_keys = pass == kQueryPass ? 2 : 4;
  const double floats = pass == kQueryPass ? 4 : 2;
  const double bytes =
      positions * (2 * shape.dim * (of_queries * shape.heads + of_keys * shape.kv_heads) + 4 * floats * shape.heads);
  memory = bytes / kMemoryBytesPerSecond;
}

bool PassCostModel::is_padded(const PassPlan& plan) const {
  return product(plan.key_tile) < pass_shape(pass, dim, plan.small).columns;
}

Prediction PassCostModel::predict(const PassPlan& plan, const TileCounts& counts) const {
  const PassShape compiled = pass_shape(pass, dim, plan.small);
  const PassCost cost = plan.small ? small_pass_cost(pass, dim) : large_pass_cost(pass, dim);
  Prediction p;
  p.tiles = {counts.query_tiles * repeats, counts.parts * repeats, counts.visited * repeats * group,
             counts.computed * repeats * group, counts.masked * repeats * group};
  p.pairs = pairs;
  p.computed_pairs = p.tiles.computed * kPartRows * compiled.columns;
  p.memory = memory;
  const double most = most_tiles_of_processor(p.tiles.query_tiles, processors, compiled.residency);
  const double per_tile = most / p.tiles.query_tiles;
  const double of_one_part = compiled.parts == 2 ? std::max(2 * p.tiles.visited - p.tiles.computed, 0.0) : 0;
  const double tile = cost.tile / compiled.parts * (rank == 1 ? one_axis(pass) : 1);
  p.compute = per_tile * (tile * (p.tiles.computed + alone(pass) * of_one_part) + cost.masked * p.tiles.masked +
                          cost.row_tile * p.tiles.query_tiles);
  if (pass == kKeyPass) {
    const int run = plan.key_tile[2], sectors = product(plan.key_tile) / run * ((run - 1) / kSectorFloats + 1);
    p.compute += per_tile * p.tiles.visited * kSector * sectors;
  }
  const double column_bytes = 2.0 * product(plan.key_tile) * compiled.chunks() * compiled.row_bytes();
  p.shared_memory = per_tile * p.tiles.visited * column_bytes / kSharedBytesPerSecond;
  p.seconds = kLaunch + join_bounds(p.compute, p.shared_memory, p.memory);
  return p;
}

}  // namespace jax_natten::sm90
