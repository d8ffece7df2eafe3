// Sizes of the data types.
#pragma once

#include "../common/params.h"

namespace jax_natten::naive {

inline int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    default:
      return 2;
  }
}

inline int64_t accumulator_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

}  // namespace jax_natten::naive
