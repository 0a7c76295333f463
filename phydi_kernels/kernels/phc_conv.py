"""Parameterized hypercomplex convolutions on the CPU: H in panels of rows, or mixed inputs, around torch's convolution.

* panel: rows of H for whole output blocks, at most the larger of 4 MiB and one block's share 1/P of H at a time, and
  one convolution with each. A panel costs n multiplications an entry, the convolution batch * pixels.
* mix: sum_l A[i,k,l] x_l for each term and output block, then one convolution of P times the batch with F itself.
  No part of H exists; worth it where the weights outweigh the activations, and where there are few terms (LoKr). The
  weights' gradients are those of this convolution: dF whole, dA[i,k,l] = <gradient of the mixed input, x_l>.
* pointwise: a kernel of one position is a linear layer whose rows are the pixels. The linear kernels multiply. The
  pixels of a channels_last image are taken as they lie, but with a stride copied whole. Those of planes are copied some
  images at a time, but whole (x, grad and dx) where all gradients are computed at once.

float16 is computed in float32. bfloat16 goes to torch's convolution as it is where oneDNN has one, which adds up in
float32; elsewhere torch adds up in bfloat16, and it is computed in float32 as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plans import Plan
from ..reference import compute_dtype
from .cpu import algebra_grad

_PANEL_BYTES = 4 << 20
# One core's share of an L3 cache: scratch memory for some images at a time. Smaller blocks pay more for calls than they
# save.
_BLOCK_BYTES = 8 << 20
_ops = torch.ops.phydi_cpu


def memory_format(x: Tensor) -> torch.memory_format:
    """The format torch's convolutions would give their result: channels_last for a channels_last ``x``."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def _uses_mkldnn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def to_work_dtype(*tensors: Tensor | None) -> list[Any]:
    bfloat16 = _uses_mkldnn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    widened = (torch.float16,) if bfloat16 else (torch.float16, torch.bfloat16)
    return [t.float() if t is not None and t.dtype in widened else t for t in tensors]


def planar(sizes: Sequence[int], fill: int) -> list[int]:
    """One spatial dimension as two: one alone has no channels_last format."""
    return [fill, *sizes] if len(sizes) == 1 else list(sizes)


def planar_geometry(
    stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[list[int], list[int], list[int]]:
    return planar(stride, 1), planar(padding, 0), planar(dilation, 1)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    if _uses_mkldnn() and x.dtype == torch.float32:
        # aten.convolution takes another, slower way for few images; but it copies a strided bias, misread here.
        bias = None if bias is None else bias.contiguous()
        stride, padding, dilation = planar_geometry(stride, padding, dilation)
        image, weights = (t.unsqueeze(2) if t.dim() == 3 else t for t in (x, weight))
        y = torch.ops.aten.mkldnn_convolution.default(image, weights, bias, padding, stride, dilation, 1)
        return y.squeeze(2) if x.dim() == 3 else y
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), 1)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], *, of: int
) -> Tensor:
    """The gradient of the input (of=0) or of the weight (of=1)."""
    if of == 1 and max(stride) > 1 and math.prod(weight.shape[2:]) == 1 and not any(padding):
        # Without the pixels that the stride leaves out: where it skips them in channels_last, oneDNN 3 for AVX2 writes
        # beyond its scratch memory.
        x = _every(x, stride).contiguous(memory_format=memory_format(x))
        stride = [1] * len(stride)
    mask = [of == 0, of == 1, False]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0] * len(stride), 1, mask
    )[of]


