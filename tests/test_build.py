"""setup.py and CMakeLists.txt, and the library they made."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import phydi_kernels
from phydi_kernels import info
from phydi_kernels.kernels import cpu

ROOT = Path(__file__).resolve().parent.parent

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="compiles C++, and there is no compiler here")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiles CUDA, and there is no nvcc here")
needs_library = pytest.mark.skipif(not cpu.LIBRARY.exists(), reason=f"inspects the compiled library: {cpu.load()}")

# Stand-ins that compile in a second, and only if every definition and include folder is handed to them.
OPS = """
#include <torch/csrc/stable/library.h>
#ifndef TORCH_TARGET_VERSION
#error TORCH_TARGET_VERSION is not defined
#endif
namespace baseline { int lanes(); }
namespace avx512 { int lanes(); }
int lanes() {
#ifdef PHYDI_X86
  return baseline::lanes() + avx512::lanes();
#else
  return baseline::lanes();
#endif
}
STABLE_TORCH_LIBRARY_IMPL(phydi_standin, CPU, m) { m.impl("lanes", nullptr); }
"""
KERNEL_SOURCES = sorted(p.name for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if p.name != "ops.cpp")
KERNELS = "namespace PHYDI_ISA { int lanes() { return 4; } }"
CUDA_KERNELS = """
__global__ void kernel() {}
void run() { kernel<<<1, 1>>>(); }
"""


def load_setup():
    spec = importlib.util.spec_from_file_location("phydi_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_checkout(folder: Path, kernels: str) -> Path:
    """The package's own sources and build files with stand-ins for the kernels."""
    folder.mkdir()
    ignore = shutil.ignore_patterns("lib", "*.so", "__pycache__")
    shutil.copytree(ROOT / "phydi_kernels", folder / "phydi_kernels", ignore=ignore)
    shutil.copytree(ROOT / "csrc" / "host", folder / "csrc" / "host")
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc" / "cpu").mkdir()
    (folder / "csrc" / "cpu" / "ops.cpp").write_text(OPS)
    first, *others = KERNEL_SOURCES
    (folder / "csrc" / "cpu" / first).write_text(kernels)
    for name in others:
        (folder / "csrc" / "cpu" / name).write_text("")
    return folder


def run_setup(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PHYDI_")} | environment
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=checkout, env=env, capture_output=True, text=True
    )


def wheel_of(checkout: Path) -> zipfile.ZipFile:
    (path,) = (checkout / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    checkout = make_checkout(tmp_path_factory.mktemp("compiled") / "checkout", KERNELS)
    done = run_setup(checkout, "bdist_wheel")
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout


def test_setup_does_not_import_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "torch" not in {name.split(".")[0] for name in names}


def test_torch_is_found_behind_build_isolation(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_setup().find_torch().samefile(Path(torch.__file__).parent)


def test_version_is_read_from_the_package():
    setup = load_setup()
    assert setup.read_version(ROOT / "phydi_kernels" / "__init__.py") == phydi_kernels.__version__
    assert setup.read_version(Path(torch.__file__).parent / "version.py") == torch.__version__


def test_reasons_not_to_build(monkeypatch, tmp_path):
    setup = load_setup()
    monkeypatch.setenv("PHYDI_NO_BUILD", "1")
    assert "PHYDI_NO_BUILD" in setup.reason_not_to_build()
    monkeypatch.setenv("PHYDI_NO_BUILD", "0")
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert "no C++ compiler" in setup.reason_not_to_build()
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert setup.reason_not_to_build() == ""
    monkeypatch.setattr(setup, "find_torch", lambda: None)
    assert "torch is not installed" in setup.reason_not_to_build()
    (tmp_path / "version.py").write_text("__version__ = '2.12.1+cu130'\n")
    monkeypatch.setattr(setup, "find_torch", lambda: tmp_path)
    assert "torch 2.12.1+cu130 is installed" in setup.reason_not_to_build()


@pytest.mark.parametrize("value", ["2", "yes"])
def test_cuda_switch_is_checked(monkeypatch, value):
    monkeypatch.setenv("PHYDI_CUDA", value)
    with pytest.raises(Exception, match=f"PHYDI_CUDA='{value}' is not one of 0, 1"):
        load_setup().find_nvcc()


def test_nvcc_script_is_resolved_to_the_toolkit(monkeypatch, tmp_path):
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho '#$ _HERE_=/opt/toolkit/bin' >&2\n")
    script.chmod(0o755)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "kernel.cu").touch()
    setup = load_setup()
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setenv("CUDACXX", str(script))
    monkeypatch.delenv("PHYDI_CUDA", raising=False)
    assert setup.find_nvcc() == "/opt/toolkit/bin/nvcc"
    monkeypatch.setenv("PHYDI_CUDA", "0")
    assert setup.find_nvcc() is None


def test_wheel_without_kernels(tmp_path):
    checkout = make_checkout(tmp_path / "checkout", KERNELS)
    done = run_setup(checkout, "bdist_wheel", PHYDI_NO_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert "installing without compiled kernels: PHYDI_NO_BUILD is set" in done.stdout
    wheel = wheel_of(checkout)
    assert wheel.filename.endswith(f"phydi_kernels-{phydi_kernels.__version__}-py3-none-any.whl")
    packaged = {name for name in wheel.namelist() if name.endswith((".py", ".so", ".typed"))}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "phydi_kernels").rglob("*.py")}
    assert packaged == sources | {"phydi_kernels/py.typed"}
    metadata = wheel.read(f"phydi_kernels-{phydi_kernels.__version__}.dist-info/METADATA").decode()
    for line in ("Requires-Dist: torch>=2.13", "License-Expression: Apache-2.0", "Requires-Python: >=3.10"):
        assert f"\n{line}\n" in metadata
    extras = {"discriminant", "demo", "test", "bench", "dev"}
    assert set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.MULTILINE)) == extras
    scripts = wheel.read(f"phydi_kernels-{phydi_kernels.__version__}.dist-info/entry_points.txt").decode()
    assert "phydi-kernels = phydi_kernels.cli:main" in scripts


