"""DiscriminantLoss and KernelDiscriminant: against the paper's sums written out, and as parts of a torch model."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
from helpers import normal
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor

from phydi_kernels.discriminant import KernelDiscriminantAnalysis, KernelDiscriminantAnalysisCV
from phydi_kernels.functional import discriminant_criterion, kernel_matrix
from phydi_kernels.nn import DiscriminantLoss, KernelDiscriminant
from phydi_kernels.nn import kernel_discriminant as layer_module

KINDS = ("trace", "logdet")
WEIGHTINGS = ("paper", "standard")
every_criterion = pytest.mark.parametrize(
    ("kind", "weighting"), [(kind, weighting) for kind in KINDS for weighting in WEIGHTINGS]
)


def _raises(error: type[Exception], message: str):
    return pytest.raises(error, match=re.escape(message))


def batch(counts=(9, 14, 5), d=4, seed=0) -> tuple[Tensor, Tensor]:
    """Overlapping classes of different sizes, shuffled; a count of 0 is a class that is missing."""
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    return normal((len(y), d), seed) + 1.5 * normal((len(counts), d), seed + 1)[y] + 3, y


def scatter(features: Tensor, labels: Tensor, weighting: str) -> tuple[np.ndarray, np.ndarray]:
    """S_w and S_b of Eq. 3 and 4, sample by sample."""
    x, y = features.detach().double().numpy(), labels.numpy()
    m = x.mean(0)
    S_w, S_b = np.zeros((2, x.shape[1], x.shape[1]))
    for i in set(y.tolist()):
        own = x[y == i]
        m_i = own.mean(0)
        weight = len(own) / len(x) if weighting == "paper" else 1 / len(x)
        for x_k in own:
            S_w += weight * np.outer(x_k - m_i, x_k - m_i)
        S_b += len(own) / len(x) * np.outer(m_i - m, m_i - m)
    return S_w, S_b


def expected(features, labels, *, tau=None, c_allow=1e4, tau_min=1e-6, weighting="paper", kind="trace") -> float:
    """The criterion from the eigenvalues of (S_w + tau I)^-1 S_b."""
    S_w, S_b = scatter(features, labels, weighting)
    if tau is None:
        tau = max(np.linalg.eigvalsh(S_w)[-1] / c_allow, tau_min)
    values = np.linalg.eigvals(np.linalg.solve(S_w + tau * np.eye(len(S_w)), S_b)).real
    return float(values.sum() if kind == "trace" else np.log1p(values).sum())


BATCHES = {
    "unbalanced": batch(),
    "two_classes": batch((7, 4)),
    "many_classes": batch((3, 1, 4, 1, 5, 9, 2), d=3),
    "missing_class": batch((8, 0, 6, 0)),
    "fewer_than_features": batch((3, 4, 2), d=15),
    "one_feature": batch((6, 5, 4), d=1),
}
every_batch = pytest.mark.parametrize(("x", "y"), BATCHES.values(), ids=BATCHES.keys())


@every_criterion
@pytest.mark.parametrize(
    "conditioning",
    ({}, {"tau": 0.3}, {"c_allow": 20.0}, {"c_allow": 1e12, "tau_min": 0.07}),
    ids=("default", "tau", "c_allow", "tau_min"),
)
@every_batch
class TestValue:
    def test_criterion(self, x, y, kind, weighting, conditioning):
        options = {"kind": kind, "weighting": weighting, **conditioning}
        J = discriminant_criterion(x, y, int(y.max()) + 1, **options)
        assert J.shape == () and J.dtype is torch.float64
        assert float(J) == pytest.approx(expected(x, y, **options), rel=1e-9)

    def test_loss_is_minus_the_criterion(self, x, y, kind, weighting, conditioning):
        options = {"kind": kind, "weighting": weighting, **conditioning}
        loss = DiscriminantLoss(int(y.max()) + 1, **options)
        assert float(loss(x, y)) == pytest.approx(-expected(x, y, **options), rel=1e-9)
        assert list(loss.parameters()) == [] and loss.state_dict() == {}


@every_criterion
def test_float32(kind, weighting):
    """As exact as the conditioning allows: eps c_allow / 8 of the value at most, at an offset as well."""
    x, y = batch((20, 31, 14), d=6)
    for offset in (0.0, 100.0):
        single = (x + offset).float()
        J = discriminant_criterion(single, y, 3, kind=kind, weighting=weighting)
        value = expected(single, y, kind=kind, weighting=weighting)
        assert J.dtype is torch.float32
        assert float(J) == pytest.approx(value, rel=1e4 / 8 * torch.finfo(torch.float32).eps)


@every_criterion
def test_labels_of_any_integer_type_and_more_classes_than_occur(kind, weighting):
    x, y = batch()
    options = {"kind": kind, "weighting": weighting}
    value = pytest.approx(expected(x, y, **options), rel=1e-9)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        assert float(discriminant_criterion(x, y.to(dtype), 3, **options)) == value
    assert float(discriminant_criterion(x, 2 * y + 1, 9, **options)) == value
    two = (y > 0).long()
    value = pytest.approx(expected(x, two, **options), rel=1e-9)
    assert float(discriminant_criterion(x, y > 0, 2, **options)) == value


def _equal_eigenvalues() -> tuple[Tensor, Tensor]:
    """Three classes at the corners of a triangle, each a cross: both scatters are multiples of I."""
    angles = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    corners = torch.stack([angles.cos(), angles.sin()], -1)
    cross = 0.4 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    return (corners[:, None] + cross).flatten(0, 1), torch.arange(3).repeat_interleave(4)


DIFFERENTIATED = {
    "unbalanced": batch((4, 3, 2), d=3),
    "fewer_than_features": batch((2, 2), d=6),
    "missing_class": batch((3, 0, 4), d=3),
    "one_class": batch((0, 5), d=3),
    "equal_eigenvalues": _equal_eigenvalues(),
}


@every_criterion
@pytest.mark.parametrize(("x", "y"), DIFFERENTIATED.values(), ids=DIFFERENTIATED.keys())
def test_numerical_derivatives(x, y, kind, weighting):
    def criterion(x):
        return discriminant_criterion(x, y, 3, tau=0.3, kind=kind, weighting=weighting)

    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(criterion, x)
    assert torch.autograd.gradgradcheck(criterion, x)


def test_the_case_of_equal_eigenvalues_has_them():
    x, y = _equal_eigenvalues()
    S_w, S_b = scatter(x, y, "paper")
    first, second = np.linalg.eigvals(np.linalg.solve(S_w, S_b))
    assert first == pytest.approx(second, rel=1e-12) and first > 1


@every_criterion
def test_the_rule_for_tau_is_a_constant_in_derivatives(kind, weighting):
    x, y = batch()
    tau = np.linalg.eigvalsh(scatter(x, y, weighting)[0])[-1] / 5
    options = {"kind": kind, "weighting": weighting}
    x = x.requires_grad_()
    by_rule = torch.autograd.grad(discriminant_criterion(x, y, 3, c_allow=5.0, **options), x)[0]
    given = torch.autograd.grad(discriminant_criterion(x, y, 3, tau=float(tau), **options), x)[0]
    torch.testing.assert_close(by_rule, given, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
@pytest.mark.parametrize(("N", "d"), ((12, 4), (1, 4), (5, 30), (0, 4), (6, 0)))
def test_nothing_to_separate(N, d, dtype, kind):
    """One class or none has the value 0 and no gradient, up to the rounding of means."""
    x = normal((N, d), 0).to(dtype).requires_grad_()
    J = discriminant_criterion(x, torch.ones(N, dtype=torch.int64), 3, kind=kind)
    (gradient,) = torch.autograd.grad(J, x)
    # Means differ from their mean by eps, and J by its square over tau_min.
    tiny = (10 * torch.finfo(dtype).eps) ** 2 / 1e-6 if kind == "trace" else 10 * torch.finfo(dtype).eps
    assert abs(J.item()) <= tiny
    assert gradient.shape == x.shape and bool((gradient.abs() <= tiny).all())


@every_criterion
def test_invariances(kind, weighting):
    """Order of the samples, names of the classes, a rotation and a shift of the features, and their scale."""
    x, y = batch()
    options = {"kind": kind, "weighting": weighting}
    J = discriminant_criterion(x, y, 3, **options)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(normal((4, 4), 5))[0]
    others = (
        discriminant_criterion(x[order], y[order], 3, **options),
        discriminant_criterion(x, 2 - y, 3, **options),
        discriminant_criterion(x @ rotation + 7, y, 3, **options),
        discriminant_criterion(30 * x, y, 3, **options),
    )
    for other in others:
        torch.testing.assert_close(other, J, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_autocast_computes_in_float32(dtype, kind):
    x, y = batch((10, 9, 8), d=5)
    half = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        J = DiscriminantLoss(3, kind=kind)(half, y)
        of_float = DiscriminantLoss(3, kind=kind)(half.float(), y)
    single = half.detach().float().requires_grad_()
    outside = DiscriminantLoss(3, kind=kind)(single, y)
    assert J.dtype is torch.float32 and torch.equal(J, outside) and torch.equal(of_float, outside)
    (gradient,) = torch.autograd.grad(J, half)
    assert gradient.dtype is dtype and torch.equal(gradient, torch.autograd.grad(outside, single)[0].to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert DiscriminantLoss(3, kind=kind)(x, y).dtype is torch.float64


@every_criterion
@pytest.mark.parametrize("tau", (None, 0.2), ids=("rule", "given"))
def test_loss_compiles_whole(kind, weighting, tau):
    torch._dynamo.reset()
    loss = DiscriminantLoss(3, tau=tau, kind=kind, weighting=weighting)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        x, y = batch(seed=seed)
        x = x.requires_grad_()
        values = [function(x, y) for function in (compiled, loss)]
        torch.testing.assert_close(*values, rtol=1e-12, atol=0)
        torch.testing.assert_close(*[torch.autograd.grad(v, x)[0] for v in values], rtol=1e-10, atol=1e-14)


@every_criterion
def test_transforms(kind, weighting):
    features, labels = zip(*(batch(seed=seed) for seed in range(3)), strict=True)
    x, y = torch.stack(features), torch.stack(labels)

    def criterion(x, y):
        return discriminant_criterion(x, y, 3, tau=0.2, kind=kind, weighting=weighting)

    alone = torch.stack([criterion(*problem) for problem in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(criterion)(x, y), alone, rtol=1e-12, atol=0)
    shared = torch.func.vmap(criterion, (0, None))(x, y[0])
    torch.testing.assert_close(shared, torch.stack([criterion(t, y[0]) for t in x]), rtol=1e-12, atol=0)
    leaf = x[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(criterion(leaf, y[0]), leaf)
    torch.testing.assert_close(torch.func.jacrev(criterion)(x[0], y[0]), gradient, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.func.jacfwd(criterion)(x[0], y[0]), gradient, rtol=1e-10, atol=1e-14)
    per_problem = torch.func.vmap(torch.func.grad(criterion), (0, None))(x, y[0])
    torch.testing.assert_close(per_problem[0], gradient, rtol=1e-10, atol=1e-14)


def test_gradients_of_several_problems_with_labels_of_their_own():
    features, labels = zip(*(batch(seed=seed) for seed in range(3)), strict=True)
    gradient = torch.func.grad(lambda x, y: discriminant_criterion(x, y, 3, tau=0.2))
    alone = torch.stack([gradient(*problem) for problem in zip(features, labels, strict=True)])
    mapped = torch.func.vmap(gradient)(torch.stack(features), torch.stack(labels))
    torch.testing.assert_close(mapped, alone, rtol=1e-10, atol=1e-14)


X, Y = batch()
BAD_CRITERIA = {
    "features_list": (TypeError, "features must be a torch.Tensor, not list", (X.tolist(), Y, 3), {}),
    "features_int": (TypeError, "features has dtype torch.int64; allowed are", (X.long(), Y, 3), {}),
    "features_half": (TypeError, "features has dtype torch.bfloat16; allowed are", (X.bfloat16(), Y, 3), {}),
    "features_sparse": (TypeError, "features is nested or has layout torch.sparse_coo", (X.to_sparse(), Y, 3), {}),
    "features_3d": (ValueError, "features have shape (1, 28, 4); they must be (N, d)", (X[None], Y, 3), {}),
    "features_1d": (ValueError, "features has shape (4,)", (X[0], Y, 3), {}),
    "labels_array": (TypeError, "labels must be a torch.Tensor, not ndarray", (X, Y.numpy(), 3), {}),
    "labels_float": (TypeError, "labels must be a tensor of integers", (X, Y.double(), 3), {}),
    "labels_short": (ValueError, "labels have shape (27,)", (X, Y[1:], 3), {}),
    "labels_2d": (ValueError, "labels have shape (1, 28); they must be (N,) = (28,)", (X, Y[None], 3), {}),
    "labels_device": (ValueError, "labels are on cpu but features on meta", (X.to("meta"), Y, 3), {}),
    "labels_large": (ValueError, "labels lie in 0 ... 2; they must be in 0 ... 1", (X, Y, 2), {}),
    "labels_negative": (ValueError, "labels lie in -1 ... 1; they must be in 0 ... 2", (X, Y - 1, 3), {}),
    "num_classes_float": (TypeError, "num_classes=3.0 must be an integer", (X, Y, 3.0), {}),
    "num_classes_0": (ValueError, "num_classes=0 must be an integer >= 1", (X, Y, 0), {}),
    "num_classes_1": (ValueError, "labels hold 1 class", (X, torch.zeros_like(Y), 1), {}),
    "tau_0": (ValueError, "tau=0 must be > 0", (X, Y, 3), {"tau": 0}),
    "tau_negative": (ValueError, "tau=-1.0 must be > 0", (X, Y, 3), {"tau": -1.0}),
    "tau_nan": (ValueError, "tau=nan must be a finite number", (X, Y, 3), {"tau": math.nan}),
    "tau_tensor": (TypeError, "must be a finite number, not Tensor", (X, Y, 3), {"tau": torch.tensor(1.0)}),
    "tau_name": (TypeError, "tau='one_norm' must be a finite number, not str", (X, Y, 3), {"tau": "one_norm"}),
    "c_allow_1": (ValueError, "c_allow=1 must be > 1", (X, Y, 3), {"c_allow": 1}),
    "c_allow_inf": (ValueError, "c_allow=inf must be a finite number", (X, Y, 3), {"c_allow": math.inf}),
    "tau_min_0": (ValueError, "tau_min=0.0 must be > 0", (X, Y, 3), {"tau_min": 0.0}),
    "weighting": (ValueError, "weighting='equal' is not one of 'paper', 'standard'", (X, Y, 3), {"weighting": "equal"}),
    "kind": (ValueError, "kind='det' is not one of 'trace', 'logdet'", (X, Y, 3), {"kind": "det"}),
}


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD_CRITERIA.values(), ids=BAD_CRITERIA.keys())
def test_bad_arguments_of_the_criterion(error, message, arguments, options):
    features, labels, classes = arguments
    with _raises(error, message):
        discriminant_criterion(features, labels, classes, **options)
    with _raises(error, message):
        DiscriminantLoss(classes, **options)(features, labels)


def _bands(N: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three curved bands in two of eight features; the others are noise of twice the width."""
    y = torch.arange(N) % 3
    x = 2 * normal((N, 8), seed).float()
    x[:, 1] /= 2
    x[:, 0] = 2 * (y - 1) + 0.2 * x[:, 0] - 0.5 * (x[:, 1].square() - 1)
    return x, y


