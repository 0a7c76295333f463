"""Layers: what they compute against the dense layer, their parameters, their initialisation, their errors."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from phydi_kernels import algebra
from phydi_kernels.nn import PHConv1d, PHConv2d, PHConv3d, PHMLinear, PHYDILinear, PHYDIResidual

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


def kronecker_sum(layer: nn.Module) -> torch.Tensor:
    """sum_i w_i kron(A_i, F_i) at each kernel position, by torch.kron."""
    w = torch.ones(layer.n, dtype=layer.A.dtype) if layer.kron_weights is None else layer.kron_weights
    n, p, q, *kernel = layer.F.shape
    F = layer.F.reshape(n, p, q, -1)
    positions = [sum(w[i] * torch.kron(layer.A[i], F[i, :, :, t]) for i in range(n)) for t in range(F.shape[-1])]
    return torch.stack(positions, -1).reshape(n * p, n * q, *kernel)


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("kron_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_dense_layer_of_its_kronecker_sum(kron_weights, bias, device):
    layer = PHMLinear(8, 12, 4, bias, kron_weights=kron_weights, dtype=torch.float64)
    randomize(layer)
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, kronecker_sum(layer), layer.bias)
    layer.to(device)
    torch.testing.assert_close(layer(x.to(device)).cpu(), expected)


@pytest.mark.parametrize("kron_weights", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution_is_the_dense_one_of_its_kronecker_sum(dims, kron_weights, device):
    options = {"stride": 2, "padding": (1, 2, 0)[:dims], "dilation": 2}
    kernel = (3, 2, 1)[:dims]
    layer = CONVS[dims](8, 12, kernel, 4, **options, kron_weights=kron_weights, dtype=torch.float64)
    randomize(layer)
    assert layer.F.shape == (4, 3, 2, *kernel)
    x = torch.randn(2, 8, *(9, 8, 7)[:dims], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = DENSE[dims](x, kronecker_sum(layer), layer.bias, **options)
    layer.to(device)
    torch.testing.assert_close(layer(x.to(device)).cpu(), expected)


def test_convolution_same_padding_keeps_the_size():
    layer = PHConv2d(4, 4, (3, 2), 2, padding="same", dilation=2)
    assert layer(torch.randn(1, 4, 6, 7)).shape == (1, 4, 6, 7)


@pytest.mark.parametrize("index", [0, 2, 3, 4], ids=["linear", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("kron_weights", [False, True])
def test_structure_and_dense_weight(index, kron_weights):
    layer, _ = layers(kron_weights=kron_weights, dtype=torch.float64)[index]
    randomize(layer)
    assert layer.structure().shape == (4, 4, 4)
    if kron_weights:
        for i in range(4):
            torch.testing.assert_close(layer.structure()[i], layer.kron_weights[i] * layer.A[i])
    else:
        assert layer.structure() is layer.A
    torch.testing.assert_close(layer.dense_weight(), kronecker_sum(layer))


def test_phydi_linear_is_the_identity_at_the_start_and_learns_to_leave_it():
    layer = PHYDILinear(8, 4, dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert layer.alpha.shape == (1,)
    assert torch.equal(layer(x), x)
    layer(x).square().sum().backward()
    expected = (2 * x * nn.functional.linear(x, layer.dense_weight(), layer.bias)).sum()
    torch.testing.assert_close(layer.alpha.grad, expected.detach().reshape(1))
    assert not layer.F.grad.any()


def test_phydi_linear_with_alpha():
    layer = PHYDILinear(8, 4, kron_weights=True, dtype=torch.float64)
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


@pytest.mark.parametrize("init", ["fan", algebra.quaternions(), 3 * algebra.random(4, 4, 4)], ids=["fan", "H", "other"])
def test_fan_keeps_the_variance_of_a_dense_layer(init):
    linear = sample_variance(lambda: PHMLinear(96, 32, 4, init=init), 40)
    assert linear == pytest.approx(2 / (96 + 32), rel=0.03)
    conv = sample_variance(lambda: PHConv2d(32, 64, 3, 4, init=init), 40)
    assert conv == pytest.approx(2 / (32 * 9), rel=0.03)


def test_fan_draws_the_algebra_with_variance_one_over_n():
    torch.manual_seed(0)
    A = PHMLinear(32, 32, 32).A.detach()
    assert A.mean().item() == pytest.approx(0, abs=0.005)
    assert A.square().mean().item() == pytest.approx(1 / 32, rel=0.03)


def test_reference_has_the_published_variance():
    linear = sample_variance(lambda: PHMLinear(96, 32, 4, init="reference"), 200)
    assert linear == pytest.approx(2 / (96 * (8 + 4)), rel=0.05)
    conv = sample_variance(lambda: PHConv2d(32, 64, 3, 4, init="reference"), 200)
    assert conv == pytest.approx(2 / (32 * 9 * (16 + 4)), rel=0.05)


def test_reference_is_xavier_uniform_on_the_stacks():
    torch.manual_seed(0)
    layer = PHConv2d(8, 12, 3, 4, init="reference")
    torch.manual_seed(0)
    expected = [nn.init.xavier_uniform_(torch.empty(shape)) for shape in ((4, 4, 4), (4, 3, 2, 3, 3))]
    assert torch.equal(layer.A, expected[0])
    assert torch.equal(layer.F, expected[1])


@pytest.mark.parametrize("init", ["fan", "reference"])
def test_bias_is_uniform_in_one_over_root_fan_in(init):
    torch.manual_seed(0)
    for layer, fan_in in ((PHMLinear(16, 4000, 4, init=init), 16), (PHConv1d(4, 4000, 4, 4, init=init), 16)):
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


def test_reset_parameters_draws_all_anew():
    layer = PHYDILinear(8, 4, kron_weights=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
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
    assert list(PHConv2d(8, 12, 3, 4, bias=False).state_dict()) == ["A", "F"]
    assert list(PHYDILinear(8, 4).state_dict()) == ["A", "F", "bias", "alpha"]
    assert list(PHYDIResidual(nn.Linear(2, 2)).state_dict()) == ["alpha", "module.weight", "module.bias"]


def test_extra_repr():
    assert repr(PHMLinear(8, 12, 4)) == "PHMLinear(in_features=8, out_features=12, n=4, bias=True)"
    assert repr(PHYDILinear(8, 4, False, kron_weights=True, learn_algebra=False)) == (
        "PHYDILinear(features=8, n=4, bias=False, kron_weights=True, learn_algebra=False)"
    )
    assert repr(PHConv1d(8, 12, 3, 4, padding="same")) == (
        "PHConv1d(8, 12, kernel_size=(3,), n=4, stride=(1,), padding='same', dilation=(1,), bias=True)"
    )


@each_layer
def test_deepcopy_pickle_and_state_dict_round_trips_after_forward_and_backward(index):
    layer, shape = layers(kron_weights=True)[index]
    randomize(layer)
    x = torch.randn(shape)
    y = layer(x)
    y.sum().backward()
    fresh, _ = layers(kron_weights=True)[index]
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


@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_argument_and_conversion(index, dtype):
    made, shape = layers(kron_weights=True, dtype=dtype)[index]
    moved = layers(kron_weights=True)[index][0].to(dtype)
    for layer in (made, moved):
        assert {p.dtype for p in layer.parameters()} == {dtype}
        y = layer(torch.randn(shape).to(dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()


@pytest.mark.parametrize("make", [PHConv1d, PHConv2d, PHConv3d])
def test_channels_last_conversion_of_a_model_leaves_F_contiguous(make):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(8, 12, 3, 4))
    F = model[1].F.detach().clone()
    model.to(torch.float64, memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].F.is_contiguous() and torch.equal(model[1].F, F.double())


def test_half_is_initialised_like_float():
    H = sample_variance(lambda: PHMLinear(96, 32, 4, dtype=torch.float16), 40)
    assert H == pytest.approx(2 / (96 + 32), rel=0.03)


@each_layer
def test_device_argument(index):
    layer, shape = layers(kron_weights=True, device="meta")[index]
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(shape, device="meta")).is_meta
    concrete = layer.to_empty(device="cpu")
    for module in concrete.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert concrete.state_dict().keys() == layer.state_dict().keys()


@each_layer
def test_replication(index):
    """As torch.nn.parallel.replicate: parameters become plain tensors set on a copy without any of its own."""
    layer, shape = layers(kron_weights=True)[index]
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


@each_layer
def test_gradients_reach_every_parameter(index):
    layer, shape = layers(kron_weights=True, dtype=torch.float64)[index]
    randomize(layer)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


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
