#define JAX_NATTEN_ISA baseline
#include "kernels_inl.h"

namespace jax_natten::cpu {

const Kernels kernels_baseline = baseline::make_kernels("baseline");

}  // namespace jax_natten::cpu
