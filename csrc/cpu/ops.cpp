// The phydi_cpu operators: torch's stable ABI on one side, the kernel table on the other.
// Shapes and dtypes are checked in Python before a call arrives here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace phydi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of one instruction set, and whether this processor has it.
struct Kernels {
  const char* isa;
  bool supported;
  decltype(&baseline::phm_linear) phm_linear;
  decltype(&baseline::phm_linear_weight_grad) phm_linear_weight_grad;
  decltype(&baseline::kron_sum) kron_sum;
  decltype(&baseline::kron_sum_grad) kron_sum_grad;
  decltype(&baseline::mix) mix;
  decltype(&baseline::epilogue) epilogue;
};

#define PHYDI_KERNELS(isa, supported)                                               \
  {#isa,          supported,          isa::phm_linear, isa::phm_linear_weight_grad, \
   isa::kron_sum, isa::kron_sum_grad, isa::mix,        isa::epilogue}

// The best compiled set that this processor has; PHYDI_MAX_CPU_ISA names the best one to consider.
const Kernels& kernels() {
  static const Kernels chosen = [] {
#if defined(PHYDI_X86)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    const Kernels sets[] = {
#if defined(PHYDI_X86)
#if defined(PHYDI_AVX512_BF16)
        PHYDI_KERNELS(avx512_bf16, has_avx512 && __builtin_cpu_supports("avx512bf16")),
#endif
        PHYDI_KERNELS(avx512, has_avx512),
        PHYDI_KERNELS(avx2, has_avx2),
#endif
        PHYDI_KERNELS(baseline, true),
    };
    const char* most = std::getenv("PHYDI_MAX_CPU_ISA");
    bool within = most == nullptr;
    std::string names;
    for (const Kernels& set : sets) {
      names += std::string(" ") + set.isa;
      within = within || std::strcmp(most, set.isa) == 0;
      if (within && set.supported) return set;
    }
    throw std::runtime_error(std::string("PHYDI_MAX_CPU_ISA=") + most + " is not one of" + names);
  }();
  return chosen;
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "phydi_cpu: no kernel for this dtype");
      return DType::f32;
  }
}

ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Threads threads() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t tasks, Task task, void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
              for (int64_t i = first; i < last; ++i) task(context, i);
            });
          }};
}

// A in the compute type, contiguous; the tensor keeps the memory alive.
struct AlgebraTensor {
  Tensor values;

  explicit AlgebraTensor(const Tensor& A) : values(A) {
    // A dispatcher call costs a microsecond: made only where there is something to convert.
    if (A.scalar_type() != compute_type(A)) values = torch::stable::to(values, compute_type(A));
    if (!values.is_contiguous()) values = torch::stable::contiguous(values);
  }

  Algebra view() const { return {values.const_data_ptr(), values.size(0), values.size(1), values.size(2)}; }
};

bool unit_stride(const Tensor& t, int64_t dim) { return t.size(dim) == 1 || t.stride(dim) == 1; }

// F (n, p, q) with a unit stride along q, or along p where `either`; copied if it has none.
struct WeightsTensor {
  Tensor values;
  Weights view;

  WeightsTensor(const Tensor& F, bool either) : values(F) {
    if (!unit_stride(F, 2) && !(either && unit_stride(F, 1))) values = torch::stable::contiguous(F);
    const bool along_q = unit_stride(values, 2);
    view = {
        values.const_data_ptr(),       values.size(1), values.size(2), values.stride(0), along_q ? values.stride(1) : 1,
        along_q ? 1 : values.stride(2)};
  }
};

// A tensor (..., width) as a matrix of rows with unit column stride; copied where its strides do not allow it.
struct RowsTensor {
  Tensor values;
  Rows view;
  int64_t count;

  explicit RowsTensor(const Tensor& t) : values(t) {
    const int64_t last = t.dim() - 1;
    const int64_t width = t.size(last);
    count = 1;
    int64_t stride = width, expected = 0;
    bool matrix = unit_stride(t, last);
    for (int64_t d = last - 1; d >= 0; --d) {
      if (t.size(d) != 1) {
        if (count == 1) {
          stride = expected = t.stride(d);
        }
        matrix = matrix && t.stride(d) == expected;
        expected *= t.size(d);
      }
      count *= t.size(d);
    }
    if (!matrix) {
      values = torch::stable::contiguous(t);
      stride = width;
    }
    view = {values.const_data_ptr(), stride};
  }
};

