#include "wide_launch.h"

#include "warpgroup_launch.h"
#include "wide_instances.h"
#include "wide_shape.h"

namespace jax_natten::sm90 {
namespace {

WarpgroupInstance find_instance(int dim, DType dtype, int rank, bool extended) {
  switch (dim) {
    case 32:
      return wide_d32(dtype, rank, extended);
    case 64:
      return wide_d64(dtype, rank, extended);
    case 96:
      return wide_d96(dtype, rank, extended);
    case 128:
      return wide_d128(dtype, rank, extended);
    case 192:
      return wide_d192(dtype, rank, extended);
    default:
      return wide_d256(dtype, rank, extended);
  }
}

}  // namespace

cudaError_t launch_wide(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  if (why_not_wide(problem, plan) != nullptr) return cudaErrorInvalidValue;
  if (is_empty(problem)) return cudaSuccess;

  const WarpgroupShape compiled = wide_shape(compiled_head_dim(problem.dim));
  const WarpgroupInstance instance =
      find_instance(compiled.dim, problem.dtype, problem.neighborhood.rank, is_extended(problem));
  return launch_warpgroups(problem, plan, compiled, instance, kWideThreads, /*blocks=*/1, stream);
}

}  // namespace jax_natten::sm90
