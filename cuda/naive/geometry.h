// Which query or key a group of lanes works on, and the walk over its neighbors. Host and device code without any CUDA:
// all of it runs (and is tested) on a CPU.
#pragma once

#include <initializer_list>

#include "../common/fast_division.h"
#include "../common/neighborhood.h"

namespace jax_natten::naive {

// Division of 64-bit numbers by one that is known at launch. Granlund and Montgomery as in FastDivisor: exact for
// 0 <= x < 2^63.
struct WideDivisor {
  int64_t divisor = 1;
  uint64_t multiplier = 0;
  int shift = 0;

  WideDivisor() = default;
  explicit WideDivisor(int64_t d) : divisor(d) {
    if (d <= 1) return;
    int log = 1;
    while (log < 63 && (int64_t(1) << log) < d) ++log;
    multiplier = uint64_t(((static_cast<unsigned __int128>(1) << (63 + log)) + d - 1) / d);
    shift = log - 1;
  }

  // Replaces x by its quotient and returns the rest.
  JAX_NATTEN_HD int64_t divide(int64_t& x) const {
    if (divisor == 1) return 0;
    const int64_t quotient = int64_t(high(uint64_t(x), multiplier) >> shift);
    const int64_t rest = x - quotient * divisor;
    x = quotient;
    return rest;
  }

 private:
  JAX_NATTEN_HD static uint64_t high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
    return __umul64hi(a, b);
#else
    return uint64_t((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
  }
};

// An axis with what its divisions need.
struct DividedAxis {
  Axis axis;
  FastDivisor stride, dilation;
  FastDivisor shorter, longer;  // lengths of the dilation groups, which differ by one ..
  int longer_groups;            // .. the first so many have the longer one

  explicit DividedAxis(const Axis& axis = Axis())
      : axis(axis),
        stride(axis.stride),
        dilation(axis.dilation),
        shorter(imax(axis.length / axis.dilation, 1)),
        longer(axis.length / axis.dilation + 1),
        longer_groups(axis.length % axis.dilation) {}

  JAX_NATTEN_HD Interval window_of_query(int index, int length) const {
    return window_of_block(axis, stride.quotient(index) * axis.stride, index, length);
  }
};

// A position of the grid, per axis as dilation group, in-group index and length of that group.
struct Place {
  int64_t position;
  int group[kMaxRank];
  int index[kMaxRank];
  int length[kMaxRank];
};

struct Item {
  bool valid;
  int64_t batch;
  int head;
  Place place;
};

// Whether the items of a launch are queries with their heads or keys with theirs.
enum class Items { kQueries, kKeys };

// Everything the threads of a launch need to find their (batch, position, head) items, in this order: heads that read
// the same memory first (the query heads of a key head, and as many key heads as fill a cache line); then positions, in
// patches of a few rows, so that the groups of a block share most of their windows in L1, and dilation group by
// dilation group; then the other heads and the batch.
struct Geometry {
  int64_t batch, positions;
  int heads;  // of the items
  DividedAxis axes[kMaxRank];
  FastDivisor group;          // query heads of a key head
  FastDivisor patch_rows[2];  // along axes 0 and 1; divide their lengths
  WideDivisor head_tile, patch, row, strips[2], head_tiles;
  WideDivisor middle;      // length of axis 1
  WideDivisor bias_share;  // batch elements that share a bias

  template <class Shape>
  Geometry(const Shape& p, Items items, int64_t row_bytes)
      : batch(p.batch),
        positions(p.neighborhood.positions()),
        heads(items == Items::kQueries ? p.heads : p.kv_heads),
        group(p.group()),
        bias_share(p.has_bias() ? p.batch / p.bias_batch : 1) {
    const Neighborhood& window = p.neighborhood;
    for (int a = 0; a < kMaxRank; ++a) axes[a] = DividedAxis(window.axes[a]);
    constexpr int kCacheLine = 128;
    const int least_tile = items == Items::kQueries ? p.group() : 1;
    int tile = least_tile;
    while (tile / least_tile * row_bytes * 2 <= kCacheLine && heads % (2 * tile) == 0) tile *= 2;
    head_tile = WideDivisor(tile);
    head_tiles = WideDivisor(heads / tile);
    patch_rows[0] = FastDivisor(dividing(window.axes[0].length, {2, 3, 1}));
    patch_rows[1] = FastDivisor(dividing(window.axes[1].length, {4, 5, 3, 6, 7, 2, 8, 1}));
    patch = WideDivisor(patch_rows[0].divisor * patch_rows[1].divisor);
    row = WideDivisor(window.axes[2].length);
    middle = WideDivisor(window.axes[1].length);
    for (int a = 0; a < 2; ++a) strips[a] = WideDivisor(window.axes[a].length / patch_rows[a].divisor);
  }

