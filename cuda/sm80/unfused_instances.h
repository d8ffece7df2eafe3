// The compiled instances of the unfused kernels, one translation unit per operation and kind of numbers.
#pragma once

#include "../common/params.h"
#include "precision.h"
#include "unfused_params.h"

namespace jax_natten::sm80 {

constexpr int kUnfusedDims[] = {32, 64, 128, 256};

// `dim`: one of kUnfusedDims. Half: float16 and bfloat16; float: float32.
UnfusedKernel pn_half(DType dtype, int dim);
UnfusedKernel nn_half(DType dtype, int dim);
UnfusedKernel in_half(DType dtype, int dim);
UnfusedKernel pn_float(Precision precision, int dim);
UnfusedKernel nn_float(Precision precision, int dim);
UnfusedKernel in_float(Precision precision, int dim);

SumKernel sum_half(DType dtype);
SumKernel sum_float();

}  // namespace jax_natten::sm80
