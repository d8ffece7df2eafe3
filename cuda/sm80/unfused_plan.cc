#include "unfused_plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <vector>

#include "dtype.h"

namespace jax_natten::sm80 {
namespace {

// What every GPU of compute capability 8.0 or later has for a CTA. The kernels are bound by bandwidth and latency:
// several small CTAs per multiprocessor are better than one large one.
constexpr int kSharedBytes = 99 * 1024;
constexpr int kAdditionalBytes = 20 * 1024;  // of a slab of additional keys

int product(const int (&tile)[kMaxRank]) { return tile[0] * tile[1] * tile[2]; }
int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }
int odd_chunks(int bytes) { return (bytes / 16 | 1) * 16; }

// Columns that `rows` rows from `first` on need along an axis.
int columns_of_rows(const Axis& axis, Operation operation, int first, int rows, int length) {
  const int last = std::min(first + rows, length) - 1;
  if (operation == Operation::kIn) {
    return queries_of_key(axis, last, length).end - queries_of_key(axis, first, length).begin;
  }
  const Interval low = window_of_query(axis, first, length), high = window_of_query(axis, last, length);
  return (operation == Operation::kPn ? high.begin + axis.window : high.end) - low.begin;
}

// The most of any run of rows that begins at a multiple of `rows`.
int most_columns(const Axis& axis, Operation operation, int rows) {
  const int longest = group_length(axis, 0);
  if (longest / rows > 1 << 16) return std::min(longest, 2 * axis.window + 2 * axis.stride + rows);
  int most = 0;
  for (const int group : {0, axis.dilation - 1}) {
    const int length = group_length(axis, group);
    for (int first = 0; first < length; first += rows) {
      most = std::max(most, columns_of_rows(axis, operation, first, rows, length));
    }
  }
  return most;
}

// most_columns(), remembered for the plans of one problem.
class MostColumns {
 public:
  MostColumns(const UnfusedShape& shape, Operation operation) : shape_(shape), operation_(operation) {}
  int operator()(int a, int rows) {
    int& most = known_[{a, rows}];
    if (most == 0) most = most_columns(shape_.neighborhood.axes[a], operation_, rows);
    return most;
  }

 private:
  const UnfusedShape& shape_;
  const Operation operation_;
  std::map<std::pair<int, int>, int> known_;
};

UnfusedLayout make_layout(Operation operation, const UnfusedSizes& sizes) {
  const bool inverse = operation == Operation::kIn;
  const int64_t slabs = sizes.slabs;
  const int buffers = int(std::min<int64_t>(slabs, kMostBuffers));
  const int rows = std::max(sizes.slab_size, sizes.additional_tile);
  UnfusedLayout layout;
  int offset = 0;
  const auto reserve = [&](int bytes) {
    const int begin = offset;
    offset = round_up(offset + bytes, 16);
    return begin;
  };
  layout.tables = reserve(sizeof(UnfusedTables));
  layout.tile = reserve(kTileBytes);
  layout.additional = reserve(kMostAdditionalListed * sizeof(ListedColumn));
  layout.rows = reserve(sizes.warps * kPartRows * kPartRowBytes);
  layout.slab_rows = reserve(sizes.slab_size * kSlabRowBytes);
  const int staged = inverse ? sizes.slab_size : sizes.warps * kPartRows;
  const int found = inverse ? int(std::min<int64_t>(slabs, kMostFound)) : operation == Operation::kPn ? 1 : buffers;
  layout.runs = reserve(found * staged * kRunBytes);
  layout.stage_bytes = staged * sizes.run_pitch;
  layout.stage = reserve((operation == Operation::kPn ? 1 : buffers) * layout.stage_bytes);
  layout.output = reserve(operation == Operation::kPn ? 0 : sizes.warps * kPartRows * kOutputPitch);
  layout.slab_bytes = rows * sizes.vector_pitch;
  layout.slabs = reserve(buffers * layout.slab_bytes);
  layout.bytes = offset;
  return layout;
}

UnfusedSizes find_sizes(const UnfusedShape& shape, Operation operation, const UnfusedPlan& plan, bool dense,
                        MostColumns& most) {
  const Axis* axes = shape.neighborhood.axes;
  const int bytes = element_bytes(shape.dtype);
  UnfusedSizes sizes;
  sizes.warps = product(plan.row_tile) / kPartRows;
  sizes.slot_step[2] = 1;
  sizes.slot_step[1] = dense ? 1 : axes[2].window;
  sizes.slot_step[0] = dense ? 1 : axes[2].window * axes[1].window;
  sizes.sliced = kMaxRank - shape.neighborhood.rank;
  sizes.slabs = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    const int of_tile = dense ? plan.column_tile[a] : most(a, plan.row_tile[a]);
    const int of_part = dense ? plan.column_tile[a] : most(a, plan.row_part[a]);
    sizes.list[a] = std::min(plan.column_tile[a], of_part);
    if (plan.column_tile[a] < of_tile) sizes.sliced = a;
    sizes.slabs *= dense ? 2 : (of_tile + plan.column_tile[a] - 1) / plan.column_tile[a];
  }
  sizes.groups = (product(sizes.list) + 15) / 16;
  sizes.slab_size = product(plan.column_tile);
  sizes.vector_steps = (shape.dim * bytes + 31) / 32;
  sizes.vector_pitch = odd_chunks(sizes.vector_steps * 32);
  sizes.additional_tile = 0;
  if (operation == Operation::kIn) {
    sizes.slabs *= shape.group();
  } else if (shape.additional > 0) {
    // Whole groups of 16 columns, in a few kilobytes.
    const int groups = std::clamp(kAdditionalBytes / 16 / sizes.vector_pitch, 1, kMostAdditionalListed / 16);
    sizes.additional_tile = std::min(round_up(shape.additional, 16), 16 * groups);
    sizes.slabs += (shape.additional + sizes.additional_tile - 1) / sizes.additional_tile;
  }

