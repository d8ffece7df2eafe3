// Fused neighborhood attention backward on tensor cores, in two passes over the pairs of queries and keys, each without
// atomics and with sums in a fixed order. One kernel serves both: a tile of rows stays in shared memory, and the tiles
// of columns that it sees pass by.
//
//     query pass: rows are queries, columns keys      key pass: rows are keys, columns queries
//     scores   = Q K^T                                scores   = K Q^T
//     d_probs  = dO V^T                               d_probs  = V dO^T
//     d_scores = p (d_probs - delta), with p = exp(scale scores + bias - lse)
//     d_query += scale d_scores K                     d_key += scale d_scores Q,  d_value += p dO
//
// The query pass also computes delta = rowsum(out * d_out) - d_lse, which the key pass reads. The queries of all heads
// that share a key head pass by its keys one after the other. Structure and gathering are those of fused_forward.cuh.
//
// Additional keys are columns of every query. As rows, they are seen by all queries of the grid, which are cut into
// chunks: their key pass leaves a partial sum for each chunk.
#pragma once

#include "../common/ptx.h"
#include "../common/softmax.h"
#include "../common/workspace.h"
#include "backward_params.h"
#include "backward_shape.h"
#include "products.cuh"
#include "row_delta.cuh"
#include "rows.cuh"
#include "tile_tables.cuh"

namespace jax_natten::sm80 {

template <class Numbers_, int kDim_, Pass kPass>
struct BackwardTraits {
  using Numbers = Numbers_;
  using T = typename Numbers::Element;
  static constexpr int kDim = kDim_;
  static constexpr Walk kWalk = walk_of(kPass);
  static constexpr bool kKeyPass = kPass == Pass::kKeys;
  static constexpr BackwardShape kShape = backward_shape(sizeof(T), kDim, kPass);
  static constexpr int kRows = kShape.rows, kColumns = kShape.columns, kThreads = 32 * kShape.warps();
  using RowTile = SharedTile<kRows, kDim* int(sizeof(T))>;
  using ColumnTile = SharedTile<kColumns, kDim* int(sizeof(T))>;

  // Of each kind of rows there are two: what scores come from, and what d_probs come from.
  struct Stage {
    alignas(128) uint8_t score_side[ColumnTile::kBytes];  // keys, or queries
    alignas(128) uint8_t prob_side[ColumnTile::kBytes];   // values, or d_out
  };
  // Of columns that are queries.
  struct alignas(8) StageNumbers {
    float lse[kKeyPass ? kColumns : 2], delta[kKeyPass ? kColumns : 2];
  };
  struct Shared {
    alignas(128) uint8_t score_side[RowTile::kBytes];  // queries, or keys; later their gradients
    alignas(128) uint8_t prob_side[RowTile::kBytes];   // d_out, or values; later the gradients of values
    Stage stage[kShape.stages];
    StageNumbers numbers[kKeyPass ? kShape.stages : 1];
    TileTables<kRows, kColumns, kWalk, true, kShape.parts()> tables;
  };
  static_assert(sizeof(Shared) <= kSharedBytesOfAnyDevice, "must fit into the shared memory of every device");
};

template <class Traits>
struct FusedBackward {
  using Numbers = typename Traits::Numbers;
  using T = typename Traits::T;
  using Shared = typename Traits::Shared;
  using RowTile = typename Traits::RowTile;
  using ColumnTile = typename Traits::ColumnTile;
  static constexpr int kDim = Traits::kDim, kRows = Traits::kRows, kColumns = Traits::kColumns;
  static constexpr int kThreads = Traits::kThreads, kSplits = Traits::kShape.splits;
  static constexpr bool kKeyPass = Traits::kKeyPass;
  static constexpr int kBlocks = Traits::kShape.blocks;
  static constexpr int kChunk = Traits::kShape.chunk;
  static constexpr int kSums = kDim / kSplits / 2;  // that a thread holds of 16 rows
  // Twice as many products are independent of each other if those of both kinds of scores take turns, where registers
  // allow for the operands of both.
  static constexpr bool kInTurns = sizeof(T) == 2 && kDim <= 128;
  static constexpr int kSplitBytes = kDim / kSplits * int(sizeof(T));
  static_assert(kColumns % kChunk == 0, "tiles are made of chunks");
  static_assert(kSplits == 1 || kSplitBytes % ColumnTile::kPanelBytes == 0, "splits are made of panels");
  using Sums = float[kBlocks][kSums];
  using Scores = float[kBlocks][kChunk / 2];
  using OfRows = float[kBlocks][2];  // of the thread's rows

