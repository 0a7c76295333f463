"""Dense layers as the nearest hypercomplex ones: optimality against other methods, and what a model keeps."""

from __future__ import annotations

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from helpers import DTYPES, dtype_id, normal
from op_cases import dense_weight
from sklearn.datasets import load_digits
from torch import nn

from phydi_kernels import algebra, optimize_for_inference
from phydi_kernels.convert import convert_model, dense, from_conv, from_linear
from phydi_kernels.nn import PHConv1d, PHConv2d, PHConv3d, PHMLinear

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PHCONV = {1: PHConv1d, 2: PHConv2d, 3: PHConv3d}
SIZES = ((1, 5, 3), (2, 6, 8), (3, 12, 6), (4, 8, 20), (5, 15, 10))  # n, in_features, out_features


def linear(inputs: int, outputs: int, seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, dtype=dtype, **options)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(normal(p.shape, 10 * seed + i))
    return layer


def kron_sum(A: torch.Tensor, F: torch.Tensor) -> torch.Tensor:
    """In float64, whatever the layer's dtype."""
    return dense_weight(A.double(), F.double())


def with_weight(layer: nn.Module, weight: torch.Tensor) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def exact_sum(n: int, inputs: int, outputs: int, *kernel: int, seed: int = 5) -> torch.Tensor:
    return kron_sum(normal((n, n, n), seed), normal((n, outputs // n, inputs // n, *kernel), seed + 1))


def rearranged(W: torch.Tensor, n: int) -> np.ndarray:
    """Row k*n + l: block (k, l)."""
    W = W.detach().double().numpy()
    p, q = W.shape[0] // n, W.shape[1] // n
    rows = [W[k * p : (k + 1) * p, l * q : (l + 1) * q].ravel() for k in range(n) for l in range(n)]  # noqa: E741
    return np.stack(rows)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def error(layer: nn.Module, W: torch.Tensor) -> float:
    """|W - H|, H by its definition."""
    with torch.no_grad():
        return (W.double() - kron_sum(layer.structure(), layer.F)).norm().item()


# Optimality


@pytest.mark.parametrize(("n", "inputs", "outputs"), SIZES)
def test_best_approximation_is_the_truncated_singular_value_decomposition(n, inputs, outputs):
    given = linear(inputs, outputs)
    R = rearranged(given.weight, n)
    L, S, rows = np.linalg.svd(R, full_matrices=False)
    layer = from_linear(given, n)
    assert isinstance(layer, PHMLinear) and (layer.in_features, layer.out_features, layer.n) == (inputs, outputs, n)
    assert error(layer, given.weight) == pytest.approx(np.sqrt((S[n:] ** 2).sum()), abs=1e-13)
    nearest = (L[:, :n] * S[:n]) @ rows[:n]
    np.testing.assert_allclose(rearranged(layer.dense_weight(), n), nearest, atol=1e-13)


@pytest.mark.parametrize(("n", "inputs", "outputs"), SIZES[1:])
def test_no_step_of_A_and_F_lowers_the_error(n, inputs, outputs):
    given = linear(inputs, outputs)
    layer = from_linear(given, n)
    least = error(layer, given.weight)
    A, F = layer.A.detach().clone(), layer.F.detach().clone()
    for seed in range(20):
        for size in (1e-3, 1e-1, 1):
            with torch.no_grad():
                layer.A.copy_(A + size * normal(A.shape, seed))
                layer.F.copy_(F + size * normal(F.shape, 100 + seed))
            assert error(layer, given.weight) > least


@pytest.mark.parametrize(("n", "inputs", "outputs"), SIZES[1:4])
def test_alternating_least_squares_finds_nothing_better(n, inputs, outputs):
    given = linear(inputs, outputs)
    R = rearranged(given.weight, n)
    least = error(from_linear(given, n), given.weight)
    found = []
    for seed in range(3):
        A = np.random.default_rng(seed).standard_normal((n * n, n))
        for _ in range(2000):
            F = np.linalg.lstsq(A, R, rcond=None)[0]
            A = np.linalg.lstsq(F.T, R.T, rcond=None)[0].T
        found.append(np.linalg.norm(R - A @ F))
    assert min(found) >= least * (1 - 1e-12)
    assert min(found) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("n", "inputs", "outputs"), SIZES)
def test_sums_of_kronecker_products_are_recovered(n, inputs, outputs, dtype):
    given = with_weight(linear(inputs, outputs, dtype=dtype), exact_sum(n, inputs, outputs))
    layer = from_linear(given, n)
    allowed = 1e-14 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    assert relative(kron_sum(layer.A.detach(), layer.F.detach()), given.weight.detach()) < allowed
    x = normal((3, inputs), 9).to(dtype)
    with torch.no_grad():
        assert relative(layer(x), copy.deepcopy(given).double()(x.double())) < max(4 * allowed, 1e-13)


def test_small_terms_are_recovered_beside_large_ones():
    """To rounding of the whole, where the square of the ratio would be lost in it."""
    F = normal((4, 5, 3), 1) * torch.tensor([1, 1e-3, 1e-6, 1e-9], dtype=torch.float64).view(4, 1, 1)
    W = kron_sum(normal((4, 4, 4), 2), F)
    layer = from_linear(with_weight(nn.Linear(12, 20, dtype=torch.float64), W), 4)
    assert relative(layer.dense_weight(), W) < 1e-15


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
def test_F_is_optimal_for_A_as_rounded(dtype):
    given = linear(24, 32, dtype=dtype)
    layer = from_linear(given, 4)
    terms = layer.A.detach().double().flatten(1).numpy().T
    F = np.linalg.lstsq(terms, rearranged(given.weight, 4), rcond=None)[0]
    torch.testing.assert_close(layer.F, torch.from_numpy(F).view(layer.F.shape).to(dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", (1, 2, 3, 4, 5))
def test_terms_of_A_are_orthogonal_equally_large_and_of_known_sign(n):
    given = linear(6 * n, 4 * n)
    for layer in (from_linear(given, n), from_linear(with_weight(linear(6 * n, 4 * n), -given.weight), n)):
        terms = layer.A.detach().flatten(1)
        torch.testing.assert_close(terms @ terms.mT, n * torch.eye(n, dtype=torch.float64))
        for term in terms:
            assert term[(term.abs() >= term.abs().max() / 2).nonzero()[0]] > 0
    sizes = layer.F.detach().flatten(1).norm(dim=1)
    expected = np.linalg.svd(rearranged(given.weight, n), compute_uv=False)[:n] / np.sqrt(n)
    np.testing.assert_allclose(sizes, expected, rtol=1e-12)


def test_one_term_is_the_layer_itself():
    given = linear(5, 3)
    layer = from_linear(given, 1)
    assert layer.A.item() == 1
    assert torch.equal(layer.F[0], given.weight)


@pytest.mark.parametrize(
    "given",
    (
        with_weight(nn.Linear(8, 8, dtype=torch.float64), torch.zeros(8, 8)),
        with_weight(nn.Linear(8, 8, dtype=torch.float64), torch.ones(8, 8)),
        linear(4, 4),
        linear(4, 8),
    ),
    ids=("zero", "one term", "one entry a block", "two entries a block"),
)
def test_fewer_terms_than_n_leave_others_to_learn(given):
    layer = from_linear(given, 4)
    torch.testing.assert_close(layer.dense_weight(), given.weight, rtol=0, atol=1e-14)
    terms = layer.A.detach().flatten(1)
    torch.testing.assert_close(terms @ terms.mT, 4 * torch.eye(4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((layer.dense_weight() * normal(given.weight.shape, 3)).sum(), layer.F)
    assert (gradient.flatten(1).norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("n", (2, 4))
def test_result_does_not_depend_on_the_blocks(monkeypatch, n):
    given = linear(8 * n, 40 * n)
    whole = from_linear(given, n)
    monkeypatch.setattr(dense, "_BLOCK_ENTRIES", 1)
    assert len(list(dense._blocks(given.weight.detach(), n))) > 3
    parts = quiet(given, n)
    (report,) = parts.conversion_report.layers
    assert report.error == pytest.approx(error(parts, given.weight) / given.weight.norm().item(), rel=1e-12)
    torch.testing.assert_close(parts.A, whole.A, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.F, whole.F, rtol=0, atol=1e-12)


# A given algebra


def least_squares(W: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """The F of least norm, entry by entry of the sum, without the rearrangement."""
    n = len(A)
    p, q = W.shape[0] // n, W.shape[1] // n
    units = np.eye(p * q).reshape(p * q, p, q)
    design = np.stack([np.kron(a, unit).ravel() for a in A.double().numpy() for unit in units], 1)
    return torch.from_numpy(np.linalg.lstsq(design, W.detach().double().numpy().ravel(), rcond=None)[0]).view(n, p, q)


@pytest.mark.parametrize(
    "A",
    (
        algebra.complex_numbers(),
        algebra.quaternions(),
        normal((3, 3, 3), 1),
        normal((1, 3, 3), 1).expand(3, 3, 3),
        torch.eye(3, dtype=torch.float64).view(3, 3, 1).expand(3, 3, 3),
    ),
    ids=("complex", "quaternions", "random", "equal terms", "one column"),
)
def test_weights_of_a_given_algebra_are_the_least_squares_solution(A):
    n = len(A)
    given = linear(4 * n, 3 * n)
    layer = from_linear(given, n, algebra=A)
    assert torch.equal(layer.A, A)
    torch.testing.assert_close(layer.F.detach(), least_squares(given.weight, A), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_quaternion_weights_are_recovered(dtype):
    F = normal((4, 5, 3), 1).to(dtype)
    given = with_weight(linear(12, 20, dtype=dtype), kron_sum(algebra.quaternions(), F))
    layer = from_linear(given, 4, algebra=algebra.quaternions(dtype=torch.float32))
    torch.testing.assert_close(layer.F.detach(), F, rtol=torch.finfo(dtype).eps, atol=1e-15)
    assert layer.A.dtype == layer.F.dtype == dtype


def test_a_given_algebra_is_learned_on_request():
    given, A = linear(8, 8), algebra.quaternions()
    assert not from_linear(given, 4, algebra=A).A.requires_grad
    assert from_linear(given, 4, algebra=A, learn_algebra=True).A.requires_grad
    assert from_linear(given, 4).A.requires_grad
    assert not from_linear(given, 4, learn_algebra=False).A.requires_grad
    factored = from_linear(given, 4, algebra=A, algebra_rank=8)
    assert [p.requires_grad for p in (factored.U, factored.V, factored.W, factored.F)] == [False, False, False, True]
    layer = from_linear(given, 4, algebra=A)
    A.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.A, algebra.quaternions())


# A known rank


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
@pytest.mark.parametrize(("n", "rank", "terms"), ((2, 3, 3), (3, "generic", 5), (4, "generic", 7), (4, 9, 9)))
def test_factors_are_those_of_the_fitted_algebra(n, rank, terms, dtype):
    given = linear(4 * n, 6 * n, dtype=dtype)
    layer, expected = from_linear(given, n, algebra_rank=rank), from_linear(given, n)
    assert [t.shape for t in (layer.U, layer.V, layer.W)] == [(terms, n)] * 3
    allowed = 1e-11 if dtype == torch.float64 else 1e-5
    assert relative(layer.structure().detach(), expected.A.detach()) < allowed
    assert error(layer, given.weight) == pytest.approx(error(expected, given.weight), rel=allowed)
    norms = torch.stack([t.detach().norm(dim=1) for t in (layer.U, layer.V, layer.W)])
    used = norms[0] > 0
    torch.testing.assert_close(norms[1:, used], norms[:1, used].expand(2, -1))


def test_factors_of_a_given_algebra():
    given = linear(12, 20)
    layer = from_linear(given, 4, algebra=algebra.quaternions(), algebra_rank=8)
    torch.testing.assert_close(layer.structure().detach(), algebra.quaternions(), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.F, from_linear(given, 4, algebra=algebra.quaternions()).F, rtol=0, atol=1e-12)


def test_rank_without_an_algorithm():
    for options in ({"algebra_rank": 4}, {"algebra_rank": 7, "algebra": algebra.quaternions()}):
        with pytest.raises(algebra.DecompositionError, match=f"rank {options['algebra_rank']}"):
            from_linear(linear(8, 8), 4, **options)


# What a layer keeps


@pytest.mark.parametrize("rank", (None, 7))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_state_is_kept(dtype, rank, device):
    for bias, training, weight_grad, bias_grad in ((True, True, True, False), (False, False, False, False)):
        given = linear(8, 12, dtype=dtype, bias=bias).to(device).train(training)
        given.weight.requires_grad_(weight_grad)
        if bias:
            given.bias.requires_grad_(bias_grad)
        before = copy.deepcopy(given.state_dict())
        layer = from_linear(given, 4, algebra_rank=rank)
        assert layer.training is training
        weights = [p for name, p in layer.named_parameters() if name != "bias"]
        assert {p.requires_grad for p in weights} == {weight_grad}
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert {p.device for p in layer.parameters()} == {given.weight.device}
        assert (layer.bias is not None) is bias
        if bias:
            assert torch.equal(layer.bias, given.bias) and layer.bias.requires_grad is bias_grad
        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()
        assert all(torch.equal(t, before[name]) for name, t in given.state_dict().items())


@pytest.mark.parametrize("options", ({}, {"algebra_rank": 7}, {"algebra": algebra.quaternions(), "algebra_rank": 9}))
def test_nothing_is_drawn_from_the_global_generator(options):
    state = torch.get_rng_state()
    from_linear(linear(8, 12), 4, **options)
    # linear() draws by the constructor of nn.Linear.
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    linear(8, 12)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_layouts_and_the_default_device():
    W = normal((12, 8), 1)
    expected = from_linear(with_weight(linear(8, 12), W), 4)
    for weight in (W.mT.contiguous().mT, torch.cat([W, W], 1)[:, :8], W.repeat_interleave(2, 1)[:, ::2]):
        given = linear(8, 12)
        given.weight = nn.Parameter(weight)
        assert given.weight.stride() != (8, 1)
        with torch.device("meta"):
            layer = from_linear(given, 4)
        assert torch.equal(layer.A, expected.A) and torch.equal(layer.F, expected.F)


def test_parametrized_weight_is_read_as_it_is_used():
    given = nn.utils.parametrizations.weight_norm(linear(8, 12))
    torch.testing.assert_close(from_linear(given, 4).F, from_linear(with_weight(linear(8, 12), given.weight), 4).F)


# Convolutions

GEOMETRIES = (
    {"kernel_size": 3},
    {"kernel_size": (3, 2, 1), "stride": (1, 2, 3), "padding": (1, 0, 2), "dilation": (2, 1, 1)},
    {"kernel_size": (2, 3, 2), "padding": "same", "dilation": (1, 2, 1)},
    {"kernel_size": (1, 3, 2), "padding": "valid", "stride": 2, "bias": False},
)


def conv(dims: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    options = {key: value[:dims] if isinstance(value, tuple) else value for key, value in options.items()}
    return CONV[dims](inputs, outputs, dtype=dtype, **options)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=("plain", "strided", "same", "valid"))
@pytest.mark.parametrize("n", (1, 2, 3))
@pytest.mark.parametrize("dims", (1, 2, 3))
def test_convolutions(dims, n, geometry):
    given = conv(dims, 4 * n, 2 * n, **geometry)
    layer = from_conv(given, n)
    assert type(layer) is PHCONV[dims]
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(layer, name) == getattr(given, name), name
    S = np.linalg.svd(rearranged(given.weight, n), compute_uv=False)
    assert error(layer, given.weight) == pytest.approx(np.sqrt((S[n:] ** 2).sum()), abs=1e-13)
    with_weight(given, exact_sum(n, 4 * n, 2 * n, *given.kernel_size))
    layer = from_conv(given, n)
    x = normal((2, 4 * n, 9, 8, 7)[: dims + 2], 1)
    torch.testing.assert_close(layer(x), given(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dims", (2, 3))
def test_memory_format_is_kept(dims, dtype):
    layout = (torch.channels_last, torch.channels_last_3d)[dims - 2]
    weight = exact_sum(2, 6, 8, *(3, 2, 2)[:dims])
    contiguous = with_weight(conv(dims, 6, 8, dtype, kernel_size=(3, 2, 2)), weight)
    given = copy.deepcopy(contiguous).to(memory_format=layout)
    assert not given.weight.is_contiguous()
    layer, expected = from_conv(given, 2), from_conv(contiguous, 2)
    assert expected.F.is_contiguous()
    assert layer.F.flatten(0, 1).is_contiguous(memory_format=layout) and not layer.F.is_contiguous()
    assert torch.equal(layer.A, expected.A) and torch.equal(layer.F, expected.F)
    x = normal((2, 6, 5, 6, 4)[: dims + 2], 1).to(dtype).contiguous(memory_format=layout)
    y = layer(x)
    assert y.is_contiguous(memory_format=layout)
    exact = copy.deepcopy(contiguous).double()(x.double())
    # The weights and the result are rounded, and sums of 16 bits are accumulated in float32.
    assert relative(y.detach(), exact.detach()) < 8 * torch.finfo(dtype).eps
    optimized = optimize_for_inference(layer.eval(), verbose=False)
    assert relative(optimized(x), exact.detach()) < 16 * torch.finfo(dtype).eps


def test_convolution_of_a_given_algebra_and_rank():
    A = algebra.quaternions()
    F = normal((4, 3, 2, 3, 2), 1)
    given = with_weight(conv(2, 8, 12, kernel_size=(3, 2)), kron_sum(A, F))
    layer = from_conv(given, 4, algebra=A)
    torch.testing.assert_close(layer.F.detach(), F, rtol=0, atol=1e-14)
    assert torch.equal(layer.A, A) and not layer.A.requires_grad
    given = conv(2, 8, 12, kernel_size=(3, 2))
    factored = from_conv(given, 4, algebra_rank="generic")
    assert error(factored, given.weight) == pytest.approx(error(from_conv(given, 4), given.weight), rel=1e-12)


# Errors


def non_finite(value: float) -> nn.Linear:
    layer = linear(8, 8)
    with torch.no_grad():
        layer.weight[1, 2] = value
    return layer


@pytest.mark.parametrize(
    ("given", "n", "options", "kind", "message"),
    (
        (nn.Conv1d(4, 4, 1), 2, {}, TypeError, "linear must be a torch.nn.Linear, not Conv1d"),
        (PHMLinear(4, 4, 2), 2, {}, TypeError, "linear must be a torch.nn.Linear, not PHMLinear"),
        (linear(10, 8), 4, {}, ValueError, "in_features=10 is not divisible by n=4"),
        (linear(8, 10), 4, {}, ValueError, "out_features=10 is not divisible by n=4"),
        (linear(8, 8), 0, {}, ValueError, "n=0 must be an integer >= 1"),
        (linear(8, 8), 2.0, {}, TypeError, "n=2.0 must be an integer"),
        (non_finite(float("nan")), 2, {}, ValueError, "the weight of linear must be finite"),
        (non_finite(float("inf")), 2, {"algebra": algebra.complex_numbers()}, ValueError, "of linear must be finite"),
        (nn.Linear(8, 8, device="meta"), 2, {}, ValueError, "the weight of linear is on the meta device"),
        (nn.LazyLinear(8), 2, {}, ValueError, "the weight of linear is not initialised yet"),
        (nn.Linear(8, 8, dtype=torch.complex64), 2, {}, TypeError, "dtype=torch.complex64 is not one of"),
        (linear(8, 8), 2, {"algebra": "complex"}, TypeError, r"algebra must be None or a real .* not str"),
        (
            linear(8, 8),
            2,
            {"algebra": torch.ones(2, 2, 2, dtype=torch.int64)},
            TypeError,
            "algebra has dtype torch.int",
        ),
        (linear(8, 8), 2, {"algebra": torch.ones(2, 2, 3)}, ValueError, r"algebra has shape \(2, 2, 3\); it must be"),
        (linear(8, 8), 2, {"algebra": torch.ones(2, 2, 2, device="meta")}, ValueError, "algebra is on the meta device"),
        (linear(8, 8), 2, {"algebra": torch.zeros(2, 2, 2)}, ValueError, "algebra must be finite, and not zero"),
        (linear(8, 8), 2, {"algebra": torch.full((2, 2, 2), torch.nan)}, ValueError, "algebra must be finite"),
        (linear(8, 8), 2, {"algebra_rank": 5}, ValueError, "algebra_rank=5 must be"),
        (linear(8, 8), 2, {"learn_algebra": 1}, TypeError, "learn_algebra=1 must be True or False"),
    ),
)
def test_errors_of_linear_layers(given, n, options, kind, message):
    with pytest.raises(kind, match=message):
        from_linear(given, n, **options)


def test_weights_that_overflow_are_refused():
    """Where all blocks are equal, the entries of A are 1/sqrt(n)."""
    given = nn.Linear(8, 8, dtype=torch.float16)
    nn.init.constant_(given.weight, 60_000)
    with pytest.raises(ValueError, match="the weight of linear is too large: F does not fit into torch.float16"):
        from_linear(given, 4)
    nn.init.constant_(given.weight, 30_000)
    assert from_linear(given, 4).F.isfinite().all()


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    (
        (nn.Linear(4, 4), TypeError, "conv must be a torch.nn.Conv1d, Conv2d or Conv3d, not Linear"),
        (nn.ConvTranspose2d(4, 4, 1), TypeError, "not ConvTranspose2d"),
        (nn.Conv2d(4, 4, 1, groups=2), ValueError, "conv cannot be a PH convolution: groups=2 is not 1"),
        (nn.Conv2d(4, 4, 1, padding_mode="reflect"), ValueError, 'padding_mode="reflect" is not "zeros"'),
        (nn.Conv1d(3, 4, 1), ValueError, "in_channels=3 is not divisible by n=2"),
        (nn.Conv3d(4, 3, 1), ValueError, "out_channels=3 is not divisible by n=2"),
        (nn.Conv1d(4, 4, 1, device="meta"), ValueError, "the weight of conv is on the meta device"),
    ),
)
def test_errors_of_convolutions(given, kind, message):
    with pytest.raises(kind, match=message):
        from_conv(given, 2)


# Models


def quiet(model: nn.Module, n: int, **options) -> nn.Module:
    return convert_model(model, n, verbose=False, **options)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    ).to(dtype)


def test_model_and_its_report(capsys):
    model = network()
    state = copy.deepcopy(model.state_dict())
    converted = convert_model(model, 4)
    kinds = [PHConv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, PHMLinear, nn.ReLU, nn.Linear]
    assert [type(m) for m in converted] == kinds
    assert not hasattr(model, "conversion_report") and [type(m) for m in model][0] is nn.Conv2d
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    first, second, last = converted.conversion_report.layers
    assert (first.name, first.kind, first.replacement) == ("0", "Conv2d", "PHConv2d")
    assert (first.before, first.after) == (4 * 8 * 9 + 8, 64 + 8 * 9 + 8)
    assert (second.before, second.after) == (128 * 16 + 16, 64 + 128 * 4 + 16)
    for report, index in ((first, 0), (second, 4)):
        W = model[index].weight.detach()
        assert report.error == pytest.approx(error(converted[index], W) / W.norm().item(), rel=1e-12)
        expected = (from_conv if index == 0 else from_linear)(model[index], 4).state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in converted[index].state_dict().items())
    assert (last.replacement, last.after, last.error) == (None, None, None)
    assert last.left == "out_features=3 is not divisible by n=4"
    printed = capsys.readouterr().out
    assert printed == f"{converted.conversion_report}\n"
    assert f"6 is left as it is: {last.left}\n" in printed
    assert re.search(rf"^4 +Linear +PHMLinear +2,064 +592 +{second.error:.2g}$", printed, re.MULTILINE)
    assert "2 of 3 layers converted: 736 parameters in place of 2,360\n" in printed


def test_report_without_layers(capsys):
    converted = convert_model(nn.Sequential(nn.ReLU()), 4)
    assert converted.conversion_report.layers == ()
    assert capsys.readouterr().out == "convert_model: no linear layer and no convolution, the model is unchanged\n"


def test_inplace():
    model = network()
    expected, modules = quiet(model, 4), list(model)
    assert quiet(model, 4, inplace=True) is model
    assert [type(m) for m in model] == [type(m) for m in expected]
    assert [a is b for a, b in zip(model, modules, strict=True)] == [False, True, True, True, False, True, True]
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in expected.state_dict().items())
    with pytest.raises(ValueError, match="inplace=True cannot replace the model itself, a Linear"):
        quiet(linear(8, 8), 4, inplace=True)


def test_the_model_may_be_a_layer_itself():
    for given, kind in ((nn.Linear(16, 16), PHMLinear), (nn.Conv1d(16, 16, 3), PHConv1d)):
        converted = quiet(given, 4)
        assert type(converted) is kind
        (report,) = converted.conversion_report.layers
        assert report.name == "" and str(converted.conversion_report).splitlines()[1].startswith(type(given).__name__)


def test_shared_module_is_converted_once():
    layer = linear(16, 16)
    model = nn.ModuleDict({"a": nn.Sequential(layer, nn.Tanh(), layer), "b": nn.Sequential(layer)})
    model.unregistered = [layer]
    for inplace in (False, True):
        converted = quiet(model, 4, inplace=inplace)
        assert converted["a"][0] is converted["a"][2] is converted["b"][0]
        assert type(converted["b"][0]) is PHMLinear
        assert [report.name for report in converted.conversion_report.layers] == ["a.0"]
        if not inplace:
            assert converted.unregistered[0] is converted["b"][0]


def test_modes_and_gradients_are_kept():
    model = network().eval()
    model[4].train()
    model[0].weight.requires_grad_(False)
    converted = quiet(model, 4)
    assert [m.training for m in converted] == [m.training for m in model]
    assert not converted[0].A.requires_grad and not converted[0].F.requires_grad and converted[0].bias.requires_grad


class OtherLinear(nn.Linear):
    """A subclass, whose forward may be anything."""


def hooked(register: str, hook=lambda *args: None) -> nn.Linear:
    layer = nn.Linear(16, 16)
    getattr(layer, register)(hook)
    return layer


def with_own_forward() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    (
        (lambda: OtherLinear(16, 16), {}, "OtherLinear is a subclass or has parametrizations"),
        (lambda: nn.LazyLinear(16), {}, "LazyLinear is a subclass or has parametrizations"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), {}, "ParametrizedLinear is a subclass or"),
        (lambda: hooked("register_forward_hook"), {}, "it has hooks or a forward of its own"),
        (lambda: hooked("register_forward_pre_hook"), {}, "it has hooks or a forward of its own"),
        (lambda: hooked("register_full_backward_hook"), {}, "it has hooks or a forward of its own"),
        (lambda: hooked("register_full_backward_pre_hook"), {}, "it has hooks or a forward of its own"),
        (with_own_forward, {}, "it has hooks or a forward of its own"),
        (lambda: nn.Linear(15, 16), {}, "in_features=15 is not divisible by n=4"),
        (lambda: nn.Conv1d(16, 15, 3), {}, "out_channels=15 is not divisible by n=4"),
        (lambda: nn.Conv2d(16, 16, 3, groups=4), {}, "groups=4 is not 1"),
        (lambda: nn.Conv2d(16, 16, 3, padding_mode="circular"), {}, 'padding_mode="circular" is not "zeros"'),
        (lambda: nn.Linear(8, 8), {}, "its weight has 64 parameters, and would have 80"),
        (lambda: nn.Linear(16, 8), {"algebra_rank": 8}, "its weight has 128 parameters, and would have 128"),
        (lambda: nn.Linear(16, 16, dtype=torch.complex64), {}, "its dtype torch.complex64 is not one of torch.float32"),
        (lambda: linear(16, 16), {"algebra_rank": 4}, "no algorithm of rank 4"),
    ),
)
@pytest.mark.parametrize("inplace", (False, True))
def test_left_as_it_is(make, options, reason, inplace):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU())
    converted = quiet(model, 4, inplace=inplace, **options)
    assert type(converted[0]) is type(model[0]) and not isinstance(converted[0], PHMLinear)
    (report,) = converted.conversion_report.layers
    assert report.replacement is report.after is report.error is None
    assert report.left.startswith(reason)
    assert str(converted.conversion_report).endswith("0 of 1 layers converted: 0 parameters in place of 0")


def test_layers_of_one_parameter_less_are_converted():
    # 3 n R + 128/4 = 116 of the 128
    assert type(quiet(nn.Linear(16, 8), 4, algebra_rank=7)) is PHMLinear
    assert type(quiet(nn.Linear(16, 8), 4)) is PHMLinear


def test_tied_weights_are_left():
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 16), "head": nn.Linear(16, 16), "other": nn.Linear(16, 16)})
    model["head"].weight = model["embedding"].weight
    model["third"] = nn.Linear(16, 16)
    model["third"].bias = model["other"].bias
    converted = quiet(model, 4)
    assert converted["head"].weight is converted["embedding"].weight
    assert converted["third"].bias is converted["other"].bias
    reasons = {report.name: report.left for report in converted.conversion_report.layers}
    assert reasons == {
        "head": "its weight is that of embedding.weight",
        "other": "its bias is that of third.bias",
        "third": "its bias is that of other.bias",
    }