def _nearest_mean_accuracy(f: Tensor, y: Tensor, f_new: Tensor, y_new: Tensor) -> float:
    means = torch.stack([f[y == j].mean(0) for j in range(3)])
    return float((torch.cdist(f_new, means).argmin(1) == y_new).float().mean())


@every_criterion
def test_training_separates_the_classes(kind, weighting):
    (x, y), (x_new, y_new) = _bands(300, 0), _bands(300, 1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    loss = DiscriminantLoss(3, kind=kind, weighting=weighting, c_allow=1e3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def state() -> tuple[float, float]:
        with torch.no_grad():
            f, f_new = model(x), model(x_new)
        J = expected(f, y, kind=kind, weighting=weighting, c_allow=1e3)
        return J, _nearest_mean_accuracy(f, y, f_new, y_new)

    J_before, accuracy_before = state()
    for _ in range(30):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    J_after, accuracy_after = state()
    assert J_after > 10 * J_before
    assert accuracy_before < 0.6 and accuracy_after > 0.75


KERNELS = {
    "linear": {"kernel": "linear"},
    "poly": {"kernel": "poly", "gamma": 0.4, "degree": 2, "coef0": 0.5},
    "rbf": {"kernel": "rbf", "gamma": 0.3},
    "rbf_default": {"kernel": "rbf"},
    "rbf_lengthscale": {"kernel": "rbf", "lengthscale": 1.7},
    "rbf_lengthscales": {"kernel": "rbf", "lengthscale": [0.8, 1.5, 2.0, 4.0]},
    "laplacian": {"kernel": "laplacian", "gamma": 0.2},
    "laplacian_lengthscale": {"kernel": "laplacian", "lengthscale": 4.0},
    "laplacian_lengthscales": {"kernel": "laplacian", "lengthscale": [2.0, 3.0, 5.0, 9.0]},
    "sigmoid": {"kernel": "sigmoid", "gamma": 0.05, "coef0": 0.2},
    "cosine": {"kernel": "cosine"},
    "matern12": {"kernel": "matern", "gamma": 0.3, "nu": 0.5},
    "matern32": {"kernel": "matern", "gamma": 0.3, "nu": 1.5},
    "matern52": {"kernel": "matern", "gamma": 0.3, "nu": 2.5},
    "matern52_lengthscale": {"kernel": "matern", "lengthscale": 1.7, "nu": 2.5},
    "matern12_lengthscales": {"kernel": "matern", "lengthscale": [0.8, 1.5, 2.0, 4.0], "nu": 0.5},
    "chi2": {"kernel": "chi2", "gamma": 0.6},
}
every_kernel = pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS.keys())


def training_data(dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Positive, as the chi2 kernel asks."""
    x, y = batch((12, 17, 9))
    return x.abs().to(dtype), y


def new_points(*size: int, dtype=torch.float64) -> Tensor:
    return (normal((*size, 4), 9).abs() * 2).to(dtype)


def fitted(dtype=torch.float64, **options) -> KernelDiscriminantAnalysis:
    x, y = training_data(dtype)
    return KernelDiscriminantAnalysis(c_allow=1e3, **options).fit(x.numpy(), y.numpy())


@every_kernel
class TestEveryKernel:
    def test_is_the_transformation_of_the_estimator(self, options):
        model = fitted(**options)
        layer = KernelDiscriminant.from_estimator(model)
        x = new_points(21)
        torch.testing.assert_close(layer(x), torch.from_numpy(model.transform(x.numpy())), rtol=1e-12, atol=1e-12)
        assert layer.points.data_ptr() != torch.as_tensor(model.X_fit_).data_ptr()

    def test_numerical_derivative_in_the_input(self, options):
        layer = KernelDiscriminant.from_estimator(fitted(**options))
        x = new_points(2, 3).requires_grad_()
        assert torch.autograd.gradcheck(layer, x)
        assert list(layer.parameters()) == [] and not layer.coefficients.requires_grad

    def test_rows_in_blocks(self, options, monkeypatch):
        layer = KernelDiscriminant.from_estimator(fitted(**options))
        x = new_points(5, 6)
        whole, rows = layer(x), []

        def recorded(x, *args, **kwargs):
            rows.append(len(x))
            return kernel_matrix(x, *args, **kwargs)

        monkeypatch.setattr(layer_module, "BLOCK_ENTRIES", 8 * len(layer.points) - 1)
        monkeypatch.setattr(layer_module.functional, "kernel_matrix", recorded)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), whole, rtol=1e-11, atol=1e-12)
        assert rows == [7, 7, 7, 7, 2]
        monkeypatch.setattr(layer_module, "BLOCK_ENTRIES", 1)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), whole, rtol=1e-11, atol=1e-12)
        assert rows[5:] == [1] * 30
        # The graph of a whole batch holds the kernel values anyway.
        assert torch.equal(layer(x), whole) and rows[35:] == [30]

    def test_saved_and_loaded(self, options):
        layer = KernelDiscriminant.from_estimator(fitted(**options))
        state = layer.state_dict()
        assert state.keys() == {"points", "coefficients", *(["lengthscale"] if "lengthscale" in options else [])}
        other = {**options, **({"lengthscale": layer.lengthscale * 2} if "lengthscale" in options else {})}
        empty = KernelDiscriminant(layer.points + 1, torch.zeros_like(layer.coefficients), **other)
        if "gamma_" in vars(fitted(**options)):
            empty.gamma = layer.gamma
        x = new_points(6)
        assert not torch.equal(empty(x), layer(x))
        empty.load_state_dict(state)
        assert torch.equal(empty(x), layer(x))

    def test_moves_between_dtypes(self, options):
        layer = KernelDiscriminant.from_estimator(fitted(torch.float32, **options))
        assert layer.points.dtype is torch.float32 and layer(new_points(3, dtype=torch.float32)).dtype is torch.float32
        wide = copy.deepcopy(layer).to(torch.float64)
        x = new_points(9)
        y = wide(x)
        assert y.dtype is torch.float64
        lengthscale = None if layer.lengthscale is None else layer.lengthscale.double()
        parameters = {**options, "gamma": layer.gamma, "lengthscale": lengthscale}
        K = kernel_matrix(x, layer.points.double(), **parameters)
        assert torch.equal(y, K @ layer.coefficients.double())
        assert torch.equal(wide.float()(x.float()), layer(x.float()))

    def test_compiles_whole(self, options):
        torch._dynamo.reset()
        layer = KernelDiscriminant.from_estimator(fitted(**options))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = new_points(2, 5).requires_grad_()
        values = [function(x) for function in (compiled, layer)]
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-13)
        gradients = [torch.autograd.grad(v.square().sum(), x)[0] for v in values]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), values[1], rtol=1e-12, atol=1e-13)

    def test_exports_with_a_dynamic_batch(self, options):
        layer = KernelDiscriminant.from_estimator(fitted(**options))
        batch_size = {"x": {0: torch.export.Dim("batch")}}
        with torch.no_grad():
            exported = torch.export.export(layer, (new_points(5),), dynamic_shapes=batch_size)
        for size in (2, 13):
            x = new_points(size)
            torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-12, atol=1e-13)


def test_against_the_formula():
    """Eq. 14 with scikit-learn's kernel."""
    points, coefficients = normal((11, 4), 0), normal((11, 2), 1)
    layer = KernelDiscriminant(points, coefficients, gamma=0.3)
    x = new_points(7)
    K = torch.from_numpy(rbf_kernel(x.numpy(), points.numpy(), gamma=0.3))
    torch.testing.assert_close(layer(x), K @ coefficients, rtol=1e-12, atol=1e-13)


def test_leading_dimensions():
    layer = KernelDiscriminant.from_estimator(fitted(gamma=0.3))
    x = new_points(2, 3, 5)
    rows = layer(x.flatten(0, 2))
    assert torch.equal(layer(x), rows.reshape(2, 3, 5, 2))
    torch.testing.assert_close(layer(x[0, 1, 2]), rows[7], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer(x.transpose(0, 2)), layer(x).transpose(0, 2), rtol=1e-12, atol=1e-13)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert layer(new_points(0)).shape == (0, 2) and layer(new_points(3, 0)).shape == (3, 0, 2)


def test_from_a_search():
    x, y = training_data()
    search = KernelDiscriminantAnalysisCV(gammas=[0.05, 0.5], taus=[1e-2, 1.0], cv=3).fit(x.numpy(), y.numpy())
    layer = KernelDiscriminant.from_estimator(search)
    assert layer.gamma == search.best_params_["gamma"]
    new = new_points(8)
    torch.testing.assert_close(layer(new), torch.from_numpy(search.transform(new.numpy())), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
def test_from_an_estimator_fitted_to_tensors(dtype):
    x, y = training_data(dtype)
    model = KernelDiscriminantAnalysis(gamma="scale", tau=1e-2, n_components=1).fit(x, y)
    layer = KernelDiscriminant.from_estimator(model)
    assert layer.points.dtype is dtype and layer.coefficients.shape == (38, 1)
    new = new_points(8, dtype=dtype)
    assert torch.equal(layer(new), model.transform(new))
    layer.points.zero_()
    assert bool((model.X_fit_ != 0).any())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_layer_under_autocast_computes_in_float32(dtype):
    """Coefficients of either sign cancel: three digits of them are none of the result."""
    layer = KernelDiscriminant.from_estimator(fitted(torch.float32, gamma=0.3))
    x = new_points(9, dtype=dtype)
    for grad in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            y = layer(x)
        assert y.dtype is torch.float32 and torch.equal(y, layer(x.float()))


def test_in_a_model():
    """Gradients reach the layers below; the statistics of the discriminant stay."""
    layer = KernelDiscriminant.from_estimator(fitted(torch.float32, gamma=0.3))
    before = copy.deepcopy(layer.state_dict())
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), layer, torch.nn.Linear(2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(normal((9, 6), 0).float()), torch.arange(9) % 3).backward()
    assert all(bool((p.grad != 0).any()) for p in model.parameters())
    optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert "points=(38, 4), components=2, kernel='rbf', gamma=0.3" in repr(model)


POINTS, COEFFICIENTS = normal((6, 4), 0), normal((6, 2), 1)
BAD_LAYERS = {
    "points_array": (TypeError, "points must be a torch.Tensor, not ndarray", (POINTS.numpy(), COEFFICIENTS), {}),
    "coefficients_list": (TypeError, "coefficients must be a torch.Tensor, not list", (POINTS, [1.0]), {}),
    "points_1d": (ValueError, "points have shape (4,) and coefficients (6, 2)", (POINTS[0], COEFFICIENTS), {}),
    "coefficients_1d": (ValueError, "coefficients (2,); they must be (N, d) and (N, l)", (POINTS, COEFFICIENTS[0]), {}),
    "lengths": (ValueError, "points have shape (6, 4) and coefficients (5, 2)", (POINTS, COEFFICIENTS[1:]), {}),
    "dtypes": (TypeError, "dtype torch.float64 and coefficients torch.float32", (POINTS, COEFFICIENTS.float()), {}),
    "integers": (TypeError, "dtype torch.int64; allowed are torch.float32", (POINTS.long(), COEFFICIENTS.long()), {}),
    "kernel": (ValueError, "kernel='gauss' is not one of 'linear'", (POINTS, COEFFICIENTS), {"kernel": "gauss"}),
    "gamma": (ValueError, "gamma=-0.5 must be > 0", (POINTS, COEFFICIENTS), {"gamma": -0.5}),
    "degree": (ValueError, "degree=0 must be an integer >= 1", (POINTS, COEFFICIENTS), {"degree": 0}),
    "coef0": (ValueError, "coef0=nan must be a finite number", (POINTS, COEFFICIENTS), {"coef0": math.nan}),
    "nu": (ValueError, "nu=1.0 is not one of 0.5, 1.5, 2.5", (POINTS, COEFFICIENTS), {"kernel": "matern", "nu": 1.0}),
    "both_scales": (ValueError, "are both given", (POINTS, COEFFICIENTS), {"gamma": 1.0, "lengthscale": 1.0}),
    "lengthscale_shape": (
        ValueError,
        "must be a number or (d,) = (4,)",
        (POINTS, COEFFICIENTS),
        {"lengthscale": [1, 2]},
    ),
    "lengthscale_0": (ValueError, "lengthscale has the entry 0.0", (POINTS, COEFFICIENTS), {"lengthscale": 0.0}),
    "chi2": (ValueError, 'kernel="chi2" needs >= 0', (POINTS, COEFFICIENTS), {"kernel": "chi2"}),
}


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD_LAYERS.values(), ids=BAD_LAYERS.keys())
def test_bad_arguments_of_the_layer(error, message, arguments, options):
    with _raises(error, message):
        KernelDiscriminant(*arguments, **options)


@pytest.mark.parametrize("shape", ((), (3,), (4, 3), (4, 0), (2, 2, 5)))
def test_input_of_another_width(shape):
    layer = KernelDiscriminant(POINTS, COEFFICIENTS)
    with _raises(ValueError, f"x has shape {shape}; its last dimension must be d = 4"):
        layer(torch.zeros(shape, dtype=torch.float64))


def test_input_of_another_dtype():
    layer = KernelDiscriminant(POINTS, COEFFICIENTS)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), _raises(TypeError, "has dtype torch.float"):
            layer(torch.zeros(2, 4))


@pytest.mark.parametrize("kernel", ("precomputed", lambda X, Y: X @ Y.T), ids=("precomputed", "callable"))
def test_estimators_whose_kernel_has_no_name(kernel):
    x, y = training_data()
    given = (x @ x.mT if kernel == "precomputed" else x).numpy()
    with _raises(ValueError, f"kernel={kernel!r} of the estimator must be the name of a kernel"):
        KernelDiscriminant.from_estimator(KernelDiscriminantAnalysis(kernel, tau=1.0).fit(given, y.numpy()))
