// The phydi_cpu operators: torch's stable ABI on one side, the kernel table on the other.
// Shapes and dtypes are checked in Python before a call arrives here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace phydi {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of one instruction set, and whether this processor has it.
struct Kernels {
  const char* isa;
  bool supported;
  decltype(&baseline::structure) structure;
  decltype(&baseline::phm_linear) phm_linear;
  decltype(&baseline::phm_linear_weight_grad) phm_linear_weight_grad;
  decltype(&baseline::phm_linear_factored) phm_linear_factored;
  decltype(&baseline::phm_linear_factored_grad) phm_linear_factored_grad;
  decltype(&baseline::kron_sum) kron_sum;
  decltype(&baseline::kron_sum_grad) kron_sum_grad;
  decltype(&baseline::mix) mix;
  decltype(&baseline::pre_add) pre_add;
  decltype(&baseline::post_add) post_add;
  decltype(&baseline::phc_conv_factored) phc_conv_factored;
  decltype(&baseline::block_dots) block_dots;
  decltype(&baseline::epilogue) epilogue;
  decltype(&baseline::kernel_matrix) kernel_matrix;
  decltype(&baseline::within_scatter) within_scatter;
  decltype(&baseline::asymmetry) asymmetry;
  decltype(&baseline::cholesky) cholesky;
  decltype(&baseline::cholesky_solve) cholesky_solve;
  decltype(&baseline::times) times;
  decltype(&baseline::eigh_small) eigh_small;
  decltype(&baseline::band_reduce) band_reduce;
  decltype(&baseline::band_cholesky) band_cholesky;
  decltype(&baseline::band_solve) band_solve;
};

#define PHYDI_KERNELS(isa, others, supported) \
  {#isa,                                      \
   supported,                                 \
   isa::structure,                            \
   isa::phm_linear,                           \
   isa::phm_linear_weight_grad,               \
   isa::phm_linear_factored,                  \
   isa::phm_linear_factored_grad,             \
   others::kron_sum,                          \
   others::kron_sum_grad,                     \
   others::mix,                               \
   others::pre_add,                           \
   others::post_add,                          \
   others::phc_conv_factored,                 \
   others::block_dots,                        \
   others::epilogue,                          \
   others::kernel_matrix,                     \
   others::within_scatter,                    \
   others::asymmetry,                         \
   others::cholesky,                          \
   others::cholesky_solve,                    \
   others::times,                             \
   others::eigh_small,                        \
   others::band_reduce,                       \
   others::band_cholesky,                     \
   others::band_solve}

