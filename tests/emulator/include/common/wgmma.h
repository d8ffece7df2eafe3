// The functions of cuda/common/wgmma.h, on the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace jax_natten::ptx {

enum class Swizzle : uint64_t { k128Bytes = 1, k64Bytes = 2 };

inline uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(swizzle) << 62;
}

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit(emulator::Where where = emulator::Where::here()) { emulator::wgmma_commit(where); }
template <int kPending>
inline void wgmma_wait(emulator::Where where = emulator::Where::here()) {
  emulator::wgmma_wait(kPending, where);
}

template <int kCount>
inline void pin(float (&)[kCount]) {}
template <int kCount>
inline void pin(uint32_t (&)[kCount]) {}

template <typename T, int kColumns>
struct Wgmma {
  static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 256, "wgmma has 8, 16, .. 256 columns");
  static constexpr bool kHalf = std::is_same_v<T, __half>;

  static void shared(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate,
                     emulator::Where where = emulator::Where::here()) {
    emulator::wgmma({d, nullptr, a, b, kColumns, kHalf, accumulate}, where);
  }
  static void registers(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                        emulator::Where where = emulator::Where::here()) {
    emulator::wgmma({d, a, 0, b, kColumns, kHalf, true}, where);
  }
};

}  // namespace jax_natten::ptx
