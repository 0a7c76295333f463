// A path of conditioning coefficients: S_w = Q T Q^T with T of bandwidth kBand by products of blocks, after which each
// T + tau I costs N kBand^2 to factor and N kBand to solve, where a factorisation of S_w + tau I costs N^3 / 3.
#include <cmath>
#include <memory>
#include <vector>

#include "dense.h"

namespace phydi {
namespace PHYDI_ISA {
namespace {

constexpr int64_t kBand = kBandwidth;
template <class T>
constexpr int64_t kBandStrips = kBand / kStrip<T>;
static_assert(kBand % kStrip<double> == 0 && kBand % kStrip<float> == 0);

// A matrix of kBand columns as strips (strip, row, kStrip).
template <class T>
class Columns {
 public:
  explicit Columns(int64_t rows) : rows_(rows), data_(std::max<int64_t>(rows, 1) * kBand) {}
  T* strip(int64_t s) const { return data_.get() + s * rows_ * kStrip<T>; }
  T& at(int64_t i, int64_t c) const { return strip(c / kStrip<T>)[i * kStrip<T> + c % kStrip<T>]; }
  Vec<T> vector(int64_t i, int64_t c) const { return load(&at(i, c)); }
  int64_t rows() const { return rows_; }
  void clear() const { std::fill(data_.get(), data_.get() + rows_ * kBand, T(0)); }

