"""phydi::phm_linear_factored and phydi::phm_linear_factored_grad."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import plans, plans_cuda, reference
from ..kernels import cpu, gpu
from ..plans import Plan
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


def plan_on_cpu(x: Tensor, U: Tensor | None, V: Tensor, W: Tensor, F: Tensor) -> Plan:
    """The plan of a call; it depends on sizes, strides and the type alone."""
    R, P = V.shape
    n, p, q = F.shape
    Q = W.shape[1]
    along_q, bfloat16 = q == 1 or F.stride(2) == 1, x.dtype == torch.bfloat16
    sizes = (x.numel() // (Q * q), n, P, Q, p, q, R)
    return plans.phm_linear_factored(*sizes, along_q, U is not None, bfloat16, cpu.isa())


def _forward_cpu(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
) -> Tensor:
    if not cpu.available():
        return reference.phm_linear_factored(x, U, V, W, F, bias, residual, alpha, activation)
    plan = plan_on_cpu(x, U, V, W, F)
    return cpu.phm_linear_factored(x, U, V, W, F, bias, residual, alpha, activation, plan)


def _forward_cuda(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    alpha: Tensor | None,
    activation: str,
) -> Tensor:
    R, P = V.shape
    n, p, q = F.shape
    dtype, capability = gpu.common_dtype((x, F, bias, residual, alpha), (U, V, W)), gpu.capability(x.device)
    sizes = (math.prod(x.shape[:-1]), n, P, W.shape[1], p, q, R)
    plan = plans_cuda.phm_linear_factored(*sizes, U is not None, dtype, gpu.tf32(), capability)
    if plan is CudaPlan.COMPOSED:
        return reference.phm_linear_factored(x, U, V, W, F, bias, residual, alpha, activation)
    from ..kernels.gpu import phm_linear_factored as driver

    return driver.phm_linear_factored(x, U, V, W, F, bias, residual, alpha, activation, plan)


def _forward_fake(x, U, V, W, F, bias, residual, alpha, activation):
    return x.new_empty((*x.shape[:-1], V.shape[1] * F.shape[1]))


def _transposed(U: Tensor | None, V: Tensor, W: Tensor, F: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The factors of the transpose of H."""
    return U, W, V, F.transpose(1, 2)


def _grad_cpu(grad: Tensor, x: Tensor, U: Tensor, V: Tensor, W: Tensor, F: Tensor) -> tuple[Tensor, ...]:
    if not cpu.available():
        return reference.phm_linear_factored_grad(grad, x, U, V, W, F)
    R, P = V.shape
    n, p, q = F.shape
    Q = W.shape[1]
    sizes = (x.numel() // (Q * q), n, P, Q, p, q, R)
    plan = plans.phm_linear_factored_grad(*sizes, x.dtype == torch.bfloat16, cpu.isa())
    if plan is Plan.RANK:
        return cpu.phm_linear_factored_grad(grad, x, U, V, W, F)

    def weight_grad(A: Tensor) -> tuple[Tensor, Tensor]:
        return cpu.phm_linear_weight_grad(grad, x, A, F, plan)

    dx = _forward_cpu(grad, *_transposed(U, V, W, F), None, None, None, "none")
    return dx, *cpu.factored_weight_grad(weight_grad, x.dtype, U, V, W)


def _grad_cuda(grad: Tensor, x: Tensor, U: Tensor, V: Tensor, W: Tensor, F: Tensor) -> tuple[Tensor, ...]:
    sizes = (len(F), V.shape[1], W.shape[1], len(V), F.numel())
    dtype, capability = gpu.common_dtype((grad, x, F), (U, V, W)), gpu.capability(x.device)
    if plans_cuda.factored_grad(*sizes, dtype, capability) is CudaPlan.COMPOSED:
        return reference.phm_linear_factored_grad(grad, x, U, V, W, F)
    from ..kernels.gpu import phm_linear_factored as driver

    return driver.phm_linear_factored_grad(grad, x, U, V, W, F)


phm_linear_factored = define(
    "phm_linear_factored(Tensor x, Tensor? U, Tensor V, Tensor W, Tensor F, Tensor? bias, Tensor? residual, "
    "Tensor? alpha, str activation) -> Tensor",
    reference.phm_linear_factored,
    _forward_cpu,
    _forward_fake,
    cuda=_forward_cuda,
)
phm_linear_factored_grad = define(
    "phm_linear_factored_grad(Tensor grad, Tensor x, Tensor U, Tensor V, Tensor W, Tensor F) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.phm_linear_factored_grad,
    _grad_cpu,
    like_arguments((1, 2, 3, 4, 5)),
    cuda=_grad_cuda,
)

OP = Operator(phm_linear_factored, _forward_cpu)


def _gradients(grad, x, factors, geometry, of_x, of_factors):
    U, V, W, F = factors
    if not of_factors:
        return (phm_linear_factored(grad, *_transposed(*factors), None, None, None, "none"),)
    if U is None:
        U = torch.eye(len(V), dtype=V.dtype, device=V.device)
    return phm_linear_factored_grad(grad, x, U, V, W, F)


_family = Family(phm_linear_factored, _gradients, channel_dim=-1, factors=4)
register_forward_autograd(_family)
register_gradients_autograd(_family, phm_linear_factored_grad, slots=(1, 2, 3, 4, 5))
register_forward_vmap(_family)
register_vmap_by_sample(phm_linear_factored_grad)
