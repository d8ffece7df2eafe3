#include "backward_cost.h"

#include <algorithm>

#include "cost.h"

namespace jax_natten::sm90 {
namespace {

constexpr double kMicrosecond = 1e-6;

// A CTA that has its multiprocessor for itself.
struct PassCost {
  double tile;      // all parts, one column tile each
  double masked;    // more for a masked tile of one part
  double row_tile;  // prologue and epilogue
};

// For large windows.
constexpr PassCost pass_cost(Walk pass, int dim) {
  if (pass == kQueryPass) {
    return dim == 32    ? PassCost{1.05 * kMicrosecond, 0.15 * kMicrosecond, 1.0 * kMicrosecond}
           : dim == 64  ? PassCost{1.33 * kMicrosecond, 0.15 * kMicrosecond, 1.2 * kMicrosecond}
           : dim == 96  ? PassCost{1.80 * kMicrosecond, 0.15 * kMicrosecond, 1.8 * kMicrosecond}
           : dim == 128 ? PassCost{2.24 * kMicrosecond, 0.15 * kMicrosecond, 2.0 * kMicrosecond}
           : dim == 192 ? PassCost{2.30 * kMicrosecond, 0.12 * kMicrosecond, 2.6 * kMicrosecond}
                        : PassCost{1.40 * kMicrosecond, 0.08 * kMicrosecond, 3.2 * kMicrosecond};
  }
  return dim == 32    ? PassCost{1.15 * kMicrosecond, 0.15 * kMicrosecond, 1.0 * kMicrosecond}
         : dim == 64  ? PassCost{1.62 * kMicrosecond, 0.15 * kMicrosecond, 1.2 * kMicrosecond}
         : dim == 96  ? PassCost{1.30 * kMicrosecond, 0.12 * kMicrosecond, 1.8 * kMicrosecond}
         : dim == 128 ? PassCost{1.62 * kMicrosecond, 0.10 * kMicrosecond, 2.0 * kMicrosecond}
         : dim == 192 ? PassCost{1.60 * kMicrosecond, 0.10 * kMicrosecond, 2.6 * kMicrosecond}
                      : PassCost{2.00 * kMicrosecond, 0.10 * kMicrosecond, 3.2 * kMicrosecond};
}

// For small ones: of one of the CTAs that share a multiprocessor, over their number.
constexpr PassCost small_pass_cost(Walk pass, int dim) {
  if (pass == kQueryPass) {
    return dim == 32 ? PassCost{0.42 * kMicrosecond, 0.08 * kMicrosecond, 0.80 * kMicrosecond}
                     : PassCost{0.50 * kMicrosecond, 0.08 * kMicrosecond, 0.95 * kMicrosecond};
  }
  return dim == 32 ? PassCost{0.47 * kMicrosecond, 0.08 * kMicrosecond, 0.90 * kMicrosecond}
                   : PassCost{0.62 * kMicrosecond, 0.08 * kMicrosecond, 1.10 * kMicrosecond};
}

// Of a column tile that only one of two parts computes, beyond the half of PassCost::tile: nothing overlaps its
// exponentials.
constexpr double kAlone = 0.7;

}  // namespace

PassCostModel::PassCostModel(Walk pass, const FusedShape& shape, int processors)
    : pass(pass), dim(compiled_head_dim(shape.dim)), processors(processors) {
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
  const PassCost cost = plan.small ? small_pass_cost(pass, dim) : pass_cost(pass, dim);
  Prediction p;
  p.tiles = {counts.query_tiles * repeats, counts.parts * repeats, counts.visited * repeats * group,
             counts.computed * repeats * group, counts.masked * repeats * group};
  p.pairs = pairs;
  p.computed_pairs = p.tiles.computed * kPartRows * compiled.columns;
  p.memory = memory;
  const double most = most_tiles_of_processor(p.tiles.query_tiles, processors, compiled.residency);
  const double per_tile = most / p.tiles.query_tiles;
  const double alone = compiled.parts == 2 ? std::max(2 * p.tiles.visited - p.tiles.computed, 0.0) : 0;
  p.compute = per_tile * (cost.tile / compiled.parts * (p.tiles.computed + kAlone * alone) +
                          cost.masked * p.tiles.masked + cost.row_tile * p.tiles.query_tiles);
  const double column_bytes = 2.0 * product(plan.key_tile) * compiled.chunks() * compiled.row_bytes();
  p.shared_memory = per_tile * p.tiles.visited * column_bytes / kSharedBytesPerSecond;
  p.seconds = kLaunch + join_bounds(p.compute, p.shared_memory, p.memory);
  return p;
}

}  // namespace jax_natten::sm90