def input_grad(
    grad: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    # The input's values do not matter for its gradient; its size and memory format do.
    x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))
    return convolution_backward(grad, x, weight, stride, padding, dilation, of=0)


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """Spatial size of a convolution's result."""
    return [
        (s + 2 * pad - e * (k - 1) - 1) // st + 1
        for s, k, st, pad, e in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def reversed_filters(F: Tensor, padding: list[int], dilation: list[int]) -> tuple[Tensor, list[int]]:
    """(F, padding) of the convolution that is the input's gradient where the stride is 1."""
    border = [e * (k - 1) - pad for k, pad, e in zip(F.shape[3:], padding, dilation, strict=True)]
    return F.transpose(1, 2).flip(list(range(3, F.dim()))), border


def as_image(t: Tensor, planes: bool) -> Tensor:
    """(B, channels, *spatial) as (B, channels, pixels) if contiguous, ``planes``, else as (B, pixels, channels)."""
    B, channels, *spatial = t.shape
    pixels = math.prod(spatial)
    return t.view(B, channels, pixels) if planes else t.movedim(1, -1).view(B, pixels, channels)


def images(count: int, image_bytes: int) -> Iterator[slice]:
    """Ranges of images, of about the same length, with ``image_bytes`` of scratch memory for each image."""
    most = max(1, _BLOCK_BYTES // max(1, image_bytes))
    step = max(1, -(-count // max(1, -(-count // most))))
    for first in range(0, count, step):
        yield slice(first, first + step)


def _every(t: Tensor, stride: Sequence[int]) -> Tensor:
    """The pixels that a pointwise convolution reads."""
    every: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
    return t if max(stride) == 1 else t[every]


def pointwise_rows(t: Tensor, stride: Sequence[int]) -> Tensor:
    """Every ``stride``-th pixel of (B, channels, *spatial), as (B, pixels, channels)."""
    planes = memory_format(t) is torch.contiguous_format
    t = _every(t, stride)
    B, channels, *spatial = t.shape
    rows = t.movedim(1, -1)
    if planes and not rows.is_contiguous():
        one = t.new_ones((1, 1), dtype=compute_dtype(t.dtype))
        return _ops.pre_add.default(as_image(t.contiguous(), planes), one, planes)[0]
    return rows.reshape(B, math.prod(spatial), channels)


def _put_rows(y: Tensor, rows: Tensor, stride: Sequence[int], planes: bool) -> None:
    """Writes rows (B, pixels, channels) to every ``stride``-th pixel of y, of planes or channels_last."""
    if planes and max(stride) == 1:
        one = y.new_ones((1, 1), dtype=compute_dtype(y.dtype))
        _ops.post_add_.default(as_image(y, planes), [rows], one, None, None, None, False, planes)
    else:
        to = _every(y, stride)
        to.copy_(rows.view(len(to), *to.shape[2:], to.shape[1]).movedim(-1, 1))


def _new_image(like: Tensor, shape: Sequence[int], stride: Sequence[int], fmt: torch.memory_format) -> Tensor:
    """Zero between every ``stride``-th pixel."""
    y = torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=fmt)
    return y if max(stride) == 1 else y.zero_()


def image_of_rows(rows: Tensor, shape: Sequence[int], stride: Sequence[int], fmt: torch.memory_format) -> Tensor:
    """(B, channels, *spatial) of ``shape`` with the rows (B, pixels, channels) at every ``stride``-th pixel, else 0."""
    if math.prod(shape[2:]) == 1:
        return rows.view(tuple(shape))
    planes = fmt is torch.contiguous_format
    if not planes and max(stride) == 1:
        return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    y = _new_image(rows, shape, stride, fmt)
    _put_rows(y, rows, stride, planes)
    return y


def pointwise(
    x: Tensor,
    shape: Sequence[int],
    linear: Callable[[Tensor, Tensor | None], Tensor],
    x_stride: Sequence[int],
    y_stride: Sequence[int],
    residual: Tensor | None = None,
) -> Tensor:
    """``linear(rows, residual)`` of every ``x_stride``-th pixel of x, at every ``y_stride``-th of the result, else 0.

    The result, of ``shape``, has the memory format of x.
    """

    def result(some: slice) -> Tensor:
        rest = None if residual is None else pointwise_rows(residual[some], y_stride)
        return linear(pointwise_rows(x[some], x_stride), rest)

    fmt = memory_format(x)
    if fmt is not torch.contiguous_format or math.prod(shape[2:]) == 1:
        return image_of_rows(result(slice(None)), shape, y_stride, fmt)
    y = _new_image(x, shape, y_stride, fmt)
    image_entries = x[:1].numel() + y[:1].numel()
    for some in images(len(x), image_entries * x.element_size()):
        _put_rows(y[some], result(some), y_stride, planes=True)
    return y


def _join_batch(y: Tensor, blocks: int, fmt: torch.memory_format) -> Tensor:
    """(B*blocks, p, *spatial) as (B, blocks*p, *spatial): a view if contiguous, a copy if channels_last."""
    return y.unflatten(0, (y.shape[0] // blocks, blocks)).flatten(1, 2).contiguous(memory_format=fmt)


def _blocks(count: int, entries: int, item_bytes: int) -> list[slice]:
    """Ranges of output (or input) blocks of H that fit the panel budget; one block holds ``entries`` entries."""
    step = max(1, _PANEL_BYTES // (entries * item_bytes))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _channels(blocks: slice, size: int) -> slice:
    return slice(blocks.start * size, blocks.stop * size)


def _in_panels(
    panel: Callable[[slice], Tensor], blocks: list[slice], size: int, shape: list[int], fmt: torch.memory_format
) -> Tensor:
    """The result of ``shape``; ``panel`` gives the channels of a range of blocks, ``size`` each."""
    if len(blocks) == 1:
        return panel(blocks[0]).contiguous(memory_format=fmt)
    first = panel(blocks[0])
    result = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=fmt)
    result[:, _channels(blocks[0], size)] = first
    del first
    for block in blocks[1:]:
        result[:, _channels(block, size)] = panel(block)
    return result


def mix(x: Tensor, A: Tensor) -> Tensor:
    """sum_l A[i,k,l] x_l as (B*P, n*q, *spatial), in the memory format of x (B, Q*q, *spatial)."""
    n, P, Q = A.shape
    B, channels, *spatial = x.shape
    q, pixels = channels // Q, math.prod(spatial)
    if memory_format(x) == torch.contiguous_format:
        return _ops.mix.default(x.reshape(B, 1, Q, q * pixels), A).view(B * P, n * q, *spatial)
    mixed = _ops.mix.default(x.movedim(1, -1).reshape(B, pixels, Q, q), A)
    return mixed.view(B * P, *spatial, n * q).movedim(-1, 1)


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
    plan: Plan,
) -> Tensor:
    dtype = x.dtype
    x, A, F, bias, residual, alpha = to_work_dtype(x, A, F, bias, residual, alpha)
    P, Q = A.shape[1:]
    p, _, *kernel = F.shape[1:]
    fmt = memory_format(x)
    x = x.contiguous(memory_format=fmt)
    size = output_size(x.shape[2:], kernel, stride, padding, dilation)
    if plan is Plan.MIX:
        h = convolution(mix(x, A), F.transpose(0, 1).flatten(1, 2), None, stride, padding, dilation)
        h = _join_batch(h, P, fmt)
    else:

        def panel(ks: slice) -> Tensor:
            panel_bias = None if bias is None else bias[_channels(ks, p)]
            return convolution(x, _ops.kron_sum.default(A[:, ks], F), panel_bias, stride, padding, dilation)

        blocks = _blocks(P, F[0].numel() * Q, F.element_size())
        h = _in_panels(panel, blocks, p, [x.shape[0], P * p, *size], fmt)
    late_bias = bias if plan is Plan.MIX else None
    if any(t is not None for t in (late_bias, residual, alpha)) or activation == "relu":
        planes = fmt is torch.contiguous_format
        if residual is not None:
            residual = as_image(residual.contiguous(memory_format=fmt), planes)
        _ops.epilogue_.default(as_image(h, planes), late_bias, residual, alpha, activation == "relu", planes)
    return h.to(dtype)


def phc_conv_input_grad(
    grad: Tensor,
    A: Tensor,
    F: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    plan: Plan,
) -> Tensor:
    dtype = grad.dtype
    grad, A, F = to_work_dtype(grad, A, F)
    P, Q = A.shape[1:]
    q = F.shape[2]
    B, _, *spatial = input_size
    fmt = memory_format(grad)
    grad = grad.contiguous(memory_format=fmt)
    if plan is Plan.MIX:
        mixed = mix(grad, A.transpose(1, 2))
        dx = input_grad(mixed, F.flatten(0, 1), [B * Q, q, *spatial], stride, padding, dilation)
        dx = _join_batch(dx, Q, fmt)
    else:

        def panel(ls: slice) -> Tensor:
            columns = _ops.kron_sum.default(A[:, :, ls], F)
            return input_grad(grad, columns, [B, columns.shape[1], *spatial], stride, padding, dilation)

        dx = _in_panels(panel, _blocks(Q, F[0].numel() * P, F.element_size()), q, input_size, fmt)
    return dx.to(dtype)


def phc_conv_weight_grad(
    grad: Tensor,
    x: Tensor,
    A: Tensor,
    F: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    dtype, algebra_dtype = x.dtype, A.dtype
    grad, x, A, F = to_work_dtype(grad, x, A, F)
    fmt = memory_format(x)
    x, grad = x.contiguous(memory_format=fmt), grad.contiguous(memory_format=fmt)
    of_weights = _mixed_weight_grad if plan is Plan.MIX else _panel_weight_grad
    dA, dF = of_weights(grad, x, A, F, stride, padding, dilation)
    return dA.to(algebra_dtype), dF.to(dtype)


def _panel_weight_grad(
    grad: Tensor, x: Tensor, A: Tensor, F: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    P, Q = A.shape[1:]
    p = F.shape[1]
    dA, dF = [], torch.zeros_like(F, dtype=compute_dtype(F.dtype), memory_format=torch.contiguous_format)
    for ks in _blocks(P, F[0].numel() * Q, F.element_size()):
        g = grad[:, _channels(ks, p)]
        shape = (g.shape[1], x.shape[1], *F.shape[3:])
        G = convolution_backward(g, x, x.new_empty(shape), stride, padding, dilation, of=1)
        part_A, part_F = _ops.kron_sum_grad.default(G.contiguous(), A[:, ks], F)
        dA.append(part_A)
        dF.add_(part_F)
    return torch.cat(dA, 1), dF


def _mixed_weight_grad(
    grad: Tensor, x: Tensor, A: Tensor, F: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    n, P, Q = A.shape
    p, q = F.shape[1:3]
    mixed = mix(x, A)
    g = grad.unflatten(1, (P, p)).flatten(0, 1).contiguous(memory_format=memory_format(x))
    weight = F.transpose(0, 1).flatten(1, 2)
    dF = convolution_backward(g, mixed, torch.empty_like(weight), stride, padding, dilation, of=1)
    of_mixed = convolution_backward(g, mixed, weight, stride, padding, dilation, of=0)
    size = q * math.prod(x.shape[2:])
    dA = algebra_grad(of_mixed.reshape(len(x), P * n, size), x.reshape(len(x), Q, size), n)
    return dA, dF.unflatten(1, (n, q)).transpose(0, 1).contiguous()