#if defined(PHYDI_AMX_BF16)
// Linux gives a process the state of the tile registers when it asks for it.
bool has_amx() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// The best compiled set that this processor has; PHYDI_MAX_CPU_ISA names the best one to consider.
const Kernels& kernels() {
  static const Kernels chosen = [] {
    const char* most = std::getenv("PHYDI_MAX_CPU_ISA");
#if defined(PHYDI_X86)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(PHYDI_AVX512_BF16)
    // Intel's processors multiply pairs of bfloat16 at half the speed of float32: there by name only.
    const bool has_avx512_bf16 =
        has_avx512 && __builtin_cpu_supports("avx512bf16") &&
        (!__builtin_cpu_is("intel") || (most != nullptr && std::strcmp(most, "avx512_bf16") == 0));
#endif
#endif
    const Kernels sets[] = {
#if defined(PHYDI_X86)
#if defined(PHYDI_AMX_BF16)
        PHYDI_KERNELS(amx_bf16, avx512, has_avx512 && __builtin_cpu_supports("avx512bf16") && has_amx()),
#endif
#if defined(PHYDI_AVX512_BF16)
        PHYDI_KERNELS(avx512_bf16, avx512_bf16, has_avx512_bf16),
#endif
        PHYDI_KERNELS(avx512, avx512, has_avx512),
        PHYDI_KERNELS(avx2, avx2, has_avx2),
#endif
        PHYDI_KERNELS(baseline, baseline, true),
    };
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

// A dispatcher call costs a microsecond: made only where there is something to copy or to convert.
Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// In the compute type of `like`, contiguous.
Tensor in_compute_type(const Tensor& t, const Tensor& like) {
  const ScalarType type = compute_type(like);
  return dense(t.scalar_type() == type ? t : torch::stable::to(t, type));
}

// A in the compute type, contiguous; the tensor keeps the memory alive.
struct AlgebraTensor {
  Tensor values;

  explicit AlgebraTensor(const Tensor& A) : values(in_compute_type(A, A)) {}

  Algebra view() const { return {values.const_data_ptr(), values.size(0), values.size(1), values.size(2)}; }
};

// U (R, n) or nothing, V (R, P), W (R, Q) in the compute type, contiguous.
struct FactorTensors {
  std::optional<Tensor> U;
  Tensor V, W;

  FactorTensors(const std::optional<Tensor>& u, const Tensor& v, const Tensor& w, const Tensor& F)
      : V(in_compute_type(v, F)), W(in_compute_type(w, F)) {
    if (u) U = in_compute_type(*u, F);
  }

  Factors view() const {
    const int64_t R = V.size(0);
    return {U ? U->const_data_ptr() : nullptr,
            V.const_data_ptr(),
            W.const_data_ptr(),
            R,
            U ? U->size(1) : R,
            V.size(1),
            W.size(1)};
  }
};

// A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l], in the compute type.
struct Structure {
  std::vector<double> storage;
  Algebra view;

  // Doubles give room and alignment for either type.
  Structure(const Factors& f, DType dtype) : storage(f.n * f.P * f.Q), view{storage.data(), f.n, f.P, f.Q} {
    kernels().structure(dtype, f, storage.data());
  }
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
  STD_TORCH_CHECK(
      (A.scalar_type() == x.scalar_type() || A.scalar_type() == compute_type(x)) && F.scalar_type() == x.scalar_type(),
      "phydi_cpu: tensors of one call share one dtype; A may have the compute type");
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

// The arguments of an epilogue as the kernels take them; the tensors keep the memory alive.
struct EpilogueTensors {
  std::optional<Tensor> bias, alphas;
  std::optional<RowsTensor> residual;
  Epilogue view;

  EpilogueTensors(const std::optional<Tensor>& bias_, const std::optional<Tensor>& residual_,
                  const std::optional<Tensor>& alpha, bool relu, Tensor& y) {
    const int64_t width = y.size(y.dim() - 1);
    view = {nullptr, {nullptr, 0}, 1.0, nullptr, relu, y.mutable_data_ptr()};
    if (bias_) {
      check_numel(*bias_, y, width);
      bias = dense(*bias_);
      view.bias = bias->const_data_ptr();
    }
    if (residual_) {
      check_numel(*residual_, y, y.numel());
      check_width(*residual_, y, width);
      residual.emplace(*residual_);
      view.residual = residual->view;
    }
    if (alpha && alpha->numel() > 1) {
      check_numel(*alpha, y, width);
      alphas = dense(*alpha);
      view.alphas = alphas->const_data_ptr();
    } else if (alpha) {
      check_numel(*alpha, y, 1);
      view.alpha = scalar(alpha);
    }
  }
};

Tensor new_rows(const Tensor& x, int64_t width) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = width;
  // torch::stable::new_empty looks its operator up by name, which takes a microsecond.
  AtenTensorHandle y = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(x.get(), shape.data(), int64_t(shape.size()), nullptr,
                                                          nullptr, nullptr, 0, nullptr, &y));
  return Tensor(y);
}

Tensor phm_linear(Tensor x, Tensor A, Tensor F, std::optional<Tensor> bias, std::optional<Tensor> residual,
                  std::optional<Tensor> alpha, bool relu, int64_t plan) {
  check_factors(x, A, F);
  STD_TORCH_CHECK(F.dim() == 3, "phydi_cpu: F must be (n, p, q)");
  STD_TORCH_CHECK(plan >= 0 && plan <= 2, "phydi_cpu: unknown plan");
  check_width(x, x, A.size(2) * F.size(2));
  const AlgebraTensor algebra(A);
  const WeightsTensor weights(F, true);
  const RowsTensor rows(x);
  Tensor y = new_rows(x, A.size(1) * F.size(1));
  const EpilogueTensors epilogue(bias, residual, alpha, relu, y);
  if (y.numel() == 0) return y;
  kernels().phm_linear(dtype_of(x), Plan(plan), rows.count, rows.view, algebra.view(), weights.view, epilogue.view,
                       threads());
  return y;
}

void check_terms(const Tensor& x, const std::optional<Tensor>& U, const Tensor& V, const Tensor& W, const Tensor& F) {
  STD_TORCH_CHECK(F.scalar_type() == x.scalar_type() && F.dim() == 3 && F.numel() > 0,
                  "phydi_cpu: F must be (n, p, q), not empty, of the dtype of x");
  STD_TORCH_CHECK(V.dim() == 2 && W.dim() == 2 && V.numel() > 0 && W.numel() > 0 && V.size(0) == W.size(0),
                  "phydi_cpu: V must be (R, P) and W (R, Q), not empty");
  STD_TORCH_CHECK(U ? U->dim() == 2 && U->size(0) == V.size(0) && U->size(1) == F.size(0) : V.size(0) == F.size(0),
                  "phydi_cpu: U must be (R, n), or left out where F has R terms");
}

Tensor phm_linear_factored(Tensor x, std::optional<Tensor> U, Tensor V, Tensor W, Tensor F, std::optional<Tensor> bias,
                           std::optional<Tensor> residual, std::optional<Tensor> alpha, bool relu, int64_t plan) {
  check_terms(x, U, V, W, F);
  STD_TORCH_CHECK(plan >= 0 && plan <= 3, "phydi_cpu: unknown plan");
  check_width(x, x, W.size(1) * F.size(2));
  const FactorTensors factors(U, V, W, F);
  const WeightsTensor weights(F, true);
  const RowsTensor rows(x);
  Tensor y = new_rows(x, V.size(1) * F.size(1));
  const EpilogueTensors epilogue(bias, residual, alpha, relu, y);
  if (y.numel() == 0) return y;
  if (Plan(plan) == Plan::rank) {
    kernels().phm_linear_factored(dtype_of(x), rows.count, rows.view, factors.view(), weights.view, epilogue.view,
                                  threads());
  } else {
    const Structure algebra(factors.view(), dtype_of(x));
    kernels().phm_linear(dtype_of(x), Plan(plan), rows.count, rows.view, algebra.view, weights.view, epilogue.view,
                         threads());
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> phm_linear_factored_grad(Tensor grad, Tensor x, Tensor U, Tensor V,
                                                                            Tensor W, Tensor F) {
  check_terms(x, U, V, W, F);
  check_width(x, x, W.size(1) * F.size(2));
  check_width(grad, x, V.size(1) * F.size(1));
  check_numel(grad, x, x.numel() / x.size(x.dim() - 1) * V.size(1) * F.size(1));
  const FactorTensors factors(U, V, W, F);
  const WeightsTensor weights(F, false);
  const RowsTensor grad_rows(grad), rows(x);
  Tensor dx = new_rows(x, W.size(1) * F.size(2));
  Tensor dU = torch::stable::new_empty(*factors.U, factors.U->sizes());
  Tensor dV = torch::stable::new_empty(factors.V, factors.V.sizes());
  Tensor dW = torch::stable::new_empty(factors.W, factors.W.sizes());
  Tensor dF = torch::stable::new_empty(F, F.sizes());
  kernels().phm_linear_factored_grad(dtype_of(x), rows.count, grad_rows.view, rows.view, factors.view(), weights.view,
                                     dx.mutable_data_ptr(), dU.mutable_data_ptr(), dV.mutable_data_ptr(),
                                     dW.mutable_data_ptr(), dF.mutable_data_ptr(), threads());
  const auto like = [](const Tensor& t, const Tensor& argument) {
    return t.scalar_type() == argument.scalar_type() ? t : torch::stable::to(t, argument.scalar_type());
  };
  return {dx, like(dU, U), like(dV, V), like(dW, W), dF};
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

  explicit FlatWeights(const Tensor& F) : values(dense(F)) {
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
  const Tensor values = dense(G);
  Tensor dA = torch::stable::new_empty(algebra.values, algebra.values.sizes());
  Tensor dF = torch::stable::new_empty(F, F.sizes(), compute_type(F));
  kernels().kron_sum_grad(dtype_of(F), values.const_data_ptr(), algebra.view(), weights.view, dA.mutable_data_ptr(),
                          dF.mutable_data_ptr(), threads());
  return {dA, dF};
}

Tensor mix(Tensor x, Tensor A) {
  STD_TORCH_CHECK(A.dim() == 3 && x.dim() == 4 && x.size(2) == A.size(2) &&
                      (A.scalar_type() == x.scalar_type() || A.scalar_type() == compute_type(x)),
                  "phydi_cpu: mix takes x (B, C, Q, inner) and A (n, P, Q) of one dtype; A may have the compute type");
  const AlgebraTensor algebra(A);
  const Tensor values = dense(x);
  const int64_t B = x.size(0), C = x.size(1), inner = x.size(3);
  Tensor out = torch::stable::new_empty(x, {B, A.size(1), C, A.size(0), inner});
  if (out.numel() == 0) return out;
  kernels().mix(dtype_of(x), B, C, inner, values.const_data_ptr(), algebra.view(), out.mutable_data_ptr(), threads());
  return out;
}

// A contiguous matrix of the algebra's coefficients.
Matrix matrix(const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == compute_type(like) && t.is_contiguous(),
                  "phydi_cpu: coefficients must be a contiguous matrix in the compute type");
  return {t.const_data_ptr(), t.size(0), t.size(1)};
}

// (images, channels, pixels) if planes, else (images, pixels, channels), contiguous.
Image image(const Tensor& t, int64_t blocks, bool planes) {
  STD_TORCH_CHECK(t.dim() == 3 && t.is_contiguous(), "phydi_cpu: images must be three-dimensional and contiguous");
  const int64_t channels = t.size(planes ? 1 : 2);
  STD_TORCH_CHECK(blocks > 0 && channels % blocks == 0, "phydi_cpu: channels do not divide into the blocks");
  return {const_cast<void*>(t.const_data_ptr()), t.size(0), channels, t.size(planes ? 2 : 1), planes};
}

// The memory of `count` contiguous tensors with the entries of one block of an image.
std::vector<void*> part_pointers(const std::vector<Tensor>& parts, int64_t count, const Tensor& like, int64_t blocks) {
  STD_TORCH_CHECK(int64_t(parts.size()) == count, "phydi_cpu: one part a term");
  std::vector<void*> pointers;
  for (const Tensor& part : parts) {
    STD_TORCH_CHECK(part.is_contiguous(), "phydi_cpu: parts must be contiguous");
    check_numel(part, like, like.numel() / blocks);
    pointers.push_back(const_cast<void*>(part.const_data_ptr()));
  }
  return pointers;
}

struct ChannelEpilogueTensors {
  std::optional<Tensor> bias, alpha;
  ChannelEpilogue view;

  ChannelEpilogueTensors(const std::optional<Tensor>& bias_, const std::optional<Tensor>& residual,
                         const std::optional<Tensor>& alpha_, bool relu, const Tensor& y, int64_t channels) {
    view = {nullptr, nullptr, alpha_ && alpha_->numel() == 1, nullptr, relu};
    if (bias_) {
      check_numel(*bias_, y, channels);
      bias = in_compute_type(*bias_, y);
      view.bias = bias->const_data_ptr();
    }
    if (alpha_) {
      check_numel(*alpha_, y, view.one_alpha ? 1 : channels);
      alpha = in_compute_type(*alpha_, y);
      view.alpha = alpha->const_data_ptr();
    }
    if (residual) {
      STD_TORCH_CHECK(residual->is_contiguous(), "phydi_cpu: the residual must have the layout of the result");
      check_numel(*residual, y, y.numel());
      view.residual = residual->const_data_ptr();
    }
  }
};

Tensor pre_add(Tensor x, Tensor W, bool planes) {
  const Matrix coefficients = matrix(W, x);
  const Image from = image(x, coefficients.columns, planes);
  Tensor out =
      torch::stable::new_empty(x, {coefficients.rows, from.images, from.pixels, from.channels / coefficients.columns});
  if (out.numel() > 0) kernels().pre_add(dtype_of(x), from, coefficients, out.mutable_data_ptr(), threads());
  return out;
}

void post_add(Tensor y, std::vector<Tensor> parts, Tensor V, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::optional<Tensor> alpha, bool relu, bool planes) {
  const Matrix coefficients = matrix(V, y);
  const Image to = image(y, coefficients.columns, planes);
  const auto pointers = part_pointers(parts, coefficients.rows, y, coefficients.columns);
  const ChannelEpilogueTensors e(bias, residual, alpha, relu, y, to.channels);
  if (y.numel() > 0) kernels().post_add(dtype_of(y), to, pointers.data(), coefficients, e.view, threads());
}

// Window: height and width of x and of y, then of the kernel, stride, padding and dilation.
void phc_conv_factored(Tensor y, Tensor x, Tensor W, Tensor V, Tensor F, std::optional<Tensor> U,
                       std::optional<Tensor> bias, std::optional<Tensor> residual, std::optional<Tensor> alpha,
                       bool relu, bool planes, std::vector<int64_t> window) {
  const Matrix before = matrix(W, x), after = matrix(V, x);
  const Image from = image(x, before.columns, planes), to = image(y, after.columns, planes);
  STD_TORCH_CHECK(window.size() == 12, "phydi_cpu: a window has 12 sizes");
  Window w;
  int64_t* const sizes[] = {w.in, w.out, w.kernel, w.stride, w.padding, w.dilation};
  for (size_t i = 0; i < window.size(); ++i) {
    const bool is_padding = sizes[i / 2] == w.padding;
    STD_TORCH_CHECK(window[i] >= (is_padding ? 0 : 1), "phydi_cpu: a window of positive sizes");
    sizes[i / 2][i % 2] = window[i];
  }
  for (int d = 0; d < 2; ++d)
    STD_TORCH_CHECK((w.out[d] - 1) * w.stride[d] + (w.kernel[d] - 1) * w.dilation[d] + 1 <= w.in[d] + 2 * w.padding[d],
                    "phydi_cpu: the result is larger than the window allows");
  STD_TORCH_CHECK(from.pixels == w.in[0] * w.in[1] && to.pixels == w.out[0] * w.out[1] && from.images == to.images,
                  "phydi_cpu: images have other sizes than the window");
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), "phydi_cpu: tensors of one call share one dtype");
  const int64_t q = from.channels / before.columns, p = to.channels / after.columns;
  const Matrix terms = U ? matrix(*U, x) : Matrix{nullptr, before.rows, 0};
  check_numel(F, x, (U ? terms.columns : before.rows) * p * q * w.kernel[0] * w.kernel[1]);
  STD_TORCH_CHECK(F.is_contiguous() && after.rows == before.rows && terms.rows == before.rows,
                  "phydi_cpu: U, V and W must have R terms, and F be contiguous");
  STD_TORCH_CHECK(!U || combines_lines_of(terms.columns), "phydi_cpu: lines of 2, 3, 4 or 8 terms are combined");
  STD_TORCH_CHECK((w.stride[1] == 1 || w.stride[1] == 2 || w.stride[1] == 4) && q * w.stride[1] <= 128,
                  "phydi_cpu: blocks too wide for the direct convolution");
  const ChannelEpilogueTensors e(bias, residual, alpha, relu, y, to.channels);
  if (y.numel() > 0)
    kernels().phc_conv_factored(dtype_of(x), from, to, before, after, F.const_data_ptr(), terms, w, e.view, threads());
}

Tensor block_dots(Tensor x, std::vector<Tensor> parts, int64_t blocks, bool planes) {
  const Image from = image(x, blocks, planes);
  const int64_t count = int64_t(parts.size());
  const auto pointers = part_pointers(parts, count, x, blocks);
  Tensor out = torch::stable::new_empty(x, {count, blocks}, compute_type(x));
  if (out.numel() > 0)
    kernels().block_dots(dtype_of(x), from, pointers.data(), count, blocks, out.mutable_data_ptr(), threads());
  return out;
}

void epilogue(Tensor y, std::optional<Tensor> bias, std::optional<Tensor> residual, std::optional<Tensor> alpha,
              bool relu, bool planes) {
  const Image to = image(y, 1, planes);
  const ChannelEpilogueTensors e(bias, residual, alpha, relu, y, to.channels);
  if (y.numel() > 0) kernels().epilogue(dtype_of(y), to, e.view, threads());
}

void check_real(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double || t.scalar_type() == ScalarType::Float,
                  "phydi_cpu: this kernel takes float32 and float64");
}

