#include "warp_instances.cuh"

namespace jax_natten::sm90 {

WarpKernel warp_d64(DType dtype, int list, int rank, bool extended) {
  return warp_instance<64, 1>(dtype, list, rank, extended);
}

}  // namespace jax_natten::sm90
