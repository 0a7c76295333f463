"""gda_solve against the generalised eigenproblem it replaces, in float64 and in 200-bit arithmetic.

The scatter matrices are formed here from the paper's equations, sample by sample or block by block, and share no code
with the package.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import LAYOUTS, normal
from torch import Tensor

from phydi_kernels import _gda
from phydi_kernels.functional import GDASolution, gda_solve, kernel_matrix
from phydi_kernels.kernels import cpu
from phydi_kernels.kernels import gda_solve as kernels
from phydi_kernels.ops.gda_solve import gda_apply, gda_factor, symmetric_times
from phydi_kernels.reference import gda_solve as reference_solve

SOLVERS = ("cholesky", "qr", "eigh", "pinv", "cg")


@pytest.fixture(params=(True, False), ids=("kernels", "reference"))
def implementation(request, monkeypatch) -> None:
    """Both the compiled kernels and the plain implementation of other devices and of machines without a compiler."""
    if not request.param:
        monkeypatch.setattr(cpu, "available", lambda: False)


def sizes(*counts: int) -> np.ndarray:
    """Labels of classes of these sizes, shuffled."""
    y = np.repeat(np.arange(len(counts)), counts)
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).numpy()]


def points(y: np.ndarray, d: int = 3, seed: int = 0, separation: float = 1.0) -> Tensor:
    """A cloud for each class."""
    return normal((len(y), d), seed) + separation * normal((int(y.max()) + 1, d), seed + 1)[torch.from_numpy(y)]


def kernel_of(y: np.ndarray, gamma: float = 0.2) -> Tensor:
    return kernel_matrix(points(y), gamma=gamma)


def within_matrix(y: np.ndarray, weighting: str) -> np.ndarray:
    """D_w of Eq. 5: a block N_j I - 1 1^T for each class, and with textbook weights I - 1 1^T / N_j."""
    D_w = np.zeros((len(y), len(y)))
    for label in np.unique(y):
        member = (y == label).astype(float)
        D_w += (member.sum() * np.diag(member) - np.outer(member, member)) / (
            1 if weighting == "paper" else member.sum()
        )
    return D_w


def between_root(y: np.ndarray) -> np.ndarray:
    """Omega D_b^1/2 of Eq. 6 and 7 in extended precision."""
    members = (y[:, None] == np.unique(y)).astype(np.longdouble)
    counts = members.sum(0)
    return (members / counts - 1 / np.longdouble(len(y))) * np.sqrt(counts)


def within_and_between(K: Tensor, y: np.ndarray, weighting: str = "paper") -> tuple[np.ndarray, np.ndarray]:
    """K D_w K and K Omega D_b Omega^T K, Eq. 20 and 21."""
    K = K.double().numpy()
    between = K @ between_root(y).astype(float)
    return K @ within_matrix(y, weighting) @ K, between @ between.T


def leading_eigenvectors(S_w: np.ndarray, S_b: np.ndarray, tau: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalues, A) of S_b A = G_w A Lambda with A^T G_w A = I, the largest first."""
    values, vectors = scipy.linalg.eigh(S_b, S_w + tau * np.eye(len(S_w)))
    return values[::-1][:count], vectors[:, ::-1][:, :count]


def exact_eigenvectors(K: Tensor, y: np.ndarray, tau: float, weighting: str = "paper") -> tuple[np.ndarray, np.ndarray]:
    """The same of a kernel matrix, to more digits: S_b = M M^T, G_w = C C^T and R = C^-1 M in extended precision.

    Forming S_w in float64 alone costs 5e-9 at the condition of 1e8.
    """
    K = K.double().numpy().astype(np.longdouble)
    D_w, M = within_matrix(y, weighting).astype(np.longdouble), K @ between_root(y)
    C, R = K @ D_w @ K + np.longdouble(tau) * np.eye(len(y)), M.copy()
    for i in range(len(y)):
        C[i:, i] = (C[i:, i] - C[i:, :i] @ C[i, :i]) / np.sqrt(C[i, i] - C[i, :i] @ C[i, :i])
        R[i] = (R[i] - C[i, :i] @ R[:i]) / C[i, i]
    values, vectors = np.linalg.eigh((R.T @ R).astype(float))
    values, vectors = values[:0:-1], vectors[:, :0:-1]
    A = R @ (vectors / np.sqrt(values))
    for i in reversed(range(len(y))):
        A[i] = (A[i] - C[i + 1 :, i] @ A[i + 1 :]) / C[i, i]
    return values, A.astype(float)


def relative(actual, expected) -> float:
    """The norm of the difference over that of the expected; eigenvalues one by one."""
    actual, expected = np.asarray(actual, dtype=float), np.asarray(expected, dtype=float)
    assert actual.shape == expected.shape
    if actual.ndim == 1:
        return float((np.abs(actual - expected) / np.abs(expected)).max())
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def projector(A) -> np.ndarray:
    """A A^T, which the signs and the basis of equal eigenvalues leave alone."""
    A = np.asarray(A, dtype=float)
    return A @ A.T


def assert_same(a: GDASolution, b: GDASolution, tolerance: float) -> None:
    assert a.coefficients.shape == b.coefficients.shape and a.info.shape == b.info.shape
    assert torch.equal(a.info, b.info)
    for of_a, of_b in ((a.tau, b.tau), (a.eigenvalues, b.eigenvalues)):
        assert torch.allclose(of_a, of_b, rtol=tolerance, atol=0), (of_a - of_b).abs().max()
    difference = a.coefficients @ a.coefficients.mT - b.coefficients @ b.coefficients.mT
    size = (b.coefficients @ b.coefficients.mT).norm(dim=(-2, -1), keepdim=True)
    assert bool((difference.norm(dim=(-2, -1), keepdim=True) <= tolerance * size).all())


PROBLEMS = {
    "balanced": sizes(20, 20, 20),
    "unbalanced": sizes(40, 10, 5, 25),
    "two_classes": sizes(15, 9),
    "thirty_classes": sizes(*[4] * 30),
    "one_sample_in_a_class": sizes(20, 1, 15),
    "fewer_than_two_for_each_class": sizes(2, 1, 1, 2, 1, 2, 1, 1, 2, 1),
}


