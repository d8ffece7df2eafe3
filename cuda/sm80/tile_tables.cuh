// What a CTA keeps in shared memory about its tiles: where their rows lie in the grid, and which of them see each
// other.
//
// The rows of the tile that stays are queries, and the columns of the tiles that pass by it are keys; in the second
// pass of the backward it is the other way round (Walk::kQueriesOfKeys), as everywhere in tiling.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/key_mask.h"
#include "../common/tiling.h"
#include "fused_params.h"

namespace jax_natten::sm80 {

// kBias: there may be a relative position bias.
template <int kRows, int kColumns, Walk kWalk, bool kBias, int kParts>
struct TileTables {
  using Part = QueryPart<kMaxRank, kWalk>;

  QueryTile tile;
  Part parts[kParts];
  using MaskWord = std::conditional_t<(kColumns <= 64), uint16_t, uint32_t>;
  MaskWord mask[4 * (kColumns + 1 + 2 + 2)];
  Interval partners[kRows + 2];   // of the rows along axis 0, then 1, then 2; relative to the tile's first column
  int column_position[kColumns];  // relative to that of the first one; -1: there is no such column
  int column_bias[kBias ? kColumns : 1];  // entry of the bias table, likewise

  // All threads call it; false if the tile of that index holds nothing. The tables can be read after a barrier.
  template <int kThreads>
  __device__ __forceinline__ bool fill(const FusedParams& params, int index) {
    const Steps& steps = params.steps;
    if (threadIdx.x == 0) tile = decode_query_tile<kMaxRank, kWalk>(params.schedule, index);
    __syncthreads();
    if (tile.empty()) return false;
    if (threadIdx.x < kParts) {
      int offset[kMaxRank];
      query_part_offset(params.schedule.axes, threadIdx.x, offset);
      parts[threadIdx.x] = Part(params.schedule.axes, tile, offset);
    }
    for (int n = threadIdx.x; n < kColumns; n += kThreads) {
      const TilePlace place = params.places.columns[n];
      const int* step = steps.group;
      column_position[n] = place.exists() ? place[0] * step[0] + place[1] * step[1] + place[2] * step[2] : -1;
    }
    for (int n = threadIdx.x; kBias && n < kColumns; n += kThreads) {
      const TilePlace place = params.places.columns[n];
      column_bias[n] = place[0] * steps.bias[0] + place[1] * steps.bias[1] + place[2] * steps.bias[2];
    }
    int first = 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const TiledAxis& axis = params.schedule.axes[a];
      for (int x = threadIdx.x; x < axis.query_tile; x += kThreads) {
        const Interval w =
            jax_natten::partners<kWalk>(axis, imin(tile.query[a] + x, tile.length[a] - 1), tile.length[a]);
        partners[first + x] = {w.begin - tile.key[a], w.end - tile.key[a]};
      }
      first += axis.query_tile;
    }
    for (int i = threadIdx.x; i < params.places.mask_layout.words; i += kThreads)
      mask[i] = MaskWord(params.places.mask_table[i]);
    return true;
  }

  // Position of a row; -1: outside the grid.
  __device__ __forceinline__ int row_position(const FusedParams& params, int row) const {
    const TilePlace place = params.places.rows[row];
    bool inside = place.exists();
    int position = 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int x = tile.query[a] + place[a];
      inside = inside & (x < tile.length[a]);
      position += x * params.steps.group[a] + tile.phase[a] * params.steps.grid[a];
    }
    return inside ? position : -1;
  }

  // Positions of the columns of the tile at `begin`, as a function of the column: -1 for those that no row sees.
  __device__ __forceinline__ auto positions(const FusedParams& params, const int* begin) const {
    int first = 0, left[kMaxRank];
    bool whole = true;  // all columns that exist are seen
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      first += (tile.key[a] + begin[a]) * params.steps.group[a] + tile.phase[a] * params.steps.grid[a];
      left[a] = tile.extent[a] - begin[a];
      whole = whole & (params.schedule.axes[a].key_tile <= left[a]);
    }
    return [this, &params, first, whole, left0 = left[0], left1 = left[1], left2 = left[2]](int column) {
      const int relative = column_position[column];
      bool seen = relative >= 0;
      if (!whole) {
        const TilePlace place = params.places.columns[column];
        seen = seen & (place[0] < left0) & (place[1] < left1) & (place[2] < left2);
      }
      return seen ? first + relative : -1;
    };
  }

  // Columns of quad lane q in the tile at `begin` that a row sees, as in key_mask.h.
  __device__ __forceinline__ uint32_t word(const FusedParams& params, const int* begin, int row, int q) const {
    const TilePlace place = params.places.rows[row];
    const TiledAxis* axes = params.schedule.axes;
    const Interval seen[kMaxRank] = {partners[place[0]], partners[axes[0].query_tile + place[1]],
                                     partners[axes[0].query_tile + axes[1].query_tile + place[2]]};
    return key_mask_word<kMaxRank>(params.places.mask_layout, mask, seen, begin, q);
  }

  // Entry of a head's bias table for a row and the first column of the tile at `begin`. That of another column is its
  // column_bias further, or before if columns are queries.
  __device__ __forceinline__ int64_t bias_entry(const FusedParams& params, const int* begin, int row) const {
    const TilePlace place = params.places.rows[row];
    int64_t entry = 0;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int from = imin(tile.query[a] + place[a], tile.length[a] - 1), to = tile.key[a] + begin[a];
      const int distance = kWalk == Walk::kKeysOfQueries ? to - from : from - to;
      entry += int64_t(distance + params.schedule.axes[a].window - 1) * params.steps.bias[a];
    }
    return entry;
  }
};

// The relative position bias of a batch element and head.
__device__ __forceinline__ const float* bias_table(const FusedParams& params, int batch, int head) {
  return params.bias + (int64_t(batch / params.bias_share) * params.heads + head) * params.bias_size;
}

}  // namespace jax_natten::sm80
