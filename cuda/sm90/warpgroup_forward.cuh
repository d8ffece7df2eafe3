// What the forward kernels whose consumers are whole warpgroups have in common: "wide" (wide_forward.cuh) and "middle"
// (middle_forward.cuh).
//
// One thread of a CTA is the producer: it walks over query tiles, and for each over the key tiles of the window box,
// and has the TMA copy them into rings of shared memory. Each warpgroup of consumers owns 64 queries of the tile and
// computes, per key tile it needs,
//     scores = Q K^T      wgmma from shared memory
//     p = softmax(scores) in registers, masked only on tiles that cross a window's edge
//     out += p V          wgmma with p from registers
// How these are interleaved is up to the kernel. Outputs leave through the shared memory of the queries.
//
// Extended variants (kExtended) also add a relative position bias to the scores, and append tiles of additional keys to
// those of the window box.
//
// CTAs are persistent: CTA c works on query tiles c, c + gridDim.x, ...
#pragma once

#include "../common/ptx.h"
#include "../common/ring.h"
#include "../common/softmax.h"
#include "../common/wgmma.h"
#include "warpgroup_params.h"
#include "warpgroup_shape.h"

namespace jax_natten::sm90 {

// What the producer tells the consumers about a query tile.
struct WarpgroupRecord {
  QueryTile tile;
  int slab;  // of its boxes, and row of lse at in-group position (0, 0, 0)
  int map;
  int has_tile;  // 0: no more tiles
};

// Kernel: says the shape that is compiled, kShape, and the number of consumer warpgroups, kGroups.
template <class Kernel, typename T_, int kRank_, bool kExtended_>
struct WarpgroupTraits {
  using T = T_;
  static constexpr int kRank = kRank_;
  static constexpr bool kExtended = kExtended_;
  using Cursor = KeyCursor<kRank, kExtended>;
  static constexpr WarpgroupShape kShape = Kernel::kShape;
  static constexpr int kGroups = Kernel::kGroups, kDim = kShape.dim;
  static constexpr int kKeys = kShape.keys, kStages = kShape.stages, kSlots = kShape.query_slots;
  static constexpr int kChunk = kShape.chunk, kChunks = kShape.chunks(), kRowBytes = kShape.row_bytes();
  static_assert(kKeys % 16 == 0 && kKeys <= kMaxKeyColumns, "a mask word holds at most 128 columns");
  static_assert(kKeys * kRowBytes % 1024 == 0, "every stage must begin at a whole swizzle pattern");

  struct Shared {
    alignas(1024) uint8_t query[kSlots][kGroups][kChunks][kWarpgroupRows * kRowBytes];  // later the output
    alignas(1024) uint8_t key[kStages][kChunks][kKeys * kRowBytes];
    alignas(1024) uint8_t value[kStages][kChunks][kKeys * kRowBytes];
    uint32_t mask_table[kMaxKeyMaskWords];
    WarpgroupRecord records[kSlots];
    uint64_t query_full[kSlots], query_empty[kSlots];
    uint64_t key_full[kStages], key_empty[kStages];
    uint64_t value_full[kStages], value_empty[kStages];
    int bias_offset[kExtended ? kKeys : 2];  // of each column's key, from the tile's first key, in the bias table
  };
};

// ---------------------------------------------------------------------------------------------------------- producer

template <class Traits>
struct WarpgroupProducer {
  using Shared = typename Traits::Shared;
  static constexpr int kRank = Traits::kRank;

  const WarpgroupParams& params;
  Shared& smem;
  RingPosition<Traits::kSlots> slot{1};  // parity 1 passes on fresh barriers
  RingPosition<Traits::kStages> stage{1};

  __device__ void run() {
    for (int index = blockIdx.x; index < params.schedule.tiles; index += gridDim.x) {
      const QueryTile tile = decode_query_tile<kRank>(params.schedule, index);
      if (tile.empty()) continue;
      const TensorMaps& maps = params.maps[map_variant<kRank>(params, tile)];
      load_queries(tile, maps);
      load_keys_and_values(tile, maps);
    }
    finish();
  }