@needs_compiler
def test_wheel_with_kernels(compiled):
    wheel = wheel_of(compiled)
    assert "none-any" not in wheel.filename
    binaries = {name for name in wheel.namelist() if name.endswith(".so")}
    assert "phydi_kernels/lib/libphydi_kernels.so" in binaries
    (host,) = binaries - {"phydi_kernels/lib/libphydi_kernels.so"}
    assert host.startswith("phydi_kernels/_host.")


@needs_compiler
def test_second_build_compiles_nothing_and_a_changed_file_alone(compiled):
    def built():
        done = run_setup(compiled, "build_ext", "--inplace")
        assert done.returncode == 0, done.stderr
        return re.findall(r"Building \w+ object \S+?(\w+\.cpp)", done.stdout)

    assert built() == []
    with open(compiled / "csrc" / "cpu" / "ops.cpp", "a") as ops:
        ops.write("\n")
    assert built() == ["ops.cpp"]
    assert (compiled / "phydi_kernels" / "lib" / "libphydi_kernels.so").is_file()


@needs_compiler
def test_compile_error_stops_the_installation(tmp_path):
    checkout = make_checkout(tmp_path / "checkout", "#error broken on purpose")
    done = run_setup(checkout, "bdist_wheel")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert "PHYDI_NO_BUILD=1 installs without them" in done.stderr
    assert not (checkout / "dist").exists()


def linked_libraries(library: Path) -> set[str]:
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    linked = set(re.findall(r"\(NEEDED\).*\[(?:.*/)?(lib\w+)", dynamic))
    return {name for name in linked if re.match("lib(torch|c10|cu)", name)}


@needs_compiler
@needs_nvcc
def test_library_with_cuda_kernels_links_no_cuda_library(tmp_path):
    checkout = make_checkout(tmp_path / "checkout", KERNELS)
    (checkout / "csrc" / "cuda").mkdir()
    (checkout / "csrc" / "cuda" / "kernels.cu").write_text(CUDA_KERNELS)
    done = run_setup(checkout, "build_ext", "--inplace", PHYDI_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    library = checkout / "phydi_kernels" / "lib" / "libphydi_kernels.so"
    assert b"sm_90a" in library.read_bytes()
    assert linked_libraries(library) == {"libtorch_cpu", "libc10"}


def test_library_is_built_where_it_can_be():
    reason = load_setup().reason_not_to_build()
    assert reason or cpu.load() == "", f"{cpu.load()}: run make build"


@needs_library
def test_library_uses_no_cpp_symbol_of_torch():
    symbols = subprocess.check_output(["nm", "-D", "-C", "--undefined-only", cpu.LIBRARY], text=True)
    assert "aoti_torch_" in symbols
    assert re.findall(r"\b(?:at|c10|torch|caffe2)::.*", symbols) == []


@needs_library
def test_library_links_torch_by_name_only():
    assert linked_libraries(cpu.LIBRARY) == {"libtorch_cpu", "libc10"}


@needs_library
def test_binaries_hold_no_path_of_the_build_machine():
    binaries = [cpu.LIBRARY, *cpu.LIBRARY.parent.parent.glob("_host*.so")]
    for path in (ROOT, Path(torch.__file__).parent):
        assert [b.name for b in binaries if f"{path}/".encode() in b.read_bytes()] == []


@needs_library
def test_build_info_describes_the_library():
    build = info.build_info()
    if build is None:
        pytest.skip("phydi_kernels._host needs Python's headers, which were missing when this was built")
    assert build["version"] == phydi_kernels.__version__
    assert build["torch_target_version"] == 0x020D << 48
    assert build["instruction_sets"][0] == "baseline"
    assert torch.ops.phydi_cpu.isa() in build["instruction_sets"]
