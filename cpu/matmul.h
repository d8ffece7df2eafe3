// The two products that all operations are made of, register-blocked, on packed operands.
//
//   dots:        S[r, j] = sum_d A[r, d] Bt[d, j]     vectors along the columns j; Bt is packed transposed
//   accumulate:  C[r, e] += sum_j W[r, j] B[j, e]      vectors along e
//
// Columns come as a list of lines: runs of adjacent columns of a panel, each of the same count. A tile has a few rows
// that share their columns, so that each vector of the panel that is loaded is used for all rows.
#pragma once

#include "simd.h"

namespace jax_natten::cpu::JAX_NATTEN_ISA {

// Most rows of a tile in `dots`, and in `accumulate`, where fewer rows waste less on columns that only some rows use.
constexpr int kTileRows = 4;
constexpr int kAccumulateRows = kRegisters == 32 && kVectorBytes > 16 ? 4 : 2;
// Lines of a step: bounds the lists of line pointers.
constexpr int kMaxLines = 64;

// Vectors of columns in a block: `rows` * vectors accumulators fill the registers but for the operands' three or four.
template <int rows>
constexpr int kBlock = rows == 1                     ? 8
                       : (kRegisters - 4) / rows > 6 ? 6
                                                     : (kRegisters - 4) / rows;

// Calls f with the constant `count`, 1 to 8.
template <typename F>
JAX_NATTEN_INLINE void with_constant(int count, F f) {
  switch (count) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 6:
      return f(std::integral_constant<int, 6>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

template <int rows, int vectors, typename Real>
JAX_NATTEN_INLINE void dots_block(const Real* a, int lda, int depth, const Real* const* bt, ptrdiff_t ldb, Real* s,
                                  ptrdiff_t lds) {
  Vec<Real> sum[rows][vectors] = {};
  const Real* column[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) column[v] = bt[v];
  ptrdiff_t offset = 0;
  for (int d = 0; d < depth; ++d, offset += ldb) {
    // The shorter side is held in registers, beside the sums.
    if constexpr (rows < vectors) {
      Vec<Real> factor[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) factor[r] = broadcast(a[r * lda + d]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const Vec<Real> b = in_register(load(column[v] + offset));
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sum[r][v] += factor[r] * b;
      }
    } else {
      Vec<Real> b[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) b[v] = in_register(load(column[v] + offset));
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Vec<Real> factor = broadcast(a[r * lda + d]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] += factor * b[v];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(s + r * lds + v * kLanes<Real>, sum[r][v]);
  }
}

// S[r, (line, v, lane)] for whole vectors: `vectors` of them per line, starting at the pointers in `lines`.
template <int rows, typename Real>
void dots(const Real* a, int lda, int depth, const Real* const* lines, int line_count, int vectors, ptrdiff_t ldb,
          Real* s, ptrdiff_t lds) {
  constexpr int W = kLanes<Real>;
  const int total = line_count * vectors;
  int blocks = (total + kBlock<rows> - 1) / kBlock<rows>;
  int line = 0, within = 0;
  for (int done = 0; done < total; --blocks) {
    // Blocks of equal size: one of a single vector would wait for its own sums.
    const int count = blocks == 1 ? total - done : (total - done + blocks - 1) / blocks;
    const Real* columns[kBlock<rows>];
    for (int v = 0; v < count; ++v) {
      columns[v] = lines[line] + within * W;
      if (++within == vectors) {
        within = 0;
        ++line;
      }
    }
    Real* to = s + done * W;
    const auto block = [&](auto width) {
      if constexpr (decltype(width)::value <= kBlock<rows>) {
        dots_block<rows, decltype(width)::value>(a, lda, depth, columns, ldb, to, lds);
      }
    };
    with_constant(count, block);
    done += count;
  }
}

template <int rows, int vectors, typename Real>
JAX_NATTEN_INLINE void accumulate_block(const Real* const* lines, ptrdiff_t offset, int line_count, int columns,
                                        ptrdiff_t ldb, const Real* w, ptrdiff_t ldw, int line_stride, Real* c,
                                        ptrdiff_t ldc, const Real* factors) {
  constexpr int W = kLanes<Real>;
  // The sum starts from zero: short sums of sums round better than a long one.
  Vec<Real> sum[rows][vectors] = {};
  for (int line = 0; line < line_count; ++line) {
    const Real* b = lines[line] + offset;
    const Real* weights = w + line * line_stride;
    for (int j = 0; j < columns; ++j, b += ldb) {
      Vec<Real> factor[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) factor[r] = broadcast(weights[r * ldw + j]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const Vec<Real> value = in_register(load(b + v * W));
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sum[r][v] += factor[r] * value;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    const Vec<Real> factor = broadcast(factors[r]);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Real* to = c + r * ldc + v * W;
      store(to, factor * load(to) + sum[r][v]);
    }
  }
}

// C[r, :] = factors[r] C[r, :] + sum over lines and columns of W[r, (line, column)] B[line, column, :], for `rows` rows
// of `width` (whole vectors) elements. Each line has `columns` columns, `ldb` apart.
template <int rows, typename Real>
void accumulate(const Real* const* lines, int line_count, int columns, ptrdiff_t ldb, int width, const Real* w,
                ptrdiff_t ldw, int line_stride, Real* c, ptrdiff_t ldc, const Real* factors) {
  constexpr int W = kLanes<Real>;
  const int total = width / W;
  int blocks = (total + kBlock<rows> - 1) / kBlock<rows>;
  for (int done = 0; done < total; --blocks) {
    const int count = blocks == 1 ? total - done : (total - done + blocks - 1) / blocks;
    const auto block = [&](auto vectors) {
      if constexpr (decltype(vectors)::value <= kBlock<rows>) {
        accumulate_block<rows, decltype(vectors)::value>(lines, done * W, line_count, columns, ldb, w, ldw, line_stride,
                                                         c + done * W, ldc, factors);
      }
    };
    with_constant(count, block);
    done += count;
  }
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
