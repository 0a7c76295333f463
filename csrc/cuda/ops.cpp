// The phydi_cuda operators: torch's stable ABI on one side, the kernels on the other.
// Values are checked in Python before a call arrives here; shapes are checked again, so that a direct call of an
// operator does not read out of bounds.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace phydi::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
                  "phydi_cuda: no kernel for this dtype");
  return t.scalar_type() == ScalarType::Double ? DType::f64 : DType::f32;
}

void check_tensor(const Tensor& t, const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.get_device_index() == like.get_device_index(),
                  "phydi_cuda: tensors of one call share one dtype and one device");
  bool fits = t.dim() == int64_t(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    fits = fits && t.size(dim) == size;
    ++dim;
  }
  STD_TORCH_CHECK(fits, "phydi_cuda: a tensor does not have the shape that the other arguments give it");
}

void check_contiguous(std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors) STD_TORCH_CHECK(t.is_contiguous(), "phydi_cuda: tensors must be contiguous");
}

// Makes the device of a tensor current, and its current stream the one to launch on.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;

  explicit OnDevice(const Tensor& t)
      : guard(t.get_device_index()),
        stream{t.get_device_index(),
               torch::stable::accelerator::getCurrentStream(t.get_device_index()).nativeHandle()} {}
};

Tensor kernel_matrix_op(Tensor X, std::optional<Tensor> Y, Tensor gamma, int64_t kernel, int64_t degree, double coef0) {
  STD_TORCH_CHECK(X.dim() == 3 && gamma.dim() == 2, "phydi_cuda: X must be (B, N, d) and gamma (G, B)");
  STD_TORCH_CHECK(kernel >= 0 && kernel <= int64_t(Kernel::chi2) && degree >= 1, "phydi_cuda: unknown kernel");
  const DType dtype = dtype_of(X);
  const Kernel k = Kernel(kernel);
  const bool pairwise = k == Kernel::dot || k == Kernel::squared_distance || k == Kernel::manhattan_distance ||
                        k == Kernel::chi2_distance;
  const int64_t G = pairwise ? 1 : gamma.size(0), B = X.size(0), N = X.size(1), d = X.size(2);
  STD_TORCH_CHECK(!Y || Y->dim() == 3, "phydi_cuda: Y must be (B, M, d)");
  const int64_t M = Y ? Y->size(1) : N;
  if (Y) check_tensor(*Y, X, X.scalar_type(), {B, M, d});
  check_tensor(gamma, X, X.scalar_type(), {gamma.size(0), B});
  STD_TORCH_CHECK(gamma.size(0) >= G, "phydi_cuda: gamma must not be empty");
  check_contiguous({X, Y.value_or(X), gamma});
  Tensor values = torch::stable::new_empty(X, {G, B, N, M});
  if (values.numel() == 0) return values;
  const OnDevice device(X);
  Tensor mean = torch::stable::new_empty(X, {B, d});
  const KernelMatrix arguments{G,
                               B,
                               N,
                               M,
                               d,
                               X.const_data_ptr(),
                               Y ? Y->const_data_ptr() : nullptr,
                               gamma.const_data_ptr(),
                               mean.mutable_data_ptr(),
                               values.mutable_data_ptr(),
                               k,
                               degree,
                               coef0};
  kernel_matrix(dtype, arguments, device.stream);
  return values;
}

std::tuple<Tensor, Tensor> class_center_op(Tensor K, Tensor codes, Tensor root, Tensor counts, Tensor scale) {
  STD_TORCH_CHECK(K.dim() == 3 && counts.dim() == 2, "phydi_cuda: K must be (P, N, N) and counts (P, L)");
  const DType dtype = dtype_of(K);
  const int64_t P = K.size(0), N = K.size(1), L = counts.size(1);
  check_tensor(K, K, K.scalar_type(), {P, N, N});
  check_tensor(codes, K, ScalarType::Long, {P, N});
  check_tensor(root, K, K.scalar_type(), {P, N});
  check_tensor(counts, K, K.scalar_type(), {P, L});
  check_tensor(scale, K, K.scalar_type(), {P, L});
  STD_TORCH_CHECK(N <= 1 || (K.stride(2) == 1 && K.stride(1) == N), "phydi_cuda: the matrices of K must be contiguous");
  check_contiguous({codes, root, counts, scale});
  Tensor centered = torch::stable::new_empty(K, {P, N, N});
  Tensor means = torch::stable::new_empty(K, {P, N, L});
  if (centered.numel() == 0) return {centered, means};
  STD_TORCH_CHECK(L > 0, "phydi_cuda: there must be a class");
  const OnDevice device(K);
  const ClassCenter arguments{P,
                              N,
                              L,
                              K.stride(0),
                              K.const_data_ptr(),
                              static_cast<const int64_t*>(codes.const_data_ptr()),
                              root.const_data_ptr(),
                              counts.const_data_ptr(),
                              scale.const_data_ptr(),
                              centered.mutable_data_ptr(),
                              means.mutable_data_ptr()};
  class_center(dtype, arguments, device.stream);
  return {centered, means};
}

std::tuple<Tensor, Tensor> eigh_small_op(Tensor S) {
  STD_TORCH_CHECK(S.dim() == 3, "phydi_cuda: S must be (P, L, L)");
  const DType dtype = dtype_of(S);
  const int64_t P = S.size(0), L = S.size(1);
  STD_TORCH_CHECK(L <= kMaxSmallEigh, "phydi_cuda: matrices of more than 64 rows");
  check_tensor(S, S, S.scalar_type(), {P, L, L});
  check_contiguous({S});
  Tensor values = torch::stable::new_empty(S, {P, L});
  Tensor vectors = torch::stable::new_empty(S, {P, L, L});
  if (vectors.numel() == 0) return {values, vectors};
  const OnDevice device(S);
  eigh_small(dtype, {P, L, S.const_data_ptr(), values.mutable_data_ptr(), vectors.mutable_data_ptr()}, device.stream);
  return {values, vectors};
}

}  // namespace
}  // namespace phydi::cuda

STABLE_TORCH_LIBRARY_IMPL(phydi_cuda, CUDA, m) {
  m.impl("kernel_matrix", TORCH_BOX(&phydi::cuda::kernel_matrix_op));
  m.impl("class_center", TORCH_BOX(&phydi::cuda::class_center_op));
  m.impl("eigh_small", TORCH_BOX(&phydi::cuda::eigh_small_op));
}
