#include "search.h"

namespace jax_natten::sm90 {

std::vector<int> sizes_along(const Axis& axis, int most, int odd) {
  std::vector<int> sizes;
  const int length = group_length(axis, 0);
  for (int size = 1; size <= most; size *= 2) {
    sizes.push_back(size);
    if (size >= length) break;
    if (odd > 1 && odd * size <= most && odd * size < length) sizes.push_back(odd * size);
  }
  if (length <= most) sizes.push_back(length);
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  return sizes;
}

void keep_best(std::vector<QueryShape>& shapes, size_t count) {
  const auto less = [](const QueryShape& a, const QueryShape& b) { return a.work < b.work; };
  if (shapes.size() > count) {
    std::nth_element(shapes.begin(), shapes.begin() + count, shapes.end(), less);
    shapes.resize(count);
  }
}

std::vector<QueryShape> query_shapes(const Neighborhood& neighborhood, AxisCounts& counts, int parts, int most,
                                     size_t count) {
  std::vector<int> sizes[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) sizes[a] = sizes_along(neighborhood.axes[a], most);
  std::vector<QueryShape> shapes;
  each_triple(sizes, smallest_of(sizes, most), most, [&](const Triple& part) {
    // Without a second part it does not matter which axis is split.
    for (int split = parts == 1 ? kMaxRank - 1 : kMaxRank - neighborhood.rank; split < kMaxRank; ++split) {
      QueryShape query;
      query.work = 1;
      for (int a = 0; a < kMaxRank; ++a) {
        query.part[a] = part[a];
        query.tile[a] = part[a] * (a == split ? parts : 1);
        query.work *= double(counts(a, query.tile[a], query.tile[a], 1).visited);  // keys of all tiles
      }
      shapes.push_back(query);
    }
  });
  keep_best(shapes, count);
  return shapes;
}

double preference(const Tiles& tiles, int rank) {
  const int first_axis = kMaxRank - rank;
  const auto elongation = [first_axis](const Triple& tile) {
    return std::log2(double(*std::max_element(tile + first_axis, tile + kMaxRank)) /
                     *std::min_element(tile + first_axis, tile + kMaxRank));
  };
  const bool alike = std::equal(tiles.key_tile, tiles.key_tile + kMaxRank, tiles.query_tile);
  return 1 + 3e-3 * !alike + 1e-3 * elongation(tiles.key_tile) + 5e-4 * elongation(tiles.query_part) +
         5e-4 * std::log2(tiles.key_tile[kMaxRank - 1]);
}

ProblemKey key_of(const FusedShape& shape, int processors) {
  ProblemKey key = {processors,     int(shape.dtype), shape.neighborhood.rank, shape.batch,      shape.heads,
                    shape.kv_heads, shape.dim,        shape.value_dim,         shape.additional, shape.bias_batch};
  for (const Axis& axis : shape.neighborhood.axes) {
    key.insert(key.end(), {axis.length, axis.window, axis.stride, axis.dilation, axis.causal});
  }
  return key;
}

}  // namespace jax_natten::sm90
