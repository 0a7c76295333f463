// phm_linear_factored: y_k = sum_r V[r,k] (sum_i U[r,i] F_i) (sum_l W[r,l] x_l), R products of blocks, and its
// gradients.
//
// Packing forms both factors of a product, x-hat_r = sum_l W[r,l] x_l and F-hat_r = sum_i U[r,i] F_i, and the products
// of a strip of columns, the y-hat_r, are combined by V while they are in cache.
#include <optional>
#include <vector>

#include "lines.h"
#include "outer.h"
#include "split.h"

namespace phydi {
namespace {

// The packed input of a group of ranks, or of as many rows of one rank, takes at most this much of L2.
constexpr int64_t kGroupBytes = 512 << 10;
// Packed weights held at a time: this much, or 1/n of H where that is more. The input is mixed anew for each part.
constexpr int64_t kHeldBytes = 4 << 20;
// Packed weights of more bytes would come back from memory.
constexpr int64_t kFarBytes = 16 << 20;

// One direction of the bilinear algorithm: results[o] = sum_r out[r,o] (F-hat_r x-hat_r), x-hat_r = sum_j in[r,j] x_j.
// Forward in = W, out = V; for the input's gradient in = V, out = W, and F transposed.
template <class In>
struct Ranks {
  using T = Compute<In>;
  const T *U, *in, *out;
  int64_t R, n, inputs, outputs;
  const In* x;
  int64_t x_stride;
  const In* F;
  int64_t p, q, F_i, F_r, F_s;

  // Entries of a column that are asked for ahead.
  static constexpr int64_t kForeseen = 4 * kLanes<T> * kPerLane<In>;

  // Lanes of the summation of one rank.
  int64_t depth() const { return ceil_div(q, kPerLane<In>); }

  // Whether the lines of F, along its columns, are combined as they lie.
  bool combines_lines() const { return U && F_s != 1 && combines_lines_of(n); }

  // Lanes of a strip whose n terms, or R sums of lines, take at most 64 KiB, most of them in L1. It divides kDepth.
  int64_t piece() const {
    const int64_t held = combines_lines() ? R : U ? n * kPerLane<In> : 1;
    const int64_t lane_bytes = held * kStrip<T> * int64_t(sizeof(T));
    int64_t lanes = kLanes<T>;
    while (lanes < kDepth<T> && 2 * lanes * lane_bytes <= (64 << 10)) lanes *= 2;
    return lanes;
  }

  // Term i of F in columns [column, column + columns), lanes [lane, lane + count): to[l * kStrip + c]. Pairs as
  // they lie, or apart: the second halves of all follow the first.
  template <bool apart>
  void pack_term(int64_t i, int64_t column, int64_t columns, int64_t lane, int64_t count, T* to) const {
    constexpr int64_t per = kPerLane<In>;
    const In* f = F + i * F_i + column * F_r + lane * per * F_s;
    if (F_s == 1) {
      for (int64_t c = 0; c < columns; c += kLanes<T>)
        for (int64_t l = 0; l < count; l += kLanes<T>)
          turn<apart>(f + c * F_r + l * per, std::min<int64_t>(columns - c, kLanes<T>), q - (lane + l) * per,
                      std::min<int64_t>(count - l, kLanes<T>), to + l * kStrip<T> + c, count * kStrip<T>);
    } else {
      for (int64_t l = 0; l < count; ++l) {
        // The lines are far apart, each in a page of its own.
        for (int64_t h = 0; h < per; ++h) __builtin_prefetch(f + ((l + 8) * per + h) * F_s);
        for (int64_t c = 0; c < columns; c += kLanes<T>)
          put<apart>(to + l * kStrip<T> + c, across(f + l * per * F_s + c, columns - c, q - (lane + l) * per),
                     count * kStrip<T>);
      }
    }
  }

  // Asks for the beginning of columns [column, column + kStrip) along q, which `turn` does not foresee: each lies in a
  // page of its own.
  void prefetch_columns(int64_t column) const {
    if (F_s != 1) return;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = column; c < std::min<int64_t>(p, column + kStrip<T>); ++c)
        prefetch(F + i * F_i + c * F_r, std::min<int64_t>(q, kForeseen));
  }

