// Host side shared by the sm_90 forward kernels: from a problem and its tiles to what the kernels are told.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../common/params.h"
#include "forward_params.h"
#include "tile_setup.h"

namespace jax_natten::sm90 {

// Kernels for large windows (wide_forward.cuh) and small ones (warp_forward.cuh).
enum class Structure { kWide, kWarp };

// How a problem is computed: by which kernel and with which tiles.
struct Plan : Tiles {
  Structure structure = Structure::kWide;
  int heads = 1;              // kWarp: per box
  int slots = 2, stages = 2;  // kWarp: of the rings of queries and of keys
};

// Why none of the kernels can take a problem, in words; nullptr if they can.
const char* why_not_any(const FusedShape& shape);

// Why tiles do not fit a problem; nullptr if they do.
const char* why_not_tiles(const FusedShape& shape, const Plan& plan);

// Tensor maps and all else but the mask. Rows of boxes have `channels` channels; boxes of queries are whole query tiles
// or parts of them.
cudaError_t set_up_forward(const FusedForwardParams& problem, const Plan& plan, int channels, bool query_box_is_part,
                           ForwardParams& params);

// Most keys along an axis that one run of `queries` neighboring queries sees, the runs beginning at multiples of it.
int most_keys_of_queries(const Axis& axis, int queries);

}  // namespace jax_natten::sm90
