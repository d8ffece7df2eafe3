// How a group of lanes holds rows (one head of one position) in registers, and the arithmetic on them.
//
// A row is cut into packs of kWidth elements (16 bytes, or 1 element where rows are not 16-byte aligned). Lane l of a
// group of kLanes holds packs l, l + kLanes, ..: kVectors of them, so every load of a group is contiguous. All products
// and sums are in the accumulation type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace jax_natten::naive {

constexpr int kThreads = 128;
constexpr unsigned kFullWarp = 0xffffffffu;

template <int kWidth_, int kLanes_, int kVectors_, bool kWhole_>
struct Layout {
  static constexpr int kWidth = kWidth_;      // elements of a pack
  static constexpr int kLanes = kLanes_;      // lanes of a group
  static constexpr int kVectors = kVectors_;  // packs per lane
  // Whether a row always fits in the registers of its group. If not, kernels walk it in spans and read rows again
  // where the others keep them.
  static constexpr bool kWhole = kWhole_;
  static constexpr int kElements = kWidth * kVectors;
  static constexpr int kSpan = kElements * kLanes;  // row elements that a group holds at once
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kMinBlocks = kWhole ? 4 : 3;  // per multiprocessor: at most 128 or 168 registers
};

template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

__device__ __forceinline__ void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(double x, double& y) { y = x; }

// exp for inputs of type T. The fast one loses about 1e-7 near 1: nothing beside the rounding of 16-bit inputs.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(T) == 2) {
    return __expf(x);
  } else {
    return expf(x);
  }
}
template <typename T>
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}

// Consecutive elements of a row, read and written as one word.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

template <typename T, int kWidth>
struct Pack {
  using Word = typename WordOf<sizeof(T) * kWidth>::Type;
  Word word = {};
};

template <int kWidth, typename T>
__device__ __forceinline__ Pack<T, kWidth> load_pack(const T* at) {
  using Word = typename Pack<T, kWidth>::Word;
  return {__ldg(reinterpret_cast<const Word*>(at))};
}

// What one lane holds of a row: as stored, and ready for arithmetic.
template <typename T, class L>
struct Stored {
  Pack<T, L::kWidth> pack[L::kVectors];
};
template <typename T, class L>
struct Fragment {
  Accumulator<T> element[L::kElements] = {};
};

// Where a lane finds its packs in rows of `size` elements.
template <class L>
struct Lane {
  int first;  // element of the row with which the lane's first pack begins
  int size;

  __device__ __forceinline__ explicit Lane(int size) : first(threadIdx.x % L::kLanes * L::kWidth), size(size) {}
  // Element with which pack v begins, less `first`, in the span that begins at `begin`.
  __device__ __forceinline__ static constexpr int offset(int v) { return v * L::kLanes * L::kWidth; }
  __device__ __forceinline__ bool holds(int v, int begin) const { return begin + offset(v) < size - first; }
};

// Loads the lane's part of span [begin, begin + kSpan) of a row; `at` is the row plus lane.first. What lies past the
// row, and a row that is not valid, reads as zero and is not touched.
template <typename T, class L>
__device__ __forceinline__ Stored<T, L> load(const T* at, const Lane<L>& lane, int begin = 0, bool valid = true) {
  Stored<T, L> stored;
#pragma unroll
  for (int v = 0; v < L::kVectors; ++v) {
    if (valid & lane.holds(v, begin)) stored.pack[v] = load_pack<L::kWidth>(at + begin + lane.offset(v));
  }
  return stored;
}

