"""Times of one layer: ours, trained and for inference, nn.Linear, and the published one that builds H at every call."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..inference import optimize_for_inference
from ..nn import PHMLinear

FEATURES = 1024
N = 4
BATCHES = (1, 64, 2048)
SECONDS_PER_SHAPE = 3.0
MIN_ROUNDS, MAX_ROUNDS = 5, 300

# Rounding of a float32 sum of K products grows like sqrt(K); the factor 8 covers the largest of 2048*1024 outputs.
TOLERANCE = 8 * torch.finfo(torch.float32).eps * FEATURES**0.5


def kronecker_sum(A: Tensor, F: Tensor) -> Tensor:
    """H = sum_i kron(A_i, F_i), a term at a time, as public implementations build it (PHYDI, Eq. 1).

    A (n, P, Q), F (n, p, q, *kernel) -> (P*p, Q*q, *kernel). They start from a tensor of zeros; this starts from the
    first term.
    """
    A = A.reshape(*A.shape, *[1] * (F.dim() - 3))
    H = torch.kron(A[0], F[0])
    for a, f in zip(A[1:], F[1:], strict=True):
        H = H + torch.kron(a, f)
    return H


class DenseH(nn.Module):
    """The published layer: H is built at every call, then F.linear; with the parameters of ``layer``."""

    def __init__(self, layer: PHMLinear) -> None:
        super().__init__()
        self.A, self.F, self.bias = layer.A, layer.F, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, kronecker_sum(self.A, self.F), self.bias)


def time_layers(seconds_per_shape: float = SECONDS_PER_SHAPE) -> list[dict[str, Any]]:
    """Median forward times in float32 on the current number of threads, one row a batch size.

    The layers hold the same function and take turns in one loop, so that a slow moment of the machine meets all of
    them. Each is compared with float64 before it is timed. Caches are warm: an untimed call of the same layer
    comes before each timed one, or the first layer after dense H would pay for the caches that H emptied.

    Raises:
        RuntimeError: an output further from float64 than float32 rounding explains.
    """
    torch.manual_seed(0)
    ours = PHMLinear(FEATURES, FEATURES, N)
    dense = nn.Linear(FEATURES, FEATURES)
    with torch.no_grad():
        dense.load_state_dict({"weight": ours.dense_weight(), "bias": ours.state_dict()["bias"]})
    inference = optimize_for_inference(ours.eval(), progress=False, verbose=False)
    layers = {"linear": dense, "ours": ours, "inference": inference, "dense_h": DenseH(ours)}
    with torch.no_grad():
        rows = [_row(layers, batch, seconds_per_shape) for batch in BATCHES]
    return [row | {"rank": inference.rank} for row in rows]


def _row(layers: dict[str, nn.Module], batch: int, seconds: float) -> dict[str, Any]:
    x = torch.randn(batch, FEATURES)
    row: dict[str, Any] = {"batch": batch, "features": FEATURES, "n": N}
    exact = copy.deepcopy(layers["dense_h"]).double()
    row["max_relative_error"] = {name: _error(layer, exact, x, name) for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in layers}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() < end):
        for name, layer in layers.items():
            layer(x)
            start = time.perf_counter()
            layer(x)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    median = {name: statistics.median(t) for name, t in times.items()}
    row["rounds"] = rounds
    row["median_seconds"] = median
    row["over_linear"] = {name: seconds / median["linear"] for name, seconds in median.items() if name != "linear"}
    return row


def _error(layer: nn.Module, exact: nn.Module, x: Tensor, name: str) -> float:
    expected = exact(x.double())
    error = ((layer(x).double() - expected).abs().max() / expected.abs().max()).item()
    # Negated, so that a NaN fails.
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"{name} layer at batch {len(x)}: relative error {error:.1e} against float64, allowed is {TOLERANCE:.1e}"
        )
    return error