void check_shape(const Tensor& t, const Tensor& like, std::vector<int64_t> shape) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.dim() == int64_t(shape.size()) &&
                      std::equal(shape.begin(), shape.end(), t.sizes().begin()),
                  "phydi_cpu: a tensor has another dtype or shape than its operator takes");
}

// New memory in pages of 2 MiB where Linux leaves that to the program: faulting in 128 MiB of kernel matrices by pages
// of 4 KiB took 43 ms, three times as long as computing them, and takes 7 ms so.
Tensor new_large(const Tensor& like, std::vector<int64_t> shape) {
  Tensor t = torch::stable::new_empty(like, shape);
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), bytes = t.numel() * t.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

// (P, N, N) whose matrices are contiguous; they may be one and the same.
Tensor matrices(const Tensor& K) {
  STD_TORCH_CHECK(K.dim() == 3 && K.size(1) == K.size(2), "phydi_cpu: K must be (P, N, N)");
  check_real(K);
  const int64_t N = K.size(2);
  return N <= 1 || (K.stride(2) == 1 && K.stride(1) == N) ? K : torch::stable::contiguous(K);
}

Tensor kernel_matrix(Tensor X, std::optional<Tensor> Y, Tensor gamma, int64_t kernel, int64_t degree, double coef0) {
  STD_TORCH_CHECK(X.dim() == 3 && gamma.dim() == 2 && kernel >= 0 && kernel <= int64_t(Kernel::chi2) && degree >= 1,
                  "phydi_cpu: X must be (B, N, d), gamma (G, B)");
  check_real(X);
  const int64_t B = X.size(0), N = X.size(1), d = X.size(2), M = Y ? Y->size(1) : N;
  if (Y) check_shape(*Y, X, {B, M, d});
  const Kernel k = Kernel(kernel);
  const bool pairwise = k == Kernel::dot || k == Kernel::squared_distance || k == Kernel::manhattan_distance ||
                        k == Kernel::chi2_distance;
  const int64_t G = pairwise ? 1 : gamma.size(0);
  check_shape(gamma, X, {gamma.size(0), B});
  const Tensor x = dense(X), y = Y ? dense(*Y) : x, scales = dense(gamma);
  Tensor out = new_large(X, {G, B, N, M});
  if (out.numel() > 0)
    kernels().kernel_matrix(dtype_of(X), k, G, B, N, M, d, !Y, x.const_data_ptr(), y.const_data_ptr(),
                            scales.const_data_ptr(), degree, coef0, out.mutable_data_ptr(), threads());
  return out;
}

