// Stands in for the CUDA runtime, so that g++ compiles the kernels of csrc/cuda and runs them on the CPU.
//
// The threads of a block are fibers (emulation.cpp). A fiber runs until it waits at a barrier or ends; then the next
// one runs, in ascending order in one phase and in descending order in the next. ThreadSanitizer is told about the
// fibers and about the barriers, and about no other order between them: it reports every access to shared or global
// memory that only this schedule keeps apart. Blocks run one after another. Dynamic shared memory is a heap block of
// the requested size, so that AddressSanitizer guards its ends.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaSetDevice(int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);

// Those of the running fiber.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// Few blocks, so that each has several tasks.
constexpr int64_t kMaxGrid = 3;

void* shared_memory();
cudaError_t run(const void* kernel, const cudaLaunchConfig_t&, const std::function<void()>& body);

}  // namespace emulation

void __syncthreads();
int __syncthreads_or(int predicate);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return emulation::run(reinterpret_cast<const void*>(kernel), *config, [&] { kernel(arguments...); });
}
