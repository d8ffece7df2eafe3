// The functions of cuda/common/ptx.h, on the emulator.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_natten::ptx {

using emulator::Where;

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

// ---- mbarrier

inline void barrier_init(uint64_t* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) { emulator::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expecting(uint64_t* barrier, int bytes) { emulator::barrier_arrive(barrier, bytes); }
inline bool barrier_test(uint64_t* barrier, uint32_t parity) { return emulator::barrier_test(barrier, parity); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity, Where where = Where::here()) {
  emulator::barrier_wait(barrier, parity, where);
}

// ---- named barriers

inline void named_barrier_sync(int id, int threads, Where where = Where::here()) {
  emulator::named_barrier(id, threads, true, where);
}
inline void named_barrier_arrive(int id, int threads, Where where = Where::here()) {
  emulator::named_barrier(id, threads, false, where);
}

// ---- cp.async

template <int kBytes>
inline void copy_async(uint32_t destination, const void* source, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::async_copy(destination, source, kBytes, valid ? kBytes : 0);
}
inline void copy_async_commit() { emulator::async_copy_commit(); }
template <int kPending>
inline void copy_async_wait() {
  emulator::async_copy_wait(kPending);
}
inline void copy_async_arrive(uint64_t* barrier) { emulator::async_copy_arrive(barrier); }

// ---- TMA

enum class CachePolicy : uint64_t { kNormal, kEvictFirst, kEvictLast };

inline void tma_load(uint32_t destination, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3,
                     int c4, CachePolicy) {
  emulator::tma_load(destination, map, barrier, {c0, c1, c2, c3, c4});
}
inline void tma_store(const CUtensorMap* map, uint32_t source, int c0, int c1, int c2, int c3, int c4) {
  emulator::tma_store(map, source, {c0, c1, c2, c3, c4});
}
inline void tma_store_commit() { emulator::tma_store_commit(); }
inline void tma_store_wait_read() { emulator::tma_store_wait_read(); }
inline void async_proxy_fence() { emulator::async_proxy_fence(); }

// ---- registers of a warpgroup

template <int kRegisters>
inline void release_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24, 32, .. 256");
}
template <int kRegisters>
inline void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24, 32, .. 256");
}

// ---- 8 x 8 matrices

inline void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                            Where where = Where::here()) {
  struct Operand {
    uint32_t address, values[4];
  } operand = {address, {a, b, c, d}};
  emulator::meet_lanes(
      "stmatrix", ~0u, &operand,
      [](void** operands, uint32_t) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          for (int row = 0; row < 8; ++row) {
            const uint32_t address = static_cast<Operand*>(operands[8 * matrix + row])->address;
            uint8_t* to = emulator::shared_bytes(address, 16, 16, "stmatrix");
            if (to == nullptr) return;
            emulator::generic_write(8 * matrix + row, address, 16);
            for (int i = 0; i < 4; ++i) {
              memcpy(to + 4 * i, &static_cast<Operand*>(operands[4 * row + i])->values[matrix], 4);
            }
          }
        }
      },
      where);
}

inline float2 load_pair(uint32_t address) {
  float2 v = {};
  if (const uint8_t* from = emulator::shared_bytes(address, 8, 8, "ld.shared.v2")) memcpy(&v, from, 8);
  return v;
}

inline uint4 load_vector(uint32_t address) {
  uint4 v = {};
  if (const uint8_t* from = emulator::shared_bytes(address, 16, 16, "ld.shared.v4")) memcpy(&v, from, 16);
  return v;
}

inline void store_vector(uint32_t address, uint4 v) {
  if (uint8_t* to = emulator::shared_bytes(address, 16, 16, "st.shared.v4")) memcpy(to, &v, 16);
}

inline uint32_t load_word(uint32_t address) {
  uint32_t word = 0;
  if (const uint8_t* from = emulator::shared_bytes(address, 4, 4, "ld.shared")) memcpy(&word, from, 4);
  return word;
}

inline void store_word(uint32_t address, uint32_t word) {
  if (uint8_t* to = emulator::shared_bytes(address, 4, 4, "st.shared")) memcpy(to, &word, 4);
}

inline uint16_t load_short(uint32_t address) {
  uint16_t element = 0;
  if (const uint8_t* from = emulator::shared_bytes(address, 2, 2, "ld.shared.u16")) memcpy(&element, from, 2);
  return element;
}

inline void store_short(uint32_t address, uint16_t element) {
  if (uint8_t* to = emulator::shared_bytes(address, 2, 2, "st.shared.u16")) memcpy(to, &element, 2);
}

// ---- arithmetic

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
inline float exp2_approximate(float x) { return flush(std::exp2(flush(x))); }
inline float log2_approximate(float x) { return std::log2(flush(x)); }
inline void compute_again(uint32_t&) {}
inline void schedule_after(float x) {
  if (x < 0) __trap();
}

template <typename T>
inline uint32_t pack(float low, float high) {
  return T(low).bits | uint32_t(T(high).bits) << 16;
}

template <typename T>
inline float2 unpack(uint32_t pair) {
  T x[2];
  memcpy(x, &pair, 4);
  return {float(x[0]), float(x[1])};
}

template <typename T>
inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  T x[2], y[2];
  memcpy(x, &a, 4);
  memcpy(y, &b, 4);
  return pack<T>(float(x[0]) * float(y[0]), float(x[1]) * float(y[1]));
}

}  // namespace jax_natten::ptx
