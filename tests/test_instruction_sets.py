"""Every instruction set the library is compiled for, not only the best one this processor has."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16") if platform.machine() == "x86_64" else ("baseline",)
ISA = "from phydi_kernels.kernels import cpu; import torch; assert cpu.available(); print(torch.ops.phydi_cpu.isa())"
# Values of every kernel, and solutions one by one and along a path of taus, beside those of the plain implementation.
# Sizes are none of a vector's, and beyond those from which a path is solved on a band. An error is allowed to be some
# eps, times the condition of G_w for its inverse.
DISCRIMINANT = """
import torch
from phydi_kernels import functional
from phydi_kernels.kernels import cpu, gda_solve

torch.set_num_threads(1)
N = gda_solve.BAND_SAMPLES + 45
labels = torch.arange(N) % 5
generator = torch.Generator().manual_seed(0)
points = torch.rand(2, N, 7, generator=generator, dtype=torch.float64) + labels[:, None] / 3
options = {"rbf": {}, "linear": {}, "poly": {}, "sigmoid": {}, "cosine": {}, "laplacian": {}, "chi2": {}}
options |= {f"matern {nu}": {"nu": nu} for nu in (0.5, 1.5, 2.5)}
taus = torch.logspace(-2, 1, gda_solve.BAND_TAUS, dtype=torch.float64).unsqueeze(-1)

def results(dtype):
    X = points.to(dtype)
    for name, given in options.items():
        for Y in (None, X[:, :33] + 0.1):
            yield name, 20, functional.kernel_matrix(X, Y, kernel=name.split()[0], gamma=0.3, **given)
    K = functional.kernel_matrix(X, gamma=0.3)
    for tau in (None, taus.to(dtype)):
        solution = functional.gda_solve(K, labels, tau=tau, c_allow=1e3)
        yield "eigenvalues", 200, solution.eigenvalues
        yield "tau", 20, solution.tau
        yield "projector", 20_000, solution.coefficients @ solution.coefficients.mT

assert gda_solve.plan(points @ points.mT, len(taus), "cholesky") == "band"
found = {dtype: list(results(dtype)) for dtype in (torch.float64, torch.float32)}
cpu.available = lambda: False
assert gda_solve.plan(points @ points.mT, len(taus), "cholesky") == "cholesky"
expected = list(results(torch.float64))
for dtype, values in found.items():
    for (name, allowed, value), (_, _, exact) in zip(values, expected, strict=True):
        error = float((value - exact).norm() / exact.norm()) / torch.finfo(dtype).eps
        assert value.dtype is dtype and error < allowed, f"{name} in {dtype}: {error} eps"
"""


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


@pytest.mark.parametrize("most", SETS)
def test_discriminant_analysis_with_every_instruction_set(most):
    result = run(most, "-c", DISCRIMINANT)
    assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_is_refused_by_name():
    result = run("avx1024", "-c", ISA)
    assert result.returncode != 0
    assert "PHYDI_MAX_CPU_ISA=avx1024 is not one of" in result.stderr and " baseline" in result.stderr
