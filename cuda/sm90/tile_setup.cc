#include "tile_setup.h"

namespace jax_natten::sm90 {

void set_up_tiles(const FusedShape& shape, const Tiles& tiles, int heads, TileParams& params) {
  params.schedule = make_schedule(shape, tiles, heads);
  const SlabAddress rows = slab_address(shape.neighborhood, shape.heads);
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = shape.neighborhood.axes[a];
    const int rest = axis.length % axis.dilation;
    params.long_phases[a] = rest == 0 ? axis.dilation : rest;
    params.row_step[a] = rows.per_phase[a] * axis.dilation;
  }
}

bool variant_exists(const Neighborhood& neighborhood, int variant) {
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis& axis = neighborhood.axes[a];
    if ((variant >> a & 1) && axis.length % axis.dilation == 0) return false;
  }
  return true;
}

cudaError_t current_device(int& device, int& processors) {
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace jax_natten::sm90
