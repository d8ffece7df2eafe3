// Warpgroup matrix multiplication (wgmma, sm_90a): D[64 x N] += A[64 x 16] B[16 x N], fp32 accumulators in registers.
//
// Accumulator element 4 j + 2 i + b of a thread lies in row 16 (warp % 4) + lane / 4 + 8 i, column 8 j + 2 (lane % 4) +
// b. An A fragment in registers has the same layout for its 16 columns, packed in pairs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_natten::ptx {

// Codes of the matrix descriptor's swizzle field.
enum class Swizzle : uint64_t { k128Bytes = 1, k64Bytes = 2 };

// Describes a matrix in shared memory made of swizzle atoms of 8 rows. `leading` and `stride`: byte distances between
// atoms along the row (for a transposed operand: along N) and across rows; bits 0-13, 16-29, 32-45 hold them in units
// of 16 bytes, so adding `bytes >> 4` to a descriptor moves its start.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                                      Swizzle swizzle) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(swizzle) << 62;
}

// Orders this warpgroup's register and shared-memory accesses before its following wgmma instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Blocks until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers that a wgmma in flight reads or writes are invisible to the compiler as such. Pinning them before the fence
// and after the wait keeps it from moving their uses across (it would serialise the wgmma: ptxas C7510, C7512, C7520).
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Wgmma<T, N>::shared(d, a, b, accumulate): A and B from shared memory, both with the 16 summed elements contiguous.
// Wgmma<T, N>::registers(d, a, b): A from registers; B from shared memory with its N elements contiguous
// ("transposed").
template <typename T, int kColumns>
struct Wgmma;

// Assembler text and operands of 8, 16, .. 128 accumulators.
#define WGMMA_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_TEXT_16 WGMMA_TEXT_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_TEXT_24 WGMMA_TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_TEXT_32 WGMMA_TEXT_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_TEXT_40 WGMMA_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_TEXT_48 WGMMA_TEXT_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_TEXT_56 WGMMA_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_TEXT_64 WGMMA_TEXT_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_TEXT_72 WGMMA_TEXT_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_TEXT_80 WGMMA_TEXT_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_TEXT_88 WGMMA_TEXT_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_TEXT_96 WGMMA_TEXT_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_TEXT_104 WGMMA_TEXT_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_TEXT_112 WGMMA_TEXT_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_TEXT_120 WGMMA_TEXT_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_TEXT_128 WGMMA_TEXT_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SIXTEEN(i) WGMMA_FOUR(i), WGMMA_FOUR(i + 4), WGMMA_FOUR(i + 8), WGMMA_FOUR(i + 12)
#define WGMMA_DATA_16 WGMMA_SIXTEEN(0)
#define WGMMA_DATA_24 WGMMA_DATA_16, WGMMA_FOUR(16), WGMMA_FOUR(20)
#define WGMMA_DATA_32 WGMMA_DATA_16, WGMMA_SIXTEEN(16)
#define WGMMA_DATA_40 WGMMA_DATA_32, WGMMA_FOUR(32), WGMMA_FOUR(36)
#define WGMMA_DATA_48 WGMMA_DATA_32, WGMMA_SIXTEEN(32)
#define WGMMA_DATA_56 WGMMA_DATA_48, WGMMA_FOUR(48), WGMMA_FOUR(52)
#define WGMMA_DATA_64 WGMMA_DATA_48, WGMMA_SIXTEEN(48)
#define WGMMA_DATA_96 WGMMA_DATA_64, WGMMA_SIXTEEN(64), WGMMA_SIXTEEN(80)
#define WGMMA_DATA_128 WGMMA_DATA_96, WGMMA_SIXTEEN(96), WGMMA_SIXTEEN(112)

// R accumulators; p0 .. p5 are the numbers R .. R + 5 of the operands behind them.
#define WGMMA_DEFINE(TYPE, NAME, N, R, p0, p1, p2, p3, p4, p5)                                              \
  template <>                                                                                               \
  struct Wgmma<TYPE, N> {                                                                                   \
    static __device__ __forceinline__ void shared(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #p2                               \
                   ", 0;\n"                                                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" WGMMA_TEXT_##R      \
                   "}, %" #p0 ", %" #p1 ", accumulate, 1, 1, 0, 0;\n}"                                      \
                   : WGMMA_DATA_##R                                                                         \
                   : "l"(a), "l"(b), "r"(int(accumulate)));                                                 \
    }                                                                                                       \
    static __device__ __forceinline__ void registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b) {   \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #p5                               \
                   ", 0;\n"                                                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" WGMMA_TEXT_##R      \
                   "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", accumulate, 1, 1, 1;\n}"         \
                   : WGMMA_DATA_##R                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                           \
    }                                                                                                       \
  };

#define WGMMA_DEFINE_BOTH(...)                     \
  WGMMA_DEFINE(__nv_bfloat16, "bf16", __VA_ARGS__) \
  WGMMA_DEFINE(__half, "f16", __VA_ARGS__)

WGMMA_DEFINE_BOTH(32, 16, 16, 17, 18, 19, 20, 21)
WGMMA_DEFINE_BOTH(48, 24, 24, 25, 26, 27, 28, 29)
WGMMA_DEFINE_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
WGMMA_DEFINE_BOTH(80, 40, 40, 41, 42, 43, 44, 45)
WGMMA_DEFINE_BOTH(96, 48, 48, 49, 50, 51, 52, 53)
WGMMA_DEFINE_BOTH(112, 56, 56, 57, 58, 59, 60, 61)
WGMMA_DEFINE_BOTH(128, 64, 64, 65, 66, 67, 68, 69)
WGMMA_DEFINE_BOTH(192, 96, 96, 97, 98, 99, 100, 101)
WGMMA_DEFINE_BOTH(256, 128, 128, 129, 130, 131, 132, 133)

#undef WGMMA_DEFINE_BOTH
#undef WGMMA_DEFINE

}  // namespace jax_natten::ptx
