// Pointwise-neighborhood: weights[x, slot] = <queries_x, keys_slot> (+ bias), as products of tiles.
//
// A CTA has a box of queries of one head, 16 (a box of them) per warp, in registers. The keys that they see pass
// through shared memory slab by slab, the next one being on its way while one is multiplied. Each warp gathers its list
// of a slab with ldmatrix, whose row addresses are free to choose, scatters the products to its staged runs of slots,
// and writes these as 16-byte vectors.
#pragma once

#include "numbers.cuh"
#include "unfused_copies.cuh"

namespace jax_natten::sm80 {

template <class Numbers, int kSteps>
struct PnWarp {
  using T = typename Numbers::Element;

  const UnfusedParams& p;
  const SharedTables& tables;
  const UnfusedTile& tile;
  const PartRow* const rows;
  Run* const runs;
  const uint32_t stage;
  const int lane;

  Fragment queries[kSteps];
  const float* bias[2];  // entry of the thread's rows and the key at QueryTile::key

  // ---- queries, from global memory to fragments

  // Word `w` of a row, zero past its end.
  __device__ __forceinline__ uint32_t load_word_of_row(const char* row, int w) const {
    if (4 * w >= p.vector_bytes) return 0;
    if (p.rows.aligned) return *reinterpret_cast<const uint32_t*>(row + 4 * w);
    if (sizeof(T) == 4) return load_element<T>(row + 4 * w);
    const uint32_t high = 4 * w + 2 < p.vector_bytes ? load_element<T>(row + 4 * w + 2) : 0;
    return load_element<T>(row + 4 * w) | high << 16;
  }

  __device__ __forceinline__ void load_queries() {
    const char* own[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = (tile.batch * p.positions + rows[lane / 4 + 8 * i].position) * p.rows.heads + tile.head;
      own[i] = p.rows.data + row * p.vector_bytes;
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        queries[k][e] = k < p.vector_steps ? load_word_of_row(own[e % 2], 8 * k + e / 2 * 4 + lane % 4) : 0;
      }
    }
  }

