// Host side shared by all sm_90 kernels: from a problem and its tiles to what the kernels are told, and launching.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "../common/shared_memory.h"
#include "plan.h"
#include "tile_params.h"

namespace jax_natten::sm90 {

// Everything but the mask. `heads`: that have query tiles of their own.
void set_up_tiles(const FusedShape& shape, const Tiles& tiles, int heads, TileParams& params);

// Whether some tile needs the tensor maps of a variant.
bool variant_exists(const Neighborhood& neighborhood, int variant);

// The current device: its number and its multiprocessors.
cudaError_t current_device(int& device, int& processors);

}  // namespace jax_natten::sm90
