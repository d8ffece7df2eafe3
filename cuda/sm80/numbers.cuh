// Number types of the sm_80 kernels: how an operand of mma.sync is prepared from what lies in memory, and multiplied.
//
// A step of a product is 32 bytes along the rows of its operands: 16 channels of 16-bit numbers, 8 of float32. ldmatrix
// moves 8 x 16 bytes whatever the numbers are, so both kinds share the loads of operands that are read along their
// rows.
#pragma once

#include "../common/mma.h"
#include "../common/ptx.h"

namespace jax_natten::sm80 {

using Fragment = uint32_t[4];

// float16 and bfloat16.
template <typename T>
struct HalfNumbers {
  using Element = T;
  static constexpr int kStepChannels = 16, kUnrolledSteps = 16;

  struct Left {
    uint32_t word[4];
  };
  struct Right {
    uint32_t word[2];
  };
  static __device__ __forceinline__ Left left(const Fragment& a) { return {a[0], a[1], a[2], a[3]}; }
  static __device__ __forceinline__ Right right(uint32_t b0, uint32_t b1) { return {b0, b1}; }
  static __device__ __forceinline__ void multiply(float* d, const Left& a, const Right& b) {
    ptx::mma_from_zero<T>(d, a.word, b.word[0], b.word[1]);
  }
  static __device__ __forceinline__ void multiply_add(float* d, const Left& a, const Right& b) {
    ptx::mma<T>(d, a.word, b.word[0], b.word[1]);
  }
};

// How many steps of a product are unrolled: with more, those of float32 have more operands in flight than registers.
struct FloatNumbers {
  using Element = float;
  static constexpr int kStepChannels = 8, kUnrolledSteps = 4;
};

// float32 rounded to tf32.
struct Tf32Numbers : FloatNumbers {
  struct Left {
    uint32_t word[4];
  };
  struct Right {
    uint32_t word[2];
  };
  static __device__ __forceinline__ uint32_t round(uint32_t x) { return ptx::round_to_tf32(__uint_as_float(x)); }
  static __device__ __forceinline__ Left left(const Fragment& a) {
    return {round(a[0]), round(a[1]), round(a[2]), round(a[3])};
  }
  static __device__ __forceinline__ Right right(uint32_t b0, uint32_t b1) { return {round(b0), round(b1)}; }
  static __device__ __forceinline__ void multiply(float* d, const Left& a, const Right& b) {
    ptx::mma_tf32_from_zero(d, a.word, b.word[0], b.word[1]);
  }
  static __device__ __forceinline__ void multiply_add(float* d, const Left& a, const Right& b) {
    ptx::mma_tf32(d, a.word, b.word[0], b.word[1]);
  }
};

// float32 as the sum of two tf32 numbers, about 21 bits of mantissa: three products, the smallest being left out.
struct SplitTf32Numbers : FloatNumbers {
  struct Left {
    uint32_t big[4], small[4];
  };
  struct Right {
    uint32_t big[2], small[2];
  };
  static __device__ __forceinline__ void split(uint32_t bits, uint32_t& big, uint32_t& small) {
    const float x = __uint_as_float(bits);
    big = ptx::round_to_tf32(x);
    small = ptx::round_to_tf32(x - __uint_as_float(big));
  }
  static __device__ __forceinline__ Left left(const Fragment& a) {
    Left l;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a[i], l.big[i], l.small[i]);
    return l;
  }
  static __device__ __forceinline__ Right right(uint32_t b0, uint32_t b1) {
    Right r;
    split(b0, r.big[0], r.small[0]);
    split(b1, r.big[1], r.small[1]);
    return r;
  }
  static __device__ __forceinline__ void multiply(float* d, const Left& a, const Right& b) {
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] = 0;
    multiply_add(d, a, b);
  }
  // Tensor cores add by truncation, which over a long sum drifts far beyond the rounding of float32: they add no more
  // than the products of one step.
  static __device__ __forceinline__ void multiply_add(float* d, const Left& a, const Right& b) {
    float step[4];
    ptx::mma_tf32_from_zero(step, a.small, b.big[0], b.big[1]);
    ptx::mma_tf32(step, a.big, b.small[0], b.small[1]);
    ptx::mma_tf32(step, a.big, b.big[0], b.big[1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] += step[e];
    ptx::keep_order(d);  // else the compiler has many steps in flight, for which there are no registers
  }
};

}  // namespace jax_natten::sm80
