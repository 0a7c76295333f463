// The tile registers of AMX, which multiply 16 rows of 32 bfloat16 by 16 columns in one instruction.
#pragma once

#include <cstdint>

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace phydi {
namespace {

#if defined(__AMX_BF16__)

constexpr int kAmxRows = 16, kAmxLanes = 16;  // of one register; a lane holds a pair of bfloat16

// Rows that this thread's tile registers are set up for, 0 where they are not ours.
thread_local int amx_rows = 0;

// Registers 0 to 3 for results, of `rows` rows in two registers and of two vectors; 4 and 5 for these rows of the left
// operand, 6 and 7 for the right one.
inline void set_up_amx(int rows) {
  if (amx_rows == rows) return;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const uint8_t upper = uint8_t(rows < kAmxRows ? rows : kAmxRows), lower = uint8_t(rows - upper);
  const uint8_t rows_of[8] = {upper, upper, lower, lower, upper, lower, kAmxLanes, kAmxLanes};
  for (int j = 0; j < 8; ++j) {
    config.rows[j] = rows_of[j];
    config.row_bytes[j] = rows_of[j] ? 64 : 0;
  }
  // GCC takes the instruction to read eight bytes of it.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
  amx_rows = rows;
}

// At the end of a task: other code of the thread sets the registers up for itself.
struct AmxOfTask {
  ~AmxOfTask() {
    if (amx_rows == 0) return;
    _tile_release();
    amx_rows = 0;
  }
};

// c (M rows of NV vectors) = (first ? 0 : c) + a * b, `steps` times kAmxLanes lanes; strides in lanes.
template <int M, int NV, int a_stride, int b_stride>
inline void multiply_amx(int64_t steps, const float* a, const float* b, bool first, float* c, int64_t c_stride) {
  set_up_amx(M);
  constexpr int64_t a_bytes = a_stride * sizeof(float), b_bytes = b_stride * sizeof(float);
  const int64_t c_bytes = c_stride * int64_t(sizeof(float));
  float* const lower = c + kAmxRows * c_stride;
  // The instructions do not tell the compiler what memory they read.
  __asm__ volatile("" ::: "memory");
  if (first) {
    _tile_zero(0);
    if constexpr (NV > 1) _tile_zero(1);
    if constexpr (M > kAmxRows) _tile_zero(2);
    if constexpr (M > kAmxRows && NV > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_bytes);
    if constexpr (NV > 1) _tile_loadd(1, c + kAmxLanes, c_bytes);
    if constexpr (M > kAmxRows) _tile_loadd(2, lower, c_bytes);
    if constexpr (M > kAmxRows && NV > 1) _tile_loadd(3, lower + kAmxLanes, c_bytes);
  }
  for (int64_t k = 0; k < steps; ++k, a += kAmxLanes, b += kAmxLanes * b_stride) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NV > 1) {
      _tile_loadd(7, b + kAmxLanes, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > kAmxRows) {
      _tile_loadd(5, a + kAmxRows * a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (NV > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (NV > 1) _tile_stored(1, c + kAmxLanes, c_bytes);
  if constexpr (M > kAmxRows) _tile_stored(2, lower, c_bytes);
  if constexpr (M > kAmxRows && NV > 1) _tile_stored(3, lower + kAmxLanes, c_bytes);
}

#else

struct AmxOfTask {};

#endif

}  // namespace
}  // namespace phydi
