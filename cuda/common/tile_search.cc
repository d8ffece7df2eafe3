#include "tile_search.h"

#include <numeric>

namespace jax_natten {

std::vector<int> all_sizes_along(const Axis& axis, int most) {
  std::vector<int> sizes(std::min(most, group_length(axis, 0)));
  std::iota(sizes.begin(), sizes.end(), 1);
  return sizes;
}

int smallest_of(const std::vector<int> (&sizes)[kMaxRank], int most) {
  int64_t largest = 1;
  for (const std::vector<int>& along : sizes) largest *= along.back();
  return int(std::min<int64_t>(largest, most * 3 / 4));
}

}  // namespace jax_natten
