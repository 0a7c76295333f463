"""The estimators against the paper's sums written out, scipy's generalised eigenproblem, and scikit-learn."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

import scipy.linalg
import scipy.stats
from sklearn.datasets import load_iris, load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis as TextbookLDA
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning, NotFittedError
from sklearn.metrics.pairwise import chi2_kernel, laplacian_kernel, polynomial_kernel, rbf_kernel
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils import get_tags

from phydi_kernels.discriminant import (
    KernelDiscriminantAnalysis,
    KernelDiscriminantAnalysisCV,
    LinearDiscriminantAnalysis,
    _base,
    _gaussian,
    kernel_discriminant_analysis_cv,
    linear_discriminant_analysis,
)

ESTIMATORS = [KernelDiscriminantAnalysis, LinearDiscriminantAnalysis, KernelDiscriminantAnalysisCV]
every = pytest.mark.parametrize("estimator", ESTIMATORS)
WEIGHTINGS = ("paper", "standard")


def draw(counts=(14, 23, 9), d=3, seed=0):
    """Overlapping classes of different sizes, shuffled."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    X = rng.normal(size=(len(y), d)) + 1.5 * rng.normal(size=(len(counts), d))[y]
    return X, y


def scatter(X, y, weighting, w=None):
    """S_w and S_b of Eq. 3 and 4 times N, for samples in rows, sample by sample."""
    w = np.ones(len(y)) if w is None else w
    m = np.average(X, axis=0, weights=w)
    S_w, S_b = np.zeros((2, X.shape[1], X.shape[1]))
    for j in np.unique(y):
        own, weights = X[y == j], w[y == j]
        m_j = np.average(own, axis=0, weights=weights)
        factor = weights.sum() if weighting == "paper" else 1
        S_w += factor * sum(v * np.outer(x - m_j, x - m_j) for x, v in zip(own, weights, strict=True))
        S_b += weights.sum() * np.outer(m_j - m, m_j - m)
    return S_w, S_b


def brute_force(X, y, tau, weighting, components):
    """Leading eigenvalues and eigenvectors of (S_w + tau I)^-1 S_b, for samples in rows."""
    S_w, S_b = scatter(X, y, weighting)
    values, vectors = scipy.linalg.eigh(S_b, S_w + tau * np.eye(len(S_w)))
    return values[::-1][:components], vectors[:, ::-1][:, :components]