  // F-hat_r of such lanes from all n terms, which follow each other, pairs apart.
  void combine_terms(const T* terms, int64_t r, int64_t count, T* to) const {
    const int64_t size = count * kStrip<T>;
#if defined(__AVX512BF16__)
    if constexpr (kPerLane<In> == 2) {
      for (int64_t e = 0; e < size; e += kStrip<T>) {
        constexpr int some = kTileVectors;
        Vec<T> first[some] = {}, second[some] = {};
        for (int64_t i = 0; i < n; ++i) {
          const Vec<T> u = splat(U[r * n + i]);
          const T* term = terms + 2 * i * size + e;
#pragma GCC unroll 4
          for (int h = 0; h < some; ++h) {
            first[h] += u * load(term + h * kLanes<T>);
            second[h] += u * load(term + size + h * kLanes<T>);
          }
        }
#pragma GCC unroll 4
        for (int h = 0; h < some; ++h) store(to + e + h * kLanes<T>, bf16_pairs(first[h], second[h]));
      }
      return;
    }
#endif
    combine(terms, size, U + r * n, 1, n, to, size);
  }

 private:
  // A square: lane j of `width` columns with unit stride into vector j; `steps` of each column are left.
  template <bool apart>
  void turn(const In* f, int64_t width, int64_t steps, int64_t count, T* to, int64_t size) const {
    constexpr int64_t lanes = kLanes<T>;
    Vec<T> rows[lanes];
    if (width == lanes && steps >= lanes * kPerLane<In>) {
#pragma GCC unroll 16
      for (int64_t c = 0; c < lanes; ++c) {
        rows[c] = load_lanes(f + c * F_r);
        __builtin_prefetch(f + c * F_r + kForeseen);
      }
      transpose<T>(rows);
#pragma GCC unroll 16
      for (int64_t j = 0; j < lanes; ++j) put<apart>(to + j * kStrip<T>, rows[j], size);
    } else {
      for (int64_t c = 0; c < lanes; ++c) rows[c] = c < width ? load_some_lanes(f + c * F_r, steps) : Vec<T>{};
      transpose<T>(rows);
      for (int64_t j = 0; j < count; ++j) put<apart>(to + j * kStrip<T>, rows[j], size);
    }
  }

  template <bool apart>
  static void put(T* to, Vec<T> v, [[maybe_unused]] int64_t size) {
    if constexpr (apart && kPerLane<In> == 2) {
      store(to, (Vec<T>)((U32s)v << 16));
      store(to + size, (Vec<T>)((U32s)v & 0xffff0000u));
    } else {
      store(to, v);
    }
  }

  // One lane of `width` columns that lie beside each other; `steps` of each column are left.
  Vec<T> across(const In* f, int64_t width, int64_t steps) const {
    if constexpr (kPerLane<In> == 2) {
      const Vec<T> second = steps > 1 ? load_some(f + F_s, width) : Vec<T>{};
      return (Vec<T>)(((U32s)load_some(f, width) >> 16) | (U32s)second);
    } else {
      return load_some(f, width);
    }
  }
};

// The ranks whose F-hat_r is a term of F, by a unit row of U, and the others.
template <class In>
struct TermRanks {
  using T = Compute<In>;
  std::vector<int64_t> term, place;  // of rank r: its term, or -1 and its place among the others
  std::vector<T> U;                  // of the others
  int64_t others = 0;

