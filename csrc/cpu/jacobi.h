// Eigenvalues and eigenvectors of small symmetric matrices; csrc/cuda/eigh_small.cu has the same method.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace phydi {
namespace {

// Cyclic Jacobi in round-robin order. The rows and columns stand in positions 0 ... 2h - 1, and a round rotates the
// pairs (k, h + k) all at once; then every position but 0 moves one step around the circle 1 ... h - 1, 2h - 1 ... h,
// so that 2h - 1 rounds meet every pair once and lead back to the first order.
template <class T>
class JacobiSweeps {
 public:
  // The matrix, both triangles (rows of `count` entries, count even), overwritten with its diagonal form; the rows of
  // `vectors` become the eigenvectors.
  JacobiSweeps(int64_t count, std::vector<T>& matrix, std::vector<T>& vectors)
      : h_(count / 2),
        a_(matrix),
        v_(vectors),
        next_a_(a_.size()),
        next_v_(v_.size()),
        row_(2 * count),
        t_(h_),
        s_(h_),
        tau_(h_) {}

  void run() {
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      bool rotated = false;
      for (int64_t round = 0; round < 2 * h_ - 1; ++round) rotated |= rotate_pairs();
      if (!rotated) return;
    }
  }

 private:
  // Convergence is quadratic: 64 x 64 takes 5 to 11, the last to see that all is done.
  static constexpr int kMaxSweeps = 32;

  // Whether an off-diagonal entry was above eps * sqrt(a_pp a_qq): small eigenvalues of a positive definite matrix
  // keep their relative accuracy.
  bool choose_rotations() {
    bool any = false;
    for (int64_t k = 0; k < h_; ++k) {
      const T pp = a_[k * 2 * h_ + k], qq = a_[(h_ + k) * (2 * h_ + 1)], pq = a_[k * 2 * h_ + h_ + k];
      const T bound = std::numeric_limits<T>::epsilon() * std::sqrt(std::abs(pp)) * std::sqrt(std::abs(qq));
      const bool rotate = std::abs(pq) > bound;
      any |= rotate;
      const T theta = (qq - pp) / (2 * pq);
      const T tangent = std::copysign(T(1), theta) / (std::abs(theta) + std::sqrt(1 + theta * theta));
      t_[k] = rotate ? tangent : T(0);
      const T cosine = 1 / std::sqrt(1 + t_[k] * t_[k]);
      s_[k] = t_[k] * cosine;
      tau_[k] = s_[k] / (1 + cosine);
    }
    return any;
  }

  int64_t moved(int64_t position) const {
    if (position == 0 || h_ == 1) return position;
    if (position < h_) return position + 1 < h_ ? position + 1 : 2 * h_ - 1;
    return position > h_ ? position - 1 : 1;
  }

  // to[moved(j)] = from[j].
  void move_row(const T* from, T* to) const {
    if (h_ == 1) {
      std::copy(from, from + 2, to);
      return;
    }
    to[0] = from[0];
    std::copy(from + 1, from + h_ - 1, to + 2);
    to[2 * h_ - 1] = from[h_ - 1];
    to[1] = from[h_];
    std::copy(from + h_ + 1, from + 2 * h_, to + h_);
  }

  // x' = c x - s y and y' = s x + c y, by the differences from x and y: a small angle leaves no rounding error of the
  // size of x, which thousands of rotations would add up.
  static void rotate(T s, T tau, T& x, T& y) {
    const T old = x;
    x -= s * (y + tau * old);
    y += s * (old - tau * y);
  }