  JAX_NATTEN_HD int64_t items() const { return batch * positions * heads; }

  // Items past the end are clamped to the first one and marked: their threads stay in step with the warp.
  JAX_NATTEN_HD Item item(int64_t ordinal) const {
    Item item;
    item.valid = ordinal < items();
    ordinal = item.valid ? ordinal : 0;
    const int in_tile = int(head_tile.divide(ordinal));
    int row1;
    const int row0 = patch_rows[1].divide(int(patch.divide(ordinal)), row1);
    const int ordinal2 = int(row.divide(ordinal));
    const int ordinal1 = int(strips[1].divide(ordinal)) * patch_rows[1].divisor + row1;
    const int ordinal0 = int(strips[0].divide(ordinal)) * patch_rows[0].divisor + row0;
    item.head = int(head_tiles.divide(ordinal) * head_tile.divisor) + in_tile;
    item.batch = ordinal;
    split(ordinal0, 0, item.place);
    split(ordinal1, 1, item.place);
    split(ordinal2, 2, item.place);
    item.place.position = position(item.place.group, item.place.index);
    return item;
  }

  // The place of a position.
  JAX_NATTEN_HD Place place(int64_t position) const {
    Place place;
    place.position = position;
    const int x2 = int(row.divide(position)), x1 = int(middle.divide(position));
    const int x[kMaxRank] = {int(position), x1, x2};
    for (int a = 0; a < kMaxRank; ++a) {
      place.index[a] = axes[a].dilation.divide(x[a], place.group[a]);
      place.length[a] = length_of_group(a, place.group[a]);
    }
    return place;
  }

  // Position of in-group indices.
  JAX_NATTEN_HD int64_t position(const int (&group)[kMaxRank], const int (&index)[kMaxRank]) const {
    int64_t position = 0;
    for (int a = 0; a < kMaxRank; ++a) {
      position = position * axes[a].axis.length + group[a] + int64_t(index[a]) * axes[a].axis.dilation;
    }
    return position;
  }

 private:
  static int dividing(int length, std::initializer_list<int> candidates) {
    for (int rows : candidates) {
      if (length % rows == 0) return rows;
    }
    return 1;
  }

  JAX_NATTEN_HD int length_of_group(int a, int group) const {
    return group < axes[a].longer_groups ? axes[a].longer.divisor : axes[a].shorter.divisor;
  }

  // Splits a coordinate that counts dilation group by dilation group: neighbors in this order are neighbors in a
  // window.
  JAX_NATTEN_HD void split(int ordinal, int a, Place& place) const {
    const DividedAxis& divided = axes[a];
    const int boundary = divided.longer_groups * divided.longer.divisor;
    if (ordinal < boundary) {
      place.group[a] = divided.longer.divide(ordinal, place.index[a]);
    } else {
      place.group[a] = divided.longer_groups + divided.shorter.divide(ordinal - boundary, place.index[a]);
    }
    place.length[a] = length_of_group(a, place.group[a]);
  }
};

// A product of intervals, one per axis, of in-group indices; axis 2 is innermost.
struct Box {
  int64_t origin;       // position of the first element
  int begin[kMaxRank];  // its in-group indices
  int count[kMaxRank];
};

// `count` consecutive positions. Additional keys and chunks of the grid are walked this way.
JAX_NATTEN_HD Box linear_box(int64_t origin, int count) { return {origin, {0, 0, 0}, {count > 0, 1, count}}; }
JAX_NATTEN_HD Box empty_box() { return linear_box(0, 0); }

JAX_NATTEN_HD Box keys_of_query(const Geometry& geometry, const Place& query) {
  Box box;
  for (int a = 0; a < kMaxRank; ++a) {
    const Interval keys = geometry.axes[a].window_of_query(query.index[a], query.length[a]);
    box.begin[a] = keys.begin;
    box.count[a] = keys.end - keys.begin;
  }
  box.origin = geometry.position(query.group, box.begin);
  return box;
}

JAX_NATTEN_HD Box queries_of_key(const Geometry& geometry, const Place& key) {
  Box box;
  for (int a = 0; a < kMaxRank; ++a) {
    const Interval queries = jax_natten::queries_of_key(geometry.axes[a].axis, key.index[a], key.length[a]);
    box.begin[a] = queries.begin;
    box.count[a] = queries.end - queries.begin;
  }
  box.origin = geometry.position(key.group, box.begin);
  return box;
}

// Walks a box in row-major order, and lets streams follow: their next() is called for a step along the innermost axis,
// their jump() once it has gone from the end of a row to the start of the next. Stays past the end once it is there.
struct Cursor {
  int at[kMaxRank] = {0, 0, 0};

