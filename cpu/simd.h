// Fixed-width vectors of the instruction set that the including file is compiled for, and the few operations on them
// that the kernels need. GCC and Clang vector extensions: no intrinsics, the same source for x86 and Arm.
//
// Everything that kernels are made of lives in the namespace JAX_NATTEN_ISA and uses no inline function from outside it
// (the standard library's least of all): the linker keeps one copy of an inline function, and it must not be one that
// was compiled for a larger instruction set than the machine has.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#ifndef JAX_NATTEN_ISA
#error "define JAX_NATTEN_ISA, the namespace of the instruction set"
#endif

#define JAX_NATTEN_INLINE inline __attribute__((always_inline))

namespace jax_natten::cpu::JAX_NATTEN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <typename Real>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = uint32_t;
};
template <>
struct IntegerOf<double> {
  using type = uint64_t;
};

template <typename Real>
constexpr int kLanes = kVectorBytes / int(sizeof(Real));

template <typename Real>
struct VectorOf {
  typedef Real type __attribute__((vector_size(kVectorBytes)));
};

template <typename Real>
using Vec = typename VectorOf<Real>::type;
// Unsigned integers as wide as Real: bit patterns.
template <typename Real>
using Bits = Vec<typename IntegerOf<Real>::type>;
// What comparisons of Vec<Real> give: all bits set in the lanes where they hold. Select with `mask ? a : b`.
template <typename Real>
using Mask = decltype(Vec<Real>{} < Vec<Real>{});

template <typename Real>
constexpr Real kInfinity = Real(__builtin_inf());

template <typename Real>
JAX_NATTEN_INLINE Vec<Real> load(const Real* from) {
  Vec<Real> vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename Real, typename V>
JAX_NATTEN_INLINE void store(Real* to, V vector) {
  static_assert(sizeof(V) == kVectorBytes, "stores whole vectors");
  __builtin_memcpy(to, &vector, sizeof(V));
}

// Keeps a loaded vector in a register: the compiler would rather load it again for each of its uses.
template <typename V>
JAX_NATTEN_INLINE V in_register(V vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#elif defined(__aarch64__)
  asm("" : "+w"(vector));
#endif
  return vector;
}

template <typename To, typename From>
JAX_NATTEN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename Real, int... lane>
JAX_NATTEN_INLINE Vec<Real> broadcast(Real value, std::integer_sequence<int, lane...>) {
  return Vec<Real>{((void)lane, value)...};
}

template <typename Real>
JAX_NATTEN_INLINE Vec<Real> broadcast(Real value) {
  return broadcast<Real>(value, std::make_integer_sequence<int, kLanes<Real>>());
}

template <typename Real, int... lane>
JAX_NATTEN_INLINE Mask<Real> lanes_between(int begin, int end, std::integer_sequence<int, lane...>) {
  using Integer = decltype(Mask<Real>{}[0] + 0);
  const Mask<Real> index{Integer(lane)...};
  return (index >= Mask<Real>{} + Integer(begin)) & (index < Mask<Real>{} + Integer(end));
}

// The lanes begin <= lane < end.
template <typename Real>
JAX_NATTEN_INLINE Mask<Real> lanes_between(int begin, int end) {
  return lanes_between<Real>(begin, end, std::make_integer_sequence<int, kLanes<Real>>());
}

template <typename V>
JAX_NATTEN_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

// Rotates the lanes down by `distance`.
template <int distance, typename Real, int... lane>
JAX_NATTEN_INLINE Vec<Real> rotate(Vec<Real> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, ((lane + distance) % int(sizeof...(lane)))...);
}

template <int distance, typename Real, typename Combine>
JAX_NATTEN_INLINE Real reduce(Vec<Real> v, Combine combine) {
  if constexpr (distance == 0) {
    return v[0];
  } else {
    const Vec<Real> other = rotate<distance, Real>(v, std::make_integer_sequence<int, kLanes<Real>>());
    return reduce<distance / 2, Real>(combine(v, other), combine);
  }
}

