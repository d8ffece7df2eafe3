// Host side shared by all sm_90 kernels: from a problem and its tiles to what the kernels are told, and launching.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "tile_params.h"

namespace jax_natten::sm90 {

// How a problem is cut. Terms are those of ../common/tiling.h: in the walk over the queries of keys, read key for query
// and query for key.
struct Tiles {
  int query_tile[kMaxRank] = {1, 1, 1};  // queries of a CTA
  int query_part[kMaxRank] = {1, 1, 1};  // of those, queries of a warpgroup or warp
  int key_tile[kMaxRank] = {1, 1, 1};    // keys that are loaded together
};

inline int product(const int (&tile)[kMaxRank]) { return tile[0] * tile[1] * tile[2]; }

// The head dimension that kernels for `dim` are compiled for; 0 if it is too large.
int compiled_head_dim(int dim);

// Why the tensor maps and 32-bit indices of the kernels do not suit a problem; nullptr if they do.
const char* why_not_layout(const FusedShape& shape);

// Why tiles do not fit a problem; nullptr if they do. `heads`: that have query tiles of their own.
const char* why_not_tiles(const FusedShape& shape, const Tiles& tiles, int heads);

// Everything but the mask.
void set_up_tiles(const FusedShape& shape, const Tiles& tiles, int heads, TileParams& params);

// Whether some tile needs the tensor maps of a variant.
bool variant_exists(const Neighborhood& neighborhood, int variant);

// The current device: its number and its multiprocessors.
cudaError_t current_device(int& device, int& processors);

// Lets a kernel have its shared memory, once per kernel, size and device.
cudaError_t allow_shared_memory(const void* kernel, int device, int bytes);

}  // namespace jax_natten::sm90
