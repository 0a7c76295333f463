"""phydi::phc_conv{1,2,3}d with phydi::phc_conv{1,2,3}d_input_grad and _weight_grad."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import plans, plans_cuda, reference
from ..kernels import cpu, gpu, phc_conv
from ..plans import Plan
from ..plans_cuda import CudaPlan
from . import phm_linear
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


def pixels(x: Tensor) -> int:
    """Positions of a batch of images."""
    return x.shape[0] * math.prod(x.shape[2:])


def pointwise_sizes(
    x: Tensor, F: Tensor, padding: list[int], entries: int, transposed: bool = False
) -> tuple[bool, int] | None:
    """What plans.py asks of a kernel of one position: whether F is contiguous along q, and what is copied into rows.

    ``entries`` are those of all images; F ``transposed`` for the input's gradient.
    """
    if math.prod(F.shape[3:]) > 1 or any(padding):
        return None
    along, size = (1, F.shape[1]) if transposed else (2, F.shape[2])
    # An image of one pixel is a row as it lies.
    planes = phc_conv.memory_format(x) is torch.contiguous_format and math.prod(x.shape[2:]) != 1
    return size == 1 or F.stride(along) == 1, entries if planes else 0


def _forward_cpu(x, A, F, bias, stride, padding, dilation, residual, alpha, activation):
    args = (x, A, F, bias, stride, padding, dilation, residual, alpha, activation)
    if not cpu.available():
        return reference.phc_conv(*args)
    P = A.shape[1]
    p, q, *kernel = F.shape[1:]
    size = phc_conv.output_size(x.shape[2:], kernel, stride, padding, dilation)
    shape = (len(x), P * p, *size)
    outputs = len(x) * math.prod(size)
    copied = outputs * (x.shape[1] + P * p * (1 if residual is None else 2))
    of_rows = pointwise_sizes(x, F, padding, copied)
    sizes = (pixels(x), outputs, *A.shape, p, q, math.prod(kernel))
    plan = plans.phc_conv(*sizes, x.dtype == torch.bfloat16, of_rows, cpu.isa())
    if plan is not Plan.POINTWISE:
        return phc_conv.phc_conv(*args, plan)

    def linear(rows, residual):
        return phm_linear.OP.on_cpu(rows, A, F.flatten(2), bias, residual, alpha, activation)

    return phc_conv.pointwise(x, shape, linear, stride, [1] * len(stride), residual)


def _input_grad_cpu(grad, A, F, input_size, stride, padding, dilation):
    args = (grad, A, F, input_size, stride, padding, dilation)
    if not cpu.available():
        return reference.phc_conv_input_grad(*args)
    n, P, Q = A.shape
    p, q, *kernel = F.shape[1:]
    count = pixels(grad)
    of_rows = pointwise_sizes(grad, F, padding, count * (Q * q + P * p), transposed=True)
    sizes = (count, count, n, Q, P, q, p, math.prod(kernel))
    plan = plans.phc_conv(*sizes, grad.dtype == torch.bfloat16, of_rows, cpu.isa())
    if plan is not Plan.POINTWISE:
        return phc_conv.phc_conv_input_grad(*args, plan)

    def linear(rows, residual):
        A_transposed, F_transposed = A.transpose(1, 2), F.flatten(2).transpose(1, 2)
        return phm_linear.OP.on_cpu(rows, A_transposed, F_transposed, None, residual, None, "none")

    return phc_conv.pointwise(grad, input_size, linear, [1] * len(stride), stride)


def _weight_grad_cpu(grad, x, A, F, stride, padding, dilation):
    args = (grad, x, A, F, stride, padding, dilation)
    if not cpu.available():
        return reference.phc_conv_weight_grad(*args)
    sizes = (pixels(x), pixels(grad), *A.shape, *F.shape[1:3], math.prod(F.shape[3:]))
    plan = plans.phc_conv_weight_grad(*sizes, x.dtype == torch.bfloat16, cpu.isa())
    return phc_conv.phc_conv_weight_grad(*args, plan)


def _forward_cuda(x, A, F, bias, stride, padding, dilation, residual, alpha, activation):
    args = (x, A, F, bias, stride, padding, dilation, residual, alpha, activation)
    dtype, capability = gpu.common_dtype((x, F, bias, residual, alpha), (A,)), gpu.capability(x.device)
    size = phc_conv.output_size(x.shape[2:], F.shape[3:], stride, padding, dilation)
    outputs = len(x) * math.prod(size)
    plan = plans_cuda.phc_conv(
        outputs, *A.shape, *F.shape[1:3], F.shape[3:], dtype, gpu.tf32(convolution=True), capability
    )
    if plan is CudaPlan.COMPOSED:
        return reference.phc_conv(*args)
    from ..kernels.gpu import phc_conv as driver

    return driver.phc_conv(*args, plan)


def reversed_kernel(F: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> tuple[int, ...]:
    """The kernel of the convolution that is the input's gradient; () where it is none."""
    # With stride 1 it is a convolution of the reversed filters, where these reach over the padding.
    reaches = all(pad <= e * (k - 1) for k, pad, e in zip(F.shape[3:], padding, dilation, strict=True))
    return F.shape[3:] if max(stride) == 1 and reaches else ()


