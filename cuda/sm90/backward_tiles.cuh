// What the two passes of the backward have in common: shared memory, and what producers (backward_producers.cuh) and
// consumers (backward_consumer.cuh) tell each other there.
//
// One warp loads: it walks over row tiles, and for each over the column tiles of the box of its partners, and has the
// TMA copy them into rings of shared memory. Consumer warpgroups work on 64 rows each. CTAs are persistent:
// CTA c works on row tiles c, c + gridDim.x, ...
//
// What all lanes of a warp read from a ring is handed back by one lane's arrival, behind a __syncwarp().
#pragma once

#include "../common/ptx.h"
#include "../common/ring.h"
#include "../common/softmax.h"
#include "../common/wgmma.h"
#include "backward_params.h"

namespace jax_natten::sm90 {

// What the producer tells the consumers about a row tile.
struct RowRecord {
  QueryTile tile;
  int slab;  // of its boxes
  int map;
  int has_tile;  // 0: no more tiles
};

// And about a column tile.
struct ColumnRecord {
  int begin[kMaxRank];  // relative to QueryTile::key
  uint32_t classes;     // two bits per part: its TileClass

  static constexpr uint32_t kLast = 1u << 31;  // no more column tiles for this row tile
};

// And in the extended variants.
struct ColumnExtension {
  // Of the bias table, for the tile's first column and the row tile's first row; null: none.
  const float* entries;
  int additional;  // columns that hold additional keys; -1: the tile lies in the window box
};

// Where a column lies in a column tile.
struct ColumnPlace {
  uint32_t coordinates;  // a byte per axis; kNone: not in the tile
  int positions;         // from the tile's first column

  static constexpr uint32_t kNone = ~0u;
};

template <typename T_, Walk kPass_, int kDim, int kRank_, bool kSmall, bool kExtended_>
struct PassTraits {
  using T = T_;
  static constexpr Walk kPass = kPass_;
  static constexpr int kRank = kRank_;
  static constexpr bool kExtended = kExtended_, kSeesAdditional = kExtended && kPass == kQueryPass;
  using Cursor = KeyCursor<kRank, kSeesAdditional>;
  static constexpr PassShape kShape = pass_shape(kPass, kDim, kSmall);
  static constexpr int kColumns = kShape.columns, kStages = kShape.stages, kSlots = kShape.row_slots;
  static constexpr int kParts = kShape.parts, kGroups = kShape.groups, kThreads = kShape.threads();
  static constexpr int kChunk = kShape.chunk, kChunks = kShape.chunks(), kRowBytes = kShape.row_bytes();
  // What warps besides the first producer's do ahead of the consumers. In the query pass, whose ring is short, masks so
  // come late.
  static constexpr bool kGathersStarts = kPass == kKeyPass, kMasksAhead = kPass == kKeyPass;
  // Parts that get their rows together. In the query pass each is on its own, so that one's products fill the time in
  // which another ends a row tile and begins the next; in the key pass that costs more than it gains.
  static constexpr int kRowSets = kPass == kQueryPass ? kParts : 1, kPartsOfSet = kParts / kRowSets;
  static_assert(kShape.dim == kDim, "no such head dimension");
  static_assert(kShape.producer_registers() >= 24 && kShape.producer_registers() % 8 == 0,
                "consumers take more registers than there are: they would wait for ever");
  static_assert(kColumns % 16 == 0 && kColumns <= kMaxKeyColumns, "a mask word holds at most 128 columns");
  static_assert(kColumns * kRowBytes % 1024 == 0, "every stage must begin at a whole swizzle pattern");

