"""PHYDILinear."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import functional
from .._check import check_divisible, check_integer
from ._base import HypercomplexLayer


class PHYDILinear(HypercomplexLayer):
    r"""Residual parameterized hypercomplex multiplication that starts as the identity.

    .. math:: y = x + \alpha\, (H x + b), \qquad H = \sum_i w_i\, A_i \otimes F_i

    (PHYDI, Eq. 1 and 2), in one fused call. :math:`\alpha` is learned and starts at 0.

    Args:
        features: size of the last dimension of input and output, divisible by n.
        n: the dimension of the algebra.
        bias, algebra_rank, kron_weights, init, learn_algebra, device, dtype: as in :class:`PHMLinear`.

    Parameters: those of :class:`PHMLinear`, and ``alpha (1,)``.

    Shapes: ``(..., features)`` to the same.

    Raises:
        TypeError, ValueError, DecompositionError: as :class:`PHMLinear`.
    """

    alpha: Parameter

    def __init__(
        self,
        features: int,
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
        features = check_divisible("features", features, n)
        super().__init__(
            features,
            features,
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
        self.features = features
        self.alpha = Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew and sets alpha to 0, as the constructor does."""
        super().reset_parameters()
        torch.nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(functional.phm_linear, functional.phm_linear_factored, x, residual=x, alpha=self.alpha)

    def extra_repr(self) -> str:
        return f"features={self.features}, n={self.n}{self._repr_options()}"
