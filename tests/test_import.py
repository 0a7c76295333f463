"""Importing the package does no work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULES = (
    "phydi_kernels",
    "phydi_kernels.algebra",
    "phydi_kernels.convert",
    "phydi_kernels.functional",
    "phydi_kernels.inference",
    "phydi_kernels.integrations",
    "phydi_kernels.models",
    "phydi_kernels.nn",
)

KEPT = ("HOME", "PATH", "PYTHONPATH", "LD_LIBRARY_PATH")

SCRIPT = """
import importlib, json, os, sys, threading
import torch

def tasks():
    return sorted(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()

def files():
    return sorted(os.path.join(d, f) for d, _, names in os.walk(os.getcwd()) for f in names)

loaded, environment, threads, before = set(sys.modules), dict(os.environ), tasks(), files()
settings = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist()
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps({
    "modules": sorted(set(sys.modules) - loaded),
    "environment": dict(os.environ) == environment,
    "threads": tasks() == threads,
    "files": files() == before,
    "settings": settings == (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist()),
    "cuda": torch.cuda.is_initialized(),
    "libraries": sorted(torch.ops.loaded_libraries),
}))
"""


def changes(directory: Path, *modules: str) -> dict[str, Any]:
    """What the imports change in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:phydi_kernels", "-c", SCRIPT, *modules],
        capture_output=True,
        text=True,
        check=True,
        cwd=directory,
        # Not what the tests' own process, where the package is imported, may have written.
        env={name: value for name, value in os.environ.items() if name in KEPT},
    )
    assert run.stderr == ""
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, Any]:
    return changes(tmp_path_factory.mktemp("empty"), *MODULES)


@pytest.fixture(scope="module")
def imported_estimators(tmp_path_factory) -> dict[str, Any]:
    """The one module that needs scikit-learn, which changes the environment itself."""
    return changes(tmp_path_factory.mktemp("empty"), "sklearn", "phydi_kernels.discriminant")


@pytest.mark.parametrize("kept", ("environment", "threads", "files", "settings"))
def test_import_changes_nothing(imported, kept):
    assert imported[kept]


def test_import_does_not_touch_cuda(imported):
    assert not imported["cuda"]


def test_import_loads_no_library(imported):
    assert imported["libraries"] == []


@pytest.mark.parametrize("module", ("triton", "sklearn", "scipy", "matplotlib", "pytest"))
def test_import_is_lean(imported, module):
    found = [name for name in imported["modules"] if name.partition(".")[0] == module]
    assert found == []


def test_submodules_are_imported_at_first_use(tmp_path):
    found = [name for name in changes(tmp_path, "phydi_kernels")["modules"] if name.startswith("phydi_kernels")]
    assert found == ["phydi_kernels"]


def test_import_of_the_estimators_changes_nothing(imported_estimators):
    assert imported_estimators["files"] and imported_estimators["settings"]
    assert not imported_estimators["cuda"] and imported_estimators["libraries"] == []


def test_import_of_the_estimators_is_lean(imported_estimators):
    modules = imported_estimators["modules"]
    assert "phydi_kernels.discriminant" in modules
    assert [name for name in modules if name.partition(".")[0] in ("triton", "matplotlib", "pytest")] == []
    assert not {"phydi_kernels.nn", "phydi_kernels.models", "phydi_kernels.inference"} & set(modules)
