"""Linear discriminant analysis in the primal, with a conditioning coefficient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import check_finite
from ._base import BLOCK_ENTRIES, Discriminant, Training, check_tau, warn_raised
from ._gaussian import orientation

_C_ALLOW = 1e8
_EPS = torch.finfo(torch.float64).eps


class LinearDiscriminantAnalysis(Discriminant):
    r"""Linear discriminant analysis: transformer and classifier.

    The directions W ``(d, l)`` maximise the ratio of between-class to within-class scatter,

    .. math:: S_b W = G_w W \Lambda, \qquad G_w = S_w + \tau I, \qquad W^T G_w W = I

    with :math:`S_w = \sum_j \frac{N_j}{N} \sum_{k \in j} (x_k - m_j)(x_k - m_j)^T` and
    :math:`S_b = \sum_j \frac{N_j}{N} (m_j - m)(m_j - m)^T` (Ma, Sancho-Gomez and Ahalt, *Nonlinear multiclass
    discriminant analysis*, Eq. 1 to 4). S_b has rank L - 1, so a triangular factor of G_w and a singular value
    decomposition of a d x L matrix give all of W. Samples are classified by Gaussians with one covariance for all
    classes, fitted to the projections, and priors.

    With ``weighting="standard"`` and tau = 0 this is textbook LDA, as of scikit-learn's ``solver="eigen"``.

    Args:
        n_components: the number l of directions, at most min(L - 1, d) for L classes. None: all of these.
        tau: the conditioning coefficient, >= 0. 0: exact LDA, unless S_w is singular to working precision (features
            that are constant or depend linearly on others, or fewer samples than features); then the rule that follows
            is taken, with a warning. None: max(lambda_max / c_allow, tau_min) (Eq. 23), with the largest eigenvalue of
            S_w; ``"one_norm"``: the same with its one-norm.
        c_allow: the largest condition number that Eq. 23 allows. None: 1e8. Scatter is computed in float64 for every
            dtype.
        tau_min: the least tau of Eq. 23.
        weighting: ``"paper"`` weights the scatter of a class by N_j / N (Eq. 3); ``"standard"`` by 1 / N, the
            textbook's. They agree for balanced classes and tau = 0, but for a scale.
        priors: probabilities of the classes ``(L,)``, in the order of ``classes_``, for the classifier; the projection
            does not depend on them. None: the frequencies of the classes, by weight.
        device: where to compute. None: where X is; the CPU for arrays.
        dtype: float32 or float64. None: float32 for float32, float64 for everything else.

    Attributes:
        classes_: the labels ``(L,)``, sorted. Labels without any positive weight are not among them.
        priors_: ``(L,)``.
        coefficients_: W ``(d, l)``: ``transform(X) = X @ W``. Signs are such that the last class is projected above the
            first.
        eigenvalues_: ``(l,)``, largest first.
        explained_variance_ratio_: ``(l,)``, the eigenvalues over the sum of all.
        xbar_: the mean of the training samples ``(d,)``.
        means_: projected class means ``(L, l)``, float64.
        covariance_: the pooled covariance of the projected classes ``(l, l)``, maximum likelihood, float64.
        tau_: the conditioning coefficient that was used.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

        Arrays or tensors as in :class:`KernelDiscriminantAnalysis`; so are the results of the methods.

    Warns:
        ConvergenceWarning: S_w is singular to working precision with the tau asked for.

    Raises:
        ValueError: by ``fit``, what :meth:`fit` lists, and a parameter that is not allowed.
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        tau: float | str | None = 0.0,
        c_allow: float | None = None,
        tau_min: float = 0.0,
        weighting: str = "paper",
        priors: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.n_components = n_components
        self.tau = tau
        self.c_allow = c_allow
        self.tau_min = tau_min
        self.weighting = weighting
        self.priors = priors
        self.device = device
        self.dtype = dtype

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> Tensor:
        check_tau(self.tau)
        if self.weighting not in ("paper", "standard"):
            raise ValueError(f'weighting={self.weighting!r} is not one of "paper", "standard"')
        data = self._validate_fit(X, y, sample_weight, copy=False)
        most = min(len(data.classes) - 1, data.X.shape[1])
        components = self._components(most, "min(the number of classes in y - 1, the number of features)")
        mean, offsets, share, within = self._scatter(data)
        between = share.sqrt().unsqueeze(-1) * offsets
        tau, R = self._factor(within, between)
        # G_w = R^T R and S_b = between^T between: W = R^-1 P with the left singular vectors P of R^-T between^T.
        vectors, values, _ = torch.linalg.svd(
            torch.linalg.solve_triangular(R.mT, between.mT, upper=False), full_matrices=False
        )
        eigenvalues = values[:most].square()
        coefficients = torch.linalg.solve_triangular(R, vectors[:, :components], upper=True)
        coefficients *= orientation(offsets @ coefficients)
        total = eigenvalues.sum()
        ratio = eigenvalues / torch.where(total > 0, total, 1)

        def store(values: Tensor) -> Any:
            return self._store(values.to(data.X.dtype).contiguous(), data.numpy)

        self.classes_, self.priors_, self.tau_ = data.classes, data.priors, tau
        self.coefficients_, self.xbar_ = store(coefficients), store(mean)
        self.eigenvalues_ = store(eigenvalues[:components])
        self.explained_variance_ratio_ = store(ratio[:components])
        scores = torch.cat(list(self._blocks(data.X)))
        self._set_gaussian(scores, data)
        return scores

    def _scatter(self, data: Training) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean m (d,), m_j - m (L, d), N_j / N (L,) and R (at most d, d) with S_w = R^T R, in float64.

        S_w is never formed, so its condition is not squared: R is the triangle of the centred samples, block by block.
        """
        N, d = data.X.shape
        count = torch.zeros(len(data.classes), dtype=torch.float64, device=data.X.device)
        count.index_add_(0, data.codes, data.weights)
        share = count / count.sum()
        sums = torch.zeros((len(count), d), dtype=torch.float64, device=data.X.device)
        # Seen from one of the samples that count, features that are constant are 0, without rounding.
        origin = data.X[data.weights.argmax()].to(torch.float64)
        blocks = range(0, N, max(4 * d, BLOCK_ENTRIES // d))

        def rows(start: int) -> tuple[Tensor, Tensor, Tensor]:
            block = slice(start, start + blocks.step)
            return data.X[block].to(torch.float64) - origin, data.codes[block], data.weights[block]

        for start in blocks:
            X, codes, weights = rows(start)
            sums.index_add_(0, codes, weights.unsqueeze(-1) * X)
        means = sums / count.unsqueeze(-1)
        mean = share @ means
        factor = share if self.weighting == "paper" else torch.ones_like(share) / count.sum()
        R = sums[:0]
        for start in blocks:
            X, codes, weights = rows(start)
            residual = (factor[codes] * weights).sqrt().unsqueeze(-1) * (X - means[codes])
            R = torch.linalg.qr(torch.cat((R, residual)), mode="r").R
        return origin + mean, means - mean, share, R

    def _factor(self, within: Tensor, between: Tensor) -> tuple[float, Tensor]:
        """tau and the upper triangle R (d, d) with R^T R = G_w = S_w + tau I, for S_w and S_b = between^T between."""
        tau = self._rule(within) if self.tau is None or isinstance(self.tau, str) else float(self.tau)
        R = _conditioned(within, tau, between)
        if R is None:
            # Where no class has any scatter the rule gives 0.
            tau = max(tau, self._rule(within), _EPS * between.square().sum(0).max().item()) or 1.0
            while (R := _conditioned(within, tau, between)) is None:
                tau *= 10
            warn_raised(self.tau, tau)
        return tau, R

    def _rule(self, within: Tensor) -> float:
        """max(lambda_max / c_allow, tau_min)."""
        c_allow = _C_ALLOW if self.c_allow is None else check_finite("c_allow", self.c_allow)
        if c_allow <= 1:
            raise ValueError(f"c_allow={self.c_allow} must be None or a number > 1")
        tau_min = check_finite("tau_min", self.tau_min)
        if tau_min < 0:
            raise ValueError(f"tau_min={self.tau_min} must be >= 0")
        if self.tau == "one_norm":
            largest = torch.linalg.matrix_norm(within.mT @ within, 1)
        else:
            largest = torch.linalg.matrix_norm(within, 2).square()
        return max(largest.item() / c_allow, tau_min)

    def _project(self, X: Tensor) -> Tensor:
        # X @ W, with the mean taken out of the product: an offset of the data costs it no digits.
        mean, coefficients = self._tensor(self.xbar_), self._tensor(self.coefficients_)
        shift = mean.to(torch.float64) @ coefficients.to(torch.float64)
        return ((X - mean) @ coefficients).to(torch.float64) + shift

    def _entries_per_sample(self) -> int:
        return len(self.coefficients_)


def _conditioned(within: Tensor, tau: float, between: Tensor) -> Tensor | None:
    """The upper triangle R with R^T R = S_w + tau I; None if that is singular to working precision.

    S_w = within^T within and S_b = between^T between. The scales of the features do not matter.
    """
    d = within.shape[1]
    if tau:
        ridge = tau**0.5 * torch.eye(d, dtype=within.dtype, device=within.device)
        within = torch.linalg.qr(torch.cat((within, ridge)), mode="r").R
    if len(within) < d:
        return None
    # R_ii is what a feature has beyond those before it; rounding of the features and of the class means adds to it.
    total = (within.square().sum(0) + between.square().sum(0)).sqrt()
    return within if bool((within.diagonal().abs() > 100 * d**0.5 * _EPS * total).all()) else None
