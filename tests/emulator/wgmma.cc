// wgmma: matrix products of warpgroups.
//
// Each warp performs its own 16 rows of a product, at its wait for it or at a random time before; until then the
// accumulators read as NaN.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cta.h"

namespace emulator {
namespace {

struct MatrixDescriptor {
  uint32_t start, leading, stride;
  int span;

  explicit MatrixDescriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3FFF) << 4),
        leading(uint32_t(bits >> 16 & 0x3FFF) << 4),
        stride(uint32_t(bits >> 32 & 0x3FFF) << 4) {
    const int code = int(bits >> 62);
    span = code == 1 ? 128 : code == 2 ? 64 : code == 3 ? 32 : 0;
    if (span == 0) {
      fail("wgmma: descriptor without swizzle: not modelled");
    } else if (bits >> 49 & 7) {
      fail("wgmma: descriptor with a base offset: not modelled");
    } else if (start % (8 * span) >= uint32_t(span)) {
      fail("wgmma: descriptor begins inside a swizzle atom, at address %u", start);
    }
  }

  // Eight 16-bit elements that are contiguous before the swizzle.
  const uint16_t* eight(uint32_t address) const {
    const uint32_t at = swizzled(address, span);
    const uint8_t* bytes = shared_bytes(at, 16, 16, "wgmma operand");
    if (bytes == nullptr || !check_fenced(at, 16, "wgmma")) return nullptr;
    return reinterpret_cast<const uint16_t*>(bytes);
  }
};

void to_floats(const uint16_t* from, int count, bool half, float* to, int step) {
  for (int i = 0; i < count; ++i) to[i * step] = half ? half_to_float(from[i]) : bfloat16_to_float(from[i]);
}

// (end - begin) x 16, row-major, the 16 contiguous in memory.
void read_rows(const MatrixDescriptor& matrix, int begin, int end, bool half, float* to) {
  if (matrix.start % matrix.span + 32 > uint32_t(matrix.span)) return fail("wgmma: 16 elements leave the swizzle span");
  for (int row = begin; row < end; ++row) {
    for (int piece = 0; piece < 2; ++piece) {
      const uint16_t* from = matrix.eight(matrix.start + row / 8 * matrix.stride + row % 8 * matrix.span + piece * 16);
      if (from == nullptr) return;
      to_floats(from, 8, half, to + 16 * (row - begin) + 8 * piece, 1);
    }
  }
}

// 16 x columns, row-major, the columns contiguous in memory ("transposed").
void read_columns(const MatrixDescriptor& matrix, int columns, bool half, float* to) {
  const int atom = matrix.span / 2;
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < columns; n += 8) {
      const uint16_t* from = matrix.eight(matrix.start + n / atom * matrix.leading + k / 8 * matrix.stride +
                                          k % 8 * matrix.span + n % atom * 2);
      if (from == nullptr) return;
      to_floats(from, 8, half, to + k * columns + n, 1);
    }
  }
}

template <typename Function>
void for_each_accumulator(int columns, Function function) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < columns / 2; ++e) {
      function(lane, e, lane / 4 + e / 2 % 2 * 8, e / 4 * 8 + lane % 4 * 2 + e % 2);
    }
  }
}

void retire(WarpProducts& products, std::vector<WgmmaOperation>& group) {
  for (WgmmaOperation& operation : group) {
    perform(operation);
    Accumulators& accumulators = *operation.accumulators;
    if (--accumulators.in_flight > 0) continue;
    for_each_accumulator(accumulators.columns, [&](int lane, int e, int row, int column) {
      accumulators.registers[lane][e] = accumulators.tile[row * accumulators.columns + column];
    });
    auto& all = products.accumulators;
    all.erase(std::find(all.begin(), all.end(), operation.accumulators));
  }
}

// The four warps of a warpgroup issue the same products in the same order, each in its own time.
bool check_issue(WarpProducts& products, const WgmmaOperand& operand) {
  const WgmmaIssue issue = {operand.a != nullptr ? 0 : operand.a_descriptor, operand.b_descriptor, operand.columns,
                            operand.accumulate};
  auto& issues = cta.issues[current->warp / 4];
  if (products.issued == issues.size()) issues.push_back(issue);
  const WgmmaIssue& other = issues[products.issued++];
  if (other.a_descriptor != issue.a_descriptor || other.b_descriptor != issue.b_descriptor ||
      other.columns != issue.columns || other.accumulate != issue.accumulate) {
    fail("wgmma: the warps of a warpgroup differ in descriptors, shape or predicate");
    return false;
  }
  return true;
}

}  // namespace

