#include "backward_additional.h"

#include <algorithm>

#include "../common/workspace.h"
#include "../naive/fused_backward.h"
#include "../sm80/backward_sums.h"
#include "backward_setup.h"
#include "cost.h"
#include "extension_setup.h"

namespace jax_natten::sm90 {
namespace {

constexpr int kAxis = kMaxRank - 1;  // the one axis of the grid

// The variant for small windows where one of its parts holds all rows.
PassPlan plan_rows(const FusedShape& shape) {
  const int dim = compiled_head_dim(shape.dim);
  PassPlan plan;
  plan.small = has_small_shape(dim) && shape.additional <= kPartRows;
  const PassShape compiled = pass_shape(kKeyPass, dim, plan.small);
  plan.query_part[kAxis] = kPartRows;
  plan.query_tile[kAxis] = kPartRows * compiled.parts;
  plan.key_tile[kAxis] = compiled.columns;
  return plan;
}

// A few row tiles for each multiprocessor, of chunks that hold a column tile each, and no fewer queries than there are
// additional keys: the kernel takes dilation groups to be as long in rows as in columns.
int count_chunks(const FusedShape& shape, const PassPlan& plan, int row_tiles) {
  constexpr int kTilesOfProcessor = 4;
  const int64_t positions = shape.neighborhood.positions(), least = std::max(shape.additional, plan.key_tile[kAxis]);
  const int64_t tiles = shape.batch * shape.kv_heads * row_tiles;
  const int64_t wanted = (kTilesOfProcessor * kProcessors + tiles - 1) / tiles;
  return int(std::max<int64_t>(1, std::min({wanted, positions / least, int64_t(reduction_chunks(positions))})));
}

}  // namespace

cudaError_t launch_additional(const FusedBackwardParams& problem, cudaStream_t stream) {
  const PassPlan plan = plan_rows(problem);
  const int rows = plan.query_tile[kAxis], row_tiles = (problem.additional + rows - 1) / rows;
  const int chunks = count_chunks(problem, plan, row_tiles), positions = int(problem.neighborhood.positions());

  FusedBackwardParams flat = problem;
  flat.neighborhood = Neighborhood();
  flat.neighborhood.axes[kAxis] = {positions, positions, 1, chunks, false};
  PassTensors tensors = tensors_of(kKeyPass, problem);
  tensors.row[kScores] = tensors.row[kGradients] = nullptr;
  tensors.result[kScores] = tensors.result[kGradients] = nullptr;
  BackwardParams params;
  cudaError_t error = set_up_pass(kKeyPass, flat, tensors, plan, params);
  if (error != cudaSuccess) return error;

  // Rows are additional keys, the same in all dilation groups.
  const PassShape compiled = pass_shape(kKeyPass, compiled_head_dim(problem.dim), plan.small);
  error = set_up_additional(problem, problem.additional_keys, problem.additional_values, {compiled.chunk, 1, {}},
                            kPartRows, params.extension);
  if (error != cudaSuccess) return error;
  for (PassMaps& maps : params.maps) {
    maps.row[kScores] = params.extension.key;
    maps.row[kGradients] = params.extension.value;
  }
  params.row_address = SlabAddress();
  params.row_address.per_batch = params.extension.per_batch;
  TiledAxis& axis = params.schedule.axes[kAxis];
  axis.length = axis.window = std::max(positions, problem.additional);
  axis.query_tiles = row_tiles;
  axis.by_query_tiles = FastDivisor(row_tiles);
  params.schedule.tiles = int(problem.batch * problem.kv_heads * chunks * row_tiles);
  params.most_columns = positions;
  params.partials = static_cast<float*>(problem.workspace) + naive::additional_partials(problem);

  error = launch_pass(kKeyPass, flat, plan.small, /*extended=*/true, params, stream);
  return error != cudaSuccess ? error : sm80::sum_additional(problem, chunks, stream);
}

}  // namespace jax_natten::sm90