@pytest.mark.parametrize("batch_first", (False, True))
def test_transformers_of_torch_run_in_both_modes(batch_first):
    """Their fused kernels take the weights of layers inside; the decoder calls its layers."""
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    model.output = nn.Linear(16, 16, dtype=torch.float64)
    converted = quiet(model, 4)
    left = {report.name: report.left for report in converted.conversion_report.layers}
    for name in ("linear1", "linear2"):
        assert left[f"encoder.layers.0.{name}"] == "TransformerEncoderLayer reads its weight"
        assert left[f"decoder.layers.0.{name}"] == ""
        assert type(converted.decoder.layers[0].get_submodule(name)) is PHMLinear
    assert left["encoder.layers.0.self_attn.out_proj"].startswith("NonDynamicallyQuantizableLinear is a subclass")
    assert left["output"] == ""
    x = normal((3, 3, 16), 1)
    trained = converted(x, x)
    assert trained.requires_grad
    converted.eval()
    with torch.no_grad():
        torch.testing.assert_close(converted(x, x), trained)
    attention = nn.MultiheadAttention(16, 2)
    attention.out_proj = nn.Linear(16, 16)
    (report,) = quiet(attention, 4).conversion_report.layers
    assert report.left == "MultiheadAttention reads its weight"
    # The reason for it: the same layer converted cannot be called.
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=torch.float64)
    encoder.linear1 = from_linear(encoder.linear1, 4)
    with torch.no_grad(), pytest.raises(AttributeError, match="weight"):
        encoder.eval()(x)


