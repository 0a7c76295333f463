"""Drivers of phydi::phc_conv{1,2,3}d_factored and their gradients.

* fused, epilogue: implicit GEMM in channels_last, the R products of a tile added to its P results in registers.
* passes: X-hat, torch's convolution in R groups, and the sums over Y-hat with the epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...plans_cuda import CudaPlan
from ..phc_conv import output_size, reversed_filters
from ._launch import deterministic
from .combine import block_dots, combine
from .configs import Config, config
from .phc_conv import as_images, as_pixels, taps_first, window
from .phm_linear import as_rows, blocks, contiguous
from .phm_linear_factored import combined_rows, combined_weights, split_combined
from .rank_product import rank_product


def in_groups(pixels: Tensor, coefficients: Tensor) -> Tensor:
    """X-hat as images (B, R*q, *spatial), channels_last, of x (B, *spatial, Q*q)."""
    R, count = coefficients.shape
    q = pixels.shape[-1] // count
    out = torch.empty((*pixels.shape[:-1], R * q), dtype=pixels.dtype, device=pixels.device)
    combine(blocks(as_rows(pixels), count), coefficients, blocks(as_rows(out), R))
    return as_images(out)


def grouped(x_hat: Tensor, weight: Tensor, geometry: Sequence[list[int]], groups: int) -> Tensor:
    none = [0] * len(geometry[0])
    with deterministic():
        return torch.ops.aten.convolution(x_hat, weight, None, *geometry, False, none, groups)


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
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
    plan: CudaPlan,
) -> Tensor:
    R, P = V.shape
    p, q, *kernel = F.shape[1:]
    size = output_size(x.shape[2:], kernel, stride, padding, dilation)
    pixels = as_pixels(x)
    rest = None if residual is None else as_rows(as_pixels(residual))
    bias, alpha = contiguous(bias, alpha)
    relu = activation == "relu"
    if plan is CudaPlan.PASSES:
        y = torch.empty((len(x), *size, P * p), dtype=x.dtype, device=x.device)
        weights = combined_weights(U, F).flatten(0, 1)
        y_hat = grouped(in_groups(pixels, W), weights, (stride, padding, dilation), R)
        parts = blocks(as_rows(as_pixels(y_hat)), R)
        combine(parts, V.t(), blocks(as_rows(y), P), bias, None if rest is None else blocks(rest, P), alpha, relu)
        return as_images(y)
    F_hat = combined_weights(U, taps_first(F))
    mixed, factor = pixels, None if plan is CudaPlan.EPILOGUE else W
    if plan is CudaPlan.EPILOGUE:
        mixed = combined_rows(as_rows(pixels), W).view(R, *pixels.shape[:-1], q)
        pixels = mixed[0]
    place = window(pixels, size, kernel, stride, padding, dilation)

    def run(tile: Config) -> Tensor:
        return rank_product(mixed, V, factor, F_hat, bias, rest, alpha, relu, place, tile)

    y = run(config(plan.value, x.dtype, P, p, x.device, run, convolution=True))
    return as_images(y.view(len(x), *size, P * p))


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
    plan: CudaPlan,
) -> Tensor:
    if plan is not CudaPlan.PASSES:
        # Its transpose has V and W exchanged.
        reverse, border = reversed_filters(F, padding, dilation)
        return phc_conv_factored(grad, U, W, V, reverse, None, stride, border, dilation, None, None, "none", plan)
    R, Q = W.shape
    B, _, *spatial = input_size
    like = torch.empty((B, *spatial, R * F.shape[2]), dtype=grad.dtype, device=grad.device)
    weight = combined_weights(U, F).flatten(0, 1)
    t, _ = _backward(in_groups(as_pixels(grad), V), as_images(like), weight, (stride, padding, dilation), R, False)
    return _from_terms(t, W, like.shape[:-1], Q * F.shape[2])


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[list[int]], groups: int, of_weight: bool
) -> tuple[Tensor, Tensor]:
    none = [0] * len(geometry[0])
    with deterministic():
        t, d_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry, False, none, groups, [True, of_weight, False]
        )
    return t, d_weight


def _from_terms(t: Tensor, W: Tensor, shape: Sequence[int], channels: int) -> Tensor:
    """dx_l = sum_r W[r,l] t_r as images, of t (B, R*q, *spatial)."""
    dx = torch.empty((*shape, channels), dtype=t.dtype, device=t.device)
    combine(blocks(as_rows(as_pixels(t)), len(W)), W.t(), blocks(as_rows(dx), W.shape[1]))
    return as_images(dx)


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
    """(dx, dU, dV, dW, dF), each in the type of its argument; formulas as in phm_linear_factored_grad."""
    (R, P), Q = V.shape, W.shape[1]
    geometry = (stride, padding, dilation)
    g, pixels = as_pixels(grad), as_pixels(x)
    weight = combined_weights(U, F)
    x_hat = in_groups(pixels, W)
    t, d_weight = _backward(in_groups(g, V), x_hat, weight.flatten(0, 1), geometry, R, True)
    y_hat = grouped(x_hat, weight.flatten(0, 1), geometry, R)
    dx = _from_terms(t, W, pixels.shape[:-1], x.shape[1])
    dW = block_dots(blocks(as_rows(as_pixels(t)), R), blocks(as_rows(pixels), Q))
    dV = block_dots(blocks(as_rows(as_pixels(y_hat)), R), blocks(as_rows(g), P))
    dU, dF = split_combined(d_weight.reshape(weight.shape), U, F)
    return dx, dU, dV.to(V.dtype), dW.to(W.dtype), dF
