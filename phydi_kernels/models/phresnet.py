"""Parameterized hypercomplex residual networks (PHYDI, section 3.1) for small images such as CIFAR's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter

from .._check import check_integer
from ..nn import PHConv2d
from ..nn._fixup import Scale, Shift, branch_scale
from ..nn._init import check_init, check_rank

Conv = PHConv2d | nn.Conv2d

INITS = ("standard", "wkp", "phydi", "fixup")


def stage_widths(n: int, width: int) -> tuple[int, ...]:
    """Channels of the four stages, all divisible by n.

    ``width`` times 1, 2, 4 and 8 where n divides it. Otherwise in proportion to the published widths of n = 3 at width
    64, which are 60, 120, 240 and 516, rounded to the nearest multiple of n.
    """
    if width % n == 0:
        return tuple(width * m for m in (1, 2, 4, 8))
    return tuple(n * max(1, (c * width + 32 * n) // (64 * n)) for c in (60, 120, 240, 516))


class PHResNet(Module):
    r"""Residual network of parameterized hypercomplex convolutions.

    A 3x3 stem, four stages of residual blocks with strides 1, 2, 2 and 2, the average over space, and a dense linear
    head. A block has a branch f of two 3x3 convolutions, or of a 1x1, a 3x3 and a 1x1 convolution (bottleneck), with
    batch normalisation after each and ReLU between, and a shortcut s: the identity, or where shapes differ a 1x1
    convolution with batch normalisation.

    * ``"standard"``: :math:`\mathrm{relu}(s(x) + f(x))` (He et al., 2016).
    * ``"wkp"``: the same with ``kron_weights`` in each convolution (PHYDI, section 4.1).
    * ``"phydi"``: :math:`s(x) + \alpha\, \mathrm{relu}(f(x))` with one alpha ``(1,)`` a block, 0 at the start
      (PHYDI, Eq. 2 and 3).
    * ``"fixup"``: the standard block without normalisation (Zhang, Dauphin and Ma, 2019): scalar biases around each
      convolution and before the head, a scalar factor on f before its last bias, the last convolution of f and the head
      zero, and the others of f scaled by
      L^(-1/(2m - 2)) for L blocks of m convolutions. All logits are 0 at the start.

    Convolutions have no bias of their own: one before batch normalisation would have no effect.

    On the CPU hypercomplex networks (n > 1) compute in channels_last, whatever the memory format of the images.

    Args:
        blocks: number of residual blocks in each of the four stages.
        bottleneck: whether blocks have three convolutions, the last with four times the stage's channels.
        n: the dimension of the algebra. n = 1 is the real network, of :class:`torch.nn.Conv2d`.
        num_classes: size of the output.
        in_channels: channels of the images; None means 3. Zero channels are put in front, up to a multiple of n.
        init: ``"standard"``, ``"wkp"`` (with n > 1), ``"phydi"`` or ``"fixup"``.
        width: channels of the first stage, about doubled from stage to stage; see :func:`stage_widths`.
        algebra_rank: as in :class:`PHConv2d`, for each convolution: None, the number of terms R, or ``"generic"``.
        weight_init: the ``init`` of :class:`PHConv2d`: ``"fan"``, ``"reference"`` or a structure tensor. With n = 1,
            ``"fan"`` is He's normal initialisation and ``"reference"`` that of :class:`torch.nn.Conv2d`.
        device: of the parameters.
        dtype: of the parameters; inputs must have the same.

    Shapes: ``(batch, in_channels, height, width)`` to ``(batch, num_classes)``, the logits.

    Raises:
        TypeError: a size or ``algebra_rank`` that is not an integer, or a ``weight_init`` of another type.
        ValueError: a size below 1, an unknown ``init`` or ``weight_init``, an ``algebra_rank`` out of range or with
            n = 1, or an input of another shape.
        DecompositionError: no algorithm of ``algebra_rank`` terms was found for the tensor in ``weight_init``.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        bottleneck: bool,
        n: int,
        num_classes: int = 10,
        in_channels: int | None = None,
        init: str = "standard",
        width: int = 64,
        *,
        algebra_rank: int | str | None = None,
        weight_init: str | Tensor = "fan",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(blocks, Sequence):
            raise TypeError(f"blocks={blocks!r} must be four integers, not {type(blocks).__name__}")
        if len(blocks) != 4:
            raise ValueError(f"blocks={blocks} has {len(blocks)} entries; it must have 4, one for each stage")
        counts = [check_integer("blocks", count) for count in blocks]
        n = check_integer("n", n)
        num_classes = check_integer("num_classes", num_classes)
        in_channels = 3 if in_channels is None else check_integer("in_channels", in_channels)
        widths = stage_widths(n, check_integer("width", width))
        rank = check_rank("algebra_rank", algebra_rank, n)
        if n == 1 and rank is not None:
            raise ValueError(
                f"algebra_rank={algebra_rank!r} is the rank of A; with n=1 there is none, and it must be None"
            )
        weight_init = check_init("weight_init", weight_init, n)
        if n == 1 and isinstance(weight_init, Tensor):
            raise ValueError('weight_init is a structure tensor; with n=1 it must be "fan" or "reference"')
        if init not in INITS:
            raise ValueError(f"init={init!r} is not one of {', '.join(map(repr, INITS))}")
        if init == "wkp" and n == 1:
            raise ValueError('init="wkp" weighs the n terms of H = sum_i A_i (x) F_i; it needs n > 1, not n=1')
        self.in_channels = in_channels
        self.zero_channels = -in_channels % n
        # torch's and our convolutions are faster in it.
        self.channels_last = n > 1

        options: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = _conv_factory(n, init, rank, weight_init, options)
        chain = _fixup_chain if init == "fixup" else _batch_norm_chain
        channels = widths[0]
        layers = []
        self.stem = chain([conv(in_channels + self.zero_channels, channels, 3)], options)
        for stage, (stage_width, count) in enumerate(zip(widths, counts, strict=True), start=1):
            layer = nn.Sequential()
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                convs = _branch_convs(conv, channels, stage_width, stride, bottleneck)
                out_channels = convs[-1].out_channels
                same = stride == 1 and channels == out_channels
                shortcut = None if same else conv(channels, out_channels, 1, stride)
                layer.append(ResidualBlock(convs, shortcut, init, options))
                channels = out_channels
            layers.append(layer)
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.shift = Shift(options) if init == "fixup" else nn.Identity()
        self.linear = nn.Linear(channels, num_classes, **options)
        if init == "fixup":
            self._scale_fixup()

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (batch, {self.in_channels}, height, width)")
        if self.zero_channels:
            x = nn.functional.pad(x, (0, 0, 0, 0, self.zero_channels, 0))
        if self.channels_last and x.device.type == "cpu":
            # Not contiguous(memory_format=...), which vmap does not know.
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        x = torch.relu(self.stem(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.shift(x.mean((2, 3))))

    @torch.no_grad()
    def _scale_fixup(self) -> None:
        blocks = [m for m in self.modules() if isinstance(m, ResidualBlock)]
        for block in blocks:
            *convs, last = (m for m in block.branch if isinstance(m, (PHConv2d, nn.Conv2d)))
            for c in convs:
                _weight(c).mul_(branch_scale(len(blocks), len(convs) + 1))
            _weight(last).zero_()
        self.linear.weight.zero_()
        self.linear.bias.zero_()


class ResidualBlock(Module):
    r"""relu(shortcut + branch), or with PHYDI shortcut + alpha * relu(branch); see :class:`PHResNet`."""

    alpha: Parameter | None

    def __init__(self, convs: list[Conv], shortcut: Conv | None, init: str, options: dict[str, Any]) -> None:
        super().__init__()
        chain = _fixup_chain if init == "fixup" else _batch_norm_chain
        self.branch = _fixup_chain(convs, options, scale=True) if init == "fixup" else chain(convs, options)
        self.shortcut = nn.Identity() if shortcut is None else chain([shortcut], options)
        self.alpha = Parameter(torch.empty(1, **options)) if init == "phydi" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets alpha to 0; the convolutions reset their own."""
        if self.alpha is not None:
            nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        shortcut, branch = self.shortcut(x), self.branch(x)
        if self.alpha is None:
            return torch.relu_(shortcut + branch)
        return torch.addcmul(shortcut, self.alpha, torch.relu(branch))


def _conv_factory(
    n: int, init: str, rank: int | None, weight_init: str | Tensor, options: dict[str, Any]
) -> Callable[..., Conv]:
    """Makes ``conv(in_channels, out_channels, kernel_size, stride=1)`` of an odd kernel that keeps the size."""

    def hypercomplex(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> PHConv2d:
        return PHConv2d(
            in_channels,
            out_channels,
            kernel_size,
            n,
            stride,
            padding=kernel_size // 2,
            bias=False,
            algebra_rank=rank,
            kron_weights=init == "wkp",
            init=weight_init,
            **options,
        )

    def real(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False, **options
        )
        if weight_init == "fan":
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        return conv

    return real if n == 1 else hypercomplex


def _weight(conv: Conv) -> Tensor:
    return conv.F if isinstance(conv, PHConv2d) else conv.weight


def _branch_convs(conv: Callable[..., Conv], in_channels: int, width: int, stride: int, bottleneck: bool) -> list[Conv]:
    if bottleneck:
        return [conv(in_channels, width, 1), conv(width, width, 3, stride), conv(width, 4 * width, 1)]
    return [conv(in_channels, width, 3, stride), conv(width, width, 3)]


def _batch_norm_chain(convs: list[Conv], options: dict[str, Any]) -> nn.Sequential:
    """Convolutions, each followed by batch normalisation, with ReLU between."""
    layers: OrderedDict[str, Module] = OrderedDict()
    for i, conv in enumerate(convs, start=1):
        if i > 1:
            layers[f"relu{i - 1}"] = nn.ReLU()
        layers[f"conv{i}"] = conv
        layers[f"bn{i}"] = nn.BatchNorm2d(conv.out_channels, **options)
    return nn.Sequential(layers)


def _fixup_chain(convs: list[Conv], options: dict[str, Any], *, scale: bool = False) -> nn.Sequential:
    """Convolutions, each between scalar biases, with ReLU between, and a scalar factor after the last."""
    layers: OrderedDict[str, Module] = OrderedDict()
    for i, conv in enumerate(convs, start=1):
        if i > 1:
            layers[f"relu{i - 1}"] = nn.ReLU()
        layers[f"bias{i}a"] = Shift(options)
        layers[f"conv{i}"] = conv
        if scale and i == len(convs):
            layers["scale"] = Scale(options)
        layers[f"bias{i}b"] = Shift(options)
    return nn.Sequential(layers)


def phresnet18(
    n: int,
    num_classes: int = 10,
    in_channels: int | None = None,
    init: str = "standard",
    width: int = 64,
    **options: Any,
) -> PHResNet:
    """PHResNet18: two basic blocks in each stage. Arguments are those of :class:`PHResNet`."""
    return PHResNet((2, 2, 2, 2), False, n, num_classes, in_channels, init, width, **options)


def phresnet34(
    n: int,
    num_classes: int = 10,
    in_channels: int | None = None,
    init: str = "standard",
    width: int = 64,
    **options: Any,
) -> PHResNet:
    """PHResNet34: 3, 4, 6 and 3 basic blocks. Arguments are those of :class:`PHResNet`."""
    return PHResNet((3, 4, 6, 3), False, n, num_classes, in_channels, init, width, **options)


def phresnet50(
    n: int,
    num_classes: int = 10,
    in_channels: int | None = None,
    init: str = "standard",
    width: int = 64,
    **options: Any,
) -> PHResNet:
    """PHResNet50: 3, 4, 6 and 3 bottleneck blocks. Arguments are those of :class:`PHResNet`."""
    return PHResNet((3, 4, 6, 3), True, n, num_classes, in_channels, init, width, **options)


def phresnet101(
    n: int,
    num_classes: int = 10,
    in_channels: int | None = None,
    init: str = "standard",
    width: int = 64,
    **options: Any,
) -> PHResNet:
    """PHResNet101: 3, 4, 23 and 3 bottleneck blocks. Arguments are those of :class:`PHResNet`."""
    return PHResNet((3, 4, 23, 3), True, n, num_classes, in_channels, init, width, **options)


def phresnet152(
    n: int,
    num_classes: int = 10,
    in_channels: int | None = None,
    init: str = "standard",
    width: int = 64,
    **options: Any,
) -> PHResNet:
    """PHResNet152: 3, 8, 36 and 3 bottleneck blocks. Arguments are those of :class:`PHResNet`."""
    return PHResNet((3, 8, 36, 3), True, n, num_classes, in_channels, init, width, **options)
