// Instantiates the wide kernel for one head dimension.
#pragma once

#include "wide_forward.cuh"
#include "wide_instances.h"

namespace jax_natten::sm90 {

template <typename T, int kDim, int kRank, bool kEarlyExponentials>
WideInstance wide_instance() {
  return {wide_forward<T, kDim, kRank, kEarlyExponentials>,
          sizeof(typename WideTraits<T, kDim, kRank, kEarlyExponentials>::Shared)};
}

template <typename T, int kDim, bool kEarlyExponentials>
WideInstance wide_instance_of_rank(int rank) {
  return rank == 1   ? wide_instance<T, kDim, 1, kEarlyExponentials>()
         : rank == 2 ? wide_instance<T, kDim, 2, kEarlyExponentials>()
                     : wide_instance<T, kDim, 3, kEarlyExponentials>();
}

template <int kDim>
WideInstance wide_instance_of(DType dtype, int rank, bool early_exponentials) {
  if (dtype == DType::kFloat16) return wide_instance_of_rank<__half, kDim, true>(rank);
#if defined(JAX_NATTEN_SM90_EXPERIMENTS)
  if (!early_exponentials) return wide_instance_of_rank<__nv_bfloat16, kDim, false>(rank);
#endif
  return wide_instance_of_rank<__nv_bfloat16, kDim, true>(rank);
}

}  // namespace jax_natten::sm90
