"""PHTransformer and its parts against torch's with dense weights, the formulas of PHYDI and Fixup, and their starts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from dense_twins import TOLERANCE, assert_same_function, call_twin, randomize
from helpers import normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from phydi_kernels import algebra, optimize_for_inference
from phydi_kernels.nn import (
    PHMLinear,
    PHMMultiheadAttention,
    PHTransformer,
    PHTransformerDecoder,
    PHTransformerDecoderLayer,
    PHTransformerEncoder,
    PHTransformerEncoderLayer,
)

D, HEADS, N, FEED = 16, 4, 4, 24
BATCH, LENGTH, MEMORY = 3, 5, 7
NORMS = ("post", "pre", "phydi", "fixup")
each_norm = pytest.mark.parametrize("norm", NORMS)
each_alphas = pytest.mark.parametrize("alphas", ["shared", "separate"])
each_kind = pytest.mark.parametrize("kind", ["encoder", "decoder"])

# For what takes seconds.
each_norm_and_a_decoder = pytest.mark.parametrize(
    ("kind", "norm"), [*(("encoder", norm) for norm in NORMS), ("decoder", "phydi")]
)

LAYERS = {"encoder": PHTransformerEncoderLayer, "decoder": PHTransformerDecoderLayer}
TWINS = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
STACKS = {"encoder": PHTransformerEncoder, "decoder": PHTransformerDecoder}
STACK_TWINS = {"encoder": nn.TransformerEncoder, "decoder": nn.TransformerDecoder}


def make(kind: str, norm: str = "post", dropout: float = 0.0, **options) -> nn.Module:
    return LAYERS[kind](D, HEADS, N, FEED, dropout, norm=norm, **options)


def stack(kind: str, norm: str, count: int, dropout: float = 0.0, **options) -> nn.Module:
    return STACKS[kind](make(kind, norm, dropout, **options), count)


def twin_layer(kind: str, norm: str, dropout: float = 0.0, **options) -> nn.Module:
    options |= {"norm_first": norm == "pre", "dtype": torch.float64, "device": "meta"}
    return TWINS[kind](D, HEADS, FEED, dropout, **options)


def arguments(kind: str, batch_first: bool = False) -> list[torch.Tensor]:
    """Source, or target and memory, in float64."""
    shapes = [(LENGTH, BATCH, D), (MEMORY, BATCH, D)][: 1 if kind == "encoder" else 2]
    tensors = [normal(shape, 10 + i) for i, shape in enumerate(shapes)]
    return [(t.transpose(0, 1) if batch_first else t).contiguous().requires_grad_() for t in tensors]


def causal(length: int, keys: int | None = None) -> torch.Tensor:
    return torch.ones(length, keys or length, dtype=torch.bool).triu(1)


def padding(length: int) -> torch.Tensor:
    return torch.arange(length) >= length - torch.arange(BATCH)[:, None]


# Names of the masks, and what ours may be given in the place of a causal one.
MASKS = {
    "encoder": {"src_mask": causal(LENGTH), "src_key_padding_mask": padding(LENGTH)},
    "decoder": {
        "tgt_mask": causal(LENGTH),
        "memory_mask": causal(LENGTH, MEMORY),
        "tgt_key_padding_mask": padding(LENGTH),
        "memory_key_padding_mask": padding(MEMORY),
    },
}
CAUSAL = {"src_mask": "is_causal", "tgt_mask": "tgt_is_causal", "memory_mask": "memory_is_causal"}

# Arguments of both layers, and what only ours has.
OPTIONS = {
    "plain": ({}, {}),
    "gelu": ({"activation": "gelu"}, {}),
    "callable": ({"activation": torch.tanh}, {}),
    "module": ({"activation": nn.ReLU()}, {}),
    "eps_without_bias": ({"layer_norm_eps": 0.1, "bias": False}, {}),
    "batch_first": ({"batch_first": True}, {}),
    "terms": ({}, {"algebra_rank": 7}),
    "weighted": ({}, {"kron_weights": True}),
    "weighted_terms": ({}, {"kron_weights": True, "algebra_rank": 5}),
}
each_option = pytest.mark.parametrize("option", OPTIONS)


def layer_pair(kind: str, norm: str, option: str) -> tuple[nn.Module, nn.Module]:
    shared, only_ours = OPTIONS[option]
    ours = make(kind, norm, **shared, **only_ours, dtype=torch.float64)
    return randomize(ours), twin_layer(kind, norm, **shared)


@each_kind
@each_option
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_layer_is_torchs_with_dense_weights(kind, norm, option):
    ours, theirs = layer_pair(kind, norm, option)
    tensors = arguments(kind, option == "batch_first")
    assert_same_function(lambda: ours(*tensors), lambda: call_twin(theirs, ours, *tensors), ours, tensors)


@each_kind
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_masks_of_a_layer(kind, norm):
    ours, theirs = layer_pair(kind, norm, "plain")
    tensors = arguments(kind)
    for name, mask in MASKS[kind].items():
        expected = call_twin(theirs, ours, *tensors, **{name: mask})
        assert not torch.allclose(expected, call_twin(theirs, ours, *tensors)), name
        given = [{name: mask}] + ([{CAUSAL[name]: True}] if name in CAUSAL else [])
        for options in given:
            torch.testing.assert_close(ours(*tensors, **options), expected, **TOLERANCE)
    together = MASKS[kind]
    assert_same_function(
        lambda: ours(*tensors, **together), lambda: call_twin(theirs, ours, *tensors, **together), ours, tensors
    )


def test_backward_hooks_see_the_gradients_of_each_product():
    """Those that they see with a forward hook beside them, which composes the layer of separate calls."""
    layer = PHTransformerEncoderLayer(16, 2, 4, 32, dropout=0.0, batch_first=True)
    layer.load_state_dict({k: v + 0.1 for k, v in layer.state_dict().items()})
    seen = {}
    for name in ("linear1", "linear2"):
        getattr(layer, name).register_full_backward_hook(lambda m, _, grad, name=name: seen.update({name: grad[0]}))
    x = normal((2, 5, 16), 0).float()
    layer(x).square().sum().backward()
    found = dict(seen)
    for name in ("linear1", "linear2"):
        getattr(layer, name).register_forward_hook(lambda *_: None)
    layer(x).square().sum().backward()
    for name, expected in seen.items():
        torch.testing.assert_close(found[name], expected)
    assert (found["linear1"] == 0).any()


def test_dropout_runs_where_its_module_is_in_training_mode():
    layer = PHTransformerEncoderLayer(16, 2, 4, 32, dropout=0.5).eval()
    calls = []
    layer.dropout.train().register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(3, 1, 16))
    assert len(calls) == 3
    layer.dropout = nn.Identity()
    layer.train()(torch.randn(3, 1, 16))


@each_kind
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_dropout_is_where_torch_has_it(kind, norm):
    """The same draws in the same order: the attention weights, each sub-layer, and the activation."""
    ours = randomize(make(kind, norm, dropout=0.4, dtype=torch.float64))
    theirs = twin_layer(kind, norm, dropout=0.4)
    tensors = arguments(kind)
    results = []
    for call in (lambda: ours(*tensors), lambda: call_twin(theirs, ours, *tensors)):
        torch.manual_seed(7)
        results.append(call())
    torch.testing.assert_close(*results, **TOLERANCE)
    assert not torch.allclose(ours(*tensors), results[0])
    ours.eval()
    plain = randomize(make(kind, norm, dtype=torch.float64))
    assert torch.equal(ours(*tensors), plain(*tensors))


def branches_of(layer: nn.Module, memory: torch.Tensor | None, shift=lambda index, x: x) -> list:
    """The sub-layers as functions, from dense weights; ``shift`` adds Fixup's biases around the activation."""

    def attend(attention, x, memory):
        theirs = nn.MultiheadAttention(D, HEADS, dtype=torch.float64, device="meta")
        return call_twin(theirs, attention, x, memory, memory)[0]

    def feed_forward(x):
        hidden = shift(-2, nn.functional.linear(x, layer.linear1.dense_weight(), layer.linear1.bias))
        return nn.functional.linear(shift(-1, torch.relu(hidden)), layer.linear2.dense_weight(), layer.linear2.bias)

    branches = [lambda x: attend(layer.self_attn, x, x), feed_forward]
    if memory is not None:
        branches.insert(1, lambda x: attend(layer.multihead_attn, x, memory))
    return branches


