"""``phydi-kernels selftest``: every operator on one device against the reference in float64."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .info import implementation

# Imported to define the convolutions, which are called by their names in torch.ops.phydi.
from .ops import phc_conv, phc_conv_factored, phm_linear, phm_linear_factored  # noqa: F401
from .ops.eigh_small import eigh_small
from .ops.gda_solve import gda_apply, gda_factor, symmetric_times
from .ops.kernel_matrix import NAMES, kernel_matrix

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# rows, n, P, Q, p, q: one row, odd sizes with a rectangular algebra, and a few hundred rows.
LINEAR_SHAPES = ((1, 4, 4, 4, 64, 64), (37, 3, 2, 5, 17, 9), (256, 4, 4, 4, 64, 96))
# batch, n, P, Q, p, q, stride, dilation; kernel 3, padding 1.
CONV_SHAPES = ((3, 2, 3, 2, 5, 3, 2, 2), (4, 4, 4, 4, 8, 8, 1, 1))
CONV_SIZES = {1: (61,), 2: (13, 12), 3: (6, 5, 7)}
# problems, samples, features and classes of the discriminant analysis, which knows no 16-bit types.
GDA_SHAPES = ((3, 37, 5, 3), (1, 150, 40, 10))
GDA_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Case:
    """One call: ``op(*args)`` should equal ``expected(*args)``; ``terms`` is the length of its sums, stage by stage."""

    op: Callable[..., Any]
    expected: Callable[..., Any]
    args: tuple[Any, ...]
    terms: int


@dataclass(frozen=True)
class Result:
    """The case of one operator and dtype with the largest ``error / tolerance``, and the time of its largest shape."""

    op: str
    dtype: torch.dtype
    error: float
    tolerance: float
    microseconds: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Largest deviation allowed, in units of the result's root mean square.

    A sum of K products, rounded at each step, drifts from the exact one like a random walk: by eps * sqrt(K) of its
    size at most, in the type that the kernels add in. Rounding weights and results to ``dtype`` adds eps of the entry.
    The largest of the 10^5 entries compared is near 5 times the root mean square, and 8 leaves a margin.
    """
    accumulated = torch.finfo(reference.compute_dtype(dtype)).eps * math.sqrt(terms)
    return 8 * (torch.finfo(dtype).eps + accumulated)


def deviation(actual: Any, expected: Any) -> float:
    """max |actual - expected| over the root mean square of expected; the largest over several results."""
    if isinstance(actual, tuple):
        return max(deviation(a, e) for a, e in zip(actual, expected, strict=True))
    error = (actual.to("cpu", torch.float64) - expected).abs().max() / expected.square().mean().sqrt()
    return float(error) if error.isfinite() else math.inf


def check(device: torch.device) -> Iterator[Result]:
    """Runs every operator in every dtype, the same inputs at every call."""
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)
        cases = [case for shape in LINEAR_SHAPES for case in _linear_cases(shape, dtype, generator)]
        for d in CONV_SIZES:
            cases += [case for shape in CONV_SHAPES for case in _conv_cases(d, shape, dtype, generator)]
        if dtype in GDA_DTYPES:
            cases += [case for shape in GDA_SHAPES for case in _gda_cases(shape, dtype, generator)]
        groups: dict[str, list[Case]] = {}
        for name, case in cases:
            groups.setdefault(name, []).append(case)
        for name, group in groups.items():
            yield _compare(name, dtype, group, device)


def _compare(name: str, dtype: torch.dtype, cases: list[Case], device: torch.device) -> Result:
    pairs = []
    for case in cases:
        args = [a.to(device) if isinstance(a, Tensor) else a for a in case.args]
        exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.args]
        pairs.append((deviation(case.op(*args), case.expected(*exact)), tolerance(dtype, case.terms)))
    error, allowed = max(pairs, key=lambda pair: pair[0] / pair[1])
    return Result(name, dtype, error, allowed, _microseconds(lambda: case.op(*args), device))


