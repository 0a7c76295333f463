"""The parameters that every parameterized hypercomplex layer holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from .. import reference
from .._check import DTYPES
from ._init import check_init, initialize


class HypercomplexLayer(Module):
    """A, F, bias and kron_weights of H = sum_i w_i A_i (x) F_i; subclasses check their sizes and add the call.

    Subclasses call :meth:`reset_parameters` at the end of their constructor.
    """

    A: Parameter
    F: Parameter
    bias: Parameter | None
    kron_weights: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        kernel: tuple[int, ...],
        bias: bool,
        *,
        kron_weights: bool,
        init: str | Tensor,
        learn_algebra: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype={dtype!r} is not one of {', '.join(map(str, DTYPES))}")
        for name, flag in (("bias", bias), ("kron_weights", kron_weights), ("learn_algebra", learn_algebra)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}={flag!r} must be True or False")
        self.n = n
        self.init = check_init("init", init, n)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.A = Parameter(torch.empty(n, n, n, **options), requires_grad=learn_algebra)
        self.F = Parameter(torch.empty(n, out_features // n, in_features // n, *kernel, **options))
        self.bias = Parameter(torch.empty(out_features, **options)) if bias else None
        self.kron_weights = Parameter(torch.empty(n, **options)) if kron_weights else None

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        initialize(self.A, self.F, self.bias, self.init)
        if self.kron_weights is not None:
            torch.nn.init.ones_(self.kron_weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        # Module.to(memory_format=torch.channels_last) takes every tensor of four or five dimensions for images: F is
        # passed flat, so that it moves and changes dtype with the rest and stays contiguous.
        return super()._apply(lambda t: fn(t.flatten()).view(t.shape) if t.dim() > 3 else fn(t), recurse)

    def structure(self) -> Tensor:
        """The structure tensor as used, (n, n, n): A, its term i multiplied by kron_weights[i] if there are any."""
        weights = self.kron_weights
        return self.A if weights is None else self.A * weights.view(-1, 1, 1)

    def dense_weight(self) -> Tensor:
        """H (out_features, in_features, *kernel), the weight of the dense layer that computes the same.

        Formed at each call.
        """
        return reference.dense_weight(self.structure(), self.F)

    def _repr_options(self) -> str:
        options = f", bias={self.bias is not None}"
        if self.kron_weights is not None:
            options += ", kron_weights=True"
        return options if self.A.requires_grad else options + ", learn_algebra=False"
