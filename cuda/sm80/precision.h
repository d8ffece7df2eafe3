#pragma once

namespace jax_natten::sm80 {

// How float32 is multiplied.
enum class Precision {
  kTf32,       // rounded to 11 bits of mantissa
  kSplitTf32,  // as sums of two such numbers: nearly float32
};

}  // namespace jax_natten::sm80