void perform(WgmmaOperation& operation) {
  if (operation.done || cta.failed) return;
  operation.done = true;
  Accumulators& accumulators = *operation.accumulators;
  const int columns = accumulators.columns;
  static float a[16 * 16], b[16 * 256], rows[256 * 16];
  if (operation.a.empty()) {
    read_rows(MatrixDescriptor(operation.a_descriptor), operation.row, operation.row + 16, operation.half, a);
    read_rows(MatrixDescriptor(operation.b_descriptor), 0, columns, operation.half, rows);
    for (int n = 0; n < columns; ++n) {
      for (int k = 0; k < 16; ++k) b[k * columns + n] = rows[16 * n + k];
    }
  } else {
    to_floats(operation.a.data(), 16 * 16, operation.half, a, 1);
    read_columns(MatrixDescriptor(operation.b_descriptor), columns, operation.half, b);
  }
  if (cta.failed) return;
  for (int row = 0; row < 16; ++row) {
    float* __restrict d = &accumulators.tile[row * columns];
    if (!operation.accumulate) std::fill(d, d + columns, 0.f);
    for (int k = 0; k < 16; ++k) {
      const float x = a[16 * row + k];
      const float* __restrict y = b + k * columns;
      for (int n = 0; n < columns; ++n) d[n] += x * y[n];
    }
  }
}

void wgmma(WgmmaOperand operand, Where where) {
  meet_lanes(
      "wgmma", ~0u, &operand,
      [](void** operands, uint32_t) {
        const WgmmaOperand* all[32];
        for (int i = 0; i < 32; ++i) all[i] = static_cast<WgmmaOperand*>(operands[i]);
        const WgmmaOperand& first = *all[0];
        WarpProducts& products = cta.products[current->warp];
        for (int i = 1; i < 32; ++i) {
          if (all[i]->b_descriptor != first.b_descriptor || all[i]->accumulate != first.accumulate ||
              (first.a == nullptr && all[i]->a_descriptor != first.a_descriptor)) {
            return fail("wgmma: the lanes of a warp differ in descriptors or predicate");
          }
        }
        if (!check_issue(products, first)) return;
        if (products.fenced != ~0u) return fail("wgmma without a wgmma_fence() since the last wait");
        std::shared_ptr<Accumulators> accumulators;
        for (const auto& in_flight : products.accumulators) {
          if (in_flight->registers[0] == first.accumulators) accumulators = in_flight;
        }
        if (accumulators == nullptr) {
          accumulators = std::make_shared<Accumulators>();
          accumulators->columns = first.columns;
          accumulators->in_flight = 0;
          accumulators->tile.resize(16 * first.columns);
          for (int i = 0; i < 32; ++i) accumulators->registers[i] = all[i]->accumulators;
          // In flight the registers hold nothing that may be read.
          for_each_accumulator(first.columns, [&](int lane, int e, int row, int column) {
            float& x = accumulators->registers[lane][e];
            accumulators->tile[row * first.columns + column] = x;
            x = NAN;
          });
          products.accumulators.push_back(accumulators);
        }
        for (int i = 0; i < 32; ++i) {
          if (accumulators->registers[i] != all[i]->accumulators || accumulators->columns != first.columns) {
            return fail("wgmma: accumulators in flight are used as others");
          }
        }
        ++accumulators->in_flight;
        WgmmaOperation operation = {accumulators,           {},         first.a_descriptor, first.b_descriptor,
                                    current->warp % 4 * 16, first.half, first.accumulate,   false};
        if (first.a != nullptr) {
          operation.a.resize(16 * 16);
          for (int i = 0; i < 32; ++i) {
            for (int e = 0; e < 8; ++e) {
              const int row = i / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + i % 4 * 2 + e % 2;
              operation.a[16 * row + column] = uint16_t(all[i]->a[e / 2] >> (e % 2 * 16));
            }
          }
        }
        products.open.push_back(std::move(operation));
      },
      where);
}

void wgmma_fence() { cta.products[current->warp].fenced |= 1u << current->lane; }

void wgmma_commit(Where where) {
  meet_lanes(
      "wgmma_commit", ~0u, nullptr,
      [](void**, uint32_t) {
        WarpProducts& products = cta.products[current->warp];
        products.groups.push_back(std::move(products.open));
        products.open.clear();
      },
      where);
}

void wgmma_wait(int pending, Where where) {
  meet_lanes(
      "wgmma_wait", ~0u, &pending,
      [](void** operands, uint32_t) {
        WarpProducts& products = cta.products[current->warp];
        while (int(products.groups.size()) > *static_cast<int*>(operands[0]) && !cta.failed) {
          retire(products, products.groups.front());
          products.groups.pop_front();
        }
        products.fenced = 0;
      },
      where);
}

}  // namespace emulator
