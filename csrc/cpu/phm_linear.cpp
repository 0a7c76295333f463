// phm_linear: y = residual + alpha * act(H x + bias) by one of three plans; see phydi_kernels/plans.py.
#include "linear.h"

namespace phydi {
namespace {

#if defined(__AVX512F__)
constexpr int kDotRows = 4;
#else
constexpr int kDotRows = 2;
#endif
constexpr int kDotColumns = 4;

template <class In, bool panel>
void multiply(int64_t batch, const Linear<In>& op, const Epilogue& epilogue, const Threads& threads) {
  using T = Compute<In>;
  const int64_t split = panel ? 1 : op.P;
  const int64_t rows = batch * split;
  const int64_t columns = panel ? op.P * op.p : op.p;
  const int64_t depth = (panel ? op.Q : op.n) * op.lanes_of_segment();
  const Output<In> output{epilogue, split, columns};

  const int64_t strips = ceil_div(columns, kStrip<T>);
  const int64_t strip_bytes = depth * kStrip<T> * int64_t(sizeof(T));
  const int64_t share = std::max<int64_t>(kPackBytes, op.P * op.p * op.Q * op.q * int64_t(sizeof(In)) / op.n);
  // At most what keeps c in L2.
  const int64_t held = std::min(strips, std::min<int64_t>(32, std::max<int64_t>(1, share / strip_bytes)));
  const int64_t block_rows = std::min<int64_t>(kBlockRows<In>, round_up(ceil_div(rows, threads.count), kRows<In>));
  const int64_t blocks = ceil_div(rows, block_rows);
  const int64_t workers = std::min(blocks, threads.count);
  const int64_t c_stride = held * kStrip<T>;

  const Scratch<T> weights(held * depth * kStrip<T>);
  for (int64_t first_strip = 0; first_strip < strips; first_strip += held) {
    const int64_t some = std::min(held, strips - first_strip);
    parallel(threads, some, [&](int64_t j) {
      const int64_t column = (first_strip + j) * kStrip<T>;
      op.template pack_strip<panel>(column, std::min<int64_t>(columns - column, kStrip<T>),
                                    weights.get() + j * depth * kStrip<T>);
    });
    parallel(threads, workers, [&](int64_t worker) {
      const Scratch<T> packed(block_rows * kBlockStride<T>);
      const Scratch<T> c(block_rows * c_stride);
      for (int64_t block = blocks * worker / workers; block < blocks * (worker + 1) / workers; ++block) {
        const int64_t row = block * block_rows;
        const int64_t count = std::min(block_rows, rows - row);
        for (int64_t k = 0; k < depth; k += kDepth<T>) {
          const int64_t steps = std::min<int64_t>(kDepth<T>, depth - k);
          for (int64_t m = 0; m < count; ++m) {
            Entry<In>* to = reinterpret_cast<Entry<In>*>(packed.get() + m * kBlockStride<T>);
            panel ? op.plain_row(row + m, k, steps, to) : op.mixed_row(row + m, k, steps, to);
          }
          // The last tile reads rows that do not exist.
          for (int64_t m = count; m < round_up(count, kRows<In>); ++m)
            std::fill_n(packed.get() + m * kBlockStride<T>, steps, T(0));
          for (int64_t j = 0; j < some; ++j) {
            const int64_t column = (first_strip + j) * kStrip<T>;
            const T* b = weights.get() + (j * depth + k) * kStrip<T>;
            const int64_t width = std::min<int64_t>(columns - column, kStrip<T>);
            for (int64_t m = 0; m < count; m += kRows<In>) {
              T* to = c.get() + m * c_stride + j * kStrip<T>;
              // Tiles of one size, for which the registers of AMX stay set up.
              const int64_t of_tile = kAmx<In> && count > kRows<In> ? kRows<In> : count - m;
              tile<In, kBlockStride<T>, 1>(of_tile, width)(steps, packed.get() + m * kBlockStride<T>, b, kStrip<T>,
                                                           k == 0, to, c_stride);
              if (k + steps < depth) continue;
              for (int64_t r = m; r < std::min<int64_t>(m + kRows<In>, count); ++r)
                output.write((row + r) / split, (row + r) % split, column, width,
                             c.get() + r * c_stride + j * kStrip<T>);
            }
          }
        }
      }
    });
  }
}

// Few rows: the mixed input (rows x n*q) is small, and F is read once, where it lies. Two register tiles of kDotRows
// rows; out is row-major with row stride kStreamColumns.
constexpr int64_t kStreamColumns = 64;

// F with unit stride along s: kDotColumns columns, lanes along s, one reduction of all accumulators at the end. The
// lanes of a term of x are padded to whole vectors.
// `ahead`: F comes from memory; a piece of it lies in other pages than the one before, where no stream is foreseen.
template <class In, bool ahead>
void dot_tile(const Linear<In>& op, const Compute<In>* x, int64_t depth, int64_t column, Compute<In>* out) {
  using T = Compute<In>;
  constexpr int lanes = kLanes<T>, entries = lanes * kPerLane<In>, cells = kDotRows * kDotColumns;
  Vec<T> acc[cells] = {};
  for (int64_t i = 0; i < op.n; ++i) {
    const In* f[kDotColumns];
#pragma GCC unroll 4
    for (int64_t c = 0; c < kDotColumns; ++c) f[c] = op.F + i * op.F_i + std::min(column + c, op.p - 1) * op.F_r;
    const int64_t next = i + 1 < op.n ? op.F_i : kDotColumns * op.F_r - i * op.F_i;
    int64_t s = 0;
    const auto step = [&](const auto& weights) __attribute__((always_inline)) {
      Vec<T> xs[kDotRows];
#pragma GCC unroll 4
      for (int m = 0; m < kDotRows; ++m) xs[m] = load(x + m * depth);
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) {
        const Vec<T> w = weights(f[c] + s);
#pragma GCC unroll 4
        for (int m = 0; m < kDotRows; ++m) multiply_add<In>(acc[m * kDotColumns + c], xs[m], w);
      }
      x += lanes;
    };
    for (; s + entries <= op.q; s += entries)
      step([next](const In* w) {
        if constexpr (ahead) __builtin_prefetch(w + next);
        return load_lanes(w);
      });
    if (s < op.q) step([some = op.q - s](const In* w) { return load_some_lanes(w, some); });
  }
  T sums[cells];
  if constexpr (cells % lanes == 0) {
#pragma GCC unroll 16
    for (int j = 0; j < cells; j += lanes) store(sums + j, sum_lanes<T>(acc + j));
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < cells; ++j) sums[j] = sum<T>(acc[j]);
  }
  for (int m = 0; m < kDotRows; ++m) memcpy(out + m * kStreamColumns, sums + m * kDotColumns, kDotColumns * sizeof(T));
}

