// Copies of the unfused kernels between global and shared memory.
#pragma once

#include "../common/ptx.h"
#include "unfused_tile.cuh"

namespace jax_natten::sm80 {

// CTAs of 8 warps per multiprocessor that the registers of a kernel for rows of `bytes` must leave room for.
constexpr int min_blocks(int bytes) { return bytes <= 64 ? 3 : bytes <= 256 ? 2 : 1; }

template <typename T>
__device__ __forceinline__ uint32_t load_element(const void* source) {
  if constexpr (sizeof(T) == 2) {
    return *static_cast<const uint16_t*>(source);
  } else {
    return *static_cast<const uint32_t*>(source);
  }
}

template <typename T>
__device__ __forceinline__ void store_element(void* destination, uint32_t bits) {
  if constexpr (sizeof(T) == 2) {
    *static_cast<uint16_t*>(destination) = uint16_t(bits);
  } else {
    *static_cast<uint32_t*>(destination) = bits;
  }
}

template <typename T>
__device__ __forceinline__ uint32_t load_shared_element(uint32_t address) {
  if constexpr (sizeof(T) == 2) {
    return ptx::load_short(address);
  } else {
    return ptx::load_word(address);
  }
}

template <typename T>
__device__ __forceinline__ void store_shared_element(uint32_t address, uint32_t bits) {
  if constexpr (sizeof(T) == 2) {
    ptx::store_short(address, uint16_t(bits));
  } else {
    ptx::store_word(address, bits);
  }
}

// Copies bytes begin .. end of a 16-byte chunk, element by element and at once, and zeros around them.
template <typename T>
__device__ __forceinline__ void copy_chunk_by_elements(uint32_t destination, const char* source, int begin, int end) {
#pragma unroll 1
  for (int i = 0; i < 16; i += sizeof(T)) {
    store_shared_element<T>(destination + i, i >= begin && i < end ? load_element<T>(source + i) : 0);
  }
}

// ---- tables

struct SharedTables {
  const UnfusedTables& common;
  const ListedColumn* additional;

  __device__ __forceinline__ SharedTables(const UnfusedParams& p, uint8_t* memory)
      : common(*reinterpret_cast<const UnfusedTables*>(memory + p.layout.tables)),
        additional(reinterpret_cast<const ListedColumn*>(memory + p.layout.additional)) {}

  // The listed columns of a slab.
  __device__ __forceinline__ const ListedColumn* columns(const Slab& slab) const {
    return slab.additional < 0 ? common.listed : additional;
  }
};

template <typename T>
__device__ __forceinline__ void fill_tables(const UnfusedParams& p, uint8_t* memory) {
  auto& tables = *reinterpret_cast<UnfusedTables*>(memory + p.layout.tables);
  auto* additional = reinterpret_cast<ListedColumn*>(memory + p.layout.additional);
  for (int i = threadIdx.x; i < p.mask_layout.words; i += blockDim.x) tables.mask[i] = p.tables.mask[i];
  for (int i = threadIdx.x; i < kMostListed; i += blockDim.x) {
    tables.listed[i] = p.tables.listed[i];
    tables.listed_bias[i] = p.tables.listed_bias[i];
  }
  for (int i = threadIdx.x; i < kMostAdditionalListed; i += blockDim.x) {
    additional[i] = {uint16_t(i * p.vector_pitch / 16), uint16_t(i * sizeof(T))};
  }
}

// Two columns from an even one on.
struct ColumnPair {
  ListedColumn column[2];

  __device__ __forceinline__ explicit ColumnPair(const ListedColumn* first) {
    const uint2 words = *reinterpret_cast<const uint2*>(first);
    column[0] = {uint16_t(words.x), uint16_t(words.x >> 16)};
    column[1] = {uint16_t(words.y), uint16_t(words.y >> 16)};
  }
};

// ---- slabs of columns

// Where a row of a slab lies, relative to the first.
struct SlabRow {
  int position;
  uint32_t coordinates;  // 10 bits each

