// SPDX-License-Identifier: Apache-2.0
// Runs the blocks of a CUDA launch on the CPU.
//
// The threads of a block are fibers. A warp runs as far as it can, its lanes in order, before the next warp starts;
// blocks follow each other. With FUSED_INPAINT_EMULATION_ORDER=reverse lanes, warps and blocks run in the opposite
// order, so that of two accesses without a barrier between them each comes first once. Shared memory is on the heap,
// allocated for each block and filled with 0xff (NaN, -1), so that AddressSanitizer knows its bounds and an unwritten
// value shows. What a GPU leaves undefined or refuses (divergent barriers, shuffles from missing lanes, impossible
// launches) throws.
#pragma once

#include <sys/mman.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __asan_unpoison_memory_region(const void*, size_t) {}
#endif

namespace fused_inpaint_emulation {

using Site = std::source_location;
constexpr int kWarp = 32;
constexpr int kBallot = -1;  // as a source lane: the predicates of all lanes
constexpr size_t kStack = size_t{256} << 10, kGuard = 4096;
inline size_t shared_limit = size_t{48} << 10;  // bytes a block may have; cudaFuncSetAttribute raises it

// Goes on where `to` left off and leaves here in `from`. Not swapcontext, which makes a system call each time, and at
// which AddressSanitizer forgets what it knows of the stack.
using Context = void*;
__attribute__((naked, noinline)) inline void swap(Context* /* from */, Context /* to */) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

// A stack on which threads run one after another.
struct Fiber {
  Context context{};
  char* stack;
  void* fake_stack = nullptr;
  explicit Fiber(void (*entry)()) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack = static_cast<char*>(memory);
    mprotect(stack, kGuard, PROT_NONE);
    // What swap pops: six registers and where it returns to, which finds the stack aligned as after a call.
    void** top = reinterpret_cast<void**>(stack + kStack) - 2;
    *top = reinterpret_cast<void*>(entry);
    context = top - 6;
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    __asan_unpoison_memory_region(stack, kStack);
    munmap(stack, kStack);
  }
};

inline std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
inline std::string text(const Site& s) { return std::string(s.file_name()) + ":" + std::to_string(s.line()); }

enum class State { fresh, ready, at_barrier, at_warp_call, exited };

struct Thread {
  uint3 index{};
  State state = State::fresh;
  Fiber* fiber = nullptr;
  const char* call = "";  // where it waits
  Site site{};
  int source = 0;  // lane whose value it asks for
  uint64_t value = 0, result = 0;

  bool waits_with(const Thread& t) const {
    return state == t.state && std::strcmp(call, t.call) == 0 && site.line() == t.site.line() &&
           site.column() == t.site.column() && std::strcmp(site.file_name(), t.site.file_name()) == 0;
  }
  std::string where() const {
    return state == State::exited ? " has exited" : std::string(" waits in ") + call + " at " + text(site);
  }
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// What runs the blocks of a launch; each host thread has one.
class Runner {
 public:
  dim3 grid, size;
  uint3 index{};
  Thread* running = nullptr;

  template <typename F>
  void launch(dim3 grid_size, dim3 block_size, size_t dynamic, const F& kernel, Site launch_site) {
    grid = grid_size, size = block_size, index = {}, dynamic_bytes = dynamic, site = launch_site;
    body = &kernel, call_body = [](const void* f) { (*static_cast<const F*>(f))(); };
    const char* order = std::getenv("FUSED_INPAINT_EMULATION_ORDER");
    reverse = order != nullptr && std::strcmp(order, "reverse") == 0;
    const uint64_t n = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (n == 0 || n > 1024 || size.z > 64) fail("a block of " + text(size) + " threads cannot be launched");
    if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
      fail("a grid of " + text(grid) + " blocks cannot be launched");
    try {
      for (uint64_t b = 0; b < blocks; ++b) run_block(position(reverse ? blocks - 1 - b : b, grid), n);
    } catch (...) {
      // Threads that have not finished are given up with their stacks.
      idle.clear(), fibers.clear(), shared.clear();
      error = nullptr;
      throw;
    }
    shared.clear();
  }

  uint64_t wait(State state, const char* call, const Site& where, uint64_t value = 0, int source = 0) {
    Thread* thread = running;
    thread->call = call, thread->site = where, thread->value = value, thread->source = source;
    thread->state = state;
    leave(*thread->fiber);
    return thread->result;
  }

  // The block's memory for one declaration; nullptr is the dynamic part.
  void* shared_memory(const void* declaration, size_t bytes) {
    auto& memory = shared[declaration];
    if (memory == nullptr && bytes != 0) {
      shared_bytes += bytes;
      if (shared_bytes > shared_limit) fail(std::to_string(shared_bytes) + " bytes of shared memory are too many");
      void* p = nullptr;
      if (posix_memalign(&p, 128, bytes) != 0) throw std::bad_alloc();
      memory.reset(std::memset(p, 0xff, bytes));
    }
    return memory.get();
  }
  void* dynamic_shared_memory() { return shared_memory(nullptr, dynamic_bytes); }