std::tuple<Tensor, Tensor> within_scatter(Tensor K, Tensor codes, Tensor root, Tensor counts, Tensor scale) {
  const Tensor k = matrices(K), c = dense(codes), r = dense(root), n = dense(counts), s = dense(scale);
  const int64_t P = K.size(0), N = K.size(1), L = counts.size(1);
  STD_TORCH_CHECK(
      codes.scalar_type() == ScalarType::Long && codes.dim() == 2 && codes.size(0) == P && codes.size(1) == N,
      "phydi_cpu: codes must be (P, N), int64");
  check_shape(root, K, {P, N});
  check_shape(counts, K, {P, L});
  check_shape(scale, K, {P, L});
  const int64_t* const code = static_cast<const int64_t*>(c.const_data_ptr());
  STD_TORCH_CHECK(std::all_of(code, code + P * N, [&](int64_t v) { return v >= 0 && v < L; }),
                  "phydi_cpu: codes must be 0 ... L - 1");
  Tensor G = new_large(K, {P, N, N});
  Tensor means = torch::stable::new_empty(K, {P, N, L});
  if (G.numel() > 0)
    kernels().within_scatter(dtype_of(K), P, N, L, k.const_data_ptr(), k.stride(0), code, r.const_data_ptr(),
                             n.const_data_ptr(), s.const_data_ptr(), G.mutable_data_ptr(), means.mutable_data_ptr(),
                             threads());
  return {G, means};
}

