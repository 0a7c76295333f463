"""Discriminant analysis against what people use for it: scipy's generalised eigenproblem, scikit-learn, scikit-kda.

A figure is how many times faster ours is, rival over ours, in the same rounds. Both results agree to 1e-8 in float64
before anything is timed, but for the fits, whose rivals compute something else: KernelPCA with LDA regularises
otherwise, and scikit-kda's transform depends on the samples it is given together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from rivals import Rival
from sklearn.datasets import make_classification
from sklearn.decomposition import KernelPCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline

from phydi_kernels.discriminant import KernelDiscriminantAnalysis, KernelDiscriminantAnalysisCV
from phydi_kernels.functional import gda_solve, kernel_matrix

CLASSES = 10


def samples(count: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten overlapping classes in standardised features."""
    X, y = make_classification(
        count, features, n_informative=features // 2, n_classes=CLASSES, n_clusters_per_class=1, random_state=0
    )
    return (X - X.mean(0)) / X.std(0), y


def scatter_matrices(K: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S_w and S_b (GDA, Eq. 20 and 21), each as one symmetric product."""
    Z = (y[:, None] == np.unique(y)).astype(K.dtype)
    count = Z.sum(0)
    means = K @ (Z / count)
    B = (K - means @ Z.T) * np.sqrt(Z @ count)
    V = (means - K.mean(1, keepdims=True)) * np.sqrt(count)
    return B @ B.T, V @ V.T


def scipy_solve(K: np.ndarray, y: np.ndarray, tau: float, *, top: bool) -> tuple[np.ndarray, np.ndarray]:
    """The leading eigenvalues, largest first, and eigenvectors of G_w^-1 S_b from scipy.linalg.eigh."""
    within, between = scatter_matrices(K, y)
    within[np.diag_indices_from(within)] += tau
    N, leading = len(K), len(np.unique(y)) - 1
    subset = [N - leading, N - 1] if top else None
    values, vectors = scipy.linalg.eigh(between, within, subset_by_index=subset)
    return values[::-1][:leading], vectors[:, ::-1][:, :leading]


def eigenvalues(call: Callable[[], Any]) -> Rival:
    return Rival(lambda: (torch.as_tensor(call()[0].copy()),), ("eigenvalues",))


def gram(count: int) -> tuple[Any, Any, float]:
    """K of `count` samples, their labels and the tau of Eq. 23 for c_allow = 1e8."""
    X, y = samples(count, 32)
    K = kernel_matrix(torch.as_tensor(X))
    return K, torch.as_tensor(y), float(gda_solve(K, torch.as_tensor(y)).tau)


@pytest.mark.parametrize(("pairs", "asked"), [("all", 9.0), ("top", 5.0)])
def test_solve(pairs: str, asked: float, outrun: Callable[..., None]) -> None:
    K, y, tau = gram(2000)
    array, labels = K.numpy(), y.numpy()
    outrun(
        f"gda_solve, N=2000, L={CLASSES}",
        f"scipy.linalg.eigh, {'all pairs' if pairs == 'all' else f'top {CLASSES - 1}'}",
        ours=Rival(lambda: (gda_solve(K, y, tau=tau).eigenvalues,), ("eigenvalues",)),
        rival=eigenvalues(lambda: scipy_solve(array, labels, tau, top=pairs == "top")),
        asked=asked,
    )


def test_solve_arithmetic(outrun: Callable[..., None]) -> None:
    """Against 4/3 N^3 operations at the rate of torch's product of two N x N matrices, which takes 2 N^3."""
    K, y, tau = gram(4000)
    outrun(
        f"gda_solve, N=4000, L={CLASSES}",
        "4/3 N^3 operations at the rate of torch.mm",
        ours=Rival(lambda: (gda_solve(K, y, tau=tau).eigenvalues,), ("eigenvalues",)),
        rival=Rival(lambda: (K @ K,), ("product",)),
        factor=2 / 3,
        check=False,
        asked=0.7,
    )


def test_tau_path(outrun: Callable[..., None]) -> None:
    """Thirty scipy solves take thirty times as long as one: one is timed."""
    K, y, tau = gram(2000)
    array, labels = K.numpy(), y.numpy()
    taus = tau * torch.logspace(0, 6, 30, dtype=torch.float64)
    outrun(
        "gda_solve, N=2000, 30 taus",
        "30 x scipy.linalg.eigh, all pairs",
        ours=Rival(lambda: (gda_solve(K, y, tau=taus).eigenvalues[0],), ("eigenvalues",)),
        rival=eigenvalues(lambda: scipy_solve(array, labels, float(taus[0]), top=False)),
        factor=30,
        asked=50.0,
    )


def gaussian_accuracy(train: np.ndarray, y: np.ndarray, test: np.ndarray, true: np.ndarray) -> float:
    """Of a Gaussian for each class with one covariance."""
    classes, count = np.unique(y, return_counts=True)
    means = np.stack([train[y == c].mean(0) for c in classes])
    within = train - means[np.searchsorted(classes, y)]
    covariance = within.T @ within / len(y)
    weights = scipy.linalg.lstsq(covariance, means.T)[0]
    scores = test @ weights - (means.T * weights).sum(0) / 2 + np.log(count / len(y))
    return float((classes[scores.argmax(1)] == true).mean())


def test_cross_validation(outrun: Callable[..., None]) -> None:
    """The loop that a user writes with scikit-learn's kernel and scipy: the mean accuracy of every candidate."""
    X, y = samples(1000, 64)
    gammas, taus = np.logspace(-3.5, -2, 10), np.logspace(-1, 3, 10)
    folds = list(StratifiedKFold(5).split(X, y))

    def loop() -> tuple[torch.Tensor]:
        scores = np.zeros((len(gammas), len(taus)))
        for g, gamma in enumerate(gammas):
            for train, test in folds:
                K = rbf_kernel(X[train], gamma=gamma)
                new = rbf_kernel(X[test], X[train], gamma=gamma)
                for t, tau in enumerate(taus):
                    A = scipy_solve(K, y[train], tau, top=False)[1]
                    scores[g, t] += gaussian_accuracy(K @ A, y[train], new @ A, y[test]) / len(folds)
        return (torch.as_tensor(scores.ravel()),)

    def ours() -> tuple[torch.Tensor]:
        search = KernelDiscriminantAnalysisCV(gammas=gammas, taus=taus, cv=folds).fit(X, y)
        return (torch.as_tensor(search.cv_results_["mean_test_score"].copy()),)

    # One sample of 200 in one fold on the other side of a tie is 0.001.
    outrun(
        "CV: 10 gammas x 10 taus x 5 folds, N=1000, d=64",
        "loop over rbf_kernel and scipy.linalg.eigh",
        ours=Rival(ours, ("accuracy",)),
        rival=Rival(loop, ("accuracy",)),
        tolerance=2e-3,
        once=True,
        asked=15.0,
    )


def test_kernel_matrix(outrun: Callable[..., None]) -> None:
    X = torch.randn(1000, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gammas, array = torch.logspace(-4, -1, 16, dtype=torch.float64), X.numpy()
    names = tuple(f"gamma {float(g):.1e}" for g in gammas)
    outrun(
        "kernel_matrix, rbf, 16 gammas, N=1000, d=128",
        "sklearn rbf_kernel, looped",
        ours=Rival(lambda: kernel_matrix(X, gamma=gammas).unbind(), names),
        rival=Rival(lambda: tuple(torch.from_numpy(rbf_kernel(array, gamma=float(g))) for g in gammas), names),
        asked=2.5,
    )


@pytest.mark.parametrize("peer", ["KernelPCA -> LDA", "scikit-kda 0.1.2"])
def test_fit(peer: str, outrun: Callable[..., None]) -> None:
    X, y = samples(2000, 32)
    ours = KernelDiscriminantAnalysis(gamma=1 / 32)
    if peer.startswith("scikit-kda"):
        peer_module = pytest.importorskip("skkda.base", reason="pip install --no-deps scikit-kda==0.1.2")
        other = peer_module.KernelDiscriminantAnalysis(kernel="rbf", gamma=1 / 32)
    else:
        other = make_pipeline(KernelPCA(kernel="rbf", gamma=1 / 32), LinearDiscriminantAnalysis())

    def fitted(estimator: Any) -> Rival:
        def fit() -> tuple[torch.Tensor]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                estimator.fit(X, y)
            return (torch.zeros(1),)

        return Rival(fit, ("nothing",))

    outrun("KernelDiscriminantAnalysis.fit, N=2000", peer, ours=fitted(ours), rival=fitted(other), check=False, asked=4)


def test_transform(outrun: Callable[..., None]) -> None:
    X, y = samples(12000, 32)
    estimator = KernelDiscriminantAnalysis(gamma=1 / 32).fit(X[:2000], y[:2000])
    new, points = torch.as_tensor(X[2000:]), torch.as_tensor(estimator.X_fit_)
    coefficients = torch.as_tensor(estimator.coefficients_)
    outrun(
        "KernelDiscriminantAnalysis.transform, 10,000 x N=2000",
        "K formed whole",
        ours=Rival(lambda: (torch.as_tensor(estimator.transform(X[2000:])),), ("features",)),
        rival=Rival(lambda: (kernel_matrix(new, points, gamma=1 / 32) @ coefficients,), ("features",)),
        asked=1.0,
    )
