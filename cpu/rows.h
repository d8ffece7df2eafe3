// Rows of tensors of any input dtype, converted to and from the accumulation type.
#pragma once

#include "cuda/common/params.h"
#include "simd.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// Smallest multiple of `unit` that is at least n.
JAX_NATTEN_INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Reals of a packed row of n elements: whole vectors.
template <typename Real>
JAX_NATTEN_INLINE int padded(int n) {
  return round_up(n, kLanes<Real>);
}

JAX_NATTEN_INLINE int element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Reads `count` elements from element `offset` on.
template <typename Real>
void load_row(DType dtype, const void* data, int64_t offset, int count, Real* __restrict row) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    const double* from = static_cast<const double*>(data) + offset;
    for (int i = 0; i < count; ++i) row[i] = from[i];
  } else if (dtype == DType::kFloat32) {
    const float* from = static_cast<const float*>(data) + offset;
    for (int i = 0; i < count; ++i) row[i] = from[i];
  } else if (dtype == DType::kFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
    for (int i = 0; i < count; ++i) row[i] = float_of_float16(from[i]);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
    for (int i = 0; i < count; ++i) row[i] = float_of_bfloat16(from[i]);
  }
}

// Writes factor * row.
template <typename Real>
void store_row(DType dtype, void* data, int64_t offset, int count, const Real* __restrict row, Real factor = 1) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    double* to = static_cast<double*>(data) + offset;
    for (int i = 0; i < count; ++i) to[i] = factor * row[i];
  } else if (dtype == DType::kFloat32) {
    float* to = static_cast<float*>(data) + offset;
    for (int i = 0; i < count; ++i) to[i] = factor * row[i];
  } else if (dtype == DType::kFloat16) {
    uint16_t* to = static_cast<uint16_t*>(data) + offset;
    for (int i = 0; i < count; ++i) to[i] = float16_of_float(factor * row[i]);
  } else {
    uint16_t* to = static_cast<uint16_t*>(data) + offset;
    for (int i = 0; i < count; ++i) to[i] = bfloat16_of_float(factor * row[i]);
  }
}

// A scratch buffer that is handed out piece by piece, each piece aligned to cache lines. Without a base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename T>
  JAX_NATTEN_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

  JAX_NATTEN_INLINE size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
