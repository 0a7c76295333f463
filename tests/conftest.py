"""Options and fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from phydi_kernels.kernels import cpu

pytest.register_assert_rewrite("dense_twins", "helpers", "op_cases", "op_checks")

hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def nan_in_empty() -> Iterator[None]:
    """Every tensor that ATen allocates without values holds NaN, so that an entry nobody wrote fails loudly."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def library() -> None:
    """The compiled CPU kernels; a test of them fails where they are missing."""
    assert cpu.load() == ""
