// Rows between global memory and tiles in shared memory.
#pragma once

#include <cstdint>

#include "../common/ptx.h"
#include "fused_params.h"
#include "shared_tile.cuh"

namespace jax_natten::sm80 {

// Address of the row of a batch element and head at position 0.
__device__ __forceinline__ char* first_row(const RowArray& array, int64_t batch, int head) {
  return static_cast<char*>(array.data) + batch * array.batch_step + int64_t(head) * array.bytes;
}

// Copies 16 bytes, of which only the first `bytes` exist, two by two. A call: only rows of an odd number of 16-bit
// channels need it, and it takes the compiler long wherever it is inlined.
inline __device__ __noinline__ void copy_pairs_of_bytes(uint32_t destination, const char* source, int bytes) {
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (2 * i < bytes) words[i / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(source + 2 * i)) << i % 2 * 16;
  }
  ptx::store_vector(destination, make_uint4(words[0], words[1], words[2], words[3]));
}

// The same in pieces of `unit` bytes: 2, 4 or 8, what the alignment of an array allows.
__device__ __forceinline__ void copy_pieces(uint32_t destination, const char* source, int bytes, int unit) {
  if (unit < 4) return copy_pairs_of_bytes(destination, source, bytes);
#pragma unroll 1
  for (int i = 0; i < 16; i += unit) {
    if (unit == 8) {
      ptx::copy_async<8>(destination + i, source + i, i < bytes);
    } else {
      ptx::copy_async<4>(destination + i, source + i, i < bytes);
    }
  }
}

// The same for any alignment.
__device__ __forceinline__ void copy_chunk(uint32_t destination, const char* source, int bytes, int unit) {
  if (unit == 16) {
    ptx::copy_async<16>(destination, source, bytes > 0);
  } else {
    copy_pieces(destination, source, bytes, unit);
  }
}

// Starts copies of rows into the tile at `destination`. position_of(row) is the position of a row, counted from the one
// at `rows`, or negative: then the row is filled with zeros, as is what the tile has beyond the array's channels. All
// kThreads threads take part. Rows that are not aligned to 4 bytes are copied at once.
template <class Tile, int kThreads, typename PositionOfRow>
__device__ __forceinline__ void copy_rows(uint32_t destination, const RowArray& array, const char* rows,
                                          PositionOfRow position_of) {
  constexpr int kRowsAtOnce = kThreads / Tile::kPanelChunks;
  static_assert(Tile::kRows % kRowsAtOnce == 0, "every thread must copy the same number of rows");
  const int first = threadIdx.x / Tile::kPanelChunks, chunk = threadIdx.x % Tile::kPanelChunks;
  const int bytes = array.bytes - 16 * chunk;
  rows += 16 * chunk;
  if (array.copy_bytes == 16) {
#pragma unroll
    for (int i = 0; i < Tile::kRows / kRowsAtOnce; ++i) {
      const int row = first + i * kRowsAtOnce, position = position_of(row);
      const uint32_t place = destination + Tile::place(row, chunk);
      const char* source = rows + int64_t(imax(position, 0)) * array.position_step;
#pragma unroll
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        ptx::copy_async<16>(place + panel * Tile::kRows * Tile::kPanelBytes, source + panel * Tile::kPanelBytes,
                            position >= 0 && panel * Tile::kPanelBytes < bytes);
      }
    }
  } else {
#pragma unroll 1
    for (int row = first; row < Tile::kRows; row += kRowsAtOnce) {
      const int position = position_of(row);
      const char* source = rows + int64_t(imax(position, 0)) * array.position_step;
#pragma unroll 1
      for (int panel = 0; panel < Tile::kPanels; ++panel) {
        const int existing = position < 0 ? 0 : bytes - panel * Tile::kPanelBytes;
        copy_pieces(destination + Tile::place(row, chunk) + panel * Tile::kRows * Tile::kPanelBytes,
                    source + panel * Tile::kPanelBytes, existing, array.copy_bytes);
      }
    }
  }
}

// One warp writes kCount rows of a tile, from `first` on, to global memory. Rows whose position is negative are left
// out. T: of one element.
template <class Tile, typename T, int kCount, typename PositionOfRow>
__device__ __forceinline__ void write_rows(uint32_t source, const RowArray& array, char* rows, int first, int lane,
                                           PositionOfRow position_of) {
  constexpr int kRowsAtOnce = 32 / Tile::kPanelChunks;
  const int chunk = lane % Tile::kPanelChunks;
#pragma unroll 1
  for (int row = first + lane / Tile::kPanelChunks; row < first + kCount; row += kRowsAtOnce) {
    const int position = position_of(row);
    if (position < 0) continue;
    char* destination = rows + int64_t(position) * array.position_step + 16 * chunk;
#pragma unroll 1
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int bytes = array.bytes - 16 * chunk - panel * Tile::kPanelBytes;
      if (bytes <= 0) break;
      const uint4 v = ptx::load_vector(source + Tile::place(row, chunk) + panel * Tile::kRows * Tile::kPanelBytes);
      char* at = destination + panel * Tile::kPanelBytes;
      if (array.copy_bytes == 16) {
        *reinterpret_cast<uint4*>(at) = v;
        continue;
      }
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 16 / int(sizeof(T)); ++i) {
        if (i * int(sizeof(T)) >= bytes) continue;
        if (sizeof(T) == 4) {
          reinterpret_cast<uint32_t*>(at)[i] = words[i % 4];
        } else {
          reinterpret_cast<uint16_t*>(at)[i] = uint16_t(words[i / 2] >> i % 2 * 16);
        }
      }
    }
  }
}

}  // namespace jax_natten::sm80
