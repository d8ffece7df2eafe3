// Guarded arrays of global memory.
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cta.h"

namespace emulator {
namespace {

void on_bad_access(int, siginfo_t* information, void*) {
  char text[256];
  const int length = std::snprintf(
      text, sizeof(text), "emulator: bad memory access at %p by thread %d of CTA (%u, %u, %u), last wait at %s:%d\n",
      information->si_addr, current ? current->linear : -1, blockIdx.x, blockIdx.y, blockIdx.z,
      current ? current->where.file : "", current ? current->where.line : 0);
  if (write(2, text, length) < 0) std::abort();
  std::signal(SIGABRT, SIG_DFL);
  std::abort();
}

}  // namespace

void catch_bad_accesses() {
  static bool done = false;
  if (done) return;
  done = true;
  static uint8_t stack[65536];
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof(stack);
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_bad_access;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

Memory::Memory(size_t bytes, uint8_t fill) : bytes_(bytes) {
  constexpr size_t kPage = 4096, kAlign = 128;
  const size_t used = (bytes + kAlign - 1) / kAlign * kAlign, pages = (used + kPage - 1) / kPage * kPage + kPage;
  mapped_ = pages + 2 * kPage;
  base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base_ == MAP_FAILED || mprotect(base_ + kPage, pages, PROT_READ | PROT_WRITE) != 0) {
    std::perror("emulator: no memory");
    std::abort();
  }
  data_ = base_ + kPage + pages - used;
  std::memset(base_ + kPage, kCanary, pages);
  std::memset(data_, fill, bytes);
}

Memory::~Memory() { munmap(base_, mapped_); }

bool Memory::intact() const {
  for (const uint8_t* p = base_ + 4096; p < base_ + mapped_ - 4096; ++p) {
    if ((p < data_ || p >= data_ + bytes_) && *p != kCanary) return false;
  }
  return true;
}

}  // namespace emulator
