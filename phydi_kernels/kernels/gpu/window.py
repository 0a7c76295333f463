"""Where the rows of a product lie: they are those of a linear layer, or the pixels of channels_last images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

# Tiles of rows that share the weights in L2 before the next ones are taken.
GROUP: tl.constexpr = tl.constexpr(8)


class Window(NamedTuple):
    """Where the rows of a product lie in an image: those of a linear layer are images of one pixel."""

    size: Sequence[int]  # (height, width) of an image,
    out_size: Sequence[int]  # of a result,
    taps: Sequence[int]  # of the kernel
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    strides: Sequence[int] = ()  # in memory, of an image, its rows and its columns
    image: bool = True


def rows_window(stride: int) -> Window:
    return Window((1, 1), (1, 1), (1, 1), strides=(stride, 0, 0), image=False)


@triton.jit
def tile_of(program, tiles_b, tiles_w):
    """(tile of rows, tile of weights) of a program: programs that run together share both, in L2."""
    in_group = GROUP * tiles_w
    group = program // in_group
    first = group * GROUP
    size = min(tiles_b - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def place_in_image(b, out_height, out_width, stride_h, stride_w, padding_h, padding_w, IMAGE: tl.constexpr):
    """(image, first row, first column) that the window of output pixel ``b`` covers."""
    if IMAGE:
        image = b // (out_height * out_width)
        h = b // out_width % out_height * stride_h - padding_h
        w = b % out_width * stride_w - padding_w
        return image, h, w
    return b, b * 0, b * 0
