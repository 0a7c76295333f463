#include <cmath>

#include "launch.h"

namespace phydi::cuda {
namespace {

// A block of kSide x kSide threads computes kTile x kTile entries; those of a thread are kSide apart in rows and in
// columns, so that neighbouring threads read neighbouring words of shared memory.
constexpr int kTile = 64;
constexpr int kSide = 16;
constexpr int kPart = kTile / kSide;
constexpr int kThreads = kSide * kSide;

// Features at a time: 64 bytes of a row.
template <class T>
constexpr int kStep = 64 / int(sizeof(T));

// Of few features the differences cost less than the centered products save.
constexpr int64_t kMaxDirectFeatures = 16;

constexpr int kMeanLanes = 32, kMeanParts = 16;

// What is summed over the features of x and y.
enum class Term { product, centered_product, squared_difference, difference, chi2 };

// Blocks on a multiprocessor at once. Three leave 80 registers, in which chi2's float64 division spills.
template <Term term>
constexpr int kBlocks = term == Term::chi2 ? 2 : 3;

template <Term term, class T>
__device__ T add_term(T sum, T x, T y) {
  if constexpr (term == Term::product || term == Term::centered_product) {
    return sum + x * y;
  } else {
    const T difference = x - y;
    if constexpr (term == Term::squared_difference) return sum + difference * difference;
    if constexpr (term == Term::difference) return sum + std::abs(difference);
    if constexpr (term == Term::chi2) return x + y == 0 ? sum : sum + difference * difference / (x + y);
  }
}

template <class T>
__device__ T power(T base, int64_t exponent) {
  T result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

template <class T>
__device__ T kernel_value(const KernelMatrix& a, T sum, T gamma) {
  switch (a.kernel) {
    case Kernel::poly:
      return power(gamma * sum + T(a.coef0), a.degree);
    case Kernel::sigmoid:
      return std::tanh(gamma * sum + T(a.coef0));
    case Kernel::rbf:
    case Kernel::laplacian:
    case Kernel::chi2:
      return std::exp(-gamma * sum);
    case Kernel::matern12:
      return std::exp(-std::sqrt(2 * gamma * sum));
    case Kernel::matern32: {
      const T r = std::sqrt(6 * gamma * sum);
      return (1 + r) * std::exp(-r);
    }
    case Kernel::matern52: {
      const T r = std::sqrt(10 * gamma * sum);
      return (1 + r + r * r / 3) * std::exp(-r);
    }
    default:
      return sum;
  }
}

// mean[b, k] = (1/N) sum_i X[b, i, k], kMeanLanes features a block.
template <class T>
__global__ void feature_means(KernelMatrix a) {
  __shared__ T sums[kMeanParts][kMeanLanes];
  const T* X = static_cast<const T*>(a.X);
  const int lane = threadIdx.x % kMeanLanes, part = threadIdx.x / kMeanLanes;
  const int64_t groups = (a.d + kMeanLanes - 1) / kMeanLanes;
  for (int64_t task = blockIdx.x; task < a.B * groups; task += gridDim.x) {
    const int64_t b = task / groups, feature = task % groups * kMeanLanes + lane;
    T sum = 0;
    if (feature < a.d) {
#pragma unroll 4
      for (int64_t i = part; i < a.N; i += kMeanParts) sum += X[(b * a.N + i) * a.d + feature];
    }
    sums[part][lane] = sum;
    __syncthreads();
    if (part == 0 && feature < a.d) {
      for (int p = 1; p < kMeanParts; ++p) sum += sums[p][lane];
      static_cast<T*>(a.mean)[b * a.d + feature] = sum / T(a.N);
    }
    __syncthreads();
  }
}

// tile[k][r] = rows[first_row + r][first_feature + k] - shift[first_feature + k], 0 outside (rows, d); shift may be
// null.
template <class T>
__device__ void load_tile(const T* rows, int64_t count, int64_t d, const T* shift, int64_t first_row,
                          int64_t first_feature, T (*tile)[kTile + 1]) {
  for (int e = threadIdx.x; e < kTile * kStep<T>; e += kThreads) {
    const int k = e % kStep<T>, r = e / kStep<T>;
    const int64_t row = first_row + r, feature = first_feature + k;
    T value = 0;
    if (row < count && feature < d) {
      value = rows[row * d + feature];
      if (shift) value -= shift[feature];
    }
    tile[k][r] = value;
  }
}

// A tile of the lower triangle, counted row by row.
__device__ inline void triangle_tile(int64_t index, int64_t& row, int64_t& column) {
  row = int64_t((std::sqrt(8.0 * double(index) + 1.0) - 1.0) / 2.0);
  while (row * (row + 1) / 2 > index) --row;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  column = index - row * (row + 1) / 2;
}

__host__ __device__ inline int64_t tiles_along(int64_t count) { return (count + kTile - 1) / kTile; }

__host__ __device__ inline int64_t tile_count(const KernelMatrix& a) {
  const int64_t rows = tiles_along(a.N);
  return a.Y ? rows * tiles_along(a.M) : rows * (rows + 1) / 2;
}

// One pass over the features for all gammas: the sums of a tile stay in shared memory.
template <class T, Term term>
__global__ void __launch_bounds__(kThreads, kBlocks<term>) kernel_matrix_tiles(KernelMatrix a) {
  __shared__ T x_tile[kStep<T>][kTile + 1], y_tile[kStep<T>][kTile + 1];
  __shared__ T squares[2][kTile];
  __shared__ T sums[kTile][kTile + 1];
  const int thread = threadIdx.x, tx = thread % kSide, ty = thread / kSide;
  const bool symmetric = a.Y == nullptr;
  const int64_t tiles = tile_count(a);

  for (int64_t task = blockIdx.x; task < a.B * tiles; task += gridDim.x) {
    const int64_t b = task / tiles, index = task % tiles;
    int64_t tile_row = index / tiles_along(a.M), tile_column = index % tiles_along(a.M);
    if (symmetric) triangle_tile(index, tile_row, tile_column);
    const int64_t first_row = tile_row * kTile, first_column = tile_column * kTile;
    const T* X = static_cast<const T*>(a.X) + b * a.N * a.d;
    const T* Y = symmetric ? X : static_cast<const T*>(a.Y) + b * a.M * a.d;
    const T* shift = term == Term::centered_product ? static_cast<const T*>(a.mean) + b * a.d : nullptr;

    T sum[kPart][kPart] = {};
    T square = 0;
    for (int64_t feature = 0; feature < a.d; feature += kStep<T>) {
      load_tile(X, a.N, a.d, shift, first_row, feature, x_tile);
      load_tile(Y, a.M, a.d, shift, first_column, feature, y_tile);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kStep<T>; ++k) {
        T x[kPart], y[kPart];
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          x[i] = x_tile[k][ty + i * kSide];
          y[i] = y_tile[k][tx + i * kSide];
        }
#pragma unroll
        for (int i = 0; i < kPart; ++i)
#pragma unroll
          for (int j = 0; j < kPart; ++j) sum[i][j] = add_term<term>(sum[i][j], x[i], y[j]);
        if constexpr (term == Term::centered_product) {
          if (thread < 2 * kTile) {
            const T value = thread < kTile ? x_tile[k][thread] : y_tile[k][thread - kTile];
            square += value * value;
          }
        }
      }
      __syncthreads();
    }

    if constexpr (term == Term::centered_product) {
      if (thread < 2 * kTile) squares[thread / kTile][thread % kTile] = square;
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        const int r = ty + i * kSide, c = tx + j * kSide;
        T value = sum[i][j];
        if constexpr (term == Term::centered_product) {
          const T distance = squares[0][r] + squares[1][c] - 2 * value;
          // On the diagonal exactly 0, or NaN; elsewhere NaN stays NaN.
          const bool diagonal = symmetric && first_row + r == first_column + c;
          value = diagonal ? distance - distance : distance < 0 ? T(0) : distance;
        }
        sums[r][c] = value;
      }
    }
    __syncthreads();

