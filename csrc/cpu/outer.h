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

// G (rows, columns) = sum_b row(b)^T column(b), from functions (b, first, count, scratch) that return entries [first,
// first + count) of a batch row, where they lie or written to `scratch`. G has room for round_up(rows, kTileRows) rows
// of `stride`, a whole number of strips; `packed_columns` for that stride times kDepth. `first`: G is written, not
// added to.
template <class In, class RowEntries, class ColumnEntries>
void outer_product(int64_t batch, int64_t rows, int64_t columns, const RowEntries& row_entries,
                   const ColumnEntries& column_entries, const Scratch<Compute<In>>& packed_columns, Compute<In>* G,
                   int64_t stride, bool first, const Threads& threads) {
  using T = Compute<In>;
  constexpr int64_t per = kPerLane<In>, vector = kLanes<T>;
  // As many blocks of rows for each thread as for the others.
  const int64_t shares = ceil_div(ceil_div(rows, kBlockRows), threads.count) * threads.count;
  const int64_t block_rows = round_up(ceil_div(rows, shares), kTileRows), blocks = ceil_div(rows, block_rows);
  const int64_t workers = std::min(blocks, threads.count), strips = ceil_div(columns, kStrip<T>);
  if (first && batch == 0) std::fill(G, G + rows * stride, T(0));
  for (int64_t b = 0; b < batch; b += per * kDepth<T>) {
    const int64_t steps = std::min<int64_t>(per * kDepth<T>, batch - b), lanes = ceil_div(steps, per);
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
      // Tiles of rows, one lane of kTileRows entries after the other; a vector may be written past the last.
      constexpr int64_t tile_size = kTileRows * kDepth<T> + vector;
      const Scratch<T> packed_rows(block_rows / kTileRows * tile_size);
      for (int64_t block = blocks * worker / workers; block < blocks * (worker + 1) / workers; ++block) {
        const int64_t row = block * block_rows, count = std::min<int64_t>(block_rows, rows - row);
        each_lane(row_entries, 0, lanes, row, count, [&](int64_t lane, const auto& lines) {
          for (int64_t m = 0; m < count; m += kTileRows)
            for (int64_t v = 0; v < kTileRows; v += vector)
              store(packed_rows.get() + m / kTileRows * tile_size + lane * kTileRows + v,
                    packed_lines<In>(lines, m + v, count));
        });
        for (int64_t strip = 0; strip < strips; ++strip) {
          const int64_t column = strip * kStrip<T>;
          for (int64_t m = 0; m < count; m += kTileRows)
            tile<In, 1, kTileRows>(count - m, columns - column)(
                lanes, packed_rows.get() + m / kTileRows * tile_size, packed_columns.get() + strip * lanes * kStrip<T>,
                kStrip<T>, first && b == 0, G + (row + m) * stride + column, stride);
        }
      }
    });
  }
}

}  // namespace

}  // namespace phydi
