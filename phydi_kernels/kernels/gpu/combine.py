"""Weighted sums of blocks, and dot products of blocks: all of a layer but its products.

``combine`` is x-hat, F-hat, the sum over Y-hat with the epilogue, the sum of split products and the gradients of F;
``block_dots`` the gradients of U, V, W and A. Both are bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plans_cuda import cdiv
from ._launch import alpha_kind, launch

_TILE = 1024
# Partial sums that one program of block_dots holds.
_DOTS = 32
_DOTS_TILE = 256
_DOTS_PROGRAMS = 1024


@triton.jit
def epilogue(h, first, channel, in_channel, residual, mask, bias, alpha, ALPHA: tl.constexpr, RELU: tl.constexpr):
    """residual + alpha * act(h + bias) of a tile.

    Its channels are those from ``first``, ``channel`` broadcasts to the tile, and ``residual`` are pointers.
    """
    if bias is not None:
        h += tl.load(bias + first + channel, mask=in_channel, other=0.0).to(tl.float32)
    if RELU:
        # Not maximum: that drops NaN.
        h = tl.where(h <= 0.0, 0.0, h)
    if ALPHA == 1:
        h *= tl.load(alpha).to(tl.float32)
    if ALPHA == 2:
        h *= tl.load(alpha + first + channel, mask=in_channel, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit(do_not_specialize=["M"])
def combine_kernel(
    x,
    coefficients,
    out,
    bias,
    residual,
    alpha,
    M,
    J,
    x_t,
    x_m,
    x_j,
    c_c,
    c_t,
    out_c,
    out_m,
    out_j,
    residual_c,
    residual_m,
    residual_j,
    T: tl.constexpr,
    C: tl.constexpr,
    ALPHA: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tiles = tl.cdiv(J, BLOCK_J)
    tile = tl.program_id(0).to(tl.int64)
    m = ((tile // tiles) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    j = ((tile % tiles) * BLOCK_J + tl.arange(0, BLOCK_J))[None, :]
    mask = (m < M) & (j < J)
    pointers = x + m * x_m + j * x_j
    blocks = ()
    for _ in tl.static_range(T):
        blocks = blocks + (tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
        pointers += x_t
    for c in tl.static_range(C):
        h = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
        for t in tl.static_range(T):
            if coefficients is None:
                h += blocks[t]
            else:
                h += tl.load(coefficients + c * c_c + t * c_t).to(tl.float32) * blocks[t]
        of_residual = None
        if residual is not None:
            of_residual = residual + m * residual_m + j * residual_j
            residual += residual_c
        h = epilogue(h, c * J, j, j < J, of_residual, mask, bias, alpha, ALPHA, RELU)
        tl.store(out + m * out_m + j * out_j, h, mask=mask)
        out += out_c


def _tile(M: int, J: int, entries: int) -> tuple[int, int]:
    """(rows, columns) of a tile, columns along memory."""
    columns = min(triton.next_power_of_2(J), entries if M == 1 else 128)
    return entries // columns, columns


def combine(
    x: Tensor,
    coefficients: Tensor | None,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """out_c = residual_c + alpha * act(sum_t coefficients[c,t] x_t + bias_c), computed in float32.

    Args:
        x: (T, M, J), any strides; T and C at most plans_cuda.MAX_BLOCKS.
        coefficients: (C, T), or None for ones.
        out: (C, M, J), any strides.
        bias, alpha: C * J entries in the order of (c, j); alpha may be one entry.
        residual: (C, M, J), any strides.
    """
    C, M, J = out.shape
    T = len(x)
    rows, columns = _tile(M, J, _TILE if T <= 8 else _TILE // 2)
    launch(
        combine_kernel,
        (cdiv(M, rows) * cdiv(J, columns),),
        x,
        coefficients,
        out,
        bias,
        residual,
        alpha,
        M,
        J,
        *x.stride(),
        *((0, 0) if coefficients is None else coefficients.stride()),
        *out.stride(),
        *((0, 0, 0) if residual is None else residual.stride()),
        T=T,
        C=C,
        ALPHA=alpha_kind(alpha),
        RELU=relu,
        BLOCK_M=rows,
        BLOCK_J=columns,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["M"])
def block_dots_kernel(
    a,
    b,
    out,
    C,
    M,
    J,
    a_c,
    a_m,
    a_j,
    b_t,
    b_m,
    b_j,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tiles_j = tl.cdiv(J, BLOCK_J)
    first = tl.program_id(1).to(tl.int64) * CHUNK
    sums = ()
    for _ in tl.static_range(CHUNK * T):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_J), tl.float32),)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_j, tl.num_programs(0)):
        m = ((tile // tiles_j).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        j = ((tile % tiles_j).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J))[None, :]
        mask = (m < M) & (j < J)
        pointers = a + first * a_c + m * a_m + j * a_j
        left = ()
        for offset in tl.static_range(CHUNK):
            left = left + (tl.load(pointers, mask=mask & (first + offset < C), other=0.0).to(tl.float32),)
            pointers += a_c
        pointers = b + m * b_m + j * b_j
        updated = ()
        for t in tl.static_range(T):
            right = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            pointers += b_t
            for offset in tl.static_range(CHUNK):
                updated = updated + (sums[t * CHUNK + offset] + left[offset] * right,)
        sums = updated
    for t in tl.static_range(T):
        for offset in tl.static_range(CHUNK):
            c = first + offset
            place = (tl.program_id(0).to(tl.int64) * C + c) * T + t
            tl.store(out + place, tl.sum(sums[t * CHUNK + offset]), mask=c < C)


def block_dots(a: Tensor, b: Tensor) -> Tensor:
    """D[c,t] = <a_c, b_t> in float32, the same at every call; a (C, M, J), b (T, M, J), any strides."""
    C, M, J = a.shape
    T = len(b)
    rows, columns = _tile(M, J, _DOTS_TILE)
    chunk = max(1, min(C, _DOTS // T))
    programs = min(cdiv(M, rows) * cdiv(J, columns), _DOTS_PROGRAMS)
    partial = torch.empty((programs, C, T), dtype=torch.float32, device=a.device)
    launch(
        block_dots_kernel,
        (programs, cdiv(C, chunk)),
        a,
        b,
        partial,
        C,
        M,
        J,
        *a.stride(),
        *b.stride(),
        T=T,
        CHUNK=chunk,
        BLOCK_M=rows,
        BLOCK_J=columns,
        num_warps=4,
    )
    return partial.sum(0)


@triton.jit
def structure_kernel(
    U, V, W, out, n, P, Q, R, u_r, u_i, v_r, v_k, w_r, w_l, ENTRIES: tl.constexpr, HAS_U: tl.constexpr
):
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    mask = entry < n * P * Q
    i, k, l = entry // (P * Q), entry // Q % P, entry % Q  # noqa: E741
    total = tl.zeros((ENTRIES,), tl.float32)
    for r in range(R):
        term = tl.load(V + r * v_r + k * v_k, mask=mask, other=0.0).to(tl.float32)
        term *= tl.load(W + r * w_r + l * w_l, mask=mask, other=0.0).to(tl.float32)
        if HAS_U:
            term *= tl.load(U + r * u_r + i * u_i, mask=mask, other=0.0).to(tl.float32)
            total += term
        else:
            total += tl.where(i == r, term, 0.0)
    tl.store(out + entry, total, mask=mask)


def structure(U: Tensor | None, V: Tensor, W: Tensor) -> Tensor:
    """A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l] in float32; without U, A[r,k,l] = V[r,k] W[r,l]."""
    (R, P), Q = V.shape, W.shape[1]
    n = R if U is None else U.shape[1]
    A = torch.empty((n, P, Q), dtype=torch.float32, device=V.device)
    entries = min(triton.next_power_of_2(A.numel()), 512)
    launch(
        structure_kernel,
        (cdiv(A.numel(), entries),),
        V if U is None else U,
        V,
        W,
        A,
        n,
        P,
        Q,
        R,
        *((0, 0) if U is None else U.stride()),
        *V.stride(),
        *W.stride(),
        ENTRIES=entries,
        HAS_U=U is not None,
    )
    return A
