#include "unfused.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/shared_memory.h"
#include "../common/workspace.h"
#include "dtype.h"
#include "factorisations.h"
#include "unfused_instances.h"

namespace jax_natten::sm80 {
namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;

bool aligned(const void* data, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
}

Vectors vectors(const void* data, int64_t positions, int heads, int64_t row_bytes) {
  return {static_cast<char*>(const_cast<void*>(data)), positions, heads, aligned(data, row_bytes)};
}

void fill_tables(const UnfusedSizes& sizes, const UnfusedPlan& plan, bool inverse, int element_bytes,
                 UnfusedParams& params) {
  const int (&list)[kMaxRank] = sizes.list;
  params.mask_layout = KeyMaskLayout(list[0], list[1], list[2]);
  fill_key_mask(params.mask_layout, params.tables.mask);
  for (int n = 0; n < kMostListed; ++n) {
    const int column = n < list[0] * list[1] * list[2] ? n : 0;  // masked, but it must be one that the slab holds
    const int x[kMaxRank] = {column / (list[1] * list[2]), column / list[2] % list[1], column % list[2]};
    int slot = 0, bias = 0;
    for (int a = 0; a < kMaxRank; ++a) {
      slot += x[a] * sizes.slot_step[a];
      bias += x[a] * params.bias_step[a];
    }
    const int slab_row = (x[0] * plan.column_tile[1] + x[1]) * plan.column_tile[2] + x[2];
    params.tables.listed[n] = {uint16_t(slab_row * sizes.vector_pitch / 16),
                               uint16_t(inverse ? slab_row : slot * element_bytes)};
    params.tables.listed_bias[n] = uint16_t(bias);
  }
}

// Everything but the arrays.
UnfusedParams make_params(const UnfusedShape& shape, Operation operation, const UnfusedTiling& tiling, bool dense) {
  const Neighborhood& neighborhood = shape.neighborhood;
  const UnfusedPlan& plan = tiling.plan;
  const UnfusedSizes& sizes = tiling.sizes;
  const int bytes = element_bytes(shape.dtype);
  UnfusedParams params = {};
  for (int a = 0; a < kMaxRank; ++a) {
    const Axis axis = dense ? Axis() : neighborhood.axes[a];
    params.schedule.axes[a] = TiledAxis(axis, plan.row_tile[a], plan.row_part[a], plan.column_tile[a]);
    params.list[a] = sizes.list[a];
    params.slot_step[a] = sizes.slot_step[a];
    params.part_log[a] = log2_of(plan.row_part[a]);
    params.parts_log[a] = log2_of(plan.row_tile[a] / plan.row_part[a]);
    params.causal = params.causal || axis.causal;
  }
  const int64_t tiles = count_tiles(shape, plan) * rows_heads(shape, operation) * shape.batch;
  params.schedule.tiles = int(std::min<int64_t>(tiles, INT32_MAX));
  params.schedule.heads = rows_heads(shape, operation);
  params.schedule.by_heads = FastDivisor(params.schedule.heads);
  params.schedule.by_group = FastDivisor(shape.group());
  params.by_tiles = FastDivisor(int(std::min<int64_t>(count_tiles(shape, plan), INT32_MAX)));
  params.first_axis = kMaxRank - (dense ? 1 : neighborhood.rank);
  params.groups = sizes.groups;
  params.sliced = sizes.sliced;
  params.slab_size = sizes.slab_size;
  params.by_slab[0] = FastDivisor(plan.column_tile[1]);
  params.by_slab[1] = FastDivisor(plan.column_tile[2]);

  params.positions = neighborhood.positions();
  params.position_step[2] = 1;
  params.position_step[1] = dense ? 0 : neighborhood.axes[2].length;
  params.position_step[0] = dense ? 0 : params.position_step[1] * neighborhood.axes[1].length;
  params.bias_step[2] = 1;
  params.bias_step[1] = 2 * neighborhood.axes[2].window - 1;
  params.bias_step[0] = params.bias_step[1] * (2 * neighborhood.axes[1].window - 1);

  params.dim = shape.dim;
  params.vector_bytes = shape.dim * bytes;
  params.vector_pitch = sizes.vector_pitch;
  params.vector_steps = sizes.vector_steps;
  params.by_vector_chunks = FastDivisor(2 * sizes.vector_steps);
  params.slots = shape.slots();
  params.window_slots = int(neighborhood.window_size());
  params.weight_heads = shape.heads;
  params.run_pitch = sizes.run_pitch;
  params.by_run_chunks = FastDivisor(sizes.run_chunks);
  params.additional_count = operation != Operation::kIn || dense ? shape.additional : 0;
  params.additional_tile = sizes.additional_tile;
  params.dense = dense;
  params.layout = sizes.layout;
  fill_tables(sizes, plan, operation == Operation::kIn, bytes, params);
  return params;
}

void set_weights(const void* weights, const UnfusedShape& shape, UnfusedParams& params) {
  params.weights = static_cast<char*>(const_cast<void*>(weights));
  const int64_t rows = shape.batch * params.positions * shape.heads;
  params.weights_end = params.weights + rows * params.slots * element_bytes(shape.dtype);
}

UnfusedKernel find_kernel(const UnfusedShape& shape, Operation operation, Precision precision) {
  int dim = kMostDim;
  for (const int compiled : kUnfusedDims) {
    if (shape.dim <= compiled) dim = std::min(dim, compiled);
  }
  if (shape.dtype == DType::kFloat32) {
    return operation == Operation::kPn   ? pn_float(precision, dim)
           : operation == Operation::kNn ? nn_float(precision, dim)
                                         : in_float(precision, dim);
  }
  return operation == Operation::kPn   ? pn_half(shape.dtype, dim)
         : operation == Operation::kNn ? nn_half(shape.dtype, dim)
                                       : in_half(shape.dtype, dim);
}

cudaError_t launch(UnfusedKernel function, UnfusedParams& params, int warps, int64_t blocks, cudaStream_t stream) {
  const void* kernel = reinterpret_cast<const void*>(function);
  if (params.layout.bytes > kDefaultSharedBytes) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = allow_shared_memory(kernel, device, params.layout.bytes)) return error;
  }
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(32 * warps), arguments, params.layout.bytes, stream);
}