def _microseconds(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median time of a call whose kernels are warm."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def _normal(dtype: torch.dtype, generator: torch.Generator) -> Callable[..., Tensor]:
    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(dtype)

    return normal


def _algebras(n: int, P: int, Q: int, normal: Callable[..., Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """A, and U, V, W of another one, with entries of variance 1/n."""
    R = n * max(P, Q) - 1
    # Signs: products of three normal numbers would leave a few entries much larger than the others.
    U, V, W = (normal(R, size).sign() * (n * R) ** (-1 / 6) for size in (n, P, Q))
    return normal(n, P, Q, std=n**-0.5), (U, V, W)


def _linear_cases(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Case]]:
    rows, n, P, Q, p, q = shape
    normal = _normal(dtype, generator)
    A, UVW = _algebras(n, P, Q, normal)
    # H x has the variance of x.
    F = normal(n, p, q, std=(Q * q) ** -0.5)
    x, grad, bias, alpha = normal(rows, Q * q), normal(rows, P * p), normal(P * p), normal(1)
    of_weights = rows + max(p * q, P * Q)
    args: tuple[Any, ...] = (x, A, F, bias, grad, alpha, "relu")
    yield "phm_linear", Case(phm_linear.phm_linear, reference.phm_linear, args, n + Q * q)
    args = (grad, x, A, F)
    yield (
        "phm_linear_weight_grad",
        Case(phm_linear.phm_linear_weight_grad, reference.phm_linear_weight_grad, args, of_weights),
    )
    factored, R = phm_linear_factored, len(UVW[0])
    args = (x, *UVW, F, bias, grad, alpha, "relu")
    yield (
        "phm_linear_factored",
        Case(factored.phm_linear_factored, reference.phm_linear_factored, args, R + n + Q * q),
    )
    args = (grad, x, *UVW, F)
    yield (
        "phm_linear_factored_grad",
        Case(
            factored.phm_linear_factored_grad,
            reference.phm_linear_factored_grad,
            args,
            R + n + max(of_weights, P * p, Q * q),
        ),
    )


def _conv_cases(
    d: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Case]]:
    batch, n, P, Q, p, q, stride, dilation = shape
    kernel, geometry = (3,) * d, ([stride] * d, [1] * d, [dilation] * d)
    normal = _normal(dtype, generator)
    A, UVW = _algebras(n, P, Q, normal)
    taps = 3**d
    F = normal(n, p, q, *kernel, std=(Q * q * taps) ** -0.5)
    size = [(s - 2 * dilation + 1) // stride + 1 for s in CONV_SIZES[d]]
    x, grad = normal(batch, Q * q, *CONV_SIZES[d]), normal(batch, P * p, *size)
    epilogue = (grad, normal(1), "relu")
    bias, pixels, R = normal(P * p), batch * math.prod(size), len(UVW[0])
    of_weights = pixels + max(p * q * taps, P * Q)
    calls = {
        "": ((x, A, F, bias, *geometry, *epilogue), n + Q * q * taps),
        "_input_grad": ((grad, A, F, list(x.shape), *geometry), n + P * p * taps),
        "_weight_grad": ((grad, x, A, F, *geometry), of_weights),
        "_factored": ((x, *UVW, F, bias, *geometry, *epilogue), R + n + Q * q * taps),
        "_factored_input_grad": ((grad, *UVW, F, list(x.shape), *geometry), R + n + P * p * taps),
        "_factored_grad": ((grad, x, *UVW, F, *geometry), R + n + max(of_weights, P * p * taps, Q * q * taps)),
    }
    for suffix, (args, terms) in calls.items():
        name = f"phc_conv{d}d{suffix}"
        yield name, Case(getattr(torch.ops.phydi, name), getattr(reference, f"phc_conv{suffix}"), args, terms)


def _gda_cases(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Case]]:
    problems, samples, features, classes = shape
    normal = _normal(dtype, generator)
    # Half the points are positive, as the chi2 kernels ask.
    X, Y = normal(problems, samples, features).abs(), normal(problems, samples // 2, features).abs()
    gamma = torch.tensor([[0.5], [1.0]], dtype=dtype).expand(2, problems) / features
    for name in NAMES:
        for other in (Y, None):
            args: tuple[Any, ...] = (X, other, gamma, name, 3, 1.0)
            # Four products a feature in |x|^2 + |y|^2 - 2 x.y; a cube has three times the relative error of its base.
            yield "kernel_matrix", Case(kernel_matrix, reference.kernel_matrix, args, 3**2 * 4 * features)
    S = normal(problems, classes, classes)
    yield (
        "eigh_small",
        Case(
            lambda S: _spectral(*eigh_small(S)),
            lambda S: (_spectral(*reference.eigh_small(S))[0], S),
            (S + S.mT,),
            classes**2,
        ),
    )
    K = reference.kernel_matrix(X, None, gamma[:1], "rbf", 3, 1.0)[0]
    x = normal(problems, samples, classes)
    yield "symmetric_times", Case(symmetric_times, torch.matmul, (K, x), samples)
    codes = torch.arange(samples).remainder(classes).expand(problems, -1)
    # tau of the size of S_w: its condition is not what is tested.
    tau = torch.full((1, problems), float(samples), dtype=dtype)
    yield "gda_apply", Case(_regularised_solve, _formed_solve, (K, codes, tau, x, classes), 4 * samples)


def _spectral(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues, and the matrix that they and their vectors make."""
    return values, vectors * values.unsqueeze(-2) @ vectors.mT


def _regularised_solve(K: Tensor, codes: Tensor, tau: Tensor, x: Tensor, classes: int) -> Tensor:
    structure = (K, codes, torch.ones_like(K[..., 0]), classes, "paper")
    *factor, tau, _ = gda_factor(*structure, tau, "given", 1e5, 0.0, "cholesky")
    return gda_apply(*structure, tau, *factor, x.unsqueeze(0), "cholesky")[0][0]


def _formed_solve(K: Tensor, codes: Tensor, tau: Tensor, x: Tensor, classes: int) -> Tensor:
    structure = reference.class_structure(codes, torch.ones_like(K[..., 0]), classes, "paper")
    S = reference.within_scatter(K, structure)
    return torch.linalg.solve(S + tau[0, :, None, None] * torch.eye(K.shape[-1], dtype=K.dtype), x)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")


def run(args: argparse.Namespace) -> int:
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        print(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
        return 2
    if device.type == "cuda":
        # TF32, which the kernels follow, has three digits; it is cuDNN's default, and can be made cuBLAS's.
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    print(f"{'operator':32}{'dtype':9}{'error':>9}{'allowed':>9}{'time':>11}  {'':6}  implementation")
    results = []
    for r in check(device):
        results.append(r)
        dtype, verdict = str(r.dtype).removeprefix("torch."), "passed" if r.passed else "FAILED"
        row = f"{r.op:32}{dtype:9}{r.error:9.1e}{r.tolerance:9.1e}{r.microseconds:8.0f} us  {verdict}"
        print(f"{row}  {implementation(r.op, device.type, r.dtype)}", flush=True)
    passed = sum(r.passed for r in results)
    print(f"{passed} passed, {len(results) - passed} failed")
    return 0 if passed == len(results) else 1
