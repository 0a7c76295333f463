"""Options shared by tests/ and benchmarks/."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the operators, such as cpu or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device").startswith("cuda"):
        # cuDNN's default is TF32, which the kernels follow: float32 is compared to its own precision.
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
