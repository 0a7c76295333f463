// The dense algebra of GDA's regularised solve, G_w = B B^T + tau I with B = K M: the symmetric product, its Cholesky
// factorisation, triangular solves and products with a few columns. B is formed in packing, never in memory.
#include <cmath>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "dense.h"

namespace phydi {
namespace PHYDI_ISA {
namespace {

constexpr int64_t kPanel = 64;

// The lower Cholesky factor of a (count x count, count <= kPanel) in place, and its inverse's rows; false if the matrix
// is not positive definite to working precision.
template <class T>
bool factor_block(int64_t count, T* a, int64_t stride, T* inverse) {
  // Rows of the upper factor, which are contiguous in each step.
  T u[kPanel][kPanel] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j) u[j][i] = a[i * stride + j];
  for (int64_t j = 0; j < count; ++j) {
    if (!(u[j][j] > 0) || !std::isfinite(u[j][j])) return false;
    const T scale = T(1) / std::sqrt(u[j][j]);
    u[j][j] = std::sqrt(u[j][j]);
    for (int64_t i = j + 1; i < count; ++i) u[j][i] *= scale;
    for (int64_t i = j + 1; i < count; ++i) {
      const Vec<T> factor = splat(u[j][i]);
      for (int64_t k = i / kLanes<T> * kLanes<T>; k < count; k += kLanes<T>)
        store(&u[i][k], load(&u[i][k]) - factor * load(&u[j][k]));
    }
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j) a[i * stride + j] = u[j][i];
  // L^-1 by rows: row i = (e_i - sum_{j<i} L_ij row j) / L_ii.
  for (int64_t i = 0; i < count; ++i) {
    T* row = inverse + i * kPanel;
    std::fill(row, row + kPanel, T(0));
    row[i] = T(1);
    for (int64_t j = 0; j < i; ++j) {
      const Vec<T> factor = splat(u[j][i]);
      for (int64_t k = 0; k <= j; k += kLanes<T>)
        store(row + k, load(row + k) - factor * load(inverse + j * kPanel + k));
    }
    const T scale = T(1) / u[i][i];
    for (int64_t k = 0; k <= i; ++k) row[k] *= scale;
  }
  return true;
}

// The lower Cholesky factor in place, the strict upper triangle 0. False: not positive definite.
template <class T>
bool cholesky(const Threads& threads, int64_t N, T* A) {
  Scratch<T> inverse(kPanel * kPanel);
  for (int64_t k = 0; k < N; k += kGramDepth) {
    const int64_t wide = std::min(kGramDepth, N - k);
    for (int64_t s = 0; s < wide; s += kPanel) {
      const int64_t at = k + s, width = std::min(kPanel, wide - s), below = at + width;
      T* const panel = A + at * N + at;
      const MatrixRows<T> done{A + at * N + k, N};
      update<T>(threads, Mode::subtract, false, N - at, width, s, done, done, panel, N);
      if (!factor_block(width, panel, N, inverse.get())) return false;
      T* const under = A + below * N + at;
      update<T>(threads, Mode::set, false, N - below, width, width, MatrixRows<T>{under, N},
                MatrixRows<T>{inverse.get(), kPanel}, under, N);
    }
    const int64_t rest = k + wide;
    const MatrixRows<T> left{A + rest * N + k, N};
    update<T>(threads, Mode::subtract, true, N - rest, N - rest, wide, left, left, A + rest * N + rest, N);
  }
  parallel(threads, N, [&](int64_t i) { std::fill(A + i * N + i + 1, A + (i + 1) * N, T(0)); });
  return true;
}

// Rows of the result that one task makes, and columns of A that it keeps in cache for all strips.
constexpr int64_t kTaskRows = 96;
constexpr int64_t kTaskDepth = 1024;

// out (N x m) = A (N x N) X (N x m).
template <class T>
void times(const Threads& threads, int64_t N, int64_t m, const T* A, const T* X, T* out) {
  const int64_t strips = ceil_div(m, kStrip<T>);
  Scratch<T> x(strips * N * kStrip<T>);
  parallel(threads, strips, [&](int64_t s) { to_strip(N, m, X, s * kStrip<T>, x.get() + s * N * kStrip<T>); });
  parallel(threads, ceil_div(N, kTaskRows), [&](int64_t task) {
    const int64_t i0 = task * kTaskRows, rows = std::min(kTaskRows, N - i0);
    Scratch<T> c(strips * rows * kStrip<T>);
    std::fill(c.get(), c.get() + strips * rows * kStrip<T>, T(0));
    for (int64_t k = 0; k < N; k += kTaskDepth) {
      const int64_t depth = std::min(kTaskDepth, N - k);
      for (int64_t s = 0; s < strips; ++s)
        few_columns<T>(rows, depth, A + i0 * N + k, N, 1, x.get() + (s * N + k) * kStrip<T>, T(1),
                       c.get() + s * rows * kStrip<T>);
    }
    for (int64_t s = 0; s < strips; ++s)
      from_strip(rows, m, c.get() + s * rows * kStrip<T>, s * kStrip<T>, out + i0 * m);
  });
}

// x (N x kStrip) = (L L^T)^-1 x.
template <class T>
void solve_strip(const Threads& threads, int64_t N, const T* L, T* x) {
  const auto row = [&](int64_t i) { return x + i * kStrip<T>; };
  const auto subtract = [&](int64_t to, T factor, int64_t from) {
    for (int v = 0; v < kTileVectors; ++v) {
      T* const target = row(to) + v * kLanes<T>;
      store(target, load(target) - factor * load(row(from) + v * kLanes<T>));
    }
  };
  const auto divide = [&](int64_t i) {
    const T scale = T(1) / L[i * N + i];
    for (int j = 0; j < kStrip<T>; ++j) row(i)[j] *= scale;
  };
  for (int64_t k = 0; k < N; k += kPanel) {
    const int64_t width = std::min(kPanel, N - k);
    for (int64_t i = k; i < k + width; ++i) {
      for (int64_t j = k; j < i; ++j) subtract(i, L[i * N + j], j);
      divide(i);
    }
    const int64_t rest = k + width;
    parallel(threads, ceil_div(N - rest, kTaskRows), [&](int64_t task) {
      const int64_t i = rest + task * kTaskRows;
      few_columns<T>(std::min(kTaskRows, N - i), width, L + i * N + k, N, 1, row(k), T(-1), row(i));
    });
  }
  for (int64_t end = N; end > 0; end = (end - 1) / kPanel * kPanel) {
    const int64_t k = (end - 1) / kPanel * kPanel;
    for (int64_t i = end - 1; i >= k; --i) {
      divide(i);
      for (int64_t j = k; j < i; ++j) subtract(j, L[i * N + j], i);
    }
    parallel(threads, ceil_div(k, kTaskRows), [&](int64_t task) {
      const int64_t i = task * kTaskRows;
      few_columns<T>(std::min(kTaskRows, k - i), end - k, L + k * N + i, 1, N, row(k), T(-1), row(i));
    });
  }
}

// table[index[j]] for j < n.
inline Vec<double> gather(const double* table, const int64_t* index, int64_t n) {
#if defined(__AVX512F__)
  if (n >= 8) return (Vec<double>)_mm512_i64gather_pd(_mm512_loadu_si512(index), table, 8);
#endif
  Vec<double> v{};
  for (int64_t j = 0; j < std::min<int64_t>(n, kLanes<double>); ++j) v[j] = table[index[j]];
  return v;
}

inline Vec<float> gather(const float* table, const int64_t* index, int64_t n) {
  Vec<float> v{};
  for (int64_t j = 0; j < std::min<int64_t>(n, kLanes<float>); ++j) v[j] = table[index[j]];
  return v;
}

// The rows of B_ij = root_i w_j (K_ij - mean of class c_j in row i) from a column on, formed as they are packed.
template <class T>
struct CenteredRows {
  const T* K;
  int64_t N, L;
  const int64_t* codes;
  const T *root, *w, *means;
  int64_t column;

