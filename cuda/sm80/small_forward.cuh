// Fused neighborhood attention forward for small windows, on every GPU from compute capability 8.0 on.
//
// Tiles of 64 keys fit windows of some fifty keys badly: of all that a warp of 16 queries would multiply, it sees a
// fifth. Here a CTA copies the box of all keys and values that its 64 queries see to shared memory at once, and each
// warp gathers from there its list of the keys that its own 16 queries (4 x 4, say) see: about 100 for a window of 7
// x 7. ldmatrix makes gathering free, since every row has an address of its own. There is no loop over tiles: a CTA's
// copies are hidden behind the work of the other CTAs of its multiprocessor.
#pragma once

#include "../common/ptx.h"
#include "../common/softmax.h"
#include "products.cuh"
#include "rows.cuh"
#include "small_box.cuh"
#include "small_params.h"
#include "small_shape.h"
#include "tile_tables.cuh"

namespace jax_natten::sm80 {

// kKeys: longest list.
template <class Numbers_, int kDim_, int kKeys_>
struct SmallTraits {
  using Numbers = Numbers_;
  using T = typename Numbers::Element;
  static constexpr int kDim = kDim_, kKeys = kKeys_, kThreads = 32 * kSmallWarps;
  static constexpr int kSteps = kDim / 16, kGroups = kKeys / 16;
  using Rows = SharedTile<kSmallRows, kDim* int(sizeof(T))>;  // of a box, too, whose number of rows is free
  static_assert(sizeof(T) == 2 && Rows::kPanels == 1, "rows of a box must be single panels");
  static_assert(kKeys % 16 == 0 && kKeys <= kMostColumns, "lists are made of groups of 16 keys");

  struct Shared {
    TileTables<kSmallRows, kKeys, Walk::kKeysOfQueries, true, kSmallWarps> tables;
    int row_position[kSmallRows];              // TileTables::row_position()
    int list_row[kKeys];                       // in the box, relative to the list's first key
    alignas(128) uint8_t query[Rows::kBytes];  // later the outputs; behind it lie the boxes
  };
  static_assert(kKeys < kSmallLists[1] || sizeof(Shared) == small_forward_bytes(kDim), "the host knows its size");
};

template <class Traits>
struct SmallForward {
  using Numbers = typename Traits::Numbers;
  using T = typename Traits::T;
  using Shared = typename Traits::Shared;
  using Rows = typename Traits::Rows;
  static constexpr int kDim = Traits::kDim, kKeys = Traits::kKeys, kSteps = Traits::kSteps;
  static constexpr int kGroups = Traits::kGroups, kThreads = Traits::kThreads;

  const SmallParams& params;
  Shared& smem;
  const int warp, lane;
  const QueryTile& tile;

  __device__ SmallForward(const SmallParams& params, Shared& smem)
      : params(params), smem(smem), warp(threadIdx.x / 32), lane(threadIdx.x % 32), tile(smem.tables.tile) {}

  __device__ void run() {
    if (!smem.tables.template fill<kThreads>(params, blockIdx.x)) return;
    for (int r = threadIdx.x; r < kSmallRows; r += kThreads) smem.row_position[r] = smem.tables.row_position(params, r);
    for (int n = threadIdx.x; n < kKeys; n += kThreads) {
      const TilePlace place = params.places.columns[n];
      smem.list_row[n] = (place[0] * params.box[1] + place[1]) * params.box[2] + place[2];
    }
    __syncthreads();
    copy_rows<Rows, kThreads>(ptx::shared_address(smem.query), params.query,
                              first_row(params.query, tile.batch, tile.head),
                              [&](int row) { return smem.row_position[row]; });
    const uint32_t keys = ptx::shared_address(smem.query) + Rows::kBytes, values = keys + params.box_bytes;
    copy_box(keys, params.key);
    ptx::copy_async_commit();
    copy_box(values, params.value);
    ptx::copy_async_commit();

    ptx::copy_async_wait<1>();
    __syncthreads();
    const QueryPart<kMaxRank>& part = smem.tables.parts[warp];
    int first[kMaxRank];  // key of the list, in the box
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      first[a] = imin(imax(part.span[a].any.begin, 0), params.box[a] - params.list[a]);
    }
    const int first_row_of_list = (first[0] * params.box[1] + first[1]) * params.box[2] + first[2];
    float scores[kKeys / 2], out[kDim / 2], normalizer[2];
    OnlineSoftmax softmax(1);
    if (part.live) {
      multiply_queries(keys, first_row_of_list, scores);
      finish_scores(first, scores);
      softmax.update(scores);
    }
    ptx::copy_async_wait<0>();
    __syncthreads();
    if (!part.live) return;
    sum_values(values, first_row_of_list, scores, out);
    softmax.finish(normalizer);
    write(softmax, out, normalizer);
  }