  int64_t run = 1;
  if (dense) {
    run = plan.row_tile[2];
  } else if (operation == Operation::kIn) {
    for (int a = 0; a < kMaxRank; ++a) {
      run += int64_t(std::min(plan.row_tile[a], axes[a].window) - 1) * sizes.slot_step[a];
    }
  } else {
    const int a = sizes.sliced;
    run = int64_t(std::min(plan.column_tile[a], axes[a].window)) * sizes.slot_step[a];
    run = std::max<int64_t>(run, sizes.additional_tile);
  }
  run = std::min<int64_t>(run, kSharedBytes);  // does not fit anyway
  sizes.run_chunks = (16 - bytes + int(run) * bytes + 15) / 16;
  sizes.run_pitch = odd_chunks(sizes.run_chunks * 16);
  sizes.layout = make_layout(operation, sizes);
  return sizes;
}

const char* why_not_sizes(Operation operation, const UnfusedPlan& plan, const UnfusedSizes& sizes, MostColumns& most) {
  if (product(sizes.list) > kMostListed) return "a warp's rows need too many columns of a slab";
  for (int a = 0; a < kMaxRank; ++a) {
    if (plan.column_tile[a] > kMostSlabRows) return "slabs are too long";
    const bool whole = plan.column_tile[a] >= most(a, plan.row_tile[a]);
    if (a > sizes.sliced && !whole) return "slabs must be whole along the axes behind the sliced one";
    if (operation != Operation::kIn && a < sizes.sliced && plan.column_tile[a] != 1) {
      return "slabs must be one column thick along the axes before the sliced one";
    }
  }
  if (sizes.run_chunks * 16 > UINT16_MAX || sizes.layout.bytes > kSharedBytes) return "does not fit into shared memory";
  if (sizes.slab_size * sizes.vector_pitch / 16 > UINT16_MAX) return "slabs are too large";
  return nullptr;
}

bool is_power_of_two(int x) { return x > 0 && (x & (x - 1)) == 0; }

// ---- the choice

