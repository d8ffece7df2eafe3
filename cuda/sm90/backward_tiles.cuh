// What the two passes of the backward have in common: shared memory, the producer, and a consumer's ways to wait for
// tiles, to multiply them and to write results. The passes themselves: backward_query.cuh and backward_key.cuh.
//
// One warp is the producer: it walks over row tiles, and for each over the column tiles of the box of its partners, and
// has the TMA copy them into rings of shared memory. Consumer warpgroups work on 64 rows each. CTAs are persistent:
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
  static constexpr bool kGathersStarts = kPass == kKeyPass;
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
    alignas(16) uint32_t mask_table[kMaxKeyMaskWords];
    int part_offset[kParts][kMaxRank];            // where a part begins in a row tile
    uint32_t row_coordinates[kPartRows];          // of the rows in a part, a byte per axis
    Interval windows[kGroups][kPartRows][kRank];  // of each row, relative to QueryTile::key
    RowRecord row_records[kSlots];
    ColumnRecord column_records[kStages];
    // The row tile whose columns are being loaded, and its parts: the producer's own, which has few registers.
    QueryTile produced_tile;
    QueryPart<kRank, kPass> parts[kParts];
    uint64_t row_full[kSlots], row_empty[kSlots];
    uint64_t column_full[kStages][kOperands], column_empty[kStages];
    uint64_t part_done;  // where a part's columns of results are divided among warpgroups
    ColumnExtension column_extensions[kExtended ? kStages : 1];
    int bias_offset[kExtended ? kColumns : 2];           // of each column, from the tile's first, in the bias table
    int row_offset[kGroups][kExtended ? kPartRows : 1];  // of each row, from the row tile's first
  };
  static_assert(sizeof(Shared) <= 228 * 1024 / kShape.residency - 1024, "CTAs must fit into a multiprocessor");
};

// ---------------------------------------------------------------------------------------------------------- producer

// One warp: all lanes walk, the first one issues copies.
template <class Traits>
struct PassProducer {
  using Shared = typename Traits::Shared;
  static constexpr int kRank = Traits::kRank;

  const BackwardParams& params;
  Shared& smem;
  const int lane;
  RingPosition<Traits::kSlots> slot{1};  // parity 1 passes on fresh barriers
  RingPosition<Traits::kStages> stage{1};

  __device__ PassProducer(const BackwardParams& params, Shared& smem, int lane)
      : params(params), smem(smem), lane(lane) {}

  __device__ void run() {
    for (int index = blockIdx.x; index < params.schedule.tiles; index += gridDim.x) {
      __syncwarp();
      if (lane == 0) find_tile(index);
      __syncwarp();
      if (!smem.produced_tile.empty()) load(smem.produced_tile);
    }
    ptx::barrier_wait(&smem.row_empty[slot.index], slot.parity);
    if (lane == 0) {
      smem.row_records[slot.index].has_tile = 0;
      ptx::barrier_arrive(&smem.row_full[slot.index]);
    }
  }

 private:
  __device__ __forceinline__ void find_tile(int index) {
    smem.produced_tile = decode_query_tile<kRank, Traits::kPass>(params.schedule, index);
    if (smem.produced_tile.empty()) return;
#pragma unroll 1
    for (int part = 0; part < Traits::kParts; ++part) {
      smem.parts[part] =
          QueryPart<kRank, Traits::kPass>(params.schedule.axes, smem.produced_tile, smem.part_offset[part]);
    }
  }

  // No lane may fall behind by a phase.
  __device__ __forceinline__ void wait(uint64_t* empty, uint32_t parity) {
    ptx::barrier_wait(empty, parity);
    __syncwarp();
  }

  // With one slot the rows must wait until the previous tile is done. The first column tiles go ahead of them.
  __device__ __forceinline__ void load(const QueryTile& tile) {
    const TiledAxis* axes = params.schedule.axes;
    constexpr int kAhead = Traits::kSlots == 1 ? Traits::kStages : 0;
    int ahead = kAhead;
    if (kAhead == 0) load_rows(tile);
    // Columns are of the key and value head of the row tile's queries, or of the query heads of its keys.
    const int group = params.schedule.by_group.divisor;
    const int first = Traits::kPass == kQueryPass ? params.schedule.by_group.quotient(tile.head) : tile.head * group;
    const int heads = Traits::kPass == kQueryPass ? 1 : group;
    for (int head = first; head < first + heads; ++head) {
      typename Traits::Cursor cursor;
      for (bool more = true; more;) {
        const typename Traits::Cursor current = cursor;
        more = cursor.next(axes, tile.extent, params.extension);
        const bool last = head + 1 == first + heads && !more;
        load_columns(tile, current, head, last);
        if (kAhead > 0 && (--ahead == 0 || (last && ahead > 0))) load_rows(tile);
      }
    }
  }

