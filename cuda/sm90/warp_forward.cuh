// Fused neighborhood attention forward for small windows on Hopper ("warp").
//
// Windows of a few hundred keys waste most of a 64 x 128 wgmma tile. Here each warp owns 16 neighboring queries (4 x 4,
// say) and computes with mma.sync on exactly the keys that those see: about 100 for a window of 7 x 7.
//
// A CTA works on a box of queries, one part of it per warp. Its last warp is the producer: the TMA brings the box of
// queries, and the box of keys and values that they see (in several pieces if it is large), to shared memory ahead of
// use. Every other warp works alone, without barriers among them: it gathers its *list* of keys from each box with
// ldmatrix, whose row addresses are free to choose. With kHeads = 2 a row of a box holds two heads, and two warps share
// a part.
//
// Boxes hold all keys that the query tile sees along the inner axes; along the outermost they may be slices. For the
// most common cases there are variants that save integer work, which is a good part of all work here (WarpCase).
//
// The extended variant (kExtended) also adds a relative position bias to the scores, and appends boxes of additional
// keys, whole lists each, to those of the window.
//
// CTAs are persistent: CTA c works on query tiles c, c + gridDim.x, ...
#pragma once

#include "../common/mma.h"
#include "../common/ptx.h"
#include "../common/softmax.h"
#include "warp_params.h"

namespace jax_natten::sm90 {

// What the producer tells the consumers about a query tile, in vectors of shared memory.
struct alignas(16) WarpRecord {
  int query[kMaxRank];  // as in QueryTile
  int row;              // of out and lse, at in-group position (0, 0, 0) of the first head
  int key[kMaxRank];
  int extent;  // keys of the tile along the outermost axis
  int length[kMaxRank];
  int has_tile;  // 0: no more tiles
  int head, batch;
};

// Everything in shared memory but the boxes.
struct WarpTables {
  uint64_t query_full[kWarpMostStages], query_empty[kWarpMostStages];
  uint64_t key_full[kWarpMostStages], key_empty[kWarpMostStages];
  WarpRecord records[2 * kWarpMostStages];   // a record is read until its tile's outputs are written
  uint32_t rows[kWarpMostWarps][kWarpRows];  // WarpConsumer::find_rows()
  int key_offset[kWarpMostListed];
  uint32_t mask[4 * (kWarpMostListed + 1 + 2 + 2)];
};
static_assert(sizeof(WarpTables) <= kWarpTableBytes, "the host reserves kWarpTableBytes");

// Behind the tables of the extended variant: of each key of the list, the distance from the first in the bias table.
using WarpBiasOffsets = int[kWarpMostListed];
static_assert(sizeof(WarpBiasOffsets) <= kWarpExtensionBytes, "the host reserves kWarpExtensionBytes");
__device__ __forceinline__ WarpBiasOffsets& bias_offsets(WarpTables& tables) {
  return *reinterpret_cast<WarpBiasOffsets*>(reinterpret_cast<uint8_t*>(&tables) + kWarpTableBytes);
}

// kKeys: longest list. kHeads: in a box.
template <typename T_, int kDim_, int kKeys_, int kHeads_, int kRank_, WarpCase kCase>
struct WarpTraits {
  using T = T_;
  static constexpr int kDim = kDim_, kKeys = kKeys_, kHeads = kHeads_, kRank = kRank_;
  static constexpr bool kExtended = kCase == WarpCase::kExtended, kSingle = kCase == WarpCase::kSingle;
  static constexpr bool kPlain = kSingle || kCase == WarpCase::kSliced;
  static constexpr int kOuter = kMaxRank - kRank;      // the outermost axis
  static constexpr int kRowBytes = 2 * kDim * kHeads;  // of a box: a swizzle span
  static constexpr int kSteps = kDim / 16;             // of a sum over channels
  static constexpr int kGroups = (kKeys + 15) / 16;    // of 16 keys
  static_assert(kRowBytes == 64 || kRowBytes == 128, "a row must be a swizzle span");
  static_assert(kKeys % 8 == 0 && kKeys <= kWarpMostListed, "the list has a place in WarpTables");

  // Where the TMA puts a byte of a box of such rows.
  static __device__ __forceinline__ uint32_t swizzle(uint32_t address) {
    return address ^ (address >> 3 & (kRowBytes == 128 ? 0x70 : 0x30));
  }
};

// A place in a ring whose size is known at launch.
struct RunTimeRing {
  int index = 0;
  uint32_t parity;

