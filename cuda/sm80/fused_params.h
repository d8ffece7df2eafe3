// What the fused sm_80 kernels are told beside their arrays, and how the host finds them.
#pragma once

#include <cstdint>

#include "../common/key_mask.h"
#include "../common/params.h"
#include "../common/tiling.h"
#include "precision.h"

namespace jax_natten::sm80 {

constexpr int kMostRows = 128;     // of a tile that stays
constexpr int kMostColumns = 112;  // of the tiles that pass by it
constexpr float kLog2E = 1.4426950408889634f;

// An array [batch, positions, heads, size]. Row of (batch, position, head) at data + batch * batch_step + position *
// position_step + head * bytes.
struct RowArray {
  void* data;
  int64_t batch_step, position_step;
  int bytes;       // of a row
  int copy_bytes;  // 16, 8, 4 or 2: the alignment of its rows
};

// Coordinates of a row in its tile, a byte each; the sign bit is set for rows past the last position of the tile.
struct TilePlace {
  static constexpr uint32_t kNone = uint32_t(1) << 31;
  uint32_t packed;

  JAX_NATTEN_HD bool exists() const { return (packed & kNone) == 0; }
  JAX_NATTEN_HD int operator[](int axis) const { return packed >> 8 * axis & 255; }
};

// A tile's shape: the coordinates of each of its rows, and the mask of its columns.
struct TilePlaces {
  TilePlace rows[kMostRows];        // of the tile that stays, part after part
  TilePlace columns[kMostColumns];  // of the tiles that pass by
  KeyMaskLayout mask_layout;
  uint32_t mask_table[4 * (kMostColumns + 1 + 2 + 2)];
};

// Steps in the flattened grid and in the bias table.
struct Steps {
  int grid[kMaxRank];   // between neighbors on an axis
  int group[kMaxRank];  // between neighbors of a dilation group
  int bias[kMaxRank];   // between entries of the relative position bias
};

struct FusedParams {
  TileSchedule schedule;
  Steps steps;
  TilePlaces places;
  bool padded;  // key tiles have fewer keys than columns
  int64_t positions;
  int heads;
  int additional;      // keys that every query sees
  int bias_share;      // batch elements that share a bias table
  int64_t bias_size;   // entries of a head's table
  float scale;         // of the scores, times log2(e); its magnitude if the queries are multiplied by query_factor
  float query_factor;  // the sign of the scale, or 0
  RowArray query, key, value, additional_key, additional_value, out;
  const float* bias;
  float* lse;
};

}  // namespace jax_natten::sm80
