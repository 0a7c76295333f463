"""Factored hypercomplex convolutions on the CPU: R convolutions of one block each, or H in panels.

With x-hat_r = sum_l W[r,l] x_l and F-hat_r = sum_i U[r,i] F_i, output block k is sum_r V[r,k] conv(x-hat_r, F-hat_r).

* rank: those R convolutions, on so many images at a time that X-hat and Y-hat stay in cache, in channels_last, torch's
  fastest format; the additions before and after them transpose where x is contiguous. The sum after them takes bias,
  activation, alpha and residual along and rounds once. The gradients are R convolutions each in the same way.
* direct: the same in one kernel, band by band of the output, for blocks too narrow to fill torch's convolutions. The
  input's gradient is the same with the filters reversed, where the stride is 1.
* mix, panel: those of phc_conv with A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l], where the additions would cost more.

float16 is computed in float32, and bfloat16 where phc_conv does so. Else in bfloat16 x-hat and F-hat are rounded to
bfloat16, and by the rank plan y-hat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import plans
from ..plans import Plan
from ..reference import compute_dtype, structure
from . import phc_conv as dense
from .cpu import factored_weight_grad
from .phc_conv import (
    as_image,
    convolution,
    convolution_backward,
    input_grad,
    memory_format,
    output_size,
    planar,
    planar_geometry,
    reversed_filters,
    to_work_dtype,
)

_ops = torch.ops.phydi_cpu


def _coefficients(dtype: torch.dtype, *matrices: Tensor) -> list[Tensor]:
    return [m.to(compute_dtype(dtype)).contiguous() for m in matrices]


def _structure(dtype: torch.dtype, U: Tensor | None, V: Tensor, W: Tensor) -> Tensor:
    V, W = _coefficients(dtype, V, W)
    return structure(None if U is None else _coefficients(dtype, U)[0], V, W)


def _from_rows(rows: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """(R, N, ..., c) of any inner shape as R channels_last tensors (N, c, *shape)."""
    R, N, *_, c = rows.shape
    return rows.view(R, N, *planar(shape, 1), c).movedim(-1, 2).unbind()


def _rows(t: Tensor) -> Tensor:
    """(N, c, *spatial) as contiguous (N, *spatial, c): a view if channels_last."""
    return t.movedim(1, -1).contiguous()


def _combined(U: Tensor | None, F: Tensor) -> Tensor:
    """F-hat (R, p, ...), F-hat_r = sum_i U[r,i] F_i, of contiguous F (n, p, ...)."""
    if U is None:
        return F
    n, p, *rest = F.shape
    coefficients = _coefficients(F.dtype, U.t().unsqueeze(2))
    return _ops.kron_sum.default(*coefficients, F.view(n, p, -1)).view(len(U), p, *rest)


def _combined_weights(U: Tensor | None, F: Tensor) -> tuple[Tensor, ...]:
    """F-hat_r for each r: (p, q, *kernel), channels_last."""
    return _from_rows(_combined(U, F.movedim(2, -1).contiguous()), F.shape[3:])


def _scratch_bytes(R: int, blocks: Sequence[tuple[int, Sequence[int]]], item_bytes: int) -> int:
    """R blocks of each number of channels and spatial size, of one image."""
    return R * sum(channels * math.prod(size) for channels, size in blocks) * item_bytes


def _operands(
    x: Tensor, before: Tensor, after: Tensor, residual: Tensor | None, shape: list[int]
) -> tuple[bool, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Whether x lies in planes; x and residual in one memory format, the coefficients, and a result of ``shape``."""
    fmt = memory_format(x)
    before, after = _coefficients(x.dtype, before, after)
    residual = None if residual is None else residual.contiguous(memory_format=fmt)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=fmt)
    return fmt is torch.contiguous_format, x.contiguous(memory_format=fmt), before, after, residual, y