// Stores it; in the accumulation type too, whose rows (partial sums in the workspace) need not be aligned.
template <typename T, class L>
__device__ __forceinline__ void store(T* at, const Lane<L>& lane, const Fragment<T, L>& fragment, int begin = 0) {
#pragma unroll
  for (int v = 0; v < L::kVectors; ++v) {
    if (!lane.holds(v, begin)) continue;
    T elements[L::kWidth];
#pragma unroll
    for (int w = 0; w < L::kWidth; ++w) narrow(fragment.element[v * L::kWidth + w], elements[w]);
    typename Pack<T, L::kWidth>::Word word;
    memcpy(&word, elements, sizeof(word));
    *reinterpret_cast<decltype(word)*>(at + begin + lane.offset(v)) = word;
  }
}
template <typename T, class L>
__device__ __forceinline__ void store_partial(Accumulator<T>* at, const Lane<L>& lane, const Fragment<T, L>& fragment,
                                              int begin = 0) {
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) {
    const int v = e / L::kWidth;
    if (lane.holds(v, begin)) at[begin + lane.offset(v) + e % L::kWidth] = fragment.element[e];
  }
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T, int kWidth>
__device__ __forceinline__ void widen(const Pack<T, kWidth>& pack, Accumulator<T>* out) {
  T elements[kWidth];
  memcpy(elements, &pack.word, sizeof(elements));
#pragma unroll
  for (int e = 0; e < kWidth; ++e) out[e] = widen(elements[e]);
}
// A bfloat16 is the upper half of a float. Written as shifts and masks of words, the work spreads over two pipelines.
__device__ __forceinline__ void widen(const Pack<__nv_bfloat16, 8>& pack, float* out) {
  const unsigned words[4] = {pack.word.x, pack.word.y, pack.word.z, pack.word.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    out[2 * w] = __uint_as_float(words[w] << 16);
    out[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
  }
}

// One element, the same for all lanes of a group.
template <typename T>
__device__ __forceinline__ Accumulator<T> load_one(const T* at) {
  Accumulator<T> x;
  widen(load_pack<1>(at), &x);
  return x;
}

template <typename T, class L>
__device__ __forceinline__ Fragment<T, L> widen(const Stored<T, L>& stored) {
  Fragment<T, L> fragment;
#pragma unroll
  for (int v = 0; v < L::kVectors; ++v) widen(stored.pack[v], fragment.element + v * L::kWidth);
  return fragment;
}

// Sum over the lanes of a group; every lane gets it. The whole warp takes part.
template <class L, typename A>
__device__ __forceinline__ A group_sum(A x) {
#pragma unroll
  for (int offset = L::kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// This lane's part of a dot product, added to `sum`.
template <typename T, class L>
__device__ __forceinline__ Accumulator<T> partial_dot(const Fragment<T, L>& x, const Stored<T, L>& y,
                                                      Accumulator<T> sum) {
  const Fragment<T, L> wide = widen<T, L>(y);
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) sum = fma(x.element[e], wide.element[e], sum);
  return sum;
}

// sum += factor * y
template <typename T, class L>
__device__ __forceinline__ void add_scaled(Fragment<T, L>& sum, Accumulator<T> factor, const Stored<T, L>& y) {
  const Fragment<T, L> wide = widen<T, L>(y);
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) sum.element[e] = fma(factor, wide.element[e], sum.element[e]);
}

// A step of a long sum. Where it shows, the step is summed by itself first: that rounds the long sum once a step.
template <typename T, class L>
struct Sum {
  static constexpr bool kStepwise = sizeof(T) >= 4;
  Fragment<T, L>& total;
  Fragment<T, L> step;

  __device__ __forceinline__ explicit Sum(Fragment<T, L>& total) : total(total) {}
  __device__ __forceinline__ void add(Accumulator<T> factor, const Stored<T, L>& row) {
    add_scaled<T, L>(kStepwise ? step : total, factor, row);
  }
  __device__ __forceinline__ void finish() {
    if constexpr (kStepwise) {
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) total.element[e] += step.element[e];
    }
  }
};

// One row that meets many others: in registers if it fits, else read again span by span.
template <typename T, class L>
struct Row {
  const T* at;  // the row plus lane.first
  Lane<L> lane;
  Fragment<T, L> whole;

  __device__ __forceinline__ Row(const T* row, const Lane<L>& lane) : at(row + lane.first), lane(lane) {
    if constexpr (L::kWhole) whole = widen<T, L>(load<T, L>(at, lane));
  }

  // Dot products with kRows other rows, complete in every lane; zero for a row that is not valid. `kept` receives the
  // last span of the other rows: whole rows, if they are whole.
  template <int kRows>
  __device__ __forceinline__ void dot(const T* const (&others)[kRows], const bool (&valid)[kRows],
                                      Accumulator<T> (&products)[kRows], Stored<T, L> (&kept)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) products[r] = 0;
    if constexpr (L::kWhole) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) kept[r] = load<T, L>(others[r], lane, 0, valid[r]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) products[r] = partial_dot<T, L>(whole, kept[r], products[r]);
    } else {
#pragma unroll 1
      for (int begin = 0; begin < lane.size; begin += L::kSpan) {
        const Fragment<T, L> span = widen<T, L>(load<T, L>(at, lane, begin));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          kept[r] = load<T, L>(others[r], lane, begin, valid[r]);
          products[r] = partial_dot<T, L>(span, kept[r], products[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) products[r] = group_sum<L>(products[r]);
  }

  template <int kRows>
  __device__ __forceinline__ void dot(const T* const (&others)[kRows], const bool (&valid)[kRows],
                                      Accumulator<T> (&products)[kRows]) const {
    Stored<T, L> kept[kRows];
    dot(others, valid, products, kept);
  }
};

// Puts span [begin, begin + kSpan) of kRows rows into `kept`, which holds it already if rows are whole.
template <typename T, class L, int kRows>
__device__ __forceinline__ void keep_span(const T* const (&rows)[kRows], const bool (&valid)[kRows],
                                          const Lane<L>& lane, int begin, Stored<T, L> (&kept)[kRows]) {
  if constexpr (!L::kWhole) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) kept[r] = load<T, L>(rows[r], lane, begin, valid[r]);
  }
}

}  // namespace jax_natten::naive
