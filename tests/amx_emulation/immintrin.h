// Stands in for the compiler's header of the same name: the AVX-512 and AMX intrinsics of the kernels for linear
// layers, in plain C++, so that those kernels run on any processor. Misuse of the tile registers ends the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef double __m512d __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));
typedef short __m256bh __attribute__((vector_size(32), may_alias));
typedef uint8_t __mmask8;
typedef uint16_t __mmask16;

#define _MM_FROUND_TO_NEAREST_INT 0

namespace emulation {

template <class To, class From>
To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The instructions for bfloat16 take subnormal numbers for zero.
inline float flushed(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.0f, f) : f; }

inline uint16_t to_bf16(float f) {
  const uint32_t b = bits<uint32_t>(flushed(f));
  if (std::isnan(f)) return uint16_t(b >> 16 | 0x40);
  return uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t h) { return flushed(bits<float>(uint32_t(h) << 16)); }

// c + a * b for a pair of bfloat16 in a lane.
inline float dot(float c, uint32_t a, uint32_t b) {
  c = flushed(std::fma(from_bf16(uint16_t(a >> 16)), from_bf16(uint16_t(b >> 16)), c));
  return flushed(std::fma(from_bf16(uint16_t(a)), from_bf16(uint16_t(b)), c));
}

template <class V, class T>
V masked_load(uint32_t mask, const void* from) {
  T lanes[sizeof(V) / sizeof(T)] = {};
  for (size_t j = 0; j < sizeof(V) / sizeof(T); ++j)
    if (mask >> j & 1) lanes[j] = static_cast<const T*>(from)[j];
  return bits<V>(lanes);
}

template <class T, class V>
void masked_store(void* to, uint32_t mask, V v) {
  for (size_t j = 0; j < sizeof(V) / sizeof(T); ++j)
    if (mask >> j & 1) static_cast<T*>(to)[j] = v[j];
}

}  // namespace emulation

inline __m256bh _mm512_cvtneps_pbh(__m512 v) {
  uint16_t h[16];
  for (int j = 0; j < 16; ++j) h[j] = emulation::to_bf16(v[j]);
  return emulation::bits<__m256bh>(h);
}

inline __m512bh _mm512_cvtne2ps_pbh(__m512 upper, __m512 lower) {
  uint16_t h[32];
  for (int j = 0; j < 16; ++j) {
    h[j] = emulation::to_bf16(lower[j]);
    h[16 + j] = emulation::to_bf16(upper[j]);
  }
  return emulation::bits<__m512bh>(h);
}

inline __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  uint32_t left[16], right[16];
  memcpy(left, &a, 64);
  memcpy(right, &b, 64);
  for (int j = 0; j < 16; ++j) c[j] = emulation::dot(c[j], left[j], right[j]);
  return c;
}

inline __mmask16 _mm512_fpclass_ps_mask(__m512 v, int category) {
  if (category != 0x20) abort();  // subnormal
  __mmask16 mask = 0;
  for (int j = 0; j < 16; ++j) mask = __mmask16(mask | (std::fpclassify(v[j]) == FP_SUBNORMAL) << j);
  return mask;
}

template <class... Lanes>
__m512i _mm512_set_epi16(Lanes... from_the_last) {
  const short given[] = {short(from_the_last)...};
  short lanes[32];
  for (int j = 0; j < 32; ++j) lanes[j] = given[31 - j];
  return emulation::bits<__m512i>(lanes);
}

inline __m512i _mm512_permutexvar_epi16(__m512i order, __m512i a) {
  uint16_t from[32], at[32], to[32];
  memcpy(from, &a, 64);
  memcpy(at, &order, 64);
  for (int j = 0; j < 32; ++j) to[j] = from[at[j] & 31];
  return emulation::bits<__m512i>(to);
}

inline __m512i _mm512_set1_epi32(int value) {
  int lanes[16];
  for (int& lane : lanes) lane = value;
  return emulation::bits<__m512i>(lanes);
}

