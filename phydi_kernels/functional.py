"""Public functions. They check their arguments, follow autocast, and call one operator.

Dtypes: all tensors of a call share one of float32, float64, bfloat16, float16; the result has the same. The 16-bit
types are added and multiplied in float32. float16 is rounded once, at the end, on a CPU. In bfloat16, where the
processor multiplies it, and in both 16-bit types on CUDA, the factors of convolutions and of all but some small linear
calls are rounded first, as those of a dense layer are: entries of H, or of the mixed input sum_l A[i,k,l] x_l (and of
F_i^T g_k of the output's gradient g, in the gradient of A), or of both factors of the R products of a factored layer.
docs/gpu.md says what CUDA rounds besides. Under ``torch.autocast`` the arguments are cast to its dtype as for
``torch.nn.functional.linear``, but for U, V and W. Nothing else is cast, and nothing is moved between devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._check import DTYPES, check_padding, check_per_dimension, check_row
from ._gda import GDASolution, discriminant_criterion, gda_solve, kernel_matrix
from .kernels.phc_conv import output_size
from .ops import phc_conv as _phc_conv
from .ops import phc_conv_factored as _phc_conv_factored
from .ops import phm_linear as _phm_linear
from .ops import phm_linear_factored as _phm_linear_factored
from .ops._autograd import autocast_enabled, may_skip_dispatch, without_autocast
from .ops._family import Operator
from .reference import compute_dtype

__all__ = [
    "GDASolution",
    "discriminant_criterion",
    "gda_solve",
    "kernel_matrix",
    "phc_conv1d",
    "phc_conv1d_factored",
    "phc_conv2d",
    "phc_conv2d_factored",
    "phc_conv3d",
    "phc_conv3d_factored",
    "phm_embedding",
    "phm_linear",
    "phm_linear_factored",
]

ACTIVATIONS = ("none", "relu")
_OPTIONAL = frozenset(("U", "bias", "residual", "alpha"))
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_STRIDED = torch.strided


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
    whole; CUDA does where its library's product is faster, and other devices, on which the reference runs.

    Args:
        x: input ``(..., Q*q)``; any strides, any number of leading dimensions, empty ones included.
        A: the algebra ``(n, P, Q)``.
        F: the weights ``(n, p, q)``.
        bias: ``(P*p,)``.
        residual: same shape as the result.
        alpha: one element, a factor on the activated product, 0 at a PHYDI start; or ``(P*p,)``, one for each output.
        activation: ``"none"`` or ``"relu"``.

    Returns:
        ``(..., P*p)``, contiguous, dtype and device of ``x``. Under autocast a residual of a wider dtype is added
        outside the fused kernel and the result has the wider dtype, as ``residual + linear(x)`` would have.

    Raises:
        TypeError: an argument that is not a tensor, mixed dtypes, or a dtype other than the four above.
        ValueError: shapes or devices that do not fit, or an unknown activation.
    """
    return _linear(_phm_linear.OP, x, {"A": A}, F, bias, residual, alpha, activation)


