"""PHResNet18 for inference and PHResNet50's training step against the dense networks that compute the same function.

For inference ``ours`` is the network as ``optimize_for_inference`` makes it, ``prepacked`` with prepack=True, and
``learned A`` as it was before. ``dense folded`` is the dense network with its batch normalisations folded, which ours
has done as well.

In training ``ours`` learns U, V, W and F, and ``learned A`` A and F.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from rivals import Rival, forward
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from phydi_kernels import optimize_for_inference
from phydi_kernels.demo.layer_times import kronecker_sum
from phydi_kernels.models import phresnet18, phresnet50
from phydi_kernels.nn import PHConv2d

N, WIDTH = 4, 64
BATCH, SIZE = 32, 32
# ours / dense at one thread, for inference and in training.
ASKED, ASKED_IN_TRAINING = 0.65, 0.75
RANK = 7
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@torch.no_grad()
def set_statistics(model: nn.Module) -> None:
    """Random statistics and factors for each batch normalisation, as training leaves some."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            for scale in (module.running_var, module.weight):
                nn.init.uniform_(scale, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


@torch.no_grad()
def copy_as_dense(model: nn.Module, dense: nn.Module) -> None:
    """Gives the dense network the weights H of the other, and everything else that it has."""
    state = model.state_dict()
    for name, conv in model.named_modules():
        if isinstance(conv, PHConv2d):
            for parameter, _ in conv.named_parameters():
                del state[f"{name}.{parameter}"]
            # The zero channels in front of the image meet the first columns of the stem's H.
            state[f"{name}.weight"] = conv.dense_weight()[:, -dense.get_submodule(name).in_channels :]
    dense.load_state_dict(state)


def folded(model: nn.Module) -> nn.Module:
    """A copy with each batch normalisation in the convolution before it."""
    model = copy.deepcopy(model)
    for chain in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        layers = list(chain.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(layers, layers[1:], strict=False):
            if isinstance(norm, nn.BatchNorm2d):
                chain.register_module(conv_name, fuse_conv_bn_eval(conv, norm))
                chain.register_module(norm_name, nn.Identity())
    return model


def test_phresnet18(compare: Callable[..., None], device: torch.device) -> None:
    torch.manual_seed(0)
    model = phresnet18(N, width=WIDTH, device=device).eval()
    set_statistics(model)
    dense = phresnet18(1, width=WIDTH, device=device).eval()
    copy_as_dense(model, dense)
    ours, prepacked = (
        optimize_for_inference(model, prepack=prepack, progress=False, verbose=False) for prepack in (False, True)
    )
    networks = {
        "ours": ours,
        "prepacked": prepacked,
        "learned A": model,
        "dense": dense,
        "dense folded": folded(dense),
    }
    x = torch.randn(BATCH, model.in_channels, SIZE, SIZE, device=device)
    # Rounding adds up over the layers.
    terms = sum(m.weight[0].numel() for m in dense.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    ranks = sorted({layer.rank for layer in ours.inference_report.layers})
    row = {
        "layer": f"PHResNet18 width {WIDTH} {SIZE}x{SIZE} B={BATCH}",
        "n": N,
        "rank": "-".join(map(str, ranks)),
        "pass": "forward",
        "dtype": "float32",
    }
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()
        copy_as_dense(copy.deepcopy(model).double(), exact)
        rivals = {name: forward(network, x) for name, network in networks.items()}
        compare(row, rivals, {"output": exact(x.double())}, terms=terms, asked={"ratio": ASKED})


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


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Computes the loss and the gradients of all parameters."""
    parameters = dict(model.named_parameters())

    def step() -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(model(x), labels)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, tuple(parameters.values())), strict=True))
        return {"loss": loss.detach(), **joined_norms(model, gradients)}

    return step


def expected_step(model: nn.Module, dense: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of U, V, W and F, of A and of H in float64, through the dense network and H formed whole."""
    inputs = {name: t.detach().double().requires_grad_() for name, t in model.named_parameters()}
    weights = {name: inputs[name] for name, _ in dense.named_parameters() if name in inputs}
    for name, conv in dense.named_modules():
        if isinstance(conv, nn.Conv2d):
            U, V, W, F = (inputs[f"{name}.{factor}"] for factor in "UVWF")
            inputs[f"{name}.A"] = torch.einsum("ri,rk,rl->ikl", U, V, W)
            H = kronecker_sum(inputs[f"{name}.A"], F)
            # The zero channels in front of the image have no weights in the dense network.
            weights[f"{name}.weight"] = H[:, -conv.in_channels :]
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
    x = torch.randn(BATCH, ours.in_channels, SIZE, SIZE, device=device).contiguous(memory_format=FORMATS[layout])
    labels = torch.randint(0, 10, (BATCH,), device=device)
    expected = expected_step(ours, dense, x, labels)
    rivals = {}
    for name, network in {"ours": ours, "learned A": learned, "dense": dense}.items():
        step = training_step(network, x, labels)
        rivals[name] = Rival(lambda step=step: tuple(step().values()), tuple(step()))
    # Rounding adds up over the layers, over channels and over pixels; each product of H is a sum of R n.
    convolutions = [m for m in dense.modules() if isinstance(m, nn.Conv2d)]
    terms = RANK * N * sum(m.weight[0].numel() + BATCH * SIZE * SIZE for m in convolutions)
    row = {
        "layer": f"PHResNet50 width {WIDTH} {SIZE}x{SIZE} B={BATCH} {layout}",
        "n": N,
        "rank": str(RANK),
        "pass": "forward+backward",
        "dtype": "float32",
    }
    compare(row, rivals, expected, terms=terms, asked={"ratio": ASKED_IN_TRAINING})