  explicit TermRanks(const Ranks<In>& op) : term(op.R), place(op.R) {
    for (int64_t r = 0; r < op.R; ++r) {
      const T *row = op.U + r * op.n, *end = row + op.n, *one = std::find(row, end, T(1));
      const bool unit = one != end && std::count(row, end, T(0)) == op.n - 1;
      term[r] = unit ? one - row : -1;
      place[r] = unit ? -1 : others++;
      if (!unit) U.insert(U.end(), row, end);
    }
  }
};

// Lanes [lane, lane + count) of F-hat in `columns` columns from `column` on: each(r, b, b_stride) takes those of
// F-hat_r, written to to + r * to_stride; or in F, where `in_place` is not null and has a term for it.
template <class In, class Each>
void pack_piece(const Ranks<In>& op, const TermRanks<In>* in_place, int64_t column, int64_t columns, int64_t lane,
                int64_t count, Compute<In>* terms, Compute<In>* to, int64_t to_stride, const Each& each) {
  using T = Compute<In>;
  const bool lines = op.combines_lines();
  if (lines) {
    const T* U = in_place ? in_place->U.data() : op.U;
    const Lines<In> packed{op.F, op.F_i, op.F_s, op.q, U, in_place ? in_place->others : op.R, op.n};
    packed.pack(column, columns, lane, count, to, to_stride);
  }
  if (op.U && !lines)
    for (int64_t i = 0; i < op.n; ++i)
      op.template pack_term<true>(i, column, columns, lane, count, terms + i * count * kStrip<T> * kPerLane<In>);
  for (int64_t r = 0; r < op.R; ++r) {
    if constexpr (std::is_same_v<In, T>) {
      if (in_place && in_place->term[r] >= 0) {
        each(r, op.F + in_place->term[r] * op.F_i + lane * op.F_s + column, op.F_s);
        continue;
      }
    }
    T* packed = to + (in_place ? in_place->place[r] : r) * to_stride;
    if (!op.U) op.template pack_term<false>(r, column, columns, lane, count, packed);
    if (op.U && !lines) op.combine_terms(terms, r, count, packed);
    each(r, packed, kStrip<T>);
  }
}

// The x-hat_r of a group of ranks [first, last) for a block of rows, in segments of at most kDepth lanes: a segment
// holds several ranks, or a part of one.
template <class In>
class MixedRows {
  using T = Compute<In>;

 public:
  MixedRows(const Ranks<In>& op, int64_t rows, int64_t ranks)
      : op_(op),
        rows_(rows),
        ranks_(std::max<int64_t>(1, kDepth<T> / op.depth())),
        parts_(ceil_div(op.depth(), kDepth<T>)),
        data_(ceil_div(ranks, ranks_) * parts_ * rows_ * kBlockStride<T>) {}

  // Bytes for one row of `ranks` ranks.
  static int64_t row_bytes(const Ranks<In>& op, int64_t ranks) {
    const int64_t together = std::max<int64_t>(1, kDepth<T> / op.depth());
    return ceil_div(ranks, together) * ceil_div(op.depth(), kDepth<T>) * kBlockStride<T> * int64_t(sizeof(T));
  }

  int64_t parts() const { return parts_; }

  // Lanes of part `part` of a rank.
  int64_t lanes(int64_t part) const { return std::min<int64_t>(kDepth<T>, op_.depth() - part * kDepth<T>); }

  // Row m of part `part` of the rank `r` places after the first; rows are kBlockStride apart.
  T* at(int64_t r, int64_t part, int64_t m) const {
    const int64_t segment = r / ranks_ * parts_ + part;
    return data_.get() + (segment * rows_ + m) * kBlockStride<T> + r % ranks_ * op_.depth();
  }

  // Rows [m, end) of the ranks [first, last) from the rows of the input from `row` on; those from `count` on do not
  // exist, and are zero.
  void pack(int64_t m, int64_t end, int64_t row, int64_t count, int64_t first, int64_t last) const {
    const Scratch<T> converted(std::is_same_v<In, T> ? 0 : op_.inputs * op_.q);
    for (; m < end; ++m) {
      const In* x = op_.x + (row + m) * op_.x_stride;
      if (first == 0) prefetch(x + 4 * op_.x_stride, op_.inputs * op_.q);
      if constexpr (std::is_same_v<In, T>) {
        mix(m, x, m < count, first, last);
      } else {
        // Once, not once for each rank.
        if (m < count) copy_row(x, converted.get(), op_.inputs * op_.q);
        mix(m, converted.get(), m < count, first, last);
      }
    }
  }

 private:
  void mix(int64_t m, const T* x, bool exists, int64_t first, int64_t last) const {
    constexpr int64_t per = kPerLane<In>;
    for (int64_t r = first; r < last; ++r) {
      for (int64_t part = 0; part < parts_; ++part) {
        auto* to = reinterpret_cast<Entry<In>*>(at(r - first, part, m));
        const int64_t from = part * kDepth<T> * per, padded = lanes(part) * per;
        const int64_t steps = exists ? std::min(padded, op_.q - from) : 0;
        if (exists) combine(x + from, op_.q, op_.in + r * op_.inputs, 1, op_.inputs, to, steps);
        std::fill(to + steps, to + padded, Entry<In>{});
      }
    }
  }

