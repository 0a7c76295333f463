"""optimize_for_inference: equal outputs, what is folded and what must not be, and that the result is a full model."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import re

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from phydi_kernels import algebra, functional, inference, optimize_for_inference
from phydi_kernels.models import PHResNet
from phydi_kernels.nn import PHConv1d, PHConv2d, PHConv3d, PHMLinear, PHYDILinear, PHYDIResidual
from phydi_kernels.nn.factored import FactoredLayer, FactoredPHConv, FactoredPHMLinear

INITS = ("standard", "wkp", "phydi", "fixup")
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: PHConv1d, 2: PHConv2d, 3: PHConv3d}
both = pytest.mark.parametrize("prepack", [False, True], ids=["F", "F-hat"])


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode, with no parameter or statistic of normalisation left at its initial value."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t, low, high):
        t.copy_(torch.rand(t.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, tuple(BATCH_NORM.values())) and m.track_running_stats:
                draw(m.running_mean, -0.5, 0.5)
                draw(m.running_var, 0.5, 2)
        for name, p in model.named_parameters():
            if p.dim() == 1:
                # Batch normalisation has positive factors here, where the tests do not make them negative.
                draw(p, 0.5 if name.endswith(("weight", "alpha", "kron_weights")) else -0.5, 1.5)
            elif not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def quiet(model: nn.Module, **options) -> nn.Module:
    return optimize_for_inference(model, verbose=False, **options)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@torch.no_grad()
def assert_same(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """The optimised model, after comparing its output: float64 to 1e-12, float32 as close as the model itself."""
    x = draw(*shape, dtype=dtype)
    optimized = quiet(model, **options)
    if dtype == torch.float64:
        assert relative(optimized(x), model(x)) < 1e-12
    else:
        exact = copy.deepcopy(model).double()(x.double())
        # One rounding error of a sum is multiplied by the growth, and errors of layers add up.
        growth = max(layer.growth or 1 for layer in optimized.inference_report.layers)
        layers = len(optimized.inference_report.layers)
        assert relative(optimized(x), exact) < growth * math.sqrt(layers) * torch.finfo(dtype).eps
    return optimized


def optimized_layers(model: nn.Module) -> list[FactoredLayer]:
    return [m for m in model.modules() if isinstance(m, FactoredLayer)]


def shared_algebra(n: int, count: int, **options) -> nn.Sequential:
    """A perceptron whose layers share A, so that it is decomposed quickly."""
    model = nn.Sequential(*(PHMLinear(8, 8, n, **options) for _ in range(count)))
    for layer in model[1:]:
        layer.A = model[0].A
    return randomized(model)


def block(dims: int = 2, *after: nn.Module, bias: bool = True, norm: nn.Module | None = None, n: int = 2):
    """Convolution, batch normalisation, and what comes after."""
    norm = BATCH_NORM[dims](6, dtype=torch.float64) if norm is None else norm
    conv = CONV[dims](4, 6, 2, n, bias=bias, dtype=torch.float64)
    return randomized(nn.Sequential(conv, norm, *after))


# Outputs


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("init", INITS)
def test_residual_networks(init, dtype, prepack):
    torch.manual_seed(0)
    known = {} if init in ("standard", "wkp") else {"weight_init": algebra.quaternions()}
    model = randomized(PHResNet((1, 1, 1, 1), init == "wkp", 4, init=init, width=8, dtype=dtype, **known))
    optimized = assert_same(model, 2, 3, 8, 8, dtype=dtype, prepack=prepack)
    report = optimized.inference_report
    assert len(optimized_layers(optimized)) == len(report.layers) == (17 if init == "wkp" else 12)
    rank = 8 if known else 7
    assert all(layer.rank == rank and layer.ratio == rank / 16 for layer in report.layers)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in optimized.modules())
    for layer in report.layers:
        parent, _, conv = layer.name.rpartition(".")
        number = conv.removeprefix("conv")
        last = "branch" not in parent or number == ("3" if init == "wkp" else "2")
        expected = (f"{parent}.bn{number}",) + (() if last else (f"{parent}.relu{number}",))
        assert layer.folded == (() if init == "fixup" else expected), layer.name


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kron_weights", [False, True])
def test_perceptrons(kron_weights, dtype, prepack):
    torch.manual_seed(0)
    options = {"kron_weights": kron_weights, "dtype": dtype}
    model = nn.Sequential(
        PHMLinear(6, 12, 3, **options), nn.ReLU(), PHYDILinear(12, 3, **options), PHMLinear(12, 4, 4, False, **options)
    )
    optimized = assert_same(randomized(model), 2, 5, 6, dtype=dtype, prepack=prepack)
    assert [type(m) for m in optimized] == [FactoredPHMLinear, nn.Identity, FactoredPHMLinear, FactoredPHMLinear]
    assert [m.rank for m in optimized_layers(optimized)] == [5, 5, 7]


@both
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_keep_their_geometry(dims, prepack):
    torch.manual_seed(0)
    convs = (
        CONV[dims](4, 6, (3, 2, 1)[:dims], 2, stride=(2, 1, 1)[:dims], padding=(1, 0, 2)[:dims], dtype=torch.float64),
        CONV[dims](6, 4, 2, 2, padding="same", dilation=(1, 2, 3)[:dims], dtype=torch.float64),
    )
    model = randomized(nn.Sequential(*convs))
    for shape in ((2, 4, 9, 8, 7)[: dims + 2], (4, 9, 8, 7)[: dims + 1]):
        assert_same(model, *shape, prepack=prepack)


@pytest.mark.parametrize("prepack", [False, True], ids=["F", "F-hat"])
def test_bfloat16_error_is_bounded(prepack):
    """|error| <= 2 u growth |A| |F| |x| + u |y|: F-hat and X-hat are rounded, and the result."""
    torch.manual_seed(0)
    for layer in (PHMLinear(64, 96, 4, bias=False), PHMLinear(64, 96, 4, bias=False, init=algebra.quaternions())):
        layer = layer.eval().bfloat16()
        optimized = quiet(layer, prepack=prepack)
        x = draw(32, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            y = optimized(x).double()
            exact = copy.deepcopy(layer).double()(x.double())
        u = torch.finfo(torch.bfloat16).eps / 2
        (report,) = optimized.inference_report.layers
        size = layer.structure().double().norm() * layer.F.double().norm() * x.double().norm(dim=1)
        # 2**-20: what float32 adds, in U, V, W and the sums.
        allowed = (2 * u + 2**-20) * report.growth * size + u * exact.norm(dim=1)
        assert ((y - exact).norm(dim=1) <= allowed).all()
        # The errors of the terms are independent: typically it is this much less.
        assert relative(y, exact) < u * (1 + report.growth)


def test_bfloat16_network_multiplies_the_error_by_the_growth_at_most():
    torch.manual_seed(0)
    model = randomized(PHResNet((1, 1, 1, 1), False, 4, width=8, weight_init=algebra.quaternions())).bfloat16()
    exact_model, x = copy.deepcopy(model).double(), draw(2, 3, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = exact_model(x.double())
        own = relative(model(x), exact)
        for prepack in (False, True):
            optimized = quiet(model, prepack=prepack)
            growth = max(layer.growth for layer in optimized.inference_report.layers)
            assert relative(optimized(x), exact) < (1 + growth) * own


def test_factors_stay_in_float32_beside_16_bits():
    torch.manual_seed(0)
    model = shared_algebra(4, 2, dtype=torch.bfloat16)
    for layer in optimized_layers(quiet(model)):
        assert {t.dtype for t in (layer.U, layer.V, layer.W)} == {torch.float32}
        assert {t.dtype for t in (layer.F, layer.bias)} == {torch.bfloat16}
    (layer, *_) = optimized_layers(quiet(shared_algebra(2, 1, dtype=torch.float64)))
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@both
def test_conversion(prepack):
    torch.manual_seed(0)
    model = randomized(nn.Sequential(PHConv2d(4, 6, 3, 2), nn.BatchNorm2d(6), nn.Flatten(), PHMLinear(24, 8, 2)))
    optimized = quiet(model, prepack=prepack)
    before = copy.deepcopy(optimized.state_dict())
    x = draw(2, 4, 4, 4, dtype=torch.float32)
    with torch.no_grad():
        y = optimized(x)
        for dtype in (torch.bfloat16, torch.float16):
            half = copy.deepcopy(optimized).to(dtype)
            assert [p.stride() for p in half.parameters()] == [p.stride() for p in optimized.parameters()]
            kept = {name for name, t in half.state_dict().items() if t.dtype != dtype}
            assert {name.rpartition(".")[2] for name in kept} == ({"V", "W"} if prepack else {"U", "V", "W"})
            assert all(torch.equal(half.state_dict()[name], before[name]) for name in kept)
            assert relative(half(x.to(dtype)), y) < 4 * torch.finfo(dtype).eps
            assert half.float()(x).dtype == torch.float32
            assert {p.dtype for p in half.double().parameters()} == {torch.float64}
        strides = [p.stride() for p in optimized.parameters()]
        last = optimized.to(memory_format=torch.channels_last)
        assert [p.stride() for p in last.parameters()] == strides
        assert torch.equal(last(x), y)
        moved = last.to("meta")
        assert moved(x.to("meta")).shape == y.shape


# Algebras


def counted(monkeypatch) -> list[torch.Tensor]:
    """The tensors that are decomposed from here on."""
    seen = []

    def decompose(A, **options):
        seen.append(A)
        return algebra.decompose(A, **options)

    monkeypatch.setattr(inference, "decompose", decompose)
    return seen


def test_equal_algebras_are_decomposed_once(monkeypatch):
    torch.manual_seed(0)
    seen = counted(monkeypatch)
    model = shared_algebra(4, 3)
    model.append(PHMLinear(8, 8, 4, dtype=torch.float64))
    with torch.no_grad():
        model[3].A.copy_(model[0].A)
    assert len({m.rank for m in optimized_layers(quiet(model.eval()))}) == 1
    assert len(seen) == 1
    assert torch.equal(seen[0], model[0].A.double())
    with torch.no_grad():
        model[2].A = nn.Parameter(model[2].A + 1e-6)
    quiet(model)
    assert len(seen) == 3


def test_kron_weights_are_part_of_the_algebra(monkeypatch):
    torch.manual_seed(0)
    seen = counted(monkeypatch)
    model = shared_algebra(2, 2, kron_weights=True, dtype=torch.float64)
    assert_same(model, 3, 8)
    assert len(seen) == 2
    for A, layer in zip(seen, model, strict=True):
        torch.testing.assert_close(A, layer.structure().detach())


def test_known_algebras():
    model = shared_algebra(4, 2, init=algebra.quaternions(), learn_algebra=False, dtype=torch.float64)
    optimized = assert_same(model, 3, 8)
    assert [(layer.rank, layer.ratio) for layer in optimized.inference_report.layers] == [(8, 0.5)] * 2


@both
@pytest.mark.parametrize("kron_weights", [False, True])
def test_learned_factors_are_kept(monkeypatch, kron_weights, prepack):
    torch.manual_seed(0)
    seen = counted(monkeypatch)
    options = {"kron_weights": kron_weights, "dtype": torch.float64}
    model = randomized(
        nn.Sequential(
            PHMLinear(8, 12, 4, algebra_rank=4, **options),
            PHYDILinear(12, 4, algebra_rank="generic", **options),
            nn.Unflatten(1, (4, 3)),
            PHConv1d(4, 8, 2, 4, algebra_rank=5, **options),
            nn.BatchNorm1d(8, dtype=torch.float64),
        )
    )
    optimized = assert_same(model, 3, 8, prepack=prepack)
    assert seen == []
    assert [layer.rank for layer in optimized.inference_report.layers] == [4, 7, 5]
    assert optimized.inference_report.layers[2].folded == ("4",)
    for layer, report in zip((model[0], model[1], model[3]), optimized.inference_report.layers, strict=True):
        terms = sum(torch.outer(v, w).norm() * u.norm() for u, v, w in zip(layer.U, layer.V, layer.W, strict=True))
        if not kron_weights:
            assert report.growth == pytest.approx((terms / layer.structure().norm()).item())
        assert report.residual == 0


def test_zero_algebra():
    layer = PHMLinear(8, 12, 4, dtype=torch.float64)
    nn.init.zeros_(layer.A)
    optimized = assert_same(layer.eval(), 3, 8)
    assert optimized.rank == 1


class OtherLinear(PHMLinear):
    """A subclass, whose forward may be anything."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(layer):
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


