#include "handlers.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "cuda/ffi/problem.h"
#include "kernels.h"
#include "thread_pool.h"

namespace jax_natten::cpu {
namespace {

namespace ffi = xla::ffi;

// Whether a comma-separated list names this implementation.
bool names_cpu(std::string_view names) {
  while (!names.empty()) {
    const size_t comma = names.find(',');
    if (names.substr(0, comma) == "cpu") return true;
    names = comma == std::string_view::npos ? std::string_view() : names.substr(comma + 1);
  }
  return false;
}

template <typename Params>
using Kernel = void (*)(const Params&, Executor&);

template <typename Params, Kernel<Params> Kernels::* kernel>
ffi::Error call(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                ffi::RemainingRets results) {
  Params params;
  std::string_view implementation;
  ffi::Error error = decode({attributes, operands, results}, params, implementation);
  if (error.failure()) return error;
  if (!names_cpu(implementation)) {
    return ffi::Error::InvalidArgument("implementation is \"" + std::string(implementation) +
                                       "\", expected a list with \"cpu\" on the CPU");
  }
  ThreadPoolExecutor<ffi::ThreadPool> executor(pool);
  (kernels().*kernel)(params, executor);
  return ffi::Error::Success();
}

#define JAX_NATTEN_CPU_HANDLER(name, kernel, Params)                    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (call<Params, &Kernels::kernel>), \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs().RemainingArgs().RemainingRets())

JAX_NATTEN_CPU_HANDLER(CpuFusedForward, fused_forward, FusedForwardParams);
JAX_NATTEN_CPU_HANDLER(CpuFusedBackward, fused_backward, FusedBackwardParams);
JAX_NATTEN_CPU_HANDLER(CpuPn, pn, PnParams);
JAX_NATTEN_CPU_HANDLER(CpuNn, nn, NnParams);
JAX_NATTEN_CPU_HANDLER(CpuIn, in, InParams);

#undef JAX_NATTEN_CPU_HANDLER

struct FreeScratch {
  void operator()(void* scratch) const { ::operator delete(scratch, std::align_val_t(64)); }
};

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<void, FreeScratch> scratch;
  thread_local size_t size = 0;
  if (size < bytes || !scratch) {
    scratch.reset();
    scratch.reset(::operator new(bytes + 64, std::align_val_t(64), std::nothrow));
    size = scratch ? bytes : 0;
  }
  return scratch.get();
}

const Handler* handlers() {
  static constexpr Handler table[kHandlers] = {{kFusedForwardTarget, CpuFusedForward},
                                               {kFusedBackwardTarget, CpuFusedBackward},
                                               {kPnTarget, CpuPn},
                                               {kNnTarget, CpuNn},
                                               {kInTarget, CpuIn}};
  return table;
}

}  // namespace jax_natten::cpu