  const Ranks<In>& op_;
  int64_t rows_, ranks_, parts_;
  Scratch<T> data_;
};

// to[row][o] (+)= sum_r weight[r,o] products[r][row] for `terms` ranks and two rows of a strip at a time.
template <class T>
void combine_products(const T* products, int64_t product_stride, const T* weight, int64_t terms, int64_t outputs,
                      int64_t rows, bool first, T* to) {
  constexpr int vectors = kTileVectors, together = 2;
  // The rows are padded to tiles, so there is always a second one.
  for (int64_t m = 0; m < rows; m += together) {
    for (int64_t o = 0; o < outputs; ++o) {
      Vec<T> total[together][vectors];
#pragma GCC unroll 4
      for (int h = 0; h < together; ++h)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v)
          total[h][v] = first ? Vec<T>{} : load(to + ((m + h) * outputs + o) * kStrip<T> + v * kLanes<T>);
      for (int64_t r = 0; r < terms; ++r) {
        const Vec<T> w = splat(weight[r * outputs + o]);
#pragma GCC unroll 4
        for (int h = 0; h < together; ++h)
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v)
            total[h][v] += w * load(products + r * product_stride + (m + h) * kStrip<T> + v * kLanes<T>);
      }
#pragma GCC unroll 4
      for (int h = 0; h < together; ++h)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(to + ((m + h) * outputs + o) * kStrip<T> + v * kLanes<T>, total[h][v]);
    }
  }
}

// A matrix whose rows' blocks, `width` entries each, are multiplied with the products.
struct Dots {
  Rows other;
  int64_t width;
};

