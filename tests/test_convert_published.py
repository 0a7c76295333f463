"""load_reference_state_dict: the published layers and networks, written anew from their formulas and names."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from phydi_kernels import algebra, models
from phydi_kernels.convert import load_reference_state_dict
from phydi_kernels.nn import (
    PHConv1d,
    PHConv2d,
    PHMEmbedding,
    PHMLinear,
    PHMMultiheadAttention,
    PHTransformerEncoder,
    PHTransformerEncoderLayer,
    PHYDIResidual,
)

TOLERANCE = 1e-10  # of float64, relative to the largest result


def kronecker_sum(A: Tensor, F: Tensor) -> Tensor:
    """H[k*p + r, l*q + s, ...] = sum_i A[i, k, l] F[i, r, s, ...]."""
    H = torch.einsum("ikl,irs...->krls...", A, F)
    return H.flatten(2, 3).flatten(0, 1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64) / math.sqrt(shape[-1]))


class Linear(nn.Module):
    def __init__(self, n: int, in_features: int, out_features: int, names: str = "AS", weighted: bool = False) -> None:
        super().__init__()
        self.names = names
        setattr(self, names[0], parameter(n, n, n))
        setattr(self, names[1], parameter(n, out_features // n, in_features // n))
        self.bias = parameter(out_features)
        if weighted:
            self.kron_weights = parameter(n)

    def weight(self) -> Tensor:
        A, S = (getattr(self, name) for name in self.names)
        return kronecker_sum(A * self.kron_weights[:, None, None] if hasattr(self, "kron_weights") else A, S)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(), self.bias)


class Conv(nn.Module):
    """With a bias that the forward does not add."""

    def __init__(
        self, n: int, channels: int, out: int, kernel: int, padding: int = 0, stride: int = 1, names: str = "AF", dims=2
    ) -> None:
        super().__init__()
        self.names, self.dims, self.options = names, dims, {"stride": stride, "padding": padding}
        setattr(self, names[0], parameter(n, n, n))
        setattr(self, names[1], parameter(n, out // n, channels // n, *(kernel,) * dims))
        self.bias = parameter(out)

    def forward(self, x: Tensor) -> Tensor:
        H = kronecker_sum(*(getattr(self, name) for name in self.names))
        return (functional.conv1d if self.dims == 1 else functional.conv2d)(x, H, **self.options)


class Block(nn.Module):
    def __init__(self, n: int, channels: int, width: int, stride: int, bottleneck: bool, phydi: bool) -> None:
        super().__init__()
        sizes = [(3, stride, width), (3, 1, width)]
        if bottleneck:
            sizes = [(1, 1, width), (3, stride, width), (1, 1, 4 * width)]
        self.count, out = len(sizes), sizes[-1][2]
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(Conv(n, channels, out, 1, stride=stride), nn.BatchNorm2d(out))
        for i, (kernel, step, to) in enumerate(sizes, start=1):
            self.add_module(f"conv{i}", Conv(n, channels, to, kernel, kernel // 2, step))
            self.add_module(f"bn{i}", nn.BatchNorm2d(to))
            channels = to
        if phydi:
            self.res_weight = parameter(1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            y = torch.relu(y) if i < self.count else y
        if hasattr(self, "res_weight"):
            return self.shortcut(x) + self.res_weight * torch.relu(y)
        return torch.relu(self.shortcut(x) + y)


class ResNet(nn.Module):
    def __init__(self, n: int, blocks: tuple[int, ...], bottleneck: bool, phydi: bool, width: int) -> None:
        super().__init__()
        images = 3 + -3 % n
        self.conv1, self.bn1 = Conv(n, images, width, 3, 1), nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for index in range(count):
                stride = 2 if stage and not index else 1
                layer.append(Block(n, channels, width << stage, stride, bottleneck, phydi))
                channels = (width << stage) * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", layer)
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(functional.avg_pool2d(x, x.shape[-1]).flatten(1))


class Attention(nn.Module):
    def __init__(self, n: int, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.A, self.S, self.in_proj_bias = parameter(n, n, n), parameter(n, 3 * d // n, d // n), parameter(3 * d)
        self.out_proj = Linear(n, d, d)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        L, B, d = x.shape
        parts = functional.linear(x, kronecker_sum(self.A, self.S), self.in_proj_bias).chunk(3, -1)
        q, k, v = (t.reshape(L, B * self.heads, d // self.heads).transpose(0, 1) for t in parts)
        weights = torch.softmax(q @ k.mT / math.sqrt(d // self.heads) + mask, -1)
        return self.out_proj((weights @ v).transpose(0, 1).reshape(L, B, d))


class EncoderLayer(nn.Module):
    def __init__(self, n: int, d: int, heads: int, hidden: int, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.self_attn = Attention(n, d, heads)
        self.linear1, self.linear2 = Linear(n, d, hidden), Linear(n, hidden, d)
        if norm == "phydi":
            self.res_weight1, self.res_weight2 = parameter(1), parameter(1)
        else:
            self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        branches = (lambda t: self.self_attn(t, mask), lambda t: self.linear2(torch.relu(self.linear1(t))))
        for i, branch in enumerate(branches, start=1):
            if self.norm == "phydi":
                x = x + getattr(self, f"res_weight{i}") * branch(x)
            elif self.norm == "pre":
                x = x + branch(self.get_submodule(f"ln{i}")(x))
            else:
                x = self.get_submodule(f"ln{i}")(x + branch(x))
        return x


class Encoder(nn.Module):
    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((len(x), len(x)), -math.inf, dtype=x.dtype).triu(1)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class LanguageModel(nn.Module):
    """Tokens (length, batch) to logits (length, batch, tokens)."""

    def __init__(self, n: int, tokens: int, d: int, heads: int, hidden: int, layers: int, norm: str) -> None:
        super().__init__()
        self.transformer_encoder = Encoder([EncoderLayer(n, d, heads, hidden, norm) for _ in range(layers)])
        self.generator = Linear(n, d, tokens)
        self.src_tok_emb = nn.Module()
        self.src_tok_emb.embedding = nn.Module()
        self.src_tok_emb.embedding.A, self.src_tok_emb.embedding.S = (
            parameter(n, n, n),
            parameter(n, tokens // n, d // n),
        )
        self.positional_encoding = nn.Module()
        angles = torch.arange(50.0, dtype=torch.float64)[:, None]
        angles = angles * 10000 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        waves = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
        self.positional_encoding.register_buffer("pos_embedding", waves[:, None])

    def forward(self, tokens: Tensor) -> Tensor:
        embedding = self.src_tok_emb.embedding
        x = kronecker_sum(embedding.A, embedding.S)[tokens]
        x = x * math.sqrt(x.shape[-1]) * math.sqrt(x.shape[-1]) + self.positional_encoding.pos_embedding[: len(tokens)]
        return self.generator(self.transformer_encoder(x))


def randomized(module: nn.Module) -> nn.Module:
    """In float64, with normalisations away from their start."""
    for m in module.double().modules():
        if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return module


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and expected.abs().max() > 0
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


DOUBLE: dict[str, Any] = {"dtype": torch.float64}


@pytest.mark.parametrize("names", ("AS", "as"))
def test_linear_layer(names: str) -> None:
    theirs, ours = Linear(3, 12, 15, names), PHMLinear(12, 15, 3, **DOUBLE)
    result = load_reference_state_dict(ours, theirs.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    x = torch.randn(5, 12, **DOUBLE)
    assert_same(ours(x), theirs(x))


def test_linear_layer_with_kronecker_weights() -> None:
    theirs, ours = Linear(4, 8, 16, weighted=True), PHMLinear(8, 16, 4, kron_weights=True, **DOUBLE)
    load_reference_state_dict(ours, theirs.state_dict())
    x = torch.randn(5, 8, **DOUBLE)
    assert_same(ours(x), theirs(x))


def test_linear_layer_of_known_rank() -> None:
    theirs, ours = Linear(4, 8, 16), PHMLinear(8, 16, 4, algebra_rank="generic", **DOUBLE)
    load_reference_state_dict(ours, theirs.state_dict())
    x = torch.randn(5, 8, **DOUBLE)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("names", ("AF", "as"))
@pytest.mark.parametrize("bias", (True, False))
def test_convolution_adds_no_bias(names: str, bias: bool) -> None:
    theirs, ours = Conv(2, 4, 6, 3, 1, 2, names), PHConv2d(4, 6, 3, 2, 2, 1, bias=bias, **DOUBLE)
    result = load_reference_state_dict(ours, theirs.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    x = torch.randn(2, 4, 7, 7, **DOUBLE)
    assert_same(ours(x), theirs(x))


def test_convolution_in_one_dimension() -> None:
    theirs, ours = Conv(2, 4, 6, 3, 1, dims=1), PHConv1d(4, 6, 3, 2, padding=1, **DOUBLE)
    load_reference_state_dict(ours, theirs.state_dict())
    x = torch.randn(2, 4, 7, **DOUBLE)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("n", (2, 4))
@pytest.mark.parametrize("phydi", (False, True))
@pytest.mark.parametrize("depth", (18, 50))
def test_residual_network(n: int, phydi: bool, depth: int) -> None:
    blocks, make = {18: ((2, 2, 2, 2), models.phresnet18), 50: ((3, 4, 6, 3), models.phresnet50)}[depth]
    theirs = randomized(ResNet(n, blocks, depth == 50, phydi, width=8))
    ours = make(n, width=8, init="phydi" if phydi else "standard", **DOUBLE)
    result = load_reference_state_dict(ours, theirs.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    images = torch.randn(2, 3, 16, 16, **DOUBLE)
    padded = functional.pad(images, (0, 0, 0, 0, -3 % n, 0))
    assert_same(ours.eval()(images), theirs.eval()(padded))
    assert_same(ours.train()(images), theirs.train()(padded))
    assert_same(ours.layer1[0].branch.bn1.running_mean, theirs.layer1[0].bn1.running_mean)


def test_published_number_of_parameters() -> None:
    """Of width 64 and n = 4, with an alpha a block, and 4,800 biases that are never added."""
    ours = models.phresnet18(4, init="phydi")
    theirs = ResNet(4, (2, 2, 2, 2), False, True, width=64)
    count = sum(p.numel() for p in theirs.parameters())
    assert count == 2_810_770 and sum(p.numel() for p in ours.parameters()) == count - 4_800
    load_reference_state_dict(ours, theirs.state_dict())


@pytest.mark.parametrize("norm", ("phydi", "pre", "post"))
def test_language_model(norm: str) -> None:
    theirs = randomized(LanguageModel(4, 24, 16, 2, 32, 3, norm))
    ours = models.PHTransformerLM(24, 16, 2, 4, 3, 32, norm=norm, alphas="separate", **DOUBLE).eval()
    if norm == "pre":
        ours.encoder.norm = None
    result = load_reference_state_dict(ours, theirs.state_dict())
    assert result.missing_keys == result.unexpected_keys == []
    tokens = torch.randint(24, (7, 3))
    assert_same(ours(tokens.T), theirs(tokens).transpose(0, 1))


def test_attention_and_encoder_layer_alone() -> None:
    theirs, ours = Attention(2, 8, 2), PHMMultiheadAttention(8, 2, 2, **DOUBLE)
    load_reference_state_dict(ours, theirs.state_dict())
    x, mask = torch.randn(5, 3, 8, **DOUBLE), torch.zeros(5, 5, **DOUBLE)
    assert_same(ours(x, x, x)[0], theirs(x, mask))
    layer = randomized(EncoderLayer(2, 8, 2, 12, "post"))
    twin = PHTransformerEncoderLayer(8, 2, 2, 12, norm="post", **DOUBLE).eval()
    load_reference_state_dict(twin, layer.state_dict())
    assert_same(twin(x), layer(x, mask))


class Mixed(nn.Module):
    def __init__(self, encoder: nn.Module, linear: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"encoder": encoder, "convs": nn.Sequential(conv, nn.BatchNorm2d(4))})
        self.head, self.scale = linear, parameter(1)


def test_layers_inside_another_module() -> None:
    theirs = randomized(Mixed(Encoder([EncoderLayer(2, 8, 2, 12, "phydi")]), Linear(2, 8, 6), Conv(2, 4, 4, 3)))
    layer = PHTransformerEncoderLayer(8, 2, 2, 12, norm="phydi", alphas="separate", **DOUBLE)
    ours = Mixed(PHTransformerEncoder(layer, 1), PHMLinear(8, 6, 2, **DOUBLE), PHConv2d(4, 4, 3, 2, **DOUBLE)).double()
    load_reference_state_dict(ours, theirs.state_dict())
    assert torch.equal(ours.scale, theirs.scale)
    x, images = torch.randn(5, 3, 8, **DOUBLE), torch.randn(2, 4, 6, 6, **DOUBLE)
    assert_same(ours.head(ours.body["encoder"].eval()(x, is_causal=True)), theirs.head(theirs.body["encoder"](x)))
    assert_same(ours.body["convs"](images), theirs.body["convs"](images))


def test_prefix_of_data_parallel() -> None:
    theirs, ours = Linear(2, 4, 6), PHMLinear(4, 6, 2, **DOUBLE)
    load_reference_state_dict(ours, nn.DataParallel(theirs).state_dict())
    assert torch.equal(ours.F, theirs.S)
    # A name of the module itself.
    branch = PHYDIResidual(PHMLinear(4, 4, 2, **DOUBLE)).double()
    square = Linear(2, 4, 4)
    result = load_reference_state_dict(branch, nn.ModuleDict({"module": square}).state_dict(), strict=False)
    assert torch.equal(branch.module.F, square.S) and result.missing_keys == ["alpha"]


def test_parameters_keep_dtype_and_the_checkpoint_its_values() -> None:
    theirs, ours = Linear(2, 4, 6), PHMEmbedding(6, 4, 2)
    checkpoint = theirs.state_dict()
    del checkpoint["bias"]
    before = copy.deepcopy(checkpoint)
    F = ours.F
    load_reference_state_dict(ours, checkpoint)
    assert ours.F is F and F.dtype is torch.float32 and torch.equal(F, theirs.S.float())
    assert checkpoint.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in checkpoint.items())


def refused(ours: nn.Module, checkpoint: Any, message: str, error: type = RuntimeError, **options: Any) -> None:
    """The error, and a module that is as it was."""
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(error, match=message):
        load_reference_state_dict(ours, checkpoint, **options)
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())


def test_what_does_not_fit_is_refused() -> None:
    linear, checkpoint = PHMLinear(4, 6, 2, **DOUBLE), Linear(2, 4, 6).state_dict()
    refused(linear, {**checkpoint, "A2": torch.zeros(2, 2, 2)}, "A2 has no place in the module")
    refused(linear, {"A": checkpoint["A"], "bias": checkpoint["bias"]}, "S or s is missing, for F")
    refused(linear, Linear(2, 8, 6).state_dict(), r"S has shape \(2, 3, 4\); F needs \(2, 3, 2\)")
    refused(linear, Linear(2, 8, 6).state_dict(), "S has shape", strict=False)
    refused(linear, linear.state_dict(), "use module.load_state_dict")
    refused(linear, [1], "state_dict must be a mapping", TypeError)
    refused(
        linear, {"state_dict": checkpoint}, r"state_dict\['state_dict'\] must be a tensor, not OrderedDict", TypeError
    )
    refused(linear, checkpoint, "strict", TypeError, strict="no")
    weighted = {**Conv(2, 4, 4, 3).state_dict(), "kron_weights": torch.ones(2)}
    conv = PHConv2d(4, 4, 3, 2, kron_weights=True, **DOUBLE)
    refused(conv, weighted, "kron_weights: the published convolution with weights is no sum of Kronecker products")
    refused(conv, weighted, "kron_weights", strict=False)
    refused(PHMLinear(4, 6, 2, algebra_rank=1, **DOUBLE), checkpoint, "rank 1", algebra.DecompositionError)
    one_alpha = models.PHTransformerLM(24, 16, 2, 4, 1, 32, **DOUBLE)
    two = LanguageModel(4, 24, 16, 2, 32, 1, "phydi").state_dict()
    refused(one_alpha, two, "transformer_encoder.layers.0.res_weight1 has no place in the module")
    with pytest.raises(TypeError, match="module must be a torch.nn.Module, not int"):
        load_reference_state_dict(3, checkpoint)


def test_not_strict_reports_what_it_left() -> None:
    ours = PHMLinear(4, 6, 2, **DOUBLE)
    F = ours.F.detach().clone()
    checkpoint = Linear(2, 4, 6).state_dict()
    result = load_reference_state_dict(ours, {"A": checkpoint["A"], "other": torch.ones(1)}, strict=False)
    assert result == (["F", "bias"], ["other"])
    assert torch.equal(ours.A, checkpoint["A"]) and torch.equal(ours.F, F)