inline __m512 _mm512_cvtph_ps(__m256i v) {
  _Float16 h[16];
  memcpy(h, &v, 32);
  __m512 to;
  for (int j = 0; j < 16; ++j) to[j] = float(h[j]);
  return to;
}

inline __m256i _mm512_cvtps_ph(__m512 v, int) {
  _Float16 h[16];
  for (int j = 0; j < 16; ++j) h[j] = _Float16(v[j]);
  return emulation::bits<__m256i>(h);
}

inline __m256i _mm256_loadu_si256(const __m256i* p) {
  __m256i v;
  memcpy(&v, p, 32);
  return v;
}

inline void _mm256_storeu_si256(__m256i* p, __m256i v) { memcpy(p, &v, 32); }

inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return emulation::masked_load<__m256i, uint16_t>(mask, p);
}

inline __m512d _mm512_maskz_loadu_pd(__mmask8 mask, const void* p) {
  return emulation::masked_load<__m512d, double>(mask, p);
}

inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return emulation::masked_load<__m512, float>(mask, p);
}

inline void _mm512_mask_storeu_pd(void* p, __mmask8 mask, __m512d v) { emulation::masked_store<double>(p, mask, v); }

inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) { emulation::masked_store<float>(p, mask, v); }

namespace emulation {

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct Tiles {
  TileConfig config = {};
  uint32_t data[8][16][16] = {};

  [[noreturn]] static void fail(const char* why) {
    fprintf(stderr, "tile registers: %s\n", why);
    abort();
  }

  int rows(int tile) const {
    if (config.palette != 1) fail("not set up");
    if (tile < 0 || tile > 7 || config.rows[tile] == 0) fail("this one is not set up");
    return config.rows[tile];
  }
  int lanes(int tile) const { return rows(tile) ? config.row_bytes[tile] / 4 : 0; }

  void load_config(const void* from) {
    memcpy(&config, from, sizeof config);
    if (config.palette != 1 || config.start_row != 0) fail("palette or start row");
    for (const uint8_t byte : config.reserved)
      if (byte) fail("reserved bytes are not zero");
    for (int j = 0; j < 16; ++j) {
      if (config.rows[j] > (j < 8 ? 16 : 0) || config.row_bytes[j] > (j < 8 ? 64 : 0)) fail("too large");
      if (!config.rows[j] != !config.row_bytes[j]) fail("rows without bytes");
    }
    memset(data, 0, sizeof data);
  }

  void zero(int tile) {
    rows(tile);
    memset(data[tile], 0, sizeof data[tile]);
  }

  void load(int tile, const void* base, int64_t stride) {
    zero(tile);
    for (int r = 0; r < rows(tile); ++r)
      memcpy(data[tile][r], static_cast<const char*>(base) + r * stride, config.row_bytes[tile]);
  }

  void store(int tile, void* base, int64_t stride) const {
    for (int r = 0; r < rows(tile); ++r)
      memcpy(static_cast<char*>(base) + r * stride, data[tile][r], config.row_bytes[tile]);
  }

  void multiply(int c, int a, int b) {
    if (rows(c) != rows(a) || lanes(c) != lanes(b) || lanes(a) != rows(b)) fail("shapes do not fit");
    for (int m = 0; m < rows(c); ++m)
      for (int k = 0; k < lanes(a); ++k)
        for (int j = 0; j < lanes(c); ++j)
          data[c][m][j] = bits<uint32_t>(dot(bits<float>(data[c][m][j]), data[a][m][k], data[b][k][j]));
  }
};

inline thread_local Tiles tiles;

}  // namespace emulation

inline void _tile_loadconfig(const void* config) { emulation::tiles.load_config(config); }
inline void _tile_release() { emulation::tiles.config = {}; }
inline void _tile_zero(int tile) { emulation::tiles.zero(tile); }
inline void _tile_loadd(int tile, const void* base, int64_t stride) { emulation::tiles.load(tile, base, stride); }
inline void _tile_stored(int tile, void* base, int64_t stride) { emulation::tiles.store(tile, base, stride); }
inline void _tile_dpbf16ps(int c, int a, int b) { emulation::tiles.multiply(c, a, b); }
