"""y = H x for a few rows, dense algebra: F is read once, 1/n of the dense weights.

All products Z[i,l] = F_i x_l of a tile come from one matrix product, features (i, r) by rows (l, b), as long as q; the
tile holds all n blocks of its features and all Q blocks of its rows, so that y[b,k] = sum_{i,l} A[i,k,l] Z[i,l] is
formed in registers. Few tiles of the result do not occupy a card, so the sum over q is split, and a second kernel adds
the parts in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plans_cuda import cdiv, power_of_two
from ._launch import alpha_kind, dot_type, launch, precision
from .combine import combine, epilogue
from .configs import Config


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
    x_b,
    x_l,
    x_s,
    a_i,
    a_k,
    a_l,
    f_i,
    f_r,
    f_s,
    out_split,
    residual_b,
    residual_j,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
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
    # Of 16 features of the product a thread or its neighbours hold all blocks i: the sum over i stays in a warp.
    LOW: tl.constexpr = 16 // I
    tiles_r = tl.cdiv(p, FEATURES)
    first_b = (tl.program_id(0) // tiles_r).to(tl.int64) * ROWS
    first_r = (tl.program_id(0) % tiles_r).to(tl.int64) * FEATURES
    feature, row = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    i, r = feature // LOW % I, first_r + feature // (LOW * I) * LOW + feature % LOW
    l, b = row // ROWS, first_b + row % ROWS  # noqa: E741
    in_F, in_x = (i < N) & (r < p), (l < Q) & (b < B)
    of_F = F + (i.to(tl.int64) * f_i + r * f_r)[:, None]
    of_x = x + (b * x_b + l.to(tl.int64) * x_l)[None, :]
    start = tl.program_id(1) * steps * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        s = (start + step * BLOCK_K).to(tl.int64) + tl.arange(0, BLOCK_K)
        in_s = s < q
        weights = tl.load(of_F + (s * f_s)[None, :], mask=in_F[:, None] & in_s[None, :], other=0.0).to(DOT)
        rows = tl.load(of_x + (s * x_s)[:, None], mask=in_s[:, None] & in_x[None, :], other=0.0).to(DOT)
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
    config: Config,
    splits: int,
) -> Tensor:
    """residual + alpha * act(H x + bias), x (B, Q*q) -> (B, P*p); the sum over q in ``splits`` parts."""
    n, P, Q = A.shape
    _, p, q = F.shape
    B = len(x)
    y = torch.empty((B, P * p), dtype=x.dtype, device=x.device)
    steps = cdiv(cdiv(q, config.block_k), splits)
    splits = cdiv(cdiv(q, config.block_k), steps)
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
        x.stride(0),
        q * x.stride(1),
        x.stride(1),
        *A.stride(),
        *F.stride(),
        0 if whole else out.stride(0),
        *((0, 0) if residual is None or not whole else residual.stride()),
        N=n,
        P=P,
        Q=Q,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        ALPHA=alpha_kind(alpha) if whole else 0,
        RELU=relu and whole,
        DOT=dot_type(x.dtype),
        PRECISION=precision(x.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if not whole:
        of_residual = None if residual is None else residual.unsqueeze(0)
        combine(out, None, y.unsqueeze(0), bias, of_residual, alpha, relu)
    return y
