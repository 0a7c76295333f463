"""Drivers of phydi::phc_conv{1,2,3}d and their gradients.

* stream: implicit GEMM in channels_last, all products of blocks weighted by A in registers.
* built: torch's convolution with panels of H that L2 holds; its result is read once, with the epilogue.
* mix: torch's gradient of F's input, of mixed gradients, input block l as an extra batch: where the input's gradient
  is no convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...plans_cuda import CudaPlan
from ..phc_conv import convolution_backward, output_size, planar, planar_geometry, reversed_filters
from ._launch import deterministic
from .combine import combine
from .phm_linear import as_rows, blocks, contiguous, panels_of_H, split_panels, stream
from .window import Window


def as_pixels(t: Tensor) -> Tensor:
    """(B, channels, *spatial) as contiguous (B, *spatial, channels): a view if channels_last."""
    return t.movedim(1, -1).contiguous()


def as_images(pixels: Tensor) -> Tensor:
    return pixels.movedim(-1, 1)


def window(
    x: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Window:
    """Of x (B, [height,] width, channels), for results of ``size``."""
    strides = x.stride() if x.dim() == 4 else (x.stride(0), 0, x.stride(1))
    of_x, of_y, taps = planar(x.shape[1:-1], 1), planar(size, 1), planar(kernel, 1)
    return Window(of_x, of_y, taps, *planar_geometry(stride, padding, dilation), strides=strides[:3])


def taps_first(F: Tensor) -> Tensor:
    """F (n, p, q, *kernel) as contiguous (n, p, taps, q)."""
    return F.flatten(3).transpose(2, 3).contiguous()


def phc_conv(
    x: Tensor,
    A: Tensor,
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
    n, P, Q = A.shape
    p, q, *kernel = F.shape[1:]
    size = output_size(x.shape[2:], kernel, stride, padding, dilation)
    pixels = as_pixels(x)
    rest = None if residual is None else as_rows(as_pixels(residual))
    bias, alpha = contiguous(bias, alpha)
    relu = activation == "relu"
    if plan is CudaPlan.STREAM:
        place = window(pixels, size, kernel, stride, padding, dilation)
        y = stream(pixels, A, taps_first(F), bias, rest, alpha, relu, place)
        return as_images(y.view(len(x), *size, P * p))
    geometry = (stride, padding, dilation)
    return as_images(built(as_images(pixels), A, F, geometry, bias, rest, alpha, relu).view(len(x), *size, P * p))


def built(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    geometry: Sequence[list[int]],
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    relu: bool,
) -> Tensor:
    """The rows of the result, (pixels, P*p)."""
    kernel, none = F.shape[3:], [0] * len(geometry[0])
    results = []
    for features, panel in panels_of_H(A, taps_first(F)):
        weight = as_images(panel.view(len(panel), *kernel, panel.shape[-1]))
        with deterministic():
            h = torch.ops.aten.convolution(x, weight, None, *geometry, False, none, 1)
        results.append((features, as_rows(as_pixels(h))))
    features, h = results[-1]
    if len(results) == 1 and bias is None and residual is None and alpha is None and not relu:
        return h
    y = torch.empty((len(h), features.stop), dtype=x.dtype, device=x.device)
    for features, h in results:
        of_bias, of_alpha = (t if t is None or t.numel() == 1 else t[features] for t in (bias, alpha))
        of_residual = None if residual is None else residual[:, features].unsqueeze(0)
        combine(h.unsqueeze(0), None, y[:, features].unsqueeze(0), of_bias, of_residual, of_alpha, relu)
    return y


def mixed(pixels: Tensor, A: Tensor) -> Tensor:
    """sum_l A[i,k,l] x_l as images (P*B, n*q, *spatial), channels_last, of x (B, *spatial, Q*q)."""
    n, P, Q = A.shape
    q = pixels.shape[-1] // Q
    out = torch.empty((P * len(pixels), *pixels.shape[1:-1], n * q), dtype=pixels.dtype, device=pixels.device)
    for k, part in enumerate(as_rows(out).view(P, -1, n * q)):
        combine(blocks(as_rows(pixels), Q), A[:, k], blocks(part, n))
    return as_images(out)


def phc_conv_input_grad(
    grad: Tensor,
    A: Tensor,
    F: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    plan: CudaPlan,
) -> Tensor:
    transposed = A.transpose(1, 2)
    if plan is not CudaPlan.MIX:
        reverse, border = reversed_filters(F, padding, dilation)
        return phc_conv(grad, transposed, reverse, None, stride, border, dilation, None, None, "none", plan)
    Q, q = A.shape[2], F.shape[2]
    B, _, *spatial = input_size
    like = torch.empty((Q * B, *spatial, q), dtype=grad.dtype, device=grad.device)
    with deterministic():
        dx = convolution_backward(
            mixed(as_pixels(grad), transposed), as_images(like), F.flatten(0, 1), stride, padding, dilation, of=0
        )
    return dx.unflatten(0, (Q, B)).movedim(0, 1).flatten(1, 2)


def phc_conv_weight_grad(
    grad: Tensor, x: Tensor, A: Tensor, F: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    P, Q = A.shape[1:]
    p = F.shape[1]
    weight = x.new_empty((p, x.shape[1], *F.shape[3:]))

    def panels() -> Iterator[Tensor]:
        for g in grad.split(p, 1):
            with deterministic():
                G = convolution_backward(g, x, weight, stride, padding, dilation, of=1)
            yield G.reshape(p, Q, -1).transpose(0, 1)

    dA, dF = split_panels(panels(), A, F.flatten(2))
    return dA, dF.view(F.shape)
