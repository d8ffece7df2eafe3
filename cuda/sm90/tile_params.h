// What every sm_90 kernel is told about tiles.
#pragma once

#include <cstdint>

#include "../common/key_mask.h"
#include "../common/tiling.h"
#include "tensor_map.h"

namespace jax_natten::sm90 {

// The last position of a dilation group may be missing in some groups; each combination of longer and shorter groups
// has its own tensor maps. Bit a of the index: group of axis a is a short one.
constexpr int kMaxMapVariants = 1 << kMaxRank;

struct TileParams {
  TileSchedule schedule;
  int long_phases[kMaxRank];  // groups with phase >= this are short ones
  KeyMaskLayout mask_layout;
  uint32_t mask_table[kMaxKeyMaskWords];
  int row_step[kMaxRank];  // rows of [batch, X, heads] arrays between neighboring in-group positions of an axis
};

template <int kRank>
JAX_NATTEN_HD int map_variant(const TileParams& params, const QueryTile& tile) {
  int variant = 0;
  JAX_NATTEN_UNROLL
  for (int a = kMaxRank - kRank; a < kMaxRank; ++a) variant |= (tile.phase[a] >= params.long_phases[a]) << a;
  return variant;
}

}  // namespace jax_natten::sm90
