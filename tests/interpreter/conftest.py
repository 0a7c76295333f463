"""Triton kernels as Python on CPU tensors, in a process of their own: TRITON_INTERPRET=1 pytest tests/interpreter."""

from __future__ import annotations

import importlib.util
import mmap
import os
import tempfile
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.register_assert_rewrite("driver_calls")

if importlib.util.find_spec("triton") is None:
    UNAVAILABLE = "triton is not installed"
elif os.environ.get("TRITON_INTERPRET") != "1":
    UNAVAILABLE = "a process that compiles kernels cannot interpret them: TRITON_INTERPRET=1 pytest tests/interpreter"
else:
    UNAVAILABLE = ""
collect_ignore_glob = ["test_gpu_*.py"] if UNAVAILABLE else []


@pytest.fixture
def interpreter() -> None:
    if UNAVAILABLE:
        pytest.skip(UNAVAILABLE)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel reads entries of its inputs and writes entries of ``out``: it touches no other memory."""
    from driver_calls import guard

    from phydi_kernels.kernels.gpu import _launch

    monkeypatch.setattr(_launch, "run", guard(_launch.run))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and steps at sizes that the interpreter can do."""
    from phydi_kernels.kernels.gpu import configs

    monkeypatch.setattr(configs, "fixed", lambda *key: configs.Config(32, 16, 8, 4, 2))


@pytest.fixture
def vast() -> Callable[..., Tensor]:
    """float16 views of any shape and strides, in a sparse file: memory is what is touched."""

    def view(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        entries = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        with tempfile.TemporaryFile() as file:
            file.truncate(2 * entries)
            storage = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float16)
        return storage.as_strided(shape, strides)

    return view