# The eigenproblem


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh"))
@pytest.mark.parametrize("weighting", ("paper", "standard"))
@pytest.mark.parametrize("y", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_eigenvalues_and_projector(y, weighting, solver, implementation):
    """Of every component, at the condition of 1e8; and against scipy at one that float64 scatter matrices bear."""
    K = kernel_of(y)
    L = len(np.unique(y))
    S_w, S_b = within_and_between(K, y, weighting)
    for c_allow in (1e8, 1e4):
        solution = gda_solve(K, y, c_allow=c_allow, weighting=weighting, solver=solver)
        assert int(solution.info) == 0
        assert solution.coefficients.shape == (len(y), L - 1) and solution.eigenvalues.shape == (L - 1,)
        tau = float(solution.tau)
        assert tau == pytest.approx(np.linalg.eigvalsh(S_w)[-1] / c_allow, rel=1e-6)
        values, A = exact_eigenvectors(K, y, tau, weighting)
        assert relative(solution.eigenvalues, values) < 1e-10
        assert relative(projector(solution.coefficients), projector(A)) < 1e-10
    values, A = leading_eigenvectors(S_w, S_b, tau, L - 1)
    assert relative(solution.eigenvalues, values) < 1e-10
    assert relative(projector(solution.coefficients), projector(A)) < 1e-10


def _polynomial_features(X: np.ndarray, gamma: float, coef0: float) -> np.ndarray:
    """phi with phi(x).phi(y) = (gamma x.y + coef0)^2."""
    i, j = np.triu_indices(X.shape[1], 1)
    return np.concatenate(
        (
            gamma * X**2,
            math.sqrt(2) * gamma * X[:, i] * X[:, j],
            math.sqrt(2 * gamma * coef0) * X,
            np.full((len(X), 1), coef0),
        ),
        axis=1,
    )


@pytest.mark.parametrize("weighting", ("paper", "standard"))
@pytest.mark.parametrize("kernel", ("linear", "poly"))
@pytest.mark.parametrize("y", (sizes(9, 9, 9), sizes(14, 3, 6, 1)), ids=("balanced", "unbalanced"))
def test_scatter_in_the_feature_space(kernel, weighting, y):
    """S_w and S_b of Eq. 3 and 4, sample by sample, with the features of the kernel made explicit: W = Theta A."""
    X = points(y, d=4)
    K = kernel_matrix(X, kernel=kernel, gamma=0.4, degree=2, coef0=0.7)
    features = X.numpy() if kernel == "linear" else _polynomial_features(X.numpy(), 0.4, 0.7)
    assert np.allclose(features @ features.T, K.numpy(), rtol=1e-13, atol=1e-13)
    mean = features.mean(0)
    S_w, S_b = 0, 0
    for label in np.unique(y):
        members = features[y == label]
        for x in members:
            deviation = x - members.mean(0)
            S_w = S_w + (len(members) / len(y) if weighting == "paper" else 1 / len(y)) * np.outer(deviation, deviation)
        S_b = S_b + len(members) / len(y) * np.outer(members.mean(0) - mean, members.mean(0) - mean)
    # In terms of A: Theta^T S Theta, without the 1 / N that Eq. 20 and 21 drop.
    within, between = (len(y) * features @ S @ features.T for S in (S_w, S_b))
    tau = float(np.trace(within)) * 1e-5
    solution = gda_solve(K, y, tau=tau, weighting=weighting)
    values, A = leading_eigenvectors(within, between, tau, len(np.unique(y)) - 1)
    assert relative(solution.eigenvalues, values) < 1e-10
    assert relative(projector(solution.coefficients), projector(A)) < 1e-10
    W = features.T @ solution.coefficients.numpy()
    criterion = np.trace(np.linalg.solve(W.T @ S_w @ W * len(y) + tau * solution.coefficients.mT.numpy()
                                         @ solution.coefficients.numpy(), W.T @ S_b @ W * len(y)))  # fmt: skip
    assert criterion == pytest.approx(float(solution.eigenvalues.sum()), rel=1e-9)


def _exact_eigenvalues(K: Tensor, y: np.ndarray, tau: float) -> list[mpmath.mpf]:
    """Those of G_w^-1 S_b in the running precision: of R^T R with L R = M, L L^T = G_w and M M^T = S_b."""
    N, labels = len(y), np.unique(y)
    exact, D_w = mpmath.matrix(K.double().tolist()), mpmath.matrix(within_matrix(y, "paper").tolist())
    counts = [int((y == label).sum()) for label in labels]
    root = mpmath.matrix(
        [
            [
                (mpmath.mpf(int(label == of)) / n - mpmath.mpf(1) / N) * mpmath.sqrt(n)
                for label, n in zip(labels, counts, strict=True)
            ]
            for of in y
        ]
    )
    G = exact * (D_w * exact) + mpmath.mpf(tau) * mpmath.eye(N)
    L, M = mpmath.cholesky(G), exact * root
    R = mpmath.zeros(N, len(labels))
    for j in range(len(labels)):
        for i in range(N):
            R[i, j] = (M[i, j] - mpmath.fdot((L[i, k], R[k, j]) for k in range(i))) / L[i, i]
    values = mpmath.eigsy(R.T * R, eigvals_only=True)
    return sorted(values, reverse=True)[: len(labels) - 1]


@functools.cache
def _hard_problem(trial: int, dtype: torch.dtype, c_allow: float) -> tuple[Tensor, float, list[mpmath.mpf]]:
    """K of a condition of 1e6, tau and the exact eigenvalues; a hair of scale gives each trial other roundings."""
    y = np.arange(32) % 4
    X = torch.randn((32, 3), generator=torch.Generator().manual_seed(0)).double()
    X = (1 + 1e-9 * trial) * (X + 0.4 * torch.from_numpy(y).unsqueeze(1))
    K = kernel_matrix(X, gamma=0.2).to(dtype)
    largest = np.linalg.eigvalsh(within_and_between(K, y)[0])[-1]
    tau = float(torch.tensor(largest / c_allow).to(dtype))
    with mpmath.workprec(200):
        return K, tau, _exact_eigenvalues(K, y, tau)


@pytest.mark.parametrize(
    ("dtype", "c_allow", "error"),
    (
        (torch.float64, 1e5, 5e-15),
        (torch.float64, 1e7, 7e-14),
        (torch.float64, 1e9, 4e-13),
        (torch.float64, 1e13, 8e-13),
        # Two refinements bring the Cholesky factor of float32, 8e-5 alone, to the error of QR.
        (torch.float32, 1e5, 1e-6),
    ),
)
@pytest.mark.parametrize("solver", ("cholesky", "qr"))
def test_accuracy_in_hard_problems(solver, dtype, c_allow, error, implementation):
    """The worst eigenvalue's relative error is that of a QR factorisation; the factor of 5 is for another problem."""
    errors = []
    for trial in range(5):
        K, tau, exact = _hard_problem(trial, dtype, c_allow)
        assert 5e5 < float(torch.linalg.cond(K.double())) < 2e6
        solution = gda_solve(K, np.arange(32) % 4, solver=solver, tau=tau)
        assert int(solution.info) == 0
        found = map(mpmath.mpf, solution.eigenvalues.tolist())
        errors.append(max(float(abs(a - b) / b) for a, b in zip(found, exact, strict=True)))
    assert statistics.median(errors) < 5 * error


# Special data


def test_duplicate_points_and_constant_features():
    """Copies of each sample, with two more features that say nothing."""
    y = sizes(8, 7, 6)
    X = torch.cat((points(y), torch.full((len(y), 1), 3.0), torch.zeros(len(y), 1)), 1).repeat(2, 1)
    twice = np.concatenate((y, y))
    K = kernel_matrix(X, gamma=0.2)
    for solver in ("cholesky", "qr", "eigh"):
        solution = gda_solve(K, twice, solver=solver)
        values, A = exact_eigenvectors(K, twice, float(solution.tau))
        assert relative(solution.eigenvalues, values) < 1e-10
        assert relative(projector(solution.coefficients), projector(A)) < 1e-10
        assert relative(solution.coefficients[: len(y)], solution.coefficients[len(y) :]) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", (0.0, 1.0))
def test_equal_points(value, solver, implementation):
    """K of one point N times, or of zeros: no component separates the classes."""
    if solver == "pinv" and value:
        pytest.skip("the pseudo-inverse of nothing but rounding errors")
    K = torch.full((6, 6), value, dtype=torch.float64)
    tau = None if solver == "pinv" else 0.5
    solution = gda_solve(K, [0, 1, 2, 0, 1, 2], solver=solver, tau=tau)
    assert int(solution.info) == 0
    assert float(solution.eigenvalues.abs().max()) < 1e-28
    projections = K @ solution.coefficients
    assert float((projections - projections[0]).abs().max()) == 0
    if value == 0:
        assert not solution.eigenvalues.any() and not solution.coefficients.any()


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh"))
def test_indefinite_kernel(solver):
    """G_w is positive definite for every symmetric K: the sigmoid's works as well."""
    y = sizes(12, 9, 7)
    K = kernel_matrix(points(y), kernel="sigmoid", gamma=1.0, coef0=-1.0)
    assert float(torch.linalg.eigvalsh(K)[0]) < -1
    solution = gda_solve(K, y, solver=solver)
    values, A = exact_eigenvectors(K, y, float(solution.tau))
    assert int(solution.info) == 0 and relative(solution.eigenvalues, values) < 1e-10
    assert relative(projector(solution.coefficients), projector(A)) < 1e-10


def test_a_class_missing_from_one_problem():
    """It costs that problem one component; the others are those of its own classes."""
    y = np.stack((sizes(6, 6, 6), sizes(9, 0, 9)))
    K = kernel_of(y[0])
    solution = gda_solve(K, y)
    assert solution.coefficients.shape == (2, 18, 2)
    for problem, count in ((0, 2), (1, 1)):
        alone = gda_solve(K, y[problem])
        assert alone.coefficients.shape == (18, count)
        assert relative(solution.eigenvalues[problem, :count], alone.eigenvalues) < 1e-9
        assert relative(projector(solution.coefficients[problem]), projector(alone.coefficients)) < 1e-9
    assert float(solution.eigenvalues[1, 1]) == 0 and not solution.coefficients[1, :, 1].any()


# Labels, order, scale, weighting


@pytest.mark.parametrize(
    "labels",
    (
        lambda y: torch.from_numpy(y),
        lambda y: torch.from_numpy(y).to(torch.uint8),
        lambda y: torch.from_numpy(y).double() / 3 - 1,
        lambda y: y.tolist(),
        lambda y: tuple((y - 7).tolist()),
        lambda y: y.astype(np.int8),
        lambda y: y.astype(np.float32),
        lambda y: np.array(["ant", "bee", "cat"])[y],
        lambda y: np.array(["ant", "bee", "cat"], dtype=object)[y],
        lambda y: [["ant", "bee", "cat"][code] for code in y],
        lambda y: (y * 1000 - 2000).tolist(),
    ),
)
def test_labels_of_any_type(labels):
    y = sizes(9, 5, 7)
    K = kernel_of(y)
    solution, expected = gda_solve(K, labels(y)), gda_solve(K, y)
    assert all(torch.equal(a, b) for a, b in zip(solution, expected, strict=True))


@pytest.mark.parametrize("labels", (lambda y: y > 0, lambda y: (y > 0).tolist(), lambda y: torch.from_numpy(y > 0)))
def test_bool_labels(labels):
    y = sizes(9, 12)
    solution, expected = gda_solve(kernel_of(y), labels(y)), gda_solve(kernel_of(y), y)
    assert all(torch.equal(a, b) for a, b in zip(solution, expected, strict=True))


def test_batched_labels_as_nested_lists():
    y = np.stack((sizes(6, 7), sizes(7, 6)))
    K = kernel_of(y[0])
    names = [[("no", "yes")[code] for code in row] for row in y]
    for labels in (names, np.array(names), y.tolist()):
        assert torch.equal(gda_solve(K, labels).eigenvalues, gda_solve(K, torch.from_numpy(y)).eigenvalues)


def test_relabelling_and_order_of_samples():
    y = sizes(14, 5, 9, 8)
    K = kernel_of(y)
    solution = gda_solve(K, y)
    assert_same(gda_solve(K, np.array([2, 3, 0, 1])[y]), solution, 1e-10)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(3))
    moved = gda_solve(K[order][:, order], y[order.numpy()])
    back = moved._replace(coefficients=moved.coefficients[order.argsort()])
    assert_same(back, solution, 1e-9)


