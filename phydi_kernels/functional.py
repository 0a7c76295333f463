"""Public functions. They check their arguments, follow autocast, and call one operator.

Dtypes: all tensors of a call share one of float32, float64, bfloat16, float16; the result has the same. The
16-bit types are added and multiplied in float32. float16 is rounded once, at the end. In bfloat16, where the
processor multiplies it, the factors of larger linear calls and of convolutions (entries of H, or of the mixed input
sum_l A[i,k,l] x_l) are rounded to bfloat16 first, as those of a dense layer are. Under ``torch.autocast`` the arguments
are cast to its dtype as for ``torch.nn.functional.linear``. Nothing else is cast, and nothing is moved between devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._check import DTYPES, check_padding, check_per_dimension
from .kernels.phc_conv import output_size
from .ops import phc_conv as _phc_conv
from .ops import phm_linear as _phm_linear

__all__ = ["phc_conv1d", "phc_conv2d", "phc_conv3d", "phm_linear"]

ACTIVATIONS = ("none", "relu")


def phm_linear(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    r"""Parameterized hypercomplex multiplication, fused with its residual connection.

    .. math:: y = \mathrm{residual} + \alpha\, \mathrm{act}(H x + \mathrm{bias}), \qquad
              H = \sum_i A_i \otimes F_i

    so that ``H[k*p + r, l*q + s] = sum_i A[i, k, l] * F[i, r, s]`` (PHYDI, Eq. 1 and 2). The CPU kernels never form H
    whole; on other devices the reference runs, which does.

    Args:
        x: input ``(..., Q*q)``; any strides, any number of leading dimensions, empty ones included.
        A: the algebra ``(n, P, Q)``.
        F: the weights ``(n, p, q)``.
        bias: ``(P*p,)``.
        residual: same shape as the result.
        alpha: one element; a factor on the activated product, 0 at a PHYDI start.
        activation: ``"none"`` or ``"relu"``.

    Returns:
        ``(..., P*p)``, contiguous, dtype and device of ``x``. Under autocast a residual of a wider dtype is added
        outside the fused kernel and the result has the wider dtype, as ``residual + linear(x)`` would have.

    Raises:
        TypeError: an argument that is not a tensor, mixed dtypes, or a dtype other than the four above.
        ValueError: shapes or devices that do not fit, or an unknown activation.
    """
    wider = None  # a residual that autocast leaves in its own dtype
    if _autocast_enabled(x):
        x, A, F, bias, alpha = _autocast(x, A, F, bias, alpha)
        if _is_wider(residual, x):
            wider, residual = residual, None
    out_features, in_features = _check(x, A, F, bias, residual, alpha, activation, spatial=0)
    shape = x.shape
    if not shape or shape[-1] != in_features:
        raise ValueError(
            f"x has shape {tuple(shape)}; its last dimension must be Q*q = {in_features} "
            f"for A {tuple(A.shape)} and F {tuple(F.shape)}"
        )
    given = residual if wider is None else wider
    if given is not None:
        _check_residual(given, (*shape[:-1], out_features))
    y = _phm_linear.phm_linear(x, A, F, bias, residual, alpha, activation)
    return y if wider is None else wider + y


def phc_conv1d(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    r"""Parameterized hypercomplex convolution in one dimension: :func:`phc_conv2d` with one spatial dimension."""
    return _conv(1, x, A, F, bias, stride, padding, dilation, residual, alpha, activation)


def phc_conv2d(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    r"""Parameterized hypercomplex convolution, with its residual connection.

    .. math:: y = \mathrm{residual} + \alpha\, \mathrm{act}(H * x + \mathrm{bias}), \qquad
              H = \sum_i A_i \otimes F_i

    with ``H[k*p + r, l*q + s, ...] = sum_i A[i, k, l] * F[i, r, s, ...]`` (PHYDI, Eq. 1 and 3): the Kronecker
    product acts on channels, the kernel positions are carried along.

    Args:
        x: input ``(B, Q*q, height, width)`` or ``(Q*q, height, width)``; contiguous or channels_last, the result
            follows; other strides are copied.
        A: the algebra ``(n, P, Q)``.
        F: the filters ``(n, p, q, kernel_height, kernel_width)``.
        bias: ``(P*p,)``.
        stride, padding, dilation: as in :func:`torch.nn.functional.conv2d`; padding also ``"valid"`` or ``"same"``.
        residual: same shape as the result.
        alpha: one element.
        activation: ``"none"`` or ``"relu"``.

    Returns:
        ``(B, P*p, out_height, out_width)``, dtype and device of ``x``.

    Raises:
        TypeError: an argument that is not a tensor, mixed dtypes, or a dtype other than the four above.
        ValueError: shapes, devices, strides, paddings or dilations that do not fit, or an unknown activation.
    """
    return _conv(2, x, A, F, bias, stride, padding, dilation, residual, alpha, activation)


def phc_conv3d(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    *,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    r"""Parameterized hypercomplex convolution in three dimensions: :func:`phc_conv2d` with three spatial dimensions."""
    return _conv(3, x, A, F, bias, stride, padding, dilation, residual, alpha, activation)


def _conv(
    d: int,
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
) -> Tensor:
    wider = None  # a residual that autocast leaves in its own dtype
    if _autocast_enabled(x):
        x, A, F, bias, alpha = _autocast(x, A, F, bias, alpha)
        if _is_wider(residual, x):
            wider, residual = residual, None
    out_channels, channels = _check(x, A, F, bias, residual, alpha, activation, spatial=d)
    if x.dim() not in (d + 1, d + 2) or x.shape[-d - 1] != channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be (batch, {channels}{', size' * d}) or "
            f"({channels}{', size' * d}), with Q*q = {channels} channels for A {tuple(A.shape)} and F {tuple(F.shape)}"
        )
    stride = list(check_per_dimension("stride", stride, d, least=1))
    dilation = list(check_per_dimension("dilation", dilation, d, least=1))
    kernel = F.shape[3:]
    padding, extra = check_padding(padding, stride, d), [0] * d
    if isinstance(padding, str):
        total = [e * (k - 1) if padding == "same" else 0 for e, k in zip(dilation, kernel, strict=True)]
        padding, extra = [t // 2 for t in total], [t % 2 for t in total]
    padding = list(padding)
    if any(extra):
        x = torch.nn.functional.pad(x, [v for e in reversed(extra) for v in (0, e)])
    size = output_size(x.shape[-d:], kernel, stride, padding, dilation)
    if any(s < 1 for s in size):
        raise ValueError(
            f"x of spatial size {tuple(x.shape[-d:])} with padding {tuple(padding)} is smaller than "
            f"the dilated kernel {tuple(e * (k - 1) + 1 for e, k in zip(dilation, kernel, strict=True))}"
        )
    given = residual if wider is None else wider
    if given is not None:
        _check_residual(given, (*x.shape[: -d - 1], out_channels, *size))
    batched = x.dim() == d + 2
    if not batched:
        x = x.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    y = _phc_conv.OPS[d].forward(x, A, F, bias, stride, padding, dilation, residual, alpha, activation)
    y = y if batched else y.squeeze(0)
    return y if wider is None else wider + y


def _autocast_enabled(x: Tensor) -> bool:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}")
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # torch knows no autocast for meta tensors


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Casts what torch's own autocast would: floating tensors that are not float64."""
    dtype = torch.get_autocast_dtype(next(t for t in tensors if t is not None).device.type)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _is_wider(residual: Any, x: Tensor) -> bool:
    """Whether the residual is added outside the kernel; what is not allowed at all is left to :func:`_check`."""
    return (
        isinstance(residual, Tensor)
        and residual.dtype in DTYPES
        and residual.dtype != x.dtype
        and residual.device == x.device
    )