  JAX_NATTEN_HD bool valid(const Box& box) const { return at[0] < box.count[0]; }

  template <typename... Streams>
  JAX_NATTEN_HD void advance(const Box& box, Streams&... streams) {
    if (++at[2] != box.count[2]) {
      (streams.next(), ...);
    } else {
      at[2] = 0;
      if (++at[1] == box.count[1]) {
        at[1] = 0;
        ++at[0];
      }
      (streams.jump(box, *this), ...);
    }
  }
};

// Follows a cursor through an array that is laid out along the box: at[0] * outer[0] + at[1] * outer[1] + at[2] * step
// from its first element. The outer steps are read from constant memory (a kernel parameter) where they are needed:
// registers are scarcer. A linear box never uses them.
template <typename T>
struct Stream {
  const T* at;
  int64_t step;
  const int64_t* outer;

  JAX_NATTEN_HD Stream(const T* first, int64_t step, const int64_t (&outer)[2]) : at(first), step(step), outer(outer) {}
  JAX_NATTEN_HD void next() { at += step; }
  JAX_NATTEN_HD void jump(const Box& box, const Cursor& cursor) {
    at += outer[1] - (box.count[2] - 1) * step;
    if (cursor.at[1] == 0) at += outer[0] - box.count[1] * outer[1];
  }
};

// Steps along axes 0 and 1, in elements: of an array with `stride` elements per position, of bias tables, of weights.
struct Steps {
  int64_t outer[2];
};

inline Steps row_steps(const Neighborhood& window, int64_t stride) {
  const Axis* axes = window.axes;
  return {{int64_t(axes[0].dilation) * axes[1].length * axes[2].length * stride,
           int64_t(axes[1].dilation) * axes[2].length * stride}};
}

inline Steps bias_steps(const Neighborhood& window, int sign) {
  const int64_t size1 = 2 * int64_t(window.axes[1].window) - 1, size2 = 2 * int64_t(window.axes[2].window) - 1;
  return {{sign * size1 * size2, sign * size2}};
}

inline Steps slot_steps(const Neighborhood& window) {
  const int64_t size1 = window.axes[1].window, size2 = window.axes[2].window;
  return {{size1 * size2, size2}};
}

// Entry of one head's bias table for (query, key): key - query + K - 1 per axis, in-group.
JAX_NATTEN_HD int64_t bias_index(const Neighborhood& window, const int (&query)[kMaxRank], const int (&key)[kMaxRank]) {
  int64_t index = 0;
  for (int a = 0; a < kMaxRank; ++a) {
    const int64_t size = window.axes[a].window;
    index = index * (2 * size - 1) + (key[a] - query[a] + size - 1);
  }
  return index;
}

// The keys of a window lie at K consecutive distances of the 2 K - 1 possible on every axis: one at each remainder of
// the distance modulo K. This is the one at given remainders, and its entry of the bias table.
struct Pair {
  bool valid;   // false: the place in the window is past a causal query
  int64_t key;  // position
  int64_t entry;
};

JAX_NATTEN_HD Pair pair_at(const Geometry& geometry, const Neighborhood& window, const Place& query,
                           const int (&remainder)[kMaxRank]) {
  const Box box = keys_of_query(geometry, query);
  bool valid = true;
  int key[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    const int size = window.axes[a].window;
    int at = remainder[a] - (box.begin[a] - query.index[a] + size - 1);
    if (at < 0) at += size;
    valid = valid & (at < box.count[a]);
    key[a] = box.begin[a] + at;
  }
  return {valid, geometry.position(query.group, key), bias_index(window, query.index, key)};
}

}  // namespace jax_natten::naive
