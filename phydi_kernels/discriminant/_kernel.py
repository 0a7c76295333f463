"""What the kernel estimators share: their parameters, and kernel matrices of arrays, callables and given matrices."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._gda import KERNELS
from ..functional import kernel_matrix
from ._base import Discriminant, Training, to_tensor


class KernelEstimator(Discriminant):
    """A discriminant on the rows of a kernel matrix. A subclass has the parameters of ``functional.kernel_matrix``."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = isinstance(self.kernel, str) and self.kernel == "precomputed"
        tags.input_tags.positive_only = isinstance(self.kernel, str) and self.kernel == "chi2"
        return tags

    def _given_matrix(self) -> bool:
        """Whether X is the kernel matrix itself. TypeError, ValueError for a kernel that is none."""
        if callable(self.kernel):
            return False
        if not isinstance(self.kernel, str):
            raise TypeError(f"kernel={self.kernel!r} must be a name or a callable, not {type(self.kernel).__name__}")
        if self.kernel not in (*KERNELS, "precomputed"):
            names = ", ".join(map(repr, KERNELS))
            raise ValueError(f"kernel={self.kernel!r} is not one of {names}, 'precomputed' or a callable")
        return self.kernel == "precomputed"

    def _has_gamma(self) -> bool:
        """Whether the kernel depends on a gamma."""
        if self.kernel in ("rbf", "laplacian", "matern"):
            return self.lengthscale is None
        return self.kernel in ("poly", "sigmoid", "chi2")

    def _named_kernel(self, X: Tensor, Y: Tensor | None, gamma: Any) -> Tensor:
        lengthscale = self.lengthscale
        return kernel_matrix(
            X,
            Y,
            kernel=self.kernel,
            gamma=gamma,
            degree=self.degree,
            coef0=self.coef0,
            lengthscale=lengthscale.to(X) if isinstance(lengthscale, Tensor) else lengthscale,
            nu=self.nu,
        )

    def _called_kernel(self, X: Tensor, Y: Tensor, numpy: bool) -> Tensor:
        """The kernel of a callable, which sees arrays of the type that fit keeps."""
        K = self.kernel(X.numpy(), Y.numpy()) if numpy else self.kernel(X, Y)
        if tuple(np.shape(K)) != (len(X), len(Y)):
            raise ValueError(f"kernel(X, Y) returned shape {tuple(np.shape(K))}; ({len(X)}, {len(Y)}) is needed")
        return to_tensor(K if isinstance(K, Tensor) else np.asarray(K), X.dtype, X.device)

    def _training_matrix(self, data: Training, gamma: Any) -> Tensor:
        """K (N, N) of the training samples, or (G, N, N) for a vector of G gammas."""
        if self._given_matrix():
            K = data.X
            if K.shape[0] != K.shape[1]:
                raise ValueError(f'X has shape {tuple(K.shape)}; for kernel="precomputed" fit needs a square matrix')
        elif callable(self.kernel):
            K = self._called_kernel(data.X, data.X, data.numpy)
        else:
            if self.kernel == "chi2" and bool((data.X < 0).any()):
                raise ValueError(
                    f"Negative values in data: the least entry of X is {data.X.min().item():.3g}, and "
                    'kernel="chi2" needs entries >= 0'
                )
            K = self._named_kernel(data.X, None, gamma)
        if not bool(K.isfinite().all()):
            raise ValueError(f"The matrix of kernel={self.kernel!r} has NaN or infinite entries; all must be finite")
        if bool((K.diagonal(dim1=-2, dim2=-1) < 0).any()):
            warnings.warn(
                f"The matrix of kernel={self.kernel!r} has a negative entry on its diagonal, so it is not positive "
                "semi-definite. G_w = K D_w K + tau I is, but the projection is not one in a feature space",
                UserWarning,
                stacklevel=4,
            )
        return K


def gamma_value(gamma: Any, data: Training) -> float:
    """The parameter ``gamma`` as a number: 1/d for None, 1 / (d Var X) for "scale", as in scikit-learn's SVC."""
    if gamma is None:
        return 1 / data.X.shape[1]
    if isinstance(gamma, str):
        if gamma != "scale":
            raise ValueError(f'gamma={gamma!r} must be None, "scale" or a number > 0')
        return scale_gamma(data)
    return gamma


def scale_gamma(data: Training) -> float:
    """1 / (d Var X) over all entries of X, each sample with its weight; 1 where X is constant."""
    X = data.X.to(torch.float64)
    weights = data.weights / (data.weights.sum() * X.shape[1])
    mean = weights @ X.sum(1)
    variance = (weights @ (X - mean).square().sum(1)).item()
    return 1 / (X.shape[1] * variance) if variance > 0 else 1.0