def _check_residual(residual: Tensor, shape: Sequence[int]) -> None:
    if residual.shape != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be the result's {tuple(shape)}")


def _check(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
    spatial: int,
) -> tuple[int, int]:
    """Checks what linear layers and convolutions share; returns (P*p, Q*q)."""
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES:
        raise TypeError(f"x has dtype {dtype}; allowed are {', '.join(str(d) for d in DTYPES)}")
    for name, t in (("x", x), ("A", A), ("F", F), ("bias", bias), ("residual", residual), ("alpha", alpha)):
        if t is None and name in ("bias", "residual", "alpha"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(t).__name__}")
        if t.layout is not torch.strided or t.is_nested:
            raise TypeError(f"{name} is nested or has layout {t.layout}; it must be a dense tensor")
        if t.dtype is not dtype:
            raise TypeError(f"{name} has dtype {t.dtype} but x has {dtype}; all tensors of a call share one dtype")
        if t.device != device:
            raise ValueError(f"{name} is on {t.device} but x is on {device}; all tensors of a call share one device")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}")
    a, f = A.shape, F.shape
    if len(a) != 3:
        raise ValueError(f"A has shape {tuple(a)}; it must be (n, P, Q)")
    if len(f) != 3 + spatial:
        raise ValueError(f"F has shape {tuple(f)}; it must be (n, p, q{', kernel' * spatial})")
    if a[0] != f[0]:
        raise ValueError(f"A {tuple(a)} and F {tuple(f)} must have the same number of terms n (first dimension)")
    if 0 in a or 0 in f:
        raise ValueError(f"A {tuple(a)} and F {tuple(f)} must not have an empty dimension")
    out_features, in_features = a[1] * f[1], a[2] * f[2]
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be (P*p,) = ({out_features},)")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}; it must hold one element")
    return out_features, in_features
