// phc_conv_factored for narrow blocks: y_k = sum_r V[r,k] conv(sum_l W[r,l] x_l, F-hat_r), a band of output rows at a
// time. X-hat of a band, with its border of zeros, and Y-hat stay in L2; a register tile holds neighbouring pixels of
// one row and sums over all taps, as in the direct convolution of Georganas et al. (2018).
#include "blocks.h"
#include "lines.h"

namespace phydi {
namespace {

// X-hat and Y-hat of a band.
constexpr int64_t kBandBytes = 768 << 10;

// A register tile: c (M pixels, NV vectors of channels) = sum over taps t of a[offset_t] (M x depth) * b_t (depth x
// NV vectors). Neighbouring pixels are row_stride lanes apart.
template <class In, int M, int NV, int row_stride>
void run_taps(int64_t taps, const int64_t* offsets, int64_t depth, const Compute<In>* a, const Compute<In>* b,
              Compute<In>* c, int64_t c_stride) {
  using T = Compute<In>;
  Vec<T> acc[M][NV] = {};
  for (int64_t t = 0; t < taps; ++t, b += depth * kStrip<T>)
    accumulate<In, row_stride, 1>(acc, depth, a + offsets[t], b);
  store_tile<T>(acc, c, c_stride);
}

template <class T>
using TapsFn = void (*)(int64_t taps, const int64_t* offsets, int64_t depth, const T* a, const T* b, T* c,
                        int64_t c_stride);

template <class In, int NV, int row_stride>
TapsFn<Compute<In>> taps_of_pixels(int64_t pixels) {
  if (pixels > kTileSizes<In>[1]) return run_taps<In, kTileSizes<In>[0], NV, row_stride>;
  if (pixels > kTileSizes<In>[2]) return run_taps<In, kTileSizes<In>[1], NV, row_stride>;
  if (pixels > kTileSizes<In>[3]) return run_taps<In, kTileSizes<In>[2], NV, row_stride>;
  return run_taps<In, kTileSizes<In>[3], NV, row_stride>;
}

template <class In, int row_stride>
TapsFn<Compute<In>> taps_tile(int64_t pixels, int64_t columns) {
  return columns > kLanes<Compute<In>> ? taps_of_pixels<In, 2, row_stride>(pixels)
                                       : taps_of_pixels<In, 1, row_stride>(pixels);
}

// The weights as strips[r][strip][tap][lane][kStrip] of the columns of F-hat_r.
template <class In>
struct TapWeights {
  using T = Compute<In>;
  const In* F;
  const T* U;
  int64_t n, R, p, q, taps;
  int64_t depth = ceil_div(q, kPerLane<In>), across = ceil_div(p, kStrip<T>);

  void pack(T* strips, const Threads& threads) const { U ? pack_lines(strips, threads) : pack_planes(strips, threads); }

 private:
  // F-hat (R, p, q, taps).
  void pack_planes(T* strips, const Threads& threads) const {
    constexpr int64_t per = kPerLane<In>, lanes = kLanes<T>;
    const int64_t size = q * taps;
    parallel(threads, R * across, [&](int64_t index) {
      const int64_t r = index / across, column = index % across * kStrip<T>;
      const int64_t width = std::min<int64_t>(p - column, kStrip<T>);
      const Scratch<T> turned(round_up(size, lanes) * lanes);
      for (int64_t g = 0; g < kStrip<T>; g += lanes) {
        tile_to_rows(F + (r * p + column + g) * size, size, size, std::min(lanes, width - g), turned.get());
        T* to = strips + index * taps * depth * kStrip<T> + g;
        for (int64_t t = 0; t < taps; ++t) {
          for (int64_t lane = 0; lane < depth; ++lane, to += kStrip<T>) {
            T line[per][lanes] = {};
            for (int64_t h = 0; h < per && lane * per + h < q; ++h)
              store(line[h], load(turned.get() + ((lane * per + h) * taps + t) * lanes));
            store(to, packed<In>(line));
          }
        }
      }
    });
  }

  // F (n, taps, q, p) and U.
  void pack_lines(T* strips, const Threads& threads) const {
    parallel(threads, across * taps, [&](int64_t index) {
      const int64_t strip = index / taps, t = index % taps, column = strip * kStrip<T>;
      const Lines<In> lines{F + t * q * p, taps * q * p, p, q, U, R, n};
      lines.pack(column, std::min<int64_t>(p - column, kStrip<T>), 0, depth, strips + index * depth * kStrip<T>,
                 across * taps * depth * kStrip<T>);
    });
  }
};

template <class In, int row_stride>
struct Direct {
  using T = Compute<In>;
  const Image &x, &y;
  const Matrix &W, &V;
  const TapWeights<In>& F_hat;
  const Window& w;
  const ChannelEpilogue& e;

