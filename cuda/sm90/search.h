// What searches for plans have in common, beyond ../common/tile_search.h: sizes and shapes of tiles worth trying, and
// choices remembered by problem. Plain host code without CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../common/remembered.h"
#include "../common/tile_search.h"
#include "plan.h"

namespace jax_natten::sm90 {

// Sizes of tiles worth trying along an axis, ascending: powers of two (`odd`: and so many times those) up to the first
// that holds the longest dilation group, and the length of that.
std::vector<int> sizes_along(const Axis& axis, int most, int odd = 1);

struct QueryShape {
  int tile[kMaxRank], part[kMaxRank];
  double work;  // by which shapes are compared before key tiles are looked at
};

// Keeps the `count` shapes with the least work.
void keep_best(std::vector<QueryShape>& shapes, size_t count);

// Query tiles worth trying: two equal halves along some axis (`parts` 2) or one part, of up to `most` queries each and
// with few keys in all.
std::vector<QueryShape> query_shapes(const Neighborhood& neighborhood, AxisCounts& counts, int parts, int most,
                                     size_t count);

// Plans of equal work differ little. Those that were measured to be best have key tiles shaped as their query tiles,
// and boxes that are compact and short along the innermost axis. A factor of the seconds.
double preference(const Tiles& tiles, int rank);

// Everything that a choice depends on.
ProblemKey key_of(const FusedShape& shape, int processors);

}  // namespace jax_natten::sm90
