"""Checkpoints of the published layers and models, which are written anew here from their formulas and names."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from functools import partial

import pytest
import torch
from helpers import normal
from op_cases import dense_weight
from torch import Tensor, nn
from torch.nn import functional

from phydi_kernels import algebra, models, optimize_for_inference
from phydi_kernels.convert import load_reference_state_dict
from phydi_kernels.models import PHTransformerLM
from phydi_kernels.nn import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHMEmbedding,
    PHMLinear,
    PHMMultiheadAttention,
    PHTransformerDecoderLayer,
    PHTransformerEncoderLayer,
    PHYDILinear,
)

f64 = {"dtype": torch.float64}
CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
OURS = {1: PHConv1d, 2: PHConv2d, 3: PHConv3d}


class Hypercomplex(nn.Module):
    """A, a stack of weights and a bias, under the published names."""

    def __init__(self, n, shape, features, names):
        super().__init__()
        self.names = names
        for name, size in zip(names, ((n, n, n), (n, *shape)), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(size)))
        self.register_parameter("bias", None if features is None else nn.Parameter(torch.empty(features)))

    def weight(self):
        return dense_weight(*(getattr(self, name) for name in self.names))


class Linear(Hypercomplex):
    def __init__(self, n, in_features, out_features, names=("A", "S")):
        super().__init__(n, (out_features // n, in_features // n), out_features, names)

    def forward(self, x):
        return functional.linear(x, self.weight(), self.bias)


class WeightedLinear(Linear):
    def __init__(self, n, in_features, out_features):
        super().__init__(n, in_features, out_features)
        self.kron_weights = nn.Parameter(torch.empty(n))

    def forward(self, x):
        H = dense_weight(self.kron_weights.view(-1, 1, 1) * self.A, self.S)
        return functional.linear(x, H, self.bias)


class Conv(Hypercomplex):
    """Its bias is a parameter, and not added."""

    def __init__(self, n, in_channels, out_channels, kernel_size, padding=0, stride=1, dilation=1, dims=2, names="AF"):
        shape = out_channels // n, in_channels // n, *(kernel_size,) * dims
        super().__init__(n, shape, out_channels, tuple(names))
        self.convolve = partial(CONVOLVE[dims], stride=stride, padding=padding, dilation=dilation)

    def forward(self, x):
        return self.convolve(x, self.weight())


class Embedding(Hypercomplex):
    def __init__(self, n, num_embeddings, embedding_dim):
        super().__init__(n, (num_embeddings // n, embedding_dim // n), None, ("A", "S"))

    def forward(self, tokens):
        return self.weight()[tokens]


class Block(nn.Module):
    def __init__(self, conv, in_channels, width, stride, bottleneck, rezero):
        super().__init__()
        if bottleneck:
            sizes = [(in_channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        else:
            sizes = [(in_channels, width, 3, stride), (width, width, 3, 1)]
        self.length = len(sizes)
        for i, (size_in, size_out, kernel, step) in enumerate(sizes, start=1):
            self.add_module(f"conv{i}", conv(size_in, size_out, kernel, kernel // 2, step))
            self.add_module(f"bn{i}", nn.BatchNorm2d(size_out))
        out = sizes[-1][1]
        same = stride == 1 and in_channels == out
        self.shortcut = (
            nn.Sequential() if same else nn.Sequential(conv(in_channels, out, 1, 0, stride), nn.BatchNorm2d(out))
        )
        if rezero:
            self.res_weight = nn.Parameter(torch.empty(1))

    def forward(self, x):
        y = x
        for i in range(1, self.length + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.length else y
        if hasattr(self, "res_weight"):
            return self.shortcut(x) + self.res_weight * y.relu()
        return (self.shortcut(x) + y).relu()


def dense_conv(in_channels, out_channels, kernel_size, padding, stride):
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)


class ResNet(nn.Module):
    BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 152: (3, 8, 36, 3)}

    def __init__(self, depth, n, widths=(64, 128, 256, 512), rezero=False, names="AF"):
        super().__init__()
        conv = dense_conv if n == 1 else partial(Conv, n, names=names)
        self.zero_channels = -3 % n
        channels = widths[0]
        self.conv1 = conv(3 + self.zero_channels, channels, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        for stage, (width, count) in enumerate(zip(widths, self.BLOCKS[depth], strict=True), start=1):
            blocks = []
            for i in range(count):
                blocks.append(Block(conv, channels, width, 2 if stage > 1 and i == 0 else 1, depth > 18, rezero))
                channels = width if depth == 18 else 4 * width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, 10)

    def forward(self, x):
        zeros = x.new_zeros(len(x), self.zero_channels, *x.shape[2:])
        y = self.bn1(self.conv1(torch.cat((zeros, x), 1))).relu()
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.linear(functional.avg_pool2d(y, 4).flatten(1))


class Attention(nn.Module):
    """Of (length, batch, d)."""

    def __init__(self, n, d, heads):
        super().__init__()
        self.heads = heads
        self.A = nn.Parameter(torch.empty(n, n, n))
        self.S = nn.Parameter(torch.empty(n, 3 * d // n, d // n))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * d))
        self.out_proj = Linear(n, d, d)

    def forward(self, x, mask):
        L, N, d = x.shape
        projected = functional.linear(x, dense_weight(self.A, self.S), self.in_proj_bias)
        q, k, v = (t.reshape(L, N * self.heads, -1).transpose(0, 1) for t in projected.chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(d // self.heads) + mask, -1)
        return self.out_proj((weights @ v).transpose(0, 1).reshape(L, N, d))


class EncoderLayer(nn.Module):
    """``norm``: "pre", "post", or "None", a text, whose normalisations are not used."""

    def __init__(self, n, d, heads, feed, norm, rezero):
        super().__init__()
        self.norm = norm
        self.self_attn = Attention(n, d, heads)
        self.linear1, self.linear2 = Linear(n, d, feed), Linear(n, feed, d)
        if rezero:
            self.res_weight1, self.res_weight2 = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
        self.rezero = rezero
        if norm is not None:
            self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x, mask):
        branches = (lambda y: self.self_attn(y, mask), lambda y: self.linear2(self.linear1(y).relu()))
        for i, branch in enumerate(branches, start=1):
            y = branch(getattr(self, f"ln{i}")(x) if self.norm == "pre" else x)
            x = x + (getattr(self, f"res_weight{i}") * y if self.rezero else y)
            x = getattr(self, f"ln{i}")(x) if self.norm == "post" else x
        return x


class LanguageModel(nn.Module):
    """Of tokens (length, batch)."""

    def __init__(self, n, heads, num_layers, d, tokens, feed, norm, rezero):
        super().__init__()
        self.d = d
        self.transformer_encoder = nn.Module()
        self.transformer_encoder.layers = nn.ModuleList(
            EncoderLayer(n, d, heads, feed, norm, rezero) for _ in range(num_layers)
        )
        self.generator = Linear(n, d, tokens)
        self.src_tok_emb = nn.Module()
        self.src_tok_emb.embedding = Embedding(n, tokens, d)
        self.positional_encoding = nn.Module()
        angles = torch.arange(5000, **f64).unsqueeze(1) / 10000 ** (torch.arange(0, d, 2, **f64) / d)
        positions = torch.stack((angles.sin(), angles.cos()), -1).flatten(1).unsqueeze(1)
        self.positional_encoding.register_buffer("pos_embedding", positions)

    def forward(self, tokens):
        x = self.src_tok_emb.embedding(tokens) * math.sqrt(self.d) * math.sqrt(self.d)
        x = x + self.positional_encoding.pos_embedding[: len(tokens)]
        mask = torch.full((len(tokens),) * 2, -math.inf, **f64).triu(1)
        for layer in self.transformer_encoder.layers:
            x = layer(x, mask)
        return self.generator(x)


def randomized(module: nn.Module) -> nn.Module:
    """In float64, with all entries random but positions and idle normalisations."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    for name, value in module.state_dict().items():
        leaf = name.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            value.fill_(7)
        elif leaf == "running_var":
            value.uniform_(0.5, 1.5, generator=generator)
        elif leaf != "pos_embedding":
            fan = math.prod(value.shape[2:]) if value.dim() > 2 else value.shape[-1] if value.dim() == 2 else 1
            value.normal_(std=fan**-0.5, generator=generator)
    for layer in module.modules():
        if isinstance(layer, EncoderLayer) and layer.norm == "None":
            layer.ln1.reset_parameters()
            layer.ln2.reset_parameters()
    return module


