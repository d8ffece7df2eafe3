#include "../common/workspace.h"
#include "../naive/fused_backward.h"
#include "../naive/partials.cuh"
#include "backward_sums.h"

namespace jax_natten::sm80 {
namespace {

template <typename T>
cudaError_t sum_additional_of(const FusedBackwardParams& p, int64_t chunks, cudaStream_t stream) {
  const float* partials = static_cast<const float*>(p.workspace) + naive::additional_partials(p);
  const int64_t rows = int64_t(p.additional) * p.kv_heads, width = int64_t(p.dim) + p.value_dim;
  if (auto error =
          naive::sum_partials<T>(partials, p.d_additional_keys, {p.batch, chunks, rows, width, 0, p.dim}, stream)) {
    return error;
  }
  return naive::sum_partials<T>(partials, p.d_additional_values, {p.batch, chunks, rows, width, p.dim, p.value_dim},
                                stream);
}

}  // namespace

cudaError_t sum_additional(const FusedBackwardParams& p, int chunks, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat16:
      return sum_additional_of<__half>(p, chunks, stream);
    case DType::kBFloat16:
      return sum_additional_of<__nv_bfloat16>(p, chunks, stream);
    default:
      return sum_additional_of<float>(p, chunks, stream);
  }
}

cudaError_t sum_bias(const FusedBackwardParams& p, const float* partials, int chunks, cudaStream_t stream) {
  return naive::sum_partials<float>(partials, p.d_bias, {1, chunks, naive::bias_gradient_size(p), 1, 0, 1}, stream);
}

}  // namespace jax_natten::sm80
