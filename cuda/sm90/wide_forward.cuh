// Fused neighborhood attention forward for large windows on Hopper ("wide").
//
// A CTA has a warpgroup for the producer and two of consumers (warpgroup_forward.cuh). A consumer issues out += p V of
// a key tile behind the scores of the next, so that the tensor cores work on one tile while the exponentials of the
// next are computed; a token makes the two warpgroups take turns, so that one's exponentials overlap the other's
// products as well.
#pragma once

#include "warpgroup_forward.cuh"
#include "wide_shape.h"

namespace jax_natten::sm90 {

template <int kDim>
struct WideKernel {
  static constexpr WarpgroupShape kShape = wide_shape(kDim);
  static constexpr int kGroups = kWideGroups;
};

template <class Traits>
struct WideConsumer : WarpgroupConsumer<Traits> {
  using Base = WarpgroupConsumer<Traits>;
  using Base::kDim, Base::kKeys, Base::kRank;
  using Base::WarpgroupConsumer, Base::params, Base::smem, Base::group, Base::warp, Base::lane, Base::part_offset;
  // Named barriers: a turn token per warpgroup.
  static constexpr int kTurnBarrier = Base::kFirstFreeBarrier;

  __device__ void run() {
    if (group == kWideGroups - 1) pass_turn();  // the first turn is warpgroup 0's
    this->each_query_tile([this](const QueryTile& tile, int slot, RingPosition<Traits::kStages>& stage,
                                 int& unreleased_slot, OnlineSoftmax& softmax,
                                 float (&out)[kDim / 2]) { attend(tile, slot, stage, unreleased_slot, softmax, out); });
  }

 private:
  // ---- turns: each warpgroup issues its products in its turn, once per key tile

  __device__ __forceinline__ void wait_for_turn() { ptx::named_barrier_sync(kTurnBarrier + group, 128 * kWideGroups); }
  __device__ __forceinline__ void pass_turn() {
    ptx::named_barrier_arrive(kTurnBarrier + (group + 1) % kWideGroups, 128 * kWideGroups);
  }

  // ---- all key tiles of a query tile

  // Works through runs of key tiles that the part sees, passing over the others. Within a run the product p V of a tile
  // is issued behind the scores of the next, and awaited only after that tile's exponentials.
  __device__ __forceinline__ void attend(const QueryTile& record, int slot, RingPosition<Traits::kStages>& stage,
                                         int& unreleased_slot, OnlineSoftmax& softmax, float (&out)[kDim / 2]) {
    const TiledAxis* axes = params.schedule.axes;
    const QueryTile tile = record;
    const QueryPart<kRank> part(axes, tile, part_offset);
    Interval windows[2][kMaxRank];
    this->find_windows(tile, part.query, windows);

    typename Traits::Cursor cursor;
    bool more = true;
    TileClass tile_class;
    const auto sees_tile = [&] {
      if (cursor.in_window()) {
        tile_class = part.classify(axes, cursor.begin, params.padded);
      } else {
        const bool whole = !params.padded && cursor.additional + params.extension.box <= params.extension.additional;
        tile_class = !part.live ? TileClass::kSkip : whole ? TileClass::kWhole : TileClass::kMasked;
      }
      return tile_class != TileClass::kSkip;
    };
    const auto step = [&] {
      stage.advance();
      more = cursor.next(axes, tile.extent, params.extension);
    };
    const auto exponentiate = [&](float (&scores)[kKeys / 2]) -> bool {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t word = ~0u;  // columns that the row sees
        if (tile_class == TileClass::kMasked) {
          word = cursor.in_window()
                     ? key_mask_word<kRank>(params.mask_layout, smem.mask_table, windows[i], cursor.begin, lane % 4)
                     : this->additional_columns(cursor);
        }
        if (Traits::kExtended && params.extension.bias != nullptr) this->add_bias(scores, i, word, record, cursor);
        if (tile_class == TileClass::kMasked) mask_row(scores, i, word);
      }
      return softmax.update(scores);
    };

    uint32_t p[kKeys / 4];  // of the previous tile of the run
    for (;;) {
      for (; more && !sees_tile(); step()) pass_over(stage);
      if (!more) return;

      // The first tile of a run: scores alone.
      ptx::barrier_wait(&smem.key_full[stage.index], stage.parity);
      {
        float scores[kKeys / 2];
        wait_for_turn();
        ptx::wgmma_fence();
        ptx::pin(scores);
        this->issue_scores(scores, slot, stage.index);
        pass_turn();
        ptx::wgmma_wait<0>();
        ptx::pin(scores);
        this->release(&smem.key_empty[stage.index]);
        if (exponentiate(scores)) this->rescale(out, softmax);
        this->pack(scores, p);
      }
      this->release_slot(unreleased_slot);

      // The others: scores, and behind them the previous tile's p V.
      RingPosition<Traits::kStages> previous = stage;
      for (step(); more && sees_tile(); step()) {
        ptx::barrier_wait(&smem.key_full[stage.index], stage.parity);
        float scores[kKeys / 2];
        wait_for_turn();
        ptx::wgmma_fence();
        ptx::pin(scores);
        ptx::pin(out);
        ptx::pin(p);
        this->issue_scores(scores, slot, stage.index);
        ptx::barrier_wait(&smem.value_full[previous.index], previous.parity);
        this->issue_output(out, p, previous.index);
        pass_turn();

        ptx::wgmma_wait<1>();  // the scores
        ptx::pin(scores);
        this->release(&smem.key_empty[stage.index]);
        const bool grew = exponentiate(scores);
        // ptxas would move the exponentials behind the wait below: better so but for small head dimensions.
        if (kDim <= 64) ptx::schedule_after(softmax.sum[0] + softmax.sum[1]);

        ptx::wgmma_wait<0>();  // p V
        ptx::pin(out);
        this->release(&smem.value_empty[previous.index]);
        this->pack(scores, p);
        if (grew) this->rescale(out, softmax);
        previous = stage;
      }

      // The last tile's p V.
      ptx::barrier_wait(&smem.value_full[previous.index], previous.parity);
      ptx::wgmma_fence();
      ptx::pin(out);
      ptx::pin(p);
      this->issue_output(out, p, previous.index);
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      this->release(&smem.value_empty[previous.index]);
    }
  }

  // Takes no part in a key tile, but waits for its copies: only full stages may be released.
  __device__ __forceinline__ void pass_over(const RingPosition<Traits::kStages>& stage) {
    ptx::barrier_wait(&smem.key_full[stage.index], stage.parity);
    ptx::barrier_wait(&smem.value_full[stage.index], stage.parity);
    wait_for_turn();
    pass_turn();
    this->release(&smem.key_empty[stage.index]);
    this->release(&smem.value_empty[stage.index]);
  }
};

template <typename T, int kDim, int kRank, bool kExtended>
__global__ void __launch_bounds__(kWideThreads, 1) wide_forward(const __grid_constant__ WarpgroupParams params) {
  using Traits = WarpgroupTraits<WideKernel<kDim>, T, kRank, kExtended>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<typename Traits::Shared*>(shared_memory);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform, and known to be
  set_up<Traits>(params, smem);
  __syncthreads();
  if (warpgroup == 0) {
    ptx::release_registers<24>();
    if (threadIdx.x == 0) WarpgroupProducer<Traits>{params, smem}.run();
  } else {
    ptx::take_registers<240>();
    WideConsumer<Traits>(params, smem, warpgroup - 1, threadIdx.x / 32 % 4, threadIdx.x % 32).run();
  }
}

}  // namespace jax_natten::sm90