 private:
  __device__ void load_queries(const QueryTile& tile, const TensorMaps& maps) {
    const TiledAxis* axes = params.schedule.axes;
    const int slab = params.query_address.slab<kRank>(tile, tile.head);
    ptx::barrier_wait(&smem.query_empty[slot.index], slot.parity);

    smem.records[slot.index] = {tile, slab, map_variant<kRank>(params, tile), 1};
    uint64_t* full = &smem.query_full[slot.index];
    const int rows = axes[0].query_part * axes[1].query_part * axes[2].query_part;
    ptx::barrier_arrive_expecting(full, Traits::kGroups * rows * Traits::kChunks * Traits::kRowBytes);
#pragma unroll 1
    for (int group = 0; group < Traits::kGroups; ++group) {
      int offset[kMaxRank];
      query_part_offset(axes, group, offset);
#pragma unroll
      for (int c = 0; c < Traits::kChunks; ++c) {
        ptx::tma_load(ptx::shared_address(smem.query[slot.index][group][c]), &maps.query, full, c * Traits::kChunk,
                      tile.query[2] + offset[2], tile.query[1] + offset[1], tile.query[0] + offset[0], slab,
                      ptx::CachePolicy::kEvictFirst);
      }
    }
    slot.advance();
  }

  __device__ void load_keys_and_values(const QueryTile& tile, const TensorMaps& maps) {
    const TiledAxis* axes = params.schedule.axes;
    const int head = params.schedule.by_group.quotient(tile.head);
    const int slab = params.key_address.slab<kRank>(tile, head);
    const int bytes = axes[0].key_tile * axes[1].key_tile * axes[2].key_tile * Traits::kChunks * Traits::kRowBytes;
    typename Traits::Cursor cursor;
    do {
      int x[kMaxRank] = {tile.key[0] + cursor.begin[0], tile.key[1] + cursor.begin[1], tile.key[2] + cursor.begin[2]};
      int box_slab = slab;
      if (!cursor.in_window()) {
        x[0] = x[1] = 0;
        x[2] = cursor.additional;
        box_slab = tile.batch * params.extension.per_batch + head;
      }
      const auto load = [&](const CUtensorMap& map,
                            uint8_t (&destination)[Traits::kChunks][Traits::kKeys* Traits::kRowBytes], uint64_t* full,
                            uint64_t* empty) {
        ptx::barrier_wait(empty, stage.parity);
        ptx::barrier_arrive_expecting(full, bytes);
#pragma unroll
        for (int c = 0; c < Traits::kChunks; ++c) {
          ptx::tma_load(ptx::shared_address(destination[c]), &map, full, c * Traits::kChunk, x[2], x[1], x[0], box_slab,
                        ptx::CachePolicy::kEvictLast);
        }
      };
      load(cursor.in_window() ? maps.key : params.extension.key, smem.key[stage.index], &smem.key_full[stage.index],
           &smem.key_empty[stage.index]);
      load(cursor.in_window() ? maps.value : params.extension.value, smem.value[stage.index],
           &smem.value_full[stage.index], &smem.value_empty[stage.index]);
      stage.advance();
    } while (cursor.next(axes, tile.extent, params.extension));
  }

  __device__ void finish() {
    ptx::barrier_wait(&smem.query_empty[slot.index], slot.parity);
    smem.records[slot.index].has_tile = 0;
    ptx::barrier_arrive(&smem.query_full[slot.index]);
  }
};

// ---------------------------------------------------------------------------------------------------------- consumer

// What a thread of a consumer warpgroup does, but for the order of things within a query tile.
template <class Traits>
struct WarpgroupConsumer {
  using T = typename Traits::T;
  using Shared = typename Traits::Shared;
  static constexpr int kRank = Traits::kRank, kDim = Traits::kDim, kKeys = Traits::kKeys;
  static constexpr int kRowBytes = Traits::kRowBytes, kChunkSteps = Traits::kChunk / 16;
  static constexpr int kAtomBytes = 8 * kRowBytes;  // eight rows make a swizzle atom
  static constexpr ptx::Swizzle kSwizzle = kRowBytes == 128 ? ptx::Swizzle::k128Bytes : ptx::Swizzle::k64Bytes;
  static constexpr int kQueryChunkBytes = kWarpgroupRows * kRowBytes, kKeyChunkBytes = kKeys * kRowBytes;
  static constexpr int kGroupBarrier = 1;  // named barriers of the groups begin here
  static constexpr int kFirstFreeBarrier = kGroupBarrier + Traits::kGroups;

