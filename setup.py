"""Compiles the kernels with CMake and places them in the package.

Environment variables:
    PHYDI_NO_BUILD=1   install without compiled kernels
    PHYDI_CUDA=0 | 1   never | always compile the CUDA kernels; by default, where nvcc is found
    CMAKE_ARGS         further arguments for CMake
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 13)


def find_torch() -> Path | None:
    """The folder of the torch package, found without importing it.

    pip builds in an isolated environment, which hides site-packages from ``sys.path`` but not from ``sysconfig``.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(f) for f in (spec and spec.submodule_search_locations) or ()]
    packages = (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages())
    folders += [Path(p, "torch") for p in packages]
    return next((f for f in folders if (f / "version.py").is_file()), None)


def read_version(path: Path) -> str:
    """The value of ``__version__`` in a file, which is read and not run."""
    match = re.search(r"^__version__ = ['\"](.+)['\"]$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SetupError(f"{path} defines no __version__")
    return match[1]


def reason_not_to_build() -> str:
    """Why the kernels cannot be compiled here, or an empty string."""
    if os.environ.get("PHYDI_NO_BUILD", "0") not in ("", "0"):
        return "PHYDI_NO_BUILD is set"
    chosen = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(name) for name in (*chosen, "c++", "g++", "clang++")):
        return "no C++ compiler was found (on Debian: apt install g++)"
    torch = find_torch()
    if torch is None:
        return "torch is not installed in this environment; install torch, then this package again"
    version = read_version(torch / "version.py")
    if tuple(map(int, version.split(".")[:2])) < MINIMUM_TORCH:
        return f"torch {version} is installed, and the kernels need {'.'.join(map(str, MINIMUM_TORCH))} or newer"
    return ""


def find_tool(name: str, folder: str) -> str:
    """``name`` from its PyPI package, whose scripts may be missing from PATH, else from PATH."""
    try:
        bundled = shutil.which(name, path=getattr(importlib.import_module(name), folder))
    except ImportError:
        bundled = None
    found = bundled or shutil.which(name)
    if found is None:
        raise SetupError(f"{name} was not found: pip install {name}, or set PHYDI_NO_BUILD=1 to do without kernels")
    return found


def find_nvcc() -> str | None:
    """The CUDA compiler, or None where the CUDA kernels are not wanted or cannot be compiled.

    An nvcc on PATH may be a script that starts the one in the toolkit. CMake derives the toolkit's folders from the
    compiler's path, so it is given the path that nvcc itself reports.
    """
    wanted = os.environ.get("PHYDI_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SetupError(f"PHYDI_CUDA={wanted!r} is not one of 0, 1")
    if wanted == "0" or not any(ROOT.glob("csrc/cuda/*.cu")):
        return None
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=toolkit)
    if nvcc is None:
        if wanted == "1":
            raise SetupError("PHYDI_CUDA=1, but nvcc was found neither on PATH nor in CUDA_HOME")
        return None
    dry_run = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    here = re.search(r"^#\$ _HERE_=(.+)$", dry_run.stderr, re.MULTILINE)
    return str(Path(here[1].strip(), "nvcc")) if here else nvcc


def cmake_definitions() -> dict[str, str | Path]:
    import pybind11

    torch = find_torch()
    assert torch is not None
    nvcc = find_nvcc()
    definitions: dict[str, str | Path] = {
        "CMAKE_MAKE_PROGRAM": find_tool("ninja", "BIN_DIR"),
        "PHYDI_VERSION": read_version(ROOT / "phydi_kernels" / "__init__.py"),
        "PHYDI_TORCH": torch,
        "PHYDI_TORCH_VERSION": read_version(torch / "version.py"),
        "PHYDI_CUDA": "ON" if nvcc else "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    if nvcc:
        definitions["CMAKE_CUDA_COMPILER"] = nvcc
    return definitions


class BuildKernels(build_ext):
    """Runs CMake in a build folder that is kept, so that a second run compiles only what changed."""

    def run(self) -> None:
        if not self.extensions:
            return
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        destination = ROOT if self.inplace else Path(self.build_lib).resolve()
        definitions = [f"-D{name}={value}" for name, value in cmake_definitions().items()]
        arguments = [*definitions, *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        for command in (
            [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *arguments],
            [cmake, "--build", build],
            [cmake, "--install", build, "--prefix", destination],
        ):
            if subprocess.run(command).returncode != 0:
                raise CompileError(
                    "the kernels did not compile, see above; PHYDI_NO_BUILD=1 installs without them (slower)"
                )


if __name__ == "__main__":
    reason = reason_not_to_build()
    if reason and {"bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
        print(f"phydi_kernels: installing without compiled kernels: {reason}", flush=True)
    setup(
        ext_modules=[] if reason else [Extension("phydi_kernels._host", sources=[])],
        cmdclass={"build_ext": BuildKernels},
    )