// Estimated clocks of a multiprocessor per CTA. The constants are counts of instructions in the kernels' loops and
// bandwidths of Hopper, not measurements.
double estimate_tile(const UnfusedShape& shape, Operation operation, const UnfusedPlan& plan, const UnfusedSizes& sizes,
                     MostColumns& most) {
  constexpr double kInstructionsPerClock = 2, kBytesPerClock = 24;
  const bool inverse = operation == Operation::kIn;
  const int products = shape.dtype == DType::kFloat32 ? 3 : 1;
  double tile_slabs = 1, part_slabs = 1;  // slabs that pass by, and those in which a part has columns
  for (int a = 0; a < kMaxRank; ++a) {
    const double tile = plan.column_tile[a], columns = most(a, plan.row_tile[a]);
    tile_slabs *= std::max(1.0, columns / tile);
    part_slabs *= std::min(std::max(1.0, columns / tile), (most(a, plan.row_part[a]) + tile - 1) / tile);
  }
  const double chunks = sizes.vector_pitch / 16;
  const double group = 60 + sizes.vector_steps * (3 + 2 * products);
  const double run_chunk = 0.6;
  double instructions = 250 * sizes.warps;
  instructions += sizes.warps * part_slabs * (120 + sizes.groups * group);
  instructions += tile_slabs * sizes.slab_size * chunks * 0.5;
  double bytes = tile_slabs * sizes.slab_size * sizes.vector_steps * 32;
  if (inverse) {
    instructions += tile_slabs * sizes.slab_size * (2 + sizes.run_chunks * run_chunk);
    bytes += tile_slabs * sizes.slab_size * (sizes.run_chunks * 16 + 16);
  } else {
    instructions += sizes.warps * part_slabs * kPartRows * sizes.run_chunks * run_chunk;
    bytes += sizes.warps * part_slabs * kPartRows * (sizes.run_chunks * 16 + 16);
  }
  // Copies and products of one CTA overlap only if it has several slabs, those of different CTAs always.
  const int ctas = std::max(1, std::min(220 * 1024 / (sizes.layout.bytes + 1024), 20 / sizes.warps));
  const double waiting = std::max(1.0, 16.0 / (ctas * sizes.warps)) *
                         std::sqrt(std::max(1.0, 3.0 / (ctas * (sizes.slabs > 1 ? 1.5 : 1.0))));
  return waiting * (instructions / kInstructionsPerClock + bytes / kBytesPerClock);
}

double estimate(const UnfusedShape& shape, Operation operation, const UnfusedPlan& plan, const UnfusedSizes& sizes,
                MostColumns& most) {
  const double heads = double(shape.batch) * (operation == Operation::kIn ? shape.kv_heads : shape.heads);
  const double tiles = count_tiles(shape, plan) * heads;
  constexpr double kLeastTiles = 2 * 132;  // that keep a large GPU busy
  return std::max(tiles, kLeastTiles) * estimate_tile(shape, operation, plan, sizes, most);
}

// Calls function(divided) for all ways to write a power of two as a product of powers of two, one for each axis of the
// problem.
template <typename Function>
void for_each_division(int size, int rank, Function function) {
  for (int first = 1; first <= size; first *= 2) {
    if (rank < 3 && first > 1) break;
    for (int second = 1; first * second <= size; second *= 2) {
      if (rank < 2 && second > 1) break;
      function({first, second, size / first / second});
    }
  }
}

// The thickest slabs along `sliced` that fit; false if none do.
bool thicken_slabs(const UnfusedShape& shape, Operation operation, int sliced, MostColumns& most, UnfusedPlan& plan) {
  for (int a = 0; a < kMaxRank; ++a) {
    plan.column_tile[a] = a < sliced ? 1 : most(a, plan.row_tile[a]);
  }
  int& thickness = plan.column_tile[sliced];
  const auto fits = [&] {
    return why_not_sizes(operation, plan, find_sizes(shape, operation, plan, false, most), most) == nullptr;
  };
  const int whole = std::min(thickness, kMostSlabRows);
  int low = 0, high = whole + 1;  // fits, does not fit
  for (thickness = whole; high - low > 1; thickness = (low + high) / 2) (fits() ? low : high) = thickness;
  thickness = low;
  return low > 0;
}

