"""y = H x, dense algebra, as one product with F itself: no entry of H is formed, and F is 1/n of the dense weights.

All products Z[i,l] = F_i x_l of a tile come from one matrix product, features (i, r) by rows (l, b), as long as q; the
tile holds all n blocks of its features and all Q blocks of its rows, so that y[b,k] = sum_{i,l} A[i,k,l] Z[i,l] is
formed in registers. Few tiles of the result do not occupy a card, so the sum over q is split, and a second kernel adds
the parts in a fixed order. Rows are those of a linear layer or the pixels of channels_last images; of these the sum
runs over the taps of the kernel as well (implicit GEMM).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plans_cuda import cdiv, power_of_two
from ._launch import alpha_kind, dot_type, launch, precision
from .combine import combine, epilogue
from .configs import Config
from .window import Window, place_in_image, tile_of


@triton.jit(do_not_specialize=["B", "steps"])
def stream_product_kernel(
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
    steps,
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
    out_split,
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
    I: tl.constexpr = triton.next_power_of_2(N)  # noqa: E741
    L: tl.constexpr = triton.next_power_of_2(Q)
    ROWS: tl.constexpr = BLOCK_M // L
    FEATURES: tl.constexpr = BLOCK_N // I
    # Sixteen features of the product hold all blocks i: the sum over i stays in a warp.
    LOW: tl.constexpr = 16 // I
    tile_b, tile_r = tile_of(tl.program_id(0), tl.cdiv(B, ROWS), tl.cdiv(p, FEATURES))
    first_b, first_r = tile_b.to(tl.int64) * ROWS, tile_r.to(tl.int64) * FEATURES
    feature, row = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    i, r = feature // LOW % I, first_r + feature // (LOW * I) * LOW + feature % LOW
    l, b = row // ROWS, first_b + row % ROWS  # noqa: E741
    in_F, in_x = (i < N) & (r < p), (l < Q) & (b < B)
    image, h, w = place_in_image(b, out_height, out_width, stride_h, stride_w, padding_h, padding_w, IMAGE)
    of_F = F + i.to(tl.int64) * f_i + r * f_r
    of_x = x + image * x_image + (l * q).to(tl.int64) * x_s
    of_tap = tl.cdiv(q, BLOCK_K)
    first = tl.program_id(1) * steps
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, min(first + steps, TAPS_H * TAPS_W * of_tap)):
        s = (step % of_tap).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_s = s < q
        weight, pixel, inside = of_F, of_x, in_x
        if TAPS_H * TAPS_W > 1:
            # The stride of a single tap says nothing: one that 16 does not divide would cost the wide loads.
            weight = of_F + (step // of_tap).to(tl.int64) * f_tap
        if IMAGE:
            h_tap = h + step // of_tap // TAPS_W * dilation_h
            w_tap = w + step // of_tap % TAPS_W * dilation_w
            inside = in_x & (h_tap >= 0) & (h_tap < height) & (w_tap >= 0) & (w_tap < width)
            pixel = of_x + h_tap * x_h + w_tap * x_w
        pointers = weight[:, None] + (s * f_s)[None, :]
        weights = tl.load(pointers, mask=in_F[:, None] & in_s[None, :], other=0.0).to(DOT)
        pointers = pixel[None, :] + (s * x_s)[:, None]
        rows = tl.load(pointers, mask=in_s[:, None] & inside[None, :], other=0.0).to(DOT)
        acc = tl.dot(weights, rows, acc, input_precision=PRECISION)
    products = tl.reshape(acc, (FEATURES // LOW, I, LOW, L, ROWS))
    r, b = first_r + tl.arange(0, FEATURES), first_b + tl.arange(0, ROWS)
    in_r = r[:, None] < p
    mask = in_r & (b < B)[None, :]
    i, l = tl.arange(0, I)[:, None], tl.arange(0, L)[None, :]  # noqa: E741
    of_A = A + i * a_i + l * a_l
    for k in tl.static_range(P):
        algebra = tl.load(of_A + k * a_k, mask=(i < N) & (l < Q), other=0.0).to(tl.float32)
        h = tl.sum(tl.sum(products * tl.reshape(algebra, (1, I, 1, L, 1)), 3), 1)
        j = k * p + r[:, None]
        of_residual = None
        if residual is not None:
            of_residual = residual + (b * residual_b)[None, :] + j * residual_j
        h = epilogue(tl.reshape(h, (FEATURES, ROWS)), 0, j, in_r, of_residual, mask, bias, alpha, ALPHA, RELU)
        place = tl.program_id(1).to(tl.int64) * out_split + (b * (P * p))[None, :] + j
        tl.store(out + place, h, mask=mask)


def stream_product(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    relu: bool,
    window: Window,
    config: Config,
    splits: int,
) -> Tensor:
    """residual + alpha * act(H x + bias), (B, P*p): one row for each pixel of the result.

    x (B, [height, width,] Q*q), F (n, p, taps, q), residual (B, P*p); the sum over taps and q in ``splits`` parts.
    """
    n, P, Q = A.shape
    _, p, taps, q = F.shape
    B = len(x) * math.prod(window.out_size)
    y = torch.empty((B, P * p), dtype=x.dtype, device=x.device)
    count = taps * cdiv(q, config.block_k)
    steps = cdiv(count, splits)
    splits = cdiv(count, steps)
    whole = splits == 1
    out = y if whole else torch.empty((splits, B, P * p), dtype=torch.float32, device=x.device)
    rows, features = config.block_m // power_of_two(Q), config.block_n // power_of_two(n)
    last = (bias, residual, alpha)
    launch(
        stream_product_kernel,
        (cdiv(B, rows) * cdiv(p, features), splits),
        x,
        A,
        F,
        out,
        *(last if whole else (None, None, None)),
        B,
        p,
        q,
        steps,
        *A.stride(),
        *F.stride(),
        x.stride(-1),
        *window.strides,
        0 if whole else out.stride(0),
        *((0, 0) if residual is None or not whole else residual.stride()),
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
        ALPHA=alpha_kind(alpha) if whole else 0,
        RELU=relu and whole,
        DOT=dot_type(x.dtype),
        PRECISION=precision(x.dtype, window.image),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if not whole:
        of_residual = None if residual is None else residual.unsqueeze(0)
        combine(out, None, y.unsqueeze(0), bias, of_residual, alpha, relu)
    return y
