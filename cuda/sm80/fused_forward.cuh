// Fused neighborhood attention forward on tensor cores, for every GPU from compute capability 8.0 on.
//
// One CTA works on one query tile: a box of queries of one dilation group, head and batch element, cut into boxes of 16
// or 32, one per warp. It copies the query rows to shared memory, then walks over the key tiles of the window box and
// over those of the additional keys. Keys and values of the next tile are on their way (cp.async) while each warp
// computes on the present one:
//     scores = Q K^T       mma.sync
//     p = softmax(scores)  in registers, masked only on tiles that cross the edge of a window
//     out += p V           mma.sync, p straight from the registers of the scores
// A warp passes over tiles that none of its queries sees. Rows are gathered by position: positions of the rows of a
// tile differ from that of its first row by numbers that are the same for all tiles, so that a small table is all it
// takes.
#pragma once

#include <type_traits>

#include "../common/ptx.h"
#include "../common/softmax.h"
#include "forward_shape.h"
#include "fused_params.h"
#include "products.cuh"
#include "rows.cuh"
#include "tile_tables.cuh"

namespace jax_natten::sm80 {

// kExtended: takes additional keys, a relative position bias, and scales as they are; float32 is always so.
template <class Numbers_, int kDim_, int kRows_, bool kExtended_>
struct ForwardTraits {
  using Numbers = Numbers_;
  using T = typename Numbers::Element;
  static constexpr int kDim = kDim_, kRows = kRows_;
  static constexpr bool kExtended = kExtended_;
  static_assert(sizeof(T) == 2 || kExtended, "the other kind is not worth its compilation");
  static constexpr ForwardShape kShape = forward_shape(sizeof(T), kDim, kRows);
  static constexpr int kThreads = 32 * kShape.warps, kKeys = kShape.keys;
  static constexpr int kWarpRows = kRows / kShape.warps, kBlocks = kWarpRows / 16;
  using QueryTileRows = SharedTile<kRows, kDim* int(sizeof(T))>;
  using KeyTileRows = SharedTile<kKeys, kDim* int(sizeof(T))>;

  struct Stage {
    alignas(128) uint8_t key[KeyTileRows::kBytes];
    alignas(128) uint8_t value[KeyTileRows::kBytes];
  };
  struct Nothing {};
  struct OwnPlace {
    alignas(128) uint8_t query[QueryTileRows::kBytes];
  };
  // Queries that move on to registers are only passing through the second stage.
  struct Shared : std::conditional_t<kShape.query_in_registers, Nothing, OwnPlace> {
    Stage stage[2];
    TileTables<kRows, kKeys, Walk::kKeysOfQueries, kExtended, kShape.warps> tables;
  };
  static_assert(QueryTileRows::kBytes <= int(2 * sizeof(Stage)), "outputs are written through the stages");
  static_assert(!kShape.query_in_registers || QueryTileRows::kBytes <= int(sizeof(Stage)), "queries pass through one");
  static_assert(sizeof(Shared) <= kSharedBytesOfAnyDevice, "must fit into the shared memory of every device");
};

template <class Traits>
struct FusedForward {
  using Numbers = typename Traits::Numbers;
  using T = typename Traits::T;
  using Shared = typename Traits::Shared;
  using QueryTileRows = typename Traits::QueryTileRows;
  using KeyTileRows = typename Traits::KeyTileRows;
  static constexpr int kDim = Traits::kDim, kKeys = Traits::kKeys, kBlocks = Traits::kBlocks;
  static constexpr int kSteps = kDim / Numbers::kStepChannels;
  static constexpr bool kExtended = Traits::kExtended, kQueryInRegisters = Traits::kShape.query_in_registers;

  const FusedParams& params;
  Shared& smem;
  const int warp, lane;
  const QueryTile& tile;

  __device__ FusedForward(const FusedParams& params, Shared& smem)
      : params(params), smem(smem), warp(threadIdx.x / 32), lane(threadIdx.x % 32), tile(smem.tables.tile) {}

  __device__ void run() {
    if (!smem.tables.template fill<Traits::kThreads>(params, blockIdx.x)) return;
    __syncthreads();

    copy_queries();
    KeyTiles next;
    copy_keys_and_values(next, 0);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncthreads();
    if (!kExtended && params.query_factor != 1) scale_queries();
    const Queries queries(query_tile(), warp, lane);

    float out[kBlocks][kDim / 2];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int e = 0; e < kDim / 2; ++e) out[m][e] = 0;
    }
    Softmax softmax(kExtended ? 1.f : params.scale);

