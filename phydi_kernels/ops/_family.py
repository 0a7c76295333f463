"""Registration shared by every parameterized hypercomplex operator.

Each operator is the gradient of one form that is linear in every argument,

    T(grad, x, *factors) = <grad, H(factors) applied to x>,

with factors (A, F), H = sum_i A_i (x) F_i, or (U, V, W, F), the same with A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l]. So its
derivatives are operators of the same family: forward = dT/dgrad, input_grad = dT/dx, and one that gives several of them
at once. The backward of each is written with these, and second derivatives follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import compute_dtype
from ._autograd import autocast_enabled, register_autograd, without_autocast

LIB = torch.library.Library("phydi", "DEF")

Factors = Sequence[Tensor | None]


@dataclass(frozen=True)
class Family:
    """The operators of one layer.

    Attributes:
        forward: the operator (x, *factors, bias, *geometry, residual, alpha, activation).
        gradients: (grad, x, factors, geometry, of_x, of_factors) -> (dT/dx, *dT/dfactors), with anything in the
            places that are not asked for; without of_factors these may be missing.
        channel_dim: the dimension of results that holds features or channels.
        factors: their number. A factor that is None stands for an identity and has no gradient.

    ``geometry`` is stride, padding and dilation, or nothing for linear layers.
    """

    forward: Any
    gradients: Callable[..., tuple[Tensor | None, ...]]
    channel_dim: int
    factors: int

    def per_channel_sum(self, grad: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """In ``dtype`` or in its own."""
        channel, dtype = self.channel_dim % grad.dim(), dtype or grad.dtype
        others = [d for d in range(grad.dim()) if d != channel]
        # torch takes a sum over no dimensions for one over all.
        return grad.sum(others, dtype=dtype) if others else grad.to(dtype)

    def per_channel(self, t: Tensor, dims: int) -> Tensor:
        channel = self.channel_dim % dims
        return t.view([t.numel() if d == channel else 1 for d in range(dims)])

    def form_gradients(self, arguments: Factors, geometry: Sequence[Any], need: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of T in those of its ``arguments`` (grad, x, *factors) that are needed."""
        grad, x, *factors = arguments
        result: list[Tensor | None] = [None] * len(arguments)
        if need[0]:
            result[0] = self.forward(x, *factors, None, *geometry, None, None, "none")
        if any(need[1:]):
            rest = self.gradients(grad, x, factors, geometry, need[1], any(need[2:]))
            result[1 : 1 + len(rest)] = rest
        return [g if needed else None for g, needed in zip(result, need, strict=True)]


class Operator(NamedTuple):
    """An operator as torch dispatches it, and its implementation on the CPU: half of a small call is dispatching."""

    dispatched: Callable[..., Tensor]
    on_cpu: Callable[..., Tensor]


def _without_autocast(implementation: Callable) -> Callable:
    """Autocast would reach into an operator that runs inside it, as a backward may."""

    def run(*args: Any) -> Any:
        device = args[0].device
        # No context where it does nothing: that would cost a small call as much as a kernel.
        if not autocast_enabled(device):
            return implementation(*args)
        with without_autocast(device):
            return implementation(*args)

    return run


def define(
    schema: str, implementation: Callable, cpu: Callable, fake: Callable, *, cuda: Callable | None = None
) -> Any:
    """Defines ``phydi::<schema>``: ``cpu`` and ``cuda`` on their tensors, ``implementation`` on every other device."""
    name = LIB.define(schema)
    LIB.impl(name, _without_autocast(implementation), "CompositeExplicitAutograd")
    LIB.impl(name, _without_autocast(cpu), "CPU")
    if cuda is not None:
        LIB.impl(name, _without_autocast(cuda), "CUDA")
    torch.library.register_fake(f"phydi::{name}", fake, lib=LIB)
    return getattr(torch.ops.phydi, name).default


