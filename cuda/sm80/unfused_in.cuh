// Inverse-neighborhood: keys[y] = sum over the queries x that see y of weights[x, slot(x, y)] * queries_x, over all
// query heads of a key head, as products of tiles.
//
// A CTA has a box of keys of one head, 16 (a box of them) per warp, whose sums are in registers. Slabs of the queries
// that see them, and of these queries' weights the runs that have to do with the CTA's keys, pass through shared
// memory. Each warp gathers the weights between its keys and its list of queries as the left operand: with the weights
// of a query in their row of slots, neighboring keys are neighbors in shared memory.
//
// Slab t is multiplied while slab t + 1 is on its way and the runs of slab t + 2 are found.
//
// Every query sees an additional key (UnfusedParams::dense): there a CTA works on a chunk of all queries, and the
// results are partial sums.
#pragma once

#include "unfused_products.cuh"

namespace jax_natten::sm80 {

// Walks over the slabs of all query heads of a key head.
struct HeadSlabWalk {
  KeyTileCursor<kMaxRank> cursor;
  int member = 0;

  __device__ __forceinline__ bool next(const UnfusedParams& p, const QueryTile& tile) {
    if (cursor.next(p.schedule.axes, tile.extent)) return true;
    cursor = KeyTileCursor<kMaxRank>();
    return ++member < p.schedule.by_group.divisor;
  }
  __device__ __forceinline__ Slab slab() const { return {{cursor.begin[0], cursor.begin[1], cursor.begin[2]}, -1}; }
};

// All threads find the runs of a slab's queries.
template <typename T>
__device__ __forceinline__ void find_runs(const UnfusedParams& p, const UnfusedTile& tile, const Slab& slab,
                                          int query_head, const SlabRow* slab_rows, Run* runs) {
  const TiledAxis* axes = p.schedule.axes;
  const int64_t first = tile.batch * p.positions + first_position(p, tile, slab);
  int count[kMaxRank];
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) count[a] = imin(axes[a].query_tile, tile.length[a] - tile.query[a]);
  for (int n = threadIdx.x; n < p.slab_size; n += blockDim.x) {
    const SlabRow row = slab_rows[n];
    SlotRange range = {p.window_slots + tile.query[2], count[2]};
    int slot = range.first;  // of the CTA's first key
    if (!p.dense) {
      int begin[kMaxRank];
      slot = 0;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        if (a < p.first_axis) continue;
        const int query = imin(tile.key[a] + slab.begin[a] + row.coordinate(a), tile.length[a] - 1);
        begin[a] = window(axes[a], query, tile.length[a]).begin;
        slot += (tile.query[a] - begin[a]) * p.slot_step[a];
      }
      range = slots_of_keys(p, begin, tile.query, count);
    }
    if (!in_tile(p, tile, slab, row)) range.count = 0;
    runs[n] = place_run<T>(p, (first + row.position) * p.weight_heads + query_head, range, n, slot);
  }
}

template <class Numbers, int kSteps>
struct InWarp {
  using T = typename Numbers::Element;

  const UnfusedParams& p;
  const SharedTables& tables;
  const PartRow* const rows;
  const int lane;

  int own_slot[2];  // of the thread's rows, from the CTA's first key, in bytes
  float sums[kSteps * Numbers::kStepChannels / 2];

  __device__ __forceinline__ void find_slots() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own_slot[i] = 0;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        own_slot[i] += rows[lane / 4 + 8 * i].in_tile[a] * p.slot_step[a] * int(sizeof(T));
      }
    }
  }

  __device__ __forceinline__ void multiply_slab(const Slab& slab, const Run* runs, uint32_t stage, uint32_t queries) {
    List list;
    if (!find_list<Operation::kIn>(p, slab, rows, list)) return;
    uint32_t seen[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      seen[i] = mask_of_row(p, tables.common.mask, rows[lane / 4 + 8 * i], list, false, lane);
    }
    const ListedColumn* columns = tables.common.listed;
    const Run* const listed_runs = runs + list.slab_row;
    const uint32_t first = queries + list.slab_row * p.vector_pitch;
    const ListedColumn* own = columns + lane % 4 * 2;
#pragma unroll 1
    for (int j = 0; j < p.groups; ++j, columns += 16, own += 16, seen[0] >>= 4, seen[1] >>= 4) {
      if (!__any_sync(~0u, (seen[0] | seen[1]) & 15)) continue;
      const ColumnPair pairs[2] = {ColumnPair(own), ColumnPair(own + 8)};
      uint32_t staged[2][2];
#pragma unroll
      for (int e = 0; e < 4; ++e) staged[e / 2][e % 2] = stage + listed_runs[pairs[e / 2].column[e % 2].place].base;
      add_weighted_columns<Numbers, kSteps>(
          sums, p.vector_steps, lane,
          [&](int i, int half, int b) -> uint32_t {
            const uint32_t at = staged[half][b] + own_slot[i];
            return seen[i] >> (2 * half + b) & 1 ? load_shared_element<T>(at) : 0;
          },
          [&](int n) { return first + columns[n].chunks * 16; });
    }
  }
};

