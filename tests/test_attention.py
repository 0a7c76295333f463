"""PHMMultiheadAttention against torch.nn.MultiheadAttention with the dense weights of its projections."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from dense_twins import TOLERANCE, Record, assert_same_function, call_twin, randomize
from helpers import normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from phydi_kernels import algebra
from phydi_kernels.nn import PHMLinear, PHMMultiheadAttention

EMBED, HEADS, N = 16, 4, 4
BATCH, LENGTH, KEYS = 3, 5, 7

# Arguments of torch's layer, and what only ours has.
LAYERS = {
    "fused": ({}, {}),
    "separate": ({}, {"fused_qkv": False}),
    "without_bias": ({"bias": False}, {}),
    "separate_without_bias": ({"bias": False}, {"fused_qkv": False}),
    "kdim_vdim": ({"kdim": 8, "vdim": 12}, {}),
    "vdim": ({"vdim": 8}, {}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "zero_attn": ({"add_zero_attn": True}, {}),
    "bias_kv_zero_attn_kdim": ({"add_bias_kv": True, "add_zero_attn": True, "kdim": 8}, {}),
    "batch_first": ({"batch_first": True}, {}),
    "batch_first_zero_attn": ({"batch_first": True, "add_zero_attn": True}, {"fused_qkv": False}),
    "terms": ({}, {"algebra_rank": 7}),
    "weighted_terms": ({}, {"algebra_rank": 5, "kron_weights": True, "fused_qkv": False}),
    "weighted": ({}, {"kron_weights": True}),
}


def padding(length: int = KEYS) -> torch.Tensor:
    """True at the end of each sequence but the first, at another place in each."""
    return torch.arange(length) >= length - torch.arange(BATCH)[:, None]


def scattered(*shape: int) -> torch.Tensor:
    """True in places, never at the first key."""
    mask = normal(shape, 5) > 0.6
    mask[..., 0] = False
    return mask


def causal(length: int, keys: int) -> torch.Tensor:
    return torch.ones(length, keys, dtype=torch.bool).triu(1)


def additive(mask: torch.Tensor) -> torch.Tensor:
    """What is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)


def masks(length: int) -> dict[str, dict[str, torch.Tensor]]:
    """Of queries of this length, and KEYS keys."""
    every = (BATCH * HEADS, length, KEYS)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding()},
        "padding_float": {"key_padding_mask": normal((BATCH, KEYS), 1)},
        "2d": {"attn_mask": scattered(length, KEYS)},
        "2d_float": {"attn_mask": normal((length, KEYS), 2)},
        "3d": {"attn_mask": scattered(*every)},
        "3d_float": {"attn_mask": normal(every, 3)},
        "padding_2d": {"key_padding_mask": padding(), "attn_mask": scattered(length, KEYS)},
        "padding_3d_float": {"key_padding_mask": normal((BATCH, KEYS), 4), "attn_mask": normal(every, 5)},
    }


MASKS = masks(LENGTH)
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_mask = pytest.mark.parametrize("mask", MASKS)
each_weights = pytest.mark.parametrize("need_weights", [False, True])


def twins(kind: str) -> tuple[PHMMultiheadAttention, nn.MultiheadAttention]:
    """Ours with random parameters, and torch's without any."""
    theirs, only_ours = LAYERS[kind]
    ours = PHMMultiheadAttention(EMBED, HEADS, N, **theirs, **only_ours, dtype=torch.float64)
    return randomize(ours), nn.MultiheadAttention(EMBED, HEADS, **theirs, dtype=torch.float64, device="meta")


def arguments(layer: nn.MultiheadAttention, length: int = LENGTH, keys: int = KEYS) -> list[torch.Tensor]:
    """Query, key and value that require gradients."""
    shapes = [(length, BATCH, EMBED), (keys, BATCH, layer.kdim), (keys, BATCH, layer.vdim)]
    tensors = [normal(shape, 10 + i) for i, shape in enumerate(shapes)]
    return [(t.transpose(0, 1) if layer.batch_first else t).contiguous().requires_grad_() for t in tensors]


@each_layer
@each_mask
def test_values_and_gradients(kind, mask):
    ours, theirs = twins(kind)
    tensors = arguments(theirs)
    for need_weights, average in ((True, True), (True, False), (False, True)):
        options = {**MASKS[mask], "need_weights": need_weights, "average_attn_weights": average}
        assert_same_function(
            lambda options=options: ours(*tensors, **options)[0],
            lambda options=options: call_twin(theirs, ours, *tensors, **options)[0],
            ours,
            tensors,
        )
        weights, expected = ours(*tensors, **options)[1], call_twin(theirs, ours, *tensors, **options)[1]
        if need_weights:
            torch.testing.assert_close(weights, expected, **TOLERANCE)
        else:
            assert weights is None


