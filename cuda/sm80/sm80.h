// The sm_80 kernels as the custom-call handlers see them.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "limits.h"

namespace jax_natten::sm80 {

// Why the kernels do not take a call, in words that follow the name of the implementation; nullptr if they do.
const char* why_not_forward_call(const FusedForwardParams& params);
const char* why_not_backward_call(const FusedBackwardParams& params);
const char* why_not_pn(const PnParams& params);
const char* why_not_nn(const NnParams& params);
const char* why_not_in(const InParams& params);

// Neither allocate on the device nor synchronise. float32 products are those of TensorFloat32 unless params.precision
// is the highest; then they are sums of such products, nearly as exact as float32.
cudaError_t fused_forward_call(const FusedForwardParams& params, cudaStream_t stream);
cudaError_t fused_backward_call(const FusedBackwardParams& params, cudaStream_t stream);
cudaError_t pn_call(const PnParams& params, cudaStream_t stream);
cudaError_t nn_call(const NnParams& params, cudaStream_t stream);
cudaError_t in_call(const InParams& params, cudaStream_t stream);

}  // namespace jax_natten::sm80