def _in_terms(
    x: Tensor,
    before: Tensor,
    after: Tensor,
    convolve: Callable[[int, Tensor], Tensor],
    shape: list[int],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """y_k = sum_r after[r,k] convolve(r, sum_l before[r,l] x_l), of ``shape``, and the epilogue."""
    planes, x, before, after, residual, y = _operands(x, before, after, residual, shape)
    spatial, size = x.shape[2:], shape[2:]
    blocks = ((x.shape[1] // before.shape[1], spatial), (shape[1] // after.shape[1], size))
    for images in dense.images(len(x), _scratch_bytes(len(before), blocks, x.element_size())):
        mixed = _from_rows(_ops.pre_add.default(as_image(x[images], planes), before, planes), spatial)
        parts = [_rows(convolve(r, t)) for r, t in enumerate(mixed)]
        some = None if residual is None else as_image(residual[images], planes)
        out = as_image(y[images], planes)
        _ops.post_add_.default(out, parts, after, bias, some, alpha, activation == "relu", planes)
    return y


def _in_lines(F: Tensor) -> Tensor:
    """F (n, p, q, *kernel) as (n, *kernel, q, p)."""
    return F.movedim((1, 2), (-1, -2))


def side_by_side(F: Tensor) -> Tensor:
    """F with the weights of all outputs beside each other in memory; F (n, p, q) of a linear layer as well."""
    return _in_lines(F).contiguous().movedim((-1, -2), (1, 2))


def _directly(
    x: Tensor,
    W: Tensor,
    V: Tensor,
    U: Tensor | None,
    F: Tensor,
    shape: list[int],
    geometry: tuple[list[int], list[int], list[int]],
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
) -> Tensor:
    planes, x, before, after, residual, y = _operands(x, W, V, residual, shape)
    window = [*planar(x.shape[2:], 1), *planar(shape[2:], 1), *planar(F.shape[3:], 1), *sum(geometry, [])]
    lines = _in_lines(F)
    if U is not None and len(F) in plans.LINE_TERMS and lines.is_contiguous():
        (U,), F = _coefficients(x.dtype, U), lines
    else:
        U, F = None, _combined(U, F.contiguous())
    _ops.phc_conv_factored_.default(
        as_image(y, planes),
        as_image(x, planes),
        before,
        after,
        F,
        U,
        bias,
        None if residual is None else as_image(residual, planes),
        alpha,
        activation == "relu",
        planes,
        window,
    )
    return y


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
    plan: Plan,
) -> Tensor:
    if plan not in (Plan.RANK, Plan.DIRECT):
        A = _structure(x.dtype, U, V, W)
        return dense.phc_conv(x, A, F, bias, stride, padding, dilation, residual, alpha, activation, plan)
    dtype = x.dtype
    x, F, bias, residual, alpha = to_work_dtype(x, F, bias, residual, alpha)
    geometry = planar_geometry(stride, padding, dilation)
    shape = [len(x), V.shape[1] * F.shape[1], *output_size(x.shape[2:], F.shape[3:], stride, padding, dilation)]
    if plan is Plan.DIRECT:
        return _directly(x, W, V, U, F, shape, geometry, bias, residual, alpha, activation).to(dtype)
    weights = _combined_weights(U, F)

    def convolve(r: int, t: Tensor) -> Tensor:
        return convolution(t, weights[r], None, *geometry)

    return _in_terms(x, W, V, convolve, shape, bias, residual, alpha, activation).to(dtype)


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
    plan: Plan,
) -> Tensor:
    if plan not in (Plan.RANK, Plan.DIRECT):
        A = _structure(grad.dtype, U, V, W)
        return dense.phc_conv_input_grad(grad, A, F, input_size, stride, padding, dilation, plan)
    dtype = grad.dtype
    grad, F = to_work_dtype(grad, F)
    if plan is Plan.DIRECT:
        reverse, border = reversed_filters(F, padding, dilation)
        geometry = planar_geometry(stride, border, dilation)
        return _directly(grad, V, W, U, reverse, input_size, geometry, None, None, None, "none").to(dtype)
    weights = _combined_weights(U, F)
    geometry = planar_geometry(stride, padding, dilation)
    q, spatial = F.shape[2], planar(input_size[2:], 1)

    def convolve(r: int, t: Tensor) -> Tensor:
        return input_grad(t, weights[r], [len(t), q, *spatial], *geometry)

    return _in_terms(grad, V, W, convolve, list(input_size)).to(dtype)


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
    """(dx, dU, dV, dW, dF) by the rank plan, each in the type of its argument.

    With g-hat_r = sum_k V[r,k] g_k and t_r = F-hat_r^T g-hat_r, dx_l = sum_r W[r,l] t_r, dW[r,l] = <x_l, t_r>,
    dV[r,k] = <g_k, y-hat_r>, and dU and dF follow from dF-hat_r, the gradient of <g-hat_r, y-hat_r>.
    """
    dtype = x.dtype
    fmt = memory_format(x)
    planes = fmt is torch.contiguous_format
    x, grad, F = to_work_dtype(x.contiguous(memory_format=fmt), grad.contiguous(memory_format=fmt), F)
    u, v, w = _coefficients(dtype, U, V, W)
    R, P, Q = len(v), v.shape[1], w.shape[1]
    n, p, q, *kernel = F.shape
    spatial, size = x.shape[2:], grad.shape[2:]
    weights = _combined_weights(U, F)
    geometry = planar_geometry(stride, padding, dilation)
    dx = torch.empty_like(x)
    dV, dW = torch.zeros_like(v), torch.zeros_like(w)
    d_weights: list[Tensor] = []
    for images in dense.images(len(x), _scratch_bytes(R, ((q, spatial), (p, size)), x.element_size())):
        x_image, g_image = as_image(x[images], planes), as_image(grad[images], planes)
        x_mixed = _from_rows(_ops.pre_add.default(x_image, w, planes), spatial)
        g_mixed = _from_rows(_ops.pre_add.default(g_image, v, planes), size)
        x_parts, g_parts = [], []
        for r, (weight, xr, gr) in enumerate(zip(weights, x_mixed, g_mixed, strict=True)):
            x_parts.append(_rows(input_grad(gr, weight, list(xr.shape), *geometry)))
            g_parts.append(_rows(convolution(xr, weight, None, *geometry)))
            d_weight = convolution_backward(gr, xr, weight, *geometry, of=1).to(compute_dtype(dtype))
            if images.start == 0:
                d_weights.append(d_weight)
            else:
                d_weights[r].add_(d_weight)
        dW.add_(_ops.block_dots.default(x_image, x_parts, Q, planes))
        dV.add_(_ops.block_dots.default(g_image, g_parts, P, planes))
        _ops.post_add_.default(as_image(dx[images], planes), x_parts, w, None, None, None, False, planes)
    if not d_weights:
        return dx.to(dtype), torch.zeros_like(U), dV.to(V.dtype), dW.to(W.dtype), torch.zeros_like(F, dtype=dtype)
    G = torch.cat([d.reshape(p, -1) for d in d_weights])
    dU, dF = _ops.kron_sum_grad.default(G, u.t().unsqueeze(2), F.to(G.dtype))
    return dx.to(dtype), dU.view(n, R).t().contiguous().to(U.dtype), dV.to(V.dtype), dW.to(W.dtype), dF.to(dtype)


def phc_conv_factored_weight_grad(
    grad: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dU, dV, dW, dF) through the gradient of A = sum_r U_r (x) V_r (x) W_r, each in the type of its argument."""

    def weight_grad(A: Tensor) -> tuple[Tensor, Tensor]:
        return dense.phc_conv_weight_grad(grad, x, A, F, stride, padding, dilation, Plan.PANEL)

    return factored_weight_grad(weight_grad, x.dtype, U, V, W)
