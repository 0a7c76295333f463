"""DiscriminantLoss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module

from .. import functional


class DiscriminantLoss(Module):
    r"""Minus the discriminant criterion of a batch (GDA, Eq. 2): trains features that separate their classes.

    .. math:: \mathrm{loss} = -\mathrm{Tr}\{(S_w + \tau I)^{-1} S_b\}
              \quad \text{or} \quad -\log\det(I + (S_w + \tau I)^{-1} S_b)

    Differentiated through one linear solve, not through eigenvectors. See :func:`functional.discriminant_criterion` for
    the scatter matrices S_w and S_b, the arguments, and the errors.

    Args:
        num_classes: L.
        tau, c_allow, tau_min, weighting, kind: as in :func:`functional.discriminant_criterion`.

    Call: ``loss(features (N, d), labels (N,))`` returns a scalar. Batches much smaller than d + L give S_w little rank;
    a larger tau, or smaller c_allow, then keeps the loss smooth.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        tau: float | None = None,
        c_allow: float = 1e4,
        tau_min: float = 1e-6,
        weighting: str = "standard",
        kind: str = "trace",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.tau = tau
        self.c_allow = c_allow
        self.tau_min = tau_min
        self.weighting = weighting
        self.kind = kind

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return -functional.discriminant_criterion(
            features,
            labels,
            self.num_classes,
            tau=self.tau,
            c_allow=self.c_allow,
            tau_min=self.tau_min,
            weighting=self.weighting,
            kind=self.kind,
        )

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, tau={self.tau}, weighting={self.weighting!r}, kind={self.kind!r}"
