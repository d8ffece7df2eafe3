// A consumer of the backward, whatever its pass: its ways to wait for tiles, to multiply them and to write results. The
// passes themselves: backward_query.cuh and backward_key.cuh.
#pragma once

#include "backward_tiles.cuh"

namespace jax_natten::sm90 {

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

  __device__ __forceinline__ int row_set() const { return part / Traits::kPartsOfSet; }
  __device__ __forceinline__ const RowRecord& row_record() const { return smem.row_records[slot.index][row_set()]; }

  // Waits for the next one; false if there is none.
  __device__ __forceinline__ bool wait_for_rows() {
    ptx::barrier_wait(&smem.row_full[slot.index][row_set()], slot.parity);
    return row_record().has_tile;
  }

  // Hands a slot back to the producer once its results have left shared memory. To be called by all.
  __device__ __forceinline__ void release_rows(int& released) {
    if (released >= 0 && warp == 0 && lane == 0) {
      ptx::tma_store_wait_read();
      ptx::barrier_arrive(&smem.row_empty[released][row_set()]);
    }
    released = -1;
  }

  // Puts what is known of the warp's rows into shared memory: windows, unless masks are made ahead, and places in the
  // bias table. Lanes of a quad take an axis each. Rows that do not exist get those of the part's last, so that what
  // they read of the bias exists.
  __device__ __forceinline__ void describe_rows(const QueryTile& tile) {
    if (Traits::kMasksAhead && !Traits::kExtended) return;
    const int axis = kMaxRank - kRank + lane % 4;
    int offset[2] = {0, 0};
    if (axis < kMaxRank) {
      const TiledAxis& along = params.schedule.axes[axis];
      const int first = part_begin(tile, axis), length = tile.length[axis];
      const int last = imin(first + along.query_part, length) - 1;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int x = imin(first + coordinate(row_in_part(i), axis), last);
        if constexpr (!Traits::kMasksAhead) {
          const Interval w = partners<Traits::kPass>(along, x, length);
          smem.windows[group][row_in_part(i)][lane % 4] = {w.begin - tile.key[axis], w.end - tile.key[axis]};
        }
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
      if (additional >= 0) return first_columns_word(additional, lane % 4);
    }
    if constexpr (Traits::kMasksAhead) {
      return reinterpret_cast<const uint32_t*>(&smem.masks[stage.index][part][row_in_part(i)])[lane % 4];
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
    const RowRecord& record = row_record();
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

}  // namespace jax_natten::sm90
