"""phydi::phc_conv{1,2,3}d_factored with phydi::phc_conv{1,2,3}d_factored_input_grad and _grad."""

from __future__ import annotations

import math

import torch

from .. import plans, reference
from ..kernels import cpu, phc_conv_factored
from ..kernels.phc_conv import memory_format, output_size
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
from .phc_conv import like_input, pixels


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
    plan = plans.phc_conv_factored(pixels(x), outputs, n, P, Q, p, q, taps, R, _bfloat16(x), row)
    return phc_conv_factored.phc_conv_factored(*args, plan)


def _input_grad_cpu(grad, U, V, W, F, input_size, stride, padding, dilation):
    args = (grad, U, V, W, F, input_size, stride, padding, dilation)
    if not cpu.available():
        return reference.phc_conv_factored_input_grad(*args)
    (R, P), Q = V.shape, W.shape[1]
    n, p, q, *kernel = F.shape
    outputs = pixels(grad)
    plan = plans.phc_conv_factored(outputs, outputs, n, Q, P, q, p, math.prod(kernel), R, _bfloat16(grad))
    return phc_conv_factored.phc_conv_factored_input_grad(*args, plan)


def _gradients_cpu(grad, x, U, V, W, F, stride, padding, dilation):
    args = (grad, x, U, V, W, F, stride, padding, dilation)
    if not cpu.available():
        return reference.phc_conv_factored_grad(*args)
    (R, P), Q = V.shape, W.shape[1]
    n, p, q, *kernel = F.shape
    taps = math.prod(kernel)
    plan = plans.phc_conv_factored_grad(pixels(x), pixels(grad), n, P, Q, p, q, taps, R, _bfloat16(x))
    return phc_conv_factored.phc_conv_factored_grad(*args, plan)


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
    )
    input_grad = define(
        f"{name}_input_grad(Tensor grad, Tensor? U, Tensor V, Tensor W, Tensor F, SymInt[] input_size, {geometry}) "
        "-> Tensor",
        like_input(reference.phc_conv_factored_input_grad),
        like_input(_input_grad_cpu),
        _input_grad_fake,
    )
    gradients = define(
        f"{name}_grad(Tensor grad, Tensor x, Tensor U, Tensor V, Tensor W, Tensor F, {geometry}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _gradients_like_input(reference.phc_conv_factored_grad),
        _gradients_like_input(_gradients_cpu),
        _gradients_like_input(like_arguments((1, 2, 3, 4, 5))),
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
