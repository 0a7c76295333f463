"""The threshold on projected scores: Gaussians with one covariance for all classes, and priors.

Functions take any leading dimensions, so that a search evaluates all its candidates at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the matrix of samples and classes that is formed at a time.
_ENTRIES = 1 << 21


def class_statistics(scores: Tensor, codes: Tensor, classes: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the classes (..., L, l) and their pooled covariance (..., l, l), by maximum likelihood.

    scores (..., N, l); codes (N,) in 0 ... L - 1; weights (N,) >= 0, positive for one sample of each class at least.
    """
    # Seen from one of the samples that count, scores that are all the same are 0, without rounding.
    origin = scores.index_select(-2, weights.argmax().view(1))
    counts = weights.new_zeros(classes).index_add_(0, codes, weights)
    means = scores.new_zeros((*scores.shape[:-2], classes, scores.shape[-1]))
    blocks = range(0, len(codes), max(1, _ENTRIES // classes))
    for start in blocks:
        some = slice(start, start + blocks.step)
        weighted = weights.new_zeros((classes, len(codes[some])))
        weighted.scatter_(0, codes[some].unsqueeze(0), weights[some].unsqueeze(0))
        means += weighted @ (scores[..., some, :] - origin)
    means /= counts.unsqueeze(-1)
    residual = scores - origin - means[..., codes, :]
    return means + origin, (weights.unsqueeze(-1) * residual).mT @ residual / weights.sum()


def orientation(means: Tensor) -> Tensor:
    """Signs (l,) that put the last class above the first in each direction of the means (L, l).

    Eigenvectors have no sign of their own. Where the last class is near the first, next to others, the class before it
    takes its place.
    """
    difference = means - means[:1]
    size = difference.abs()
    far = (size >= size.amax(0) / 2).flip(0).to(torch.int8).argmax(0, keepdim=True)
    return torch.where(difference.flip(0).gather(0, far)[0] < 0, -1.0, 1.0).to(means.dtype)


def discriminant_scores(scores: Tensor, means: Tensor, covariance: Tensor, priors: Tensor) -> Tensor:
    r"""Logarithms of the joint densities (..., n, L), less a term that all classes have in common.

    .. math:: g_j(z) = (z - c)^T \Sigma^{-1} (m_j - c) - \tfrac12 |m_j - c|^2_{\Sigma^{-1}} + \log \pi_j

    c is the mean of the class means, so :math:`g_j` is linear in z, and softmax of it over j gives the posterior.
    Each score is measured by its own deviation in all samples, so that one class far off does not hide the others; a
    direction with a variance below sqrt(eps) of that, or below that of rounding, is taken to have that variance: where
    the projection collapses every class to a point the nearest mean decides.
    """
    center = means.mean(-2, keepdim=True)
    offset = means - center
    total = covariance + offset.mT @ offset
    eps = torch.finfo(scores.dtype).eps
    floor = eps**0.5
    deviation = total.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)
    deviation = torch.maximum(deviation, 16 * eps * center.abs() / floor**0.5)
    deviation = torch.where(deviation > 0, deviation, 1)
    variance, axes = torch.linalg.eigh(covariance / (deviation * deviation.mT))
    whiten = axes / deviation.mT * variance.clamp_min(floor).rsqrt().unsqueeze(-2)
    offset = offset @ whiten
    return ((scores - center) @ whiten) @ offset.mT - offset.square().sum(-1).unsqueeze(-2) / 2 + priors.log()
