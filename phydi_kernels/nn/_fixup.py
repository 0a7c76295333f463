"""The scalars of Fixup (Zhang, Dauphin and Ma, 2019): networks without normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class Shift(Module):
    """Fixup's scalar bias, which starts at 0."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.bias = Parameter(torch.empty(1, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Scale(Module):
    """Fixup's scalar factor, which starts at 1."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(1, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def branch_scale(branches: int, layers: int) -> float:
    """L^(-1/(2m - 2)), the factor on each weight but the last of a branch of m layers, L branches in all."""
    return branches ** (-1 / (2 * layers - 2))
