// The dtypes of tensors in memory, a vector at a time: conversion to and from the accumulation type.
#pragma once

#include "cuda/common/params.h"
#include "simd.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// Elements of 16-bit tensors. Other tensors hold the accumulation type itself.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct HalfVector {
  typedef uint16_t type __attribute__((vector_size(kVectorBytes / 2)));
};
using Halves = HalfVector::type;
using Words = Bits<float>;

// The conversions use integers, because XLA's threads flush denormal floats to zero.

JAX_NATTEN_INLINE Vec<float> widen(Words half, BFloat16) { return bit_cast<Vec<float>>(half << 16); }

JAX_NATTEN_INLINE Vec<float> widen(Words half, Float16) {
  const Words magnitude = (half & 0x7fff) << 13;
  const Words normal = magnitude + (112u << 23);
  const Words special = magnitude + (224u << 23);  // infinities and NaNs keep the largest exponent
  // A denormal's mantissa under the exponent of the smallest normal number, which is then subtracted.
  const Words denormal = bit_cast<Words>(bit_cast<Vec<float>>(magnitude + (113u << 23)) - 0x1p-14f);
  const Words finite = magnitude < (1u << 23) ? denormal : normal;
  const Words bits = magnitude >= (31u << 23) ? special : finite;
  return bit_cast<Vec<float>>(bits | (half & 0x8000) << 16);
}

JAX_NATTEN_INLINE Words narrow(Vec<float> value, BFloat16) {
  const Words bits = bit_cast<Words>(value);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = (bits >> 16) | 0x40;
  return (bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
}

JAX_NATTEN_INLINE Words narrow(Vec<float> value, Float16) {
  const Words bits = bit_cast<Words>(value);
  const Words magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves a denormal's mantissa, rounded, in the low bits.
  const Words denormal = bit_cast<Words>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  const Words infinity = Words{} + 0x7c00;
  const Words special = magnitude > 0x7f800000 ? infinity + 0x200 : infinity;
  const Words finite = magnitude < (113u << 23) ? denormal : normal;
  return ((bits >> 16) & 0x8000) | (magnitude >= (143u << 23) ? special : finite);
}

JAX_NATTEN_INLINE Vec<float> load_as_real(const float* from) { return load(from); }
JAX_NATTEN_INLINE Vec<double> load_as_real(const double* from) { return load(from); }

template <typename T>
JAX_NATTEN_INLINE Vec<float> load_as_real(const T* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return widen(__builtin_convertvector(halves, Words), T());
}

JAX_NATTEN_INLINE void store_real(float* to, Vec<float> value) { store(to, value); }
JAX_NATTEN_INLINE void store_real(double* to, Vec<double> value) { store(to, value); }

template <typename T>
JAX_NATTEN_INLINE void store_real(T* to, Vec<float> value) {
  const Halves halves = __builtin_convertvector(narrow(value, T()), Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// Fewer elements than a vector has; the other lanes are zero.
template <typename Real, typename T>
JAX_NATTEN_INLINE Vec<Real> load_some_as_real(const T* from, int count) {
  T elements[kLanes<Real>] = {};
  for (int i = 0; i < count; ++i) elements[i] = from[i];
  return load_as_real(elements);
}

template <typename Real, typename T>
JAX_NATTEN_INLINE void store_some_real(T* to, int count, Vec<Real> value) {
  T elements[kLanes<Real>];
  store_real(elements, value);
  for (int i = 0; i < count; ++i) to[i] = elements[i];
}

template <typename Real, typename T>
JAX_NATTEN_INLINE Real as_real(T element) {
  if constexpr (sizeof(T) == sizeof(Real)) {
    return element;
  } else {
    return widen(Words{} + element.bits, T())[0];
  }
}

// Calls f(T()) with the element type of a dtype whose accumulation type is Real.
template <typename Real, typename F>
JAX_NATTEN_INLINE void with_storage(DType dtype, F f) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    f(double());
  } else if (dtype == DType::kFloat32) {
    f(float());
  } else if (dtype == DType::kFloat16) {
    f(Float16());
  } else {
    f(BFloat16());
  }
}

JAX_NATTEN_INLINE int element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Reals of a packed row of n elements: whole vectors.
template <typename Real>
JAX_NATTEN_INLINE int padded(int n) {
  return (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

// Asks for the cache lines of `count` elements, which need not exist; to_write: to be written.
template <bool to_write = false, typename T>
JAX_NATTEN_INLINE void prefetch(const T* elements, int count) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(elements);
  for (size_t byte = 0; byte < count * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + byte), to_write);
  }
}

// row = factor * `count` elements, and zeros up to a whole vector.
template <typename Real, typename T>
JAX_NATTEN_INLINE void load_row(const T* from, int count, Real* row, Real factor = 1) {
  constexpr int W = kLanes<Real>;
  int i = 0;
  for (; i + W <= count; i += W) store(row + i, factor * load_as_real(from + i));
  if (i < count) store(row + i, factor * load_some_as_real<Real>(from + i, count - i));
}

// The same from element `offset` of a tensor on.
template <typename Real>
JAX_NATTEN_INLINE void load_row(DType dtype, const void* data, int64_t offset, int count, Real* row) {
  with_storage<Real>(dtype,
                     [&](auto element) { load_row(static_cast<const decltype(element)*>(data) + offset, count, row); });
}

// Writes factor * row. Reads whole vectors of the row.
template <typename Real, typename T>
JAX_NATTEN_INLINE void store_row(T* to, int count, const Real* row, Real factor = 1) {
  constexpr int W = kLanes<Real>;
  int i = 0;
  for (; i + W <= count; i += W) store_real(to + i, factor * load(row + i));
  if (i < count) store_some_real<Real>(to + i, count - i, factor * load(row + i));
}

// The same to element `offset` of a tensor.
template <typename Real>
JAX_NATTEN_INLINE void store_row(DType dtype, void* data, int64_t offset, int count, const Real* row) {
  with_storage<Real>(dtype,
                     [&](auto element) { store_row(static_cast<decltype(element)*>(data) + offset, count, row); });
}

// Zeros in whole vectors.
template <typename Real>
JAX_NATTEN_INLINE void fill_zero(Real* row, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<Real>) store(row + i, Vec<Real>{});
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
