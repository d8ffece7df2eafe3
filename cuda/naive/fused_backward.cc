// Fused backward: calls the passes.
#include "fused_backward.h"

#include "naive.h"

namespace jax_natten::naive {

cudaError_t fused_backward(const FusedBackwardParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.neighborhood.positions() == 0) return fill_sums_with_zeros(p, stream);
  if (auto error = backward_of_queries(p, stream)) return error;
  if (auto error = backward_of_keys(p, stream)) return error;
  return p.has_bias() ? backward_of_bias(p, stream) : cudaSuccess;
}

}  // namespace jax_natten::naive
