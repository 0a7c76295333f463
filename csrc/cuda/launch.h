// Launches and shared memory. Everything is in an anonymous namespace; nothing here knows torch, so that the kernels
// also compile against the emulated runtime of tests/cuda_emulation.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace phydi::cuda {
namespace {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("phydi_cuda: ") + cudaGetErrorString(error));
}

#if defined(__CUDACC__)
constexpr int64_t kMaxGrid = INT32_MAX;

// The dynamic shared memory of a block.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ double shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
}
#else
using emulation::kMaxGrid;

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::shared_memory());
}
#endif

// One block a task, up to the largest grid: a kernel starts at blockIdx.x and goes on in steps of gridDim.x.
template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t tasks, int threads, size_t shared_bytes, const Stream& stream,
            const Arguments& arguments) {
  if (tasks == 0) return;
  check(cudaSetDevice(stream.device));
  if (shared_bytes > 0)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min(tasks, kMaxGrid)));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchKernelEx(&config, kernel, arguments);
  check(cudaGetLastError());
}

}  // namespace
}  // namespace phydi::cuda