@each_kind
@each_alphas
def test_phydi_layer_follows_its_formula(kind, alphas):
    """h = x + alpha att(x), y = h + alpha ff(h)."""
    layer = randomize(make(kind, "phydi", alphas=alphas, dtype=torch.float64))
    count = 2 if kind == "encoder" else 3
    names = ["alpha"] * count if alphas == "shared" else [f"alpha{i + 1}" for i in range(count)]
    assert {name for name, _ in layer.named_parameters() if "alpha" in name} == set(names)
    factors = [getattr(layer, name) for name in names]
    assert all(factor.shape == (1,) for factor in factors)
    tensors = arguments(kind)

    def expected():
        x = tensors[0]
        for factor, branch in zip(factors, branches_of(layer, *([None, *tensors[1:]][-1:])), strict=True):
            x = x + factor * branch(x)
        return x

    assert_same_function(lambda: layer(*tensors), expected, layer, tensors)
    assert not any(isinstance(m, nn.LayerNorm) for m in layer.modules())


@each_kind
def test_fixup_layer_follows_its_formula(kind):
    """h = x + scale att(x + shift) + shift', and a shift before and after the activation."""
    layer = randomize(make(kind, "fixup", dtype=torch.float64))
    count = 2 if kind == "encoder" else 3
    assert (len(layer.shifts), len(layer.scales)) == (2 * count + 2, count)
    tensors = arguments(kind)

    def shift(index, x):
        return x + layer.shifts[index].bias

    def expected():
        x = tensors[0]
        for i, branch in enumerate(branches_of(layer, *([None, *tensors[1:]][-1:]), shift)):
            x = x + shift(2 * i + 1, layer.scales[i].weight * branch(shift(2 * i, x)))
        return x

    assert_same_function(lambda: layer(*tensors), expected, layer, tensors)
    assert not any(isinstance(m, nn.LayerNorm) for m in layer.modules())


