// The online softmax on accumulator fragments. A thread holds two rows, i = 0 and 1; element 4 j + 2 i + b of a
// fragment is column 8 j + 2 (lane % 4) + b of row i; the four lanes of a quad share their rows.
#pragma once

#include <cstdint>

#include "ptx.h"

namespace jax_natten {

// Scores that `word` (of key_mask_word) does not name become `masked`.
template <int kCount>
__device__ __forceinline__ void mask_row(float (&scores)[kCount], int i, uint32_t word, float masked = -INFINITY) {
#pragma unroll
  for (int bit = 0; bit < kCount / 2; ++bit) {
    float& score = scores[bit / 2 * 4 + 2 * i + bit % 2];
    score = (word >> bit) & 1 ? score : masked;
  }
}

// The same for both rows and the columns of one span of kColumns. Row by row: seven bits of a word then become
// predicates in one instruction (R2P).
template <int kColumns, int kCount>
__device__ __forceinline__ void mask_columns(float (&scores)[kCount], int span, const uint32_t (&words)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int bit = 0; bit < kColumns / 4; ++bit) {
      const int n = span * (kColumns / 4) + bit;
      if (n >= kCount / 2) break;
      float& score = scores[n / 2 * 4 + 2 * i + n % 2];
      score = (words[i] >> n) & 1 ? score : -INFINITY;
    }
  }
}

// Scores become scale score + bias, in powers of two. The bias of a column that `word` names is entries[offset], the
// column's place in `offsets`; others, whose entries need not exist, get none. offsets: of this lane's first column.
template <int kCount>
__device__ __forceinline__ void bias_row(float (&scores)[kCount], int i, uint32_t word, const float* entries,
                                         const int* offsets, float scale) {
  constexpr float kLog2E = 1.4426950408889634f;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const int2 offset = *reinterpret_cast<const int2*>(offsets + 8 * j);
    float &first = scores[4 * j + 2 * i], &second = scores[4 * j + 2 * i + 1];
    first = fmaf(word >> 2 * j & 1 ? __ldg(entries + offset.x) : 0.f, kLog2E, first * scale);
    second = fmaf(word >> (2 * j + 1) & 1 ? __ldg(entries + offset.y) : 0.f, kLog2E, second * scale);
  }
}

template <int kCount>
__device__ __forceinline__ void scale_row(float (&scores)[kCount], int i, float scale) {
#pragma unroll
  for (int bit = 0; bit < kCount / 2; ++bit) scores[bit / 2 * 4 + 2 * i + bit % 2] *= scale;
}

// Of both rows, whose exchanges overlap.
__device__ __forceinline__ void quad_max(float (&x)[2]) {
#pragma unroll
  for (int distance = 1; distance <= 2; ++distance) {
    const float other[2] = {__shfl_xor_sync(~0u, x[0], distance), __shfl_xor_sync(~0u, x[1], distance)};
    x[0] = fmaxf(x[0], other[0]);
    x[1] = fmaxf(x[1], other[1]);
  }
}

