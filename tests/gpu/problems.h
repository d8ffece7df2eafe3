// Problems for the C++ tests: those of the benchmark table, the hard windows that once broke kernels, and random ones.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "../../cuda/common/params.h"

namespace jax_natten::driver {

struct Problem {
  std::string name;
  FusedShape shape;
};

// Axes in the problem's own order; they are padded in front to three.
inline Problem make_problem(std::string name, DType dtype, int64_t batch, int heads, int kv_heads, int dim,
                            std::vector<int> grid, std::vector<int> window, std::vector<int> stride,
                            std::vector<int> dilation, unsigned causal = 0) {
  Problem problem;
  problem.name = std::move(name);
  FusedShape& shape = problem.shape;
  shape.dtype = dtype;
  shape.batch = batch;
  shape.heads = heads;
  shape.kv_heads = kv_heads;
  shape.dim = shape.value_dim = dim;
  shape.neighborhood.rank = int(grid.size());
  for (size_t a = 0; a < grid.size(); ++a) {
    shape.neighborhood.axes[kMaxRank - grid.size() + a] =
        Axis{grid[a], window[a], stride[a], dilation[a], (causal >> a & 1) != 0};
  }
  double root = 1;
  while (root * root < dim) root += 1e-3;
  shape.scale = 1 / root;
  return problem;
}

inline std::vector<Problem> bench_problems() {
  constexpr DType t = DType::kBFloat16;
  return {
      make_problem("flux_s1", t, 1, 24, 24, 128, {256, 256}, {80, 80}, {1, 1}, {1, 1}),
      make_problem("flux_s16", t, 1, 24, 24, 128, {256, 256}, {80, 80}, {16, 16}, {1, 1}),
      make_problem("hunyuan_s1", t, 1, 24, 24, 128, {30, 48, 80}, {18, 24, 24}, {1, 1, 1}, {1, 1, 1}),
      make_problem("hunyuan_s16_8_8", t, 1, 24, 24, 128, {30, 48, 80}, {18, 24, 24}, {16, 8, 8}, {1, 1, 1}),
      make_problem("cosmos_s1", t, 1, 32, 32, 128, {16, 44, 80}, {16, 24, 16}, {1, 1, 1}, {1, 1, 1}),
      make_problem("cosmos_s1_8_16", t, 1, 32, 32, 128, {16, 44, 80}, {16, 24, 16}, {1, 8, 16}, {1, 1, 1}),
      make_problem("cosmos_w16_32_48", t, 1, 32, 32, 128, {16, 44, 80}, {16, 32, 48}, {1, 1, 1}, {1, 1, 1}),
      make_problem("cosmos2_s1_4_8", t, 1, 16, 16, 128, {16, 44, 80}, {16, 12, 24}, {1, 4, 8}, {1, 1, 1}),
      make_problem("seq32k_w2048", t, 1, 16, 16, 128, {32768}, {2048}, {1}, {1}),
      make_problem("seq32k_w2048_s256", t, 1, 16, 16, 128, {32768}, {2048}, {256}, {1}),
      make_problem("seq32k_w2048_causal", t, 1, 16, 16, 128, {32768}, {2048}, {1}, {1}, 1),
      make_problem("seq32k_gqa8", t, 1, 32, 4, 128, {32768}, {2048}, {1}, {1}, 1),
      make_problem("dense16k_d128", t, 1, 16, 16, 128, {16384}, {16384}, {1}, {1}),
      make_problem("dense16k_d64", t, 1, 32, 32, 64, {16384}, {16384}, {1}, {1}),
      make_problem("nat_56", t, 128, 2, 2, 32, {56, 56}, {7, 7}, {1, 1}, {1, 1}),
      make_problem("nat_28", t, 128, 4, 4, 32, {28, 28}, {7, 7}, {1, 1}, {1, 1}),
      make_problem("nat_14", t, 128, 8, 8, 32, {14, 14}, {7, 7}, {1, 1}, {1, 1}),
      make_problem("nat_7", t, 128, 16, 16, 32, {7, 7}, {7, 7}, {1, 1}, {1, 1}),
      make_problem("dinat_56_d8", t, 128, 2, 2, 32, {56, 56}, {7, 7}, {1, 1}, {8, 8}),
      make_problem("dinat_28_d4", t, 128, 4, 4, 32, {28, 28}, {7, 7}, {1, 1}, {4, 4}),
      make_problem("hdit_64_k13", t, 32, 8, 8, 64, {64, 64}, {13, 13}, {1, 1}, {1, 1}),
      make_problem("hdit_64_k13_d4", t, 32, 8, 8, 64, {64, 64}, {13, 13}, {1, 1}, {4, 4}),
      make_problem("seq4k_w127", t, 8, 16, 16, 64, {4096}, {127}, {1}, {1}),
      make_problem("weather", t, 1, 6, 6, 32, {14, 90, 180}, {5, 7, 7}, {1, 1, 1}, {1, 1, 1}),
      make_problem("vae_k3_7_7", t, 1, 16, 16, 64, {21, 34, 60}, {3, 7, 7}, {1, 1, 1}, {1, 1, 1}),
  };
}

inline std::vector<Problem> hard_problems(DType t, unsigned causal) {
  const std::string suffix = t == DType::kFloat16 ? "_f16" : "_bf16";
  std::vector<Problem> problems;
  const auto add = [&](const char* name, int64_t b, int hq, int hkv, int d, std::vector<int> x, std::vector<int> k,
                       std::vector<int> s, std::vector<int> dilation) {
    if (causal >> x.size()) return;
    problems.push_back(
        make_problem(name + suffix + "_c" + std::to_string(causal), t, b, hq, hkv, d, x, k, s, dilation, causal));
  };
  add("h1d_a", 4, 3, 1, 128, {256}, {255}, {82}, {1});
  add("h1d_b", 2, 4, 2, 128, {128}, {63}, {31}, {1});
  add("h1d_c", 1, 1, 1, 32, {128}, {3}, {2}, {10});
  add("h1d_d", 1, 1, 1, 64, {128}, {8}, {7}, {5});
  add("h1d_e", 1, 1, 1, 32, {17}, {12}, {1}, {1});
  add("h1d_f", 1, 1, 1, 128, {256}, {128}, {127}, {1});
  add("h1d_g", 1, 2, 2, 64, {125}, {15}, {1}, {1});
  add("h1d_h", 1, 1, 1, 24, {7}, {1}, {1}, {7});
  add("h1d_i", 2, 2, 1, 40, {33}, {33}, {33}, {1});
  add("h2d_a", 1, 4, 1, 32, {5, 25}, {5, 16}, {1, 16}, {1, 1});
  add("h2d_b", 1, 1, 1, 32, {84, 19}, {7, 3}, {1, 1}, {5, 1});
  add("h2d_c", 1, 1, 1, 128, {19, 29}, {8, 8}, {1, 1}, {2, 3});
  add("h2d_d", 1, 1, 1, 128, {48, 17}, {24, 16}, {1, 1}, {2, 1});
  add("h2d_e", 1, 1, 1, 128, {67, 80}, {12, 7}, {8, 4}, {5, 11});
  add("h2d_f", 1, 1, 1, 128, {44, 80}, {24, 16}, {8, 16}, {1, 1});
  add("h2d_g", 1, 1, 1, 64, {36, 40}, {36, 40}, {12, 13}, {1, 1});
  add("h2d_h", 1, 12, 4, 64, {17, 16}, {3, 8}, {1, 2}, {1, 1});
  add("h2d_i", 2, 4, 4, 56, {32, 32}, {31, 31}, {1, 1}, {1, 1});
  add("h2d_j", 1, 2, 2, 88, {28, 46}, {11, 13}, {1, 1}, {1, 1});
  add("h3d_a", 1, 4, 1, 32, {8, 8, 16}, {3, 3, 3}, {2, 1, 2}, {2, 2, 4});
  add("h3d_b", 1, 1, 1, 64, {18, 37, 12}, {14, 16, 12}, {12, 8, 1}, {1, 2, 1});
  add("h3d_c", 1, 1, 1, 64, {13, 11, 9}, {3, 4, 3}, {2, 3, 3}, {3, 2, 2});
  add("h3d_d", 2, 3, 3, 64, {57, 20, 88}, {19, 4, 6}, {13, 1, 6}, {2, 2, 7});
  add("h3d_e", 1, 1, 1, 64, {30, 48, 18}, {3, 2, 8}, {1, 1, 1}, {8, 18, 2});
  add("h3d_f", 1, 1, 1, 64, {8, 4, 8}, {7, 3, 7}, {1, 1, 1}, {1, 1, 1});
  add("h3d_g", 1, 2, 1, 64, {68, 64, 8}, {14, 32, 2}, {3, 4, 1}, {1, 2, 3});
  return problems;
}

// Grids of rank r have up to sizes[r - 1] positions and a little more along an axis.
inline Problem random_problem(std::mt19937& random, int index, const std::vector<int>& sizes = {600, 48, 20}) {
  const int rank = 1 + random() % 3;
  std::vector<int> x, k, s, d;
  unsigned causal = 0;
  for (int a = 0; a < rank; ++a) {
    const int dilation = random() % 3 == 0 ? 1 + random() % 5 : 1;
    x.push_back(dilation + random() % sizes[rank - 1]);
    const int most = x.back() / dilation;
    k.push_back(random() % 5 == 0 ? most : 1 + random() % most);
    s.push_back(random() % 2 == 0 ? 1 : 1 + random() % k.back());
    d.push_back(dilation);
    causal |= unsigned(random() % 4 == 0) << a;
  }
  const int dims[] = {32, 64, 64, 128, 128, 96, 192, 256, 40, 24, 88, 120, 8, 200};
  const int kv_heads = 1 + random() % 3;
  Problem problem = make_problem("random" + std::to_string(index), random() % 2 ? DType::kBFloat16 : DType::kFloat16,
                                 1 + random() % 2, kv_heads * (random() % 3 ? 1 : 1 + random() % 4), kv_heads,
                                 dims[random() % 14], x, k, s, d, causal);
  const double factors[] = {1, 1, 1, 4, -1, 0, -3};
  problem.shape.scale *= factors[random() % 7];
  return problem;
}

// Adds additional keys, or a relative position bias, or both.
inline void extend_problem(std::mt19937& random, Problem& problem) {
  FusedShape& shape = problem.shape;
  bool causal = false;
  for (const Axis& axis : shape.neighborhood.axes) causal = causal || axis.causal;
  if (!causal && random() % 3 != 0) shape.bias_batch = random() % 2 ? shape.batch : 1;
  if (!shape.has_bias() || random() % 2) shape.additional = 1 + random() % (random() % 2 ? 8 : 200);
}

inline std::string describe(const FusedShape& shape) {
  std::string text = "B" + std::to_string(shape.batch) + " H" + std::to_string(shape.heads) + "/" +
                     std::to_string(shape.kv_heads) + " D" + std::to_string(shape.dim) +
                     (shape.dtype == DType::kFloat16 ? " f16" : " bf16");
  for (int a = kMaxRank - shape.neighborhood.rank; a < kMaxRank; ++a) {
    const Axis& axis = shape.neighborhood.axes[a];
    text += " [x" + std::to_string(axis.length) + " k" + std::to_string(axis.window) + " s" +
            std::to_string(axis.stride) + " d" + std::to_string(axis.dilation) + (axis.causal ? " causal]" : "]");
  }
  if (shape.additional > 0) text += " additional " + std::to_string(shape.additional);
  if (shape.has_bias()) text += " bias " + std::to_string(shape.bias_batch);
  return text + " scale " + std::to_string(shape.scale);
}

}  // namespace jax_natten::driver
