// The functions of cuda/common/mma.h, on the emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_natten::ptx {

namespace emulated {

// kCount matrices; lanes 8 m .. 8 m + 7 give the rows of matrix m.
template <int kCount, bool kTransposed>
inline void load_matrix(const char* what, uint32_t* r, uint32_t address, emulator::Where where) {
  struct Operand {
    uint32_t address, *registers;
  } operand = {address, r};
  emulator::meet_lanes(
      what, ~0u, &operand,
      [](void** operands, uint32_t) {
        for (int matrix = 0; matrix < kCount; ++matrix) {
          uint16_t elements[8][8];
          for (int row = 0; row < 8; ++row) {
            const uint8_t* from =
                emulator::shared_bytes(static_cast<Operand*>(operands[8 * matrix + row])->address, 16, 16, "ldmatrix");
            if (from == nullptr) return;
            memcpy(elements[row], from, 16);
          }
          for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = lane % 4 * 2;
            const uint32_t low = kTransposed ? elements[j][i] : elements[i][j];
            const uint32_t high = kTransposed ? elements[j + 1][i] : elements[i][j + 1];
            static_cast<Operand*>(operands[lane])->registers[matrix] = low | high << 16;
          }
        }
      },
      where);
}

// To float, toward zero: so do tensor cores round what they add up, which a long sum of products must not rely on.
inline float truncated(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  bits &= ~((uint64_t(1) << 29) - 1);
  memcpy(&x, &bits, 8);
  return float(x);
}

struct MmaOperand {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Of lane l, the registers of A hold (row, column) = (l / 4 + 8 (r % 2), w (l % 4) + 4 w (r / 2)) and, with two
// elements to a register (w = 2), their right neighbors; those of B (row, column) = (w (l % 4) + 4 w r, l / 4).
template <int kDepth, typename ToFloats>
inline void multiply(void** operands, ToFloats to_floats) {
  constexpr int kWidth = kDepth == 16 ? 2 : 1;  // elements of a register
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* operand = static_cast<MmaOperand*>(operands[lane]);
    const int row = lane / 4, column = lane % 4 * kWidth;
    for (int r = 0; r < 4; ++r) to_floats(operand->a[r], &a[row + 8 * (r % 2)][column + 4 * kWidth * (r / 2)], 1);
    for (int r = 0; r < 2; ++r) to_floats(operand->b[r], &b[column + 4 * kWidth * r][row], 8);
  }
  double d[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += double(a[i][k]) * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* to = static_cast<MmaOperand*>(operands[lane])->d;
    for (int e = 0; e < 4; ++e) to[e] = truncated(to[e] + d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2]);
  }
}

template <typename T>
inline void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperand operand = {d, a, {b0, b1}};
  emulator::meet_lanes(
      "mma", ~0u, &operand,
      [](void** operands, uint32_t) {
        multiply<16>(operands, [](uint32_t pair, float* to, int step) {
          T values[2];
          memcpy(values, &pair, 4);
          to[0] = values[0];
          to[step] = values[1];
        });
      },
      emulator::Where::here());
}

}  // namespace emulated

inline void load_matrix_x4(uint32_t (&r)[4], uint32_t address, emulator::Where where = emulator::Where::here()) {
  emulated::load_matrix<4, false>("ldmatrix", r, address, where);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address,
                                      emulator::Where where = emulator::Where::here()) {
  emulated::load_matrix<4, true>("ldmatrix.trans", r, address, where);
}

template <typename T>
inline void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma<T>(d, a, b0, b1);
}
template <typename T>
inline void mma_from_zero(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  d[0] = d[1] = d[2] = d[3] = 0;
  emulated::mma<T>(d, a, b0, b1);
}

inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  return finite ? (bits + 0x1000) & ~uint32_t(0x1FFF) : bits;
}

inline void mma_tf32(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::MmaOperand operand = {d, a, {b0, b1}};
  emulator::meet_lanes(
      "mma", ~0u, &operand,
      [](void** operands, uint32_t) {
        // What is not rounded to tf32 must not be multiplied: the hardware ignores the lower bits.
        emulated::multiply<8>(operands, [](uint32_t bits, float* to, int) {
          bits &= ~uint32_t(0x1FFF);
          memcpy(to, &bits, 4);
        });
      },
      emulator::Where::here());
}

inline void mma_tf32_from_zero(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  d[0] = d[1] = d[2] = d[3] = 0;
  mma_tf32(d, a, b0, b1);
}

inline void keep_order(float*) {}

}  // namespace jax_natten::ptx