def with_own_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def parametrized(layer):
    class Double(nn.Module):
        def forward(self, F):
            return 2 * F

    nn.utils.parametrize.register_parametrization(layer, "F", Double())
    return layer


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda: PHMLinear(4, 4, 1), {}, r"an algorithm of R = 1 block products saves none of the n\*n = 1"),
        (lambda: PHConv1d(4, 4, 1, 1), {}, r"R = 1 block products saves none"),
        (lambda: PHMLinear(4, 4, 2, algebra_rank=4), {}, r"R = 4 block products saves none of the n\*n = 4"),
        (lambda: PHMLinear(8, 8, 2), {"max_growth": 1}, r"residual .* growth .* \(allowed 1\)"),
        (lambda: OtherLinear(8, 8, 2), {}, "OtherLinear is a subclass or has parametrizations"),
        (lambda: parametrized(PHMLinear(8, 8, 2)), {}, "ParametrizedPHMLinear is a subclass or has parametrizations"),
        (lambda: with_hook(PHMLinear(8, 8, 2)), {}, "it has hooks or a forward of its own"),
        (lambda: with_own_forward(PHMLinear(8, 8, 2)), {}, "it has hooks or a forward of its own"),
    ],
    ids=["n1", "n1-conv", "full-rank", "growth", "subclass", "parametrized", "hook", "own-forward"],
)
def test_left_as_it_is(make, options, reason, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU()).eval()
    optimized = optimize_for_inference(model, **options)
    x = draw(3, model[0].F.shape[2] * model[0].n, dtype=torch.float32)
    x = x.unsqueeze(-1) if isinstance(model[0], PHConv1d) else x
    assert torch.equal(optimized(x), model(x))
    assert type(optimized[0]) is type(model[0])
    assert type(optimized[1]) is nn.ReLU
    (report,) = optimized.inference_report.layers
    assert report.rank is report.ratio is report.residual is report.growth is None
    assert re.search(reason, report.left), report.left
    printed = capsys.readouterr().out
    assert f"0 is left as it is: {report.left}\n" in printed
    assert "0 of 1 hypercomplex layers in rank-R form\n" in printed