 private:
  int64_t rows_;
  Scratch<T> data_;
};

// Householder vectors of a panel (rows x count, row-major of kBand columns): R stays above, the vectors, with their 1
// and their zeros, replace the panel in `v`; block (kBand x kBand, upper) makes Q = I - V block V^T.
template <class T>
void factor_panel(int64_t rows, int64_t count, T* panel, T* v, T* block) {
  std::fill(v, v + rows * kBand, T(0));
  std::fill(block, block + kBand * kBand, T(0));
  T scales[kBand] = {};
  for (int64_t c = 0; c < std::min(rows, count); ++c) {
    // Scaled by its one-norm a column neither overflows nor vanishes, and keeps a NaN.
    T size = 0;
    for (int64_t i = c; i < rows; ++i) size += std::abs(panel[i * kBand + c]);
    if (size == 0) {
      v[c * kBand + c] = T(1);
      continue;  // nothing to reflect: H = I
    }
    T square = 0;
    for (int64_t i = c; i < rows; ++i) {
      T& x = v[i * kBand + c];
      x = panel[i * kBand + c] / size;
      square += x * x;
    }
    const T alpha = v[c * kBand + c], beta = -std::copysign(std::sqrt(square), alpha);
    const T scale = (beta - alpha) / beta, inverse = T(1) / (alpha - beta);
    scales[c] = scale;
    for (int64_t i = c + 1; i < rows; ++i) v[i * kBand + c] *= inverse;
    v[c * kBand + c] = T(1);
    // w = scale v^T panel in registers; the columns up to c, which are done, get a factor of 0.
    constexpr int64_t lanes = kLanes<T>, vectors = kBand / lanes;
    Vec<T> w[vectors] = {};
    for (int64_t i = c; i < rows; ++i) {
      const Vec<T> factor = splat(v[i * kBand + c]);
#pragma GCC unroll 16
      for (int64_t k = 0; k < vectors; ++k) w[k] += factor * load(panel + i * kBand + k * lanes);
    }
    for (int64_t k = 0; k < kBand; ++k) w[k / lanes][k % lanes] *= k > c ? scale : T(0);
    for (int64_t i = c; i < rows; ++i) {
      const Vec<T> factor = splat(v[i * kBand + c]);
#pragma GCC unroll 16
      for (int64_t k = 0; k < vectors; ++k) {
        T* const to = panel + i * kBand + k * lanes;
        store(to, load(to) - factor * w[k]);
      }
    }
    panel[c * kBand + c] = beta * size;
  }
  // block = (diag(1/scale) + strictly upper part of V^T V)^-1, by columns.
  std::vector<T> gram(kBand * kBand);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < kBand; ++c) {
      const Vec<T> factor = splat(v[i * kBand + c]);
      for (int64_t k = 0; k < kBand; k += kLanes<T>)
        store(&gram[c * kBand + k], load(&gram[c * kBand + k]) + factor * load(v + i * kBand + k));
    }
  for (int64_t c = 0; c < kBand; ++c) {
    block[c * kBand + c] = scales[c];
    for (int64_t r = 0; r < c; ++r) {
      T total = 0;
      for (int64_t k = r; k < c; ++k) total += block[r * kBand + k] * gram[k * kBand + c];
      block[r * kBand + c] = -scales[c] * total;
    }
  }
}

// out += A x, A with rows and columns at any strides, x and out of kBand columns.
template <class T>
void add_product(const T* A, int64_t row_stride, int64_t step_stride, const Columns<T>& x, const Columns<T>& out) {
  for (int64_t s = 0; s < kBandStrips<T>; ++s)
    few_columns<T>(out.rows(), x.rows(), A, row_stride, step_stride, x.strip(s), T(1), out.strip(s));
}

constexpr int64_t kSquare = 192;

// y += A x for a symmetric A (n x n) of which the lower triangle is read, once; x and y of kBand columns. Each thread
// adds up the row blocks of its own share.
template <class T>
void symmetric_times(const Threads& threads, int64_t n, const T* A, int64_t stride, const Columns<T>& x,
                     const Columns<T>& y) {
  const int64_t blocks = ceil_div(n, kSquare), shares = std::min(threads.count, blocks);
  std::vector<std::unique_ptr<Columns<T>>> parts;
  for (int64_t s = 0; s < shares; ++s) parts.push_back(std::make_unique<Columns<T>>(n));
  parallel(threads, shares, [&](int64_t share) {
    const Columns<T>& part = *parts[share];
    part.clear();
    Scratch<T> diagonal(kSquare * kSquare);
    for (int64_t task = share; task < blocks; task += shares) {
      const int64_t i0 = from_both_ends(task, blocks) * kSquare, rows = std::min(kSquare, n - i0);
      for (int64_t j0 = 0; j0 < i0; j0 += kSquare) {
        const T* const a = A + i0 * stride + j0;
        for (int64_t s = 0; s < kBandStrips<T>; ++s) {
          few_columns<T>(rows, kSquare, a, stride, 1, x.strip(s) + j0 * kStrip<T>, T(1),
                         part.strip(s) + i0 * kStrip<T>);
          few_columns<T>(kSquare, rows, a, 1, stride, x.strip(s) + i0 * kStrip<T>, T(1),
                         part.strip(s) + j0 * kStrip<T>);
        }
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j <= i; ++j)
          diagonal.get()[i * kSquare + j] = diagonal.get()[j * kSquare + i] = A[(i0 + i) * stride + i0 + j];
      for (int64_t s = 0; s < kBandStrips<T>; ++s)
        few_columns<T>(rows, rows, diagonal.get(), kSquare, 1, x.strip(s) + i0 * kStrip<T>, T(1),
                       part.strip(s) + i0 * kStrip<T>);
    }
  });
  for (const auto& part : parts)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < kBand; c += kLanes<T>) store(&y.at(i, c), y.vector(i, c) + part->vector(i, c));
}

// Two matrices of kBand columns side by side, as an operand of `update`.
template <class T>
struct SideBySide {
  const Columns<T>&first, &second;

