// How the fused kernels cut a problem into tiles: plain integer code for host and device, proved on the CPU
// (tests/cpp/test_tiling.cc walks every tile as the kernels do).
//
// A *query tile* is a box of queries of one dilation group, head and batch element; one CTA works on it. It is divided
// into equal *parts*, one per warpgroup (or warp). The keys that some query of the tile sees form a box too, because
// window begins and ends grow with the query; *key tiles* cover that box, anchored at its first corner, so that no key
// before a window is ever loaded. A key tile is skipped by a part, or computed whole, or computed under a mask.
//
// The second pass of the backward walks the other way: tiles of keys stay, and tiles of the queries that see them are
// loaded. It uses the same code with Walk::kQueriesOfKeys, and only has to read key for query and query for key in
// every name below.
//
// Axis 2 is the innermost one. Problems of lower rank use only the last kRank axes; the others have length 1.
#pragma once

#include <cstdint>

#include "fast_division.h"
#include "neighborhood.h"

namespace jax_natten {

struct TiledAxis : Axis {
  int query_tile = 1;   // queries in a query tile
  int query_part = 1;   // of those, queries in one part
  int key_tile = 1;     // keys in a key tile
  int query_tiles = 1;  // query tiles in the longest dilation group
  FastDivisor by_stride, by_dilation, by_query_tiles;

  TiledAxis() = default;
  TiledAxis(const Axis& axis, int query_tile, int query_part, int key_tile)
      : Axis(axis), query_tile(query_tile), query_part(query_part), key_tile(key_tile) {
    query_tiles = (group_length(axis, 0) + query_tile - 1) / query_tile;
    by_stride = FastDivisor(stride);
    by_dilation = FastDivisor(dilation);
    by_query_tiles = FastDivisor(query_tiles);
  }

  JAX_NATTEN_HD int parts() const { return query_tile / query_part; }
};

// Keys that the query at in-group index i sees.
JAX_NATTEN_HD Interval window(const TiledAxis& axis, int i, int length) {
  const int block = axis.stride == 1 ? i : axis.by_stride.quotient(i) * axis.stride;
  return window_of_block(axis, block, i, length);
}

// The same on an axis without stride and causality.
JAX_NATTEN_HD Interval plain_window(const TiledAxis& axis, int i, int length) {
  const int begin = imin(imax(i - axis.window / 2, 0), length - axis.window);
  return {begin, begin + axis.window};
}

// An interval of up to 2^15 keys in one register.
class PackedInterval {
 public:
  PackedInterval() = default;
  JAX_NATTEN_HD PackedInterval(Interval i) : packed_(i.begin << 16 | (i.end & 0xFFFF)) {}
  JAX_NATTEN_HD operator Interval() const { return {packed_ >> 16, int(unsigned(packed_) << 16) >> 16}; }

 private:
  int packed_;
};

constexpr int kMostPackedKeys = 32767;

enum class Walk { kKeysOfQueries, kQueriesOfKeys };

// Keys that the query i sees, or queries that see the key i.
template <Walk kWalk = Walk::kKeysOfQueries>
JAX_NATTEN_HD Interval partners(const TiledAxis& axis, int i, int length) {
  if (kWalk == Walk::kKeysOfQueries) return window(axis, i, length);
  return queries_of_key(axis, i, length,
                        [&axis](int x) { return axis.stride == 1 ? x : axis.by_stride.quotient(x) * axis.stride; });
}

// Keys that some query of first..last sees, and keys that all of them see (possibly none: end <= begin).
struct Span {
  Interval any, all;
};

template <Walk kWalk = Walk::kKeysOfQueries>
JAX_NATTEN_HD Span span_of_queries(const TiledAxis& axis, int first, int last, int length) {
  const Interval low = partners<kWalk>(axis, first, length), high = partners<kWalk>(axis, last, length);
  return {{low.begin, high.end}, {high.begin, low.end}};
}

// The order of query tiles: innermost axis fastest, then dilation groups, query heads, batch elements, so that tiles in
// flight together share keys and values in the L2 cache.
struct TileSchedule {
  TiledAxis axes[kMaxRank];
  int tiles = 0;                   // query tiles in all
  int heads = 1;                   // query heads
  FastDivisor by_heads, by_group;  // group: query heads per key and value head
};

struct QueryTile {
  int query[kMaxRank];   // first query, an in-group index like all that follow
  int key[kMaxRank];     // first key that the tile sees
  int extent[kMaxRank];  // keys from there to the last that the tile sees
  int length[kMaxRank];  // positions in the dilation group
  int phase[kMaxRank];   // the dilation group
  int head, batch;

