"""Drivers of phydi::phm_linear and phydi::phm_linear_weight_grad."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ...plans_cuda import PANEL_BYTES, CudaPlan, stream_size, stream_splits, stream_tile
from . import capability
from ._launch import product
from .combine import block_dots, combine
from .configs import Config, config
from .stream_product import stream_product
from .window import Window, rows_window


def blocks(rows: Tensor, count: int) -> Tensor:
    """(B, count * size) as (count, B, size)."""
    return rows.unflatten(1, (count, rows.shape[1] // count)).transpose(0, 1)


def as_rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def phm_linear(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
    plan: CudaPlan,
) -> Tensor:
    P, p = A.shape[1], F.shape[1]
    rows, rest = as_rows(x), None if residual is None else as_rows(residual)
    bias, alpha = contiguous(bias, alpha)
    relu = activation == "relu"
    if plan is CudaPlan.BUILT:
        y = built(rows, A, F, bias, rest, alpha, relu)
    elif plan is CudaPlan.MIX:
        y = torch.mm(mix(rows, A), F.transpose(0, 1).reshape(p, -1).t()).view(len(rows), P * p)
        if bias is not None or rest is not None or alpha is not None or relu:
            finish(y, bias, rest, alpha, relu)
    else:
        y = stream(rows, A, F.unsqueeze(2), bias, rest, alpha, relu, rows_window(rows.stride(0)))
    return y.view(*x.shape[:-1], P * p)


def stream(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    relu: bool,
    window: Window,
) -> Tensor:
    """stream_product with the tiles and the parts that fit, F (n, p, taps, q)."""
    n, P, Q = A.shape
    _, p, taps, q = F.shape
    M, N = stream_size(len(x) * math.prod(window.out_size), Q), stream_size(p, n)

    def run(tile: Config) -> Tensor:
        splits = stream_splits(M, N, taps * q, tile[:3], capability(x.device))
        return stream_product(x, A, F, bias, residual, alpha, relu, window, tile, splits)

    kernel = f"stream{stream_tile(M, n, P, Q, p, q)}"
    return run(config(kernel, x.dtype, n, p, x.device, run, convolution=window.image))


def built(
    rows: Tensor, A: Tensor, F: Tensor, bias: Tensor | None, residual: Tensor | None, alpha: Tensor | None, relu: bool
) -> Tensor:
    """By cuBLAS, with panels of H; what is more than a bias takes a pass of its own."""
    plain = residual is None and alpha is None and not relu
    y = torch.empty((len(rows), A.shape[1] * F.shape[1]), dtype=rows.dtype, device=rows.device)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    for features, panel in panels_of_H(A, F):
        if bias is not None and plain:
            torch.addmm(bias[features], rows, panel.t(), out=y[:, features])
        else:
            torch.mm(rows, panel.t(), out=y[:, features])
    if not plain:
        finish(y, bias, residual, alpha, relu)
    return y


def finish(y: Tensor, bias: Tensor | None, residual: Tensor | None, alpha: Tensor | None, relu: bool) -> None:
    """The epilogue, in place."""
    whole = y.unsqueeze(0)
    combine(whole, None, whole, bias, None if residual is None else residual.unsqueeze(0), alpha, relu)


def mix(rows: Tensor, A: Tensor) -> Tensor:
    """sum_l A[i,k,l] x_l of rows (B, Q*q) as (B*P, n*q)."""
    n, P, Q = A.shape
    B, q = len(rows), rows.shape[1] // Q
    weights = A.transpose(0, 1).reshape(P * n, Q).to(rows.dtype)
    return torch.bmm(weights.expand(B, P * n, Q), rows.reshape(B, Q, q)).view(B * P, n * q)


def panels_of_H(A: Tensor, F: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(features, H[features]) for F (n, p, [taps,] q): whole output blocks, as many as stay in L2."""
    P, Q = A.shape[1:]
    p, *taps, q = F.shape[1:]
    most = max(1, PANEL_BYTES // (F[0].numel() * Q * F.element_size()))
    for ks in range(0, P, most):
        count = min(most, P - ks)
        panel = torch.empty((count * p, *taps, Q * q), dtype=F.dtype, device=F.device)
        for k, part in enumerate(panel.split(p), start=ks):
            combine(F.reshape(len(F), -1, q), A[:, k].t(), blocks(as_rows(part), Q))
        yield slice(ks * p, (ks + count) * p), panel


def split_panels(panels: Iterable[Tensor], A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """(dA, dF) from the P panels of G = dL/dH, each (Q, p, ...) of one block of outputs; F (n, p, ...).

    dA[i,k,l] = <F_i, G_kl>, dF_i = sum_kl A[i,k,l] G_kl: a panel is read and dropped before the next is formed.
    """
    n, P, _ = A.shape
    dA = []
    total = torch.empty(F.shape, dtype=torch.float32, device=F.device)
    dF = torch.empty(F.shape, dtype=F.dtype, device=F.device)
    for k, panel in enumerate(panels):
        dA.append(block_dots(F, panel))
        combine(panel, A[:, k], total if k < P - 1 else dF, residual=total if k else None)
    return torch.stack(dA, 1).to(A.dtype), dF


def phm_linear_weight_grad(grad: Tensor, x: Tensor, A: Tensor, F: Tensor, plan: CudaPlan) -> tuple[Tensor, Tensor]:
    n, P, Q = A.shape
    _, p, q = F.shape
    rows = as_rows(x)
    if plan is CudaPlan.MIX:
        # dF_i = sum_k g_k^T (sum_l A[i,k,l] x_l), dA[i,k,l] = <F_i^T g_k, x_l>.
        g = grad.reshape(len(rows) * P, p)
        dF = product(g.t(), mix(rows, A)).view(p, n, q).transpose(0, 1)
        products = torch.mm(g, F.transpose(0, 1).reshape(p, n * q)).view(len(rows), P * n, q)
        left, right = (t.transpose(0, 1).reshape(t.shape[1], -1) for t in (products, rows.reshape(len(rows), Q, q)))
        dA = product(left, right.t()).view(P, n, Q).transpose(0, 1)
        return dA.to(A.dtype).contiguous(), dF.to(F.dtype).contiguous()
    g = blocks(as_rows(grad), P)

    def panels() -> Iterator[Tensor]:
        for k in range(P):
            yield blocks(product(g[k].t(), rows), Q)

    return split_panels(panels(), A, F)
