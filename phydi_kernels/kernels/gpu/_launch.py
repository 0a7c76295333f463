"""The one place where a Triton kernel is started."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tf32

# TRITON_INTERPRET=1 runs kernels as Python on CPU tensors.
INTERPRETED = triton.knobs.runtime.interpret

# Backward runs in a thread for each device, and the setting is global.
_CUDNN = threading.Lock()

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    kernel[grid](*args, **meta)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Starts ``kernel`` on the current stream of the device of its first argument; an empty grid starts nothing."""
    if 0 in grid:
        return
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        run(kernel, grid, args, meta)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type of the operands of a product. The interpreter has no bfloat16 arithmetic."""
    return tl.float32 if INTERPRETED and dtype is torch.bfloat16 else _TYPES[dtype]


def precision(dtype: torch.dtype, convolution: bool = False) -> str:
    """How float32 products round: "tf32" where torch's own do so on CUDA, else "ieee"."""
    return "tf32" if dtype is torch.float32 and tf32(convolution) else "ieee"


def alpha_kind(alpha: Tensor | None) -> int:
    """0: there is none, 1: one number, 2: one for each feature."""
    return 0 if alpha is None else 1 if alpha.numel() == 1 else 2


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, of matrices or of batches of them."""
    if a.dtype is torch.float32 or a.device.type != "cuda":
        return torch.matmul(a.float(), b.float())
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    """cuDNN's algorithms of the same result at every call."""
    with _CUDNN:
        before = torch._C._get_cudnn_deterministic()
        # Not torch.backends.cudnn, whose settings may be frozen.
        torch._C._set_cudnn_deterministic(True)
        try:
            yield
        finally:
            torch._C._set_cudnn_deterministic(before)
