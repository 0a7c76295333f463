"""What the estimators share: validation of arrays and tensors, prediction by row blocks, probabilities."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from .._check import check_integer
from .._gda import BLOCK_ENTRIES
from ..ops._autograd import without_autocast
from ._gaussian import class_statistics, discriminant_scores

FLOATS = (torch.float64, torch.float32)


class Training(NamedTuple):
    """Validated arguments of fit.

    Attributes:
        X: the samples (N, d) in the dtype and on the device of the computation.
        codes: the class of each sample as an index into ``classes``, (N,) int64; 0 where the weight is 0.
        weights: the sample weights (N,), float64.
        classes: the labels that occur with a positive weight, sorted.
        priors: the probabilities of the classes (L,), float64.
        numpy: whether fitted attributes are NumPy arrays.
    """

    X: Tensor
    codes: Tensor
    weights: Tensor
    classes: np.ndarray
    priors: np.ndarray
    numpy: bool


def to_numpy(array: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else array


def to_tensor(array: Any, dtype: torch.dtype, device: torch.device | str, *, copy: bool = False) -> Tensor:
    """An array or tensor as a contiguous tensor without a graph; it shares memory only where ``copy`` is False."""
    if isinstance(array, np.ndarray):
        # torch warns of read-only memory, and refuses negative strides.
        copy = copy or not array.flags.writeable
        array = torch.from_numpy(np.array(array, order="C") if copy else np.ascontiguousarray(array))
    else:
        array = torch.as_tensor(array).detach()
        array = array.clone() if copy else array
    return array.to(device=device, dtype=dtype).contiguous()


def float_dtype(dtype: Any) -> torch.dtype | None:
    """The parameter ``dtype`` as torch's; None stays None. ValueError unless it is float32 or float64."""
    if dtype is None or dtype in FLOATS:
        return dtype
    try:
        return {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}[np.dtype(dtype)]
    except (TypeError, KeyError):
        raise ValueError(f"dtype={dtype!r} must be None, float32 or float64") from None


def numpy_dtype(dtype: torch.dtype) -> type:
    return np.float32 if dtype == torch.float32 else np.float64


