// Images in blocks of channels: the additions before and after the convolutions of a factored layer.
#pragma once

#include <type_traits>
#include <vector>

#include "dots.h"

namespace phydi {
namespace {

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

// Calls tile(Tile) for tiles of the pixels [first, last) of one image.
template <class T, class Fn>
void tiles_between(int64_t image, int64_t first, int64_t last, int64_t channels, const Fn& fn) {
  for (int64_t pixel = first; pixel < last; pixel += kTilePixels)
    for (int64_t channel = 0; channel < channels; channel += kLanes<T>)
      fn(Tile{image, pixel, std::min(kTilePixels, last - pixel), channel,
              std::min<int64_t>(kLanes<T>, channels - channel)});
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

// x-hat_r = sum_l W[r,l] x_l, written to results_r; x_l is block l of the channels of an image.
template <class In, class Out>
struct PreAdd {
  using T = Compute<In>;
  const Image& x;
  const T* W;
  int64_t R, Q, q;
  const In* from;
  std::vector<const In*> blocks;
  std::vector<Out*> results;
  int64_t stride;  // of the results of one pixel

  PreAdd(const Image& image, const Matrix& weights, Out* out, int64_t size, int64_t stride_)
      : x(image),
        W(static_cast<const T*>(weights.data)),
        R(weights.rows),
        Q(weights.columns),
        q(image.channels / Q),
        from(static_cast<const In*>(image.data)),
        blocks(block_pointers(from, Q, q)),
        results(block_pointers(out, R, size)),
        stride(stride_) {}

  // Pixels [first, first + count) of all images, in channels_last, from entry `to` of the results on.
  void rows(int64_t first, int64_t count, int64_t to) const {
    const Combination<In, Out> mix{W, Q, Q, 1, blocks.data(), Q * q, results.data(), stride};
    mix.run(R, count, q, first * Q * q, to, kPlain);
  }

  // Entries of the scratch memory for a tile.
  int64_t scratch_size() const { return x.planes ? Q * kTilePixels * kLanes<T> : 0; }

  // A tile of planes, turned into rows in `scratch`; rows(write) calls write(first, count, to) for pixels of the tile.
  template <class Rows>
  void tile(const Tile& t, T* scratch, const Rows& rows) const {
    constexpr int64_t size = kTilePixels * kLanes<T>;
    for (int64_t l = 0; l < Q; ++l)
      tile_to_rows(from + (t.image * x.channels + l * q + t.channel) * x.pixels + t.pixel, x.pixels, t.pixels,
                   t.channels, scratch + l * size);
    const auto inputs = block_pointers(static_cast<const T*>(scratch), Q, size);
    const Combination<T, Out> mix{W, Q, Q, 1, inputs.data(), kLanes<T>, results.data(), stride};
    rows([&](int64_t first, int64_t count, int64_t to) {
      mix.run(R, count, t.channels, first * kLanes<T>, to + t.channel, kPlain);
    });
  }
};

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

// y_k = sum_r V[r,k] parts_r and the epilogue; y_k is block k of the channels of an image.
template <class In, class Part>
struct PostAdd {
  using T = Compute<In>;
  const Image& y;
  const T* V;
  int64_t R, P, p;
  const Part* const* parts;
  int64_t stride;  // of the parts of one pixel
  In* to;
  std::vector<In*> blocks;
  Finish<In> finish;

  PostAdd(const Image& image, const Matrix& weights, const Part* const* parts_, int64_t stride_,
          const ChannelEpilogue& e)
      : y(image),
        V(static_cast<const T*>(weights.data)),
        R(weights.rows),
        P(weights.columns),
        p(image.channels / P),
        parts(parts_),
        stride(stride_),
        to(static_cast<In*>(image.data)),
        blocks(block_pointers(to, P, p)),
        finish(e) {}

  // Pixels [first, first + count) of all images, in channels_last, from entry `from` of the parts on.
  void rows(int64_t first, int64_t count, int64_t from) const {
    const Combination<Part, In> sum{V, R, 1, P, parts, stride, blocks.data(), P * p};
    sum.run(P, count, p, from, first * P * p, [&](int64_t k, int64_t m, int64_t s, int64_t some, Vec<T> h) {
      const int64_t channel = k * p + s;
      return finish.along_channels(h, channel, (first + m) * P * p + channel, some);
    });
  }

  // Entries of the scratch memory for a tile.
  int64_t scratch_size() const { return y.planes ? P * kTilePixels * kLanes<T> : 0; }

  // A tile of planes, from entry `from` of the parts on, the first channel of its pixels.
  void tile(const Tile& t, int64_t from, T* scratch) const {
    constexpr int64_t size = kTilePixels * kLanes<T>;
    const auto results = block_pointers(scratch, P, size);
    const Combination<Part, T> sum{V, R, 1, P, parts, stride, results.data(), kLanes<T>};
    sum.run(P, t.pixels, t.channels, from + t.channel, 0, kPlain);
    for (int64_t k = 0; k < P; ++k) {
      for (int64_t j = 0; j < t.pixels; j += kLanes<T>) {
        Vec<T> lines[kLanes<T>];
        for (int64_t i = 0; i < kLanes<T>; ++i) lines[i] = load(scratch + k * size + (j + i) * kLanes<T>);
        transpose<T>(lines);
        for (int64_t c = 0; c < t.channels; ++c) {
          const int64_t channel = k * p + t.channel + c, some = t.pixels - j;
          const int64_t at = (t.image * y.channels + channel) * y.pixels + t.pixel + j;
          store_some(to + at, finish.along_pixels(lines[c], channel, at, some), some);
        }
      }
    }
  }
};

}  // namespace

}  // namespace phydi