# skip


def nested() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"encoder": nn.Sequential(nn.Linear(16, 16), nn.Conv1d(16, 16, 3)), "head": nn.Linear(16, 16)}
    return nn.ModuleDict({"trunk": nn.ModuleDict(layers), "head": nn.Linear(16, 16)})


NAMES = ("trunk.encoder.0", "trunk.encoder.1", "trunk.head", "head")


@pytest.mark.parametrize(
    ("skip", "left"),
    (
        ((), ()),
        ("head", ("trunk.head", "head")),
        ("trunk.head", ("trunk.head",)),
        (["encoder"], ("trunk.encoder.0", "trunk.encoder.1")),
        ({"encoder.0", "trunk.head"}, ("trunk.encoder.0", "trunk.head")),
        (nn.Conv1d, ("trunk.encoder.1",)),
        ((nn.Sequential, "head"), NAMES),
        (nn.LSTM, ()),
        (lambda module, name: isinstance(module, nn.Linear) and name.startswith("trunk"), NAMES[:3:2]),
        (iter(["trunk"]), NAMES[:3]),
    ),
)
def test_skip(skip, left):
    converted = quiet(nested(), 4, skip=skip)
    reasons = {report.name: report.left for report in converted.conversion_report.layers}
    assert reasons == {name: "it is in skip" if name in left else "" for name in NAMES}
    assert [type(converted.get_submodule(name)) in (PHMLinear, PHConv1d) for name in NAMES] == [
        name not in left for name in NAMES
    ]


