"""Registration shared by every parameterized hypercomplex operator.

Each operator is the gradient of one form that is linear in every argument,

    T(grad, x, A, F) = <grad, H(A, F) applied to x>,      H = sum_i A_i (x) F_i,

so its derivatives are operators of the same family: forward = dT/dgrad, input_grad = dT/dx and
weight_grad = (dT/dA, dT/dF). The backward of each is written with these three, and second derivatives follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._autograd import register_autograd

LIB = torch.library.Library("phydi", "DEF")


@dataclass(frozen=True)
class Family:
    """The three operators of one layer, and the dimension of its results that holds features or channels.

    Their arguments ``geometry`` are stride, padding and dilation, or nothing for linear layers.
    """

    forward: Callable[..., Tensor]
    input_grad: Callable[..., Tensor]
    weight_grad: Callable[..., tuple[Tensor, Tensor]]
    channel_dim: int

    def bias_grad(self, grad: Tensor) -> Tensor:
        channel = self.channel_dim % grad.dim()
        others = [d for d in range(grad.dim()) if d != channel]
        return grad.sum(others) if others else grad  # torch takes a sum over no dimensions for one over all


def define(schema: str, implementation: Callable, cpu: Callable, fake: Callable) -> Any:
    """Defines ``phydi::<schema>``: ``cpu`` on CPU tensors, ``implementation`` on every other device."""
    name = LIB.define(schema)
    LIB.impl(name, implementation, "CompositeExplicitAutograd")
    LIB.impl(name, cpu, "CPU")
    torch.library.register_fake(f"phydi::{name}", fake, lib=LIB)
    return getattr(torch.ops.phydi, name).default


def register_forward_autograd(family: Family) -> None:
    """forward(x, A, F, bias, *geometry, residual, alpha, activation) = residual + alpha * act(H x + bias)."""

    def setup_context(ctx, inputs, output):
        x, A, F, bias, *geometry, residual, alpha, activation = inputs
        ctx.geometry, ctx.activation = geometry, activation
        ctx.plain = alpha is None and residual is None
        saved_output = output if activation == "relu" and ctx.plain else None
        ctx.save_for_backward(x, A, F, bias, alpha, saved_output)

    def backward(ctx, grad):
        x, A, F, bias, alpha, y = ctx.saved_tensors
        need = ctx.needs_input_grad
        need_alpha = need[-2]
        d_residual = grad if need[-3] else None
        d_alpha = None
        if ctx.activation == "relu":
            # Saving act(h) beside y would cost an output-sized tensor per layer; it is computed again instead.
            z = y if ctx.plain else family.forward(x, A, F, bias, *ctx.geometry, None, None, "relu")
            if need_alpha:
                d_alpha = (grad * z).sum().reshape(alpha.shape)
            grad = torch.ops.aten.threshold_backward(grad, z, 0)
            del z
        scale = None if alpha is None else alpha.reshape(())
        d_x = d_A = d_F = d_bias = None
        if need[0]:
            # alpha rides on A, the smallest factor, instead of a pass over the input's gradient.
            d_x = family.input_grad(grad, A if scale is None else A * scale, F, x.shape, *ctx.geometry)
        alpha_by_euler = need_alpha and d_alpha is None
        if need[1] or need[2] or alpha_by_euler:
            d_A, d_F = family.weight_grad(grad, x, A, F, *ctx.geometry)
        if bias is not None and (need[3] or alpha_by_euler):
            d_bias = family.bias_grad(grad)
        if alpha_by_euler:
            # Euler: <grad, H x> = <F, dT/dF>, so the product H x need not be kept for alpha's gradient.
            d_alpha = (F * d_F).sum()
            if bias is not None:
                d_alpha = d_alpha + (bias * d_bias).sum()
            d_alpha = d_alpha.reshape(alpha.shape)
        if scale is not None:
            d_A, d_F, d_bias = (None if d is None else d * scale for d in (d_A, d_F, d_bias))
        return (d_x, d_A, d_F, d_bias, *[None] * len(ctx.geometry), d_residual, d_alpha, None)

    register_autograd(LIB, family.forward, backward, setup_context)


def register_input_grad_autograd(family: Family) -> None:
    """input_grad(grad, A, F, input_size, *geometry) = dT/dx; with v for its gradient, S = T(grad, v, A, F)."""

    def setup_context(ctx, inputs, output):
        grad, A, F, _, *ctx.geometry = inputs
        ctx.save_for_backward(grad, A, F)

    def backward(ctx, v):
        grad, A, F = ctx.saved_tensors
        d_grad = d_A = d_F = None
        if ctx.needs_input_grad[0]:
            d_grad = family.forward(v, A, F, None, *ctx.geometry, None, None, "none")
        if any(ctx.needs_input_grad[1:3]):
            d_A, d_F = family.weight_grad(grad, v, A, F, *ctx.geometry)
        return (d_grad, d_A, d_F, None, *[None] * len(ctx.geometry))

    register_autograd(LIB, family.input_grad, backward, setup_context)


def register_weight_grad_autograd(family: Family) -> None:
    """weight_grad(grad, x, A, F) = (dT/dA, dT/dF); with gradients (a, f), S = T(grad, x, a, F) + T(grad, x, A, f)."""

    def setup_context(ctx, inputs, output):
        grad, x, A, F, *ctx.geometry = inputs
        ctx.save_for_backward(grad, x, A, F)

    def backward(ctx, a, f):
        grad, x, A, F = ctx.saved_tensors
        a = torch.zeros_like(A) if a is None else a
        f = torch.zeros_like(F) if f is None else f
        need = ctx.needs_input_grad
        d_grad = d_x = d_A = d_F = None
        # S is one application of the operator with 2n terms: (a, A) against (F, f).
        terms, weights = torch.cat([a, A]), torch.cat([F, f])
        if need[0]:
            d_grad = family.forward(x, terms, weights, None, *ctx.geometry, None, None, "none")
        if need[1]:
            d_x = family.input_grad(grad, terms, weights, x.shape, *ctx.geometry)
        if need[2] or need[3]:
            d_A, d_F = family.weight_grad(grad, x, a, f, *ctx.geometry)
        return (d_grad, d_x, d_A, d_F, *[None] * len(ctx.geometry))

    register_autograd(LIB, family.weight_grad, backward, setup_context)


def weight_grad_fake(grad: Tensor, x: Tensor, A: Tensor, F: Tensor, *geometry: Any) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), F.new_empty(F.shape)


def each_sample(op: Callable, info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """vmap over a dimension that the operator cannot fold into its batch: one call a sample, stacked at dimension 0."""
    calls = [
        # torch gives a list of integers a list of dimensions, all None.
        op(*(a if d is None or isinstance(a, list) else a.select(d, b) for a, d in zip(args, in_dims, strict=True)))
        for b in range(info.batch_size)
    ]
    if isinstance(calls[0], tuple):
        return tuple(torch.stack(c) for c in zip(*calls, strict=True)), (0,) * len(calls[0])
    return torch.stack(calls), 0


def leading(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension of ``t`` at the front, made by expansion where ``t`` is not mapped."""
    if t is None:
        return None
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
