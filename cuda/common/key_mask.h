// Masks of the columns of a key tile, without coordinate arithmetic per element.
//
// The n-th column of a tile of t0 x t1 x t2 keys is the key at row-major place n; columns past the last key are
// padding. A thread of an m64nNk16 or m16n8k16 accumulator owns columns n = 8 j + 2 q + b, with q = lane % 4 and b = 0,
// 1; bit 2 j + b of a mask word stands for column n. For each axis and each coordinate c = 0 .. t the table holds four
// words (one per q): the columns whose coordinate on that axis is at least c. The keys of a window then are, per axis,
// the columns at or past its begin that are not at or past its end.
#pragma once

#include <cstdint>

#include "neighborhood.h"

namespace jax_natten {

constexpr int kMaxKeyColumns = 128;                                 // 32 bits of 4 columns
constexpr int kMaxKeyMaskWords = 4 * (kMaxKeyColumns + 1 + 2 + 2);  // worst case: all keys along one axis

struct KeyMaskLayout {
  int tile[kMaxRank];   // keys per axis
  int first[kMaxRank];  // first row (of four words) of the axis
  int words;

  KeyMaskLayout() = default;
  KeyMaskLayout(int t0, int t1, int t2) : tile{t0, t1, t2}, first{0, t0 + 1, t0 + t1 + 2} {
    words = 4 * (t0 + t1 + t2 + 3);
  }
};

inline void fill_key_mask(const KeyMaskLayout& layout, uint32_t* table) {
  const int *tile = layout.tile, keys = tile[0] * tile[1] * tile[2];
  for (int i = 0; i < layout.words; ++i) table[i] = 0;
  for (int n = 0; n < keys; ++n) {
    const int coordinate[kMaxRank] = {n / (tile[1] * tile[2]), n / tile[2] % tile[1], n % tile[2]};
    const uint32_t bit = uint32_t(1) << (n / 8 * 2 + n % 2);
    for (int a = 0; a < kMaxRank; ++a) table[4 * (layout.first[a] + coordinate[a]) + n % 8 / 2] |= bit;
  }
  for (int a = 0; a < kMaxRank; ++a) {
    for (int i = 4 * (layout.first[a] + tile[a]) - 1; i >= 4 * layout.first[a]; --i) table[i] |= table[i + 4];
  }
}

// Turns the words of an axis into those of whole windows: c then stands for the columns with coordinates c to c +
// window - 1.
inline void fill_whole_windows(const KeyMaskLayout& layout, uint32_t* table, int a, int window) {
  for (int c = 0; c + window <= layout.tile[a]; ++c) {
    for (int q = 0; q < 4; ++q) {
      table[4 * (layout.first[a] + c) + q] &= ~table[4 * (layout.first[a] + c + window) + q];
    }
  }
}

// Columns of quad lane q whose coordinate on axis a lies in the window, given relative to the tile's first key. Word: a
// table of up to 64 columns may be one of uint16_t.
template <typename Word>
JAX_NATTEN_HD uint32_t key_mask_word(const KeyMaskLayout& layout, const Word* table, int a, Interval window, int q) {
  const int begin = imin(imax(window.begin, 0), layout.tile[a]);
  const int end = imin(imax(window.end, 0), layout.tile[a]);
  return table[4 * (layout.first[a] + begin) + q] & ~uint32_t(table[4 * (layout.first[a] + end) + q]);
}

// The first `count` columns.
JAX_NATTEN_HD uint32_t first_columns_word(int count, int q) {
  const int columns = imin(imax(count, 0), kMaxKeyColumns);
  const int bits = columns / 8 * 2 + imin(imax(columns % 8 - 2 * q, 0), 2);
  return bits == 32 ? ~uint32_t(0) : (uint32_t(1) << bits) - 1;
}

// Columns whose key lies in a box of windows, relative like `begin` of the tile.
template <int kRank, typename Word, class Window>
JAX_NATTEN_HD uint32_t key_mask_word(const KeyMaskLayout& layout, const Word* table, const Window* windows,
                                     const int* begin, int q) {
  uint32_t word = ~uint32_t(0);
  JAX_NATTEN_UNROLL
  for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
    const Interval window = windows[a];
    word &= key_mask_word(layout, table, a, {window.begin - begin[a], window.end - begin[a]}, q);
  }
  return word;
}

}  // namespace jax_natten
