// Powers of two along the axes of a grid, which tiles are chosen from.
#pragma once

#include "../common/neighborhood.h"

namespace jax_natten::sm80 {

inline int log2_of(int x) {
  int log = 0;
  while (1 << log < x) ++log;
  return log;
}

// Calls visit(logs) for all powers of two per axis with the given product; axes before `first` get 1.
template <typename Visit>
void for_each_factorisation(int log_product, int first, Visit visit) {
  for (int a = 0; a <= (first > 0 ? 0 : log_product); ++a) {
    for (int b = 0; b <= (first > 1 ? 0 : log_product - a); ++b) {
      const int logs[kMaxRank] = {a, b, log_product - a - b};
      visit(logs);
    }
  }
}

}  // namespace jax_natten::sm80
