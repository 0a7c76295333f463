"""Every operator in plain PyTorch: the specification of the compiled kernels.

Tests and benchmarks compare against these functions, and they run wherever no kernel is built for a device.
They build the dense weight H = sum_i A_i (x) F_i. Half-precision inputs are computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.grad as conv_grad
from torch import Tensor

_CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
_CONV_INPUT = {1: conv_grad.conv1d_input, 2: conv_grad.conv2d_input, 3: conv_grad.conv3d_input}
_CONV_WEIGHT = {1: conv_grad.conv1d_weight, 2: conv_grad.conv2d_weight, 3: conv_grad.conv3d_weight}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a kernel adds and multiplies in: float32 for the 16-bit types, else the type itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _up(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(compute_dtype(t.dtype)) for t in tensors]


def _like(arguments: Sequence[Tensor], *results: Tensor) -> Any:
    return tuple(t.to(a.dtype).contiguous() for a, t in zip(arguments, results, strict=True))


def dense_weight(A: Tensor, F: Tensor) -> Tensor:
    """H = sum_i A_i (x) F_i (PHYDI Eq. 1). A (n, P, Q), F (n, p, q, *kernel) -> (P*p, Q*q, *kernel)."""
    n, P, Q = A.shape
    _, p, q, *kernel = F.shape
    H = torch.einsum("ikl,irst->krlst", A, F.reshape(n, p, q, -1))
    return H.reshape(P * p, Q * q, *kernel)


def split_weight_grad(G: Tensor, A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """(dA, dF) from G = dL/dH: dA[i,k,l] = <F_i, G_kl>, dF_i = sum_kl A[i,k,l] G_kl."""
    n, P, Q = A.shape
    _, p, q = F.shape[:3]
    blocks = G.reshape(P, p, Q, q, -1)
    dA = torch.einsum("irst,krlst->ikl", F.reshape(n, p, q, -1), blocks)
    dF = torch.einsum("ikl,krlst->irst", A, blocks)
    return dA, dF.reshape(F.shape)


def structure(U: Tensor | None, V: Tensor, W: Tensor) -> Tensor:
    """A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l] from U (R, n), V (R, P), W (R, Q); without U, A[r,k,l] = V[r,k] W[r,l]."""
    if U is None:
        return V.unsqueeze(2) * W.unsqueeze(1)
    return torch.einsum("ri,rk,rl->ikl", U, V, W)


def split_structure_grad(dA: Tensor, U: Tensor, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dU, dV, dW) from the gradient of A = structure(U, V, W)."""
    dU = torch.einsum("ikl,rk,rl->ri", dA, V, W)
    dV = torch.einsum("ikl,ri,rl->rk", dA, U, W)
    dW = torch.einsum("ikl,ri,rk->rl", dA, U, V)
    return dU, dV, dW


def epilogue(h: Tensor, residual: Tensor | None, alpha: Tensor | None, activation: str, spatial: int = 0) -> Tensor:
    """residual + alpha * act(h), alpha for all of h (..., channels, *spatial) or for each channel."""
    y = torch.relu(h) if activation == "relu" else h
    if alpha is not None:
        y = y * (alpha.reshape(()) if alpha.numel() == 1 else alpha.view(-1, *[1] * spatial))
    return y if residual is None else residual + y


def phm_linear(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """residual + alpha * act(x H^T + bias); x (..., Q*q) -> (..., P*p)."""
    dtype = x.dtype
    x, A, F, bias, residual, alpha = _up(x, A, F, bias, residual, alpha)
    h = torch.nn.functional.linear(x, dense_weight(A, F), bias)
    return epilogue(h, residual, alpha, activation).to(dtype).contiguous()


def phm_linear_weight_grad(grad: Tensor, x: Tensor, A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """(dA, dF) of <grad, x H^T>; grad (..., P*p), x (..., Q*q)."""
    dtype = x.dtype
    grad, x, A, F = _up(grad, x, A, F)
    G = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    dA, dF = split_weight_grad(G, A, F)
    return dA.to(dtype).contiguous(), dF.to(dtype).contiguous()


def phm_linear_factored(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """phm_linear with A = structure(U, V, W)."""
    dtype = x.dtype
    x, U, V, W, F, bias, residual, alpha = _up(x, U, V, W, F, bias, residual, alpha)
    return phm_linear(x, structure(U, V, W), F, bias, residual, alpha, activation).to(dtype)


def phm_linear_factored_grad(
    grad: Tensor, x: Tensor, U: Tensor, V: Tensor, W: Tensor, F: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dU, dV, dW, dF) of <grad, x H^T>."""
    arguments = (x, U, V, W, F)
    grad, x, U, V, W, F = _up(grad, *arguments)
    A = structure(U, V, W)
    dx = torch.nn.functional.linear(grad, dense_weight(A, F).t())
    dA, dF = phm_linear_weight_grad(grad, x, A, F)
    return _like(arguments, dx, *split_structure_grad(dA, U, V, W), dF)


def phc_conv(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """residual + alpha * act(conv(x, H) + bias) in one, two or three dimensions; x (B, Q*q, *spatial)."""
    dtype = x.dtype
    x, A, F, bias, residual, alpha = _up(x, A, F, bias, residual, alpha)
    h = _CONV[F.dim() - 3](x, dense_weight(A, F), bias, stride, padding, dilation)
    return epilogue(h, residual, alpha, activation, spatial=F.dim() - 3).to(dtype)


def phc_conv_input_grad(
    grad: Tensor,
    A: Tensor,
    F: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """d<grad, conv(x, H)>/dx, of size input_size."""
    dtype = grad.dtype
    grad, A, F = _up(grad, A, F)
    dx = _CONV_INPUT[F.dim() - 3](input_size, dense_weight(A, F), grad, stride, padding, dilation)
    return dx.to(dtype)


def phc_conv_weight_grad(
    grad: Tensor, x: Tensor, A: Tensor, F: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    """(dA, dF) of <grad, conv(x, H)>."""
    dtype = x.dtype
    grad, x, A, F = _up(grad, x, A, F)
    size = (A.shape[1] * F.shape[1], A.shape[2] * F.shape[2], *F.shape[3:])
    G = _CONV_WEIGHT[F.dim() - 3](x, size, grad, stride, padding, dilation)
    dA, dF = split_weight_grad(G, A, F)
    return dA.to(dtype).contiguous(), dF.to(dtype).contiguous()


def phc_conv_factored(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """phc_conv with A = structure(U, V, W)."""
    dtype = x.dtype
    x, U, V, W, F, bias, residual, alpha = _up(x, U, V, W, F, bias, residual, alpha)
    A = structure(U, V, W)
    return phc_conv(x, A, F, bias, stride, padding, dilation, residual, alpha, activation).to(dtype)


def phc_conv_factored_input_grad(
    grad: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """d<grad, conv(x, H)>/dx, of size input_size."""
    dtype = grad.dtype
    grad, U, V, W, F = _up(grad, U, V, W, F)
    return phc_conv_input_grad(grad, structure(U, V, W), F, input_size, stride, padding, dilation).to(dtype)


def phc_conv_factored_grad(
    grad: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dU, dV, dW, dF) of <grad, conv(x, H)>."""
    arguments = (x, U, V, W, F)
    grad, x, U, V, W, F = _up(grad, *arguments)
    A = structure(U, V, W)
    dx = phc_conv_input_grad(grad, A, F, list(x.shape), stride, padding, dilation)
    dA, dF = phc_conv_weight_grad(grad, x, A, F, stride, padding, dilation)
    return _like(arguments, dx, *split_structure_grad(dA, U, V, W), dF)
