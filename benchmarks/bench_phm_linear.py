"""PHMLinear that learns A against nn.Linear of the same shape, the published layer, and each plan, forced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from layers import PublishedLayer, dense_linear
from rivals import Rival, expected_results, forward, forward_backward
from torch import Tensor, nn

from phydi_kernels.demo.layer_times import kronecker_sum
from phydi_kernels.kernels import cpu
from phydi_kernels.nn import PHMLinear
from phydi_kernels.plans import Plan

N = 4
# Stream reads the rows anew for each of F's: hopeless where the batch outgrows the cache.
STREAM_ROWS = 64


@dataclass(frozen=True)
class Case:
    """``asked`` bounds ours at one thread: {"ratio": to nn.Linear} or {"extra_seconds": more than nn.Linear}."""

    features: int
    batch: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    asked: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.features}-B{self.batch}-{'backward' if self.backward else 'forward'}-{dtype}"

    def row(self) -> dict[str, Any]:
        return {
            "layer": f"linear {self.features}x{self.features} B={self.batch}",
            "n": N,
            "rank": None,
            "pass": "forward+backward" if self.backward else "forward",
            "dtype": str(self.dtype).removeprefix("torch."),
        }


CASES = [
    Case(1024, 1, asked={"ratio": 0.45}),
    Case(1024, 8, asked={"ratio": 0.6}),
    Case(1024, 64),
    Case(1024, 2048, asked={"ratio": 1.1}),
    Case(2048, 1),
    Case(2048, 2048, asked={"ratio": 1.1}),
    Case(128, 64, asked={"extra_seconds": 25e-6}),
    Case(128, 64, backward=True),
    Case(1024, 64, backward=True),
    Case(1024, 2048, backward=True, asked={"ratio": 1.15}),
    Case(2048, 2048, backward=True, asked={"ratio": 1.15}),
    Case(1024, 1, torch.bfloat16),
    Case(1024, 8, torch.bfloat16),
    Case(1024, 2048, torch.bfloat16),
    Case(2048, 2048, torch.bfloat16),
    Case(1024, 2048, torch.bfloat16, backward=True),
]


def forced_plans(layer: PHMLinear, x: Tensor) -> dict[str, Rival]:
    """The operator with its plan given, without the module around it."""
    if x.device.type != "cpu" or not cpu.available():
        return {}

    def rival(plan: Plan) -> Rival:
        return Rival(lambda: (cpu.phm_linear(x, layer.A, layer.F, layer.bias, None, None, "none", plan),))

    plans = [Plan.MIX, Plan.PANEL] if len(x) > STREAM_ROWS else [Plan.STREAM, Plan.MIX, Plan.PANEL]
    return {plan.name.lower(): rival(plan) for plan in plans}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_phm_linear(case: Case, compare: Callable[..., None], device: torch.device) -> None:
    torch.manual_seed(0)
    options = {"device": device, "dtype": case.dtype}
    ours = PHMLinear(case.features, case.features, N, **options)
    layers = {
        "ours": ours,
        "dense": dense_linear(kronecker_sum(ours.A.double(), ours.F.double()), ours.bias),
        "published": PublishedLayer(nn.functional.linear, ours.A, ours.F, ours.bias),
    }
    x, grad_output = torch.randn(2, case.batch, case.features, **options)
    if case.backward:
        x.requires_grad_()
        rivals = {name: forward_backward(layer, x, grad_output) for name, layer in layers.items()}
    else:
        rivals = {name: forward(layer, x) for name, layer in layers.items()} | forced_plans(ours, x)
    expected = expected_results(nn.functional.linear, ours, x, grad_output if case.backward else None)
    with torch.set_grad_enabled(case.backward):
        compare(case.row(), rivals, expected, terms=max(case.features, case.batch), asked=case.asked)