class Discriminant(ClassNamePrefixFeaturesOutMixin, ClassifierMixin, TransformerMixin, BaseEstimator):
    """An estimator that projects samples on l <= L - 1 directions and classifies by Gaussians on the projection.

    A subclass has the parameters ``n_components``, ``priors``, ``device`` and ``dtype``, and after ``fit`` the
    attributes ``classes_``, ``priors_``, ``means_``, ``covariance_`` and ``coefficients_``.
    """

    @abstractmethod
    def _fit(self, X: Any, y: Any, sample_weight: Any) -> Tensor:
        """Set the fitted attributes; return the projections of X, float64."""

    @abstractmethod
    def _project(self, X: Tensor) -> Tensor:
        """Projections (n, l) of a block of samples, float64."""

    @abstractmethod
    def _entries_per_sample(self) -> int:
        """Entries of the temporary arrays that ``_project`` forms for a sample."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Discriminant:
        """Fit the projection and the Gaussians on it.

        Args:
            X: samples ``(N, d)``, an array or a tensor.
            y: labels ``(N,)``: numbers or strings; an array, a sequence or a tensor.
            sample_weight: ``(N,)``, >= 0. A weight w equals w repetitions, and weight 0 leaves a sample out. None: 1.

        Returns:
            The estimator.

        Raises:
            ValueError: NaN or infinite entries, lengths that differ, fewer than two classes, or a parameter that is
                not allowed.
        """
        self._fit_in_full_precision(X, y, sample_weight)
        return self

    def fit_transform(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """The same as ``fit(X, y, sample_weight).transform(X)``, without projecting X a second time."""
        return self._return(self._fit_in_full_precision(X, y, sample_weight), X)

    def _fit_in_full_precision(self, X: Any, y: Any, sample_weight: Any) -> Tensor:
        # The data's device is not known yet.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return self._fit(X, y, sample_weight)

    def transform(self, X: Any) -> Any:
        """Projections ``(n, l)`` of the samples ``(n, d)``: an array for an array, a tensor for a tensor."""
        return self._map(X, lambda scores: scores)

    def decision_function(self, X: Any) -> Any:
        """Log posterior odds of the second class ``(n,)`` for two classes; for more, linear scores ``(n, L)``.

        The scores are the logarithms of prior times density, less a term that all classes have in common.
        """
        if len(self._classes()) == 2:
            return self._map(X, lambda scores: self._joint(scores).diff(dim=-1).squeeze(-1))
        return self._map(X, self._joint)

    def predict_log_proba(self, X: Any) -> Any:
        """Logarithms of the posterior probabilities ``(n, L)``, in the order of ``classes_``."""
        return self._map(X, lambda scores: self._joint(scores).log_softmax(-1))

    def predict_proba(self, X: Any) -> Any:
        """Posterior probabilities ``(n, L)``, in the order of ``classes_``.

        The Gaussians are those of the projected training samples. Where the conditioning coefficient tau is small these
        are further apart than new samples are, and probabilities are too close to 0 and 1.
        """
        return self._map(X, lambda scores: self._joint(scores).softmax(-1))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable classes ``(n,)``: entries of ``classes_``, so a NumPy array for a tensor as well."""
        check_is_fitted(self)
        X = self._validate_new(X)
        return self.classes_[torch.cat([self._joint(scores).argmax(-1) for scores in self._blocks(X)]).cpu().numpy()]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        return self.coefficients_.shape[1]

    def _classes(self) -> np.ndarray:
        check_is_fitted(self)
        return self.classes_

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Of the fitted arrays."""
        if isinstance(self.coefficients_, Tensor):
            return self.coefficients_.device, self.coefficients_.dtype
        return torch.device("cpu"), torch.float32 if self.coefficients_.dtype == np.float32 else torch.float64

    def _tensor(self, array: Any) -> Tensor:
        """A fitted array where and in the dtype in which it is computed with."""
        device, dtype = self._device_and_dtype()
        return to_tensor(array, dtype, device)

    def _joint(self, scores: Tensor) -> Tensor:
        means, covariance, priors = (
            to_tensor(a, torch.float64, scores.device) for a in (self.means_, self.covariance_, self.priors_)
        )
        return discriminant_scores(scores, means, covariance, priors)

    def _blocks(self, X: Any) -> Iterator[Tensor]:
        """Projections of row blocks of validated samples."""
        device, dtype = self._device_and_dtype()
        rows = max(1, BLOCK_ENTRIES // max(1, self._entries_per_sample()))
        for start in range(0, X.shape[0], rows):
            with without_autocast(device):
                scores = self._project(to_tensor(X[start : start + rows], dtype, device))
            yield scores

    def _map(self, X: Any, function: Callable[[Tensor], Tensor]) -> Any:
        """``function`` of the projections of new samples, block by block."""
        check_is_fitted(self)
        X = self._validate_new(X)
        return self._return(torch.cat([function(scores) for scores in self._blocks(X)]), X)

    def _return(self, values: Tensor, X: Any) -> Any:
        """``values`` in the dtype of the fit and as what X is: a tensor on its device, or an array."""
        values = values.to(self._device_and_dtype()[1])
        return values.to(X.device) if isinstance(X, Tensor) else values.cpu().numpy()

    def _store(self, values: Tensor, numpy: bool) -> Any:
        """``values`` as a fitted attribute."""
        return values.numpy() if numpy else values

    def _set_gaussian(self, scores: Tensor, data: Training) -> None:
        means, covariance = class_statistics(scores, data.codes, len(data.classes), data.weights)
        self.means_, self.covariance_ = self._store(means, data.numpy), self._store(covariance, data.numpy)

    def _validate_new(self, X: Any) -> Any:
        """Samples to predict, checked: an array, or a tensor where it was one."""
        if isinstance(X, Tensor):
            return self._validate_tensor(X, self._device_and_dtype()[1], reset=False)
        return validate_data(self, X, dtype=numpy_dtype(self._device_and_dtype()[1]), reset=False)

    def _validate_tensor(self, X: Tensor, dtype: torch.dtype, *, reset: bool) -> Tensor:
        """X in ``dtype``, if it is a matrix of numbers that are finite in it."""
        if X.dim() != 2:
            raise ValueError(f"X of shape {tuple(X.shape)} must have 2 dimensions, (samples, features)")
        if 0 in X.shape:
            raise ValueError(f"X of shape {tuple(X.shape)} must have at least one sample and one feature")
        if X.is_complex():
            raise ValueError(f"X of {X.dtype} must be real: complex data is not supported")
        validate_data(self, X, skip_check_array=True, reset=reset)
        X = X.to(dtype)
        if not X.isfinite().all():
            raise ValueError(f"X holds NaN or entries that are infinite in {dtype}; all must be finite")
        return X

    def _validate_fit(self, X: Any, y: Any, sample_weight: Any, *, copy: bool) -> Training:
        """Arguments of fit, checked; X is copied where the estimator keeps it."""
        wanted = float_dtype(self.dtype)
        y, sample_weight = to_numpy(y), to_numpy(sample_weight)
        given = X
        if isinstance(X, Tensor):
            dtype = wanted or (X.dtype if X.dtype in FLOATS else torch.float64)
            X = self._validate_tensor(X, dtype, reset=True)
            if y is None:
                raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
            y = column_or_1d(y, warn=True)
            check_consistent_length(X, y)
        else:
            accepted = [np.float64, np.float32] if wanted is None else numpy_dtype(wanted)
            X, y = validate_data(self, X, y, dtype=accepted, ensure_min_samples=2)
            dtype = torch.float32 if X.dtype == np.float32 else torch.float64
        check_classification_targets(y)
        device = torch.device(self.device if self.device is not None else getattr(X, "device", "cpu"))
        numpy = not isinstance(given, Tensor) and device.type == "cpu"

        weights = np.ones(len(y))
        if sample_weight is not None:
            # y stands for X, which may be on another device: only its length is looked at.
            weights = _check_sample_weight(sample_weight, y, dtype=np.float64, ensure_non_negative=True)
        kept = weights > 0
        classes, inverse = np.unique(y[kept], return_inverse=True)
        if len(classes) < 2:
            found = f"one class, {classes[0]!r}" if len(classes) else "no class"
            where = "" if kept.all() else " among the samples of positive sample_weight"
            raise ValueError(f"y holds {found}{where}; at least 2 classes are needed")
        codes = np.zeros(len(y), dtype=np.int64)
        codes[kept] = inverse
        frequencies = np.bincount(codes, weights, len(classes)) / weights.sum()
        return Training(
            to_tensor(X, dtype, device, copy=copy),
            torch.from_numpy(codes).to(device),
            torch.from_numpy(weights).to(device),
            classes,
            frequencies if self.priors is None else self._validate_priors(classes),
            numpy,
        )

    def _validate_priors(self, classes: np.ndarray) -> np.ndarray:
        priors = np.array(to_numpy(self.priors), dtype=np.float64)
        if priors.shape != classes.shape:
            raise ValueError(f"priors={self.priors!r} must have {len(classes)} entries, one for each class in y")
        if not (priors >= 0).all() or abs(priors.sum() - 1) > 1e-6:
            raise ValueError(f"priors={self.priors!r} must be >= 0 and their sum 1")
        return priors

    def _components(self, most: int, reason: str) -> int:
        """The number of directions to keep; ``reason`` names the limit ``most``."""
        if self.n_components is None:
            return most
        count = check_integer("n_components", self.n_components)
        if count > most:
            raise ValueError(f"n_components={count} must be at most {reason} = {most}")
        return count


def check_tau(tau: Any) -> None:
    """ValueError unless tau is None, "one_norm" or a finite number >= 0."""
    if tau is None or (isinstance(tau, str) and tau == "one_norm"):
        return
    if isinstance(tau, bool) or not isinstance(tau, Real) or not 0 <= float(tau) < float("inf"):
        raise ValueError(f'tau={tau!r} must be None, "one_norm" or a finite number >= 0')


def warn_raised(tau: Any, used: float) -> None:
    """Say that a larger conditioning coefficient than asked for was taken."""
    warnings.warn(
        f"G_w is not positive definite to working precision with tau={tau!r}: tau={used:.3g} was taken. A larger tau "
        "or a smaller c_allow avoids this",
        ConvergenceWarning,
        stacklevel=5,
    )
