"""The experiment of Ma, Sancho-Gómez and Ahalt (2003), Section V: two features extracted for three classes.

The paper shows its synthetic problem in Fig. 1 and does not publish the points. The ones here are in its spirit: two
features, three classes that no line separates.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Points of each class; unequal, so that the weights N_j / N of Eq. 3-4 matter.
COUNTS = (100, 200, 300)
DEVIATION = 0.2
GAMMA = 0.5


@dataclass(frozen=True)
class Experiment:
    """Held-out points ``(n, 2)``, labels ``(n,)``, the features GDA extracts of the points ``(n, 2)``, all figures."""

    points: Tensor
    labels: Tensor
    extracted: Tensor
    summary: dict[str, Any]


def draw_points(generator: torch.Generator, copies: int = 1) -> tuple[Tensor, Tensor]:
    """``copies`` times ``COUNTS`` points (n, 2) float64 and their labels (n,): a disc, label 0, in two rings, 1 and 2.

    A point lies in a random direction from the origin, at the distance label + normal noise.
    """
    labels = torch.arange(len(COUNTS)).repeat_interleave(copies * torch.tensor(COUNTS))
    angles = 2 * math.pi * torch.rand(len(labels), generator=generator, dtype=torch.float64)
    distances = labels + DEVIATION * torch.randn(len(labels), generator=generator, dtype=torch.float64)
    return torch.stack([distances * angles.cos(), distances * angles.sin()], dim=1), labels


def run(seed: int) -> Experiment:
    """Fits GDA with an rbf kernel, and LDA for comparison, and tests both on held-out points.

    Both classify by the same rule on their two features: Gaussian classes of one pooled covariance, with priors. For
    LDA (Eq. 1-4) these features are a linear map of the input; for GDA they are Eq. 16. The conditioning coefficient
    tau is the default's (Eq. 23).

    Returns:
        ``summary`` holds the counts, the error of each in ``error``, ``eigenvalues`` (the two of Section V), ``gamma``,
        ``tau``, and ``fit_seconds`` of GDA with everything loaded.
    """
    from ..discriminant import KernelDiscriminantAnalysis, LinearDiscriminantAnalysis

    generator = torch.Generator().manual_seed(seed)
    train, train_labels = draw_points(generator)
    points, labels = draw_points(generator, copies=2)
    linear = LinearDiscriminantAnalysis().fit(train, train_labels)
    # The first fit of a process loads the compiled kernels; the second is timed.
    kernel = KernelDiscriminantAnalysis(kernel="rbf", gamma=GAMMA).fit(train, train_labels)
    start = time.perf_counter()
    kernel.fit(train, train_labels)
    seconds = time.perf_counter() - start
    summary = {
        "train_points": len(train),
        "held_out_points": len(points),
        "error": {"lda": 1 - float(linear.score(points, labels)), "gda": 1 - float(kernel.score(points, labels))},
        "eigenvalues": kernel.eigenvalues_.tolist(),
        "gamma": GAMMA,
        "tau": kernel.tau_,
        "fit_seconds": seconds,
    }
    return Experiment(points, labels, torch.as_tensor(kernel.transform(points)), summary)
