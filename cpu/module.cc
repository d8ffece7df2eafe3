// The Python module jax_natten._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "cuda/common/neighborhood.h"
#include "cuda/ffi/tile_functions.h"
#include "handlers.h"
#include "kernels.h"

namespace py = pybind11;

namespace jax_natten::cpu {
namespace {

py::dict handler_capsules() {
  py::dict capsules;
  for (int n = 0; n < kHandlers; ++n) {
    const Handler& handler = handlers()[n];
    capsules[handler.target] = py::capsule(reinterpret_cast<void*>(handler.call), "xla._CUSTOM_CALL_TARGET");
  }
  return capsules;
}

using Bounds = std::vector<int>;

std::tuple<Bounds, Bounds, Bounds, Bounds> window_bounds(int length, int window, int stride, int dilation,
                                                         bool causal) {
  Axis axis;
  axis.length = length;
  axis.window = window;
  axis.stride = stride;
  axis.dilation = dilation;
  axis.causal = causal;
  Bounds begin, end, query_begin, query_end;
  for (int x = 0; x < length; ++x) {
    const int group = group_length(axis, x % dilation);
    const Interval keys = window_of_query(axis, x / dilation, group);
    const Interval queries = queries_of_key(axis, x / dilation, group);
    begin.push_back(keys.begin);
    end.push_back(keys.end);
    query_begin.push_back(queries.begin);
    query_end.push_back(queries.end);
  }
  return {begin, end, query_begin, query_end};
}

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "Neighborhood attention kernels for the CPU, as XLA custom calls.";
  m.def("handlers", handler_capsules, "Custom-call target names and their handlers.");
  m.def(
      "instruction_set", [] { return kernels().instruction_set; },
      "The instruction set whose kernels run on this machine.");
  m.def("window_bounds", window_bounds, py::arg("length"), py::arg("window"), py::arg("stride"), py::arg("dilation"),
        py::arg("causal"),
        "Windows of an axis by the C++ formulas, as in-group indices, for every position: first key and past-the-last "
        "key of a query's window, first query and past-the-last query that see a key.");
  add_tile_functions(m);
}

}  // namespace jax_natten::cpu
