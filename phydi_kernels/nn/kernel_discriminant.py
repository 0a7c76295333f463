"""KernelDiscriminant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import functional
from .._gda import BLOCK_ENTRIES, float32_under_autocast
from ..ops._autograd import without_autocast


class KernelDiscriminant(Module):
    r"""The features of a kernel discriminant analysis, as a layer (GDA, Eq. 14).

    .. math:: y_m = \sum_i A_{im}\, K(p_i, x)

    Args:
        points: the training points p ``(N, d)``.
        coefficients: A ``(N, l)``, of :func:`functional.gda_solve` for the kernel matrix of ``points``.
        kernel, gamma, degree, coef0, lengthscale, nu: as in :func:`functional.kernel_matrix`.

    Buffers: ``points``, ``coefficients`` and ``lengthscale``, which move, save and load with the model; nothing is
    trained, and gradients flow to the input. ``KernelDiscriminant.from_estimator`` takes them from a fitted
    ``KernelDiscriminantAnalysis``.

    Call: x ``(..., d)`` returns ``(..., l)``. Without gradients the rows of x are taken in blocks, so that at most
    2^22 kernel values are held at a time.

    Raises:
        TypeError, ValueError: points and coefficients that do not fit, or what ``kernel_matrix`` raises.
    """

    points: Tensor
    coefficients: Tensor
    lengthscale: Tensor | None

    def __init__(
        self,
        points: Tensor,
        coefficients: Tensor,
        *,
        kernel: str = "rbf",
        gamma: float | None = None,
        degree: int = 3,
        coef0: float = 1.0,
        lengthscale: Any = None,
        nu: float = 1.5,
    ) -> None:
        super().__init__()
        for name, t in (("points", points), ("coefficients", coefficients)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, not {type(t).__name__}")
        if points.dim() != 2 or coefficients.dim() != 2 or len(points) != len(coefficients):
            raise ValueError(
                f"points have shape {tuple(points.shape)} and coefficients {tuple(coefficients.shape)}; "
                "they must be (N, d) and (N, l)"
            )
        if points.dtype != coefficients.dtype:
            raise TypeError(f"points have dtype {points.dtype} and coefficients {coefficients.dtype}; both must agree")
        self.register_buffer("points", points.detach().clone())
        self.register_buffer("coefficients", coefficients.detach().clone())
        scale = None if lengthscale is None else torch.as_tensor(lengthscale, dtype=points.dtype, device=points.device)
        self.register_buffer("lengthscale", scale)
        self.kernel, self.gamma, self.degree, self.coef0, self.nu = kernel, gamma, degree, coef0, nu
        self._project(self.points[:1])

    @classmethod
    def from_estimator(cls, estimator: Any) -> KernelDiscriminant:
        """The transformation of a fitted KernelDiscriminantAnalysis (or the best one of a CV) with a named kernel."""
        fitted = getattr(estimator, "best_estimator_", estimator)
        if not hasattr(fitted, "kernel") or not hasattr(fitted, "coefficients_"):
            raise TypeError(f"estimator={estimator!r} must be a fitted KernelDiscriminantAnalysis")
        if callable(fitted.kernel) or fitted.kernel == "precomputed":
            raise ValueError(f"kernel={fitted.kernel!r} of the estimator must be the name of a kernel")
        return cls(
            torch.as_tensor(fitted.X_fit_),
            torch.as_tensor(fitted.coefficients_),
            kernel=fitted.kernel,
            gamma=getattr(fitted, "gamma_", None),
            degree=fitted.degree,
            coef0=fitted.coef0,
            lengthscale=fitted.lengthscale,
            nu=fitted.nu,
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.points.shape[1:]:
            raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be d = {self.points.shape[1]}")
        x = float32_under_autocast(x)
        if x.dtype != self.points.dtype:
            raise TypeError(f"x has dtype {x.dtype} but the layer's points have {self.points.dtype}")
        rows = x.reshape(-1, x.shape[-1])
        blocks: tuple[Tensor, ...] = (rows,)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            blocks = rows.split(max(1, BLOCK_ENTRIES // max(1, len(self.points))))
        with without_autocast(x.device):
            projected = [self._project(block) for block in blocks]
        y = projected[0] if len(projected) == 1 else torch.cat(projected)
        return y.reshape(*x.shape[:-1], self.coefficients.shape[1])

    def _project(self, x: Tensor) -> Tensor:
        K = functional.kernel_matrix(
            x,
            self.points,
            kernel=self.kernel,
            gamma=self.gamma,
            degree=self.degree,
            coef0=self.coef0,
            lengthscale=self.lengthscale,
            nu=self.nu,
        )
        return K @ self.coefficients

    def extra_repr(self) -> str:
        return (
            f"points={tuple(self.points.shape)}, components={self.coefficients.shape[1]}, kernel={self.kernel!r}, "
            f"gamma={self.gamma}"
        )
