"""Imports between the layers of the package go one way."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import phydi_kernels

ROOT = Path(phydi_kernels.__file__).parent

# From what users run down to what computes. A module imports from its own layer and from those below.
LAYERS = (
    ("__main__", "cli", "info", "bench", "demo", "selftest"),
    ("integrations", "discriminant", "models", "convert", "inference"),
    ("nn",),
    ("functional", "_gda"),
    ("ops",),
    ("kernels",),
    ("reference",),
    ("plans", "plans_cuda"),
    ("algebra",),
    ("_check", "_dataflow", "_table"),
    ("",),
)
# What is imported from elsewhere: by every module, and by those that an extra of the installation serves.
DEPENDENCIES = {"phydi_kernels", "torch", "tqdm", *sys.stdlib_module_names}
EXTRAS = {
    "kernels": {"triton"},
    "discriminant": {"numpy", "sklearn"},
    "demo": {"matplotlib", "sklearn"},
    "integrations": {"adapters", "peft"},
}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def _module(path: Path) -> tuple[str, ...]:
    """Dotted name below the package; a package's own __init__ has the name of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(source: str, module: tuple[str, ...], is_package: bool) -> set[tuple[str, ...]]:
    """Modules of phydi_kernels that ``source`` imports at any place, without the package's own name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {tuple(name[1:]) for name in names if name[0] == "phydi_kernels"}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                package = module if is_package else module[:-1]
                base = ["phydi_kernels", *package[: len(package) - node.level + 1], *base]
            if base and base[0] == "phydi_kernels":
                # "from . import plans" names the module in the list, not in the path.
                found |= {(*base[1:], alias.name) for alias in node.names} if len(base) == 1 else {tuple(base[1:])}
    return found


def _layer(module: tuple[str, ...]) -> str:
    return module[0] if module and module[0] in RANK else ""


def upward(source: str, module: tuple[str, ...], is_package: bool) -> list[str]:
    """Imports of a higher layer. The package's own __init__ gathers the public modules and may import all."""
    if not module:
        return []
    rank = RANK[_layer(module)]
    return [".".join(target) for target in imports(source, module, is_package) if RANK[_layer(target)] < rank]


def packages(source: str) -> set[str]:
    """Top-level packages that ``source`` imports by their names, at any place."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_declared_dependencies_are_imported(path):
    allowed = DEPENDENCIES | EXTRAS.get(_layer(_module(path)), set())
    assert packages(path.read_text()) <= allowed


def test_every_import_is_seen():
    source = (
        "import os.path, numpy as np\ndef f():\n    from scipy.linalg import eigh\nfrom . import x\nfrom .y import z"
    )
    assert packages(source) == {"os", "numpy", "scipy"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    module = _module(path)
    assert not module or module[0] in RANK, f"{path.name} has no layer in this test"
    assert upward(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("source", "module", "is_package", "expected"),
    (
        ("from ..nn import PHMLinear", ("ops", "phm_linear"), False, ["nn"]),
        ("from .. import functional", ("kernels", "cpu"), False, ["functional"]),
        ("import phydi_kernels.ops.phm_linear", ("reference",), False, ["ops.phm_linear"]),
        ("def f():\n    from phydi_kernels import models", ("nn",), True, ["models"]),
        ("from .. import plans, reference", ("ops", "phm_linear"), False, []),
        ("from ..functional import phm_linear", ("nn", "phm_linear"), False, []),
        ("from .._gda import C_ALLOW", ("ops", "gda_solve"), False, ["_gda"]),
        ("from ..discriminant import LinearDiscriminantAnalysis", ("nn", "discriminant_loss"), False, ["discriminant"]),
        ("from ..ops.eigh_small import eigh_small", ("kernels", "cuda"), False, ["ops.eigh_small"]),
        ("from ..discriminant import LinearDiscriminantAnalysis", ("demo", "discriminant"), False, []),
        ("from .._gda import BLOCK_ENTRIES", ("nn", "kernel_discriminant"), False, []),
        ("from .kernels import cpu, cuda", ("_gda",), False, []),
        ("from . import __version__", ("info",), False, []),
        ("from . import nn", (), True, []),
    ),
)
def test_upward_imports_are_seen(source, module, is_package, expected):
    assert upward(source, module, is_package) == expected
