// Neighborhood-neighborhood: queries[x] = sum over slots of weights[x, slot] * keys_slot, as products of tiles.
//
// A CTA has a box of queries of one head, 16 (a box of them) per warp, whose sums are in registers. Slabs of the keys
// that they see, and the runs of weights that belong to them, pass through shared memory, the next ones being on their
// way while one is multiplied. Each warp gathers the weights of its list of keys, with zeros where a query does not see
// a key, as the left operand.
#pragma once

#include "unfused_products.cuh"

namespace jax_natten::sm80 {

template <class Numbers, int kSteps>
struct NnWarp {
  using T = typename Numbers::Element;

  const UnfusedParams& p;
  const SharedTables& tables;
  const UnfusedTile& tile;
  const PartRow* const rows;
  const int lane;

  float sums[kSteps * Numbers::kStepChannels / 2];

  // Places the warp's runs of a slab and starts to copy them to `stage`.
  __device__ __forceinline__ void start_runs(const Slab& slab, Run* runs, uint32_t stage) {
    const bool additional = slab.additional >= 0;
    List list = {};
    const bool seen = additional || find_list<Operation::kNn>(p, slab, rows, list);
    if (lane < kPartRows) {
      const PartRow& row = rows[lane];
      SlotRange range;
      int slot = 0;  // of the first column of the list
      if (additional) {
        slot = p.window_slots + slab.additional;
        range = {slot, imin(p.additional_tile, p.additional_count - slab.additional)};
      } else {
        range = slots_in_slab(p, row.begin, slab);
#pragma unroll
        for (int a = 0; a < kMaxRank; ++a) slot += (list.begin[a] - row.begin[a]) * p.slot_step[a];
      }
      if (!row.exists || !seen) range.count = 0;
      const int64_t weights_row = (tile.batch * p.positions + row.position) * p.weight_heads + tile.head;
      runs[lane] = place_run<T>(p, weights_row, range, lane, slot);
    }
    __syncwarp();
    copy_runs<T>(p, runs, kPartRows, stage, lane, 32);
  }

  __device__ __forceinline__ void multiply_slab(const Slab& slab, const Run* runs, uint32_t stage, uint32_t keys) {
    const bool listed = slab.additional < 0;
    List list = {};
    if (listed && !find_list<Operation::kNn>(p, slab, rows, list)) return;
    if (!rows[0].exists) return;
    const int additional = imin(p.additional_tile, p.additional_count - slab.additional);
    const int groups = listed ? p.groups : (additional + 15) / 16;
    uint32_t seen[2], staged[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const PartRow& row = rows[lane / 4 + 8 * i];
      seen[i] = listed       ? mask_of_row(p, tables.common.mask, row, list, false, lane)
                : row.exists ? mask_of_first(additional, lane)
                             : 0;
      staged[i] = stage + runs[lane / 4 + 8 * i].base;
    }
    const ListedColumn* columns = tables.columns(slab);
    const uint32_t first = keys + list.slab_row * p.vector_pitch;
    const ListedColumn* own = columns + lane % 4 * 2;
#pragma unroll 1
    for (int j = 0; j < groups; ++j, columns += 16, own += 16, seen[0] >>= 4, seen[1] >>= 4) {
      if (!__any_sync(~0u, (seen[0] | seen[1]) & 15)) continue;
      const ColumnPair pairs[2] = {ColumnPair(own), ColumnPair(own + 8)};
      add_weighted_columns<Numbers, kSteps>(
          sums, p.vector_steps, lane,
          [&](int i, int half, int b) -> uint32_t {
            const uint32_t at = staged[i] + pairs[half].column[b].place;
            return seen[i] >> (2 * half + b) & 1 ? load_shared_element<T>(at) : 0;
          },
          [&](int n) { return first + columns[n].chunks * 16; });
    }
  }
};

template <class Numbers, int kSteps>
__global__ void __launch_bounds__(32 * kMostWarps, min_blocks(32 * kSteps))
    unfused_nn(const __grid_constant__ UnfusedParams p) {
  using T = typename Numbers::Element;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const SharedTables tables(p, shared_memory);
  auto* slab_rows = reinterpret_cast<SlabRow*>(shared_memory + p.layout.slab_rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  auto* rows = reinterpret_cast<PartRow*>(shared_memory + p.layout.rows) + warp * kPartRows;
  auto* all_runs = reinterpret_cast<Run*>(shared_memory + p.layout.runs);
  const uint32_t memory = ptx::shared_address(shared_memory);
  auto& tile = *reinterpret_cast<UnfusedTile*>(shared_memory + p.layout.tile);  // registers are scarce
  const UnfusedTile decoded = decode_tile<Operation::kNn>(p);
  if (decoded.empty()) return;

  if (threadIdx.x == 0) tile = decoded;
  find_slab_rows(p, slab_rows);
  find_rows<Operation::kNn>(p, decoded, warp, lane, rows);
  __syncthreads();

  const int key_head = p.schedule.by_group.quotient(tile.head);
  NnWarp<Numbers, kSteps> own{p, tables, tile, rows, lane, {}};
  const auto runs = [&](int buffer) { return all_runs + (buffer * warps + warp) * kPartRows; };
  const auto stage = [&](int buffer) {
    return memory + p.layout.stage + buffer * p.layout.stage_bytes + warp * kPartRows * p.run_pitch;
  };
  const auto keys = [&](int buffer) { return memory + p.layout.slabs + buffer * p.layout.slab_bytes; };
  const auto start = [&](const Slab& slab, int buffer) {
    copy_slab<T>(p, tile, slab, key_head, slab_rows, keys(buffer));
    own.start_runs(slab, runs(buffer), stage(buffer));
    ptx::copy_async_commit();
  };
  SlabWalk walk;
  Slab slab = walk.slab();
  start(slab, 0);
  fill_tables<T>(p, shared_memory);
  for (int buffer = 0;; buffer ^= 1) {
    ptx::copy_async_wait<0>();
    __syncthreads();  // the slab and the runs are there, and the other buffers have been read
    const bool more = walk.next(p, tile);
    if (more) start(walk.slab(), buffer ^ 1);
    own.multiply_slab(slab, runs(buffer), stage(buffer), keys(buffer));
    if (!more) break;
    slab = walk.slab();
  }
  const uint32_t staging = memory + p.layout.output + warp * kPartRows * kOutputPitch;
  write_rows<T>(p, own.sums, rows, tile.batch * p.positions, tile.head, staging, lane);
}

}  // namespace jax_natten::sm80
