// phm_linear_weight_grad: (dA, dF) of <grad, H x>.
#include "linear.h"
#include "outer.h"
#include "split.h"

namespace phydi {
namespace {

// u += g f and d = sum_m g_m mixed_m for one vector f of F, beside `rows` rows of the others; `whole`: all its entries
// exist, else `some` of them do.
template <bool whole, class In>
void stream_vector(int64_t rows, const In* f, const Compute<In>* g, int64_t g_step, const Compute<In>* mixed,
                   Compute<In>* u, int64_t step, int64_t some, In* d) {
  using T = Compute<In>;
  const auto from = [some](const auto* at) { return whole ? load(at) : load_some(at, some); };
  const auto to = [some](auto* at, Vec<T> v) { whole ? store(at, v) : store_some(at, v, some); };
  const Vec<T> w = from(f);
  Vec<T> total{};
  for (int64_t m = 0; m < rows; ++m, g += g_step, mixed += step, u += step) {
    const Vec<T> gm = splat(*g);
    to(u, from(u) + gm * w);
    total += gm * from(mixed);
  }
  to(d, total);
}

// Few rows: F is read and dF written once, term by term, beside the mixed input and
//   u[b,k,i,s] = sum_r grad[b,k,r] F[i,r,s];    dF[i,r,s] = sum_bk grad[b,k,r] mixed[b,k,i,s],
//   dA[i,k,l] = sum_bs u[b,k,i,s] x[b,l,s].
template <class In>
void stream_weight_grad(int64_t batch, const Linear<In>& op, const In* grad, int64_t grad_stride, Compute<In>* dA,
                        In* dF, const Threads& threads) {
  using T = Compute<In>;
  const int64_t rows = batch * op.P, P = op.P, Q = op.Q, p = op.p, q = op.q;
  parallel(threads, op.n, [&](int64_t i) {
    const Scratch<T> mixed(rows * q), u(rows * q), g(rows * p);
    std::fill(u.get(), u.get() + rows * q, T(0));
    for (int64_t m = 0; m < rows; ++m) {
      op.mix(m / P, m % P, i, 0, q, mixed.get() + m * q);
      copy_row(grad + m / P * grad_stride + m % P * p, g.get() + m * p, p);
    }
    for (int64_t r = 0; r < p; ++r) {
      const In* f = op.F + i * op.F_i + r * op.F_r;
      In* d = dF + (i * p + r) * q;
      int64_t s = 0;
      for (; s + kLanes<T> <= q; s += kLanes<T>)
        stream_vector<true>(rows, f + s, g.get() + r, p, mixed.get() + s, u.get() + s, q, kLanes<T>, d + s);
      if (s < q) stream_vector<false>(rows, f + s, g.get() + r, p, mixed.get() + s, u.get() + s, q, q - s, d + s);
    }
    for (int64_t k = 0; k < P; ++k) {
      for (int64_t l = 0; l < Q; ++l) {
        Vec<T> total{};
        for (int64_t b = 0; b < batch; ++b) {
          const T* ub = u.get() + (b * P + k) * q;
          const In* xb = op.x + b * op.x_stride + l * q;
          for (int64_t s = 0; s < q; s += kLanes<T>) total += load_some(ub + s, q - s) * load_some(xb + s, q - s);
        }
        dA[(i * P + k) * Q + l] = sum<T>(total);
      }
    }
  });
}

template <class In>
void run(Plan plan, int64_t batch, Rows grad, Rows x, const Algebra& algebra, const Weights& weights, void* dA,
         void* dF, const Threads& threads) {
  using T = Compute<In>;
  const T* A = static_cast<const T*>(algebra.data);
  const int64_t n = algebra.n, P = algebra.P, Q = algebra.Q, p = weights.p, q = weights.q;
  const In* g = static_cast<const In*>(grad.data);
  const In* xs = static_cast<const In*>(x.data);
  const In* F = static_cast<const In*>(weights.data);
  if (plan == Plan::stream)
    return stream_weight_grad<In>(batch, Linear<In>(x, algebra, weights), g, grad.stride, static_cast<T*>(dA),
                                  static_cast<In*>(dF), threads);
  const int64_t rows = P * p;  // of G
  std::fill(static_cast<T*>(dA), static_cast<T*>(dA) + n * P * Q, T(0));

  // Columns [s, s + width) of every block l at a time: G's panel stays within 1/n of H, the packed input within
  // kPackBytes.
  const int64_t share = std::max<int64_t>(kPackBytes, rows * Q * q * int64_t(sizeof(In)) / n) / int64_t(sizeof(T));
  const int64_t most = std::min(share / (rows * Q), kPackBytes / (Q * kDepth<T> * int64_t(sizeof(T))));
  const int64_t width = std::min(q, std::max<int64_t>(most / kStrip<T> * kStrip<T>, kStrip<T>));
  const int64_t strips_most = ceil_div(Q * width, kStrip<T>);
  const Scratch<T> G(round_up(rows, kRows<In>) * strips_most * kStrip<T>);
  const Scratch<T> scratch(strips_most * kStrip<T> * kDepth<T>);

  for (int64_t s = 0; s < q; s += width) {
    const int64_t some = std::min(width, q - s);
    const int64_t columns = Q * some, stride = round_up(columns, kStrip<T>);
    const auto piece = [](const In* data, int64_t row_stride, int64_t b, int64_t first, int64_t count) {
      const In* row = data + b * row_stride + first;
      prefetch(row + 16 * row_stride, count);
      return row;
    };
    const auto rows_of_grad = [&](int64_t b, int64_t first, int64_t count, In*) {
      return piece(g, grad.stride, b, first, count);
    };
    const auto columns_of_x = [&](int64_t b, int64_t, int64_t, In* to) {
      if (some == q) return piece(xs, x.stride, b, 0, Q * q);
      for (int64_t l = 0; l < Q; ++l) std::copy_n(piece(xs, x.stride, b, l * q + s, some), some, to + l * some);
      return static_cast<const In*>(to);
    };
    outer_product<In>(batch, rows, columns, rows_of_grad, columns_of_x, scratch, G.get(), stride, true, threads);
    const Split<In, T, In> split{A,
                                 n,
                                 P,
                                 Q,
                                 F + s,
                                 weights.stride_i,
                                 weights.stride_r,
                                 G.get(),
                                 p * stride,
                                 stride,
                                 some,
                                 static_cast<In*>(dF) + s,
                                 p * q,
                                 q};
    split_all(split, p, some, static_cast<T*>(dA), threads);
  }
}

}  // namespace

namespace PHYDI_ISA {

void phm_linear_weight_grad(DType dtype, Plan plan, int64_t rows, Rows grad, Rows x, const Algebra& A, const Weights& F,
                            void* dA, void* dF, const Threads& threads) {
  with_type(dtype, [&](auto type) { run<decltype(type)>(plan, rows, grad, x, A, F, dA, dF, threads); });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
