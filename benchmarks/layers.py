"""The layers that are timed beside ours: dense ones, of weight H, and the published ones, which build H at a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from phydi_kernels import algebra
from phydi_kernels.demo.layer_times import kronecker_sum


class PublishedLayer(nn.Module):
    """``dense(x, H, bias)``, such as ``torch.nn.functional.linear``, with the parameters of another layer.

    H is built at every call (PHYDI, Eq. 1-3). Written anew from what the public implementations do, except that the
    bias of the convolution is added.
    """

    def __init__(
        self, dense: Callable[[Tensor, Tensor, Tensor], Tensor], A: nn.Parameter, F: nn.Parameter, bias: nn.Parameter
    ) -> None:
        super().__init__()
        self.dense, self.A, self.F, self.bias = dense, A, F, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x, kronecker_sum(self.A, self.F), self.bias)


def dense_linear(H: Tensor, bias: Tensor) -> nn.Linear:
    """nn.Linear with the weight H, in the dtype of the bias."""
    layer = nn.Linear(H.shape[1], H.shape[0], device=bias.device, dtype=bias.dtype)
    return _with(layer, H, bias)


def dense_conv2d(H: Tensor, bias: Tensor, padding: int, memory_format: torch.memory_format) -> nn.Conv2d:
    """nn.Conv2d with the weight H, in the dtype of the bias and in ``memory_format``."""
    layer = nn.Conv2d(H.shape[1], H.shape[0], H.shape[2], padding=padding, device=bias.device, dtype=bias.dtype)
    return _with(layer.to(memory_format=memory_format), H, bias)


@torch.no_grad()
def _with(layer: nn.Module, H: Tensor, bias: Tensor) -> nn.Module:
    layer.weight.copy_(H)
    layer.bias.copy_(bias)
    return layer


def structure_tensor(n: int) -> Tensor:
    """An algebra (n, n, n) of the generic rank: random, as a trained one is to an algorithm.

    For n = 2 the complex numbers, which take 3 terms: most random ones take 2.
    """
    torch.manual_seed(0)
    return algebra.complex_numbers() if n == 2 else algebra.random(n, n, n)
