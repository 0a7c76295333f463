"""The published convolution, next to the published linear layer of the demo: H is built at every call (PHYDI, Eq. 1-3).

Written anew from what the public implementations do, except that the bias of the convolution is added.
"""

from __future__ import annotations

from torch import Tensor, nn

from phydi_kernels.demo.layer_times import kronecker_sum


class PublishedPHConv2d(nn.Module):
    """x (B, Q*q, height, width) -> (B, P*p, height, width), with the parameters of another layer."""

    def __init__(self, A: nn.Parameter, F: nn.Parameter, bias: nn.Parameter, padding: int) -> None:
        super().__init__()
        self.A, self.F, self.bias, self.padding = A, F, bias, padding

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, kronecker_sum(self.A, self.F), self.bias, padding=self.padding)