  Vec<T> operator()(int64_t i, int64_t f, int64_t n) const {
    const int64_t j = column + f;
    const Vec<T> mean = gather(means + i * L, codes + j, n);
    return root[i] * (load_some(w + j, n) * (load_some(K + i * N + j, n) - mean));
  }
};

// G = B B^T (lower triangle) and the means (N x L) of one problem.
template <class T>
void within_scatter(const Threads& threads, int64_t N, int64_t L, const T* K, const int64_t* codes, const T* root,
                    const T* counts, const T* scale, T* G, T* means) {
  Scratch<T> average(N * L), w(N);
  std::fill(average.get(), average.get() + N * L, T(0));
  for (int64_t j = 0; j < N; ++j) {
    const int64_t c = codes[j];
    w.get()[j] = root[j] * scale[c];
    if (counts[c] > 0) average.get()[j * L + c] = root[j] * root[j] / counts[c];
  }
  times<T>(threads, N, L, K, average.get(), means);
  for (int64_t k = 0; k < N; k += kGramDepth) {
    const CenteredRows<T> rows{K, N, L, codes, root, w.get(), means, k};
    update<T>(threads, k == 0 ? Mode::set : Mode::add, true, N, N, std::min(kGramDepth, N - k), rows, rows, G, N);
  }
}

// The largest |K_ij| and |K_ij - K_ji| of rows i0..i0+lanes against the columns up to there; NaN where one is NaN.
template <class T>
void asymmetry(int64_t N, const T* K, int64_t i0, Vec<T>& largest, Vec<T>& difference) {
  const auto more = [](Vec<T>& a, Vec<T> b) { a = ~(b <= a) & (a == a) ? b : a; };
  for (int64_t j0 = 0; j0 <= i0; j0 += kLanes<T>) {
    Vec<T> mirror[kLanes<T>];
    const int64_t rows = std::min<int64_t>(kLanes<T>, N - i0), columns = std::min<int64_t>(kLanes<T>, N - j0);
    for (int64_t j = 0; j < kLanes<T>; ++j) mirror[j] = j < columns ? load_some(K + (j0 + j) * N + i0, rows) : Vec<T>{};
    for (int64_t j = 0; j < columns; ++j) more(largest, vector_abs<T>(mirror[j]));
    transpose<T>(mirror);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec<T> row = load_some(K + (i0 + i) * N + j0, columns);
      more(largest, vector_abs<T>(row));
      more(difference, vector_abs<T>(row - mirror[i]));
    }
  }
}

}  // namespace

