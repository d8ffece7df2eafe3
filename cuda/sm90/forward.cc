#include "forward.h"

#include "middle_launch.h"
#include "warp_launch.h"
#include "wide_launch.h"

namespace jax_natten::sm90 {

cudaError_t launch(const FusedForwardParams& problem, const Plan& plan, cudaStream_t stream) {
  switch (plan.structure) {
    case Structure::kWide:
      return launch_wide(problem, plan, stream);
    case Structure::kWarp:
      return launch_warp(problem, plan, stream);
    default:
      return launch_middle(problem, plan, stream);
  }
}

}  // namespace jax_natten::sm90
