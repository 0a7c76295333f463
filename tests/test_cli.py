import json
import math
import subprocess
import sys

import pytest
import torch

import phydi_kernels
from phydi_kernels import bench, cli, info, selftest
from phydi_kernels.kernels import cpu


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
    assert info.implementation("phm_linear", "cpu") == "reference (library not loaded)"
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
    assert lines[-1] == f"{len(info.OPS) * 4} passed, 0 failed"
    assert {line.split()[0] for line in lines[1:-1]} == set(info.OPS)


@pytest.mark.parametrize("fault", [1.0001, math.nan])
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