  __device__ __forceinline__ void load_rows(const QueryTile& tile) {
    wait(&smem.row_empty[slot.index], slot.parity);
    if (lane == 0) {
      const int slab = params.row_address.slab<kRank>(tile, tile.head), map = map_variant<kRank>(params, tile);
      uint64_t* full = &smem.row_full[slot.index];
      smem.row_records[slot.index] = {tile, slab, map, 1};
      ptx::barrier_arrive_expecting(full, params.row_bytes);
#pragma unroll 1
      for (int part = 0; part < Traits::kParts; ++part) {
        const int (&offset)[kMaxRank] = smem.part_offset[part];
#pragma unroll 1
        for (int operand = 0; operand < kOperands; ++operand) {
          const int channel = operand == kScores ? params.first_channel : 0;
#pragma unroll
          for (int c = 0; c < Traits::kChunks; ++c) {
            ptx::tma_load(ptx::shared_address(smem.row[slot.index][part][operand][c]), &params.maps[map].row[operand],
                          full, channel + c * Traits::kChunk, tile.query[2] + offset[2], tile.query[1] + offset[1],
                          tile.query[0] + offset[0], slab, ptx::CachePolicy::kEvictFirst);
          }
        }
      }
    }
    slot.advance();
  }

  __device__ __forceinline__ void load_columns(const QueryTile& tile, const typename Traits::Cursor& cursor, int head,
                                               bool last) {
    const int (&begin)[kMaxRank] = cursor.begin;
    wait(&smem.column_empty[stage.index], stage.parity);
    if (lane == 0) {
      uint32_t classes = last ? ColumnRecord::kLast : 0;
      for (int part = 0; part < Traits::kParts; ++part) classes |= uint32_t(classify(part, cursor)) << 2 * part;
      smem.column_records[stage.index] = {{begin[0], begin[1], begin[2]}, classes};
      if constexpr (Traits::kExtended) find_extension(tile, cursor, head);
      int slab = params.column_address.slab<kRank>(tile, head);
      int x[kMaxRank] = {tile.key[0] + begin[0], tile.key[1] + begin[1], tile.key[2] + begin[2]};
      const CUtensorMap *first = &params.maps[map_variant<kRank>(params, tile)].column[0], *second = first + 1;
      if (!cursor.in_window()) {
        slab = tile.batch * params.extension.per_batch + head;
        x[0] = x[1] = 0;
        x[2] = cursor.additional;
        first = &params.extension.key;
        second = &params.extension.value;
      }
#pragma unroll 1
      for (int operand = 0; operand < kOperands; ++operand) {
        uint64_t* full = &smem.column_full[stage.index][operand];
        ptx::barrier_arrive_expecting(full, params.column_bytes);
#pragma unroll
        for (int c = 0; c < Traits::kChunks; ++c) {
          ptx::tma_load(ptx::shared_address(smem.column[stage.index][operand][c]), operand == 0 ? first : second, full,
                        c * Traits::kChunk, x[2], x[1], x[0], slab, ptx::CachePolicy::kEvictLast);
        }
      }
    }
    if constexpr (Traits::kGathersStarts) gather_starts(tile, begin, head);
    stage.advance();
  }

  // What a part does with a column tile.
  __device__ __forceinline__ TileClass classify(int part, const typename Traits::Cursor& cursor) const {
    if (cursor.in_window()) return smem.parts[part].classify(params.schedule.axes, cursor.begin, params.padded);
    const bool whole = !params.padded && cursor.additional + params.extension.box <= params.extension.additional;
    return !smem.parts[part].live ? TileClass::kSkip : whole ? TileClass::kWhole : TileClass::kMasked;
  }

  __device__ __forceinline__ void find_extension(const QueryTile& tile, const typename Traits::Cursor& cursor,
                                                 int head) {
    const KeyExtension& extension = params.extension;
    const float* entries = nullptr;
    if (cursor.in_window() && extension.bias != nullptr) {
      entries = extension.entries(tile.batch, Traits::kPass == kQueryPass ? tile.head : head);
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        entries += (tile.key[a] + cursor.begin[a] - tile.query[a]) * extension.bias_step[a];
      }
    }
    const int left = imin(extension.additional - cursor.additional, extension.box);
    smem.column_extensions[stage.index] = {entries, cursor.in_window() ? -1 : left};
  }

  // Columns outside the grid start at zero; they are masked.
  __device__ __forceinline__ void gather_starts(const QueryTile& tile, const int (&begin)[kMaxRank], int head) {
    int first = params.start_address.slab<kRank>(tile, head * params.positions);
    int left[kMaxRank];  // columns inside the grid
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      const int x = tile.key[a] + begin[a];
      left[a] = (Traits::kExtended ? imin(tile.length[a], params.most_columns) : tile.length[a]) - x;
      first += x * params.position_step[a];
    }
