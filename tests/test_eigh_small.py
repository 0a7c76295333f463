"""eigh_small against torch.linalg.eigh in float64: many small symmetric matrices at once."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LAYOUTS, dtype_id, normal
from torch import Tensor

from phydi_kernels.kernels import cpu
from phydi_kernels.ops.eigh_small import LARGEST, eigh_small

DTYPES = (torch.float64, torch.float32)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=dtype_id)


@pytest.fixture(params=(True, False), ids=("kernels", "reference"))
def implementation(request, monkeypatch) -> None:
    """Both the compiled kernels and the plain implementation of other devices and of machines without a compiler."""
    if not request.param:
        monkeypatch.setattr(cpu, "available", lambda: False)


def symmetric(P: int, L: int, seed: int = 0) -> Tensor:
    S = normal((P, L, L), seed)
    return S + S.mT


def assert_decomposes(S: Tensor, values: Tensor, vectors: Tensor) -> None:
    """S = Q Lambda Q^T, Q^T Q = I and eigenvalues within the backward error of a method of L sweeps of rotations.

    Its rounding errors are a random walk of L (L - 1) / 2 rotations a sweep, in units of eps |S|: 10 sqrt(L) covers
    the sweeps and the worst of the entries.
    """
    L, eps = S.shape[-1], torch.finfo(S.dtype).eps
    S, Q, Lambda = S.double(), vectors.double(), values.double()
    allowed = 10 * eps * math.sqrt(L)
    norm = S.norm(dim=(-2, -1))
    assert bool(((S @ Q - Q * Lambda.unsqueeze(-2)).norm(dim=(-2, -1)) <= allowed * norm).all())
    identity = torch.eye(L, dtype=torch.float64)
    assert bool(((Q.mT @ Q - identity).norm(dim=(-2, -1)) <= allowed * math.sqrt(L)).all())
    assert bool((Lambda.diff() >= 0).all())
    assert bool(((Lambda - torch.linalg.eigvalsh(S)).norm(dim=-1) <= allowed * norm).all())
    largest = Q.gather(-2, Q.abs().argmax(-2, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("L", (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 29, 31, 32, 33, 48, 63, LARGEST, LARGEST + 1))
@pytest.mark.parametrize("P", (1, 3, 19))
def test_values_and_vectors(L, P, dtype, implementation):
    S = symmetric(P, L).to(dtype)
    before = S.clone()
    values, vectors = eigh_small(S)
    assert values.dtype is vectors.dtype is dtype
    assert values.shape == (P, L) and vectors.shape == (P, L, L)
    assert values.is_contiguous() and vectors.is_contiguous() and torch.equal(S, before)
    assert_decomposes(S, values, vectors)


def test_by_hand(implementation):
    S = torch.tensor([[[2, 1], [1, 2]], [[0, 0], [0, -3]], [[1, 2], [2, -2]]], dtype=torch.float64)
    values, vectors = eigh_small(S)
    expected = torch.tensor([[1, 3], [-3, 0], [-3, 2]], dtype=torch.float64)
    assert torch.allclose(values, expected, rtol=1e-14, atol=1e-15)
    columns = torch.tensor([[[1, 1], [1, 1]], [[0, 1], [1, 0]], [[-1, 2], [2, 1]]], dtype=torch.float64)
    expected = columns / columns.norm(dim=-2, keepdim=True)
    assert torch.allclose(vectors[1:], expected[1:], rtol=1e-14, atol=1e-15)
    # Rounding decides which of two entries equal in size is the positive one.
    assert torch.allclose(vectors[0].abs(), expected[0], rtol=1e-14)
    assert float(vectors[0, 0, 0] * vectors[0, 1, 0]) < 0 < float(vectors[0, 0, 1] * vectors[0, 1, 1])


@pytest.mark.parametrize("scale", (1e-300, 1e-150, 1e-30, 1e30, 1e150, 1e300), ids=str)
@pytest.mark.parametrize("L", (2, 9, 40))
def test_scales(L, scale, dtype, implementation):
    """Squares of the entries may be too large or too small for their type."""
    scale = max(min(scale, 1e36), 1e-36) if dtype is torch.float32 else scale
    S = symmetric(2, L).to(dtype) * scale
    values, vectors = eigh_small(S)
    assert_decomposes((S.double() / scale).to(dtype), (values.double() / scale).to(dtype), vectors)


@pytest.mark.parametrize("L", (1, 2, 5, 20, 64))
def test_equal_eigenvalues(L, dtype, implementation):
    """Multiples of the identity, zeros, a matrix of ones, and blocks that share their eigenvalues."""
    blocks = torch.block_diag(*[torch.tensor([[2.0, 1.0], [1.0, 2.0]])] * ((L + 1) // 2))[:L, :L]
    S = torch.stack((torch.eye(L), 3 * torch.eye(L), torch.zeros(L, L), torch.ones(L, L), blocks)).to(dtype)
    values, vectors = eigh_small(S)
    assert_decomposes(S, values, vectors)
    assert torch.equal(values[:3], torch.tensor([1.0, 3.0, 0.0]).to(dtype).unsqueeze(-1).expand(3, L))
    assert torch.equal(vectors[:3].abs().sum(-1), torch.ones((3, L), dtype=dtype))


def test_graded_matrices(dtype, implementation):
    """Small eigenvalues of a positive definite matrix of scaled rows, to many of their own digits.

    LAPACK's tridiagonal methods lose them, and so this holds for the Jacobi method alone.
    """
    if not cpu.available():
        pytest.skip("LAPACK's accuracy is relative to the largest eigenvalue")
    root = torch.logspace(0, -6, 6, dtype=torch.float64)
    S = root.unsqueeze(1) * (torch.eye(6, dtype=torch.float64) + 0.1) * root
    S = S.to(dtype)
    # With S = D A D for a well-conditioned A, the inverse gives the small eigenvalues to the digits of float64.
    exact = 1 / torch.linalg.eigvalsh(torch.linalg.inv(S.double())).flip(-1)
    values, _ = eigh_small(S.unsqueeze(0))
    error = ((values[0].double() - exact.sort().values) / exact.sort().values).abs()
    assert float(error[:3].max()) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("entry", ((0, 0), (4, 1), (6, 6)))
def test_nan_and_infinity_stay_in_their_matrix(entry, value, dtype, implementation):
    S = symmetric(5, 7).to(dtype)
    clean = eigh_small(S)
    S[2][entry] = S[2][entry[::-1]] = value
    values, vectors = eigh_small(S)
    assert values[2].isnan().all() and vectors[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(values[others], clean[0][others]) and torch.equal(vectors[others], clean[1][others])


def test_the_lower_triangle_counts(implementation):
    S = symmetric(3, 6)
    values, vectors = eigh_small(S)
    lower = eigh_small(S.tril() + normal((3, 6, 6), 9).triu(1))
    assert torch.equal(values, lower[0]) and torch.equal(vectors, lower[1])


@pytest.mark.parametrize("shape", ((0, 5, 5), (3, 0, 0), (0, 0, 0), (0, LARGEST + 1, LARGEST + 1)), ids=str)
def test_empty(shape, dtype, implementation):
    S = torch.empty(shape, dtype=dtype, requires_grad=True)
    values, vectors = eigh_small(S)
    assert values.shape == shape[:2] and vectors.shape == shape
    assert values.dtype is vectors.dtype is dtype
    (grad,) = torch.autograd.grad(values.sum() + vectors.sum(), S)
    assert grad.shape == shape


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_between_nan(layout, dtype, implementation):
    S = layout(symmetric(4, 6).to(dtype))
    values, vectors = eigh_small(S)
    plain = eigh_small(S.clone(memory_format=torch.contiguous_format))
    assert torch.allclose(values, plain[0], rtol=0, atol=1e-14 if dtype is torch.float64 else 1e-5)
    assert_decomposes(S, values, vectors)


def test_reruns_batches_and_threads(threads):
    """Bit for bit: alone or in a batch, again, and with two threads."""
    S = symmetric(50, 12)
    runs = []
    for count in (1, 1, 2):
        threads(count)
        runs.append(eigh_small(S))
    alone = [torch.cat(parts) for parts in zip(*(eigh_small(s.unsqueeze(0)) for s in S), strict=True)]
    for values, vectors in (*runs[1:], alone):
        assert torch.equal(values, runs[0][0]) and torch.equal(vectors, runs[0][1])


# Derivatives


def _symmetrized(S: Tensor) -> Tensor:
    return (S + S.mT) / 2


@pytest.mark.parametrize("L", (1, 2, 5))
def test_numerical_derivatives(L):
    """Of values, and of vectors with their signs, where all eigenvalues differ."""
    S = symmetric(2, L).requires_grad_()
    assert torch.autograd.gradcheck(lambda S: eigh_small(_symmetrized(S)), S, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda S: eigh_small(_symmetrized(S)), S)


def test_gradients_are_those_of_torch():
    S = symmetric(3, 6).requires_grad_()
    weight = normal((3, 6, 6), 1)

    def loss(values: Tensor, vectors: Tensor) -> Tensor:
        # The squares leave out the signs, in which the two may differ.
        return (values.exp().unsqueeze(-2) * vectors.square() * weight).sum()

    grads = [torch.autograd.grad(loss(*f(_symmetrized(S))), S)[0] for f in (eigh_small, torch.linalg.eigh)]
    assert torch.allclose(*grads, rtol=1e-11, atol=1e-12)


def test_gradients_where_eigenvalues_are_equal():
    """The sum of functions of all eigenvalues has a derivative, and what depends on the basis does not give NaN."""
    base = torch.diag_embed(torch.tensor([[1.0, 1.0, 2.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64))
    Q = torch.linalg.qr(normal((3, 3, 3), 0)).Q
    S = (Q @ base @ Q.mT).requires_grad_()
    values, vectors = eigh_small(_symmetrized(S))
    (grad,) = torch.autograd.grad(values.exp().sum(), S, retain_graph=True)
    assert torch.allclose(grad, torch.linalg.matrix_exp(S.detach()), rtol=1e-12, atol=1e-13)
    (of_vectors,) = torch.autograd.grad((vectors * normal((3, 3, 3), 1)).sum(), S)
    assert of_vectors.isfinite().all()


# Tracing and transforms


def test_opcheck(dtype):
    torch.library.opcheck(eigh_small, (symmetric(3, 5).to(dtype).requires_grad_(),))


def test_compile():
    def criterion(S: Tensor) -> Tensor:
        values, vectors = eigh_small(_symmetrized(S))
        return (values * vectors.square().sum(-2) * torch.arange(5)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    S = symmetric(3, 5).requires_grad_()
    results = [(f(S), *torch.autograd.grad(f(S), S)) for f in (compiled, criterion)]
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("in_dim", (0, 1))
def test_vmap(in_dim):
    S = torch.stack([symmetric(2, 4, seed) for seed in range(3)], in_dim)
    values, vectors = torch.func.vmap(eigh_small, in_dims=in_dim)(S)
    looped = [eigh_small(s) for s in S.movedim(in_dim, 0)]
    assert torch.equal(values, torch.stack([v for v, _ in looped]))
    assert torch.equal(vectors, torch.stack([v for _, v in looped]))

    def loss(S: Tensor) -> Tensor:
        return eigh_small(S)[0].exp().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=in_dim)(S)
    assert torch.equal(grads, torch.stack([torch.func.grad(loss)(s) for s in S.movedim(in_dim, 0)]))


def test_nested_transforms():
    def loss(S: Tensor) -> Tensor:
        values, vectors = eigh_small(_symmetrized(S))
        return (values.square().unsqueeze(-2) * vectors**4).sum()

    S = symmetric(1, 3)
    expected = torch.autograd.functional.hessian(loss, S)
    assert expected.any()
    assert torch.allclose(torch.func.jacrev(torch.func.jacrev(loss))(S), expected, rtol=1e-10, atol=1e-12)
    corner = torch.func.grad(lambda S: torch.func.grad(loss)(S)[0, 0, 0])(S)
    assert torch.allclose(corner, expected[0, 0, 0], rtol=1e-10, atol=1e-12)


def test_meta():
    values, vectors = eigh_small(torch.empty((3, 5, 5), device="meta"))
    assert values.is_meta and values.shape == (3, 5) and vectors.shape == (3, 5, 5)
