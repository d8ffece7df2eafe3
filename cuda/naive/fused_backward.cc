// Fused backward: calls the passes, and fills what an empty problem leaves.
#include "fused_backward.h"

#include "dtype.h"
#include "naive.h"

namespace jax_natten::naive {
namespace {

cudaError_t fill_zero(void* data, int64_t elements, int64_t bytes, cudaStream_t stream) {
  return elements > 0 ? cudaMemsetAsync(data, 0, elements * bytes, stream) : cudaSuccess;
}

}  // namespace

cudaError_t fused_backward(const FusedBackwardParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.neighborhood.positions() == 0) {
    const int64_t bytes = element_bytes(p.dtype), additional = p.batch * p.additional * p.kv_heads;
    if (auto error = fill_zero(p.d_additional_keys, additional * p.dim, bytes, stream)) return error;
    if (auto error = fill_zero(p.d_additional_values, additional * p.value_dim, bytes, stream)) return error;
    return fill_zero(p.d_bias, bias_gradient_size(p), accumulator_bytes(p.dtype), stream);
  }
  if (auto error = backward_of_queries(p, stream)) return error;
  if (auto error = backward_of_keys(p, stream)) return error;
  return p.has_bias() ? backward_of_bias(p, stream) : cudaSuccess;
}

}  // namespace jax_natten::naive
