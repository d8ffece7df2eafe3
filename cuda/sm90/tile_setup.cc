#include "tile_setup.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace jax_natten::sm90 {
namespace {

int64_t count_query_tiles(const FusedShape& shape, const TileSchedule& schedule) {
  int64_t tiles = shape.batch * schedule.by_heads.divisor;
  for (const TiledAxis& axis : schedule.axes) tiles *= int64_t(axis.query_tiles) * axis.dilation;
  return tiles;
}

TileSchedule make_schedule(const FusedShape& shape, const Tiles& tiles, int heads) {
  TileSchedule schedule;
  for (int a = 0; a < kMaxRank; ++a) {
    schedule.axes[a] =
        TiledAxis(shape.neighborhood.axes[a], tiles.query_tile[a], tiles.query_part[a], tiles.key_tile[a]);
  }
  schedule.by_heads = FastDivisor(heads);
  schedule.by_group = FastDivisor(shape.group());
  schedule.tiles = int(std::min<int64_t>(count_query_tiles(shape, schedule), INT32_MAX));
  return schedule;
}

}  // namespace

int compiled_head_dim(int dim) {
  for (const int compiled : {32, 64, 96, 128, 192, 256}) {
    if (dim <= compiled) return compiled;
  }
  return 0;
}

const char* why_not_layout(const FusedShape& shape) {
  if (shape.dtype != DType::kFloat16 && shape.dtype != DType::kBFloat16) return "takes float16 and bfloat16 only";
  if (shape.dim != shape.value_dim) return "needs values of the keys' head dimension";
  if (shape.dim > 256) return "takes head dimensions up to 256";
  if (shape.dim % 8 != 0) return "needs a head dimension that is a multiple of 8";
  if (shape.batch * shape.neighborhood.positions() * shape.heads > INT32_MAX) {
    return "takes up to 2^31 - 1 pairs of a query and a head";
  }
  return nullptr;
}

const char* why_not_tiles(const FusedShape& shape, const Tiles& tiles, int heads) {
  for (int a = 0; a < kMaxRank; ++a) {
    if (tiles.query_part[a] < 1 || tiles.key_tile[a] < 1 || tiles.query_tile[a] % tiles.query_part[a] != 0) {
      return "query tiles must be divided into equal parts";
    }
    if (a < kMaxRank - shape.neighborhood.rank && tiles.query_tile[a] * tiles.key_tile[a] != 1) {
      return "axes that the problem does not have must have tiles of 1";
    }
    if (tiles.query_tile[a] > 256 || tiles.key_tile[a] > 256) return "tiles have at most 256 positions along an axis";
  }
  if (count_query_tiles(shape, make_schedule(shape, tiles, heads)) > INT32_MAX) return "has too many tiles";
  return nullptr;
}

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

cudaError_t allow_shared_memory(const void* kernel, int device, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) most = bytes;
  return error;
}

}  // namespace jax_natten::sm90
