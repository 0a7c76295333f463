// Vectors of the widest width this file is compiled for, and loads and stores that convert to the compute type.
// Everything has internal linkage: two instruction sets in one library must not share an inline function.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// A bfloat16 operand of a packed product. The processor's conversion takes subnormal numbers for zero, and so does its
// product.
struct bf16_operand {
  uint16_t bits;
};

// The type to add and multiply in.
template <class In>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class In>
using Compute = typename ComputeOf<In>::type;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
struct MaskOf {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct MaskOf<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Mask = typename MaskOf<T>::type;

typedef uint16_t U16s __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t U32s __attribute__((vector_size(kVectorBytes)));

static inline Vec<float> load(const float* p) {
  Vec<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline Vec<double> load(const double* p) {
  Vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline Vec<float> load(const bf16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // One instruction; of the conversion of vectors GCC makes five.
  const U32s bits = (U32s)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  U16s half;
  memcpy(&half, p, sizeof half);
  const U32s bits = __builtin_convertvector(half, U32s);
#endif
  return (Vec<float>)(bits << 16);
}

static inline float f16_to_float(f16 h) {
  _Float16 v;
  memcpy(&v, &h, sizeof v);
  return float(v);
}

static inline f16 float_to_f16(float f) {
  const _Float16 v = _Float16(f);
  f16 h;
  memcpy(&h, &v, sizeof h);
  return h;
}

static inline Vec<float> load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int j = 0; j < kLanes<float>; ++j) v[j] = f16_to_float(p[j]);
  return v;
#endif
}

static inline void store(float* p, Vec<float> v) { memcpy(p, &v, sizeof v); }

static inline void store(double* p, Vec<double> v) { memcpy(p, &v, sizeof v); }

// bfloat16 bits in the upper half of each lane: round to nearest, ties to even; NaN stays NaN.
static inline U32s round_to_bf16(Vec<float> v) {
  const U32s bits = (U32s)v;
  const U32s rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  const U32s is_nan = (U32s)((bits & 0x7fffffffu) > 0x7f800000u);
  return ((rounded & ~is_nan) | ((bits | 0x400000u) & is_nan)) & 0xffff0000u;
}

static inline void store(bf16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers for zero.
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0, 1)) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &half, sizeof half);
    return;
  }
#endif
  const U16s half = __builtin_convertvector(round_to_bf16(v) >> 16, U16s);
  memcpy(p, &half, sizeof half);
}

#if defined(__AVX512BF16__)
// Lanes of bfloat16 pairs: the first in the lower half.
static inline Vec<float> bf16_pairs(Vec<float> first, Vec<float> second) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec<float>)_mm512_permutexvar_epi16(order, halves);
}

static inline void store(bf16_operand* p, Vec<float> v) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &half, sizeof half);
}
#endif

static inline void store(f16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int j = 0; j < kLanes<float>; ++j) p[j] = float_to_f16(v[j]);
#endif
}

// What is shorter than 16 bytes in two words, read and written in pieces of 8, 4 and 2: a vector read from memory that
// was written in pieces would wait for them.
typedef uint64_t Words __attribute__((vector_size(16)));

static inline Words load_words(const void* from, int64_t bytes) {
  const char* p = static_cast<const char*>(from);
  uint64_t first = 0, rest = 0;
  if (bytes & 8) memcpy(&first, p, 8);
  const char* tail = p + (bytes & 8);
  if (bytes & 4) {
    uint32_t four;
    memcpy(&four, tail, 4);
    rest = four;
  }
  if (bytes & 2) {
    uint16_t two;
    memcpy(&two, tail + (bytes & 4), 2);
    rest |= uint64_t(two) << (bytes & 4) * 8;
  }
  return bytes & 8 ? Words{first, rest} : Words{rest, 0};
}

