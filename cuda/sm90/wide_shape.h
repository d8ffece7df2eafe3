// What the "wide" kernel (wide_forward.cuh) is compiled for. Plain code without CUDA.
#pragma once

namespace jax_natten::sm90 {

// Compile-time shape of the kernel for a head dimension; smaller head dimensions are padded with zeros by the TMA.
struct WideShape {
  int dim;
  int keys;         // columns of a key tile
  int stages;       // of the key and value rings
  int query_slots;  // query tiles in shared memory
  int chunk;        // channels of a shared-memory row, which is one swizzle span of 128 or 64 bytes

  constexpr int chunks() const { return dim / chunk; }
  constexpr int row_bytes() const { return 2 * chunk; }
};

constexpr WideShape wide_shape(int dim) {
  return dim == 32    ? WideShape{32, 128, 4, 2, 32}
         : dim == 64  ? WideShape{64, 128, 3, 2, 64}
         : dim == 96  ? WideShape{96, 128, 2, 2, 32}
         : dim == 128 ? WideShape{128, 128, 2, 2, 64}
         : dim == 192 ? WideShape{192, 96, 2, 1, 64}
                      : WideShape{256, 64, 2, 1, 64};
}

constexpr int kWideGroups = 2;      // consumer warpgroups
constexpr int kWideGroupRows = 64;  // queries of each
constexpr int kWideThreads = 128 * (kWideGroups + 1);

}  // namespace jax_natten::sm90
