"""The compiled CPU kernels: schemas of the ``phydi_cpu`` namespace, and the library that implements them.

Schemas are defined here, so that they exist where the library is missing; the library is loaded at first use.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import plans
from ..plans import Plan
from ..reference import compute_dtype, split_structure_grad, structure

LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "libphydi_kernels.so"

_LIB = torch.library.Library("phydi_cpu", "DEF")
_LIB.define(
    "phm_linear(Tensor x, Tensor A, Tensor F, Tensor? bias, Tensor? residual, Tensor? alpha, bool relu, int plan) "
    "-> Tensor"
)
_LIB.define("phm_linear_weight_grad(Tensor grad, Tensor x, Tensor A, Tensor F, int plan) -> (Tensor, Tensor)")
_LIB.define(
    "phm_linear_factored(Tensor x, Tensor? U, Tensor V, Tensor W, Tensor F, Tensor? bias, Tensor? residual, "
    "Tensor? alpha, bool relu, int plan) -> Tensor"
)
_LIB.define(
    "phm_linear_factored_grad(Tensor grad, Tensor x, Tensor U, Tensor V, Tensor W, Tensor F) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# H = sum_i A_i (x) F_i for the blocks of H that A selects, and (dA, dF) from the gradient of those blocks.
_LIB.define("kron_sum(Tensor A, Tensor F) -> Tensor")
_LIB.define("kron_sum_grad(Tensor G, Tensor A, Tensor F) -> (Tensor, Tensor)")
# out[b, k, c, i, s] = sum_l A[i, k, l] x[b, c, l, s].
_LIB.define("mix(Tensor x, Tensor A) -> Tensor")
# Images are (B, channels, pixels) if planes, else (B, pixels, channels); W and V are in the compute type.
# out[r, b, m, s] = sum_l W[r, l] x_l[b, m, s], x_l block l of the channels of x.
_LIB.define("pre_add(Tensor x, Tensor W, bool planes) -> Tensor")
# y_k = sum_r V[r, k] parts_r, then the epilogue: residual + alpha * act(y + bias), bias and alpha along the channels.
_LIB.define(
    "post_add_(Tensor(a!) y, Tensor[] parts, Tensor V, Tensor? bias, Tensor? residual, Tensor? alpha, bool relu, "
    "bool planes) -> ()"
)
# The whole of a factored convolution, directly: y_k = sum_r V[r, k] conv(sum_l W[r, l] x_l, F_hat_r) and the epilogue,
# with F_hat (R, p, q, taps), or F (n, taps, q, p) and U, F_hat_r = sum_i U[r, i] F_i, for n of plans.LINE_TERMS. The
# window is (height, width) of x, y, the kernel, stride, padding and dilation.
_LIB.define(
    "phc_conv_factored_(Tensor(a!) y, Tensor x, Tensor W, Tensor V, Tensor F, Tensor? U, Tensor? bias, "
    "Tensor? residual, Tensor? alpha, bool relu, bool planes, int[] window) -> ()"
)
# out[r, l] = <parts_r, x_l>.
_LIB.define("block_dots(Tensor x, Tensor[] parts, int blocks, bool planes) -> Tensor")
_LIB.define("epilogue_(Tensor(a!) y, Tensor? bias, Tensor? residual, Tensor? alpha, bool relu, bool planes) -> ()")
# K(x_i, y_j) of X (B, N, d), Y (B, M, d) or X itself, for every gamma (G, B); kernel numbers ops.kernel_matrix.NAMES.
_LIB.define("kernel_matrix(Tensor X, Tensor? Y, Tensor gamma, int kernel, int degree, float coef0) -> Tensor")
# (G, means) of K (P, N, N): means (P, N, L) of the classes in each row, with weights root^2, and the lower triangle of
# G = B B^T, B_ij = root_i root_j scale_c(j) (K_ij - means_ic(j)); codes c and root (P, N), counts (sums of the weights)
# and scale (P, L).
_LIB.define("within_scatter(Tensor K, Tensor codes, Tensor root, Tensor counts, Tensor scale) -> (Tensor, Tensor)")
# The largest |K_ij| and |K_ij - K_ji| (P, 2).
_LIB.define("asymmetry(Tensor K) -> Tensor")
# The lower Cholesky factors of the lower triangles of A (P, N, N), in place; where there is none the result (P) is 1.
_LIB.define("cholesky_(Tensor(a!) A) -> Tensor")
_LIB.define("cholesky_solve(Tensor L, Tensor R) -> Tensor")
# A X of A (P, N, N) and X (P, N, m) of few columns: A is read once.
_LIB.define("times(Tensor A, Tensor X) -> Tensor")
# S = Q T Q^T: (T as a band, blocks), with Q in the place of S and in blocks; then the factors of T + tau I for tau
# (count, P) and where there is none; then X = Q (L L^T)^-1 Q^T R for R (count, P, N, m).
_LIB.define("band_reduce_(Tensor(a!) S) -> (Tensor, Tensor)")
_LIB.define("band_cholesky(Tensor band, Tensor tau) -> (Tensor, Tensor)")
_LIB.define("band_solve(Tensor L, Tensor S, Tensor blocks, Tensor R) -> Tensor")
_LIB.define("eigh_small(Tensor S) -> (Tensor, Tensor)")
# The instruction set the kernels run with on this machine.
_LIB.define("isa() -> str")

_OPERATORS = (
    "phm_linear",
    "phm_linear_weight_grad",
    "phm_linear_factored",
    "phm_linear_factored_grad",
    "kron_sum",
    "kron_sum_grad",
    "mix",
    "pre_add",
    "post_add_",
    "phc_conv_factored_",
    "block_dots",
    "epilogue_",
    "kernel_matrix",
    "within_scatter",
    "asymmetry",
    "cholesky_",
    "cholesky_solve",
    "times",
    "band_reduce_",
    "band_cholesky",
    "band_solve",
    "eigh_small",
    "isa",
)
_phm_linear = torch.ops.phydi_cpu.phm_linear.default
_phm_linear_weight_grad = torch.ops.phydi_cpu.phm_linear_weight_grad.default
_phm_linear_factored = torch.ops.phydi_cpu.phm_linear_factored.default
phm_linear_factored_grad = torch.ops.phydi_cpu.phm_linear_factored_grad.default


def load() -> str:
    """Loads the library. Returns "" or the reason why it cannot be used."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built (no C++ compiler, or no torch, at installation)"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error.__cause__ or error}"
    computed = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    missing = [name for name in _OPERATORS if not computed(f"phydi_cpu::{name}", "CPU")]
    if missing:
        return f"{LIBRARY.name} is of another version, without {', '.join(missing)}; build it again"
    return ""


