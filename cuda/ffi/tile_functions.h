// What the Python modules tell about tiles: which cases and tiles the kernels take, and what the cost model expects.
// Needs no CUDA; both modules have it.
#pragma once

#include <pybind11/pybind11.h>

namespace jax_natten {

void add_tile_functions(pybind11::module_& m);

}  // namespace jax_natten
