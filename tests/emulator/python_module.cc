// The Python module _emulated: the custom-call handlers of cuda/ffi, whose kernels the emulator runs, for XLA's CPU
// platform. Operands and results of a call lie between guard pages.
#include <pybind11/pybind11.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/ffi/handlers.h"
#include "cuda/ffi/tile_functions.h"
#include "emulator.h"

namespace emulator {
namespace {

namespace cuda = jax_natten::cuda;

int element_bytes(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_BF16:
      return 2;
    case XLA_FFI_DataType_F32:
      return 4;
    case XLA_FFI_DataType_F64:
      return 8;
    default:
      return 0;  // the handler will refuse it
  }
}

// A copy of a buffer between guard pages. A copy of a result begins as NaNs.
class Guarded {
 public:
  Guarded(const void* buffer, bool is_result) : buffer_(*static_cast<const XLA_FFI_Buffer*>(buffer)) {
    size_t bytes = element_bytes(buffer_.dtype);
    for (int64_t d = 0; d < buffer_.rank; ++d) bytes *= size_t(buffer_.dims[d]);
    original_ = buffer_.data;
    memory_ = std::make_unique<Memory>(bytes, 0xFF);
    if (!is_result && bytes > 0) std::memcpy(memory_->data(), original_, bytes);
    buffer_.data = memory_->data();
  }

  void* buffer() { return &buffer_; }
  bool intact() const { return memory_->intact(); }
  void write_back() const {
    if (memory_->bytes() > 0) std::memcpy(original_, memory_->data(), memory_->bytes());
  }

 private:
  XLA_FFI_Buffer buffer_;
  void* original_;
  std::unique_ptr<Memory> memory_;
};

std::vector<Guarded> guard(void** buffers, int64_t count, bool are_results) {
  std::vector<Guarded> guarded;
  for (int64_t i = 0; i < count; ++i) guarded.emplace_back(buffers[i], are_results);
  return guarded;
}

std::vector<void*> buffers_of(std::vector<Guarded>& guarded) {
  std::vector<void*> buffers;
  for (Guarded& g : guarded) buffers.push_back(g.buffer());
  return buffers;
}

std::mutex one_device;  // of all calls: XLA runs independent ones at the same time

template <int index>
XLA_FFI_Error* call(XLA_FFI_CallFrame* frame) {
  const auto handler = cuda::handlers()[index].call;
  // XLA also asks for metadata, without buffers.
  if (frame->extension_start != nullptr || frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return handler(frame);
  const std::lock_guard<std::mutex> lock(one_device);
  std::vector<Guarded> operands = guard(frame->args.args, frame->args.size, false);
  std::vector<Guarded> results = guard(frame->rets.rets, frame->rets.size, true);
  std::vector<void*> operand_buffers = buffers_of(operands), result_buffers = buffers_of(results);
  XLA_FFI_CallFrame guarded = *frame;
  guarded.args.args = operand_buffers.data();
  guarded.rets.rets = result_buffers.data();
  XLA_FFI_Error* error = handler(&guarded);
  for (const auto* all : {&operands, &results}) {
    for (const Guarded& g : *all) {
      if (!g.intact()) {
        std::fprintf(stderr, "emulator: %s writes outside of its buffers\n", cuda::handlers()[index].target);
        std::abort();
      }
    }
  }
  for (const Guarded& result : results) result.write_back();
  return error;
}

template <int... indices>
pybind11::dict handlers(std::integer_sequence<int, indices...>) {
  pybind11::dict capsules;
  ((capsules[cuda::handlers()[indices].target] =
        pybind11::capsule(reinterpret_cast<void*>(&call<indices>), "xla._CUSTOM_CALL_TARGET")),
   ...);
  return capsules;
}

}  // namespace
}  // namespace emulator

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA kernels of jax_natten on the emulator, as XLA custom calls for the CPU.";
  m.attr("is_emulated") = true;
  m.def("handlers", [] { return emulator::handlers(std::make_integer_sequence<int, jax_natten::cuda::kHandlers>()); });
  m.def(
      "configure",
      [](uint64_t seed, int major, int minor) {
        emulator::Settings settings;
        settings.seed = seed;
        settings.capability[0] = major;
        settings.capability[1] = minor;
        emulator::configure(settings);
      },
      pybind11::arg("seed"), pybind11::arg("major") = 9, pybind11::arg("minor") = 0);
  jax_natten::add_tile_functions(m);
}