# Structure of the model


def test_shared_module_is_replaced_once_at_all_places():
    torch.manual_seed(0)
    layer = PHMLinear(8, 8, 2, dtype=torch.float64)
    model = nn.ModuleDict({"a": nn.Sequential(layer, nn.Tanh(), layer), "b": nn.Sequential(layer)}).eval()
    optimized = quiet(model)
    assert optimized["a"][0] is optimized["a"][2] is optimized["b"][0]
    assert isinstance(optimized["b"][0], FactoredPHMLinear)
    assert [report.name for report in optimized.inference_report.layers] == ["a.0"]
    x = draw(3, 8)
    assert relative(optimized["a"](x), model["a"](x)) < 1e-12


def test_shared_weights_stay_shared():
    torch.manual_seed(0)
    model = shared_algebra(2, 2)
    model[1].F, model[1].bias = model[0].F, model[0].bias
    optimized = quiet(model)
    assert optimized[0].F is optimized[1].F and optimized[0].bias is optimized[1].bias
    assert optimized[0].F.data_ptr() != model[0].F.data_ptr()
    converted = copy.deepcopy(optimized).double()
    assert converted[0].F is converted[1].F


@both
def test_inplace(prepack):
    torch.manual_seed(0)
    model = block(2, nn.ReLU())
    x = draw(2, 4, 5, 5)
    y = model(x).detach()
    modules, state = list(model), copy.deepcopy(model.state_dict())
    optimized = quiet(model, prepack=prepack)
    assert optimized is not model
    assert list(model) == modules and not hasattr(model, "inference_report")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
    assert torch.equal(model(x), y)
    assert quiet(model, inplace=True, prepack=prepack) is model
    assert [type(m) for m in model] == [FactoredPHConv, nn.Identity, nn.Identity]
    assert relative(model(x), y) < 1e-12


def test_optimized_layers_need_no_gradient_and_pass_one_on():
    torch.manual_seed(0)
    model = shared_algebra(2, 2, dtype=torch.float64)
    optimized = quiet(model)
    assert not any(p.requires_grad for p in optimized.parameters())
    x = draw(3, 8).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (actual,) = torch.autograd.grad(optimized(x).square().sum(), x)
    assert relative(actual, expected) < 1e-12


def test_factored_layer_of_trainable_parameters_needs_no_gradient():
    torch.manual_seed(0)
    layer = PHMLinear(8, 12, 4, algebra_rank=4, dtype=torch.float64)
    factored = FactoredPHMLinear(layer.U, layer.V, layer.W, layer.F, layer.bias)
    assert not any(p.requires_grad for p in factored.parameters())
    assert all(p.requires_grad for p in layer.parameters())
    x = draw(3, 8)
    assert torch.equal(factored(x), layer(x))
    assert FactoredPHMLinear(factored.U, factored.V, factored.W, factored.F).F is factored.F