// The R products, combined into `output` and multiplied with `dots` into dout (R, outputs), where these are not null.
template <class In>
void multiply_ranks(int64_t rows, const Ranks<In>& op, const Output<In>* output, const Dots* dots, Compute<In>* dout,
                    const Threads& threads) {
  using T = Compute<In>;
  const int64_t R = op.R, outputs = op.outputs, depth = op.depth();
  const int64_t strips = ceil_div(op.p, kStrip<T>), strip_size = R * depth * kStrip<T>;
  // One block of rows: each packed strip is used once, at once. Several: as many strips as fit are packed for all. A
  // larger block, where its rows are read for each strip in less time than the packed weights once more.
  const bool far = strips * strip_size * int64_t(sizeof(T)) > kFarBytes;
  const bool single = rows <= kBlockRows<In> || (far && rows <= op.p * kPerLane<In> / 8);
  int64_t group = R, block_rows = std::max<int64_t>(rows, 1);
  if (!single) {
    // Whole tiles, as many blocks for each thread as for the others.
    const int64_t most = op.p > 8 * kStrip<T> ? kBlockRows<In> / 2 : kBlockRows<In>;
    const int64_t shares = ceil_div(ceil_div(rows, most), threads.count) * threads.count;
    block_rows = round_up(ceil_div(rows, shares), kRows<In>);
    while (group > 1 && MixedRows<In>::row_bytes(op, group) * block_rows > kGroupBytes) --group;
    const int64_t one = MixedRows<In>::row_bytes(op, 1);
    if (one * block_rows > kGroupBytes)
      block_rows = std::max<int64_t>(kRows<In>, kGroupBytes / one / kRows<In> * kRows<In>);
    group = ceil_div(R, ceil_div(R, group));
  }
  const int64_t step = single ? tile_step<In>(rows, 4) : kRows<In>;
  const int64_t blocks = ceil_div(rows, block_rows), padded = round_up(block_rows, step);
  const int64_t share = std::max<int64_t>(kHeldBytes, op.n * op.p * op.q * int64_t(sizeof(In)));
  // At most what keeps the results of a block in L2.
  const int64_t held = single
                           ? strips
                           : std::min({strips, std::max<int64_t>(1, share / (strip_size * int64_t(sizeof(T)))),
                                       std::max<int64_t>(1, 1024 / (kStrip<T> * outputs) * kBlockRows<In> / padded)});
  const int64_t workers = std::min(single ? strips : blocks, threads.count);
  const int64_t result_size = padded * outputs * kStrip<T>;
  const Scratch<Vec<T>> sums(dots ? workers * R * outputs : 0);
  std::fill(sums.get(), sums.get() + (dots ? workers * R * outputs : 0), Vec<T>{});

  const int64_t product_stride = padded * kStrip<T>;
  // What becomes of the products of ranks [first, last) with rows [row, row + count) in one strip; `results` (rows,
  // outputs, kStrip) collects over the groups of ranks.
  const auto combine_strip = [&](int64_t first, int64_t last, int64_t row, int64_t count, int64_t strip, int64_t worker,
                                 const T* products, T* results) {
    const int64_t column = strip * kStrip<T>, width = std::min<int64_t>(op.p - column, kStrip<T>);
    if (dots) {
      const auto others = block_pointers(static_cast<const In*>(dots->other.data), outputs, dots->width);
      const auto parts = block_pointers(products, last - first, product_stride);
      const int64_t stride = dots->other.stride;
      add_products<In, T>(count, width, {others.data(), outputs, row * stride + column, stride},
                          {parts.data(), last - first, 0, kStrip<T>}, sums.get() + (worker * R + first) * outputs);
    }
    if (!output) return;
    combine_products(products, product_stride, op.out + first * outputs, last - first, outputs, count, first == 0,
                     results);
    if (last < R) return;
    for (int64_t m = 0; m < count; ++m)
      for (int64_t o = 0; o < outputs; ++o)
        output->write(row + m, o, column, width, results + (m * outputs + o) * kStrip<T>);
  };

  const int64_t piece = op.piece();
  if (single) {
    const MixedRows<In> mixed(op, padded, R);
    const int64_t packers = rows * R * op.inputs * op.q < kThreadStart ? 1 : std::min(padded, threads.count);
    parallel(threads, packers, [&](int64_t packer) {
      mixed.pack(padded * packer / packers, padded * (packer + 1) / packers, 0, rows, 0, R);
    });
    std::optional<TermRanks<In>> in_place;
    if (std::is_same_v<In, T> && op.combines_lines()) in_place.emplace(op);
    parallel(threads, workers, [&](int64_t worker) {
      const int64_t piece_size = piece * kStrip<T>, packed_stride = op.combines_lines() ? piece_size : 0;
      const Scratch<T> terms(op.n * kPerLane<In> * piece_size), packed((R - 1) * packed_stride + piece_size),
          products(R * product_stride), results(result_size);
      for (int64_t strip = strips * worker / workers; strip < strips * (worker + 1) / workers; ++strip) {
        const int64_t column = strip * kStrip<T>, width = std::min<int64_t>(op.p - column, kStrip<T>);
        // A strip cut off has no whole lines.
        const TermRanks<In>* terms_of_F = in_place && width == kStrip<T> ? &*in_place : nullptr;
        for (int64_t lane = 0; lane < depth; lane += piece) {
          const int64_t count = std::min(piece, depth - lane);
          if (lane + count == depth) op.prefetch_columns(column + kStrip<T>);
          pack_piece(op, terms_of_F, column, width, lane, count, terms.get(), packed.get(), packed_stride,
                     [&](int64_t r, const T* b, int64_t b_stride) {
                       for (int64_t m = 0; m < rows; m += step) {
                         const int64_t some = kAmx<In> ? step : std::min(step, rows - m);
                         const auto multiply = kAmx<In> || b_stride == kStrip<T>
                                                   ? tile<In, kBlockStride<T>, 1, false>(some, width)
                                                   : tile<In, kBlockStride<T>, 1, !kAmx<In>>(some, width);
                         multiply(count, mixed.at(r, lane / kDepth<T>, m) + lane % kDepth<T>, b, b_stride, lane == 0,
                                  products.get() + r * product_stride + m * kStrip<T>, kStrip<T>);
                       }
                     });
        }
        combine_strip(0, R, 0, rows, strip, worker, products.get(), results.get());
      }
    });
  } else {
    const Scratch<T> packed(held * strip_size);
    for (int64_t first_strip = 0; first_strip < strips; first_strip += held) {
      const int64_t some = std::min(held, strips - first_strip);
      parallel(threads, some, [&](int64_t j) {
        const Scratch<T> terms(op.n * kPerLane<In> * piece * kStrip<T>);
        const int64_t column = (first_strip + j) * kStrip<T>;
        const int64_t width = std::min<int64_t>(op.p - column, kStrip<T>);
        for (int64_t lane = 0; lane < depth; lane += piece)
          pack_piece(op, static_cast<const TermRanks<In>*>(nullptr), column, width, lane, std::min(piece, depth - lane),
                     terms.get(), packed.get() + j * strip_size + lane * kStrip<T>, depth * kStrip<T>,
                     [](int64_t, const T*, int64_t) {});
      });
      parallel(threads, workers, [&](int64_t worker) {
        const MixedRows<In> mixed(op, padded, group);
        const Scratch<T> products(group * product_stride), results(some * result_size);
        for (int64_t block = blocks * worker / workers; block < blocks * (worker + 1) / workers; ++block) {
          const int64_t row = block * block_rows, count = std::min(block_rows, rows - row);
          for (int64_t first = 0; first < R; first += group) {
            const int64_t last = std::min(first + group, R);
            mixed.pack(0, round_up(count, kRows<In>), row, count, first, last);
            for (int64_t j = 0; j < some; ++j) {
              const int64_t strip = first_strip + j;
              for (int64_t r = first; r < last; ++r) {
                for (int64_t part = 0; part < mixed.parts(); ++part) {
                  const T* b = packed.get() + j * strip_size + (r * depth + part * kDepth<T>)*kStrip<T>;
                  for (int64_t m = 0; m < count; m += kRows<In>)
                    tile<In, kBlockStride<T>, 1>(kAmx<In> ? kRows<In> : count - m, op.p - strip * kStrip<T>)(
                        mixed.lanes(part), mixed.at(r - first, part, m), b, kStrip<T>, part == 0,
                        products.get() + (r - first) * product_stride + m * kStrip<T>, kStrip<T>);
                }
              }
              combine_strip(first, last, row, count, strip, worker, products.get(), results.get() + j * result_size);
            }
          }
        }
      });
    }
  }
  if (!dots) return;
  std::fill(dout, dout + R * outputs, T(0));
  add_shares<T>(sums.get(), workers, R * outputs, dout);
}

