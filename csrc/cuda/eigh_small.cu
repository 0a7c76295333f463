#include <cmath>
#include <limits>

#include "launch.h"

namespace phydi::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMaxPairs = kMaxSmallEigh / 2;
// Convergence is quadratic: 64 x 64 takes 5 to 11, the last to see that all is done.
constexpr int kMaxSweeps = 32;

template <class T>
constexpr T kEpsilon = std::numeric_limits<T>::epsilon();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// An odd L gets a row and a column of zeros.
__host__ __device__ inline int padded(int64_t L) { return int(L + L % 2); }

// Pair k of a round: the 2h - 1 rounds of h pairs meet every pair of 2h rows once, and no row twice in a round.
__device__ inline void round_robin(int round, int k, int h, int& p, int& q) {
  const int circle = 2 * h - 1;
  p = k == 0 ? circle : (round + k) % circle;
  q = (round + circle - k) % circle;
}

// x' = c x - s y and y' = s x + c y, by the differences from x and y: a small angle leaves no rounding error of the
// size of x, which thousands of rotations would add up.
template <class T>
__device__ void rotate(T s, T tau, T& x, T& y) {
  const T old = x;
  x -= s * (y + tau * old);
  y += s * (old - tau * y);
}

// Jacobi's method, the pairs of a round at once: one thread chooses the angle of a pair, and the 2 x 2 blocks where
// rows of one pair meet columns of another are rotated independently of each other. A block a matrix.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) jacobi(SmallEigh a) {
  __shared__ T tangents[kMaxPairs], sines[kMaxPairs], taus[kMaxPairs];  // tau = sin / (1 + cos)
  __shared__ T largest[kMaxThreads];
  __shared__ int ranks[kMaxSmallEigh];
  const int L = int(a.L), n = padded(L), h = n / 2;
  const int thread = threadIdx.x, threads = blockDim.x;
  T *matrix = dynamic_shared<T>(), *vectors = matrix + n * n;  // the rows of `vectors` become the eigenvectors

  for (int64_t problem = blockIdx.x; problem < a.P; problem += gridDim.x) {
    const T* S = static_cast<const T*>(a.S) + problem * L * L;
    T* to_values = static_cast<T*>(a.values) + problem * L;
    T* to_vectors = static_cast<T*>(a.vectors) + problem * L * L;

    T my_largest = 0;
    bool finite = true;
    for (int e = thread; e < n * n; e += threads) {
      const int i = e / n, j = e % n;
      const T value = i >= L || j >= L ? T(0) : i >= j ? S[i * L + j] : S[j * L + i];
      finite = finite && std::isfinite(value);
      my_largest = std::abs(value) > my_largest ? std::abs(value) : my_largest;
      matrix[e] = value;
      vectors[e] = i == j;
    }
    largest[thread] = my_largest;
    if (__syncthreads_or(!finite)) {
      for (int e = thread; e < L * L; e += threads) to_vectors[e] = kNaN<T>;
      for (int i = thread; i < L; i += threads) to_values[i] = kNaN<T>;
      continue;
    }
    for (int i = 0; i < threads; ++i) my_largest = largest[i] > my_largest ? largest[i] : my_largest;
    // A power of two: exact, and no product overflows.
    int exponent = 0;
    std::frexp(my_largest, &exponent);
    for (int e = thread; e < n * n; e += threads) matrix[e] = std::ldexp(matrix[e], -exponent);
    __syncthreads();

    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      bool rotated = false;
      for (int round = 0; round < n - 1; ++round) {
        if (thread < h) {
          int p, q;
          round_robin(round, thread, h, p, q);
          const T pp = matrix[p * n + p], qq = matrix[q * n + q], pq = matrix[p * n + q];
          // Relative to the diagonal: small eigenvalues of a positive definite matrix keep their relative accuracy.
          const bool rotates = std::abs(pq) > kEpsilon<T> * std::sqrt(std::abs(pp)) * std::sqrt(std::abs(qq));
          rotated = rotated || rotates;
          const T theta = (qq - pp) / (2 * pq);
          const T tangent = std::copysign(T(1), theta) / (std::abs(theta) + std::sqrt(1 + theta * theta));
          const T t = rotates ? tangent : T(0), cosine = 1 / std::sqrt(1 + t * t);
          tangents[thread] = t;
          sines[thread] = t * cosine;
          taus[thread] = t * cosine / (1 + cosine);
        }
        __syncthreads();
        for (int e = thread; e < h * h; e += threads) {
          const int k = e / h, j = e % h;
          int p, q, r, s;
          round_robin(round, k, h, p, q);
          round_robin(round, j, h, r, s);
          T pr = matrix[p * n + r], ps = matrix[p * n + s], qr = matrix[q * n + r], qs = matrix[q * n + s];
          if (k == j) {
            const T t = tangents[k], shift = t * ps;
            pr -= shift;
            qs += shift;
            ps = qr = t == 0 ? ps : T(0);
          } else {
            rotate(sines[k], taus[k], pr, qr);
            rotate(sines[k], taus[k], ps, qs);
            rotate(sines[j], taus[j], pr, ps);
            rotate(sines[j], taus[j], qr, qs);
          }
          matrix[p * n + r] = pr;
          matrix[p * n + s] = ps;
          matrix[q * n + r] = qr;
          matrix[q * n + s] = qs;
        }
        for (int e = thread; e < h * n; e += threads) {
          const int k = e / n, i = e % n;
          int p, q;
          round_robin(round, k, h, p, q);
          rotate(sines[k], taus[k], vectors[p * n + i], vectors[q * n + i]);
        }
        __syncthreads();
      }
      if (!__syncthreads_or(rotated)) break;
    }

    for (int i = thread; i < L; i += threads) {
      const T value = matrix[i * n + i];
      int rank = 0;
      for (int j = 0; j < L; ++j) {
        const T other = matrix[j * n + j];
        rank += other < value || (other == value && j < i);
      }
      ranks[i] = rank;
      to_values[rank] = std::ldexp(value, exponent);
      int at = 0;
      for (int j = 1; j < L; ++j)
        if (std::abs(vectors[i * n + j]) > std::abs(vectors[i * n + at])) at = j;
      if (vectors[i * n + at] < 0)
        for (int j = 0; j < L; ++j) vectors[i * n + j] = -vectors[i * n + j];
    }
    __syncthreads();
    for (int e = thread; e < L * L; e += threads) to_vectors[e / L * L + ranks[e % L]] = vectors[e % L * n + e / L];
    __syncthreads();
  }
}

template <class T>
void launch_jacobi(const SmallEigh& a, const Stream& stream) {
  const int n = padded(a.L), blocks = n / 2 * (n / 2);
  const int threads = std::min((blocks + 31) / 32 * 32, kMaxThreads);
  launch(jacobi<T>, a.L == 0 ? 0 : a.P, threads, 2 * n * n * sizeof(T), stream, a);
}

}  // namespace

void eigh_small(DType dtype, const SmallEigh& a, const Stream& stream) {
  dtype == DType::f64 ? launch_jacobi<double>(a, stream) : launch_jacobi<float>(a, stream);
}

}  // namespace phydi::cuda