 private:
  __device__ __forceinline__ void copy_box(uint32_t destination, const RowArray& array) {
    const char* const rows = first_row(array, tile.batch, params.schedule.by_group.quotient(tile.head));
    for_each_box_chunk<Rows, kThreads>(params, params, tile, {0, 0, 0}, [&](int row, int chunk, int position) {
      copy_box_chunk<Rows>(destination, array, rows, row, chunk, position);
    });
  }

  // scores = Q K^T of the warp's queries and list. Of 16 keys and 16 channels, ldmatrix reads (keys 0-7, channels 0-7),
  // (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
  __device__ __forceinline__ void multiply_queries(uint32_t keys, int first_row_of_list, float (&scores)[kKeys / 2]) {
    const uint32_t query = left_address<Rows>(ptx::shared_address(smem.query), 16 * warp, lane);
    typename Numbers::Left left[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Fragment a;
      ptx::load_matrix_x4(a, Rows::moved(query, 0, k));
      left[k] = Numbers::left(a);
    }
#pragma unroll
    for (int e = 0; e < kKeys / 2; ++e) scores[e] = 0;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int row = first_row_of_list + smem.list_row[16 * j + lane % 8 + lane / 16 * 8];
      const uint32_t address = keys + Rows::place(row, lane / 8 % 2);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        Fragment b;
        ptx::load_matrix_x4(b, Rows::moved(address, 0, k));
        Numbers::multiply_add(&scores[8 * j], left[k], Numbers::right(b[0], b[1]));
        Numbers::multiply_add(&scores[8 * j + 4], left[k], Numbers::right(b[2], b[3]));
      }
    }
  }

  // Scale, bias and mask.
  __device__ __forceinline__ void finish_scores(const int (&first)[kMaxRank], float (&scores)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 16 * warp + 8 * i + lane / 4;
      const uint32_t word = smem.tables.word(params, first, row, lane % 4);
      const float* bias = nullptr;
      if (params.bias != nullptr) {
        bias = bias_table(params, tile.batch, tile.head) + smem.tables.bias_entry(params, first, row);
      }
#pragma unroll
      for (int bit = 0; bit < kKeys / 4; ++bit) {
        float& score = scores[bit / 2 * 4 + 2 * i + bit % 2];
        float b = 0;
        if (params.bias != nullptr && (word >> bit & 1)) {
          b = __ldg(bias + smem.tables.column_bias[bit / 2 * 8 + lane % 4 * 2 + bit % 2]);
        }
        score = fmaf(score, params.scale, b * kLog2E);
      }
      mask_row(scores, i, word);
    }
  }

  // out = p V
  __device__ __forceinline__ void sum_values(uint32_t values, int first_row_of_list, const float (&p)[kKeys / 2],
                                             float (&out)[kDim / 2]) {
#pragma unroll
    for (int e = 0; e < kDim / 2; ++e) out[e] = 0;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int row = first_row_of_list + smem.list_row[16 * j + lane % 16];
      const uint32_t address = values + Rows::place(row, lane / 16);
      const float* w = &p[8 * j];
      const Fragment a = {ptx::pack<T>(w[0], w[1]), ptx::pack<T>(w[2], w[3]), ptx::pack<T>(w[4], w[5]),
                          ptx::pack<T>(w[6], w[7])};
      const auto left = Numbers::left(a);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        Fragment b;
        ptx::load_matrix_x4_transposed(b, Rows::moved(address, 0, k));
        Numbers::multiply_add(&out[8 * k], left, Numbers::right(b[0], b[1]));
        Numbers::multiply_add(&out[8 * k + 4], left, Numbers::right(b[2], b[3]));
      }
    }
  }

  // Outputs through the place of the warp's queries.
  __device__ __forceinline__ void write(const OnlineSoftmax& softmax, const float (&out)[kDim / 2],
                                        const float (&normalizer)[2]) {
    const uint32_t staged = ptx::shared_address(smem.query);
    store_fragments<Numbers, Rows>(staged, 16 * warp, lane, out, normalizer);
    const int i = lane % 4;  // two lanes of four write a row's each
    const float lse = i == 0 ? softmax.log_sum_exp(0) : softmax.log_sum_exp(1);
    const int position = i < 2 ? smem.row_position[16 * warp + 8 * i + lane / 4] : -1;
    if (position >= 0) {
      params.lse[(tile.batch * params.positions + position) * params.heads + tile.head] = lse;
    }
    __syncwarp();
    write_rows<Rows, T, 16>(staged, params.out, first_row(params.out, tile.batch, tile.head), 16 * warp, lane,
                            [&](int row) { return smem.row_position[row]; });
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kDim == 32 ? 4 : 3)
    small_forward_kernel(const __grid_constant__ SmallParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  SmallForward<Traits>(params, *reinterpret_cast<typename Traits::Shared*>(shared_memory)).run();
}

}  // namespace jax_natten::sm80
