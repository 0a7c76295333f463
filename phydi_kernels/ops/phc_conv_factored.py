"""phydi::phc_conv{1,2,3}d_factored with phydi::phc_conv{1,2,3}d_factored_input_grad and _grad."""

from __future__ import annotations

import math

import torch

from .. import plans, plans_cuda, reference
from ..kernels import cpu, gpu, phc_conv, phc_conv_factored
from ..kernels.phc_conv import memory_format, output_size
from ..plans import Plan
from ..plans_cuda import CudaPlan
from . import phm_linear_factored
from ._family import (
    Family,
    define,
    like_arguments,
    register_forward_autograd,
    register_forward_vmap,
    register_gradients_autograd,
    register_input_grad_autograd,
    register_vmap_by_sample,
)
from .phc_conv import like_input, pixels, pointwise_sizes, reversed_kernel


def _bfloat16(x):
    return x.dtype == torch.bfloat16


def _forward_cpu(x, U, V, W, F, bias, stride, padding, dilation, residual, alpha, activation):
    args = (x, U, V, W, F, bias, stride, padding, dilation, residual, alpha, activation)
    if not cpu.available():
        return reference.phc_conv_factored(*args)
    (R, P), Q = V.shape, W.shape[1]
    n, p, q, *kernel = F.shape
    size = output_size(x.shape[2:], kernel, stride, padding, dilation)
    outputs, taps = x.shape[0] * math.prod(size), math.prod(kernel)
    row = (stride[-1], size[-1]) if len(size) < 3 else None
    copied = outputs * (Q * q + P * p * (1 if residual is None else 2))
    of_rows = pointwise_sizes(x, F, padding, copied)
    plan = plans.phc_conv_factored(pixels(x), outputs, n, P, Q, p, q, taps, R, _bfloat16(x), row, of_rows, cpu.isa())
    if plan is not Plan.POINTWISE:
        return phc_conv_factored.phc_conv_factored(*args, plan)

    def linear(rows, residual):
        return phm_linear_factored.OP.on_cpu(rows, U, V, W, F.flatten(2), bias, residual, alpha, activation)

    return phc_conv.pointwise(x, (len(x), P * p, *size), linear, stride, [1] * len(stride), residual)


def _plan_of_input_grad(grad, U, V, W, F, input_size, stride, padding, dilation):
    """The arguments of plans.phc_conv_factored for the input's gradient."""
    (R, P), Q = V.shape, W.shape[1]
    n, p, q, *kernel = F.shape
    outputs = pixels(grad)
    row = (1, input_size[-1]) if reversed_kernel(F, stride, padding, dilation) and len(stride) < 3 else None
    of_rows = pointwise_sizes(grad, F, padding, outputs * (Q * q + P * p), transposed=True)
    return outputs, outputs, n, Q, P, q, p, math.prod(kernel), R, _bfloat16(grad), row, of_rows


def _input_grad_cpu(grad, U, V, W, F, input_size, stride, padding, dilation):
    args = (grad, U, V, W, F, input_size, stride, padding, dilation)
    if not cpu.available():
        return reference.phc_conv_factored_input_grad(*args)
    plan = plans.phc_conv_factored(*_plan_of_input_grad(*args), cpu.isa())
    if plan is not Plan.POINTWISE:
        return phc_conv_factored.phc_conv_factored_input_grad(*args, plan)

    def linear(rows, residual):
        F_transposed = F.flatten(2).transpose(1, 2)
        return phm_linear_factored.OP.on_cpu(rows, U, W, V, F_transposed, None, residual, None, "none")

    return phc_conv.pointwise(grad, input_size, linear, [1] * len(stride), stride)


def _gradients_cpu(grad, x, U, V, W, F, stride, padding, dilation):
    args = (grad, x, U, V, W, F, stride, padding, dilation)
    if not cpu.available():
        return reference.phc_conv_factored_grad(*args)
    of_input = (grad, U, V, W, F, list(x.shape), stride, padding, dilation)
    *sizes, row, of_rows = _plan_of_input_grad(*of_input)
    outputs, _, n, Q, P, q, p, taps, R, bfloat16 = sizes
    plan = plans.phc_conv_factored_grad(pixels(x), outputs, n, P, Q, p, q, taps, R, bfloat16, row, of_rows, cpu.isa())
    if plan is Plan.RANK:
        return phc_conv_factored.phc_conv_factored_grad(*args)
    if plan is Plan.POINTWISE:
        grad_rows = phc_conv.pointwise_rows(grad, [1] * len(stride))
        d_rows, *of_factors, d_F = phm_linear_factored.phm_linear_factored_grad(
            grad_rows, phc_conv.pointwise_rows(x, stride), U, V, W, F.flatten(2)
        )
        return phc_conv.image_of_rows(d_rows, x.shape, stride, memory_format(x)), *of_factors, d_F.view(F.shape)
    d_x = _input_grad_cpu(*of_input)
    return d_x, *phc_conv_factored.phc_conv_factored_weight_grad(*args)


