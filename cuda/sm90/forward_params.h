// What every sm_90 forward kernel is told, whatever its structure.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../common/key_mask.h"
#include "../common/tiling.h"
#include "extension.h"
#include "tensor_map.h"

namespace jax_natten::sm90 {

// The last position of a dilation group may be missing in some groups; each combination of longer and shorter groups
// has its own maps. Bit a of the index: group of axis a is a short one.
constexpr int kMaxMapVariants = 1 << kMaxRank;

struct TensorMaps {
  CUtensorMap query, key, value, out;
};

struct ForwardParams {
  TensorMaps maps[kMaxMapVariants];
  TileSchedule schedule;
  SlabAddress query_address, key_address;
  int long_phases[kMaxRank];  // groups with phase >= this are short ones
  void* out;                  // [batch, X, heads, dim]
  float* lse;                 // [batch, X, heads]
  int dim;
  int row_step[kMaxRank];  // rows of out and lse between neighboring in-group positions of an axis
  float scale;             // of the softmax: > 0, in powers of two
  uint32_t query_factor;   // pair of T that queries are multiplied with first. Carries the sign of the scale.
  bool has_query_factor;
  KeyMaskLayout mask_layout;
  uint32_t mask_table[kMaxKeyMaskWords];
  KeyExtension extension;  // for the extended variants only
};

template <int kRank>
JAX_NATTEN_HD int map_variant(const ForwardParams& params, const QueryTile& tile) {
  int variant = 0;
  JAX_NATTEN_UNROLL
  for (int a = kMaxRank - kRank; a < kMaxRank; ++a) variant |= (tile.phase[a] >= params.long_phases[a]) << a;
  return variant;
}

}  // namespace jax_natten::sm90
