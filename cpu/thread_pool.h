// Runs tasks on XLA's thread pool and on the calling thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

#include "executor.h"

namespace jax_natten::cpu {

// Scratch of the current thread, at least this large and aligned to 64. Kept for the next call, because fresh memory
// costs a page fault per 4 KiB. Null if there is no memory.
void* thread_scratch(size_t bytes);

// `Pool` has num_threads() and Schedule(f), like xla::ffi::ThreadPool.
//
// The calling thread takes tasks like every other, so that all get done even if no pool thread is ever free (the pool
// may be the one that the caller runs on). It waits only for tasks that some thread is already working on. Helpers that
// the pool starts too late find no task left; they own what they look at.
template <typename Pool>
class ThreadPoolExecutor final : public Executor {
 public:
  explicit ThreadPoolExecutor(Pool& pool) : pool_(pool) {}

  void run(int64_t tasks, size_t scratch_bytes, Task task, const void* context) override {
    if (tasks <= 0) return;
    auto work = std::make_shared<Work>(tasks, scratch_bytes, task, context);
    void* scratch = thread_scratch(scratch_bytes);
    if (scratch == nullptr) throw std::bad_alloc();
    const int64_t threads = pool_.num_threads();
    for (int64_t helper = 1; helper < threads && helper < tasks; ++helper) {
      pool_.Schedule([work] {
        // A thread without memory leaves its share to the others.
        if (work->has_tasks()) {
          if (void* own = thread_scratch(work->scratch_bytes)) work->take_all(own);
        }
      });
    }
    work->take_all(scratch);
    work->wait();
  }

 private:
  struct Work {
    Work(int64_t tasks, size_t scratch_bytes, Task task, const void* context)
        : tasks(tasks), scratch_bytes(scratch_bytes), task(task), context(context) {}

    bool has_tasks() const { return next.load(std::memory_order_relaxed) < tasks; }

    void take_all(void* scratch) {
      int64_t taken = 0;
      for (int64_t n; (n = next.fetch_add(1, std::memory_order_relaxed)) < tasks; ++taken) task(context, n, scratch);
      if (taken == 0) return;
      // The last thread to finish wakes the caller; results of all threads are visible to it.
      if (done.fetch_add(taken, std::memory_order_acq_rel) + taken == tasks) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done = true;
        wake.notify_all();
      }
    }

    void wait() {
      std::unique_lock<std::mutex> lock(mutex);
      wake.wait(lock, [this] { return all_done; });
    }

    const int64_t tasks;
    const size_t scratch_bytes;
    const Task task;
    const void* const context;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable wake;
    bool all_done = false;
  };

  Pool& pool_;
};

}  // namespace jax_natten::cpu
