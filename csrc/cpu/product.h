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
// Whether tile registers multiply packed operands.
template <class In>
constexpr bool kAmx = false;
#if defined(__AMX_BF16__)
template <>
constexpr bool kAmx<bf16> = true;
#endif
// Rows of the largest tile, and the numbers of rows that tiles are compiled for.
template <class In>
constexpr int kRows = kAmx<In> ? 32 : kTileRows;
template <class In>
constexpr int kTileSizes[] = {kRows<In>, kAmx<In> ? 24 : (kTileRows + 2) / 2, kAmx<In> ? 16 : (kTileRows + 2) / 4,
                              kAmx<In> ? 8 : (kTileRows + 2) / 8};

// A tile's strip of the weight operand (depth kDepth) takes at most two thirds of a 48 KiB L1.
template <class T>
constexpr int kDepth = 1024 / int(sizeof(T));
// A row of a packed block: kDepth entries and one cache line, so that rows do not fall into the same L1 sets.
template <class T>
constexpr int kBlockStride = kDepth<T> + 64 / int(sizeof(T));
template <class In>
constexpr int kBlockRows = 112 / kRows<In> * kRows<In>;
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

// The same by tile registers of AMX, b without a stride of its own; lanes that do not fill one by vectors.
template <class In, int M, int NV, int row_stride>
void run_amx_tile(int64_t depth, const Compute<In>* a, const Compute<In>* b, int64_t b_stride, bool first,
                  Compute<In>* c, int64_t c_stride) {
#if defined(__AMX_BF16__)
  constexpr int some = 8, strip = kStrip<float>;
  static_assert(M % some == 0);
  const int64_t steps = depth / kAmxLanes, whole = steps * kAmxLanes;
  if (steps) multiply_amx<M, NV, row_stride, strip>(steps, a, b, first, c, c_stride);
  if (whole == depth) return;
  for (int m = 0; m < M; m += some)
    run_tile<In, some, NV, row_stride, 1, false>(depth - whole, a + whole + m * row_stride, b + whole * strip, b_stride,
                                                 first && steps == 0, c + m * c_stride, c_stride);
#endif
}

// The tile function for `rows` rows and `columns` columns, rounded up to what is compiled.
template <class T>
using TileFn = void (*)(int64_t depth, const T* a, const T* b, int64_t b_stride, bool first, T* c, int64_t c_stride);

template <class In, int row_stride, int step_stride, bool apart, int M>
TileFn<Compute<In>> tile_of_columns(int64_t columns) {
  const bool wide = columns > kLanes<Compute<In>>;
  if constexpr (kAmx<In>) {
    static_assert(step_stride == 1 && !apart);
    return wide ? run_amx_tile<In, M, 2, row_stride> : run_amx_tile<In, M, 1, row_stride>;
  } else {
    return wide ? run_tile<In, M, 2, row_stride, step_stride, apart>
                : run_tile<In, M, 1, row_stride, step_stride, apart>;
  }
}

template <class In, int row_stride, int step_stride, bool apart = false>
TileFn<Compute<In>> tile(int64_t rows, int64_t columns) {
  constexpr auto& sizes = kTileSizes<In>;
  if (rows > sizes[1]) return tile_of_columns<In, row_stride, step_stride, apart, sizes[0]>(columns);
  if (rows > sizes[2]) return tile_of_columns<In, row_stride, step_stride, apart, sizes[1]>(columns);
  if (rows > sizes[3]) return tile_of_columns<In, row_stride, step_stride, apart, sizes[2]>(columns);
  return tile_of_columns<In, row_stride, step_stride, apart, sizes[3]>(columns);
}

// Rows of a tile, so that the tiles of `rows` take least; fewer than `busy` of them leave units idle.
template <class In>
int64_t tile_step(int64_t rows, int64_t busy) {
  if constexpr (kAmx<In>) {
    // Tiles of one size, for which the registers stay set up.
    int64_t best = kRows<In>;
    for (const int size : kTileSizes<In>)
      if (round_up(rows, size) < round_up(rows, best)) best = size;
    return best;
  }
  const auto cost = [&](int64_t step) {
    const auto of_tile = [&](int64_t some) {
      int64_t compiled = kRows<In>;
      for (const int size : kTileSizes<In>) compiled = some <= size ? size : compiled;
      return std::max(compiled, busy) + 1;
    };
    return rows / step * of_tile(step) + (rows % step ? of_tile(rows % step) : 0);
  };
  return cost(kTileSizes<In>[1]) < cost(kTileSizes<In>[0]) ? kTileSizes<In>[1] : kTileSizes<In>[0];
}

}  // namespace

}  // namespace phydi
