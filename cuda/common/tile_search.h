// What searches for tiles have in common: sizes worth trying, counts by axis found once, and the best candidates so
// far. Plain host code without CUDA.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tile_model.h"

namespace jax_natten {

using Triple = int[kMaxRank];

inline void copy(const Triple& from, Triple& to) { std::copy(from, from + kMaxRank, to); }

// All sizes up to `most`, and to the first that holds the longest dilation group.
std::vector<int> all_sizes_along(const Axis& axis, int most);

// The product that all triples worth looking at reach: three quarters of `most`, or less on a small grid.
int smallest_of(const std::vector<int> (&sizes)[kMaxRank], int most);

// Calls `visit` with triples of sizes whose product is least .. most.
template <typename Visit>
void each_triple(const std::vector<int> (&sizes)[kMaxRank], int least, int most, Visit visit) {
  for (const int x0 : sizes[0]) {
    if (x0 > most) break;
    for (const int x1 : sizes[1]) {
      if (x0 * x1 > most) break;
      for (const int x2 : sizes[2]) {
        const int all = x0 * x1 * x2;
        if (all > most) break;
        const Triple triple = {x0, x1, x2};
        if (all >= least) visit(triple);
      }
    }
  }
}

// Counts along the axes of a problem.
class AxisCounts {
 public:
  AxisCounts(const Axis* axes, Walk walk) : axes_(axes), walk_(walk) { known_.reserve(1024); }

  const AxisTileCounts& operator()(int a, int query_tile, int query_part, int key_tile) {
    const uint64_t id = ((uint64_t(a) << 16 | query_tile) << 16 | query_part) << 16 | key_tile;
    const auto found = known_.find(id);
    if (found != known_.end()) return found->second;
    return known_.emplace(id, count_axis_tiles(axes_[a], query_tile, query_part, key_tile, walk_)).first->second;
  }

  // `tiles` have a query_tile, a query_part and a key_tile.
  template <typename Tiles>
  TileCounts count(const Tiles& tiles, bool padded) {
    const int *q = tiles.query_tile, *p = tiles.query_part, *k = tiles.key_tile;
    const AxisTileCounts along[kMaxRank] = {(*this)(0, q[0], p[0], k[0]), (*this)(1, q[1], p[1], k[1]),
                                            (*this)(2, q[2], p[2], k[2])};
    return count_tiles(along, padded);
  }

 private:
  const Axis* axes_;
  const Walk walk_;
  std::unordered_map<uint64_t, AxisTileCounts> known_;
};

// The candidates with the least scores so far.
template <typename Candidate>
class Best {
 public:
  explicit Best(size_t count) : count_(count) {}

  // Whether a score would be among them.
  bool takes(double score) const { return !full() || score < worst_; }

  void add(const Candidate& candidate) {
    if (full()) best_.erase(std::max_element(best_.begin(), best_.end(), less));
    best_.push_back(candidate);
    worst_ = std::max_element(best_.begin(), best_.end(), less)->score;
  }

  std::vector<Candidate> sorted() {
    std::sort(best_.begin(), best_.end(), less);
    return std::move(best_);
  }

 private:
  bool full() const { return best_.size() == count_; }
  static bool less(const Candidate& a, const Candidate& b) { return a.score < b.score; }

  const size_t count_;
  std::vector<Candidate> best_;
  double worst_ = 0;
};

}  // namespace jax_natten
