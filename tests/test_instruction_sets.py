"""Every instruction set the library is compiled for, not only the best one this processor has."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SETS = ("baseline", "avx2", "avx512", "avx512_bf16") if platform.machine() == "x86_64" else ("baseline",)
ISA = "from phydi_kernels.kernels import cpu; import torch; assert cpu.available(); print(torch.ops.phydi_cpu.isa())"


def run(most: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PHYDI_MAX_CPU_ISA": most}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("most", SETS)
def test_every_operator_with_every_instruction_set(most):
    chosen = run(most, "-c", ISA).stdout.strip()
    # A processor without the set runs the next one below.
    assert chosen in SETS[: SETS.index(most) + 1]
    selftest = run(most, "-m", "phydi_kernels", "selftest")
    assert selftest.returncode == 0, selftest.stdout + selftest.stderr
    assert f"C++ {chosen}\n" in selftest.stdout


def test_an_unknown_instruction_set_is_refused_by_name():
    result = run("avx1024", "-c", ISA)
    assert result.returncode != 0
    assert "PHYDI_MAX_CPU_ISA=avx1024 is not one of" in result.stderr and " baseline" in result.stderr
