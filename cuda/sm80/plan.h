// How a fused problem is cut into tiles.
#pragma once

#include <array>
#include <cstdint>

#include "../common/params.h"

namespace jax_natten::sm80 {

// Kernels for all windows (fused_forward.cuh, fused_backward.cuh), and for small ones (small_forward.cuh,
// small_backward.cuh). The numbers are a wire format.
enum class Structure { kTiles = 0, kSmall = 1 };

struct Plan {
  Structure structure = Structure::kTiles;
  int rows = 64;                         // of the compiled tile that stays
  int query_tile[kMaxRank] = {1, 1, 1};  // queries of a CTA
  int query_part[kMaxRank] = {1, 1, 1};  // of those, queries of a warp
  int key_tile[kMaxRank] = {1, 1, 1};    // keys that are loaded together; kSmall: all are, and these are 1
};

// A plan as custom calls carry it: structure, rows, query_tile, query_part, key_tile. A wire format.
constexpr int kPlanFields = 11;
std::array<int64_t, kPlanFields> encode_plan(const Plan& plan);

// Why tiles are no plan, in words; nullptr and the plan if they are. Whether it fits a problem is another question.
const char* decode_plan(const AskedTiles& tiles, Plan& plan);

// What a kernel's tiles can hold.
struct TileLimits {
  int warps;    // parts of a query tile
  int queries;  // of a part
  int keys;     // of a key tile
};

inline int product(const int (&tile)[kMaxRank]) { return tile[0] * tile[1] * tile[2]; }

// Copying a key tile takes about as long as a quarter of what its computation takes all warps together.
constexpr double kTileCopyCost = 0.25;

// Why tiles do not fit a problem; nullptr if they do.
const char* why_not_tiles(const FusedShape& shape, const Plan& plan, const TileLimits& limits);

// Tiles that fit: those whose parts compute the fewest scores, far from the borders of the grid.
Plan choose_tiles(const FusedShape& shape, const TileLimits& limits);

}  // namespace jax_natten::sm80
