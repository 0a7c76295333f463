"""Initialisation of A, F and bias.

The entries of H = sum_i A_i (x) F_i are sums of n products. For independent A and F of mean 0,
Var(H) = n Var(A) Var(F); for a given A, the mean square of H over its entries is Var(F) * mean_kl(sum_i A[i, k, l]^2).

* ``"fan"`` gives H the variance of a dense layer's weight: A normal with variance 1/n, F normal with variance
  v / mean_kl(sum_i A[i, k, l]^2), where v = 2 / (fan_in + fan_out) for a linear layer (Glorot and Bengio, 2010) and
  v = 2 / fan_in for a convolution (He et al., 2015), fan_in = in_channels * kernel positions.
* a structure tensor: A starts from it, F follows by the same rule.
* ``"reference"``, as published: xavier_uniform_ on the whole stacks A (n, n, n) and F (n, p, q, ...), whose fans torch
  takes as n*n and n*n, p*q*positions and n*q*positions. So Var(A) = 1/n^2, Var(F) = 2 / (q (p + n) positions) and
  Var(H) = 2 / (fan_in (p + n)): smaller than "fan" by (p + n) / (1 + out_features/in_features) for a linear layer and
  by p + n for a convolution.

In all of them the bias is uniform in +-1/sqrt(fan_in).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import init as torch_init


def check_init(name: str, init: str | Tensor, n: int) -> str | Tensor:
    """``init`` itself, or a copy of a structure tensor, so that a later change of the caller's does not reach it."""
    allowed = f'"fan", "reference" or a real floating-point tensor of shape (n, n, n) = ({n}, {n}, {n})'
    if isinstance(init, str):
        if init not in ("fan", "reference"):
            raise ValueError(f"{name}={init!r} is not one of {allowed}")
        return init
    if not isinstance(init, Tensor):
        raise TypeError(f"{name} must be {allowed}, not {type(init).__name__}")
    if not init.is_floating_point():
        raise TypeError(f"{name} has dtype {init.dtype}; it must be {allowed}")
    if init.shape != (n, n, n):
        raise ValueError(f"{name} has shape {tuple(init.shape)}; it must be {allowed}")
    if init.is_meta:
        raise ValueError(f'{name} is on the meta device and holds no values; make it with device="cpu"')
    if not init.isfinite().all() or not init.any():
        raise ValueError(f"{name} must be finite, and not zero everywhere")
    return init.detach().clone()


def initialize(A: Tensor, F: Tensor, bias: Tensor | None, init: str | Tensor) -> None:
    """Fills A (n, P, Q), F (n, p, q, *kernel) and bias (P*p,) in place."""
    n, P, Q = A.shape
    _, p, q, *kernel = F.shape
    fan_in = Q * q * math.prod(kernel)
    if isinstance(init, str) and init == "reference":
        torch_init.xavier_uniform_(A)
        torch_init.xavier_uniform_(F)
    else:
        with torch.no_grad():
            if isinstance(init, Tensor):
                A.copy_(init)
            else:
                A.normal_(std=1 / math.sqrt(n))
            variance = 2 / fan_in if kernel else 2 / (fan_in + P * p)
            norm = torch.linalg.vector_norm(A, dtype=torch.promote_types(A.dtype, torch.float32))
            F.normal_(std=math.sqrt(variance)).mul_(math.sqrt(P * Q) / norm)
    if bias is not None:
        bound = 1 / math.sqrt(fan_in)
        torch_init.uniform_(bias, -bound, bound)
