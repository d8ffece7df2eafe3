// Fused neighborhood attention backward for small windows, on every GPU from compute capability 8.0 on: the maths and
// the two passes of fused_backward.cuh in the structure of small_forward.cuh.
//
// A CTA of four warps owns 64 rows (queries, or keys in the key pass) and copies a box of the columns that they see
// (keys with their values; or queries with d_out, lse and delta) to shared memory: all of them, or as many as leave
// room for other CTAs, whose work hides the copies. Of each box, a warp goes through the list of the columns that its
// own 16 rows see, gathering 16 of them at a time. Since the softmax is known already, nothing but the sums outlives
// such a group, so that lists may be of any length. A list is walked over in segments, boxes of up to kMostColumns
// columns which have a mask in one word of each lane; groups of which no row sees a column are skipped.
#pragma once

#include "../common/ptx.h"
#include "backward_shape.h"
#include "products.cuh"
#include "row_delta.cuh"
#include "rows.cuh"
#include "small_box.cuh"
#include "small_params.h"
#include "small_shape.h"
#include "tile_tables.cuh"

namespace jax_natten::sm80 {

template <class Numbers_, int kDim_, Pass kPass>
struct SmallBackwardTraits {
  using Numbers = Numbers_;
  using T = typename Numbers::Element;
  static constexpr int kDim = kDim_, kThreads = 32 * kSmallWarps, kSteps = kDim / 16;
  static constexpr Walk kWalk = walk_of(kPass);
  static constexpr bool kKeyPass = kPass == Pass::kKeys;
  static constexpr int kLeastCtas = small_backward_ctas(kDim, kPass);
  using Rows = SharedTile<kSmallRows, kDim* int(sizeof(T))>;  // of a box, too, whose number of rows is free
  using Group = SharedTile<16, kDim* int(sizeof(T))>;         // of 16 columns, wherever they lie
  static_assert(sizeof(T) == 2 && Rows::kPanels == 1, "rows of a box must be single panels");

  struct Shared {
    TileTables<kSmallRows, kMostColumns, kWalk, true, kSmallWarps> tables;
    int list_row[kMostColumns];  // in the box, relative to the segment's first column
    // Where the CTA is: the box, relative to QueryTile::key, and the head of the queries. Here they take no registers.
    int box[kMaxRank], head;
    const float* bias;  // table of that head, if there is one
    // Of each kind of rows there are two: what scores come from, and what d_probs come from. Behind these lie the boxes
    // of the columns, in the same order, and those of their lse and delta.
    alignas(128) uint8_t score_side[Rows::kBytes];  // queries, or keys; later their gradients
    alignas(128) uint8_t prob_side[Rows::kBytes];   // d_out, or values; later the gradients of values
  };
};

template <class Traits>
struct SmallBackward {
  using Numbers = typename Traits::Numbers;
  using T = typename Traits::T;
  using Shared = typename Traits::Shared;
  using Rows = typename Traits::Rows;
  using Group = typename Traits::Group;
  static constexpr int kDim = Traits::kDim, kSteps = Traits::kSteps, kThreads = Traits::kThreads;
  static constexpr bool kKeyPass = Traits::kKeyPass;
  using Left = typename Numbers::Left[kSteps];
  using Sums = float[1][kDim / 2];
  using Scores = float[1][8];  // of a group

  const SmallBackwardParams& params;
  Shared& smem;
  const int warp, lane;
  const QueryTile& tile;
  const uint32_t boxes;  // address of the first one

  __device__ SmallBackward(const SmallBackwardParams& params, Shared& smem)
      : params(params),
        smem(smem),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        tile(smem.tables.tile),
        boxes(ptx::shared_address(&smem) + uint32_t(sizeof(Shared))) {}

