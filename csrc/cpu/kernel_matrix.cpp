// Kernel matrices: one pass over the features forms the pairwise sums of a block, and an epilogue makes of it the
// kernels of all gammas while it is in cache.
#include <cmath>
#include <vector>

#include "gram.h"

namespace phydi {
namespace PHYDI_ISA {
namespace {

// Squared distances of up to this many features are sums of squared differences: twice the instructions of a product,
// and exact at any offset.
constexpr int64_t kDirectFeatures = 32;
constexpr int64_t kBlockColumns = 256;

template <class T>
struct KernelMatrix {
  Kernel kernel;
  int64_t G, B, N, M, d, degree;
  T coef0;
  bool symmetric;
  const T *X, *Y;  // Y is X if symmetric
  const T* gamma;  // (G, B)
  T* out;          // (G, B, N, M)
  const Threads& threads;

  Kernel pairwise() const {
    switch (kernel) {
      case Kernel::dot:
      case Kernel::poly:
      case Kernel::sigmoid:
        return Kernel::dot;
      case Kernel::manhattan_distance:
      case Kernel::laplacian:
        return Kernel::manhattan_distance;
      case Kernel::chi2_distance:
      case Kernel::chi2:
        return Kernel::chi2_distance;
      default:
        return Kernel::squared_distance;
    }
  }

  void run() const {
    switch (pairwise()) {
      case Kernel::dot:
        return each_problem<Dot>(false);
      case Kernel::manhattan_distance:
        return each_problem<Manhattan>(false);
      case Kernel::chi2_distance:
        return each_problem<Chi2>(false);
      default:
        return d <= kDirectFeatures ? each_problem<Squared>(false) : each_problem<Dot>(true);
    }
  }

  // The points of one problem less their center, in strips and in rows, and their squared lengths if `expand`:
  // |x - y|^2 = |x|^2 + |y|^2 - 2 x.y.
  template <class Term>
  void each_problem(bool expand) const {
    const int64_t strips = ceil_div(M, kStrip<T>), strip_size = d * kStrip<T>;
    const int64_t blocks = ceil_div(N, kGramRows);
    // Small problems are packed and run together: one alone has too few tasks for the threads.
    const int64_t together = std::max<int64_t>(1, std::min(B, (int64_t(1) << 20) / std::max<int64_t>(1, M * d)));
    Scratch<T> packed(together * strips * strip_size);
    Scratch<T> center(together * std::max<int64_t>(d, 1)), x_lengths(together * N), y_lengths(together * M);
    for (int64_t first = 0; first < B; first += together) {
      const int64_t some = std::min(together, B - first);
      const auto points = [&](int64_t p) { return X + (first + p) * N * d; };
      const auto others = [&](int64_t p) { return Y + (first + p) * M * d; };
      const auto origin = [&](int64_t p) { return expand ? center.get() + p * d : nullptr; };
      if (expand) {
        parallel(threads, some, [&](int64_t p) {
          middle(others(p), M, center.get() + p * d);
          squared_lengths(points(p), N, origin(p), x_lengths.get() + p * N);
          squared_lengths(others(p), M, origin(p), y_lengths.get() + p * M);
        });
      }
      parallel(threads, some * strips, [&](int64_t task) {
        const int64_t p = task / strips, j = task % strips * kStrip<T>;
        const T *y = others(p) + j * d, *o = origin(p);
        pack_strip<T>(
            std::min<int64_t>(kStrip<T>, M - j), d, [&](int64_t i, int64_t f, int64_t n) { return at(y, i, f, n, o); },
            packed.get() + task * strip_size);
      });
      parallel(threads, some * blocks, [&](int64_t task) {
        const int64_t p = task / blocks, block = from_both_ends(task % blocks, blocks);
        row_block<Term>(first + p, block * kGramRows, points(p), packed.get() + p * strips * strip_size, origin(p),
                        x_lengths.get() + p * N, y_lengths.get() + p * M);
      });
    }
  }

  Vec<T> at(const T* x, int64_t i, int64_t f, int64_t n, const T* o) const {
    const Vec<T> v = load_some(x + i * d + f, n);
    return o ? v - load_some(o + f, n) : v;
  }

  // The medians of at most nine points in each feature, of what is finite: an outlier or a NaN must not cost the other
  // points their digits, nor a row of X those of the other rows.
  void middle(const T* y, int64_t count, T* medians) const {
    constexpr int64_t some = 9;
    for (int64_t f = 0; f < d; ++f) {
      T values[some];
      int64_t finite = 0;
      for (int64_t j = 0; count > 0 && j < some; ++j) {
        const T value = y[j * count / some * d + f];
        if (!std::isfinite(value)) continue;
        int64_t at = finite++;
        for (; at > 0 && values[at - 1] > value; --at) values[at] = values[at - 1];
        values[at] = value;
      }
      medians[f] = finite > 0 ? values[(finite - 1) / 2] : T(0);
    }
  }

  void squared_lengths(const T* x, int64_t count, const T* o, T* lengths) const {
    for (int64_t i = 0; i < count; ++i) {
      Vec<T> total{};
      for (int64_t f = 0; f < d; f += kLanes<T>) {
        const Vec<T> v = at(x, i, f, std::min<int64_t>(kLanes<T>, d - f), o);
        total += v * v;
      }
      lengths[i] = sum<T>(total);
    }
  }

