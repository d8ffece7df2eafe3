// Gradients of attention by their definition, in double precision, for the emulator's tests. `out` and `lse` are given
// like the other inputs, so that only the kernel's own rounding is seen.
#pragma once

#include "reference.h"

namespace jax_natten::testing {

// As FusedBackwardParams lays them out.
struct BackwardReference {
  std::vector<double> d_query, d_key, d_value, d_additional_keys, d_additional_values, d_bias;
};

inline BackwardReference reference_backward(const FusedBackwardParams& p) {
  const int64_t positions = p.neighborhood.positions(), rows = p.batch * positions;
  BackwardReference result;
  result.d_query.assign(rows * p.heads * p.dim, 0);
  result.d_key.assign(rows * p.kv_heads * p.dim, 0);
  result.d_value.assign(rows * p.kv_heads * p.value_dim, 0);
  result.d_additional_keys.assign(p.batch * p.additional * p.kv_heads * p.dim, 0);
  result.d_additional_values.assign(p.batch * p.additional * p.kv_heads * p.value_dim, 0);
  result.d_bias.assign(p.bias_batch * p.heads * p.neighborhood.bias_size(), 0);
  std::vector<double> query(p.dim), d_out(p.value_dim);
  for (int64_t row = 0; row < rows * p.heads; ++row) {
    const int head = int(row % p.heads), kv_head = head / p.group();
    const int64_t batch = row / p.heads / positions, position = row / p.heads % positions;
    for (int c = 0; c < p.dim; ++c) query[c] = to_double(p.dtype, p.query, row * p.dim + c);
    const double lse = static_cast<const float*>(p.lse)[row];
    double delta = -double(static_cast<const float*>(p.d_lse)[row]);
    for (int c = 0; c < p.value_dim; ++c) {
      d_out[c] = to_double(p.dtype, p.d_out, row * p.value_dim + c);
      delta += d_out[c] * to_double(p.dtype, p.out, row * p.value_dim + c);
    }

    struct Seen {
      bool additional;
      int64_t at, bias;  // row of the key; index in d_bias, or -1
      double d_score, probability;
    };
    std::vector<Seen> seen;
    const auto see = [&](bool additional, int64_t at, int64_t bias) {
      const void* keys = additional ? p.additional_keys : p.key;
      const void* values = additional ? p.additional_values : p.value;
      double score = 0, d_probability = 0;
      for (int c = 0; c < p.dim; ++c) score += query[c] * to_double(p.dtype, keys, at * p.dim + c);
      for (int c = 0; c < p.value_dim; ++c) {
        d_probability += d_out[c] * to_double(p.dtype, values, at * p.value_dim + c);
      }
      score *= p.scale;
      if (bias >= 0) score += static_cast<const float*>(p.bias)[bias];
      const double probability = std::exp(score - lse);
      seen.push_back({additional, at, bias, probability * (d_probability - delta), probability});
    };
    for_each_neighbor(p.neighborhood, position, [&](int64_t key, int64_t entry) {
      const int64_t table = p.has_bias() ? batch / (p.batch / p.bias_batch) * p.heads + head : 0;
      see(false, (batch * positions + key) * p.kv_heads + kv_head,
          p.has_bias() ? table * p.neighborhood.bias_size() + entry : -1);
    });
    for (int s = 0; s < p.additional; ++s) see(true, (batch * p.additional + s) * p.kv_heads + kv_head, -1);

    for (const Seen& s : seen) {
      const void* keys = s.additional ? p.additional_keys : p.key;
      double* d_key = &(s.additional ? result.d_additional_keys : result.d_key)[s.at * p.dim];
      double* d_value = &(s.additional ? result.d_additional_values : result.d_value)[s.at * p.value_dim];
      for (int c = 0; c < p.dim; ++c) {
        result.d_query[row * p.dim + c] += p.scale * s.d_score * to_double(p.dtype, keys, s.at * p.dim + c);
        d_key[c] += p.scale * s.d_score * query[c];
      }
      for (int c = 0; c < p.value_dim; ++c) d_value[c] += s.probability * d_out[c];
      if (s.bias >= 0) result.d_bias[s.bias] += s.d_score;
    }
  }
  return result;
}

}  // namespace jax_natten::testing