  int64_t R = W.rows, q = F_hat.q, p = F_hat.p, taps = F_hat.taps, depth = F_hat.depth, strips = F_hat.across;
  // Lanes of a pixel of X-hat and of Y-hat.
  int64_t x_pixel = row_stride / w.stride[1], y_pixel = round_up(p, kLanes<T>);
  // Output rows and columns at a time, and the rows and columns of X-hat for them.
  int64_t rows = w.out[0], columns = w.out[1], x_rows = 0, x_columns = 0;

  // Rows (d = 0) or columns (d = 1) of the input that `count` of the output meet, with those of the border.
  int64_t input_size(int d, int64_t count) const {
    return (count - 1) * w.stride[d] + (w.kernel[d] - 1) * w.dilation[d] + 1;
  }

  int64_t bytes() const {
    const int64_t x_lanes = input_size(0, rows) * input_size(1, columns) * x_pixel;
    return R * (x_lanes + rows * columns * y_pixel) * int64_t(sizeof(T));
  }

  // Whole rows, at least one for each thread; parts of one row only where one is too many.
  void choose_band(const Threads& threads) {
    const auto even = [](int64_t size, int64_t most) { return ceil_div(size, ceil_div(size, most)); };
    rows = std::max<int64_t>(1, w.out[0] / ceil_div(threads.count, std::max<int64_t>(1, y.images)));
    while (rows > 1 && bytes() > kBandBytes) --rows;
    rows = even(w.out[0], rows);
    while (columns > kTileRows && bytes() > kBandBytes) columns = ceil_div(columns, 2);
    columns = even(w.out[1], columns);
    x_rows = input_size(0, rows);
    x_columns = input_size(1, columns);
  }

  void run(const Threads& threads) {
    choose_band(threads);
    const int64_t strip_size = taps * depth * kStrip<T>;
    const Scratch<T> weights(R * strips * strip_size);
    F_hat.pack(weights.get(), threads);
    const int64_t down = ceil_div(w.out[0], rows), across = ceil_div(w.out[1], columns);
    const int64_t bands = y.images * down * across, workers = std::min(bands, threads.count);
    // Tiles at the end read and write pixels that do not exist.
    const int64_t x_size = x_rows * x_columns * x_pixel, y_size = rows * columns * y_pixel;
    const int64_t x_all = R * x_size + kTileRows * row_stride, y_all = R * y_size + kTileRows * y_pixel;
    parallel(threads, workers, [&](int64_t worker) {
      const Scratch<T> x_hat(x_all), y_hat(y_all);
      // The lanes beyond q stay zero: nothing is written there.
      std::fill(x_hat.get(), x_hat.get() + x_all, T(0));
      const auto parts = block_pointers(static_cast<const T*>(y_hat.get()), R, y_size);
      const PreAdd<In, Entry<In>> before(x, W, reinterpret_cast<Entry<In>*>(x_hat.get()), x_size * kPerLane<In>,
                                         x_pixel * kPerLane<In>);
      const PostAdd<In, T> after(y, V, parts.data(), y_pixel, e);
      const Scratch<T> turned(std::max(before.scratch_size(), after.scratch_size()));
      for (int64_t band = bands * worker / workers; band < bands * (worker + 1) / workers; ++band) {
        const int64_t image = band / across / down, row = band / across % down * rows, column = band % across * columns;
        const int64_t some_rows = std::min(rows, w.out[0] - row), some_columns = std::min(columns, w.out[1] - column);
        mix(before, image, row * w.stride[0] - w.padding[0], column * w.stride[1] - w.padding[1], x_hat.get(), x_size,
            turned.get());
        convolve(some_rows, some_columns, x_hat.get(), x_size, weights.get(), strip_size, y_hat.get(), y_size);
        // Either whole rows or a part of one: neighbours in memory both ways.
        finish(after, image, row * w.out[1] + column, some_rows * some_columns, turned.get());
      }
    });
  }