@pytest.mark.parametrize("norm", ["phydi", "fixup"])
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stack_of_96_layers_is_the_identity_to_the_bit(kind, norm, dtype):
    """In training, with dropout, and in evaluation."""
    torch.manual_seed(0)
    model = STACKS[kind](LAYERS[kind](8, 2, 4, 8, norm=norm, dtype=dtype), 96)
    x = torch.randn(LENGTH, 2, 8).to(dtype)
    memory = [] if kind == "encoder" else [torch.randn(MEMORY, 2, 8).to(dtype)]
    assert model.training and model.layers[0].dropout.p == 0.1
    assert torch.equal(model(x, *memory), x)
    model.eval()
    assert torch.equal(model(x, *memory), x)
    with torch.no_grad():
        assert torch.equal(model(x, *memory), x)


@pytest.mark.parametrize("norm", ["phydi", "fixup"])
@each_kind
def test_identity_without_biases(kind, norm):
    model = stack(kind, norm, 2, bias=False)
    tensors = [t.detach().float() for t in arguments(kind)]
    assert torch.equal(model(*tensors), tensors[0])
    assert all(m.bias is None for m in model.modules() if isinstance(m, PHMLinear))


@each_alphas
@pytest.mark.parametrize("algebra_rank", [None, 7])
def test_phydi_start_of_a_transformer(alphas, algebra_rank):
    torch.manual_seed(0)
    model = PHTransformer(D, HEADS, N, 3, 3, FEED, norm="phydi", alphas=alphas, algebra_rank=algebra_rank)
    src, tgt = torch.randn(MEMORY, BATCH, D), torch.randn(LENGTH, BATCH, D)
    assert torch.equal(model(src, tgt), tgt)
    assert torch.equal(model.encoder(src), src)
    assert model.encoder.norm is None and model.decoder.norm is None


def singular_values(norm: str) -> torch.Tensor:
    """Of the Jacobian of 96 layers in float64, from all entries of the input to all of the output."""
    torch.manual_seed(0)
    layer = PHTransformerEncoderLayer(8, 2, 4, 16, 0.0, norm=norm, dtype=torch.float64)
    model = PHTransformerEncoder(layer, 96)
    x = normal((4, 1, 8), 0)
    jacobian = torch.autograd.functional.jacobian(model, x).reshape(32, 32)
    if norm in ("phydi", "fixup"):
        assert torch.equal(jacobian, torch.eye(32, dtype=torch.float64))
    return torch.linalg.svdvals(jacobian)


