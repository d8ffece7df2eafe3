// What a CTA of the unfused kernels works on, and what a warp of it sees of a slab.
#pragma once

#include "unfused_params.h"

namespace jax_natten::sm80 {

constexpr Walk walk_of(Operation operation) {
  return operation == Operation::kIn ? Walk::kQueriesOfKeys : Walk::kKeysOfQueries;
}

struct UnfusedTile : QueryTile {
  int chunk = 0;  // of queries, for additional keys in IN
};
static_assert(sizeof(UnfusedTile) == kTileBytes, "the host reserves kTileBytes");

// Heads follow each other fastest, since their rows of weights share cache lines, then tiles, then batch elements.
template <Operation kOperation>
__device__ __forceinline__ UnfusedTile decode_tile(const UnfusedParams& p) {
  UnfusedTile tile;
  int head, in_head;
  const int rest = p.schedule.by_heads.divide(int(blockIdx.x), head);
  const int batch = p.by_tiles.divide(rest, in_head);
  const int index = (batch * p.schedule.heads + head) * p.by_tiles.divisor + in_head;
  constexpr Walk kWalk = walk_of(kOperation);
  QueryTile& decoded = tile;
  decoded = p.first_axis == 2   ? decode_query_tile<1, kWalk>(p.schedule, index)
            : p.first_axis == 1 ? decode_query_tile<2, kWalk>(p.schedule, index)
                                : decode_query_tile<3, kWalk>(p.schedule, index);
  if (kOperation == Operation::kPn && p.causal) {
    // Slots past a causal query are written too: the tile extends to the keys that they stand for.
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const TiledAxis& axis = p.schedule.axes[a];
      const int last = imin(tile.query[a] + axis.query_tile, tile.length[a]) - 1;
      if (tile.extent[a] > 0) tile.extent[a] = window(axis, last, tile.length[a]).begin + axis.window - tile.key[a];
    }
  }
  return tile;
}

// Rows are additional keys, columns a chunk of all queries.
__device__ __forceinline__ UnfusedTile decode_dense_tile(const UnfusedParams& p) {
  UnfusedTile tile;
  int row_tile;
  int rest = p.by_row_tiles.divide(int(blockIdx.x), row_tile);
  rest = p.schedule.by_heads.divide(rest, tile.head);
  tile.batch = p.by_chunks.divide(rest, tile.chunk);
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    tile.query[a] = tile.key[a] = tile.phase[a] = 0;
    tile.length[a] = tile.extent[a] = 1;
  }
  tile.query[2] = row_tile * p.schedule.axes[2].query_tile;
  tile.length[2] = p.additional_count;
  const int64_t begin = chunk_begin(p.positions, tile.chunk);
  tile.key[2] = int(begin);
  tile.extent[2] = int(chunk_begin(p.positions, tile.chunk + 1) - begin);
  return tile;
}

// Position in the flattened grid of in-group indices.
__device__ __forceinline__ int64_t position_of(const UnfusedParams& p, const QueryTile& tile, const int (&index)[3]) {
  int64_t position = 0;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    if (a < p.first_axis) continue;
    position += (int64_t(index[a]) * p.schedule.axes[a].dilation + tile.phase[a]) * p.position_step[a];
  }
  return position;
}

// ---- rows of a warp

struct PartRow {
  int64_t position;
  int begin[kMaxRank], end[kMaxRank];  // its columns, relative to QueryTile::key
  int in_tile[kMaxRank];               // relative to QueryTile::query
  int exists;                          // 0: beyond the grid, and then a copy of the last row
};
static_assert(sizeof(PartRow) == kPartRowBytes, "the host reserves kPartRowBytes");

template <Operation kOperation>
__device__ __forceinline__ void find_rows(const UnfusedParams& p, const UnfusedTile& tile, int warp, int lane,
                                          PartRow* rows) {
  const TiledAxis* axes = p.schedule.axes;
  if (lane < kPartRows) {
    int in_tile[kMaxRank], index[kMaxRank], part = warp, in_part = lane;
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      const int parts = 1 << p.parts_log[a], rows_of_part = 1 << p.part_log[a];
      in_tile[a] = (part & parts - 1) * rows_of_part + (in_part & rows_of_part - 1);
      part >>= p.parts_log[a];
      in_part >>= p.part_log[a];
    }
    PartRow row;
    row.exists = 1;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      index[a] = row.in_tile[a] = row.begin[a] = 0;
      row.end[a] = 1;
      if (a < p.first_axis) continue;
      index[a] = imin(tile.query[a] + in_tile[a], tile.length[a] - 1);
      if (tile.query[a] + in_tile[a] >= tile.length[a]) row.exists = 0;
      row.in_tile[a] = index[a] - tile.query[a];
      Interval columns = {tile.key[a], tile.key[a] + tile.extent[a]};
      if (kOperation != Operation::kIn || !p.dense) {
        columns = partners<walk_of(kOperation)>(axes[a], index[a], tile.length[a]);
      }
      row.begin[a] = columns.begin - tile.key[a];
      row.end[a] = columns.end - tile.key[a];
    }
    row.position = position_of(p, tile, index);
    rows[lane] = row;
  }
  __syncwarp();
}

