"""PHConv1d, PHConv2d and PHConv3d."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import functional
from .._check import check_divisible, check_integer, check_padding, check_per_dimension
from ._base import HypercomplexLayer


class _PHConv(HypercomplexLayer):
    """What the three convolutions share; ``_dims`` is the number of spatial dimensions."""

    _dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        n: int,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        *,
        algebra_rank: int | str | None = None,
        kron_weights: bool = False,
        init: str | Tensor = "fan",
        learn_algebra: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        n = check_integer("n", n)
        in_channels = check_divisible("in_channels", in_channels, n)
        out_channels = check_divisible("out_channels", out_channels, n)
        kernel = check_per_dimension("kernel_size", kernel_size, self._dims, least=1)
        stride = check_per_dimension("stride", stride, self._dims, least=1)
        dilation = check_per_dimension("dilation", dilation, self._dims, least=1)
        padding = check_padding(padding, stride, self._dims)
        super().__init__(
            in_channels,
            out_channels,
            n,
            kernel,
            bias,
            algebra_rank=algebra_rank,
            kron_weights=kron_weights,
            init=init,
            learn_algebra=learn_algebra,
            device=device,
            dtype=dtype,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.reset_parameters()

    def _convolve(self, dense: Callable[..., Tensor], factored: Callable[..., Tensor], x: Tensor) -> Tensor:
        return self._product(dense, factored, x, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, n={self.n}, "
            f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}{self._repr_options()}"
        )


class PHConv1d(_PHConv):
    """Parameterized hypercomplex convolution of ``(batch, in_channels, length)``; otherwise as :class:`PHConv2d`."""

    _dims = 1

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(functional.phc_conv1d, functional.phc_conv1d_factored, x)


class PHConv2d(_PHConv):
    r"""Parameterized hypercomplex convolution: a convolution with 1/n of the parameters.

    .. math:: y = H * x + b, \qquad H = \sum_i w_i\, A_i \otimes F_i

    (PHYDI, Eq. 1 and 3): the Kronecker product acts on channels, the kernel positions are carried along.

    Args:
        in_channels: channels of the input, divisible by n.
        out_channels: channels of the output, divisible by n.
        kernel_size: one integer, or one for each spatial dimension.
        n: the dimension of the algebra.
        stride, padding, dilation: as in :class:`torch.nn.Conv2d`; padding also ``"valid"`` or ``"same"``.
        bias: adds b.
        algebra_rank: as in :class:`PHMLinear`: R learns U, V and W in place of A and takes R/n^2 of the dense layer's
            multiplications.
        kron_weights: learns one factor w_i a term, starting at 1 (weighted Kronecker products, WKP); else w_i = 1.
        init: ``"fan"`` keeps Var(H) = 2 / fan_in, fan_in = in_channels * kernel positions; ``"reference"`` is the
            published xavier_uniform_ on whole stacks, with Var(H) = 2 / (fan_in (out_channels/n + n)); a structure
            tensor ``(n, n, n)`` starts A from it with the Var(H) of ``"fan"``. With ``algebra_rank`` as in
            :class:`PHMLinear`.
        learn_algebra: False keeps A, or U, V and W, as initialised: their ``requires_grad`` is False, and they stay in
            the state_dict.
        device: of the parameters.
        dtype: of the parameters; inputs must have the same.

    Parameters: ``A (n, n, n)``, or ``U``, ``V`` and ``W`` ``(R, n)``,
    ``F (n, out_channels/n, in_channels/n, *kernel_size)``, ``bias (out_channels,)``, ``kron_weights (n,)``.

    Shapes: ``(batch, in_channels, height, width)`` or ``(in_channels, height, width)`` to the same with out_channels.

    Raises:
        TypeError: a size or ``algebra_rank`` that is not an integer, a dtype that is not real floating point, or
            ``init`` of another type.
        ValueError: a size out of range or not divisible by n, the wrong number of entries for the spatial dimensions,
            ``algebra_rank`` out of range, an unknown ``padding`` or ``init``, or a structure tensor that is not
            ``(n, n, n)``, not finite, or zero.
        DecompositionError: no algorithm of ``algebra_rank`` terms was found for the structure tensor in ``init``.
    """

    _dims = 2

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(functional.phc_conv2d, functional.phc_conv2d_factored, x)


class PHConv3d(_PHConv):
    """Parameterized hypercomplex convolution of ``(batch, in_channels, depth, height, width)``; otherwise as
    :class:`PHConv2d`."""

    _dims = 3

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(functional.phc_conv3d, functional.phc_conv3d_factored, x)
