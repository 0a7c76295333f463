// The boundary between the operators (ops.cpp, which knows torch) and the CUDA kernels (which do not). Tensors are
// contiguous.
#pragma once

#include <cstdint>

namespace phydi::cuda {

enum class DType { f32, f64 };

// A cudaStream_t of a device.
struct Stream {
  int device;
  void* handle;
};

// The numbers are those of the operators' `kernel` argument.
enum class Kernel {
  dot = 0,                 // x.y
  poly = 1,                // (gamma x.y + coef0)^degree
  sigmoid = 2,             // tanh(gamma x.y + coef0)
  squared_distance = 3,    // |x-y|^2
  rbf = 4,                 // exp(-gamma |x-y|^2)
  matern12 = 5,            // exp(-r), r^2 = 2 gamma |x-y|^2
  matern32 = 6,            // (1 + sqrt(3) r) exp(-sqrt(3) r)
  matern52 = 7,            // (1 + sqrt(5) r + 5/3 r^2) exp(-sqrt(5) r)
  manhattan_distance = 8,  // |x-y|_1
  laplacian = 9,           // exp(-gamma |x-y|_1)
  chi2_distance = 10,      // sum (x-y)^2 / (x+y), terms 0 where x+y = 0
  chi2 = 11                // exp(-gamma chi2_distance)
};

// X (B, N, d), Y (B, M, d) or null for X, gamma (G, B), values (G, B, N, M); mean (B, d) is working memory.
struct KernelMatrix {
  int64_t G, B, N, M, d;
  const void *X, *Y, *gamma;
  void *mean, *values;
  Kernel kernel;
  int64_t degree;
  double coef0;
};

// K and centered (P, N, N), codes and root (P, N), counts and scale (P, L), means (P, N, L). The matrices of K are
// K_stride apart: 0 where they are one and the same.
struct ClassCenter {
  int64_t P, N, L, K_stride;
  const void* K;
  const int64_t* codes;
  const void *root, *counts, *scale;
  void *centered, *means;
};

// S (P, L, L), values (P, L), vectors (P, L, L).
struct SmallEigh {
  int64_t P, L;
  const void* S;
  void *values, *vectors;
};

constexpr int64_t kMaxSmallEigh = 64;

void kernel_matrix(DType, const KernelMatrix&, const Stream&);

// means[i,c] = (1 / counts_c) sum_j root_j^2 K_ij [codes_j = c], 0 where counts_c = 0, and
// centered_ij = root_i root_j scale_{codes_j} (K_ij - means[i, codes_j]), NaN where codes_j is not in 0 ... L - 1.
void class_center(DType, const ClassCenter&, const Stream&);

// Eigenvalues, ascending, and eigenvectors, in columns, of symmetric matrices given by their lower triangle, L at most
// kMaxSmallEigh. The largest entry of a vector is positive. All NaN where a matrix holds an infinity or NaN.
void eigh_small(DType, const SmallEigh&, const Stream&);

}  // namespace phydi::cuda