void within_scatter(DType dtype, int64_t P, int64_t N, int64_t L, const void* K, int64_t K_stride, const int64_t* codes,
                    const void* root, const void* counts, const void* scale, void* G, void* means,
                    const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t p = 0; p < P; ++p) {
      const auto of = [&](const void* data, int64_t stride) { return static_cast<const T*>(data) + p * stride; };
      within_scatter<T>(threads, N, L, of(K, K_stride), codes + p * N, of(root, N), of(counts, L), of(scale, L),
                        static_cast<T*>(G) + p * N * N, static_cast<T*>(means) + p * N * L);
    }
  });
}

void asymmetry(DType dtype, int64_t P, int64_t N, const void* K, int64_t K_stride, void* out, const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = ceil_div(N, kLanes<T>);
    for (int64_t p = 0; p < P; ++p) {
      Scratch<T> found(blocks * 2 * kLanes<T>);
      parallel(threads, blocks, [&](int64_t task) {
        const int64_t block = from_both_ends(task, blocks);
        Vec<T> largest{}, difference{};
        asymmetry<T>(N, static_cast<const T*>(K) + p * K_stride, block * kLanes<T>, largest, difference);
        store(found.get() + 2 * block * kLanes<T>, largest);
        store(found.get() + (2 * block + 1) * kLanes<T>, difference);
      });
      T* const of = static_cast<T*>(out) + 2 * p;
      of[0] = of[1] = T(0);
      for (int64_t i = 0; i < blocks * 2 * kLanes<T>; ++i) {
        T& most = of[i / kLanes<T> % 2];
        if (!(found.get()[i] <= most) && most == most) most = found.get()[i];
      }
    }
  });
}

void cholesky(DType dtype, int64_t P, int64_t N, void* A, int32_t* failed, const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t p = 0; p < P; ++p) failed[p] = !cholesky<T>(threads, N, static_cast<T*>(A) + p * N * N);
  });
}

void cholesky_solve(DType dtype, int64_t P, int64_t N, int64_t m, const void* L, const void* R, void* X,
                    const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    Scratch<T> strip(N * kStrip<T>);
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t j = 0; j < m; j += kStrip<T>) {
        to_strip(N, m, static_cast<const T*>(R) + p * N * m, j, strip.get());
        solve_strip(threads, N, static_cast<const T*>(L) + p * N * N, strip.get());
        from_strip(N, m, strip.get(), j, static_cast<T*>(X) + p * N * m);
      }
    }
  });
}

void times(DType dtype, int64_t P, int64_t N, int64_t m, const void* A, int64_t A_stride, const void* X, void* out,
           const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t p = 0; p < P; ++p)
      times(threads, N, m, static_cast<const T*>(A) + p * A_stride, static_cast<const T*>(X) + p * N * m,
            static_cast<T*>(out) + p * N * m);
  });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
