"""y = H x for many rows, dense algebra: tiles of H are formed in registers, from F, and never stored.

A program has the same features of all P output blocks: its tiles of F, read once, make P tiles of H. One kernel for
linear layers and for convolutions of channels_last images: the rows of a product are pixels, and its sum runs over the
taps of the kernel as well (implicit GEMM).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plans_cuda import cdiv
from ._launch import alpha_kind, dot_type, launch, precision
from .combine import epilogue
from .configs import Config

# Tiles of rows that share the weights in L2 before the next ones are taken.
GROUP: tl.constexpr = tl.constexpr(8)


class Window(NamedTuple):
    """Where the rows of a product lie in an image: those of a linear layer are images of one pixel."""

    size: Sequence[int]  # (height, width) of an image,
    out_size: Sequence[int]  # of a result,
    taps: Sequence[int]  # of the kernel
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    strides: Sequence[int] = ()  # in memory, of an image, its rows and its columns
    image: bool = True


def rows_window(stride: int) -> Window:
    return Window((1, 1), (1, 1), (1, 1), strides=(stride, 0, 0), image=False)


@triton.jit
def tile_of(program, tiles_b, tiles_w):
    """(tile of rows, tile of weights) of a program: programs that run together share both, in L2."""
    in_group = GROUP * tiles_w
    group = program // in_group
    first = group * GROUP
    size = min(tiles_b - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def place_in_image(b, out_height, out_width, stride_h, stride_w, padding_h, padding_w, IMAGE: tl.constexpr):
    """(image, first row, first column) that the window of output pixel ``b`` covers."""
    if IMAGE:
        image = b // (out_height * out_width)
        h = b // out_width % out_height * stride_h - padding_h
        w = b % out_width * stride_w - padding_w
        return image, h, w
    return b, b * 0, b * 0


@triton.jit(do_not_specialize=["B"])
def panel_product_kernel(
    x,
    A,
    F,
    out,
    bias,
    residual,
    alpha,
    B,
    p,
    q,
    a_i,
    a_k,
    a_l,
    f_i,
    f_r,
    f_tap,
    f_s,
    x_s,
    x_image,
    x_h,
    x_w,
    out_b,
    residual_b,
    residual_j,
    height,
    width,
    out_height,
    out_width,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    IMAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALPHA: tl.constexpr,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_b, tile_w = tile_of(tl.program_id(0), tl.cdiv(B, BLOCK_M), tl.cdiv(p, BLOCK_N))
    b = tile_b.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile_w.to(tl.int64) * BLOCK_N
    r = tl.arange(0, BLOCK_N)
    in_b, in_r = b < B, first + r < p
    image, h, w = place_in_image(b, out_height, out_width, stride_h, stride_w, padding_h, padding_w, IMAGE)
    of_x = x + image * x_image
    of_F = F + ((first + r) * f_r)[:, None]
    steps = tl.cdiv(q, BLOCK_K)
    sums = ()
    for _ in tl.static_range(P):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for step in range(TAPS_H * TAPS_W * Q * steps):
        s = (step % steps).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_s = s < q
        l = step // steps % Q  # noqa: E741
        tap = step // (steps * Q)
        pixel, inside = of_x, in_b
        if IMAGE:
            h_tap, w_tap = h + tap // TAPS_W * dilation_h, w + tap % TAPS_W * dilation_w
            inside = in_b & (h_tap >= 0) & (h_tap < height) & (w_tap >= 0) & (w_tap < width)
            pixel = of_x + h_tap * x_h + w_tap * x_w
        pointers = pixel[:, None] + ((l * q + s) * x_s)[None, :]
        values = tl.load(pointers, mask=inside[:, None] & in_s[None, :], other=0.0).to(DOT)
        pointers = of_F + (s * f_s)[None, :]
        if TAPS_H * TAPS_W > 1:
            # The stride of a single tap says nothing: one that 16 does not divide would cost the wide loads.
            pointers += tap.to(tl.int64) * f_tap
        terms = ()
        for _ in tl.static_range(N):
            terms = terms + (tl.load(pointers, mask=in_r[:, None] & in_s[None, :], other=0.0).to(tl.float32),)
            pointers += f_i
        updated = ()
        for k in tl.static_range(P):
            panel = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for i in tl.static_range(N):
                panel += tl.load(A + i * a_i + k * a_k + l * a_l).to(tl.float32) * terms[i]
            updated = updated + (tl.dot(values, tl.trans(panel.to(DOT)), sums[k], input_precision=PRECISION),)
        sums = updated
    mask = in_b[:, None] & in_r[None, :]
    for k in tl.static_range(P):
        tl.debug_barrier()
        start = first + k * p
        of_residual = None
        if residual is not None:
            columns = residual + start * residual_j + (r.to(tl.int64) * residual_j)[None, :]
            of_residual = columns + (b * residual_b)[:, None]
        y = epilogue(sums[k], start, r[None, :], in_r[None, :], of_residual, mask, bias, alpha, ALPHA, RELU)
        tl.store((out + start + b * out_b)[:, None] + r[None, :], y, mask=mask)


def panel_product(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    relu: bool,
    window: Window,
    config: Config,
) -> Tensor:
    """residual + alpha * act(H x + bias), (B, P*p): one row for each pixel of the result.

    x (B, [height, width,] Q*q), F (n, p, taps, q), residual (B, P*p).
    """
    n, P, Q = A.shape
    _, p, _, q = F.shape
    B = len(x) * math.prod(window.out_size)
    out = torch.empty((B, P * p), dtype=x.dtype, device=x.device)
    launch(
        panel_product_kernel,
        (cdiv(B, config.block_m) * cdiv(p, config.block_n),),
        x,
        A,
        F,
        out,
        bias,
        residual,
        alpha,
        B,
        p,
        q,
        *A.stride(),
        *F.stride(),
        x.stride(-1),
        *window.strides,
        out.stride(0),
        *((0, 0) if residual is None else residual.stride()),
        *window.size,
        *window.out_size,
        *window.stride,
        *window.padding,
        *window.dilation,
        N=n,
        P=P,
        Q=Q,
        TAPS_H=window.taps[0],
        TAPS_W=window.taps[1],
        IMAGE=window.image,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        ALPHA=alpha_kind(alpha),
        RELU=relu,
        DOT=dot_type(x.dtype),
        PRECISION=precision(x.dtype, window.image),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