@both
def test_second_call_of_a_layer_checks_only_what_changed(monkeypatch, prepack):
    layer = quiet(PHMLinear(8, 12, 4).eval(), prepack=prepack)
    x = draw(3, 8, dtype=torch.float32)
    checks = []
    check = functional._check
    monkeypatch.setattr(functional, "_check", lambda *args, **options: checks.append(1) or check(*args, **options))

    def call(x):
        with torch.no_grad():
            return layer(x), len(checks)

    expected, first = call(x)
    assert first == 1
    again, second = call(x)
    assert torch.equal(again, expected)
    assert second == 1
    with pytest.raises(ValueError, match="last dimension"):
        call(x[:, :7])
    with pytest.raises(TypeError, match="dtype"):
        call(x.double())
    with pytest.raises(ValueError, match="activation"), torch.no_grad():
        layer(x, activation="tanh")
    layer.activation = "relu"
    torch.testing.assert_close(call(x)[0], expected.relu())
    layer.activation = "none"
    doubled = torch.func.functional_call(layer, {"V": 2 * layer.V, "bias": 2 * layer.bias}, (x,))
    torch.testing.assert_close(doubled, 2 * expected)
    torch.testing.assert_close(call(x)[0], expected)
    layer.V = nn.Parameter(2 * layer.V.detach(), requires_grad=False)
    layer.bias.mul_(2)
    torch.testing.assert_close(call(x)[0], 2 * expected)
    assert b"_CheckedCall" not in pickle.dumps(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.W.mul_(0)
        with torch.no_grad():
            torch.testing.assert_close(copied(x), copied.bias.expand(3, 12))
    torch.testing.assert_close(call(x)[0], 2 * expected)
    layer.double()
    with pytest.raises(TypeError, match="dtype"):
        call(x)
    assert call(x.double())[0].dtype == torch.float64
    torch.nn.utils.parametrize.register_parametrization(layer, "V", Halved())
    for _ in range(2):
        y = call(x.double())[0]
        torch.testing.assert_close(y - layer.bias, expected.double() - layer.bias / 2, rtol=1e-5, atol=1e-6)
    layer.parametrizations.V.original.mul_(0)
    torch.testing.assert_close(call(x.double())[0], layer.bias.expand(3, 12))


class Halved(nn.Module):
    def forward(self, t):
        return t / 2


def test_memory_switch():
    torch.manual_seed(0)
    model = nn.Sequential(PHMLinear(16, 32, 4), PHConv2d(32, 16, 3, 4)).eval()
    dense = [m.dense_weight().numel() for m in model]
    kept, packed = quiet(model), quiet(model, prepack=True)
    assert [m.F.numel() / d for m, d in zip(kept, dense, strict=True)] == [1 / 4] * 2
    assert [m.F_hat.numel() / d for m, d in zip(packed, dense, strict=True)] == [7 / 16] * 2
    assert [layer.prepacked for layer in packed.inference_report.layers] == [True, True]
    # All outputs of a block side by side.
    assert packed[0].F_hat.shape == (7, 4, 8) and packed[0].F_hat.is_contiguous()
    assert packed[1].F_hat.shape == (7, 4, 8, 3, 3) and packed[1].F_hat.is_contiguous()
    U = kept[0].U
    torch.testing.assert_close(packed[0].F_hat.mT, torch.einsum("ri,ipq->rpq", U, kept[0].F))
    assert packed[0].U is None and set(packed[0].state_dict()) == {"V", "W", "F_hat", "bias"}


def test_weights_lie_as_the_kernels_combine_them():
    """Those of all outputs side by side, but for what the direct plan does not serve."""
    model = nn.Sequential(PHMLinear(16, 12, 4), PHYDILinear(12, 2))
    convs = (PHConv1d(8, 12, 3, 4), PHConv2d(8, 12, (3, 2), 4), PHConv2d(8, 12, 3, 4, stride=(1, 3)))
    convs += (PHConv2d(8, 12, 1, 4), PHConv2d(516, 12, 3, 4), PHConv3d(8, 12, 3, 4))
    convs += (PHConv2d(15, 10, 3, 5, algebra_rank=9),)
    for layer in quiet(model.eval()):
        assert layer.F.mT.is_contiguous()
    for conv, moved in zip(convs, (True, True, False, False, False, False, False), strict=True):
        F = quiet(conv.eval()).F
        assert F.is_contiguous() != moved
        assert F.movedim((1, 2), (-1, -2)).is_contiguous() == moved


@pytest.mark.parametrize(
    ("n", "dtype"), ((2, torch.float64), (3, torch.float64), (4, torch.float64), (4, torch.float32))
)
def test_weights_of_a_linear_layer_are_those_of_n_products(n, dtype):
    """U F = U' F' with n unit rows in U', and none of its entries much beyond 1."""
    layer = PHMLinear(
        12 * n, 8 * n, n, init=algebra.random(n, n, n, generator=torch.Generator().manual_seed(1)), dtype=dtype
    ).eval()
    own = algebra.decompose(layer.A.detach().double())
    factored = quiet(layer)
    units = (factored.U.abs().sum(1) == 1) & (factored.U.max(1).values == 1)
    assert units.sum() >= n
    assert factored.U.abs().max() <= 1.01
    expected = torch.einsum("ri,ipq->rpq", own.U, layer.F.double())
    actual = torch.einsum("ri,ipq->rpq", factored.U.double(), factored.F.double())
    assert relative(actual, expected) < 8 * torch.finfo(dtype).eps
    assert torch.equal(factored.F[factored.U[units].argmax(1)].double(), actual[units])


def test_weights_kept_as_they_are():
    """Of 16 bits, shared by layers of other algebras, prepacked, beyond the bound, of convolutions."""
    torch.manual_seed(0)
    A = algebra.random(4, 4, 4)
    half = PHMLinear(16, 16, 4, init=A, dtype=torch.bfloat16).eval()
    assert torch.equal(quiet(half).F, half.F)
    conv = PHConv2d(16, 16, 3, 4, init=A).eval()
    assert torch.equal(quiet(conv).F, conv.F)
    tied = nn.Sequential(PHMLinear(16, 16, 4, init=A), PHMLinear(16, 16, 4)).eval()
    tied[1].F = tied[0].F
    factored = quiet(tied)
    assert factored[0].F is factored[1].F
    assert torch.equal(factored[0].F, tied[0].F)
    # Each of the other 16 products would be a sum of all of the 8.
    many = PHMLinear(16, 16, 8, algebra_rank=24).eval()
    with torch.no_grad():
        many.U.copy_(torch.randn(24, 8))
    assert torch.equal(quiet(many).F, many.F)
    deficient = PHMLinear(16, 16, 4, algebra_rank=5).eval()
    with torch.no_grad():
        deficient.U[:, 0] = 0
    assert torch.equal(quiet(deficient).F, deficient.F)


@both
def test_copies(prepack):
    torch.manual_seed(0)
    model = nn.Sequential(*block(2, nn.ReLU()), nn.Flatten(), PHMLinear(96, 8, 2, dtype=torch.float64))
    optimized = quiet(model.eval(), prepack=prepack)
    x = draw(2, 4, 5, 5)
    y = optimized(x)
    buffer = io.BytesIO()
    torch.save(optimized, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized)), loaded):
        assert torch.equal(other(x), y)
        assert str(other.inference_report) == str(optimized.inference_report)
        assert not any(p.requires_grad for p in other.parameters())


@both
def test_state_dict_of_another_optimized_model(prepack):
    def make(seed):
        torch.manual_seed(seed)
        options = {"init": "phydi", "weight_init": algebra.quaternions(), "dtype": torch.float64}
        model = PHResNet((1, 1, 1, 1), False, 4, width=4, **options)
        return quiet(randomized(model, seed), prepack=prepack)

    first, second = make(0), make(1)
    x = draw(2, 3, 8, 8)
    assert relative(first(x), second(x)) > 0.1
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(first(x), second(x))