  __device__ __forceinline__ int coordinate(int a) const { return coordinates >> 10 * a & 1023; }
};
static_assert(sizeof(SlabRow) == kSlabRowBytes, "the host reserves kSlabRowBytes");

__device__ __forceinline__ void find_slab_rows(const UnfusedParams& p, SlabRow* slab_rows) {
  const TiledAxis* axes = p.schedule.axes;
  for (int n = threadIdx.x; n < p.slab_size; n += blockDim.x) {
    int x[kMaxRank];
    x[0] = p.by_slab[0].divide(p.by_slab[1].divide(n, x[2]), x[1]);
    SlabRow row = {0, 0};
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      row.position += x[a] * axes[a].dilation * int(p.position_step[a]);
      row.coordinates |= uint32_t(x[a]) << 10 * a;
    }
    slab_rows[n] = row;
  }
}

// Whether a row of a slab is one of the tile's columns.
__device__ __forceinline__ bool in_tile(const UnfusedParams& p, const QueryTile& tile, const Slab& slab,
                                        const SlabRow& row) {
  bool inside = true;
#pragma unroll
  for (int a = 0; a < kMaxRank; ++a) {
    if (a < p.first_axis) continue;
    inside = inside && slab.begin[a] + row.coordinate(a) < tile.extent[a];
  }
  return inside;
}

__device__ __forceinline__ int64_t first_position(const UnfusedParams& p, const QueryTile& tile, const Slab& slab) {
  const int first[kMaxRank] = {tile.key[0] + slab.begin[0], tile.key[1] + slab.begin[1], tile.key[2] + slab.begin[2]};
  return position_of(p, tile, first);
}

// All threads start to copy a slab of one head of the columns. What is not in the tile becomes zero, and so do the
// channels past the last, up to a whole step.
template <typename T>
__device__ __forceinline__ void copy_slab(const UnfusedParams& p, const QueryTile& tile, const Slab& slab, int head,
                                          const SlabRow* slab_rows, uint32_t destination) {
  const bool additional = slab.additional >= 0;
  const Vectors& columns = additional ? p.additional : p.columns;
  const int64_t first = additional ? slab.additional : first_position(p, tile, slab);
  const int64_t step = int64_t(columns.heads) * p.vector_bytes;
  const char* source = columns.data + (tile.batch * columns.positions + first) * step + int64_t(head) * p.vector_bytes;
  const bool aligned = columns.aligned;
  const int count = (additional ? p.additional_tile : p.slab_size) * p.by_vector_chunks.divisor;
#pragma unroll 2
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    int chunk;
    const int row = p.by_vector_chunks.divide(i, chunk);
    int position = row;
    bool inside = slab.additional + row < p.additional_count;
    if (!additional) {
      const SlabRow slab_row = slab_rows[row];
      position = slab_row.position;
      inside = in_tile(p, tile, slab, slab_row);
    }
    const int bytes = inside ? imin(imax(p.vector_bytes - 16 * chunk, 0), 16) : 0;
    const char* at = bytes > 0 ? source + position * step + 16 * chunk : columns.data;
    if (aligned) {
      ptx::copy_async<16>(destination + row * p.vector_pitch + 16 * chunk, at, bytes > 0);
    } else {
      copy_chunk_by_elements<T>(destination + row * p.vector_pitch + 16 * chunk, at, 0, bytes);
    }
  }
}

// ---- runs of weights

// A staged run: bytes begin .. end of 16-byte chunks that begin at `chunks`.
struct Run {
  char* chunks;
  int base;             // of the stage's addresses, see place_run()
  uint16_t begin, end;  // equal: empty
};
static_assert(sizeof(Run) == kRunBytes, "the host reserves kRunBytes");