  Vec<T> operator()(int64_t i, int64_t f, int64_t) const {
    return f < kBand ? first.vector(i, f) : second.vector(i, f - kBand);
  }
};

// The band (N, kBand + 1), row i holding columns i - kBand ... i, of Q^T S Q; the vectors of Q in the columns of S
// below the band, kBand columns a panel; and a block for each panel.
template <class T>
void reduce(const Threads& threads, int64_t N, T* S, T* band, T* blocks) {
  for (int64_t k = 0; k + kBand < N; k += kBand) {
    const int64_t first = k + kBand, n = N - first;
    T* const block = blocks + k * kBand;
    Scratch<T> panel(n * kBand), vectors(n * kBand);
    for (int64_t i = 0; i < n; ++i)
      std::copy(S + (first + i) * N + k, S + (first + i) * N + first, panel.get() + i * kBand);
    factor_panel<T>(n, kBand, panel.get(), vectors.get(), block);
    Columns<T> V(n), W(n), product(n), square(kBand), inner(kBand);
    for (int64_t i = 0; i < n; ++i) {
      // R to the band's place, above it in the matrix; the vectors to S.
      for (int64_t c = 0; c < kBand; ++c) {
        V.at(i, c) = vectors.get()[i * kBand + c];
        if (i <= c) band[(first + i) * (kBand + 1) + c - i] = panel.get()[i * kBand + c];
      }
      std::copy(vectors.get() + i * kBand, vectors.get() + (i + 1) * kBand, S + (first + i) * N + k);
    }
    // A' = A - V W^T - W V^T with X = A V block, W = X - V block^T (V^T X) / 2.
    for (int64_t r = 0; r < kBand; ++r)
      for (int64_t c = 0; c < kBand; ++c) square.at(r, c) = block[r * kBand + c];
    product.clear();
    add_product<T>(vectors.get(), kBand, 1, square, product);
    W.clear();
    symmetric_times<T>(threads, n, S + first * N + first, N, product, W);
    inner.clear();
    add_product<T>(vectors.get(), 1, kBand, W, inner);
    for (int64_t r = 0; r < kBand; ++r)
      for (int64_t c = 0; c < kBand; ++c) {
        T total = 0;
        for (int64_t m = 0; m <= r; ++m) total += block[m * kBand + r] * inner.at(m, c);
        square.at(r, c) = -total / 2;
      }
    add_product<T>(vectors.get(), kBand, 1, square, W);
    update<T>(threads, Mode::subtract, true, n, n, 2 * kBand, SideBySide<T>{V, W}, SideBySide<T>{W, V},
              S + first * N + first, N);
  }
  // What no panel reduced: the diagonal blocks.
  for (int64_t i = 0; i < N; ++i) {
    const int64_t start = i / kBand * kBand;
    for (int64_t j = start; j <= i; ++j) band[i * (kBand + 1) + kBand - i + j] = S[i * N + j];
    for (int64_t j = i - kBand; j < 0; ++j) band[i * (kBand + 1) + kBand - i + j] = T(0);
  }
}

// The lower Cholesky factor of band + tau I, in the same storage; false where there is none.
template <class T>
bool factor_band(int64_t N, const T* band, T tau, T* L) {
  constexpr int64_t width = kBand + 1;
  for (int64_t i = 0; i < N; ++i) {
    T* const row = L + i * width + kBand - i;  // row[j]: column j
    const T* const a = band + i * width + kBand - i;
    const int64_t first = std::max<int64_t>(0, i - kBand);
    for (int64_t j = i - kBand; j < first; ++j) row[j] = T(0);
    for (int64_t j = first; j < i; ++j) {
      const T* const other = L + j * width + kBand - j;
      Vec<T> total{};
      for (int64_t k = first; k < j; k += kLanes<T>) total += load_some(row + k, j - k) * load_some(other + k, j - k);
      row[j] = (a[j] - sum<T>(total)) / other[j];
    }
    T square = a[i] + tau;
    for (int64_t k = first; k < i; ++k) square -= row[k] * row[k];
    if (!(square > 0) || !std::isfinite(square)) return false;
    row[i] = std::sqrt(square);
  }
  return true;
}

// x (N x kStrip) = (L L^T)^-1 x of a banded factor.
template <class T>
void solve_band(int64_t N, const T* L, T* x) {
  constexpr int64_t width = kBand + 1;
  const auto at = [&](int64_t i, int v) { return x + i * kStrip<T> + v * kLanes<T>; };
  for (int64_t i = 0; i < N; ++i) {
    const T* const row = L + i * width + kBand - i;
    Vec<T> total[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) total[v] = load(at(i, v));
    for (int64_t k = std::max<int64_t>(0, i - kBand); k < i; ++k)
      for (int v = 0; v < kTileVectors; ++v) total[v] -= row[k] * load(at(k, v));
    for (int v = 0; v < kTileVectors; ++v) store(at(i, v), total[v] / row[i]);
  }
  for (int64_t i = N - 1; i >= 0; --i) {
    const T* const row = L + i * width + kBand - i;
    for (int v = 0; v < kTileVectors; ++v) {
      const Vec<T> solved = load(at(i, v)) / row[i];
      store(at(i, v), solved);
      for (int64_t k = std::max<int64_t>(0, i - kBand); k < i; ++k) store(at(k, v), load(at(k, v)) - row[k] * solved);
    }
  }
}

// x (N x kStrip) = Q x or Q^T x.
template <class T>
void apply_q(int64_t N, const T* S, const T* blocks, bool transposed, T* x) {
  const int64_t panels = N > kBand ? ceil_div(N - kBand, kBand) : 0;
  alignas(64) T inner[kBand * kStrip<T>], scaled[kBand * kStrip<T>];
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t k = (transposed ? panel : panels - 1 - panel) * kBand, first = k + kBand, n = N - first;
    const T *const block = blocks + k * kBand, *const v = S + first * N + k;
    std::fill(inner, inner + kBand * kStrip<T>, T(0));
    std::fill(scaled, scaled + kBand * kStrip<T>, T(0));
    few_columns<T>(kBand, n, v, 1, N, x + first * kStrip<T>, T(1), inner);
    few_columns<T>(kBand, kBand, block, transposed ? 1 : kBand, transposed ? kBand : 1, inner, T(1), scaled);
    few_columns<T>(n, kBand, v, N, 1, scaled, T(-1), x + first * kStrip<T>);
  }
}

}  // namespace

