// F-hat_r = sum_i U[r,i] F_i packed from lines of F, the weights of one input for all outputs side by side: combined as
// they lie, each read once for all R.
#pragma once

#include "product.h"

namespace phydi {
namespace {

// F[i, c, s] at F + i * F_i + s * F_s + c, s < q; U (R, n), n as combines_lines_of says.
template <class In>
struct Lines {
  using T = Compute<In>;
  const In* F;
  int64_t F_i, F_s, q;
  const T* U;
  int64_t R, n;

  // F-hat_r in columns [column, column + columns) of a strip, lanes [lane, lane + count), for all r:
  // to[r * to_stride + l * kStrip + c].
  void pack(int64_t column, int64_t columns, int64_t lane, int64_t count, T* to, int64_t to_stride) const {
    const auto with_terms = [&](auto terms) {
      constexpr int N = decltype(terms)::value;
      columns < kStrip<T> ? pack_terms<N, false>(column, columns, lane, count, to, to_stride)
                          : pack_terms<N, true>(column, columns, lane, count, to, to_stride);
    };
    switch (n) {
      case 2:
        return with_terms(std::integral_constant<int, 2>{});
      case 3:
        return with_terms(std::integral_constant<int, 3>{});
      case 4:
        return with_terms(std::integral_constant<int, 4>{});
      case 8:
        return with_terms(std::integral_constant<int, 8>{});
    }
  }

 private:
  // `whole`: all columns of the strip exist.
  template <int terms, bool whole>
  void pack_terms(int64_t column, int64_t columns, int64_t lane, int64_t count, T* to, int64_t to_stride) const {
    // Two sums at a time: both vectors of a strip, or both halves of the pairs of one.
    constexpr int64_t per = kPerLane<In>, step_of_vector = per == 2 ? 1 : kTileVectors;
    static_assert(kTileVectors == 2);
    const In* f = F + column + lane * per * F_s;
    int64_t steps = q - lane * per;
    for (int64_t l = 0; l < count; ++l, to += kStrip<T>, f += per * F_s, steps -= per) {
      for (int64_t v = 0; v < kTileVectors; v += step_of_vector) {
        const auto vector = [&](int64_t i, int64_t h) {
          const int64_t c = (per == 2 ? v : h) * kLanes<T>, s = per == 2 ? h : 0;
          if (s >= steps || (!whole && c >= columns)) return Vec<T>{};
          const In* at = f + i * F_i + s * F_s + c;
          // The lines are far apart, each in a page of its own.
          __builtin_prefetch(at + 4 * per * F_s);
          return whole ? load(at) : load_some(at, columns - c);
        };
        Vec<T> held[terms][2];
#pragma GCC unroll 8
        for (int i = 0; i < terms; ++i)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) held[i][h] = vector(i, h);
        const T* u = U;
        T* packed = to + v * kLanes<T>;
        for (int64_t r = 0; r < R; ++r, u += terms, packed += to_stride) {
          Vec<T> total[2] = {};
#pragma GCC unroll 8
          for (int i = 0; i < terms; ++i)
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) total[h] += splat(u[i]) * held[i][h];
          if constexpr (per == 1) {
            store(packed, total[0]);
            store(packed + kLanes<T>, total[1]);
          } else {
#if defined(__AVX512BF16__)
            store(packed, bf16_pairs(total[0], total[1]));
#endif
          }
        }
      }
    }
  }
};

}  // namespace

}  // namespace phydi