UnfusedPlan find_plan(const UnfusedShape& shape, Operation operation) {
  MostColumns most(shape, operation);
  const int rank = shape.neighborhood.rank;
  UnfusedPlan best;
  double least = INFINITY;
  for (int warps = 1; warps <= kMostWarps; warps *= 2) {
    for_each_division(kPartRows, rank, [&](const std::vector<int>& part) {
      for_each_division(warps, rank, [&](const std::vector<int>& parts) {
        UnfusedPlan plan;
        for (int a = 0; a < kMaxRank; ++a) {
          plan.row_part[a] = part[a];
          plan.row_tile[a] = part[a] * parts[a];
        }
        for (int sliced = kMaxRank - rank; sliced < kMaxRank; ++sliced) {
          if (!thicken_slabs(shape, operation, sliced, most, plan)) continue;
          for (const int pieces : {1, 2}) {  // thinner slabs leave shared memory to other CTAs
            int& thickness = plan.column_tile[sliced];
            thickness = (thickness + pieces - 1) / pieces;
            const UnfusedSizes sizes = find_sizes(shape, operation, plan, false, most);
            if (why_not_sizes(operation, plan, sizes, most) != nullptr) continue;
            const double time = estimate(shape, operation, plan, sizes, most);
            if (time < least) {
              least = time;
              best = plan;
            }
          }
        }
      });
    });
  }
  return best;
}

}  // namespace

int64_t count_tiles(const UnfusedShape& shape, const UnfusedPlan& plan) {
  int64_t tiles = 1;
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = shape.neighborhood.axes[a];
    tiles *= int64_t(group_length(axis, 0) + plan.row_tile[a] - 1) / plan.row_tile[a] * axis.dilation;
  }
  return tiles;
}

int rows_heads(const UnfusedShape& shape, Operation operation) {
  return operation == Operation::kIn ? shape.kv_heads : shape.heads;
}

int64_t dense_row_tiles(const UnfusedShape& shape, const UnfusedPlan& plan) {
  return (shape.additional + plan.row_tile[2] - 1) / plan.row_tile[2];
}

int64_t dense_blocks(const UnfusedShape& shape) {
  return dense_row_tiles(shape, choose_dense_tiling(shape).plan) * shape.kv_heads *
         reduction_chunks(shape.neighborhood.positions()) * shape.batch;
}

UnfusedSizes sizes_of(const UnfusedShape& shape, Operation operation, const UnfusedPlan& plan, bool dense) {
  MostColumns most(shape, operation);
  return find_sizes(shape, operation, plan, dense, most);
}

const char* why_not_plan(const UnfusedShape& shape, Operation operation, const UnfusedPlan& plan) {
  for (int a = 0; a < kMaxRank; ++a) {
    if (!is_power_of_two(plan.row_part[a]) || !is_power_of_two(plan.row_tile[a]) ||
        plan.row_part[a] > plan.row_tile[a] || plan.column_tile[a] < 1) {
      return "row tiles and their parts must be powers of two along each axis";
    }
    if (a < kMaxRank - shape.neighborhood.rank && plan.row_tile[a] * plan.column_tile[a] != 1) {
      return "axes that the problem does not have must have tiles of 1";
    }
  }
  if (product(plan.row_part) != kPartRows) return "parts have 16 rows";
  if (product(plan.row_tile) > kMostWarps * kPartRows) return "row tiles have at most 8 parts";
  MostColumns most(shape, operation);
  return why_not_sizes(operation, plan, find_sizes(shape, operation, plan, false, most), most);
}

const UnfusedTiling& choose_tiling(const UnfusedShape& shape, Operation operation) {
  std::vector<int64_t> key = {int(operation), int(shape.dtype), shape.batch,      shape.heads,
                              shape.kv_heads, shape.dim,        shape.additional, shape.neighborhood.rank};
  for (const Axis& axis : shape.neighborhood.axes) {
    key.insert(key.end(), {axis.length, axis.window, axis.stride, axis.dilation, axis.causal});
  }
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, UnfusedTiling> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const UnfusedPlan plan = find_plan(shape, operation);
  return known.emplace(key, UnfusedTiling{plan, sizes_of(shape, operation, plan)}).first->second;
}

UnfusedTiling choose_dense_tiling(const UnfusedShape& shape) {
  UnfusedPlan plan;
  int warps = 1;
  while (warps < kMostWarps && warps * kPartRows < shape.additional) warps *= 2;
  plan.row_part[2] = kPartRows;
  plan.row_tile[2] = warps * kPartRows;
  for (plan.column_tile[2] = kMostListed;; plan.column_tile[2] /= 2) {
    const UnfusedSizes sizes = sizes_of(shape, Operation::kIn, plan, true);
    if (sizes.layout.bytes <= kSharedBytes) return {plan, sizes};
  }
}

}  // namespace jax_natten::sm80
