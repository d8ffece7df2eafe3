// The Python module jax_natten._cuda.
#include <pybind11/pybind11.h>

#include "handlers.h"
#include "tile_functions.h"

namespace py = pybind11;

namespace jax_natten::cuda {
namespace {

py::dict handler_capsules() {
  py::dict capsules;
  for (int n = 0; n < kHandlers; ++n) {
    const Handler& handler = handlers()[n];
    capsules[handler.target] = py::capsule(reinterpret_cast<void*>(handler.call), "xla._CUSTOM_CALL_TARGET");
  }
  return capsules;
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "Neighborhood attention kernels for NVIDIA GPUs, as XLA custom calls.";
  m.def("handlers", handler_capsules, "Custom-call target names and their handlers.");
  add_tile_functions(m);
}

}  // namespace jax_natten::cuda