// The public functions have checked and named their arguments; direct calls of an operator must not read out of bounds.
void check_factors(const Tensor& x, const Tensor& A, const Tensor& F) {
  STD_TORCH_CHECK(A.scalar_type() == x.scalar_type() && F.scalar_type() == x.scalar_type(),
                  "phydi_cpu: tensors of one call share one dtype");
  STD_TORCH_CHECK(A.dim() == 3 && F.dim() >= 3 && F.size(0) == A.size(0) && A.numel() > 0 && F.numel() > 0,
                  "phydi_cpu: A must be (n, P, Q) and F (n, p, q, ...), not empty");
}

void check_width(const Tensor& t, const Tensor& like, int64_t width) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "phydi_cpu: tensors of one call share one dtype");
  STD_TORCH_CHECK(t.dim() > 0 && t.size(t.dim() - 1) == width, "phydi_cpu: a last dimension does not fit A and F");
}

void check_numel(const Tensor& t, const Tensor& like, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.numel() == numel,
                  "phydi_cpu: a tensor has another dtype or size than the result");
}

double scalar(const std::optional<Tensor>& alpha) {
  if (!alpha) return 1.0;
  const Tensor wide = torch::stable::to(*alpha, ScalarType::Double);
  return *static_cast<const double*>(wide.const_data_ptr());
}