  const WarpgroupParams& params;
  Shared& smem;
  const int group, warp, lane;  // consumer warpgroup, warp in it, lane in that

  int part_offset[kMaxRank] = {};  // of the warpgroup's queries in the tile
  uint32_t row[2];                 // coordinates of the thread's rows in the part, a byte each

  __device__ WarpgroupConsumer(const WarpgroupParams& params, Shared& smem, int group, int warp, int lane)
      : params(params), smem(smem), group(group), warp(warp), lane(lane) {
    const TiledAxis* axes = params.schedule.axes;
    if (Traits::kGroups > 1) query_part_offset(axes, group, part_offset);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int inner = axes[2].query_part, middle = axes[1].query_part, rows = axes[0].query_part * middle * inner;
      const int n = imin(row_in_part(i), rows - 1);  // rows that do not exist are the last: what those see exists
      row[i] = n / (inner * middle) | n / inner % middle << 8 | n % inner << 16;
    }
  }

  __device__ __forceinline__ int row_x(int i, int a) const { return row[i] >> 8 * a & 0xff; }

  // Calls attend(tile, slot, stage, unreleased_slot, softmax, out) for every query tile: it works through the key
  // tiles, releases them and, as soon as it has waited for something else, the unreleased slot.
  template <class Attend>
  __device__ __forceinline__ void each_query_tile(Attend attend) {
    RingPosition<Traits::kSlots> slot(0);
    RingPosition<Traits::kStages> stage(0);
    int unreleased_slot = -1;  // whose output may still be on its way to memory

    for (;;) {
      ptx::barrier_wait(&smem.query_full[slot.index], slot.parity);
      const WarpgroupRecord& tile = smem.records[slot.index];
      if (!tile.has_tile) break;
      if (params.has_query_factor) scale_queries(slot.index);

      float out[kDim / 2];
#pragma unroll
      for (int e = 0; e < kDim / 2; ++e) out[e] = 0;
      OnlineSoftmax softmax(params.scale);
      attend(tile.tile, slot.index, stage, unreleased_slot, softmax, out);

      release_slot(unreleased_slot);
      write(tile, slot.index, softmax, out);
      unreleased_slot = slot.index;
      if (Traits::kSlots == 1) release_slot(unreleased_slot);
      slot.advance();
    }
    if (warp == 0 && lane == 0) ptx::tma_store_wait_read();  // shared memory must outlive the stores
  }

  __device__ __forceinline__ int row_in_part(int i) const { return 16 * warp + lane / 4 + 8 * i; }

  __device__ __forceinline__ void sync_group() { ptx::named_barrier_sync(kGroupBarrier + group, 128); }

  // One arrival per warp, after a wait that all its lanes have passed: wgmma alone reads keys and values.
  __device__ __forceinline__ void release(uint64_t* empty) {
    if (lane == 0) ptx::barrier_arrive(empty);
  }

  // Hands a query slot back to the producer once its output has left shared memory. Every thread arrives, because every
  // thread has read the slot's record.
  __device__ __forceinline__ void release_slot(int& slot) {
    if (slot < 0) return;
    if (warp == 0 && lane == 0) ptx::tma_store_wait_read();
    ptx::barrier_arrive(&smem.query_empty[slot]);
    slot = -1;
  }

