// The key pass of the backward: dK and dV. See backward_shape.h for the formulas and backward_tiles.cuh for tiles
// and rings.
//
// Per column tile of queries and d_out, for each query head of the keys' group, a consumer computes
//     S^T = K Q^T - lse / scale, dP^T = V dO^T - delta   wgmma from shared memory; the second terms are start values
//     P^T = exp(scale S^T)                               while dP^T is computed; masked on tiles that cross an edge
//     dV += P^T dO                                       wgmma with P^T from registers
//     dK += dS^T Q with dS^T = P^T dP^T                  likewise, awaited behind the next tile's S^T
//
// A warp gathers the start values, which belong to queries and so to columns, and two more find the masks. Where a
// warpgroup cannot hold both dK and dV in its registers, one computes dV and another dK of the same keys.
//
// The extended variant adds a relative position bias to S^T. It also computes partial sums of the gradients of
// additional keys, where rows are those (backward_additional.h).
#pragma once

#include "backward_consumer.cuh"
#include "backward_producers.cuh"

namespace jax_natten::sm90 {

// ---------------------------------------------------------------------------------------------------------- consumer

// kKeys, kValues: whether this warpgroup computes dK, dV.
template <class Traits, bool kKeys, bool kValues>
struct KeyPassConsumer : PassConsumer<Traits> {
  using Base = PassConsumer<Traits>;
  using Base::Base;
  using Base::held_stage, Base::lane, Base::params, Base::slot, Base::smem, Base::stage, Base::warp;
  using Base::kColumns, Base::kDim;

  // Of a result that another warpgroup computes nothing is held.
  static constexpr int kKeyAccumulators = kKeys ? kDim / 2 : 1, kValueAccumulators = kValues ? kDim / 2 : 1;

  __device__ void run() {
    int unreleased_slot = -1;  // whose results may still be on their way to memory
    while (this->wait_for_rows()) {
      this->release_rows(unreleased_slot);
      this->describe_rows(this->row_record().tile);
      float d_key[kKeyAccumulators], d_value[kValueAccumulators];
#pragma unroll
      for (float& d : d_key) d = 0;
#pragma unroll
      for (float& d : d_value) d = 0;
      attend(d_key, d_value);

      const bool partial = Traits::kExtended && params.partials != nullptr;
      if (partial) {
        if constexpr (kKeys) write_partials(kScores, d_key, params.scale);
        if constexpr (kValues) write_partials(kGradients, d_value, 1.f);
      }
      this->sync_part();
      if (!partial) {
        if constexpr (kKeys) this->write_result(kScores, d_key, params.scale);
        if constexpr (kValues) this->write_result(kGradients, d_value, 1.f);
        ptx::async_proxy_fence();
        this->sync_group();
        if (warp == 0 && lane == 0) {
          if (kKeys) this->store_result(kScores);
          if (kValues) this->store_result(kGradients);
          ptx::tma_store_commit();
        }
      }
      unreleased_slot = slot.index;
      if (Traits::kSlots == 1) this->release_rows(unreleased_slot);
      slot.advance();
    }
    if (warp == 0 && lane == 0) ptx::tma_store_wait_read();  // shared memory must outlive the stores
  }

 private:
  // A chunk's sums of additional keys, which are the rows, straight to the workspace.
  __device__ __forceinline__ void write_partials(Operand operand, const float (&result)[kDim / 2], float factor) {
    const QueryTile& tile = this->row_record().tile;
    const int additional = params.extension.additional, kv_heads = params.schedule.by_heads.divisor;
    const int64_t table = int64_t(tile.batch) * params.schedule.axes[2].dilation + tile.phase[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = this->part_begin(tile, 2) + this->row_in_part(i);
      if (key >= additional) continue;
      float* row =
          params.partials + (((table * additional + key) * kv_heads + tile.head) * kOperands + operand) * params.dim;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        const int channel = 8 * j + lane % 4 * 2;
        if (channel >= params.dim) continue;
        row[channel] = result[4 * j + 2 * i] * factor;
        row[channel + 1] = result[4 * j + 2 * i + 1] * factor;
      }
    }
  }

