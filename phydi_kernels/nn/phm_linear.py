"""PHMLinear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from .._check import check_divisible, check_integer
from ._base import HypercomplexLayer


class PHMLinear(HypercomplexLayer):
    r"""Parameterized hypercomplex multiplication: a linear layer with 1/n of the parameters.

    .. math:: y = H x + b, \qquad H = \sum_i w_i\, A_i \otimes F_i

    (PHYDI, Eq. 1). See :func:`phydi_kernels.functional.phm_linear`, and with ``algebra_rank``
    :func:`phydi_kernels.functional.phm_linear_factored`.

    Args:
        in_features: size of the input's last dimension, divisible by n.
        out_features: size of the output's last dimension, divisible by n.
        n: the dimension of the algebra.
        bias: adds b.
        algebra_rank: R from 1 to n*n learns an algebra of R terms, :math:`A_{ikl} = \sum_r U_{ri} V_{rk} W_{rl}`, in
            place of A: forward and backward take R/n^2 of the dense layer's multiplications. ``"generic"`` is
            ``algebra.generic_rank(n, n, n)``, 7 for n = 4, with which almost every A can be reached; with fewer terms
            not all can. None learns A.
        kron_weights: learns one factor w_i a term, starting at 1 (weighted Kronecker products, WKP); else w_i = 1.
        init: ``"fan"`` keeps Var(H) = 2 / (in_features + out_features); ``"reference"`` is the published
            xavier_uniform_ on whole stacks, with a smaller Var(H) = 2 / (in_features (out_features/n + n)); a
            structure tensor ``(n, n, n)``, such as ``algebra.quaternions()``, starts A from it with the Var(H) of
            ``"fan"``. With ``algebra_rank``, the first two draw U, V and W so that A has the same variance, and a
            structure tensor is decomposed (:func:`phydi_kernels.algebra.decompose`); the quaternions need 8 terms.
        learn_algebra: False keeps A, or U, V and W, as initialised: their ``requires_grad`` is False, and they stay in
            the state_dict.
        device: of the parameters.
        dtype: of the parameters; inputs must have the same.

    Parameters: ``A (n, n, n)``, or ``U``, ``V`` and ``W`` ``(R, n)``, ``F (n, out_features/n, in_features/n)``,
    ``bias (out_features,)``, ``kron_weights (n,)``. All terms add into block row k and block column l as
    ``A[i, k, l] * F[i]``.

    Shapes: ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        TypeError: a size or ``algebra_rank`` that is not an integer, a dtype that is not real floating point, or
            ``init`` of another type.
        ValueError: a size below 1 or not divisible by n, ``algebra_rank`` out of range, an unknown ``init``, or a
            structure tensor that is not ``(n, n, n)``, not finite, or zero.
        DecompositionError: no algorithm of ``algebra_rank`` terms was found for the structure tensor in ``init``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        bias: bool = True,
        *,
        algebra_rank: int | str | None = None,
        kron_weights: bool = False,
        init: str | Tensor = "fan",
        learn_algebra: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        n = check_integer("n", n)
        in_features = check_divisible("in_features", in_features, n)
        out_features = check_divisible("out_features", out_features, n)
        super().__init__(
            in_features,
            out_features,
            n,
            (),
            bias,
            algebra_rank=algebra_rank,
            kron_weights=kron_weights,
            init=init,
            learn_algebra=learn_algebra,
            device=device,
            dtype=dtype,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.reset_parameters()

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, alpha: Tensor | None = None, activation: str = "none"
    ) -> Tensor:
        """y = residual + alpha * act(H x + b), as :func:`phydi_kernels.functional.phm_linear`, in one fused call."""
        epilogue: dict[str, Any] = {"residual": residual, "alpha": alpha, "activation": activation}
        return self._product(functional.phm_linear, functional.phm_linear_factored, x, **epilogue)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, n={self.n}{self._repr_options()}"