def test_state_dict_that_does_not_fit():
    torch.manual_seed(0)
    with_relu, without = block(2, nn.ReLU()), block(2, nn.ReLU())
    with torch.no_grad():
        without[1].weight[2] = -1.0
    with_relu, without = quiet(with_relu), quiet(without)
    message = r"0.alpha must be positive: the ReLU that followed it is applied before it"
    before = copy.deepcopy(with_relu.state_dict())
    with pytest.raises(RuntimeError, match=message):
        with_relu.load_state_dict(without.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in with_relu.state_dict().items())
    without.load_state_dict(with_relu.state_dict())
    x = draw(2, 4, 5, 5)
    torch.testing.assert_close(without(x), with_relu(x))
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.F_hat"'):
        quiet(block(2, nn.ReLU()), prepack=True).load_state_dict(with_relu.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for U"):
        other = PHMLinear(8, 8, 4, init=algebra.quaternions()).eval()
        quiet(PHMLinear(8, 8, 4).eval()).load_state_dict(quiet(other).state_dict())


@both
def test_compiles_and_exports(prepack):
    torch.manual_seed(0)
    model = nn.Sequential(*block(2, nn.ReLU()), nn.Flatten(), PHMLinear(96, 8, 2, dtype=torch.float64))
    model.append(PHYDILinear(8, 2, dtype=torch.float64))
    optimized = quiet(randomized(model), prepack=prepack)
    x = draw(2, 4, 5, 5)
    y = optimized(x)
    compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(optimized, (x,), dynamic_shapes=({0: batch},))
    wide = draw(7, 4, 5, 5)
    torch.testing.assert_close(exported.module()(wide), optimized(wide))


def test_repr():
    complex_block = block(2, nn.ReLU())
    complex_block[0].A.data.copy_(algebra.complex_numbers())
    optimized = quiet(complex_block)
    assert repr(optimized[0]) == (
        "FactoredPHConv(4, 6, kernel_size=(2, 2), stride=(1, 1), padding=(0, 0), dilation=(1, 1), "
        "n=2, rank=3, bias=True, alpha=(6,), activation='relu')"
    )
    layer = quiet(PHYDILinear(4, 2, bias=False, init=algebra.complex_numbers()).eval(), prepack=True)
    assert repr(layer) == (
        "FactoredPHMLinear(in_features=4, out_features=4, n=2, rank=3, bias=False, alpha=(1,), prepacked, residual)"
    )


# Folding


@both
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_batch_norm_is_folded(dims, bias, affine, prepack):
    torch.manual_seed(0)
    norm = BATCH_NORM[dims](6, eps=0.1, affine=affine, dtype=torch.float64)
    model = block(dims, bias=bias, norm=norm)
    optimized = assert_same(model, 2, *(4, 3, 5, 4)[: dims + 1], prepack=prepack)
    assert type(optimized[1]) is nn.Identity
    assert optimized.inference_report.layers[0].folded == ("1",)
    assert optimized[0].alpha.shape == (6,)


def test_negative_factor_is_folded_but_no_relu_after_it():
    torch.manual_seed(0)
    model = block(2, nn.ReLU())
    with torch.no_grad():
        model[1].weight[3] = -0.7
    optimized = assert_same(model, 2, 4, 5, 5)
    assert [type(m) for m in optimized] == [FactoredPHConv, nn.Identity, nn.ReLU]
    assert optimized[0].activation == "none"


def set_norm(**values):
    def change(model):
        for name, value in values.items():
            getattr(model[1], name).data[1] = value

    return change


def train_norm(model):
    model[1].train()


def hook_norm(model):
    model[1].register_forward_hook(lambda module, args, y: 2 * y)


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        (set_norm(weight=0.0), torch.float64, "1 of its factors are 0 in torch.float64"),
        (set_norm(weight=1e-9, bias=0.0), torch.float16, "1 of its factors are 0 in torch.float16"),
        (set_norm(weight=1e-200, bias=1e200), torch.float64, "a factor, or the shift divided by it, is not finite"),
        (set_norm(weight=1e-5, bias=1.0), torch.float16, "the shift divided by it, is not finite in torch.float16"),
        (train_norm, torch.float64, "it normalises by the statistics of each batch"),
        (hook_norm, torch.float64, "it has hooks or a forward of its own"),
    ],
    ids=["zero", "underflow", "overflow", "half-overflow", "training", "hook"],
)
def test_batch_norm_that_cannot_be_folded(change, dtype, reason):
    torch.manual_seed(0)
    model = block(2, nn.ReLU())
    change(model)
    model = model.to(dtype)
    optimized = quiet(model)
    assert [type(m) for m in optimized] == [FactoredPHConv, nn.BatchNorm2d, nn.ReLU]
    (report,) = optimized.inference_report.layers
    assert report.folded == () and reason in report.not_folded
    assert report.not_folded.startswith("1 is not folded: ")
    assert f"0: {report.not_folded}\n" in str(optimized.inference_report)
    x = draw(2, 4, 5, 5, dtype=dtype)
    assert relative(optimized(x), model(x)) < 8 * torch.finfo(dtype).eps


def test_batch_norm_without_statistics_is_not_folded():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, track_running_stats=False, dtype=torch.float64)
    optimized = assert_same(block(norm=norm), 2, 4, 5, 5)
    assert "statistics of each batch" in optimized.inference_report.layers[0].not_folded


def test_batch_norm_of_another_size_or_kind_is_not_folded():
    torch.manual_seed(0)
    wrong = quiet(block(norm=nn.BatchNorm2d(4, dtype=torch.float64)))
    assert "it has 4 channels for the 6 of PHConv2d" in wrong.inference_report.layers[0].not_folded
    for x in (draw(2, 4, 5, 5),):
        with pytest.raises(RuntimeError):
            wrong(x)
    other = quiet(block(2, norm=nn.BatchNorm1d(6, dtype=torch.float64)))
    assert type(other[1]) is nn.BatchNorm1d
    # Rows of features or images of channels: which one a linear layer gives is not known without an input.
    linear = randomized(nn.Sequential(PHMLinear(4, 6, 2), nn.BatchNorm1d(6)))
    assert type(quiet(linear)[1]) is nn.BatchNorm1d


def test_relu_that_cannot_be_fused():
    torch.manual_seed(0)
    hooked = block(2, nn.ReLU())
    hooked[2].register_forward_hook(lambda module, args, y: 2 * y)
    assert assert_same(hooked, 2, 4, 5, 5).inference_report.layers[0].folded == ("1",)
    # The residual is added before this one.
    residual = randomized(nn.Sequential(PHYDILinear(8, 2, dtype=torch.float64), nn.ReLU()))
    assert assert_same(residual, 3, 8).inference_report.layers[0].folded == ()
    capped = randomized(nn.Sequential(PHMLinear(8, 8, 2, dtype=torch.float64), nn.ReLU6()))
    assert assert_same(capped, 3, 8).inference_report.layers[0].folded == ()


