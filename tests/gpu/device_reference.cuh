// Inputs, a plain reference and comparison, all on the GPU, for the driver. Nothing here shares code with the kernels
// but the window formulas.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "../../cuda/common/params.h"

#define CHECK_CUDA(call)                                                          \
  do {                                                                            \
    const cudaError_t error_ = (call);                                            \
    if (error_ != cudaSuccess) {                                                  \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error_)); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (0)

namespace jax_natten::driver {

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(float x) { return x; }
__device__ inline void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16(x); }
__device__ inline void from_float(float x, __half& y) { y = __float2half(x); }
__device__ inline void from_float(float x, float& y) { y = x; }

__device__ inline uint32_t hash(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return uint32_t(x ^ x >> 33);
}

// Normally distributed.
template <typename T>
__global__ void fill_normal(T* out, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const uint64_t key = seed * 0x9e3779b97f4a7c15ull + 2 * i;
    const float u = (hash(key) + 1.f) * (1.f / 4294967808.f), v = hash(key + 1) * (1.f / 4294967296.f);
    from_float(sqrtf(-2.f * logf(u)) * cosf(6.2831853f * v), out[i]);
  }
}

template <typename T>
__device__ float dot(const T* a, const T* b, int count) {
  float sum = 0;
  for (int c = 0; c < count; ++c) sum += to_float(a[c]) * to_float(b[c]);
  return sum;
}

// Every `step`-th pair of a query and a head. One warp per pair: lanes over keys for the scores, over channels for the
// output.
template <typename T>
__global__ void reference_forward(FusedForwardParams p, int64_t step, float* out, float* lse) {
  const int64_t sample = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32, pair = sample * step;
  const Axis* axes = p.neighborhood.axes;
  if (pair >= p.batch * p.neighborhood.positions() * p.heads) return;
  const int lane = threadIdx.x % 32, head = pair % p.heads, dim = p.dim;
  int64_t rest = pair / p.heads;
  int phase[kMaxRank], own[kMaxRank];
  Interval keys[kMaxRank];
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int x = rest % axes[a].length;
    rest /= axes[a].length;
    phase[a] = x % axes[a].dilation;
    own[a] = x / axes[a].dilation;
    keys[a] = window_of_query(axes[a], own[a], group_length(axes[a], phase[a]));
  }
  const int n1 = keys[1].end - keys[1].begin, n2 = keys[2].end - keys[2].begin;
  const int64_t window = int64_t(keys[0].end - keys[0].begin) * n1 * n2, count = window + p.additional;
  const T* query = static_cast<const T*>(p.query) + pair * dim;
  float maximum = -INFINITY, sum = 0, accumulator[8] = {};
  for (int64_t base = 0; base < count; base += 32) {
    const int64_t n = base + lane;
    float score = -INFINITY;
    int64_t offset = 0;
    if (n < window) {
      const int in_group[kMaxRank] = {int(keys[0].begin + n / (n1 * n2)), int(keys[1].begin + n / n2 % n1),
                                      int(keys[2].begin + n % n2)};
      offset = rest;
      int64_t entry = p.has_bias() ? rest / (p.batch / p.bias_batch) * p.heads + head : 0;
      for (int a = 0; a < kMaxRank; ++a) {
        offset = offset * axes[a].length + in_group[a] * axes[a].dilation + phase[a];
        entry = entry * (2 * axes[a].window - 1) + in_group[a] - own[a] + axes[a].window - 1;
      }
      offset = (offset * p.kv_heads + head / p.group()) * dim;
      score = dot(query, static_cast<const T*>(p.key) + offset, dim) * float(p.scale);
      if (p.has_bias()) score += static_cast<const float*>(p.bias)[entry];
    } else if (n < count) {
      offset = ((rest * p.additional + n - window) * p.kv_heads + head / p.group()) * dim;
      score = dot(query, static_cast<const T*>(p.additional_keys) + offset, dim) * float(p.scale);
    }
    float raised = fmaxf(maximum, score);
    for (int w = 16; w; w /= 2) raised = fmaxf(raised, __shfl_xor_sync(~0u, raised, w));
    const float correction = expf(maximum - raised), weight = n < count ? expf(score - raised) : 0.f;
    float weights = weight;
    for (int w = 16; w; w /= 2) weights += __shfl_xor_sync(~0u, weights, w);
    sum = sum * correction + weights;
    for (float& a : accumulator) a *= correction;
    maximum = raised;
    for (int j = 0; j < 32 && base + j < count; ++j) {
      const float w = __shfl_sync(~0u, weight, j);
      const int64_t at = __shfl_sync(~0u, offset, j);
      const auto* values = static_cast<const T*>(base + j < window ? p.value : p.additional_values);
      for (int i = 0; i < 8; ++i) {
        if (lane + 32 * i < dim) accumulator[i] += w * to_float(values[at + lane + 32 * i]);
      }
    }
  }
  for (int i = 0; i < 8; ++i) {
    if (lane + 32 * i < dim) out[sample * dim + lane + 32 * i] = accumulator[i] / sum;
  }
  if (lane == 0) lse[sample] = maximum + logf(sum);
}

