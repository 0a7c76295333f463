// Products summed over the batch, for the gradients of weights.
#pragma once

#include "product.h"

namespace phydi {
namespace {

// The vector of an operand from entry `at` of lines of `count` entries; a null line, of a row that does not exist, and
// what follows the last entry are zero.
template <class In, class E>
inline Vec<Compute<In>> packed_lines(const E* const (&lines)[kPerLane<In>], int64_t at, int64_t count) {
  const auto vector = [&](const E* line) {
    return line && at < count ? load_some(line + at, count - at) : Vec<Compute<In>>{};
  };
#if defined(__AVX512BF16__)
  if constexpr (kPerLane<In> == 2) return bf16_pairs(vector(lines[0]), vector(lines[1]));
#endif
  return vector(lines[0]);
}

// to[m * kBlockStride + lane] = from[lane * height + m] for lanes [0, lanes).
template <class T, int64_t height>
void turn_rows(const T* from, int64_t lanes, T* to) {
  constexpr int64_t vector = kLanes<T>;
  static_assert(height % vector == 0);
  for (int64_t lane = 0; lane < lanes; lane += vector) {
    for (int64_t v = 0; v < height; v += vector) {
      Vec<T> square[vector];
      for (int64_t j = 0; j < vector; ++j)
        square[j] = lane + j < lanes ? load(from + (lane + j) * height + v) : Vec<T>{};
      transpose<T>(square);
      for (int64_t j = 0; j < vector; ++j) store(to + (v + j) * kBlockStride<T> + lane, square[j]);
    }
  }
}

// G (rows, columns) = sum_b row(b)^T column(b), from functions (b, first, count, scratch) that return entries [first,
// first + count) of a batch row, where they lie or written to `scratch`. G has room for round_up(rows, kRows<In>) rows
// of `stride`, a whole number of strips; `packed_columns` for that stride times kDepth. `first`: G is written, not
// added to.
template <class In, class RowEntries, class ColumnEntries>
void outer_product(int64_t batch, int64_t rows, int64_t columns, const RowEntries& row_entries,
                   const ColumnEntries& column_entries, const Scratch<Compute<In>>& packed_columns, Compute<In>* G,
                   int64_t stride, bool first, const Threads& threads) {
  using T = Compute<In>;
  constexpr int64_t per = kPerLane<In>, vector = kLanes<T>;
  // As many blocks of rows for each thread as for the others.
  const int64_t shares = ceil_div(ceil_div(rows, kBlockRows<In>), threads.count) * threads.count;
  const int64_t block_rows = round_up(ceil_div(rows, shares), kRows<In>), blocks = ceil_div(rows, block_rows);
  const int64_t workers = std::min(blocks, threads.count), strips = ceil_div(columns, kStrip<T>);
  if (first && batch == 0) std::fill(G, G + rows * stride, T(0));
  for (int64_t b = 0; b < batch; b += per * kDepth<T>) {
    const int64_t steps = std::min<int64_t>(per * kDepth<T>, batch - b), lanes = ceil_div(steps, per);
    const bool start = first && b == 0;
    // pack(lane, lines) for lanes [begin, end) of entries [from, from + count). Lines that are written are read some
    // lanes later: unaligned vectors of what was just stored would wait for the stores.
    const auto each_lane = [&](const auto& entries, int64_t begin, int64_t end, int64_t from, int64_t count,
                               const auto& pack) {
      using E = std::remove_pointer_t<decltype(entries(b, from, count, nullptr))>;
      constexpr int64_t together = 8;
      const Scratch<std::remove_const_t<E>> scratch(together * per * count);
      for (int64_t lane = begin; lane < end; lane += together) {
        E* lines[together][per];
        const int64_t some = std::min(together, end - lane);
        for (int64_t j = 0; j < some; ++j) {
          for (int64_t h = 0; h < per; ++h) {
            const int64_t step = (lane + j) * per + h;
            lines[j][h] =
                step < steps ? entries(b + step, from, count, scratch.get() + (j * per + h) * count) : nullptr;
          }
        }
        for (int64_t j = 0; j < some; ++j) pack(lane + j, lines[j]);
      }
    };
    const int64_t packers = std::min(lanes, threads.count);
    parallel(threads, packers, [&](int64_t packer) {
      each_lane(column_entries, lanes * packer / packers, lanes * (packer + 1) / packers, 0, columns,
                [&](int64_t lane, const auto& lines) {
                  for (int64_t at = 0; at < columns; at += vector)
                    store(packed_columns.get() + (at / kStrip<T> * lanes + lane) * kStrip<T> + at % kStrip<T>,
                          packed_lines<In>(lines, at, columns));
                });
    });
    parallel(threads, workers, [&](int64_t worker) {
      // Tiles of rows, one lane of kRows entries after the other; a vector may be written past the last.
      constexpr int64_t height = kRows<In>, tile_size = height * kDepth<T> + vector;
      const Scratch<T> packed_rows(block_rows / height * tile_size),
          turned(kAmx<In> ? block_rows * kBlockStride<T> : 0);
      for (int64_t block = blocks * worker / workers; block < blocks * (worker + 1) / workers; ++block) {
        const int64_t row = block * block_rows, count = std::min<int64_t>(block_rows, rows - row);
        each_lane(row_entries, 0, lanes, row, count, [&](int64_t lane, const auto& lines) {
          for (int64_t m = 0; m < count; m += height)
            for (int64_t v = 0; v < height; v += vector)
              store(packed_rows.get() + m / height * tile_size + lane * height + v,
                    packed_lines<In>(lines, m + v, count));
        });
        if constexpr (kAmx<In>)
          for (int64_t m = 0; m < count; m += height)
            turn_rows<T, height>(packed_rows.get() + m / height * tile_size, lanes, turned.get() + m * kBlockStride<T>);
        for (int64_t strip = 0; strip < strips; ++strip) {
          const int64_t column = strip * kStrip<T>;
          for (int64_t m = 0; m < count; m += height) {
            const T *a = packed_rows.get() + m / height * tile_size, *b = packed_columns.get() + column * lanes;
            T* c = G + (row + m) * stride + column;
            if constexpr (kAmx<In>) {
              a = turned.get() + m * kBlockStride<T>;
              tile<In, kBlockStride<T>, 1>(height, columns - column)(lanes, a, b, kStrip<T>, start, c, stride);
            } else {
              tile<In, 1, height>(count - m, columns - column)(lanes, a, b, kStrip<T>, start, c, stride);
            }
          }
        }
      }
    });
  }
}

}  // namespace

}  // namespace phydi