template <typename Real>
JAX_NATTEN_INLINE Real largest_lane(Vec<Real> v) {
  return reduce<kLanes<Real> / 2, Real>(v, [](Vec<Real> a, Vec<Real> b) { return maximum(a, b); });
}

template <typename Real>
JAX_NATTEN_INLINE Real sum_of_lanes(Vec<Real> v) {
  return reduce<kLanes<Real> / 2, Real>(v, [](Vec<Real> a, Vec<Real> b) { return a + b; });
}

template <typename Real, int... lane>
JAX_NATTEN_INLINE void interleave(Vec<Real> a, Vec<Real> b, Vec<Real>* low, Vec<Real>* high,
                                  std::integer_sequence<int, lane...>) {
  constexpr int W = sizeof...(lane);
  *low = __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * W)...);
  *high = __builtin_shufflevector(a, b, (W / 2 + lane / 2 + lane % 2 * W)...);
}

// Transposes the square of kLanes vectors: each round interleaves vector i with vector i + W / 2.
template <typename Real>
JAX_NATTEN_INLINE void transpose(Vec<Real> (&square)[kLanes<Real>]) {
  constexpr int W = kLanes<Real>;
#pragma GCC unroll 8
  for (int round = 1; round < W; round *= 2) {
    Vec<Real> next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      interleave<Real>(square[i], square[i + W / 2], &next[2 * i], &next[2 * i + 1],
                       std::make_integer_sequence<int, W>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) square[i] = next[i];
  }
}

// Constants of exp(x) = 2^n e^r with r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2]. The polynomials give 2 e^r, so that the
// factor 2^(n - 1) is a normal number for all n that occur.
template <typename Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  static constexpr float kLeast = -86.6f, kMost = 88.72f;  // below: 0, above: infinity
  static constexpr int kMantissaBits = 23;
  static constexpr uint32_t kBias = 126;
  // Minimax, relative error 3e-9.
  static constexpr float kPolynomial[] = {
      0x1.6a2434p-9f, 0x1.1239e2p-6f, 0x1.5558f2p-4f, 0x1.555492p-2f, 0x1.fffffcp-1f, 2.0f, 2.0f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kLeast = -707.7, kMost = 709.78;
  static constexpr int kMantissaBits = 52;
  static constexpr uint64_t kBias = 1022;
  // Taylor, relative error 1e-17.
  static constexpr double kPolynomial[] = {
      2.0 / 6227020800, 2.0 / 479001600, 2.0 / 39916800, 2.0 / 3628800, 2.0 / 362880, 2.0 / 40320, 2.0 / 5040,
      2.0 / 720,        2.0 / 120,       2.0 / 24,       2.0 / 6,       1.0,          2.0,         2.0};
};

template <typename Real>
JAX_NATTEN_INLINE Vec<Real> exp(Vec<Real> x) {
  using C = ExpConstants<Real>;
  const Vec<Real> shifted = x * Real(1.4426950408889634) + C::kRound;
  const Vec<Real> n = shifted - C::kRound;
  const Vec<Real> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  Vec<Real> polynomial = broadcast(C::kPolynomial[0]);
#pragma GCC unroll 16
  for (size_t i = 1; i < sizeof(C::kPolynomial) / sizeof(Real); ++i) polynomial = polynomial * r + C::kPolynomial[i];
  const Bits<Real> exponent = (bit_cast<Bits<Real>>(shifted) + C::kBias) << C::kMantissaBits;
  const Vec<Real> result = polynomial * bit_cast<Vec<Real>>(exponent);
  const Vec<Real> bounded = x > C::kMost ? broadcast(kInfinity<Real>) : result;  // a NaN stays
  return x < C::kLeast ? Vec<Real>{} : bounded;
}

}  // namespace jax_natten::cpu::JAX_NATTEN_ISA
