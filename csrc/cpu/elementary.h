// Elementary functions of vectors.
#pragma once

#include <cmath>

#include "vec.h"

namespace phydi {
namespace {

template <class T>
struct Exp;

// Constants of exp: log(2) in two parts, so that x - n log(2) is exact to the last bit, the range of x whose results
// are neither 0 nor infinite, and the degree of the series on |r| <= log(2)/2.
template <>
struct Exp<double> {
  static constexpr double kLn2High = 0x1.62e42fefa0000p-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double kRound = 0x1.8p52;  // added, it leaves the integer in the low bits
  static constexpr double kLeast = -746, kMost = 710;
  static constexpr int kMantissa = 52, kBias = 1023, kDegree = 13;
};
template <>
struct Exp<float> {
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kLeast = -104, kMost = 89;
  static constexpr int kMantissa = 23, kBias = 127, kDegree = 7;
};

// 1/k!
template <class T, int k>
constexpr T kInverseFactorial = k == 0 ? T(1) : kInverseFactorial<T, k - 1> / T(k);
template <class T>
constexpr T kInverseFactorial<T, 0> = T(1);

template <class T, int k>
inline __attribute__((always_inline)) Vec<T> exp_series(Vec<T> r, Vec<T> tail) {
  if constexpr (k < 0) {
    return tail;
  } else {
    return exp_series<T, k - 1>(r, tail * r + splat(T(kInverseFactorial<double, k>)));
  }
}

// e^x within 2 units of the last place, subnormal results included; NaN of NaN.
template <class T>
inline Vec<T> vector_exp(Vec<T> x) {
  using E = Exp<T>;
  x = x < splat(E::kLeast) ? splat(E::kLeast) : x;
  x = x > splat(E::kMost) ? splat(E::kMost) : x;
  const Vec<T> shifted = x * T(1.4426950408889634) + E::kRound;
  const Vec<T> n = shifted - E::kRound;
  const Vec<T> r = (x - n * E::kLn2High) - n * E::kLn2Low;
  const Vec<T> series = exp_series<T, E::kDegree - 1>(r, splat(T(kInverseFactorial<double, E::kDegree>)));
  // 2^n in two factors: the exponent of a subnormal result does not fit one.
  const Mask<T> exponent = (Mask<T>)shifted - (Mask<T>)splat(E::kRound);
  const Mask<T> half = exponent >> 1;
  const Vec<T> first = (Vec<T>)((half + E::kBias) << E::kMantissa);
  const Vec<T> second = (Vec<T>)((exponent - half + E::kBias) << E::kMantissa);
  return series * first * second;
}

template <class T>
inline Vec<T> vector_sqrt(Vec<T> x) {
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<T>; ++j) x[j] = std::sqrt(x[j]);
  return x;
}

template <class T>
inline Vec<T> vector_tanh(Vec<T> x) {
  for (int j = 0; j < kLanes<T>; ++j) x[j] = std::tanh(x[j]);
  return x;
}

template <class T>
inline Vec<T> vector_abs(Vec<T> x) {
  const Mask<T> sign = (Mask<T>)splat(T(-0.0));
  return (Vec<T>)((Mask<T>)x & ~sign);
}

}  // namespace
}  // namespace phydi