  void rotate_rows(int64_t k, T* __restrict p, T* __restrict q) const {
    const int64_t n = 2 * h_;
    const T* __restrict above = &a_[k * n], * __restrict below = &a_[(h_ + k) * n];
    const T* __restrict s = s_.data(), * __restrict tau = tau_.data();
    const T s_k = s_[k], tau_k = tau_[k];
    for (int64_t j = 0; j < h_; ++j) {
      T pj = above[j], pm = above[h_ + j], qj = below[j], qm = below[h_ + j];
      rotate(s_k, tau_k, pj, qj);
      rotate(s_k, tau_k, pm, qm);
      rotate(s[j], tau[j], pj, pm);
      rotate(s[j], tau[j], qj, qm);
      p[j] = pj;
      p[h_ + j] = pm;
      q[j] = qj;
      q[h_ + j] = qm;
    }
    const T shift = t_[k] * above[h_ + k];
    p[k] = above[k] - shift;
    q[h_ + k] = below[h_ + k] + shift;
    p[h_ + k] = q[k] = t_[k] == 0 ? above[h_ + k] : T(0);
  }

  void rotate_vectors(int64_t k, T* __restrict p, T* __restrict q) const {
    const int64_t n = 2 * h_;
    const T* __restrict x = &v_[k * n], * __restrict y = &v_[(h_ + k) * n];
    const T s_k = s_[k], tau_k = tau_[k];
    for (int64_t j = 0; j < n; ++j) {
      T xj = x[j], yj = y[j];
      rotate(s_k, tau_k, xj, yj);
      p[j] = xj;
      q[j] = yj;
    }
  }

  bool rotate_pairs() {
    const bool any = choose_rotations();
    const int64_t n = 2 * h_;
    for (int64_t k = 0; k < h_; ++k) {
      rotate_rows(k, row_.data(), row_.data() + n);
      move_row(row_.data(), &next_a_[moved(k) * n]);
      move_row(row_.data() + n, &next_a_[moved(h_ + k) * n]);
      rotate_vectors(k, &next_v_[moved(k) * n], &next_v_[moved(h_ + k) * n]);
    }
    a_.swap(next_a_);
    v_.swap(next_v_);
    return any;
  }

  int64_t h_;
  std::vector<T>&a_, &v_;
  std::vector<T> next_a_, next_v_, row_, t_, s_, tau_;  // t, s = tan, sin; tau = s / (1 + cos)
};

// values (L) ascending and vectors (L, L), in columns, the largest entry of each positive, of a symmetric matrix whose
// lower triangle is in S (rows `stride` apart). All NaN where that holds an infinity or NaN.
template <class T>
void jacobi(int64_t L, const T* S, int64_t stride, T* values, T* vectors) {
  T largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < L; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      finite &= std::isfinite(S[i * stride + j]);
      largest = std::max(largest, std::abs(S[i * stride + j]));
    }
  }
  if (!finite) {
    std::fill(values, values + L, std::numeric_limits<T>::quiet_NaN());
    std::fill(vectors, vectors + L * L, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  // Scaled by a power of two: exact, and no product overflows. An odd L gets a row and a column of zeros.
  int exponent = 0;
  std::frexp(largest, &exponent);
  const int64_t n = L + L % 2;
  std::vector<T> a(n * n), v(n * n);
  for (int64_t i = 0; i < L; ++i)
    for (int64_t j = 0; j <= i; ++j) a[i * n + j] = a[j * n + i] = std::ldexp(S[i * stride + j], -exponent);
  for (int64_t i = 0; i < n; ++i) v[i * n + i] = 1;
  JacobiSweeps<T>(n, a, v).run();

  std::vector<int64_t> order(L);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return a[i * n + i] < a[j * n + j]; });
  for (int64_t m = 0; m < L; ++m) {
    const T* vector = &v[order[m] * n];
    const auto smaller = [](T x, T y) { return std::abs(x) < std::abs(y); };
    const T sign = std::copysign(T(1), *std::max_element(vector, vector + L, smaller));
    values[m] = std::ldexp(a[order[m] * n + order[m]], exponent);
    for (int64_t i = 0; i < L; ++i) vectors[i * L + m] = sign * vector[i];
  }
}

}  // namespace

}  // namespace phydi
