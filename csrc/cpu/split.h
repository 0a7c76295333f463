// The split of a dense gradient into those of the algebra and the weights.
#pragma once

#include "dots.h"

namespace phydi {
namespace {

// Factors and gradients of the split of G = dL/dH (k, r, l, s) into
//   dF[i, r, s] = sum_kl A[i,k,l] G[k,r,l,s]    and    dA[i,k,l] = sum_rs F[i,r,s] G[k,r,l,s].
template <class In, class Grad, class Out>
struct Split {
  using T = Compute<In>;
  const T* A;
  int64_t n, P, Q;
  const In* F;
  int64_t F_i, F_r;
  const Grad* G;
  int64_t G_k, G_r, G_l;
  Out* dF;
  int64_t dF_i, dF_r;

  // One vector over s, `some` entries of it, for `terms` terms from `first` on; dA collects lane sums.
  template <bool whole, int terms>
  void block(int64_t first, int64_t r, int64_t s, int64_t some, Vec<T>* dA) const {
    const auto at = [&](auto* from) { return whole ? load(from) : load_some(from, some); };
    const T* a = A + first * P * Q;
    Vec<T> f[terms], d[terms];
#pragma GCC unroll 8
    for (int t = 0; t < terms; ++t) {
      f[t] = at(F + (first + t) * F_i + r * F_r + s);
      d[t] = Vec<T>{};
    }
    for (int64_t k = 0; k < P; ++k) {
      for (int64_t l = 0; l < Q; ++l) {
        const Vec<T> g = at(G + k * G_k + r * G_r + l * G_l + s);
        const int64_t entry = k * Q + l;
#pragma GCC unroll 8
        for (int t = 0; t < terms; ++t) {
          d[t] += a[entry + t * P * Q] * g;
          dA[entry + t * P * Q] += f[t] * g;
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < terms; ++t) store_some(dF + (first + t) * dF_i + r * dF_r + s, d[t], some);
  }

  // Row r for `terms` terms from `first` on.
  template <int terms>
  void row(int64_t first, int64_t r, int64_t width, Vec<T>* dA) const {
    int64_t s = 0;
    for (; s + kLanes<T> <= width; s += kLanes<T>) block<true, terms>(first, r, s, kLanes<T>, dA);
    if (s < width) block<false, terms>(first, r, s, width - s, dA);
  }
};

// Terms [first, first + terms) of rows r < p and columns s < width; dA is added to.
template <int terms, class S, class T>
void split_terms(const S& split, int64_t first, int64_t p, int64_t width, T* dA, const Threads& threads) {
  const int64_t entries = terms * split.P * split.Q;
  // A task's share of dA is a vector an entry: all shares in 1 MiB where one fits; their number depends on shapes only.
  const int64_t most = std::clamp<int64_t>((1 << 20) / (entries * int64_t(sizeof(Vec<T>))), 1, 64);
  const int64_t step = std::max<int64_t>(16, ceil_div(p, most)), shares = ceil_div(p, step);
  const Scratch<Vec<T>> partial(shares * entries);
  parallel(threads, shares, [&](int64_t share) {
    Vec<T>* mine = partial.get() + share * entries;
    std::fill(mine, mine + entries, Vec<T>{});
    for (int64_t r = share * step; r < std::min(p, (share + 1) * step); ++r)
      split.template row<terms>(first, r, width, mine);
  });
  add_shares<T>(partial.get(), shares, entries, dA + first * split.P * split.Q);
}

template <class In, class Grad, class Out>
void split_all(const Split<In, Grad, Out>& split, int64_t p, int64_t width, Compute<In>* dA, const Threads& threads) {
  int64_t first = 0;
  for (; first + 8 <= split.n; first += 8) split_terms<8>(split, first, p, width, dA, threads);
  if (split.n & 4) split_terms<4>(split, first, p, width, dA, threads), first += 4;
  if (split.n & 2) split_terms<2>(split, first, p, width, dA, threads), first += 2;
  if (split.n & 1) split_terms<1>(split, first, p, width, dA, threads);
}

}  // namespace

}  // namespace phydi
