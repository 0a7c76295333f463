"""PHConv2d that learns A, 3x3, against nn.Conv2d of the same shape and the published layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from layers import PublishedLayer, dense_conv2d
from rivals import expected_results, forward, forward_backward
from torch import nn

from phydi_kernels.demo.layer_times import kronecker_sum
from phydi_kernels.nn import PHConv2d

N = 4
BATCH = 32
KERNEL, PADDING = 3, 1
CHANNELS_AND_SIZE = [(64, 32), (256, 8), (512, 4)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("channels", "size"), CHANNELS_AND_SIZE)
def test_phc_conv2d(
    channels: int, size: int, layout: str, backward: bool, compare: Callable[..., None], device: torch.device
) -> None:
    torch.manual_seed(0)
    ours = PHConv2d(channels, channels, KERNEL, N, padding=PADDING, device=device)
    # A channels_last input meets a channels_last weight, as in a dense network that was converted.
    H = kronecker_sum(ours.A.double(), ours.F.double())
    dense = dense_conv2d(H, ours.bias, PADDING, FORMATS[layout])
    conv2d = functools.partial(nn.functional.conv2d, padding=PADDING)
    layers = {"ours": ours, "dense": dense, "published": PublishedLayer(conv2d, ours.A, ours.F, ours.bias)}
    x, grad_output = (
        torch.randn(BATCH, channels, size, size, device=device).contiguous(memory_format=FORMATS[layout])
        for _ in range(2)
    )
    if backward:
        x.requires_grad_()
        rivals = {name: forward_backward(layer, x, grad_output) for name, layer in layers.items()}
    else:
        rivals = {name: forward(layer, x) for name, layer in layers.items()}
    expected = expected_results(conv2d, ours, x, grad_output if backward else None)
    row = {
        "layer": f"conv2d {channels}ch {size}x{size} B={BATCH} {layout}",
        "n": N,
        "rank": None,
        "pass": "forward+backward" if backward else "forward",
        "dtype": "float32",
    }
    terms = max(channels * KERNEL**2, BATCH * size**2)
    with torch.set_grad_enabled(backward):
        compare(row, rivals, expected, terms=terms, asked={})