def register_forward_autograd(family: Family) -> None:
    """forward(x, *factors, bias, *geometry, residual, alpha, activation) = residual + alpha * act(H x + bias)."""
    count = family.factors

    def setup_context(ctx, inputs, output):
        x, *rest = inputs
        factors, (bias, *geometry, residual, alpha, activation) = rest[:count], rest[count:]
        ctx.geometry, ctx.activation = geometry, activation
        ctx.plain = alpha is None and residual is None
        saved_output = output if activation == "relu" and ctx.plain else None
        ctx.save_for_backward(x, *factors, bias, alpha, saved_output)

    def backward(ctx, grad):
        x, *factors, bias, alpha, y = ctx.saved_tensors
        need_x, *need_factors = ctx.needs_input_grad[: 1 + count]
        need_bias = ctx.needs_input_grad[1 + count]
        need_residual, need_alpha, _ = ctx.needs_input_grad[-3:]
        d_residual = grad if need_residual else None
        d_alpha = None
        channel_alpha = alpha is not None and alpha.numel() > 1
        if ctx.activation == "relu" or (channel_alpha and need_alpha):
            # Saving act(h) beside y would cost an output-sized tensor per layer; it is computed again instead.
            z = y
            if not (ctx.plain and ctx.activation == "relu"):
                z = family.forward(x, *factors, bias, *ctx.geometry, None, None, ctx.activation)
            if need_alpha:
                d_alpha = family.per_channel_sum(grad * z) if channel_alpha else (grad * z).sum().reshape(alpha.shape)
            if ctx.activation == "relu":
                grad = torch.ops.aten.threshold_backward(grad, z, 0)
            del z
        if channel_alpha:
            grad = grad * family.per_channel(alpha, grad.dim())
            alpha = None
        by_euler = need_alpha and d_alpha is None
        # alpha rides on the first factor, a small one, instead of a pass over the input's gradient.
        carrier = next(i for i, factor in enumerate(factors) if factor is not None)
        # Its gradient, and the bias's, are multiplied by alpha at last: until then 16 bits might not hold them.
        scaled, scale, wide = list(factors), None, None
        if alpha is not None:
            wide = compute_dtype(x.dtype)
            scale = alpha.reshape(()).to(wide)
            scaled[carrier] = factors[carrier].to(wide) * scale
        d_bias = family.per_channel_sum(grad, wide) if bias is not None and (need_bias or by_euler) else None
        need = [False, need_x, *need_factors]
        need[2 + carrier] |= by_euler
        _, d_x, *d_factors = family.form_gradients((grad, x, *scaled), ctx.geometry, need)
        if by_euler:
            # Euler: <grad, H x> = <A, dT/dA>, so the product H x need not be kept for alpha's gradient.
            d_alpha = (factors[carrier] * d_factors[carrier]).sum()
            if bias is not None:
                d_alpha = d_alpha + (bias * d_bias).sum()
            d_alpha = d_alpha.to(alpha.dtype).reshape(alpha.shape)
        if scale is not None:
            if d_factors[carrier] is not None:
                d_factors[carrier] = (d_factors[carrier] * scale).to(factors[carrier].dtype)
            d_bias = None if d_bias is None else (d_bias * scale).to(bias.dtype)
        return (d_x, *d_factors, d_bias, *[None] * len(ctx.geometry), d_residual, d_alpha, None)

    register_autograd(LIB, family.forward, backward, setup_context)


def register_input_grad_autograd(family: Family, op: Any) -> None:
    """op(grad, *factors, input_size, *geometry) = dT/dx; with v for its gradient, S = T(grad, v, *factors)."""
    count = family.factors

    def setup_context(ctx, inputs, output):
        grad, *rest = inputs
        ctx.geometry = rest[count + 1 :]
        ctx.save_for_backward(grad, *rest[:count])

    def backward(ctx, v):
        grad, *factors = ctx.saved_tensors
        need_grad, *need_factors = ctx.needs_input_grad[: 1 + count]
        d_grad, _, *d_factors = family.form_gradients(
            (grad, v, *factors), ctx.geometry, [need_grad, False, *need_factors]
        )
        return (d_grad, *d_factors, None, *[None] * len(ctx.geometry))

    register_autograd(LIB, op, backward, setup_context)