void band_reduce(DType dtype, int64_t P, int64_t N, void* S, void* band, void* blocks, const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t panels = std::max<int64_t>(ceil_div(N, kBand) - 1, 0);
    for (int64_t p = 0; p < P; ++p)
      reduce<T>(threads, N, static_cast<T*>(S) + p * N * N, static_cast<T*>(band) + p * N * (kBand + 1),
                static_cast<T*>(blocks) + p * panels * kBand * kBand);
  });
}

void band_cholesky(DType dtype, int64_t count, int64_t P, int64_t N, const void* band, const void* tau, void* L,
                   int32_t* failed, const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t size = N * (kBand + 1);
    parallel(threads, count * P, [&](int64_t task) {
      failed[task] = !factor_band<T>(N, static_cast<const T*>(band) + task % P * size, static_cast<const T*>(tau)[task],
                                     static_cast<T*>(L) + task * size);
    });
  });
}

void band_solve(DType dtype, int64_t count, int64_t P, int64_t N, int64_t m, const void* L, const void* S,
                const void* blocks, const void* R, void* X, const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t panels = std::max<int64_t>(ceil_div(N, kBand) - 1, 0), strips = ceil_div(m, kStrip<T>);
    parallel(threads, count * P * strips, [&](int64_t task) {
      const int64_t problem = task / strips, p = problem % P, j = task % strips * kStrip<T>;
      const T* const q = static_cast<const T*>(S) + p * N * N;
      const T* const block = static_cast<const T*>(blocks) + p * panels * kBand * kBand;
      Scratch<T> x(N * kStrip<T>);
      to_strip(N, m, static_cast<const T*>(R) + problem * N * m, j, x.get());
      apply_q<T>(N, q, block, true, x.get());
      solve_band<T>(N, static_cast<const T*>(L) + problem * N * (kBand + 1), x.get());
      apply_q<T>(N, q, block, false, x.get());
      from_strip(N, m, x.get(), j, static_cast<T*>(X) + problem * N * m);
    });
  });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