Tensor asymmetry(Tensor K) {
  const Tensor k = matrices(K);
  Tensor out = torch::stable::new_zeros(K, {K.size(0), 2});
  if (K.numel() > 0)
    kernels().asymmetry(dtype_of(K), K.size(0), K.size(1), k.const_data_ptr(), k.stride(0), out.mutable_data_ptr(),
                        threads());
  return out;
}

Tensor cholesky(Tensor A) {
  check_real(A);
  STD_TORCH_CHECK(A.dim() == 3 && A.size(1) == A.size(2) && A.is_contiguous(),
                  "phydi_cpu: A must be (P, N, N), contiguous");
  Tensor failed = torch::stable::new_zeros(A, {A.size(0)}, ScalarType::Int);
  if (A.numel() > 0)
    kernels().cholesky(dtype_of(A), A.size(0), A.size(1), A.mutable_data_ptr(),
                       static_cast<int32_t*>(failed.mutable_data_ptr()), threads());
  return failed;
}

Tensor cholesky_solve(Tensor L, Tensor R) {
  const Tensor factor = matrices(L), right = dense(R);
  STD_TORCH_CHECK(factor.is_contiguous() && R.dim() == 3, "phydi_cpu: R must be (P, N, m), L contiguous");
  check_shape(R, L, {L.size(0), L.size(1), R.size(2)});
  Tensor X = torch::stable::new_empty(R, R.sizes());
  if (X.numel() > 0)
    kernels().cholesky_solve(dtype_of(L), L.size(0), L.size(1), R.size(2), factor.const_data_ptr(),
                             right.const_data_ptr(), X.mutable_data_ptr(), threads());
  return X;
}