    bool more = true;
    for (int stage = 0; more; stage ^= 1) {
      // The present tile has arrived, and all warps are done with the one before.
      ptx::copy_async_wait<0>();
      __syncthreads();
      const KeyTiles present = next;
      more = next.advance(params, tile);
      if (more) copy_keys_and_values(next, stage ^ 1);
      ptx::copy_async_commit();
      attend(present, smem.stage[stage], queries, softmax, out);
    }
    write(softmax, out);
  }

 private:
  // ---- copies

  __device__ __forceinline__ uint32_t query_tile() const {
    if constexpr (kQueryInRegisters)
      return ptx::shared_address(&smem.stage[1]);
    else
      return ptx::shared_address(smem.query);
  }

  __device__ __forceinline__ void copy_queries() {
    copy_rows<QueryTileRows, Traits::kThreads>(query_tile(), params.query,
                                               first_row(params.query, tile.batch, tile.head),
                                               [&](int row) { return smem.tables.row_position(params, row); });
  }

  // A key tile of the window box, or of the additional keys.
  struct KeyTiles {
    KeyTileCursor<kMaxRank> cursor;
    int additional = -1;  // the first of the tile; negative: the tile is one of the window box

    __device__ __forceinline__ bool in_window() const { return !kExtended || additional < 0; }

    // Moves on; false after the last tile.
    __device__ __forceinline__ bool advance(const FusedParams& params, const QueryTile& tile) {
      if (in_window()) {
        if (cursor.next(params.schedule.axes, tile.extent)) return true;
        if (!kExtended) return false;
        additional = 0;
      } else {
        additional += kKeys;
      }
      return additional < params.additional;
    }
  };

  // Keys that no query of the tile sees are not read: their rows are zeros.
  __device__ __forceinline__ void copy_keys_and_values(const KeyTiles& keys, int stage) {
    const uint32_t key = ptx::shared_address(smem.stage[stage].key);
    const uint32_t value = ptx::shared_address(smem.stage[stage].value);
    const int kv_head = params.schedule.by_group.quotient(tile.head);
    const auto copy = [&](const RowArray& key_array, const RowArray& value_array, auto position_of) {
      copy_rows<KeyTileRows, Traits::kThreads>(key, key_array, first_row(key_array, tile.batch, kv_head), position_of);
      copy_rows<KeyTileRows, Traits::kThreads>(value, value_array, first_row(value_array, tile.batch, kv_head),
                                               position_of);
    };
    if (keys.in_window()) {
      copy(params.key, params.value, smem.tables.positions(params, keys.cursor.begin));
    } else {
      copy(params.additional_key, params.additional_value, [&](int row) {
        const int key = keys.additional + row;
        return key < params.additional ? key : -1;
      });
    }
  }

  // Multiplies the queries by the sign of the scale (or by zero): the softmax wants a positive one.
  __device__ __forceinline__ void scale_queries() {
    if constexpr (sizeof(T) == 2) {
      const uint32_t factor = ptx::pack<T>(params.query_factor, params.query_factor);
      for (int i = threadIdx.x; i < QueryTileRows::kBytes / 4; i += Traits::kThreads) {
        const uint32_t address = query_tile() + 4 * i;
        ptx::store_word(address, ptx::multiply_pairs<T>(ptx::load_word(address), factor));
      }
      __syncthreads();
    }
  }

  // ---- queries: the left side of Q K^T

  class Queries {
   public:
    __device__ __forceinline__ Queries(uint32_t tile, int warp, int lane)
        : address_(left_address<QueryTileRows>(tile, Traits::kWarpRows * warp, lane)) {
      if constexpr (kQueryInRegisters) {
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            ptx::load_matrix_x4(fragment_[m][k], QueryTileRows::moved(address_, 16 * m, k));
          }
        }
      }
    }

    __device__ __forceinline__ void load(int m, int k, Fragment& a) const {
      if constexpr (kQueryInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = fragment_[m][k][i];
      } else {
        ptx::load_matrix_x4(a, QueryTileRows::moved(address_, 16 * m, k));
      }
    }

   private:
    uint32_t address_;
    Fragment fragment_[kQueryInRegisters ? kBlocks : 1][kQueryInRegisters ? kSteps : 1];
  };

  // ---- one key tile

  using Scores = float[kBlocks][kKeys / 2];
  using Out = float[kBlocks][kDim / 2];

  struct Softmax {
    OnlineSoftmax block[kBlocks];

    __device__ explicit Softmax(float scale) {
#pragma unroll
      for (OnlineSoftmax& b : block) b.scale = scale;
    }
  };

  __device__ __forceinline__ int row_of_thread(int m, int i) const {
    return Traits::kWarpRows * warp + 16 * m + 8 * i + lane / 4;
  }

  // Columns of this thread that its row sees, as in key_mask.h.
  __device__ __forceinline__ uint32_t mask_word(const KeyTiles& keys, int row) const {
    if (!keys.in_window()) return first_columns_word(params.additional - keys.additional, lane % 4);
    return smem.tables.word(params, keys.cursor.begin, row, lane % 4);
  }

  __device__ __forceinline__ TileClass classify(const KeyTiles& keys) const {
    const QueryPart<kMaxRank>& part = smem.tables.parts[warp];
    if (keys.in_window()) return part.classify(params.schedule.axes, keys.cursor.begin, params.padded);
    if (!part.live) return TileClass::kSkip;
    return keys.additional + kKeys <= params.additional ? TileClass::kWhole : TileClass::kMasked;
  }

  // Scores times the scale, and the bias of the columns that `word` names.
  __device__ __forceinline__ void add_bias(float (&scores)[kKeys / 2], int i, uint32_t word, const KeyTiles& keys,
                                           int row) const {
    const bool has_bias = params.bias != nullptr && keys.in_window();
    const float* bias = nullptr;
    if (has_bias) {
      bias = bias_table(params, tile.batch, tile.head) + smem.tables.bias_entry(params, keys.cursor.begin, row);
    }
#pragma unroll
    for (int bit = 0; bit < kKeys / 4; ++bit) {
      float& score = scores[bit / 2 * 4 + 2 * i + bit % 2];
      float b = 0;
      if (has_bias && (word >> bit & 1))
        b = __ldg(bias + smem.tables.column_bias[bit / 2 * 8 + lane % 4 * 2 + bit % 2]);
      score = fmaf(score, params.scale, b * kLog2E);
    }
  }

  __device__ __forceinline__ void attend(const KeyTiles& keys, const typename Traits::Stage& stage,
                                         const Queries& queries, Softmax& softmax, Out& out) {
    const TileClass tile_class = classify(keys);
    if (tile_class == TileClass::kSkip) return;

    Scores scores;
    multiply_rows<Numbers, KeyTileRows>(scores, right_address<KeyTileRows>(ptx::shared_address(stage.key), lane),
                                        [&](int m, int k, Fragment& a) { queries.load(m, k, a); });

#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool masked = tile_class == TileClass::kMasked;
        const int row = row_of_thread(m, i);
        const uint32_t word = masked ? mask_word(keys, row) : ~uint32_t(0);
        if (kExtended) add_bias(scores[m], i, word, keys, row);
        if (masked) mask_row(scores[m], i, word);
      }
      if (softmax.block[m].update(scores[m])) {
#pragma unroll
        for (int e = 0; e < kDim / 2; ++e) out[m][e] *= softmax.block[m].correction[e / 2 % 2];
      }
    }
    add_weighted_rows<Numbers, KeyTileRows>(
        out, scores, column_address<Numbers, KeyTileRows>(ptx::shared_address(stage.value), lane));
  }

  // ---- epilogue: outputs through shared memory

  __device__ __forceinline__ void write(Softmax& softmax, Out& out) {
    __syncthreads();  // all warps are done with the stages
    const uint32_t staged = ptx::shared_address(smem.stage);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      float normalizer[2];
      softmax.block[m].finish(normalizer);
      store_fragments<Numbers, QueryTileRows>(staged, Traits::kWarpRows * warp + 16 * m, lane, out[m], normalizer);
      const int i = lane % 4;  // two lanes of four write a row's each
      const float lse = i == 0 ? softmax.block[m].log_sum_exp(0) : softmax.block[m].log_sum_exp(1);
      const int position = i < 2 ? smem.tables.row_position(params, row_of_thread(m, i)) : -1;
      if (position >= 0) {
        params.lse[(tile.batch * params.positions + position) * params.heads + tile.head] = lse;
      }
    }
    __syncwarp();
    write_rows<QueryTileRows, T, Traits::kWarpRows>(staged, params.out, first_row(params.out, tile.batch, tile.head),
                                                    Traits::kWarpRows * warp, lane,
                                                    [&](int row) { return smem.tables.row_position(params, row); });
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kShape.least_ctas)
    fused_forward_kernel(const __grid_constant__ FusedParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  FusedForward<Traits>(params, *reinterpret_cast<typename Traits::Shared*>(shared_memory)).run();
}

}  // namespace jax_natten::sm80
