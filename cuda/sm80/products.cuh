// Products of tiles by tensor cores, for every number type. A warp owns blocks of 16 rows of the left side; results are
// accumulator fragments: element 4 j + 2 i + b of a thread's fragment of a block is row lane / 4 + 8 i, column
// 8 j + 2 (lane % 4) + b.
// All code but the product whose right side is read down its columns serves 16-bit numbers and float32 alike.
#pragma once

#include "numbers.cuh"
#include "shared_tile.cuh"

namespace jax_natten::sm80 {

// ---- where lanes find their fragments, as addresses in the first 32 bytes of a tile's rows

// Of the left side, or of the right side read down its columns: 16 rows from `row` on.
template <class Tile>
__device__ __forceinline__ uint32_t left_address(uint32_t tile, int row, int lane) {
  return tile + Tile::place(row + lane % 16, lane / 16);
}

// Of the right side read along its rows: 16 rows from 0 on, the first two matrices from the first eight.
template <class Tile>
__device__ __forceinline__ uint32_t right_address(uint32_t tile, int lane) {
  return tile + Tile::place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// ---- products along the rows: of left[block] and right^T

// scores += one step of them, or become it. load_left(block, fragment) gives the left side. right: of right_address(),
// moved along the rows.
template <class Numbers, class RightTile, int kBlocks, int kCount, typename LoadLeft>
__device__ __forceinline__ void add_row_products(float (&scores)[kBlocks][kCount], uint32_t right, bool from_zero,
                                                 LoadLeft load_left) {
  static_assert(kCount <= RightTile::kRows / 2, "a fragment of no more columns than the right side has rows");
  typename Numbers::Left left[kBlocks];
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    Fragment a;
    load_left(m, a);
    left[m] = Numbers::left(a);
  }
#pragma unroll
  for (int j = 0; j < kCount / 8; ++j) {
    Fragment b;
    ptx::load_matrix_x4(b, RightTile::moved(right, 16 * j, 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto r = Numbers::right(b[2 * half], b[2 * half + 1]);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        float* const sums = &scores[m][8 * j + 4 * half];
        from_zero ? Numbers::multiply(sums, left[m], r) : Numbers::multiply_add(sums, left[m], r);
      }
    }
  }
}

// scores = left right^T, all steps. load_left(block, step, fragment) gives the left side. right: of right_address(),
// for as many rows as there are scores.
template <class Numbers, class RightTile, int kBlocks, int kCount, typename LoadLeft>
__device__ __forceinline__ void multiply_rows(float (&scores)[kBlocks][kCount], uint32_t right, LoadLeft load_left) {
  constexpr int kSteps = RightTile::kRowBytes / 32;
  constexpr bool kFromZero = Numbers::kUnrolledSteps >= kSteps;
  if constexpr (!kFromZero) {
#pragma unroll
    for (int e = 0; e < kBlocks * kCount; ++e) scores[e / kCount][e % kCount] = 0;
  }
#pragma unroll Numbers::kUnrolledSteps
  for (int k = 0; k < kSteps; ++k) {
    add_row_products<Numbers, RightTile>(scores, RightTile::moved(right, 0, k), kFromZero && k == 0,
                                         [&](int m, Fragment& a) { load_left(m, k, a); });
  }
}

// ---- products down the columns: sums[block] += weights[block] right, with weights in accumulator fragments, for as
// many channels as there are sums

// Address of the right side for add_weighted_rows().
template <class Numbers, class RightTile>
__device__ __forceinline__ uint32_t column_address(uint32_t tile, int lane) {
  if (sizeof(typename Numbers::Element) == 2) return left_address<RightTile>(tile, 0, lane);
  return tile + RightTile::place(2 * (lane % 4), lane / 16) + lane / 4 % 4 * 4;
}

template <class Numbers, class RightTile, int kBlocks, int kCount, int kSums>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[kBlocks][kSums],
                                                  const float (&weights)[kBlocks][kCount], uint32_t right) {
  using T = typename Numbers::Element;
  constexpr int kSteps = 2 * kSums / Numbers::kStepChannels;
  static_assert(kCount <= RightTile::kRows / 2, "no more weights than the right side has rows");
  static_assert(32 * kSteps <= RightTile::kRowBytes, "a channel for each sum");
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < kCount / 8; ++j) {
      typename Numbers::Left left[kBlocks];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        const float* w = &weights[m][8 * j];
        const Fragment a = {ptx::pack<T>(w[0], w[1]), ptx::pack<T>(w[2], w[3]), ptx::pack<T>(w[4], w[5]),
                            ptx::pack<T>(w[6], w[7])};
        left[m] = Numbers::left(a);
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        Fragment b;
        ptx::load_matrix_x4_transposed(b, RightTile::moved(right, 16 * j, k));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto r = Numbers::right(b[2 * half], b[2 * half + 1]);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) Numbers::multiply_add(&sums[m][8 * k + 4 * half], left[m], r);
        }
      }
    }
  } else {
    // A thread's weights are of rows 2 q and 2 q + 1 (q = lane % 4), where the left operand wants columns q and q + 4.
    // The order of the rows in the sum is free: row 2 q takes the place of q, row 2 q + 1 that of q + 4, on both sides.
    // They differ in the last bit of the permutation, so that the second is one row further with chunks exchanged.
    const uint32_t odd = (right ^ 16) + RightTile::kPanelBytes;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      typename Numbers::Left left[kBlocks];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        const float* w = &weights[m][4 * j];
        const Fragment a = {__float_as_uint(w[0]), __float_as_uint(w[2]), __float_as_uint(w[1]), __float_as_uint(w[3])};
        left[m] = Numbers::left(a);
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const auto r = Numbers::right(ptx::load_word(RightTile::moved(right, 8 * j, k)),
                                      ptx::load_word(RightTile::moved(odd, 8 * j, k)));
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) Numbers::multiply_add(&sums[m][4 * k], left[m], r);
      }
    }
  }
}

// ---- results: 16 rows of a tile, from `first` on, become a block's fragments times a factor for each of its two rows

template <class Numbers, class Tile, int kCount>
__device__ __forceinline__ void store_fragments(uint32_t tile, int first, int lane, const float (&fragment)[kCount],
                                                const float (&factor)[2]) {
  using T = typename Numbers::Element;
  constexpr int kPairBytes = 2 * sizeof(T);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t row = tile + Tile::place(first + 8 * i + lane / 4, lane % 4 * kPairBytes / 16);
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      // Eight columns are a 16-byte chunk of 16-bit numbers, and two of float32.
      const int bytes = 4 * kPairBytes * j;
      const uint32_t address = Tile::moved(row ^ bytes % 32, 0, bytes / 32) + lane % 4 * kPairBytes % 16;
      const float low = fragment[4 * j + 2 * i] * factor[i], high = fragment[4 * j + 2 * i + 1] * factor[i];
      if constexpr (sizeof(T) == 2) {
        ptx::store_word(address, ptx::pack<T>(low, high));
      } else {
        ptx::store_word(address, __float_as_uint(low));
        ptx::store_word(address + 4, __float_as_uint(high));
      }
    }
  }
}

}  // namespace jax_natten::sm80