  __device__ void run() {
    if (!smem.tables.template fill<kThreads>(params, blockIdx.x)) return;
    for (int n = threadIdx.x; n < kMostColumns; n += kThreads) {
      const TilePlace place = params.places.columns[n];
      smem.list_row[n] = row_of_box(place[0], place[1], place[2]);
    }
    if (threadIdx.x == 0) {
      for (int& begin : smem.box) begin = 0;
      begin_head(kKeyPass ? tile.head * params.schedule.by_group.divisor : tile.head);
    }
    __syncthreads();
    copy_staying_rows(smem.score_side, kKeyPass ? params.key : params.query);
    copy_staying_rows(smem.prob_side, kKeyPass ? params.value : params.d_out);

    float row_lse[2], row_delta[2];
    Sums d_score_side, d_prob_side;
#pragma unroll
    for (int e = 0; e < kDim / 2; ++e) d_score_side[0][e] = d_prob_side[0][e] = 0;
    for (bool first = true;; first = false) {
      copy_boxes();
      ptx::copy_async_commit();
      if (!kKeyPass && first) find_delta(row_lse, row_delta);
      ptx::copy_async_wait<0>();
      __syncthreads();
      if (smem.tables.parts[warp].live) add_list(row_lse, row_delta, d_score_side, d_prob_side);
      if (is_last_box()) break;
      __syncthreads();  // all warps are done with the boxes
      if (threadIdx.x == 0) move_on();
      __syncthreads();
    }
    if (!smem.tables.parts[warp].live) return;
    write(smem.score_side, d_score_side, params.problem_scale, kKeyPass ? params.d_key : params.d_query);
    if (kKeyPass) write(smem.prob_side, d_prob_side, 1.f, params.d_value);
  }

 private:
  __device__ __forceinline__ int row_of_box(int x0, int x1, int x2) const {
    return (x0 * params.box[1] + x1) * params.box[2] + x2;
  }
  __device__ __forceinline__ int row_of_thread(int i) const { return 16 * warp + 8 * i + lane / 4; }

  // ---- copies

  // Goes through the boxes of one head after the other, innermost axis fastest.
  __device__ __forceinline__ bool is_last_box() const {
    bool last = !kKeyPass || smem.head + 1 == (tile.head + 1) * params.schedule.by_group.divisor;
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) last = last && smem.box[a] + params.box[a] >= tile.extent[a];
    return last;
  }