  __device__ explicit RunTimeRing(uint32_t parity) : parity(parity) {}
  __device__ __forceinline__ void advance(int size) {
    if (++index == size) {
      index = 0;
      parity ^= 1;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------- producer

template <class Traits>
struct WarpProducer {
  static constexpr int kRank = Traits::kRank;

  const WarpParams& params;
  const uint32_t memory;
  WarpTables& tables;
  RunTimeRing slot{1}, stage{1}, record{0};  // parity 1 passes on fresh barriers

  __device__ void run() {
    for (int index = blockIdx.x; index < params.schedule.tiles; index += gridDim.x) {
      const QueryTile tile = decode_query_tile<kRank>(params.schedule, index);
      if (tile.empty()) continue;
      const TensorMaps& maps = params.maps[map_variant<kRank>(params, tile)];
      load_queries(tile, maps);
      load_keys_and_values(tile, maps);
    }
    ptx::barrier_wait(&tables.query_empty[slot.index], slot.parity);
    tables.records[record.index].has_tile = 0;
    ptx::barrier_arrive(&tables.query_full[slot.index]);
  }

 private:
  __device__ void load_queries(const QueryTile& tile, const TensorMaps& maps) {
    const TiledAxis* axes = params.schedule.axes;
    const int slab = params.query_address.slab<kRank>(tile, Traits::kHeads * tile.head);
    ptx::barrier_wait(&tables.query_empty[slot.index], slot.parity);
    const int (&query)[kMaxRank] = tile.query, (&key)[kMaxRank] = tile.key, (&length)[kMaxRank] = tile.length;
    tables.records[record.index] = {{query[0], query[1], query[2]},
                                    slab,
                                    {key[0], key[1], key[2]},
                                    tile.extent[Traits::kOuter],
                                    {length[0], length[1], length[2]},
                                    1,
                                    tile.head,
                                    tile.batch};
    uint64_t* full = &tables.query_full[slot.index];
    ptx::barrier_arrive_expecting(full,
                                  axes[0].query_tile * axes[1].query_tile * axes[2].query_tile * Traits::kRowBytes);
    ptx::tma_load(memory + slot.index * params.layout.query_bytes, &maps.query, full, 0, tile.query[2], tile.query[1],
                  tile.query[0], slab, ptx::CachePolicy::kEvictFirst);
    slot.advance(params.slots);
    record.advance(2 * params.slots);
  }

  __device__ void load_keys_and_values(const QueryTile& tile, const TensorMaps& maps) {
    const TiledAxis* axes = params.schedule.axes;
    const int head = params.schedule.by_group.quotient(Traits::kHeads * tile.head);
    const int slab = params.key_address.slab<kRank>(tile, head);
    const int bytes = axes[0].key_tile * axes[1].key_tile * axes[2].key_tile * Traits::kRowBytes;
    int x[kMaxRank] = {tile.key[0], tile.key[1], tile.key[2]};
    for (int begin = 0; begin < tile.extent[Traits::kOuter]; begin += axes[Traits::kOuter].key_tile) {
      load_box(maps.key, maps.value, bytes, x, slab);
      x[Traits::kOuter] += axes[Traits::kOuter].key_tile;
    }
    if constexpr (Traits::kExtended) {
      const KeyExtension& extension = params.extension;
      for (int first = 0; first < extension.additional; first += extension.box) {
        const int rows[kMaxRank] = {0, 0, first};
        load_box(extension.key, extension.value, extension.box * Traits::kRowBytes, rows,
                 tile.batch * extension.per_batch + head);
      }
    }
  }

  __device__ __forceinline__ void load_box(const CUtensorMap& key, const CUtensorMap& value, int bytes,
                                           const int (&x)[kMaxRank], int slab) {
    uint64_t* full = &tables.key_full[stage.index];
    const uint32_t keys = memory + params.layout.keys + 2 * stage.index * params.layout.key_bytes;
    ptx::barrier_wait(&tables.key_empty[stage.index], stage.parity);
    ptx::barrier_arrive_expecting(full, 2 * bytes);
    ptx::tma_load(keys, &key, full, 0, x[2], x[1], x[0], slab, ptx::CachePolicy::kNormal);
    ptx::tma_load(keys + params.layout.key_bytes, &value, full, 0, x[2], x[1], x[0], slab, ptx::CachePolicy::kNormal);
    stage.advance(params.stages);
  }
};

// ---------------------------------------------------------------------------------------------------------- consumer

template <class Traits>
struct WarpConsumer {
  using T = typename Traits::T;
  static constexpr int kRank = Traits::kRank, kDim = Traits::kDim, kKeys = Traits::kKeys, kSteps = Traits::kSteps;
  static constexpr int kGroups = Traits::kGroups, kRowBytes = Traits::kRowBytes;

  const WarpParams& params;
  const uint32_t memory;
  WarpTables& tables;
  const int warp, lane;

  int head;  // in the box

  __device__ WarpConsumer(const WarpParams& params, uint32_t memory, WarpTables& tables, int warp, int lane)
      : params(params), memory(memory), tables(tables), warp(warp), lane(lane), head(warp % Traits::kHeads) {}

  __device__ void run() {
    find_rows();
    const uint32_t query_offset = place_of_queries();
    RunTimeRing slot(0), stage(0), record(0);
    for (;;) {
      ptx::barrier_wait(&tables.query_full[slot.index], slot.parity);
      const WarpRecord& tile = tables.records[record.index];
      if (!tile.has_tile) break;
      uint32_t queries[kSteps][4];
      load_queries(memory + slot.index * params.layout.query_bytes + query_offset, queries);
      release(&tables.query_empty[slot.index]);

      float out[kDim / 2];
      OnlineSoftmax softmax(params.scale);
      attend(tile, queries, stage, softmax, out);
      write(tile, softmax, out);
      slot.advance(params.slots);
      record.advance(2 * params.slots);
    }
  }

 private:
  // Finds the coordinates of the warp's rows in the tile, one byte each, once and for all. Rows past the last are the
  // last, without kRowExists.
  static constexpr uint32_t kRowExists = 1 << 24;
  __device__ __forceinline__ void find_rows() {
    const TiledAxis* axes = params.schedule.axes;
    int part_offset[kMaxRank];
    query_part_offset(axes, warp / Traits::kHeads, part_offset);
    if (lane < kWarpRows) {
      const int rows = axes[0].query_part * axes[1].query_part * axes[2].query_part, row = imin(lane, rows - 1);
      const int x0 = part_offset[0] + row / (axes[2].query_part * axes[1].query_part);
      const int x1 = part_offset[1] + row / axes[2].query_part % axes[1].query_part;
      const int x2 = part_offset[2] + row % axes[2].query_part;
      tables.rows[warp][lane] = x0 | x1 << 8 | x2 << 16 | (lane < rows ? kRowExists : 0);
    }
    __syncwarp();
  }

  static __device__ __forceinline__ int coordinate(uint32_t row, int a) { return row >> 8 * a & 255; }

  // Every lane has read what `empty` guards.
  __device__ __forceinline__ void release(uint64_t* empty) {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(empty);
  }

  // ---- queries: fragments of A, lane l addressing row l % 16

  __device__ __forceinline__ uint32_t place_of_queries() const {
    const TiledAxis* axes = params.schedule.axes;
    const uint32_t x = tables.rows[warp][lane % 16];
    const int row = (coordinate(x, 0) * axes[1].query_tile + coordinate(x, 1)) * axes[2].query_tile + coordinate(x, 2);
    return Traits::swizzle(row * kRowBytes + head * 2 * kDim + lane / 16 * 16);
  }

  __device__ __forceinline__ void load_queries(uint32_t address, uint32_t (&queries)[kSteps][4]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      ptx::load_matrix_x4(queries[k], address ^ 32 * k);
      if (params.has_query_factor) {
#pragma unroll
        for (uint32_t& pair : queries[k]) pair = ptx::multiply_pairs<T>(pair, params.query_factor);
      }
    }
  }

  // ---- all boxes of keys of a query tile

  // What the warp sees.
  struct Sight {
    bool live;                // has queries inside the grid
    int place;                // of its list in a box, in keys, as far as inner axes go (kSingle: all axes)
    int begin[kMaxRank];      // of the list, relative to WarpRecord::key, likewise
    uint32_t masks[2];        // columns that the thread's two queries see, likewise
    Interval outer_any;       // keys along the outermost axis that some query sees, relative to WarpRecord::key
    PackedInterval outer[2];  // that the thread's two queries see
  };

  // Columns of the list that a query sees as far as an axis goes.
  __device__ __forceinline__ uint32_t seen_columns(int a, Interval window) const {
    // Of whole windows it is enough to know where they begin.
    if (Traits::kPlain) return tables.mask[4 * (params.mask_layout.first[a] + window.begin) + lane % 4];
    return key_mask_word(params.mask_layout, tables.mask, a, window, lane % 4);
  }

  __device__ __forceinline__ Sight look(const WarpRecord& tile) const {
    Sight sight;
    sight.live = true;
    sight.place = 0;
    sight.masks[0] = sight.masks[1] = ~0u;
    const uint32_t first = tables.rows[warp][0],
                   own[2] = {tables.rows[warp][lane / 4], tables.rows[warp][lane / 4 + 8]};
#pragma unroll
    for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
      const TiledAxis& axis = params.schedule.axes[a];
      const int length = tile.length[a];
      const auto see = [&](uint32_t row) -> Interval {
        const int query = imin(tile.query[a] + coordinate(row, a), length - 1);
        const Interval w = Traits::kPlain ? plain_window(axis, query, length) : window(axis, query, length);
        return {w.begin - tile.key[a], w.end - tile.key[a]};
      };
      sight.live = sight.live & (tile.query[a] + coordinate(first, a) < length);
      if (a == Traits::kOuter && !Traits::kSingle) {
        sight.outer_any = {see(first).begin, see(tables.rows[warp][kWarpRows - 1]).end};
#pragma unroll
        for (int i = 0; i < 2; ++i) sight.outer[i] = see(own[i]);
      } else {
        // The list begins where the part's windows do, but stays in the box.
        sight.begin[a] = imin(see(first).begin, axis.key_tile - params.list[a]);
        sight.place = sight.place * axis.key_tile + sight.begin[a];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Interval w = see(own[i]);
          sight.masks[i] &= seen_columns(a, {w.begin - sight.begin[a], w.end - sight.begin[a]});
        }
      }
    }
    return sight;
  }

