// From the operands of a custom call to the parameter structs of the kernels, with every check.
//
// Shared by the CPU and the CUDA handlers, which declare `.Attrs().RemainingArgs().RemainingRets()` and call `decode`.
// The operands, results and attributes of each custom call are listed in problem.cc, in wire order; they are a file
// format (exported programs hold them), so that their meaning never changes: a new meaning gets a new target name.
// Python has checked everything before; these checks only turn a mistake into an error instead of a crash.
#pragma once

#include <string_view>

#include "../common/params.h"
#include "xla/ffi/api/ffi.h"

namespace jax_natten {

constexpr const char* kFusedForwardTarget = "jax_natten_fused_forward";
constexpr const char* kFusedBackwardTarget = "jax_natten_fused_backward";
constexpr const char* kPnTarget = "jax_natten_pn";
constexpr const char* kNnTarget = "jax_natten_nn";
constexpr const char* kInTarget = "jax_natten_in";

// Everything a custom call is told besides its stream or thread pool.
struct CallFrame {
  xla::ffi::Dictionary attributes;
  xla::ffi::RemainingArgs operands;
  xla::ffi::RemainingRets results;
};

// Fills `params` and `implementation` (comma-separated kernel names in order of preference; the view lives as long as
// the call). On failure returns InvalidArgument naming the buffer or attribute, what was got and what is expected.
// Grids of rank 1 and 2 come out padded in front to three axes. After success all sizes are consistent, and
// bias_batch is 0 exactly if there is no relative position bias; batch and axis lengths may still be zero.
xla::ffi::Error decode(const CallFrame& frame, FusedForwardParams& params, std::string_view& implementation);
xla::ffi::Error decode(const CallFrame& frame, FusedBackwardParams& params, std::string_view& implementation);
xla::ffi::Error decode(const CallFrame& frame, PnParams& params, std::string_view& implementation);
xla::ffi::Error decode(const CallFrame& frame, NnParams& params, std::string_view& implementation);
xla::ffi::Error decode(const CallFrame& frame, InParams& params, std::string_view& implementation);

}  // namespace jax_natten