@pytest.mark.parametrize("kind", ["fused", "separate", "batch_first", "bias_kv"])
@each_weights
def test_self_attention(kind, need_weights):
    """One tensor for query, key and value takes the one product of the fused projection."""
    ours, theirs = twins(kind)
    x = arguments(theirs)[0]
    assert_same_function(
        lambda: ours(x, x, x, need_weights=need_weights)[0], lambda: call_twin(theirs, ours, x, x, x)[0], ours, [x]
    )


@each_weights
@pytest.mark.parametrize("length", [LENGTH, KEYS])
def test_key_and_value_are_one_tensor(length, need_weights):
    """The query is another, of another length or of the same."""
    ours, theirs = twins("fused")
    query, memory, _ = arguments(theirs, length)
    assert_same_function(
        lambda: ours(query, memory, memory, need_weights=need_weights)[0],
        lambda: call_twin(theirs, ours, query, memory, memory)[0],
        ours,
        [query, memory],
    )
    # Equal values in two tensors, and the same query and key with another value.
    other = memory.detach().clone()
    torch.testing.assert_close(ours(query, memory, other), ours(query, memory, memory))
    torch.testing.assert_close(
        ours(memory, memory, other.neg())[0], call_twin(theirs, ours, memory, memory, other.neg())[0], **TOLERANCE
    )


@pytest.mark.parametrize("kind", ["fused", "kdim_vdim", "bias_kv", "zero_attn", "bias_kv_zero_attn_kdim"])
@each_mask
@each_weights
def test_causal_mask(kind, mask, need_weights):
    """is_causal by itself, and together with each other mask, which torch's layer takes as one."""
    ours, theirs = twins(kind)
    tensors = arguments(theirs, KEYS)
    given = masks(KEYS)[mask]
    other = given.get("attn_mask", torch.zeros(KEYS, KEYS, dtype=torch.bool))
    expected = {name: additive(t) for name, t in given.items()}
    expected["attn_mask"] = additive(other).masked_fill(causal(KEYS, KEYS), -torch.inf)
    assert_same_function(
        lambda: ours(*tensors, **given, is_causal=True, need_weights=need_weights)[0],
        lambda: call_twin(theirs, ours, *tensors, **expected)[0],
        ours,
        tensors,
    )


@pytest.mark.parametrize(("length", "keys"), [(5, 7), (7, 5)])
@each_weights
def test_causal_mask_of_other_keys(length, keys, need_weights):
    """Query i attends to the keys up to i."""
    ours, theirs = twins("fused")
    tensors = arguments(theirs, length, keys)
    expected, weights = call_twin(theirs, ours, *tensors, attn_mask=causal(length, keys))
    y, w = ours(*tensors, is_causal=True, need_weights=need_weights)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    if need_weights:
        torch.testing.assert_close(w, weights, **TOLERANCE)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [torch.bool, torch.float64], ids=["bool", "float"])
@pytest.mark.parametrize("masked", [torch.bool, torch.float64], ids=["bool", "float"])
def test_masks_of_two_dtypes(masked, padded, need_weights):
    ours, theirs = twins("fused")
    tensors = arguments(theirs)

    masks = {"key_padding_mask": (padding(), padded), "attn_mask": (scattered(LENGTH, KEYS), masked)}
    expected = call_twin(theirs, ours, *tensors, **{name: additive(mask) for name, (mask, _) in masks.items()})[0]
    given = {name: mask if dtype == torch.bool else additive(mask) for name, (mask, dtype) in masks.items()}
    torch.testing.assert_close(ours(*tensors, **given, need_weights=need_weights)[0], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["fused", "kdim_vdim", "bias_kv", "batch_first", "zero_attn"])
