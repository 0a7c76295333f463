// Eigenproblems of many small symmetric matrices.
#include "common.h"
#include "jacobi.h"

namespace phydi {
namespace PHYDI_ISA {

void eigh_small(DType dtype, int64_t P, int64_t L, const void* S, void* values, void* vectors, const Threads& threads) {
  with_real(dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel(threads, P, [&](int64_t p) {
      jacobi<T>(L, static_cast<const T*>(S) + p * L * L, L, static_cast<T*>(values) + p * L,
                static_cast<T*>(vectors) + p * L * L);
    });
  });
}

}  // namespace PHYDI_ISA
}  // namespace phydi
