"""Values, memory layouts and comparisons for operator tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The rounding error of a sum of K products is a random walk: eps * sqrt(K) / 2 of the result's size, as a standard
# deviation. Of 1e5 results the largest shows 4.4 of those: c = 4 leaves a factor of two.
ROUNDING = 4.0


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def even(shape: Sequence[int], seed: int) -> Tensor:
    """Numbers of either sign between 1/2 and 3/2 in size: products of several are of one size too."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.5 + torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    return size * (2 * torch.randint(0, 2, tuple(shape), generator=generator) - 1)


def ternary(shape: Sequence[int], seed: int) -> Tensor:
    """-1, 0, 0, 1: every sum the operators form of these is exact in float32, and short ones in 16 bits."""
    draw = torch.randint(0, 4, tuple(shape), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([-1.0, 0.0, 0.0, 1.0], dtype=torch.float64)[draw]


def _nan(t: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.full(tuple(shape), math.nan, dtype=t.dtype, device=t.device)


def red_zone(t: Tensor) -> Tensor:
    """Contiguous, at an odd offset, between NaN."""
    return _nan(t, (t.numel() + 66,))[33 : 33 + t.numel()].view(t.shape).copy_(t)


def wide_rows(t: Tensor) -> Tensor:
    """Rows of a wider tensor: a row stride larger than the row."""
    if t.dim() == 0:
        return red_zone(t)
    return _nan(t, (*t.shape[:-1], t.shape[-1] + 5))[..., 3:-2].copy_(t)


def every_second(t: Tensor) -> Tensor:
    """Stride 2 in the last dimension."""
    if t.dim() == 0:
        return red_zone(t)
    return _nan(t, (*t.shape[:-1], 2 * t.shape[-1] + 1))[..., 1::2].copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The last two dimensions exchanged in memory, as a slice."""
    if t.dim() < 2:
        return every_second(t)
    return wide_rows(t.transpose(-1, -2)).transpose(-1, -2)


def first_fastest(t: Tensor) -> Tensor:
    """The first dimension last in memory, as a slice."""
    if t.dim() < 2:
        return every_second(t)
    return wide_rows(t.movedim(0, -1)).movedim(-1, 0)


def expanded(t: Tensor) -> Tensor:
    """Stride 0 in the first dimension: other values than ``t``, its first entry repeated."""
    if t.dim() == 0 or t.shape[0] == 0:
        return red_zone(t)
    return red_zone(t[:1]).expand(t.shape)


LAYOUTS = {f.__name__: f for f in (red_zone, wide_rows, every_second, transposed, first_fastest, expanded)}


def evaluate(
    op: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    differentiable: Sequence[str],
    grad_output: Tensor,
) -> dict[str, Tensor]:
    """The output of ``op``, under its own name, and the gradients of the differentiable arguments."""
    leaves = {name: t.detach().requires_grad_(name in differentiable) for name, t in tensors.items()}
    y = op(**leaves, **options)
    wanted = [name for name in leaves if name in differentiable]
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], grad_output)
    return {"output": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_exact(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Equal to the float64 result of integer arguments, rounded once.

    Integers above 2/eps are not all representable: a sum of two rounded parts may be one unit away there.
    """
    assert actual.keys() == expected.keys()
    eps = torch.finfo(dtype).eps
    for name, value in actual.items():
        assert value.dtype is dtype, f"{name} has dtype {value.dtype}, not {dtype}"
        rounded = expected[name].to(dtype)
        assert value.shape == rounded.shape, f"{name}: shape {tuple(value.shape)}, not {tuple(rounded.shape)}"
        error = (value.cpu().double() - rounded.double()).abs()
        allowed = torch.where(rounded.double().abs() > 2 / eps, eps * rounded.double().abs(), 0.0)
        # Equal infinities pass, NaN does not.
        wrong = ~((value.cpu() == rounded) | (error <= allowed))
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} entries differ; entry {wrong.nonzero()[0].tolist()} "
            f"is {value[tuple(wrong.nonzero()[0])]}, expected {rounded[tuple(wrong.nonzero()[0])]}"
        )


def unit_error(dtype: torch.dtype, terms: Tensor) -> Tensor:
    """Relative size of the rounding error of a sum of ``terms`` products: eps of the result and of the additions."""
    work = torch.float64 if dtype is torch.float64 else torch.float32
    return torch.finfo(dtype).eps + terms.sqrt() * torch.finfo(work).eps


def assert_close(
    actual: Tensor, expected: Tensor, magnitude: Tensor, terms: float | Tensor, name: str = "value"
) -> None:
    """Entry by entry, and as a vector: an error spread thin over all entries passes the first and not the second.

    ``magnitude`` is the same sum over absolute values, the typical size times sqrt(terms): unlike ``expected`` it does
    not vanish where the terms happen to cancel. ``terms`` is their number, in all entries or in each.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    terms = torch.as_tensor(terms, dtype=torch.float64)
    error = (actual.cpu().double() - expected).abs()
    assert error.isfinite().all(), f"{name}: {int((~error.isfinite()).sum())} of {error.numel()} entries are not finite"
    size = torch.maximum(expected.abs(), magnitude / terms.sqrt())
    scale = unit_error(actual.dtype, terms) * size
    worst = (error - ROUNDING * scale).argmax()
    assert error.flatten()[worst] <= ROUNDING * scale.flatten()[worst], (
        f"{name}: entry {int(worst)} is {actual.flatten()[worst]}, expected {expected.flatten()[worst]}: "
        f"error {error.flatten()[worst]:.2e}, allowed {ROUNDING * scale.flatten()[worst]:.2e}"
    )
    # Independent errors average out: the norm is held to one standard deviation, a single entry to ROUNDING of them.
    allowed = float(scale.norm()) * (1 + (ROUNDING - 1) / math.sqrt(error.numel()))
    assert error.norm() <= allowed, f"{name}: the error's L2 norm is {float(error.norm()):.2e}, allowed {allowed:.2e}"
    if expected.any():
        a, b = actual.cpu().double().flatten(), expected.flatten()
        lost = float((a / a.norm() - b / b.norm()).square().sum()) / 2
        allowed = (allowed / float(b.norm())) ** 2 + 1e-14
        assert lost <= allowed, f"{name}: cosine is {lost:.2e} below 1, allowed {allowed:.2e}"