@pytest.mark.parametrize("scale", (1e-9, 3.0, 1e6))
def test_a_factor_on_the_kernel(scale):
    """tau follows with its square, eigenvalues and projections K A stay."""
    y = sizes(14, 5, 9)
    K = kernel_of(y)
    plain, scaled = gda_solve(K, y), gda_solve(scale * K, y)
    assert_same(scaled._replace(tau=scaled.tau / scale**2, coefficients=scale * scaled.coefficients), plain, 1e-9)


def test_weightings_agree_on_balanced_classes_alone():
    """Of n samples a class, S_w by "paper" is n times that by "standard"."""
    n = 8
    y = sizes(n, n, n)
    K = kernel_of(y)
    standard, paper = gda_solve(K, y, tau=0.01, weighting="standard"), gda_solve(K, y, tau=0.01 * n)
    assert relative(paper.eigenvalues * n, standard.eigenvalues) < 1e-11
    assert relative(projector(paper.coefficients) * n, projector(standard.coefficients)) < 1e-11
    y = sizes(60, 8, 25, 4)
    K = kernel_of(y)
    A = [gda_solve(K, y, weighting=weighting).coefficients.numpy() for weighting in ("paper", "standard")]
    angle = np.degrees(scipy.linalg.subspace_angles(*(K.numpy() @ a for a in A))[0])
    assert 4 < angle < 60


