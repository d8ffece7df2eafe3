// How kernels run tasks on several threads.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace jax_natten::cpu {

class Executor {
 public:
  using Task = void (*)(const void* context, int64_t task, void* scratch);

  // Calls task(context, n, scratch) once for each n below `tasks`, in any order and on several threads, and returns
  // when all have returned. A thread's scratch has `scratch_bytes` bytes aligned to 64, and holds anything.
  virtual void run(int64_t tasks, size_t scratch_bytes, Task task, const void* context) = 0;

 protected:
  ~Executor() = default;
};

}  // namespace jax_natten::cpu
