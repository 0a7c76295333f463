// The scheduler behind cuda_runtime.h. It is compiled without sanitizers and linked with them.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

#if defined(EMULATE_WITH_TSAN)
#include <sanitizer/tsan_interface.h>
#else
void* __tsan_get_current_fiber() { return nullptr; }
void* __tsan_create_fiber(unsigned) { return nullptr; }
void __tsan_switch_to_fiber(void*, unsigned) {}
void __tsan_acquire(void*) {}
void __tsan_release(void*) {}
constexpr unsigned __tsan_switch_to_fiber_no_sync = 1;
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = size_t(256) << 10;
constexpr unsigned kMaxThreads = 1024;
// What a block has without asking for more, and what the smallest of the supported cards has.
constexpr size_t kDefaultShared = size_t(48) << 10, kMaxShared = size_t(99) << 10;

enum class State { idle, running, waiting };

struct Fiber {
  ucontext_t context;
  void* tsan;
  State state;
  std::unique_ptr<char[]> stack;
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
void* scheduler_tsan;
unsigned current;
int predicate_of_phase, predicate_of_next;
const std::function<void()>* body_of_launch;
char* block_memory;
cudaError_t last_error = cudaSuccess;
// Addresses that stand for order in the sanitizer's eyes: the begin and the end of a block, and the barriers, two in
// turn: what a thread does after one barrier and before the next must not seem ordered before the threads that leave
// the first one later.
char block_begin, block_end, barriers[2];
unsigned phase;
std::map<const void*, size_t> shared_limits;

void switch_to_scheduler() {
  Fiber& self = *fibers[current];
  __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
  swapcontext(&self.context, &scheduler);
}

void live() {
  for (;;) {
    __tsan_acquire(&block_begin);
    (*body_of_launch)();
    __tsan_release(&block_end);
    fibers[current]->state = State::idle;
    switch_to_scheduler();
  }
}

void grow_pool(unsigned threads) {
  while (fibers.size() < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->tsan = __tsan_create_fiber(0);
    fiber->state = State::idle;
    fiber->stack.reset(new char[kStackBytes]);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber->context, live, 0);
    fibers.push_back(std::move(fiber));
  }
}

void resume(unsigned thread) {
  current = thread;
  threadIdx = dim3(thread);
  fibers[thread]->state = State::running;
  __tsan_switch_to_fiber(fibers[thread]->tsan, __tsan_switch_to_fiber_no_sync);
  swapcontext(&scheduler, &fibers[thread]->context);
}

void run_block(unsigned threads) {
  __tsan_release(&block_begin);
  for (;; ++phase) {
    unsigned waiting = 0;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = phase % 2 == 0 ? i : threads - 1 - i;
      resume(thread);
      waiting += fibers[thread]->state == State::waiting;
    }
    if (waiting == 0) break;
    if (waiting < threads) {
      std::fprintf(stderr, "%u of %u threads of a block wait at a barrier, and the others have ended\n", waiting,
                   threads);
      std::abort();
    }
    predicate_of_phase = predicate_of_next;
    predicate_of_next = 0;
  }
  __tsan_acquire(&block_end);
}

cudaError_t fail(cudaError_t error) { return last_error = error; }

}  // namespace

void* shared_memory() { return block_memory; }

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 || grid.x == 0 || grid.x > kMaxGrid || block.x == 0 ||
      block.x > kMaxThreads)
    return fail(cudaErrorInvalidConfiguration);
  const auto limit = shared_limits.find(kernel);
  if (config.dynamicSmemBytes > (limit == shared_limits.end() ? kDefaultShared : limit->second))
    return fail(cudaErrorInvalidValue);
  if (!scheduler_tsan) scheduler_tsan = __tsan_get_current_fiber();
  grow_pool(block.x);
  body_of_launch = &body;
  blockDim = block;
  gridDim = grid;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b);
    // All bits set: NaN, of either type.
    const std::unique_ptr<char[]> memory(new char[config.dynamicSmemBytes]);
    std::fill_n(memory.get(), config.dynamicSmemBytes, char(0xff));
    block_memory = memory.get();
    run_block(block.x);
  }
  return cudaSuccess;
}

}  // namespace emulation

void __syncthreads() {
  using namespace emulation;
  char* const barrier = &barriers[phase % 2];
  __tsan_release(barrier);
  fibers[current]->state = State::waiting;
  switch_to_scheduler();
  __tsan_acquire(barrier);
}

int __syncthreads_or(int predicate) {
  emulation::predicate_of_next |= predicate != 0;
  __syncthreads();
  return emulation::predicate_of_phase;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "no error";
  }
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (size_t(value) > emulation::kMaxShared) return emulation::fail(cudaErrorInvalidValue);
  emulation::shared_limits[kernel] = size_t(value);
  return cudaSuccess;
}
