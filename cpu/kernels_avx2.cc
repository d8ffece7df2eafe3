#define JAX_NATTEN_ISA avx2
#include "kernels_inl.h"

namespace jax_natten::cpu {

const Kernels kernels_avx2 = avx2::make_kernels("avx2");

}  // namespace jax_natten::cpu