// P and dS of a query and a key, given where their rows are in their tensors. `entry`: of the bias, if there is one.
template <typename T>
__device__ float2 pair_gradients(const FusedBackwardParams& p, int64_t query_row, int64_t key_row, bool additional,
                                 int64_t entry) {
  const int dim = p.dim;
  const auto row = [dim](const void* tensor, int64_t at) { return static_cast<const T*>(tensor) + at * dim; };
  const T* d_out = row(p.d_out, query_row);
  const T* key = row(additional ? p.additional_keys : p.key, key_row);
  const T* value = row(additional ? p.additional_values : p.value, key_row);
  float score = dot(row(p.query, query_row), key, dim) * float(p.scale);
  if (p.has_bias() && !additional) score += static_cast<const float*>(p.bias)[entry];
  const float probability = expf(score - static_cast<const float*>(p.lse)[query_row]);
  const float delta = dot(row(p.out, query_row), d_out, dim) - static_cast<const float*>(p.d_lse)[query_row];
  return {probability, probability * (dot(d_out, value, dim) - delta)};
}

enum Owner { kOfQueries, kOfKeys, kOfAdditional };

// The gradients of every `step`-th pair of a query and a head, or of a key and a head (`second`: of its value). One
// warp per pair: lanes over partners for P and dS, over channels for the gradients.
template <typename T, Owner kOwner>
__global__ void reference_backward(FusedBackwardParams p, int64_t step, float* first, float* second) {
  constexpr bool kKeys = kOwner != kOfQueries;
  const int64_t sample = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32, own_row = sample * step;
  const int64_t positions = p.neighborhood.positions();
  const Axis* axes = p.neighborhood.axes;
  const int own_heads = kKeys ? p.kv_heads : p.heads;
  if (own_row >= p.batch * (kOwner == kOfAdditional ? p.additional : positions) * own_heads) return;
  const int lane = threadIdx.x % 32, head = own_row % own_heads, dim = p.dim;
  int64_t rest = own_row / own_heads;
  int phase[kMaxRank], own[kMaxRank];
  Interval partners[kMaxRank];
  if (kOwner == kOfAdditional) {
    rest /= p.additional;
    for (int a = 0; a < kMaxRank; ++a) partners[a] = {0, axes[a].length};
  } else {
    for (int a = kMaxRank - 1; a >= 0; --a) {
      const int x = rest % axes[a].length;
      rest /= axes[a].length;
      phase[a] = x % axes[a].dilation;
      own[a] = x / axes[a].dilation;
      const int length = group_length(axes[a], phase[a]);
      partners[a] = kKeys ? queries_of_key(axes[a], own[a], length) : window_of_query(axes[a], own[a], length);
    }
  }
  const int n1 = partners[1].end - partners[1].begin, n2 = partners[2].end - partners[2].begin;
  const int heads = kKeys ? p.group() : 1;  // of the partners
  const int64_t in_box = int64_t(partners[0].end - partners[0].begin) * n1 * n2 * heads;
  const int64_t count = in_box + (kKeys ? 0 : p.additional);
  float sums[8] = {}, second_sums[8] = {};
  for (int64_t base = 0; base < count; base += 32) {
    const int64_t n = (base + lane) / heads;
    int64_t row = 0;
    float2 weights = {0, 0};
    if (base + lane < in_box) {
      const int x[kMaxRank] = {int(partners[0].begin + n / (int64_t(n1) * n2)), int(partners[1].begin + n / n2 % n1),
                               int(partners[2].begin + n % n2)};
      const int partner_head = kKeys ? head * heads + int((base + lane) % heads) : head / p.group();
      int64_t entry = p.has_bias() ? rest / (p.batch / p.bias_batch) * p.heads + (kKeys ? partner_head : head) : 0;
      row = rest;
      for (int a = 0; a < kMaxRank; ++a) {
        if (kOwner == kOfAdditional) {
          row = row * axes[a].length + x[a];
        } else {
          row = row * axes[a].length + x[a] * axes[a].dilation + phase[a];
          entry = entry * (2 * axes[a].window - 1) + (kKeys ? own[a] - x[a] : x[a] - own[a]) + axes[a].window - 1;
        }
      }
      row = row * (kKeys ? p.heads : p.kv_heads) + partner_head;
      weights = kKeys ? pair_gradients<T>(p, row, own_row, kOwner == kOfAdditional, entry)
                      : pair_gradients<T>(p, own_row, row, false, entry);
    } else if (base + lane < count) {
      row = (rest * p.additional + n - in_box) * p.kv_heads + head / p.group();
      weights = pair_gradients<T>(p, own_row, row, true, 0);
    }
    for (int j = 0; j < 32 && base + j < count; ++j) {
      const float probability = __shfl_sync(~0u, weights.x, j), d_score = __shfl_sync(~0u, weights.y, j);
      const int64_t at = __shfl_sync(~0u, row, j) * dim;
      const auto* other = static_cast<const T*>(kKeys ? p.query : base + j < in_box ? p.key : p.additional_keys);
      for (int i = 0; i < 8; ++i) {
        const int channel = lane + 32 * i;
        if (channel >= dim) break;
        sums[i] += d_score * to_float(other[at + channel]);
        if (kKeys) second_sums[i] += probability * to_float(static_cast<const T*>(p.d_out)[at + channel]);
      }
    }
  }
  for (int i = 0; i < 8 && lane + 32 * i < dim; ++i) {
    first[sample * dim + lane + 32 * i] = sums[i] * float(p.scale);
    if (kKeys) second[sample * dim + lane + 32 * i] = second_sums[i];
  }
}