Tensor phm_linear(Tensor x, Tensor A, Tensor F, std::optional<Tensor> bias, std::optional<Tensor> residual,
                  std::optional<Tensor> alpha, bool relu, int64_t plan) {
  check_factors(x, A, F);
  STD_TORCH_CHECK(F.dim() == 3, "phydi_cpu: F must be (n, p, q)");
  STD_TORCH_CHECK(plan >= 0 && plan <= 2, "phydi_cpu: unknown plan");
  check_width(x, x, A.size(2) * F.size(2));
  if (bias) check_width(*bias, x, A.size(1) * F.size(1));
  if (residual) check_numel(*residual, x, x.numel() / x.size(x.dim() - 1) * A.size(1) * F.size(1));
  if (alpha) check_numel(*alpha, x, 1);
  const AlgebraTensor algebra(A);
  const WeightsTensor weights(F, true);
  const RowsTensor rows(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = A.size(1) * F.size(1);
  Tensor y = torch::stable::new_empty(x, shape);
  if (y.numel() == 0) return y;

  Epilogue epilogue{nullptr, {nullptr, 0}, scalar(alpha), relu, y.mutable_data_ptr()};
  std::optional<Tensor> dense_bias;
  if (bias) {
    dense_bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    epilogue.bias = dense_bias->const_data_ptr();
  }
  std::optional<RowsTensor> residual_rows;
  if (residual) {
    residual_rows.emplace(*residual);
    epilogue.residual = residual_rows->view;
  }
  kernels().phm_linear(dtype_of(x), Plan(plan), rows.count, rows.view, algebra.view(), weights.view, epilogue,
                       threads());
  return y;
}

std::tuple<Tensor, Tensor> phm_linear_weight_grad(Tensor grad, Tensor x, Tensor A, Tensor F, int64_t plan) {
  check_factors(x, A, F);
  STD_TORCH_CHECK(F.dim() == 3, "phydi_cpu: F must be (n, p, q)");
  STD_TORCH_CHECK(plan == 0 || plan == 2, "phydi_cpu: unknown plan");
  check_width(x, x, A.size(2) * F.size(2));
  check_width(grad, x, A.size(1) * F.size(1));
  check_numel(grad, x, x.numel() / x.size(x.dim() - 1) * A.size(1) * F.size(1));
  const AlgebraTensor algebra(A);
  const WeightsTensor weights(F, false);
  const RowsTensor grad_rows(grad), rows(x);
  Tensor dA = torch::stable::new_empty(algebra.values, algebra.values.sizes());
  Tensor dF = torch::stable::new_empty(F, F.sizes());
  kernels().phm_linear_weight_grad(dtype_of(x), Plan(plan), rows.count, grad_rows.view, rows.view, algebra.view(),
                                   weights.view, dA.mutable_data_ptr(), dF.mutable_data_ptr(), threads());
  return {dA.scalar_type() == A.scalar_type() ? dA : torch::stable::to(dA, A.scalar_type()), dF};
}

// F (n, p, q, *kernel) contiguous, kernel positions counted with q.
struct FlatWeights {
  Tensor values;
  Weights view;

  explicit FlatWeights(const Tensor& F) : values(torch::stable::contiguous(F)) {
    const int64_t n = F.size(0), p = F.size(1), q = F.numel() / (n * p);
    view = {values.const_data_ptr(), p, q, p * q, q, 1};
  }
};

Tensor kron_sum(Tensor A, Tensor F) {
  check_factors(F, A, F);
  const AlgebraTensor algebra(A);
  const FlatWeights weights(F);
  std::vector<int64_t> shape(F.sizes().begin() + 1, F.sizes().end());
  shape[0] *= A.size(1);
  shape[1] *= A.size(2);
  Tensor H = torch::stable::new_empty(F, shape);
  kernels().kron_sum(dtype_of(F), algebra.view(), weights.view, H.mutable_data_ptr(), threads());
  return H;
}

std::tuple<Tensor, Tensor> kron_sum_grad(Tensor G, Tensor A, Tensor F) {
  check_factors(F, A, F);
  check_numel(G, F, A.size(1) * A.size(2) * (F.numel() / F.size(0)));
  const AlgebraTensor algebra(A);
  const FlatWeights weights(F);
  const Tensor dense = torch::stable::contiguous(G);
  Tensor dA = torch::stable::new_empty(algebra.values, algebra.values.sizes());
  Tensor dF = torch::stable::new_empty(F, F.sizes(), compute_type(F));
  kernels().kron_sum_grad(dtype_of(F), dense.const_data_ptr(), algebra.view(), weights.view, dA.mutable_data_ptr(),
                          dF.mutable_data_ptr(), threads());
  return {dA, dF};
}

Tensor mix(Tensor x, Tensor A) {
  STD_TORCH_CHECK(A.dim() == 3 && x.dim() == 4 && x.size(2) == A.size(2) && x.scalar_type() == A.scalar_type(),
                  "phydi_cpu: mix takes x (B, C, Q, inner) and A (n, P, Q) of one dtype");
  const AlgebraTensor algebra(A);
  const Tensor dense = torch::stable::contiguous(x);
  const int64_t B = x.size(0), C = x.size(1), inner = x.size(3);
  Tensor out = torch::stable::new_empty(x, {B, A.size(1), C, A.size(0), inner});
  if (out.numel() == 0) return out;
  kernels().mix(dtype_of(x), B, C, inner, dense.const_data_ptr(), algebra.view(), out.mutable_data_ptr(), threads());
  return out;
}

void epilogue(Tensor y, std::optional<Tensor> residual, std::optional<Tensor> alpha, bool relu) {
  if (residual) check_numel(*residual, y, y.numel());
  if (alpha) check_numel(*alpha, y, 1);
  if (y.numel() == 0) return;
  const Epilogue e{
      nullptr, {residual ? residual->const_data_ptr() : nullptr, 0}, scalar(alpha), relu, y.mutable_data_ptr()};
  kernels().epilogue(dtype_of(y), y.numel(), e, threads());
}

std::string isa() { return kernels().isa; }

}  // namespace
}  // namespace phydi

STABLE_TORCH_LIBRARY_IMPL(phydi_cpu, CPU, m) {
  m.impl("phm_linear", TORCH_BOX(&phydi::phm_linear));
  m.impl("phm_linear_weight_grad", TORCH_BOX(&phydi::phm_linear_weight_grad));
  m.impl("kron_sum", TORCH_BOX(&phydi::kron_sum));
  m.impl("kron_sum_grad", TORCH_BOX(&phydi::kron_sum_grad));
  m.impl("mix", TORCH_BOX(&phydi::mix));
  m.impl("epilogue_", TORCH_BOX(&phydi::epilogue));
}

STABLE_TORCH_LIBRARY_IMPL(phydi_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&phydi::isa)); }
