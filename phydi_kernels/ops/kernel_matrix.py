"""phydi::kernel_matrix.

Every kernel is f(gamma s) of a pairwise quantity s: a dot product or a distance. So one derivative f' serves s and
gamma, and the gradients in X and Y are those of the four pairwise quantities. They are written in differentiable
operations, and second derivatives follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..kernels import cpu, cuda
from ..reference import KERNELS, PAIRWISE
from ._autograd import register_autograd
from ._family import LIB, define, leading

# The order is that of the enum in csrc.
NAMES = (
    "dot",
    "poly",
    "sigmoid",
    "squared_distance",
    "rbf",
    "matern12",
    "matern32",
    "matern52",
    "manhattan_distance",
    "laplacian",
    "chi2_distance",
    "chi2",
)


def _cpu(X: Tensor, Y: Tensor | None, gamma: Tensor, kernel: str, degree: int, coef0: float) -> Tensor:
    if not cpu.available():
        return reference.kernel_matrix(X, Y, gamma, kernel, degree, coef0)
    return torch.ops.phydi_cpu.kernel_matrix.default(X, Y, gamma, NAMES.index(kernel), degree, coef0)


def _cuda(X: Tensor, Y: Tensor | None, gamma: Tensor, kernel: str, degree: int, coef0: float) -> Tensor:
    if not cuda.available():
        return reference.kernel_matrix(X, Y, gamma, kernel, degree, coef0)
    Y = None if Y is None else Y.contiguous()
    return torch.ops.phydi_cuda.kernel_matrix.default(
        X.contiguous(), Y, gamma.contiguous(), NAMES.index(kernel), degree, coef0
    )


def _fake(X, Y, gamma, kernel, degree, coef0):
    groups = 1 if kernel in PAIRWISE else gamma.shape[0]
    return X.new_empty((groups, *X.shape[:2], (X if Y is None else Y).shape[1]))


kernel_matrix = define(
    "kernel_matrix(Tensor X, Tensor? Y, Tensor gamma, str kernel, int degree, float coef0) -> Tensor",
    reference.kernel_matrix,
    _cpu,
    _fake,
    cuda=_cuda,
)


def _slope(kernel: str, s: Tensor, K: Any, gamma: Tensor, degree: int, coef0: float) -> Tensor:
    """df/ds of a kernel f(gamma s); K = f where it is given."""
    if kernel == "poly":
        return gamma * degree * (gamma * s + coef0) ** (degree - 1)
    if kernel == "sigmoid":
        return gamma * (1 - K * K)
    if kernel.startswith("matern"):
        nu2 = int(kernel[-2])  # 2 nu
        r = reference.matern_radius(s, gamma)
        decay = (-(nu2**0.5) * r).exp()
        if nu2 == 1:
            # Not differentiable where x = y: 0 there.
            return torch.where(s > 0, -gamma * decay / torch.where(r > 0, r, 1), 0)
        return -gamma * decay * (3 if nu2 == 3 else 5 / 3 * (1 + 5**0.5 * r))
    return -gamma * K


def _pairwise_grad(pairwise: str, W: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """d/dX of sum_ij W_ij s(x_i, y_j); s is symmetric, so this serves Y as well."""
    if pairwise == "dot":
        return W @ Y
    if pairwise == "squared_distance":
        center = reference.middle(Y)
        return 2 * (W.sum(-1, keepdim=True) * (X - center) - W @ (Y - center))
    columns = []
    for f in range(X.shape[-1]):
        x, y = X[..., f].unsqueeze(-1), Y[..., f].unsqueeze(-2)
        if pairwise == "manhattan_distance":
            slope = (x - y).sign()
        else:
            total = x + y
            safe = torch.where(total == 0, 1, total)
            slope = torch.where(total == 0, 0, (x - y) * (x + 3 * y) / (safe * safe))
        columns.append((W * slope).sum(-1))
    return torch.stack(columns, -1) if columns else torch.zeros_like(X)


def _setup_context(ctx, inputs, output):
    X, Y, gamma, ctx.kernel, ctx.degree, ctx.coef0 = inputs
    of_K = ctx.kernel in KERNELS and ctx.kernel != "poly" and not ctx.kernel.startswith("matern")
    ctx.save_for_backward(X, Y, gamma, output if of_K else None)


def _backward(ctx, grad):
    X, Y, gamma, K = ctx.saved_tensors
    need_X, need_Y, need_gamma, *_ = ctx.needs_input_grad
    pairwise = KERNELS[ctx.kernel][0] if ctx.kernel in KERNELS else ctx.kernel
    d_gamma = None
    if pairwise == ctx.kernel:
        W = grad.sum(0)
        d_gamma = torch.zeros_like(gamma) if need_gamma else None
    else:
        s = kernel_matrix(X, Y, gamma.new_ones((1, gamma.shape[1])), pairwise, ctx.degree, ctx.coef0)
        scale = gamma[..., None, None]
        W = grad * _slope(ctx.kernel, s, K, scale, ctx.degree, ctx.coef0)
        if need_gamma:
            d_gamma = (W * s).sum((-2, -1)) / gamma
        W = W.sum(0)
    d_X = d_Y = None
    if Y is None:
        d_X = _pairwise_grad(pairwise, W + W.mT, X, X) if need_X else None
    else:
        d_X = _pairwise_grad(pairwise, W, X, Y) if need_X else None
        d_Y = _pairwise_grad(pairwise, W.mT, Y, X) if need_Y else None
    return d_X, d_Y, d_gamma, None, None, None


register_autograd(LIB, kernel_matrix, _backward, _setup_context)


def _vmap(info, in_dims, X, Y, gamma, kernel, degree, coef0):
    size = info.batch_size
    if in_dims[0] is None and in_dims[1] is None and kernel not in PAIRWISE:
        # The mapped gammas share the distances.
        K = kernel_matrix(X, Y, leading(gamma, in_dims[2], size).flatten(0, 1), kernel, degree, coef0)
        return K.unflatten(0, (size, -1)), 0
    batch = X.shape[0] if in_dims[0] is None else X.movedim(in_dims[0], 0).shape[1]
    X, Y, gamma = (leading(t, d, size) for t, d in zip((X, Y, gamma), in_dims[:3], strict=True))
    gamma = gamma.movedim(0, 1).flatten(1, 2)
    K = kernel_matrix(X.flatten(0, 1), None if Y is None else Y.flatten(0, 1), gamma, kernel, degree, coef0)
    return K.unflatten(1, (size, batch)), 1


torch.library.register_vmap(kernel_matrix, _vmap)
