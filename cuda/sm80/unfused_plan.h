// Tiles of the unfused kernels: what fits, and which are best.
#pragma once

#include "unfused_params.h"

namespace jax_natten::sm80 {

constexpr int kMostDim = 256;  // head dimension

// How a problem is cut into tiles (unfused_params.h says what rows and columns are). Row tiles are made of 1 to 8
// parts, parts of 16 rows; both are powers of two along each axis. On axes that a problem does not have, all is 1.
struct UnfusedPlan {
  int row_tile[kMaxRank] = {1, 1, 1};
  int row_part[kMaxRank] = {1, 1, 1};
  int column_tile[kMaxRank] = {1, 1, 1};
};

// Why a plan does not fit a problem; nullptr if it does.
const char* why_not_plan(const UnfusedShape& shape, Operation operation, const UnfusedPlan& plan);

// Everything about a plan that kernels need to know; of one that fits.
struct UnfusedSizes {
  int warps;
  int list[kMaxRank];
  int groups;  // of 16 columns of a list
  int sliced;
  int slot_step[kMaxRank];
  int slab_size;        // rows of a slab
  int additional_tile;  // PN, NN
  int vector_pitch, vector_steps;
  int run_pitch, run_chunks;
  int64_t slabs;  // of a tile, at most
  UnfusedLayout layout;
};

UnfusedSizes sizes_of(const UnfusedShape& shape, Operation operation, const UnfusedPlan& plan, bool dense = false);

struct UnfusedTiling {
  UnfusedPlan plan;
  UnfusedSizes sizes;
};

// The plan with the least estimated time. Found once for every problem and remembered for good.
const UnfusedTiling& choose_tiling(const UnfusedShape& shape, Operation operation);

// Tiles of the additional keys in IN.
UnfusedTiling choose_dense_tiling(const UnfusedShape& shape);

// Row tiles of one head of one batch element.
int64_t count_tiles(const UnfusedShape& shape, const UnfusedPlan& plan);

// Heads of the rows.
int rows_heads(const UnfusedShape& shape, Operation operation);

// CTAs for the additional keys in IN: row tiles of a head and batch element, and all of them.
int64_t dense_row_tiles(const UnfusedShape& shape, const UnfusedPlan& plan);
int64_t dense_blocks(const UnfusedShape& shape);

}  // namespace jax_natten::sm80