def _input_grad_cuda(grad, A, F, input_size, stride, padding, dilation):
    args = (grad, A, F, input_size, stride, padding, dilation)
    kernel = reversed_kernel(F, stride, padding, dilation)
    dtype, capability = gpu.common_dtype((grad, F), (A,)), gpu.capability(grad.device)
    (n, P, Q), (p, q) = A.shape, F.shape[1:3]
    outputs = input_size[0] * math.prod(input_size[2:])
    plan = plans_cuda.phc_conv(outputs, n, Q, P, q, p, kernel, dtype, gpu.tf32(convolution=True), capability)
    if plan is CudaPlan.COMPOSED:
        return reference.phc_conv_input_grad(*args)
    from ..kernels.gpu import phc_conv as driver

    return driver.phc_conv_input_grad(*args, plan)


def _weight_grad_cuda(grad, x, A, F, stride, padding, dilation):
    args = (grad, x, A, F, stride, padding, dilation)
    dtype, capability = gpu.common_dtype((grad, x, F), (A,)), gpu.capability(x.device)
    if plans_cuda.weight_grad(*A.shape, F.numel(), dtype, capability) is CudaPlan.COMPOSED:
        return reference.phc_conv_weight_grad(*args)
    from ..kernels.gpu import phc_conv as driver

    return driver.phc_conv_weight_grad(*args)


def like_input(implementation):
    """The memory format of the first argument (the input, or the output's gradient) for every result of its rank."""

    def wrapped(x, *args):
        return implementation(x, *args).contiguous(memory_format=phc_conv.memory_format(x))

    return wrapped


@like_input
def _forward_fake(x, A, F, bias, stride, padding, dilation, residual, alpha, activation):
    size = phc_conv.output_size(x.shape[2:], F.shape[3:], stride, padding, dilation)
    return x.new_empty((x.shape[0], A.shape[1] * F.shape[1], *size))


@like_input
def _input_grad_fake(grad, A, F, input_size, stride, padding, dilation):
    return grad.new_empty(input_size)


def _define(d: int) -> Family:
    name = f"phc_conv{d}d"
    geometry = f"SymInt[{d}] stride, SymInt[{d}] padding, SymInt[{d}] dilation"
    forward = define(
        f"{name}(Tensor x, Tensor A, Tensor F, Tensor? bias, {geometry}, "
        "Tensor? residual, Tensor? alpha, str activation) -> Tensor",
        like_input(reference.phc_conv),
        like_input(_forward_cpu),
        _forward_fake,
        cuda=like_input(_forward_cuda),
    )
    input_grad = define(
        f"{name}_input_grad(Tensor grad, Tensor A, Tensor F, SymInt[] input_size, {geometry}) -> Tensor",
        like_input(reference.phc_conv_input_grad),
        like_input(_input_grad_cpu),
        _input_grad_fake,
        cuda=like_input(_input_grad_cuda),
    )
    weight_grad = define(
        f"{name}_weight_grad(Tensor grad, Tensor x, Tensor A, Tensor F, {geometry}) -> (Tensor, Tensor)",
        reference.phc_conv_weight_grad,
        _weight_grad_cpu,
        like_arguments((2, 3)),
        cuda=_weight_grad_cuda,
    )

    def gradients(grad, x, factors, geometry, of_x, of_factors):
        d_x = input_grad(grad, *factors, x.shape, *geometry) if of_x else None
        return (d_x, *weight_grad(grad, x, *factors, *geometry)) if of_factors else (d_x,)

    family = Family(forward, gradients, channel_dim=1, factors=2)
    register_forward_autograd(family)
    register_input_grad_autograd(family, input_grad)
    register_gradients_autograd(family, weight_grad, slots=(2, 3))

    register_forward_vmap(family, fold=True)
    register_vmap_by_sample(input_grad)
    register_vmap_by_sample(weight_grad)
    return family


OPS = {d: _define(d) for d in (1, 2, 3)}