Tensor times(Tensor A, Tensor X) {
  const Tensor a = matrices(A), x = dense(X);
  STD_TORCH_CHECK(X.dim() == 3, "phydi_cpu: X must be (P, N, m)");
  check_shape(X, A, {A.size(0), A.size(1), X.size(2)});
  Tensor out = torch::stable::new_empty(X, X.sizes());
  if (out.numel() > 0)
    kernels().times(dtype_of(A), A.size(0), A.size(1), X.size(2), a.const_data_ptr(), a.stride(0), x.const_data_ptr(),
                    out.mutable_data_ptr(), threads());
  return out;
}

std::tuple<Tensor, Tensor> eigh_small(Tensor S) {
  check_real(S);
  STD_TORCH_CHECK(S.dim() == 3 && S.size(1) == S.size(2), "phydi_cpu: S must be (P, L, L)");
  const Tensor s = dense(S);
  Tensor values = torch::stable::new_empty(S, {S.size(0), S.size(1)});
  Tensor vectors = torch::stable::new_empty(S, S.sizes());
  if (S.numel() > 0)
    kernels().eigh_small(dtype_of(S), S.size(0), S.size(1), s.const_data_ptr(), values.mutable_data_ptr(),
                         vectors.mutable_data_ptr(), threads());
  return {values, vectors};
}