    for (int64_t g = 0; g < a.G; ++g) {
      const T gamma = static_cast<const T*>(a.gamma)[g * a.B + b];
      T* values = static_cast<T*>(a.values) + (g * a.B + b) * a.N * a.M;
      for (int e = thread; e < kTile * kTile; e += kThreads) {
        const int r = e / kTile, c = e % kTile;
        const int64_t row = first_row + r, column = first_column + c;
        if (row < a.N && column < a.M) values[row * a.M + column] = kernel_value(a, sums[r][c], gamma);
      }
      if (!symmetric || tile_row == tile_column) continue;
      // The mirror image: threads run along its rows, so the values are computed again, at the cost of an exponential
      // and for the sake of whole cache lines.
      for (int e = thread; e < kTile * kTile; e += kThreads) {
        const int r = e % kTile, c = e / kTile;
        const int64_t row = first_row + r, column = first_column + c;
        if (row < a.N && column < a.M) values[column * a.M + row] = kernel_value(a, sums[r][c], gamma);
      }
    }
    __syncthreads();
  }
}

template <class T>
void launch_kernel_matrix(const KernelMatrix& a, const Stream& stream) {
  const int64_t blocks = a.B * tile_count(a);
  const auto tiles = [&](auto kernel) { launch(kernel, blocks, kThreads, 0, stream, a); };
  switch (a.kernel) {
    case Kernel::dot:
    case Kernel::poly:
    case Kernel::sigmoid:
      return tiles(kernel_matrix_tiles<T, Term::product>);
    case Kernel::manhattan_distance:
    case Kernel::laplacian:
      return tiles(kernel_matrix_tiles<T, Term::difference>);
    case Kernel::chi2_distance:
    case Kernel::chi2:
      return tiles(kernel_matrix_tiles<T, Term::chi2>);
    default:
      if (a.d <= kMaxDirectFeatures) return tiles(kernel_matrix_tiles<T, Term::squared_difference>);
      launch(feature_means<T>, a.B * ((a.d + kMeanLanes - 1) / kMeanLanes), kMeanLanes * kMeanParts, 0, stream, a);
      return tiles(kernel_matrix_tiles<T, Term::centered_product>);
  }
}

}  // namespace

void kernel_matrix(DType dtype, const KernelMatrix& a, const Stream& stream) {
  dtype == DType::f64 ? launch_kernel_matrix<double>(a, stream) : launch_kernel_matrix<float>(a, stream);
}

}  // namespace phydi::cuda
