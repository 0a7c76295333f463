"""What only a card can show of the Triton kernels: CUDA graphs, streams, devices. --device cuda runs OpChecks there."""

from __future__ import annotations

import pytest
import torch
from helpers import normal
from torch import Tensor

from phydi_kernels import functional, plans_cuda, reference
from phydi_kernels.plans_cuda import CudaPlan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a card, and there is none here")

ROWS = 1000
PLANS = [CudaPlan[name] for name in ("STREAM", "BUILT", "FUSED", "EPILOGUE", "PASSES")]


@pytest.fixture(params=PLANS, ids=lambda plan: plan.value)
def plan(request, monkeypatch):
    monkeypatch.setattr(plans_cuda, "phm_linear_factored", lambda *sizes: request.param)


def arguments(rows: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """x, U, V, W, F, bias, and residual and alpha."""
    n, R, p, q = 4, 7, 96, 64
    shapes = ((rows, n * q), (R, n), (R, n), (R, n), (n, p, q), (n * p,))
    tensors = [(normal(s, i) / s[-1] ** 0.5).to(device, dtype) for i, s in enumerate(shapes)]
    return tensors, {"residual": normal((rows, n * p), 9).to(device, dtype), "alpha": normal((1,), 8).to(device, dtype)}


def expected(tensors: list[Tensor], options: dict[str, Tensor]) -> Tensor:
    exact = [t.cpu().double() for t in tensors]
    return reference.phm_linear_factored(*exact, *(options[name].cpu().double() for name in ("residual", "alpha")))


def test_cuda_graph_replays_with_new_values(plan):
    tensors, options = arguments(ROWS, torch.bfloat16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        functional.phm_linear_factored(*tensors, **options)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.phm_linear_factored(*tensors, **options)
    for scale in (1.0, -2.0):
        tensors[0].mul_(scale)
        graph.replay()
        torch.testing.assert_close(y.cpu().double(), expected(tensors, options), atol=0.05, rtol=0.02)


def test_kernels_run_on_the_current_stream(plan):
    tensors, options = arguments(ROWS, torch.float32, "cuda")
    functional.phm_linear_factored(*tensors, **options)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        tensors[0].mul_(2)  # a kernel on another stream would read x before this
        y = functional.phm_linear_factored(*tensors, **options)
    stream.synchronize()
    torch.testing.assert_close(y.cpu().double(), expected(tensors, options), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_kernels_run_on_the_device_of_their_tensors():
    tensors, options = arguments(100, torch.float32, "cuda:1")
    with torch.cuda.device(0):
        y = functional.phm_linear_factored(*tensors, **options)
        assert torch.cuda.current_device() == 0
    assert y.device == torch.device("cuda:1")
    torch.testing.assert_close(y.cpu().double(), expected(tensors, options), atol=1e-4, rtol=1e-4)