@each_weights
def test_one_sequence(kind, need_weights):
    ours, theirs = twins(kind)
    batch = 1 if theirs.batch_first else 0
    tensors = [t.detach().select(1 - batch, 0).requires_grad_() for t in arguments(theirs)]
    masks = (
        {},
        {"key_padding_mask": padding()[1]},
        {"attn_mask": scattered(LENGTH, KEYS)},
        {"attn_mask": scattered(HEADS, LENGTH, KEYS), "key_padding_mask": padding()[2]},
    )
    for mask, average in itertools.product(masks, (True, False)):
        options = {**mask, "need_weights": need_weights, "average_attn_weights": average}
        actual, expected = ours(*tensors, **options), call_twin(theirs, ours, *tensors, **options)
        assert actual[0].shape == (LENGTH, EMBED)
        for a, b in zip(actual, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("kind", ["fused", "separate", "kdim_vdim", "batch_first", "terms"])
@each_weights
def test_residual_and_alpha(kind, need_weights):
    ours, theirs = twins(kind)
    tensors = arguments(theirs)
    residual = normal(tensors[0].shape, 20).requires_grad_()
    alpha = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    options = {"need_weights": need_weights, "key_padding_mask": padding()}
    for scale, added in ((alpha, residual), (None, residual), (alpha, None)):
        assert_same_function(
            lambda scale=scale, added=added: ours(*tensors, **options, residual=added, alpha=scale)[0],
            lambda scale=scale, added=added: (
                (0 if added is None else added)
                + (1 if scale is None else scale) * call_twin(theirs, ours, *tensors, **options)[0]
            ),
            ours,
            [*tensors, *(t for t in (scale, added) if t is not None)],
        )
    zero = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(ours(*tensors, **options, residual=residual, alpha=zero)[0], residual)
    one = (
        [t.detach()[:, 0] for t in (*tensors, residual)]
        if kind != "batch_first"
        else [t.detach()[0] for t in (*tensors, residual)]
    )
    torch.testing.assert_close(
        ours(*one[:3], residual=one[3], alpha=alpha)[0], one[3] + alpha * ours(*one[:3])[0], **TOLERANCE
    )


@pytest.mark.parametrize("given", [{}, {"is_causal": True}])
def test_weights_are_not_formed_where_none_are_needed(given):
    ours = PHMMultiheadAttention(8, 2, 2, batch_first=True)
    x = torch.randn(1, 500, 8)
    with Record() as fused:
        ours(x, x, x, need_weights=False, **given)
    with Record() as formed:
        ours(x, x, x, **given)
    assert any("scaled_dot_product" in name for name in fused.names)
    assert formed.largest >= 2 * 500 * 500 > 500 * 500 > fused.largest


def test_self_attention_is_one_product():
    ours = PHMMultiheadAttention(8, 2, 2)
    calls = []
    for name, layer in ours.named_modules():
        if isinstance(layer, PHMLinear):
            layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    x = torch.randn(5, 3, 8)
    ours(x, x, x)
    assert calls == ["in_proj", "out_proj"]
    separate = PHMMultiheadAttention(8, 2, 2, fused_qkv=False)
    names = {name for name, m in separate.named_modules() if isinstance(m, PHMLinear)}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_parameters():
    shapes = {name: tuple(p.shape) for name, p in PHMMultiheadAttention(16, 4, 4).named_parameters()}
    assert shapes == {
        "in_proj.A": (4, 4, 4),
        "in_proj.F": (4, 12, 4),
        "in_proj.bias": (48,),
        "out_proj.A": (4, 4, 4),
        "out_proj.F": (4, 4, 4),
        "out_proj.bias": (16,),
    }
    options = {"kdim": 8, "vdim": 12, "add_bias_kv": True, "bias": False, "algebra_rank": 7}
    separate = PHMMultiheadAttention(16, 4, 4, **options)
    shapes = {name: tuple(p.shape) for name, p in separate.named_parameters() if name.rpartition(".")[2] not in "UVW"}
    assert shapes == {
        "bias_k": (1, 1, 16),
        "bias_v": (1, 1, 16),
        "q_proj.F": (4, 4, 4),
        "k_proj.F": (4, 4, 2),
        "v_proj.F": (4, 4, 3),
        "out_proj.F": (4, 4, 4),
    }


@each_weights
def test_dropout_in_training(need_weights):
    """The mean over draws is the result without dropout; none is dropped in evaluation."""
    torch.manual_seed(0)
    copies = 20_000
    layer = PHMMultiheadAttention(8, 2, 4, dropout=0.4, dtype=torch.float64)
    randomize(layer)
    x = normal((3, 1, 8), 0)
    repeated = x.expand(3, copies, 8)
    y = layer(repeated, repeated, repeated, need_weights=need_weights)[0]
    layer.eval()
    expected = layer(x, x, x, need_weights=need_weights)[0]
    assert torch.equal(layer(x, x, x, need_weights=need_weights)[0], expected)
    error = (y.mean(1) - expected[:, 0]).abs()
    assert (error <= 5 * y.std(1) / copies**0.5).all()
    assert (y.std(1) > 0.01).all()
    # A single head's weight is kept in a share of 0.6 of the draws: the result without any weight is the bias.
    single = randomize(PHMMultiheadAttention(4, 1, 4, dropout=0.4, dtype=torch.float64))
    z = normal((1, 1, 4), 1).expand(1, copies, 4)
    dropped = (single(z, z, z, need_weights=need_weights)[0] == single.out_proj.bias).all(-1).double().mean()
    assert dropped.item() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("kind", ["fused", "kdim_vdim", "bias_kv_zero_attn_kdim", "weighted_terms"])
@each_weights
def test_second_derivatives(kind, need_weights):
    ours, theirs = twins(kind)
    tensors = [t.detach()[:2, :1].requires_grad_() for t in arguments(theirs)]
    names = [name for name, _ in ours.named_parameters()]

    def call(*tensors):
        parameters = dict(zip(names, tensors[3:], strict=True))
        options = {"need_weights": need_weights, "is_causal": True}
        return torch.func.functional_call(ours, parameters, tensors[:3], options)[0]

    inputs = (*tensors, *ours.parameters())
    # The fused kernel of scaled_dot_product_attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@each_layer
def test_copies_compute_the_same(kind):
    theirs, only_ours = LAYERS[kind]
    layer = randomize(PHMMultiheadAttention(EMBED, HEADS, N, **theirs, **only_ours))
    tensors = [t.detach().float() for t in arguments(twins(kind)[1])]
    y = layer(*tensors)[0]
    y.sum().backward()
    fresh = PHMMultiheadAttention(EMBED, HEADS, N, **theirs, **only_ours)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(*tensors)[0], y)