def phm_linear_factored(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    r""":func:`phm_linear` with an algebra of R terms: R block products of p x q in place of P*Q.

    .. math:: H = \sum_i A_i \otimes F_i, \quad A_{ikl} = \sum_{r=1}^R U_{ri} V_{rk} W_{rl}, \qquad
              (H x)_k = \sum_r V_{rk} \Bigl(\sum_i U_{ri} F_i\Bigr) \Bigl(\sum_l W_{rl} x_l\Bigr)

    with y = residual + alpha * act(H x + bias). Forward and backward take R/(P*Q) of the dense layer's multiplications;
    small batches take another plan where that is faster. ``algebra.decompose`` gives U, V, W for a given A.

    Args:
        x: input ``(..., Q*q)``.
        U: ``(R, n)``, or None if F holds the R combined weights ``sum_i U[r, i] F_i`` already.
        V: ``(R, P)``.
        W: ``(R, Q)``.
        F: the weights ``(n, p, q)``; ``(R, p, q)`` without U.
        bias, residual, alpha, activation: as in :func:`phm_linear`.

    Returns:
        ``(..., P*p)``, contiguous, dtype and device of ``x``.

    Raises:
        TypeError, ValueError: as :func:`phm_linear`; U, V and W may also be float32 where the others are of a 16-bit
            type (autocast leaves them as they are), and must have the same R.
    """
    return _linear(_phm_linear_factored.OP, x, {"U": U, "V": V, "W": W}, F, bias, residual, alpha, activation)


def phm_embedding(input: Tensor, A: Tensor, F: Tensor, *, padding_idx: int | None = None) -> Tensor:
    r"""Rows of the table of a parameterized hypercomplex embedding, which is never formed.

    .. math:: E = \sum_i A_i \otimes F_i, \qquad y_{lq+s} = \sum_i A_{ikl} F_{irs} \quad \text{for index } kp + r

    Time and memory are O(tokens * Q*q * n), and O(n p q) for the gradient of F.

    Args:
        input: indices from 0 to P*p - 1, int32 or int64, of any shape.
        A: the algebra ``(n, P, Q)``.
        F: the weights ``(n, p, q)``, with the dtype of A, one of those above. The 16-bit types are added and multiplied
            in float32 and rounded once. Autocast changes nothing, as for :func:`torch.nn.functional.embedding`.
        padding_idx: an index, from the end if negative, whose row is 0 and has no gradient.

    Returns:
        ``(*input.shape, Q*q)``, dtype and device of F.

    Raises:
        TypeError: an argument that is not a tensor, indices that are no integers, mixed dtypes.
        ValueError: shapes or devices that do not fit, or a ``padding_idx`` out of range.
        IndexError: an index out of range, on a CPU outside of ``torch.compile``; elsewhere as
            :func:`torch.nn.functional.embedding`.
    """
    for name, t in (("input", input), ("F", F)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(t).__name__}")
    _check_tensors(F, {"A": A}, "F")
    if F.dim() != 3 or 0 in F.shape:
        raise ValueError(f"F has shape {tuple(F.shape)}; it must be (n, p, q), not empty")
    P, _ = _check_algebra(F, A)
    if input.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input has dtype {input.dtype}; indices must be torch.int32 or torch.int64")
    if input.device != F.device:
        raise ValueError(f"input is on {input.device} but F is on {F.device}; all tensors of a call share one device")
    rows = P * F.shape[1]
    padding_idx = check_row("padding_idx", padding_idx, rows)
    if torch.compiler.is_compiling():
        y = _rows_of_table(input.long(), A, F)
    else:
        try:
            y = _rows_of_table(input.long(), A, F)
        except IndexError:
            try:
                low, high = (int(bound) for bound in input.aminmax())
                found = f"indices from {low} to {high}"
            except RuntimeError:  # under vmap no value can be read
                found = "an index out of range"
            raise IndexError(f"input holds {found}; indices must be from 0 to {rows - 1}") from None
    if padding_idx is not None:
        y = y.masked_fill((input == padding_idx).unsqueeze(-1), 0)
    return y


def _rows_of_table(index: Tensor, A: Tensor, F: Tensor) -> Tensor:
    n, p, q = F.shape
    # Widened before the lookup: its gradient is a sum over all tokens.
    wide = compute_dtype(F.dtype)
    block = index.div(p, rounding_mode="floor")
    terms = torch.arange(n, device=index.device) * p
    rows = torch.nn.functional.embedding((index - block * p).unsqueeze(-1) + terms, F.to(wide).reshape(n * p, q))
    factors = torch.nn.functional.embedding(block, A.to(wide).transpose(0, 1).flatten(1)).unflatten(-1, (n, A.shape[2]))
    with without_autocast(F.device):
        y = factors.transpose(-1, -2) @ rows
    return y.flatten(-2).to(F.dtype)


def _linear(
    op: Operator,
    x: Tensor,
    algebra: dict[str, Any],
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
) -> Tensor:
    wider = None  # a residual that autocast leaves in its own dtype
    direct = isinstance(x, Tensor) and x.is_cpu and may_skip_dispatch()
    if not direct and _autocast_enabled(x):
        x, algebra, F, bias, alpha, residual, wider = _autocast(x, algebra, F, bias, alpha, residual)
    out_features, in_features, plain = _check(x, algebra, F, bias, residual, alpha, activation, spatial=0)
    shape = x.shape
    if not shape or shape[-1] != in_features:
        raise ValueError(
            f"x has shape {tuple(shape)}; its last dimension must be Q*q = {in_features} for {_shapes(algebra, F)}"
        )
    given = residual if wider is None else wider
    if given is not None:
        _check_residual(given, (*shape[:-1], out_features))
    call = op.on_cpu if direct and plain else op.dispatched
    y = call(x, *algebra.values(), F, bias, residual, alpha, activation)
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
    op = _phc_conv.OPS[1].forward
    return _conv(1, op, x, {"A": A}, F, bias, stride, padding, dilation, residual, alpha, activation)


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
        alpha: one element, or ``(P*p,)``, one for each output channel.
        activation: ``"none"`` or ``"relu"``.

    Returns:
        ``(B, P*p, out_height, out_width)``, dtype and device of ``x``.

    Raises:
        TypeError: an argument that is not a tensor, mixed dtypes, or a dtype other than the four above.
        ValueError: shapes, devices, strides, paddings or dilations that do not fit, or an unknown activation.
    """
    op = _phc_conv.OPS[2].forward
    return _conv(2, op, x, {"A": A}, F, bias, stride, padding, dilation, residual, alpha, activation)


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
    op = _phc_conv.OPS[3].forward
    return _conv(3, op, x, {"A": A}, F, bias, stride, padding, dilation, residual, alpha, activation)


def phc_conv1d_factored(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
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
    """:func:`phc_conv2d_factored` with one spatial dimension."""
    algebra = {"U": U, "V": V, "W": W}
    op = _phc_conv_factored.OPS[1].forward
    return _conv(1, op, x, algebra, F, bias, stride, padding, dilation, residual, alpha, activation)


def phc_conv2d_factored(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
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
    r""":func:`phc_conv2d` with an algebra of R terms: R convolutions of p x q channels in place of P*Q.

    .. math:: H = \sum_i A_i \otimes F_i, \quad A_{ikl} = \sum_{r=1}^R U_{ri} V_{rk} W_{rl}, \qquad
              (H * x)_k = \sum_r V_{rk} \Bigl(\sum_i U_{ri} F_i\Bigr) * \Bigl(\sum_l W_{rl} x_l\Bigr)

    Args:
        x: input ``(B, Q*q, height, width)`` or ``(Q*q, height, width)``.
        U: ``(R, n)``, or None if F holds the R combined filters ``sum_i U[r, i] F_i`` already.
        V: ``(R, P)``.
        W: ``(R, Q)``.
        F: the filters ``(n, p, q, kernel_height, kernel_width)``; ``(R, p, q, ...)`` without U.
        bias, stride, padding, dilation, residual, alpha, activation: as in :func:`phc_conv2d`.

    Returns:
        ``(B, P*p, out_height, out_width)``, dtype and device of ``x``.

    Raises:
        TypeError, ValueError: as :func:`phc_conv2d`, and as :func:`phm_linear_factored` for U, V and W.
    """
    algebra = {"U": U, "V": V, "W": W}
    op = _phc_conv_factored.OPS[2].forward
    return _conv(2, op, x, algebra, F, bias, stride, padding, dilation, residual, alpha, activation)


def phc_conv3d_factored(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
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
    """:func:`phc_conv2d_factored` with three spatial dimensions."""
    algebra = {"U": U, "V": V, "W": W}
    op = _phc_conv_factored.OPS[3].forward
    return _conv(3, op, x, algebra, F, bias, stride, padding, dilation, residual, alpha, activation)


def _conv(
    d: int,
    op: Any,
    x: Tensor,
    algebra: dict[str, Any],
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
        x, algebra, F, bias, alpha, residual, wider = _autocast(x, algebra, F, bias, alpha, residual)
    out_channels, channels, _ = _check(x, algebra, F, bias, residual, alpha, activation, spatial=d)
    if x.dim() not in (d + 1, d + 2) or x.shape[-d - 1] != channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be (batch, {channels}{', size' * d}) or "
            f"({channels}{', size' * d}), with Q*q = {channels} channels for {_shapes(algebra, F)}"
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
    y = op(x, *algebra.values(), F, bias, stride, padding, dilation, residual, alpha, activation)
    y = y if batched else y.squeeze(0)
    return y if wider is None else wider + y


def _autocast_enabled(x: Tensor) -> bool:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}")
    return autocast_enabled(x.device)


def _autocast(x: Tensor, algebra: dict[str, Any], F: Any, bias: Any, alpha: Any, residual: Any) -> tuple[Any, ...]:
    """The arguments as torch's own autocast would cast them: floating tensors that are not float64, but for U, V and W.

    The residual is not cast. One of another dtype is returned last, in its place None: it is added outside the kernel.
    """
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        casts = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if casts and t.dtype != dtype else t

    kept = compute_dtype(dtype)
    algebra = {
        name: t if name != "A" and isinstance(t, Tensor) and t.dtype == kept else cast(t) for name, t in algebra.items()
    }
    x = cast(x)
    # What is not allowed at all is left to _check.
    allowed = isinstance(residual, Tensor) and residual.dtype in DTYPES and residual.device == x.device
    wider = residual if allowed and residual.dtype != x.dtype else None
    return x, algebra, cast(F), cast(bias), cast(alpha), residual if wider is None else None, wider


def _check_residual(residual: Tensor, shape: Sequence[int]) -> None:
    if residual.shape != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be the result's {tuple(shape)}")


def _shapes(algebra: dict[str, Any], F: Tensor) -> str:
    return " and ".join(f"{name} {tuple(t.shape)}" for name, t in (*algebra.items(), ("F", F)) if t is not None)


def _check(
    x: Tensor,
    algebra: dict[str, Any],
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
    spatial: int,
) -> tuple[int, int, bool]:
    """Checks what linear layers and convolutions share; returns (P*p, Q*q, all are plain tensors on the CPU)."""
    # The common case in few lookups, and the reasons only where it does not hold: this runs at each call.
    dtype = x.dtype
    plain = dtype in DTYPES and F is not None
    for t in (x, F, bias, residual, alpha, *algebra.values()):
        if t is not None and not (
            type(t) in _PLAIN and t.dtype is dtype and t.is_cpu and t.layout is _STRIDED and not t.is_nested
        ):
            plain = False
    if not plain or any(t is None and name not in _OPTIONAL for name, t in algebra.items()):
        plain = _check_tensors(x, {**algebra, "F": F, "bias": bias, "residual": residual, "alpha": alpha})
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}")
    f = F.shape
    if len(f) != 3 + spatial:
        raise ValueError(f"F has shape {tuple(f)}; it must be (n, p, q{', kernel' * spatial})")
    P, Q = _check_algebra(F=F, **algebra) if "A" in algebra else _check_terms(F=F, **algebra)
    if 0 in f:
        raise ValueError(f"F {tuple(f)} must not have an empty dimension")
    out_features, in_features = P * f[1], Q * f[2]
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be (P*p,) = ({out_features},)")
    if alpha is not None and alpha.numel() != 1 and alpha.shape != (out_features,):
        raise ValueError(
            f"alpha has shape {tuple(alpha.shape)}; it must hold one element, or be (P*p,) = ({out_features},)"
        )
    return out_features, in_features, plain


def _check_tensors(x: Tensor, others: dict[str, Any], first: str = "x") -> bool:
    """Types, layouts, dtypes and devices; returns whether all are plain tensors on the CPU. ``first`` names x."""
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES:
        raise TypeError(f"{first} has dtype {dtype}; allowed are {', '.join(str(d) for d in DTYPES)}")
    plain = x.is_cpu
    for name, t in ((first, x), *others.items()):
        if t is None and name in _OPTIONAL:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(t).__name__}")
        if t.layout is not torch.strided or t.is_nested:
            raise TypeError(f"{name} is nested or has layout {t.layout}; it must be a dense tensor")
        if t.dtype is not dtype:
            if name not in ("U", "V", "W"):
                raise TypeError(
                    f"{name} has dtype {t.dtype} but {first} has {dtype}; all tensors of a call share one dtype"
                )
            if t.dtype is not compute_dtype(dtype):
                allowed = " or ".join(map(str, dict.fromkeys((dtype, compute_dtype(dtype)))))
                raise TypeError(f"{name} has dtype {t.dtype}; beside {first} of dtype {dtype} it must have {allowed}")
        if t.device != device:
            raise ValueError(
                f"{name} is on {t.device} but {first} is on {device}; all tensors of a call share one device"
            )
        plain = plain and type(t) in _PLAIN
    return plain


def _check_algebra(F: Tensor, A: Tensor) -> tuple[int, int]:
    """(P, Q) of A (n, P, Q)."""
    a = A.shape
    if len(a) != 3:
        raise ValueError(f"A has shape {tuple(a)}; it must be (n, P, Q)")
    if a[0] != F.shape[0]:
        raise ValueError(f"A {tuple(a)} and F {tuple(F.shape)} must have the same number of terms n (first dimension)")
    if 0 in a:
        raise ValueError(f"A {tuple(a)} must not have an empty dimension")
    return a[1], a[2]


def _check_terms(F: Tensor, U: Tensor | None, V: Tensor, W: Tensor) -> tuple[int, int]:
    """(P, Q) of U (R, n), V (R, P), W (R, Q)."""
    n, v, w = F.shape[0], V.shape, W.shape
    u = (n, n) if U is None else U.shape
    if not (len(u) == len(v) == len(w) == 2 and u[0] == v[0] == w[0] and u[1] == n and 0 not in (*v, *w)):
        _raise_terms(F, U, V, W)
    return v[1], w[1]


def _raise_terms(F: Tensor, U: Tensor | None, V: Tensor, W: Tensor) -> None:
    n = F.shape[0]
    given = {"V": V, "W": W} if U is None else {"U": U, "V": V, "W": W}
    for name, t in given.items():
        if t.dim() != 2 or 0 in t.shape:
            size = {"U": "n", "V": "P", "W": "Q"}[name]
            raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be (R, {size}), not empty")
    if len({len(t) for t in given.values()}) > 1:
        raise ValueError(f"{_shapes(given, F)}: U, V and W must have the same number of rows R")
    if U is None:
        raise ValueError(f"F {tuple(F.shape)} must have the R = {len(V)} terms of V and W where U is None")
    raise ValueError(f"U {tuple(U.shape)} must have a column for each of the n = {n} terms of F {tuple(F.shape)}")
