// Fused backward: what remains to be written of a problem without queries.
#include "dtype.h"
#include "fused_backward.h"

namespace jax_natten::naive {
namespace {

cudaError_t fill_zero(void* data, int64_t elements, int64_t bytes, cudaStream_t stream) {
  return elements > 0 ? cudaMemsetAsync(data, 0, elements * bytes, stream) : cudaSuccess;
}

}  // namespace

cudaError_t fill_sums_with_zeros(const FusedBackwardParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype), additional = p.batch * p.additional * p.kv_heads;
  if (auto error = fill_zero(p.d_additional_keys, additional * p.dim, bytes, stream)) return error;
  if (auto error = fill_zero(p.d_additional_values, additional * p.value_dim, bytes, stream)) return error;
  return fill_zero(p.d_bias, bias_gradient_size(p), accumulator_bytes(p.dtype), stream);
}

}  // namespace jax_natten::naive