def test_batch_norm_without_a_bias_is_folded():
    model = randomized(nn.Sequential(PHConv2d(4, 4, 3, 2, dtype=torch.float64), nn.BatchNorm2d(4).double()))
    model[1].bias = None
    optimized = assert_same(model, 2, 4, 5, 5)
    assert type(optimized[1]) is nn.Identity


def test_backward_hooks_are_kept():
    model = randomized(nn.Sequential(PHConv2d(4, 4, 3, 2), nn.BatchNorm2d(4)))
    calls = []
    model[0].register_full_backward_hook(lambda *_: calls.append(1))
    quiet(model)(torch.randn(1, 4, 5, 5, requires_grad=True)).sum().backward()
    assert calls == [1]


def test_a_model_that_cannot_be_copied_is_optimized_in_place():
    model = randomized(nn.Sequential(PHConv2d(4, 4, 3, 2), nn.BatchNorm2d(4)))
    model.feature = torch.ones(1, requires_grad=True) * 2
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        expected = model(x)
        optimized = quiet(model, inplace=True)
        assert torch.allclose(optimized(x), expected, atol=1e-5)
    assert type(optimized[0]) is FactoredPHConv and type(optimized[1]) is nn.BatchNorm2d
    assert optimized.inference_report.untraced == ("Sequential",)


def test_pruned_alpha_is_seen_by_a_layer_called_before():
    layer = quiet(PHYDILinear(256, 4).eval())
    layer.alpha.data.fill_(1)
    x = torch.randn(2, 256)
    with torch.no_grad():
        layer(x), layer(x)
        torch.nn.utils.prune.l1_unstructured(layer, "alpha", 1)
        assert torch.equal(layer(x), x)


def test_switches():
    torch.manual_seed(0)
    model = block(2, nn.ReLU())
    kinds = {
        (True, True): [nn.Identity, nn.Identity],
        (True, False): [nn.Identity, nn.ReLU],
        (False, True): [nn.BatchNorm2d, nn.ReLU],
        (False, False): [nn.BatchNorm2d, nn.ReLU],
    }
    for (fold, fuse), expected in kinds.items():
        optimized = assert_same(model, 2, 4, 5, 5, fold_batchnorm=fold, fuse_relu=fuse)
        assert [type(m) for m in optimized[1:]] == expected


class Net(nn.Module):
    """Modules that the tests' forwards call in their own ways."""

    def __init__(self):
        super().__init__()
        self.conv = PHConv2d(4, 4, 3, 2, padding=1, dtype=torch.float64)
        self.bn = nn.BatchNorm2d(4, dtype=torch.float64)
        self.relu = nn.ReLU()


class Plain(Net):
    def forward(self, x):
        return x + self.relu(self.bn(self.conv(x)))


class FunctionalRelu(Net):
    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))) + x


class NormNotFirst(Net):
    def forward(self, x):
        return self.bn(self.relu(self.conv(x)))


class NormOfSum(Net):
    def forward(self, x):
        return self.bn(self.conv(x) + x)