def test_dynamical_isometry():
    """All singular values of the input-output Jacobian are 1 with PHYDI; with PostNorm none is near 1, nor the next."""
    assert (singular_values("phydi") - 1).abs().max() <= 1e-14
    post = singular_values("post")
    # A normalisation takes two directions of each of the four positions: the mean and the scale.
    assert (post[24:] < 1e-15).all()
    assert ((post - 1).abs() > 0.5).all()
    assert post[0] > 1e6 * post[23]


@each_kind
def test_alpha_learns_first(kind):
    """At a PHYDI start dalpha = <dy, att(x) + ff(x)>; no weight receives a gradient."""
    layer = make(kind, "phydi", dtype=torch.float64)
    tensors = arguments(kind)
    weights = normal(tensors[0].shape, 3)
    (layer(*tensors) * weights).sum().backward()
    x = tensors[0]
    total = sum(branch(x) for branch in branches_of(layer, *([None, *tensors[1:]][-1:])))
    torch.testing.assert_close(layer.alpha.grad, (total * weights).sum().detach().reshape(1), **TOLERANCE)
    for name, p in layer.named_parameters():
        if name != "alpha":
            assert not p.grad.any(), name
    torch.testing.assert_close(x.grad, weights, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"kron_weights": True}, {"algebra_rank": 7}], ids=["A", "weighted", "terms"])
@each_kind
def test_fixup_scales_all_but_the_last_product_of_a_branch(kind, options):
    """By L^(-1/2) for L branches of two products, against a stack with the same draws that scales none."""
    count = 6
    models = []
    for norm in ("fixup", "phydi"):
        torch.manual_seed(0)
        models.append(stack(kind, norm, count, dtype=torch.float64, **options))
    fixup, plain = (dict(m.named_modules()) for m in models)
    L = count * (2 if kind == "encoder" else 3)
    names = [name for name, m in fixup.items() if isinstance(m, PHMLinear)]
    assert len(names) == count * (4 if kind == "encoder" else 8)
    for name in names:
        if name.endswith(("out_proj", "linear2")):
            assert not fixup[name].dense_weight().any(), name
            assert not fixup[name].bias.any(), name
            assert plain[name].dense_weight().any(), name
        else:
            expected = plain[name].dense_weight() * L**-0.5
            torch.testing.assert_close(fixup[name].dense_weight(), expected, **TOLERANCE)
    for layer in models[0].layers:
        assert all(scale.weight.tolist() == [1.0] for scale in layer.scales)
        assert all(shift.bias.tolist() == [0.0] for shift in layer.shifts)


