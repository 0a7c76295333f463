"""Structure tensors A (n, n, n): ``A[i, k, l]`` is the coefficient of e_k in the product e_i * e_l.

With x and y split into n blocks, a layer with H = sum_i A_i (x) F_i (PHYDI, Eq. 1) then multiplies from the left by
the hypercomplex number whose parts are the F_i: y = w * x. The real unit is e_0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._check import check_integer


def complex_numbers(*, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """The complex numbers, basis (1, i): H = [[F_0, -F_1], [F_1, F_0]].

    Args:
        dtype: of the result.
        device: of the result.

    Returns:
        ``(2, 2, 2)``.
    """
    return _placed(_cayley_dickson(1), dtype, device)


def quaternions(*, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """The quaternions, basis (1, i, j, k) with i j = k: H is the Hamilton product from the left.

    Args:
        dtype: of the result.
        device: of the result.

    Returns:
        ``(4, 4, 4)``.
    """
    return _placed(_cayley_dickson(2), dtype, device)


def octonions(*, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """The octonions, basis (1, i, j, k, l, il, jl, kl), by Cayley-Dickson doubling of the quaternions.

    Not associative, so H(v) H(w) is not H(v * w); the norm is multiplicative all the same.

    Args:
        dtype: of the result.
        device: of the result.

    Returns:
        ``(8, 8, 8)``.
    """
    return _placed(_cayley_dickson(3), dtype, device)


def clifford(p: int, q: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """The Clifford algebra Cl(p, q): p generators with square +1, then q with square -1, any two anticommuting.

    Basis element b is the product, in ascending order, of the generators whose bit is set in b: (1, e1, e2, e1 e2, e3,
    ...). Cl(0, 1) are the complex numbers and Cl(0, 2) the quaternions, in the bases used here.

    Args:
        p: number of generators with square +1.
        q: number of generators with square -1.
        dtype: of the result.
        device: of the result.

    Returns:
        ``(n, n, n)`` with n = 2**(p + q).

    Raises:
        TypeError: p or q is not an integer.
        ValueError: p or q is negative.
    """
    p, q = check_integer("p", p, least=0), check_integer("q", q, least=0)
    n = 1 << (p + q)
    negative = n - (1 << p)
    A = torch.zeros(n, n, n, dtype=torch.float64, device="cpu")
    for i in range(n):
        for j in range(n):
            # Each generator of j passes the higher ones of i; the shared ones of negative square change sign again.
            swaps = sum((i >> s & j).bit_count() for s in range(1, p + q))
            A[i, i ^ j, j] = -1.0 if (swaps + (i & j & negative).bit_count()) % 2 else 1.0
    return _placed(A, dtype, device)


def random(
    n: int,
    P: int,
    Q: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random structure tensor with independent normal entries of mean 0 and variance 1/n.

    The mean over (k, l) of sum_i A[i, k, l]^2 then is 1, as it is for the known algebras, and the entries of
    H = sum_i A_i (x) F_i have the variance of F.

    Args:
        n: number of terms.
        P: output blocks.
        Q: input blocks.
        generator: source of random numbers, on ``device``.
        dtype: of the result.
        device: of the result.

    Returns:
        ``(n, P, Q)``.

    Raises:
        TypeError: n, P or Q is not an integer.
        ValueError: n, P or Q is below 1.
    """
    shape = [check_integer(name, value) for name, value in (("n", n), ("P", P), ("Q", Q))]
    return torch.randn(shape, generator=generator, dtype=dtype, device=device) / math.sqrt(n)


def _placed(A: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    return A.to(dtype=dtype, device=torch.get_default_device() if device is None else device)


def _cayley_dickson(doublings: int) -> Tensor:
    """The real numbers doubled: (a, b)(c, d) = (a c - d* b, d a + b c*)."""
    A = torch.ones(1, 1, 1, dtype=torch.float64, device="cpu")
    for _ in range(doublings):
        n = A.shape[0]
        conjugate = torch.tensor([1.0] + [-1.0] * (n - 1), dtype=torch.float64, device="cpu")
        swapped = A.transpose(0, 2)
        double = A.new_zeros(2 * n, 2 * n, 2 * n)
        double[:n, :n, :n] = A
        double[n:, :n, n:] = -swapped * conjugate
        double[:n, n:, n:] = swapped
        double[n:, n:, :n] = A * conjugate
        A = double
    return A