@pytest.mark.parametrize("kind", ["fused", "kdim_vdim", "bias_kv"])
@each_weights
def test_compile_and_export(kind, need_weights):
    theirs, only_ours = LAYERS[kind]
    layer = PHMMultiheadAttention(EMBED, HEADS, N, **theirs, **only_ours, batch_first=True).eval()
    sizes = (EMBED, theirs.get("kdim", EMBED), theirs.get("vdim", EMBED))
    options = {"need_weights": need_weights, "is_causal": True}

    def draw(batch):
        return tuple(torch.randn(batch, KEYS, size) for size in sizes)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in ("query", "key", "value")} | dict.fromkeys(options)
    exported = torch.export.export(layer, draw(4), options, dynamic_shapes=shapes).module()
    tensors = draw(6)
    y = layer(*tensors, **options)[0]
    torch.testing.assert_close(compiled(*tensors, **options)[0], y)
    torch.testing.assert_close(exported(*tensors, **options)[0], y)
    parameters = list(layer.parameters())
    grads = torch.autograd.grad(compiled(*tensors, **options)[0].square().sum(), parameters)
    for actual, expected in zip(grads, torch.autograd.grad(y.square().sum(), parameters), strict=True):
        torch.testing.assert_close(actual, expected)


@each_weights
def test_vmap(need_weights):
    """Over sequences, and over parameters."""
    layer, theirs = twins("fused")
    query, key, value = (t.detach() for t in arguments(theirs))
    options = {"need_weights": need_weights}

    def one(query, key, value):
        return layer(query, key, value, **options)[0]

    def with_parameters(parameters):
        return torch.func.functional_call(layer, parameters, (query, key, value), options)[0]

    models = [randomize(copy.deepcopy(layer), scale) for scale in (0.3, 0.6)]
    stacked, _ = torch.func.stack_module_state(models)
    # The fused kernel of scaled_dot_product_attention warns that it is mapped one by one.
    with sdpa_kernel(SDPBackend.MATH):
        mapped = torch.func.vmap(one, in_dims=1, out_dims=1)(query, key, value)
        torch.testing.assert_close(mapped, one(query, key, value), **TOLERANCE)
        outputs = torch.func.vmap(with_parameters)(stacked)
        expected = torch.stack([m(query, key, value, **options)[0] for m in models])
        torch.testing.assert_close(outputs, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["fused", "separate", "bias_kv"])
