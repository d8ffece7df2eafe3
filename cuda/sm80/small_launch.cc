#include "small_launch.h"

#include <algorithm>

#include "fused_setup.h"
#include "small_instances.h"
#include "small_params.h"
#include "small_setup.h"
#include "small_shape.h"

namespace jax_natten::sm80 {

cudaError_t launch_small(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  SmallParams params;
  int box[kMaxRank];
  find_box(problem, plan.query_tile, Walk::kKeysOfQueries, box);
  set_up_box(problem, box, params);
  find_box(problem, plan.query_part, Walk::kKeysOfQueries, params.list);
  const int list = small_list(product(params.list));
  Plan of_list = plan;
  std::copy(params.list, params.list + kMaxRank, of_list.key_tile);
  set_up_tiles(problem, of_list, kSmallRows / kSmallWarps, list, problem.heads, params);
  set_up_forward_arrays(problem, params);
  params.scale = float(problem.scale * kLog2E);
  params.query_factor = 1;
  KernelInstance kernel = small_forward(problem.dtype, small_dim(problem), list);
  kernel.shared_bytes += 2 * params.box_bytes;
  return launch(kernel, params.schedule.tiles, params, stream);
}

}  // namespace jax_natten::sm80
