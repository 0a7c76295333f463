// The pieces that phydi_kernels/kernels/phc_conv.py puts around torch's convolutions.
#include <type_traits>
#include <vector>

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

// out_t[m, s] = finish(t, m, s, sum_u C[t,u] in_u[m, s]) on `rows` rows of `width` entries.
template <class In, class Out>
struct Combination {
  using T = Compute<In>;
  const T* C;
  int64_t inputs, C_t, C_u;
  const In* const* in;
  int64_t in_stride;
  Out* const* out;
  int64_t out_stride;

  // Results [first, first + count), each input read once for all of them.
  template <int count, class Finish>
  void chunk(int64_t first, int64_t rows, int64_t width, int64_t in_offset, int64_t out_offset,
             const Finish& finish) const {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t s = 0; s < width; s += kLanes<T>) {
        const int64_t some = width - s;
        Vec<T> total[count] = {};
        for (int64_t u = 0; u < inputs; ++u) {
          const Vec<T> v = load_some(in[u] + in_offset + m * in_stride + s, some);
#pragma GCC unroll 8
          for (int t = 0; t < count; ++t) total[t] += C[(first + t) * C_t + u * C_u] * v;
        }
#pragma GCC unroll 8
        for (int t = 0; t < count; ++t)
          store_some(out[first + t] + out_offset + m * out_stride + s, finish(first + t, m, s, some, total[t]), some);
      }
    }
  }

  template <class Finish>
  void run(int64_t results, int64_t rows, int64_t width, int64_t in_offset, int64_t out_offset,
           const Finish& finish) const {
    const auto some = [&](auto count, int64_t first) {
      chunk<decltype(count)::value>(first, rows, width, in_offset, out_offset, finish);
    };
    int64_t t = 0;
    for (; t + 8 <= results; t += 8) some(std::integral_constant<int, 8>{}, t);
    switch (results - t) {
      case 7:
        return some(std::integral_constant<int, 7>{}, t);
      case 6:
        return some(std::integral_constant<int, 6>{}, t);
      case 5:
        return some(std::integral_constant<int, 5>{}, t);
      case 4:
        return some(std::integral_constant<int, 4>{}, t);
      case 3:
        return some(std::integral_constant<int, 3>{}, t);
      case 2:
        return some(std::integral_constant<int, 2>{}, t);
      case 1:
        return some(std::integral_constant<int, 1>{}, t);
    }
  }
};

// The combination as it is.
constexpr auto kPlain = [](int64_t, int64_t, int64_t, int64_t, auto total) { return total; };

// Where the blocks of channels of an image are planes, a tile of kTilePixels positions by kLanes channels is transposed
// in cache. Tiles of one task follow each other in memory.
constexpr int64_t kTilePixels = 64;

struct Tile {
  int64_t image, pixel, pixels, channel, channels;
};

// Calls tile(Tile) for all tiles of `images` images whose blocks have `channels` channels, in tasks on all threads.
template <class T, class Fn>
void each_tile(int64_t images, int64_t pixels, int64_t channels, int64_t tasks, const Threads& threads, const Fn& fn) {
  const int64_t across = ceil_div(pixels, kTilePixels), down = ceil_div(channels, int64_t(kLanes<T>));
  const int64_t tiles = images * across * down;
  tasks = std::min(tasks, tiles);
  parallel(threads, tasks, [&](int64_t task) {
    for (int64_t tile = tiles * task / tasks; tile < tiles * (task + 1) / tasks; ++tile) {
      const int64_t pixel = tile / down % across * kTilePixels, channel = tile % down * kLanes<T>;
      fn(task, Tile{tile / down / across, pixel, std::min(kTilePixels, pixels - pixel), channel,
                    std::min<int64_t>(kLanes<T>, channels - channel)});
    }
  });
}

// Calls fn(task, first, count) for ranges of rows.
template <class Fn>
void each_range(int64_t rows, int64_t most, int64_t tasks, const Threads& threads, const Fn& fn) {
  const int64_t ranges = ceil_div(rows, most);
  tasks = std::min(tasks, ranges);
  parallel(threads, tasks, [&](int64_t task) {
    for (int64_t range = ranges * task / tasks; range < ranges * (task + 1) / tasks; ++range)
      fn(task, range * most, std::min(most, rows - range * most));
  });
}

// rows[j][c] = planes[c * stride + j] for j < pixels, c < channels; rows of kLanes entries, those beyond zero.
template <class In>
void tile_to_rows(const In* planes, int64_t stride, int64_t pixels, int64_t channels, Compute<In>* rows) {
  using T = Compute<In>;
  for (int64_t j = 0; j < pixels; j += kLanes<T>) {
    Vec<T> lines[kLanes<T>] = {};
    for (int64_t c = 0; c < channels; ++c) lines[c] = load_some(planes + c * stride + j, pixels - j);
    transpose<T>(lines);
    for (int64_t i = 0; i < kLanes<T>; ++i) store(rows + (j + i) * kLanes<T>, lines[i]);
  }
}

template <class T>
std::vector<T*> typed(void* const* pointers, int64_t count) {
  std::vector<T*> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = static_cast<T*>(pointers[i]);
  return result;
}