// F with unit stride along r (the input's gradient): NV vectors of columns, lanes along r, one line of F a step.
// `whole`: all columns exist; else `columns` of them do.
template <class In, int NV, bool whole>
void line_tile(const Linear<In>& op, const Compute<In>* x, int64_t depth, int64_t column, int64_t columns,
               Compute<In>* out) {
  using T = Compute<In>;
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[kDotRows][NV] = {};
  for (int64_t i = 0; i < op.n; ++i, x += op.q) {
    const In* f = op.F + i * op.F_i + column;
    for (int64_t s = 0; s < op.q; ++s, f += op.F_s) {
      Vec<T> w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        w[v] = whole ? load(f + v * lanes) : load_some(f + v * lanes, std::max<int64_t>(columns - v * lanes, 0));
      // One or two cache lines of each, in a page of its own: the processor foresees none of them.
      if constexpr (kVectorBytes < 64) prefetch(f + 24 * op.F_s, NV * lanes);
#pragma GCC unroll 4
      for (int m = 0; m < kDotRows; ++m) {
        const Vec<T> xm = splat(x[m * depth + s]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] += xm * w[v];
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kDotRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + m * kStreamColumns + v * lanes, acc[m][v]);
}

// `dots`: F has unit stride along s.
template <class In, bool dots>
void stream(int64_t batch, const Linear<In>& op, const Epilogue& epilogue, const Threads& threads) {
  using T = Compute<In>;
  using X = std::conditional_t<dots, Entry<In>, T>;
  const int64_t rows = batch * op.P;
  const int64_t term = dots ? round_up(op.lanes_of_segment(), kLanes<T>) : op.q, depth = op.n * term;
  const int64_t padded_rows = round_up(rows, kDotRows);
  const Output<In> output{epilogue, op.P, op.p};

  const Scratch<T> mixed(padded_rows * depth);
  const int64_t mixers = rows * depth * op.Q < kThreadStart ? 1 : std::min(padded_rows, threads.count);
  parallel(threads, mixers, [&](int64_t mixer) {
    for (int64_t row = padded_rows * mixer / mixers; row < padded_rows * (mixer + 1) / mixers; ++row) {
      for (int64_t i = 0; i < op.n; ++i) {
        T* to = mixed.get() + row * depth + i * term;
        X* entries = reinterpret_cast<X*>(to);
        if (row < rows) op.mix(row / op.P, row % op.P, i, 0, op.q, entries);
        std::fill(row < rows ? entries + op.q : entries, reinterpret_cast<X*>(to + term), X{});
      }
    }
  });

  // A multiple of kDotColumns, and of the lanes of every type.
  static_assert(kStreamColumns % kDotColumns == 0 && kStreamColumns % kLanes<float> == 0);
  constexpr int NV = std::min<int64_t>(4, kStreamColumns / kLanes<T>);
  constexpr int64_t width = NV * kLanes<T>;
  const int64_t chunks = ceil_div(op.p, kStreamColumns);
  const int64_t tasks = std::min(chunks, threads.count);
  parallel(threads, tasks, [&](int64_t task) {
    const Scratch<T> results(padded_rows * kStreamColumns);
    for (int64_t chunk = chunks * task / tasks; chunk < chunks * (task + 1) / tasks; ++chunk) {
      const int64_t first = chunk * kStreamColumns, columns = std::min(kStreamColumns, op.p - first);
      for (int64_t column = 0; column < columns; column += dots ? kDotColumns : width) {
        for (int64_t row = 0; row < padded_rows; row += kDotRows) {
          const T* x = mixed.get() + row * depth;
          T* out = results.get() + row * kStreamColumns + column;
          if constexpr (dots) {
            row == 0 ? dot_tile<In, true>(op, x, depth, first + column, out)
                     : dot_tile<In, false>(op, x, depth, first + column, out);
          } else if (columns - column >= width) {
            line_tile<In, NV, true>(op, x, depth, first + column, width, out);
          } else if (columns - column > 2 * kLanes<T>) {
            line_tile<In, NV, false>(op, x, depth, first + column, columns - column, out);
          } else if (columns - column == 2 * kLanes<T>) {
            line_tile<In, 2, true>(op, x, depth, first + column, columns - column, out);
          } else if (columns - column > kLanes<T>) {
            line_tile<In, 2, false>(op, x, depth, first + column, columns - column, out);
          } else {
            line_tile<In, 1, false>(op, x, depth, first + column, columns - column, out);
          }
        }
      }
      for (int64_t row = 0; row < rows; ++row)
        output.write(row / op.P, row % op.P, first, columns, results.get() + row * kStreamColumns);
    }
  });
}

template <class In>
void run(Plan plan, int64_t rows, Rows x, const Algebra& A, const Weights& F, const Epilogue& epilogue,
         const Threads& threads) {
  const Linear<In> op(x, A, F);
  switch (plan) {
    case Plan::stream:
      return op.F_s == 1 ? stream<In, true>(rows, op, epilogue, threads)
                         : stream<In, false>(rows, op, epilogue, threads);
    case Plan::mix:
      return multiply<In, false>(rows, op, epilogue, threads);
    case Plan::panel:
      return multiply<In, true>(rows, op, epilogue, threads);
    case Plan::rank:
      break;  // needs U, V, W; ops.cpp does not pass it
  }
}

template <class T>
void form_structure(const Factors& f, T* A) {
  const T *U = static_cast<const T*>(f.U), *V = static_cast<const T*>(f.V), *W = static_cast<const T*>(f.W);
  const int64_t size = f.P * f.Q;
  const Scratch<T> product(size);
  std::fill(A, A + f.n * size, T(0));
  for (int64_t r = 0; r < f.R; ++r) {
    for (int64_t k = 0; k < f.P; ++k)
      for (int64_t l = 0; l < f.Q; ++l) product.get()[k * f.Q + l] = V[r * f.P + k] * W[r * f.Q + l];
    // All entries of a slice in one loop, which a compiler turns into vectors.
    for (int64_t i = U ? 0 : r; i < (U ? f.n : r + 1); ++i) {
      const T u = U ? U[r * f.n + i] : T(1);
      for (int64_t e = 0; e < size; ++e) A[i * size + e] += u * product.get()[e];
    }
  }
}

}  // namespace

namespace PHYDI_ISA {

void structure(DType dtype, const Factors& factors, void* A) {
  with_type(dtype, [&](auto type) {
    using T = Compute<decltype(type)>;
    form_structure(factors, static_cast<T*>(A));
  });
}

void phm_linear(DType dtype, Plan plan, int64_t rows, Rows x, const Algebra& A, const Weights& F, const Epilogue& e,
                const Threads& threads) {
  with_type(dtype, [&](auto type) { run<decltype(type)>(plan, rows, x, A, F, e, threads); });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
