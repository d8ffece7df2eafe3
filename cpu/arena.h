// Scratch memory of a task.
#pragma once

#include "simd.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// A scratch buffer that is handed out piece by piece, each piece aligned to cache lines and followed by room for the
// rest of a vector. Without a base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename T>
  JAX_NATTEN_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (size_t(count) * sizeof(T) + kVectorBytes + 63) / 64 * 64;
    return piece;
  }

  JAX_NATTEN_INLINE size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