@pytest.mark.parametrize(
    ("skip", "kind", "message"),
    (
        ("hed", ValueError, "skip has 'hed', and no module has this name; did you mean 'head'?"),
        (["head", "ead"], ValueError, "skip has 'ead', and no module has this name"),
        ([nn.Conv1d, "xyz"], ValueError, "skip has 'xyz', and no module has this name$"),
        (None, TypeError, "it has a NoneType"),
        ([3], TypeError, "skip must be names or classes of modules, or a function; it has a int"),
        (int, TypeError, "skip must be names or classes of modules"),
        (nn.Sequential(), TypeError, "it has a Sequential"),
    ),
)
def test_skip_of_unknown_modules(skip, kind, message):
    with pytest.raises(kind, match=message):
        quiet(nested(), 4, skip=skip)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    (
        ({"n": 0}, ValueError, "n=0 must be"),
        ({"weights": "old"}, ValueError, 'weights=\'old\' must be "nearest" or "new"'),
        ({"inplace": 1}, TypeError, "inplace=1 must be True or False"),
        ({"progress": 0}, TypeError, "progress=0 must be"),
        ({"verbose": None}, TypeError, "verbose=None must be"),
        ({"algebra": torch.ones(2, 2, 2)}, ValueError, "algebra has shape"),
        ({"algebra_rank": "full"}, ValueError, "algebra_rank='full' must be"),
        ({"algebra": algebra.quaternions(), "algebra_rank": 7}, algebra.DecompositionError, "rank 7"),
    ),
)
def test_errors_of_models(options, kind, message):
    model = network()
    with pytest.raises(kind, match=message):
        convert_model(**{"model": model, "n": 4, "inplace": True} | options)
    assert type(model[0]) is nn.Conv2d


