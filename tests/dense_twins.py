"""The weights of hypercomplex transformer layers as torch.nn's layers of the same names hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from helpers import normal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from phydi_kernels.nn import PHMLinear, PHMMultiheadAttention

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@torch.no_grad()
def randomize(module: nn.Module, scale: float = 0.5) -> nn.Module:
    """No parameter is left at the value that it starts with."""
    for i, p in enumerate(module.parameters()):
        p.copy_(scale * normal(p.shape, i))
    return module


def _attention_state(attention: PHMMultiheadAttention) -> dict[str, Tensor]:
    fused = getattr(attention, "in_proj", None)
    layers = [getattr(attention, name) for name in PROJECTIONS] if fused is None else [fused]
    weights = [layer.dense_weight() for layer in layers]
    if len({weight.shape[1] for weight in weights}) == 1:
        state = {"in_proj_weight": torch.cat(weights)}
    else:
        state = {f"{name}_weight": weight for name, weight in zip(PROJECTIONS, weights, strict=True)}
    if layers[0].bias is not None:
        state["in_proj_bias"] = torch.cat([layer.bias for layer in layers])
    return state | {name: p for name, p in attention.named_parameters(recurse=False)}


def dense_state(module: nn.Module) -> dict[str, Tensor]:
    """A state_dict for torch.nn's module of the same kind, differentiable in the parameters of ``module``."""
    state = {}
    for name, m in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(m, PHMMultiheadAttention):
            part = _attention_state(m)
        elif isinstance(m, PHMLinear) and name.rpartition(".")[2] not in ("in_proj", *PROJECTIONS):
            part = {"weight": m.dense_weight()} | ({} if m.bias is None else {"bias": m.bias})
        elif isinstance(m, nn.LayerNorm):
            part = dict(m.named_parameters())
        else:
            continue
        state |= {prefix + key: value for key, value in part.items()}
    return state


def call_twin(twin: nn.Module, ours: nn.Module, *args: Any, **options: Any) -> Any:
    """``twin(*args, **options)`` with the weights of ``ours``; every parameter of it has one."""
    state = dense_state(ours)
    assert state.keys() == {name for name, _ in twin.named_parameters()}
    return torch.func.functional_call(twin, state, args, options)


def gradients(loss: Tensor, module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of the inputs and of every parameter that ``loss`` depends on."""
    wanted = {f"input {i}": t for i, t in enumerate(inputs)} | dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


def assert_same_function(
    actual: Callable[[], Tensor], expected: Callable[[], Tensor], module: nn.Module, inputs: Sequence[Tensor]
) -> None:
    """Values and all gradients, in float64."""
    values = actual(), expected()
    torch.testing.assert_close(*values, **TOLERANCE)
    weights = normal(values[0].shape, 99)
    grads: list[Mapping[str, Tensor]] = [gradients((y * weights).sum(), module, inputs) for y in values]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


class Record(TorchDispatchMode):
    """Names of the operators that run, and the number of entries of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for t in result if isinstance(result, (tuple, list)) else [result]:
            self.largest = max(self.largest, t.numel() if isinstance(t, torch.Tensor) else 0)
        return result
