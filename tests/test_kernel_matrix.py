"""kernel_matrix against scikit-learn's formulas in float64, its derivatives, and how it is traced and transformed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, normal
from scipy.spatial.distance import cdist
from sklearn.gaussian_process import kernels as gaussian_process
from sklearn.metrics import pairwise
from torch import Tensor

from phydi_kernels.functional import kernel_matrix
from phydi_kernels.kernels import cpu
from phydi_kernels.ops.kernel_matrix import NAMES
from phydi_kernels.ops.kernel_matrix import kernel_matrix as operator

Formula = Callable[..., np.ndarray]


def _scaled(kernel: Callable[[Any], Any]) -> Formula:
    """A kernel of scikit-learn's gaussian_process, made from a lengthscale; gamma is 1 / (2 lengthscale^2)."""

    def formula(X, Y, gamma=None, lengthscale=None, **ignored):
        return kernel(1 / math.sqrt(2 * gamma) if lengthscale is None else lengthscale)(X, Y)

    return formula


def _rbf(X, Y, gamma=None, lengthscale=None):
    return pairwise.rbf_kernel(X, Y, gamma) if lengthscale is None else gaussian_process.RBF(lengthscale)(X, Y)


def _laplacian(X, Y, gamma=None, lengthscale=None):
    scale = 1 if lengthscale is None else lengthscale
    return pairwise.laplacian_kernel(X / scale, Y / scale, gamma if lengthscale is None else 1)


