// What the "warp" kernel (warp_forward.cuh) is told.
#pragma once

#include <cstddef>
#include <cstdint>

#include "forward_params.h"
#include "warp_shape.h"

namespace jax_natten::sm90 {

// schedule: key_tile: keys of a box; query_part: queries of a warp. mask_layout: of the list.
struct WarpParams : ForwardParams {
  int slots, stages, warps;
  WarpLayout layout;
  int list[kMaxRank];               // keys per axis that a warp gathers from a box
  int outer_keys;                   // of a box, per key along the outermost axis
  int key_offset[kWarpMostListed];  // bytes from the first key of the list in a box to each other
};

using WarpKernel = void (*)(WarpParams);

}  // namespace jax_natten::sm90