def assert_equal_outputs(ours: nn.Module, published: nn.Module, x: Tensor) -> None:
    expected = published(x)
    y = ours(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def load_all(ours: nn.Module, published: nn.Module) -> None:
    """Strictly, with the given state_dict untouched."""
    state = published.state_dict()
    names, before = list(state), copy.deepcopy(state)
    result = load_reference_state_dict(ours, state)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert list(state) == names
    assert all(torch.equal(state[name], before[name]) for name in names)


def failure(ours: nn.Module, state: dict[str, Tensor], *, strict: bool = True) -> str:
    """The message of a load that fails, and leaves the module as it was."""
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError) as error:
        load_reference_state_dict(ours, state, strict=strict)
    after = ours.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return str(error.value)


# Layers


@pytest.mark.parametrize("names", [("A", "S"), ("a", "s")], ids=["PHYDI", "HyperNets"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_linear(n, names):
    published, ours = randomized(Linear(n, 12, 24, names)), PHMLinear(12, 24, n, **f64)
    load_all(ours, published)
    assert_equal_outputs(ours, published, normal((5, 12), 1))


def test_weighted_linear():
    published, ours = randomized(WeightedLinear(4, 12, 24)), PHMLinear(12, 24, 4, kron_weights=True, **f64)
    load_all(ours, published)
    assert_equal_outputs(ours, published, normal((5, 12), 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("names", ["AF", "as"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution(dims, names, bias):
    geometry = {"padding": 2, "stride": 2, "dilation": 2}
    published = randomized(Conv(2, 4, 6, 3, **geometry, dims=dims, names=names))
    ours = OURS[dims](4, 6, 3, 2, bias=bias, **geometry, **f64)
    load_all(ours, published)
    assert_equal_outputs(ours, published, normal((2, 4, *(7,) * dims), 1))


def test_bias_of_a_convolution_becomes_zero():
    ours = PHConv2d(4, 4, 3, 2, **f64)
    load_all(ours, randomized(Conv(2, 4, 4, 3)))
    assert ours.bias.requires_grad and not ours.bias.any()


def test_embedding():
    published, ours = randomized(Embedding(4, 20, 12)), PHMEmbedding(20, 12, 4, **f64)
    load_all(ours, published)
    assert_equal_outputs(ours, published, torch.arange(20))


@pytest.mark.parametrize("algebra_rank", [None, 7])
def test_attention(algebra_rank):
    published = randomized(Attention(4, 16, 2))
    ours = PHMMultiheadAttention(16, 2, 4, algebra_rank=algebra_rank, **f64)
    load_all(ours, published)
    x, mask = normal((5, 3, 16), 1), torch.zeros(5, 5, **f64)
    torch.testing.assert_close(ours(x, x, x)[0], published(x, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_encoder_layer(norm):
    published = randomized(EncoderLayer(4, 16, 2, 24, norm, False))
    ours = PHTransformerEncoderLayer(16, 2, 4, 24, 0.0, norm=norm, **f64)
    load_all(ours, published)
    x = normal((5, 3, 16), 1)
    torch.testing.assert_close(ours(x), published(x, torch.zeros(5, 5, **f64)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("algebra_rank", [7, 8, "generic"])
def test_algebra_of_terms(algebra_rank):
    published = randomized(nn.ModuleDict({"linear": Linear(4, 12, 8), "conv": Conv(4, 8, 4, 3)}))
    ours = nn.ModuleDict(
        {
            "linear": PHMLinear(12, 8, 4, algebra_rank=algebra_rank, **f64),
            "conv": PHConv2d(8, 4, 3, 4, algebra_rank=algebra_rank, **f64),
        }
    )
    load_all(ours, published)
    assert_equal_outputs(ours["linear"], published["linear"], normal((3, 12), 1))
    assert_equal_outputs(ours["conv"], published["conv"], normal((3, 8, 5, 5), 1))
    U, V, W = (t.norm(dim=1) for t in (ours["linear"].U, ours["linear"].V, ours["linear"].W))
    torch.testing.assert_close(U, V)
    torch.testing.assert_close(U, W)


def test_terms_that_an_algebra_does_not_need_can_learn():
    """The complex numbers have three terms of the layer's four."""
    published = randomized(Linear(2, 6, 4))
    with torch.no_grad():
        published.A.copy_(algebra.complex_numbers())
    ours = PHMLinear(6, 4, 2, algebra_rank=4, **f64)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    load_all(ours, published)
    assert_equal_outputs(ours, published, normal((3, 6), 1))
    (spare,) = (ours.U == 0).all(1).nonzero().flatten().tolist()
    assert torch.equal(ours.V[spare], before["V"][spare]) and torch.equal(ours.W[spare], before["W"][spare])
    ours(normal((3, 6), 1)).square().sum().backward()
    assert ours.U.grad[spare].abs().min() > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_terms_without_values_stay_zero(value):
    published = randomized(Linear(2, 6, 4))
    with torch.no_grad():
        published.A.copy_(algebra.complex_numbers())
        ours = PHMLinear(6, 4, 2, algebra_rank=4, **f64)
        for p in ours.parameters():
            p.fill_(value)
    load_all(ours, published)
    assert_equal_outputs(ours, published, normal((3, 6), 1))
    assert all(p.isfinite().all() for p in ours.parameters())


def test_algebra_of_too_few_terms():
    ours = nn.ModuleDict({"a": PHMLinear(4, 4, 2, **f64), "b": PHMLinear(4, 4, 2, algebra_rank=1, **f64)})
    published = randomized(nn.ModuleDict({"a": Linear(2, 4, 4), "b": Linear(2, 4, 4)}))
    message = failure(ours, published.state_dict())
    assert "b.A, for b.U: no algorithm of rank 1" in message and "a.A" not in message


def test_algebra_that_is_not_finite():
    state = randomized(Linear(2, 4, 4)).state_dict()
    state["A"][0, 0, 0] = math.nan
    assert "A, for U: A must be finite" in failure(PHMLinear(4, 4, 2, algebra_rank=2, **f64), state)


# Models


@pytest.mark.parametrize(
    ("depth", "n", "rezero"),
    [(18, 2, False), (18, 4, True), (18, 1, True), (18, 1, False), (50, 2, True), (50, 4, False)],
)
def test_phresnet(depth, n, rezero):
    published = randomized(ResNet(depth, n, (8, 16, 32, 64), rezero, "as" if n == 4 else "AF"))
    make = getattr(models, f"phresnet{depth}")
    ours = make(n, init="phydi" if rezero else "standard", width=8, **f64)
    load_all(ours, published)
    x = normal((2, 3, 32, 32), 1)
    assert_equal_outputs(ours.eval(), published.eval(), x)
    assert_equal_outputs(ours.train(), published.train(), x)
    torch.testing.assert_close(ours.stem.bn1.running_var, published.bn1.running_var, rtol=1e-10, atol=0)
    assert ours.stem.bn1.num_batches_tracked == 8


def test_phresnet_of_terms():
    published = randomized(ResNet(18, 4, (8, 16, 32, 64), True))
    ours = models.phresnet18(4, init="phydi", width=8, algebra_rank="generic", **f64)
    load_all(ours, published)
    assert_equal_outputs(ours.eval(), published.eval(), normal((2, 3, 32, 32), 1))


# Of the networks with 18, 50 and 152 layers, by n, with one alpha a block.
COUNTS = {
    1: (11_173_970, 23_520_858, 58_156_668),
    2: (5_599_602, 11_824_514, 29_241_556),
    3: (3_640_602, 7_587_857, 17_847_285),
    4: (2_810_770, 5_965_530, 14_753_916),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("rezero", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [18, 50, 152])
def test_phresnet_at_its_published_size(depth, n, rezero):
    """Both sides; ours has no bias in its convolutions."""
    with torch.device("meta"):
        published = ResNet(depth, n, (60, 120, 240, 516) if n == 3 else (64, 128, 256, 512), rezero)
        ours = getattr(models, f"phresnet{depth}")(n, init="phydi" if rezero else "standard")
    biases = sum(m.bias.numel() for m in published.modules() if isinstance(m, Conv))
    if n in (2, 4):
        assert biases == {18: 4_800, 50: 26_560, 152: 75_712}[depth]
    without = 0 if rezero else sum(ResNet.BLOCKS[depth])
    assert count(published) == COUNTS[n][list(ResNet.BLOCKS).index(depth)] - without
    assert count(ours) == count(published) - biases
    assert load_reference_state_dict(ours, published.state_dict()) == ([], [])


def language_models(norm, rezero, n=4, dtype=torch.float64, **options):
    published = randomized(LanguageModel(n, 2, 3, 12, 24, 36, norm, rezero))
    own_norm = "phydi" if rezero else norm
    alphas = "separate" if rezero else "shared"
    ours = PHTransformerLM(24, 12, 2, n, 3, 36, 0.0, own_norm, alphas=alphas, dtype=dtype, **options)
    if own_norm == "pre":
        ours.encoder.norm = None
    return ours, published


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize(("norm", "rezero"), [("None", True), (None, True), ("pre", False), ("post", False)], ids=str)
def test_language_model(norm, rezero, n):
    ours, published = language_models(norm, rezero, n)
    load_all(ours, published)
    tokens = torch.randint(24, (3, 9), generator=torch.Generator().manual_seed(2))
    expected = published(tokens.T).transpose(0, 1)
    for mode in (True, False):
        y = ours.train(mode)(tokens)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_language_model_in_other_dtypes():
    """Values are rounded once, and the module keeps its dtype."""
    ours, published = language_models("None", True, dtype=torch.float32)
    load_reference_state_dict(ours, published.state_dict())
    S = published.src_tok_emb.embedding.S
    assert ours.embedding.F.dtype == torch.float32
    torch.testing.assert_close(ours.embedding.F, (S * math.sqrt(12)).float(), rtol=0, atol=0)
    state = {name: value.bfloat16() for name, value in published.state_dict().items()}
    load_reference_state_dict(ours, state)
    torch.testing.assert_close(ours.embedding.F, S.bfloat16().float() * math.sqrt(12), rtol=0, atol=0)
    torch.testing.assert_close(ours.generator.bias, published.generator.bias.bfloat16().float(), rtol=0, atol=0)


@pytest.mark.parametrize(("norm", "rezero", "parameters"), [(None, True, 2_277_892), ("post", False, 2_284_012)])
def test_language_model_at_its_published_size(norm, rezero, parameters):
    published = LanguageModel(4, 8, 12, 128, 28_780, 256, norm, rezero)
    ours = PHTransformerLM(28_780, norm="phydi" if rezero else norm, alphas="separate")
    assert count(published) == count(ours) == parameters
    load_all(ours, randomized(published).float())


class Wrapper(nn.Module):
    """A network of a user's own, of either kind of layers."""

    def __init__(self, conv, linear, residual):
        super().__init__()
        self.features = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.ModuleDict({"hidden": linear, "out": nn.Linear(8, 3)})
        self.residual = residual
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        hidden = self.classifier["hidden"](self.features(x).mean((2, 3)))
        return self.classifier["out"](self.residual(hidden).relu()) * self.scale


class Residual(Linear):
    def __init__(self, n, features):
        super().__init__(n, features, features)
        self.alpha = nn.Parameter(torch.empty(1))

    def forward(self, x):
        return x + self.alpha * super().forward(x)


def wrappers():
    published = randomized(Wrapper(Conv(2, 4, 4, 3), Linear(2, 4, 8, ("a", "s")), Residual(2, 8)))
    ours = Wrapper(PHConv2d(4, 4, 3, 2), PHMLinear(4, 8, 2, algebra_rank="generic"), PHYDILinear(8, 2)).double()
    return ours, published


def test_layers_in_a_model_of_the_users_own():
    ours, published = wrappers()
    load_all(ours, published)
    assert_equal_outputs(ours.eval(), published.eval(), normal((2, 4, 6, 6), 1))


def test_models_within_a_model():
    ours, published = language_models("post", False)
    load_all(nn.ModuleDict({"text": ours}), nn.ModuleDict({"text": published}))
    tokens = torch.arange(9).unsqueeze(0)
    torch.testing.assert_close(ours(tokens), published(tokens.T).transpose(0, 1), rtol=1e-10, atol=1e-10)


def test_checkpoint_of_the_sound_event_detection():
    ours, published = wrappers()
    state = {f"module.{name}": value for name, value in published.state_dict().items()}
    result = load_reference_state_dict(ours, {"model_state_dict": state, "optimizer_state_dict": {}, "state": {}})
    assert result == ([], [])
    assert_equal_outputs(ours.eval(), published.eval(), normal((2, 4, 6, 6), 1))


def test_prefix_of_the_module_itself_stays():
    ours, published = PHMLinear(4, 4, 2, **f64), randomized(Linear(2, 4, 4))
    load_all(nn.ModuleDict({"module": ours}), nn.ModuleDict({"module": published}))
    assert_equal_outputs(ours, published, normal((2, 4), 1))


# Names and shapes that do not fit


def test_missing_and_unexpected_names():
    ours, published = wrappers()
    state = published.state_dict()
    del state["features.0.F"], state["classifier.hidden.a"], state["scale"]
    state["other"] = torch.zeros(1)
    message = failure(ours, state)
    assert "into Wrapper" in message
    assert "unexpected names: other" in message
    assert "missing names: scale, features.0.F, classifier.hidden.A" in message
    before = copy.deepcopy(ours.state_dict())
    result = load_reference_state_dict(ours, state, strict=False)
    assert result.missing_keys == ["scale", "features.0.F", "classifier.hidden.A"]
    assert result.unexpected_keys == ["other"]
    after = ours.state_dict()
    kept = {"scale", "features.0.F", "classifier.hidden.U", "classifier.hidden.V", "classifier.hidden.W"}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert torch.equal(ours.classifier["hidden"].F, published.classifier["hidden"].s)


def test_upper_case_comes_first():
    published = randomized(Linear(2, 4, 4))
    state = published.state_dict() | {"a": torch.zeros(2, 2, 2)}
    ours = PHMLinear(4, 4, 2, **f64)
    assert load_reference_state_dict(ours, state, strict=False).unexpected_keys == ["a"]
    assert torch.equal(ours.A, published.A)


def test_all_shapes_that_do_not_fit_are_named():
    state = randomized(nn.ModuleDict({"a": Linear(2, 4, 6), "b": Conv(3, 3, 6, 3)})).state_dict()
    ours = nn.ModuleDict({"a": PHMLinear(4, 8, 2, **f64), "b": PHConv2d(4, 6, 3, 2, algebra_rank=2, **f64)})
    for strict in (True, False):
        message = failure(ours, state, strict=strict)
        assert "a.S has shape (2, 3, 2); it must be (2, 4, 2), for a.F" in message
        assert "a.bias has shape (6,); it must be (8,), for a.bias" in message
        assert "b.A has shape (3, 3, 3); it must be (2, 2, 2), for b.U" in message
        assert "b.F has shape (3, 2, 1, 3, 3); it must be (2, 3, 2, 3, 3), for b.F" in message


def test_entry_that_is_no_tensor():
    state = randomized(Linear(2, 4, 4)).state_dict() | {"S": [1.0]}
    assert "S must be a torch.Tensor, not list" in failure(PHMLinear(4, 4, 2, **f64), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, {}), "module must be a torch.nn.Module, not int"),
        ((nn.Identity(), [1]), "state_dict must be a mapping from names to tensors, not list"),
        ((nn.Identity(), {0: torch.ones(1)}), "state_dict has an entry 0; its names must be str, not int"),
        ((nn.Identity(), {"model_state_dict": {0: {}}}), "state_dict has an entry 0; its names must be str, not int"),
    ],
)
def test_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        load_reference_state_dict(*arguments)


def test_strict_must_be_a_flag():
    with pytest.raises(TypeError, match="strict=1"):
        load_reference_state_dict(nn.Identity(), {}, strict=1)


@pytest.mark.parametrize("ours", [PHMLinear(4, 4, 2), models.phresnet18(2, width=8)], ids=["layer", "model"])
def test_checkpoint_of_this_package(ours):
    message = failure(ours, ours.state_dict())
    assert "this package's own: its checkpoints go to load_state_dict" in message


def test_result_is_torchs():
    ours, state = PHMLinear(4, 4, 2), Linear(2, 4, 4).state_dict()
    assert repr(load_reference_state_dict(ours, OrderedDict(state))) == "<All keys matched successfully>"


# What is not loaded


def test_weighted_convolution_is_refused():
    state = randomized(Conv(2, 4, 4, 3)).state_dict() | {"kron_weights": torch.ones(2)}
    for weighted in (False, True):
        message = failure(PHConv2d(4, 4, 3, 2, kron_weights=weighted, **f64), state, strict=False)
        assert "PHConv2d: a published convolution with kron_weights is no sum of Kronecker products" in message


def test_second_sum_is_refused():
    state = randomized(WeightedLinear(2, 4, 4)).state_dict()
    state |= {"A2": state["A"], "S2": state["S"]}
    message = failure(PHMLinear(4, 4, 2, kron_weights=True, **f64), state, strict=False)
    assert "PHMLinear: kron_res adds a second sum" in message


def test_kron_weights_need_their_parameter():
    state = randomized(WeightedLinear(2, 4, 4)).state_dict()
    assert "unexpected names: kron_weights" in failure(PHMLinear(4, 4, 2, **f64), state)


def test_optimized_model_is_refused():
    ours = optimize_for_inference(nn.Sequential(PHMLinear(8, 8, 4, **f64)).eval(), verbose=False)
    state = randomized(nn.Sequential(Linear(4, 8, 8))).state_dict()
    assert "0: a layer of optimize_for_inference takes no A" in failure(ours, state)


def test_projections_of_their_own_are_refused():
    ours = PHMMultiheadAttention(16, 2, 4, fused_qkv=False, **f64)
    state = randomized(Attention(4, 16, 2)).state_dict()
    assert "make it with fused_qkv=True" in failure(ours, state, strict=False)


def test_decoder_layer_is_refused():
    state = randomized(EncoderLayer(4, 16, 2, 24, "post", False)).state_dict()
    message = failure(PHTransformerDecoderLayer(16, 2, 4, 24, **f64), state, strict=False)
    assert "published decoder layers compute what none here does" in message


def test_fixup_is_refused():
    state = randomized(ResNet(18, 2, (8, 16, 32, 64))).state_dict()
    assert 'init="fixup" has no checkpoints' in failure(models.phresnet18(2, init="fixup", width=8), state)
    layer = PHTransformerEncoderLayer(16, 2, 4, 24, norm="fixup", **f64)
    assert 'no norm="fixup"' in failure(layer, randomized(EncoderLayer(4, 16, 2, 24, None, False)).state_dict())


def test_shared_alpha_is_refused():
    ours = PHTransformerEncoderLayer(16, 2, 4, 24, norm="phydi", **f64)
    state = randomized(EncoderLayer(4, 16, 2, 24, None, True)).state_dict()
    message = failure(ours, state, strict=False)
    assert "PHTransformerEncoderLayer: the published layers have an alpha for each sub-layer" in message


@pytest.mark.parametrize("name", ["ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"])
def test_trained_normalisation_is_refused(name):
    ours, published = language_models("None", True)
    state = published.state_dict()
    state[f"transformer_encoder.layers.1.{name}"][3] += 0.1
    message = failure(ours, state, strict=False)
    assert "encoder.layers.1: ln1 and ln2 of the checkpoint were trained" in message
    assert "encoder.layers.0" not in message


def test_last_normalisation_is_explained():
    ours, published = language_models("pre", False)
    ours.encoder.norm = nn.LayerNorm(12, **f64)
    message = failure(ours, published.state_dict())
    assert "missing names: transformer_encoder.norm.weight, transformer_encoder.norm.bias" in message
    assert "set encoder.norm = None before" in message


def test_other_positions_are_refused():
    ours, published = language_models("post", False)
    state = published.state_dict()
    name = "positional_encoding.pos_embedding"
    for positions in (state[name] + 0.1, state[name][..., :-1], torch.zeros(()), None):
        message = failure(ours, {**state, name: positions}, strict=False)
        assert f"{name} are not the sinusoids of d_model=12, which PHTransformerLM adds" in message
    del state[name]
    assert load_reference_state_dict(ours, state) == ([], [])


@pytest.mark.parametrize(("init", "rezero"), [("standard", True), ("phydi", False)])
def test_alphas_must_match(init, rezero):
    state = randomized(ResNet(18, 2, (8, 16, 32, 64), rezero)).state_dict()
    message = failure(models.phresnet18(2, init=init, width=8, **f64), state)
    assert ("unexpected" if rezero else "missing") + " names: layer1.0.res_weight" in message