// The run of `range` in the query's row `weights_row` of weights, staged in row `stage_row`. The weight in slot s is
// found at base + (s - slot) * sizeof(T) from the beginning of the stage.
template <typename T>
__device__ __forceinline__ Run place_run(const UnfusedParams& p, int64_t weights_row, SlotRange range, int stage_row,
                                         int slot) {
  char* const first = p.weights + (weights_row * p.slots + range.first) * int64_t(sizeof(T));
  const int begin = int(reinterpret_cast<uintptr_t>(first) % 16);
  Run run;
  run.chunks = first - begin;
  run.base = stage_row * p.run_pitch + begin + (slot - range.first) * int(sizeof(T));
  run.begin = uint16_t(begin);
  run.end = uint16_t(begin + range.count * int(sizeof(T)));
  return run;
}

// Threads first, first + step, .. start to copy `count` runs to the stage.
template <typename T>
__device__ __forceinline__ void copy_runs(const UnfusedParams& p, const Run* runs, int count, uint32_t stage, int first,
                                          int step) {
  for (int i = first; i < count * p.by_run_chunks.divisor; i += step) {
    int chunk;
    const int row = p.by_run_chunks.divide(i, chunk);
    const Run run = runs[row];
    if (run.begin == run.end || 16 * chunk >= run.end) continue;
    char* const source = run.chunks + 16 * chunk;
    const uint32_t destination = stage + row * p.run_pitch + 16 * chunk;
    // Neighbors of a run are copied too, but nothing outside the array.
    if (source >= p.weights && source + 16 <= p.weights_end) {
      ptx::copy_async<16>(destination, source, true);
    } else {
      copy_chunk_by_elements<T>(destination, source, imax(run.begin - 16 * chunk, 0), imin(run.end - 16 * chunk, 16));
    }
  }
}

// Writes bytes begin .. end of a 16-byte chunk, by as few stores as their alignment allows.
template <typename T>
__device__ __forceinline__ void write_part_of_chunk(char* destination, uint32_t source, int begin, int end) {
  const auto write_to = [&](int bytes) {
    if (bytes == 2) store_element<uint16_t>(destination + begin, ptx::load_short(source + begin));
    if (bytes == 4) store_element<uint32_t>(destination + begin, ptx::load_word(source + begin));
    if (bytes == 8) {
      *reinterpret_cast<uint2*>(destination + begin) =
          make_uint2(ptx::load_word(source + begin), ptx::load_word(source + begin + 4));
    }
    begin += bytes;
  };
#pragma unroll
  for (int bytes = sizeof(T); bytes < 16; bytes *= 2) {
    if ((begin & bytes) && begin + bytes <= end) write_to(bytes);
  }
#pragma unroll
  for (int bytes = 8; bytes >= int(sizeof(T)); bytes /= 2) {
    if (begin + bytes <= end) write_to(bytes);
  }
}

// A warp writes its 16 staged runs to global memory: first all whole chunks, then both ends of every run.
template <typename T>
__device__ __forceinline__ void write_runs(const UnfusedParams& p, const Run* runs, uint32_t stage, int lane) {
  for (int i = lane; i < kPartRows * p.by_run_chunks.divisor; i += 32) {
    int chunk;
    const int row = p.by_run_chunks.divide(i, chunk);
    const Run& run = runs[row];
    if (16 * chunk < run.begin || 16 * chunk + 16 > run.end) continue;
    *reinterpret_cast<uint4*>(run.chunks + 16 * chunk) = ptx::load_vector(stage + row * p.run_pitch + 16 * chunk);
  }
  const int row = lane / 2;
  const Run run = runs[row];
  const bool first = lane % 2 == 0, one_chunk = run.end <= 16;
  const int chunk = first ? 0 : (run.end - 1) / 16;
  const int begin = chunk == 0 ? run.begin : 0, end = imin(run.end - 16 * chunk, 16);
  if (begin >= end || (begin == 0 && end == 16) || (one_chunk && !first)) return;
  write_part_of_chunk<T>(run.chunks + 16 * chunk, stage + row * p.run_pitch + 16 * chunk, begin, end);
}

}  // namespace jax_natten::sm80
