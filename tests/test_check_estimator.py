"""scikit-learn's own checks of estimators."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")

from sklearn.utils.estimator_checks import parametrize_with_checks

from phydi_kernels.discriminant import (
    KernelDiscriminantAnalysis,
    KernelDiscriminantAnalysisCV,
    LinearDiscriminantAnalysis,
)

ESTIMATORS = [
    KernelDiscriminantAnalysis(),
    KernelDiscriminantAnalysis("precomputed"),
    KernelDiscriminantAnalysis("chi2"),
    LinearDiscriminantAnalysis(),
    LinearDiscriminantAnalysis(tau=None, weighting="standard"),
    KernelDiscriminantAnalysisCV(cv=3),
]

# This check draws samples with negative entries for every estimator, whatever its tags say of its input.
UNFIT = {
    "precomputed": {"check_decision_proba_consistency": "fits samples where a kernel matrix is expected"},
    "chi2": {"check_decision_proba_consistency": "fits negative entries"},
}


@parametrize_with_checks(
    ESTIMATORS, expected_failed_checks=lambda estimator: UNFIT.get(getattr(estimator, "kernel", ""), {})
)
def test_check_estimator(estimator, check):
    check(estimator)