  // X-hat of x_rows rows and x_columns columns of an image from (top, left) on, zero outside of the image.
  void mix(const PreAdd<In, Entry<In>>& add, int64_t image, int64_t top, int64_t left, T* x_hat, int64_t x_size,
           T* turned) const {
    const auto inside = [](int64_t first, int64_t count, int64_t size) {
      const int64_t begin = std::clamp<int64_t>(first, 0, size);
      return std::pair(begin, std::clamp(first + count, begin, size));
    };
    const auto [first, last] = inside(top, x_rows, w.in[0]);
    const auto [begin, end] = inside(left, x_columns, w.in[1]);
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t row = 0; row < x_rows; ++row) {
        T* line = x_hat + r * x_size + row * x_columns * x_pixel;
        const bool exists = top + row >= first && top + row < last;
        const int64_t before = exists ? begin - left : x_columns;
        std::fill_n(line, std::clamp<int64_t>(before, 0, x_columns) * x_pixel, T(0));
        if (exists && end - left < x_columns) {
          const int64_t written = std::max<int64_t>(end - left, 0);
          std::fill_n(line + written * x_pixel, (x_columns - written) * x_pixel, T(0));
        }
      }
    }
    const auto place = [&, left = left](int64_t row, int64_t column) {
      return ((row - top) * x_columns + column - left) * x_pixel * kPerLane<In>;
    };
    if (!x.planes) {
      for (int64_t row = first; row < last; ++row)
        add.rows((image * w.in[0] + row) * w.in[1] + begin, end - begin, place(row, begin));
      return;
    }
    // Rows follow each other in a plane: tiles may span several.
    const bool whole = begin == 0 && end == w.in[1];
    for (int64_t row = first; row < last; row = whole ? last : row + 1) {
      const int64_t from = row * w.in[1] + begin, to = whole ? last * w.in[1] : row * w.in[1] + end;
      tiles_between<T>(image, from, to, q, [&](const Tile& t) {
        add.tile(t, turned, [&](const auto& write) {
          for (int64_t j = 0; j < t.pixels;) {
            const int64_t column = (t.pixel + j) % w.in[1], some = std::min(t.pixels - j, w.in[1] - column);
            write(j, some, place((t.pixel + j) / w.in[1], column));
            j += some;
          }
        });
      });
    }
  }

  void convolve(int64_t some_rows, int64_t some_columns, const T* x_hat, int64_t x_size, const T* weights,
                int64_t strip_size, T* y_hat, int64_t y_size) const {
    std::vector<int64_t> offsets(taps);
    for (int64_t t = 0; t < taps; ++t)
      offsets[t] = (t / w.kernel[1] * w.dilation[0] * x_columns + t % w.kernel[1] * w.dilation[1]) * x_pixel;
    const int64_t step = tile_step<In>(some_columns, p > kLanes<T> ? 4 : 8);
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t strip = 0; strip < strips; ++strip) {
        const T* b = weights + (r * strips + strip) * strip_size;
        const int64_t width = p - strip * kStrip<T>;
        // What a tile writes beyond the end of a row is written anew by the next one.
        for (int64_t row = 0; row < some_rows; ++row)
          for (int64_t pixel = 0; pixel < some_columns; pixel += step)
            taps_tile<In, row_stride>(std::min(step, some_columns - pixel), width)(
                taps, offsets.data(), depth,
                x_hat + r * x_size + row * w.stride[0] * x_columns * x_pixel + pixel * row_stride, b,
                y_hat + r * y_size + (row * some_columns + pixel) * y_pixel + strip * kStrip<T>, y_pixel);
      }
    }
  }

  // Pixels [start, start + count) of an image from Y-hat.
  void finish(const PostAdd<In, T>& add, int64_t image, int64_t start, int64_t count, T* turned) const {
    if (!y.planes) return add.rows(image * y.pixels + start, count, 0);
    tiles_between<T>(image, start, start + count, p,
                     [&](const Tile& t) { add.tile(t, (t.pixel - start) * y_pixel, turned); });
  }
};

template <class In>
void direct(const Image& x, const Image& y, const Matrix& W, const Matrix& V, const void* F, const Matrix& U,
            const Window& w, const ChannelEpilogue& e, const Threads& threads) {
  const TapWeights<In> F_hat{static_cast<const In*>(F),
                             static_cast<const Compute<In>*>(U.data),
                             U.columns,
                             W.rows,
                             y.channels / V.columns,
                             x.channels / W.columns,
                             w.kernel[0] * w.kernel[1]};
  // A pixel of X-hat has whole cache lines, and neighbouring pixels of a result lie a constant number of lanes apart.
  for (const int64_t pixel : {16, 32, 64, 128}) {
    if (F_hat.depth > pixel) continue;
    switch (pixel * w.stride[1]) {
      case 16:
        return Direct<In, 16>{x, y, W, V, F_hat, w, e}.run(threads);
      case 32:
        return Direct<In, 32>{x, y, W, V, F_hat, w, e}.run(threads);
      case 64:
        return Direct<In, 64>{x, y, W, V, F_hat, w, e}.run(threads);
      case 128:
        return Direct<In, 128>{x, y, W, V, F_hat, w, e}.run(threads);
    }
  }
}

}  // namespace

namespace PHYDI_ISA {

void phc_conv_factored(DType dtype, const Image& x, const Image& y, const Matrix& W, const Matrix& V, const void* F,
                       const Matrix& U, const Window& window, const ChannelEpilogue& e, const Threads& threads) {
  with_type(dtype, [&](auto type) { direct<decltype(type)>(x, y, W, V, F, U, window, e, threads); });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