@each_weights
def test_empty_batch(kind, need_weights):
    ours, theirs = twins(kind)
    tensors = [t.detach()[:, :0].requires_grad_() for t in arguments(theirs)]
    y, weights = ours(*tensors, need_weights=need_weights)
    assert y.shape == (LENGTH, 0, EMBED)
    y.sum().backward()
    assert not any(p.grad.any() for p in ours.parameters() if p.grad is not None)
    assert (weights is None) is not need_weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_weights
def test_16_bits(dtype, need_weights):
    layer = PHMMultiheadAttention(EMBED, HEADS, N, dtype=dtype)
    x = torch.randn(LENGTH, BATCH, EMBED).to(dtype)
    y = layer(x, x, x, need_weights=need_weights, is_causal=True, key_padding_mask=padding(LENGTH))[0]
    exact = copy.deepcopy(layer).double()
    expected = exact(*[x.double()] * 3, is_causal=True, key_padding_mask=padding(LENGTH))[0]
    assert y.dtype == dtype
    assert ((y.double() - expected).norm() / expected.norm()).item() < 4 * torch.finfo(dtype).eps


@each_weights
def test_autocast(need_weights):
    layer = PHMMultiheadAttention(EMBED, HEADS, N)
    x = torch.randn(LENGTH, BATCH, EMBED)
    options = {"need_weights": need_weights, "key_padding_mask": padding(LENGTH).float().mul(-9)}
    expected = layer(x, x, x, **options)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, x, x, **options)[0]
        added = layer(x, x, x, **options, residual=x, alpha=torch.zeros(1))[0]
    assert y.dtype == torch.bfloat16
    assert ((y - expected).norm() / expected.norm()).item() < 0.03
    assert torch.equal(added, x)


def test_meta_device():
    layer = PHMMultiheadAttention(EMBED, HEADS, N, device="meta", add_bias_kv=True)
    assert all(p.is_meta for p in layer.parameters())
    x = torch.empty(LENGTH, BATCH, EMBED, device="meta")
    y, weights = layer(x, x, x)
    assert y.is_meta and y.shape == x.shape
    assert weights.shape == (BATCH, LENGTH, LENGTH + 1)


