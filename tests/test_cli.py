import json
import math
import subprocess
import sys

import pytest
import torch

import phydi_kernels
from phydi_kernels import bench, cli, info, selftest
from phydi_kernels.kernels import cpu

FAULTS = (1.0001, math.nan)


def test_help_does_not_import_torch():
    code = "import sys, phydi_kernels.cli as c\ntry: c.main(['-h'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "phydi_kernels", "--version"], capture_output=True, text=True)
    assert done.stdout == f"phydi-kernels {phydi_kernels.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["train"], ["info", "--yaml"], ["selftest", "--device"]])
def test_bad_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: phydi-kernels" in capsys.readouterr().err


def test_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train"])
    message = capsys.readouterr().err
    assert "'train'" in message and all(command in message for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: phydi-kernels {command}" in capsys.readouterr().out


def test_info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["version"] == phydi_kernels.__version__
    assert printed["torch"] == torch.__version__
    assert printed["cpu"]["threads"] == torch.get_num_threads()
    assert printed["library"]["path"] == str(cpu.LIBRARY)
    assert printed["library"]["loaded"] == (printed["library"]["reason"] == "")


def test_info_lists_every_operator():
    registered = torch._C._dispatch_get_all_op_names()
    assert {f"phydi::{op}" for op in info.OPS} == {name for name in registered if name.startswith("phydi::")}


@pytest.mark.parametrize("reason", ["", "built without CUDA kernels"])
def test_info_names_the_cuda_kernels_where_they_were_built(reason, monkeypatch):
    monkeypatch.setattr(info.cuda, "load", lambda: reason)
    compiled = {op for op in info.OPS if info.implementation(op, "cuda") == "CUDA C++"}
    assert compiled == (set() if reason else {"kernel_matrix", "gda_factor", "eigh_small"})
    monkeypatch.setattr(info.gpu, "status", lambda: "there is no triton")
    others = {info.implementation(op, "cuda") for op in info.OPS if op not in compiled}
    assert others == {"reference (composed torch ops)"}


def test_info_text(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["phydi_kernels", phydi_kernels.__version__]
    table = {line.split()[0]: line for line in lines if line.startswith(info.OPS)}
    assert set(table) == set(info.OPS)
    for op, line in table.items():
        assert info.implementation(op, "cpu") in line and info.implementation(op, "cuda") in line


def test_info_without_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "libphydi_kernels.so")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "libphydi_kernels.so was not built" in out
    assert {info.implementation(op, "cpu") for op in info.OPS} == {"reference (library not loaded)"}
    assert "C++" not in out.split("operator")[1]


def test_info_tells_a_stale_build(monkeypatch, capsys):
    build = {"compiler": "GNU 12", "build_type": "Release", "instruction_sets": ("baseline",)}
    build |= {"cuda_architectures": ("80", "90a"), "torch_version": "2.13.0", "version": "0.0.1"}
    monkeypatch.setattr(info, "build_info", lambda: build)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "CUDA 80 90a" in out
    assert "phydi_kernels 0.0.1, another version than this one" in out


def test_selftest_passes(capsys):
    assert cli.main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tested = [tuple(line.split()[:2]) for line in lines[1:-1]]
    wide, half = ("float32", "float64"), ("bfloat16", "float16")
    # A factor is tested by what is solved with it.
    expected = [(op, dtype) for op in info.OPS if op != "gda_factor" for dtype in wide]
    expected += [(op, dtype) for op in info.OPS if op.startswith("ph") for dtype in half]
    assert sorted(tested) == sorted(expected)
    assert lines[-1] == f"{len(expected)} passed, 0 failed"


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        *((op, fault) for op in ("kernel_matrix", "eigh_small", "symmetric_times", "gda_apply") for fault in FAULTS),
        # The steps of refinement mend a factor that is almost right.
        *(("gda_factor", fault) for fault in (1.1, math.nan)),
    ],
)
def test_selftest_sees_a_wrong_operator_of_discriminant_analysis(op, fault, monkeypatch, capsys):
    correct = getattr(selftest, op)

    def wrong(*args):
        result = correct(*args)
        return (result[0] * fault, *result[1:]) if isinstance(result, tuple) else result * fault

    monkeypatch.setattr(selftest, op, wrong)
    monkeypatch.setattr(selftest, "LINEAR_SHAPES", ())
    monkeypatch.setattr(selftest, "CONV_SIZES", {})
    assert cli.main(["selftest"]) == 1
    failed = {tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines() if "FAILED" in line}
    row = "gda_apply" if op == "gda_factor" else op
    assert failed == {(row, "float32"), (row, "float64")}


@pytest.mark.parametrize("fault", FAULTS)
def test_selftest_sees_a_wrong_operator(fault, monkeypatch, capsys):
    correct = selftest.phm_linear.phm_linear
    monkeypatch.setattr(selftest.phm_linear, "phm_linear", lambda *args: correct(*args) * fault)
    assert cli.main(["selftest"]) == 1
    failed = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert ["phm_linear", "float32"] in failed and ["phm_linear", "float64"] in failed
    assert {op for op, _ in failed} == {"phm_linear"}


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:99"])
def test_selftest_on_a_device_that_is_not_there(device, capsys):
    assert cli.main(["selftest", "--device", device]) == 2
    assert f"--device {device} cannot be used" in capsys.readouterr().out


def test_bench_outside_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path / "benchmarks")
    assert cli.main(["bench"]) == 1
    assert "source checkout" in capsys.readouterr().out


def test_bench_runs_the_chosen_benchmarks(monkeypatch, tmp_path):
    pytest.importorskip("pytest_benchmark")
    calls = []

    def run(command, cwd):
        calls.append((command[1:], cwd))
        return subprocess.CompletedProcess(command, 5)

    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path / "benchmarks")
    monkeypatch.setattr(bench.subprocess, "run", run)
    assert cli.main(["bench", "-k", "linear"]) == 5
    assert calls == [(["-m", "pytest", str(tmp_path / "benchmarks"), "--threads", "1,2", "-k", "linear"], tmp_path)]