@pytest.mark.parametrize("norm", ["phydi", "fixup"])
@each_kind
def test_stacks_learn_to_leave_the_identity(kind, norm):
    torch.manual_seed(0)
    model = stack(kind, norm, 3)
    tensors = [t.detach().float() for t in arguments(kind)]
    target = torch.randn_like(tensors[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(*tensors), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    for module in model.layers:
        module.reset_parameters()
    assert torch.equal(model(*tensors), tensors[0])


@each_norm
@each_kind
def test_weighted_kronecker_products(kind, norm):
    """WKP: every product weighs its terms, with 1 at the start."""
    model = stack(kind, norm, 2, kron_weights=True)
    products = [m for m in model.modules() if isinstance(m, PHMLinear)]
    assert len(products) == (8 if kind == "encoder" else 16)
    assert all(m.kron_weights.tolist() == [1.0] * N for m in products)


@each_norm
@each_kind
def test_copies_of_a_layer_are_drawn_anew(kind, norm):
    torch.manual_seed(0)
    layer = make(kind, norm)
    model = STACKS[kind](layer, 3)
    assert len(model.layers) == model.num_layers == 3
    weights = [m.linear1.F for m in (layer, *model.layers)]
    weights += [m.self_attn.in_proj.F / m.self_attn.in_proj.F.norm() for m in (layer, *model.layers)]
    for i, first in enumerate(weights):
        for second in weights[i + 1 :]:
            assert first.shape != second.shape or not torch.allclose(first, second)
    variances = [m.linear1.dense_weight().square().mean() for m in model.layers]
    assert max(variances) < 2 * min(variances)


def test_copies_of_another_module():
    """Torch's own layers can be stacked; a normalisation follows the last."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(D, HEADS, FEED, 0.0)
    norm = nn.LayerNorm(D)
    model = PHTransformerEncoder(theirs, 2, norm)
    x = torch.randn(LENGTH, BATCH, D)
    expected = norm(model.layers[1](model.layers[0](x)))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("norm", ["post", "pre"])
@each_kind
def test_stack_is_torchs_with_dense_weights(kind, norm):
    ours = STACKS[kind](make(kind, norm, dtype=torch.float64), 3, nn.LayerNorm(D, dtype=torch.float64))
    randomize(ours)
    last = nn.LayerNorm(D, dtype=torch.float64, device="meta")
    options = {"enable_nested_tensor": False} if kind == "encoder" else {}
    theirs = STACK_TWINS[kind](twin_layer(kind, norm), 3, norm=last, **options)
    tensors = arguments(kind)
    names = {"src_mask": "mask"} if kind == "encoder" else {}
    masks = {names.get(name, name): mask for name, mask in MASKS[kind].items()}
    assert_same_function(
        lambda: ours(*tensors, **masks), lambda: call_twin(theirs, ours, *tensors, **masks), ours, tensors
    )
    without = {name: mask for name, mask in masks.items() if name not in ("mask", "tgt_mask", "memory_mask")}
    flags = {"is_causal": True} if kind == "encoder" else {"tgt_is_causal": True, "memory_is_causal": True}
    torch.testing.assert_close(ours(*tensors, **without, **flags), ours(*tensors, **masks), **TOLERANCE)


TRANSFORMER_MASKS = {
    "src_mask": causal(MEMORY),
    "tgt_mask": causal(LENGTH),
    "memory_mask": causal(LENGTH, MEMORY),
    "src_key_padding_mask": padding(MEMORY),
    "tgt_key_padding_mask": padding(LENGTH),
    "memory_key_padding_mask": padding(MEMORY),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("option", ["plain", "gelu", "eps_without_bias", "batch_first", "weighted_terms"])
def test_transformer_is_torchs_with_dense_weights(norm, option):
    shared, only_ours = OPTIONS[option]
    sizes = {"num_encoder_layers": 2, "num_decoder_layers": 3, "dim_feedforward": FEED, "dropout": 0.0, **shared}
    ours = randomize(PHTransformer(D, HEADS, N, **sizes, **only_ours, norm=norm, dtype=torch.float64), 0.4)
    theirs = nn.Transformer(D, HEADS, **sizes, norm_first=norm == "pre", dtype=torch.float64, device="meta")
    tgt, src = arguments("decoder", option == "batch_first")
    for masks in ({}, TRANSFORMER_MASKS):
        assert_same_function(
            lambda masks=masks: ours(src, tgt, **masks),
            lambda masks=masks: call_twin(theirs, ours, src, tgt, **masks),
            ours,
            [src, tgt],
        )
    without = {name: mask for name, mask in TRANSFORMER_MASKS.items() if "padding" in name}
    flags = {"src_is_causal": True, "tgt_is_causal": True, "memory_is_causal": True}
    torch.testing.assert_close(ours(src, tgt, **without, **flags), ours(src, tgt, **TRANSFORMER_MASKS), **TOLERANCE)


def test_square_subsequent_mask():
    mask = PHTransformer.generate_square_subsequent_mask(3)
    assert mask.tolist() == [[0, -torch.inf, -torch.inf], [0, 0, -torch.inf], [0, 0, 0]]


@each_kind
def test_one_sequence(kind):
    layer = randomize(make(kind, "phydi", dtype=torch.float64))
    tensors = arguments(kind)
    alone = layer(*[t[:, 0] for t in tensors])
    assert alone.shape == (LENGTH, D)
    torch.testing.assert_close(alone, layer(*tensors)[:, 0], **TOLERANCE)


@each_norm
@each_kind
def test_empty_batch(kind, norm):
    layer = randomize(make(kind, norm, dtype=torch.float64))
    tensors = [t[:, :0] for t in arguments(kind)]
    y = layer(*tensors)
    assert y.shape == (LENGTH, 0, D)
    y.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in layer.parameters())


@each_norm_and_a_decoder
def test_second_derivatives(kind, norm):
    layer = LAYERS[kind](4, 2, 2, 4, 0.0, "gelu", norm=norm, kron_weights=True, dtype=torch.float64)
    randomize(layer)
    names = [name for name, _ in layer.named_parameters()]
    tensors = [normal((3, 2, 4), i).requires_grad_() for i in range(1 if kind == "encoder" else 2)]

    def call(*tensors):
        count = len(tensors) - len(names)
        return torch.func.functional_call(layer, dict(zip(names, tensors[count:], strict=True)), tensors[:count])

    # The fused kernel of scaled_dot_product_attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(call, (*tensors, *layer.parameters()), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, (*tensors, *layer.parameters()), fast_mode=True)


@each_norm
def test_given_algebra_of_every_product(norm):
    options = {"init": algebra.quaternions(), "learn_algebra": False}
    model = PHTransformer(D, HEADS, N, 1, 1, FEED, norm=norm, **options)
    products = [m for m in model.modules() if isinstance(m, PHMLinear)]
    assert len(products) == 4 + 8
    for m in products:
        assert torch.equal(m.A, algebra.quaternions().float()) and not m.A.requires_grad


@each_norm
def test_optimize_for_inference(norm):
    model = randomize(PHTransformer(D, HEADS, N, 1, 1, FEED, norm=norm, algebra_rank=7, dtype=torch.float64)).eval()
    optimized = optimize_for_inference(model, verbose=False)
    tgt, src = arguments("decoder")
    torch.testing.assert_close(optimized(src, tgt), model(src, tgt), **TOLERANCE)
    assert not any(isinstance(m, PHMLinear) for m in optimized.modules())


@each_norm
@each_alphas
def test_copies_compute_the_same(norm, alphas):
    options = {"alphas": alphas, "algebra_rank": 7, "kron_weights": True}
    model = randomize(PHTransformer(D, HEADS, N, 1, 2, FEED, norm=norm, **options)).eval()
    tgt, src = (t.detach().float() for t in arguments("decoder"))
    y = model(src, tgt)
    y.sum().backward()
    fresh = PHTransformer(D, HEADS, N, 1, 2, FEED, norm=norm, **options).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(src, tgt), y)


def test_published_names():
    """Of the parameters of the published encoder layer, the weights under each projection's name."""
    layer = make("encoder", "phydi", alphas="separate")
    products = [f"{name}.{p}" for name in ("self_attn.in_proj", "self_attn.out_proj") for p in ("A", "F", "bias")]
    products += [f"{name}.{p}" for name in ("linear1", "linear2") for p in ("A", "F", "bias")]
    assert set(layer.state_dict()) == {*products, "alpha1", "alpha2"}
    post = set(make("encoder", "post").state_dict())
    assert post == {*products, *(f"norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias"))}


@each_norm_and_a_decoder
def test_compile_and_export(kind, norm):
    model = randomize(stack(kind, norm, 1, batch_first=True, dtype=torch.float64)).eval()
    flags = {"is_causal": True} if kind == "encoder" else {"tgt_is_causal": True}

    def draw(batch):
        lengths = (LENGTH,) if kind == "encoder" else (LENGTH, MEMORY)
        return tuple(normal((batch, length, D), batch + length) for length in lengths)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = torch.export.Dim("batch")
    names = ("src",) if kind == "encoder" else ("tgt", "memory")
    shapes = {name: {0: batch} for name in names} | dict.fromkeys(flags)
    exported = torch.export.export(model, draw(4), flags, dynamic_shapes=shapes).module()
    tensors = draw(6)
    y = model(*tensors, **flags)
    torch.testing.assert_close(compiled(*tensors, **flags), y, **TOLERANCE)
    torch.testing.assert_close(exported(*tensors, **flags), y, **TOLERANCE)
    parameters = [p for _, p in sorted(model.named_parameters())]
    grads = torch.autograd.grad(compiled(*tensors, **flags).square().sum(), parameters)
    for actual, expected in zip(grads, torch.autograd.grad(y.square().sum(), parameters), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_compiled_transformer_in_training():
    """One graph, with dropout, and the start of PHYDI in it."""
    model = PHTransformer(D, HEADS, N, 1, 1, FEED, norm="phydi")
    tgt, src = (t.detach().float() for t in arguments("decoder"))
    torch._dynamo.reset()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(src, tgt)
    assert torch.equal(y, tgt)
    y.sum().backward()
    assert all(layer.alpha.grad.any() for layer in model.decoder.layers)


@each_norm
@each_kind
def test_vmap(kind, norm):
    """Over sequences, and over models."""
    layer = randomize(make(kind, norm, dtype=torch.float64))
    tensors = [t.detach() for t in arguments(kind)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = layer(*tensors)
        mapped = torch.func.vmap(layer, in_dims=1, out_dims=1)(*tensors)
        torch.testing.assert_close(mapped, expected, **TOLERANCE)
        models = [randomize(copy.deepcopy(layer), scale) for scale in (0.3, 0.6)]
        stacked, _ = torch.func.stack_module_state(models)
        outputs = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, tuple(tensors)))(stacked)
        torch.testing.assert_close(outputs, torch.stack([m(*tensors) for m in models]), **TOLERANCE)


@each_norm
@each_kind
def test_autocast(kind, norm):
    torch.manual_seed(0)
    model = stack(kind, norm, 2)
    randomize(model, 0.3)
    tensors = [t.detach().float() for t in arguments(kind)]
    expected = model(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(*tensors)
    assert ((y - expected).norm() / expected.norm()).item() < 0.03
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@each_kind
def test_phydi_start_under_autocast(kind):
    model = stack(kind, "phydi", 4, dropout=0.1)
    tensors = [t.detach().float() for t in arguments(kind)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(*tensors), tensors[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each_norm
def test_dtype(norm, dtype):
    made = PHTransformer(D, HEADS, N, 1, 1, FEED, norm=norm, dtype=dtype).eval()
    assert {p.dtype for p in made.parameters()} == {dtype}
    tgt, src = (t.detach().to(dtype) for t in arguments("decoder"))
    y = made(src, tgt)
    expected = copy.deepcopy(made).double()(src.double(), tgt.double())
    assert y.dtype == dtype
    assert ((y.double() - expected).norm() / expected.norm()).item() < 8 * torch.finfo(dtype).eps


@each_norm
def test_meta_device(norm):
    model = PHTransformer(D, HEADS, N, 2, 1, FEED, norm=norm, device="meta")
    assert all(p.is_meta for p in model.parameters())
    tensors = [torch.empty(LENGTH, BATCH, D, device="meta") for _ in range(2)]
    assert model(*tensors).is_meta
    concrete = model.to_empty(device="cpu")
    # Parents before their parts: no start depends on the order.
    for module in concrete.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(LENGTH, BATCH, D)
    y = concrete.eval()(x, x)
    assert torch.equal(y, x) if norm in ("phydi", "fixup") else y.isfinite().all()


ERRORS = [
    ({"d_model": 18}, ValueError, "d_model=18 is not divisible by n=4; 16 and 20 are the nearest sizes that are"),
    ({"dim_feedforward": 25}, ValueError, "dim_feedforward=25 is not divisible by n=4; 24 and 28 are the nearest"),
    ({"nhead": 3}, ValueError, "d_model=16 is not divisible by nhead=3"),
    ({"nhead": 0}, ValueError, "nhead=0 must be an integer >= 1"),
    ({"n": 0}, ValueError, "n=0 must be an integer >= 1"),
    ({"n": 2.0}, TypeError, "n=2.0 must be an integer >= 1, not float"),
    ({"norm": "rezero"}, ValueError, "norm='rezero' is not one of 'post', 'pre', 'phydi', 'fixup'"),
    ({"alphas": "both"}, ValueError, 'alphas=\'both\' is not one of "shared", "separate"'),
    ({"dropout": -0.1}, ValueError, "dropout=-0.1 must be a probability from 0 to 1"),
    ({"dropout": None}, TypeError, "dropout=None"),
    ({"activation": "swish"}, ValueError, "activation='swish' is not one of 'relu', 'gelu' or a callable"),
    ({"activation": 3}, TypeError, "activation=3 must be"),
    ({"algebra_rank": 17}, ValueError, "algebra_rank=17"),
    ({"init": "xavier"}, ValueError, "init='xavier'"),
    ({"bias": 1}, TypeError, "bias=1 must be True or False"),
    ({"batch_first": "yes"}, TypeError, "batch_first='yes' must be True or False"),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS)
@pytest.mark.parametrize("cls", [*LAYERS.values(), PHTransformer])
def test_constructor_errors(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(**{"d_model": D, "nhead": HEADS, "n": N, "dim_feedforward": FEED, **options})


@each_kind
def test_errors_of_a_stack(kind):
    with pytest.raises(ValueError, match="num_layers=0 must be an integer >= 1"):
        STACKS[kind](make(kind), 0)
    with pytest.raises(TypeError, match="num_layers=2.0 must be an integer >= 1, not float"):
        STACKS[kind](make(kind), 2.0)
    with pytest.raises(TypeError, match="layer must be a torch.nn.Module, not function"):
        STACKS[kind](lambda x: x, 2)


def test_errors_of_a_transformer():
    for name in ("num_encoder_layers", "num_decoder_layers"):
        with pytest.raises(ValueError, match=f"{name}=0 must be an integer >= 1"):
            PHTransformer(D, HEADS, N, dim_feedforward=FEED, **{name: 0})
    model = PHTransformer(D, HEADS, N, 1, 1, FEED)
    x = torch.randn(LENGTH, BATCH, D)
    with pytest.raises(ValueError, match=r"shape \(5, 2, 16\)|\(5, 2, 16\)"):
        model(x[:, :2], x)
    with pytest.raises(ValueError, match=r"shape \(5, 3, 12\)"):
        model(x[..., :12], x)
    with pytest.raises(ValueError, match=r"attn_mask has shape \(4, 4\)"):
        model(x, x, torch.zeros(4, 4))


def test_sub_layers():
    decoder = make("decoder")
    assert isinstance(decoder.self_attn, PHMMultiheadAttention)
    assert isinstance(decoder.multihead_attn, PHMMultiheadAttention)
    assert [name for name, m in decoder.named_children() if isinstance(m, PHMLinear)] == ["linear1", "linear2"]
    assert [name for name, _ in decoder.named_children() if name.startswith("norm")] == ["norm1", "norm2", "norm3"]


@pytest.mark.parametrize("norm", ["post", "phydi"])
def test_other_modules_and_hooks_in_the_place_of_a_linear_layer(norm):
    """A wrapped or hooked layer computes what it computed, and a hook sees its own result."""
    layer = randomize(PHTransformerEncoderLayer(D, HEADS, N, FEED, 0.0, norm=norm, dtype=torch.float64))
    x = normal((LENGTH, BATCH, D), 1)
    expected = layer(x)
    own = copy.deepcopy(layer)
    for parent, name in ((own, "linear1"), (own, "linear2"), (own.self_attn, "out_proj")):
        part = getattr(parent, name)
        dense = nn.Linear(part.in_features, part.out_features, dtype=torch.float64)
        dense.load_state_dict({"weight": part.dense_weight(), "bias": part.bias})
        setattr(parent, name, dense)
    torch.testing.assert_close(own(x), expected, **TOLERANCE)
    seen = {}
    layer.linear1.register_forward_hook(lambda module, args, y: seen.update(hidden=y, x=args[0]))
    layer.linear2.register_forward_hook(lambda module, args, y: seen.update(y=y))
    torch.testing.assert_close(layer(x), expected, **TOLERANCE)
    torch.testing.assert_close(seen["y"], layer.linear2(torch.relu(layer.linear1(seen["x"]))), **TOLERANCE)


def test_a_stack_names_what_it_cannot_take():
    layer = PHTransformerEncoderLayer(D, HEADS, N, FEED)
    with pytest.raises(TypeError, match="norm='pre' must be a torch.nn.Module or None"):
        PHTransformerEncoder(layer, 2, norm="pre")
    factored = optimize_for_inference(layer.eval(), progress=False, verbose=False)
    with pytest.raises(TypeError, match="encoder_layer holds a FactoredPHMLinear, which cannot be drawn anew"):
        PHTransformerEncoder(factored, 2)
    with pytest.raises(TypeError, match="encoder_layer must be a torch.nn.Module, not str"):
        PHTransformerEncoder("layer", 2)
    with pytest.raises(ValueError, match=r"src has shape \(3, 2, 12\).*d_model=16"):
        layer(torch.zeros(3, 2, 12))


@pytest.mark.parametrize("norm", ["post", "pre", "phydi"])
def test_dtype_under_autocast_is_that_of_evaluation(norm):
    layer = PHTransformerEncoderLayer(D, HEADS, N, FEED, 0.1, norm=norm)
    x = torch.randn(LENGTH, BATCH, D).bfloat16()
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.train()(x, mask).dtype == layer.eval()(x, mask).dtype
