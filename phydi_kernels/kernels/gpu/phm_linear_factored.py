"""Drivers of phydi::phm_linear_factored and phydi::phm_linear_factored_grad."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plans_cuda import CudaPlan
from . import phm_linear as dense
from ._launch import product
from .combine import block_dots, combine, structure
from .configs import Config, config
from .phm_linear import as_rows, blocks, contiguous
from .rank_product import rank_product
from .window import rows_window


def combined_weights(U: Tensor | None, F: Tensor) -> Tensor:
    """F-hat (R, p, ...), F-hat_r = sum_i U[r,i] F_i, of F (n, p, ...)."""
    if U is None:
        return F
    F_hat = torch.empty((len(U), *F.shape[1:]), dtype=F.dtype, device=F.device)
    combine(F.flatten(2), U, F_hat.flatten(2))
    return F_hat


def combined_rows(rows: Tensor, coefficients: Tensor) -> Tensor:
    """X-hat (R, B, q), x-hat_r = sum_l coefficients[r,l] x_l, of rows (B, Q*q)."""
    R, count = coefficients.shape
    out = torch.empty((R, len(rows), rows.shape[1] // count), dtype=rows.dtype, device=rows.device)
    return combine(blocks(rows, count), coefficients, out)


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
    plan: CudaPlan,
) -> Tensor:
    if plan in (CudaPlan.STREAM, CudaPlan.BUILT):
        return dense.phm_linear(x, structure(U, V, W), F, bias, residual, alpha, activation, plan)
    P, p = V.shape[1], F.shape[1]
    rows, rest = as_rows(x), None if residual is None else as_rows(residual)
    bias, alpha = contiguous(bias, alpha)
    relu = activation == "relu"
    F_hat = combined_weights(U, F)
    if plan is CudaPlan.PASSES:
        y = torch.empty((len(rows), P * p), dtype=x.dtype, device=x.device)
        # In float16 Y-hat may overflow where y does not.
        multiply = product if x.dtype is torch.float16 else torch.bmm
        y_hat = multiply(combined_rows(rows, W), F_hat.mT)
        combine(y_hat, V.t(), blocks(y, P), bias, None if rest is None else blocks(rest, P), alpha, relu)
    else:
        fused = plan is CudaPlan.FUSED
        mixed, factor = (rows, W) if fused else (combined_rows(rows, W), None)
        window = rows_window(mixed.stride(-2))

        def run(tile: Config) -> Tensor:
            return rank_product(mixed, V, factor, F_hat.unsqueeze(2), bias, rest, alpha, relu, window, tile)

        y = run(config(plan.value, x.dtype, P, p, x.device, run))
    return y.view(*x.shape[:-1], P * p)


def phm_linear_factored_grad(
    grad: Tensor, x: Tensor, U: Tensor, V: Tensor, W: Tensor, F: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dU, dV, dW, dF), each in the type of its argument.

    With g-hat_r = sum_k V[r,k] g_k and t_r = F-hat_r^T g-hat_r, dx_l = sum_r W[r,l] t_r, dW[r,l] = <x_l, t_r>,
    dV[r,k] = <g_k, y-hat_r>, and dU and dF follow from dF-hat_r = g-hat_r^T x-hat_r.
    """
    P, Q = V.shape[1], W.shape[1]
    g, rows = as_rows(grad), as_rows(x)
    F_hat, g_hat, x_hat = combined_weights(U, F), combined_rows(g, V), combined_rows(rows, W)
    t = product(g_hat, F_hat)
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    combine(t, W.t(), blocks(dx, Q))
    dW = block_dots(t, blocks(rows, Q))
    dV = block_dots(product(x_hat, F_hat.mT), blocks(g, P))
    dU, dF = split_combined(product(g_hat.mT, x_hat), U, F)
    return dx.view(x.shape), dU, dV.to(V.dtype), dW.to(W.dtype), dF


def split_combined(d_weights: Tensor, U: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """(dU, dF) from the gradient of F-hat, both (., p, ...)."""
    of_F = F.flatten(2)
    dF = torch.empty(F.shape, dtype=F.dtype, device=F.device)
    combine(d_weights.flatten(2), U.t(), dF.flatten(2))
    return block_dots(d_weights.flatten(2), of_F).to(U.dtype), dF
