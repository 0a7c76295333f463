"""Parameterized hypercomplex layers and kernel discriminant analysis for PyTorch.

    from phydi_kernels.nn import PHMLinear, PHYDILinear, PHConv2d
    from phydi_kernels.models import phresnet18
    from phydi_kernels import algebra, functional, optimize_for_inference
    from phydi_kernels.discriminant import KernelDiscriminantAnalysis

Importing does no work: a submodule is imported at its first use, and the compiled library is loaded by the first call
that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference import optimize_for_inference

__version__ = "0.1.0"

_SUBMODULES = ("algebra", "convert", "discriminant", "functional", "inference", "integrations", "models", "nn")

__all__ = ["__version__", "optimize_for_inference", *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "optimize_for_inference":
        return importlib.import_module(".inference", __name__).optimize_for_inference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
