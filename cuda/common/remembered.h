// Choices that are expensive to make, remembered by what they depend on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace jax_natten {

// Everything that a choice depends on.
using ProblemKey = std::vector<int64_t>;

// Choices by problem. Thread-safe.
template <typename Choice>
class Remembered {
 public:
  // `choose`: makes the choice if it is not known yet.
  template <typename Choose>
  Choice find(const ProblemKey& key, Choose choose) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = known_.find(key);
      if (found != known_.end()) return found->second;
    }
    const Choice choice = choose();
    constexpr size_t kMostKnown = 4096;  // shapes of a program that never stops making up new ones
    const std::lock_guard<std::mutex> lock(mutex_);
    if (known_.size() >= kMostKnown) known_.clear();
    known_.emplace(key, choice);
    return choice;
  }

 private:
  std::mutex mutex_;
  std::map<ProblemKey, Choice> known_;
};

}  // namespace jax_natten
