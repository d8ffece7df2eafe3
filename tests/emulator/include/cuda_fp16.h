// Stand-in for CUDA's half: storage and conversions.
#pragma once

#include "emulator_types.h"

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(emulator::float_to_half(x)) {}
  operator float() const { return emulator::half_to_float(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
typedef __half half;
typedef __half2 half2;
inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
