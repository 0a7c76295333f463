"""PHMLinear in rank-R form against nn.Linear of the same shape and the published layer: inference, and training.

In inference ``ours`` is what ``optimize_for_inference`` makes by default, and ``prepacked`` what it makes with
prepack=True; in training ``ours`` learns U, V and W (``algebra_rank``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from layers import PublishedLayer, dense_linear, structure_tensor
from rivals import expected_results, forward, forward_backward
from torch import nn

from phydi_kernels import optimize_for_inference
from phydi_kernels.demo.layer_times import kronecker_sum
from phydi_kernels.nn import PHMLinear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Inference:
    """``float32`` and ``bfloat16`` bound ours / nn.Linear at one thread."""

    n: int
    features: int
    batch: int
    float32: float
    bfloat16: float

    def __str__(self) -> str:
        return f"n{self.n}-{self.features}-B{self.batch}"


INFERENCE = [
    Inference(4, 1024, 1, 0.32, 0.6),
    Inference(4, 4096, 1, 0.30, 0.45),
    Inference(4, 1024, 8, 0.25, 0.8),
    Inference(4, 1024, 64, 0.38, 0.6),
    Inference(4, 1024, 2048, 0.50, 0.8),
    Inference(4, 2048, 2048, 0.48, 0.6),
    Inference(4, 4096, 2048, 0.48, 0.52),
    Inference(2, 2048, 2048, 0.80, 0.9),
    Inference(8, 2048, 2048, 0.50, 0.6),
]
# ours / nn.Linear, by algebra_rank.
TRAINING = {7: 0.58, 4: 0.38}
TRAINING_N, TRAINING_FEATURES, TRAINING_BATCH = 4, 1024, 2048


def row(n: int, rank: int, features: int, batch: int, **rest: str) -> dict[str, Any]:
    return {"layer": f"linear {features}x{features} B={batch}", "n": n, "rank": rank, **rest}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", INFERENCE, ids=str)
def test_inference(case: Inference, dtype: str, compare: Callable[..., None], device: torch.device) -> None:
    options = {"init": structure_tensor(case.n), "device": device, "dtype": DTYPES[dtype]}
    layer = PHMLinear(case.features, case.features, case.n, **options).eval()
    ours, prepacked = (
        optimize_for_inference(layer, prepack=prepack, progress=False, verbose=False) for prepack in (False, True)
    )
    layers = {
        "ours": ours,
        "prepacked": prepacked,
        "dense": dense_linear(kronecker_sum(layer.A.double(), layer.F.double()), layer.bias),
        "published": PublishedLayer(nn.functional.linear, layer.A, layer.F, layer.bias),
    }
    x = torch.randn(case.batch, case.features, device=device, dtype=DTYPES[dtype])
    expected = expected_results(nn.functional.linear, layer, x, None)
    described = row(case.n, ours.rank, case.features, case.batch, **{"pass": "forward", "dtype": dtype})
    with torch.no_grad():
        rivals = {name: forward(rival, x) for name, rival in layers.items()}
        compare(described, rivals, expected, terms=case.features, asked={"ratio": getattr(case, dtype)})


@pytest.mark.parametrize("rank", TRAINING)
def test_training(rank: int, compare: Callable[..., None], device: torch.device) -> None:
    torch.manual_seed(0)
    ours = PHMLinear(TRAINING_FEATURES, TRAINING_FEATURES, TRAINING_N, algebra_rank=rank, device=device)
    A = nn.Parameter(ours.structure().detach())
    layers = {
        "ours": ours,
        "dense": dense_linear(kronecker_sum(A.double(), ours.F.double()), ours.bias),
        "published": PublishedLayer(nn.functional.linear, A, ours.F, ours.bias),
    }
    x, grad_output = torch.randn(2, TRAINING_BATCH, TRAINING_FEATURES, device=device)
    x.requires_grad_()
    rivals = {name: forward_backward(layer, x, grad_output) for name, layer in layers.items()}
    expected = expected_results(nn.functional.linear, ours, x, grad_output)
    described = row(
        TRAINING_N, rank, TRAINING_FEATURES, TRAINING_BATCH, **{"pass": "forward+backward", "dtype": "float32"}
    )
    terms = max(TRAINING_FEATURES, TRAINING_BATCH)
    compare(described, rivals, expected, terms=terms, asked={"ratio": TRAINING[rank]})
