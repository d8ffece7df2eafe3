#include "fused_setup.h"

#include <algorithm>
#include <cstdint>

#include "../common/shared_memory.h"

namespace jax_natten::sm80 {
namespace {

TilePlace place(const int (&x)[kMaxRank], bool exists) {
  return {uint32_t(x[0] | x[1] << 8 | x[2] << 16) | (exists ? 0 : TilePlace::kNone)};
}

// Coordinates of the n-th position of a box; of its last one for those past it.
void coordinates(const int (&box)[kMaxRank], int n, int (&x)[kMaxRank]) {
  n = std::min(n, product(box) - 1);
  x[0] = n / (box[1] * box[2]);
  x[1] = n / box[2] % box[1];
  x[2] = n % box[2];
}

TileSchedule make_schedule(const FusedShape& shape, const Plan& plan, int heads) {
  TileSchedule schedule;
  int64_t tiles = shape.batch * heads;
  for (int a = 0; a < kMaxRank; ++a) {
    TiledAxis& axis = schedule.axes[a];
    axis = TiledAxis(shape.neighborhood.axes[a], plan.query_tile[a], plan.query_part[a], plan.key_tile[a]);
    tiles *= int64_t(axis.query_tiles) * axis.dilation;
  }
  schedule.heads = heads;
  schedule.by_heads = FastDivisor(heads);
  schedule.by_group = FastDivisor(shape.group());
  schedule.tiles = int(tiles);
  return schedule;
}

void set_up_places(const TileSchedule& schedule, const Plan& plan, int rows_of_warp, int columns, TilePlaces& places) {
  for (int r = 0; r < kMostRows; ++r) {
    int offset[kMaxRank], x[kMaxRank];
    const int warp = std::min(r / rows_of_warp, product(plan.query_tile) / product(plan.query_part) - 1);
    query_part_offset(schedule.axes, warp, offset);
    coordinates(plan.query_part, r % rows_of_warp, x);
    for (int a = 0; a < kMaxRank; ++a) x[a] += offset[a];
    places.rows[r] = place(x, r % rows_of_warp < product(plan.query_part));
  }
  for (int n = 0; n < columns; ++n) {
    int x[kMaxRank];
    coordinates(plan.key_tile, n, x);
    places.columns[n] = place(x, n < product(plan.key_tile));
  }
  places.mask_layout = KeyMaskLayout(plan.key_tile[0], plan.key_tile[1], plan.key_tile[2]);
  fill_key_mask(places.mask_layout, places.mask_table);
}

}  // namespace

RowArray row_array(DType dtype, const void* data, int64_t positions, int heads, int size) {
  RowArray array;
  array.data = const_cast<void*>(data);
  array.bytes = size * element_bytes(dtype);
  array.position_step = int64_t(heads) * array.bytes;
  array.batch_step = positions * array.position_step;
  array.copy_bytes = 16;
  while (array.bytes % array.copy_bytes != 0 || reinterpret_cast<uintptr_t>(data) % array.copy_bytes != 0) {
    array.copy_bytes /= 2;
  }
  return array;
}

void set_up_tiles(const FusedShape& shape, const Plan& plan, int rows_of_warp, int columns, int heads,
                  FusedParams& params) {
  const Axis* axes = shape.neighborhood.axes;
  params.schedule = make_schedule(shape, plan, heads);
  params.positions = shape.neighborhood.positions();
  params.heads = shape.heads;
  params.additional = shape.additional;
  params.bias_share = shape.has_bias() ? int(shape.batch / shape.bias_batch) : 1;
  params.bias_size = shape.neighborhood.bias_size();
  params.padded = product(plan.key_tile) < columns;
  params.steps.grid[2] = params.steps.bias[2] = 1;
  for (int a = kMaxRank - 1; a > 0; --a) {
    params.steps.grid[a - 1] = params.steps.grid[a] * axes[a].length;
    params.steps.bias[a - 1] = params.steps.bias[a] * (2 * axes[a].window - 1);
  }
  for (int a = 0; a < kMaxRank; ++a) params.steps.group[a] = params.steps.grid[a] * axes[a].dilation;
  set_up_places(params.schedule, plan, rows_of_warp, columns, params.places);
}

void set_up_forward_arrays(const FusedForwardParams& problem, FusedParams& params) {
  const int64_t positions = problem.neighborhood.positions();
  const auto array = [&](const void* data, int64_t rows, int heads, int size) {
    return row_array(problem.dtype, data, rows, heads, size);
  };
  params.query = array(problem.query, positions, problem.heads, problem.dim);
  params.key = array(problem.key, positions, problem.kv_heads, problem.dim);
  params.value = array(problem.value, positions, problem.kv_heads, problem.value_dim);
  params.additional_key = array(problem.additional_keys, problem.additional, problem.kv_heads, problem.dim);
  params.additional_value = array(problem.additional_values, problem.additional, problem.kv_heads, problem.value_dim);
  params.out = array(problem.out, positions, problem.heads, problem.value_dim);
  params.bias = problem.has_bias() ? static_cast<const float*>(problem.bias) : nullptr;
  params.lse = static_cast<float*>(problem.lse);
}

cudaError_t launch_tiles(const KernelInstance& kernel, int tiles, void* params, cudaStream_t stream) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = allow_shared_memory(kernel.function, device, kernel.shared_bytes)) return error;
  void* arguments[] = {params};
  return cudaLaunchKernel(kernel.function, dim3(tiles), dim3(kernel.threads), arguments, kernel.shared_bytes, stream);
}

}  // namespace jax_natten::sm80
