// The custom-call handlers of the CUDA platform, by target name.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace jax_natten::cuda {

struct Handler {
  const char* target;
  XLA_FFI_Error* (*call)(XLA_FFI_CallFrame*);
};

constexpr int kHandlers = 5;
const Handler* handlers();

}  // namespace jax_natten::cuda
