"""The search for gamma and tau of generalised discriminant analysis, batched over candidates."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning
from sklearn.model_selection import check_cv
from torch import Tensor
from tqdm import tqdm

from .._gda import C_ALLOW
from ..functional import gda_solve
from ..kernels.gda_solve import largest_eigenvalue
from ..reference import class_structure
from ._base import Training, to_numpy
from ._gaussian import class_statistics, discriminant_scores
from ._kernel import KernelEstimator, scale_gamma
from .kernel_discriminant_analysis import KernelDiscriminantAnalysis

# Kernel matrices of several gammas are held at once up to this many entries: small problems share the cost of calls,
# and large ones stay in cache (N = 1000, 10 gammas: 3.5 s one by one, 4.5 s by four).
_ENTRIES = 1 << 19


class _Grid(NamedTuple):
    """Candidates: one for each gamma (slow) and each value of ``level`` (fast); a None stands for no such parameter."""

    gammas: list[Any]
    level: str
    levels: list[Any]

    def params(self) -> list[dict[str, Any]]:
        pairs = itertools.product(self.gammas, self.levels)
        return [
            {name: v for name, v in (("gamma", gamma), (self.level, level)) if v is not None} for gamma, level in pairs
        ]


def _of_best(name: str) -> Any:
    """The attribute of the estimator that the search chose."""
    return property(operator.attrgetter(f"best_estimator_.{name}"))


class KernelDiscriminantAnalysisCV(KernelEstimator):
    r"""Kernel discriminant analysis with gamma and the conditioning coefficient chosen by cross-validation.

    The same as scikit-learn's ``GridSearchCV`` over :class:`KernelDiscriminantAnalysis` with the same folds, but
    computed in batches: one pass over the distances serves several gammas, and one product K D_w K all the
    conditioning coefficients of a gamma and a fold. The score is the accuracy on the left-out samples, with their
    weights. The best candidate (of equals, the first) is fitted to all samples, and is what predicts.

    Args:
        kernel: as in :class:`KernelDiscriminantAnalysis`.
        gammas: candidates for gamma, numbers > 0. None: 9 values from 0.01 to 100 times 1 / (d Var X), evenly spaced in
            the logarithm. Left out where the kernel has no gamma, or a lengthscale takes its place.
        taus: candidates for the conditioning coefficient, absolute numbers >= 0. None: those of ``c_allows``.
        c_allows: candidates for the condition number c of G_w, > 1, where no taus are given: tau = lambda_max / c
            (Eq. 23), with the largest eigenvalue lambda_max of K D_w K for each gamma and each fold's own training
            samples. None: the powers of ten from 1e2 to 1e8 in float64, from 1e2 to 1e5 in float32.
        cv: number of folds (stratified, in the order of the samples), a scikit-learn splitter, or an iterable of
            (train, test) index arrays.
        degree, coef0, lengthscale, nu, n_components, weighting, solver, priors, device, dtype: as in
            :class:`KernelDiscriminantAnalysis`. ``solver="pinv"`` has no tau: gamma alone is searched.
        progress: show a progress bar.

    Attributes:
        cv_results_: as in ``GridSearchCV``: ``params``, ``param_gamma``, ``param_tau`` or ``param_c_allow``,
            ``split{i}_test_score``, ``mean_test_score``, ``std_test_score``, ``rank_test_score``, an entry for each
            candidate; gamma varies slowest.
        best_index_, best_params_, best_score_: the candidate of rank 1.
        best_estimator_: the fitted :class:`KernelDiscriminantAnalysis`; ``classes_``, ``priors_``, ``coefficients_``,
            ``eigenvalues_``, ``explained_variance_ratio_``, ``means_``, ``covariance_`` and ``tau_`` are its.
        n_splits_: the number of folds.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    A class that is missing from the training samples of a fold is not predicted in that fold.

    Warns:
        ConvergenceWarning: some candidates needed a larger tau than asked for.
        FitFailedWarning: some candidates found no solution in a fold; their scores are NaN and their rank is the last.

    Raises:
        ValueError: by ``fit``, what :meth:`fit` lists, a parameter that is not allowed, a fold without training samples
            of two classes, or no candidate with a solution in every fold.
    """

    def __init__(
        self,
        kernel: str | Callable[[Any, Any], Any] = "rbf",
        *,
        gammas: Sequence[float] | None = None,
        taus: Sequence[float] | None = None,
        c_allows: Sequence[float] | None = None,
        cv: Any = 5,
        degree: int = 3,
        coef0: float = 1.0,
        lengthscale: Any = None,
        nu: float = 1.5,
        n_components: int | None = None,
        weighting: str = "paper",
        solver: str = "cholesky",
        priors: Any = None,
        device: Any = None,
        dtype: Any = None,
        progress: bool = False,
    ) -> None:
        self.kernel = kernel
        self.gammas = gammas
        self.taus = taus
        self.c_allows = c_allows
        self.cv = cv
        self.degree = degree
        self.coef0 = coef0
        self.lengthscale = lengthscale
        self.nu = nu
        self.n_components = n_components
        self.weighting = weighting
        self.solver = solver
        self.priors = priors
        self.device = device
        self.dtype = dtype
        self.progress = progress

    classes_, priors_ = _of_best("classes_"), _of_best("priors_")
    coefficients_, tau_ = _of_best("coefficients_"), _of_best("tau_")
    eigenvalues_, explained_variance_ratio_ = _of_best("eigenvalues_"), _of_best("explained_variance_ratio_")
    means_, covariance_ = _of_best("means_"), _of_best("covariance_")

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> Tensor:
        self._given_matrix()
        data = self._validate_fit(X, y, sample_weight, copy=False)
        self._components(len(data.classes) - 1, "the number of classes in y - 1")
        grid = self._grid(data)
        folds = self._folds(data, to_numpy(y))
        scores = self._scores(data, grid, folds)
        params = grid.params()
        results: dict[str, Any] = {"params": params}
        for name in params[0]:
            results[f"param_{name}"] = np.ma.MaskedArray([p[name] for p in params])
        mean = scores.mean(0)
        results |= {f"split{i}_test_score": row for i, row in enumerate(scores)}
        results |= {"mean_test_score": mean, "std_test_score": scores.std(0)}
        order = np.nan_to_num(mean, nan=-1.0)
        results["rank_test_score"] = 1 + (order > order[:, None]).sum(1, dtype=np.int32)
        if np.isnan(mean).all():
            raise ValueError(
                f"None of the {len(params)} candidates has a solution in every fold; take larger taus or another solver"
            )
        self.cv_results_, self.n_splits_ = results, len(folds)
        self.best_index_ = int(order.argmax())
        self.best_params_, self.best_score_ = params[self.best_index_], float(mean[self.best_index_])
        own = self.get_params(deep=False)
        shared = {name: own[name] for name in KernelDiscriminantAnalysis().get_params() if name in own}
        self.best_estimator_ = KernelDiscriminantAnalysis(**shared, **self.best_params_)
        return self.best_estimator_._fit(X, y, sample_weight)

    def _grid(self, data: Training) -> _Grid:
        gammas: list[Any] = [None]
        if self._has_gamma():
            default = scale_gamma(data) * np.logspace(-2, 2, 9) if self.gammas is None else self.gammas
            gammas = _candidates("gammas", default, 0, strict=True)
        elif self.gammas is not None and self.lengthscale is not None:
            raise ValueError(f"gammas={self.gammas!r} and lengthscale={self.lengthscale!r} are both given; give one")
        if self.taus is not None and self.c_allows is not None:
            raise ValueError(f"taus={self.taus!r} and c_allows={self.c_allows!r} are both given; give one")
        if self.solver == "pinv":
            if self.taus is not None or self.c_allows is not None:
                raise ValueError('solver="pinv" has no tau: leave taus and c_allows None')
            return _Grid(gammas, "tau", [None])
        if self.taus is not None:
            return _Grid(gammas, "tau", _candidates("taus", self.taus, 0, strict=False))
        decades = round(np.log10(C_ALLOW[data.X.dtype]))
        default = 10.0 ** np.arange(2, decades + 1) if self.c_allows is None else self.c_allows
        return _Grid(gammas, "c_allow", _candidates("c_allows", default, 1, strict=True))

    def _folds(self, data: Training, y: Any) -> list[tuple[Tensor, Tensor]]:
        """(train, test) indices, without samples of weight 0."""
        splitter = check_cv(self.cv, np.asarray(y).ravel(), classifier=True)
        codes, kept = data.codes.cpu().numpy(), (data.weights > 0).cpu().numpy()
        folds = []
        for i, parts in enumerate(splitter.split(np.zeros((len(codes), 1)), np.asarray(y).ravel())):
            train, test = (_indices(part, kept) for part in parts)
            found = len(np.unique(codes[train]))
            if found < 2 or not len(test):
                raise ValueError(
                    f"Fold {i} of cv has training samples of {found} classes and {len(test)} test samples "
                    "of positive weight; 2 classes and 1 sample are needed"
                )
            folds.append((torch.from_numpy(train).to(data.X.device), torch.from_numpy(test).to(data.X.device)))
        return folds

    def _scores(self, data: Training, grid: _Grid, folds: list[tuple[Tensor, Tensor]]) -> np.ndarray:
        """Accuracies (folds, candidates); NaN where there is no solution."""
        scores = np.full((len(folds), len(grid.gammas), len(grid.levels)), np.nan)
        N = len(data.X)
        step = max(1, _ENTRIES // (N * N))
        starts = range(0, len(grid.gammas), step)
        raised = failed = 0
        batches = len(starts) * len(folds)
        with tqdm(total=batches, desc="cross-validation", unit="batch", disable=not self.progress) as bar:
            for start in starts:
                K = self._matrices(data, grid.gammas[start : start + step])
                for fold, (train, test) in enumerate(folds):
                    accuracy, info = self._fold_scores(K, data, grid, train, test)
                    scores[fold, start : start + step] = accuracy.mT.cpu().numpy()
                    raised, failed = raised + int((info > 0).sum()), failed + int((info < 0).sum())
                    bar.update()
        fits = scores.size
        if raised:
            warnings.warn(
                f"{raised} of {fits} fits took a larger tau than asked for: G_w was not positive definite to working "
                "precision",
                ConvergenceWarning,
                stacklevel=4,
            )
        if failed:
            warnings.warn(
                f"{failed} of {fits} fits found no solution: their score is NaN", FitFailedWarning, stacklevel=4
            )
        return scores.reshape(len(folds), -1)

    def _matrices(self, data: Training, gammas: list[Any]) -> Tensor:
        """Kernel matrices (G, N, N) of some of the gammas."""
        if gammas == [None]:
            return self._training_matrix(data, None).unsqueeze(0)
        return self._training_matrix(data, torch.tensor(gammas, dtype=data.X.dtype, device=data.X.device))

    def _fold_scores(
        self, K: Tensor, data: Training, grid: _Grid, train: Tensor, test: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Accuracies (T, G) of one fold and the info of its fits, for T levels and the G gammas of K."""
        present, codes = data.codes[train].unique(return_inverse=True)
        weights = data.weights[train]
        among = K[:, train.unsqueeze(1), train]
        classes, limit = len(present), len(present) - 1
        solution = gda_solve(
            among,
            codes,
            tau=self._taus(among, codes, weights, classes, grid),
            n_components=limit if self.n_components is None else min(self.n_components, limit),
            weighting=self.weighting,
            solver=self.solver,
            sample_weight=weights,
            num_classes=classes,
        )
        coefficients, info = solution.coefficients, solution.info
        if coefficients.dim() == 3:
            coefficients, info = coefficients.unsqueeze(0), info.unsqueeze(0)
        T, G, n, components = coefficients.shape
        # NaN of a fit without a solution would end the eigenvalue problem of the others' covariance.
        columns = coefficients.nan_to_num(0).permute(1, 2, 0, 3).reshape(G, n, T * components)

        def projected(rows: Tensor) -> Tensor:
            return (rows @ columns).view(G, -1, T, components).permute(2, 0, 1, 3).to(torch.float64)

        means, covariance = class_statistics(projected(among), codes, classes, weights)
        priors = torch.from_numpy(data.priors).to(K.device)[present]
        if self.priors is None:
            priors = torch.zeros_like(priors).index_add_(0, codes, weights) / weights.sum()
        joint = discriminant_scores(projected(K[:, test.unsqueeze(1), train]), means, covariance, priors)
        right = (present[joint.argmax(-1)] == data.codes[test]).to(torch.float64)
        accuracy = right @ data.weights[test] / data.weights[test].sum()
        return torch.where(info < 0, torch.nan, accuracy), info

    def _taus(self, K: Tensor, codes: Tensor, weights: Tensor, classes: int, grid: _Grid) -> Tensor | None:
        """The conditioning coefficients (T, G) of the G kernel matrices of one fold; None for the pseudo-inverse."""
        if grid.levels == [None]:
            return None
        levels = torch.tensor(grid.levels, dtype=K.dtype, device=K.device).unsqueeze(1)
        if grid.level == "tau":
            return levels.expand(-1, len(K)).contiguous()
        root = weights.sqrt().to(K).expand(len(K), -1)
        return largest_eigenvalue(K, class_structure(codes.expand(len(K), -1), root, classes, self.weighting)) / levels

    def _project(self, X: Tensor) -> Tensor:
        return self.best_estimator_._project(X)

    def _entries_per_sample(self) -> int:
        return self.best_estimator_._entries_per_sample()


def _candidates(name: str, values: Iterable[float], least: float, *, strict: bool) -> list[float]:
    array = np.asarray(to_numpy(values), dtype=np.float64)
    allowed = (array > least if strict else array >= least) & np.isfinite(array)
    if array.ndim != 1 or not array.size or not allowed.all():
        raise ValueError(f"{name}={values!r} must be a sequence of finite numbers {'>' if strict else '>='} {least}")
    return array.tolist()


def _indices(part: Any, kept: np.ndarray) -> np.ndarray:
    """The indices in ``part``, numbers or a mask, that are kept."""
    part = np.asarray(part)
    chosen = np.arange(len(kept))[part if part.dtype == bool else part.astype(np.int64)]
    return chosen[kept[chosen]]
