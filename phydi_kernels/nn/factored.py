"""Layers in rank-R form without gradients: what ``phydi_kernels.optimize_for_inference`` puts in place of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from .. import functional
from .._dataflow import has_hooks
from ..kernels import cpu
from ..ops._autograd import may_skip_dispatch, without_autocast
from ..ops.phm_linear_factored import plan_on_cpu
from ..plans import Plan
from ..reference import compute_dtype
from ._base import apply_to_weights
from .phm_linear import PHMLinear


class FactoredLayer(Module):
    r"""What the layers in rank-R form share: y = residual + alpha * act(H x + bias), without gradients.

    .. math:: H = \sum_i A_i \otimes F_i, \quad A_{ikl} = \sum_{r=1}^R U_{ri} V_{rk} W_{rl}

    Args:
        U: ``(R, n)``.
        V: ``(R, P)``.
        W: ``(R, Q)``.
        F: ``(n, p, q, *kernel)``. A parameter that requires no gradient becomes the layer's own, so that layers may
            share it; any other tensor gives its values, not copied.
        bias: ``(P*p,)`` or None, like F.
        alpha: one element, ``(P*p,)`` or None, like F.
        activation: ``"none"`` or ``"relu"``.
        prepack: holds the R combined weights ``sum_i U[r, i] F_i`` in place of U and F. They take R/(P*Q) of the dense
            layer's memory in place of 1/n, and no time at each call.

    Parameters, none of which requires a gradient: ``V``, ``W`` and either ``U`` and ``F`` or ``F_hat``; ``bias`` and
    ``alpha`` where they are given. F, bias and alpha share a dtype; U, V and W are kept in float32 where that has 16
    bits, also when the layer is converted. A layer takes the state_dict of another with the same shapes and options.
    """

    U: Parameter | None
    V: Parameter
    W: Parameter
    F: Parameter
    F_hat: Parameter
    bias: Parameter | None
    alpha: Parameter | None

    def __init__(
        self,
        U: Tensor,
        V: Tensor,
        W: Tensor,
        F: Tensor,
        bias: Tensor | None = None,
        *,
        alpha: Tensor | None = None,
        activation: str = "none",
        prepack: bool = False,
    ) -> None:
        super().__init__()
        wide = compute_dtype(F.dtype)
        U, V, W = (t.detach().to(F.device, wide, copy=True) for t in (U, V, W))
        self.n, self.rank, self.prepacked = F.shape[0], len(U), prepack
        self.in_features, self.out_features = W.shape[1] * F.shape[2], V.shape[1] * F.shape[1]
        self.activation = activation
        self._names = ("U", "V", "W", "F_hat" if prepack else "F", "bias", "alpha")
        self.register_parameter("U", None if prepack else _frozen(U))
        self.V, self.W = _frozen(V), _frozen(W)
        if prepack:
            with without_autocast(F.device):
                combined = torch.einsum("ri,i...->r...", U, F.detach().to(wide)).to(F.dtype)
            self.F_hat = _frozen(self._packed(combined).contiguous())
        else:
            self.F = _frozen(F)
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        self.register_parameter("alpha", None if alpha is None else _frozen(alpha))

    def _packed(self, weights: Tensor) -> Tensor:
        """The combined weights (R, p, q, *kernel) as F_hat holds them, and these back again."""
        return weights

    def _tensors(self) -> tuple[Any, ...]:
        """(U, V, W, F, bias, alpha) as the functions take them, F the combined weights where U is None."""
        # Half a microsecond less for each than as an attribute, of a call that may take twenty.
        own: dict[str, Any] = self._parameters
        try:
            tensors = [own[name] for name in self._names]
        except KeyError:  # a parametrization holds the tensor elsewhere
            tensors = [getattr(self, name) for name in self._names]
        if self.prepacked:
            tensors[3] = self._packed(tensors[3])
        return tuple(tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        factors = (self.U, self.V, self.W)

        def apply(t: Tensor) -> Tensor:
            moved = apply_to_weights(fn, t)
            kept = compute_dtype(moved.dtype)
            return t.to(moved.device, kept) if moved.dtype != kept and any(t is f for f in factors) else moved

        return super()._apply(apply, recurse)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        alpha = state_dict.get(prefix + "alpha")
        if self.activation == "relu" and alpha is not None and not (alpha > 0).all():
            # relu(alpha h) was written as alpha relu(h).
            error_msgs.append(f"{prefix}alpha must be positive: the ReLU that followed it is applied before it")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        options = f"n={self.n}, rank={self.rank}, bias={self.bias is not None}"
        if self.alpha is not None:
            options += f", alpha={tuple(self.alpha.shape)}"
        if self.activation != "none":
            options += f", activation={self.activation!r}"
        return options + (", prepacked" if self.prepacked else "")


# Shapes of inputs that a layer remembers.
_SHAPES = 64


class _CheckedCall(NamedTuple):
    """What calls have checked. To check it anew would be a third of the time of a small one."""

    parameters: tuple[Any, ...]  # of the layer: U, V, W, F or F_hat, bias and alpha
    activation: str
    dtype: torch.dtype
    plans: dict[torch.Size, Plan]  # by shapes of x

    def holds(self, layer: FactoredPHMLinear, dtype: torch.dtype) -> bool:
        """Whether the layer is the same, called with ``dtype``."""
        # One by one, in half the time of a loop. A parametrization has the tensor elsewhere.
        U, V, W, F, bias, alpha = self.parameters
        own = layer._parameters.get
        return (
            dtype is self.dtype
            and layer.activation == self.activation
            and own("V") is V
            and own("W") is W
            and own("U") is U
            and own(layer._names[3]) is F
            and own("bias") is bias
            and own("alpha") is alpha
        )

    def plan(self, x: Tensor) -> Plan | None:
        """For a plain tensor of a shape seen before, on the CPU."""
        plain = type(x) is Tensor and x.is_cpu and x.layout is torch.strided and not x.is_nested
        return self.plans.get(x.shape) if plain else None


class FactoredPHMLinear(FactoredLayer):
    """:class:`PHMLinear`, or with ``residual`` :class:`PHYDILinear`, by :func:`functional.phm_linear_factored`.

    Args:
        U, V, W, F, bias, alpha, activation, prepack: as in :class:`FactoredLayer`.
        residual: adds the input.

    Shapes: ``(..., in_features)`` to ``(..., out_features)``.
    """

    def __init__(
        self,
        U: Tensor,
        V: Tensor,
        W: Tensor,
        F: Tensor,
        bias: Tensor | None = None,
        *,
        residual: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(U, V, W, F, bias, **options)
        self.residual = residual
        self._checked: _CheckedCall | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        self._checked = None  # the parameters stay the same objects where their types change
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None}  # a pickle holds no class of this module's own

    def _packed(self, weights: Tensor) -> Tensor:
        # Transposed, (R, q, p): the CPU kernels then read the weights of all outputs side by side.
        return weights.transpose(1, 2)

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, alpha: Tensor | None = None, activation: str = "none"
    ) -> Tensor:
        """As :class:`PHMLinear`; a layer with an alpha, an activation or a residual of its own takes none of them."""
        alone = residual is None and alpha is None and activation == "none"
        checked = self._checked
        if checked is not None and alone and may_skip_dispatch():
            plan = checked.plan(x)
            if plan is not None and checked.holds(self, x.dtype):
                U, V, W, F, bias, own_alpha = checked.parameters
                F = self._packed(F) if self.prepacked else F
                own_residual = x if self.residual else None
                return cpu.phm_linear_factored(x, U, V, W, F, bias, own_residual, own_alpha, self.activation, plan)
        *tensors, own_alpha = self._tensors()
        if not alone:
            if own_alpha is not None or self.activation != "none" or self.residual:
                raise ValueError(
                    f"residual, alpha and activation={activation!r} must not be given: the layer has its own ({self})"
                )
            epilogue: dict[str, Any] = {"residual": residual, "alpha": alpha, "activation": activation}
            return functional.phm_linear_factored(x, *tensors, **epilogue)
        epilogue = {"residual": x if self.residual else None, "alpha": own_alpha, "activation": self.activation}
        y = functional.phm_linear_factored(x, *tensors, **epilogue)
        if x.is_cpu and may_skip_dispatch() and cpu.available():
            self._remember(x, *tensors[:4])
        return y

    def _remember(self, x: Tensor, U: Tensor | None, V: Tensor, W: Tensor, F: Tensor) -> None:
        if tuple(self._parameters) != self._names:
            return  # a parametrization holds a tensor elsewhere
        own = tuple(self._parameters.values())
        if not all(p is None or (type(p) is Parameter and p.is_cpu) for p in own):
            return
        if self._checked is None or not self._checked.holds(self, x.dtype) or len(self._checked.plans) == _SHAPES:
            self._checked = _CheckedCall(own, self.activation, x.dtype, {})
        self._checked.plans[x.shape] = plan_on_cpu(x, U, V, W, F)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, "
        return sizes + super().extra_repr() + (", residual" if self.residual else "")


def linear_call(
    layer: Module, x: Tensor, *, residual: Tensor | None = None, alpha: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """residual + alpha * act(layer(x)): in one call of a layer of ours, composed for any other and around hooks."""
    if isinstance(layer, (PHMLinear, FactoredPHMLinear)) and not has_hooks(layer):
        return layer(x, residual=residual, alpha=alpha, activation=activation)
    y = layer(x)
    y = torch.relu(y) if activation == "relu" else y
    y = y if alpha is None else alpha.to(y.dtype) * y
    return y if residual is None else residual + y


class FactoredPHConv(FactoredLayer):
    """:class:`PHConv1d`, :class:`PHConv2d` or :class:`PHConv3d`, by :func:`functional.phc_conv2d_factored` and alike.

    Args:
        U, V, W, F, bias, alpha, activation, prepack: as in :class:`FactoredLayer`.
        stride, padding, dilation: as in :class:`PHConv2d`.

    Shapes: ``(batch, in_channels, *size)`` or ``(in_channels, *size)`` to the same with out_channels, with as many
    spatial dimensions as F has.
    """

    def __init__(
        self,
        U: Tensor,
        V: Tensor,
        W: Tensor,
        F: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...] | str,
        dilation: tuple[int, ...],
        **options: Any,
    ) -> None:
        super().__init__(U, V, W, F, bias, **options)
        self.in_channels, self.out_channels = self.in_features, self.out_features
        self.kernel_size = tuple(F.shape[3:])
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def forward(self, x: Tensor) -> Tensor:
        *tensors, alpha = self._tensors()
        geometry = self.stride, self.padding, self.dilation
        function = _CONV[len(self.kernel_size)]
        return function(x, *tensors, *geometry, alpha=alpha, activation=self.activation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, {super().extra_repr()}"
        )


_CONV: dict[int, Callable[..., Tensor]] = {
    1: functional.phc_conv1d_factored,
    2: functional.phc_conv2d_factored,
    3: functional.phc_conv3d_factored,
}


def _frozen(t: Tensor) -> Parameter:
    return t if isinstance(t, Parameter) and not t.requires_grad else Parameter(t.detach(), requires_grad=False)
