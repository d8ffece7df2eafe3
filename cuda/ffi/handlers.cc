#include "handlers.h"

#include <cuda_runtime.h>

#include <string>
#include <string_view>

#include "../naive/naive.h"
#include "../sm80/sm80.h"
#include "../sm90/sm90.h"
#include "problem.h"

namespace jax_natten::cuda {
namespace {

namespace ffi = xla::ffi;

// Kernels for one operation. Which of them take a case was decided when the program was lowered; which of those run on
// the device at hand is decided here, since a program may be compiled elsewhere.
template <typename Params>
struct Implementation {
  std::string_view name;
  bool (*runs_on)(int compute_capability);  // e.g. 90 for 9.0
  cudaError_t (*launch)(const Params&, cudaStream_t);
  // Why it does not take a call, in words that follow its name; nullptr: it takes every call.
  const char* (*why_not)(const Params&) = nullptr;
};

bool any_device(int) { return true; }

constexpr Implementation<FusedForwardParams> kFusedForward[] = {
    {"sm90", sm90::runs_on, sm90::fused_forward, sm90::why_not_forward},
    {"sm80", sm80::runs_on, sm80::fused_forward_call, sm80::why_not_forward_call},
    {"naive", any_device, naive::fused_forward},
};
constexpr Implementation<FusedBackwardParams> kFusedBackward[] = {
    {"sm90", sm90::runs_on, sm90::fused_backward, sm90::why_not_backward_call},
    {"sm80", sm80::runs_on, sm80::fused_backward_call, sm80::why_not_backward_call},
    {"naive", any_device, naive::fused_backward},
};
constexpr Implementation<PnParams> kPn[] = {
    {"sm80", sm80::runs_on, sm80::pn_call, sm80::why_not_pn},
    {"naive", any_device, naive::pn},
};
constexpr Implementation<NnParams> kNn[] = {
    {"sm80", sm80::runs_on, sm80::nn_call, sm80::why_not_nn},
    {"naive", any_device, naive::nn},
};
constexpr Implementation<InParams> kIn[] = {
    {"sm80", sm80::runs_on, sm80::in_call, sm80::why_not_in},
    {"naive", any_device, naive::in},
};

ffi::Error internal(cudaError_t status) {
  return ffi::Error::Internal(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <typename Params, size_t count>
ffi::Error launch(const Implementation<Params> (&table)[count], std::string_view names, const Params& params,
                  cudaStream_t stream) {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) return internal(status);

  for (std::string_view rest = names; !rest.empty();) {
    const size_t comma = rest.find(',');
    const std::string_view name = rest.substr(0, comma);
    rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
    const Implementation<Params>* found = nullptr;
    for (const auto& implementation : table) {
      if (implementation.name == name) found = &implementation;
    }
    if (!found) return ffi::Error::InvalidArgument("implementation \"" + std::string(name) + "\" is unknown on CUDA");
    if (!found->runs_on(10 * major + minor)) continue;
    if (const char* reason = found->why_not ? found->why_not(params) : nullptr) {
      return ffi::Error::InvalidArgument("implementation \"" + std::string(name) + "\" " + reason);
    }
    status = found->launch(params, stream);
    return status == cudaSuccess ? ffi::Error::Success() : internal(status);
  }
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "none of the implementations \"" + std::string(names) +
                                                             "\" runs on compute capability " + std::to_string(major) +
                                                             "." + std::to_string(minor));
}

template <typename Params, const auto& table>
ffi::Error call(cudaStream_t stream, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                ffi::RemainingRets results) {
  Params params;
  std::string_view implementation;
  ffi::Error error = decode({attributes, operands, results}, params, implementation);
  if (error.failure()) return error;
  return launch(table, implementation, params, stream);
}

// Command-buffer compatible: a handler launches the same kernels every time, allocates nothing and waits for nothing.
#define JAX_NATTEN_CUDA_HANDLER(name, table, Params)                                                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                         \
      name, (call<Params, table>),                                                                       \
      ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Attrs().RemainingArgs().RemainingRets(), \
      {ffi::Traits::kCmdBufferCompatible})

JAX_NATTEN_CUDA_HANDLER(CudaFusedForward, kFusedForward, FusedForwardParams);
JAX_NATTEN_CUDA_HANDLER(CudaFusedBackward, kFusedBackward, FusedBackwardParams);
JAX_NATTEN_CUDA_HANDLER(CudaPn, kPn, PnParams);
JAX_NATTEN_CUDA_HANDLER(CudaNn, kNn, NnParams);
JAX_NATTEN_CUDA_HANDLER(CudaIn, kIn, InParams);

#undef JAX_NATTEN_CUDA_HANDLER

}  // namespace

const Handler* handlers() {
  static constexpr Handler table[kHandlers] = {{kFusedForwardTarget, CudaFusedForward},
                                               {kFusedBackwardTarget, CudaFusedBackward},
                                               {kPnTarget, CudaPn},
                                               {kNnTarget, CudaNn},
                                               {kInTarget, CudaIn}};
  return table;
}

}  // namespace jax_natten::cuda