// The gradient of the bias. One warp per entry: lanes over the queries.
template <typename T>
__global__ void reference_bias(FusedBackwardParams p, float* d_bias) {
  const int64_t own = (blockIdx.x * int64_t(blockDim.x) + threadIdx.x) / 32, size = p.neighborhood.bias_size();
  if (own >= p.bias_batch * p.heads * size) return;
  const Axis* axes = p.neighborhood.axes;
  const int head = own / size % p.heads, lane = threadIdx.x % 32;
  const int64_t share = p.batch / p.bias_batch, first_batch = own / size / p.heads * share;
  int distance[kMaxRank];
  int64_t rest = own % size;
  for (int a = kMaxRank - 1; a >= 0; --a) {
    distance[a] = int(rest % (2 * axes[a].window - 1)) - (axes[a].window - 1);
    rest /= 2 * axes[a].window - 1;
  }
  const int64_t positions = p.neighborhood.positions();
  float sum = 0;
  for (int64_t n = lane; n < share * positions; n += 32) {
    int64_t query = n % positions, key = 0, step = 1;
    const int64_t batch = first_batch + n / positions, query_row = (batch * positions + query) * p.heads + head;
    bool seen = true;
    for (int a = kMaxRank - 1; a >= 0; --a) {
      const int x = query % axes[a].length, phase = x % axes[a].dilation, y = x / axes[a].dilation + distance[a];
      const Interval keys = window_of_query(axes[a], x / axes[a].dilation, group_length(axes[a], phase));
      seen = seen && y >= keys.begin && y < keys.end;
      query /= axes[a].length;
      key += step * (y * axes[a].dilation + phase);
      step *= axes[a].length;
    }
    if (!seen) continue;
    const int64_t key_row = (batch * positions + key) * p.kv_heads + head / p.group();
    sum += pair_gradients<T>(p, query_row, key_row, false, own).y;
  }
  for (int w = 16; w; w /= 2) sum += __shfl_xor_sync(~0u, sum, w);
  if (lane == 0) d_bias[own] = sum;
}

struct Difference {
  double squares, reference_squares;
  float lse;  // largest absolute difference
  int bad;    // values that are not numbers
};

template <typename T>
__global__ void compare(const T* out, const float* reference, const float* lse, const float* lse_reference,
                        int64_t samples, int64_t step, int dim, Difference* difference) {
  double squares = 0, reference_squares = 0;
  float worst = 0;
  int bad = 0;
  const int64_t first = blockIdx.x * int64_t(blockDim.x) + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < samples * dim; i += threads) {
    const float x = to_float(out[i / dim * step * dim + i % dim]), d = x - reference[i];
    bad += !(fabsf(x) < INFINITY);
    squares += double(d) * d;
    reference_squares += double(reference[i]) * reference[i];
  }
  for (int64_t i = first; i < samples; i += threads) {
    const float d = fabsf(lse[i * step] - lse_reference[i]);
    bad += !(d < INFINITY);
    worst = fmaxf(worst, d);
  }
  atomicAdd(&difference->squares, squares);
  atomicAdd(&difference->reference_squares, reference_squares);
  atomicMax(reinterpret_cast<int*>(&difference->lse), __float_as_int(worst));
  if (bad) atomicAdd(&difference->bad, bad);
}

static __global__ void count_different_words(const uint32_t* a, const uint32_t* b, int64_t count, int* different) {
  int n = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    n += a[i] != b[i];
  }
  if (n) atomicAdd(different, n);
}

static __global__ void count_other_bytes(const uint8_t* a, int64_t count, uint8_t expected, int* other) {
  int n = 0;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    n += a[i] != expected;
  }
  if (n) atomicAdd(other, n);
}

}  // namespace jax_natten::driver