  template <class Term>
  void row_block(int64_t b, int64_t i0, const T* x, const T* packed, const T* o, const T* x_lengths,
                 const T* y_lengths) const {
    const int64_t rows = std::min(kGramRows, N - i0), padded = round_up(rows, kTileRows);
    const int64_t columns = symmetric ? std::min(M, i0 + rows) : M;
    const int64_t chunks = std::max<int64_t>(1, ceil_div(d, kGramDepth)), chunk_size = padded * kGramStride<T>;
    Scratch<T> a(chunks * chunk_size), s(padded * kBlockColumns);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t f0 = c * kGramDepth;
      pack_rows<T>(
          rows, padded, std::min(kGramDepth, d - f0),
          [&](int64_t i, int64_t f, int64_t n) { return at(x, i0 + i, f0 + f, n, o); }, a.get() + c * chunk_size);
    }
    for (int64_t j0 = 0; j0 < columns; j0 += kBlockColumns) {
      const int64_t width = std::min(kBlockColumns, columns - j0);
      for (int64_t j = 0; j < width; j += kStrip<T>)
        for (int64_t c = 0; c < chunks; ++c)
          for (int64_t i = 0; i < padded; i += kTileRows)
            gram_tile<Term, T>(std::min(kGramDepth, d - c * kGramDepth), a.get() + c * chunk_size + i * kGramStride<T>,
                               packed + (j0 + j) * d + c * kGramDepth * kStrip<T>, c == 0,
                               s.get() + i * kBlockColumns + j, kBlockColumns);
      for (int64_t i = 0; i < rows; ++i) {
        T* row = s.get() + i * kBlockColumns;
        if (o) distances(row, width, x_lengths[i0 + i], y_lengths + j0);
        // A point is at no distance from itself; NaN stays NaN.
        if (symmetric && pairwise() != Kernel::dot && i0 + i >= j0 && i0 + i < j0 + width) row[i0 + i - j0] *= 0;
        for (int64_t g = 0; g < G; ++g) {
          T* to = out + ((g * B + b) * N + i0 + i) * M + j0;
          profile(row, width, kernel == pairwise() ? T(1) : gamma[g * B + b], to);
        }
      }
    }
    if (!symmetric) return;
    for (int64_t g = 0; g < G; ++g) {
      T* K = out + (g * B + b) * N * M;
      for (int64_t i = i0; i < i0 + rows; i += kLanes<T>)
        for (int64_t j = 0; j < i0; j += kLanes<T>) mirror(K, i, std::min<int64_t>(kLanes<T>, i0 + rows - i), j);
    }
  }

  // Columns i..i+count of the rows j..j+lanes above the diagonal from the rows i..i+count below it.
  void mirror(T* K, int64_t i, int64_t count, int64_t j) const {
    Vec<T> square[kLanes<T>];
    for (int64_t k = 0; k < kLanes<T>; ++k) square[k] = k < count ? load(K + (i + k) * M + j) : Vec<T>{};
    transpose<T>(square);
    for (int64_t k = 0; k < kLanes<T>; ++k) store_some(K + (j + k) * M + i, square[k], count);
  }

  static void distances(T* row, int64_t count, T length, const T* lengths) {
    for (int64_t j = 0; j < count; j += kLanes<T>) {
      const int64_t some = std::min<int64_t>(kLanes<T>, count - j);
      const Vec<T> both = length + load_some(lengths + j, some);
      const Vec<T> s = both - T(2) * load(row + j);
      store(row + j, s < Vec<T>{} ? Vec<T>{} : s);
    }
  }

  // to = f(gamma s).
  void profile(const T* s, int64_t count, T g, T* to) const {
    switch (kernel) {
      case Kernel::poly:
        return each(s, count, to, [&](Vec<T> v) {
          const Vec<T> base = g * v + coef0;
          Vec<T> power = base;
          for (int64_t n = 1; n < degree; ++n) power *= base;
          return power;
        });
      case Kernel::sigmoid:
        return each(s, count, to, [&](Vec<T> v) { return vector_tanh<T>(g * v + coef0); });
      case Kernel::rbf:
      case Kernel::laplacian:
      case Kernel::chi2:
        return each(s, count, to, [&](Vec<T> v) { return vector_exp<T>(-g * v); });
      case Kernel::matern12:
        return each(s, count, to, [&](Vec<T> v) { return vector_exp<T>(-vector_sqrt<T>(2 * g * v)); });
      case Kernel::matern32:
        return each(s, count, to, [&](Vec<T> v) {
          const Vec<T> z = vector_sqrt<T>(6 * g * v);
          return (1 + z) * vector_exp<T>(-z);
        });
      case Kernel::matern52:
        return each(s, count, to, [&](Vec<T> v) {
          const Vec<T> z = vector_sqrt<T>(10 * g * v);
          return (1 + z * (1 + z * T(1.0 / 3))) * vector_exp<T>(-z);
        });
      default:
        return each(s, count, to, [](Vec<T> v) { return v; });
    }
  }

  template <class Fn>
  static void each(const T* s, int64_t count, T* to, const Fn& fn) {
    for (int64_t j = 0; j < count; j += kLanes<T>) store_some(to + j, fn(load(s + j)), count - j);
  }
};

}  // namespace

void kernel_matrix(DType dtype, Kernel kernel, int64_t G, int64_t B, int64_t N, int64_t M, int64_t d, bool symmetric,
                   const void* X, const void* Y, const void* gamma, int64_t degree, double coef0, void* out,
                   const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    KernelMatrix<T>{kernel,
                    G,
                    B,
                    N,
                    M,
                    d,
                    degree,
                    T(coef0),
                    symmetric,
                    static_cast<const T*>(X),
                    static_cast<const T*>(Y),
                    static_cast<const T*>(gamma),
                    static_cast<T*>(out),
                    threads}
        .run();
  });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
