// 16-bit floating-point numbers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "emulator.h"

namespace emulator {

float half_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) {
      const int exponent = i >> 10 & 31, mantissa = i & 1023;
      const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                               : exponent == 0 ? std::ldexp(mantissa, -24)
                                               : std::ldexp(1024 + mantissa, exponent - 25);
      values[i] = float(i & 0x8000 ? -magnitude : magnitude);
    }
    return values;
  }();
  return table[bits];
}

uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (std::isnan(x)) return 0x7FFF;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.f) return sign | 0x7C00;
  int exponent = std::max(magnitude == 0 ? -126 : std::ilogb(magnitude), -14);
  // Rounded to an integer multiple of the last place, to even: that is what nearbyint does.
  const int places = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return sign | uint16_t(places < 1024 ? places : ((exponent + 15) << 10) + (places - 1024));
}

uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator
