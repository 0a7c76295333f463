// The product of packed operands that every plan but stream ends in. It follows the classic blocking (Goto and
// van de Geijn, 2008): strips of the operand with output features along the lanes, row blocks of the other operand in
// L2, and a register tile of kTileRows x (kTileVectors * lanes).
#pragma once

#include <type_traits>

#include "common.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace phydi {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 accumulators of 32 registers
#else
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
#endif
constexpr int kTileVectors = 2;
// The numbers of rows that tiles are compiled for.
constexpr int kTileSizes[] = {kTileRows, (kTileRows + 2) / 2, (kTileRows + 2) / 4, (kTileRows + 2) / 8};

// A tile's strip of the weight operand (depth kDepth) takes at most two thirds of a 48 KiB L1.
template <class T>
constexpr int kDepth = 1024 / int(sizeof(T));
// A row of a packed block: kDepth entries and one cache line, so that rows do not fall into the same L1 sets.
template <class T>
constexpr int kBlockStride = kDepth<T> + 64 / int(sizeof(T));
constexpr int kBlockRows = 112 / kTileRows * kTileRows;
template <class T>
constexpr int kStrip = kTileVectors * kLanes<T>;
// Packed weights held at a time: this much, or 1/n of H where that is more.
constexpr int64_t kPackBytes = 2 << 20;

// Steps of the summation in one lane of a packed operand: with AVX512_BF16 a lane holds a pair of bfloat16, multiplied
// and added to a float in one instruction.
template <class In>
constexpr int kPerLane = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kPerLane<bf16> = 2;
#endif

// Entries of a packed row: of the compute type, or bfloat16 where a lane holds two.
template <class In>
using Entry = std::conditional_t<kPerLane<In> == 2, bf16_operand, Compute<In>>;

// One vector of a packed operand from kPerLane lines of entries.
template <class In>
inline Vec<Compute<In>> packed(const Compute<In> (&line)[kPerLane<In>][kLanes<Compute<In>>]) {
  if constexpr (kPerLane<In> == 2) {
    return bf16_pairs(load(line[0]), load(line[1]));
  } else {
    return load(line[0]);
  }
}

// A vector of an operand that is not packed, its kPerLane * kLanes entries as they lie.
template <class In>
inline Vec<Compute<In>> load_lanes(const In* entries) {
  if constexpr (kPerLane<In> == 2) {
    Vec<Compute<In>> pairs;
    memcpy(&pairs, entries, sizeof pairs);
    return pairs;
  } else {
    return load(entries);
  }
}

// The same of the first `count` of them; the others are zero.
template <class In>
inline Vec<Compute<In>> load_some_lanes(const In* entries, int64_t count) {
  if constexpr (kPerLane<In> == 2) {
    constexpr int64_t all = kPerLane<In> * kLanes<Compute<In>>;
    In padded[all] = {};
    memcpy(padded, entries, size_t(std::min(count, all)) * sizeof(In));
    return load_lanes(padded);
  } else {
    return load_some(entries, count);
  }
}

template <class In>
inline Vec<Compute<In>> broadcast(const Compute<In>* a) {
#if defined(__AVX512BF16__)
  if constexpr (kPerLane<In> == 2) {
    int pair;
    memcpy(&pair, a, sizeof pair);
    return (Vec<float>)_mm512_set1_epi32(pair);
  }
#endif
  return splat(*a);
}

template <class In>
inline void multiply_add(Vec<Compute<In>>& c, Vec<Compute<In>> a, Vec<Compute<In>> b) {
#if defined(__AVX512BF16__)
  if constexpr (kPerLane<In> == 2) {
    c = (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    return;
  }
#endif
  c += a * b;
}

// acc (M rows, NV vectors) += a (M x depth) * b (depth x NV vectors), depth in lanes. `a` holds entry (m, k) at
// a + m * row_stride + k * step_stride: constants, so that one pointer addresses all rows.
template <class In, int row_stride, int step_stride, int M, int NV>
inline __attribute__((always_inline)) void accumulate(Vec<Compute<In>> (&acc)[M][NV], int64_t depth,
                                                      const Compute<In>* a, const Compute<In>* b,
                                                      int64_t b_stride = kStrip<Compute<In>>) {
  using T = Compute<In>;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec<T> am = broadcast<In>(a + m * row_stride);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) multiply_add<In>(acc[m][v], am, w[v]);
    }
    a += step_stride;
    b += b_stride;
  }
}

template <class T, int M, int NV>
inline __attribute__((always_inline)) void store_tile(const Vec<T> (&acc)[M][NV], T* c, int64_t c_stride) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c + m * c_stride + v * kLanes<T>, acc[m][v]);
}

// A register tile: c = (first ? 0 : c) + a * b. The lanes of b follow each other, or are `apart`: b_stride entries.
template <class In, int M, int NV, int row_stride, int step_stride, bool apart>
void run_tile(int64_t depth, const Compute<In>* a, const Compute<In>* b, [[maybe_unused]] int64_t b_stride, bool first,
              Compute<In>* c, int64_t c_stride) {
  using T = Compute<In>;
  Vec<T> acc[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = first ? Vec<T>{} : load(c + m * c_stride + v * kLanes<T>);
  accumulate<In, row_stride, step_stride>(acc, depth, a, b, apart ? b_stride : kStrip<T>);
  store_tile<T>(acc, c, c_stride);
}

// The tile function for `rows` rows and `columns` columns, rounded up to what is compiled.
template <class T>
using TileFn = void (*)(int64_t depth, const T* a, const T* b, int64_t b_stride, bool first, T* c, int64_t c_stride);

template <class In, int row_stride, int step_stride, bool apart, int M>
TileFn<Compute<In>> tile_of_columns(int64_t columns) {
  return columns > kLanes<Compute<In>> ? run_tile<In, M, 2, row_stride, step_stride, apart>
                                       : run_tile<In, M, 1, row_stride, step_stride, apart>;
}

template <class In, int row_stride, int step_stride, bool apart = false>
TileFn<Compute<In>> tile(int64_t rows, int64_t columns) {
  if (rows > kTileSizes[1]) return tile_of_columns<In, row_stride, step_stride, apart, kTileSizes[0]>(columns);
  if (rows > kTileSizes[2]) return tile_of_columns<In, row_stride, step_stride, apart, kTileSizes[1]>(columns);
  if (rows > kTileSizes[3]) return tile_of_columns<In, row_stride, step_stride, apart, kTileSizes[2]>(columns);
  return tile_of_columns<In, row_stride, step_stride, apart, kTileSizes[3]>(columns);
}

// Rows of a tile, so that the tiles of `rows` take least; fewer than `busy` of them leave units idle.
inline int64_t tile_step(int64_t rows, int64_t busy) {
  const auto cost = [&](int64_t step) {
    const auto of_tile = [&](int64_t some) {
      int64_t compiled = kTileSizes[0];
      for (const int size : kTileSizes) compiled = some <= size ? size : compiled;
      return std::max(compiled, busy) + 1;
    };
    return rows / step * of_tile(step) + (rows % step ? of_tile(rows % step) : 0);
  };
  return cost(kTileSizes[1]) < cost(kTileSizes[0]) ? kTileSizes[1] : kTileSizes[0];
}

}  // namespace

}  // namespace phydi
