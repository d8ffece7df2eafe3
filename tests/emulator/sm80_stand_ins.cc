#include "cuda/sm80/backward_instances.h"

// The Makefile links the kernels of some head dimensions; these stand in for the others.
namespace jax_natten::sm80 {

#define STAND_IN(DIM)                                                                                          \
  __attribute__((weak)) KernelInstance forward_d##DIM(DType, Precision, int, bool) { return {nullptr, 0, 0}; } \
  __attribute__((weak)) KernelInstance backward_d##DIM(DType, Precision, Pass) { return {nullptr, 0, 0}; }
STAND_IN(32)
STAND_IN(64)
STAND_IN(96)
STAND_IN(128)
STAND_IN(192)
STAND_IN(256)
#undef STAND_IN

}  // namespace jax_natten::sm80
