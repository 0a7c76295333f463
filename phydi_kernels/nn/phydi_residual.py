"""PHYDIResidual."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module, Parameter, UninitializedParameter

from .._check import check_finite


class PHYDIResidual(Module):
    r"""A residual connection around any module, the identity at the start (PHYDI, Eq. 2).

    .. math:: y = x + \alpha\, \mathrm{module}(x)

    Args:
        module: maps a tensor to one of the same shape.
        alpha: initial value of :math:`\alpha`.

    Parameters: those of the module, and ``alpha (1,)``, with dtype and device of the module's first floating-point
    parameter, or torch's defaults if it has none.

    Raises:
        TypeError: ``module`` is not a Module, ``alpha`` is not a number, or the module returns something other than a
            tensor.
        ValueError: ``alpha`` is not finite, or the module's output has another shape than its input.
    """

    module: Module
    alpha: Parameter

    def __init__(self, module: Module, alpha: float = 0.0) -> None:
        super().__init__()
        if not isinstance(module, Module):
            raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
        self.initial_alpha = check_finite("alpha", alpha)
        self.module = module
        made = (p for p in module.parameters() if not isinstance(p, UninitializedParameter))
        like = next((p for p in made if p.is_floating_point()), torch.empty(0))
        self.alpha = Parameter(like.new_empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets alpha to its initial value; the module's parameters are its own."""
        torch.nn.init.constant_(self.alpha, self.initial_alpha)

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        if not isinstance(y, Tensor):
            raise TypeError(f"{type(self.module).__name__} returned {type(y).__name__}; it must return a tensor")
        if y.shape != x.shape:
            raise ValueError(
                f"{type(self.module).__name__} returned shape {tuple(y.shape)} for an input of shape {tuple(x.shape)}; "
                "a residual connection needs both to be the same"
            )
        return x + self.alpha * y