def test_error_of_one_layer_leaves_the_model_unchanged():
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of layer '4' must be finite"):
        quiet(model, 4, inplace=True)
    assert [type(m) for m in model] == [type(m) for m in network()]
    with pytest.raises(ValueError, match="the weight of layer '0' is on the meta device"):
        quiet(network().to("meta"), 4)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, not str"):
        convert_model("model", 4)


# New weights


def test_new_weights_are_those_of_the_constructor():
    model = network(torch.float32)
    model[4].weight.requires_grad_(False)
    torch.manual_seed(1)
    converted = quiet(model, 4, weights="new")
    torch.manual_seed(1)
    expected = nn.ModuleDict({"0": PHConv2d(4, 8, 3, 4, padding=1), "4": PHMLinear(128, 16, 4)})
    state = converted.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in expected.state_dict().items())
    assert torch.equal(state["6.weight"], model[6].weight)
    assert [report.error for report in converted.conversion_report.layers] == [None, None, None]
    assert [report.after for report in converted.conversion_report.layers] == [144, 592, None]
    assert not converted[4].F.requires_grad


def test_new_weights_of_an_algebra_a_rank_and_without_a_device():
    converted = quiet(network(), 4, weights="new", algebra=algebra.quaternions(), algebra_rank=8)
    torch.testing.assert_close(converted[0].structure(), algebra.quaternions(), rtol=0, atol=1e-12)
    assert not converted[0].U.requires_grad
    assert quiet(network(), 4, weights="new", algebra_rank=4)[4].U.shape == (4, 4)
    assert {p.device.type for p in quiet(network().to("meta"), 4, weights="new").parameters()} == {"meta"}


