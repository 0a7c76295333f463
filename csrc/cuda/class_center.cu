#include <limits>

#include "launch.h"

namespace phydi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 1024;

template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// The class sums of K belong here and not to the tiles of kernel_matrix: a tile knows 64 columns, so that sums without
// atomics would first write N^2 L / 64 partial ones, and K has to be read here in any case.
//
// A block a row. Every class is summed by one thread, or by several that each take a part of the columns, in a fixed
// order: no atomics, so a rerun gives the same bits. The row is read again for the second pass, from the cache.
template <class T>
__global__ void __launch_bounds__(kThreads) class_center_rows(ClassCenter a) {
  __shared__ T weighted[kChunk];
  __shared__ int64_t chunk_codes[kChunk];
  __shared__ T sums[kThreads];
  const int thread = threadIdx.x;
  for (int64_t task = blockIdx.x; task < a.P * a.N; task += gridDim.x) {
    const int64_t problem = task / a.N;
    const T* row = static_cast<const T*>(a.K) + problem * a.K_stride + task % a.N * a.N;
    const int64_t* codes = a.codes + problem * a.N;
    const T* root = static_cast<const T*>(a.root) + problem * a.N;
    const T* counts = static_cast<const T*>(a.counts) + problem * a.L;
    const T* scale = static_cast<const T*>(a.scale) + problem * a.L;
    T* means = static_cast<T*>(a.means) + task * a.L;

    for (int64_t first = 0; first < a.L; first += kThreads) {
      const int classes = int(a.L - first < kThreads ? a.L - first : kThreads);
      const int parts = kThreads / classes, part = thread / classes;
      const int64_t mine = first + thread % classes;
      T sum = 0;
      for (int64_t start = 0; start < a.N; start += kChunk) {
        const int columns = int(a.N - start < kChunk ? a.N - start : kChunk);
        for (int j = thread; j < columns; j += kThreads) {
          const T r = root[start + j];
          weighted[j] = r * r * row[start + j];
          chunk_codes[j] = codes[start + j];
        }
        __syncthreads();
        if (part < parts)
          for (int j = part; j < columns; j += parts)
            if (chunk_codes[j] == mine) sum += weighted[j];
        __syncthreads();
      }
      sums[thread] = sum;
      __syncthreads();
      if (thread < classes) {
        for (int p = 1; p < parts; ++p) sum += sums[p * classes + thread];
        means[mine] = counts[mine] > 0 ? sum / counts[mine] : T(0);
      }
      __syncthreads();
    }

    const T root_i = root[task % a.N];
    T* centered = static_cast<T*>(a.centered) + task * a.N;
    for (int64_t j = thread; j < a.N; j += kThreads) {
      const int64_t code = codes[j];
      const bool known = code >= 0 && code < a.L;
      centered[j] = known ? root_i * root[j] * scale[code] * (row[j] - means[code]) : kNaN<T>;
    }
  }
}

}  // namespace

void class_center(DType dtype, const ClassCenter& a, const Stream& stream) {
  const auto kernel = dtype == DType::f64 ? class_center_rows<double> : class_center_rows<float>;
  launch(kernel, a.P * a.N, kThreads, 0, stream, a);
}

}  // namespace phydi::cuda
