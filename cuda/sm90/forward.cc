#include "forward.h"

#include "warp_launch.h"
#include "wide_launch.h"

namespace jax_natten::sm90 {

cudaError_t launch(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  return plan.structure == Structure::kWide ? launch_wide(problem, plan, stream) : launch_warp(problem, plan, stream);
}

}  // namespace jax_natten::sm90