__device__ __forceinline__ void quad_sum(float (&x)[2]) {
#pragma unroll
  for (int distance = 1; distance <= 2; ++distance) {
    const float other[2] = {__shfl_xor_sync(~0u, x[0], distance), __shfl_xor_sync(~0u, x[1], distance)};
    x[0] += other[0];
    x[1] += other[1];
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Exponents are powers of two: p = 2^(scale s - scale maximum) with scale = |scale of the problem| log2(e) > 0.
struct OnlineSoftmax {
  // A growth of a row's maximum below this many powers of two is left unnoticed: p then exceeds 1 but neither the sums
  // nor the outputs need rescaling, which saves most of the rescaling passes.
  static constexpr float kSlack = 8;

  float scale;
  float maximum[2] = {-INFINITY, -INFINITY};  // that p refers to
  float sum[2] = {0, 0};                      // over this thread's columns
  float correction[2] = {1, 1};               // of the outputs, after an update that returned true

  OnlineSoftmax() = default;
  __device__ explicit OnlineSoftmax(float scale) : scale(scale) {}

  // Turns scores into p. True (for the whole warp) if outputs so far must be multiplied by `correction`.
  template <int kCount>
  __device__ __forceinline__ bool update(float (&scores)[kCount]) {
    const auto sees = [](int) { return true; };
    const bool grew = raise_maximum<2 * kCount>(scores, sees);
    exponentiate<2 * kCount>(scores, sees, [](int, bool) {});
    return grew;
  }

  // The same where all of a row's scores come at once: there are no outputs yet.
  template <int kCount>
  __device__ __forceinline__ void begin(float (&scores)[kCount]) {
    const auto sees = [](int) { return true; };
    find_maximum<2 * kCount>(scores, sees, maximum);
    exponentiate<2 * kCount>(scores, sees, [](int, bool) {});
  }

  // The two halves of an update where the warp sees only some spans of kColumns columns: sees(span).

  template <int kColumns, int kCount, class Sees>
  __device__ __forceinline__ bool raise_maximum(const float (&scores)[kCount], Sees sees) {
    float tile[2];
    find_maximum<kColumns>(scores, sees, tile);
    bool grew[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // No short circuits: they would become branches between the rows.
      grew[i] = (tile[i] * scale > maximum[i] * scale + kSlack) | ((maximum[i] == -INFINITY) & (tile[i] > maximum[i]));
    }
    if (!__any_sync(~0u, grew[0] | grew[1])) return false;
    // A row decides for itself: were others to raise it too, its rounding would depend on them, and some of a warp's
    // rows hold whatever was in shared memory before.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float raised = grew[i] ? tile[i] : maximum[i];
      const float reference = raised == -INFINITY ? 0.f : raised * scale;
      correction[i] = grew[i] ? ptx::exp2_approximate(maximum[i] * scale - reference) : 1.f;
      maximum[i] = raised;
      sum[i] *= correction[i];
    }
    return true;
  }

  template <int kColumns, int kCount, class Sees>
  __device__ __forceinline__ static void find_maximum(const float (&scores)[kCount], Sees sees, float (&tile)[2]) {
    constexpr int kSpan = kColumns / 8;  // of the fragment's steps of 8 columns
    float even[2] = {-INFINITY, -INFINITY}, odd[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int span = 0; span * kSpan < kCount / 4; ++span) {
      if (!sees(span)) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = span * kSpan; j < (span + 1) * kSpan && j < kCount / 4; ++j) {
          even[i] = fmaxf(even[i], scores[4 * j + 2 * i]);
          odd[i] = fmaxf(odd[i], scores[4 * j + 2 * i + 1]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) tile[i] = fmaxf(even[i], odd[i]);
    quad_max(tile);
  }

  // take(span, seen) takes each span's p, if it was seen; else it is 0, and not among the scores.
  template <int kColumns, int kCount, class Sees, class Take>
  __device__ __forceinline__ void exponentiate(float (&scores)[kCount], Sees sees, Take take) {
    constexpr int kSpan = kColumns / 8;
    float reference[2], even[2] = {sum[0], sum[1]}, odd[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) reference[i] = maximum[i] == -INFINITY ? 0.f : maximum[i] * scale;
#pragma unroll
    for (int span = 0; span * kSpan < kCount / 4; ++span) {
      if (sees(span)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = span * kSpan; j < (span + 1) * kSpan && j < kCount / 4; ++j) {
            float &first = scores[4 * j + 2 * i], &second = scores[4 * j + 2 * i + 1];
            first = ptx::exp2_approximate(fmaf(first, scale, -reference[i]));
            second = ptx::exp2_approximate(fmaf(second, scale, -reference[i]));
            even[i] += first;
            odd[i] += second;
          }
        }
        take(span, true);
      } else {
        take(span, false);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] = even[i] + odd[i];
  }

  // What remains: the sums over all columns, and the factors that normalise the outputs. A row without keys (outside
  // the grid) gives zeros.
  __device__ __forceinline__ void finish(float (&normalizer)[2]) {
    quad_sum(sum);
#pragma unroll
    for (int i = 0; i < 2; ++i) normalizer[i] = sum[i] == 0 ? 0.f : __fdividef(1.f, sum[i]);
  }

  // Natural log of the sum of exponentials, after finish().
  __device__ __forceinline__ float log_sum_exp(int i) const {
    constexpr float kLn2 = 0.6931471805599453f;
    const float s = i == 0 ? sum[0] : sum[1], m = i == 0 ? maximum[0] : maximum[1];  // i may differ by lane
    return s == 0 ? -INFINITY : (m * scale + ptx::log2_approximate(s)) * kLn2;
  }
};

}  // namespace jax_natten