@dataclass(frozen=True)
class Case:
    """A kernel with its options, and scikit-learn's function (X, Y, gamma or lengthscale) of the same options."""

    kernel: str
    formula: Formula
    options: Mapping[str, Any] = field(default_factory=dict)
    lengthscale: bool = False

    @property
    def parameter(self) -> str | None:
        """The argument with a gradient beside X and Y."""
        if self.lengthscale:
            return "lengthscale"
        return None if self.kernel in ("linear", "cosine") else "gamma"

    @property
    def unit_diagonal(self) -> bool:
        return self.kernel in ("rbf", "laplacian", "matern", "chi2")

    def values(self, shape: Sequence[int], seed: int) -> Tensor:
        """Points in a cube; entries of either sign but for chi2."""
        cube = torch.rand(tuple(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return cube if self.kernel == "chi2" else 2 * cube - 1

    def parameters(self, d: int, gamma: Any = None) -> dict[str, Any]:
        if self.lengthscale:
            # The distance, a sum over the features or the square root of one, is of size 1.
            scale = d if self.kernel == "laplacian" else math.sqrt(d)
            return {"lengthscale": scale * torch.linspace(0.5, 2.5, d, dtype=torch.float64)}
        return {} if gamma is None else {"gamma": gamma}

    def __call__(self, X: Tensor, Y: Tensor | None = None, **parameters: Any) -> Tensor:
        return kernel_matrix(X, Y, kernel=self.kernel, **self.options, **parameters)

    def expected(self, X: Tensor, Y: Tensor | None, **parameters: Any) -> Tensor:
        """In float64, of one problem."""
        x = X.double().numpy()
        y = x if Y is None else Y.double().numpy()
        if self.parameter == "gamma":
            parameters = {"gamma": 1 / X.shape[-1], **parameters}
        given = {name: v.double().numpy() if isinstance(v, Tensor) else v for name, v in parameters.items()}
        return torch.from_numpy(np.asarray(self.formula(x, y, **given)))


def _matern(nu: float) -> Formula:
    return _scaled(lambda lengthscale: gaussian_process.Matern(lengthscale, nu=nu))


CASES = {
    "linear": Case("linear", lambda X, Y: pairwise.linear_kernel(X, Y)),
    "poly": Case("poly", lambda X, Y, gamma: pairwise.polynomial_kernel(X, Y, 3, gamma, 1)),
    "poly1": Case("poly", lambda X, Y, gamma: pairwise.polynomial_kernel(X, Y, 1, gamma, 0), {"degree": 1, "coef0": 0}),
    "poly4": Case(
        "poly", lambda X, Y, gamma: pairwise.polynomial_kernel(X, Y, 4, gamma, -0.7), {"degree": 4, "coef0": -0.7}
    ),
    "sigmoid": Case("sigmoid", lambda X, Y, gamma: pairwise.sigmoid_kernel(X, Y, gamma, -0.3), {"coef0": -0.3}),
    "cosine": Case("cosine", lambda X, Y: pairwise.cosine_similarity(X, Y)),
    "rbf": Case("rbf", _rbf),
    "rbf_lengthscale": Case("rbf", _rbf, lengthscale=True),
    "laplacian": Case("laplacian", _laplacian),
    "laplacian_lengthscale": Case("laplacian", _laplacian, lengthscale=True),
    "matern12": Case("matern", _matern(0.5), {"nu": 0.5}),
    "matern32": Case("matern", _matern(1.5)),
    "matern52": Case("matern", _matern(2.5), {"nu": 2.5}),
    "matern32_lengthscale": Case("matern", _matern(1.5), {"nu": 1.5}, lengthscale=True),
    "chi2": Case("chi2", lambda X, Y, gamma: pairwise.chi2_kernel(X, Y, gamma)),
}
# (N, M, d): M None for Y = None. Around the vectors, tiles, blocks and depths of the kernels.
SIZES = (
    (1, 1, 1),
    (5, 1, 16),
    (1, 257, 17),
    (113, 257, 33),
    (257, 5, 300),
    (5, None, 1),
    (113, None, 17),
    (257, None, 16),
    (257, None, 33),
    (113, None, 300),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(params=(True, False), ids=("kernels", "reference"))
def implementation(request, monkeypatch) -> None:
    """Both the compiled kernels and the plain implementation of other devices and of machines without a compiler."""
    if not request.param:
        monkeypatch.setattr(cpu, "available", lambda: False)


def _points(case: Case, N: int, M: int | None, d: int, dtype=torch.float64) -> tuple[Tensor, Tensor | None]:
    return case.values((N, d), 1).to(dtype), None if M is None else case.values((M, d), 2).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(case, size, dtype, implementation):
    """Points fill a cube and gamma is 1/d: a kernel's argument s, the sum of d terms, is of size 1.

    The rounding errors of the sum are a random walk, sqrt(d) eps of its largest value. A kernel of the largest value 1
    passes them on with a factor |f'| <= 1, the polynomials, of 8 at most, with 12; linear sums up to d. The factor of
    10 is for the worst of 10^5 entries, 4.4 standard deviations, for centring, and for exp and tanh.
    """
    X, Y = _points(case, *size, dtype)
    parameters = {name: v.to(dtype) for name, v in case.parameters(size[2]).items()}
    K = case(X, Y, **parameters)
    expected = case.expected(X, Y, **parameters)
    assert K.dtype is dtype and K.shape == expected.shape and K.is_contiguous()
    largest = float(expected.abs().max())
    eps = torch.finfo(dtype).eps
    # 1e-12 is what sums of 300 terms leave in float64: both sides are rounded.
    allowed = 1e-12 if dtype is torch.float64 else 10 * eps * math.sqrt(size[2])
    assert float((K.double() - expected).abs().max()) <= allowed * largest


@pytest.mark.parametrize(
    "gamma", (0.3, torch.tensor(0.3, dtype=torch.float64), np.float64(0.3)), ids=("float", "tensor", "numpy")
)
def test_gamma_is_used(case, gamma, implementation):
    if case.parameter != "gamma":
        pytest.skip("has no gamma")
    X, Y = _points(case, 6, 9, 5)
    assert torch.allclose(case(X, Y, gamma=gamma), case.expected(X, Y, gamma=0.3), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ("rbf", "laplacian", "matern"))
def test_a_number_is_the_lengthscale_of_all_features(name):
    X, Y = normal((5, 3), 0), normal((4, 3), 1)
    of_all = kernel_matrix(X, Y, kernel=name, lengthscale=torch.full((3,), 1.7, dtype=torch.float64))
    for lengthscale in (1.7, torch.tensor(1.7, dtype=torch.float64), [1.7] * 3, np.full(3, 1.7)):
        assert torch.allclose(kernel_matrix(X, Y, kernel=name, lengthscale=lengthscale), of_all, rtol=1e-14, atol=0)


def test_matern_goes_to_the_rbf_of_the_same_gamma():
    """The distance between the two falls about as 1 / nu: r^2 = 2 gamma |x - y|^2 for every nu."""
    X = normal((30, 4), 0)
    distances = [
        float((kernel_matrix(X, kernel="matern", nu=nu, gamma=0.2) - kernel_matrix(X, gamma=0.2)).abs().max())
        for nu in (0.5, 1.5, 2.5)
    ]
    assert distances[0] < 0.3 and distances[1] < 0.5 * distances[0] and distances[2] < 0.7 * distances[1]


def test_parameters_without_a_use_are_ignored():
    X = normal((5, 3), 0)
    linear = kernel_matrix(X, kernel="linear")
    assert torch.equal(kernel_matrix(X, kernel="linear", gamma=7, degree=9, coef0=3, lengthscale=2, nu=99), linear)
    assert torch.equal(kernel_matrix(X, kernel="rbf", degree=9, coef0=3, nu=99), kernel_matrix(X))
    poly = kernel_matrix(X, kernel="poly", gamma=0.2)
    assert torch.equal(kernel_matrix(X, kernel="poly", gamma=0.2, lengthscale=3.0), poly)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
@pytest.mark.parametrize("size", ((113, 1), (257, 17), (300, 33), (70, 300)), ids=str)
def test_symmetric_with_unit_diagonal(case, size, dtype, implementation):
    X = case.values(size, 0).to(dtype)
    parameters = {name: v.to(dtype) for name, v in case.parameters(size[1]).items()}
    K = case(X, **parameters)
    assert torch.equal(K, K.mT)
    if case.unit_diagonal:
        assert torch.equal(K.diagonal(), torch.ones_like(K.diagonal()))
        assert float(K.max()) == 1


@pytest.mark.parametrize("d", (1, 4, 32, 33, 300))
@pytest.mark.parametrize("offset", (0, 1e3, 1e5))
def test_an_offset_of_the_data_costs_no_digits(d, offset, implementation):
    """Against differences in float64 of the same float32 points; the expanded square loses all digits here.

    The error left is that of sums of d squares about the mean, as without an offset.
    """
    X, Y = ((normal((n, d), n) + offset).float() for n in (90, 40))
    for other, (metric, kernel, lengthscale) in itertools.product(
        (None, Y), (("sqeuclidean", "rbf", math.sqrt(d / 2)), ("cityblock", "laplacian", d))
    ):
        distances = cdist(X.double(), (X if other is None else Y).double(), metric)
        expected = (-torch.from_numpy(distances) / d).exp()
        for parameter in ({"gamma": 1 / d}, {"lengthscale": torch.full((d,), float(lengthscale))}):
            K = kernel_matrix(X, other, kernel=kernel, **parameter)
            assert float((K.double() - expected).abs().max()) <= 1e-6, (kernel, parameter)


@pytest.mark.parametrize(
    ("of_X", "of_Y", "of_gamma"),
    (
        ((), (), (3,)),
        ((2,), (), ()),
        ((), (2,), (2,)),
        ((2,), (2,), (3, 1)),
        ((2,), (2,), (3, 2)),
        ((2, 1), (3,), (4, 1, 1)),
        ((1, 3, 1), (3, 2), (2, 1, 2)),
        ((3, 1, 2), None, (1, 4, 1)),
        ((2, 3), None, (5, 1, 1, 1)),
        ((2, 3, 1), (3, 1), (4,)),
        ((2, 1, 1), None, (3, 4)),
        ((1,), None, (2, 2)),
        ((2,), (2,), (1,)),
    ),
    ids=str,
)
def test_batches_broadcast(of_X, of_Y, of_gamma, implementation):
    """Each matrix is that of its X, Y and gamma alone, wherever the batch dimensions stand."""
    X, Y = normal((*of_X, 7, 3), 0), None if of_Y is None else normal((*of_Y, 4, 3), 1)
    gamma = 0.1 + torch.rand(of_gamma, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = torch.broadcast_shapes(of_X, of_Y or (), of_gamma)
    K = kernel_matrix(X, Y, kernel="matern", gamma=gamma)
    assert K.shape == (*batch, 7, 7 if Y is None else 4)
    wide_X, wide_gamma = X.expand(*batch, 7, 3), gamma.expand(batch)
    wide_Y = None if Y is None else Y.expand(*batch, 4, 3)
    for index in itertools.product(*map(range, batch)):
        alone = CASES["matern32"].expected(
            wide_X[index], None if wide_Y is None else wide_Y[index], gamma=float(wide_gamma[index])
        )
        assert torch.allclose(K[index], alone, rtol=0, atol=1e-13), index


def test_batches_of_kernels_without_a_gamma():
    X, Y = normal((2, 1, 5, 3), 0), normal((3, 4, 3), 1)
    K = kernel_matrix(X, Y, kernel="linear")
    assert K.shape == (2, 3, 5, 4)
    assert torch.allclose(K, torch.einsum("aid,bjd->abij", X[:, 0], Y), rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_between_nan(case, layout, implementation):
    X, Y = layout(case.values((2, 19, 5), 0)), layout(case.values((2, 23, 5), 1))
    gamma = layout(torch.tensor([0.3, 0.4], dtype=torch.float64))
    parameters = case.parameters(5, gamma)
    for other in (None, Y):
        plain = case(
            X.clone(memory_format=torch.contiguous_format),
            None if other is None else Y.contiguous(),
            **{name: v.clone() for name, v in parameters.items()},
        )
        assert torch.allclose(case(X, other, **parameters), plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("of_X", "of_Y", "of_gamma"),
    (
        ((0, 3), None, ()),
        ((0, 3), (4, 3), ()),
        ((4, 3), (0, 3), (2,)),
        ((0, 5, 3), None, ()),
        ((0, 5, 3), (4, 3), (2, 1)),
        ((5, 3), (4, 3), (0,)),
    ),
    ids=str,
)
def test_empty(case, of_X, of_Y, of_gamma, implementation):
    X = case.values(of_X, 0).requires_grad_()
    Y = None if of_Y is None else case.values(of_Y, 1)
    if case.parameter != "gamma":
        of_gamma = None
    gamma = None if of_gamma is None else torch.ones(of_gamma, dtype=torch.float64)
    K = case(X, Y, **case.parameters(3, gamma))
    others = (of_X, of_X if of_Y is None else of_Y)
    batch = torch.broadcast_shapes(of_gamma or (), *(shape[:-2] for shape in others))
    assert K.shape == (*batch, *(shape[-2] for shape in others))
    (grad,) = torch.autograd.grad(K.sum(), X)
    assert grad.shape == X.shape and (K.numel() > 0 or not grad.any())


def test_without_features():
    """All points are equal then."""
    X = torch.ones((4, 0), dtype=torch.float64)
    assert torch.equal(kernel_matrix(X), torch.ones((4, 4), dtype=torch.float64))
    assert torch.equal(kernel_matrix(X, X[:2], kernel="linear"), torch.zeros((4, 2), dtype=torch.float64))


@pytest.mark.parametrize("d", (3, 40))
def test_nan_in_a_point_reaches_its_row(case, d, implementation):
    X, Y = _points(case, 5, 6, d)
    X[2, 1] = math.nan
    parameters = {name: v for name, v in case.parameters(d).items()}
    assert case(X, Y, **parameters)[2].isnan().all()
    K = case(X, **parameters)
    others = [0, 1, 3, 4]
    assert K[2, others].isnan().all() and K[others, 2].isnan().all()
    assert K[others][:, others].isfinite().all()


@pytest.mark.parametrize("value", (math.nan, math.inf, 1e6))
@pytest.mark.parametrize("d", (3, 8, 40))
def test_a_stray_point_costs_the_others_no_digits(d, value, implementation):
    """Against differences in float64 of the same float32 points, and their gradients against those without it."""
    X, Y = (normal((n, d), n).float() for n in (60, 30))
    X[7, 1] = value
    others = torch.arange(60) != 7
    for other, columns in ((None, others), (Y, torch.ones(30, dtype=torch.bool))):
        distances = cdist(X[others].double(), (X[others] if other is None else Y).double(), "sqeuclidean")
        for parameter in ({"gamma": 1 / d}, {"lengthscale": torch.full((d,), math.sqrt(d / 2))}):
            K = kernel_matrix(X, other, kernel="rbf", **parameter)[others][:, columns]
            assert float((K.double() - (-torch.from_numpy(distances) / d).exp()).abs().max()) <= 1e-6, parameter
    leaf = X.clone().requires_grad_()
    for parameter in ({"gamma": 1 / d}, {"lengthscale": torch.full((d,), math.sqrt(d / 2))}):
        (grad,) = torch.autograd.grad(kernel_matrix(leaf, Y, kernel="rbf", **parameter)[others].sum(), leaf)
        rest = X[others].requires_grad_()
        (expected,) = torch.autograd.grad(kernel_matrix(rest, Y, kernel="rbf", **parameter).sum(), rest)
        assert float((grad[others] - expected).norm() / expected.norm()) < 1e-6, parameter


def test_cosine_of_a_zero_vector_is_zero():
    X = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    K = kernel_matrix(X, kernel="cosine")
    assert torch.allclose(K, torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64), rtol=0, atol=1e-15)
    (grad,) = torch.autograd.grad(K.sum(), X)
    assert grad.isfinite().all()


def test_chi2_of_zeros():
    """Features that are 0 in both points count nothing, 0/0 notwithstanding."""
    X = torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    K = kernel_matrix(X, kernel="chi2", gamma=0.5)
    expected = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 3.0], [1.0, 3.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(K, (-0.5 * expected).exp(), rtol=1e-15, atol=0)
    (grad,) = torch.autograd.grad(K.sum(), X)
    assert grad.isfinite().all()


# Derivatives


def _leaves(case: Case, with_Y: bool, batch: tuple[int, ...] = ()) -> tuple[list[str], list[Tensor]]:
    named = {"X": case.values((*batch, 4, 2), 0)}
    if with_Y:
        named["Y"] = case.values((3, 2), 1)
    if case.parameter:
        named[case.parameter] = torch.tensor([0.4, 0.9], dtype=torch.float64)
        if case.parameter == "gamma" and batch:
            named["gamma"] = named["gamma"].unsqueeze(-1)
    return list(named), [t.requires_grad_() for t in named.values()]


@pytest.mark.parametrize("with_Y", (True, False), ids=("X_Y", "X"))
@pytest.mark.parametrize("batch", ((), (2,)), ids=("one", "batch"))
def test_numerical_derivatives(case, with_Y, batch):
    """In X, Y and the vector gamma or lengthscale."""
    names, leaves = _leaves(case, with_Y, batch)

    def function(*tensors: Tensor) -> Tensor:
        return case(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=not batch)
    if not batch:
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("d", (2, 40))
def test_gradients_in_float32_and_at_an_offset(case, d):
    """Those of float64 at the same points, to the rounding of a few products; far from 0 too for kernels of x - y."""
    offset = 1000.0 if case.kernel in ("rbf", "laplacian", "matern") else 0.0
    X, Y = ((case.values((n, d), n) + offset).float() for n in (30, 20))
    weight = normal((30, 20), 5)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (X, Y)]
        K = case(*leaves, **{name: v.to(dtype) for name, v in case.parameters(d).items()})
        grads.append(torch.autograd.grad((K * weight.to(dtype)).sum(), leaves))
    for single, double in zip(*grads, strict=True):
        assert float((single.double() - double).norm() / double.norm()) < 20 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ("matern12", "matern32", "matern52", "laplacian", "rbf"))
def test_duplicate_points_have_finite_derivatives(name, implementation):
    """Where x = y the derivatives of laplacian and matern 1/2, a kink, are taken as 0; those of the others are 0."""
    case = CASES[name]
    X = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for Y in (None, X.detach().clone()):
        K = case(X, Y, gamma=gamma)
        (of_equal,) = torch.autograd.grad(K[0, 1], X, retain_graph=True)
        assert not of_equal.any()
        first = torch.autograd.grad(K.sum(), (X, gamma), create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), (X, gamma))
        assert all(g.isfinite().all() for g in (*first, *second))


def test_gradients_of_a_chosen_argument_alone():
    X, Y, gamma = normal((4, 2), 0), normal((3, 2), 1), torch.tensor([0.4, 0.9], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (X, Y, gamma)]
    together = torch.autograd.grad(kernel_matrix(X, Y, gamma=gamma).square().sum(), leaves)
    for chosen, leaf in enumerate(leaves):
        arguments = [t if i == chosen else t.detach() for i, t in enumerate(leaves)]
        K = kernel_matrix(*arguments[:2], gamma=arguments[2])
        assert torch.equal(torch.autograd.grad(K.square().sum(), leaf)[0], together[chosen])


@pytest.mark.parametrize("with_Y", (True, False), ids=("X_Y", "X"))
def test_nested_transforms(case, with_Y):
    """torch.func's second derivatives in X are those of autograd; forward mode says that it is missing."""
    X = case.values((2, 2), 0)
    Y = case.values((3, 2), 1) if with_Y else None
    parameters = case.parameters(2, 0.6)

    def loss(X: Tensor) -> Tensor:
        return case(X, Y, **parameters).square().sum()

    expected = torch.autograd.functional.hessian(loss, X)
    assert expected.any()
    both = torch.func.jacrev(torch.func.jacrev(loss))(X)
    assert torch.allclose(both, expected, rtol=1e-12, atol=1e-14)
    corner = torch.func.grad(lambda X: torch.func.grad(loss)(X)[0, 0])(X)
    assert torch.allclose(corner, expected[0, 0], rtol=1e-12, atol=1e-14)
    with pytest.raises(NotImplementedError, match="kernel_matrix has no forward-mode derivative; use reverse mode"):
        torch.func.jacfwd(loss)(X)


# Tracing, transforms, modes


@pytest.mark.parametrize("with_Y", (True, False), ids=("X_Y", "X"))
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, with_Y):
    """Schema, fake, autograd registration and AOT dispatch of the operator."""
    if not with_Y and name not in ("rbf", "poly", "dot"):
        pytest.skip("one of each pairwise quantity and profile is enough for X against itself")
    X = (0.5 + torch.rand((2, 4, 3), dtype=torch.float64)).requires_grad_()
    Y = (0.5 + torch.rand((2, 5, 3), dtype=torch.float64)).requires_grad_() if with_Y else None
    gamma = torch.rand((3, 2), dtype=torch.float64).add(0.5).requires_grad_()
    torch.library.opcheck(operator, (X, Y, gamma, name, 3, 1.0))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compile(dynamic):
    def function(X, Y, gamma, lengthscale):
        several = kernel_matrix(X, Y, gamma=gamma)
        return several.sum(0) + kernel_matrix(X, Y, kernel="matern", nu=0.5, lengthscale=lengthscale)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for N in (6, 9) if dynamic else (6,):
        leaves = [
            normal((N, 3), 0),
            normal((4, 3), 1),
            normal((2,), 2).exp(),
            normal((3,), 3).exp(),
        ]
        leaves = [t.requires_grad_() for t in leaves]
        K, expected = compiled(*leaves), function(*leaves)
        assert torch.equal(K, expected)
        grads = [torch.autograd.grad(k.square().sum(), leaves) for k in (K, expected)]
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-13, atol=1e-15)


