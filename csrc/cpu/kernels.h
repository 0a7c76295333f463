// The boundary between the operators (ops.cpp, which know torch) and the kernels (which do not). The kernels are
// compiled once per instruction set, PHYDI_ISA; ops.cpp picks one at run time.
#pragma once

#include <cstdint>

namespace phydi {

enum class DType { f32, f64, bf16, f16 };

// The numbers are those of phydi_kernels.plans.Plan.
enum class Plan { stream = 0, mix = 1, panel = 2, rank = 3 };

// Of the band that a path of conditioning coefficients reduces S_w to; phydi_kernels.kernels.gda_solve.BANDWIDTH.
constexpr int64_t kBandwidth = 32;

// The order is that of phydi_kernels.ops.kernel_matrix.NAMES.
enum class Kernel {
  dot,
  poly,
  sigmoid,
  squared_distance,
  rbf,
  matern12,
  matern32,
  matern52,
  manhattan_distance,
  laplacian,
  chi2_distance,
  chi2
};

// The numbers of terms whose lines stay in registers while they are combined; those of phydi_kernels.plans.LINE_TERMS.
static constexpr bool combines_lines_of(int64_t n) { return n == 2 || n == 3 || n == 4 || n == 8; }

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

// U (R, n), V (R, P), W (R, Q), contiguous, in the compute type; U null: n = R and U is the identity.
struct Factors {
  const void *U, *V, *W;
  int64_t R, n, P, Q;
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

// y = residual + alpha * act(h + bias); bias and residual may be null, y is contiguous. alphas (a column's each) or
// null: alpha for all.
struct Epilogue {
  const void* bias;
  Rows residual;
  double alpha;
  const void* alphas;
  bool relu;
  void* y;
};

// A contiguous row-major matrix in the compute type.
struct Matrix {
  const void* data;
  int64_t rows, columns;
};

// Images (images, channels, pixels) if planes, else (images, pixels, channels), contiguous.
struct Image {
  void* data;
  int64_t images, channels, pixels;
  bool planes;
};

// The geometry of a convolution in two dimensions, (height, width) each.
struct Window {
  int64_t in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
};

// y = residual + alpha * act(h + bias) on an Image: bias and alpha, for all channels or for each, in the compute type;
// residual as y. All may be null.
struct ChannelEpilogue {
  const void* bias;
  const void* alpha;
  bool one_alpha;
  const void* residual;
  bool relu;
};

// The kernels of one instruction set: linear layers, and the others.
#define PHYDI_DECLARE_LINEAR(isa)                                                                                      \
  namespace isa {                                                                                                      \
  /* A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l] (n, P, Q), contiguous, in the compute type. */                              \
  void structure(DType, const Factors&, void* A);                                                                      \
  /* y (rows, P*p) from x (rows, Q*q). */                                                                              \
  void phm_linear(DType, Plan, int64_t rows, Rows x, const Algebra&, const Weights&, const Epilogue&, const Threads&); \
  /* The same of A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l], in R products. */                                              \
  void phm_linear_factored(DType, int64_t rows, Rows x, const Factors&, const Weights&, const Epilogue&,               \
                           const Threads&);                                                                            \
  /* dx (rows, Q*q), dF (n, p, q), contiguous, and dU, dV, dW in the compute type; F has unit stride along q. */       \
  void phm_linear_factored_grad(DType, int64_t rows, Rows grad, Rows x, const Factors&, const Weights&, void* dx,      \
                                void* dU, void* dV, void* dW, void* dF, const Threads&);                               \
  /* dA (n, P, Q) in the compute type and dF (n, p, q) contiguous, by stream or panel; F has unit stride along q. */   \
  void phm_linear_weight_grad(DType, Plan, int64_t rows, Rows grad, Rows x, const Algebra&, const Weights&, void* dA,  \
                              void* dF, const Threads&);                                                               \
  }

#define PHYDI_DECLARE_OTHERS(isa)                                                                                      \
  namespace isa {                                                                                                      \
  /* H (P*p, Q*q), contiguous; F contiguous. */                                                                        \
  void kron_sum(DType, const Algebra&, const Weights&, void* H, const Threads&);                                       \
  /* dA and dF, both in the compute type, from G = dL/dH (P*p, Q*q), contiguous; F contiguous. */                      \
  void kron_sum_grad(DType, const void* G, const Algebra&, const Weights&, void* dA, void* dF, const Threads&);        \
  /* out (B, P, C, n, inner) = sum_l A[i, k, l] x (B, C, Q, inner), both contiguous. */                                \
  void mix(DType, int64_t B, int64_t C, int64_t inner, const void* x, const Algebra&, void* out, const Threads&);      \
  /* out[r, m, s] = sum_l W[r,l] x_l[m,s], m counting the pixels of all images, x_l block l of the channels. */        \
  void pre_add(DType, const Image& x, const Matrix& W, void* out, const Threads&);                                     \
  /* y_k[m,s] = sum_r V[r,k] parts_r[m,s], parts contiguous, and the epilogue; y is written. */                        \
  void post_add(DType, const Image& y, void* const* parts, const Matrix& V, const ChannelEpilogue&, const Threads&);   \
  /* y_k = sum_r V[r,k] conv(sum_l W[r,l] x_l, F-hat_r) and the epilogue. F is F-hat (R, p, q, taps) where U.data is   \
     null, else (n, taps, q, p) with F-hat_r = sum_i U[r,i] F_i for the n of combines_lines_of; both contiguous. The   \
     lanes of q and the stride along the width are bounded; see ops.cpp. */                                            \
  void phc_conv_factored(DType, const Image& x, const Image& y, const Matrix& W, const Matrix& V, const void* F,       \
                         const Matrix& U, const Window&, const ChannelEpilogue&, const Threads&);                      \
  /* out[r,l] = <parts_r, x_l> in the compute type. */                                                                 \
  void block_dots(DType, const Image& x, void* const* parts, int64_t R, int64_t Q, void* out, const Threads&);         \
  /* The epilogue of h = y, in place. */                                                                               \
  void epilogue(DType, const Image& y, const ChannelEpilogue&, const Threads&);                                        \
  /* out (G, B, N, M) = f(gamma s(x, y)) for X (B, N, d), Y (B, M, d), which is X if symmetric, gamma (G, B); all      \
     contiguous. */                                                                                                    \
  void kernel_matrix(DType, Kernel, int64_t G, int64_t B, int64_t N, int64_t M, int64_t d, bool symmetric,             \
                     const void* X, const void* Y, const void* gamma, int64_t degree, double coef0, void* out,         \
                     const Threads&);                                                                                  \
  /* The lower triangle of G (P, N, N) = B B^T, B_ij = root_i root_j scale_c(j) (K_ij - means_ic(j)), and means (P, N, \
     L), of class c and weights root^2; K (P, N, N) with rows of N, codes c and root (P, N), counts and scale (P, L).  \
     Above the diagonal G is undefined. */                                                                             \
  void within_scatter(DType, int64_t P, int64_t N, int64_t L, const void* K, int64_t K_stride, const int64_t* codes,   \
                      const void* root, const void* counts, const void* scale, void* G, void* means, const Threads&);  \
  /* out (P, 2): the largest |K_ij| and |K_ij - K_ji|, NaN where there is one. */                                      \
  void asymmetry(DType, int64_t P, int64_t N, const void* K, int64_t K_stride, void* out, const Threads&);             \
  /* A (P, N, N) = its lower Cholesky factor; failed (P) where there is none. */                                       \
  void cholesky(DType, int64_t P, int64_t N, void* A, int32_t* failed, const Threads&);                                \
  /* X (P, N, m) = (L L^T)^-1 R. */                                                                                    \
  void cholesky_solve(DType, int64_t P, int64_t N, int64_t m, const void* L, const void* R, void* X, const Threads&);  \
  /* out (P, N, m) = A X, A (P, N, N) with rows of N. */                                                               \
  void times(DType, int64_t P, int64_t N, int64_t m, const void* A, int64_t A_stride, const void* X, void* out,        \
             const Threads&);                                                                                          \
  /* S = Q T Q^T of the lower triangles of S (P, N, N): T as band (P, N, kBandwidth + 1), its row i the columns        \
     i - kBandwidth ... i, and Q in S and blocks (P, panels, kBandwidth, kBandwidth), a panel for every kBandwidth     \
     columns but the last. */                                                                                          \
  void band_reduce(DType, int64_t P, int64_t N, void* S, void* band, void* blocks, const Threads&);                    \
  /* Lower factors L (count, P, N, kBandwidth + 1) of T + tau I, tau (count, P); failed (count, P). */                 \
  void band_cholesky(DType, int64_t count, int64_t P, int64_t N, const void* band, const void* tau, void* L,           \
                     int32_t* failed, const Threads&);                                                                 \
  /* X (count, P, N, m) = Q (L L^T)^-1 Q^T R. */                                                                       \
  void band_solve(DType, int64_t count, int64_t P, int64_t N, int64_t m, const void* L, const void* S,                 \
                  const void* blocks, const void* R, void* X, const Threads&);                                         \
  /* values (P, L) ascending and vectors (P, L, L) in columns of the lower triangles of S (P, L, L). */                \
  void eigh_small(DType, int64_t P, int64_t L, const void* S, void* values, void* vectors, const Threads&);            \
  }

PHYDI_DECLARE_LINEAR(baseline)
PHYDI_DECLARE_OTHERS(baseline)
PHYDI_DECLARE_LINEAR(avx2)
PHYDI_DECLARE_OTHERS(avx2)
PHYDI_DECLARE_LINEAR(avx512)
PHYDI_DECLARE_OTHERS(avx512)
PHYDI_DECLARE_LINEAR(avx512_bf16)
PHYDI_DECLARE_OTHERS(avx512_bf16)
// With the others of avx512_bf16.
PHYDI_DECLARE_LINEAR(amx_bf16)

}  // namespace phydi