#pragma unroll 1
    for (int column = lane; column < Traits::kColumns; column += 32) {
      const auto [x, positions] = smem.places[column];
      const bool inside =
          x != ColumnPlace::kNone && int(x & 255) < left[0] && int(x >> 8 & 255) < left[1] && int(x >> 16) < left[2];
      const int at = inside ? first + positions : 0;
      for (int operand = 0; operand < kOperands; ++operand) {
        ptx::copy_async<4>(ptx::shared_address(&smem.start[stage.index][operand][column]), params.start[operand] + at,
                           inside);
      }
    }
    ptx::copy_async_arrive(&smem.column_full[stage.index][kScores]);
  }
};

// ---------------------------------------------------------------------------------------------------------- consumer

template <class Traits>
struct PassConsumer {
  using T = typename Traits::T;
  using Shared = typename Traits::Shared;
  static constexpr int kRank = Traits::kRank, kDim = Traits::kShape.dim, kColumns = Traits::kColumns;
  static constexpr int kRowBytes = Traits::kRowBytes, kChunkSteps = Traits::kChunk / 16;
  static constexpr int kAtomBytes = 8 * kRowBytes;  // eight rows make a swizzle atom
  static constexpr ptx::Swizzle kSwizzle = kRowBytes == 128 ? ptx::Swizzle::k128Bytes : ptx::Swizzle::k64Bytes;
  static constexpr int kRowChunkBytes = kPartRows * kRowBytes, kColumnChunkBytes = kColumns * kRowBytes;
  static constexpr int kGroupsOfPart = Traits::kGroups / Traits::kParts;
  static constexpr int kPartBarrier = 1, kGroupBarrier = kPartBarrier + Traits::kParts;  // named barriers

  const BackwardParams& params;
  Shared& smem;
  const int group, part, warp, lane;  // consumer warpgroup, its part, warp in it, lane in that

  RingPosition<Traits::kSlots> slot{0};
  RingPosition<Traits::kStages> stage = RingPosition<Traits::kStages>::before_first();  // of the column tile at work
  TileClass tile_class;                                                                 // and what it is to the part
  bool last;            // whether it is the row tile's last
  int held_stage = -1;  // that products in flight may still read
  uint32_t done_parity = 0;

  __device__ PassConsumer(const BackwardParams& params, Shared& smem, int group, int warp, int lane)
      : params(params), smem(smem), group(group), part(group / kGroupsOfPart), warp(warp), lane(lane) {}

  __device__ __forceinline__ int row_in_part(int i) const { return 16 * warp + lane / 4 + 8 * i; }

  // Coordinate of a row of the part along an axis.
  __device__ __forceinline__ int coordinate(int row, int a) const { return smem.row_coordinates[row] >> 8 * a & 255; }

  // First row of the part along an axis.
  __device__ __forceinline__ int part_begin(const QueryTile& tile, int a) const {
    return tile.query[a] + smem.part_offset[part][a];
  }

  __device__ __forceinline__ bool part_is_live(const QueryTile& tile) const {
    bool live = true;
#pragma unroll
    for (int a = kMaxRank - kRank; a < kMaxRank; ++a) live = live && part_begin(tile, a) < tile.length[a];
    return live;
  }

  __device__ __forceinline__ void sync_group() { ptx::named_barrier_sync(kGroupBarrier + group, 128); }
  // All warpgroups of the part. If there are two, they do not share their code: synccheck objects to a named barrier at
  // two places.
  __device__ __forceinline__ void sync_part() {
    if constexpr (kGroupsOfPart == 1) {
      ptx::named_barrier_sync(kPartBarrier + part, 128);
    } else {
      ptx::barrier_arrive(&smem.part_done);
      ptx::barrier_wait(&smem.part_done, done_parity);
      done_parity ^= 1;
    }
  }

  // ---- row tiles

  // Waits for the next one; false if there is none.
  __device__ __forceinline__ bool wait_for_rows() {
    ptx::barrier_wait(&smem.row_full[slot.index], slot.parity);
    return smem.row_records[slot.index].has_tile;
  }

