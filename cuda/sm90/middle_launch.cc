#include "middle_launch.h"

#include "middle_instances.h"
#include "middle_shape.h"
#include "warpgroup_launch.h"

namespace jax_natten::sm90 {
namespace {

WarpgroupInstance find_instance(int dim, DType dtype, int rank, int variant) {
  switch (dim) {
    case 32:
      return middle_d32(dtype, rank, variant);
    case 64:
      return middle_d64(dtype, rank, variant);
    case 96:
      return middle_d96(dtype, rank, variant);
    default:
      return middle_d128(dtype, rank, variant);
  }
}

}  // namespace

cudaError_t launch_middle(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  if (why_not_middle(problem, plan) != nullptr) return cudaErrorInvalidValue;
  if (is_empty(problem)) return cudaSuccess;

  const int dim = compiled_head_dim(problem.dim), variant = middle_variant(dim, product(plan.key_tile));
  const WarpgroupInstance instance = find_instance(dim, problem.dtype, problem.neighborhood.rank, variant);
  return launch_warpgroups(problem, plan, middle_shape(dim, variant), instance, kMiddleThreads, middle_blocks(dim),
                           stream);
}

}  // namespace jax_natten::sm90