  // What the warp gathers from a box.
  struct List {
    uint32_t address;   // of the first key
    int outer_begin;    // that key, along the outermost axis relative to WarpRecord::key
    bool in_window;     // else neighboring rows of a box of additional keys
    uint32_t masks[2];  // columns that the thread's two queries see
  };

  // False if the warp sees no keys of the box at `address`, whose first is `begin` along the outermost axis.
  __device__ __forceinline__ bool find_list(const Sight& sight, int begin, uint32_t address, List& list) const {
    list.in_window = true;
    list.masks[0] = sight.masks[0];
    list.masks[1] = sight.masks[1];
    int place = sight.place;
    if (!Traits::kSingle) {
      const TiledAxis& axis = params.schedule.axes[Traits::kOuter];
      const bool seen = sight.live & (begin < sight.outer_any.end) & (begin + axis.key_tile > sight.outer_any.begin);
      if (!seen) return false;
      const int first = imin(imax(sight.outer_any.begin - begin, 0), axis.key_tile - params.list[Traits::kOuter]);
      place += first * params.outer_keys;
      list.outer_begin = begin + first;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Interval w = sight.outer[i];
        list.masks[i] &= key_mask_word(params.mask_layout, tables.mask, Traits::kOuter,
                                       {w.begin - list.outer_begin, w.end - list.outer_begin}, lane % 4);
      }
    }
    list.address = address + place * kRowBytes;
    return sight.live;
  }

