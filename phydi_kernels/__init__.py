"""Fused parameterized hypercomplex layers for PyTorch.

    from phydi_kernels.nn import PHMLinear, PHYDILinear, PHConv2d
    from phydi_kernels.models import phresnet18
    from phydi_kernels import algebra, functional

Importing does no work: a submodule is imported at its first use, and the compiled library is loaded by the first call
that needs it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = ("algebra", "functional", "models", "nn")

__all__ = ["__version__", *_SUBMODULES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
