"""phydi::phc_conv{1,2,3}d with phydi::phc_conv{1,2,3}d_input_grad and _weight_grad."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import plans, reference
from ..kernels import cpu, phc_conv
from ._family import (
    Family,
    define,
    each_sample,
    leading,
    like_arguments,
    register_forward_autograd,
    register_gradients_autograd,
    register_input_grad_autograd,
)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * math.prod(x.shape[2:])


def _forward_cpu(x, A, F, bias, stride, padding, dilation, residual, alpha, activation):
    args = (x, A, F, bias, stride, padding, dilation, residual, alpha, activation)
    if not cpu.available():
        return reference.phc_conv(*args)
    p, q, *kernel = F.shape[1:]
    outputs = x.shape[0] * math.prod(phc_conv.output_size(x.shape[2:], kernel, stride, padding, dilation))
    return phc_conv.phc_conv(*args, plans.phc_conv(_pixels(x), outputs, *A.shape, p, q, math.prod(kernel)))


def _input_grad_cpu(grad, A, F, input_size, stride, padding, dilation):
    args = (grad, A, F, input_size, stride, padding, dilation)
    if not cpu.available():
        return reference.phc_conv_input_grad(*args)
    n, P, Q = A.shape
    p, q, *kernel = F.shape[1:]
    pixels = _pixels(grad)
    return phc_conv.phc_conv_input_grad(*args, plans.phc_conv(pixels, pixels, n, Q, P, q, p, math.prod(kernel)))


def _weight_grad_cpu(*args):
    return (phc_conv if cpu.available() else reference).phc_conv_weight_grad(*args)


def _like_input(implementation):
    """The memory format of the first argument (the input, or the output's gradient) for every result of its rank."""

    def wrapped(x, *args):
        return implementation(x, *args).contiguous(memory_format=phc_conv.memory_format(x))

    return wrapped


def _forward_fake(x, A, F, bias, stride, padding, dilation, residual, alpha, activation):
    size = phc_conv.output_size(x.shape[2:], F.shape[3:], stride, padding, dilation)
    y = x.new_empty((x.shape[0], A.shape[1] * F.shape[1], *size))
    return y.contiguous(memory_format=phc_conv.memory_format(x))


def _input_grad_fake(grad, A, F, input_size, stride, padding, dilation):
    return grad.new_empty(input_size).contiguous(memory_format=phc_conv.memory_format(grad))


def _define(d: int) -> Family:
    name = f"phc_conv{d}d"
    geometry = f"SymInt[{d}] stride, SymInt[{d}] padding, SymInt[{d}] dilation"
    forward = define(
        f"{name}(Tensor x, Tensor A, Tensor F, Tensor? bias, {geometry}, "
        "Tensor? residual, Tensor? alpha, str activation) -> Tensor",
        _like_input(reference.phc_conv),
        _like_input(_forward_cpu),
        _forward_fake,
    )
    input_grad = define(
        f"{name}_input_grad(Tensor grad, Tensor A, Tensor F, SymInt[] input_size, {geometry}) -> Tensor",
        _like_input(reference.phc_conv_input_grad),
        _like_input(_input_grad_cpu),
        _input_grad_fake,
    )
    weight_grad = define(
        f"{name}_weight_grad(Tensor grad, Tensor x, Tensor A, Tensor F, {geometry}) -> (Tensor, Tensor)",
        reference.phc_conv_weight_grad,
        _weight_grad_cpu,
        like_arguments((2, 3)),
    )

    def gradients(grad, x, factors, geometry, of_x, of_factors):
        d_x = input_grad(grad, *factors, x.shape, *geometry) if of_x else None
        return (d_x, *weight_grad(grad, x, *factors, *geometry)) if of_factors else (d_x,)

    family = Family(forward, gradients, channel_dim=1, factors=2)
    register_forward_autograd(family)
    register_input_grad_autograd(family, input_grad)
    register_gradients_autograd(family, weight_grad, slots=(2, 3))

    @torch.library.register_vmap(f"phydi::{name}")
    def forward_vmap(info, in_dims, x, A, F, bias, stride, padding, dilation, residual, alpha, activation):
        args = (x, A, F, bias, stride, padding, dilation, residual, alpha, activation)
        if any(in_dims[i] is not None for i in (1, 2, 3, 8)):
            return each_sample(forward, info, in_dims, args)
        x = leading(x, in_dims[0], info.batch_size)
        residual = leading(residual, in_dims[7], info.batch_size)
        folded = None if residual is None else residual.flatten(0, 1)
        y = forward(x.flatten(0, 1), A, F, bias, stride, padding, dilation, folded, alpha, activation)
        return y.unflatten(0, (info.batch_size, x.shape[1])), 0

    for op, suffix in ((input_grad, "_input_grad"), (weight_grad, "_weight_grad")):

        @torch.library.register_vmap(f"phydi::{name}{suffix}")
        def gradient_vmap(info, in_dims, *args, op=op):
            return each_sample(op, info, in_dims, args)

    return family


OPS = {d: _define(d) for d in (1, 2, 3)}
