// A box of the columns that a CTA's rows see, in shared memory: kernels for small windows copy it there at once, and
// each warp gathers the columns that its own rows see by ldmatrix, for which every row has an address of its own.
#pragma once

#include "rows.cuh"
#include "small_params.h"
#include "tile_tables.cuh"

namespace jax_natten::sm80 {

// Calls copy(row, chunk, position) for the 16-byte chunks of the rows of the box at `begin`, dealt out to all threads.
// Rows that no row of the tile sees have position -1. Rows: one of their tiles, of a single panel.
template <class Rows, int kThreads, typename Copy>
__device__ __forceinline__ void for_each_box_chunk(const FusedParams& params, const SmallBox& box,
                                                   const QueryTile& tile, const int (&begin)[kMaxRank], Copy copy) {
  const int chunk = threadIdx.x % Rows::kPanelChunks;
  int origin = 0;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    origin += (tile.key[a] + begin[a]) * params.steps.group[a] + tile.phase[a] * params.steps.grid[a];
  }
  const int left0 = tile.extent[0] - begin[0], left1 = tile.extent[1] - begin[1], left2 = tile.extent[2] - begin[2];
  for (int row = threadIdx.x / Rows::kPanelChunks; row < box.box_rows; row += kThreads / Rows::kPanelChunks) {
    int x1, x2;
    const int x0 = box.by_box1.divide(box.by_box2.divide(row, x2), x1);
    const bool seen = x0 < left0 && x1 < left1 && x2 < left2;
    const int (&step)[kMaxRank] = params.steps.group;
    copy(row, chunk, seen ? origin + x0 * step[0] + x1 * step[1] + x2 * step[2] : -1);
  }
}

// Starts the copy of a chunk of an array's row to a box. `rows`: of position 0. Without a position it becomes zeros.
template <class Rows>
__device__ __forceinline__ void copy_box_chunk(uint32_t box, const RowArray& array, const char* rows, int row,
                                               int chunk, int position) {
  copy_chunk(box + Rows::place(row, chunk), rows + imax(position, 0) * array.position_step + 16 * chunk,
             position >= 0 ? array.bytes - 16 * chunk : 0, array.copy_bytes);
}

}  // namespace jax_natten::sm80
