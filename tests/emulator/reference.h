// Attention by its definition, in double precision, for the emulator's tests. Shares nothing with the kernels but the
// window formulas.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/common/params.h"
#include "emulator.h"

namespace jax_natten::testing {

inline double to_double(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::kFloat16:
      return emulator::half_to_float(static_cast<const uint16_t*>(data)[i]);
    case DType::kBFloat16:
      return emulator::bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    default:
      return static_cast<const double*>(data)[i];
  }
}

inline void from_double(DType dtype, double x, void* data, int64_t i) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[i] = emulator::float_to_half(float(x));
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[i] = emulator::float_to_bfloat16(float(x));
      break;
    case DType::kFloat32:
      static_cast<float*>(data)[i] = float(x);
      break;
    default:
      static_cast<double*>(data)[i] = x;
  }
}

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// The keys that the query at a flat grid position sees: calls function(flat position of the key, flat index in the bias
// table of a head) for each, in the order of the slots of its window.
template <typename Function>
void for_each_neighbor(const Neighborhood& neighborhood, int64_t position, Function function) {
  const Axis* axes = neighborhood.axes;
  int phase[kMaxRank], query[kMaxRank];
  Interval keys[kMaxRank];
  for (int a = kMaxRank - 1; a >= 0; --a) {
    const int x = int(position % axes[a].length);
    position /= axes[a].length;
    phase[a] = x % axes[a].dilation;
    query[a] = x / axes[a].dilation;
    keys[a] = window_of_query(axes[a], query[a], group_length(axes[a], phase[a]));
  }
  int y[kMaxRank];
  for (y[0] = keys[0].begin; y[0] < keys[0].end; ++y[0]) {
    for (y[1] = keys[1].begin; y[1] < keys[1].end; ++y[1]) {
      for (y[2] = keys[2].begin; y[2] < keys[2].end; ++y[2]) {
        int64_t key = 0, bias = 0;
        for (int a = 0; a < kMaxRank; ++a) {
          key = key * axes[a].length + y[a] * axes[a].dilation + phase[a];
          bias = bias * (2 * axes[a].window - 1) + y[a] - query[a] + axes[a].window - 1;
        }
        function(key, bias);
      }
    }
  }
}

struct ForwardReference {
  std::vector<double> out, lse;  // as FusedForwardParams lays them out
};

inline ForwardReference reference_forward(const FusedForwardParams& p) {
  const int64_t positions = p.neighborhood.positions();
  ForwardReference result;
  result.out.assign(p.batch * positions * p.heads * p.value_dim, 0);
  result.lse.assign(p.batch * positions * p.heads, 0);
  std::vector<double> query(p.dim), scores;
  std::vector<std::vector<double>> values;
  for (int64_t row = 0; row < p.batch * positions * p.heads; ++row) {
    const int head = int(row % p.heads), kv_head = head / p.group();
    const int64_t batch = row / p.heads / positions, position = row / p.heads % positions;
    for (int c = 0; c < p.dim; ++c) query[c] = to_double(p.dtype, p.query, row * p.dim + c);
    std::vector<std::pair<const void*, int64_t>> seen;  // values: array and row
    scores.clear();
    const auto see = [&](const void* keys, const void* values, int64_t at, double bias) {
      double dot = 0;
      for (int c = 0; c < p.dim; ++c) dot += query[c] * to_double(p.dtype, keys, at * p.dim + c);
      scores.push_back(dot * p.scale + bias);
      seen.push_back({values, at});
    };
    for_each_neighbor(p.neighborhood, position, [&](int64_t key, int64_t bias) {
      double added = 0;
      if (p.has_bias()) {
        const int64_t table = batch / (p.batch / p.bias_batch) * p.heads + head;
        added = static_cast<const float*>(p.bias)[table * p.neighborhood.bias_size() + bias];
      }
      see(p.key, p.value, (batch * positions + key) * p.kv_heads + kv_head, added);
    });
    for (int s = 0; s < p.additional; ++s) {
      see(p.additional_keys, p.additional_values, (batch * p.additional + s) * p.kv_heads + kv_head, 0);
    }
    double maximum = -INFINITY, sum = 0;
    for (const double score : scores) maximum = std::max(maximum, score);
    for (double& score : scores) sum += score = std::exp(score - maximum);
    result.lse[row] = maximum + std::log(sum);
    for (size_t n = 0; n < scores.size(); ++n) {
      for (int c = 0; c < p.value_dim; ++c) {
        result.out[row * p.value_dim + c] +=
            scores[n] / sum * to_double(p.dtype, seen[n].first, seen[n].second * p.value_dim + c);
      }
    }
  }
  return result;
}

// A tensor's error as a fraction of its length; infinite if a value is not a number.
inline double relative_error(const std::vector<double>& reference, DType dtype, const void* data) {
  double squares = 0, reference_squares = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double d = to_double(dtype, data, int64_t(i)) - reference[i];
    if (!(std::fabs(d) < INFINITY)) return INFINITY;
    squares += d * d;
    reference_squares += reference[i] * reference[i];
  }
  return squares == 0 ? 0 : std::sqrt(squares / reference_squares);
}

inline double largest_difference(const std::vector<double>& reference, DType dtype, const void* data) {
  double most = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double d = std::fabs(to_double(dtype, data, int64_t(i)) - reference[i]);
    if (!(d < INFINITY)) return INFINITY;
    most = std::max(most, d);
  }
  return most;
}

}  // namespace jax_natten::testing