def test_export_with_dynamic_points():
    class Layer(torch.nn.Module):
        def forward(self, X: Tensor, Y: Tensor) -> Tensor:
            return kernel_matrix(X, Y, gamma=0.3) + kernel_matrix(X, Y, kernel="cosine")

    sizes = {"X": {0: torch.export.Dim("N")}, "Y": {0: torch.export.Dim("M")}}
    exported = torch.export.export(Layer(), (normal((5, 3), 0), normal((4, 3), 1)), dynamic_shapes=sizes)
    for N, M in ((2, 7), (11, 3)):
        X, Y = normal((N, 3), N), normal((M, 3), M)
        assert torch.equal(exported.module()(X, Y), Layer()(X, Y))


@pytest.mark.parametrize("mapped", ("X", "Y", "gamma", "XY", "X+gamma", "all", "X_alone"))
@pytest.mark.parametrize("kernel", ("rbf", "linear", "laplacian"))
def test_vmap(kernel, mapped):
    """Over some of the arguments, forward and gradients, as a loop gives."""
    if kernel == "linear" and "gamma" in mapped:
        pytest.skip("has no gamma")
    dims = {
        "X": (0, None, None),
        "Y": (None, 1, None),
        "gamma": (None, None, 0),
        "XY": (0, 1, None),
        "X+gamma": (0, None, 1),
        "all": (1, 0, 0),
        "X_alone": (0, None, None),
    }[mapped]
    # gamma of a sample is a vector of 2.
    samples = [[normal((4, 2), 3 * b), normal((5, 2), 3 * b + 1), normal((2,), 3 * b + 2).exp()] for b in range(3)]
    rows = [[row[i] if dims[i] is not None else samples[0][i] for i in range(3)] for row in samples]
    stacked = [
        samples[0][i] if dim is None else torch.stack([row[i] for row in rows], dim) for i, dim in enumerate(dims)
    ]

    def function(X, Y, gamma):
        other = None if mapped == "X_alone" else Y
        return kernel_matrix(X, other, kernel=kernel, gamma=None if kernel == "linear" else gamma)

    def loss(X, Y, gamma):
        return function(X, Y, gamma).square().sum()

    K = torch.func.vmap(function, in_dims=dims)(*stacked)
    assert torch.allclose(K, torch.stack([function(*row) for row in rows]), rtol=1e-14, atol=0)
    grad = torch.func.grad(loss, argnums=(0, 1, 2))
    grads = torch.func.vmap(grad, in_dims=dims)(*stacked)
    for got, *looped in zip(grads, *[grad(*row) for row in rows], strict=True):
        assert torch.allclose(got, torch.stack(looped), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_autocast_computes_in_float32(dtype):
    X, Y = normal((5, 3), 0).to(dtype), normal((4, 3), 1).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        K = kernel_matrix(X, Y)
        assert torch.equal(kernel_matrix(X.float(), Y.float()), K)
    assert K.dtype is torch.float32
    assert torch.equal(K, kernel_matrix(X.float(), Y.float()))
    with pytest.raises(TypeError, match=f"X has dtype {dtype}"):
        kernel_matrix(X, Y)


def test_meta_and_default_gamma(case):
    X, Y = case.values((2, 7, 3), 0), case.values((4, 3), 1)
    for other in (None, Y):
        real = case(X, other)
        meta = case(X.to("meta"), None if other is None else Y.to("meta"))
        assert meta.is_meta and (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_reruns_and_threads(case, threads):
    """Bit for bit the same, with one thread or two; the arguments stay as they are."""
    X, Y = _points(case, 150, 131, 33, torch.float32)
    before = X.clone(), Y.clone()
    for other in (None, Y):
        runs = []
        for count in (1, 1, 2):
            threads(count)
            runs.append(case(X, other))
        assert all(torch.equal(run, runs[0]) for run in runs)
    assert torch.equal(X, before[0]) and torch.equal(Y, before[1])


# Bad input

X = torch.ones((4, 3), dtype=torch.float64)
TWO = torch.tensor([1.0, -2.0], dtype=torch.float64)
ABS = TWO.abs()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    (
        (TypeError, "X must be a torch.Tensor, not list", ([[1.0]],), {}),
        (TypeError, "Y must be a torch.Tensor, not ndarray", (X, np.ones((2, 3))), {}),
        (TypeError, "X has dtype torch.int64; allowed are torch.float32, torch.float64", (X.long(),), {}),
        (TypeError, "X is nested or has layout torch.sparse_coo", (X.to_sparse(),), {}),
        (TypeError, "Y has dtype torch.float32 but X has torch.float64", (X, X.float()), {}),
        (TypeError, "gamma has dtype torch.float32 but X has torch.float64", (X,), {"gamma": torch.ones(2)}),
        (ValueError, r"X has shape \(3,\); it must have at least two dimensions", (X[0],), {}),
        (ValueError, "Y is on meta but X is on cpu", (X, X.to("meta")), {}),
        (ValueError, r"Y has 2 features \(last dimension\) but X has 3", (X, X[:, :2]), {}),
        (ValueError, "kernel='gauss' is not one of 'linear', 'poly', 'rbf'", (X,), {"kernel": "gauss"}),
        (ValueError, "gamma=0 must be > 0", (X,), {"gamma": 0}),
        (ValueError, "gamma=-1.5 must be > 0", (X,), {"gamma": -1.5}),
        (ValueError, "gamma=nan must be a finite number", (X,), {"gamma": math.nan}),
        (TypeError, "gamma='scale' must be a finite number, not str", (X,), {"gamma": "scale"}),
        (ValueError, r"gamma has the entry -2\.0; it must be > 0", (X,), {"gamma": TWO}),
        (ValueError, r"gamma has the entry nan; it must be > 0", (X,), {"gamma": TWO.sqrt()}),
        (ValueError, "lengthscale=0 must be > 0", (X,), {"lengthscale": 0}),
        (ValueError, r"lengthscale has the entry 0\.0; it must be > 0", (X,), {"lengthscale": [1.0, 0.0, 1.0]}),
        (ValueError, r"lengthscale has shape \(2,\); it must be a number or \(d,\)", (X,), {"lengthscale": ABS}),
        (ValueError, "gamma=1.0 and lengthscale=2.0 are both given", (X,), {"gamma": 1.0, "lengthscale": 2.0}),
        (ValueError, "nu=2 is not one of 0.5, 1.5, 2.5", (X,), {"kernel": "matern", "nu": 2}),
        (ValueError, "degree=0 must be an integer >= 1", (X,), {"kernel": "poly", "degree": 0}),
        (TypeError, "degree=2.5 must be an integer >= 1, not float", (X,), {"kernel": "poly", "degree": 2.5}),
        (ValueError, "coef0=inf must be a finite number", (X,), {"kernel": "poly", "coef0": math.inf}),
        (ValueError, r'X has negative entries \(least -1\.0\); kernel="chi2" needs >= 0', (-X,), {"kernel": "chi2"}),
        (ValueError, r'Y has negative entries \(least -1\.0\); kernel="chi2" needs >= 0', (X, -X), {"kernel": "chi2"}),
    ),
)  # fmt: skip
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=message):
        kernel_matrix(*arguments, **options)


def test_batches_that_do_not_broadcast():
    with pytest.raises((ValueError, RuntimeError), match="[Ss]hape mismatch|broadcast"):
        kernel_matrix(normal((2, 4, 3), 0), normal((3, 4, 3), 1))