static inline void store_words(void* to, Words words, int64_t bytes) {
  char* p = static_cast<char*>(to);
  uint64_t rest = words[0];
  if (bytes & 8) {
    memcpy(p, &rest, 8);
    p += 8;
    rest = words[1];
  }
  if (bytes & 4) {
    memcpy(p, &rest, 4);
    p += 4;
    rest >>= 32;
  }
  if (bytes & 2) memcpy(p, &rest, 2);
}

// The first `count` elements; the other lanes are zero.
template <class In>
static inline Vec<Compute<In>> load_some(const In* p, int64_t count) {
  constexpr int64_t lanes = kLanes<Compute<In>>;
  if (count >= lanes) return load(p);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << count) - 1u;
  if constexpr (sizeof(In) == 8) {
    return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  } else if constexpr (sizeof(In) == 4) {
    return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  } else {
    In padded[lanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(padded), _mm256_maskz_loadu_epi16(__mmask16(mask), p));
    return load(padded);
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(In) >= 4) {
    // A window of ones and zeros that begins with `count` ones.
    alignas(64) static constexpr int32_t window[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    constexpr int64_t step = sizeof(In) / 4;
    const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(window + 8 - step * count));
    if constexpr (step == 2) {
      return (Vec<double>)_mm256_maskload_pd(p, mask);
    } else {
      return (Vec<float>)_mm256_maskload_ps(p, mask);
    }
  }
#endif
  const Words words = load_words(p, count * int64_t(sizeof(In)));
  In padded[lanes];
  memcpy(padded, &words, sizeof padded);
  return load(padded);
#endif
}

template <class Out>
static inline void store_some(Out* p, Vec<Compute<Out>> v, int64_t count) {
  constexpr int64_t lanes = kLanes<Compute<Out>>;
  if (count >= lanes) return store(p, v);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << count) - 1u;
  if constexpr (sizeof(Out) == 8) {
    return _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v);
  } else if constexpr (sizeof(Out) == 4) {
    return _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)v);
  }
#endif
  Out padded[lanes];
  store(padded, v);
#if defined(__AVX512F__)
  memcpy(p, padded, size_t(count) * sizeof(Out));
#else
  // Of a vector of 32 bytes the first half as it is, where there are as many.
  const int64_t bytes = count * int64_t(sizeof(Out));
  Words words{};
  constexpr size_t half = std::min(sizeof words, sizeof padded);
  memcpy(&words, padded, half);
  if (bytes < 16) return store_words(p, words, bytes);
  memcpy(p, &words, half);
  memcpy(&words, padded + lanes / 2, half);
  store_words(reinterpret_cast<char*>(p) + 16, words, bytes - 16);
#endif
}

template <class T>
static inline Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// One step of a transposition: exchanges bit h of the lane with the choice between a and b.
template <class T, int h>
static inline __attribute__((always_inline)) void exchange(Vec<T>& a, Vec<T>& b) {
  Mask<T> first, second;
  for (int j = 0; j < kLanes<T>; ++j) {
    first[j] = (j & h) ? kLanes<T> + (j ^ h) : j;
    second[j] = (j & h) ? kLanes<T> + j : (j ^ h);
  }
  const Vec<T> low = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = low;
}

template <class T, int h = 1>
static inline __attribute__((always_inline)) void transpose(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (h < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (!(i & h)) exchange<T, h>(rows[i], rows[i | h]);
    }
    transpose<T, 2 * h>(rows);
  }
}

// Lane j of the result is the sum of all lanes of v[j]; v is overwritten.
template <class T, int h = 1>
static inline __attribute__((always_inline)) Vec<T> sum_lanes(Vec<T>* v) {
  if constexpr (h < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i += 2 * h) {
      exchange<T, h>(v[i], v[i + h]);
      v[i] += v[i + h];
    }
    return sum_lanes<T, 2 * h>(v);
  }
  return v[0];
}

template <class T>
static inline T sum(Vec<T> v) {
  T total = 0;
  for (int j = 0; j < kLanes<T>; ++j) total += v[j];
  return total;
}

// Scratch memory of one task: cache-line aligned, freed at the end of the scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(aligned_alloc(64, (size_t(count) * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace
