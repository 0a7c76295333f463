"""Layers: what they compute against the dense layer, their parameters, their initialisation, their errors."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from op_cases import dense_weight
from torch import nn

from phydi_kernels import algebra
from phydi_kernels.nn import PHConv1d, PHConv2d, PHConv3d, PHMLinear, PHYDILinear, PHYDIResidual, _init

DENSE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
CONVS = {1: PHConv1d, 2: PHConv2d, 3: PHConv3d}


def layers(**options):
    """One of each kind with an input for it."""
    return [
        (PHMLinear(8, 12, 4, **options), (5, 8)),
        (PHYDILinear(8, 4, **options), (5, 8)),
        (PHConv1d(8, 12, 3, 4, **options), (2, 8, 7)),
        (PHConv2d(8, 12, 3, 4, padding=1, **options), (2, 8, 5, 6)),
        (PHConv3d(8, 12, (1, 2, 3), 4, **options), (2, 8, 3, 4, 5)),
        (PHYDIResidual(PHMLinear(8, 8, 4, **options)), (5, 8)),
    ]


LAYER_IDS = ["linear", "phydi", "conv1d", "conv2d", "conv3d", "residual"]
each_layer = pytest.mark.parametrize("index", range(6), ids=LAYER_IDS)
each_rank = pytest.mark.parametrize("algebra_rank", [None, 5], ids=["A", "UVW"])


def algebra_of(layer: nn.Module) -> torch.Tensor:
    """A, or the sum over r of the outer products of U[r], V[r] and W[r]."""
    if layer.algebra_rank is None:
        return layer.A
    terms = zip(layer.U, layer.V, layer.W, strict=True)
    return sum(u[:, None, None] * v[:, None] * w for u, v, w in terms)


def kronecker_sum(layer: nn.Module) -> torch.Tensor:
    """sum_i w_i kron(A_i, F_i) at each kernel position."""
    A = algebra_of(layer)
    w = torch.ones(layer.n, dtype=A.dtype) if layer.kron_weights is None else layer.kron_weights
    return dense_weight(w[:, None, None] * A, layer.F)


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


@each_rank
@pytest.mark.parametrize("kron_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_dense_layer_of_its_kronecker_sum(kron_weights, bias, algebra_rank, device):
    options = {"algebra_rank": algebra_rank, "kron_weights": kron_weights, "dtype": torch.float64}
    layer = PHMLinear(8, 12, 4, bias, **options)
    randomize(layer)
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, kronecker_sum(layer), layer.bias)
    layer.to(device)
    torch.testing.assert_close(layer(x.to(device)).cpu(), expected)


@each_rank
@pytest.mark.parametrize("kron_weights", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution_is_the_dense_one_of_its_kronecker_sum(dims, kron_weights, algebra_rank, device):
    geometry = {"stride": 2, "padding": (1, 2, 0)[:dims], "dilation": 2}
    options = {"algebra_rank": algebra_rank, "kron_weights": kron_weights, "dtype": torch.float64}
    kernel = (3, 2, 1)[:dims]
    layer = CONVS[dims](8, 12, kernel, 4, **geometry, **options)
    randomize(layer)
    assert layer.F.shape == (4, 3, 2, *kernel)
    x = torch.randn(2, 8, *(9, 8, 7)[:dims], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = DENSE[dims](x, kronecker_sum(layer), layer.bias, **geometry)
    layer.to(device)
    torch.testing.assert_close(layer(x.to(device)).cpu(), expected)


def test_convolution_same_padding_keeps_the_size():
    layer = PHConv2d(4, 4, (3, 2), 2, padding="same", dilation=2)
    assert layer(torch.randn(1, 4, 6, 7)).shape == (1, 4, 6, 7)


@each_rank
@pytest.mark.parametrize("index", [0, 2, 3, 4], ids=["linear", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("kron_weights", [False, True])
def test_structure_and_dense_weight(index, kron_weights, algebra_rank):
    layer, _ = layers(algebra_rank=algebra_rank, kron_weights=kron_weights, dtype=torch.float64)[index]
    randomize(layer)
    assert layer.structure().shape == (4, 4, 4)
    if kron_weights:
        for i in range(4):
            torch.testing.assert_close(layer.structure()[i], layer.kron_weights[i] * algebra_of(layer)[i])
    elif algebra_rank is None:
        assert layer.structure() is layer.A
    else:
        torch.testing.assert_close(layer.structure(), algebra_of(layer))
    torch.testing.assert_close(layer.dense_weight(), kronecker_sum(layer))


@each_rank
def test_phydi_linear_is_the_identity_at_the_start_and_learns_to_leave_it(algebra_rank):
    layer = PHYDILinear(8, 4, algebra_rank=algebra_rank, dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert layer.alpha.shape == (1,)
    assert torch.equal(layer(x), x)
    layer(x).square().sum().backward()
    expected = (2 * x * nn.functional.linear(x, layer.dense_weight(), layer.bias)).sum()
    torch.testing.assert_close(layer.alpha.grad, expected.detach().reshape(1))
    assert not layer.F.grad.any()


@each_rank
def test_phydi_linear_with_alpha(algebra_rank):
    layer = PHYDILinear(8, 4, algebra_rank=algebra_rank, kron_weights=True, dtype=torch.float64)
    randomize(layer)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = x + layer.alpha * nn.functional.linear(x, kronecker_sum(layer), layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_phydi_residual():
    inner = nn.Linear(6, 6, dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(PHYDIResidual(inner)(x), x)
    layer = PHYDIResidual(inner, alpha=0.5)
    assert layer.alpha.tolist() == [0.5]
    assert layer.alpha.dtype == torch.float64
    torch.testing.assert_close(layer(x), x + 0.5 * inner(x))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_phydi_layers_reset_alpha(alpha):
    layers = [(PHYDIResidual(nn.Linear(4, 4), alpha), alpha), (PHYDILinear(8, 4), 0.0)]
    for layer, start in layers:
        nn.init.constant_(layer.alpha, 7.0)
        layer.reset_parameters()
        assert layer.alpha.item() == start


def test_phydi_residual_around_a_lazy_module():
    layer = PHYDIResidual(nn.LazyLinear(4))
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), x)


def test_phydi_residual_around_a_module_without_parameters():
    layer = PHYDIResidual(nn.ReLU(), alpha=2)
    assert layer(torch.tensor([-1.0, 3.0])).tolist() == [-1.0, 9.0]


def test_phydi_residual_rejects_what_it_cannot_add():
    with pytest.raises(ValueError, match=r"Linear returned shape \(5, 3\) for an input of shape \(5, 6\)"):
        PHYDIResidual(nn.Linear(6, 3))(torch.randn(5, 6))
    with pytest.raises(ValueError, match=r"Sequential returned shape \(1, 6\) for an input of shape \(6,\)"):
        PHYDIResidual(nn.Sequential(nn.Unflatten(0, (1, 6)), nn.Linear(6, 6)))(torch.randn(6))
    with pytest.raises(TypeError, match=r"LSTM returned tuple; it must return a tensor"):
        PHYDIResidual(nn.LSTM(6, 6))(torch.randn(5, 6))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, not function"):
        PHYDIResidual(lambda x: x)
    for alpha in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"alpha={alpha} must be a finite number"):
            PHYDIResidual(nn.ReLU(), alpha)
    with pytest.raises(TypeError, match=r"alpha='0' must be a finite number, not str"):
        PHYDIResidual(nn.ReLU(), "0")


def sample_variance(make, count: int) -> float:
    """Mean square of the entries of H over many fresh layers."""
    torch.manual_seed(0)
    return sum(make().dense_weight().square().mean().item() for _ in range(count)) / count


@pytest.mark.parametrize("algebra_rank", [None, 8], ids=["A", "UVW"])
@pytest.mark.parametrize("init", ["fan", algebra.quaternions(), 3 * algebra.random(4, 4, 4)], ids=["fan", "H", "other"])
def test_fan_keeps_the_variance_of_a_dense_layer(init, algebra_rank):
    options = {"algebra_rank": algebra_rank, "init": init}
    linear = sample_variance(lambda: PHMLinear(96, 32, 4, **options), 40)
    assert linear == pytest.approx(2 / (96 + 32), rel=0.03)
    conv = sample_variance(lambda: PHConv2d(32, 64, 3, 4, **options), 40)
    assert conv == pytest.approx(2 / (32 * 9), rel=0.03)


def test_fan_draws_the_algebra_with_variance_one_over_n():
    torch.manual_seed(0)
    A = PHMLinear(32, 32, 32).A.detach()
    assert A.mean().item() == pytest.approx(0, abs=0.005)
    assert A.square().mean().item() == pytest.approx(1 / 32, rel=0.03)


@pytest.mark.parametrize(("init", "variance"), [("fan", 1 / 8), ("reference", 1 / 64)])
def test_terms_are_drawn_for_the_variance_of_a_learned_algebra(init, variance):
    torch.manual_seed(0)
    layers = [PHMLinear(8, 8, 8, algebra_rank=24, init=init) for _ in range(100)]
    for name in ("U", "V", "W"):
        factors = torch.stack([getattr(layer, name).detach() for layer in layers])
        assert factors.mean().item() == pytest.approx(0, abs=0.01)
        assert factors.square().mean().item() == pytest.approx((variance / 24) ** (1 / 3), rel=0.03)
    A = torch.stack([layer.structure().detach() for layer in layers])
    assert A.square().mean().item() == pytest.approx(variance, rel=0.05)


# The size of A varies more from layer to layer where its entries are sums of products of three.
@pytest.mark.parametrize(("algebra_rank", "count", "tolerance"), [(None, 200, 0.05), (7, 1000, 0.1)], ids=["A", "UVW"])
def test_reference_has_the_published_variance(algebra_rank, count, tolerance):
    options = {"algebra_rank": algebra_rank, "init": "reference"}
    linear = sample_variance(lambda: PHMLinear(96, 32, 4, **options), count)
    assert linear == pytest.approx(2 / (96 * (8 + 4)), rel=tolerance)
    conv = sample_variance(lambda: PHConv2d(32, 64, 3, 4, **options), count)
    assert conv == pytest.approx(2 / (32 * 9 * (16 + 4)), rel=tolerance)


def test_reference_is_xavier_uniform_on_the_stacks():
    torch.manual_seed(0)
    layer = PHConv2d(8, 12, 3, 4, init="reference")
    torch.manual_seed(0)
    expected = [nn.init.xavier_uniform_(torch.empty(shape)) for shape in ((4, 4, 4), (4, 3, 2, 3, 3))]
    assert torch.equal(layer.A, expected[0])
    assert torch.equal(layer.F, expected[1])


@each_rank
@pytest.mark.parametrize("init", ["fan", "reference"])
def test_bias_is_uniform_in_one_over_root_fan_in(init, algebra_rank):
    torch.manual_seed(0)
    for layer, fan_in in (
        (PHMLinear(16, 4000, 4, algebra_rank=algebra_rank, init=init), 16),
        (PHConv1d(4, 4000, 4, 4, algebra_rank=algebra_rank, init=init), 16),
    ):
        bound = 1 / math.sqrt(fan_in)
        assert layer.bias.abs().max().item() <= bound
        assert layer.bias.var().item() == pytest.approx(bound**2 / 3, rel=0.1)


def test_given_algebra_is_copied_frozen_and_restored():
    A = algebra.quaternions()
    layer = PHMLinear(8, 12, 4, init=A, learn_algebra=False)
    A.zero_()
    assert torch.equal(layer.A, algebra.quaternions().float())
    assert not layer.A.requires_grad
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.A.grad is None
    assert layer.F.grad.any()
    assert list(layer.state_dict()) == ["A", "F", "bias"]
    randomize(layer)
    layer.reset_parameters()
    assert torch.equal(layer.A, algebra.quaternions().float())
    assert PHMLinear(8, 12, 4, init=algebra.quaternions()).A.requires_grad


def test_given_algebra_is_decomposed_frozen_and_restored():
    A = algebra.quaternions()
    layer = PHMLinear(8, 12, 4, algebra_rank=8, init=A, learn_algebra=False, dtype=torch.float64)
    A.zero_()
    torch.testing.assert_close(layer.structure(), algebra.quaternions())
    sizes = [getattr(layer, name).norm(dim=1) for name in ("U", "V", "W")]
    assert (sizes[0] > 0).all()
    torch.testing.assert_close(sizes[1:], sizes[:1] * 2)
    layer(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    assert all(getattr(layer, name).grad is None for name in ("U", "V", "W"))
    assert layer.F.grad.any()
    assert list(layer.state_dict()) == ["U", "V", "W", "F", "bias"]
    randomize(layer)
    layer.reset_parameters()
    torch.testing.assert_close(layer.structure(), algebra.quaternions())


def test_spare_terms_add_nothing_and_learn():
    """The complex numbers need three terms."""
    layer = PHMLinear(8, 12, 2, algebra_rank=4, init=algebra.complex_numbers(), dtype=torch.float64)
    torch.testing.assert_close(layer.structure(), algebra.complex_numbers())
    layer(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
    assert all(layer.U.grad.any(1))
    with torch.no_grad():
        layer.U -= layer.U.grad
    layer(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
    assert all(layer.V.grad.any(1)) and all(layer.W.grad.any(1))


@each_rank
def test_reset_parameters_draws_all_anew(algebra_rank):
    layer = PHYDILinear(8, 4, algebra_rank=algebra_rank, kron_weights=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() and (p.any() or p is layer.alpha) for p in layer.parameters())
    assert layer.alpha.tolist() == [0.0]
    assert layer.kron_weights.tolist() == [1.0] * 4


def test_state_dict_names_and_shapes():
    linear = PHMLinear(8, 12, 4, kron_weights=True)
    assert {k: tuple(v.shape) for k, v in linear.state_dict().items()} == {
        "A": (4, 4, 4),
        "F": (4, 3, 2),
        "bias": (12,),
        "kron_weights": (4,),
    }
    factored = PHConv2d(8, 12, 3, 4, algebra_rank=5, kron_weights=True)
    assert {k: tuple(v.shape) for k, v in factored.state_dict().items()} == {
        **{name: (5, 4) for name in ("U", "V", "W")},
        "F": (4, 3, 2, 3, 3),
        "bias": (12,),
        "kron_weights": (4,),
    }
    assert list(PHConv2d(8, 12, 3, 4, bias=False).state_dict()) == ["A", "F"]
    assert list(PHYDILinear(8, 4).state_dict()) == ["A", "F", "bias", "alpha"]
    assert list(PHYDIResidual(nn.Linear(2, 2)).state_dict()) == ["alpha", "module.weight", "module.bias"]


def test_extra_repr():
    assert repr(PHMLinear(8, 12, 4)) == "PHMLinear(in_features=8, out_features=12, n=4, bias=True)"
    assert repr(PHYDILinear(8, 4, False, kron_weights=True, learn_algebra=False)) == (
        "PHYDILinear(features=8, n=4, bias=False, kron_weights=True, learn_algebra=False)"
    )
    assert repr(PHMLinear(8, 8, 4, algebra_rank="generic", kron_weights=True, learn_algebra=False)) == (
        "PHMLinear(in_features=8, out_features=8, n=4, bias=True, algebra_rank=7, kron_weights=True, "
        "learn_algebra=False)"
    )
    assert repr(PHConv1d(8, 12, 3, 4, padding="same")) == (
        "PHConv1d(8, 12, kernel_size=(3,), n=4, stride=(1,), padding='same', dilation=(1,), bias=True)"
    )


@each_rank
@each_layer
def test_deepcopy_pickle_and_state_dict_round_trips_after_forward_and_backward(index, algebra_rank):
    layer, shape = layers(algebra_rank=algebra_rank, kron_weights=True)[index]
    randomize(layer)
    x = torch.randn(shape)
    y = layer(x)
    y.sum().backward()
    fresh, _ = layers(algebra_rank=algebra_rank, kron_weights=True)[index]
    fresh.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
        fresh,
    ]
    for other in others:
        assert torch.equal(other(x), y)
        assert other.state_dict().keys() == layer.state_dict().keys()


@each_rank
@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_argument_and_conversion(index, algebra_rank, dtype):
    options = {"algebra_rank": algebra_rank, "kron_weights": True}
    made, shape = layers(**options, dtype=dtype)[index]
    moved = layers(**options)[index][0].to(dtype)
    for layer in (made, moved):
        assert {p.dtype for p in layer.parameters()} == {dtype}
        y = layer(torch.randn(shape).to(dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()


@each_rank
@pytest.mark.parametrize("make", [PHConv1d, PHConv2d, PHConv3d])
def test_channels_last_conversion_of_a_model_leaves_parameters_contiguous(make, algebra_rank):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(8, 12, 3, 4, algebra_rank=algebra_rank))
    before = copy.deepcopy(model[1].state_dict())
    model.to(torch.float64, memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, p in model[1].named_parameters():
        assert p.is_contiguous() and torch.equal(p, before[name].double()), name


@each_rank
def test_half_is_initialised_like_float(algebra_rank):
    H = sample_variance(lambda: PHMLinear(96, 32, 4, algebra_rank=algebra_rank, dtype=torch.float16), 40)
    assert H == pytest.approx(2 / (96 + 32), rel=0.03)


@each_rank
@each_layer
def test_device_argument(index, algebra_rank):
    layer, shape = layers(algebra_rank=algebra_rank, kron_weights=True, device="meta")[index]
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(shape, device="meta")).is_meta
    concrete = layer.to_empty(device="cpu")
    for module in concrete.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert concrete.state_dict().keys() == layer.state_dict().keys()


@each_rank
@each_layer
def test_replication(index, algebra_rank):
    """As torch.nn.parallel.replicate: parameters become plain tensors set on a copy without any of its own."""
    layer, shape = layers(algebra_rank=algebra_rank, kron_weights=True)[index]
    randomize(layer)
    modules = list(layer.modules())
    replicas = [m._replicate_for_data_parallel() for m in modules]
    copies = []
    for module, replica in zip(modules, replicas, strict=True):
        for name, child in module._modules.items():
            setattr(replica, name, replicas[modules.index(child)])
        for name, p in module._parameters.items():
            if p is None:
                replica._parameters[name] = None
            else:
                copies.append(p.detach().clone().requires_grad_())
                setattr(replica, name, copies[-1])
    x = torch.randn(shape)
    y = replicas[0](x)
    assert torch.equal(y, layer(x))
    grads = torch.autograd.grad(y.sum(), copies)
    assert len(grads) == len(list(layer.parameters()))
    assert all(p.grad is None for p in layer.parameters())


@each_rank
@each_layer
def test_gradients_reach_every_parameter(index, algebra_rank):
    layer, shape = layers(algebra_rank=algebra_rank, kron_weights=True, dtype=torch.float64)[index]
    randomize(layer)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("kron_weights", [False, True])
@pytest.mark.parametrize("index", range(5), ids=LAYER_IDS[:5])
def test_gradients_of_the_terms_follow_from_those_of_A(index, kron_weights):
    """dU[r, i] = sum_kl dA[i, k, l] V[r, k] W[r, l], and so on; all other gradients are those of the layer with A."""
    options = {"kron_weights": kron_weights, "dtype": torch.float64}
    factored, shape = layers(algebra_rank=5, **options)[index]
    dense, _ = layers(**options)[index]
    randomize(factored)
    with torch.no_grad():
        dense.A.copy_(algebra_of(factored))
        for name, p in dense.named_parameters():
            if name != "A":
                p.copy_(factored.get_parameter(name))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(i) for layer, i in zip((factored, dense), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    U, V, W, dA = factored.U, factored.V, factored.W, dense.A.grad
    for i, name in enumerate(("U", "V", "W")):
        others = [t for j, t in enumerate((U, V, W)) if j != i]
        expected = torch.stack(
            [(dA.movedim(i, 0) * torch.outer(a, b)).sum((1, 2)) for a, b in zip(*others, strict=True)]
        )
        torch.testing.assert_close(factored.get_parameter(name).grad, expected)
    for name, p in dense.named_parameters():
        if name != "A":
            torch.testing.assert_close(p.grad, factored.get_parameter(name).grad)


@each_layer
@each_rank
def test_compile_and_export(index, algebra_rank):
    layer, shape = layers(algebra_rank=algebra_rank, kron_weights=True)[index]
    randomize(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(
        layer, (torch.randn(4, *shape[1:]),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    x = torch.randn(shape)
    y = layer(x)
    grads = torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert torch.equal(compiled(x), y)
    assert torch.equal(exported.module()(x), y)
    for actual, expected in zip(torch.autograd.grad(compiled(x).sum(), list(layer.parameters())), grads, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (2, 3), (3, 5), (4, 7), (8, 24)])
def test_generic_rank(n, rank):
    layer = PHMLinear(2 * n, n, n, algebra_rank="generic")
    assert layer.algebra_rank == rank
    assert layer.U.shape == layer.V.shape == layer.W.shape == (rank, n)
    assert layer(torch.randn(3, 2 * n)).shape == (3, n)


def test_layers_of_one_algebra_decompose_it_once(monkeypatch):
    calls = []
    _init._balanced_terms.cache_clear()
    monkeypatch.setattr(_init, "decompose", lambda A, rank: calls.append(rank) or algebra.decompose(A, rank))
    A = algebra.random(3, 3, 3, generator=torch.Generator().manual_seed(5))
    made = [PHMLinear(6, 6, 3, algebra_rank=rank, init=A) for rank in (5, 5, 6)]
    made[0].reset_parameters()
    assert calls == [5, 6]
    for layer in made:
        torch.testing.assert_close(layer.structure(), A.float())


def test_algebra_is_decomposed_where_the_default_device_is_another():
    A = algebra.random(3, 3, 3, generator=torch.Generator().manual_seed(6))
    _init._balanced_terms.cache_clear()
    with torch.device("meta"):
        layer = PHMLinear(6, 9, 3, algebra_rank=5, init=A)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(layer.structure(), A.float())


def test_algebra_of_too_few_terms():
    with pytest.raises(algebra.DecompositionError, match=r"no algorithm of rank 4") as caught:
        PHMLinear(8, 12, 4, algebra_rank=4, init=algebra.quaternions())
    assert caught.value.rank == 4
    assert caught.value.residual > 0.1


RANKS = r'must be None, "generic" or an integer from 1 to n\*n = 16'
LINEAR_ERRORS = [
    (lambda: PHMLinear(10, 8, 4), ValueError, r"in_features=10 is not divisible by n=4"),
    (lambda: PHMLinear(8, 10, 4), ValueError, r"out_features=10 is not divisible by n=4"),
    (lambda: PHMLinear(0, 8, 4), ValueError, r"in_features=0 must be an integer >= 1"),
    (lambda: PHMLinear(8.0, 8, 4), TypeError, r"in_features=8.0 must be an integer >= 1, not float"),
    (lambda: PHMLinear(8, 8, 0), ValueError, r"n=0 must be an integer >= 1"),
    (lambda: PHMLinear(8, 8, -2), ValueError, r"n=-2 must be an integer >= 1"),
    (lambda: PHMLinear(8, 8, 2.0), TypeError, r"n=2.0 must be an integer >= 1, not float"),
    (lambda: PHMLinear(8, 8, True), TypeError, r"n=True must be an integer >= 1, not bool"),
    (lambda: PHYDILinear(10, 4), ValueError, r"features=10 is not divisible by n=4"),
    (
        lambda: PHMLinear(8, 8, 4, dtype=torch.int64),
        TypeError,
        r"dtype=torch.int64 is not one of torch.float32",
    ),
    (lambda: PHMLinear(8, 8, 4, dtype=torch.complex64), TypeError, r"dtype=torch.complex64 is not one of"),
    (lambda: PHMLinear(8, 8, 4, dtype="float32"), TypeError, "dtype='float32' is not one of torch.float32"),
    (lambda: PHMLinear(8, 8, 4, algebra.quaternions()), TypeError, "bias=tensor"),
    (lambda: PHMLinear(8, 8, 4, algebra_rank=0), ValueError, rf"algebra_rank=0 {RANKS}"),
    (lambda: PHMLinear(8, 8, 4, algebra_rank=-7), ValueError, rf"algebra_rank=-7 {RANKS}"),
    (lambda: PHYDILinear(8, 4, algebra_rank=17), ValueError, rf"algebra_rank=17 {RANKS}"),
    (lambda: PHMLinear(8, 8, 4, algebra_rank=7.0), TypeError, rf"algebra_rank=7.0 {RANKS}, not float"),
    (lambda: PHMLinear(8, 8, 4, algebra_rank=True), TypeError, rf"algebra_rank=True {RANKS}, not bool"),
    (lambda: PHMLinear(8, 8, 4, algebra_rank="7"), ValueError, rf"algebra_rank='7' {RANKS}"),
    (lambda: PHMLinear(8, 8, 4, kron_weights="yes"), TypeError, "kron_weights='yes' must be True or False"),
    (lambda: PHMLinear(8, 8, 4, learn_algebra=None), TypeError, "learn_algebra=None must be True or False"),
    (lambda: PHMLinear(8, 8, 4, init=algebra.quaternions(device="meta")), ValueError, "init is on the meta device"),
    (lambda: PHMLinear(8, 8, 4, init="xavier"), ValueError, r"init='xavier' is not one of \"fan\", \"reference\""),
    (lambda: PHMLinear(8, 8, 4, init=None), TypeError, r"init must be .* not NoneType"),
    (
        lambda: PHMLinear(8, 8, 4, init=algebra.octonions()),
        ValueError,
        r"init has shape \(8, 8, 8\); it must be .* = \(4, 4, 4\)",
    ),
    (lambda: PHMLinear(8, 8, 4, init=algebra.quaternions().cfloat()), TypeError, r"init has dtype torch.complex64"),
    (lambda: PHMLinear(8, 8, 4, init=algebra.quaternions().int()), TypeError, r"init has dtype torch.int32"),
    (lambda: PHMLinear(8, 8, 4, init=algebra.quaternions() * math.nan), ValueError, r"init must be finite"),
    (lambda: PHMLinear(8, 8, 4, init=torch.zeros(4, 4, 4)), ValueError, r"init must be .* not zero everywhere"),
]
CONV_ERRORS = [
    (lambda: PHConv2d(8, 8, 3, 4, algebra_rank=17), ValueError, rf"algebra_rank=17 {RANKS}"),
    (lambda: PHConv2d(10, 8, 3, 4), ValueError, r"in_channels=10 is not divisible by n=4"),
    (lambda: PHConv2d(8, 10, 3, 4), ValueError, r"out_channels=10 is not divisible by n=4"),
    (lambda: PHConv2d(8, 8, 0, 4), ValueError, r"kernel_size=0 must be an integer >= 1"),
    (lambda: PHConv2d(8, 8, 3.0, 4), TypeError, r"kernel_size=3.0 must be an integer >= 1, not float"),
    (lambda: PHConv2d(8, 8, (3, 3, 3), 4), ValueError, r"kernel_size=\(3, 3, 3\) has 3 entries; .* one integer or 2"),
    (lambda: PHConv2d(8, 8, "3", 4), TypeError, r"kernel_size='3' must be an integer >= 1, not str"),
    (lambda: PHConv2d(8, 8, 3, 4, stride=0), ValueError, r"stride=0 must be an integer >= 1"),
    (lambda: PHConv2d(8, 8, 3, 4, padding=-1), ValueError, r"padding=-1 must be an integer >= 0"),
    (lambda: PHConv2d(8, 8, 3, 4, padding="half"), ValueError, r"padding='half' is not one of \"valid\", \"same\""),
    (lambda: PHConv2d(8, 8, 3, 4, 2, "same"), ValueError, r'padding="same" needs stride 1, not \(2, 2\)'),
    (lambda: PHConv2d(8, 8, 3, 4, dilation=(1, 0)), ValueError, r"dilation=0 must be an integer >= 1"),
]


@pytest.mark.parametrize(("make", "error", "message"), LINEAR_ERRORS + CONV_ERRORS)
def test_constructor_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
