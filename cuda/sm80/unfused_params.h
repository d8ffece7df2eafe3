// What the unfused sm_80 kernels are told, and how the host finds them.
//
// PN, NN and IN are products of *rows*, which stay with a CTA, and *columns*, which pass by: in PN and NN the rows are
// queries and the columns keys, in IN the rows are keys and the columns the queries that see them. Tiles are those of
// ../common/tiling.h with rows for its queries and columns for its keys:
//
//   query_tile   rows of a CTA, one part of 16 (a box: 4 x 4, say) per warp
//   key_tile     a *slab*: the box of columns that is in shared memory at a time
//
// Of every slab a warp takes its *list*: the box of columns that some row of its part needs, 128 at most.
//
// Weights lie in rows of slots, one for each query and head. In PN and NN slabs are such that the slots which one query
// has in a slab are a contiguous *run* of its row: a slab has all columns along the axes behind `sliced`, and one along
// the axes before it. In IN the run of a query goes from its first to its last slot with a key of the CTA. Runs are
// staged in shared memory at addresses that are congruent to those in global memory modulo 16, so that both sides of
// the copy are 16-byte vectors although rows of, say, 49 slots begin anywhere.
#pragma once

#include <cstdint>

#include "../common/key_mask.h"
#include "../common/params.h"
#include "../common/tiling.h"
#include "../common/workspace.h"

namespace jax_natten::sm80 {

enum class Operation { kPn, kNn, kIn };

constexpr int kPartRows = 16;
constexpr int kMostWarps = 8;
constexpr int kMostListed = kMaxKeyColumns;
constexpr int kMostSlabRows = 1023;  // along an axis: 10 bits of SlabRow

// Sizes of UnfusedTile, PartRow, SlabRow and Run.
constexpr int kTileBytes = 72, kPartRowBytes = 48, kSlabRowBytes = 8, kRunBytes = 16;

// Slabs in shared memory: one is multiplied while the next is copied. In IN the runs of a third are found meanwhile.
constexpr int kMostBuffers = 2, kMostFound = 3;

// The n-th column of a list, relative to the first.
struct ListedColumn {
  uint16_t chunks;  // in the slab: bytes / 16
  uint16_t place;   // PN, NN: of its weight in a row of slots, in bytes; IN: row of the slab
};
constexpr int kMostAdditionalListed = 64;  // columns of a slab of additional keys

// What every CTA copies to shared memory.
struct UnfusedTables {
  uint32_t mask[kMaxKeyMaskWords];
  ListedColumn listed[kMostListed];
  uint16_t listed_bias[kMostListed];  // PN: entry of the bias table
};

// An operand or result [batch, positions, heads, dim].
struct Vectors {
  char* data;
  int64_t positions;  // of a batch element
  int heads;
  bool aligned;  // rows begin at multiples of 16 bytes
};

// Offsets in shared memory, in bytes.
struct UnfusedLayout {
  int tables;      // UnfusedTables
  int tile;        // UnfusedTile
  int additional;  // ListedColumn[kMostAdditionalListed]
  int rows;        // PartRow[warps][16]
  int slab_rows;   // SlabRow[rows of a slab]
  int runs;        // PN, NN: Run[buffers][warps][16]; IN: Run[found][rows of a slab]
  int stage;       // runs of weights: PN, NN [buffers][warps][16], IN [buffers][rows of a slab]; run_pitch bytes each
  int stage_bytes;
  int output;  // NN, IN: 16 rows of kOutputPitch bytes per warp
  int slabs;   // [buffers][rows of a slab], vector_pitch bytes each
  int slab_bytes;
  int bytes;
};
constexpr int kOutputPiece = 64, kOutputPitch = kOutputPiece + 16;

struct UnfusedParams {
  TileSchedule schedule;
  int first_axis;                               // that the problem has
  FastDivisor by_tiles;                         // of a head
  int list[kMaxRank];                           // columns of a list
  int groups;                                   // of 16 columns of a list
  int sliced;                                   // the axis along which slabs follow each other
  int slab_size;                                // rows of a slab that are loaded
  FastDivisor by_slab[2];                       // key_tile of axes 1 and 2
  int part_log[kMaxRank], parts_log[kMaxRank];  // rows of a part, and parts, along an axis

  int64_t positions;
  int64_t position_step[kMaxRank];  // of a coordinate
  int slot_step[kMaxRank];
  int bias_step[kMaxRank];
  bool causal;

  // Vectors: `rows` are the operand of PN that stays; `columns` what slabs are loaded from; `out` is the result of NN
  // and IN.
  Vectors rows, columns, additional, out;
  int dim;
  int vector_bytes;              // of a row of the operands
  int vector_pitch;              // in shared memory: an odd multiple of 16, so that ldmatrix has no bank conflicts
  int vector_steps;              // of 32 bytes
  FastDivisor by_vector_chunks;  // of 16 bytes, with padding to whole steps

  // Weights [batch, positions, heads, slots].
  char *weights, *weights_end;
  int64_t slots;
  int window_slots;  // before those of the additional columns
  int weight_heads;
  int run_pitch;  // in shared memory: an odd multiple of 16
  FastDivisor by_run_chunks;
  float fill;  // PN: what a causal slot past the query holds

  int additional_count;  // additional keys; 0 for those of the window in IN
  int additional_tile;   // PN, NN: in a slab

  const float* bias;   // PN; null: none
  int64_t bias_size;   // of a head
  int64_t bias_share;  // batch elements that share a table

  // IN of the additional keys: rows are these, columns are chunks of all queries, the results are partial sums.
  bool dense;
  int chunks;
  FastDivisor by_chunks, by_row_tiles;

  UnfusedLayout layout;
  KeyMaskLayout mask_layout;
  UnfusedTables tables;
};
static_assert(sizeof(UnfusedParams) <= 4096, "kernel parameters");

using UnfusedKernel = void (*)(const UnfusedParams);

// Sums partial sums [batch, chunks, size] over the chunks.
struct PartialSums {
  const float* partials;
  void* sums;
  int64_t batch, size;
  int chunks;
};

using SumKernel = void (*)(const PartialSums);

}  // namespace jax_natten::sm80