  // Multiplies this warpgroup's queries by the sign of the scale (or by zero).
  __device__ void scale_queries(int slot) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(smem.query[slot][group]);
    for (int i = 32 * warp + lane; i < kWarpgroupRows * kDim / 2; i += 128) {
      pairs[i] = ptx::multiply_pairs<T>(pairs[i], params.query_factor);
    }
    ptx::async_proxy_fence();
    sync_group();
  }

  // ---- phase 1 of a key tile: the scores, asynchronously

  __device__ __forceinline__ void issue_scores(float (&scores)[kKeys / 2], int slot, int stage) {
    const uint64_t query =
        ptx::matrix_descriptor(ptx::shared_address(smem.query[slot][group]), 16, kAtomBytes, kSwizzle);
    const uint64_t key = ptx::matrix_descriptor(ptx::shared_address(smem.key[stage]), 16, kAtomBytes, kSwizzle);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const int in_row = k % kChunkSteps * 32, chunk = k / kChunkSteps;
      ptx::Wgmma<T, kKeys>::shared(scores, query + ((chunk * kQueryChunkBytes + in_row) >> 4),
                                   key + ((chunk * kKeyChunkBytes + in_row) >> 4), k > 0);
    }
    ptx::wgmma_commit();
  }

  // ---- phase 2: out += p V, asynchronously

  __device__ __forceinline__ void issue_output(float (&out)[kDim / 2], const uint32_t (&p)[kKeys / 4], int stage) {
    const uint64_t value =
        ptx::matrix_descriptor(ptx::shared_address(smem.value[stage]), kKeyChunkBytes, kAtomBytes, kSwizzle);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint32_t fragment[4] = {p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]};
      ptx::Wgmma<T, kDim>::registers(out, fragment, value + ((k * 2 * kAtomBytes) >> 4));
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void pack(const float (&scores)[kKeys / 2], uint32_t (&p)[kKeys / 4]) {
#pragma unroll
    for (int e = 0; e < kKeys / 4; ++e) p[e] = ptx::pack<T>(scores[2 * e], scores[2 * e + 1]);
  }

  template <class Window>
  __device__ __forceinline__ void find_windows(const QueryTile& tile, const int (&first)[kMaxRank],
                                               Window (&windows)[2][kMaxRank]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
        const int query = imin(first[a] + row_x(i, a), tile.length[a] - 1);
        const Interval w = window(params.schedule.axes[a], query, tile.length[a]);
        windows[i][a] = Interval{w.begin - tile.key[a], w.end - tile.key[a]};
      }
    }
  }

  // ---- the extended variant

  // Columns of a box of additional keys that hold one.
  __device__ __forceinline__ uint32_t additional_columns(const typename Traits::Cursor& cursor) const {
    const KeyExtension& extension = params.extension;
    return first_columns_word(imin(extension.additional - cursor.additional, extension.box), lane % 4);
  }

  // Scales the scores of a row and adds the bias of the keys that `word` names. All about the query is read again,
  // which costs fewer registers than to keep it.
  __device__ __forceinline__ void add_bias(float (&scores)[kKeys / 2], int i, uint32_t word, const QueryTile& tile,
                                           const typename Traits::Cursor& cursor) const {
    const KeyExtension& extension = params.extension;
    if (!cursor.in_window()) return scale_row(scores, i, extension.score_scale);
    int entry = 0;
#pragma unroll
    for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
      const int query = imin(tile.query[a] + part_offset[a] + row_x(i, a), tile.length[a] - 1);
      entry += (tile.key[a] + cursor.begin[a] - query) * extension.bias_step[a];
    }
    bias_row(scores, i, word, extension.entries(tile.batch, tile.head) + entry, smem.bias_offset + 2 * (lane % 4),
             extension.score_scale);
  }

  __device__ __forceinline__ void rescale(float (&out)[kDim / 2], const OnlineSoftmax& softmax) {
#pragma unroll
    for (int e = 0; e < kDim / 2; ++e) out[e] *= softmax.correction[e / 2 % 2];
  }

  // ---- epilogue: outputs through the query slot, log-sum-exp straight to memory

  __device__ __forceinline__ void write(const WarpgroupRecord& record, int slot, OnlineSoftmax& softmax,
                                        const float (&out)[kDim / 2]) {
    const TiledAxis* axes = params.schedule.axes;
    const QueryPart<kRank> part(axes, record.tile, part_offset);
    float normalizer[2];
    softmax.finish(normalizer);

    sync_group();  // all four warps have computed with the queries that the outputs overwrite
    const int r = 16 * warp + lane % 16;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const int segment = k % kChunkSteps * 2 + lane / 16;  // of 16 bytes, in the row
      const int swizzled = segment ^ (kRowBytes == 128 ? r % 8 : r / 2 % 4);
      const float* o = &out[8 * k];
      ptx::store_matrix_x4(
          ptx::shared_address(&smem.query[slot][group][k / kChunkSteps][r * kRowBytes + swizzled * 16]),
          ptx::pack<T>(o[0] * normalizer[0], o[1] * normalizer[0]),
          ptx::pack<T>(o[2] * normalizer[1], o[3] * normalizer[1]),
          ptx::pack<T>(o[4] * normalizer[0], o[5] * normalizer[0]),
          ptx::pack<T>(o[6] * normalizer[1], o[7] * normalizer[1]));
    }
    ptx::async_proxy_fence();
    sync_group();
    if (warp == 0 && lane == 0) {
      if (part.live) {
#pragma unroll
        for (int c = 0; c < Traits::kChunks; ++c) {
          ptx::tma_store(&params.maps[record.map].out, ptx::shared_address(smem.query[slot][group][c]),
                         c * Traits::kChunk, part.query[2], part.query[1], part.query[0], record.slab);
        }
      }
      ptx::tma_store_commit();
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bool inside = lane % 4 == i && row_in_part(i) < axes[0].query_part * axes[1].query_part * axes[2].query_part;
      int at = record.slab;
#pragma unroll
      for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
        const int x = part.query[a] + row_x(i, a);
        inside = inside && x < record.tile.length[a];
        at += x * params.row_step[a];
      }
      if (inside) params.lse[at] = softmax.log_sum_exp(i);
    }
  }
};