template <class In>
void pre_add_blocks(const Image& x, const Matrix& W, void* out, const Threads& threads) {
  using T = Compute<In>;
  const int64_t R = W.rows, Q = W.columns, q = x.channels / Q, rows = x.images * x.pixels;
  const T* coefficients = static_cast<const T*>(W.data);
  const In* from = static_cast<const In*>(x.data);
  const auto results = block_pointers(static_cast<In*>(out), R, rows * q);
  if (!x.planes) {
    const auto inputs = block_pointers(from, Q, q);
    const Combination<In, In> mix{coefficients, Q, Q, 1, inputs.data(), Q * q, results.data(), q};
    each_range(rows, 64, threads.count * 4, threads,
               [&](int64_t, int64_t first, int64_t count) { mix.run(R, count, q, first * Q * q, first * q, kPlain); });
    return;
  }
  const int64_t tasks = threads.count * 4, size = kTilePixels * kLanes<T>;
  const Scratch<T> scratch(tasks * Q * size);
  each_tile<T>(x.images, x.pixels, q, tasks, threads, [&](int64_t task, const Tile& t) {
    T* mine = scratch.get() + task * Q * size;
    for (int64_t l = 0; l < Q; ++l)
      tile_to_rows(from + (t.image * x.channels + l * q + t.channel) * x.pixels + t.pixel, x.pixels, t.pixels,
                   t.channels, mine + l * size);
    const auto inputs = block_pointers(static_cast<const T*>(mine), Q, size);
    const Combination<T, In> mix{coefficients, Q, Q, 1, inputs.data(), kLanes<T>, results.data(), q};
    mix.run(R, t.pixels, t.channels, 0, (t.image * x.pixels + t.pixel) * q + t.channel, kPlain);
  });
}

// The epilogue of one vector of `some` entries, at entry `at` of the result.
template <class In>
struct Finish {
  using T = Compute<In>;
  const T *bias, *alpha;
  bool one_alpha, relu;
  const In* residual;

  explicit Finish(const ChannelEpilogue& e)
      : bias(static_cast<const T*>(e.bias)),
        alpha(static_cast<const T*>(e.alpha)),
        one_alpha(e.one_alpha),
        relu(e.relu),
        residual(static_cast<const In*>(e.residual)) {}

  Vec<T> along_channels(Vec<T> h, int64_t channel, int64_t at, int64_t some) const {
    if (bias) h += load_some(bias + channel, some);
    if (relu) h = rectified<T>(h);
    if (alpha) h *= one_alpha ? splat(*alpha) : load_some(alpha + channel, some);
    return residual ? h + load_some(residual + at, some) : h;
  }

  Vec<T> along_pixels(Vec<T> h, int64_t channel, int64_t at, int64_t some) const {
    if (bias) h += bias[channel];
    if (relu) h = rectified<T>(h);
    if (alpha) h *= alpha[one_alpha ? 0 : channel];
    return residual ? h + load_some(residual + at, some) : h;
  }
};

template <class In>
void post_add_blocks(const Image& y, void* const* parts, const Matrix& V, const ChannelEpilogue& e,
                     const Threads& threads) {
  using T = Compute<In>;
  const int64_t R = V.rows, P = V.columns, p = y.channels / P, rows = y.images * y.pixels;
  const T* coefficients = static_cast<const T*>(V.data);
  const auto inputs = typed<const In>(parts, R);
  In* to = static_cast<In*>(y.data);
  const Finish<In> finish(e);
  if (!y.planes) {
    const auto results = block_pointers(to, P, p);
    const Combination<In, In> sum{coefficients, R, 1, P, inputs.data(), p, results.data(), P * p};
    each_range(rows, 64, threads.count * 4, threads, [&](int64_t, int64_t first, int64_t count) {
      sum.run(P, count, p, first * p, first * P * p, [&](int64_t k, int64_t m, int64_t s, int64_t some, Vec<T> h) {
        const int64_t channel = k * p + s;
        return finish.along_channels(h, channel, (first + m) * P * p + channel, some);
      });
    });
    return;
  }
  const int64_t tasks = threads.count * 4, size = kTilePixels * kLanes<T>;
  const Scratch<T> scratch(tasks * P * size);
  each_tile<T>(y.images, y.pixels, p, tasks, threads, [&](int64_t task, const Tile& t) {
    T* mine = scratch.get() + task * P * size;
    const auto results = block_pointers(mine, P, size);
    const Combination<In, T> sum{coefficients, R, 1, P, inputs.data(), p, results.data(), kLanes<T>};
    sum.run(P, t.pixels, t.channels, (t.image * y.pixels + t.pixel) * p + t.channel, 0, kPlain);
    for (int64_t k = 0; k < P; ++k) {
      for (int64_t j = 0; j < t.pixels; j += kLanes<T>) {
        Vec<T> lines[kLanes<T>];
        for (int64_t i = 0; i < kLanes<T>; ++i) lines[i] = load(mine + k * size + (j + i) * kLanes<T>);
        transpose<T>(lines);
        for (int64_t c = 0; c < t.channels; ++c) {
          const int64_t channel = k * p + t.channel + c, some = t.pixels - j;
          const int64_t at = (t.image * y.channels + channel) * y.pixels + t.pixel + j;
          store_some(to + at, finish.along_pixels(lines[c], channel, at, some), some);
        }
      }
    }
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
