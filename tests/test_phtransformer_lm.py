"""PHTransformerLM: what it computes, its published size, causality, its start, learning and inference."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from dense_twins import TOLERANCE, assert_same_function, call_twin, randomize
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from phydi_kernels import optimize_for_inference
from phydi_kernels.models import PHTransformerLM
from phydi_kernels.nn import PHMEmbedding, PHMLinear
from phydi_kernels.nn.factored import FactoredPHMLinear

TOKENS, D, HEADS, N, LAYERS, FEED = 24, 16, 4, 4, 2, 24
NORMS = ("post", "pre", "phydi", "fixup")
each_norm = pytest.mark.parametrize("norm", NORMS)


def make(norm: str = "phydi", dropout: float = 0.0, num_layers: int = LAYERS, **options) -> PHTransformerLM:
    torch.manual_seed(0)
    return PHTransformerLM(TOKENS, D, HEADS, N, num_layers, FEED, dropout, norm, **options)


def text(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(0, TOKENS, (batch, length), generator=torch.Generator().manual_seed(1))


def positions(length: int, d: int) -> torch.Tensor:
    """Vaswani et al. (2017), section 3.5, an entry at a time."""
    rows = [
        [(math.cos if i % 2 else math.sin)(t / 10000 ** ((i - i % 2) / d)) for i in range(d)] for t in range(length)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def inputs_of_encoder(model: PHTransformerLM, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("options", [{}, {"algebra_rank": 7}, {"kron_weights": True}], ids=["A", "terms", "weighted"])
def test_logits_are_those_of_torchs_layers_with_dense_weights(norm, options):
    model = randomize(make(norm, **options, dtype=torch.float64))
    factory = {"dtype": torch.float64, "device": "meta"}
    layer = nn.TransformerEncoderLayer(D, HEADS, FEED, 0.0, batch_first=True, norm_first=norm == "pre", **factory)
    last = nn.LayerNorm(D, **factory) if norm == "pre" else None
    encoder = nn.TransformerEncoder(layer, LAYERS, last, enable_nested_tensor=False)
    tokens = text()
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
    # The positions are computed in float32.
    added = inputs_of_encoder(model, tokens) - math.sqrt(D) * model.embedding.dense_weight()[tokens]
    torch.testing.assert_close(added, positions(7, D).expand(3, 7, D), rtol=1e-5, atol=1e-5)
    added = added.detach()

    def expected():
        x = math.sqrt(D) * model.embedding.dense_weight()[tokens] + added
        y = call_twin(encoder, model.encoder, x, mask=mask)
        return nn.functional.linear(y, model.generator.dense_weight(), model.generator.bias)

    assert_same_function(lambda: model(tokens), expected, model, [])


@pytest.mark.parametrize("d", [15, 16])
def test_positions(d):
    model = PHTransformerLM(15, d, 1, 1, 1, 8, 0.0)
    tokens = torch.randint(0, 15, (1, 40))
    added = inputs_of_encoder(model, tokens) - math.sqrt(d) * model.embedding(tokens)
    torch.testing.assert_close(added[0].double(), positions(40, d), rtol=1e-4, atol=1e-4)


@each_norm
@pytest.mark.parametrize("algebra_rank", [None, 7])
def test_logits_depend_on_no_later_token(norm, algebra_rank):
    model = randomize(make(norm, algebra_rank=algebra_rank, num_layers=3, dtype=torch.float64)).eval()
    tokens = text(2, 9)
    logits = model(tokens)
    for t in (1, 4, 8):
        other = tokens.clone()
        other[:, t] = (tokens[:, t] + 5) % TOKENS
        changed = model(other)
        torch.testing.assert_close(changed[:, :t], logits[:, :t], rtol=0, atol=1e-12)
        assert (changed[:, t:] - logits[:, t:]).abs().amax((0, 2)).min() > 1e-8
    embedded = []
    handle = model.embedding.register_forward_hook(lambda module, args, y: embedded.append(y))
    y = model(tokens)
    handle.remove()
    (grad,) = torch.autograd.grad(y[:, 3].square().sum(), embedded)
    assert not grad[:, 4:].any()
    assert grad[:, :4].abs().amax((0, 2)).min() > 0


def count(norm: str, **options) -> int:
    model = PHTransformerLM(28_780, 128, 8, 4, 12, 256, norm=norm, device="meta", **options)
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    """The published ones; ours has one alpha a layer unless they are separate, and a last LayerNorm with PreNorm."""
    assert count("phydi", alphas="separate") == 2_277_892
    assert count("phydi") == 2_277_892 - 12
    assert count("post") == 2_284_012
    assert count("pre") == 2_284_012 + 2 * 128
    # A scalar a branch, and biases before and after it and around the activation.
    assert count("fixup") == 2_277_868 + 12 * (2 + 6)
    products = 4 * 12 + 2
    assert count("phydi", kron_weights=True) == count("phydi") + 4 * products
    assert count("phydi", algebra_rank=7) == count("phydi") + (3 * 7 * 4 - 4**3) * products


def test_parts():
    model = make("pre", kron_weights=True, algebra_rank=5)
    assert isinstance(model.embedding, PHMEmbedding) and isinstance(model.generator, PHMLinear)
    assert model.embedding.F is not model.generator.F
    assert len(model.encoder.layers) == LAYERS
    layers = [m for m in model.modules() if isinstance(m, (PHMLinear, PHMEmbedding))]
    assert len(layers) == 4 * LAYERS + 2
    assert all(m.algebra_rank == 5 and m.kron_weights is not None for m in layers)
    assert isinstance(model.encoder.norm, nn.LayerNorm)
    assert all(make(norm).encoder.norm is None for norm in ("post", "phydi", "fixup"))


def test_embedding_is_scaled_once():
    """Entries of the table have variance 1/d at the start, those of the input sqrt(d) times as large 1."""
    torch.manual_seed(0)
    model = PHTransformerLM(4000, 64, 4, 4, 1, 64, 0.0)
    table = model.embedding.dense_weight()
    assert table.square().mean().item() == pytest.approx(1 / 64, rel=0.02)
    tokens = torch.arange(4000).view(8, 500)
    x = inputs_of_encoder(model, tokens) - positions(500, 64).float()
    assert x.square().mean().item() == pytest.approx(1, rel=0.02)


def test_dropout_of_the_input():
    model = make(dropout=0.3)
    tokens = torch.zeros(300, 20, dtype=torch.int64)
    x = inputs_of_encoder(model, tokens)
    assert (x == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not (inputs_of_encoder(model.eval(), tokens) == 0).all(-1).any()


@each_norm
def test_logits_at_the_start(norm):
    """PHYDI: those of a model without layers. Fixup: 0."""
    model = make(norm, dropout=0.1, num_layers=6).eval()
    tokens = text()
    logits = model(tokens)
    if norm == "phydi":
        assert torch.equal(logits, model.generator(inputs_of_encoder(model, tokens)))
    assert not logits.any() if norm == "fixup" else logits.std() > 0.1


@pytest.mark.parametrize(
    ("norm", "options"),
    [*((norm, {}) for norm in NORMS), ("phydi", {"algebra_rank": 4}), ("phydi", {"kron_weights": True})],
)
def test_learns_a_text(norm, options):
    """A text in which each token follows from the two before it."""
    model = make(norm, dropout=0.1, **options)
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8] * 6).view(6, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert sum(losses[-5:]) / 5 < 0.25 * losses[0]


@pytest.mark.parametrize("options", [{}, {"algebra_rank": 7, "kron_weights": True}], ids=["A", "terms"])
@pytest.mark.parametrize(("norm", "prepack"), [*((norm, False) for norm in NORMS), ("phydi", True)])
def test_optimize_for_inference(norm, options, prepack):
    model = randomize(make(norm, dropout=0.1, **options, dtype=torch.float64)).eval()
    optimized = optimize_for_inference(model, prepack=prepack, progress=False, verbose=False)
    tokens = text()
    with torch.no_grad():
        torch.testing.assert_close(optimized(tokens), model(tokens), **TOLERANCE)
    assert not any(isinstance(m, PHMLinear) for m in optimized.modules())
    factored = [m for m in optimized.modules() if isinstance(m, FactoredPHMLinear)]
    embedding, *linear = optimized.inference_report.layers
    assert (embedding.kind, embedding.left) == ("PHMEmbedding", "a lookup has too few multiplications to save some")
    assert len(factored) == len(linear) == 4 * LAYERS + 1
    assert all(layer.rank == 7 and not layer.left and not layer.folded for layer in linear)
    assert any(isinstance(m, PHMEmbedding) for m in optimized.modules())


@each_norm
def test_copies_compute_the_same(norm):
    model = randomize(make(norm, kron_weights=True)).eval()
    tokens = text()
    y = model(tokens)
    y.sum().backward()
    fresh = make(norm, kron_weights=True).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(tokens), y)


@pytest.mark.parametrize("norm", ["pre", "phydi"])
def test_compile_and_export(norm):
    model = randomize(make(norm, dtype=torch.float64)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(model, (text(4, 5),), dynamic_shapes=(sizes,)).module()
    for shape in ((3, 7), (6, 2)):
        tokens = text(*shape)
        torch.testing.assert_close(exported(tokens), model(tokens), **TOLERANCE)
    y = model(tokens)
    torch.testing.assert_close(compiled(tokens), y, **TOLERANCE)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(compiled(tokens).square().sum(), parameters)
    for actual, expected in zip(grads, torch.autograd.grad(y.square().sum(), parameters), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@each_norm
def test_gradients_of_each_sequence_by_vmap(norm):
    model = randomize(make(norm, num_layers=1, dtype=torch.float64)).eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tokens = text()

    def loss(parameters, tokens):
        logits = torch.func.functional_call(model, parameters, (tokens[None],))[0]
        return nn.functional.cross_entropy(logits[:-1], tokens[1:])

    with sdpa_kernel(SDPBackend.MATH):
        mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
        looped = [torch.func.grad(loss)(parameters, row) for row in tokens]
    for name, grads in mapped.items():
        torch.testing.assert_close(grads, torch.stack([g[name] for g in looped]), **TOLERANCE)


def test_tokens_of_other_shapes_and_types():
    model = make().eval()
    tokens = text()
    assert torch.equal(model(tokens.int()), model(tokens))
    torch.testing.assert_close(model(tokens[:, :1]), model(tokens)[:, :1])
    assert model(tokens[:0]).shape == (0, 7, TOKENS)
    assert model(tokens[:, :0]).shape == (3, 0, TOKENS)
    strided = torch.stack([tokens, tokens + 1], -1)[..., 0]
    assert torch.equal(model(strided), model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype):
    model = make("pre", dtype=dtype).eval()
    logits = model(text())
    assert logits.dtype == dtype
    expected = copy.deepcopy(model).double()(text())
    assert ((logits.double() - expected).norm() / expected.norm()).item() < 8 * torch.finfo(dtype).eps + 1e-7


@pytest.mark.parametrize("options", [{}, {"algebra_rank": 7}], ids=["A", "terms"])
@each_norm
def test_autocast(norm, options):
    model = randomize(make(norm, **options), 0.3)
    tokens = text()
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert logits.dtype == torch.bfloat16
    assert ((logits - expected).norm() / expected.norm()).item() < 0.05
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_meta_device():
    model = make(device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, TOKENS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"num_tokens": 28_782},
            ValueError,
            "num_tokens=28782 is not divisible by n=4; 28780 and 28784 are the nearest sizes that are",
        ),
        ({"d_model": 18}, ValueError, "d_model=18 is not divisible by n=4; 16 and 20 are the nearest sizes that are"),
        ({"dim_feedforward": 3}, ValueError, "dim_feedforward=3 is not divisible by n=4; 4 is the smallest"),
        ({"nhead": 3}, ValueError, "d_model=16 is not divisible by nhead=3"),
        ({"num_tokens": 0}, ValueError, "num_tokens=0 must be an integer >= 1"),
        ({"num_tokens": 24.0}, TypeError, "num_tokens=24.0 must be an integer >= 1, not float"),
        ({"num_layers": 0}, ValueError, "num_layers=0 must be an integer >= 1"),
        ({"dropout": 2}, ValueError, "dropout=2.* must be a probability from 0 to 1"),
        ({"norm": "none"}, ValueError, "norm='none' is not one of 'post', 'pre', 'phydi', 'fixup'"),
        ({"alphas": None}, ValueError, "alphas=None is not one of"),
        ({"algebra_rank": 17}, ValueError, "algebra_rank=17"),
    ],
)
def test_constructor_errors(options, error, message):
    with pytest.raises(error, match=message):
        PHTransformerLM(**{"num_tokens": TOKENS, "d_model": D, "nhead": HEADS, "dim_feedforward": FEED, **options})


def test_errors_of_a_call():
    model = make()
    with pytest.raises(ValueError, match=r"tokens has shape \(7,\); it must be \(batch, length\)"):
        model(text()[0])
    with pytest.raises(IndexError, match="indices from 0 to 24; indices must be from 0 to 23"):
        model(torch.tensor([[0, TOKENS]]))
    with pytest.raises(IndexError, match="indices from -1 to 3"):
        model(torch.tensor([[3, -1]]))
    with pytest.raises(TypeError, match="dtype torch.float32"):
        model(text().float())
    with pytest.raises(TypeError, match="tokens must be a .*Tensor, not list"):
        model([[1, 2]])
