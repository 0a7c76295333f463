// Inner products of blocks, and the sum of the shares that tasks have of them.
#pragma once

#include <vector>

#include "common.h"

namespace phydi {
namespace {

// Pointers to `blocks` blocks, `step` entries apart.
template <class In>
std::vector<In*> block_pointers(In* first, int64_t blocks, int64_t step) {
  std::vector<In*> pointers(blocks);
  for (int64_t b = 0; b < blocks; ++b) pointers[b] = first + b * step;
  return pointers;
}

// Rows of `width` entries, `stride` apart, of several blocks; each begins `offset` entries after its pointer.
template <class In>
struct BlockRows {
  const In* const* blocks;
  int64_t count, offset, stride;

  // The last block stands for those after it.
  const In* at(int64_t block) const { return blocks[std::min(block, count - 1)] + offset; }
};

// Four parts from r and four blocks of x from l on; `whole`: the width is a whole number of vectors.
template <bool whole, class X, class In>
void add_square(int64_t rows, int64_t width, const BlockRows<X>& x, const BlockRows<In>& parts, int64_t r, int64_t l,
                Vec<Compute<In>>* total) {
  using T = Compute<In>;
  constexpr int kSide = 4;
  const X* a[kSide];
  const In* b[kSide];
  for (int64_t j = 0; j < kSide; ++j) {
    a[j] = x.at(l + j);
    b[j] = parts.at(r + j);
  }
  Vec<T> sums[kSide][kSide] = {};
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t s = 0; s < width; s += kLanes<T>) {
      const auto vector = [some = width - s](const auto* at) { return whole ? load(at) : load_some(at, some); };
      Vec<T> v[kSide];
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) v[j] = vector(a[j] + m * x.stride + s);
#pragma GCC unroll 4
      for (int t = 0; t < kSide; ++t) {
        const Vec<T> part = vector(b[t] + m * parts.stride + s);
#pragma GCC unroll 4
        for (int j = 0; j < kSide; ++j) sums[t][j] += part * v[j];
      }
    }
  }
  for (int64_t t = 0; t < std::min<int64_t>(kSide, parts.count - r); ++t)
    for (int64_t j = 0; j < std::min<int64_t>(kSide, x.count - l); ++j) total[(r + t) * x.count + l + j] += sums[t][j];
}

// total[r * x.count + l] += sum over rows of parts_r * x_l, lane by lane.
template <class X, class In>
void add_products(int64_t rows, int64_t width, const BlockRows<X>& x, const BlockRows<In>& parts,
                  Vec<Compute<In>>* total) {
  const auto square = width % kLanes<Compute<In>> == 0 ? add_square<true, X, In> : add_square<false, X, In>;
  for (int64_t l = 0; l < x.count; l += 4)
    for (int64_t r = 0; r < parts.count; r += 4) square(rows, width, x, parts, r, l, total);
}

// Adds every task's share of dA in a fixed order, so that the result does not depend on scheduling.
template <class T>
void add_shares(const Vec<T>* shares, int64_t count, int64_t entries, T* dA) {
  for (int64_t e = 0; e < entries; ++e) {
    Vec<T> total{};
    for (int64_t c = 0; c < count; ++c) total += shares[c * entries + e];
    dA[e] += sum<T>(total);
  }
}

}  // namespace

}  // namespace phydi