def assert_same_up_to_sign(actual, expected, tolerance):
    signs = np.sign((actual * expected).sum(0))
    np.testing.assert_allclose(actual * signs, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def quiet_fit(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(*args, **kwargs)


KERNELS = {
    "rbf": (dict(gamma=0.3), lambda X, Y: rbf_kernel(X, Y, gamma=0.3)),
    "laplacian": (dict(gamma=0.2), lambda X, Y: laplacian_kernel(X, Y, gamma=0.2)),
    "poly": (
        dict(gamma=0.1, degree=2, coef0=0.5),
        lambda X, Y: polynomial_kernel(X, Y, degree=2, gamma=0.1, coef0=0.5),
    ),
    "linear": (dict(gamma=-7.0, degree=-1), lambda X, Y: X @ Y.T),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_transform_is_that_of_the_generalised_eigenproblem(kernel, weighting):
    options, function = KERNELS[kernel]
    options = {k: v for k, v in options.items() if kernel != "linear" or k == "gamma"}
    X, y = draw()
    X_new = draw(seed=1)[0]
    model = KernelDiscriminantAnalysis(kernel, tau=0.05, weighting=weighting, **options).fit(X, y)
    K = function(X, X)
    values, vectors = brute_force(K, y, 0.05, weighting, 2)
    np.testing.assert_allclose(model.eigenvalues_, values, rtol=1e-9)
    assert_same_up_to_sign(model.transform(X_new), function(X_new, X) @ vectors, 1e-9)
    np.testing.assert_allclose(model.explained_variance_ratio_, values / values.sum(), rtol=1e-9)
    # A^T G_w A = I
    G_w = scatter(K, y, weighting)[0] + 0.05 * np.eye(len(K))
    np.testing.assert_allclose(model.coefficients_.T @ G_w @ model.coefficients_, np.eye(2), atol=1e-9)


def test_precomputed_and_callable_kernels_give_what_the_named_one_does():
    X, y = draw()
    X_new = draw(seed=1)[0]
    named = KernelDiscriminantAnalysis("rbf", gamma=0.3).fit(X, y)
    called = KernelDiscriminantAnalysis(lambda A, B: rbf_kernel(A, B, gamma=0.3)).fit(X, y)
    given = KernelDiscriminantAnalysis("precomputed").fit(rbf_kernel(X, gamma=0.3), y)
    for other, new in ((called, X_new), (given, rbf_kernel(X_new, X, gamma=0.3))):
        np.testing.assert_allclose(other.transform(new), named.transform(X_new), rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(other.predict(new), named.predict(X_new))
    again = named.set_params(kernel="precomputed", gamma=None).fit(rbf_kernel(X, gamma=0.3), y)
    for model in (given, again):
        assert not hasattr(model, "X_fit_") and not hasattr(model, "gamma_")


def test_kernel_parameters_reach_the_kernel():
    X, y = draw()
    scale = np.array([0.5, 1.0, 3.0])
    for lengthscale in (scale, scale.tolist(), torch.tensor(scale)):
        model = KernelDiscriminantAnalysis("rbf", lengthscale=lengthscale).fit(X, y)
        same = KernelDiscriminantAnalysis("rbf", gamma=0.5).fit(X / scale, y)
        np.testing.assert_allclose(model.transform(X), same.transform(X / scale), rtol=1e-7)
    chi2 = KernelDiscriminantAnalysis("chi2", gamma=0.7, tau=1e-3).fit(abs(X), y)
    given = KernelDiscriminantAnalysis("precomputed", tau=1e-3).fit(chi2_kernel(abs(X), gamma=0.7), y)
    np.testing.assert_allclose(chi2.eigenvalues_, given.eigenvalues_, rtol=1e-9)
    rough, smooth = (KernelDiscriminantAnalysis("matern", nu=nu, tau=1e-3).fit(X, y) for nu in (0.5, 2.5))
    assert abs(rough.eigenvalues_ / smooth.eigenvalues_ - 1).max() > 0.1


def test_gamma():
    X, y = draw()
    assert KernelDiscriminantAnalysis().fit(X, y).gamma_ == 1 / 3
    assert KernelDiscriminantAnalysis(gamma=0.7).fit(X, y).gamma_ == 0.7
    scale = KernelDiscriminantAnalysis(gamma="scale").fit(X, y).gamma_
    np.testing.assert_allclose(scale, SVC(gamma="scale").fit(X, y)._gamma, rtol=1e-12)
    assert not hasattr(KernelDiscriminantAnalysis("linear").fit(X, y), "gamma_")


def test_tau_is_the_rule_of_equation_23():
    X, y = draw()
    S_w = scatter(rbf_kernel(X), y, "paper")[0]
    largest = np.linalg.eigvalsh(S_w)[-1]
    model = KernelDiscriminantAnalysis
    np.testing.assert_allclose(model().fit(X, y).tau_, largest / 1e8, rtol=1e-6)
    np.testing.assert_allclose(model(c_allow=1e3).fit(X, y).tau_, largest / 1e3, rtol=1e-6)
    np.testing.assert_allclose(
        model(c_allow=1e3, tau="one_norm").fit(X, y).tau_, abs(S_w).sum(0).max() / 1e3, rtol=1e-9
    )
    assert model(tau_min=2.5).fit(X, y).tau_ == 2.5
    linear = LinearDiscriminantAnalysis
    S_w = scatter(X, y, "paper")[0] / len(X)
    assert linear().fit(X, y).tau_ == 0
    np.testing.assert_allclose(linear(tau=None).fit(X, y).tau_, np.linalg.eigvalsh(S_w)[-1] / 1e8, rtol=1e-9)
    np.testing.assert_allclose(linear(tau="one_norm", c_allow=50).fit(X, y).tau_, abs(S_w).sum(0).max() / 50, rtol=1e-9)
    assert linear(tau=None, tau_min=2.5).fit(X, y).tau_ == 2.5


@pytest.mark.parametrize("solver", ("cholesky", "qr", "eigh", "cg"))
def test_solvers_agree(solver):
    X, y = draw()
    expected = KernelDiscriminantAnalysis(tau=1e-2).fit(X, y)
    model = KernelDiscriminantAnalysis(tau=1e-2, solver=solver).fit(X, y)
    np.testing.assert_allclose(model.transform(X), expected.transform(X), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("load", (load_iris, load_wine))
def test_linear_standard_is_textbook_lda(load):
    X, y = load(return_X_y=True)
    # Classes of different sizes.
    X, y = X[20:], y[20:]
    model = LinearDiscriminantAnalysis(weighting="standard").fit(X, y)
    textbook = TextbookLDA(solver="eigen").fit(X, y)
    actual, expected = model.transform(X), textbook.transform(X)
    assert_same_up_to_sign(actual / np.linalg.norm(actual, axis=0), expected / np.linalg.norm(expected, axis=0), 1e-10)
    np.testing.assert_allclose(model.predict_proba(X), textbook.predict_proba(X), atol=1e-10)
    np.testing.assert_allclose(model.explained_variance_ratio_, textbook.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_array_equal(model.predict(X), textbook.predict(X))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("tau", (0, 0.3))
def test_linear_transform_is_that_of_the_generalised_eigenproblem(weighting, tau):
    X, y = draw()
    N = len(X)
    model = LinearDiscriminantAnalysis(weighting=weighting, tau=tau).fit(X, y)
    values, vectors = brute_force(X / N**0.5, y, tau, weighting, 2)
    np.testing.assert_allclose(model.eigenvalues_, values, rtol=1e-10)
    assert_same_up_to_sign(model.coefficients_, vectors, 1e-10)
    assert_same_up_to_sign(model.transform(X), X @ vectors, 1e-10)


def test_weightings_agree_for_balanced_classes_alone():
    for counts, same in (((15, 15, 15), True), ((30, 10, 5), False)):
        X, y = draw(counts)
        for make in (LinearDiscriminantAnalysis, lambda **o: KernelDiscriminantAnalysis("linear", **o)):
            directions = []
            for weighting in WEIGHTINGS:
                # K D_w K grows by N_j where the paper's weights are taken, and so must tau.
                tau = 1e-3 * (counts[0] if weighting == "paper" and make is not LinearDiscriminantAnalysis else 1)
                tau = 0 if make is LinearDiscriminantAnalysis else tau
                Z = make(weighting=weighting, tau=tau).fit(X, y).transform(X)
                Z = Z - Z.mean(0)
                directions.append(Z / np.linalg.norm(Z, axis=0))
            assert np.allclose(*directions, atol=1e-7) == same


def test_linear_of_a_singular_scatter_takes_the_rule_and_says_so():
    X, y = draw()
    constant = np.column_stack((X, np.full(len(X), 0.1)))
    dependent = np.column_stack((X, X @ [1.0, -2.0, 0.5]))
    few = draw((3, 3, 2), d=20)
    for X_, y_ in ((constant, y), (dependent, y), few):
        with pytest.warns(ConvergenceWarning, match="tau=0.0: tau=.* was taken"):
            model = LinearDiscriminantAnalysis().fit(X_, y_)
        largest = np.linalg.eigvalsh(scatter(X_, y_, "paper")[0] / len(X_))[-1]
        np.testing.assert_allclose(model.tau_, largest / 1e8, rtol=1e-6)
        assert np.isfinite(model.transform(X_)).all()
    plain = LinearDiscriminantAnalysis().fit(X, y)
    np.testing.assert_allclose(
        quiet_fit(LinearDiscriminantAnalysis(), constant, y).predict_proba(constant), plain.predict_proba(X), atol=1e-6
    )


def test_linear_does_not_mind_the_scales_of_features():
    X, y = draw()
    scales = np.array([1e-9, 1.0, 1e9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, scaled = (LinearDiscriminantAnalysis().fit(x, y) for x in (X, X * scales))
    np.testing.assert_allclose(scaled.transform(X * scales), model.transform(X), atol=1e-9)


def test_an_offset_of_the_data_costs_no_digits_in_float32():
    X, y = draw()
    # Samples that float32 holds exactly, with the offset and without it.
    X = np.rint(64 * X) / 64
    far = (X + 2**17).astype(np.float32)
    for model in (LinearDiscriminantAnalysis(), KernelDiscriminantAnalysis(tau=0.1)):
        expected = model.fit(X.astype(np.float32), y).predict_proba(X)
        np.testing.assert_allclose(model.fit(far, y).predict_proba(far), expected, atol=1e-4)


def test_linear_fits_in_blocks(monkeypatch):
    X, y = draw()
    expected = LinearDiscriminantAnalysis().fit(X, y)
    monkeypatch.setattr(linear_discriminant_analysis, "BLOCK_ENTRIES", 0)
    model = LinearDiscriminantAnalysis().fit(X, y)
    np.testing.assert_allclose(model.coefficients_, expected.coefficients_, rtol=1e-10)
    np.testing.assert_allclose(model.eigenvalues_, expected.eigenvalues_, rtol=1e-10)


def test_scatter_of_rounding_alone_is_none():
    X, y = draw((7, 11, 13))
    # Constant within each class but for the rounding of the class means.
    with pytest.warns(ConvergenceWarning, match="tau=.* was taken"):
        model = LinearDiscriminantAnalysis().fit(np.column_stack((X, 0.1 * y + y**2 / 3)), y)
    assert model.tau_ > 1e-12


def test_classes_without_scatter():
    y = np.repeat([0, 1, 2], 4)
    X = np.repeat(np.array([[0.0, 0.1], [1.0, 0.3], [0.0, 1.7]]), 4, axis=0)
    for model in (LinearDiscriminantAnalysis(), KernelDiscriminantAnalysis(tau=1e-3)):
        quiet_fit(model, X, y)
        assert model.score(X, y) == 1
        assert np.isfinite(model.predict_proba(X + 0.1)).all()
        np.testing.assert_array_equal(model.predict(X + 0.1), y)


@every
def test_constant_samples_have_the_priors_for_probabilities(estimator):
    y = np.repeat([0, 1], [10, 30])
    X = np.full((40, 2), 0.3)
    options = {KernelDiscriminantAnalysis: {"tau": 1e-3}, KernelDiscriminantAnalysisCV: {"taus": [1e-3]}}
    model = quiet_fit(estimator(**options.get(estimator, {})), X, y)
    np.testing.assert_allclose(model.predict_proba(X), np.tile([0.25, 0.75], (40, 1)), atol=1e-12)


# Labels, order and weights


@every
@pytest.mark.parametrize(
    "names", (["b", "a", "c"], [7, -1, 3], [2.0, 0.0, -1.0], np.array(["y", "x", "z"], object)), ids=str
)
def test_relabelling_renames_the_predictions(estimator, names):
    X, y = draw()
    X_new = draw(seed=1)[0]
    expected = estimator().fit(X, y).predict(X_new)
    model = estimator().fit(X, np.asarray(names)[y])
    np.testing.assert_array_equal(model.predict(X_new), np.asarray(names)[expected])
    np.testing.assert_array_equal(model.classes_, sorted(names))
    np.testing.assert_allclose(model.predict_proba(X_new).sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
def test_order_of_samples_does_not_matter(estimator):
    X, y = draw()
    X_new = draw(seed=1)[0]
    order = np.random.default_rng(2).permutation(len(y))
    model, other = estimator().fit(X, y), estimator().fit(X[order], y[order])
    np.testing.assert_array_equal(other.predict(X_new), model.predict(X_new))
    np.testing.assert_allclose(other.transform(X_new), model.transform(X_new), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
def test_the_last_class_lies_above_the_first(estimator):
    for counts in ((12, 10), (12, 10, 15)):
        X, y = draw(counts)
        for sign in (1, -1):
            means = estimator().fit(sign * X, y).means_
            assert (means[-1, 0] > means[0, 0]) or abs(means[-1, 0] - means[0, 0]) < 0.5 * np.ptp(means[:, 0])
    X, y = draw((12, 10))
    model, swapped = estimator().fit(X, y), estimator().fit(X, 1 - y)
    np.testing.assert_allclose(swapped.transform(X), -model.transform(X), rtol=1e-6)


@every
def test_a_weight_is_a_number_of_repetitions(estimator):
    X, y = draw((12, 10, 8))
    X_new = draw(seed=1)[0]
    w = np.random.default_rng(0).integers(0, 4, len(y))
    options, repeated = {}, {}
    if estimator is KernelDiscriminantAnalysisCV:
        test = np.arange(len(y)) % 3
        folds, folds_repeated = (
            [(np.nonzero(t != i)[0], np.nonzero(t == i)[0]) for i in range(3)] for t in (test, test.repeat(w))
        )
        options, repeated = {"cv": folds}, {"cv": folds_repeated}
    model = estimator(**options).fit(X, y, sample_weight=w)
    other = estimator(**repeated).fit(X.repeat(w, axis=0), y.repeat(w))
    np.testing.assert_allclose(model.transform(X_new), other.transform(X_new), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(model.predict_proba(X_new), other.predict_proba(X_new), atol=1e-7)
    np.testing.assert_allclose(model.priors_, other.priors_, rtol=1e-12)
    if options:
        np.testing.assert_allclose(
            model.cv_results_["mean_test_score"], other.cv_results_["mean_test_score"], rtol=1e-12
        )


@pytest.mark.parametrize("value", (1e10, 1e14, 1e20))
def test_a_sample_of_weight_0_costs_no_digits_wherever_it_lies(value):
    X, y = load_iris(return_X_y=True)
    stray, weights = X.copy(), np.ones(len(X))
    stray[0], weights[0] = value, 0
    fitted = LinearDiscriminantAnalysis().fit(stray, y, sample_weight=weights)
    expected = LinearDiscriminantAnalysis().fit(X[1:], y[1:])
    np.testing.assert_allclose(fitted.coefficients_, expected.coefficients_, rtol=1e-9)
    np.testing.assert_allclose(fitted.covariance_, expected.covariance_, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("priors", ([1 / 3] * 3, [0.9, 0.05, 0.05]))
@pytest.mark.parametrize(("far", "allowed"), ((1e2, 1e-12), (1e5, 0.01), (1e7, 0.01)))
def test_a_class_far_off_does_not_hide_the_others(far, allowed, priors):
    """Beyond 1e4 deviations its own direction has a larger variance than the classes have in it, and no other."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 100)
    X = rng.normal(size=(300, 3))
    X[y == 1, 0] += 3
    X[y == 2, 1] += far
    means = np.array([X[y == j].mean(0) for j in range(3)])
    precision = np.linalg.inv(np.cov((X - means[y]).T, bias=True))
    distances = np.einsum("nji,ik,njk->nj", X[:, None] - means, precision, X[:, None] - means)
    joint = np.exp(-distances / 2) * np.array(priors)
    found = LinearDiscriminantAnalysis(weighting="standard", priors=priors).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(found, joint / joint.sum(1, keepdims=True), atol=allowed)


def test_classes_are_counted_in_blocks(monkeypatch):
    X, y = load_wine(return_X_y=True)
    whole = LinearDiscriminantAnalysis().fit(X, y)
    monkeypatch.setattr("phydi_kernels.discriminant._gaussian._ENTRIES", 21)
    blocks = LinearDiscriminantAnalysis().fit(X, y)
    np.testing.assert_allclose(blocks.means_, whole.means_, rtol=1e-12)
    np.testing.assert_allclose(blocks.covariance_, whole.covariance_, rtol=1e-12)


def test_search_does_not_mind_the_default_device():
    X, y = load_iris(return_X_y=True)
    options = {"gammas": [0.1, 1.0], "cv": 3}
    expected = KernelDiscriminantAnalysisCV(**options).fit(X, y)
    with torch.device("meta"):
        found = KernelDiscriminantAnalysisCV(**options).fit(X, y)
    assert found.best_params_ == expected.best_params_


@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
def test_a_class_of_weight_0_is_no_class(estimator):
    X, y = draw((12, 10, 8))
    w = (y != 1).astype(float)
    model, other = estimator().fit(X, y, sample_weight=w), estimator().fit(X[y != 1], y[y != 1])
    np.testing.assert_array_equal(model.classes_, [0, 2])
    np.testing.assert_allclose(model.transform(X), other.transform(X), rtol=1e-6)
    if estimator is KernelDiscriminantAnalysis:
        assert (model.coefficients_[y == 1] == 0).all()
        scale = KernelDiscriminantAnalysis(gamma="scale")
        assert scale.fit(X, y, w).gamma_ == pytest.approx(scale.fit(X[y != 1], y[y != 1]).gamma_, rel=1e-12)


# The threshold


@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
@pytest.mark.parametrize("priors", (None, (0.2, 0.5, 0.3), (1.0, 0.0, 0.0)))
def test_probabilities_are_those_of_gaussians_on_the_projection(estimator, priors):
    X, y = draw()
    X_new = draw(seed=1)[0]
    w = np.random.default_rng(3).uniform(0.5, 2, len(y))
    model = estimator(tau=0.1, priors=priors).fit(X, y, sample_weight=w)
    Z, Z_new = model.transform(X), model.transform(X_new)
    means = np.stack([np.average(Z[y == j], axis=0, weights=w[y == j]) for j in range(3)])
    covariance = np.cov((Z - means[y]).T, aweights=w, ddof=0) if Z.shape[1] > 1 else None
    np.testing.assert_allclose(model.means_, means, rtol=1e-9)
    np.testing.assert_allclose(model.covariance_, covariance, rtol=1e-9)
    frequencies = np.bincount(y, w) / w.sum() if priors is None else np.array(priors)
    np.testing.assert_allclose(model.priors_, frequencies, rtol=1e-12)
    density = np.stack([scipy.stats.multivariate_normal(m, covariance).pdf(Z_new) for m in means], 1) * frequencies
    posterior = density / density.sum(1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(X_new), posterior, rtol=1e-7, atol=1e-12)
    np.testing.assert_array_equal(model.predict(X_new), posterior.argmax(1))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(model.predict_log_proba(X_new), np.log(posterior), rtol=1e-6, atol=1e-7)
    scores = model.decision_function(X_new)
    assert scores.shape == (len(X_new), 3)
    if priors is None:
        np.testing.assert_allclose(np.diff(scores), np.diff(np.log(posterior)), rtol=1e-6, atol=1e-7)


def test_means_that_differ_by_rounding_do_not_discriminate():
    means = torch.tensor([[3.0], [3.0 + 4e-16]], dtype=torch.float64)
    priors = torch.tensor([0.25, 0.75], dtype=torch.float64)
    joint = _gaussian.discriminant_scores(means, means, torch.zeros(1, 1, dtype=torch.float64), priors)
    np.testing.assert_allclose(joint.softmax(-1).numpy(), [[0.25, 0.75]] * 2, atol=0.02)


@every
def test_decision_function_of_two_classes_is_the_log_odds(estimator):
    X, y = draw((20, 30))
    model = estimator().fit(X, np.array(["no", "yes"])[y])
    log_proba = model.predict_log_proba(X)
    scores = model.decision_function(X)
    assert scores.shape == (len(X),)
    np.testing.assert_allclose(scores, log_proba[:, 1] - log_proba[:, 0], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(model.predict(X), np.where(scores > 0, "yes", "no"))


@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
def test_n_components(estimator):
    X, y = draw((10, 12, 14, 9))
    full = estimator().fit(X, y)
    model = estimator(n_components=2).fit(X, y)
    assert full.transform(X).shape[1] == 3
    np.testing.assert_allclose(model.transform(X), full.transform(X)[:, :2], rtol=1e-9)
    np.testing.assert_allclose(model.explained_variance_ratio_, full.explained_variance_ratio_[:2], rtol=1e-12)
    np.testing.assert_allclose(full.explained_variance_ratio_.sum(), 1, rtol=1e-12)
    assert LinearDiscriminantAnalysis().fit(X[:, :2], y).transform(X[:, :2]).shape[1] == 2


# Arrays and tensors


@every
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_tensors_give_tensors_and_the_same_numbers(estimator, dtype):
    X, y = draw()
    X = torch.tensor(X, dtype=dtype)
    by_tensor = estimator().fit(X.requires_grad_(), torch.tensor(y))
    X = X.detach()
    by_array = estimator().fit(X.numpy(), y)
    assert isinstance(by_tensor.coefficients_, torch.Tensor) and isinstance(by_array.coefficients_, np.ndarray)
    for method in ("transform", "predict_proba", "predict_log_proba", "decision_function"):
        of_tensor, of_array = (getattr(by_tensor, method)(x) for x in (X, X.numpy()))
        assert isinstance(of_tensor, torch.Tensor) and of_tensor.dtype == dtype and not of_tensor.requires_grad
        assert isinstance(of_array, np.ndarray) and of_array.dtype == X.numpy().dtype
        np.testing.assert_array_equal(of_tensor.numpy(), of_array)
        np.testing.assert_array_equal(getattr(by_array, method)(X).numpy(), getattr(by_array, method)(X.numpy()))
        np.testing.assert_array_equal(getattr(by_array, method)(X.numpy()), of_array)
    assert isinstance(by_tensor.predict(X), np.ndarray)
    assert by_tensor.score(X, torch.tensor(y)) == by_array.score(X.numpy(), y)
    fresh = estimator().fit_transform(X, y)
    assert isinstance(fresh, torch.Tensor)
    np.testing.assert_allclose(fresh.numpy(), by_tensor.transform(X).numpy(), rtol=1e-4, atol=1e-4)


@every
def test_dtype(estimator):
    X, y = draw()
    for given in (np.rint(4 * X).astype(int), torch.tensor(X).half(), torch.tensor(X).bfloat16()):
        model = estimator().fit(given, y)
        assert model.transform(given).dtype in (np.float64, torch.float64)
    for name in (torch.float32, "float32", np.float32):
        model = estimator(dtype=name).fit(X, y)
        assert model.coefficients_.dtype == np.float32
        assert model.transform(X).dtype == np.float32
        assert model.transform(torch.tensor(X)).dtype == torch.float32


@every
def test_device(estimator, device):
    X, y = draw()
    expected = estimator().fit(X, y)
    for given in (X, torch.tensor(X, device=device)):
        model = estimator(device=device).fit(given, y)
        assert isinstance(model.coefficients_, np.ndarray) == (given is X and device.type == "cpu")
        for new in (X, torch.tensor(X, device=device)):
            proba = model.predict_proba(new)
            assert isinstance(proba, np.ndarray) if new is X else proba.device == new.device
            np.testing.assert_allclose(_base.to_numpy(proba), expected.predict_proba(X), atol=1e-6)
            np.testing.assert_array_equal(model.predict(new), expected.predict(X))


def test_fitted_samples_are_a_copy():
    X, y = draw()
    for given in (X.copy(), torch.tensor(X)):
        model = KernelDiscriminantAnalysis().fit(given, y)
        expected = model.predict_proba(X)
        given[:] = 0
        np.testing.assert_array_equal(model.predict_proba(X), expected)


def test_callables_see_what_was_fitted():
    X, y = draw()
    seen = []

    def kernel(A, B):
        seen.append((type(A), type(B)))
        return A @ B.T

    for given, kind in ((X, np.ndarray), (torch.tensor(X), torch.Tensor)):
        model = KernelDiscriminantAnalysis(kernel).fit(given, y)
        model.transform(X)
        assert seen == [(kind, kind)] * 2
        seen.clear()


def test_reversed_and_read_only_arrays():
    X, y = draw()
    frozen = X.copy()
    frozen.flags.writeable = False
    for model in (KernelDiscriminantAnalysis(), LinearDiscriminantAnalysis()):
        expected = model.fit(X, y).transform(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for given in (X, frozen):
                np.testing.assert_allclose(model.fit(given, y).transform(given[::-1])[::-1], expected, rtol=1e-7)


@pytest.mark.parametrize("model", (KernelDiscriminantAnalysis(), LinearDiscriminantAnalysis()), ids=str)
def test_new_samples_are_projected_in_blocks(model, monkeypatch):
    X, y = draw()
    X_new = np.concatenate([draw(seed=s)[0] for s in range(5)])
    model.fit(X, y)
    expected = {m: getattr(model, m)(X_new) for m in ("transform", "predict", "predict_proba")}
    rows = []
    project = type(model)._project
    monkeypatch.setattr(type(model), "_project", lambda self, block: rows.append(len(block)) or project(self, block))
    monkeypatch.setattr(_base, "BLOCK_ENTRIES", 7 * len(model.coefficients_))
    for method, values in expected.items():
        rows.clear()
        np.testing.assert_allclose(getattr(model, method)(X_new), values, rtol=1e-6, atol=1e-9)
        assert sum(rows) == len(X_new) and max(rows) == 7


@every
def test_a_pickled_estimator_predicts_the_same(estimator):
    X, y = draw()
    for given in (X, torch.tensor(X)):
        model = estimator().fit(given, y)
        other = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(np.asarray(other.predict_proba(given)), np.asarray(model.predict_proba(given)))


@every
def test_names_of_features(estimator):
    X, y = draw()
    model = estimator().fit(X, y)
    name = estimator.__name__.lower()
    assert model.get_feature_names_out().tolist() == [f"{name}0", f"{name}1"]
    assert model.set_output(transform="default").transform(X).shape == (len(X), 2)


@every
def test_tags(estimator):
    tags = get_tags(estimator())
    assert tags.transformer_tags.preserves_dtype == ["float64", "float32"]
    assert not tags.input_tags.pairwise and not tags.input_tags.positive_only
    if estimator is not LinearDiscriminantAnalysis:
        assert get_tags(estimator("precomputed")).input_tags.pairwise
        assert get_tags(estimator("chi2")).input_tags.positive_only


def test_in_a_pipeline():
    X, y = load_wine(return_X_y=True)
    for model in (KernelDiscriminantAnalysis(gamma=0.02, c_allow=1e3), LinearDiscriminantAnalysis()):
        assert cross_val_score(make_pipeline(StandardScaler(), model), X, y).mean() > 0.96


# The search


def grid_search(X, y, grid, cv=5, **options):
    """scikit-learn's search, its results by parameters."""
    search = GridSearchCV(KernelDiscriminantAnalysis(**options), grid, cv=cv).fit(X, y)
    return {tuple(sorted(p.items())): i for i, p in enumerate(search.cv_results_["params"])}, search.cv_results_


@pytest.mark.parametrize("options", ({}, {"weighting": "standard", "solver": "eigh"}, {"n_components": 1}), ids=str)
@pytest.mark.parametrize("level", ("tau", "c_allow"))
def test_search_is_that_of_scikit_learn(level, options):
    X, y = draw((23, 31, 17))
    gammas, levels = [0.03, 0.3, 3.0], [1e-3, 1.0] if level == "tau" else [1e2, 1e5]
    model = KernelDiscriminantAnalysisCV(gammas=gammas, **{f"{level}s": levels}, **options).fit(X, y)
    index, expected = grid_search(X, y, {"gamma": gammas, level: levels}, **options)
    results = model.cv_results_
    assert results["params"] == [{"gamma": g, level: v} for g in gammas for v in levels]
    order = [index[tuple(sorted(p.items()))] for p in results["params"]]
    names = [f"split{i}_test_score" for i in range(5)] + ["mean_test_score", "std_test_score", "rank_test_score"]
    for name in names:
        np.testing.assert_allclose(results[name], expected[name][order], rtol=1e-12, err_msg=name)
    assert results["param_gamma"].tolist() == [p["gamma"] for p in results["params"]]
    assert results[f"param_{level}"].tolist() == [p[level] for p in results["params"]]
    assert len(set(results["mean_test_score"])) > 2
    best = model.best_index_
    assert results["rank_test_score"][best] == 1 and (results["rank_test_score"][:best] > 1).all()
    assert model.best_score_ == results["mean_test_score"][best] and model.best_params_ == results["params"][best]
    refitted = KernelDiscriminantAnalysis(**options, **model.best_params_).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), refitted.predict_proba(X))
    np.testing.assert_array_equal(model.coefficients_, refitted.coefficients_)
    assert model.tau_ == refitted.tau_ and model.n_splits_ == 5


def test_search_takes_splitters_indices_and_masks():
    X, y = draw((23, 31, 17))
    splitter = StratifiedKFold(4, shuffle=True, random_state=0)
    folds = list(splitter.split(X, y))
    masks = [tuple(np.isin(np.arange(len(y)), part) for part in fold) for fold in folds]
    scores = [
        KernelDiscriminantAnalysisCV(cv=cv).fit(X, y).cv_results_["mean_test_score"] for cv in (splitter, folds, masks)
    ]
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[0], scores[2])
    assert (scores[0] != KernelDiscriminantAnalysisCV().fit(X, y).cv_results_["mean_test_score"]).any()


def test_search_without_a_class_in_a_fold():
    X, y = draw((20, 20, 6))
    folds = [(np.nonzero(y != 2)[0][::2], np.arange(len(y))), (np.arange(len(y)), np.arange(0, len(y), 2))]
    priors = [0.2, 0.5, 0.3]
    for given in (None, priors):
        model = KernelDiscriminantAnalysisCV(gammas=[0.3], taus=[0.1], cv=folds, priors=given).fit(X, y)
        for i, (train, test) in enumerate(folds):
            own = np.array(priors)[np.unique(y[train])]
            single = KernelDiscriminantAnalysis(gamma=0.3, tau=0.1, priors=None if given is None else own / own.sum())
            expected = single.fit(X[train], y[train]).score(X[test], y[test])
            assert model.cv_results_[f"split{i}_test_score"][0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kernel", ("linear", "cosine", "precomputed", "poly", "matern", lambda A, B: A @ B.T))
def test_search_over_the_parameters_that_a_kernel_has(kernel):
    X, y = draw((20, 20, 15))
    given = rbf_kernel(X) if kernel == "precomputed" else X
    model = KernelDiscriminantAnalysisCV(kernel, c_allows=[1e3, 1e5]).fit(given, y)
    index, expected = grid_search(
        given,
        y,
        {"c_allow": [1e3, 1e5]}
        | ({"gamma": [p["gamma"] for p in model.cv_results_["params"]]} if kernel in ("poly", "matern") else {}),
        kernel=kernel,
    )
    order = [index[tuple(sorted(p.items()))] for p in model.cv_results_["params"]]
    np.testing.assert_allclose(model.cv_results_["mean_test_score"], expected["mean_test_score"][order], rtol=1e-12)
    assert ("param_gamma" in model.cv_results_) == (kernel in ("poly", "matern"))


def test_search_with_a_lengthscale_or_without_tau():
    X, y = draw((20, 20, 15))
    model = KernelDiscriminantAnalysisCV(lengthscale=[1.0, 2.0, 3.0], taus=[0.1, 1.0]).fit(X, y)
    assert [set(p) for p in model.cv_results_["params"]] == [{"tau"}] * 2
    model = KernelDiscriminantAnalysisCV("linear", solver="pinv").fit(X, y)
    assert model.cv_results_["params"] == [{}]
    model = KernelDiscriminantAnalysisCV(gammas=[0.1, 1.0], solver="pinv").fit(X, y)
    _, expected = grid_search(X, y, {"gamma": [0.1, 1.0]}, solver="pinv")
    np.testing.assert_allclose(model.cv_results_["mean_test_score"], expected["mean_test_score"], rtol=1e-12)


def test_default_grids():
    X, y = draw((20, 20, 15))
    for dtype, levels in ((np.float64, 7), (np.float32, 4)):
        model = KernelDiscriminantAnalysisCV().fit(X.astype(dtype), y)
        gammas = np.unique(model.cv_results_["param_gamma"])
        np.testing.assert_allclose(gammas, np.logspace(-2, 2, 9) / (3 * X.var()), rtol=1e-5)
        np.testing.assert_array_equal(np.unique(model.cv_results_["param_c_allow"]), 10.0 ** np.arange(2, 2 + levels))


def test_batches_of_gammas_do_not_change_the_search(monkeypatch):
    X, y = draw((20, 20, 15))
    expected = KernelDiscriminantAnalysisCV().fit(X, y).cv_results_["mean_test_score"]
    monkeypatch.setattr(kernel_discriminant_analysis_cv, "_ENTRIES", 0)
    np.testing.assert_array_equal(KernelDiscriminantAnalysisCV().fit(X, y).cv_results_["mean_test_score"], expected)


def test_progress_bar(capsys):
    X, y = draw()
    KernelDiscriminantAnalysisCV(cv=3).fit(X, y)
    assert capsys.readouterr().err == ""
    KernelDiscriminantAnalysisCV(cv=3, progress=True).fit(X, y)
    assert "cross-validation: 100%" in capsys.readouterr().err


def with_info(gda_solve, value, column):
    """gda_solve whose problems of one tau are said to have ended with ``value``."""

    def solve(*args, **kwargs):
        solution = gda_solve(*args, **kwargs)
        info, coefficients = solution.info.clone(), solution.coefficients.clone()
        info.view(-1)[column] = value
        if value < 0:
            coefficients.view(-1, *coefficients.shape[-2:])[column] = torch.nan
        return solution._replace(info=info, coefficients=coefficients)

    return solve


def test_search_ranks_candidates_without_a_solution_last(monkeypatch):
    X, y = draw()
    module = kernel_discriminant_analysis_cv
    options = {"gammas": [0.3], "taus": [1e-2, 1e-1, 1.0], "cv": 3}
    expected = KernelDiscriminantAnalysisCV(**options).fit(X, y).cv_results_["mean_test_score"]
    solve = module.gda_solve
    monkeypatch.setattr(module, "gda_solve", with_info(solve, -1, 1))
    with pytest.warns(FitFailedWarning, match="3 of 9 fits found no solution"):
        results = KernelDiscriminantAnalysisCV(**options).fit(X, y).cv_results_
    np.testing.assert_array_equal(results["mean_test_score"], [expected[0], np.nan, expected[2]])
    assert results["rank_test_score"][1] == 3
    with pytest.raises(ValueError, match="None of the 1 candidates"), pytest.warns(FitFailedWarning):
        monkeypatch.setattr(module, "gda_solve", with_info(solve, -1, 0))
        KernelDiscriminantAnalysisCV(gammas=[0.3], taus=[1.0], cv=3).fit(X, y)
    monkeypatch.setattr(module, "gda_solve", with_info(solve, 2, 1))
    with pytest.warns(ConvergenceWarning, match="3 of 9 fits took a larger tau"):
        results = KernelDiscriminantAnalysisCV(**options).fit(X, y).cv_results_
    np.testing.assert_array_equal(results["mean_test_score"], expected)


# What goes wrong


def test_a_raised_tau_is_reported():
    X, y = draw()
    with pytest.warns(ConvergenceWarning, match=r"tau=1e-20: tau=\d.* was taken"):
        model = KernelDiscriminantAnalysis("linear", tau=1e-20).fit(X, y)
    assert model.tau_ > 1e-20


def test_no_solution_is_an_error():
    X, y = draw()
    with pytest.raises(np.linalg.LinAlgError, match="solver='cg' and tau=1e-12 .*did not converge"):
        KernelDiscriminantAnalysis(gamma=1e-2, tau=1e-12, solver="cg").fit(X, y)


def test_a_kernel_that_is_visibly_not_semi_definite_is_reported():
    X, y = draw()
    with pytest.warns(UserWarning, match="kernel='sigmoid' has a negative entry on its diagonal"):
        model = KernelDiscriminantAnalysis("sigmoid", gamma=0.1, coef0=-2.0, tau=1e-3).fit(X, y)
    assert model.score(X, y) > 0.5
    with pytest.warns(UserWarning, match="kernel='precomputed'"):
        KernelDiscriminantAnalysis("precomputed", tau=1e-3).fit(np.diag(np.linspace(-1, 1, len(y))), y)


X, Y = draw()
SYMMETRIC = rbf_kernel(X)
BAD = {
    "one class": ({}, (X, np.zeros(len(Y))), ValueError, r"y holds one class.*at least 2 classes"),
    "one weighted class": ({}, (X, Y, Y == 0), ValueError, "one class, .*positive sample_weight; at least 2"),
    "NaN": ({}, (np.where(X > 1, np.nan, X), Y), ValueError, "X contains NaN"),
    "infinity": ({}, (np.where(X > 1, np.inf, X), Y), ValueError, "X contains infinity"),
    "NaN tensor": (
        {},
        (torch.tensor(np.where(X > 1, np.nan, X)), Y),
        ValueError,
        "X holds NaN or entries that are infinite",
    ),
    "infinity in float32": (
        {"dtype": "float32"},
        (torch.tensor(X) * 1e39, Y),
        ValueError,
        "X holds .* infinite in torch.float32",
    ),
    "3 dimensions": ({}, (torch.zeros(4, 2, 2), Y[:4]), ValueError, r"X of shape \(4, 2, 2\) must have 2 dim"),
    "no feature": ({}, (torch.zeros(4, 0), Y[:4]), ValueError, r"X of shape \(4, 0\) must have at least one"),
    "complex": ({}, (torch.zeros(4, 2).cfloat(), Y[:4]), ValueError, "must be real"),
    "short labels": ({}, (X, Y[:-1]), ValueError, "inconsistent numbers of samples"),
    "short labels of a tensor": ({}, (torch.tensor(X), Y[:-1]), ValueError, "inconsistent numbers of samples"),
    "no labels": ({}, (torch.tensor(X), None), ValueError, "requires y"),
    "continuous labels": ({}, (X, Y + 0.5 * X[:, 0]), ValueError, "Unknown label type"),
    "short weights": ({}, (X, Y, np.ones(3)), ValueError, "sample_weight"),
    "negative weights": ({}, (X, Y, -np.ones(len(Y))), ValueError, "Negative values.*sample_weight"),
    "too many components": ({"n_components": 3}, (X, Y), ValueError, "n_components=3 must be at most .* = 2"),
    "no component": ({"n_components": 0}, (X, Y), ValueError, "n_components=0 must be an integer >= 1"),
    "half a component": ({"n_components": 1.5}, (X, Y), TypeError, "n_components=1.5 must be an integer"),
    "negative prior": ({"priors": [0.5, 0.7, -0.2]}, (X, Y), ValueError, "priors=.* must be >= 0 and their sum 1"),
    "priors of sum 2": ({"priors": [0.5, 0.7, 0.8]}, (X, Y), ValueError, "priors=.* must be >= 0 and their sum 1"),
    "two priors": ({"priors": [0.5, 0.5]}, (X, Y), ValueError, "priors=.* must have 3 entries"),
    "half precision": ({"dtype": torch.float16}, (X, Y), ValueError, "dtype=.* must be None, float32 or float64"),
    "no dtype": ({"dtype": "wide"}, (X, Y), ValueError, "dtype='wide' must be None, float32 or float64"),
    "weighting": ({"weighting": "none"}, (X, Y), ValueError, "weighting='none' is not one of"),
}
BAD_SINGLE = {
    "negative tau": ({"tau": -1.0}, (X, Y), ValueError, r"tau=-1.0 must be None, \"one_norm\" or a finite number >= 0"),
    "NaN tau": ({"tau": np.nan}, (X, Y), ValueError, "tau=nan must be"),
    "unknown rule": ({"tau": "norm"}, (X, Y), ValueError, "tau='norm' must be"),
    "c_allow": ({"c_allow": 0.5, "tau": None}, (X, Y), ValueError, "c_allow=0.5 must be"),
    "tau_min": ({"tau_min": -0.5, "tau": None}, (X, Y), ValueError, "tau_min=-0.5 must be >= 0"),
}
BAD_LINEAR = {
    "more components than features": (
        {"n_components": 2},
        (X[:, :1], Y),
        ValueError,
        r"n_components=2 must be at most min\(.*number of features\) = 1",
    ),
}
BAD_KERNEL = {
    "gamma 0": ({"gamma": 0.0}, (X, Y), ValueError, "gamma=0.0 must be > 0"),
    "negative gamma": ({"gamma": -1.0}, (X, Y), ValueError, "gamma=-1.0 must be > 0"),
    "unknown gamma": ({"gamma": "auto"}, (X, Y), ValueError, "gamma='auto' must be"),
    "two scales": ({"gamma": 1.0, "lengthscale": 1.0}, (X, Y), ValueError, "gamma=1.0 and lengthscale=1.0"),
    "unknown solver": ({"solver": "lu"}, (X, Y), ValueError, "solver='lu' is not one of"),
}
BAD_EITHER_KERNEL = {
    "unknown kernel": ({"kernel": "gauss"}, (X, Y), ValueError, "kernel='gauss' is not one of .*'rbf'.*'precomputed'"),
    "no kernel": ({"kernel": 3}, (X, Y), TypeError, "kernel=3 must be a name or a callable"),
    "negative for chi2": ({"kernel": "chi2"}, (X, Y), ValueError, 'Negative values in data.* kernel="chi2" needs'),
    "matrix not square": ({"kernel": "precomputed"}, (X, Y), ValueError, r"X has shape \(46, 3\).*square"),
    "matrix not symmetric": (
        {"kernel": "precomputed"},
        (SYMMETRIC + 1e-6 * np.tri(len(X)), Y),
        ValueError,
        "K is not symmetric",
    ),
    "callable's shape": ({"kernel": lambda A, B: A}, (X, Y), ValueError, r"kernel\(X, Y\) returned shape \(46, 3\)"),
    "callable's NaN": (
        {"kernel": lambda A, B: np.full((len(A), len(B)), np.nan)},
        (X, Y),
        ValueError,
        "The matrix of kernel=<.*> has NaN or infinite entries",
    ),
}
BAD_SEARCH = {
    "no gamma": ({"gammas": []}, (X, Y), ValueError, r"gammas=\[\] must be a sequence of finite numbers > 0"),
    "gamma 0": ({"gammas": [1.0, 0.0]}, (X, Y), ValueError, "gammas=.* must be a sequence of finite numbers > 0"),
    "one gamma": ({"gammas": 1.0}, (X, Y), ValueError, "gammas=1.0 must be a sequence"),
    "negative tau": ({"taus": [-1.0]}, (X, Y), ValueError, "taus=.* must be a sequence of finite numbers >= 0"),
    "c_allow": ({"c_allows": [1.0]}, (X, Y), ValueError, "c_allows=.* must be a sequence of finite numbers > 1"),
    "both": ({"taus": [1.0], "c_allows": [10.0]}, (X, Y), ValueError, "taus=.* and c_allows=.* are both given"),
    "two scales": ({"gammas": [1.0], "lengthscale": 1.0}, (X, Y), ValueError, "gammas=.* and lengthscale=.* are both"),
    "tau of pinv": ({"solver": "pinv", "taus": [1.0]}, (X, Y), ValueError, 'solver="pinv" has no tau'),
    "one class in a fold": (
        {"cv": [(np.nonzero(Y == 0)[0], np.nonzero(Y == 1)[0])]},
        (X, Y),
        ValueError,
        "Fold 0 .* training samples of 1 classes",
    ),
    "empty fold": ({"cv": [(np.arange(len(Y)), [])]}, (X, Y), ValueError, "Fold 0 .* and 0 test samples"),
}


def bad_cases():
    kernels = [KernelDiscriminantAnalysis, KernelDiscriminantAnalysisCV]
    tables = [
        (BAD, ESTIMATORS),
        (BAD_SINGLE, ESTIMATORS[:2]),
        (BAD_LINEAR, [LinearDiscriminantAnalysis]),
        (BAD_KERNEL, ESTIMATORS[:1]),
        (BAD_EITHER_KERNEL, kernels),
        (BAD_SEARCH, kernels[1:]),
    ]
    for table, estimators in tables:
        for estimator in estimators:
            for name, case in table.items():
                yield pytest.param(estimator, *case, id=f"{estimator.__name__}-{name}")


@pytest.mark.parametrize(("estimator", "options", "arguments", "error", "message"), list(bad_cases()))
def test_bad_input(estimator, options, arguments, error, message):
    with pytest.raises(error, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator(**options).fit(*arguments)


@every
def test_bad_new_samples(estimator):
    model = estimator()
    with pytest.raises(NotFittedError):
        model.transform(X)
    model.fit(X, Y)
    for new in (X[:, :2], torch.tensor(X[:, :2])):
        with pytest.raises(ValueError, match="X has 2 features, but .* is expecting 3 features"):
            model.predict(new)
    for new in (X * np.nan, torch.tensor(X * np.nan)):
        with pytest.raises(ValueError, match="NaN"):
            model.predict(new)


def test_import_without_scikit_learn_names_the_extra():
    script = """
import sys
sys.modules["sklearn"] = None
import phydi_kernels
try:
    import phydi_kernels.discriminant
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (
        run.stdout.strip() == "phydi_kernels.discriminant needs scikit-learn: pip install phydi-kernels[discriminant]"
    )
