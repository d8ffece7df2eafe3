// Cooperative threads of execution: a stack each, switched without the kernel's help.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

#if defined(__x86_64__)

// Saves the callee-saved registers on the stack, its pointer in *from, and goes on with the stack `to`.
extern "C" void emulator_switch(void** from, void* to);

#endif

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;

  Fiber() {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, kGuardBytes, PROT_NONE) != 0) {
      std::perror("emulator: no memory for a stack");
      std::abort();
    }
    stack_ = static_cast<uint8_t*>(stack);
  }
  ~Fiber() { munmap(stack_, kStackBytes); }
  Fiber(const Fiber&) = delete;

#if defined(__x86_64__)
  // The next resume() calls `entry`, which must never return.
  void prepare(void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 3;
    *--top = reinterpret_cast<void*>(entry);  // at its entry the stack is 8 bytes off a multiple of 16
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
  }
  void resume() { emulator_switch(&outside_, pointer_); }
  void suspend() { emulator_switch(&pointer_, outside_); }

 private:
  void* pointer_ = nullptr;
  static inline void* outside_ = nullptr;
#else
  void prepare(void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void resume() { swapcontext(&outside_, &context_); }
  void suspend() { swapcontext(&context_, &outside_); }

 private:
  ucontext_t context_;
  static inline ucontext_t outside_;
#endif
  uint8_t* stack_;
};

}  // namespace emulator