template <class Numbers, int kSteps>
__global__ void __launch_bounds__(32 * kMostWarps, min_blocks(32 * kSteps))
    unfused_in(const __grid_constant__ UnfusedParams p) {
  using T = typename Numbers::Element;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const SharedTables tables(p, shared_memory);
  auto* slab_rows = reinterpret_cast<SlabRow*>(shared_memory + p.layout.slab_rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* rows = reinterpret_cast<PartRow*>(shared_memory + p.layout.rows) + warp * kPartRows;
  auto* all_runs = reinterpret_cast<Run*>(shared_memory + p.layout.runs);
  const uint32_t memory = ptx::shared_address(shared_memory);
  auto& tile = *reinterpret_cast<UnfusedTile*>(shared_memory + p.layout.tile);  // registers are scarce
  const UnfusedTile decoded = p.dense ? decode_dense_tile(p) : decode_tile<Operation::kIn>(p);
  if (decoded.empty()) return;

  if (threadIdx.x == 0) tile = decoded;
  find_slab_rows(p, slab_rows);
  find_rows<Operation::kIn>(p, decoded, warp, lane, rows);
  __syncthreads();

  InWarp<Numbers, kSteps> own{p, tables, rows, lane, {}, {}};
  own.find_slots();
  const auto runs = [&](int place) { return all_runs + place * p.slab_size; };
  const auto stage = [&](int buffer) { return memory + p.layout.stage + buffer * p.layout.stage_bytes; };
  const auto queries = [&](int buffer) { return memory + p.layout.slabs + buffer * p.layout.slab_bytes; };
  const auto after = [](int place) { return place == kMostFound - 1 ? 0 : place + 1; };
  const auto head_of = [&](const HeadSlabWalk& walk) { return tile.head * p.schedule.by_group.divisor + walk.member; };
  const auto find = [&](const HeadSlabWalk& walk, int place) {
    find_runs<T>(p, tile, walk.slab(), head_of(walk), slab_rows, runs(place));
  };
  const auto start = [&](const HeadSlabWalk& walk, int place, int buffer) {
    copy_slab<T>(p, tile, walk.slab(), head_of(walk), slab_rows, queries(buffer));
    copy_runs<T>(p, runs(place), p.slab_size, stage(buffer), threadIdx.x, blockDim.x);
    ptx::copy_async_commit();
  };

  HeadSlabWalk current, coming;
  find(current, 0);
  __syncthreads();
  start(current, 0, 0);
  fill_tables<T>(p, shared_memory);
  bool more = coming.next(p, tile);
  if (more) find(coming, 1);
  for (int place = 0, buffer = 0;; buffer ^= 1) {
    const int next_place = after(place);
    ptx::copy_async_wait<0>();
    __syncthreads();  // the slab and its runs are there, the next runs are found, and all before has been read
    const Slab slab = current.slab();
    const bool last = !more;
    if (more) {
      start(coming, next_place, buffer ^ 1);
      current = coming;
      more = coming.next(p, tile);
      if (more) find(coming, after(next_place));
    }
    own.multiply_slab(slab, runs(place), stage(buffer), queries(buffer));
    if (last) break;
    place = next_place;
  }

  const uint32_t staging = memory + p.layout.output + warp * kPartRows * kOutputPitch;
  if (p.dense) {
    const int64_t chunk = int64_t(tile.batch) * p.chunks + tile.chunk;
    write_rows<float>(p, own.sums, rows, chunk * p.additional_count, tile.head, staging, lane);
  } else {
    write_rows<T>(p, own.sums, rows, tile.batch * p.positions, tile.head, staging, lane);
  }
}

// One thread per sum, chunk after chunk.
template <typename T>
__global__ void __launch_bounds__(256) sum_partials(const __grid_constant__ PartialSums p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.batch * p.size) return;
  const int64_t batch = i / p.size;
  const float* partial = p.partials + batch * p.chunks * p.size + (i - batch * p.size);
  float sum = 0;
  for (int chunk = 0; chunk < p.chunks; ++chunk) sum += partial[chunk * p.size];
  if constexpr (sizeof(T) == 2) {
    static_cast<T*>(p.sums)[i] = T(sum);
  } else {
    static_cast<T*>(p.sums)[i] = sum;
  }
}

}  // namespace jax_natten::sm80
