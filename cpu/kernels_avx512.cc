#define JAX_NATTEN_ISA avx512
#include "kernels_inl.h"

namespace jax_natten::cpu {

const Kernels kernels_avx512 = avx512::make_kernels("avx512");

}  // namespace jax_natten::cpu