  // Tiles past the end of a shorter dilation group hold nothing.
  JAX_NATTEN_HD bool empty() const { return extent[0] == 0 || extent[1] == 0 || extent[2] == 0; }
};

template <int kRank, Walk kWalk = Walk::kKeysOfQueries>
JAX_NATTEN_HD QueryTile decode_query_tile(const TileSchedule& schedule, int index) {
  QueryTile tile;
  int rest = index;
  JAX_NATTEN_UNROLL
  for (int a = kMaxRank - 1; a >= 0; --a) {
    tile.query[a] = 0;
    if (a < kMaxRank - kRank) continue;
    rest = schedule.axes[a].by_query_tiles.divide(rest, tile.query[a]);
    tile.query[a] *= schedule.axes[a].query_tile;
  }
  JAX_NATTEN_UNROLL
  for (int a = kMaxRank - 1; a >= 0; --a) {
    tile.phase[a] = 0;
    if (a < kMaxRank - kRank) continue;
    rest = schedule.axes[a].by_dilation.divide(rest, tile.phase[a]);
  }
  tile.batch = schedule.by_heads.divide(rest, tile.head);
  JAX_NATTEN_UNROLL
  for (int a = 0; a < kMaxRank; ++a) {
    tile.key[a] = 0;
    tile.extent[a] = tile.length[a] = 1;
    if (a < kMaxRank - kRank) continue;
    const TiledAxis& axis = schedule.axes[a];
    const int length = axis.by_dilation.quotient(axis.length - tile.phase[a] + axis.dilation - 1);
    const int first = tile.query[a];
    const int last = imin(first + axis.query_tile, length) - 1;
    tile.length[a] = length;
    tile.extent[a] = 0;
    if (first > last) continue;
    const Interval keys = span_of_queries<kWalk>(axis, first, last, length).any;
    tile.key[a] = keys.begin;
    tile.extent[a] = keys.end - keys.begin;
  }
  return tile;
}

// Walks over the key tiles of a query tile, innermost axis fastest.
template <int kRank>
struct KeyTileCursor {
  int begin[kMaxRank] = {0, 0, 0};  // first key of the current tile, relative to QueryTile::key

  // Moves on; false after the last tile.
  JAX_NATTEN_HD bool next(const TiledAxis* axes, const int* extent) {
    begin[2] += axes[2].key_tile;
    if (begin[2] < extent[2]) return true;
    if (kRank == 1) return false;
    begin[2] = 0;
    begin[1] += axes[1].key_tile;
    if (begin[1] < extent[1]) return true;
    if (kRank == 2) return false;
    begin[1] = 0;
    begin[0] += axes[0].key_tile;
    return begin[0] < extent[0];
  }
};

// Where a part of a query tile begins in it.
JAX_NATTEN_HD void query_part_offset(const TiledAxis* axes, int part, int (&offset)[kMaxRank]) {
  offset[2] = part % axes[2].parts() * axes[2].query_part;
  offset[1] = part / axes[2].parts() % axes[1].parts() * axes[1].query_part;
  offset[0] = part / (axes[2].parts() * axes[1].parts()) * axes[0].query_part;
}

enum class TileClass { kSkip, kWhole, kMasked };

// One part of a query tile: where its queries begin, and which keys they see relative to QueryTile::key.
template <int kRank, Walk kWalk = Walk::kKeysOfQueries>
struct QueryPart {
  int query[kMaxRank];
  Span span[kMaxRank];
  bool live;  // has queries inside the grid

  // `offset`: of query_part_offset().
  JAX_NATTEN_HD QueryPart(const TiledAxis* axes, const QueryTile& tile, const int (&offset)[kMaxRank]) : live(true) {
    JAX_NATTEN_UNROLL
    for (int a = 0; a < kMaxRank; ++a) {
      query[a] = 0;
      span[a] = {{0, 1}, {0, 1}};
      if (a < kMaxRank - kRank) continue;
      query[a] = tile.query[a] + offset[a];
      const int last = imin(query[a] + axes[a].query_part, tile.length[a]) - 1;
      live = live && query[a] <= last;
      const Span s = span_of_queries<kWalk>(axes[a], imin(query[a], tile.length[a] - 1), last, tile.length[a]);
      span[a] = {{s.any.begin - tile.key[a], s.any.end - tile.key[a]},
                 {s.all.begin - tile.key[a], s.all.end - tile.key[a]}};
    }
  }

  // What the part does with the key tile at `begin`. `padded`: the tile has columns beyond its keys, to be masked.
  JAX_NATTEN_HD TileClass classify(const TiledAxis* axes, const int* begin, bool padded) const {
    bool seen = live, whole = !padded;
    JAX_NATTEN_UNROLL
    for (int a = kMaxRank - kRank; a < kMaxRank; ++a) {
      const int end = begin[a] + axes[a].key_tile;
      seen = seen && begin[a] < span[a].any.end && end > span[a].any.begin;
      whole = whole && begin[a] >= span[a].all.begin && end <= span[a].all.end;
    }
    return !seen ? TileClass::kSkip : whole ? TileClass::kWhole : TileClass::kMasked;
  }
};

}  // namespace jax_natten
