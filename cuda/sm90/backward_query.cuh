// The query pass of the backward: delta and dQ. See backward_shape.h for the formulas and backward_tiles.cuh for
// tiles and rings.
//
// Per column tile of keys and values a consumer computes
//     S = Q K^T, dP = dO V^T     wgmma from shared memory
//     P = exp(scale S - lse)     while dP is computed; masked on tiles that cross a window's edge
//     dS = P (dP - delta)
//     dQ += dS K                 wgmma with dS from registers, awaited behind the next tile's S
//
// The extended variant adds a relative position bias to S, and appends tiles of additional keys to those of the window
// box.
#pragma once

#include "backward_consumer.cuh"
#include "backward_producers.cuh"

namespace jax_natten::sm90 {

template <class Traits>
struct QueryPassConsumer : PassConsumer<Traits> {
  using Base = PassConsumer<Traits>;
  using T = typename Traits::T;
  using Base::Base;
  using Base::group, Base::held_stage, Base::lane, Base::params, Base::part, Base::slot, Base::smem, Base::stage,
      Base::warp;
  using Base::kColumns, Base::kDim, Base::kRank;

  __device__ void run() {
    int unreleased_slot = -1;  // whose results may still be on their way to memory
    while (this->wait_for_rows()) {
      this->release_rows(unreleased_slot);
      const RowRecord& record = this->row_record();
      this->describe_rows(record.tile);
      float lse[2], delta[2];  // lse in powers of two
      find_row_constants(record, lse, delta);
      float d_query[kDim / 2];
#pragma unroll
      for (int e = 0; e < kDim / 2; ++e) d_query[e] = 0;
      attend(lse, delta, d_query);

      this->sync_part();
      this->write_result(kScores, d_query, params.scale);
      ptx::async_proxy_fence();
      this->sync_group();
      if (warp == 0 && lane == 0) {
        this->store_result(kScores);
        ptx::tma_store_commit();
      }
      unreleased_slot = slot.index;
      if (Traits::kSlots == 1) this->release_rows(unreleased_slot);
      slot.advance();
    }
    if (warp == 0 && lane == 0) ptx::tma_store_wait_read();  // shared memory must outlive the stores
  }