def warn(reason: str) -> None:
    """Says why compiled kernels do not run, to who calls ``available``."""
    warnings.warn(
        f"phydi_kernels: {reason}; the plain PyTorch implementation runs instead, slower. See `phydi-kernels info`.",
        stacklevel=3,
    )


@functools.cache
def available() -> bool:
    """Whether the compiled kernels run. Warns once, with the reason, when they do not."""
    reason = load()
    if reason:
        warn(reason)
    return not reason


@functools.cache
def isa() -> str:
    """The instruction set that the kernels run with; they must be available."""
    return torch.ops.phydi_cpu.isa()


def phm_linear(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
    plan: Plan,
) -> Tensor:
    return _phm_linear(x, A, F, bias, residual, alpha, activation == "relu", int(plan))


def phm_linear_weight_grad(grad: Tensor, x: Tensor, A: Tensor, F: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    if plan is not Plan.MIX:
        return _phm_linear_weight_grad(grad, x, A, F, int(plan))
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and "bf16" not in isa()):
        # What the processor does not multiply is rounded once.
        dA, dF = phm_linear_weight_grad(grad.float(), x.float(), A.float(), F.float(), plan)
        return dA.to(A.dtype), dF.to(F.dtype)
    if not plans.mixes_input(*A.shape[1:], *F.shape[1:]):
        dA, dF = _mixed_weight_grad(x, grad, A.transpose(1, 2), F.transpose(1, 2))
        return dA.transpose(1, 2).contiguous(), dF.transpose(1, 2).contiguous()
    return _mixed_weight_grad(grad, x, A, F)


def _mixed_weight_grad(grad: Tensor, x: Tensor, A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """dF_i = sum_k g_k^T (sum_l A[i,k,l] x_l), dA[i,k,l] = <F_i^T g_k, x_l>: n*P blocks of products in place of P*Q."""
    n, P, Q = A.shape
    _, p, q = F.shape
    x, grad = x.reshape(-1, Q * q).contiguous(), grad.reshape(-1, P * p).contiguous()
    rows, each = grad.view(len(x) * P, p), torch.eye(n, dtype=A.dtype)
    mixed = torch.ops.phydi_cpu.mix.default(x.view(len(x), 1, Q, q), A).view(len(x) * P, n * q)
    dF = _phm_linear_weight_grad(rows, mixed, each.view(n, 1, n), F, int(Plan.PANEL))[1]
    of_product = plans.phm_linear(len(rows), n, n, 1, q, p, False, x.dtype == torch.bfloat16, isa())
    products = phm_linear(rows, each.view(n, n, 1), F.transpose(1, 2), None, None, None, "none", of_product)
    return algebra_grad(products.view(len(x), P * n, q), x.view(len(x), Q, q), n).to(A.dtype), dF


def algebra_grad(products: Tensor, x: Tensor, n: int) -> Tensor:
    """dA[i,k,l] = <products_ki, x_l>, of products (B, P*n, size) and x (B, Q, size), in the type that adds up."""
    dtype = compute_dtype(x.dtype)
    dA = x.new_zeros((products.shape[1], x.shape[1]), dtype=dtype)
    some = max(1, plans.NEAR_BYTES // (dA.numel() * dA.element_size()))
    for a, b in zip(products.split(some), x.split(some), strict=True):
        dA += torch.bmm(a.to(dtype), b.to(dtype).transpose(1, 2)).sum(0)
    return dA.unflatten(0, (-1, n)).transpose(0, 1).contiguous()


def phm_linear_factored(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
    plan: Plan,
) -> Tensor:
    return _phm_linear_factored(x, U, V, W, F, bias, residual, alpha, activation == "relu", int(plan))


def factored_weight_grad(
    weight_grad: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype, U: Tensor, V: Tensor, W: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dU, dV, dW, dF), where ``weight_grad(A)`` gives (dA, dF) for A = sum_r U_r (x) V_r (x) W_r.

    ``dtype`` is that of the activations; dU, dV and dW have the types of U, V and W.
    """
    factors = [t.to(compute_dtype(dtype)) for t in (U, V, W)]
    dA, dF = weight_grad(structure(*factors))
    dU, dV, dW = split_structure_grad(dA, *factors)
    return dU.to(U.dtype), dV.to(V.dtype), dW.to(W.dtype), dF
