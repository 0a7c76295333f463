// Sums over features of pairs of rows, s(x_i, y_j) = sum_f term(x_if, y_jf), in register tiles of packed operands: the
// blocking of product.h with a choice of terms.
#pragma once

#include "elementary.h"
#include "product.h"

namespace phydi {
namespace {

// Features packed at a time: a strip of them takes two thirds of a 48 KiB L1.
constexpr int64_t kGramDepth = 256;
template <class T>
constexpr int64_t kGramStride = kGramDepth + 64 / int64_t(sizeof(T));
// A multiple of kTileRows and of every number of lanes.
constexpr int64_t kGramRows = kTileRows == 14 ? 112 : 96;

struct Dot {
  template <class T>
  static inline __attribute__((always_inline)) void add(Vec<T>& c, Vec<T> a, Vec<T> b) {
    c += a * b;
  }
};

struct Squared {
  template <class T>
  static inline __attribute__((always_inline)) void add(Vec<T>& c, Vec<T> a, Vec<T> b) {
    const Vec<T> d = a - b;
    c += d * d;
  }
};

struct Manhattan {
  template <class T>
  static inline __attribute__((always_inline)) void add(Vec<T>& c, Vec<T> a, Vec<T> b) {
    c += vector_abs<T>(a - b);
  }
};

struct Chi2 {
  template <class T>
  static inline __attribute__((always_inline)) void add(Vec<T>& c, Vec<T> a, Vec<T> b) {
    const Vec<T> d = a - b, total = a + b;
    c += total == Vec<T>{} ? Vec<T>{} : d * d / total;
  }
};

// c (kTileRows x kStrip) = (first ? 0 : c) + the terms of `depth` features; a has rows of kGramStride. What c holds is
// fetched while the terms are added up, and added at the end: waiting for it first cost a tenth of a large product.
template <class Term, class T>
void gram_tile(int64_t depth, const T* a, const T* b, bool first, T* c, int64_t c_stride) {
  Vec<T> acc[kTileRows][kTileVectors] = {};
  if (!first) {
    for (int m = 0; m < kTileRows; ++m)
      for (int v = 0; v < kTileVectors; ++v) __builtin_prefetch(c + m * c_stride + v * kLanes<T>, 1);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> y[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) y[v] = load(b + k * kStrip<T> + v * kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < kTileRows; ++m) {
      const Vec<T> x = splat(a[m * kGramStride<T> + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) Term::template add<T>(acc[m][v], x, y[v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      T* const to = c + m * c_stride + v * kLanes<T>;
      store(to, first ? acc[m][v] : load(to) + acc[m][v]);
    }
}

// The rows 0..count of a matrix as the lanes of a strip, out[f * kStrip + j] for f < depth; row(j, f, n) loads n
// entries of row j from f on. Lanes past count are 0.
template <class T, class Row>
void pack_strip(int64_t count, int64_t depth, const Row& row, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t f = 0; f < depth; f += lanes) {
    const int64_t some = std::min(lanes, depth - f);
    for (int64_t j = 0; j < kStrip<T>; j += lanes) {
      Vec<T> square[lanes];
      for (int64_t i = 0; i < lanes; ++i) square[i] = j + i < count ? row(j + i, f, some) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < some; ++i) store(out + (f + i) * kStrip<T> + j, square[i]);
    }
  }
}

// The same rows one after another, kGramStride apart.
template <class T, class Row>
void pack_rows(int64_t count, int64_t padded, int64_t depth, const Row& row, T* out) {
  for (int64_t i = 0; i < padded; ++i)
    for (int64_t f = 0; f < depth; f += kLanes<T>)
      store(out + i * kGramStride<T> + f, i < count ? row(i, f, std::min<int64_t>(kLanes<T>, depth - f)) : Vec<T>{});
}

// Tasks of a lower triangle in an order whose halves have equal work.
inline int64_t from_both_ends(int64_t task, int64_t tasks) { return task % 2 ? tasks - 1 - task / 2 : task / 2; }

}  // namespace
}  // namespace phydi
