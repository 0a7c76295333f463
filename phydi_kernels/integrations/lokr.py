"""LoKr layers of PEFT without kron(w1, w2)."""

from __future__ import annotations

import math
from typing import Any

import peft
import torch
from peft.tuners.lokr import layer as lokr
from torch import Tensor, nn

from .. import functional

if not hasattr(lokr, "Conv1d"):
    raise ImportError(f"apply_phydi_kernels needs peft 0.19 or newer, not {peft.__version__}")

LIBRARY = "peft LoKr"
_CONV = {1: nn.functional.conv1d, 2: nn.functional.conv2d}


class _Factored(lokr.LoKrLayer):
    """What the adapter adds, as (w1 (x) w2) x in two steps."""

    def _get_delta_activations(self, adapter_name: str, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _unfit(self, adapter_name):
            return super()._get_delta_activations(adapter_name, input, *args, **kwargs)
        if adapter_name in self.lokr_w1:
            w1 = self.lokr_w1[adapter_name]
        else:
            w1 = self.lokr_w1_a[adapter_name] @ self.lokr_w1_b[adapter_name]
        x = self._cast_input_dtype(input, w1.dtype)
        A = (self.scaling[adapter_name] * w1).unsqueeze(0)
        y = self._linear(x, A, adapter_name) if _dims(self) == 0 else self._convolution(x, A, adapter_name)
        rank_dropout = self.rank_dropout[adapter_name]
        if self.training and rank_dropout:
            # Rows of the Kronecker matrix, drawn as PEFT draws them.
            kept = (torch.rand(y.shape[-1 - _dims(self)]) > rank_dropout).float()
            if self.rank_dropout_scale[adapter_name]:
                kept /= kept.mean()
            y = y * kept.to(y).view(-1, *[1] * _dims(self))
        return y

    def _linear(self, x: Tensor, A: Tensor, name: str) -> Tensor:
        if name in self.lokr_w2:
            return functional.phm_linear(x, A, self.lokr_w2[name].unsqueeze(0))
        out, into = self.lokr_w2_a[name], self.lokr_w2_b[name]
        if not _small(len(into) * (len(out) + into.shape[1]), len(out), into.shape[1]):
            return functional.phm_linear(x, A, (out @ into).unsqueeze(0))
        x = nn.functional.linear(x.unflatten(-1, (A.shape[2], -1)), into).flatten(-2)
        return functional.phm_linear(x, A, out.unsqueeze(0))

    def _convolution(self, x: Tensor, A: Tensor, name: str) -> Tensor:
        d, base = _dims(self), self.get_base_layer()
        geometry = base.stride, base.padding, base.dilation
        kernel, phc_conv = base.kernel_size, functional.phc_conv1d if d == 1 else functional.phc_conv2d
        if name in self.lokr_w2:
            return phc_conv(x, A, self.lokr_w2[name].unsqueeze(0), None, *geometry)
        out, into = self.lokr_w2_a[name], self.lokr_w2_b[name]
        q = base.in_channels // A.shape[2]
        if name in self.lokr_t2:
            # PEFT's make_weight_cp: w2 = sum_ij core[i,j] out[i,:] into[j,:].
            out, core = out.t(), self.lokr_t2[name].flatten(2).unflatten(2, kernel)
            filters = [into.view(-1, q, *[1] * d), core]
        else:
            filters = [into.view(-1, q, *kernel)]
        p, rank = out.shape
        if not _small(sum(f.numel() for f in (out, *filters)), p, q * math.prod(kernel)):
            w2 = torch.einsum("pi,ij...,jq->pq...", out, core, into) if len(filters) == 2 else out @ into
            return phc_conv(x, A, w2.reshape(1, p, q, *kernel), None, *geometry)
        # Block l of the channels as an image of its own.
        images = x.unflatten(-1 - d, (A.shape[2], q))
        batched = images.dim() == d + 3
        images = images.flatten(0, 1) if batched else images
        for pointwise in filters[:-1]:
            images = _CONV[d](images, pointwise)
        images = _CONV[d](images, filters[-1], None, *geometry)
        images = images.unflatten(0, (-1, A.shape[2])) if batched else images
        return phc_conv(images.flatten(-2 - d, -1 - d), A, out.reshape(1, p, rank, *[1] * d))


class Linear(_Factored, lokr.Linear):
    """peft's lokr.Linear on the kernels."""


class Conv2d(_Factored, lokr.Conv2d):
    """peft's lokr.Conv2d on the kernels."""


class Conv1d(_Factored, lokr.Conv1d):
    """peft's lokr.Conv1d on the kernels."""


REPLACEMENTS = {lokr.Linear: Linear, lokr.Conv2d: Conv2d, lokr.Conv1d: Conv1d}


def _dims(layer: lokr.LoKrLayer) -> int:
    return layer.get_base_layer().weight.dim() - 2


def _small(steps: int, p: int, q: int) -> bool:
    """Whether the factors of w2 (p, q), of ``steps`` multiplications, take at most half of its own."""
    return 2 * steps <= p * q


def _unfit(layer: lokr.LoKrLayer, adapter_name: str) -> str:
    base = layer.get_base_layer()
    if _dims(layer) and base.groups != 1:
        return f"its convolution has {base.groups} groups"
    if _dims(layer) == 1 and adapter_name in layer.lokr_w2:
        return f"{adapter_name!r} has a whole w2, which peft's Conv1d multiplies by no Kronecker product of channels"
    return ""


def why_left(layer: lokr.LoKrLayer) -> str:
    """Why no adapter of the layer is computed here; "" if one is, or there is none yet."""
    reasons = [_unfit(layer, name) for name in layer.r]
    return reasons[0] if reasons and all(reasons) else ""
