"""Without a usable library the package imports silently, warns once at first use, and computes the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import pathlib, sys, warnings
import torch

with warnings.catch_warnings():
    warnings.simplefilter("error")
    from phydi_kernels import functional
    from phydi_kernels.kernels import cpu

cpu.LIBRARY = pathlib.Path(sys.argv[1])

def values(*shape):
    return torch.randint(-2, 3, shape, dtype=torch.float64).requires_grad_()

x, A, F, bias, alpha = values(3, 8), values(2, 2, 2), values(2, 5, 4), values(10), values(1)
image, filters = values(2, 8, 5, 5), values(2, 5, 4, 3, 3)
points, labels = values(30, 4).detach(), torch.arange(30) % 3
gamma = torch.tensor([0.2, 0.4], dtype=torch.float64, requires_grad=True)
taus = torch.logspace(-1, 2, 9, dtype=torch.float64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        K = functional.kernel_matrix(points, gamma=gamma)
        solution = functional.gda_solve(K, labels, tau=taus[:, None])
        gamma_grad = torch.autograd.grad(solution.eigenvalues.sum(), gamma)[0]
        y = functional.phm_linear(x, A, F, bias, alpha=alpha)
        z = functional.phc_conv2d(image, A, filters, bias, alpha=alpha)
        grads = torch.autograd.grad(y.square().sum() + z.square().sum(), (x, A, F, bias, alpha, image, filters))

def dense(weights):
    ones = [1] * (weights.dim() - 3)
    return sum(torch.kron(a.reshape(2, 2, *ones), f) for a, f in zip(A, weights, strict=True))

dense_y = alpha * torch.nn.functional.linear(x, dense(F), bias)
dense_z = alpha * torch.nn.functional.conv2d(image, dense(filters), bias)
expected = torch.autograd.grad(dense_y.square().sum() + dense_z.square().sum(), (x, A, F, bias, alpha, image, filters))
assert torch.equal(y, dense_y) and torch.equal(z, dense_z)
assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))

def solved(gamma):
    # G_w^-1 S_b for each tau and gamma, from sums over the classes.
    K = (-gamma[:, None, None] * (points[:, None] - points).square().sum(-1)).exp()
    center = K.mean(-1, keepdim=True)
    S_w = S_b = 0
    for j in range(3):
        own = K[..., labels == j]
        mean = own.mean(-1, keepdim=True)
        S_w = S_w + 10 * (own - mean) @ (own - mean).mT
        S_b = S_b + 10 * (mean - center) @ (mean - center).mT
    return torch.linalg.solve(S_w + taus[:, None, None, None] * torch.eye(30, dtype=torch.float64), S_b)

exact = solved(gamma)
assert solution.coefficients.shape == (9, 2, 30, 2) and not solution.info.any()
assert torch.allclose(solution.eigenvalues, torch.linalg.eigvals(exact).real.sort(-1).values[..., -2:].flip(-1), 1e-10)
trace = exact.diagonal(dim1=-2, dim2=-1).sum()
assert torch.allclose(gamma_grad, torch.autograd.grad(trace, gamma)[0], 1e-9)
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


def _warnings(library) -> list[str]:
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(library)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_missing_library(tmp_path):
    (warning,) = _warnings(tmp_path / "libmissing.so")
    assert warning.startswith("UserWarning phydi_kernels: libmissing.so was not built")
    assert "the plain PyTorch implementation runs instead, slower" in warning


@pytest.mark.parametrize(
    ("content", "reason"),
    (
        (b"", "file too short"),
        (b"not a library" * 100, "invalid ELF header"),
        (b"\x7fELF\x02\x01\x01" + bytes(200), ""),
    ),
)
def test_broken_library(tmp_path, content, reason):
    library = tmp_path / "libbroken.so"
    library.write_bytes(content)
    (warning,) = _warnings(library)
    assert warning.startswith("UserWarning phydi_kernels: libbroken.so does not load: ") and reason in warning
    assert "the plain PyTorch implementation runs instead, slower" in warning


def test_library_of_another_version():
    """One that loads and has none of the kernels, as after an update without a new build."""
    (warning,) = _warnings(Path(torch.__file__).parent / "lib" / "libc10.so")
    assert "is of another version, without phm_linear, " in warning and "build it again" in warning
