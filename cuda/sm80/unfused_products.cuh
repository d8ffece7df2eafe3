// Sums of columns weighted by what a warp has staged, and their way out: shared by NN and IN.
#pragma once

#include "numbers.cuh"
#include "unfused_copies.cuh"

namespace jax_natten::sm80 {

// sums[16 rows x channels] += weights[16 rows x 16 columns] columns[16 x channels]. weight(i, j, b): bits of the weight
// of row lane / 4 + 8 i and column 8 j + 2 (lane % 4) + b. address(n): shared memory of column n.
template <class Numbers, int kSteps, int kCount, typename Weight, typename Address>
__device__ __forceinline__ void add_weighted_columns(float (&sums)[kCount], int steps, int lane, Weight weight,
                                                     Address address) {
  if constexpr (sizeof(typename Numbers::Element) == 2) {
    Fragment a;
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = weight(e % 2, e / 2, 0) | weight(e % 2, e / 2, 1) << 16;
    const typename Numbers::Left left = Numbers::left(a);
    const uint32_t columns = address(lane % 16) + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k >= steps) continue;
      Fragment b;
      ptx::load_matrix_x4_transposed(b, columns + 32 * k);
      Numbers::multiply_add(&sums[8 * k], left, Numbers::right(b[0], b[1]));
      Numbers::multiply_add(&sums[8 * k + 4], left, Numbers::right(b[2], b[3]));
    }
  } else {
    // The thread has the weights of columns 2 q and 2 q + 1 (q = lane % 4), where the left operand wants columns q and
    // q + 4. The order of the columns in the sum is free: 2 q takes the place of q, 2 q + 1 that of q + 4, on both
    // sides.
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Fragment a = {weight(0, j, 0), weight(1, j, 0), weight(0, j, 1), weight(1, j, 1)};
      const typename Numbers::Left left = Numbers::left(a);
      const uint32_t even = address(8 * j + lane % 4 * 2) + lane / 4 * 4;
      const uint32_t odd = address(8 * j + lane % 4 * 2 + 1) + lane / 4 * 4;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (k >= steps) continue;
        const auto right = Numbers::right(ptx::load_word(even + 32 * k), ptx::load_word(odd + 32 * k));
        Numbers::multiply_add(&sums[4 * k], left, right);
      }
    }
  }
}

// A warp writes its sums as rows of p.out, whose elements are of type Out, in pieces of 64 bytes that it stages.
// `first`: of the batch element, counted in positions.
template <typename Out, int kCount>
__device__ __forceinline__ void write_rows(const UnfusedParams& p, const float (&sums)[kCount], const PartRow* rows,
                                           int64_t first, int head, uint32_t staging, int lane) {
  constexpr int kPieceBlocks = kOutputPiece / (8 * int(sizeof(Out)));  // of 8 channels
  const int row_bytes = p.dim * int(sizeof(Out));
#pragma unroll
  for (int piece = 0; piece < kCount / 4 / kPieceBlocks; ++piece) {
    if (piece * kOutputPiece >= row_bytes) continue;
    __syncwarp();
#pragma unroll
    for (int e = 0; e < 2 * kPieceBlocks; ++e) {
      const int block = e / 2, i = e % 2;
      const float* sum = &sums[4 * (piece * kPieceBlocks + block) + 2 * i];
      const uint32_t at = staging + (lane / 4 + 8 * i) * kOutputPitch + (8 * block + lane % 4 * 2) * int(sizeof(Out));
      if constexpr (sizeof(Out) == 2) {
        ptx::store_word(at, ptx::pack<Out>(sum[0], sum[1]));
      } else {
        ptx::store_word(at, __float_as_uint(sum[0]));
        ptx::store_word(at + 4, __float_as_uint(sum[1]));
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPartRows * kOutputPiece / 16 / 32; ++i) {
      const int row = lane / 4 + 8 * i, offset = piece * kOutputPiece + lane % 4 * 16;
      if (!rows[row].exists || offset >= row_bytes) continue;
      const uint32_t source = staging + row * kOutputPitch + lane % 4 * 16;
      char* const destination = p.out.data + ((first + rows[row].position) * p.out.heads + head) * row_bytes + offset;
      if (p.out.aligned) {
        *reinterpret_cast<uint4*>(destination) = ptx::load_vector(source);
      } else {
        const int bytes = imin(row_bytes - offset, 16);
#pragma unroll 1
        for (int byte = 0; byte < bytes; byte += sizeof(Out)) {
          store_element<Out>(destination + byte, load_shared_element<Out>(source + byte));
        }
      }
    }
  }
}

}  // namespace jax_natten::sm80