// False if the problem is not taken, or not under the given plan.
bool find_tiling(const UnfusedShape& shape, Operation operation, const UnfusedPlan* given, UnfusedTiling& tiling) {
  if (why_not(shape, operation) != nullptr) return false;
  if (given == nullptr) {
    tiling = choose_tiling(shape, operation);
    return true;
  }
  if (why_not_plan(shape, operation, *given) != nullptr) return false;
  tiling = {*given, sizes_of(shape, operation, *given)};
  return true;
}

// The additional keys of IN: partial sums over chunks of the queries, then their sums.
cudaError_t in_additional(const InParams& problem, UnfusedKernel kernel, cudaStream_t stream) {
  const UnfusedTiling tiling = choose_dense_tiling(problem);
  UnfusedParams params = make_params(problem, Operation::kIn, tiling, true);
  const int chunks = reduction_chunks(params.positions);
  set_weights(problem.weights, problem, params);
  params.columns = vectors(problem.queries, params.positions, problem.heads, params.vector_bytes);
  params.out = vectors(problem.workspace, 0, problem.kv_heads, int64_t(problem.dim) * sizeof(float));
  params.chunks = chunks;
  params.by_chunks = FastDivisor(chunks);
  params.by_row_tiles = FastDivisor(int(dense_row_tiles(problem, tiling.plan)));
  if (const cudaError_t error = launch(kernel, params, tiling.sizes.warps, dense_blocks(problem), stream);
      error != cudaSuccess) {
    return error;
  }
  PartialSums sums = {static_cast<const float*>(problem.workspace), problem.additional_keys, problem.batch,
                      int64_t(problem.additional) * problem.kv_heads * problem.dim, chunks};
  constexpr int kThreads = 256;
  const SumKernel sum = problem.dtype == DType::kFloat32 ? sum_float() : sum_half(problem.dtype);
  void* arguments[] = {&sums};
  return cudaLaunchKernel(reinterpret_cast<const void*>(sum),
                          dim3(unsigned((sums.batch * sums.size + kThreads - 1) / kThreads)), dim3(kThreads), arguments,
                          0, stream);
}

}  // namespace

