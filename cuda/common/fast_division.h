// Division by a number known only at launch, without a division instruction: a multiplication and a shift.
#pragma once

#include <cstdint>

#include "neighborhood.h"

namespace jax_natten {

struct FastDivisor {
  int divisor = 1;
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  FastDivisor() = default;

  // Exact for every dividend 0 <= x < 2^31: with s = ceil(log2(d)) and m = ceil(2^(31 + s) / d), the error m d - 2^(31
  // + s) is below d <= 2^s, which is Granlund and Montgomery's condition for x m >> (31 + s).
  explicit FastDivisor(int d) : divisor(d) {
    if (d == 1) return;
    uint32_t log = 1;
    while ((int64_t(1) << log) < d) ++log;
    multiplier = uint32_t(((uint64_t(1) << (31 + log)) + d - 1) / d);
    shift = log - 1;
  }

  JAX_NATTEN_HD int quotient(int x) const {
    return divisor == 1 ? x : int(uint32_t((uint64_t(uint32_t(x)) * multiplier) >> 32) >> shift);
  }

  // Quotient of x; `remainder` receives the rest.
  JAX_NATTEN_HD int divide(int x, int& remainder) const {
    const int q = quotient(x);
    remainder = x - q * divisor;
    return q;
  }
};

}  // namespace jax_natten