// ---- slabs

struct Slab {
  int begin[kMaxRank];  // relative to QueryTile::key
  int additional;       // PN, NN: not negative if the columns are the additional keys from this one on
};

// Walks over the slabs of a tile: those of the window, then those of the additional columns.
struct SlabWalk {
  KeyTileCursor<kMaxRank> cursor;
  int additional = -1;

  __device__ __forceinline__ bool next(const UnfusedParams& p, const QueryTile& tile) {
    if (additional < 0 && cursor.next(p.schedule.axes, tile.extent)) return true;
    additional = additional < 0 ? 0 : additional + p.additional_tile;
    return additional < p.additional_count;
  }
  __device__ __forceinline__ Slab slab() const {
    return {{cursor.begin[0], cursor.begin[1], cursor.begin[2]}, additional};
  }
};

// What a warp works on in a slab.
struct List {
  int begin[kMaxRank];  // first column, relative to QueryTile::key
  int slab_row;         // of the first column
};

// False if no row of the part needs a column of the slab.
template <Operation kOperation>
__device__ __forceinline__ bool find_list(const UnfusedParams& p, const Slab& slab, const PartRow* rows, List& list) {
  list.slab_row = 0;
  bool seen = rows[0].exists;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    list.begin[a] = 0;
    if (a < p.first_axis) continue;
    const TiledAxis& axis = p.schedule.axes[a];
    const PartRow& last = rows[kPartRows - 1];
    const int begin = rows[0].begin[a], end = kOperation == Operation::kPn ? last.begin[a] + axis.window : last.end[a];
    seen = seen && slab.begin[a] < end && slab.begin[a] + axis.key_tile > begin;
    const int first = imin(imax(begin - slab.begin[a], 0), axis.key_tile - p.list[a]);
    list.begin[a] = slab.begin[a] + first;
    list.slab_row = list.slab_row * axis.key_tile + first;
  }
  return seen;
}

// Columns of the list that a row has, in the lane's columns (../common/key_mask.h); `slots`: up to the end of its row
// of slots, also past a causal query.
__device__ __forceinline__ uint32_t mask_of_row(const UnfusedParams& p, const uint32_t* table, const PartRow& row,
                                                const List& list, bool slots, int lane) {
  uint32_t word = row.exists ? ~uint32_t(0) : 0;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    if (a < p.first_axis) continue;
    const int begin = row.begin[a] - list.begin[a];
    const int end = slots ? begin + p.schedule.axes[a].window : row.end[a] - list.begin[a];
    word &= key_mask_word(p.mask_layout, table, a, {begin, end}, lane % 4);
  }
  return word;
}

// The same for the first `count` columns.
__device__ __forceinline__ uint32_t mask_of_first(int count, int lane) {
  uint32_t word = 0;
#pragma unroll
  for (int bit = 0; bit < 32; ++bit) {
    if (bit / 2 * 8 + lane % 4 * 2 + bit % 2 < count) word |= uint32_t(1) << bit;
  }
  return word;
}

// ---- slots

// A contiguous piece of a query's row of slots.
struct SlotRange {
  int first, count;
};

// Slots that a query, whose window begins at `begin`, has in a slab of keys.
__device__ __forceinline__ SlotRange slots_in_slab(const UnfusedParams& p, const int* begin, const Slab& slab) {
  SlotRange range = {0, 0};
  bool seen = true;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    const TiledAxis& axis = p.schedule.axes[a];
    if (a < p.first_axis || a > p.sliced) continue;
    const int low = imax(slab.begin[a] - begin[a], 0);
    const int high = imin(slab.begin[a] + axis.key_tile - begin[a], axis.window);
    seen = seen && low < high;
    range.first += low * p.slot_step[a];
    range.count = (high - low) * p.slot_step[a];  // of the last of these axes
  }
  if (!seen) range.count = 0;
  return range;
}

// Slots from the first to the last that a query, whose window begins at `begin`, has for the keys of a CTA: `first` and
// `count` of them, in-group.
__device__ __forceinline__ SlotRange slots_of_keys(const UnfusedParams& p, const int* begin, const int* first,
                                                   const int* count) {
  SlotRange range = {0, 0};
  bool seen = true;
  int last = 0;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    if (a < p.first_axis) continue;
    const int low = imax(first[a] - begin[a], 0);
    const int high = imin(first[a] + count[a] - begin[a], p.schedule.axes[a].window);
    seen = seen && low < high;
    range.first += low * p.slot_step[a];
    last += (high - 1) * p.slot_step[a];
  }
  if (seen) range.count = last + 1 - range.first;
  return range;
}

}  // namespace jax_natten::sm80
