// How a problem is computed on Hopper: by which kernel and with which tiles; and which problems and tiles the kernels
// take. Plain host code without CUDA, so that any machine can ask: the chooser, the simulator, JAX while it traces.
#pragma once

#include <array>
#include <cstdint>

#include "../common/params.h"
#include "../common/tiling.h"

namespace jax_natten::sm90 {

// Compiled for 90a, the kernels run on compute capability 9.0 and on nothing newer.
inline bool runs_on(int compute_capability) { return compute_capability == 90; }

// The fewest axes that kernels for a compiled head dimension know. A problem with fewer has axes of length 1 in front:
// for the head dimensions that models seldom have, not worth the compilation.
constexpr int least_rank(int dim) { return dim == 96 || dim > 128 ? 2 : 1; }

// Kernels for large windows (wide_forward.cuh), small ones (warp_forward.cuh) and those between (middle_forward.cuh).
// The numbers are a wire format.
enum class Structure { kWide = 0, kWarp = 1, kMiddle = 2 };

// How a problem is cut. Terms are those of ../common/tiling.h: in the walk over the queries of keys, read key for query
// and query for key.
struct Tiles {
  int query_tile[kMaxRank] = {1, 1, 1};  // queries of a CTA
  int query_part[kMaxRank] = {1, 1, 1};  // of those, queries of a warpgroup or warp
  int key_tile[kMaxRank] = {1, 1, 1};    // keys that are loaded together
};

struct Plan : Tiles {
  Structure structure = Structure::kWide;
  int heads = 1;              // kWarp: per box
  int slots = 2, stages = 2;  // kWarp: of the rings of queries and of keys
};

// A plan as custom calls carry it: structure, query_tile, query_part, key_tile, heads, slots, stages. A wire format.
constexpr int kPlanFields = 13;
std::array<int64_t, kPlanFields> encode_plan(const Plan& plan);

// Why tiles are no plan, in words; nullptr and the plan if they are. Whether it fits a problem is for why_not().
const char* decode_plan(const AskedTiles& tiles, Plan& plan);

constexpr int kMostPositions = 256;  // of a tile, along an axis

inline int product(const int (&tile)[kMaxRank]) { return tile[0] * tile[1] * tile[2]; }

// Whether a problem needs the kernels' extended variants.
inline bool is_extended(const FusedShape& shape) { return shape.additional > 0 || shape.has_bias(); }

// Whether there is nothing to compute.
bool is_empty(const FusedShape& shape);

// The head dimension that the kernels for `dim` are compiled for, but for the warp kernel; 0: none.
constexpr int compiled_head_dim(int dim) {
  for (const int compiled : {32, 64, 96, 128, 192, 256}) {
    if (dim <= compiled) return compiled;
  }
  return 0;
}

// Why the tensor maps and 32-bit indices of the kernels, forward or backward, do not suit a problem, in words that
// follow the name of the implementation; nullptr if they do.
const char* why_not_layout(const FusedShape& shape);

// Why none of the forward kernels can take a problem, likewise.
const char* why_not_any(const FusedShape& shape);

// Why a plan does not fit a problem; nullptr if it does. The first asks the kernel of the plan's structure, the next
// three are about one kernel, the last about what holds for each of them.
const char* why_not(const FusedShape& shape, const Plan& plan);
const char* why_not_wide(const FusedShape& shape, const Plan& plan);
const char* why_not_warp(const FusedShape& shape, const Plan& plan);
const char* why_not_middle(const FusedShape& shape, const Plan& plan);
const char* why_not_tiles(const FusedShape& shape, const Plan& plan);

// The same for tiles of any kernel, forward or backward. `heads`: that have query tiles of their own.
const char* why_not_tiles(const FusedShape& shape, const Tiles& tiles, int heads);

TileSchedule make_schedule(const FusedShape& shape, const Tiles& tiles, int heads);

}  // namespace jax_natten::sm90
