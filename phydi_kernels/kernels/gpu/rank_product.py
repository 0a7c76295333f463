"""y_k = sum_r V[r,k] F-hat_r x-hat_r in one kernel: R products, each added to P results as soon as it is there.

x-hat_r = sum_l W[r,l] x_l is formed where it is used (``W`` given), or read. Nothing but y is written. As in
stream_product the rows are those of a linear layer or the pixels of channels_last images.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plans_cuda import cdiv
from ._launch import alpha_kind, dot_type, launch, precision
from .combine import epilogue
from .configs import Config
from .window import Window, place_in_image, tile_of


@triton.jit(do_not_specialize=["B"])
def rank_product_kernel(
    x,
    V,
    W,
    F,
    out,
    bias,
    residual,
    alpha,
    B,
    p,
    q,
    R,
    v_r,
    v_k,
    w_r,
    w_l,
    f_r,
    f_p,
    f_tap,
    f_s,
    x_r,
    x_l,
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
    o = tl.arange(0, BLOCK_N)
    in_b, in_o = b < B, first + o < p
    image, h, w = place_in_image(b, out_height, out_width, stride_h, stride_w, padding_h, padding_w, IMAGE)
    of_x = x + image * x_image
    of_F = F + ((first + o) * f_p)[None, :]
    steps = tl.cdiv(q, BLOCK_K)
    sums = ()
    for _ in tl.static_range(P):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    for r in range(R):
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(TAPS_H * TAPS_W * steps):
            s = (step % steps).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
            in_s = s < q
            tap = step // steps
            pixel, inside = of_x, in_b
            if IMAGE:
                h_tap, w_tap = h + tap // TAPS_W * dilation_h, w + tap % TAPS_W * dilation_w
                inside = in_b & (h_tap >= 0) & (h_tap < height) & (w_tap >= 0) & (w_tap < width)
                pixel = of_x + h_tap * x_h + w_tap * x_w
            pointers = pixel[:, None] + (s * x_s)[None, :]
            mask = inside[:, None] & in_s[None, :]
            if W is None:
                mixed = tl.load(pointers, mask=mask, other=0.0).to(DOT)
            else:
                total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                for l in tl.static_range(Q):  # noqa: E741
                    block = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                    total += tl.load(W + r * w_r + l * w_l).to(tl.float32) * block
                    pointers += x_l
                mixed = total.to(DOT)
            columns = of_F + (s * f_s)[:, None]
            if TAPS_H * TAPS_W > 1:
                columns += tap.to(tl.int64) * f_tap
            weights = tl.load(columns, mask=in_s[:, None] & in_o[None, :], other=0.0).to(DOT)
            product = tl.dot(mixed, weights, product, input_precision=PRECISION)
        of_F += f_r
        of_x += x_r
        updated = ()
        for k in tl.static_range(P):
            updated = updated + (sums[k] + tl.load(V + r * v_r + k * v_k).to(tl.float32) * product,)
        sums = updated
    mask = in_b[:, None] & in_o[None, :]
    # Columns of a tile count from its first, in 32 bits, and one block follows the other: fewer registers.
    for k in tl.static_range(P):
        tl.debug_barrier()
        start = first + k * p
        of_residual = None
        if residual is not None:
            columns = residual + start * residual_j + (o.to(tl.int64) * residual_j)[None, :]
            of_residual = columns + (b * residual_b)[:, None]
        y = epilogue(sums[k], start, o[None, :], in_o[None, :], of_residual, mask, bias, alpha, ALPHA, RELU)
        tl.store((out + start + b * out_b)[:, None] + o[None, :], y, mask=mask)


def rank_product(
    x: Tensor,
    V: Tensor,
    W: Tensor | None,
    F_hat: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    relu: bool,
    window: Window,
    config: Config,
) -> Tensor:
    """residual + alpha * act(y + bias), (B, P*p): one row for each pixel of the result.

    x (B, [height, width,] Q*q) with W, X-hat (R, B, [height, width,] q) without; F_hat (R, p, taps, q), residual
    (B, P*p).
    """
    R, P = V.shape
    _, p, _, q = F_hat.shape
    B = x.shape[1 if W is None else 0] * math.prod(window.out_size)
    out = torch.empty((B, P * p), dtype=x.dtype, device=x.device)
    launch(
        rank_product_kernel,
        (cdiv(B, config.block_m) * cdiv(p, config.block_n),),
        x,
        V,
        W,
        F_hat,
        out,
        bias,
        residual,
        alpha,
        B,
        p,
        q,
        R,
        *V.stride(),
        *((0, 0) if W is None else W.stride()),
        *F_hat.stride(),
        x.stride(0) if W is None else 0,
        q * x.stride(-1),
        x.stride(-1),
        *window.strides,
        out.stride(0),
        *((0, 0) if residual is None else residual.stride()),
        *window.size,
        *window.out_size,
        *window.stride,
        *window.padding,
        *window.dilation,
        P=P,
        Q=1 if W is None else W.shape[1],
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