template <class In>
Ranks<In> forward_ranks(Rows x, const Factors& f, const Weights& w) {
  using T = Compute<In>;
  return {static_cast<const T*>(f.U),
          static_cast<const T*>(f.W),
          static_cast<const T*>(f.V),
          f.R,
          f.n,
          f.Q,
          f.P,
          static_cast<const In*>(x.data),
          x.stride,
          static_cast<const In*>(w.data),
          w.p,
          w.q,
          w.stride_i,
          w.stride_r,
          w.stride_s};
}

template <class In>
void forward(int64_t rows, Rows x, const Factors& factors, const Weights& weights, const Epilogue& epilogue,
             const Threads& threads) {
  const Ranks<In> op = forward_ranks<In>(x, factors, weights);
  const Output<In> output{epilogue, op.outputs, op.p};
  multiply_ranks<In>(rows, op, &output, nullptr, nullptr, threads);
}

// dF_i = sum_r U[r,i] G_r and dU[r,i] = <F_i, G_r> from G_r = g-hat_r^T x-hat_r, g-hat_r = sum_k V[r,k] grad_k.
template <class In>
void weights_grad(int64_t batch, Rows grad, Rows x, const Factors& f, const Weights& weights, void* dU, void* dF,
                  const Threads& threads) {
  using T = Compute<In>;
  const T *U = static_cast<const T*>(f.U), *V = static_cast<const T*>(f.V), *W = static_cast<const T*>(f.W);
  const int64_t n = f.n, R = f.R, p = weights.p, q = weights.q;
  const Scratch<T> terms(2 * n * R);
  T *by_term = terms.get(), *dU_by_term = terms.get() + n * R;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < R; ++r) by_term[i * R + r] = U[r * n + i];
  std::fill(dU_by_term, dU_by_term + n * R, T(0));

  // Columns [s, s + width) of every rank at a time: the G_r stay within 1/n of H, the packed input within kPackBytes.
  const int64_t share = std::max<int64_t>(kPackBytes, n * p * q * int64_t(sizeof(In))) / int64_t(sizeof(T));
  const int64_t most = std::min<int64_t>(share / (R * p), kPackBytes / int64_t(sizeof(T)) / kDepth<T>);
  const int64_t width = std::min(q, std::max<int64_t>(most / kStrip<T> * kStrip<T>, kStrip<T>));
  const int64_t stride = round_up(width, kStrip<T>), rows = round_up(p, kRows<In>);
  const Scratch<T> G(R * rows * stride), scratch(stride * kDepth<T>);
  for (int64_t s = 0; s < q; s += width) {
    const int64_t columns = std::min(width, q - s);
    // Some rows of the batch for all ranks, so that they are mixed R times in cache.
    constexpr int64_t block = kPerLane<In> * kDepth<T>;
    for (int64_t b = 0; b == 0 || b < batch; b += block) {
      for (int64_t r = 0; r < R; ++r) {
        const auto mixed = [b, r](Rows from, int64_t row_of_block, int64_t at, int64_t size, int64_t blocks,
                                  const T* weight, int64_t count, T* to) {
          const In* row = static_cast<const In*>(from.data) + (b + row_of_block) * from.stride + at;
          for (int64_t l = 0; l < blocks; ++l) prefetch(row + 2 * from.stride + l * size, count);
          combine(row, size, weight + r * blocks, 1, blocks, to, count);
          return static_cast<const T*>(to);
        };
        outer_product<In>(
            std::min(block, batch - b), p, columns,
            [&](int64_t row, int64_t first, int64_t count, T* to) {
              return mixed(grad, row, first, p, f.P, V, count, to);
            },
            [&](int64_t row, int64_t, int64_t count, T* to) { return mixed(x, row, s, q, f.Q, W, count, to); }, scratch,
            G.get() + r * rows * stride, stride, b == 0, threads);
      }
    }
    const Split<In, T, In> split{by_term,
                                 n,
                                 R,
                                 1,
                                 static_cast<const In*>(weights.data) + s,
                                 weights.stride_i,
                                 weights.stride_r,
                                 G.get(),
                                 rows * stride,
                                 stride,
                                 0,
                                 static_cast<In*>(dF) + s,
                                 p * q,
                                 q};
    split_all(split, p, columns, dU_by_term, threads);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < R; ++r) static_cast<T*>(dU)[r * n + i] = dU_by_term[i * R + r];
}