def register_gradients_autograd(family: Family, op: Any, slots: Sequence[int]) -> None:
    """op(grad, x, *factors, *geometry) = the gradients of T in the arguments numbered ``slots``, grad being 0.

    With (c_s) for their gradients, S = sum_s T(..., c_s in the place of argument s, ...).
    """
    count = 2 + family.factors

    def setup_context(ctx, inputs, output):
        ctx.geometry = inputs[count:]
        ctx.save_for_backward(*inputs[:count])

    def backward(ctx, *gradients):
        arguments = ctx.saved_tensors
        total: list[Tensor | None] = [None] * count
        for slot, gradient in zip(slots, gradients, strict=True):
            if gradient is None:
                continue
            need = [needed and i != slot for i, needed in enumerate(ctx.needs_input_grad[:count])]
            replaced = [gradient if i == slot else a for i, a in enumerate(arguments)]
            for i, part in enumerate(family.form_gradients(replaced, ctx.geometry, need)):
                if part is not None:
                    total[i] = part if total[i] is None else total[i] + part
        return (*total, *[None] * len(ctx.geometry))

    register_autograd(LIB, op, backward, setup_context)


def like_arguments(slots: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """The fake of an operator whose results have the shapes and types of the arguments numbered ``slots``."""

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(arguments[s].new_empty(arguments[s].shape) for s in slots)

    return fake


def register_forward_vmap(family: Family, *, fold: bool = False) -> None:
    """vmap of a family's forward. The mapped dimension of x and residual joins the batch, as one more leading dimension
    or folded into the first one, where the operator knows no others; with others mapped, one call a sample."""
    forward, count = family.forward, family.factors

    def vmap(info, in_dims, x, *rest):
        # (*factors, bias, *geometry, residual, alpha, activation)
        *others, residual, alpha, activation = rest
        if any(d is not None for d in (*in_dims[1 : 2 + count], in_dims[-2])):
            return _each_sample(forward, info, in_dims, (x, *rest))
        size = info.batch_size
        x, residual = leading(x, in_dims[0], size), leading(residual, in_dims[-3], size)
        if not fold:
            return forward(x, *others, residual, alpha, activation), 0
        folded = None if residual is None else residual.flatten(0, 1)
        y = forward(x.flatten(0, 1), *others, folded, alpha, activation)
        return y.unflatten(0, (size, x.shape[1])), 0

    torch.library.register_vmap(forward, vmap)


def register_vmap_by_sample(op: Any) -> None:
    """vmap of an operator whose mapped dimension does not fold into the batch."""
    torch.library.register_vmap(op, lambda info, in_dims, *args: _each_sample(op, info, in_dims, args))


def _each_sample(op: Callable, info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """vmap over a dimension that the operator cannot fold into its batch: one call a sample, stacked at dimension 0."""

    def call(sample: Callable[[Tensor, int], Tensor]) -> Any:
        # torch gives a list of integers a list of dimensions, all None.
        pairs = zip(args, in_dims, strict=True)
        return op(*(a if d is None or isinstance(a, list) else sample(a, d) for a, d in pairs))

    def number(b: int) -> Callable[[Tensor, int], Tensor]:
        return lambda t, d: t.select(d, b)

    def zeros(t: Tensor, d: int) -> Tensor:
        return t.new_zeros(t.shape[:d] + t.shape[d + 1 :])

    # Without a sample one of zeros shows the shapes of the results.
    calls = [call(number(b)) for b in range(info.batch_size)] or [call(zeros)]
    if isinstance(calls[0], tuple):
        results = tuple(torch.stack(c)[: info.batch_size] for c in zip(*calls, strict=True))
        return results, (0,) * len(results)
    return torch.stack(calls)[: info.batch_size], 0


def leading(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension of ``t`` at the front, made by expansion where ``t`` is not mapped."""
    if t is None:
        return None
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
