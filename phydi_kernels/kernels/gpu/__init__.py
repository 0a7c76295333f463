"""Triton kernels for CUDA devices of compute capability 8.0 or newer, and the drivers of the operators.

The modules of this package import triton: they are imported where a kernel is about to run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...plans_cuda import CARDS, architecture
from .. import cpu


def reason(capability: int) -> str:
    """Why a card of this compute capability cannot run the kernels, or ""."""
    if torch.version.hip:
        return "the kernels are for NVIDIA cards"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    compilers = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    if not any(map(shutil.which, compilers)):
        return f"triton needs a C compiler to start kernels, and there is no {' or '.join(compilers)}"
    # As triton looks for it: Debian's scheme of local installations has no headers.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_paths(scheme)["include"], "Python.h").exists():
        return "triton needs Python.h (python3-dev) to start kernels"
    if not architecture(capability):
        return f"compute capability {capability // 10}.{capability % 10} is below 8.0"
    return ""


def status() -> str:
    """Why CUDA tensors of this process cannot reach the kernels, or "": of the current device where there is one."""
    return reason(_capability(None) if torch.cuda.is_available() else min(CARDS))


def _capability(device: torch.device | None) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def capability(device: torch.device) -> int:
    """Ten times the compute capability of a CUDA device; 0 where the kernels cannot run.

    Warns once for each device, with the reason, when they cannot. Other devices are those of Triton's interpreter.
    """
    if device.type != "cuda":
        return 90
    of_card = _capability(device)
    why = reason(of_card)
    if why:
        cpu.warn(f"{torch.cuda.get_device_name(device)}: {why}")
    return 0 if why else of_card


def common_dtype(tensors: Iterable[Tensor | None], algebra: Iterable[Tensor | None]) -> torch.dtype | None:
    """The type of the tensors that are given, or None where they have several. The algebra's may be float32."""
    dtypes = {t.dtype for t in tensors if t is not None}
    of_algebra = {t.dtype for t in algebra if t is not None} - {torch.float32}
    return dtypes.pop() if len(dtypes) == 1 and of_algebra <= dtypes else None


def tf32(convolution: bool = False) -> bool:
    """Whether torch's matmul, or cuDNN, rounds the operands of float32 products to TF32; the kernels follow them."""
    of: Any = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return of.fp32_precision == "tf32"
