#include "sm80.h"

#include "fused.h"
#include "unfused.h"

namespace jax_natten::sm80 {
namespace {

Precision precision_of(jax_natten::Precision asked) {
  return asked == jax_natten::Precision::kHighest ? Precision::kSplitTf32 : Precision::kTf32;
}

}  // namespace

const char* why_not_forward_call(const FusedForwardParams& params) { return why_not_forward(params); }
const char* why_not_backward_call(const FusedBackwardParams& params) { return why_not_fused_backward(params); }
const char* why_not_pn(const PnParams& params) { return why_not(params, Operation::kPn); }
const char* why_not_nn(const NnParams& params) { return why_not(params, Operation::kNn); }
const char* why_not_in(const InParams& params) { return why_not(params, Operation::kIn); }

cudaError_t fused_forward_call(const FusedForwardParams& params, cudaStream_t stream) {
  return fused_forward(params, precision_of(params.precision), stream);
}

cudaError_t fused_backward_call(const FusedBackwardParams& params, cudaStream_t stream) {
  return fused_backward(params, precision_of(params.precision), stream);
}

cudaError_t pn_call(const PnParams& params, cudaStream_t stream) {
  return pn(params, stream, precision_of(params.precision));
}

cudaError_t nn_call(const NnParams& params, cudaStream_t stream) {
  return nn(params, stream, precision_of(params.precision));
}

cudaError_t in_call(const InParams& params, cudaStream_t stream) {
  return in(params, stream, precision_of(params.precision));
}

}  // namespace jax_natten::sm80
