#include "warp_instances.cuh"

namespace jax_natten::sm90 {

WarpKernel warp_d32(DType dtype, int list, int heads, int rank, bool extended) {
  return heads == 2 ? warp_instance<32, 2>(dtype, list, rank, extended)
                    : warp_instance<32, 1>(dtype, list, rank, extended);
}

}  // namespace jax_natten::sm90
