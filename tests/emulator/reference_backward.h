// The gradients of attention by their definition, in double precision, from the same inputs as a kernel: also `out` and
// `lse` are given, so that only the kernel's own rounding is seen. Without bias and additional keys.
#pragma once

#include "reference.h"

namespace jax_natten::testing {

struct BackwardReference {
  std::vector<double> d_query, d_key, d_value;  // as FusedBackwardParams lays them out
};

inline BackwardReference reference_backward(const FusedBackwardParams& p) {
  const int64_t positions = p.neighborhood.positions();
  BackwardReference result;
  result.d_query.assign(p.batch * positions * p.heads * p.dim, 0);
  result.d_key.assign(p.batch * positions * p.kv_heads * p.dim, 0);
  result.d_value.assign(p.batch * positions * p.kv_heads * p.value_dim, 0);
  const auto doubles = [&](const void* data, int64_t count) {
    std::vector<double> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = to_double(p.dtype, data, i);
    return values;
  };
  const std::vector<double> query = doubles(p.query, int64_t(result.d_query.size()));
  const std::vector<double> key = doubles(p.key, int64_t(result.d_key.size()));
  const std::vector<double> value = doubles(p.value, int64_t(result.d_value.size()));
  const std::vector<double> out = doubles(p.out, p.batch * positions * p.heads * p.value_dim);
  const std::vector<double> d_out = doubles(p.d_out, int64_t(out.size()));
  const auto dot = [](const double* a, const double* b, int count) {
    double sum = 0;
    for (int c = 0; c < count; ++c) sum += a[c] * b[c];
    return sum;
  };
  for (int64_t row = 0; row < p.batch * positions * p.heads; ++row) {
    const int kv_head = int(row % p.heads) / p.group();
    const int64_t batch = row / p.heads / positions, position = row / p.heads % positions;
    const double* q = &query[row * p.dim];
    const double* d_o = &d_out[row * p.value_dim];
    const double lse = static_cast<const float*>(p.lse)[row];
    const double delta = dot(&out[row * p.value_dim], d_o, p.value_dim) - static_cast<const float*>(p.d_lse)[row];
    for_each_neighbor(p.neighborhood, position, [&](int64_t neighbor, int64_t) {
      const int64_t at = (batch * positions + neighbor) * p.kv_heads + kv_head;
      const double* k = &key[at * p.dim];
      const double probability = std::exp(p.scale * dot(q, k, p.dim) - lse);
      const double d_score = p.scale * probability * (dot(&value[at * p.value_dim], d_o, p.value_dim) - delta);
      for (int c = 0; c < p.dim; ++c) {
        result.d_query[row * p.dim + c] += d_score * k[c];
        result.d_key[at * p.dim + c] += d_score * q[c];
      }
      for (int c = 0; c < p.value_dim; ++c) result.d_value[at * p.value_dim + c] += probability * d_o[c];
    });
  }
  return result;
}

}  // namespace jax_natten::testing
