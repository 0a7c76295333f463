"""Generalised discriminant analysis (GDA) as an estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..functional import gda_solve
from ._base import check_tau, warn_raised
from ._gaussian import class_statistics, orientation
from ._kernel import KernelEstimator, gamma_value


class KernelDiscriminantAnalysis(KernelEstimator):
    r"""Discriminant analysis in the feature space of a kernel: transformer and classifier.

    The directions :math:`W = \Phi(X)^T A` maximise the ratio of between-class to within-class scatter,

    .. math:: \tilde S_b A = G_w A \Lambda, \qquad G_w = K D_w K + \tau I, \qquad A^T G_w A = I

    (Ma, Sancho-Gomez and Ahalt, *Nonlinear multiclass discriminant analysis*, Eq. 18 to 23). New samples are projected
    by ``kernel_matrix(X_new, X) @ A`` and classified by Gaussians with one covariance for all classes, fitted to the
    projections of the training samples, and priors. The default tau is about the smallest with which G_w can be
    inverted; what generalises best is often larger, and :class:`KernelDiscriminantAnalysisCV` finds it.

    Args:
        kernel: ``"linear"``, ``"poly"``, ``"sigmoid"``, ``"cosine"``, ``"rbf"``, ``"laplacian"``, ``"matern"``,
            ``"chi2"`` (see :func:`phydi_kernels.functional.kernel_matrix`); ``"precomputed"``: X is the matrix itself,
            ``(N, N)`` for fit and ``(n, N)`` later; or a callable ``kernel(X, Y)`` that returns the matrix ``(n, m)``
            of X ``(n, d)`` and Y ``(m, d)``, which are of the type of ``X_fit_``.
        gamma: a number > 0; None: 1/d; ``"scale"``: 1 / (d Var X), as in scikit-learn's SVC.
        degree, coef0, lengthscale, nu: as in ``kernel_matrix``. A lengthscale (number or ``(d,)``) takes the place of
            gamma for rbf, laplacian and matern. A kernel ignores what it has no use for.
        n_components: the number l of directions, at most L - 1 for L classes. None: L - 1.
        tau: the conditioning coefficient. None: max(lambda_max / c_allow, tau_min) (Eq. 23), with the largest
            eigenvalue of K D_w K; ``"one_norm"``: the same with its one-norm; or a number >= 0.
        c_allow: the largest condition number that Eq. 23 allows. None: by dtype, as in ``gda_solve``.
        tau_min: the least tau of Eq. 23.
        weighting: ``"paper"`` weights the scatter of a class by the number of its samples (Eq. 3); ``"standard"`` is
            the textbook's. They agree for balanced classes.
        solver: of :func:`phydi_kernels.functional.gda_solve`: ``"cholesky"``, ``"qr"``, ``"eigh"``, ``"pinv"`` or
            ``"cg"``.
        priors: probabilities of the classes ``(L,)``, in the order of ``classes_``, for the classifier; the projection
            does not depend on them. None: the frequencies of the classes, by weight.
        device: where to compute. None: where X is; the CPU for arrays.
        dtype: float32 or float64. None: float32 for float32, float64 for everything else.

    Attributes:
        classes_: the labels ``(L,)``, sorted. Labels without any positive weight are not among them.
        priors_: ``(L,)``.
        coefficients_: A ``(N, l)``; rows of samples with weight 0 are 0. Signs are such that the last class is above
            the first.
        eigenvalues_: ``(l,)``, largest first.
        explained_variance_ratio_: ``(l,)``, the eigenvalues over the sum of all L - 1.
        means_: projected class means ``(L, l)``, float64.
        covariance_: the pooled covariance of the projected classes ``(l, l)``, maximum likelihood, float64.
        tau_: the conditioning coefficient that was used.
        gamma_: the gamma that was used; only for kernels that have one.
        X_fit_: a copy of the training samples ``(N, d)``; not for ``"precomputed"``.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

        These are NumPy arrays if X was not a tensor and the CPU computed; tensors on the device of the computation
        otherwise. ``classes_`` and ``priors_`` are always arrays.

    ``transform`` and the probabilities return a tensor for a tensor, on its device and without a graph (see
    ``phydi_kernels.nn.KernelDiscriminant`` for a layer that has one), else an array. New samples are projected in row
    blocks, so the matrix of kernel values between them and the training samples is never held whole.

    K need not be positive semi-definite: G_w is positive definite for every symmetric K and tau > 0. But where K is not
    (sigmoid, or a given matrix) there is no feature space in which the projection discriminates best. ``fit`` warns of
    it where it shows on the diagonal of K, and looks no further.

    Warns:
        ConvergenceWarning: G_w was not positive definite to working precision, and a larger tau was taken.
        UserWarning: a negative entry on the diagonal of K.

    Raises:
        ValueError: by ``fit``, what :meth:`fit` lists, and a parameter that is not allowed.
        numpy.linalg.LinAlgError: by ``fit``, no solution was found (``solver="cg"``: it did not converge).
    """

    def __init__(
        self,
        kernel: str | Callable[[Any, Any], Any] = "rbf",
        *,
        gamma: float | str | None = None,
        degree: int = 3,
        coef0: float = 1.0,
        lengthscale: Any = None,
        nu: float = 1.5,
        n_components: int | None = None,
        tau: float | str | None = None,
        c_allow: float | None = None,
        tau_min: float = 0.0,
        weighting: str = "paper",
        solver: str = "cholesky",
        priors: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.lengthscale = lengthscale
        self.nu = nu
        self.n_components = n_components
        self.tau = tau
        self.c_allow = c_allow
        self.tau_min = tau_min
        self.weighting = weighting
        self.solver = solver
        self.priors = priors
        self.device = device
        self.dtype = dtype

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> Tensor:
        given = self._given_matrix()
        check_tau(self.tau)
        data = self._validate_fit(X, y, sample_weight, copy=not given)
        components = self._components(len(data.classes) - 1, "the number of classes in y - 1")
        gamma = gamma_value(self.gamma, data) if self._has_gamma() else self.gamma
        K = self._training_matrix(data, gamma)
        solution = gda_solve(
            K,
            data.codes,
            tau=self.tau,
            c_allow=self.c_allow,
            tau_min=self.tau_min,
            weighting=self.weighting,
            solver=self.solver,
            sample_weight=None if sample_weight is None else data.weights,
            num_classes=len(data.classes),
        )
        self._check_solution(int(solution.info), float(solution.tau))
        for name in ("gamma_", "X_fit_"):
            self.__dict__.pop(name, None)
        if self._has_gamma():
            self.gamma_ = gamma
        if not given:
            self.X_fit_ = self._store(data.X, data.numpy)
        self.classes_, self.priors_ = data.classes, data.priors
        self.tau_ = float(solution.tau)
        coefficients, eigenvalues = solution.coefficients[:, :components], solution.eigenvalues
        total = eigenvalues.sum()
        ratio = eigenvalues / torch.where(total > 0, total, 1)
        self.eigenvalues_ = self._store(eigenvalues[:components], data.numpy)
        self.explained_variance_ratio_ = self._store(ratio[:components], data.numpy)
        scores = (K @ coefficients).to(torch.float64)
        signs = orientation(class_statistics(scores, data.codes, len(data.classes), data.weights)[0])
        scores *= signs
        self.coefficients_ = self._store((coefficients * signs.to(K.dtype)).contiguous(), data.numpy)
        self._set_gaussian(scores, data)
        return scores

    def _check_solution(self, info: int, tau: float) -> None:
        if info > 0:
            warn_raised(self.tau, tau)
        elif info < 0:
            reason = "conjugate gradients did not converge" if self.solver == "cg" else "G_w has no usable factor"
            raise np.linalg.LinAlgError(
                f"No solution with solver={self.solver!r} and tau={self.tau!r} (used: {tau:.3g}): {reason}. "
                "Take a larger tau, a smaller c_allow or another solver"
            )

    def _project(self, X: Tensor) -> Tensor:
        if self._given_matrix():
            K = X
        elif callable(self.kernel):
            K = self._called_kernel(X, self._tensor(self.X_fit_), isinstance(self.X_fit_, np.ndarray))
        else:
            K = self._named_kernel(X, self._tensor(self.X_fit_), getattr(self, "gamma_", None))
        return (K @ self._tensor(self.coefficients_)).to(torch.float64)

    def _entries_per_sample(self) -> int:
        return len(self.coefficients_)