  // Bytes from the first key of a list to the n-th.
  __device__ __forceinline__ int key_offset(const List& list, int n) const {
    if (!Traits::kExtended || list.in_window) return tables.key_offset[n];
    return imin(n, params.extension.box - 1) * kRowBytes;
  }

  // Scales the scores of a row and adds its bias. All about the query is read again, which costs fewer registers than
  // to keep it.
  __device__ __forceinline__ void add_bias(float (&scores)[kKeys / 2], int i, const WarpRecord& tile,
                                           const Sight& sight, const List& list) const {
    const KeyExtension& extension = params.extension;
    if (!list.in_window) return scale_row(scores, i, extension.score_scale);
    const uint32_t row = tables.rows[warp][lane / 4 + 8 * i];
    int entry = 0;
#pragma unroll
    for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
      const int query = imin(tile.query[a] + coordinate(row, a), tile.length[a] - 1);
      const int begin = a == Traits::kOuter ? list.outer_begin : sight.begin[a];
      entry += (tile.key[a] + begin - query) * extension.bias_step[a];
    }
    bias_row(scores, i, list.masks[i], extension.entries(tile.batch, Traits::kHeads * tile.head + head) + entry,
             bias_offsets(tables) + 2 * (lane % 4), extension.score_scale);
  }

  __device__ __forceinline__ void attend(const WarpRecord& tile, const uint32_t (&queries)[kSteps][4],
                                         RunTimeRing& stage, OnlineSoftmax& softmax, float (&out)[kDim / 2]) {
    const Sight sight = look(tile);
    if (!Traits::kSingle) {
#pragma unroll
      for (int e = 0; e < kDim / 2; ++e) out[e] = 0;
    }
    List list;
    // list_of(address): whether the warp sees keys of the box there, and puts those into `list`.
    const auto attend_to_box = [&](auto list_of) {
      ptx::barrier_wait(&tables.key_full[stage.index], stage.parity);
      if (list_of(memory + params.layout.keys + 2 * stage.index * params.layout.key_bytes)) {
        attend_to_list(tile, sight, list, queries, softmax, out);
      }
      release(&tables.key_empty[stage.index]);
      stage.advance(params.stages);
    };
    int begin = 0;
    do {
      attend_to_box([&](uint32_t address) { return find_list(sight, begin, address, list); });
      begin += params.schedule.axes[Traits::kOuter].key_tile;
    } while (!Traits::kSingle && begin < tile.extent);
    if constexpr (Traits::kExtended) {
      for (int first = 0; first < params.extension.additional; first += params.extension.box) {
        attend_to_box([&](uint32_t address) {
          const int keys = imin(params.extension.additional - first, params.extension.box);
          list.in_window = false;
          list.address = address;
          list.masks[0] = list.masks[1] = first_columns_word(keys, lane % 4);
          return sight.live;
        });
      }
    }
  }

  __device__ __forceinline__ void attend_to_list(const WarpRecord& tile, const Sight& sight, const List& list,
                                                 const uint32_t (&queries)[kSteps][4], OnlineSoftmax& softmax,
                                                 float (&out)[kDim / 2]) {
    // Of 16 keys and 16 channels, ldmatrix reads (keys 0-7, channels 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
    const int key = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
    uint32_t address[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      address[j] = Traits::swizzle(list.address + key_offset(list, 16 * j + key) + head * 2 * kDim + half * 16);
    }

    float scores[kKeys / 2];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t b[4];
        ptx::load_matrix_x4(b, address[j] ^ 32 * k);
        const auto multiply = k == 0 ? ptx::mma_from_zero<T> : ptx::mma<T>;
        multiply(&scores[8 * j], queries[k], b[0], b[1]);
        if (16 * j + 8 < kKeys) multiply(&scores[8 * j + 4], queries[k], b[2], b[3]);
      }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (Traits::kExtended && params.extension.bias != nullptr) add_bias(scores, i, tile, sight, list);
      mask_row(scores, i, list.masks[i]);
    }
    if constexpr (Traits::kSingle) {
      softmax.begin(scores);
    } else if (softmax.update(scores)) {
#pragma unroll
      for (int e = 0; e < kDim / 2; ++e) out[e] *= softmax.correction[e / 2 % 2];
    }

    // Transposed, the second and third matrix swap places: lanes 8-15 and 16-23 swap addresses.
    const int source = lane & 7 | (lane & 8) << 1 | (lane & 16) >> 1;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const uint32_t value = __shfl_sync(~0u, address[j], source) + params.layout.key_bytes;
      uint32_t fragment[4] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 8 * j; e < 8 * j + 8 && e < kKeys / 2; e += 2) {
        fragment[e % 8 / 2] = ptx::pack<T>(scores[e], scores[e + 1]);
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t b[4];
        ptx::load_matrix_x4_transposed(b, value ^ 32 * k);
        const auto multiply = Traits::kSingle && j == 0 ? ptx::mma_from_zero<T> : ptx::mma<T>;
        multiply(&out[8 * k], fragment, b[0], b[1]);
        multiply(&out[8 * k + 4], fragment, b[2], b[3]);
      }
    }
  }

  // ---- epilogue: through the warp's own staging rows, so that four lanes write 64 bytes of a row together

  __device__ __forceinline__ void write(const WarpRecord& record, OnlineSoftmax& softmax,
                                        const float (&out)[kDim / 2]) {
    constexpr int kStagedRowBytes = 2 * kDim;
    const auto swizzle = [](uint32_t place) { return place ^ (place >> 3 & (kStagedRowBytes == 128 ? 0x70 : 0x30)); };
    float normalizer[2];
    softmax.finish(normalizer);
    const uint32_t staging = memory + params.layout.staging + warp * kWarpRows * kStagedRowBytes;
    __syncwarp();  // the previous tile's rows have been read
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const float* o = &out[8 * k];
      ptx::store_matrix_x4(staging + (swizzle(lane % 16 * kStagedRowBytes + lane / 16 * 16) ^ 32 * k),
                           ptx::pack<T>(o[0] * normalizer[0], o[1] * normalizer[0]),
                           ptx::pack<T>(o[2] * normalizer[1], o[3] * normalizer[1]),
                           ptx::pack<T>(o[4] * normalizer[0], o[5] * normalizer[0]),
                           ptx::pack<T>(o[6] * normalizer[1], o[7] * normalizer[1]));
    }
    __syncwarp();
    int row[2];
    bool inside[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t own = tables.rows[warp][lane / 4 + 8 * i];
      row[i] = record.row + head;
      inside[i] = own & kRowExists;
#pragma unroll
      for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
        const int x = record.query[a] + coordinate(own, a);
        inside[i] = inside[i] & (x < record.length[a]);
        row[i] += x * params.row_step[a];
      }
      T* destination = static_cast<T*>(params.out) + int64_t(row[i]) * params.dim;