  // Hands a slot back to the producer once its results have left shared memory. To be called by all.
  __device__ __forceinline__ void release_rows(int& released) {
    if (released >= 0 && warp == 0 && lane == 0) {
      ptx::tma_store_wait_read();
      ptx::barrier_arrive(&smem.row_empty[released]);
    }
    released = -1;
  }

  // Puts the windows of the warp's rows into shared memory: lanes of a quad take an axis each. Rows that do not exist
  // get that of the part's last, so that what they read of the bias exists.
  __device__ __forceinline__ void find_windows(const QueryTile& tile) {
    const int axis = kMaxRank - kRank + lane % 4;
    int offset[2] = {0, 0};
    if (axis < kMaxRank) {
      const TiledAxis& along = params.schedule.axes[axis];
      const int first = part_begin(tile, axis), length = tile.length[axis];
      const int last = imin(first + along.query_part, length) - 1;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int x = imin(first + coordinate(row_in_part(i), axis), last);
        const Interval w = partners<Traits::kPass>(along, x, length);
        smem.windows[group][row_in_part(i)][lane % 4] = {w.begin - tile.key[axis], w.end - tile.key[axis]};
        if constexpr (Traits::kExtended) offset[i] = (x - tile.query[axis]) * params.extension.bias_step[axis];
      }
    }
    if constexpr (Traits::kExtended) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        offset[i] += __shfl_xor_sync(~0u, offset[i], 1);
        offset[i] += __shfl_xor_sync(~0u, offset[i], 2);
        if (lane % 4 == 0) smem.row_offset[group][row_in_part(i)] = offset[i];
      }
    }
    __syncwarp();
  }

  // ---- column tiles

  __device__ __forceinline__ void release_columns(int index) {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&smem.column_empty[index]);
  }

  __device__ __forceinline__ void begin_columns() { last = false; }

  // Moves to the next column tile that the part sees; false if none is left. Those between are only waited for: nobody
  // may hand a stage back before its copies have landed. `drain` is called before, for a stage held meanwhile could be
  // the one that the producer needs next.
  template <typename Drain>
  __device__ __forceinline__ bool next_columns(Drain drain) {
    for (;;) {
      if (last) return false;
      stage.advance();
      ptx::barrier_wait(&smem.column_full[stage.index][kScores], stage.parity);
      const uint32_t classes = smem.column_records[stage.index].classes;
      last = classes & ColumnRecord::kLast;
      tile_class = TileClass(classes >> 2 * part & 3);
      if (tile_class != TileClass::kSkip) return true;
      drain();
      wait_for_columns(kGradients);
      release_columns(stage.index);
    }
  }

  __device__ __forceinline__ void wait_for_columns(Operand operand) {
    ptx::barrier_wait(&smem.column_full[stage.index][operand], stage.parity);
  }

  // After the products that read the previous column tile are done.
  __device__ __forceinline__ void release_held() {
    if (held_stage >= 0) release_columns(held_stage);
    held_stage = -1;
  }

  // product (+)= rows columns^T, asynchronously.
  __device__ __forceinline__ void issue_product(Operand operand, float (&product)[kColumns / 2], bool accumulate) {
    const uint64_t rows =
        ptx::matrix_descriptor(ptx::shared_address(smem.row[slot.index][part][operand]), 16, kAtomBytes, kSwizzle);
    const uint64_t columns =
        ptx::matrix_descriptor(ptx::shared_address(smem.column[stage.index][operand]), 16, kAtomBytes, kSwizzle);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const int in_row = k % kChunkSteps * 32, chunk = k / kChunkSteps;
      ptx::Wgmma<T, kColumns>::shared(product, rows + ((chunk * kRowChunkBytes + in_row) >> 4),
                                      columns + ((chunk * kColumnChunkBytes + in_row) >> 4), accumulate || k > 0);
    }
    ptx::wgmma_commit();
  }

  // result += factor columns, asynchronously.
  __device__ __forceinline__ void issue_result(Operand operand, float (&result)[kDim / 2],
                                               const uint32_t (&factor)[kColumns / 4]) {
    const uint64_t columns = ptx::matrix_descriptor(ptx::shared_address(smem.column[stage.index][operand]),
                                                    kColumnChunkBytes, kAtomBytes, kSwizzle);
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      const uint32_t fragment[4] = {factor[4 * k], factor[4 * k + 1], factor[4 * k + 2], factor[4 * k + 3]};
      ptx::Wgmma<T, kDim>::registers(result, fragment, columns + ((k * 2 * kAtomBytes) >> 4));
    }
    ptx::wgmma_commit();
  }

  // Columns of a masked tile that a row sees.
  __device__ __forceinline__ uint32_t seen_columns(int i) const {
    if constexpr (Traits::kSeesAdditional) {
      const int additional = smem.column_extensions[stage.index].additional;
      if (additional >= 0) return leading_columns_word(additional, lane % 4);
    }
    const ColumnRecord& record = smem.column_records[stage.index];
    uint32_t word = ~uint32_t(0);
#pragma unroll
    for (int a = 0; a < kRank; ++a) {
      const int axis = kMaxRank - kRank + a, begin = record.begin[axis];
      const Interval w = smem.windows[group][row_in_part(i)][a];
      word &= key_mask_word(params.mask_layout, smem.mask_table, axis, {w.begin - begin, w.end - begin}, lane % 4);
    }
    return word;
  }

  // Zeroes what lies outside the windows.
  __device__ __forceinline__ void mask(float (&probability)[kColumns / 2]) {
    if (tile_class != TileClass::kMasked) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) mask_row(probability, i, seen_columns(i), 0.f);
  }

  // If there is a bias: makes the scores powers of two, and adds it to those in the window box.
  __device__ __forceinline__ void add_bias(float (&scores)[kColumns / 2]) {
    const KeyExtension& extension = params.extension;
    if (extension.bias == nullptr) return;
    const float* entries = smem.column_extensions[stage.index].entries;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (entries == nullptr) {
        scale_row(scores, i, extension.score_scale);
      } else {
        bias_row(scores, i, tile_class == TileClass::kMasked ? seen_columns(i) : ~uint32_t(0),
                 entries - smem.row_offset[group][row_in_part(i)], smem.bias_offset + 2 * (lane % 4),
                 extension.score_scale);
      }
    }
  }

  __device__ __forceinline__ void pack(const float (&numbers)[kColumns / 2], uint32_t (&packed)[kColumns / 4]) {
#pragma unroll
    for (int e = 0; e < kColumns / 4; ++e) packed[e] = ptx::pack<T>(numbers[2 * e], numbers[2 * e + 1]);
  }

  // ---- results, through the slot of the rows

  // Byte of a 16-byte segment in the rows of a part.
  __device__ __forceinline__ static int segment_offset(int row, int segment) {
    constexpr int kSegments = kRowBytes / 16;
    const int swizzled = segment % kSegments ^ (kRowBytes == 128 ? row % 8 : row / 2 % 4);
    return segment / kSegments * kRowChunkBytes + row * kRowBytes + swizzled * 16;
  }

  // After sync_part(): no warp computes with the rows any more.
  __device__ __forceinline__ void write_result(Operand operand, const float (&result)[kDim / 2], float factor) {
    const int row = 16 * warp + lane % 16;
    const uint32_t rows = ptx::shared_address(smem.row[slot.index][part][operand]);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const float* r = &result[8 * k];
      ptx::store_matrix_x4(rows + segment_offset(row, 2 * k + lane / 16), ptx::pack<T>(r[0] * factor, r[1] * factor),
                           ptx::pack<T>(r[2] * factor, r[3] * factor), ptx::pack<T>(r[4] * factor, r[5] * factor),
                           ptx::pack<T>(r[6] * factor, r[7] * factor));
    }
  }

  // Enqueues the store of a result that all warps of the group have written, after async_proxy_fence() and
  // sync_group(). By one thread.
  __device__ __forceinline__ void store_result(Operand operand) {
    const RowRecord& record = smem.row_records[slot.index];
    if (!part_is_live(record.tile)) return;
    const int x[kMaxRank] = {part_begin(record.tile, 0), part_begin(record.tile, 1), part_begin(record.tile, 2)};
#pragma unroll
    for (int c = 0; c < Traits::kChunks; ++c) {
      ptx::tma_store(&params.maps[record.map].result[operand],
                     ptx::shared_address(smem.row[slot.index][part][operand][c]), c * Traits::kChunk, x[2], x[1], x[0],
                     record.slab);
    }
  }
};

// ------------------------------------------------------------------------------------------------------------ kernel

template <class Traits>
__device__ __forceinline__ void set_up_pass(const BackwardParams& params, typename Traits::Shared& smem) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kSlots; ++i) {
      ptx::barrier_init(&smem.row_full[i], 1);
      ptx::barrier_init(&smem.row_empty[i], Traits::kGroups);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      // The lanes that gather start values arrive too.
      ptx::barrier_init(&smem.column_full[i][kScores], Traits::kGathersStarts ? 1 + 32 : 1);
      ptx::barrier_init(&smem.column_full[i][kGradients], 1);
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
