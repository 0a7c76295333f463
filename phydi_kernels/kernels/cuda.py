"""The compiled CUDA kernels: schemas of the ``phydi_cuda`` namespace, and whether the library implements them.

They are in the library of the CPU kernels where nvcc was there when it was built. Tensors are float32 or float64 (codes
are int64), contiguous, and on one device; K may be one matrix expanded over the problems.
"""

from __future__ import annotations

import functools

import torch

from . import cpu

_LIB = torch.library.Library("phydi_cuda", "DEF")
# K(x_i, y_j) (G, B, N, M) of X (B, N, d), Y (B, M, d) or X itself, and gamma (G, B); kernel: ops.kernel_matrix.NAMES.
_LIB.define("kernel_matrix(Tensor X, Tensor? Y, Tensor gamma, int kernel, int degree, float coef0) -> Tensor")
# (B, means) of K (P, N, N): means (P, N, L) of the classes in each row, with weights root^2, and B (P, N, N),
# B_ij = root_i root_j scale_c(j) (K_ij - means_ic(j)); codes c and root (P, N), counts (sums of weights) and scale
# (P, L).
_LIB.define("class_center(Tensor K, Tensor codes, Tensor root, Tensor counts, Tensor scale) -> (Tensor, Tensor)")
# Ascending eigenvalues (P, L) and eigenvectors (P, L, L) in columns of the lower triangles of S (P, L, L), L <= 64.
_LIB.define("eigh_small(Tensor S) -> (Tensor, Tensor)")

_OPERATORS = ("kernel_matrix", "class_center", "eigh_small")


def load() -> str:
    """Loads the library. Returns "" or the reason why its CUDA kernels cannot be used."""
    reason = cpu.load()
    if reason:
        return reason
    computed = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    missing = [name for name in _OPERATORS if not computed(f"phydi_cuda::{name}", "CUDA")]
    if len(missing) == len(_OPERATORS):
        return f"{cpu.LIBRARY.name} was built without CUDA kernels (no nvcc, or PHYDI_CUDA=0, at installation)"
    if missing:
        return f"{cpu.LIBRARY.name} is of another version, without {', '.join(missing)} on CUDA; build it again"
    return ""


@functools.cache
def available() -> bool:
    """Whether the compiled kernels run on CUDA tensors. Warns once, with the reason, when they do not."""
    reason = load()
    if reason:
        cpu.warn(reason)
    return not reason
