"""Initialisation of A, or of U, V and W, of F and of bias.

The entries of H = sum_i A_i (x) F_i are sums of n products. For independent A and F of mean 0,
Var(H) = n Var(A) Var(F); for a given A, the mean square of H over its entries is Var(F) * mean_kl(sum_i A[i, k, l]^2).

* ``"fan"`` gives H the variance of a dense layer's weight: A normal with variance 1/n, F normal with variance
  v / mean_kl(sum_i A[i, k, l]^2), where v = 2 / (fan_in + fan_out) for a linear layer (Glorot and Bengio, 2010) and
  v = 2 / fan_in for a convolution (He et al., 2015), fan_in = in_channels * kernel positions; an embedding names its v.
* a structure tensor: A starts from it, F follows by the same rule.
* ``"reference"``, as published: xavier_uniform_ on the whole stacks A (n, n, n) and F (n, p, q, ...), whose fans torch
  takes as n*n and n*n, p*q*positions and n*q*positions. So Var(A) = 1/n^2, Var(F) = 2 / (q (p + n) positions) and
  Var(H) = 2 / (fan_in (p + n)): smaller than "fan" by (p + n) / (1 + out_features/in_features) for a linear layer and
  by p + n for a convolution.

With an algebra of R terms, A[i, k, l] = sum_r U[r, i] V[r, k] W[r, l], each rule keeps its variances of A, F and H:

* ``"fan"`` and ``"reference"``: U, V and W normal with standard deviation (Var(A) / R)^(1/6). F compensates any scale
  of A, but the scales decide how fast each is learned, and this leaves them where a layer that learns A has them.
* a structure tensor: its bilinear algorithm of R terms, the three factors of each term with equal norms, so that none
  is learned faster than the others. Where fewer terms suffice, the spare ones have U[r] = 0 and V[r] and W[r] as in
  ``"fan"``: they add nothing to A and receive gradients all the same.

In all of them the bias is uniform in +-1/sqrt(fan_in).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import init as torch_init

from .. import reference
from ..algebra import decompose, generic_rank


def check_init(name: str, init: str | Tensor, n: int) -> str | Tensor:
    """``init`` itself, or a copy of a structure tensor, so that a later change of the caller's does not reach it."""
    allowed = f'"fan", "reference" or a real floating-point tensor of shape (n, n, n) = ({n}, {n}, {n})'
    if isinstance(init, str):
        if init not in ("fan", "reference"):
            raise ValueError(f"{name}={init!r} is not one of {allowed}")
        return init
    return check_structure(name, init, n, allowed)


def check_structure(name: str, A: Any, n: int, allowed: str) -> Tensor:
    """A copy of the structure tensor A (n, n, n); ``allowed`` says in errors what the argument may be."""
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} must be {allowed}, not {type(A).__name__}")
    if not A.is_floating_point():
        raise TypeError(f"{name} has dtype {A.dtype}; it must be {allowed}")
    if A.shape != (n, n, n):
        raise ValueError(f"{name} has shape {tuple(A.shape)}; it must be {allowed}")
    if A.is_meta:
        raise ValueError(f'{name} is on the meta device and holds no values; make it with device="cpu"')
    if not A.isfinite().all() or not A.any():
        raise ValueError(f"{name} must be finite, and not zero everywhere")
    return A.detach().clone()


def check_rank(name: str, rank: Any, n: int) -> int | None:
    """The number of terms R, or None."""
    if rank is None:
        return None
    allowed = f'None, "generic" or an integer from 1 to n*n = {n * n}'
    if isinstance(rank, str):
        if rank != "generic":
            raise ValueError(f"{name}={rank!r} must be {allowed}")
        return generic_rank(n, n, n)
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise TypeError(f"{name}={rank!r} must be {allowed}, not {type(rank).__name__}")
    R = int(rank)
    if not 1 <= R <= n * n:
        raise ValueError(f"{name}={R} must be {allowed}")
    return R


@torch.no_grad()
def initialize(
    algebra: Sequence[Tensor], F: Tensor, bias: Tensor | None, init: str | Tensor, variance: float | None = None
) -> None:
    """Fills ``algebra``, which is A (n, n, n) or U, V and W (R, n), F (n, p, q, *kernel) and bias (n*p,) in place.

    ``variance`` is that of H, where it is not the one of a linear layer or a convolution; "reference" has its own.
    """
    n, p, q, *kernel = F.shape
    fan_in = n * q * math.prod(kernel)
    published = isinstance(init, str) and init == "reference"
    if len(algebra) > 1:
        _initialize_factors(algebra, 1 / n**2 if published else 1 / n, init)
    elif isinstance(init, Tensor):
        algebra[0].copy_(init)
    elif published:
        torch_init.xavier_uniform_(algebra[0])
    else:
        algebra[0].normal_(std=1 / math.sqrt(n))
    if published:
        torch_init.xavier_uniform_(F)
    else:
        if variance is None:
            variance = 2 / fan_in if kernel else 2 / (fan_in + n * p)
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in algebra]
        A = reference.structure(*wide) if len(wide) > 1 else wide[0]
        F.normal_(std=math.sqrt(variance)).mul_(n / torch.linalg.vector_norm(A))
    if bias is not None:
        bound = 1 / math.sqrt(fan_in)
        torch_init.uniform_(bias, -bound, bound)


def _initialize_factors(factors: Sequence[Tensor], variance: float, init: str | Tensor) -> None:
    """Fills U, V and W, with the given variance of A unless it is given."""
    R = len(factors[0])
    std = (variance / R) ** (1 / 6)
    if not isinstance(init, Tensor):
        for t in factors:
            t.normal_(std=std)
        return
    terms = balanced_terms(init, R)
    for t, values in zip(factors, terms, strict=True):
        t.copy_(values)
    spare = spare_terms(terms[0])
    for t in factors[1:]:
        for r in spare:
            t[r].normal_(std=std)


def spare_terms(U: Tensor) -> list[int]:
    """The terms that add nothing to A, and learn where V and W are not zero as well."""
    return (U == 0).all(1).nonzero().flatten().tolist()


def balanced_terms(A: Tensor, R: int) -> tuple[Tensor, ...]:
    """U, V and W of A, in float64 on the CPU, with |U[r]| = |V[r]| = |W[r]|."""
    return _balanced_terms(tuple(A.detach().cpu().double().flatten().tolist()), len(A), R)


# The layers of a model often share their algebra.
@functools.lru_cache(maxsize=16)
def _balanced_terms(entries: tuple[float, ...], n: int, R: int) -> tuple[Tensor, ...]:
    with torch.device("cpu"):
        found = decompose(torch.tensor(entries, dtype=torch.float64).view(n, n, n), R)
    factors = (found.U, found.V, found.W)
    sizes = [t.norm(dim=1, keepdim=True) for t in factors]
    common = math.prod(size.pow(1 / 3) for size in sizes)
    return tuple(torch.where(size > 0, t * (common / size), 0.0) for t, size in zip(factors, sizes, strict=True))
