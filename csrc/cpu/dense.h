// Dense algebra in two shapes: updates C op= A B^T of packed operands, and products with a few columns that read their
// matrix once.
#pragma once

#include "gram.h"

namespace phydi {
namespace {

enum class Mode { set, add, subtract };

// C (rows x columns, row-major) op= A B^T with A (rows x depth) and B (columns x depth), depth <= kGramDepth, given by
// a(i, f, n) and b(i, f, n): n entries of row i from f on. Of C only the lower triangle, and what shares a tile with
// it, if `lower`. C may be A.
template <class T, class RowA, class RowB>
void update(const Threads& threads, Mode mode, bool lower, int64_t rows, int64_t columns, int64_t depth, const RowA& a,
            const RowB& b, T* C, int64_t c_stride) {
  if (rows == 0 || columns == 0) return;
  const int64_t strips = ceil_div(columns, kStrip<T>), strip_size = depth * kStrip<T>;
  const int64_t blocks = ceil_div(rows, kGramRows);
  Scratch<T> packed(strips * strip_size);
  parallel(threads, strips, [&](int64_t strip) {
    const int64_t j0 = strip * kStrip<T>;
    pack_strip<T>(
        std::min<int64_t>(kStrip<T>, columns - j0), depth,
        [&](int64_t j, int64_t f, int64_t n) { return b(j0 + j, f, n); }, packed.get() + strip * strip_size);
  });
  parallel(threads, blocks, [&](int64_t task) {
    const int64_t i0 = (lower ? from_both_ends(task, blocks) : task) * kGramRows;
    const int64_t count = std::min(kGramRows, rows - i0), padded = round_up(count, kTileRows);
    Scratch<T> left(padded * kGramStride<T>), edge(kTileRows * kStrip<T>);
    pack_rows<T>(
        count, padded, depth,
        [&](int64_t i, int64_t f, int64_t n) {
          const Vec<T> v = a(i0 + i, f, n);
          return mode == Mode::subtract ? -v : v;
        },
        left.get());
    const int64_t end = lower ? std::min(columns, i0 + count) : columns;
    for (int64_t j = 0; j < end; j += kStrip<T>) {
      const T* strip = packed.get() + j / kStrip<T> * strip_size;
      const int64_t width = std::min<int64_t>(kStrip<T>, columns - j);
      for (int64_t i = 0; i < count; i += kTileRows) {
        if (lower && j >= i0 + i + kTileRows) continue;
        T* c = C + (i0 + i) * c_stride + j;
        const int64_t height = std::min<int64_t>(kTileRows, count - i);
        if (height == kTileRows && width == kStrip<T>) {
          gram_tile<Dot, T>(depth, left.get() + i * kGramStride<T>, strip, mode == Mode::set, c, c_stride);
          continue;
        }
        gram_tile<Dot, T>(depth, left.get() + i * kGramStride<T>, strip, true, edge.get(), kStrip<T>);
        for (int64_t m = 0; m < height; ++m)
          for (int64_t s = 0; s < width; ++s)
            c[m * c_stride + s] = (mode == Mode::set ? T(0) : c[m * c_stride + s]) + edge.get()[m * kStrip<T> + s];
      }
    }
  });
}

// The rows of a matrix in memory.
template <class T>
struct MatrixRows {
  const T* data;
  int64_t stride;

  Vec<T> operator()(int64_t i, int64_t f, int64_t n) const { return load_some(data + i * stride + f, n); }
};

constexpr int kFewRows = 6;

// c (M x kStrip, contiguous) += sign * a (M x depth) x (depth x kStrip, contiguous).
template <int M, class T>
inline __attribute__((always_inline)) void few_rows(int64_t depth, const T* a, int64_t row_stride, int64_t step_stride,
                                                    const T* x, T sign, T* c) {
  Vec<T> acc[M][kTileVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> v[kTileVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) v[j] = load(x + k * kStrip<T> + j * kLanes<T>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<T> w = splat(a[m * row_stride + k * step_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) acc[m][j] += w * v[j];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) {
      T* to = c + m * kStrip<T> + j * kLanes<T>;
      store(to, load(to) + sign * acc[m][j]);
    }
}

// C (rows x kStrip) += sign * A X with A at any strides, X (depth x kStrip): few columns, so that A is read once.
template <class T>
void few_columns(int64_t rows, int64_t depth, const T* A, int64_t row_stride, int64_t step_stride, const T* X, T sign,
                 T* C) {
  for (; rows >= kFewRows; rows -= kFewRows) {
    few_rows<kFewRows, T>(depth, A, row_stride, step_stride, X, sign, C);
    A += kFewRows * row_stride;
    C += kFewRows * kStrip<T>;
  }
  for (; rows > 0; --rows) {
    few_rows<1, T>(depth, A, row_stride, step_stride, X, sign, C);
    A += row_stride;
    C += kStrip<T>;
  }
}

// Columns j..j+kStrip of x (N x m) as rows of kStrip, padded with 0; and back.
template <class T>
void to_strip(int64_t N, int64_t m, const T* x, int64_t j, T* strip) {
  const int64_t width = std::min<int64_t>(kStrip<T>, m - j);
  for (int64_t i = 0; i < N; ++i) {
    std::fill(strip + i * kStrip<T>, strip + (i + 1) * kStrip<T>, T(0));
    std::copy(x + i * m + j, x + i * m + j + width, strip + i * kStrip<T>);
  }
}

template <class T>
void from_strip(int64_t N, int64_t m, const T* strip, int64_t j, T* x) {
  const int64_t width = std::min<int64_t>(kStrip<T>, m - j);
  for (int64_t i = 0; i < N; ++i) std::copy(strip + i * kStrip<T>, strip + i * kStrip<T> + width, x + i * m + j);
}

}  // namespace
}  // namespace phydi