@each_weights
def test_autocast_with_added_keys(need_weights):
    """These are float32 beside products of 16 bits."""
    layer = PHMMultiheadAttention(EMBED, HEADS, N, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(LENGTH, BATCH, EMBED)
    expected = layer(x, x, x, is_causal=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, x, x, is_causal=True, need_weights=need_weights)[0]
    assert y.dtype == torch.bfloat16
    assert ((y - expected).norm() / expected.norm()).item() < 0.03


@each_weights
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_gradient_of_a_mask(name, need_weights):
    """Such as a learned bias of positions."""
    ours, theirs = twins("fused")
    tensors = arguments(theirs)
    mask = normal((LENGTH, KEYS) if name == "attn_mask" else (BATCH, KEYS), 6).requires_grad_()
    assert_same_function(
        lambda: ours(*tensors, **{name: mask}, need_weights=need_weights)[0],
        lambda: call_twin(theirs, ours, *tensors, **{name: mask})[0],
        ours,
        [*tensors, mask],
    )


def test_given_algebra_of_every_projection():
    options = {"init": algebra.quaternions(), "learn_algebra": False}
    for fused, count in ((True, 2), (False, 4)):
        layer = PHMMultiheadAttention(EMBED, HEADS, N, fused_qkv=fused, **options)
        projections = [m for m in layer.modules() if isinstance(m, PHMLinear)]
        assert len(projections) == count
        for m in projections:
            assert torch.equal(m.A, algebra.quaternions().float()) and not m.A.requires_grad


def call(layer: PHMMultiheadAttention, *shapes: tuple[int, ...], **options):
    tensors = [torch.randn(shape) for shape in shapes]
    return layer(*(tensors * 3 if len(tensors) == 1 else tensors), **options)


X = (LENGTH, BATCH, EMBED)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PHMMultiheadAttention(16, 3, 4), ValueError, "embed_dim=16 is not divisible by num_heads=3"),
        (lambda: PHMMultiheadAttention(18, 3, 4), ValueError, "embed_dim=18 is not divisible by n=4"),
        (lambda: PHMMultiheadAttention(16, 4, 4, kdim=10), ValueError, "kdim=10 is not divisible by n=4"),
        (lambda: PHMMultiheadAttention(16, 4, 4, vdim=10), ValueError, "vdim=10 is not divisible by n=4"),
        (lambda: PHMMultiheadAttention(16, 0, 4), ValueError, "num_heads=0 must be an integer >= 1"),
        (lambda: PHMMultiheadAttention(16, 4.0, 4), TypeError, "num_heads=4.0 must be an integer >= 1, not float"),
        (lambda: PHMMultiheadAttention(16, 4, 0), ValueError, "n=0 must be an integer >= 1"),
        (lambda: PHMMultiheadAttention(16, 4, 4, dropout=1.5), ValueError, r"dropout=1.5"),
        (lambda: PHMMultiheadAttention(16, 4, 4, dropout="a"), TypeError, r"dropout='a'"),
        (
            lambda: PHMMultiheadAttention(16, 4, 4, kdim=8, fused_qkv=True),
            ValueError,
            r"fused_qkv=True .*embed_dim=16, not 8 and 16",
        ),
        (lambda: PHMMultiheadAttention(16, 4, 4, fused_qkv="yes"), TypeError, "fused_qkv='yes'"),
        (lambda: PHMMultiheadAttention(16, 4, 4, batch_first=1), TypeError, "batch_first=1 must be True or False"),
        (lambda: PHMMultiheadAttention(16, 4, 4, algebra_rank=17), ValueError, "algebra_rank=17"),
    ],
)
def test_constructor_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        ([(LENGTH, BATCH, 12)], {}, ValueError, r"query has shape \(5, 3, 12\).* 16"),
        ([X, (KEYS, BATCH, 12), (KEYS, BATCH, EMBED)], {}, ValueError, r"key has shape \(7, 3, 12\)"),
        ([X, (KEYS, BATCH, EMBED), (KEYS, BATCH, 12)], {}, ValueError, r"value has shape \(7, 3, 12\)"),
        (
            [X, (KEYS, BATCH, EMBED), (KEYS - 1, BATCH, EMBED)],
            {},
            ValueError,
            r"key \(7, 3, 16\) and value \(6, 3, 16\)",
        ),
        ([X, (KEYS, 2, EMBED), (KEYS, 2, EMBED)], {}, ValueError, r"query \(5, 3, 16\) and key \(7, 2, 16\)"),
        ([X, (KEYS, EMBED), (KEYS, EMBED)], {}, ValueError, r"key has shape \(7, 16\)"),
        ([(2, *X)], {}, ValueError, r"query has shape \(2, 5, 3, 16\)"),
        ([(EMBED,)], {}, ValueError, r"query has shape \(16,\)"),
        ([X], {"attn_mask": torch.zeros(5, 4)}, ValueError, r"attn_mask has shape \(5, 4\).*\(5, 5\)"),
        ([X], {"attn_mask": torch.zeros(3, 5, 5)}, ValueError, r"attn_mask has shape \(3, 5, 5\).*\(12, 5, 5\)"),
        ([X], {"attn_mask": torch.zeros(5, 5).double()}, TypeError, r"attn_mask has dtype torch.float64"),
        ([X], {"attn_mask": torch.zeros(5, 5).int()}, TypeError, r"attn_mask has dtype torch.int32"),
        ([X], {"key_padding_mask": torch.zeros(5, 3)}, ValueError, r"key_padding_mask has shape \(5, 3\).*\(3, 5\)"),
        ([X], {"key_padding_mask": torch.zeros(3, 5).long()}, TypeError, r"key_padding_mask has dtype torch.int64"),
        ([X], {"residual": torch.zeros(5, 3, 12)}, ValueError, r"residual has shape \(5, 3, 12\).*\(5, 3, 16\)"),
        ([X], {"residual": torch.zeros(16)}, ValueError, r"residual has shape \(16,\).*\(5, 3, 16\)"),
    ],
)
def test_errors_of_a_call(shapes, options, error, message):
    with pytest.raises(error, match=message):
        call(PHMMultiheadAttention(EMBED, HEADS, N), *shapes, **options)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks_that_are_no_tensors(name):
    with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor or None, not list"):
        call(PHMMultiheadAttention(EMBED, HEADS, N), X, **{name: [True]})


def test_other_dtype_of_the_input():
    layer = PHMMultiheadAttention(EMBED, HEADS, N)
    x = torch.zeros(X)
    for tensors in ((x.double(), x, x), (x, x.double(), x), (x, x, x.double()), (x.int(), x, x)):
        with pytest.raises(TypeError, match="dtype"):
            layer(*tensors)
    with pytest.raises(TypeError, match="query must be a torch.Tensor, not list"):
        layer([1.0], x, x)