  const BackwardParams& params;
  Shared& smem;
  const int warp, lane;

  const QueryTile& tile;  // of an additional key pass: head and batch only
  int chunk, first;       // of an additional key pass: the chunk, and the first additional key of the tile

  __device__ FusedBackward(const BackwardParams& params, Shared& smem)
      : params(params), smem(smem), warp(threadIdx.x / 32), lane(threadIdx.x % 32), tile(smem.tables.tile) {}

  __device__ void run() {
    if (rows_are_additional()) {
      decode_additional_tile();
    } else if (!smem.tables.template fill<kThreads>(params, blockIdx.x)) {
      return;
    }
    __syncthreads();
    copy_staying_rows();
    Columns next = first_columns();
    copy_columns(next, 0);
    ptx::copy_async_commit();

    OfRows row_lse, row_delta;
    if (!kKeyPass) find_delta(row_lse, row_delta);
    Sums d_score_side, d_prob_side;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int e = 0; e < kSums; ++e) d_score_side[m][e] = d_prob_side[m][e] = 0;
    }

    bool more = true;
    for (int stage = 0; more;) {
      // The present tile has arrived, and all warps are done with the one before.
      ptx::copy_async_wait<0>();
      __syncthreads();
      const Columns present = next;
      more = advance(next);
      const int stage_of_present = stage;
      if (Traits::kShape.stages == 2) {
        stage ^= 1;
        if (more) copy_columns(next, stage);
        ptx::copy_async_commit();
      }
      compute(present, stage_of_present, row_lse, row_delta, d_score_side, d_prob_side);
      if (Traits::kShape.stages == 1) {
        __syncthreads();
        if (more) copy_columns(next, 0);
        ptx::copy_async_commit();
      }
    }
    if (rows_are_additional()) {
      write_partials(d_score_side, d_prob_side);
    } else {
      write(d_score_side, d_prob_side);
    }
  }

 protected:
  __device__ __forceinline__ bool rows_are_additional() const { return kKeyPass && params.partials != nullptr; }
  __device__ __forceinline__ int row_of_warp() const { return warp / kSplits * Traits::kShape.warp_rows(); }
  __device__ __forceinline__ int row_of_thread(int m, int i) const { return row_of_warp() + 16 * m + 8 * i + lane / 4; }
  __device__ __forceinline__ int kv_head() const {
    return kKeyPass ? tile.head : params.schedule.by_group.quotient(tile.head);
  }
  // Of lse and delta.
  __device__ __forceinline__ int64_t index(int position, int head) const {
    return (int64_t(tile.batch) * params.positions + position) * params.heads + head;
  }

  // ---- the rows that stay

  __device__ __forceinline__ void decode_additional_tile() {
    const int index = int(blockIdx.x) / params.additional_tiles;
    first = int(blockIdx.x) % params.additional_tiles * kRows;
    chunk = index / params.kv_heads % params.chunks;
    if (threadIdx.x == 0) {
      smem.tables.tile.head = index % params.kv_heads;
      smem.tables.tile.batch = index / params.kv_heads / params.chunks;
    }
  }

  __device__ __forceinline__ int staying_position(int row) const {
    if (!rows_are_additional()) return smem.tables.row_position(params, row);
    return first + row < params.additional ? first + row : -1;
  }

  __device__ __forceinline__ void copy_staying_rows() {
    const auto copy = [&](uint8_t* destination, const RowArray& array, int head) {
      copy_rows<RowTile, kThreads>(ptx::shared_address(destination), array, first_row(array, tile.batch, head),
                                   [&](int row) { return staying_position(row); });
    };
    if (!kKeyPass) {
      copy(smem.score_side, params.query, tile.head);
      copy(smem.prob_side, params.d_out, tile.head);
    } else {
      const bool additional = rows_are_additional();
      copy(smem.score_side, additional ? params.additional_key : params.key, tile.head);
      copy(smem.prob_side, additional ? params.additional_value : params.value, tile.head);
    }
  }

  // Writes delta of this thread's rows.
  __device__ __forceinline__ void find_delta(OfRows& row_lse, OfRows& row_delta) {
#pragma unroll
    for (int n = 0; n < 2 * kBlocks; ++n) {
      const int m = n / 2, i = n % 2, position = smem.tables.row_position(params, row_of_thread(m, i));
      find_row_delta<T>(params, tile, position, lane, warp % kSplits == 0, row_lse[m][i], row_delta[m][i]);
    }
  }

  // ---- the columns that pass by

  // A tile of the window box, of the additional keys (query pass), or of a chunk of all queries (key pass of additional
  // keys).
  struct Columns {
    KeyTileCursor<kMaxRank> cursor;
    int linear;  // first column of a tile outside the window box; negative: in it
    int head;    // key pass: of the queries

    __device__ __forceinline__ bool in_window() const { return linear < 0; }
  };

  __device__ __forceinline__ Columns first_columns() const {
    Columns columns;
    columns.linear = rows_are_additional() ? int(chunk_begin(params.positions, chunk)) : -1;
    columns.head = kKeyPass ? tile.head * params.schedule.by_group.divisor : 0;
    return columns;
  }

  // Past the last column of the tiles outside the window box.
  __device__ __forceinline__ int linear_end() const {
    return kKeyPass ? int(chunk_begin(params.positions, chunk + 1)) : params.additional;
  }

  // Moves on; false after the last tile.
  __device__ __forceinline__ bool advance(Columns& columns) const {
    if (columns.in_window()) {
      if (columns.cursor.next(params.schedule.axes, tile.extent)) return true;
      if (!kKeyPass) {
        columns.linear = 0;
        return params.additional > 0;
      }
    } else {
      columns.linear += kColumns;
      if (columns.linear < linear_end()) return true;
      if (!kKeyPass) return false;
    }
    const int head = columns.head + 1;  // the next one that reads these keys
    columns = first_columns();
    columns.head = head;
    return head < (tile.head + 1) * params.schedule.by_group.divisor;
  }

  // Columns that no row of the tile sees are not read: they are zeros.
  __device__ __forceinline__ void copy_columns(const Columns& columns, int stage) {
    if (columns.in_window()) {
      copy_columns_at(columns, stage, smem.tables.positions(params, columns.cursor.begin));
    } else {
      copy_columns_at(columns, stage, [begin = columns.linear, end = linear_end()](int column) {
        return begin + column < end ? begin + column : -1;
      });
    }
  }

  template <typename PositionOfColumn>
  __device__ __forceinline__ void copy_columns_at(const Columns& columns, int stage, PositionOfColumn position_of) {
    const auto copy = [&](uint8_t* destination, const RowArray& array, int head) {
      copy_rows<ColumnTile, kThreads>(ptx::shared_address(destination), array, first_row(array, tile.batch, head),
                                      position_of);
    };
    if (!kKeyPass) {
      const bool window = columns.in_window();
      copy(smem.stage[stage].score_side, window ? params.key : params.additional_key, kv_head());
      copy(smem.stage[stage].prob_side, window ? params.value : params.additional_value, kv_head());
    } else {
      copy(smem.stage[stage].score_side, params.query, columns.head);
      copy(smem.stage[stage].prob_side, params.d_out, columns.head);
      for (int n = threadIdx.x; n < 2 * kColumns; n += kThreads) {
        const int column = n % kColumns, position = position_of(column);
        const int64_t at = index(imax(position, 0), columns.head);
        auto& numbers = smem.numbers[stage];
        float* destination = n < kColumns ? &numbers.lse[column] : &numbers.delta[column];
        ptx::copy_async<4>(ptx::shared_address(destination), (n < kColumns ? params.lse : params.delta) + at,
                           position >= 0);
      }
    }
  }

  // ---- one tile of columns

  __device__ __forceinline__ TileClass classify(const Columns& columns) const {
    const auto& part = smem.tables.parts[warp / kSplits];
    if (columns.in_window()) return part.classify(params.schedule.axes, columns.cursor.begin, params.padded);
    if (!kKeyPass && !part.live) return TileClass::kSkip;
    return columns.linear + kColumns <= linear_end() ? TileClass::kWhole : TileClass::kMasked;
  }

  __device__ __forceinline__ uint32_t word(const Columns& columns, int row) const {
    if (!columns.in_window()) return first_columns_word(linear_end() - columns.linear, lane % 4);
    return smem.tables.word(params, columns.cursor.begin, row, lane % 4);
  }

  using Words = uint32_t[kBlocks][2];  // masks of the thread's columns, for each of its rows

  __device__ __forceinline__ void compute(const Columns& columns, int stage, const OfRows& row_lse,
                                          const OfRows& row_delta, Sums& d_score_side, Sums& d_prob_side) {
    const TileClass tile_class = classify(columns);
    if (tile_class == TileClass::kSkip) return;
#pragma unroll 1
    for (int begin = 0; begin < kColumns; begin += kChunk) {
      Scores probs, d_scores;
      if (!find_d_scores(columns, tile_class, stage, begin, row_lse, row_delta, probs, d_scores)) continue;
      if (kKeyPass) add(d_prob_side, probs, smem.stage[stage].prob_side, begin);
      add(d_score_side, d_scores, smem.stage[stage].score_side, begin);
    }
  }

  // Of the columns from `begin` on, of a tile of which the rows see some. False if they see none of the chunk.
  __device__ __forceinline__ bool find_d_scores(const Columns& columns, TileClass tile_class, int stage, int begin,
                                                const OfRows& row_lse, const OfRows& row_delta, Scores& probs,
                                                Scores& d_scores) {
    const bool masked = tile_class == TileClass::kMasked;
    Words words;
    if (kChunk < kColumns && masked) {
      uint32_t any = 0;
#pragma unroll
      for (int n = 0; n < 2 * kBlocks; ++n) {
        words[n / 2][n % 2] = word(columns, row_of_thread(n / 2, n % 2)) >> begin / 4;
        any |= words[n / 2][n % 2];
      }
      if (!__any_sync(~0u, any << (32 - kChunk / 4))) return false;
    }
    multiply(stage, begin, probs, d_scores);
    // Most tiles of long windows are whole: their elements are spared the masks.
    if (params.bias != nullptr && columns.in_window()) {
      find_d_scores_of<true, true>(columns, masked, words, stage, begin, row_lse, row_delta, probs, d_scores);
    } else if (masked || sizeof(T) == 4) {  // which has not the registers for one more copy of the code
      find_d_scores_of<true, false>(columns, masked, words, stage, begin, row_lse, row_delta, probs, d_scores);
    } else {
      find_d_scores_of<false, false>(columns, masked, words, stage, begin, row_lse, row_delta, probs, d_scores);
    }
    return true;
  }

  // From the products of the rows: probs and d_scores. kMasked: a tile may be `masked`, by `words` if chunks are not
  // whole tiles.
  template <bool kMasked, bool kBias>
  __device__ __forceinline__ void find_d_scores_of(const Columns& columns, bool masked, const Words& words, int stage,
                                                   int begin, const OfRows& row_lse, const OfRows& row_delta,
                                                   Scores& probs, Scores& d_scores) {
#pragma unroll
    for (int n = 0; n < 2 * kBlocks; ++n) {
      const int m = n / 2, i = n % 2, row = row_of_thread(m, i);
      uint32_t seen = ~uint32_t(0);
      if (kMasked && masked) seen = kChunk < kColumns ? words[m][i] : word(columns, row);
      const float* bias = nullptr;
      if (kBias) {
        bias = bias_table(params, tile.batch, kKeyPass ? columns.head : tile.head) +
               smem.tables.bias_entry(params, columns.cursor.begin, row);
      }
#pragma unroll
      for (int bit = 0; bit < kChunk / 4; ++bit) {
        const int e = bit / 2 * 4 + 2 * i + bit % 2, column = begin + bit / 2 * 8 + lane % 4 * 2 + bit % 2;
        float offset = kKeyPass ? smem.numbers[stage].lse[column] * -kLog2E : -row_lse[m][i];
        if (kBias && (seen >> bit & 1)) {
          const int entry = smem.tables.column_bias[column];
          offset = fmaf(__ldg(bias + (kKeyPass ? -entry : entry)), kLog2E, offset);
        }
        const float p = ptx::exp2_approximate(fmaf(probs[m][e], params.scale, offset));
        const float d = p * (d_scores[m][e] - (kKeyPass ? smem.numbers[stage].delta[column] : row_delta[m][i]));
        probs[m][e] = !kMasked || (seen >> bit & 1) ? p : 0.f;
        d_scores[m][e] = !kMasked || (seen >> bit & 1) ? d : 0.f;
      }
    }
  }

  // scores and d_probs, products of the rows and a chunk of the columns.
  __device__ __forceinline__ void multiply(int stage, int begin, Scores& scores, Scores& d_probs) {
    const auto left_of = [&](const uint8_t* rows) {
      return left_address<RowTile>(ptx::shared_address(rows), row_of_warp(), lane);
    };
    const auto right_of = [&](const uint8_t* columns) {
      return right_address<ColumnTile>(ptx::shared_address(columns), lane) + begin * ColumnTile::kPanelBytes;
    };
    const uint32_t left[2] = {left_of(smem.score_side), left_of(smem.prob_side)};
    const uint32_t right[2] = {right_of(smem.stage[stage].score_side), right_of(smem.stage[stage].prob_side)};
    const auto load_left = [&](int side, int m, int k, Fragment& a) {
      ptx::load_matrix_x4(a, RowTile::moved(left[side], 16 * m, k));
    };
    if constexpr (kInTurns) {
#pragma unroll
      for (int k = 0; k < ColumnTile::kRowBytes / 32; ++k) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          add_row_products<Numbers, ColumnTile>(side == 0 ? scores : d_probs, ColumnTile::moved(right[side], 0, k),
                                                k == 0, [&](int m, Fragment& a) { load_left(side, m, k, a); });
        }
      }
    } else {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        multiply_rows<Numbers, ColumnTile>(side == 0 ? scores : d_probs, right[side],
                                           [&](int m, int k, Fragment& a) { load_left(side, m, k, a); });
      }
    }
  }

  // sums += weights columns, for this warp's channels
  __device__ __forceinline__ void add(Sums& sums, const Scores& weights, const uint8_t (&columns)[ColumnTile::kBytes],
                                      int begin) {
    constexpr int kPanelRows = kSplitBytes / ColumnTile::kPanelBytes * ColumnTile::kRows;
    const uint32_t tile = ptx::shared_address(columns) + warp % kSplits * kPanelRows * ColumnTile::kPanelBytes;
    add_weighted_rows<Numbers, ColumnTile>(
        sums, weights, column_address<Numbers, ColumnTile>(tile, lane) + begin * ColumnTile::kPanelBytes);
  }

  // ---- results

  // Through the places of the rows in shared memory.
  __device__ __forceinline__ void write(const Sums& d_score_side, const Sums& d_prob_side) {
    __syncthreads();  // all warps are done with them
    stage_sums(smem.score_side, d_score_side, params.problem_scale);
    if (kKeyPass) stage_sums(smem.prob_side, d_prob_side, 1.f);
    __syncthreads();
    write_staged(smem.score_side, kKeyPass ? params.d_key : params.d_query);
    if (kKeyPass) write_staged(smem.prob_side, params.d_value);
  }

  __device__ __forceinline__ void stage_sums(uint8_t (&rows)[RowTile::kBytes], const Sums& sums, float factor) {
    constexpr int kPanelRows = kSplitBytes / RowTile::kPanelBytes * RowTile::kRows;
    const float factors[2] = {factor, factor};
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      store_fragments<Numbers, RowTile>(ptx::shared_address(rows) + warp % kSplits * kPanelRows * RowTile::kPanelBytes,
                                        row_of_warp() + 16 * m, lane, sums[m], factors);
    }
  }

  __device__ __forceinline__ void write_staged(const uint8_t (&rows)[RowTile::kBytes], const RowArray& array) {
    constexpr int kWarpRows = kRows / Traits::kShape.warps();
    write_rows<RowTile, T, kWarpRows>(ptx::shared_address(rows), array, first_row(array, tile.batch, tile.head),
                                      kWarpRows * warp, lane,
                                      [&](int row) { return smem.tables.row_position(params, row); });
  }

  __device__ __forceinline__ void write_partials(const Sums& d_score_side, const Sums& d_prob_side) {
#pragma unroll
    for (int n = 0; n < 2 * kBlocks; ++n) {
      const int m = n / 2, i = n % 2, key = first + row_of_thread(m, i);
      if (key >= params.additional) continue;
      const int64_t row =
          ((int64_t(tile.batch) * params.chunks + chunk) * params.additional + key) * params.kv_heads + tile.head;
      float* keys = params.partials + row * (params.dim + params.value_dim);
      float* values = keys + params.dim;
#pragma unroll
      for (int j = 0; j < kSums / 4; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int channel = warp % kSplits * (kDim / kSplits) + 8 * j + lane % 4 * 2 + b, e = 4 * j + 2 * i + b;
          if (channel < params.dim) keys[channel] = d_score_side[m][e] * params.problem_scale;
          if (channel < params.value_dim) values[channel] = d_prob_side[m][e];
        }
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kShape.least_ctas)
    fused_backward_kernel(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  FusedBackward<Traits>(params, *reinterpret_cast<typename Traits::Shared*>(shared_memory)).run();
}

}  // namespace jax_natten::sm80
