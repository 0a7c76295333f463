"""PHResNet18 for inference against the dense ResNet18 that computes the same function.

``ours`` is the network as ``optimize_for_inference`` makes it, ``prepacked`` with prepack=True, and ``learned A`` as it
was before. ``dense folded`` is the dense network with its batch normalisations folded, which ours has done as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from rivals import forward
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from phydi_kernels import optimize_for_inference
from phydi_kernels.models import phresnet18
from phydi_kernels.nn import PHConv2d

N, WIDTH = 4, 64
BATCH, SIZE = 32, 32
# ours / dense at one thread.
ASKED = 0.65


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
