// Exact counts of the work of a tiled fused kernel, without walking its tiles: plain host code.
//
// Everything that tiling.h decides about a query tile is a product of decisions per axis, so that sums over all tiles
// are products of sums per axis. Along an axis, tiles far from the ends repeat with the period of the stride, and tiles
// whose windows are all held by an end are alike, or grow or shrink steadily; the sums below evaluate one period of
// each such run. For the walk over the queries of keys read, as there, key for query and query for key.
// tests/cpp/test_tile_model.cc compares with a walk over the tiles through tiling.h.
#pragma once

#include <cstdint>

#include "tiling.h"

namespace jax_natten {

// Sums over the query tiles of an axis, all dilation groups together.
struct AxisTileCounts {
  int64_t query_tiles = 0;  // that hold queries
  int64_t parts = 0;        // that hold queries
  int64_t visited = 0;      // key tiles, summed over query tiles
  int64_t computed = 0;     // key tiles that a part does not skip, summed over parts
  int64_t whole = 0;        // of those, key tiles that all of the part's queries see whole
};

AxisTileCounts count_axis_tiles(const Axis& axis, int query_tile, int query_part, int key_tile,
                                Walk walk = Walk::kKeysOfQueries);

// The same for all axes of a problem, for one head of one batch element.
struct TileCounts {
  double query_tiles = 1, parts = 1, visited = 1, computed = 1, masked = 0;

  double whole() const { return computed - masked; }
};

// `padded`: key tiles have columns beyond their keys, so that each of them is masked.
TileCounts count_tiles(const AxisTileCounts (&axes)[kMaxRank], bool padded);
TileCounts count_tiles(const Neighborhood& neighborhood, const int (&query_tile)[kMaxRank],
                       const int (&query_part)[kMaxRank], const int (&key_tile)[kMaxRank], bool padded,
                       Walk walk = Walk::kKeysOfQueries);

// Query-key pairs, for one head of one batch element: the useful work.
double count_pairs(const Neighborhood& neighborhood);

// Most keys along an axis that one run of `queries` neighboring queries sees, the runs beginning at multiples of it.
int most_keys_of_queries(const Axis& axis, int queries, Walk walk = Walk::kKeysOfQueries);

}  // namespace jax_natten
