// Two-stage reductions over all queries of a grid, which every additional key needs: partial sums over chunks of the
// flattened positions (../common/workspace.h), then their sums in a fixed order.
#pragma once

#include "../common/workspace.h"
#include "launch.h"
#include "rows.cuh"

namespace jax_natten::naive {

// What a group of lanes works on in stage one: a chunk of queries of one additional key and key head. Items number the
// partial sums [batch, chunks, additional, kv_heads].
struct ChunkItem {
  bool valid;
  int64_t batch, additional;
  int kv_head;
  Box queries;
};

__device__ __forceinline__ ChunkItem find_chunk_item(int64_t ordinal, const Geometry& geometry, int64_t additional,
                                                     int kv_heads) {
  const int chunks = reduction_chunks(geometry.positions);
  ChunkItem item;
  item.valid = ordinal < geometry.batch * chunks * additional * kv_heads;
  ordinal = item.valid ? ordinal : 0;
  item.kv_head = int(ordinal % kv_heads);
  ordinal /= kv_heads;
  item.additional = ordinal % additional;
  ordinal /= additional;
  const int chunk = int(ordinal % chunks);
  item.batch = ordinal / chunks;
  const int64_t begin = chunk_begin(geometry.positions, chunk);
  item.queries = linear_box(begin, int(chunk_begin(geometry.positions, chunk + 1) - begin));
  return item;
}

// Stage two. Partial sums lie in [batch, chunks, rows, row_width]; the columns from `first` on of every row are summed
// over the chunks into [batch, rows, width].
struct Partials {
  int64_t batch, chunks, rows, row_width, first, width;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const Accumulator<T>* partials, T* sums, const __grid_constant__ Partials p,
                        int64_t first_block) {
  const int64_t ordinal = (first_block + blockIdx.x) * kThreads + threadIdx.x;
  if (ordinal >= p.batch * p.rows * p.width) return;
  const int64_t column = ordinal % p.width, row = ordinal / p.width % p.rows, batch = ordinal / p.width / p.rows;
  const Accumulator<T>* partial = partials + (batch * p.chunks * p.rows + row) * p.row_width + p.first + column;
  Accumulator<T> sum = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += partial[chunk * p.rows * p.row_width];
  narrow(sum, sums[ordinal]);
}

template <typename T>
cudaError_t sum_partials(const void* partials, void* sums, const Partials& p, cudaStream_t stream) {
  return launch_blocks(sum_partials_kernel<T>, blocks_for(p.batch * p.rows * p.width, kThreads), stream,
                       static_cast<const Accumulator<T>*>(partials), static_cast<T*>(sums), p);
}

}  // namespace jax_natten::naive
