// The pieces that phydi_kernels/kernels/phc_conv.py puts around torch's convolutions.
#include "split.h"

namespace phydi {
namespace {

template <class In>
void form(const Algebra& algebra, const Weights& weights, void* H, const Threads& threads) {
  using T = Compute<In>;
  const T* A = static_cast<const T*>(algebra.data);
  const int64_t n = algebra.n, P = algebra.P, Q = algebra.Q, p = weights.p, q = weights.q;
  parallel(threads, P * p, [&](int64_t row) {
    const int64_t k = row / p, r = row % p;
    const In* F = static_cast<const In*>(weights.data) + r * weights.stride_r;
    In* to = static_cast<In*>(H) + row * Q * q;
    for (int64_t l = 0; l < Q; ++l) combine(F, weights.stride_i, A + k * Q + l, P * Q, n, to + l * q, q);
  });
}

template <class In>
void split(const void* G, const Algebra& algebra, const Weights& weights, void* dA, void* dF, const Threads& threads) {
  using T = Compute<In>;
  const int64_t n = algebra.n, P = algebra.P, Q = algebra.Q, p = weights.p, q = weights.q;
  T* to = static_cast<T*>(dA);
  std::fill(to, to + n * P * Q, T(0));
  const Split<In, In, T> gradient{static_cast<const T*>(algebra.data),
                                  n,
                                  P,
                                  Q,
                                  static_cast<const In*>(weights.data),
                                  weights.stride_i,
                                  weights.stride_r,
                                  static_cast<const In*>(G),
                                  p * Q * q,
                                  Q * q,
                                  q,
                                  static_cast<T*>(dF),
                                  p * q,
                                  q};
  split_all(gradient, p, q, to, threads);
}

template <class In>
void mix_blocks(int64_t B, int64_t C, int64_t inner, const void* x, const Algebra& algebra, void* out,
                const Threads& threads) {
  using T = Compute<In>;
  const T* A = static_cast<const T*>(algebra.data);
  const int64_t n = algebra.n, P = algebra.P, Q = algebra.Q;
  // Q pieces of the input stay in L1 for all P * n results.
  const int64_t chunk = std::max<int64_t>(64, 4096 / Q / 64 * 64), chunks = ceil_div(inner, chunk);
  const int64_t pieces = B * C * chunks, tasks = std::min(pieces, threads.count * 4);
  parallel(threads, tasks, [&](int64_t task) {
    for (int64_t piece = pieces * task / tasks; piece < pieces * (task + 1) / tasks; ++piece) {
      const int64_t bc = piece / chunks, s = piece % chunks * chunk, some = std::min(chunk, inner - s);
      const In* from = static_cast<const In*>(x) + bc * Q * inner + s;
      for (int64_t k = 0; k < P; ++k) {
        for (int64_t i = 0; i < n; ++i) {
          In* to = static_cast<In*>(out) + (((bc / C * P + k) * C + bc % C) * n + i) * inner + s;
          combine(from, inner, A + (i * P + k) * Q, 1, Q, to, some);
        }
      }
    }
  });
}

template <class In>
void finish_all(int64_t count, const Epilogue& e, const Threads& threads) {
  constexpr int64_t kChunk = 1 << 14;
  In* y = static_cast<In*>(e.y);
  const In* residual = static_cast<const In*>(e.residual.data);
  parallel(threads, ceil_div(count, kChunk), [&](int64_t chunk) {
    const int64_t first = chunk * kChunk, some = std::min(kChunk, count - first);
    using T = Compute<In>;
    for (int64_t j = first; j < first + some; j += kLanes<T>) {
      T v[kLanes<T>];
      const int64_t left = first + some - j;
      store(v, load_some(y + j, left));
      finish<In>(v, nullptr, residual ? residual + j : nullptr, T(e.alpha), e.relu, y + j,
                 std::min<int64_t>(left, kLanes<T>));
    }
  });
}

}  // namespace

namespace PHYDI_ISA {

void kron_sum(DType dtype, const Algebra& A, const Weights& F, void* H, const Threads& threads) {
  with_type(dtype, [&](auto type) { form<decltype(type)>(A, F, H, threads); });
}

void kron_sum_grad(DType dtype, const void* G, const Algebra& A, const Weights& F, void* dA, void* dF,
                   const Threads& threads) {
  with_type(dtype, [&](auto type) { split<decltype(type)>(G, A, F, dA, dF, threads); });
}

void mix(DType dtype, int64_t B, int64_t C, int64_t inner, const void* x, const Algebra& A, void* out,
         const Threads& threads) {
  with_type(dtype, [&](auto type) { mix_blocks<decltype(type)>(B, C, inner, x, A, out, threads); });
}

void epilogue(DType dtype, int64_t count, const Epilogue& e, const Threads& threads) {
  with_type(dtype, [&](auto type) { finish_all<decltype(type)>(count, e, threads); });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
