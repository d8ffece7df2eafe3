#include "backward_setup.h"

#include <algorithm>
#include <cmath>

#include "../common/workspace.h"
#include "backward_instances.h"

namespace jax_natten::sm90 {
namespace {

using FindInstance = BackwardInstance (*)(DType dtype, int rank, bool small, bool extended);

FindInstance find_instances(Walk pass, int dim) {
  const bool query = pass == kQueryPass;
  switch (dim) {
    case 32:
      return query ? backward_query_d32 : backward_key_d32;
    case 64:
      return query ? backward_query_d64 : backward_key_d64;
    case 96:
      return query ? backward_query_d96 : backward_key_d96;
    case 128:
      return query ? backward_query_d128 : backward_key_d128;
    case 192:
      return query ? backward_query_d192 : backward_key_d192;
    default:
      return query ? backward_query_d256 : backward_key_d256;
  }
}

// The exponent of the key pass multiplies start values too: it must not be zero. Scales this small make no difference
// to finite scores.
bool scores_vanish(double scale) { return std::abs(scale) < 1e-30; }

cudaError_t set_up_maps(const FusedBackwardParams& problem, const PassTensors& tensors, const PassPlan& plan,
                        int channels, BackwardParams& params) {
  const int *row = plan.query_part, *column = plan.key_tile;
  const TensorBox row_box = {channels, 1, {row[0], row[1], row[2]}};
  const TensorBox column_box = {channels, 1, {column[0], column[1], column[2]}};
  for (int variant = 0; variant < kMaxMapVariants; ++variant) {
    if (!variant_exists(problem.neighborhood, variant)) continue;
    PassMaps& maps = params.maps[variant];
    const auto encode = [&](CUtensorMap& map, const void* data, int heads, const TensorBox& box) {
      return data == nullptr ? cudaSuccess : encode_tensor_map(&map, problem, data, heads, box, variant);
    };
    for (int operand = 0; operand < kOperands; ++operand) {
      for (const cudaError_t error :
           {encode(maps.row[operand], tensors.row[operand], tensors.row_heads, row_box),
            encode(maps.column[operand], tensors.column[operand], tensors.column_heads, column_box),
            encode(maps.result[operand], tensors.result[operand], tensors.row_heads, row_box)}) {
        if (error != cudaSuccess) return error;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace

PassTensors tensors_of(Walk pass, const FusedBackwardParams& p) {
  // The second of the workspace lies where that of the other implementations ends, so that partial sums lie where they
  // have them.
  float* const start = static_cast<float*>(p.workspace);
  float* const second = start + least_fused_backward_workspace(p);
  if (pass == kQueryPass) {
    return {{p.query, p.d_out}, {p.key, p.value}, {p.d_query, nullptr}, {start, second}, p.heads, p.kv_heads};
  }
  return {{p.key, p.value}, {p.query, p.d_out}, {p.d_key, p.d_value}, {start, second}, p.kv_heads, p.heads};
}

cudaError_t set_up_pass(Walk pass, const FusedBackwardParams& problem, const PassTensors& tensors, const PassPlan& plan,
                        BackwardParams& params) {
  const Neighborhood& neighborhood = problem.neighborhood;
  const PassShape compiled = pass_shape(pass, compiled_head_dim(problem.dim), plan.small);
  set_up_tiles(problem, plan, tensors.row_heads, params);
  params.mask_layout = KeyMaskLayout(plan.key_tile[0], plan.key_tile[1], plan.key_tile[2]);
  fill_key_mask(params.mask_layout, params.mask_table);
  params.padded = product(plan.key_tile) < compiled.columns;
  const cudaError_t error = set_up_maps(problem, tensors, plan, compiled.chunk, params);
  if (error != cudaSuccess) return error;
  params.row_bytes = kOperands * product(plan.query_part) * compiled.chunks() * compiled.row_bytes();
  params.column_bytes = product(plan.key_tile) * compiled.chunks() * compiled.row_bytes();
  params.row_address = slab_address(neighborhood, tensors.row_heads);
  params.column_address = slab_address(neighborhood, tensors.column_heads);

  constexpr double kLog2E = 1.4426950408889634;
  const bool vanish = scores_vanish(problem.scale);
  params.first_channel = vanish && pass == kKeyPass ? compiled.dim : 0;
  params.exponent = float((vanish && pass == kKeyPass ? 1 : problem.scale * kLog2E));
  params.scale = float(problem.scale);
  params.lse_to_start = float(vanish ? -kLog2E : -1 / problem.scale);
  params.dim = problem.dim;
  params.out = problem.out;
  params.lse = static_cast<const float*>(problem.lse);
  params.d_lse = static_cast<const float*>(problem.d_lse);

  params.positions = int(neighborhood.positions());
  params.start_address = slab_address(neighborhood, 1);
  for (int a = 0; a < kMaxRank; ++a) {
    params.position_step[a] = params.start_address.per_phase[a] * neighborhood.axes[a].dilation;
  }
  params.start_address.per_batch *= problem.heads;
  params.start[kScores] = tensors.start[kScores];
  params.start[kGradients] = tensors.start[kGradients];
  return cudaSuccess;
}

cudaError_t launch_pass(Walk pass, const FusedBackwardParams& problem, bool small, bool extended,
                        BackwardParams& params, cudaStream_t stream) {
  const PassShape compiled = pass_shape(pass, compiled_head_dim(problem.dim), small);
  const BackwardInstance instance =
      find_instances(pass, compiled.dim)(problem.dtype, problem.neighborhood.rank, small, extended);
  const void* kernel = reinterpret_cast<const void*>(instance.kernel);
  int device = 0, processors = 0;
  cudaError_t error = current_device(device, processors);
  if (error != cudaSuccess) return error;
  if (error = allow_shared_memory(kernel, device, int(instance.shared_bytes)); error != cudaSuccess) return error;
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(std::min(params.schedule.tiles, processors * compiled.residency)),
                          dim3(compiled.threads()), arguments, instance.shared_bytes, stream);
}

}  // namespace jax_natten::sm90
