// Asynchronous copies from global to shared memory (sm_80): 4, 8 or 16 bytes per thread, the tail filled with zeros.
// Addresses of shared memory are 32-bit.
#pragma once

#include <cstdint>

namespace jax_natten::ptx {

// Copies `bytes` (0 .. kSize) bytes, and zeros after them up to kSize. Both addresses are multiples of kSize. Nothing
// is read if `bytes` is 0. Copies of 16 bytes go past the L1 cache.
template <int kSize>
__device__ __forceinline__ void cp_async(uint32_t destination, const void* source, int bytes);

template <>
__device__ __forceinline__ void cp_async<16>(uint32_t destination, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes)
               : "memory");
}

template <>
__device__ __forceinline__ void cp_async<8>(uint32_t destination, const void* source, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(destination), "l"(source), "r"(bytes) : "memory");
}

template <>
__device__ __forceinline__ void cp_async<4>(uint32_t destination, const void* source, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(bytes) : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Blocks until at most kPending of this thread's latest groups are under way. Other threads see the copied bytes after
// a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace jax_natten::ptx
