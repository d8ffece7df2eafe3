#include "warp_instances.cuh"

namespace jax_natten::sm90 {

WarpKernel warp_pair(DType dtype, int rank, WarpCase which) {
  return dtype == DType::kFloat16 ? warp_instance_of_pair<__half>(rank, which)
                                  : warp_instance_of_pair<__nv_bfloat16>(rank, which);
}

}  // namespace jax_natten::sm90