# Progress


def test_progress(monkeypatch):
    bars = []

    def bar(names, **options):
        bars.append((list(names), options))
        return names

    monkeypatch.setattr(dense, "tqdm", bar)
    quiet(network(), 4)
    quiet(network(), 4, progress=False)
    assert [names for names, _ in bars] == [["0", "4", "6"]] * 2
    assert [(options["delay"], options["disable"]) for _, options in bars] == [(1, False), (1, True)]


def test_progress_is_not_shown_for_short_work(capsys):
    quiet(network(), 4)
    assert capsys.readouterr() == ("", "")


# The converted model is a full one


@pytest.mark.parametrize("options", ({}, {"algebra_rank": "generic"}, {"algebra": algebra.quaternions()}))
def test_copies_and_state_dicts(options):
    converted = quiet(network(), 4, **options).eval()
    x = normal((2, 4, 4, 4), 1)
    y = converted(x)
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), y)
        assert other.conversion_report == converted.conversion_report
    other = quiet(network(), 4, weights="new", **options).eval()
    assert not torch.equal(other(x), y)
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(x), y)


def test_compiles_and_exports():
    converted = quiet(network(), 4).eval()
    x = normal((2, 4, 4, 4), 1)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), converted(x))
    exported = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    wide = normal((7, 4, 4, 4), 2)
    torch.testing.assert_close(exported.module()(wide), converted(wide))


