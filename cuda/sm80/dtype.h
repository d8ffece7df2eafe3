// Sizes of the dtypes that the sm_80 kernels take.
#pragma once

#include "../common/params.h"

namespace jax_natten::sm80 {

inline int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace jax_natten::sm80
