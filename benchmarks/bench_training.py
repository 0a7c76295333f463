"""Training steps of PHTransformerLM and PHResNet50 against the same networks of dense layers and of published ones.

The language model is that of PHYDI's experiments on WikiText-2: 12 layers of 128 features, 28,780 words, 64 sequences
of 35 words, dropout. Beside it its embedding alone. The residual network is that of CIFAR-10.

A step is the forward, the cross-entropy and the backward: an optimiser's own time follows the parameters, of which a
dense network has almost four times as many. ``ours`` learns U, V, W and F, ``learned A`` A and F.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from bench_phresnet import copy_as_dense
from layers import PublishedLayer
from rivals import Rival, forward
from torch import Tensor, nn

from phydi_kernels.demo.layer_times import kronecker_sum
from phydi_kernels.models import PHTransformerLM, phresnet50
from phydi_kernels.nn import PHConv2d, PHMEmbedding, PHMLinear

N, TOKENS, FEATURES, LAYERS = 4, 28_780, 128, 12
BATCH, LENGTH = 64, 35
IMAGES, WIDTH, SIZE = 32, 64, 32
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RANK = 7
# ours / dense at one thread.
ASKED_OF_TRANSFORMER, ASKED_OF_RESNET = 0.85, 0.75
ALPHA = 0.1
# Many times the standard deviation of what is added to it.
FAR = 10.0
PASSES = ("forward", "forward+backward")

Layer = PHMLinear | PHMEmbedding


class PublishedEmbedding(nn.Module):
    """Rows of a table that is built at every call."""

    def __init__(self, A: nn.Parameter, F: nn.Parameter) -> None:
        super().__init__()
        self.A, self.F = A, F

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, kronecker_sum(self.A, self.F))


def dense(layer: Layer) -> nn.Module:
    """nn.Linear or nn.Embedding with the weight H."""
    weight = layer.dense_weight().detach()
    if isinstance(layer, PHMEmbedding):
        return nn.Embedding.from_pretrained(weight, freeze=False)
    linear = nn.Linear(layer.in_features, layer.out_features, device=weight.device, dtype=weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": layer.bias})
    return linear


def published(layer: Layer) -> nn.Module:
    A = nn.Parameter(layer.structure().detach())
    if isinstance(layer, PHMEmbedding):
        return PublishedEmbedding(A, layer.F)
    return PublishedLayer(nn.functional.linear, A, layer.F, layer.bias)


def learned_algebra(layer: Layer) -> nn.Module:
    """The layer with A in the place of U, V and W."""
    if isinstance(layer, PHMEmbedding):
        twin: Layer = PHMEmbedding(layer.num_embeddings, layer.embedding_dim, layer.n, device=layer.F.device)
    else:
        twin = PHMLinear(layer.in_features, layer.out_features, layer.n, device=layer.F.device)
    kept = {name: p for name, p in layer.state_dict().items() if name not in ("U", "V", "W")}
    twin.load_state_dict({**kept, "A": layer.structure()})
    return twin


def replaced(model: nn.Module, replace: Callable[[Layer], nn.Module]) -> nn.Module:
    """A copy with another layer in the place of each hypercomplex one."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Layer):
                setattr(parent, name, replace(child))
    return model


