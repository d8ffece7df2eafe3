// Host side shared by the sm_90 kernels with extended variants: what those are told besides.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"
#include "extension.h"
#include "tensor_map.h"

namespace jax_natten::sm90 {

// Additional keys and values, `box` of which are loaded together, in rows as `rows` has them.
cudaError_t set_up_additional(const FusedShape& shape, const void* keys, const void* values, const TensorBox& rows,
                              int box, KeyExtension& extension);

// The bias. `scale`: what the kernel multiplies scores with to get powers of two; 1 from here on, as scores leave the
// bias step so.
void set_up_bias(const FusedShape& shape, const void* bias, KeyExtension& extension, float& scale);

}  // namespace jax_natten::sm90