@pytest.mark.parametrize("options", ({}, {"algebra_rank": "generic"}))
def test_exact_sums_keep_the_outputs_of_a_model_through_optimisation(options):
    model = network().eval()
    with_weight(model[0], exact_sum(4, 4, 8, 3, 3))
    with_weight(model[4], exact_sum(4, 128, 16))
    x = normal((2, 4, 4, 4), 1)
    converted = quiet(model, 4, **options)
    assert relative(converted(x), model(x)) < 1e-12
    optimized = optimize_for_inference(converted, verbose=False)
    assert [layer.rank for layer in optimized.inference_report.layers] == [7, 7]
    assert relative(optimized(x), model(x)) < 1e-11


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> float:
    """The last loss of full batches."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("options", ({}, {"algebra_rank": "generic"}, {"algebra": algebra.quaternions()}))
def test_trained_network_loses_by_the_conversion_and_is_trained_again(options):
    torch.manual_seed(0)
    x, teacher = normal((256, 16), 1), nn.Linear(16, 4, dtype=torch.float64)
    y = teacher(x).argmax(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    before = train(model, x, y, 100)
    converted = quiet(model, 4, skip="2", **options)
    report = converted.conversion_report.layers[0]
    lost = nn.functional.cross_entropy(converted(x), y).item()
    assert 0.1 < report.error < 1 and lost > 2 * before
    A = converted[0].structure().detach().clone()
    assert train(converted, x, y, 100) < lost / 2
    assert torch.equal(converted[0].structure(), A) is ("algebra" in options)


def test_perceptron_on_digits():
    """The README's figures: what is left of a trained network, and after an epoch and five of training."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    train_x, train_y, test_x, test_y = x[:1297], y[:1297], x[1297:], y[1297:]

    def accuracy(model):
        with torch.no_grad():
            return (model(test_x).argmax(1) == test_y).float().mean().item()

    def epochs(model, count):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(count):
            for rows in torch.randperm(len(train_y)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(train_x[rows]), train_y[rows]).backward()
                optimizer.step()
        return accuracy(model)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    drawn = [layer.error for layer in quiet(model, 4).conversion_report.layers[:2]]
    dense_accuracy = epochs(model, 20)
    converted = quiet(model, 4)
    errors = [layer.error for layer in converted.conversion_report.layers[:2]]
    new = quiet(model, 4, weights="new")
    assert all(0.83 < error < 0.85 for error in drawn) and all(0.81 < error < 0.83 for error in errors)
    assert dense_accuracy > 0.95 and accuracy(converted) < 0.55
    assert 0.85 < epochs(copy.deepcopy(converted), 1) < epochs(converted, 5)
    assert accuracy(converted) > 0.94 > 0.93 > epochs(new, 5)
