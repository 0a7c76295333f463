// Products summed over the batch, for the gradients of weights.
#pragma once

#include "product.h"

namespace phydi {
namespace {

// G (rows, columns) = sum_b row_entries(b)^T column_entries(b), from functions (b, first, count, to) that write entries
// [first, first + count) of a batch row. G has room for round_up(rows, kTileRows) rows of `stride`, a whole number of
// strips; `packed_columns` for that stride times kDepth. `first`: G is written, not added to.
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
    // The lines of a lane, one batch row or two, and its vector from entry `at` on.
    const auto fill_lines = [&](const auto& entries, int64_t lane, int64_t from, int64_t count, int64_t size, T* line) {
      for (int64_t h = 0; h < per; ++h) {
        const int64_t written = lane * per + h < steps ? count : 0;
        if (written) entries(b + lane * per + h, from, count, line + h * size);
        std::fill(line + h * size + written, line + (h + 1) * size, T(0));
      }
    };
    const auto vector_at = [](const T* line, [[maybe_unused]] int64_t size, int64_t at) {
      if constexpr (per == 2) {
        return bf16_pairs(load(line + at), load(line + size + at));
      } else {
        return load(line + at);
      }
    };
    const int64_t packers = std::min(lanes, threads.count);
    parallel(threads, packers, [&](int64_t packer) {
      const int64_t size = round_up(columns, vector);
      const Scratch<T> line(per * size);
      for (int64_t lane = lanes * packer / packers; lane < lanes * (packer + 1) / packers; ++lane) {
        fill_lines(column_entries, lane, 0, columns, size, line.get());
        for (int64_t at = 0; at < columns; at += vector)
          store(packed_columns.get() + (at / kStrip<T> * lanes + lane) * kStrip<T> + at % kStrip<T>,
                vector_at(line.get(), size, at));
      }
    });
    parallel(threads, workers, [&](int64_t worker) {
      // Tiles of rows, one lane of kTileRows entries after the other; a vector may be written past the last.
      constexpr int64_t tile_size = kTileRows * kDepth<T> + vector;
      const int64_t size = block_rows + vector;
      const Scratch<T> packed_rows(block_rows / kTileRows * tile_size), line(per * size);
      for (int64_t block = blocks * worker / workers; block < blocks * (worker + 1) / workers; ++block) {
        const int64_t row = block * block_rows, count = std::min<int64_t>(block_rows, rows - row);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          fill_lines(row_entries, lane, row, count, size, line.get());
          for (int64_t m = 0; m < count; m += kTileRows)
            for (int64_t v = 0; v < kTileRows; v += vector)
              store(packed_rows.get() + m / kTileRows * tile_size + lane * kTileRows + v,
                    vector_at(line.get(), size, m + v));
        }
        for (int64_t strip = 0; strip < strips; ++strip) {
          const int64_t column = strip * kStrip<T>;
          for (int64_t m = 0; m < count; m += kTileRows)
            tile<In, 1, kTileRows>(kTileRows, columns - column)(
                lanes, packed_rows.get() + m / kTileRows * tile_size, packed_columns.get() + strip * lanes * kStrip<T>,
                first && b == 0, G + (row + m) * stride + column, stride);
        }
      }
    });
  }
}

}  // namespace

}  // namespace phydi
