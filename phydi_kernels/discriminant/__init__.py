"""Discriminant analysis with scikit-learn's conventions: a kernel and a linear estimator, and a search over the former.

    from phydi_kernels.discriminant import KernelDiscriminantAnalysis

    model = KernelDiscriminantAnalysis("rbf", gamma=0.1).fit(X, y)
    model.transform(X_new), model.predict_proba(X_new)

scikit-learn is an extra: ``pip install phydi-kernels[discriminant]``.
"""

from __future__ import annotations

try:
    import sklearn  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    raise ImportError(
        "phydi_kernels.discriminant needs scikit-learn: pip install phydi-kernels[discriminant]"
    ) from error

from .kernel_discriminant_analysis import KernelDiscriminantAnalysis
from .kernel_discriminant_analysis_cv import KernelDiscriminantAnalysisCV
from .linear_discriminant_analysis import LinearDiscriminantAnalysis

__all__ = ["KernelDiscriminantAnalysis", "KernelDiscriminantAnalysisCV", "LinearDiscriminantAnalysis"]
