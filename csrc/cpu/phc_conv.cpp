// The pieces that phydi_kernels/kernels/phc_conv.py puts around torch's convolutions.
#include "blocks.h"
#include "split.h"

namespace phydi {
namespace {

template <class In>
void form(const Algebra& algebra, const Weights& weights, void* H, const Threads& threads) {
  using T = Compute<In>;
  const T* A = static_cast<const T*>(algebra.data);
  const int64_t n = algebra.n, P = algebra.P, Q = algebra.Q, p = weights.p, q = weights.q;
  parallel(threads, P * p, [&](int64_t row) {
    const int64_t k = row / p, r = row % p;
    const In* F = static_cast<const In*>(weights.data) + r * weights.stride_r;
    In* to = static_cast<In*>(H) + row * Q * q;
    for (int64_t l = 0; l < Q; ++l) combine(F, weights.stride_i, A + k * Q + l, P * Q, n, to + l * q, q);
  });
}

template <class In>
void split(const void* G, const Algebra& algebra, const Weights& weights, void* dA, void* dF, const Threads& threads) {
  using T = Compute<In>;
  const int64_t n = algebra.n, P = algebra.P, Q = algebra.Q, p = weights.p, q = weights.q;
  T* to = static_cast<T*>(dA);
  std::fill(to, to + n * P * Q, T(0));
  const Split<In, In, T> gradient{static_cast<const T*>(algebra.data),
                                  n,
                                  P,
                                  Q,
                                  static_cast<const In*>(weights.data),
                                  weights.stride_i,
                                  weights.stride_r,
                                  static_cast<const In*>(G),
                                  p * Q * q,
                                  Q * q,
                                  q,
                                  static_cast<T*>(dF),
                                  p * q,
                                  q};
  split_all(gradient, p, q, to, threads);
}

template <class In>
void mix_blocks(int64_t B, int64_t C, int64_t inner, const void* x, const Algebra& algebra, void* out,
                const Threads& threads) {
  using T = Compute<In>;
  const T* A = static_cast<const T*>(algebra.data);
  const int64_t n = algebra.n, P = algebra.P, Q = algebra.Q;
  // Q pieces of the input stay in L1 for all P * n results.
  const int64_t chunk = std::max<int64_t>(64, 4096 / Q / 64 * 64), chunks = ceil_div(inner, chunk);
  const int64_t pieces = B * C * chunks, tasks = std::min(pieces, threads.count * 4);
  parallel(threads, tasks, [&](int64_t task) {
    for (int64_t piece = pieces * task / tasks; piece < pieces * (task + 1) / tasks; ++piece) {
      const int64_t bc = piece / chunks, s = piece % chunks * chunk, some = std::min(chunk, inner - s);
      const In* from = static_cast<const In*>(x) + bc * Q * inner + s;
      for (int64_t k = 0; k < P; ++k) {
        for (int64_t i = 0; i < n; ++i) {
          In* to = static_cast<In*>(out) + (((bc / C * P + k) * C + bc % C) * n + i) * inner + s;
          combine(from, inner, A + (i * P + k) * Q, 1, Q, to, some);
        }
      }
    }
  });
}

template <class T>
std::vector<T*> typed(void* const* pointers, int64_t count) {
  std::vector<T*> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = static_cast<T*>(pointers[i]);
  return result;
}

template <class In>
void pre_add_blocks(const Image& x, const Matrix& W, void* out, const Threads& threads) {
  const int64_t rows = x.images * x.pixels, q = x.channels / W.columns, tasks = threads.count * 4;
  const PreAdd<In, In> add(x, W, static_cast<In*>(out), rows * q, q);
  if (!x.planes) {
    each_range(rows, 64, tasks, threads,
               [&](int64_t, int64_t first, int64_t count) { add.rows(first, count, first * q); });
    return;
  }
  using T = Compute<In>;
  const Scratch<T> scratch(tasks * add.scratch_size());
  each_tile<T>(x.images, x.pixels, q, tasks, threads, [&](int64_t task, const Tile& t) {
    add.tile(t, scratch.get() + task * add.scratch_size(),
             [&](const auto& write) { write(0, t.pixels, (t.image * x.pixels + t.pixel) * q); });
  });
}

template <class In>
void post_add_blocks(const Image& y, void* const* parts, const Matrix& V, const ChannelEpilogue& e,
                     const Threads& threads) {
  const int64_t rows = y.images * y.pixels, p = y.channels / V.columns, tasks = threads.count * 4;
  const auto inputs = typed<const In>(parts, V.rows);
  const PostAdd<In, In> add(y, V, inputs.data(), p, e);
  if (!y.planes) {
    each_range(rows, 64, tasks, threads,
               [&](int64_t, int64_t first, int64_t count) { add.rows(first, count, first * p); });
    return;
  }
  using T = Compute<In>;
  const Scratch<T> scratch(tasks * add.scratch_size());
  each_tile<T>(y.images, y.pixels, p, tasks, threads, [&](int64_t task, const Tile& t) {
    add.tile(t, (t.image * y.pixels + t.pixel) * p, scratch.get() + task * add.scratch_size());
  });
}

template <class In>
void dot_blocks(const Image& x, void* const* parts, int64_t R, int64_t Q, void* out, const Threads& threads) {
  using T = Compute<In>;
  const int64_t q = x.channels / Q, rows = x.images * x.pixels;
  const In* from = static_cast<const In*>(x.data);
  const auto terms = typed<const In>(parts, R);
  // Shares depend on shapes only, so that the result does not depend on the threads.
  constexpr int64_t kShares = 32;
  const Scratch<Vec<T>> partial(kShares * R * Q);
  std::fill(partial.get(), partial.get() + kShares * R * Q, Vec<T>{});
  if (!x.planes) {
    const auto inputs = block_pointers(from, Q, q);
    const int64_t some = std::clamp<int64_t>(8192 / ((Q + R) * q), 1, 64);
    each_range(rows, some, kShares, threads, [&](int64_t task, int64_t first, int64_t count) {
      add_products<In, In>(count, q, {inputs.data(), Q, first * Q * q, Q * q}, {terms.data(), R, first * q, q},
                           partial.get() + task * R * Q);
    });
  } else {
    const int64_t size = kTilePixels * kLanes<T>;
    const Scratch<T> scratch(kShares * Q * size);
    each_tile<T>(x.images, x.pixels, q, kShares, threads, [&](int64_t task, const Tile& t) {
      T* mine = scratch.get() + task * Q * size;
      for (int64_t l = 0; l < Q; ++l)
        tile_to_rows(from + (t.image * x.channels + l * q + t.channel) * x.pixels + t.pixel, x.pixels, t.pixels,
                     t.channels, mine + l * size);
      const auto inputs = block_pointers(static_cast<const T*>(mine), Q, size);
      const int64_t offset = (t.image * x.pixels + t.pixel) * q + t.channel;
      add_products<T, In>(t.pixels, t.channels, {inputs.data(), Q, 0, kLanes<T>}, {terms.data(), R, offset, q},
                          partial.get() + task * R * Q);
    });
  }
  T* dots = static_cast<T*>(out);
  std::fill(dots, dots + R * Q, T(0));
  add_shares<T>(partial.get(), kShares, R * Q, dots);
}

template <class In>
void finish_all(const Image& y, const ChannelEpilogue& e, const Threads& threads) {
  using T = Compute<In>;
  In* to = static_cast<In*>(y.data);
  const Finish<In> finish(e);
  const int64_t lines = y.images * (y.planes ? y.channels : y.pixels), length = y.planes ? y.pixels : y.channels;
  each_range(lines, ceil_div(1 << 12, length), threads.count * 4, threads, [&](int64_t, int64_t first, int64_t count) {
    for (int64_t line = first; line < first + count; ++line) {
      for (int64_t j = 0; j < length; j += kLanes<T>) {
        const int64_t at = line * length + j, some = length - j;
        const Vec<T> h = load_some(to + at, some);
        store_some(
            to + at,
            y.planes ? finish.along_pixels(h, line % y.channels, at, some) : finish.along_channels(h, j, at, some),
            some);
      }
    }
  });
}

}  // namespace

namespace PHYDI_ISA {

void kron_sum(DType dtype, const Algebra& A, const Weights& F, void* H, const Threads& threads) {
  with_type(dtype, [&](auto type) { form<decltype(type)>(A, F, H, threads); });
}

void kron_sum_grad(DType dtype, const void* G, const Algebra& A, const Weights& F, void* dA, void* dF,
                   const Threads& threads) {
  with_type(dtype, [&](auto type) { split<decltype(type)>(G, A, F, dA, dF, threads); });
}

void mix(DType dtype, int64_t B, int64_t C, int64_t inner, const void* x, const Algebra& A, void* out,
         const Threads& threads) {
  with_type(dtype, [&](auto type) { mix_blocks<decltype(type)>(B, C, inner, x, A, out, threads); });
}

void pre_add(DType dtype, const Image& x, const Matrix& W, void* out, const Threads& threads) {
  with_type(dtype, [&](auto type) { pre_add_blocks<decltype(type)>(x, W, out, threads); });
}

void post_add(DType dtype, const Image& y, void* const* parts, const Matrix& V, const ChannelEpilogue& e,
              const Threads& threads) {
  with_type(dtype, [&](auto type) { post_add_blocks<decltype(type)>(y, parts, V, e, threads); });
}

void block_dots(DType dtype, const Image& x, void* const* parts, int64_t R, int64_t Q, void* out,
                const Threads& threads) {
  with_type(dtype, [&](auto type) { dot_blocks<decltype(type)>(x, parts, R, Q, out, threads); });
}

void epilogue(DType dtype, const Image& y, const ChannelEpilogue& e, const Threads& threads) {
  with_type(dtype, [&](auto type) { finish_all<decltype(type)>(y, e, threads); });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
