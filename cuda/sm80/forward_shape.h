// Sizes of the forward kernels: what one CTA holds, for each head dimension.
#pragma once

namespace jax_natten::sm80 {

// What a CTA can have on every GPU from compute capability 8.0 on (8.6, 8.9, 12.0: 99 KB; 8.0: 163 KB).
constexpr int kSharedBytesOfAnyDevice = 99 * 1024;

constexpr int kForwardDims[] = {32, 64, 96, 128, 192, 256};

// Float32 does without two of them, which saves a sixth of all compilation.
constexpr bool forward_has_dim(int element_bytes, int compiled) {
  return element_bytes == 2 || (compiled != 96 && compiled != 192);
}

// The smallest compiled head dimension that holds `dim` channels; 0: none.
constexpr int forward_dim(int element_bytes, int dim) {
  for (const int compiled : kForwardDims) {
    if (dim <= compiled && forward_has_dim(element_bytes, compiled)) return compiled;
  }
  return 0;
}

struct ForwardShape {
  int keys;   // of a key tile
  int warps;  // that share the rows of the query tile
  bool query_in_registers;
  int least_ctas;  // of a multiprocessor, which registers must allow for
};

// rows: 64, or 128: then a warp has 32, so that keys and values are read from shared memory half as often, which long
// windows want. The number of keys is what fits into 99 KB twice, beside the queries if they stay.
constexpr ForwardShape forward_shape(int element_bytes, int dim, int rows) {
  const int row_bytes = element_bytes * dim;
  // Float32 needs the registers for operands in two parts.
  const bool in_registers = element_bytes == 2 && rows == 64 && row_bytes <= 256;
  return {row_bytes <= 256   ? 64
          : row_bytes <= 512 ? 32
                             : 16,
          rows == 32 ? 2 : 4, in_registers, rows == 64 && dim <= 64 && element_bytes == 2 ? 3 : 2};
}

// Rows of the query tile that a compiled head dimension offers; the first is always there.
constexpr int forward_least_rows(int element_bytes, int dim) { return element_bytes * dim > 768 ? 32 : 64; }
constexpr bool forward_has_128_rows(int element_bytes, int dim) { return element_bytes * dim <= 256; }

}  // namespace jax_natten::sm80