cudaError_t pn(const PnParams& problem, cudaStream_t stream, Precision precision, const UnfusedPlan* given) {
  if (problem.batch * problem.neighborhood.positions() * problem.heads == 0) return cudaSuccess;
  UnfusedTiling tiling;
  if (!find_tiling(problem, Operation::kPn, given, tiling)) return cudaErrorInvalidValue;
  UnfusedParams params = make_params(problem, Operation::kPn, tiling, false);
  set_weights(problem.weights, problem, params);
  params.rows = vectors(problem.queries, params.positions, problem.heads, params.vector_bytes);
  params.columns = vectors(problem.keys, params.positions, problem.kv_heads, params.vector_bytes);
  params.additional = vectors(problem.additional_keys, problem.additional, problem.kv_heads, params.vector_bytes);
  params.fill = problem.fill_negative_infinity ? -INFINITY : 0.f;
  if (problem.has_bias()) {
    params.bias = static_cast<const float*>(problem.bias);
    params.bias_size = problem.neighborhood.bias_size();
    params.bias_share = problem.batch / problem.bias_batch;
  }
  return launch(find_kernel(problem, Operation::kPn, precision), params, tiling.sizes.warps, params.schedule.tiles,
                stream);
}

cudaError_t nn(const NnParams& problem, cudaStream_t stream, Precision precision, const UnfusedPlan* given) {
  if (problem.batch * problem.neighborhood.positions() * problem.heads == 0) return cudaSuccess;
  UnfusedTiling tiling;
  if (!find_tiling(problem, Operation::kNn, given, tiling)) return cudaErrorInvalidValue;
  UnfusedParams params = make_params(problem, Operation::kNn, tiling, false);
  set_weights(problem.weights, problem, params);
  params.columns = vectors(problem.keys, params.positions, problem.kv_heads, params.vector_bytes);
  params.additional = vectors(problem.additional_keys, problem.additional, problem.kv_heads, params.vector_bytes);
  params.out = vectors(problem.queries, params.positions, problem.heads, params.vector_bytes);
  return launch(find_kernel(problem, Operation::kNn, precision), params, tiling.sizes.warps, params.schedule.tiles,
                stream);
}

cudaError_t in(const InParams& problem, cudaStream_t stream, Precision precision, const UnfusedPlan* given) {
  if (problem.batch * problem.kv_heads == 0) return cudaSuccess;
  if (problem.neighborhood.positions() == 0) {
    const int64_t size = problem.batch * problem.additional * problem.kv_heads * problem.dim;
    return size > 0 ? cudaMemsetAsync(problem.additional_keys, 0, size * element_bytes(problem.dtype), stream)
                    : cudaSuccess;
  }
  UnfusedTiling tiling;
  if (!find_tiling(problem, Operation::kIn, given, tiling)) return cudaErrorInvalidValue;
  const UnfusedKernel kernel = find_kernel(problem, Operation::kIn, precision);
  UnfusedParams params = make_params(problem, Operation::kIn, tiling, false);
  set_weights(problem.weights, problem, params);
  params.columns = vectors(problem.queries, params.positions, problem.heads, params.vector_bytes);
  params.out = vectors(problem.keys, params.positions, problem.kv_heads, params.vector_bytes);
  const cudaError_t error = launch(kernel, params, tiling.sizes.warps, params.schedule.tiles, stream);
  return error != cudaSuccess || problem.additional == 0 ? error : in_additional(problem, kernel, stream);
}

}  // namespace jax_natten::sm80
