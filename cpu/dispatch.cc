#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace jax_natten::cpu {
namespace {

const Kernels& choose() {
  [[maybe_unused]] const char* variable = std::getenv("JAX_NATTEN_CPU_ISA");
  [[maybe_unused]] const std::string_view wanted = variable ? variable : "";
#if defined(JAX_NATTEN_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && wanted != "avx2" && wanted != "baseline") {
    return kernels_avx512;
  }
#endif
#if defined(JAX_NATTEN_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && wanted != "baseline") return kernels_avx2;
#endif
  return kernels_baseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace jax_natten::cpu
