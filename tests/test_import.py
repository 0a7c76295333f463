"""Importing the package does no work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MODULES = ("phydi_kernels", "phydi_kernels.functional", "phydi_kernels.nn", "phydi_kernels.models")

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


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict:
    """What the imports changed in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:phydi_kernels", "-c", SCRIPT, *MODULES],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path_factory.mktemp("empty"),
        # Not what the tests' own process, where the package is imported, may have written.
        env={name: value for name, value in os.environ.items() if name in KEPT},
    )
    assert run.stderr == ""
    return json.loads(run.stdout)


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
