"""phydi::phm_linear and phydi::phm_linear_weight_grad."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import plans, plans_cuda, reference
from ..kernels import cpu, gpu
from ..plans_cuda import CudaPlan
from ._family import (
    Family,
    Operator,
    define,
    like_arguments,
    register_forward_autograd,
    register_forward_vmap,
    register_gradients_autograd,
    register_vmap_by_sample,
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
    along_q, bfloat16 = q == 1 or F.stride(2) == 1, x.dtype == torch.bfloat16
    plan = plans.phm_linear(x.numel() // (Q * q), n, P, Q, p, q, along_q, bfloat16, cpu.isa())
    return cpu.phm_linear(x, A, F, bias, residual, alpha, activation, plan)


def _forward_cuda(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
) -> Tensor:
    n, P, Q = A.shape
    _, p, q = F.shape
    dtype, capability = gpu.common_dtype((x, F, bias, residual, alpha), (A,)), gpu.capability(x.device)
    rows = math.prod(x.shape[:-1])
    plan = plans_cuda.phm_linear(rows, n, P, Q, p, q, dtype, gpu.tf32(), capability)
    if plan is CudaPlan.COMPOSED:
        return reference.phm_linear(x, A, F, bias, residual, alpha, activation)
    from ..kernels.gpu import phm_linear as driver

    return driver.phm_linear(x, A, F, bias, residual, alpha, activation, plan)


def _forward_fake(x, A, F, bias, residual, alpha, activation):
    return x.new_empty((*x.shape[:-1], A.shape[1] * F.shape[1]))


def _weight_grad_cpu(grad: Tensor, x: Tensor, A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    if not cpu.available():
        return reference.phm_linear_weight_grad(grad, x, A, F)
    n, P, Q = A.shape
    _, p, q = F.shape
    plan = plans.phm_linear_weight_grad(x.numel() // (Q * q), n, P, Q, p, q, cpu.isa())
    return cpu.phm_linear_weight_grad(grad, x, A, F, plan)


def _weight_grad_cuda(grad: Tensor, x: Tensor, A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    dtype, capability = gpu.common_dtype((grad, x, F), (A,)), gpu.capability(x.device)
    plan = plans_cuda.phm_linear_weight_grad(*A.shape, F.numel(), dtype, capability)
    if plan is CudaPlan.COMPOSED:
        return reference.phm_linear_weight_grad(grad, x, A, F)
    from ..kernels.gpu import phm_linear as driver

    return driver.phm_linear_weight_grad(grad, x, A, F, plan)


phm_linear = define(
    "phm_linear(Tensor x, Tensor A, Tensor F, Tensor? bias, Tensor? residual, Tensor? alpha, str activation) -> Tensor",
    reference.phm_linear,
    _forward_cpu,
    _forward_fake,
    cuda=_forward_cuda,
)
phm_linear_weight_grad = define(
    "phm_linear_weight_grad(Tensor grad, Tensor x, Tensor A, Tensor F) -> (Tensor, Tensor)",
    reference.phm_linear_weight_grad,
    _weight_grad_cpu,
    like_arguments((2, 3)),
    cuda=_weight_grad_cuda,
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
register_forward_vmap(_family)
register_vmap_by_sample(phm_linear_weight_grad)
