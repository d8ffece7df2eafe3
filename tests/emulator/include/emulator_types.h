// Qualifiers, built-in variables, vector types and functions of CUDA C++.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmath>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  operator emulator::Index() const { return {x, y, z}; }
};

#define EMULATOR_VECTORS(TYPE, NAME)                                                      \
  struct alignas(2 * sizeof(TYPE)) NAME##2 { TYPE x, y; };                                \
  struct NAME##3 { TYPE x, y, z; };                                                       \
  struct alignas(sizeof(TYPE) == 8 ? 16 : 4 * sizeof(TYPE)) NAME##4 { TYPE x, y, z, w; }; \
  inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return {x, y}; }                        \
  inline NAME##3 make_##NAME##3(TYPE x, TYPE y, TYPE z) { return {x, y, z}; }             \
  inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
EMULATOR_VECTORS(long long, longlong)
EMULATOR_VECTORS(unsigned long long, ulonglong)
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)
#undef EMULATOR_VECTORS

// ---- synchronisation

inline void __syncthreads(emulator::Where where = emulator::Where::here()) { emulator::sync_threads(where); }
inline void __syncwarp(uint32_t mask = ~0u, emulator::Where where = emulator::Where::here()) {
  emulator::meet_lanes("__syncwarp", mask, nullptr, nullptr, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::interruption(); }
[[noreturn]] inline void __trap() {
  emulator::fail("trap");
  __builtin_abort();
}

// ---- shuffles and votes

namespace emulator {

// source(lane) names the lane whose value a lane gets; a lane outside the mask or the width leaves its own.
template <typename T>
struct Shuffle {
  T value, result;
  int source;
};

template <typename T>
T shuffle(const char* what, uint32_t mask, T value, int source, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle<T> mine = {value, value, source};
  meet_lanes(
      what, mask, &mine,
      [](void** operands, uint32_t mask) {
        for (int i = 0; i < 32; ++i) {
          if (!(mask >> i & 1)) continue;
          auto* to = static_cast<Shuffle<T>*>(operands[i]);
          if (!(mask >> to->source & 1))
            return fail("shuffle: lane %d reads lane %d, which takes no part", i, to->source);
          to->result = static_cast<Shuffle<T>*>(operands[to->source])->value;
        }
      },
      where);
  return mine.result;
}

inline uint32_t ballot(uint32_t mask, bool vote, Where where) {
  struct Vote {
    bool vote;
    uint32_t result;
  } mine = {vote, 0};
  meet_lanes(
      "vote", mask, &mine,
      [](void** operands, uint32_t mask) {
        uint32_t result = 0;
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) result |= uint32_t(static_cast<Vote*>(operands[i])->vote) << i;
        }
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) static_cast<Vote*>(operands[i])->result = result;
        }
      },
      where);
  return mine.result;
}

inline uint32_t reduce_or(uint32_t mask, uint32_t value, Where where) {
  struct Value {
    uint32_t value, result;
  } mine = {value, 0};
  meet_lanes(
      "reduction", mask, &mine,
      [](void** operands, uint32_t mask) {
        uint32_t result = 0;
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) result |= static_cast<Value*>(operands[i])->value;
        }
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) static_cast<Value*>(operands[i])->result = result;
        }
      },
      where);
  return mine.result;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, emulator::Where where = emulator::Where::here()) {
  const int lane = emulator::lane();
  return emulator::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, emulator::Where where = emulator::Where::here()) {
  const int lane = emulator::lane(), source = lane ^ bits;
  return emulator::shuffle("__shfl_xor_sync", mask, value, source / width == lane / width ? source : lane, where);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32, emulator::Where where = emulator::Where::here()) {
  const int lane = emulator::lane();
  return emulator::shuffle("__shfl_up_sync", mask, value, lane % width >= delta ? lane - delta : lane, where);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32, emulator::Where where = emulator::Where::here()) {
  const int lane = emulator::lane();
  return emulator::shuffle("__shfl_down_sync", mask, value, lane % width + delta < width ? lane + delta : lane, where);
}
inline uint32_t __ballot_sync(uint32_t mask, bool vote, emulator::Where where = emulator::Where::here()) {
  return emulator::ballot(mask, vote, where);
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, emulator::Where where = emulator::Where::here()) {
  return emulator::reduce_or(mask, value, where);
}
inline int __any_sync(uint32_t mask, bool vote, emulator::Where where = emulator::Where::here()) {
  return emulator::ballot(mask, vote, where) != 0;
}
inline int __all_sync(uint32_t mask, bool vote, emulator::Where where = emulator::Where::here()) {
  return emulator::ballot(mask, !vote, where) == 0;
}

// ---- arithmetic and memory

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <typename T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(uint32_t(x)); }
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline uint32_t __brev(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return uint32_t(uint64_t(x) * y >> 32); }
inline uint64_t __umul64hi(uint64_t x, uint64_t y) { return uint64_t(static_cast<unsigned __int128>(x) * y >> 64); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t code = selector >> 4 * i & 15, byte = uint32_t(bytes >> 8 * (code & 7) & 255);
    result |= (code & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}
inline size_t __cvta_generic_to_shared(const void* pointer) { return emulator::shared_address(pointer); }