template <class In>
void gradients(int64_t rows, Rows grad, Rows x, const Factors& f, const Weights& w, void* dx, void* dU, void* dV,
               void* dW, void* dF, const Threads& threads) {
  using T = Compute<In>;
  // dV[r,k] = <grad_k, F-hat_r x-hat_r>.
  const Dots with_grad{grad, w.p};
  multiply_ranks<In>(rows, forward_ranks<In>(x, f, w), nullptr, &with_grad, static_cast<T*>(dV), threads);
  // dx_l = sum_r W[r,l] t_r and dW[r,l] = <x_l, t_r> with t_r = F-hat_r^T g-hat_r.
  const Factors exchanged{f.U, f.W, f.V, f.R, f.n, f.Q, f.P};
  const Weights transposed{w.data, w.q, w.p, w.stride_i, w.stride_s, w.stride_r};
  const Epilogue epilogue{nullptr, {nullptr, 0}, 1.0, nullptr, false, dx};
  const Output<In> output{epilogue, f.Q, w.q};
  const Dots with_x{x, w.q};
  multiply_ranks<In>(rows, forward_ranks<In>(grad, exchanged, transposed), &output, &with_x, static_cast<T*>(dW),
                     threads);
  weights_grad<In>(rows, grad, x, f, w, dU, dF, threads);
}

}  // namespace

namespace PHYDI_ISA {

void phm_linear_factored(DType dtype, int64_t rows, Rows x, const Factors& factors, const Weights& F, const Epilogue& e,
                         const Threads& threads) {
  with_type(dtype, [&](auto type) { forward<decltype(type)>(rows, x, factors, F, e, threads); });
}

void phm_linear_factored_grad(DType dtype, int64_t rows, Rows grad, Rows x, const Factors& factors, const Weights& F,
                              void* dx, void* dU, void* dV, void* dW, void* dF, const Threads& threads) {
  with_type(dtype,
            [&](auto type) { gradients<decltype(type)>(rows, grad, x, factors, F, dx, dU, dV, dW, dF, threads); });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
