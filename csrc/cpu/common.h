// What the kernels share. Everything is in an anonymous namespace; see vec.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "kernels.h"
#include "vec.h"

namespace phydi {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class Fn>
void parallel(const Threads& threads, int64_t tasks, const Fn& fn) {
  const auto task = [](void* context, int64_t index) {
    [[maybe_unused]] const AmxOfTask amx;
    (*static_cast<const Fn*>(context))(index);
  };
  Fn* const context = const_cast<Fn*>(&fn);
  if (tasks == 1 || threads.count == 1) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i);
    return;
  }
  threads.run(tasks, task, context);
}

// Multiplications in the time that it takes to start another thread.
constexpr int64_t kThreadStart = 1 << 17;

template <class Fn>
void with_type(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::f32:
      return fn(float{});
    case DType::f64:
      return fn(double{});
    case DType::bf16:
      return fn(bf16{});
    case DType::f16:
      return fn(f16{});
  }
}

// The kernels that know no 16-bit types.
template <class Fn>
void with_real(DType dtype, const Fn& fn) {
  dtype == DType::f64 ? fn(double{}) : fn(float{});
}

// Asks for `count` entries of a row that the processor does not foresee: it is short, or lies far from the one before.
template <class In>
inline void prefetch(const In* row, int64_t count) {
  for (int64_t j = 0; j < count; j += 64 / int64_t(sizeof(In))) __builtin_prefetch(row + j);
}

// NV vectors of combine, of the last of them `some` entries: sums beside each other, which do not wait for one another.
template <int NV, class In, class Out>
inline void combine_vectors(const In* rows, int64_t row_stride, const Compute<In>* weight, int64_t weight_stride,
                            int64_t terms, Out* out, int64_t some) {
  using T = Compute<In>;
  constexpr int last = NV - 1;
  Vec<T> total[NV] = {};
  for (int64_t t = 0; t < terms; ++t) {
    const Vec<T> w = splat(weight[t * weight_stride]);
    const In* row = rows + t * row_stride;
#pragma GCC unroll 4
    for (int v = 0; v < last; ++v) total[v] += w * load(row + v * kLanes<T>);
    total[last] += w * load_some(row + last * kLanes<T>, some);
  }
#pragma GCC unroll 4
  for (int v = 0; v < last; ++v) store(out + v * kLanes<T>, total[v]);
  store_some(out + last * kLanes<T>, total[last], some);
}

// out[s] = sum_t weight[t * weight_stride] * rows[t * row_stride + s] for s < count.
template <class In, class Out>
inline void combine(const In* rows, int64_t row_stride, const Compute<In>* weight, int64_t weight_stride, int64_t terms,
                    Out* out, int64_t count) {
  constexpr int64_t lanes = kLanes<Compute<In>>;
  const auto some = [&](auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    combine_vectors<NV>(rows, row_stride, weight, weight_stride, terms, out, count - (NV - 1) * lanes);
  };
  for (; count > 3 * lanes; count -= 4 * lanes, rows += 4 * lanes, out += 4 * lanes)
    some(std::integral_constant<int, 4>{});
  if (count > 2 * lanes) return some(std::integral_constant<int, 3>{});
  if (count > lanes) return some(std::integral_constant<int, 2>{});
  if (count > 0) some(std::integral_constant<int, 1>{});
}

// out[s] = row[s] for s < count, with a change of type.
template <class In, class Out>
inline void copy_row(const In* row, Out* out, int64_t count) {
  for (int64_t s = 0; s < count; s += kLanes<Compute<In>>)
    store_some(out + s, load_some(row + s, count - s), count - s);
}

// max(h, 0), and NaN of NaN, as torch.relu.
template <class T>
inline Vec<T> rectified(Vec<T> h) {
  return h < Vec<T>{} ? Vec<T>{} : h;
}

// y = residual + alpha * act(v + bias) on `count` contiguous elements; null bias and residual are left out, and
// `alphas` take the place of alpha unless null.
template <class In>
void finish(const Compute<In>* v, const In* bias, const In* residual, Compute<In> alpha, const In* alphas, bool relu,
            In* y, int64_t count) {
  using T = Compute<In>;
  const auto on_vector = [&](int64_t j, Vec<T> h, const auto& at) __attribute__((always_inline)) {
    if (bias) h += at(bias + j);
    if (relu) h = rectified<T>(h);
    h *= alphas ? at(alphas + j) : splat(alpha);
    if (residual) h += at(residual + j);
    return h;
  };
  int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>)
    store(y + j, on_vector(j, load(v + j), [](const In* p) { return load(p); }));
  if (j == count) return;
  const int64_t some = count - j;
  store_some(y + j, on_vector(j, load_some(v + j, some), [some](const In* p) { return load_some(p, some); }), some);
}

// A result (rows, split * width): block k of a row is `width` columns from k * width on.
template <class In>
struct Output {
  const Epilogue& e;
  int64_t split, width;

  void write(int64_t row, int64_t k, int64_t column, int64_t count, const Compute<In>* v) const {
    const int64_t offset = k * width + column;
    const auto from = [&](const void* data, int64_t start) {
      return data ? static_cast<const In*>(data) + start + offset : nullptr;
    };
    finish<In>(v, from(e.bias, 0), from(e.residual.data, row * e.residual.stride), Compute<In>(e.alpha),
               from(e.alphas, 0), e.relu, static_cast<In*>(e.y) + row * split * width + offset, count);
  }
};

}  // namespace

}  // namespace phydi