#pragma unroll
      for (int segment = lane % 4; segment < kDim / 8; segment += 4) {
        const uint4 staged = ptx::load_vector(staging + swizzle((lane / 4 + 8 * i) * kStagedRowBytes + segment * 16));
        if (inside[i] & (segment * 8 < params.dim)) *reinterpret_cast<uint4*>(destination + segment * 8) = staged;
      }
    }
    const int mine = lane % 2;
    if ((lane % 4 < 2) & (mine == 0 ? inside[0] : inside[1])) {
      params.lse[mine == 0 ? row[0] : row[1]] = softmax.log_sum_exp(mine);
    }
  }
};

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, int kDim, int kKeys, int kHeads, int kRank, WarpCase kCase>
__global__ void __launch_bounds__(warp_most_threads(kDim, kKeys), 1)
    warp_forward(const __grid_constant__ WarpParams params) {
  using Traits = WarpTraits<T, kDim, kKeys, kHeads, kRank, kCase>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& tables = *reinterpret_cast<WarpTables*>(shared_memory + params.layout.tables);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < params.slots; ++i) {
      ptx::barrier_init(&tables.query_full[i], 1);
      ptx::barrier_init(&tables.query_empty[i], params.warps);
    }
    for (int i = 0; i < params.stages; ++i) {
      ptx::barrier_init(&tables.key_full[i], 1);
      ptx::barrier_init(&tables.key_empty[i], params.warps);
    }
    ptx::barrier_init_fence();
  }
  for (int i = threadIdx.x; i < params.mask_layout.words; i += blockDim.x) tables.mask[i] = params.mask_table[i];
  for (int i = threadIdx.x; i < kWarpMostListed; i += blockDim.x) tables.key_offset[i] = params.key_offset[i];
  if constexpr (Traits::kExtended) {
    const int *list = params.list, *step = params.extension.bias_step;
    for (int n = threadIdx.x; n < kWarpMostListed; n += blockDim.x) {
      bias_offsets(tables)[n] =
          n / (list[1] * list[2]) * step[0] + n / list[2] % list[1] * step[1] + n % list[2] * step[2];
    }
  }
  __syncthreads();
  const uint32_t memory = ptx::shared_address(shared_memory);
  if (warp == params.warps) {
    if (lane == 0) WarpProducer<Traits>{params, memory, tables}.run();
  } else {
    WarpConsumer<Traits>(params, memory, tables, warp, lane).run();
  }
}

}  // namespace jax_natten::sm90