int64_t panels_of(int64_t N) { return std::max<int64_t>((N + kBandwidth - 1) / kBandwidth - 1, 0); }

std::tuple<Tensor, Tensor> band_reduce(Tensor S) {
  check_real(S);
  STD_TORCH_CHECK(S.dim() == 3 && S.size(1) == S.size(2) && S.is_contiguous(),
                  "phydi_cpu: S must be (P, N, N), contiguous");
  const int64_t P = S.size(0), N = S.size(1);
  Tensor band = torch::stable::new_empty(S, {P, N, kBandwidth + 1});
  Tensor blocks = torch::stable::new_empty(S, {P, panels_of(N), kBandwidth, kBandwidth});
  if (S.numel() > 0)
    kernels().band_reduce(dtype_of(S), P, N, S.mutable_data_ptr(), band.mutable_data_ptr(), blocks.mutable_data_ptr(),
                          threads());
  return {band, blocks};
}

std::tuple<Tensor, Tensor> band_cholesky(Tensor band, Tensor tau) {
  check_real(band);
  STD_TORCH_CHECK(band.dim() == 3 && band.size(2) == kBandwidth + 1 && tau.dim() == 2, "phydi_cpu: unknown band");
  const int64_t count = tau.size(0), P = band.size(0), N = band.size(1);
  check_shape(tau, band, {count, P});
  const Tensor b = dense(band), t = dense(tau);
  Tensor L = torch::stable::new_empty(band, {count, P, N, kBandwidth + 1});
  Tensor failed = torch::stable::new_zeros(band, {count, P}, ScalarType::Int);
  if (L.numel() > 0)
    kernels().band_cholesky(dtype_of(band), count, P, N, b.const_data_ptr(), t.const_data_ptr(), L.mutable_data_ptr(),
                            static_cast<int32_t*>(failed.mutable_data_ptr()), threads());
  return {L, failed};
}

