"""phydi::phm_linear and phydi::phm_linear_weight_grad."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import plans, reference
from ..kernels import cpu
from ._family import (
    Family,
    Operator,
    define,
    each_sample,
    leading,
    like_arguments,
    register_forward_autograd,
    register_gradients_autograd,
)


def _forward_cpu(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
) -> Tensor:
    if not cpu.available():
        return reference.phm_linear(x, A, F, bias, residual, alpha, activation)
    n, P, Q = A.shape
    _, p, q = F.shape
    plan = plans.phm_linear(x.numel() // (Q * q), n, P, Q, p, q, q == 1 or F.stride(2) == 1, x.dtype == torch.bfloat16)
    return cpu.phm_linear(x, A, F, bias, residual, alpha, activation, plan)


def _forward_fake(x, A, F, bias, residual, alpha, activation):
    return x.new_empty((*x.shape[:-1], A.shape[1] * F.shape[1]))


def _weight_grad_cpu(grad: Tensor, x: Tensor, A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    if not cpu.available():
        return reference.phm_linear_weight_grad(grad, x, A, F)
    n, P, Q = A.shape
    _, p, q = F.shape
    plan = plans.phm_linear_weight_grad(x.numel() // (Q * q), n, P, Q, p, q)
    return cpu.phm_linear_weight_grad(grad, x, A, F, plan)


phm_linear = define(
    "phm_linear(Tensor x, Tensor A, Tensor F, Tensor? bias, Tensor? residual, Tensor? alpha, str activation) -> Tensor",
    reference.phm_linear,
    _forward_cpu,
    _forward_fake,
)
phm_linear_weight_grad = define(
    "phm_linear_weight_grad(Tensor grad, Tensor x, Tensor A, Tensor F) -> (Tensor, Tensor)",
    reference.phm_linear_weight_grad,
    _weight_grad_cpu,
    like_arguments((2, 3)),
)

OP = Operator(phm_linear, _forward_cpu)


def _gradients(grad, x, factors, geometry, of_x, of_factors):
    A, F = factors
    d_x = None
    if of_x:
        # H^T = sum_i A_i^T (x) F_i^T: the operator itself with transposed factors.
        d_x = phm_linear(grad, A.transpose(1, 2), F.transpose(1, 2), None, None, None, "none")
    return (d_x, *phm_linear_weight_grad(grad, x, A, F)) if of_factors else (d_x,)


_family = Family(phm_linear, _gradients, channel_dim=-1, factors=2)
register_forward_autograd(_family)
register_gradients_autograd(_family, phm_linear_weight_grad, slots=(2, 3))


@torch.library.register_vmap("phydi::phm_linear")
def _forward_vmap(info, in_dims, x, A, F, bias, residual, alpha, activation):
    args = (x, A, F, bias, residual, alpha, activation)
    if any(d is not None for d in (*in_dims[1:4], in_dims[5])):
        return each_sample(phm_linear, info, in_dims, args)
    x = leading(x, in_dims[0], info.batch_size)
    residual = leading(residual, in_dims[4], info.batch_size)
    return phm_linear(x, A, F, bias, residual, alpha, activation), 0


@torch.library.register_vmap("phydi::phm_linear_weight_grad")
def _weight_grad_vmap(info, in_dims, *args):
    return each_sample(phm_linear_weight_grad, info, in_dims, args)