class ResultUsedTwice(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class NormedUsedTwice(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) + y


class NormUsedTwice(Net):
    def forward(self, x):
        return self.relu(self.bn(self.conv(self.bn(x))))


class ConvUsedTwice(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv(2 * x)


class ReluUsedTwice(Net):
    def forward(self, x):
        return self.relu(self.bn(self.conv(self.relu(x))))


class NormInAnotherPlace(Net):
    def __init__(self):
        super().__init__()
        self.other = nn.Sequential(self.bn)

    def forward(self, x):
        return self.other(x) + self.bn(self.conv(x))


class Keyword(Net):
    def forward(self, x):
        return self.bn(input=self.conv(x))


class BranchOnInput(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if x.sum() > 1e9 else y


class OptionalArgument(Net):
    def forward(self, x, plain=None):
        y = self.conv(x)
        return y if plain is None else self.bn(y)


class ReadsWeight(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn.weight.sum()


class Remembers(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = x
        return self.relu(self.bn(self.conv(x)))


class KeepsResult(Net):
    def forward(self, x):
        self.feature = [self.conv(x)]
        return self.bn(self.feature[0])


class CalledThroughList(Net):
    def __init__(self):
        super().__init__()
        self.convs = [self.conv]

    def forward(self, x):
        return self.relu(self.bn(self.convs[0](x)))


class Helper(nn.Module):
    def forward(self, module, x):
        return module(x)


class HandedOver(Net):
    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def forward(self, x):
        return self.bn(self.conv(x)) + self.helper(self.conv, x)


class AsksForTensors(Net):
    def forward(self, x):
        y = self.conv(x)
        if isinstance(y, torch.Tensor):
            y = torch.tanh(y)
        return self.bn(y)


@pytest.mark.parametrize(
    ("kind", "folded"),
    [
        (Plain, ("bn", "relu")),
        (KeepsResult, ()),
        (CalledThroughList, ()),
        (HandedOver, ()),
        (AsksForTensors, ()),
        (FunctionalRelu, ("bn",)),
        (NormNotFirst, ("relu",)),
        (NormOfSum, ()),
        (ResultUsedTwice, ()),
        (NormedUsedTwice, ("bn",)),
        (NormUsedTwice, ()),
        (ConvUsedTwice, ()),
        (ReluUsedTwice, ("bn",)),
        (NormInAnotherPlace, ()),
        (Keyword, ()),
        (BranchOnInput, ()),
        (OptionalArgument, ()),
        (ReadsWeight, ()),
        (Remembers, ("bn", "relu")),
    ],
)
def test_what_follows_in_a_forward(kind, folded):
    torch.manual_seed(0)
    model = randomized(kind())
    optimized = assert_same(model, 2, 4, 5, 5)
    (report,) = optimized.inference_report.layers
    assert report.folded == folded
    for name in ("bn", "relu"):
        assert (type(getattr(optimized, name)) is nn.Identity) == (name in folded)
    untraced = kind in (BranchOnInput, OptionalArgument, AsksForTensors)
    assert optimized.inference_report.untraced == ((kind.__name__,) if untraced else ())
    assert ("cannot be traced: " + kind.__name__ in str(optimized.inference_report)) == untraced


def test_tracing_leaves_no_trace():
    torch.manual_seed(0)
    model = randomized(Remembers())
    quiet(model)
    assert model.calls == 0 and not hasattr(model, "last")


class Outer(nn.Module):
    """Cannot be traced: it branches on its input."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            PHConv2d(4, 4, 3, 2, padding=1, dtype=torch.float64), nn.BatchNorm2d(4, dtype=torch.float64)
        )
        self.blocks = nn.ModuleList([self.body])

    def check(self, x):
        if x.sum() > 1e9:
            raise ValueError("too large")
        return x

    @property
    def alias(self):
        return self.body


class CallsWhole(Outer):
    def forward(self, x):
        return self.body(self.check(x)) + x


class AsksFirst(Outer):
    def forward(this, x):
        if this.body is None or not isinstance(this.body, nn.Module) or x.sum() > 1e9:
            raise TypeError(type(this.body).__name__)
        return this.body(x)


class Indexes(Outer):
    def forward(self, x):
        return self.body[0](self.check(x))


class Iterates(Outer):
    def forward(self, x):
        taps = []
        for m in self.body:
            x = m(self.check(x))
            taps.append(x)
        return sum(taps)


class OpensInMethod(Outer):
    def first(self, x):
        return self.body[0](x)

    def forward(self, x):
        return self.body(self.check(x)) + self.first(x)


class OpensInProperty(Outer):
    def forward(self, x):
        return self.body(self.check(x)) + self.alias[0](x)


class OpensByReflection(Outer):
    def forward(self, x):
        return self.body(self.check(x)) + getattr(self, "body")[0](x)  # noqa: B009


class OpensByEnumeration(Outer):
    def forward(self, x):
        return self.body(self.check(x)) + next(m for m in self.modules() if isinstance(m, PHM_CONV))(x)


class OpensByList(Outer):
    def __init__(self):
        super().__init__()
        self.listed = [self.body[0], self.body[1]]

    def forward(self, x):
        return self.body(self.check(x)) + self.listed[0](x)


def first_of(module, x):
    return module.body[0](x)


class PassesItself(Outer):
    def forward(this, x):
        return this.body(this.check(x)) + first_of(this, x)


class PassesBody(Outer):
    def forward(self, x):
        return self.body(self.check(x)) + list(self.body)[0](x)


class Assigned(Outer):
    forward = lambda self, x: self.body(self.check(x))  # noqa: E731


class OpensInParent(Indexes):
    def forward(self, x):
        return self.body(x) + super().forward(x)


class Partial(Outer):
    forward = functools.partialmethod(Indexes.forward)


class DirectForward(Outer):
    def forward(self, x):
        return self.body.forward(self.check(x))


PHM_CONV = (PHConv2d, FactoredPHConv)


@pytest.mark.parametrize(
    ("kind", "folds"),
    [
        (CallsWhole, True),
        (AsksFirst, True),
        (Indexes, False),
        (Iterates, False),
        (OpensInMethod, False),
        (OpensInProperty, False),
        (OpensByReflection, False),
        (OpensByEnumeration, False),
        (OpensByList, False),
        (PassesItself, False),
        (PassesBody, False),
        (Assigned, False),
        (OpensInParent, False),
        (DirectForward, False),
        (Partial, False),
    ],
)
def test_what_an_untraced_forward_does_with_its_modules(kind, folds):
    torch.manual_seed(0)
    model = kind()
    del model.blocks
    model = randomized(nn.Sequential(model))
    # A list is copied with the model but its modules are not replaced: only what it does to folding is tested.
    options = {"inplace": True} if kind is OpensByList else {}
    x = draw(2, 4, 5, 5)
    expected = model(x).detach()
    optimized = quiet(model, **options)
    assert relative(optimized(x), expected) < 1e-12
    assert optimized.inference_report.layers[0].folded == (("0.body.1",) if folds else ())
    assert optimized.inference_report.untraced == (() if folds else (kind.__name__,))


def test_inside_a_phydi_residual():
    torch.manual_seed(0)
    conv = PHConv2d(4, 4, 3, 2, padding=1, dtype=torch.float64)
    body = nn.Sequential(conv, nn.BatchNorm2d(4, dtype=torch.float64), nn.ReLU())
    model = randomized(nn.Sequential(PHYDIResidual(body, 0.5)))
    report = assert_same(model, 2, 4, 5, 5).inference_report
    assert report.layers[0].folded == ("0.module.1", "0.module.2")


def test_own_forward_of_a_container_is_not_followed():
    torch.manual_seed(0)
    model = nn.Sequential(block(2))
    model[0].forward = model[0][0].forward
    assert quiet(model.eval()).inference_report.layers[0].folded == ()


def test_container_called_by_an_untraced_module_list_user_is_not_followed():
    class Loops(Outer):
        def forward(self, x):
            for m in self.blocks:
                x = m[0](self.check(x))
            return x

    torch.manual_seed(0)
    model = randomized(Loops())
    del model.body
    assert assert_same(model, 2, 4, 5, 5).inference_report.layers[0].folded == ()


def test_modules_of_a_list_are_followed_where_the_calls_can_be_traced():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(block(2, nn.ReLU()))

        def forward(self, x):
            for m in self.layers:
                x = m(x)
            return x

    torch.manual_seed(0)
    report = assert_same(Loops().eval(), 2, 4, 5, 5).inference_report
    assert report.layers[0].folded == ("layers.1", "layers.2")


def test_taps_of_a_traced_parent_are_seen():
    class Taps(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = block(2)

        def forward(self, x):
            return self.body(x).sum() + self.body[0](x).sum()

    torch.manual_seed(0)
    assert assert_same(Taps().eval(), 2, 4, 5, 5).inference_report.layers[0].folded == ()


# Report and arguments


def test_report(capsys):
    torch.manual_seed(0)
    model = randomized(
        nn.Sequential(PHConv2d(4, 8, 2, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), PHMLinear(8, 3, 1))
    )
    optimized = optimize_for_inference(model, prepack=True)
    first, last = optimized.inference_report.layers
    assert (first.name, first.kind, first.n, first.rank, first.ratio) == ("0", "PHConv2d", 4, 7, 7 / 16)
    assert first.residual <= 1e-12 and 1 <= first.growth <= 8
    assert first.folded == ("1", "2") and first.prepacked and first.left == ""
    known = algebra.decompose(model[0].A.detach())
    assert (first.residual, first.growth) == (known.residual, known.growth)
    assert last.left and last.rank is None and not last.prepacked
    printed = capsys.readouterr().out.splitlines()
    assert printed == str(optimized.inference_report).splitlines()
    assert printed[0].split() == ["layer", "n", "R", "R/n^2", "residual", "growth", "weights", "folded"]
    assert printed[1].split() == [
        "0",
        "4",
        "7",
        "0.438",
        f"{first.residual:.1e}",
        f"{first.growth:.3g}",
        "F-hat",
        "1,",
        "2",
    ]
    assert printed[2].split() == ["4", "1", "-", "-", "-", "-", "-"]
    assert printed[-1] == "1 of 2 hypercomplex layers in rank-R form"
    quiet(model)
    assert capsys.readouterr().out == ""


def test_model_without_hypercomplex_layers(capsys):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    optimized = optimize_for_inference(model)
    assert [type(m) for m in optimized] == [nn.Linear, nn.BatchNorm1d]
    assert "no parameterized hypercomplex layer, the model is unchanged" in capsys.readouterr().out
    assert optimized.inference_report.layers == ()
    assert optimize_for_inference(model, inplace=True) is model


def test_layer_alone():
    torch.manual_seed(0)
    layer = PHMLinear(8, 12, 4, dtype=torch.float64).eval()
    optimized = assert_same(layer, 3, 8)
    assert type(optimized) is FactoredPHMLinear
    assert str(optimized.inference_report).splitlines()[1].startswith("PHMLinear  4")
    with pytest.raises(ValueError, match=r"inplace=True cannot replace the model itself, a PHMLinear"):
        optimize_for_inference(layer, inplace=True)


def test_optimized_model_is_unchanged_by_another_call():
    torch.manual_seed(0)
    once = quiet(block(2, nn.ReLU()))
    twice = quiet(once)
    assert twice.inference_report.layers == ()
    x = draw(2, 4, 5, 5)
    assert torch.equal(once(x), twice(x))


@pytest.mark.parametrize("progress", [False, True])
def test_progress(monkeypatch, progress):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.done, self.texts = options, 0, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed = True

        def update(self, n=1):
            self.done += n

        def set_postfix_str(self, text, refresh):
            self.texts.append(text)
            assert not refresh

    monkeypatch.setattr(inference, "tqdm", Bar)
    torch.manual_seed(0)
    model = shared_algebra(4, 3)
    model.append(PHMLinear(8, 8, 2)).append(PHMLinear(8, 8, 2, algebra_rank=2))
    quiet(model.eval(), progress=progress)
    (bar,) = bars
    assert bar.options["total"] == bar.done == 2 and bar.closed
    assert bar.options["delay"] == 1 and bar.options["disable"] is not progress
    assert any(text.startswith("rank 7, start ") for text in bar.texts)


def test_progress_is_not_shown_for_short_work(capsys):
    torch.manual_seed(0)
    quiet(shared_algebra(2, 1))
    assert capsys.readouterr().err == ""


def test_seed_decides_the_algorithm():
    torch.manual_seed(0)
    layer = PHMLinear(8, 8, 4, dtype=torch.float64).eval()
    same, other = (quiet(layer, seed=seed) for seed in (0, 1))
    assert torch.equal(same.U, quiet(layer).U) and not torch.equal(same.U, other.U)


def poisoned(name: str, value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), PHMLinear(4, 4, 2, kron_weights=True)).eval()
    getattr(model[1], name).data.flatten()[1] = value
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: PHMLinear, {}, TypeError, r"model must be a torch.nn.Module, not type"),
        (lambda: nn.Linear(2, 2), {}, ValueError, r"model is in training mode; call model.eval\(\) first"),
        (lambda: poisoned("A", math.nan), {}, ValueError, r"A of layer '1' must be finite, and it holds NaN or inf"),
        (lambda: poisoned("A", math.inf), {}, ValueError, r"A of layer '1' must be finite"),
        (lambda: poisoned("kron_weights", math.nan), {}, ValueError, r"kron_weights of layer '1' must be finite"),
        (
            lambda: nn.Sequential(PHConv2d(4, 4, 3, 2, device="meta")).eval(),
            {},
            ValueError,
            r"layer '0' is on the meta device: A holds no values",
        ),
        (
            lambda: PHMLinear(4, 4, 2, algebra_rank=2, device="meta").eval(),
            {},
            ValueError,
            r"layer '' is on the meta device: U holds no values",
        ),
        (lambda: PHMLinear(4, 4, 2).eval(), {"seed": -1}, ValueError, r"seed=-1"),
        (lambda: PHMLinear(4, 4, 2).eval(), {"max_growth": 0}, ValueError, r"max_growth=0 must be positive"),
        *(
            (lambda: nn.Linear(2, 2).eval(), {name: 1}, TypeError, rf"{name}=1 must be True or False")
            for name in ("inplace", "prepack", "fold_batchnorm", "fuse_relu", "progress", "verbose")
        ),
    ],
)
def test_bad_input(make, options, error, message):
    with pytest.raises(error, match=message):
        optimize_for_inference(make(), **options)


def test_failure_leaves_a_model_inplace_as_it_was():
    model = nn.Sequential(PHMLinear(4, 4, 2), poisoned("A", math.nan)).eval()
    with pytest.raises(ValueError, match=r"A of layer '1.1'"):
        optimize_for_inference(model, inplace=True)
    assert type(model[0]) is PHMLinear


@both
def test_parametrized_weights_are_the_ones_used(prepack):
    """A parametrization takes a parameter's place in the module; its value counts as anywhere in torch."""

    class Double(nn.Module):
        def forward(self, t):
            return 2 * t

    layer = quiet(PHMLinear(8, 12, 4, bias=False).eval(), prepack=prepack)
    x = torch.randn(3, 8)
    expected = 2 * layer(x)
    nn.utils.parametrize.register_parametrization(layer, "F_hat" if prepack else "F", Double())
    torch.testing.assert_close(layer(x), expected)


def test_prepacked_weights_are_combined_in_full_precision_under_autocast():
    torch.manual_seed(0)
    layer = PHMLinear(16, 16, 4).eval()
    expected = optimize_for_inference(layer, prepack=True, progress=False, verbose=False).F_hat
    with torch.autocast("cpu", torch.bfloat16):
        actual = optimize_for_inference(layer, prepack=True, progress=False, verbose=False).F_hat
    assert torch.equal(actual, expected)
