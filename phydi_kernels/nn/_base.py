"""The parameters that every parameterized hypercomplex layer holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from .. import reference
from .._check import DTYPES, check_flag
from ..ops._autograd import without_autocast
from ._init import check_init, check_rank, initialize


def apply_to_weights(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """fn(t), laid out as t is.

    Module.to(memory_format=torch.channels_last) takes every tensor of four or five dimensions for images: filters are
    passed flat, so that they move and change dtype with the rest and keep their layout.
    """
    if t.dim() < 4:
        return fn(t)
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    lines = t.permute(order)
    return fn(lines.flatten()).view(lines.shape).permute([order.index(d) for d in range(t.dim())])


def layer_options(
    algebra_rank: int | str | None,
    kron_weights: bool,
    init: str | Tensor,
    learn_algebra: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The keyword-only options of a layer, for those that it holds."""
    return {
        "algebra_rank": algebra_rank,
        "kron_weights": kron_weights,
        "init": init,
        "learn_algebra": learn_algebra,
        "device": device,
        "dtype": dtype,
    }


class HypercomplexLayer(Module):
    """A, F, bias and kron_weights of H = sum_i w_i A_i (x) F_i; subclasses check their sizes and add the call.

    With ``algebra_rank`` = R there is no A but U, V and W, and A[i, k, l] = sum_r U[r, i] V[r, k] W[r, l].

    Subclasses call :meth:`reset_parameters` at the end of their constructor.
    """

    A: Parameter
    U: Parameter
    V: Parameter
    W: Parameter
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
        algebra_rank: int | str | None,
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
            check_flag(name, flag)
        self.n = n
        self.algebra_rank = check_rank("algebra_rank", algebra_rank, n)
        self.init = check_init("init", init, n)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.algebra_rank is None:
            self.A = Parameter(torch.empty(n, n, n, **options), requires_grad=learn_algebra)
        else:
            for name in ("U", "V", "W"):
                factor = torch.empty(self.algebra_rank, n, **options)
                self.register_parameter(name, Parameter(factor, requires_grad=learn_algebra))
        self.F = Parameter(torch.empty(n, out_features // n, in_features // n, *kernel, **options))
        self.bias = Parameter(torch.empty(out_features, **options)) if bias else None
        self.kron_weights = Parameter(torch.empty(n, **options)) if kron_weights else None
        self._start_scales = (1.0, 1.0)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        initialize(self._algebra(), self.F, self.bias, self.init, self._variance())
        self.scale_start(*self._start_scales)
        if self.kron_weights is not None:
            torch.nn.init.ones_(self.kron_weights)

    @torch.no_grad()
    def scale_start(self, F: float, bias: float) -> None:
        """Multiplies F and bias, now and whenever they are drawn: the start that a network has for its parts."""
        self._start_scales = (F, bias)
        for t, scale in ((self.F, F), (self.bias, bias)):
            if t is not None:
                t.mul_(scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        return super()._apply(lambda t: apply_to_weights(fn, t), recurse)

    def structure(self) -> Tensor:
        """The structure tensor as used, (n, n, n): A, its term i multiplied by kron_weights[i] if there are any."""
        with without_autocast(self.F.device):
            factors = self._weighted_algebra()
            return factors[0] if self.algebra_rank is None else reference.structure(*factors)

    def dense_weight(self) -> Tensor:
        """H (out_features, in_features, *kernel), the weight of the dense layer that computes the same.

        Formed at each call.
        """
        with without_autocast(self.F.device):
            return reference.dense_weight(self.structure(), self.F)

    def _variance(self) -> float | None:
        """Of H at the start, where it is not the rule of linear layers and convolutions."""
        return None

    def _algebra(self) -> list[Tensor]:
        """A alone, or U, V and W."""
        return [self.A] if self.algebra_rank is None else [self.U, self.V, self.W]

    def _weighted_algebra(self) -> list[Tensor]:
        """The same with kron_weights: in the terms of A, or in the columns of U."""
        first, *others = self._algebra()
        if self.kron_weights is not None:
            first = first * (self.kron_weights.view(-1, 1, 1) if self.algebra_rank is None else self.kron_weights)
        return [first, *others]

    def _product(
        self, dense: Callable[..., Tensor], factored: Callable[..., Tensor], x: Tensor, *geometry: Any, **fused: Any
    ) -> Tensor:
        """``dense`` of x and A, or ``factored`` of x, U, V and W."""
        function = dense if self.algebra_rank is None else factored
        return function(x, *self._weighted_algebra(), self.F, self.bias, *geometry, **fused)

    def _repr_options(self) -> str:
        options = f", bias={self.bias is not None}"
        if self.algebra_rank is not None:
            options += f", algebra_rank={self.algebra_rank}"
        if self.kron_weights is not None:
            options += ", kron_weights=True"
        return options if self._algebra()[0].requires_grad else options + ", learn_algebra=False"