  // The start values of the columns, in all rows alike.
  __device__ __forceinline__ void load_starts(Operand operand, float (&product)[kColumns / 2]) {
    const uint32_t starts = ptx::shared_address(&smem.start[stage.index][operand][2 * (lane % 4)]);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float2 start = ptx::load_pair(starts + 32 * j);
      product[4 * j] = product[4 * j + 2] = start.x;
      product[4 * j + 1] = product[4 * j + 3] = start.y;
    }
  }

  // All column tiles of a row tile.
  __device__ __forceinline__ void attend(float (&d_key)[kKeyAccumulators], float (&d_value)[kValueAccumulators]) {
    uint32_t probabilities[kColumns / 4], d_scores[kColumns / 4];  // packed
    const auto pin_results = [&] {
      if constexpr (kKeys) ptx::pin(d_key);
      if constexpr (kValues) ptx::pin(d_value);
    };
    const auto drain = [&] {
      ptx::wgmma_wait<0>();
      pin_results();
      this->release_held();
    };

    this->begin_columns();
    while (this->next_columns(drain)) {
      float scores[kColumns / 2], d_probabilities[kColumns / 2];
      // Loads issued behind products would wait for them: the start values come first.
      load_starts(kScores, scores);
      ptx::wgmma_fence();
      ptx::pin(scores);
      this->issue_product(kScores, scores, true);
      ptx::wgmma_wait<kKeys ? 1 : 0>();  // the previous tile's results; nothing is left to do before S^T without dP^T
      pin_results();
      if constexpr (kKeys) ptx::pin(d_scores);
      if constexpr (kValues) ptx::pin(probabilities);
      if constexpr (kKeys) load_starts(kGradients, d_probabilities);
      this->release_held();

      this->wait_for_columns(kGradients);
      if constexpr (kKeys) {
        ptx::wgmma_fence();
        ptx::pin(d_probabilities);
        this->issue_product(kGradients, d_probabilities, true);
      }

      if constexpr (kKeys) ptx::wgmma_wait<1>();  // S^T
      ptx::pin(scores);
      if constexpr (Traits::kExtended) this->add_bias(scores);
#pragma unroll
      for (int e = 0; e < kColumns / 2; ++e) scores[e] = ptx::exp2_approximate(scores[e] * params.exponent);
      this->mask(scores);

      if constexpr (kValues) {
        this->pack(scores, probabilities);
        ptx::wgmma_fence();
        ptx::pin(d_value);
        ptx::pin(probabilities);
        this->issue_result(kGradients, d_value, probabilities);
      }
      if constexpr (kKeys) {
        ptx::wgmma_wait<kValues ? 1 : 0>();  // dP^T
        ptx::pin(d_probabilities);
#pragma unroll
        for (int e = 0; e < kColumns / 2; ++e) scores[e] *= d_probabilities[e];
        this->pack(scores, d_scores);
        ptx::wgmma_fence();
        ptx::pin(d_key);
        ptx::pin(d_scores);
        this->issue_result(kScores, d_key, d_scores);
      }
      held_stage = stage.index;
    }
    drain();
  }
};

// ------------------------------------------------------------------------------------------------------------ kernel

template <typename T, int kDim, int kRank, bool kSmall, bool kExtended>
__global__ void __launch_bounds__(pass_shape(kKeyPass, kDim, kSmall).threads(),
                                  pass_shape(kKeyPass, kDim, kSmall).residency)
    backward_key(const __grid_constant__ BackwardParams params) {
  using Traits = PassTraits<T, kKeyPass, kDim, kRank, kSmall, kExtended>;
  constexpr bool kDivided = Traits::kGroups > Traits::kParts;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<typename Traits::Shared*>(shared_memory);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform, and known to be
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  set_up_pass<Traits>(params, smem);
  __syncthreads();
  if (warpgroup == 0) {
    ptx::release_registers<Traits::kShape.producer_registers()>();
    if (warp == 0) {
      PassProducer<Traits>(params, smem, lane).run();
    } else if (warp == 1) {
      StartProducer<Traits>(params, smem, lane).run();
    } else {
      MaskProducer<Traits>(params, smem, threadIdx.x - 64).run();
    }
  } else {
    ptx::take_registers<Traits::kShape.registers>();
    if constexpr (kDivided) {
      if (warpgroup == 1) {
        KeyPassConsumer<Traits, true, false>(params, smem, 0, warp, lane).run();
      } else {
        KeyPassConsumer<Traits, false, true>(params, smem, 1, warp, lane).run();
      }
    } else {
      KeyPassConsumer<Traits, true, true>(params, smem, warpgroup - 1, warp, lane).run();
    }
  }
}

struct KeyPass {
  static constexpr Walk kPass = kKeyPass;
  template <typename T, int kDim, int kRank, bool kSmall, bool kExtended>
  static BackwardKernel kernel() {
    return backward_key<T, kDim, kRank, kSmall, kExtended>;
  }
};

}  // namespace jax_natten::sm90