  struct Shared {
    alignas(1024) uint8_t row[kSlots][kParts][kOperands][kChunks][kPartRows * kRowBytes];  // later the results
    alignas(1024) uint8_t column[kStages][kOperands][kChunks][kColumns * kRowBytes];
    alignas(16) float start[kGathersStarts ? kStages : 1][kOperands][kGathersStarts ? kColumns : 1];
    ColumnPlace places[kGathersStarts ? kColumns : 1];
    uint4 masks[kMasksAhead ? kStages : 1][kParts][kMasksAhead ? kPartRows : 1];  // columns that each row sees
    alignas(16) uint32_t mask_table[kMaxKeyMaskWords];
    int part_offset[kParts][kMaxRank];            // where a part begins in a row tile
    uint32_t row_coordinates[kPartRows];          // of the rows in a part, a byte per axis
    Interval windows[kGroups][kPartRows][kRank];  // of each row, relative to QueryTile::key
    RowRecord row_records[kSlots][kRowSets];
    ColumnRecord column_records[kStages];
    QueryTile produced_tile, gathered_tile;  // the producers' own
    uint64_t row_full[kSlots][kRowSets], row_empty[kSlots][kRowSets];
    uint64_t column_full[kStages][kOperands], column_empty[kStages];
    uint64_t part_done;  // where a part's columns of results are divided among warpgroups
    ColumnExtension column_extensions[kExtended ? kStages : 1];
    int bias_offset[kExtended ? kColumns : 2];           // of each column, from the tile's first, in the bias table
    int row_offset[kGroups][kExtended ? kPartRows : 1];  // of each row, from the row tile's first
  };
  static_assert(sizeof(Shared) <= 228 * 1024 / kShape.residency - 1024, "CTAs must fit into a multiprocessor");
};

template <class Traits>
__device__ __forceinline__ void set_up_pass(const BackwardParams& params, typename Traits::Shared& smem) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kSlots; ++i) {
      for (int set = 0; set < Traits::kRowSets; ++set) {
        ptx::barrier_init(&smem.row_full[i][set], 1);
        ptx::barrier_init(&smem.row_empty[i][set], Traits::kGroups / Traits::kRowSets);
      }
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      // The lanes that gather start values arrive too.
      ptx::barrier_init(&smem.column_full[i][kScores], Traits::kGathersStarts ? 1 + 32 : 1);
      ptx::barrier_init(&smem.column_full[i][kGradients], Traits::kMasksAhead ? 1 + 2 : 1);
      ptx::barrier_init(&smem.column_empty[i], 4 * Traits::kGroups);
    }
    ptx::barrier_init(&smem.part_done, 128 * Traits::kGroups / Traits::kParts);
    ptx::barrier_init_fence();
  }
  for (int i = threadIdx.x; i < params.mask_layout.words; i += Traits::kThreads) {
    smem.mask_table[i] = params.mask_table[i];
  }
  if constexpr (Traits::kExtended) {
    const int *tile = params.mask_layout.tile, *step = params.extension.bias_step;
    for (int n = threadIdx.x; n < Traits::kColumns; n += Traits::kThreads) {
      smem.bias_offset[n] = n / (tile[1] * tile[2]) * step[0] + n / tile[2] % tile[1] * step[1] + n % tile[2] * step[2];
    }
  }
  // Copies never write the columns without a partner. They must hold numbers: their probabilities are zero.
  const TiledAxis* axes = params.schedule.axes;
  const int used = axes[0].key_tile * axes[1].key_tile * axes[2].key_tile * Traits::kRowBytes / 16;
  constexpr int kChunkVectors = Traits::kColumns * Traits::kRowBytes / 16;
  uint4* vectors = reinterpret_cast<uint4*>(smem.column);
  const int unused = kChunkVectors - used;
  for (int i = threadIdx.x; i < unused * Traits::kStages * kOperands * Traits::kChunks; i += Traits::kThreads) {
    vectors[i / unused * kChunkVectors + used + i % unused] = make_uint4(0, 0, 0, 0);
  }
  ptx::async_proxy_fence();
  if (threadIdx.x < Traits::kParts) query_part_offset(axes, threadIdx.x, smem.part_offset[threadIdx.x]);
  for (int i = threadIdx.x; i < kPartRows; i += Traits::kThreads) {
    // Rows past the part's last lie past its end on the outermost axis.
    const int x2 = Traits::kRank == 1 ? i : i % axes[2].query_part, outer = i / axes[2].query_part;
    const int x1 = Traits::kRank == 2 ? outer : outer % axes[1].query_part;
    smem.row_coordinates[i] = outer / axes[1].query_part | x1 << 8 | x2 << 16;
  }
  if constexpr (Traits::kGathersStarts) {
    for (int i = threadIdx.x; i < Traits::kColumns; i += Traits::kThreads) {
      const int x2 = i % axes[2].key_tile, x1 = i / axes[2].key_tile % axes[1].key_tile;
      const int x0 = i / (axes[2].key_tile * axes[1].key_tile);
      smem.places[i] = {x0 < axes[0].key_tile ? uint32_t(x0 | x1 << 8 | x2 << 16) : ColumnPlace::kNone,
                        x0 * params.position_step[0] + x1 * params.position_step[1] + x2 * params.position_step[2]};
    }
  }
}

}  // namespace jax_natten::sm90