  __device__ __forceinline__ void find_bias() {
    const int64_t table = (tile.batch / p.bias_share * p.weight_heads + tile.head) * p.bias_size;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bias[i] = p.bias + table;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const int query = tile.query[a] + rows[lane / 4 + 8 * i].in_tile[a];
        bias[i] += (tile.key[a] - query + p.schedule.axes[a].window - 1) * p.bias_step[a];
      }
    }
  }

  // ---- slabs

  __device__ __forceinline__ void multiply_slab(const Slab& slab, uint32_t keys) {
    Work work = {tables.columns(slab), p.groups, keys, {}, {}, -1};
    if (!rows[0].exists) return;
    if (slab.additional >= 0) {
      const int count = imin(p.additional_tile, p.additional_count - slab.additional);
      place_runs({p.window_slots + slab.additional, count});
      work.groups = (count + 15) / 16;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        work.seen[i] = work.slots[i] = rows[lane / 4 + 8 * i].exists ? mask_of_first(count, lane) : 0;
      }
    } else {
      List list;
      if (!find_list<Operation::kPn>(p, slab, rows, list)) return;
      place_runs(slab, list);
      work.keys += list.slab_row * p.vector_pitch;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const PartRow& row = rows[lane / 4 + 8 * i];
        work.slots[i] = mask_of_row(p, tables.common.mask, row, list, true, lane);
        work.seen[i] = p.causal ? mask_of_row(p, tables.common.mask, row, list, false, lane) : work.slots[i];
      }
      if (p.bias != nullptr) {
        work.bias = 0;
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) work.bias += list.begin[a] * p.bias_step[a];
      }
    }
    multiply(work);
    __syncwarp();
    write_runs<T>(p, runs, stage, lane);
    __syncwarp();
  }

 private:
  // What the warp does with a slab.
  struct Work {
    const ListedColumn* columns;
    int groups;         // of 16 columns
    uint32_t keys;      // address of the first column
    uint32_t slots[2];  // masks: columns that have a place among the slots of the thread's rows ..
    uint32_t seen[2];   // .. and those of them that a causal query sees
    int bias;           // entry of the first column relative to that of the key at QueryTile::key; -1: no bias
  };

  __device__ __forceinline__ int64_t weights_row(int row) const {
    return (tile.batch * p.positions + rows[row].position) * p.weight_heads + tile.head;
  }

  __device__ __forceinline__ void place_runs(const Slab& slab, const List& list) {
    if (lane < kPartRows) {
      const PartRow& row = rows[lane];
      SlotRange range = slots_in_slab(p, row.begin, slab);
      if (!row.exists) range.count = 0;
      int slot = 0;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) slot += (list.begin[a] - row.begin[a]) * p.slot_step[a];
      runs[lane] = place_run<T>(p, weights_row(lane), range, lane, slot);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void place_runs(SlotRange additional) {
    if (lane < kPartRows) {
      if (!rows[lane].exists) additional.count = 0;
      runs[lane] = place_run<T>(p, weights_row(lane), additional, lane, additional.first);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(const Work& work) {
    const uint32_t staged[2] = {stage + runs[lane / 4].base, stage + runs[lane / 4 + 8].base};
    uint32_t slots[2] = {work.slots[0], work.slots[1]};
    // Of 16 keys, ldmatrix reads keys 0-7, bytes 0-15; then keys 0-7, bytes 16-31; then keys 8-15 so.
    const ListedColumn* key = work.columns + lane % 8 + lane / 16 * 8;
    const uint32_t keys = work.keys + lane / 8 % 2 * 16;
    const ListedColumn* own = work.columns + lane % 4 * 2;
#pragma unroll 1
    for (int j = 0; j < work.groups; ++j, key += 16, own += 16, slots[0] >>= 4, slots[1] >>= 4) {
      if (!__any_sync(~0u, (slots[0] | slots[1]) & 15)) continue;
      const uint32_t address = keys + key->chunks * 16;
      const ColumnPair pairs[2] = {ColumnPair(own), ColumnPair(own + 8)};
      float products[8] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (k >= p.vector_steps) continue;
        Fragment b;
        ptx::load_matrix_x4(b, address + 32 * k);
        if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (uint32_t& word : queries[k]) ptx::compute_again(word);  // not enough registers for all parts of all
        }
        const typename Numbers::Left left = Numbers::left(queries[k]);
        Numbers::multiply_add(&products[0], left, Numbers::right(b[0], b[1]));
        Numbers::multiply_add(&products[4], left, Numbers::right(b[2], b[3]));
      }
      if (work.bias >= 0) add_bias(work, j, products);
      if (p.causal) fill_unseen(work, j, products);
      // To the slots.
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2, i = e % 2;
        const float low = products[4 * half + 2 * i], high = products[4 * half + 2 * i + 1];
        uint32_t bits[2] = {__float_as_uint(low), __float_as_uint(high)};
        if constexpr (sizeof(T) == 2) {
          bits[0] = ptx::pack<T>(low, high);
          bits[1] = bits[0] >> 16;
        }
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const uint32_t at = staged[i] + pairs[half].column[b].place;
          if (slots[i] >> (2 * half + b) & 1) store_shared_element<T>(at, bits[b]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_bias(const Work& work, int j, float (&products)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int half = e / 4, i = e / 2 % 2, b = e % 2;
      const int entry = work.bias + tables.common.listed_bias[16 * j + 8 * half + lane % 4 * 2 + b];
      if (work.seen[i] >> (4 * j + 2 * half + b) & 1) products[e] += __ldg(bias[i] + entry);
    }
  }

  __device__ __forceinline__ void fill_unseen(const Work& work, int j, float (&products)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (!(work.seen[e / 2 % 2] >> (4 * j + e / 4 * 2 + e % 2) & 1)) products[e] = p.fill;
    }
  }
};

template <class Numbers, int kSteps>
__global__ void __launch_bounds__(32 * kMostWarps, min_blocks(32 * kSteps))
    unfused_pn(const __grid_constant__ UnfusedParams p) {
  using T = typename Numbers::Element;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const SharedTables tables(p, shared_memory);
  auto* slab_rows = reinterpret_cast<SlabRow*>(shared_memory + p.layout.slab_rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* rows = reinterpret_cast<PartRow*>(shared_memory + p.layout.rows) + warp * kPartRows;
  auto* runs = reinterpret_cast<Run*>(shared_memory + p.layout.runs) + warp * kPartRows;
  const uint32_t memory = ptx::shared_address(shared_memory);
  auto& tile = *reinterpret_cast<UnfusedTile*>(shared_memory + p.layout.tile);  // registers are scarce
  const UnfusedTile decoded = decode_tile<Operation::kPn>(p);
  if (decoded.empty()) return;

  if (threadIdx.x == 0) tile = decoded;
  find_slab_rows(p, slab_rows);
  find_rows<Operation::kPn>(p, decoded, warp, lane, rows);
  __syncthreads();

  const int key_head = p.schedule.by_group.quotient(tile.head);
  const auto start = [&](const Slab& slab, int buffer) {
    copy_slab<T>(p, tile, slab, key_head, slab_rows, memory + p.layout.slabs + buffer * p.layout.slab_bytes);
    ptx::copy_async_commit();
  };
  SlabWalk walk;
  Slab slab = walk.slab();
  start(slab, 0);
  fill_tables<T>(p, shared_memory);

  PnWarp<Numbers, kSteps> own{p,    tables, tile, rows, runs, memory + p.layout.stage + warp * kPartRows * p.run_pitch,
                              lane, {},     {}};
  own.load_queries();
  if (p.bias != nullptr) own.find_bias();
  for (int buffer = 0;; buffer ^= 1) {
    ptx::copy_async_wait<0>();
    __syncthreads();  // the slab is there, and the other buffer has been read
    const bool more = walk.next(p, tile);
    if (more) start(walk.slab(), buffer ^ 1);
    own.multiply_slab(slab, memory + p.layout.slabs + buffer * p.layout.slab_bytes);
    if (!more) break;
    slab = walk.slab();
  }
}

}  // namespace jax_natten::sm80
