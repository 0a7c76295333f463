"""y = H x for a few rows, dense algebra: F is read once, 1/n of the dense weights.

Mixed rows m = (b, k), sum_l A[i,k,l] x_l[b], are formed where they are used and meet F_i:
y[b,k] = sum_i F_i (sum_l A[i,k,l] x_l[b]). Few tiles of the result do not occupy a card, so the sum over q is split,
and a second kernel adds the parts in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plans_cuda import cdiv
from ._launch import alpha_kind, dot_type, launch, precision
from .combine import combine, epilogue
from .configs import Config


@triton.jit(do_not_specialize=["B", "steps"])
def mix_product_kernel(
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
    # The tile of the result is transposed, (features, rows): its rows are few, and mixed in shared memory.
    K: tl.constexpr = triton.next_power_of_2(P)
    tiles_r = tl.cdiv(p, BLOCK_N)
    first = (tl.program_id(0) // tiles_r).to(tl.int64) * (BLOCK_M // K)
    r = (tl.program_id(0) % tiles_r).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, k = first + tl.arange(0, BLOCK_M // K), tl.arange(0, K)
    in_b, in_k, in_r = b < B, k < P, r < p
    # Loaded once: n Q registers.
    algebra = ()
    for i in tl.static_range(N):
        for l in tl.static_range(Q):  # noqa: E741
            algebra = algebra + (tl.load(A + k * a_k + i * a_i + l * a_l, mask=in_k, other=0.0).to(tl.float32),)
    start = tl.program_id(1) * steps * BLOCK_K
    of_x = x + (b * x_b)[:, None]
    of_F = F + (r * f_r)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        s = (start + step * BLOCK_K).to(tl.int64) + tl.arange(0, BLOCK_K)
        in_s = s < q
        pointers = of_x + (s * x_s)[None, :]
        blocks = ()
        for _ in tl.static_range(Q):
            block = tl.load(pointers, mask=in_b[:, None] & in_s[None, :], other=0.0).to(tl.float32)
            # By reshape, not by [:, None, :], entries of a thread stay neighbours: it stores four at once, not one.
            blocks = blocks + (tl.reshape(block, (BLOCK_M // K, 1, BLOCK_K)),)
            pointers += x_l
        pointers = of_F + (s * f_s)[None, :]
        for i in tl.static_range(N):
            mixed = tl.zeros((BLOCK_M // K, K, BLOCK_K), tl.float32)
            for l in tl.static_range(Q):  # noqa: E741
                mixed += algebra[i * Q + l][None, :, None] * blocks[l]
            rows = tl.reshape(mixed.to(DOT), (BLOCK_M, BLOCK_K))
            weights = tl.load(pointers, mask=in_r[:, None] & in_s[None, :], other=0.0).to(DOT)
            pointers += f_i
            acc = tl.dot(weights, tl.trans(rows), acc, input_precision=PRECISION)
    m = tl.arange(0, BLOCK_M)
    b, k = first + m // K, m % K
    mask = in_r[:, None] & ((b < B) & (k < P))[None, :]
    j = (k * p)[None, :] + r[:, None]
    of_residual = None
    if residual is not None:
        of_residual = residual + (b * residual_b)[None, :] + j * residual_j
    acc = epilogue(acc, 0, j, mask, of_residual, mask, bias, alpha, ALPHA, RELU)
    place = tl.program_id(1).to(tl.int64) * out_split + ((b * P + k) * p)[None, :] + r[:, None]
    tl.store(out + place, acc, mask=mask)


def mix_product(
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
    rows = config.block_m // triton.next_power_of_2(P)
    last = (bias, residual, alpha)
    launch(
        mix_product_kernel,
        (cdiv(B, rows) * cdiv(p, config.block_n), splits),
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
