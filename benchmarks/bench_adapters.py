"""Adapter layers after ``apply_phydi_kernels`` against the same layers as peft and adapters compute them.

``dense`` of LoKr is the layer without its adapter, frozen: what the adapter adds is what lies above 1. A training step
is the gradients of the input and of what is learned. ``dense`` of Compacter is nn.Linear of the same shape.
``published`` is the other library.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from adapters import CompacterConfig
from adapters.methods.modeling import PHMLayer
from peft import LoKrConfig, get_peft_model
from rivals import Rival
from torch import Tensor, nn

from phydi_kernels.integrations import apply_phydi_kernels


class LoKr(NamedTuple):
    """An adapter of a layer; ``size`` of the input."""

    name: str
    layer: Callable[[], nn.Module]
    size: Sequence[int]
    options: dict[str, int]


LOKR = (
    LoKr("LoKr r=16, linear 1024x1024 B=512", lambda: nn.Linear(1024, 1024), (512, 1024), {"r": 16}),
    LoKr("LoKr r=16, linear 4096x4096 B=1", lambda: nn.Linear(4096, 4096), (1, 4096), {"r": 16}),
    LoKr("LoKr r=16, linear 4096x4096 B=512", lambda: nn.Linear(4096, 4096), (512, 4096), {"r": 16}),
    LoKr(
        "LoKr 8x8 (x) 512x512, linear 4096x4096 B=512",
        lambda: nn.Linear(4096, 4096),
        (512, 4096),
        {"r": 10_000, "decompose_factor": 8},
    ),
    LoKr("LoKr r=16, conv2d 320ch 32x32 B=2", lambda: nn.Conv2d(320, 320, 3, padding=1), (2, 320, 32, 32), {"r": 16}),
)
# Features in and out of the two layers of an adapter.
COMPACTER = ((768, 48), (48, 768))
TOKENS = 2048
passes = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def rival(layer: nn.Module, x: Tensor, grad: Tensor | None, learned: Sequence[str], prefix: str = "") -> Rival:
    """The output, or the gradients of x and of the parameters of these names."""
    if grad is None:
        return Rival(lambda: (layer(x),), (f"{prefix}output",))
    parameters = dict(layer.named_parameters())
    wanted = (x, *(parameters[name] for name in learned))
    return Rival(lambda: torch.autograd.grad(layer(x), wanted, grad), (f"{prefix}x", *learned))


def run(
    name: str,
    theirs: nn.Module,
    dense: nn.Module,
    x: Tensor,
    *,
    backward: bool,
    learned: tuple[Sequence[str], Sequence[str]],
    compare: Callable[..., None],
    terms: int,
) -> None:
    """``learned``: the names of the adapter's parameters and of the dense layer's."""
    grad = torch.randn_like(dense(x).detach()) if backward else None

    def rivals(theirs: nn.Module, dense: nn.Module, x: Tensor, grad: Tensor | None) -> dict[str, Rival]:
        x = x.requires_grad_(backward)
        beside = rival(dense, x, grad, learned[1], "dense ")
        return {"published": rival(theirs, x, grad, learned[0]), "dense": beside}

    exact = rivals(
        copy.deepcopy(theirs).double(), copy.deepcopy(dense).double(), x.double(), grad.double() if backward else None
    )
    case: dict[str, Any] = {"layer": name, "n": None, "rank": None, "dtype": "float32"}
    case["pass"] = "forward+backward" if backward else "forward"
    with torch.set_grad_enabled(backward):
        expected = {key: t for r in exact.values() for key, t in zip(r.results, r.call(), strict=True)}
        timed = rivals(theirs, dense, x, grad)
        ours = apply_phydi_kernels(copy.deepcopy(theirs), verbose=False)
        compare(case, {"ours": rival(ours, x, grad, learned[0]), **timed}, expected, terms=terms, asked={})


@passes
@pytest.mark.parametrize("case", LOKR, ids=lambda case: case.name)
def test_lokr(case: LoKr, backward: bool, compare: Callable[..., None], device: torch.device) -> None:
    torch.manual_seed(0)
    layer = case.layer().to(device).requires_grad_(False)
    config = LoKrConfig(target_modules=["0"], init_weights=False, **case.options)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    learned = [name for name, p in theirs.named_parameters() if p.requires_grad]
    # An entry of the gradient of w2 is a sum over the samples and the blocks, of which there are at most 64.
    samples = case.size[0] * torch.Size(case.size[2:]).numel()
    terms = 64 * samples if backward else layer.weight[0].numel()
    x = torch.randn(case.size, device=device)
    run(case.name, theirs, layer, x, backward=backward, learned=(learned, ()), compare=compare, terms=terms)


@passes
@pytest.mark.parametrize(("inputs", "outputs"), COMPACTER, ids=["down", "up"])
def test_compacter(
    inputs: int, outputs: int, backward: bool, compare: Callable[..., None], device: torch.device
) -> None:
    torch.manual_seed(0)
    logging.getLogger("adapters").setLevel(logging.ERROR)
    theirs = PHMLayer("task", inputs, outputs, "down", CompacterConfig(shared_phm_rule=False)).to(device)
    for p in theirs.parameters():
        nn.init.normal_(p)
    dense = nn.Linear(inputs, outputs, device=device)
    learned = [name for name, _ in theirs.named_parameters()], ["weight", "bias"]
    x = torch.randn(TOKENS, inputs, device=device)
    name = f"Compacter {inputs} to {outputs} B={TOKENS}"
    terms = TOKENS * 4 if backward else inputs
    run(name, theirs, dense, x, backward=backward, learned=learned, compare=compare, terms=terms)