def _forward_cuda(x, U, V, W, F, bias, stride, padding, dilation, residual, alpha, activation):
    args = (x, U, V, W, F, bias, stride, padding, dilation, residual, alpha, activation)
    (R, P), Q = V.shape, W.shape[1]
    n, p, q, *kernel = F.shape
    outputs = len(x) * math.prod(output_size(x.shape[2:], kernel, stride, padding, dilation))
    dtype, capability = gpu.common_dtype((x, F, bias, residual, alpha), (U, V, W)), gpu.capability(x.device)
    sizes = (pixels(x), outputs, n, P, Q, p, q, F.shape[3:], R)
    plan = plans_cuda.phc_conv_factored(*sizes, U is not None, dtype, gpu.tf32(convolution=True), capability)
    if plan is CudaPlan.COMPOSED:
        return reference.phc_conv_factored(*args)
    from ..kernels.gpu import phc_conv_factored as driver

    return driver.phc_conv_factored(*args, plan)


def _input_grad_cuda(grad, U, V, W, F, input_size, stride, padding, dilation):
    args = (grad, U, V, W, F, input_size, stride, padding, dilation)
    (R, P), Q = V.shape, W.shape[1]
    n, p, q = F.shape[:3]
    count = input_size[0] * math.prod(input_size[2:])
    dtype, capability = gpu.common_dtype((grad, F), (U, V, W)), gpu.capability(grad.device)
    sizes = (pixels(grad), count, n, Q, P, q, p, reversed_kernel(F, stride, padding, dilation), R)
    plan = plans_cuda.phc_conv_factored(*sizes, U is not None, dtype, gpu.tf32(convolution=True), capability)
    if plan is CudaPlan.COMPOSED:
        return reference.phc_conv_factored_input_grad(*args)
    from ..kernels.gpu import phc_conv_factored as driver

    return driver.phc_conv_factored_input_grad(*args, plan)


def _gradients_cuda(grad, x, U, V, W, F, stride, padding, dilation):
    args = (grad, x, U, V, W, F, stride, padding, dilation)
    sizes = (len(F), V.shape[1], W.shape[1], len(V), F.numel())
    dtype, capability = gpu.common_dtype((grad, x, F), (U, V, W)), gpu.capability(x.device)
    if plans_cuda.factored_grad(*sizes, dtype, capability) is CudaPlan.COMPOSED:
        return reference.phc_conv_factored_grad(*args)
    from ..kernels.gpu import phc_conv_factored as driver

    return driver.phc_conv_factored_grad(*args)


def _gradients_like_input(implementation):
    """The memory format of the input for its gradient; the others contiguous."""

    def wrapped(grad, x, *args):
        dx, *rest = implementation(grad, x, *args)
        return dx.contiguous(memory_format=memory_format(x)), *(t.contiguous() for t in rest)

    return wrapped


@like_input
def _forward_fake(x, U, V, W, F, bias, stride, padding, dilation, residual, alpha, activation):
    size = output_size(x.shape[2:], F.shape[3:], stride, padding, dilation)
    return x.new_empty((x.shape[0], V.shape[1] * F.shape[1], *size))


@like_input
def _input_grad_fake(grad, U, V, W, F, input_size, stride, padding, dilation):
    return grad.new_empty(input_size)


def _define(d: int) -> Family:
    name = f"phc_conv{d}d_factored"
    geometry = f"SymInt[{d}] stride, SymInt[{d}] padding, SymInt[{d}] dilation"
    forward = define(
        f"{name}(Tensor x, Tensor? U, Tensor V, Tensor W, Tensor F, Tensor? bias, {geometry}, "
        "Tensor? residual, Tensor? alpha, str activation) -> Tensor",
        like_input(reference.phc_conv_factored),
        like_input(_forward_cpu),
        _forward_fake,
        cuda=like_input(_forward_cuda),
    )
    input_grad = define(
        f"{name}_input_grad(Tensor grad, Tensor? U, Tensor V, Tensor W, Tensor F, SymInt[] input_size, {geometry}) "
        "-> Tensor",
        like_input(reference.phc_conv_factored_input_grad),
        like_input(_input_grad_cpu),
        _input_grad_fake,
        cuda=like_input(_input_grad_cuda),
    )
    gradients = define(
        f"{name}_grad(Tensor grad, Tensor x, Tensor U, Tensor V, Tensor W, Tensor F, {geometry}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _gradients_like_input(reference.phc_conv_factored_grad),
        _gradients_like_input(_gradients_cpu),
        _gradients_like_input(like_arguments((1, 2, 3, 4, 5))),
        cuda=_gradients_like_input(_gradients_cuda),
    )

    def form_gradients(grad, x, factors, geometry, of_x, of_factors):
        U, V, W, F = factors
        if not of_factors:
            return (input_grad(grad, *factors, x.shape, *geometry),)
        if U is None:
            U = torch.eye(len(V), dtype=V.dtype, device=V.device)
        return gradients(grad, x, U, V, W, F, *geometry)

    family = Family(forward, form_gradients, channel_dim=1, factors=4)
    register_forward_autograd(family)
    register_input_grad_autograd(family, input_grad)
    register_gradients_autograd(family, gradients, slots=(1, 2, 3, 4, 5))

    register_forward_vmap(family, fold=True)
    register_vmap_by_sample(input_grad)
    register_vmap_by_sample(gradients)
    return family


OPS = {d: _define(d) for d in (1, 2, 3)}