  int lane() const { return static_cast<int>(running - threads.data()) % kWarp; }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("cuda emulation: " + what + ", in block " + text(index) + " of the kernel launched at " +
                             text(site));
  }

 private:
  Site site{};
  size_t dynamic_bytes = 0, shared_bytes = 0;
  bool reverse = false;
  const void* body = nullptr;
  void (*call_body)(const void*) = nullptr;
  std::vector<Thread> threads;
  std::map<const void*, std::unique_ptr<void, Free>> shared;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  std::exception_ptr error;
  Context scheduler{};
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;

  static uint3 position(uint64_t i, dim3 d) {
    return {static_cast<unsigned>(i % d.x), static_cast<unsigned>(i / d.x % d.y), static_cast<unsigned>(i / d.x / d.y)};
  }

  static void enter();

  void leave(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack, scheduler_stack_size);
    swap(&fiber.context, scheduler);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
  }

  void resume(Thread& thread) {
    if (thread.state == State::fresh) {
      if (idle.empty()) idle.push_back(fibers.emplace_back(std::make_unique<Fiber>(&enter)).get());
      thread.fiber = idle.back();
      idle.pop_back();
    }
    running = &thread;
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, thread.fiber->stack, kStack);
    swap(&scheduler, thread.fiber->context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
    if (running->state == State::exited) idle.push_back(running->fiber);
    if (error) std::rethrow_exception(error);
  }

  // A thread that exits hands its stack to the next lane that has not started, which spares two switches.
  void run_fiber() {
    for (;;) {
      Fiber* fiber = running->fiber;
      try {
        call_body(body);
      } catch (...) {
        error = std::current_exception();
      }
      running->state = State::exited;
      const auto [begin, end] = warp_of(running);
      Thread* next = running + (reverse ? -1 : 1);
      if (!error && begin <= next && next < end && next->state == State::fresh) {
        next->fiber = fiber;
        running = next;
      } else {
        leave(*fiber);
      }
    }
  }

  std::pair<Thread*, Thread*> warp_of(Thread* thread) {
    Thread* begin = threads.data() + (thread - threads.data()) / kWarp * kWarp;
    return {begin, std::min(begin + kWarp, threads.data() + threads.size())};
  }

  // All of [begin, end) must wait in the same call as those in `state` do.
  void require_together(Thread* begin, Thread* end, State state) const {
    const Thread& first = *std::find_if(begin, end, [&](const Thread& t) { return t.state == state; });
    for (const Thread* t = begin; t < end; ++t)
      if (!t->waits_with(first))
        fail("divergent barrier: thread " + text(first.index) + first.where() + " while thread " + text(t->index) +
             t->where());
  }

  // Runs a warp until all of its threads wait for the block or have exited.
  void run_warp(Thread* begin, Thread* end) {
    for (;;) {
      for (Thread* i = begin; i < end; ++i) {
        Thread& thread = reverse ? *(end - 1 - (i - begin)) : *i;
        if (thread.state == State::fresh || thread.state == State::ready) resume(thread);
      }
      if (std::none_of(begin, end, [](const Thread& t) { return t.state == State::at_warp_call; })) return;
      require_together(begin, end, State::at_warp_call);
      uint64_t ballot = 0;
      for (Thread* t = begin; t < end; ++t) ballot |= uint64_t{t->value != 0} << (t - begin);
      for (Thread* t = begin; t < end; ++t) {
        if (t->source >= end - begin)
          fail(std::string(t->call) + " at " + text(t->site) + " reads lane " + std::to_string(t->source) +
               " of a warp of " + std::to_string(end - begin) + " threads");
        t->result = t->source == kBallot ? ballot : begin[t->source].value;
        t->state = State::ready;
      }
    }
  }

  void run_block(uint3 block, size_t n) {
    index = block;
    threads.assign(n, Thread{});
    for (size_t i = 0; i < n; ++i) threads[i].index = position(i, size);
    shared.clear();
    shared_bytes = 0;
    dynamic_shared_memory();
    Thread *begin = threads.data(), *end = begin + n;
    const size_t warps = (n + kWarp - 1) / kWarp;
    for (;;) {
      for (size_t w = 0; w < warps; ++w) {
        const auto [first, last] = warp_of(begin + (reverse ? warps - 1 - w : w) * kWarp);
        run_warp(first, last);
      }
      if (std::all_of(begin, end, [](const Thread& t) { return t.state == State::exited; })) return;
      require_together(begin, end, State::at_barrier);
      for (Thread& thread : threads) thread.state = State::ready;
    }
  }
};

inline thread_local constinit Runner* runner = nullptr;

inline void Runner::enter() {
  __sanitizer_finish_switch_fiber(nullptr, &runner->scheduler_stack, &runner->scheduler_stack_size);
  runner->run_fiber();
}

inline void use_this_threads_runner() {
  static thread_local Runner mine;
  runner = &mine;
}

template <typename F>
void launch(dim3 grid, dim3 block, size_t shared_bytes, const F& kernel, Site site = Site::current()) {
  use_this_threads_runner();
  runner->launch(grid, block, shared_bytes, kernel, site);
}

}  // namespace fused_inpaint_emulation
