// The boundary between the operators (ops.cpp, which know torch) and the kernels (which do not). The kernels are
// compiled once per instruction set, PHYDI_ISA; ops.cpp picks one at run time.
#pragma once

#include <cstdint>

namespace phydi {

enum class DType { f32, f64, bf16, f16 };

// The numbers are those of phydi_kernels.plans.Plan.
enum class Plan { stream = 0, mix = 1, panel = 2 };

using Task = void (*)(void* context, int64_t index);

// Runs task(context, 0 ... count - 1) on torch's threads.
struct Threads {
  int64_t count;
  void (*run)(int64_t tasks, Task task, void* context);
};

// A structure tensor (n, P, Q), contiguous, in the compute type (float for the 16-bit types).
struct Algebra {
  const void* data;
  int64_t n, P, Q;
};

// F (n, p, q) with a unit stride along p or along q.
struct Weights {
  const void* data;
  int64_t p, q, stride_i, stride_r, stride_s;
};

// A matrix of rows with unit column stride.
struct Rows {
  const void* data;
  int64_t stride;
};

// y = residual + alpha * act(h + bias); bias and residual may be null, y is contiguous.
struct Epilogue {
  const void* bias;
  Rows residual;
  double alpha;
  bool relu;
  void* y;
};

// The kernels of one instruction set.
#define PHYDI_DECLARE_KERNELS(isa)                                                                                     \
  namespace isa {                                                                                                      \
  /* y (rows, P*p) from x (rows, Q*q). */                                                                              \
  void phm_linear(DType, Plan, int64_t rows, Rows x, const Algebra&, const Weights&, const Epilogue&, const Threads&); \
  /* dA (n, P, Q) in the compute type and dF (n, p, q) contiguous, by stream or panel; F has unit stride along q. */   \
  void phm_linear_weight_grad(DType, Plan, int64_t rows, Rows grad, Rows x, const Algebra&, const Weights&, void* dA,  \
                              void* dF, const Threads&);                                                               \
  /* H (P*p, Q*q), contiguous; F contiguous. */                                                                        \
  void kron_sum(DType, const Algebra&, const Weights&, void* H, const Threads&);                                       \
  /* dA and dF, both in the compute type, from G = dL/dH (P*p, Q*q), contiguous; F contiguous. */                      \
  void kron_sum_grad(DType, const void* G, const Algebra&, const Weights&, void* dA, void* dF, const Threads&);        \
  /* out (B, P, C, n, inner) = sum_l A[i, k, l] x (B, C, Q, inner), both contiguous. */                                \
  void mix(DType, int64_t B, int64_t C, int64_t inner, const void* x, const Algebra&, void* out, const Threads&);      \
  /* In place on count elements: y = residual + alpha * act(y). */                                                     \
  void epilogue(DType, int64_t count, const Epilogue&, const Threads&);                                                \
  }

PHYDI_DECLARE_KERNELS(baseline)
PHYDI_DECLARE_KERNELS(avx2)
PHYDI_DECLARE_KERNELS(avx512)
PHYDI_DECLARE_KERNELS(avx512_bf16)

}  // namespace phydi
