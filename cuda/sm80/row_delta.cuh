// delta = rowsum(out * d_out) - d_lse of the backward's query pass.
#pragma once

#include "../common/softmax.h"
#include "backward_params.h"
#include "rows.cuh"

namespace jax_natten::sm80 {

// This lane's quarter of the inner product of two rows in memory, of `out` and of d_out. T: of one element.
template <typename T>
__device__ __forceinline__ float quarter_of_product(const BackwardParams& params, int lane, const char* x,
                                                    const char* y) {
  constexpr int kChunk = 16 / sizeof(T);
  float sum = 0;
  if (params.out.copy_bytes == 16 && params.d_out.copy_bytes == 16) {
    for (int c = lane % 4 * 16; c < params.out.bytes; c += 64) {
      const uint4 u = *reinterpret_cast<const uint4*>(x + c), v = *reinterpret_cast<const uint4*>(y + c);
      T a[kChunk], b[kChunk];
      memcpy(a, &u, 16);
      memcpy(b, &v, 16);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sum += float(a[e]) * float(b[e]);
    }
  } else {
    for (int c = lane % 4; c < params.value_dim; c += 4) {
      sum += float(reinterpret_cast<const T*>(x)[c]) * float(reinterpret_cast<const T*>(y)[c]);
    }
  }
  return sum;
}

// Finds the lse, counted in powers of two, and delta of a row of the quad that calls it; `writes`: it is the quad that
// leaves delta for the other passes. A row outside the grid, at a negative position, has zeros.
template <typename T>
__device__ __forceinline__ void find_row_delta(const BackwardParams& params, const QueryTile& tile, int position,
                                               int lane, bool writes, float& lse, float& delta) {
  lse = delta = 0;
  float sum = 0;
  const int64_t at = (int64_t(tile.batch) * params.positions + position) * params.heads + tile.head;
  if (position >= 0) {
    sum = quarter_of_product<T>(params, lane,
                                first_row(params.out, tile.batch, tile.head) + position * params.out.position_step,
                                first_row(params.d_out, tile.batch, tile.head) + position * params.d_out.position_step);
    lse = params.lse[at] * kLog2E;
    delta = params.d_lse[at];
  }
  delta = quad_sum(sum) - delta;
  if (position >= 0 && lane % 4 == 0 && writes) params.delta[at] = delta;
}

}  // namespace jax_natten::sm80