def gradients(call: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """With the same draws of dropout at each call."""
    torch.manual_seed(0)
    return torch.autograd.grad(call(), parameters)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of the next tokens, given logits for all but the last."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def training_step(model: nn.Module, tokens: Tensor) -> Rival:
    """The gradients of all parameters."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return Rival(lambda: gradients(lambda: loss_of(model(tokens[:, :-1]), tokens), parameters), names)


def dense_weights(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds to the parameters of hypercomplex layers A, where they hold U, V and W, and H as ``weight``."""
    found = dict(parameters)
    for name, F in parameters.items():
        if name.rpartition(".")[2] == "F":
            prefix = name.removesuffix("F")
            if f"{prefix}A" not in found:
                factors = [found[prefix + factor] for factor in ("U", "V", "W")]
                found[f"{prefix}A"] = torch.einsum("ri,rk,rl->ikl", *factors)
            found[f"{prefix}weight"] = kronecker_sum(found[f"{prefix}A"], F)
    return found


def exact_weights(model: nn.Module) -> dict[str, Tensor]:
    """In float64, with gradients: the parameters of ``model``, of the dense model and of the published one."""
    return dense_weights({name: p.detach().double().requires_grad_() for name, p in model.named_parameters()})


def expected_gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    twin = replaced(model, dense).double()
    weights = exact_weights(model)
    state = {name: weights[name] for name, _ in twin.named_parameters()}

    def loss() -> Tensor:
        return loss_of(torch.func.functional_call(twin, state, (tokens[:, :-1],)), tokens)

    return dict(zip(weights, gradients(loss, tuple(weights.values())), strict=True))


@torch.no_grad()
def leave_the_start(model: PHTransformerLM) -> None:
    """Branches that add something, and ReLUs whose arguments, all far from 0, rounding does not move across it."""
    for layer in model.encoder.layers:
        layer.alpha.fill_(ALPHA)
        layer.linear1.bias.fill_(FAR)[::2].neg_()


def row(layer: str, rank: int | None, passes: str) -> dict[str, object]:
    return {"layer": layer, "n": N, "rank": rank, "pass": passes, "dtype": "float32"}


def test_training_step_of_phtransformer_lm(compare: Callable[..., None], device: torch.device) -> None:
    torch.manual_seed(0)
    model = PHTransformerLM(TOKENS, FEATURES, n=N, num_layers=LAYERS, algebra_rank=RANK, device=device)
    leave_the_start(model)
    models = {
        "ours": model,
        "learned A": replaced(model, learned_algebra),
        "dense": replaced(model, dense),
        "published": replaced(model, published),
    }
    tokens = torch.randint(0, TOKENS, (BATCH, LENGTH + 1), device=device)
    rivals = {name: training_step(m, tokens) for name, m in models.items()}
    products = [m.in_features + m.out_features for m in model.modules() if isinstance(m, PHMLinear)]
    # Rounding adds up over the layers, forward and backward, and over the positions. The RMS of the embedding's
    # gradient is that of all rows, the error that of the few which a token meets.
    terms = (sum(products) + BATCH * LENGTH) * (TOKENS // N) // (BATCH * LENGTH)
    described = row(f"PHTransformerLM d={FEATURES} {LAYERS} layers {BATCH}x{LENGTH}", RANK, PASSES[True])
    compare(described, rivals, expected_gradients(model, tokens), terms=terms, asked={"ratio": ASKED_OF_TRANSFORMER})


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_embedding(backward: bool, compare: Callable[..., None], device: torch.device) -> None:
    torch.manual_seed(0)
    ours = PHMEmbedding(TOKENS, FEATURES, N, device=device)
    layers = {"ours": ours, "dense": dense(ours), "published": published(ours)}
    tokens = torch.randint(0, TOKENS, (BATCH, LENGTH), device=device)
    grad_output = torch.randn(BATCH, LENGTH, FEATURES, device=device)
    weights = exact_weights(ours)
    y = nn.functional.embedding(tokens, weights["weight"])
    if backward:
        grads = torch.autograd.grad(y, tuple(weights.values()), grad_output.double())
        expected = dict(zip(weights, grads, strict=True))
    else:
        expected = {"output": y.detach()}

    def rival(layer: nn.Module) -> Rival:
        if not backward:
            return forward(layer, tokens)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        return Rival(lambda: torch.autograd.grad(layer(tokens), parameters, grad_output), names)

    described = row(f"PHMEmbedding {TOKENS}x{FEATURES} B={BATCH * LENGTH}", None, PASSES[backward])
    with torch.set_grad_enabled(backward):
        compare(described, {name: rival(m) for name, m in layers.items()}, expected, terms=BATCH * LENGTH, asked={})


@torch.no_grad()
def keep_off_zero(model: nn.Module) -> None:
    """Normalised activations of mean 1 and deviation 1/4: rounding hardly ever turns one on or off.

    One that it does turn changes every gradient behind it by far more than rounding explains.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(0.25)
            module.bias.fill_(1)


def joined_norms(model: nn.Module, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients, those of all normalisations as one vector: that of a bias before another one is 0."""
    norms = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    of_norms = [name for name in gradients if name.removesuffix("weight").removesuffix("bias") in norms]
    rest = {name: t for name, t in gradients.items() if name not in of_norms}
    return rest | {"norms": torch.cat([gradients[name] for name in of_norms])}


def image_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Computes the loss and the gradients of all parameters."""
    parameters = dict(model.named_parameters())

    def step() -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(model(x), labels)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, tuple(parameters.values())), strict=True))
        return {"loss": loss.detach(), **joined_norms(model, gradients)}

    return step


def expected_step(model: nn.Module, dense: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of U, V, W and F, of A and of H in float64, through the dense network and H formed whole."""
    inputs = exact_weights(model)
    # The zero channels in front of the image have no weights in the dense network.
    weights = {
        name: inputs[name][:, -p.shape[1] :] if p.dim() == 4 else inputs[name] for name, p in dense.named_parameters()
    }
    y = torch.func.functional_call(copy.deepcopy(dense).double(), weights, (x.double(),))
    loss = nn.functional.cross_entropy(y, labels)
    inputs |= weights
    gradients = dict(zip(inputs, torch.autograd.grad(loss, tuple(inputs.values())), strict=True))
    return {"loss": loss.detach(), **joined_norms(dense, gradients)}


@pytest.mark.parametrize("layout", FORMATS)
def test_training_step_of_phresnet50(layout: str, compare: Callable[..., None], device: torch.device) -> None:
    torch.manual_seed(0)
    options = {"width": WIDTH, "device": device}
    ours = phresnet50(N, algebra_rank=RANK, **options)
    learned, dense = phresnet50(N, **options), phresnet50(1, **options).to(memory_format=FORMATS[layout])
    keep_off_zero(ours)
    copy_as_dense(ours, dense)
    state = {name: t for name, t in ours.state_dict().items() if name in learned.state_dict()}
    for name, conv in ours.named_modules():
        if isinstance(conv, PHConv2d):
            state[f"{name}.A"] = conv.structure().detach()
    learned.load_state_dict(state)
    x = torch.randn(IMAGES, ours.in_channels, SIZE, SIZE, device=device).contiguous(memory_format=FORMATS[layout])
    labels = torch.randint(0, 10, (IMAGES,), device=device)
    expected = expected_step(ours, dense, x, labels)
    rivals = {}
    for name, network in {"ours": ours, "learned A": learned, "dense": dense}.items():
        step = image_step(network, x, labels)
        rivals[name] = Rival(lambda step=step: tuple(step().values()), tuple(step()))
    # Rounding adds up over the layers, over channels and over pixels; each product of H is a sum of R n.
    convolutions = [m for m in dense.modules() if isinstance(m, nn.Conv2d)]
    terms = RANK * N * sum(m.weight[0].numel() + IMAGES * SIZE * SIZE for m in convolutions)
    described = row(f"PHResNet50 width {WIDTH} {SIZE}x{SIZE} B={IMAGES} {layout}", RANK, PASSES[True])
    compare(described, rivals, expected, terms=terms, asked={"ratio": ASKED_OF_RESNET})
