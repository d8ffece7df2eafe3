// Fused neighborhood attention forward for windows of middling size on Hopper ("middle").
//
// A CTA has one warpgroup of consumers, which own 64 queries (warpgroup_forward.cuh), and a producer warp. Two or three
// CTAs share a multiprocessor: while one waits for its products another computes exponentials, so that a consumer does
// everything in order, and small query tiles cost no pipeline to fill and drain. A warp leaves out spans of a key
// tile's columns that none of its own 16 queries sees: with such windows that is about half of them.
#pragma once

#include "middle_shape.h"
#include "warpgroup_forward.cuh"

namespace jax_natten::sm90 {

template <int kDim, int kVariant>
struct MiddleKernel {
  static constexpr WarpgroupShape kShape = middle_shape(kDim, kVariant);
  static constexpr int kGroups = 1;
};

template <class Traits>
struct MiddleConsumer : WarpgroupConsumer<Traits> {
  using Base = WarpgroupConsumer<Traits>;
  using Base::WarpgroupConsumer, Base::params, Base::smem, Base::lane;
  using T = typename Traits::T;
  using Base::kDim, Base::kKeys, Base::kRank;
  static constexpr int kSpanColumns = 32;  // columns that a warp looks at or leaves out together

  __device__ void run() {
    this->each_query_tile([this](const QueryTile& tile, int slot, RingPosition<Traits::kStages>& stage,
                                 int& unreleased_slot, OnlineSoftmax& softmax,
                                 float (&out)[kDim / 2]) { attend(tile, slot, stage, unreleased_slot, softmax, out); });
  }

 private:
  // All key tiles of a query tile: with one part, none is of no use to it. What is about the tile is read again for
  // each of them, which costs fewer registers than to keep it.
  __device__ __forceinline__ void attend(const QueryTile& tile, int slot, RingPosition<Traits::kStages>& stage,
                                         int& unreleased_slot, OnlineSoftmax& softmax, float (&out)[kDim / 2]) {
    PackedInterval windows[2][kMaxRank];
    this->find_windows(tile, tile.query, windows);

    typename Traits::Cursor cursor;
    do {
      ptx::barrier_wait(&smem.key_full[stage.index], stage.parity);
      float scores[kKeys / 2];
      ptx::wgmma_fence();
      ptx::pin(scores);
      this->issue_scores(scores, slot, stage.index);

      uint32_t words[2];  // columns that the thread's rows see
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        words[i] = key_mask_word<kRank>(params.mask_layout, smem.mask_table, windows[i], cursor.begin, lane % 4);
      }
      const uint32_t seen = __reduce_or_sync(~0u, words[0] | words[1]);
      const auto sees = [seen](int span) { return (seen >> span * (kSpanColumns / 4) & 0xff) != 0; };
      this->release_slot(unreleased_slot);

      // The values have come with the keys: here the look costs nothing, after the exponentials it takes its time.
      ptx::barrier_wait(&smem.value_full[stage.index], stage.parity);
      ptx::wgmma_wait<0>();
      ptx::pin(scores);
      this->release(&smem.key_empty[stage.index]);
#pragma unroll
      for (int span = 0; span * kSpanColumns < kKeys; ++span) {
        if (sees(span)) mask_columns<kSpanColumns>(scores, span, words);
      }
      uint32_t p[kKeys / 4];
      const auto pack = [&](int span, bool seen) {
#pragma unroll
        for (int e = span * (kSpanColumns / 4); e < (span + 1) * (kSpanColumns / 4) && e < kKeys / 4; ++e) {
          p[e] = seen ? ptx::pack<T>(scores[2 * e], scores[2 * e + 1]) : 0;
        }
      };
      if (softmax.raise_maximum<kSpanColumns>(scores, sees)) this->rescale(out, softmax);
      softmax.exponentiate<kSpanColumns>(scores, sees, pack);

      ptx::wgmma_fence();
      ptx::pin(out);
      ptx::pin(p);
      this->issue_output(out, p, stage.index);
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      this->release(&smem.value_empty[stage.index]);
      stage.advance();
    } while (cursor.next(params.schedule.axes, tile.extent, params.extension));
  }
};

template <typename T, int kDim, int kVariant, int kRank>
__global__ void __launch_bounds__(kMiddleThreads, middle_blocks(kDim))
    middle_forward(const __grid_constant__ WarpgroupParams params) {
  using Traits = WarpgroupTraits<MiddleKernel<kDim, kVariant>, T, kRank, /*kExtended=*/false>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<typename Traits::Shared*>(shared_memory);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // uniform, and known to be
  set_up<Traits>(params, smem);
  __syncthreads();
  if (warp == 4) {
    if (threadIdx.x % 32 == 0) WarpgroupProducer<Traits>{params, smem}.run();
  } else {
    MiddleConsumer<Traits>(params, smem, 0, warp, threadIdx.x % 32).run();
  }
}

}  // namespace jax_natten::sm90
