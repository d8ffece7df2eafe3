// Fused backward, bias pass: the gradient of the relative position bias, d_bias[distance] = sum of d_scores over the
// pairs of a query and a key that far apart.
//
// A CTA works on some query tiles (a chunk) of a head and of the batch elements that share its bias table. It finds
// d_scores as the query pass does and puts them into shared memory. There every distance that occurs between the tiles
// has one thread, which adds up its pairs in order and adds the sum to the CTA's own partial table. A second stage adds
// the partial tables. So there are no atomics, and the order of all sums is fixed.
#pragma once

#include "fused_backward.cuh"

namespace jax_natten::sm80 {

template <class Traits>
struct BiasShared : Traits::Shared {
  static constexpr int kStep = Traits::kColumns + 8;  // so that the rows of a fragment lie in different banks
  float d_scores[Traits::kRows * kStep];
  int row_of_query[Traits::kRows];  // row-major in the query tile
};

template <class Traits>
struct BackwardBias : FusedBackward<Traits> {
  using Base = FusedBackward<Traits>;
  using typename Base::Columns;
  using typename Base::Scores;
  using Shared = BiasShared<Traits>;
  using Base::lane;
  using Base::params;
  using Base::tile;
  static constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns, kThreads = Traits::kThreads;
  static_assert(Traits::kShape.blocks == 1 && Traits::kShape.chunk == kColumns,
                "d_scores are those of 16 rows and a tile");
  static_assert(sizeof(Shared) <= kSharedBytesOfAnyDevice, "must fit into the shared memory of every device");

  Shared& smem;

  __device__ BackwardBias(const BackwardParams& params, Shared& smem) : Base(params, smem), smem(smem) {}

  __device__ void run() {
    // Blocks number the partial tables [chunk, bias batch, head].
    const int tables = params.bias_batch * params.heads, chunk = int(blockIdx.x) / tables;
    const int head = int(blockIdx.x) % params.heads, bias_batch = int(blockIdx.x) % tables / params.heads;
    float* const table = params.bias_partials + blockIdx.x * params.bias_size;
    for (int64_t i = threadIdx.x; i < params.bias_size; i += kThreads) table[i] = 0;
    find_rows();
    for (int i = chunk; i < params.bias_share * params.tiles_of_head; i += params.chunks) {
      const int batch = bias_batch * params.bias_share + i / params.tiles_of_head;
      __syncthreads();  // nobody reads the tile before any more
      const int tile_of_head = i % params.tiles_of_head;
      if (!smem.tables.template fill<kThreads>(params,
                                               (batch * params.heads + head) * params.tiles_of_head + tile_of_head)) {
        continue;
      }
      __syncthreads();
      add_query_tile(table);
    }
  }

 private:
  __device__ __forceinline__ void find_rows() {
    const TiledAxis* axes = params.schedule.axes;
    for (int r = threadIdx.x; r < kRows; r += kThreads) {
      const TilePlace place = params.places.rows[r];
      if (place.exists()) {
        smem.row_of_query[(place[0] * axes[1].query_tile + place[1]) * axes[2].query_tile + place[2]] = r;
      }
    }
  }

  __device__ __forceinline__ void add_query_tile(float* table) {
    this->copy_staying_rows();
    typename Base::OfRows row_lse, row_delta;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int position = smem.tables.row_position(params, this->row_of_thread(0, i));
      const int64_t at = this->index(imax(position, 0), tile.head);
      row_lse[0][i] = position < 0 ? 0 : params.lse[at] * kLog2E;
      row_delta[0][i] = position < 0 ? 0 : params.bias_delta.at(tile.batch, tile.head, position);
    }
    Columns columns = this->first_columns();
    do {
      this->copy_columns(columns, 0);
      ptx::copy_async_commit();
      ptx::copy_async_wait<0>();
      __syncthreads();
      Scores probs, d_scores;
      const TileClass tile_class = this->classify(columns);
      if (tile_class != TileClass::kSkip) {
        this->find_d_scores(columns, tile_class, 0, 0, row_lse, row_delta, probs, d_scores);
      } else {
#pragma unroll
        for (float& d_score : d_scores[0]) d_score = 0;
      }
      store(d_scores);
      __syncthreads();
      add_distances(columns, table);
    } while (columns.cursor.next(params.schedule.axes, tile.extent));
  }

  __device__ __forceinline__ void store(const Scores& d_scores) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* row = &smem.d_scores[this->row_of_thread(0, i) * Shared::kStep + lane % 4 * 2];
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        row[8 * j] = d_scores[0][4 * j + 2 * i];
        row[8 * j + 1] = d_scores[0][4 * j + 2 * i + 1];
      }
    }
  }

  // Distances between the query tile and the key tile form a box.
  __device__ __forceinline__ void add_distances(const Columns& columns, float* table) {
    const TiledAxis* axes = params.schedule.axes;
    int nearest[kMaxRank], sides[kMaxRank];
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      nearest[a] = tile.key[a] + columns.cursor.begin[a] - tile.query[a] - (axes[a].query_tile - 1);
      sides[a] = axes[a].query_tile + axes[a].key_tile - 1;
    }
    for (int n = threadIdx.x; n < sides[0] * sides[1] * sides[2]; n += kThreads) {
      const int place[kMaxRank] = {n / (sides[1] * sides[2]), n / sides[2] % sides[1], n % sides[2]};
      int64_t entry = 0;
      Interval queries[kMaxRank];  // of the tile, whose key that far away is in the key tile
      bool exists = true;
#pragma unroll
      for (int a = 0; a < kMaxRank; ++a) {
        const int shifted = nearest[a] + place[a] + axes[a].window - 1;
        exists = exists && shifted >= 0 && shifted < 2 * axes[a].window - 1;
        entry += int64_t(shifted) * params.steps.bias[a];
        const int last = axes[a].query_tile - 1 - place[a];  // query of the key tile's first key
        queries[a] = {imax(last, 0), imin(last + axes[a].key_tile, axes[a].query_tile)};
      }
      if (exists) table[entry] += sum_of_distance(place, queries);
    }
  }

  __device__ __forceinline__ float sum_of_distance(const int (&place)[kMaxRank],
                                                   const Interval (&queries)[kMaxRank]) const {
    const TiledAxis* axes = params.schedule.axes;
    float sum = 0;
    for (int x0 = queries[0].begin; x0 < queries[0].end; ++x0) {
      const int key0 = x0 + place[0] - (axes[0].query_tile - 1);
      for (int x1 = queries[1].begin; x1 < queries[1].end; ++x1) {
        const int key1 = x1 + place[1] - (axes[1].query_tile - 1);
        const int* row = &smem.row_of_query[(x0 * axes[1].query_tile + x1) * axes[2].query_tile];
        const float* key =
            &smem.d_scores[(key0 * axes[1].key_tile + key1) * axes[2].key_tile + place[2] - (axes[2].query_tile - 1)];
        for (int x2 = queries[2].begin; x2 < queries[2].end; ++x2) sum += key[row[x2] * Shared::kStep + x2];
      }
    }
    return sum;
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, sizeof(typename Traits::T) == 4 ? 2 : 4)
    backward_bias_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  BackwardBias<Traits>(params, *reinterpret_cast<BiasShared<Traits>*>(shared_memory)).run();
}

}  // namespace jax_natten::sm80