def test_projections_are_as_the_formula_says():
    """A^T G_w A = I and A^T S_b A = Lambda, Eq. 18 to 22, for a number of components as for all."""
    y = sizes(14, 5, 9, 8, 3)
    K = kernel_of(y)
    S_w, S_b = within_and_between(K, y)
    everything = gda_solve(K, y)
    for count in (1, 2, 4):
        solution = gda_solve(K, y, n_components=count)
        A, eigenvalues = solution.coefficients.numpy(), solution.eigenvalues.numpy()
        G_w = S_w + float(solution.tau) * np.eye(len(y))
        assert np.allclose(A.T @ G_w @ A, np.eye(count), rtol=0, atol=1e-9)
        assert np.allclose(A.T @ S_b @ A, np.diag(eigenvalues), rtol=0, atol=1e-9 * eigenvalues[0])
        assert (np.diff(eigenvalues) <= 0).all()
        # To rounding: a BLAS may add up one column in another order than several.
        expected = everything.coefficients[:, :count].numpy()
        assert np.allclose(A, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# Solvers


@pytest.mark.parametrize("solver", ("qr", "eigh", "cg"))
@pytest.mark.parametrize("weighting", ("paper", "standard"))
def test_solvers_agree(solver, weighting, implementation):
    y = sizes(30, 12, 5, 25)
    K = kernel_of(y)
    tau = {"cg": float(gda_solve(K, y, c_allow=1e4).tau)}.get(solver)
    expected = gda_solve(K, y, weighting=weighting, tau=tau)
    assert_same(gda_solve(K, y, weighting=weighting, tau=tau, solver=solver), expected, 1e-9)


def test_the_plain_specification_agrees():
    """reference.gda_solve, the generalised eigenproblem in PyTorch, with weights and of two problems."""
    y = torch.from_numpy(np.stack((sizes(9, 4, 6), sizes(6, 9, 4))))
    K = torch.stack([kernel_of(row.numpy(), gamma) for row, gamma in zip(y, (0.2, 0.3), strict=True)])
    weight = torch.arange(38, dtype=torch.float64).reshape(2, 19) % 4
    tau = torch.tensor([1e-3, 1e-2], dtype=torch.float64)
    A, eigenvalues = reference_solve(K, y, weight.sqrt(), tau, 3, "paper")
    solution = gda_solve(K, y, sample_weight=weight, tau=tau)
    assert torch.allclose(solution.eigenvalues, eigenvalues, rtol=1e-10)
    assert torch.allclose(solution.coefficients @ solution.coefficients.mT, A @ A.mT, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("y", (sizes(12, 7, 9), sizes(5, 4)), ids=("three", "two"))
def test_pseudo_inverse(y, implementation):
    """Section IV: S_w^+ in the place of G_w^-1. A linear kernel's S_w has a rank that leaves no doubt."""
    X = points(y, d=4)
    K = kernel_matrix(X, kernel="linear")
    S_w, S_b = within_and_between(K, y)
    inverse = np.linalg.pinv(S_w, rcond=1e-12, hermitian=True)
    L = len(np.unique(y))
    # Eigenvectors of S_w^+ S_b of eigenvalues that are not 0 solve the symmetric problem of its root.
    values, vectors = np.linalg.eigh(inverse)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    expected, U = np.linalg.eigh(root @ S_b @ root)
    A = root @ U[:, -L + 1 :]
    solution = gda_solve(K, y, solver="pinv")
    assert int(solution.info) == 0 and float(solution.tau) == 0
    assert relative(solution.eigenvalues, expected[::-1][: L - 1]) < 1e-9
    assert relative(projector(solution.coefficients), projector(A)) < 1e-9


@pytest.mark.parametrize("weighting", ("paper", "standard"))
@pytest.mark.parametrize("count", (kernels.BAND_TAUS - 1, kernels.BAND_TAUS, 30))
@pytest.mark.parametrize("N", (kernels.BAND_SAMPLES - 1, kernels.BAND_SAMPLES, kernels.BAND_SAMPLES + 3, 257))
def test_a_path_of_taus(N, count, weighting):
    """As one at a time, whether a band or a factorisation for each tau serves them."""
    y = np.arange(N) % 4
    K = kernel_of(y, 0.5)
    banded = kernels.plan(K, count, "cholesky") == "band"
    assert banded == (N >= kernels.BAND_SAMPLES and count >= kernels.BAND_TAUS)
    largest = float(gda_solve(K, y, c_allow=10.0, weighting=weighting).tau) * 10
    tau = torch.logspace(-8, 1, count, dtype=torch.float64) * largest
    path = gda_solve(K, y, tau=tau, weighting=weighting)
    assert path.coefficients.shape == (count, N, 3) and torch.equal(path.tau, tau)
    for i in range(0, count, 3):
        alone = gda_solve(K, y, tau=float(tau[i]), weighting=weighting)
        assert_same(GDASolution(*(t[i] for t in path)), alone, 1e-9)
        qr = gda_solve(K, y, tau=float(tau[i]), weighting=weighting, solver="qr")
        assert relative(path.eigenvalues[i], qr.eigenvalues) < 1e-11


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
def test_a_path_of_taus_of_several_problems(dtype):
    """Two kernels with their folds, on the band: against the solver that shares nothing with it."""
    N = kernels.BAND_SAMPLES + 6
    y = np.arange(N) % 3
    K = torch.stack([kernel_of(y, gamma) for gamma in (0.3, 0.6)]).to(dtype)
    mask = torch.arange(N) % 50 != torch.arange(2).unsqueeze(1)
    largest = float(torch.linalg.eigvalsh(torch.from_numpy(within_and_between(K[0], y)[0]))[-1])
    tau = torch.logspace(-4, 0, kernels.BAND_TAUS, dtype=torch.float64).to(dtype) * largest
    solution = gda_solve(K, y, tau=tau[:, None], sample_mask=mask)
    expected = gda_solve(K.double(), y, tau=tau[:, None].double(), sample_mask=mask, solver="qr")
    assert solution.coefficients.shape == (kernels.BAND_TAUS, 2, N, 2) and solution.coefficients.dtype is dtype
    assert_same(
        GDASolution(*(t if t.dtype is torch.int32 else t.double() for t in solution)),
        expected,
        1e-9 if dtype is torch.float64 else 1e-3,
    )


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh"))
@pytest.mark.parametrize("y", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_float32_at_its_own_condition(y, solver, implementation):
    """1e5: without a refinement of its factor's solutions a Cholesky's projector is 2e-3 to 4e-3 away."""
    K = kernel_of(y).float()
    solution = gda_solve(K, y, solver=solver)
    assert solution.coefficients.dtype is solution.eigenvalues.dtype is solution.tau.dtype is torch.float32
    values, A = exact_eigenvectors(K, y, float(solution.tau))
    assert relative(solution.eigenvalues, values) < 2e-4
    assert relative(projector(solution.coefficients), projector(A)) < 4e-4


# Masks, weights, batches


@pytest.mark.parametrize("solver", SOLVERS)
def test_masked_samples_are_left_out(solver, implementation):
    """As a training set gathered first; folds of different sizes share one batch."""
    y = sizes(12, 9, 8)
    N = len(y)
    K = kernel_of(y)
    tau = None if solver == "pinv" else 0.02
    masks = torch.stack([torch.arange(N) % 4 != 0, torch.arange(N) % 3 != 1, torch.ones(N, dtype=torch.bool)])
    together = gda_solve(K, y, sample_mask=masks, tau=tau, solver=solver)
    assert together.coefficients.shape == (3, N, 2)
    for i, mask in enumerate(masks):
        gathered = gda_solve(K[mask][:, mask], y[mask.numpy()], tau=tau, solver=solver)
        alone = gda_solve(K, y, sample_mask=mask, tau=tau, solver=solver)
        for solution in (alone, GDASolution(*(t[i] for t in together))):
            assert not solution.coefficients[~mask].any()
            assert_same(solution._replace(coefficients=solution.coefficients[mask]), gathered, 1e-9)


@pytest.mark.parametrize("rule", (None, "one_norm"))
def test_rules_of_tau_see_the_mask(rule):
    y = sizes(12, 9, 8)
    mask = torch.arange(len(y)) % 4 != 0
    K = kernel_of(y)
    gathered = gda_solve(K[mask][:, mask], y[mask.numpy()], tau=rule)
    assert float(gda_solve(K, y, sample_mask=mask, tau=rule).tau) == pytest.approx(float(gathered.tau), rel=1e-7)
    # Where one problem of a batch keeps all samples, the others' are not gathered.
    both = gda_solve(K, y, sample_mask=torch.stack((mask, torch.ones_like(mask))), tau=rule)
    assert float(both.tau[0]) == pytest.approx(float(gathered.tau), rel=1e-7)


@pytest.mark.parametrize("weighting", ("paper", "standard"))
@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh", "cg"))
def test_a_weight_equals_as_many_samples(weighting, solver, implementation):
    """Weight 0 leaves a sample out; projections of new points are those of the repeated training set."""
    y = sizes(9, 6, 7)
    X, new = points(y), normal((5, 3), 9)
    weight = torch.arange(len(y)) % 4
    repeated = torch.arange(len(y)).repeat_interleave(weight)
    options = {"tau": 0.05, "weighting": weighting, "solver": solver}
    weighted = gda_solve(kernel_matrix(X), y, sample_weight=weight, **options)
    copies = gda_solve(kernel_matrix(X[repeated]), y[repeated.numpy()], **options)
    assert relative(weighted.eigenvalues, copies.eigenvalues) < 1e-10
    assert not weighted.coefficients[weight == 0].any()
    Z = kernel_matrix(new, X) @ weighted.coefficients
    Z_copies = kernel_matrix(new, X[repeated]) @ copies.coefficients
    assert relative(Z @ Z.mT, Z_copies @ Z_copies.mT) < 1e-10


def test_fractional_weights_interpolate():
    """Weights 2 w and tau 2 t (4 t with "paper", whose S_w has N_j twice) change no direction; a mask is a weight."""
    y = sizes(9, 6, 7)
    K = kernel_of(y)
    weight = 0.3 + torch.rand(len(y), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for weighting, power in (("standard", 2), ("paper", 3)):
        once = gda_solve(K, y, sample_weight=weight, tau=0.05, weighting=weighting)
        twice = gda_solve(K, y, sample_weight=2 * weight, tau=0.05 * 2**power, weighting=weighting)
        # W^1/2 K W^1/2 doubles: S_w grows 4 (8) times, S_b 4 times.
        assert relative(twice.eigenvalues * 2 ** (power - 2), once.eigenvalues) < 1e-10
    mask = torch.arange(len(y)) % 3 > 0
    masked = gda_solve(K, y, sample_mask=mask, sample_weight=weight, tau=0.05)
    assert_same(gda_solve(K, y, sample_weight=weight * mask, tau=0.05), masked, 1e-12)


def test_batches_broadcast():
    """K, labels, mask, weights and tau each have their own batch dimensions."""
    y = torch.from_numpy(np.stack((sizes(8, 6, 6), sizes(6, 8, 6))))
    K = torch.stack([kernel_of(y[0].numpy(), gamma) for gamma in (0.1, 0.3, 0.5)])
    mask = torch.arange(20) % 7 != torch.arange(2).unsqueeze(1)
    tau = torch.tensor([0.3, 0.01], dtype=torch.float64)
    solution = gda_solve(
        K[:, None, None, None], y[:, None, None], sample_mask=mask[:, None], tau=tau, sample_weight=torch.ones(20)
    )
    assert solution.coefficients.shape == (3, 2, 2, 2, 20, 2) and solution.eigenvalues.shape == (3, 2, 2, 2, 2)
    assert solution.tau.shape == solution.info.shape == (3, 2, 2, 2)
    for k, label, m, t in np.ndindex(3, 2, 2, 2):
        alone = gda_solve(K[k], y[label], sample_mask=mask[m], tau=float(tau[t]))
        assert_same(GDASolution(*(value[k, label, m, t] for value in solution)), alone, 1e-11)


@pytest.mark.parametrize("solver", SOLVERS)
def test_small_steps_of_a_large_batch(solver, monkeypatch):
    """A batch whose factors are formed a few at a time is the same batch."""
    y = sizes(5, 4, 6)
    K = torch.stack([kernel_of(y, gamma) for gamma in (0.1, 0.3, 0.5)])
    tau = None if solver == "pinv" else torch.tensor([[0.3], [0.01], [0.2], [0.1]], dtype=torch.float64)
    whole = gda_solve(K, y, tau=tau, solver=solver)
    for chunk in (1, 15 * 15 * 2, 15 * 15 * 6):
        monkeypatch.setattr(_gda, "_CHUNK", chunk)
        assert_same(gda_solve(K, y, tau=tau, solver=solver), whole, 1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_empty_batch(solver):
    y = sizes(5, 4, 6)
    solution = gda_solve(torch.empty((0, 15, 15), dtype=torch.float64), y, solver=solver)
    assert [tuple(t.shape) for t in solution] == [(0, 15, 2), (0, 2), (0,), (0,)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("solver", SOLVERS)
def test_layouts_between_nan(layout, solver):
    y = sizes(5, 4, 6)
    K = layout(torch.stack([kernel_of(y, gamma) for gamma in (0.1, 0.3)]))
    options = {"solver": solver} if solver == "pinv" else {"solver": solver, "tau": 0.1}
    before = K.clone()
    assert_same(
        gda_solve(K, y, **options), gda_solve(K.clone(memory_format=torch.contiguous_format), y, **options), 1e-10
    )
    assert torch.equal(K, before)


@pytest.mark.parametrize("count", (1, 30))
def test_reruns_and_threads(count, threads):
    """The same bits at every call; K stays as it is."""
    y = np.arange(150) % 3
    K = kernel_of(y).float()
    before = K.clone()
    tau = torch.logspace(-3, 0, count)
    runs = []
    for number in (1, 1, 2):
        threads(number)
        runs.append(gda_solve(K, y, tau=tau))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert torch.allclose(runs[2].eigenvalues, runs[0].eigenvalues, rtol=1e-4)
    assert torch.equal(K, before)


# Conditioning coefficient and info


@pytest.mark.parametrize("weighting", ("paper", "standard"))
@pytest.mark.parametrize("y", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_rules_of_tau(y, weighting, implementation):
    K = kernel_of(y)
    S_w, _ = within_and_between(K, y, weighting)
    largest, one_norm = np.linalg.eigvalsh(S_w)[-1], np.abs(S_w).sum(0).max()
    assert float(gda_solve(K, y, weighting=weighting).tau) == pytest.approx(largest / 1e8, rel=1e-6)
    assert float(gda_solve(K.float(), y, weighting=weighting).tau) == pytest.approx(largest / 1e5, rel=1e-5)
    assert float(gda_solve(K, y, c_allow=300, weighting=weighting).tau) == pytest.approx(largest / 300, rel=1e-6)
    norm = gda_solve(K, y, tau="one_norm", c_allow=300, weighting=weighting).tau
    assert float(norm) == pytest.approx(one_norm / 300, rel=1e-12)
    for tau in (None, "one_norm"):
        assert float(gda_solve(K, y, tau=tau, tau_min=1e9).tau) == 1e9


def test_rules_of_tau_on_a_larger_problem():
    """More samples than the one-norm takes at a time, and than the steps of the Lanczos method."""
    y = np.arange(300) % 5
    K = kernel_of(y, 0.05)
    S_w, _ = within_and_between(K, y)
    assert float(gda_solve(K, y, c_allow=1e6).tau) == pytest.approx(np.linalg.eigvalsh(S_w)[-1] / 1e6, rel=1e-6)
    one_norm = np.abs(S_w).sum(0).max()
    assert float(gda_solve(K, y, tau="one_norm", c_allow=1e6).tau) == pytest.approx(one_norm / 1e6, rel=1e-11)


@pytest.mark.parametrize("tau", (None, "one_norm"))
def test_rules_of_tau_take_a_weight_for_a_number_of_repetitions(tau):
    y = np.arange(300) % 5
    K, repeats = kernel_of(y, 0.05), 1 + np.arange(300) * 7 % 11
    index = torch.from_numpy(np.repeat(np.arange(300), repeats))
    expected = gda_solve(K[index][:, index], y[index], tau=tau, c_allow=1e6).tau
    found = gda_solve(K, y, tau=tau, c_allow=1e6, sample_weight=torch.from_numpy(repeats).double()).tau
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("given", (0.0, 1e-40), ids=("zero", "tiny"))
@pytest.mark.parametrize("count", (1, 3))
def test_a_failed_factorisation_raises_tau(given, count, implementation):
    """S_w has the rank N - L at most, and no factor without a tau: another problem of the batch sees nothing of it."""
    y = sizes(8, 7, 6)
    K = torch.stack([kernel_of(y, gamma) for gamma in (0.2, 0.3)])
    tau = torch.full((count, 2), 0.1, dtype=torch.float64)
    tau[0, 0] = given
    both = gda_solve(K, y, tau=tau)
    assert int(both.info[0, 0]) > 0 and not both.info[:, 1].any() and not both.info[1:].any()
    alone = gda_solve(K[1:], y, tau=tau[:, 1:])
    if cpu.available():
        assert all(torch.equal(a[:, 1:], b) for a, b in zip(both, alone, strict=True))
    else:
        assert_same(GDASolution(*(t[:, 1:] for t in both)), alone, 1e-9)
    assert both.coefficients.isfinite().all() and both.eigenvalues.isfinite().all()
    # Some rounding errors of S_w, and no more.
    largest = np.linalg.eigvalsh(within_and_between(K[0], y)[0])[-1]
    assert 1e-18 * largest < float(both.tau[0, 0]) < 1e-12 * largest
    assert bool((both.tau.flatten()[1:] == tau.flatten()[1:]).all())
    again = gda_solve(K[0], y, tau=float(both.tau[0, 0]))
    assert int(again.info) == 0
    # At a tau of the size of rounding only the same rounding gives the same digits; torch's batches have another.
    if cpu.available():
        assert torch.allclose(again.eigenvalues, both.eigenvalues[0, 0], rtol=1e-6)


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh", "pinv"))
def test_traced_factor_lies_as_the_computed_one_without_compiled_kernels(solver, monkeypatch):
    """As for CUDA tensors: torch's own Cholesky factor lies column by column."""
    monkeypatch.setattr(kernels, "_compiled", lambda K: False)
    y = torch.arange(20) % 3
    K = torch.stack([kernel_of(y.numpy(), 2.0)] * 2)
    arguments = (y.expand(2, -1), torch.ones((2, 20), dtype=torch.float64), 3, "paper")
    tau = torch.full((2, 2), 0.1, dtype=torch.float64)
    sample = (K, *arguments, tau, "given", 1e8, 0.0, solver)
    torch.library.opcheck(gda_factor, sample, test_utils=("test_faketensor",))


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh", "pinv", "band"))
def test_nan_in_one_problem_of_a_batch(solver):
    """Devices whose values are not looked at hand NaN to the factorisation: -1 there, and nowhere else."""
    N = kernels.BAND_SAMPLES + 1 if solver == "band" else 20
    y = torch.arange(N) % 3
    K = torch.stack([kernel_of(y.numpy(), 2.0)] * 3)
    arguments = (y.expand(3, -1), torch.ones((3, N), dtype=torch.float64), 3, "paper")
    tau = torch.full((2, 3), 0.1, dtype=torch.float64)
    good = gda_factor(K, *arguments, tau, "given", 1e8, 0.0, solver)
    poisoned = K.clone()
    poisoned[1, 4, 2] = poisoned[1, 2, 4] = math.nan
    *factor, used, info = gda_factor(poisoned, *arguments, tau, "given", 1e8, 0.0, solver)
    assert (info[:, 1] == -1).all() and not info[:, ::2].any()
    assert torch.equal(used[:, ::2], good[3][:, ::2])
    V = normal((2, 3, N, 2), 0)[: len(used)]
    for found, expected in zip(
        *(gda_apply(K, *arguments, used, *f, V, solver) for f in (factor, good[:3])), strict=True
    ):
        assert torch.equal(found[:, ::2], expected[:, ::2])


@pytest.mark.parametrize("rule", ("lambda_max", "one_norm"))
def test_nan_gives_no_number_for_tau(rule):
    K = torch.stack([kernel_of(sizes(5, 6), 0.3)] * 2)
    K[1, 2, 2] = math.nan
    y = torch.from_numpy(sizes(5, 6)).expand(2, -1)
    *_, tau, info = gda_factor(
        K, y, torch.ones((2, 11), dtype=torch.float64), 2, "paper", None, rule, 1e8, 0.0, "cholesky"
    )
    assert info.tolist() == [[0, -1]] and tau.isnan().tolist() == [[False, True]]


def test_no_convergence_of_conjugate_gradients(monkeypatch):
    """Problems that do not converge are NaN with info -1, beside one that does."""
    y = sizes(12, 9, 8)
    K = kernel_of(y)
    tau = torch.tensor([1e-25, 10.0], dtype=torch.float64)
    solution = gda_solve(K, y, tau=tau, solver="cg")
    assert solution.info.tolist() == [-1, 0]
    assert solution.coefficients[0].isnan().all() and solution.eigenvalues[0].isnan().all()
    alone = gda_solve(K, y, tau=10.0, solver="cg")
    assert_same(GDASolution(*(t[1] for t in solution)), alone, 1e-12)


# Derivatives


def _differentiable(solver: str = "cholesky", **options) -> tuple[Callable[..., GDASolution], tuple[Tensor, ...]]:
    y = sizes(4, 2, 3)

    def solve(X: Tensor, gamma: Tensor, tau: Tensor) -> GDASolution:
        return gda_solve(kernel_matrix(X, gamma=gamma), y, tau=tau, solver=solver, **options)

    X = points(y, d=2).requires_grad_()
    gamma, tau = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.4, 0.3))
    return solve, (X, gamma, tau)


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh", "cg"))
def test_derivatives_of_the_criterion(solver):
    """Of the sum of the eigenvalues, Eq. 18, through the kernel, twice."""
    solve, arguments = _differentiable(solver)

    def criterion(*args: Tensor) -> Tensor:
        return solve(*args).eigenvalues.sum()

    assert torch.autograd.gradcheck(criterion, arguments)
    assert torch.autograd.gradgradcheck(criterion, arguments)


@pytest.mark.parametrize("options", ({}, {"weighting": "standard"}, {"n_components": 1}), ids=str)
def test_derivatives_of_eigenvalues_and_projector(options):
    solve, arguments = _differentiable(**options)

    def projected(*args: Tensor) -> Tensor:
        A = solve(*args).coefficients
        return A @ A.mT

    assert torch.autograd.gradcheck(lambda *args: solve(*args).eigenvalues, arguments)
    assert torch.autograd.gradcheck(projected, arguments)
    assert torch.autograd.gradgradcheck(projected, arguments)


@pytest.mark.parametrize("solver", ("cholesky", "eigh", "cg"))
def test_derivatives_with_masks_and_weights_of_a_batch(solver):
    y = sizes(4, 3, 3)
    mask = torch.arange(10) % 5 != torch.arange(2).unsqueeze(1)
    weight = 0.5 + torch.arange(10) % 3

    def criterion(K: Tensor, tau: Tensor) -> Tensor:
        symmetric = (K + K.mT) / 2
        return gda_solve(symmetric, y, tau=tau, sample_mask=mask, sample_weight=weight, solver=solver).eigenvalues.sum(
            -1
        )

    K = kernel_of(y, 0.5).requires_grad_()
    tau = torch.tensor([[0.3], [0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(criterion, (K, tau))
    assert torch.autograd.gradgradcheck(criterion, (K, tau))


def test_gradients_along_a_path_of_taus():
    """The band's are those of one factorisation for each tau."""
    N = kernels.BAND_SAMPLES
    y = np.arange(N) % 3
    K = kernel_of(y, 0.5).requires_grad_()
    tau = torch.logspace(-2, 1, kernels.BAND_TAUS, dtype=torch.float64).requires_grad_()
    assert kernels.plan(K, len(tau), "cholesky") == "band"
    weight = normal((len(tau), 2), 0)
    path = (gda_solve(K, y, tau=tau).eigenvalues * weight).sum()
    single = sum((gda_solve(K, y, tau=t).eigenvalues * w).sum() for t, w in zip(tau, weight, strict=True))
    for a, b in zip(torch.autograd.grad(path, (K, tau)), torch.autograd.grad(single, (K, tau)), strict=True):
        assert float((a - b).norm()) < 1e-9 * float(b.norm())


def test_gradients_where_eigenvalues_are_equal():
    """Classes in the corners of a regular simplex: the derivative of the sum is finite, and right."""
    y = np.arange(9) % 3
    K = (torch.eye(9, dtype=torch.float64) + torch.from_numpy(0.3 * (y[:, None] == y))).requires_grad_()
    solution = gda_solve(K, y, tau=0.5)
    assert relative(solution.eigenvalues[:1].detach(), solution.eigenvalues[1:].detach()) < 1e-13
    first = torch.autograd.grad(solution.eigenvalues.sum(), K, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.square().sum(), K)
    assert second.isfinite().all()
    direction = normal((9, 9), 0)
    direction = direction + direction.mT
    step = 1e-5
    moved = [gda_solve(K.detach() + sign * step * direction, y, tau=0.5).eigenvalues.sum() for sign in (1, -1)]
    assert float((first * direction).sum()) == pytest.approx(float(moved[0] - moved[1]) / (2 * step), rel=1e-7)
    A = gda_solve(K, y, tau=0.5).coefficients
    (of_projector,) = torch.autograd.grad((A @ A.mT * direction).sum(), K)
    assert of_projector.isfinite().all()


def test_rules_of_tau_carry_no_gradient():
    y = sizes(4, 2, 3)
    K = kernel_of(y, 0.4).requires_grad_()
    by_rule = gda_solve(K, y, c_allow=1e3)
    assert not by_rule.tau.requires_grad and not by_rule.info.requires_grad
    given = gda_solve(K, y, tau=by_rule.tau)
    grads = [torch.autograd.grad(s.eigenvalues.sum(), K)[0] for s in (by_rule, given)]
    assert float((grads[0] - grads[1]).norm()) < 1e-12 * float(grads[1].norm())


def test_torch_func():
    """grad, and grad of grad, as autograd's."""
    y = torch.from_numpy(sizes(4, 2, 3))
    X = points(y.numpy(), d=2)

    def criterion(X: Tensor) -> Tensor:
        return gda_solve(kernel_matrix(X, gamma=0.4), y, tau=0.3, num_classes=3).eigenvalues.sum()

    expected = torch.autograd.functional.jacobian(criterion, X)
    assert torch.allclose(torch.func.grad(criterion)(X), expected, rtol=1e-11)
    row = torch.func.grad(lambda X: torch.func.grad(criterion)(X)[0, 0])(X)
    hessian = torch.autograd.functional.hessian(criterion, X)
    assert torch.allclose(row, hessian[0, 0], rtol=1e-9, atol=1e-12)


# Operators


def _operator_arguments(P: int = 2, N: int = 7) -> tuple[Tensor, tuple]:
    y = torch.arange(N).remainder(3).expand(P, -1).contiguous()
    K = torch.stack([kernel_matrix(normal((N, 2), p), gamma=0.5) for p in range(P)])
    root = torch.ones((P, N), dtype=torch.float64)
    root[0, 1] = 0
    return K, (y, root, 3, "paper")


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh", "pinv", "band", "cg"))
def test_opcheck_of_factor_and_apply(solver):
    """Schema, fake, autograd registration and AOT dispatch."""
    N = 40 if solver == "band" else 7
    K, structure = _operator_arguments(N=N)
    taus = torch.tensor([[0.5, 0.3], [0.2, 0.1], [0.7, 1.1]], dtype=torch.float64)
    for tau, rule in ((taus, "given"), (None, "lambda_max")) if solver == "cholesky" else ((taus, "given"),):
        torch.library.opcheck(gda_factor, (K, *structure, tau, rule, 1e5, 0.0, solver))
    *factor, used, _ = gda_factor(K, *structure, taus, "given", 1e5, 0.0, solver)
    rhs = normal((len(used), 2, N, 2), 3).requires_grad_()
    if solver == "pinv":
        leaves = (K, *structure, used, *factor, rhs, solver)
    else:
        leaves = (K.requires_grad_(), *structure, used.requires_grad_(), *factor, rhs, solver)
    torch.library.opcheck(gda_apply, leaves)


def test_opcheck_of_times():
    K, _ = _operator_arguments()
    torch.library.opcheck(symmetric_times, (K.requires_grad_(), normal((2, 7, 3), 2).requires_grad_()))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
@pytest.mark.parametrize("size", ((1, 1), (3, 1), (31, 2), (33, 7), (130, 9), (257, 40)), ids=str)
def test_symmetric_times(size, dtype, implementation):
    """A product and its derivatives; K of them is symmetric."""
    N, m = size
    K, x = normal((2, N, N), 0).to(dtype), normal((2, N, m), 1).to(dtype)
    K = K + K.mT
    product = symmetric_times(K, x)
    expected = K.double() @ x.double()
    assert float((product.double() - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps * math.sqrt(N)
    if N == 31 and dtype is torch.float64:
        leaves = (K.requires_grad_(), x.requires_grad_())
        arguments = (leaves[0][:1, :5, :5], leaves[1][:1, :5])
        arguments = tuple(t.detach().requires_grad_() for t in arguments)
        assert torch.autograd.gradcheck(lambda K, x: symmetric_times((K + K.mT) / 2, x), arguments)


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh", "cg"))
def test_steps_of_the_solve(solver):
    """gda_factor keeps the given tau, and gda_apply solves with G_w: X = G_w^-1 R and R^T X. A sample is left out."""
    K, structure = _operator_arguments()
    tau = torch.tensor([[0.5, 0.3], [0.01, 0.02]], dtype=torch.float64)
    R = normal((2, 2, 7, 2), 0)
    G = tau[..., None, None] * torch.eye(7, dtype=torch.float64)
    for p in range(2):
        kept = structure[1][p].nonzero().squeeze(-1)
        within, _ = within_and_between(K[p][kept][:, kept], structure[0][p][kept].numpy())
        G[:, p, kept.unsqueeze(1), kept] += torch.from_numpy(within)
    expected = torch.linalg.solve(G, R)
    *factor, used, info = gda_factor(K, *structure, tau, "given", 1e5, 0.0, solver)
    assert not info.any() and torch.equal(used, tau)
    X, T = gda_apply(K, *structure, tau, *factor, R, solver)
    assert torch.allclose(X, expected, rtol=1e-9, atol=1e-11)
    assert torch.allclose(T, R.mT @ expected, rtol=1e-9, atol=1e-11) and torch.equal(T, T.mT)


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh", "cg"))
def test_compile(solver):
    y = torch.from_numpy(sizes(5, 4, 6))
    X = points(y.numpy())

    def criterion(X: Tensor, tau: Tensor) -> Tensor:
        K = kernel_matrix(X, gamma=0.3)
        solution = gda_solve(K, y, tau=tau, solver=solver, num_classes=3)
        return solution.eigenvalues.sum() + (K @ solution.coefficients).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, criterion):
        leaves = X.clone().requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("solver", SOLVERS)
def test_meta(solver):
    """Shapes and dtypes without data."""
    y = sizes(5, 4, 6)
    K = torch.stack([kernel_of(y)] * 2)
    tau = None if solver == "pinv" else torch.full((3, 1), 0.5, dtype=torch.float64)
    real = gda_solve(K, y, tau=tau, solver=solver)
    labels = torch.from_numpy(y).to("meta")
    meta = gda_solve(K.to("meta"), labels, tau=None if tau is None else tau.to("meta"), solver=solver, num_classes=3)
    for a, b in zip(meta, real, strict=True):
        assert a.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
def test_tau_path_of_duplicate_points(dtype):
    """The rounding of a matrix of low rank vanishes column by column: a panel of it must still reduce to a band."""
    X = normal((150, 1), 0).round().to(dtype)
    K = kernel_matrix(X, kernel="linear")
    labels = torch.arange(150) % 3
    taus = gda_solve(K, labels, c_allow=1e4).tau * torch.logspace(0, 3, kernels.BAND_TAUS, dtype=dtype)
    path = gda_solve(K, labels, tau=taus)
    assert not path.info.any()
    single = torch.stack([gda_solve(K, labels, tau=tau).eigenvalues for tau in taus])
    bound = 1e4 * torch.finfo(dtype).eps * float(single.max())
    torch.testing.assert_close(path.eigenvalues, single, rtol=0, atol=bound)


@pytest.mark.parametrize("scale", (1e-20, 1e-12, 1e9, 1e15))
def test_rule_in_float32_at_any_scale(scale):
    """No square of S_w, which goes with the square of K, overflows or vanishes on the way to tau."""
    K, labels = kernel_of(sizes(50, 50, 50)).float(), sizes(50, 50, 50)
    expected = float(gda_solve(K, labels).tau)
    assert float(gda_solve(K * scale, labels).tau) / scale / scale == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh", "cg"))
def test_vmap(solver):
    """Solutions and gradients of mapped points equal a loop over them, and so do mapped masks of one matrix."""
    y = torch.arange(12) % 3
    X = torch.stack([normal((12, 4), seed) for seed in range(3)])

    def eigenvalues(x: Tensor, mask: Tensor | None = None) -> Tensor:
        K = kernel_matrix(x, gamma=0.3)
        return gda_solve(K, y, num_classes=3, tau=0.1, solver=solver, sample_mask=mask).eigenvalues

    mapped = torch.func.vmap(eigenvalues)(X)
    torch.testing.assert_close(mapped, torch.stack([eigenvalues(x) for x in X]), rtol=1e-13, atol=0)
    slope = torch.func.grad(lambda x: eigenvalues(x).sum())
    looped = torch.stack([slope(x) for x in X])
    torch.testing.assert_close(torch.func.vmap(slope)(X), looped, rtol=1e-11, atol=1e-11 * float(looped.abs().max()))
    masks = torch.arange(12).expand(3, 12) != torch.tensor([[0], [5], [7]])
    mapped = torch.func.vmap(lambda mask: eigenvalues(X[0], mask))(masks)
    expected = torch.stack([eigenvalues(X[0], mask) for mask in masks])
    torch.testing.assert_close(mapped, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_autocast_computes_in_float32(dtype):
    y = sizes(5, 4, 6)
    K = kernel_of(y).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        solution = gda_solve(K, y, tau=0.1)
        same = gda_solve(K.float(), y, tau=0.1)
    assert solution.coefficients.dtype is torch.float32
    for other in (same, gda_solve(K.float(), y, tau=0.1)):
        assert all(torch.equal(a, b) for a, b in zip(solution, other, strict=True))


# Memory

# VmHWM, the peak of the resident set, is reset by writing 5 to clear_refs; a first call on a small problem loads code.
SCRIPT = """
import json, re, sys
import torch
from phydi_kernels.functional import gda_solve, kernel_matrix

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def solve(N, solver, taus):
    X = torch.randn(N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    K = kernel_matrix(X, gamma=0.5)
    tau = torch.logspace(-3, 1, taus, dtype=torch.float64) if taus else None
    if solver == "cg":
        tau = torch.tensor(1e3, dtype=torch.float64)
    y = torch.arange(N) % 10
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    gda_solve(K, y, solver=solver, tau=tau)
    return (resident("VmHWM") - before) / (8 * N * N)

N, *cases = json.loads(sys.argv[1])
for solver, taus in cases:
    solve(200, solver, taus)
    print(solve(N, solver, taus), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory():
    """Matrices N x N beside K: 3.2 at most, and of conjugate gradients next to none."""
    allowed = {("cholesky", 0): 3.2, ("cg", 0): 0.3}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # A fixed threshold: freed blocks return to the system at once.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([1500, *allowed])], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    peaks = dict(zip(allowed, map(float, run.stdout.split()), strict=True))
    assert peaks["cholesky", 0] > 0.9, "the factor was formed and not seen: the measurement is blind"
    assert {case: peak for case, peak in peaks.items() if peak > allowed[case]} == {}


# Bad input

K = torch.eye(6, dtype=torch.float64) + 0.1
Y = [0, 1, 2, 0, 1, 2]


def _with(i: int, j: int, value: float) -> Tensor:
    changed = K.clone()
    changed[i, j] = value
    return changed


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    (
        (TypeError, "K must be a torch.Tensor, not ndarray", (K.numpy(), Y), {}),
        (TypeError, "K has dtype torch.float16; allowed are torch.float32, torch.float64", (K.half(), Y), {}),
        (TypeError, "K is nested or has layout torch.sparse_coo", (K.to_sparse(), Y), {}),
        (ValueError, r"K has shape \(6,\); it must have at least two dimensions", (K[0], Y), {}),
        (ValueError, r"K has shape \(6, 4\); it must be square in its last two dimensions", (K[:, :4], Y), {}),
        (ValueError, "K has NaN or infinite entries", (_with(2, 2, math.nan), Y), {}),
        (ValueError, "K has NaN or infinite entries", (_with(5, 1, math.inf), Y), {}),
        (ValueError, r"K is not symmetric: entries differ from .* by up to 0\.", (_with(0, 1, 0.3), Y), {}),
        (ValueError, r"labels have shape \(5,\); the last dimension must be N = 6, as in K", (K, Y[:5]), {}),
        (ValueError, "labels hold 1 class; discriminant analysis needs at least 2", (K, [4] * 6), {}),
        (ValueError, "labels contain NaN", (K, torch.tensor([0.0, 1.0, math.nan, 0.0, 1.0, 0.0])), {}),
        (ValueError, "labels contain NaN", (K, np.array([0.0, 1.0, math.nan, 0.0, 1.0, 0.0])), {}),
        (ValueError, "labels contain NaN", (K, [0.0, 1.0, math.nan, 0.0, 1.0, 0.0]), {}),
        (ValueError, r"labels lie in 0 \.\.\. 2; they must be in 0 \.\.\. 1", (K, torch.tensor(Y)), {"num_classes": 2}),
        (TypeError, r"labels must be a tensor of integers 0 \.\.\. num_classes - 1", (K, Y), {"num_classes": 3}),
        (ValueError, "num_classes=0 must be an integer >= 1", (K, torch.tensor(Y)), {"num_classes": 0}),
        (ValueError, "labels hold 1 class", (K, torch.zeros(6, dtype=torch.int64)), {"num_classes": 1}),
        (ValueError, "n_components=3 must be at most 2 for 3 classes", (K, Y), {"n_components": 3}),
        (ValueError, "n_components=0 must be an integer >= 1", (K, Y), {"n_components": 0}),
        (TypeError, "n_components=1.5 must be an integer >= 1, not float", (K, Y), {"n_components": 1.5}),
        (ValueError, r"tau has the entry -0\.5; it must be finite and >= 0", (K, Y), {"tau": -0.5}),
        (ValueError, "tau has the entry -2.0; it must be finite and >= 0", (K, Y), {"tau": [1.0, -2.0]}),
        (ValueError, "tau=nan must be a finite number", (K, Y), {"tau": math.nan}),
        (ValueError, "tau has the entry .*; it must be finite and >= 0", (K, Y), {"tau": [math.nan, 1.0]}),
        (ValueError, "tau='frobenius' is not one of 'one_norm'", (K, Y), {"tau": "frobenius"}),
        (TypeError, "tau has dtype torch.float32 on cpu; it must be as K", (K, Y), {"tau": torch.ones(2)}),
        (ValueError, "c_allow=1.0 must be > 1", (K, Y), {"c_allow": 1}),
        (ValueError, "c_allow=inf must be a finite number", (K, Y), {"c_allow": math.inf}),
        (ValueError, "tau_min=-1.0 must be >= 0", (K, Y), {"tau_min": -1}),
        (ValueError, "weighting='textbook' is not one of 'paper', 'standard'", (K, Y), {"weighting": "textbook"}),
        (ValueError, "solver='lu' is not one of 'cholesky', 'qr', 'eigh', 'pinv', 'cg'", (K, Y), {"solver": "lu"}),
        (ValueError, 'tau=0.1 cannot be given with solver="pinv"', (K, Y), {"solver": "pinv", "tau": 0.1}),
        (ValueError, 'solver="pinv" has no gradient', (K.clone().requires_grad_(), Y), {"solver": "pinv"}),
        (TypeError, "sample_mask has dtype torch.int64; it must be torch.bool", (K, Y), {"sample_mask": [1] * 6}),
        (ValueError, r"sample_mask has shape \(5,\); .* must be N = 6", (K, Y), {"sample_mask": [True] * 5}),
        (ValueError, r"sample_weight has shape \(7,\); .* must be N = 6", (K, Y), {"sample_weight": [1] * 7}),
        (ValueError, "sample_weight has negative entries", (K, Y), {"sample_weight": [1, 1, 1, 1, 1, -1]}),
        (ValueError, "sample_weight has .* NaN or infinity", (K, Y), {"sample_weight": [math.inf] * 6}),
    ),
)  # fmt: skip
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        gda_solve(*arguments, **options)


def test_asymmetry_to_rounding_is_no_error():
    y = sizes(9, 8)
    K = kernel_of(y)
    noisy = K * (1 + 1e-15 * normal(K.shape, 0))
    assert relative(gda_solve(noisy, y, tau=0.1).eigenvalues, gda_solve(K, y, tau=0.1).eigenvalues) < 1e-11