 private:
  // lse and delta of the thread's two rows; writes them to the workspace, as the key pass wants them. Rows outside the
  // grid get an lse that makes their probabilities zero.
  __device__ __forceinline__ void find_row_constants(const RowRecord& record, float (&lse)[2], float (&delta)[2]) {
    constexpr float kLog2E = 1.4426950408889634f;
    constexpr int kVectors = kDim / 32;  // of 8 channels, per lane of a quad
    bool inside[2];
    int start_at[2];
    float given_lse[2], d_lse[2];
    uint4 out[2][kVectors];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int at = record.slab;
      start_at[i] = params.start_address.template slab<kRank>(record.tile, record.tile.head * params.positions);
      inside[i] = true;
#pragma unroll
      for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
        const int in_part = this->coordinate(this->row_in_part(i), a), x = this->part_begin(record.tile, a) + in_part;
        inside[i] = inside[i] && x < record.tile.length[a] && in_part < params.schedule.axes[a].query_part;
        at += x * params.row_step[a];
        start_at[i] += x * params.position_step[a];
      }
      given_lse[i] = inside[i] ? __ldg(params.lse + at) : INFINITY;
      d_lse[i] = inside[i] ? __ldg(params.d_lse + at) : 0.f;
      const T* row = static_cast<const T*>(params.out) + int64_t(at) * params.dim;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int channel = 8 * (4 * v + lane % 4);
        out[i][v] = inside[i] && channel < params.dim ? __ldg(reinterpret_cast<const uint4*>(row + channel))
                                                      : make_uint4(0, 0, 0, 0);
      }
    }
    const uint32_t d_out_rows = ptx::shared_address(smem.row[slot.index][part][kGradients]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint4 d_out = ptx::load_vector(d_out_rows + this->segment_offset(this->row_in_part(i), 4 * v + lane % 4));
        sum = add_products(out[i][v].x, d_out.x, sum);
        sum = add_products(out[i][v].y, d_out.y, sum);
        sum = add_products(out[i][v].z, d_out.z, sum);
        sum = add_products(out[i][v].w, d_out.w, sum);
      }
      delta[i] = quad_sum(sum) - d_lse[i];
      lse[i] = given_lse[i] * kLog2E;
      if (inside[i] && lane % 4 == 0) {
        params.start[kScores][start_at[i]] = given_lse[i] * params.lse_to_start;
        params.start[kGradients][start_at[i]] = -delta[i];
      }
    }
  }

  __device__ __forceinline__ static float add_products(uint32_t a, uint32_t b, float sum) {
    const float2 x = ptx::unpack<T>(a), y = ptx::unpack<T>(b);
    return fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
  }

  // All column tiles of a row tile.
  __device__ __forceinline__ void attend(const float (&lse)[2], const float (&delta)[2], float (&d_query)[kDim / 2]) {
    uint32_t d_scores[kColumns / 4];  // packed
    const auto drain = [&] {
      ptx::wgmma_wait<0>();
      ptx::pin(d_query);
      this->release_held();
    };

    this->begin_columns();
    while (this->next_columns(drain)) {
      float scores[kColumns / 2], d_probabilities[kColumns / 2];
      ptx::wgmma_fence();
      ptx::pin(scores);
      this->issue_product(kScores, scores, false);
      this->wait_for_columns(kGradients);  // while products are under way the look costs nothing
      ptx::wgmma_wait<1>();                // the previous tile's dS K
      ptx::pin(d_query);
      ptx::pin(d_scores);
      this->release_held();

      ptx::wgmma_fence();
      ptx::pin(d_probabilities);
      this->issue_product(kGradients, d_probabilities, false);

      ptx::wgmma_wait<1>();  // S
      ptx::pin(scores);
      if constexpr (Traits::kExtended) this->add_bias(scores);
#pragma unroll
      for (int e = 0; e < kColumns / 2; ++e) {
        scores[e] = ptx::exp2_approximate(fmaf(scores[e], params.exponent, -lse[e / 2 % 2]));
      }
      this->mask(scores);

      ptx::wgmma_wait<0>();  // dP
      ptx::pin(d_probabilities);
#pragma unroll
      for (int e = 0; e < kColumns / 2; ++e) scores[e] *= d_probabilities[e] - delta[e / 2 % 2];
      this->pack(scores, d_scores);
      ptx::wgmma_fence();
      ptx::pin(d_query);
      ptx::pin(d_scores);
      this->issue_result(kScores, d_query, d_scores);
      held_stage = stage.index;
    }
    drain();
  }
};

template <typename T, int kDim, int kRank, bool kSmall, bool kExtended>
__global__ void __launch_bounds__(pass_shape(kQueryPass, kDim, kSmall).threads(),
                                  pass_shape(kQueryPass, kDim, kSmall).residency)
    backward_query(const __grid_constant__ BackwardParams params) {
  using Traits = PassTraits<T, kQueryPass, kDim, kRank, kSmall, kExtended>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<typename Traits::Shared*>(shared_memory);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform, and known to be
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  set_up_pass<Traits>(params, smem);
  __syncthreads();
  if (warpgroup == 0) {
    ptx::release_registers<Traits::kShape.producer_registers()>();
    if (warp == 0) PassProducer<Traits>(params, smem, lane).run();
  } else {
    ptx::take_registers<Traits::kShape.registers>();
    QueryPassConsumer<Traits>(params, smem, warpgroup - 1, warp, lane).run();
  }
}

struct QueryPass {
  static constexpr Walk kPass = kQueryPass;
  template <typename T, int kDim, int kRank, bool kSmall, bool kExtended>
  static BackwardKernel kernel() {
    return backward_query<T, kDim, kRank, kSmall, kExtended>;
  }
};

}  // namespace jax_natten::sm90