// ------------------------------------------------------------------------------------------------------------ kernel

template <class Traits>
__device__ __forceinline__ void set_up(const WarpgroupParams& params, typename Traits::Shared& smem) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kSlots; ++i) {
      ptx::barrier_init(&smem.query_full[i], 1);
      ptx::barrier_init(&smem.query_empty[i], 128 * Traits::kGroups);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::barrier_init(&smem.key_full[i], 1);
      ptx::barrier_init(&smem.key_empty[i], 4 * Traits::kGroups);
      ptx::barrier_init(&smem.value_full[i], 1);
      ptx::barrier_init(&smem.value_empty[i], 4 * Traits::kGroups);
    }
    ptx::barrier_init_fence();
  }
  for (int i = threadIdx.x; i < params.mask_layout.words; i += blockDim.x) smem.mask_table[i] = params.mask_table[i];
  if constexpr (Traits::kExtended) {
    const int *tile = params.mask_layout.tile, *step = params.extension.bias_step;
    for (int n = threadIdx.x; n < Traits::kKeys; n += blockDim.x) {
      smem.bias_offset[n] = n / (tile[1] * tile[2]) * step[0] + n / tile[2] % tile[1] * step[1] + n % tile[2] * step[2];
    }
  }
  // Copies never write the rows of columns without a key. They must hold numbers: their probabilities are zero.
  const TiledAxis* axes = params.schedule.axes;
  const int used = axes[0].key_tile * axes[1].key_tile * axes[2].key_tile * Traits::kRowBytes / 16;
  constexpr int kChunkVectors = Traits::kKeys * Traits::kRowBytes / 16;
  uint4* vectors = reinterpret_cast<uint4*>(smem.key);  // the values follow
  const int unused = kChunkVectors - used;
  for (int i = threadIdx.x; i < unused * 2 * Traits::kStages * Traits::kChunks; i += blockDim.x) {
    vectors[i / unused * kChunkVectors + used + i % unused] = make_uint4(0, 0, 0, 0);
  }
  ptx::async_proxy_fence();
}

}  // namespace jax_natten::sm90