  __device__ __forceinline__ void move_on() {
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      smem.box[a] += params.box[a];
      if (smem.box[a] < tile.extent[a]) return;
      smem.box[a] = 0;
    }
    begin_head(smem.head + 1);
  }

  __device__ __forceinline__ void begin_head(int head) {
    smem.head = head;
    if (params.bias != nullptr) smem.bias = bias_table(params, tile.batch, head);
  }

  __device__ __forceinline__ void copy_staying_rows(uint8_t (&rows)[Rows::kBytes], const RowArray& array) {
    copy_rows<Rows, kThreads>(ptx::shared_address(rows), array, first_row(array, tile.batch, tile.head),
                              [&](int row) { return smem.tables.row_position(params, row); });
  }

  __device__ __forceinline__ void copy_boxes() {
    const int column_head = kKeyPass ? smem.head : params.schedule.by_group.quotient(smem.head);
    const RowArray &scores = kKeyPass ? params.query : params.key, &probs = kKeyPass ? params.d_out : params.value;
    const char* const score_rows = first_row(scores, tile.batch, column_head);
    const char* const prob_rows = first_row(probs, tile.batch, column_head);
    const int64_t first = int64_t(tile.batch) * params.positions * params.heads + smem.head;  // of lse and delta
    for_each_box_chunk<Rows, kThreads>(params, params, tile, smem.box, [&](int row, int chunk, int position) {
      copy_box_chunk<Rows>(boxes, scores, score_rows, row, chunk, position);
      copy_box_chunk<Rows>(boxes + params.box_bytes, probs, prob_rows, row, chunk, position);
      if (kKeyPass && chunk < 2) {
        const int64_t at = first + int64_t(imax(position, 0)) * params.heads;
        ptx::copy_async<4>(numbers_of(row) + 4 * chunk, (chunk == 0 ? params.lse : params.delta) + at, position >= 0);
      }
    });
  }

  // Address of the lse and delta of a row of the box.
  __device__ __forceinline__ uint32_t numbers_of(int row) const { return boxes + 2 * params.box_bytes + 8 * row; }

  __device__ __forceinline__ void find_delta(float (&row_lse)[2], float (&row_delta)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      find_row_delta<T>(params, tile, smem.tables.row_position(params, row_of_thread(i)), lane, true, row_lse[i],
                        row_delta[i]);
    }
  }

  // ---- products with the columns of the warp's list

  struct Segment {
    int first;         // row of its first column in the box
    uint32_t seen[2];  // columns that this thread's rows see, shifted so that the present group comes first
    int bias[2];       // entry of the head's bias table for the first column
  };

  // Of what the warp's rows see along an axis, the part in the box.
  __device__ __forceinline__ Interval list(int a) const {
    const Interval seen = smem.tables.parts[warp].span[a].any;
    return {imax(seen.begin, smem.box[a]), imin(seen.end, smem.box[a] + params.box[a])};
  }

  __device__ __forceinline__ void add_list(const float (&row_lse)[2], const float (&row_delta)[2], Sums& d_score_side,
                                           Sums& d_prob_side) {
    Left score_left, prob_left;
    load_left(smem.score_side, score_left);
    load_left(smem.prob_side, prob_left);
    int begin[kMaxRank];  // of a segment
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      begin[a] = list(a).begin;
      if (begin[a] >= list(a).end) return;
    }
    do {
      Segment segment = segment_at(begin);
#pragma unroll 1
      for (int group = 0; group < params.groups; ++group) {
        if (__any_sync(~0u, (segment.seen[0] | segment.seen[1]) & 15)) {
          add_group(segment, 16 * group, score_left, prob_left, row_lse, row_delta, d_score_side, d_prob_side);
        }
        segment.seen[0] >>= 4;
        segment.seen[1] >>= 4;
      }
    } while (next_segment(begin));
  }

  __device__ __forceinline__ bool next_segment(int (&begin)[kMaxRank]) const {
#pragma unroll
    for (int a = kMaxRank - 1; a >= 0; --a) {
      begin[a] += params.schedule.axes[a].key_tile;
      if (begin[a] < list(a).end) return true;
      begin[a] = list(a).begin;
    }
    return false;
  }

  __device__ __forceinline__ void load_left(const uint8_t (&rows)[Rows::kBytes], Left& left) const {
    const uint32_t address = left_address<Rows>(ptx::shared_address(rows), 16 * warp, lane);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Fragment a;
      ptx::load_matrix_x4(a, Rows::moved(address, 0, k));
      left[k] = Numbers::left(a);
    }
  }

  __device__ __forceinline__ Segment segment_at(const int (&begin)[kMaxRank]) const {
    Segment segment;
    segment.first = row_of_box(begin[0] - smem.box[0], begin[1] - smem.box[1], begin[2] - smem.box[2]);
    uint32_t inside = ~uint32_t(0);  // columns of the list: a segment may overhang it
#pragma unroll
    for (int a = 0; a < kMaxRank; ++a) {
      inside &= key_mask_word(params.places.mask_layout, smem.tables.mask, a, {0, list(a).end - begin[a]}, lane % 4);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of_thread(i);
      segment.seen[i] = smem.tables.word(params, begin, row, lane % 4) & inside;
      segment.bias[i] = params.bias != nullptr ? int(smem.tables.bias_entry(params, begin, row)) : 0;
    }
    return segment;
  }

  // 16 columns of a segment, from `begin` on.
  __device__ __forceinline__ void add_group(const Segment& segment, int begin, const Left& score_left,
                                            const Left& prob_left, const float (&row_lse)[2],
                                            const float (&row_delta)[2], Sums& d_score_side, Sums& d_prob_side) {
    // Of columns outside the list, any row of the box.
    const int box_row = imin(segment.first + smem.list_row[begin + lane % 16], params.box_rows - 1);
    const uint32_t score_side = boxes + Rows::place(unsigned(box_row), lane / 16);
    const uint32_t prob_side = score_side + params.box_bytes;
    Scores probs, d_scores;
    multiply(score_left, score_side, probs[0]);
    multiply(prob_left, prob_side, d_scores[0]);
    const bool has_bias = params.bias != nullptr;
    if (has_bias) add_bias(segment, begin, probs[0]);
    const float scale = has_bias ? 1.f : params.scale;
#pragma unroll
    for (int bit = 0; bit < 4; ++bit) {
      float2 numbers;
      if (kKeyPass) numbers = ptx::load_pair(numbers_of(__shfl_sync(~0u, box_row, column_of(bit))));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int e = bit / 2 * 4 + 2 * i + bit % 2;
        const bool seen = segment.seen[i] >> bit & 1;
        const float lse = kKeyPass ? numbers.x * kLog2E : row_lse[i];
        const float delta = kKeyPass ? numbers.y : row_delta[i];
        const float p = ptx::exp2_approximate(fmaf(probs[0][e], scale, -lse));
        probs[0][e] = seen ? p : 0.f;
        d_scores[0][e] = seen ? p * (d_scores[0][e] - delta) : 0.f;
      }
    }
    if (kKeyPass) add_weighted_rows<Numbers, Group>(d_prob_side, probs, prob_side);
    add_weighted_rows<Numbers, Group>(d_score_side, d_scores, score_side);
  }

  // This lane's column of a group for a bit of a mask word.
  __device__ __forceinline__ int column_of(int bit) const { return bit / 2 * 8 + lane % 4 * 2 + bit % 2; }

  // Scores become scaled ones, in powers of two, with their bias.
  __device__ __forceinline__ void add_bias(const Segment& segment, int begin, float (&scores)[8]) const {
#pragma unroll
    for (int bit = 0; bit < 4; ++bit) {
      const int step = smem.tables.column_bias[begin + column_of(bit)];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[bit / 2 * 4 + 2 * i + bit % 2];
        const bool seen = segment.seen[i] >> bit & 1;  // entries of others need not exist
        const float bias = seen ? __ldg(smem.bias + segment.bias[i] + (kKeyPass ? -step : step)) : 0.f;
        score = fmaf(score, params.scale, bias * kLog2E);
      }
    }
  }

  // products = left columns^T. The lanes' addresses are those of add_weighted_rows(), so that ldmatrix reads (columns
  // 0-7, channels 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
  __device__ __forceinline__ void multiply(const Left& left, uint32_t columns, float (&products)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) products[e] = 0;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Fragment b;
      ptx::load_matrix_x4(b, Group::moved(columns, 0, k));
      Numbers::multiply_add(&products[0], left[k], Numbers::right(b[0], b[2]));
      Numbers::multiply_add(&products[4], left[k], Numbers::right(b[1], b[3]));
    }
  }

  // ---- results, through the places of the warp's rows

  __device__ __forceinline__ void write(uint8_t (&rows)[Rows::kBytes], const Sums& sums, float factor,
                                        const RowArray& array) {
    const float factors[2] = {factor, factor};
    const uint32_t staged = ptx::shared_address(rows);
    store_fragments<Numbers, Rows>(staged, 16 * warp, lane, sums[0], factors);
    __syncwarp();
    write_rows<Rows, T, 16>(staged, array, first_row(array, tile.batch, tile.head), 16 * warp, lane,
                            [&](int row) { return smem.tables.row_position(params, row); });
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLeastCtas)
    small_backward_kernel(const __grid_constant__ SmallBackwardParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  SmallBackward<Traits>(params, *reinterpret_cast<typename Traits::Shared*>(shared_memory)).run();
}

}  // namespace jax_natten::sm80
