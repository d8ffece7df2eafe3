#include "warp_instances.cuh"

namespace jax_natten::sm90 {

WarpKernel warp_d32(DType dtype, int list, int rank, WarpCase which) {
  return warp_instance<32>(dtype, list, rank, which);
}

}  // namespace jax_natten::sm90