Tensor band_solve(Tensor L, Tensor S, Tensor blocks, Tensor R) {
  check_real(L);
  STD_TORCH_CHECK(L.dim() == 4 && R.dim() == 4, "phydi_cpu: L must be (T, P, N, width), R (T, P, N, m)");
  const int64_t count = L.size(0), P = L.size(1), N = L.size(2);
  check_shape(L, R, {count, P, N, kBandwidth + 1});
  check_shape(S, R, {P, N, N});
  check_shape(blocks, R, {P, panels_of(N), kBandwidth, kBandwidth});
  check_shape(R, L, {count, P, N, R.size(3)});
  const Tensor l = dense(L), s = dense(S), b = dense(blocks), r = dense(R);
  Tensor X = torch::stable::new_empty(R, R.sizes());
  if (X.numel() > 0)
    kernels().band_solve(dtype_of(R), count, P, N, R.size(3), l.const_data_ptr(), s.const_data_ptr(),
                         b.const_data_ptr(), r.const_data_ptr(), X.mutable_data_ptr(), threads());
  return X;
}

std::string isa() { return kernels().isa; }

}  // namespace
}  // namespace phydi

STABLE_TORCH_LIBRARY_IMPL(phydi_cpu, CPU, m) {
  m.impl("phm_linear", TORCH_BOX(&phydi::phm_linear));
  m.impl("phm_linear_weight_grad", TORCH_BOX(&phydi::phm_linear_weight_grad));
  m.impl("phm_linear_factored", TORCH_BOX(&phydi::phm_linear_factored));
  m.impl("phm_linear_factored_grad", TORCH_BOX(&phydi::phm_linear_factored_grad));
  m.impl("kron_sum", TORCH_BOX(&phydi::kron_sum));
  m.impl("kron_sum_grad", TORCH_BOX(&phydi::kron_sum_grad));
  m.impl("mix", TORCH_BOX(&phydi::mix));
  m.impl("pre_add", TORCH_BOX(&phydi::pre_add));
  m.impl("post_add_", TORCH_BOX(&phydi::post_add));
  m.impl("phc_conv_factored_", TORCH_BOX(&phydi::phc_conv_factored));
  m.impl("block_dots", TORCH_BOX(&phydi::block_dots));
  m.impl("epilogue_", TORCH_BOX(&phydi::epilogue));
  m.impl("kernel_matrix", TORCH_BOX(&phydi::kernel_matrix));
  m.impl("within_scatter", TORCH_BOX(&phydi::within_scatter));
  m.impl("asymmetry", TORCH_BOX(&phydi::asymmetry));
  m.impl("cholesky_", TORCH_BOX(&phydi::cholesky));
  m.impl("cholesky_solve", TORCH_BOX(&phydi::cholesky_solve));
  m.impl("times", TORCH_BOX(&phydi::times));
  m.impl("eigh_small", TORCH_BOX(&phydi::eigh_small));
  m.impl("band_reduce_", TORCH_BOX(&phydi::band_reduce));
  m.impl("band_cholesky", TORCH_BOX(&phydi::band_cholesky));
  m.impl("band_solve", TORCH_BOX(&phydi::band_solve));
}

STABLE_TORCH_LIBRARY_IMPL(phydi_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&phydi::isa)); }
