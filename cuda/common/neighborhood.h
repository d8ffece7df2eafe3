// The window formulas of neighborhood attention, shared by every CPU and CUDA kernel.
//
// This header and jax_natten/neighborhood.py are the only two places that know them; tests/test_neighborhood.py
// compares the two exhaustively. Semantics: NATTEN (arXiv 2403.04690, stride: 2504.16922).
//
// Vocabulary: a *position* x is an index on an axis of the grid. Dilation splits an axis into `dilation` groups,
// position x belonging to group x % dilation at *in-group index* x / dilation. Windows are intervals of in-group
// indices.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define JAX_NATTEN_HD __host__ __device__ __forceinline__
#else
// Always: a CPU kernel compiled for one instruction set must not end up calling a copy compiled for another.
#define JAX_NATTEN_HD inline __attribute__((always_inline))
#endif

// Before a loop over a compile-time number of registers or axes.
#if defined(__CUDA_ARCH__)
#define JAX_NATTEN_UNROLL _Pragma("unroll")
#else
#define JAX_NATTEN_UNROLL
#endif

namespace jax_natten {

constexpr int kMaxRank = 3;

// Half-open interval of in-group indices.
struct Interval {
  int begin;
  int end;
};

struct Axis {
  int length = 1;    // positions on the axis
  int window = 1;    // kernel size K
  int stride = 1;    // queries of one stride block share the leader's window
  int dilation = 1;  // distance of neighboring keys
  bool causal = false;
};

JAX_NATTEN_HD int imin(int a, int b) { return a < b ? a : b; }
JAX_NATTEN_HD int imax(int a, int b) { return a > b ? a : b; }

// Number of positions in a dilation group.
JAX_NATTEN_HD int group_length(const Axis& axis, int group) {
  return (axis.length - group + axis.dilation - 1) / axis.dilation;
}

// The window of the query at in-group index i, whose stride block begins at `block`, in a group of `length` positions.
JAX_NATTEN_HD Interval window_of_block(const Axis& axis, int block, int i, int length) {
  if (axis.causal) {
    const int leader = imin(block + axis.stride - 1, length - 1);
    return {imax(leader - axis.window + 1, 0), i + 1};
  }
  const int leader = imin(block + axis.stride / 2, length - 1);
  const int begin = imin(imax(leader - axis.window / 2, 0), length - axis.window);
  return {begin, begin + axis.window};
}

// Keys seen by the query at in-group index i of a group with `length` positions. Never empty; holds i itself.
JAX_NATTEN_HD Interval window_of_query(const Axis& axis, int i, int length) {
  return window_of_block(axis, i / axis.stride * axis.stride, i, length);
}

// Queries that see the key at in-group index j: the inverse window, one interval. Never empty. `to_block` rounds down
// to a multiple of the stride.
template <typename ToBlock>
JAX_NATTEN_HD Interval queries_of_key(const Axis& axis, int j, int length, ToBlock to_block) {
  const int K = axis.window, s = axis.stride;
  if (axis.causal) return {j, imin(to_block(j + K) + (j + K >= length ? s : 0), length)};
  const int offset = s - s / 2 - 1;
  const int left = K / 2, right = K / 2 + K % 2 - 1;
  const int begin = j >= K ? to_block(j - right + offset) : 0;
  const int end = j >= length - K ? length : imin(to_block(j + left + offset + 1), length);
  return {begin, end};
}

struct ToBlockByDivision {
  int stride;
  JAX_NATTEN_HD int operator()(int x) const { return x / stride * stride; }
};

JAX_NATTEN_HD Interval queries_of_key(const Axis& axis, int j, int length) {
  return queries_of_key(axis, j, length, ToBlockByDivision{axis.stride});
}

// A whole problem's windows. Problems of rank 1 and 2 are padded *in front* with axes of length 1 and window 1, so that
// axes[2] is always the innermost (contiguous) one and one kernel serves every rank.
struct Neighborhood {
  int rank = 1;
  Axis axes[kMaxRank];

  JAX_NATTEN_HD int64_t positions() const { return int64_t(axes[0].length) * axes[1].length * axes[2].length; }
  JAX_NATTEN_HD int64_t window_size() const { return int64_t(axes[0].window) * axes[1].window * axes[2].window; }
  // Entries of one head's relative position bias table, prod(2 K - 1).
  JAX_NATTEN_HD int64_t bias_size() const {
    return int64_t(2 * axes[0].window - 1) * (2 * axes[1].window - 1) * (2 * axes[2].window - 1);
  }
};

}  // namespace jax_natten
