"""PHConv2d in rank-R form, 3x3, as ``optimize_for_inference`` makes it, against nn.Conv2d and the published layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from layers import PublishedLayer, dense_conv2d, structure_tensor
from rivals import expected_results, forward
from torch import nn

from phydi_kernels import optimize_for_inference
from phydi_kernels.demo.layer_times import kronecker_sum
from phydi_kernels.nn import PHConv2d

N = 4
BATCH = 32
KERNEL, PADDING = 3, 1
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# ours / nn.Conv2d at one thread, by channels and size.
ASKED = {(256, 16): {"float32": 0.58, "bfloat16": 0.75}, (512, 8): {"float32": 0.52, "bfloat16": 0.55}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("channels", "size"), ASKED)
def test_inference(
    channels: int, size: int, layout: str, dtype: str, compare: Callable[..., None], device: torch.device
) -> None:
    options = {"init": structure_tensor(N), "device": device, "dtype": DTYPES[dtype]}
    layer = PHConv2d(channels, channels, KERNEL, N, padding=PADDING, **options).eval()
    ours, prepacked = (
        optimize_for_inference(layer, prepack=prepack, progress=False, verbose=False) for prepack in (False, True)
    )
    # A channels_last input meets a channels_last weight, as in a dense network that was converted.
    H = kronecker_sum(layer.A.double(), layer.F.double())
    conv2d = functools.partial(nn.functional.conv2d, padding=PADDING)
    layers = {
        "ours": ours,
        "prepacked": prepacked,
        "dense": dense_conv2d(H, layer.bias, PADDING, FORMATS[layout]),
        "published": PublishedLayer(conv2d, layer.A, layer.F, layer.bias),
    }
    x = torch.randn(BATCH, channels, size, size, device=device, dtype=DTYPES[dtype])
    x = x.contiguous(memory_format=FORMATS[layout])
    expected = expected_results(conv2d, layer, x, None)
    row = {
        "layer": f"conv2d {channels}ch {size}x{size} B={BATCH} {layout}",
        "n": N,
        "rank": ours.rank,
        "pass": "forward",
        "dtype": dtype,
    }
    asked = {"ratio": ASKED[channels, size][dtype]}
    with torch.no_grad():
        rivals = {name: forward(rival, x) for name, rival in layers.items()}
        compare(row, rivals, expected, terms=channels * KERNEL**2, asked=asked)
