// Tiles of rows in shared memory that copies fill 16 bytes at a time and ldmatrix reads without bank conflicts.
#pragma once

#include <cstdint>

namespace jax_natten::sm80 {

// kRows rows of kRowBytes each. A row is cut into panels of 128 bytes (64 if its length is no multiple of 128), panel
// after panel of the whole tile. In a panel the 16-byte chunks of a row are permuted with the row's number, so that the
// same chunk of eight consecutive rows lies in eight different groups of banks.
//
// A tile begins at a multiple of 128 bytes. Then rows r and r + 8 are permuted alike, and a step of 32 bytes along the
// row is an exclusive or in a panel: addresses of fragments are found once, and moved by moved().
template <int kRows_, int kRowBytes_>
struct SharedTile {
  static constexpr int kRows = kRows_, kRowBytes = kRowBytes_;
  static constexpr int kPanelBytes = kRowBytes % 128 == 0 ? 128 : 64;
  static constexpr int kPanels = kRowBytes / kPanelBytes;
  static constexpr int kPanelChunks = kPanelBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kRowBytes % 64 == 0, "rows are made of panels");

  // Of a chunk of the first panel. Row: int, or unsigned where the compiler cannot see that it is not negative.
  template <typename Row>
  static __device__ __forceinline__ uint32_t place(Row row, int chunk) {
    const int turn = kPanelBytes == 128 ? row % 8 : row / 2 % 4;
    return row * kPanelBytes + (chunk ^ turn) * 16;
  }

  // Of any chunk.
  static __device__ __forceinline__ uint32_t place_of_chunk(int row, int chunk) {
    return chunk / kPanelChunks * (kRows * kPanelBytes) + place(row, chunk % kPanelChunks);
  }

  // An address in the first panel, `rows` (a multiple of 8) rows further and 32 * steps bytes along the row. The
  // address must lie in the first 32 bytes of its row.
  static __device__ __forceinline__ uint32_t moved(uint32_t address, int rows, int steps) {
    constexpr int kPanelSteps = kPanelBytes / 32;
    return (address ^ steps % kPanelSteps * 32) + steps / kPanelSteps * (kRows * kPanelBytes) + rows * kPanelBytes;
  }
};

}  // namespace jax_natten::sm80
