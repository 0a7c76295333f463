// The operands of phm_linear, and their packing, which applies the algebra on the way: neither H nor the mixed input
// ever exists outside a cache-sized block.
#pragma once

#include "product.h"

namespace phydi {
namespace {

template <class In>
struct Linear {
  using T = Compute<In>;
  const In* x;
  int64_t x_stride;
  const T* A;
  int64_t n, P, Q;
  const In* F;
  int64_t p, q, F_i, F_r, F_s;

  Linear(Rows rows, const Algebra& a, const Weights& f)
      : x(static_cast<const In*>(rows.data)),
        x_stride(rows.stride),
        A(static_cast<const T*>(a.data)),
        n(a.n),
        P(a.P),
        Q(a.Q),
        F(static_cast<const In*>(f.data)),
        p(f.p),
        q(f.q),
        F_i(f.stride_i),
        F_r(f.stride_r),
        F_s(f.stride_s) {}

  // Term i of row (b, k) of the mixed input, entries [s, s + count): sum_l A[i,k,l] x[b,l,s].
  template <class Out>
  void mix(int64_t b, int64_t k, int64_t i, int64_t s, int64_t count, Out* out) const {
    combine(x + b * x_stride + s, q, A + (i * P + k) * Q, 1, Q, out, count);
  }

  // Lanes of one segment (term i of the mixed input, or input block l).
  int64_t lanes_of_segment() const { return ceil_div(q, kPerLane<In>); }

  // Writes `count` lanes from `first` on, a segment at a time: piece(segment, s, steps, out) fills `steps` entries.
  template <class Out, class Piece>
  void by_segment(int64_t first, int64_t count, Out* out, const Piece& piece) const {
    constexpr int64_t per = kPerLane<In>;
    const int64_t length = lanes_of_segment();
    int64_t segment = first == 0 ? 0 : first / length, lane = first - segment * length;
    for (; count > 0; ++segment, lane = 0) {
      const int64_t run = std::min(count, length - lane);
      const int64_t steps = std::min(run * per, q - lane * per);
      piece(segment, lane * per, steps, out);
      if (steps < run * per) out[steps] = Out{};
      out += run * per;
      count -= run;
    }
  }

  // Row (b, k) of the mixed input, lanes over (i, s).
  template <class Out>
  void mixed_row(int64_t row, int64_t first, int64_t count, Out* out) const {
    const int64_t b = row / P, k = row - b * P;
    by_segment(first, count, out, [&](int64_t i, int64_t s, int64_t steps, Out* to) { mix(b, k, i, s, steps, to); });
  }

  // Row b of the input itself, lanes over (l, s).
  template <class Out>
  void plain_row(int64_t row, int64_t first, int64_t count, Out* out) const {
    const In* xb = x + row * x_stride;
    // Blocks follow each other without a gap where a lane holds one entry.
    if constexpr (kPerLane<In> == 1) return copy_row(xb + first, out, count);
    by_segment(first, count, out,
               [&](int64_t l, int64_t s, int64_t steps, Out* to) { copy_row(xb + l * q + s, to, steps); });
  }

  // Vector over s of sum_t weight[t] F[first_term + t, r, s ...] where F has unit stride along s.
  Vec<T> row_of_weights(const T* weight, int64_t terms, int64_t first_term, int64_t r, int64_t s) const {
    Vec<T> total{};
    if (s >= q) return total;
    for (int64_t t = 0; t < terms; ++t)
      total += weight[t * P * Q] * load_some(F + (first_term + t) * F_i + r * F_r + s, q - s);
    return total;
  }

  // All lanes of the weight operand for columns [first, first + columns): out[lane * kStrip + column].
  // panel: column (k, r), lanes over (l, s): sum_i A[i,k,l] F[i,r,s], an entry of H.
  // Otherwise: column r, lanes over (i, s): F[i,r,s].
  template <bool panel>
  void pack_strip(int64_t first, int64_t columns, T* out) const {
    constexpr int64_t lanes = kLanes<T>, per = kPerLane<In>;
    const int64_t segments = panel ? Q : n, length = lanes_of_segment();
    const T one = 1;
    for (int64_t g = 0; g < kStrip<T>; g += lanes) {
      const int64_t width = std::min<int64_t>(std::max<int64_t>(columns - g, 0), lanes);
      for (int64_t segment = 0; segment < segments; ++segment) {
        T* to = out + segment * length * kStrip<T> + g;
        const int64_t terms = panel ? n : 1, first_term = panel ? 0 : segment;
        const int64_t column = first + g;
        const auto weight = [&](int64_t c) { return panel ? A + c / p * Q + segment : &one; };
        if (F_s == 1) {
          for (int64_t lane = 0; lane < length; lane += lanes) {
            Vec<T> rows[lanes] = {};
            for (int64_t c = 0; c < width; ++c) {
              const T* w = weight(column + c);
              const int64_t r = (column + c) % p, s = lane * per;
              rows[c] = row_of_weights(w, terms, first_term, r, s);
              if constexpr (per == 2) {
                bf16 pairs[2 * lanes];
                store(pairs, rows[c]);
                store(pairs + lanes, row_of_weights(w, terms, first_term, r, s + lanes));
                memcpy(&rows[c], pairs, sizeof pairs);
              }
            }
            transpose<T>(rows);
            const int64_t count = std::min<int64_t>(lanes, length - lane);
            for (int64_t j = 0; j < count; ++j) store(to + (lane + j) * kStrip<T>, rows[j]);
          }
        } else {
          for (int64_t lane = 0; lane < length; ++lane) {
            T line[per][lanes] = {};
            for (int64_t h = 0; h < per && lane * per + h < q; ++h) {
              // Columns of one output block k at a time: their r run along the lanes.
              for (int64_t c = 0; c < width;) {
                const int64_t r = (column + c) % p;
                const int64_t run = std::min(width - c, p - r);
                combine_vectors<1>(F + first_term * F_i + r + (lane * per + h) * F_s, F_i, weight(column + c), P * Q,
                                   terms, line[h] + c, run);
                c += run;
              }
            }
            store(to + lane * kStrip<T>, packed<In>(line));
          }
        }
      }
    }
  }
};

}  // namespace

}  // namespace phydi
