"""Entries more than 2^31 apart, with strides that fit in 32 bits: offsets are 64-bit before they are multiplied."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from helpers import assert_exact, ternary
from torch import Tensor

from phydi_kernels import reference
from phydi_kernels.kernels.gpu import _launch
from phydi_kernels.kernels.gpu.combine import block_dots, combine
from phydi_kernels.kernels.gpu.configs import Config
from phydi_kernels.kernels.gpu.rank_product import rank_product
from phydi_kernels.kernels.gpu.stream_product import stream_product
from phydi_kernels.kernels.gpu.window import Window, rows_window

pytestmark = pytest.mark.usefixtures("guarded")

TILE = Config(16, 16, 2, 4, 2)


def half(*shape: int, seed: int = 0) -> Tensor:
    return ternary(shape, seed).half()


def exact(actual: Tensor, expected: Tensor) -> None:
    assert_exact({"": actual}, {"": expected}, actual.dtype)


@pytest.fixture
def far(vast) -> Callable[..., Tensor]:
    """A copy of a tensor of which entries ``steps`` apart along ``axis`` (by default the ends) are 2^31 apart."""

    def copy(t: Tensor, axis: int, steps: int | None = None) -> Tensor:
        strides = [math.prod(size for k, size in enumerate(t.shape) if k > i and k != axis) for i in range(t.dim())]
        strides[axis] = -(-(2**31) // (steps or t.shape[axis] - 1))
        assert strides[axis] < 2**31
        return vast(tuple(t.shape), tuple(strides)).copy_(t)

    return copy


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("which", ("x", "residual", "out"))
def test_combine(which, axis, far):
    tensors = {"x": half(3, 3, 3), "residual": half(3, 3, 3, seed=1), "out": torch.zeros(3, 3, 3).half()}
    coefficients = half(3, 3, seed=2)
    expected = torch.einsum("ct,tmj->cmj", coefficients.double(), tensors["x"].double()) + tensors["residual"].double()
    tensors[which] = far(tensors[which], axis)
    combine(tensors["x"], coefficients, tensors["out"], residual=tensors["residual"])
    exact(tensors["out"], expected)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("which", (0, 1))
def test_block_dots(which, axis, far):
    blocks = [half(3, 5, 4, seed=i) for i in range(2)]
    expected = torch.einsum("cmj,tmj->ct", *(t.double() for t in blocks))
    blocks[which] = far(blocks[which], axis)
    exact(block_dots(*blocks), expected)


R, P, Q, p, q = 3, 2, 3, 3, 5


def _arguments(image: bool) -> dict[str, Tensor]:
    """Three rows, or three images of 3 x 3 pixels and a kernel of nine taps; no U, so that any product takes them."""
    pixels, taps = ((3, 3, 3), 9) if image else ((3,), 1)
    return {
        "x": half(*pixels, Q * q),
        "V": half(R, P, seed=1),
        "W": half(R, Q, seed=2),
        "F": half(R, p, taps, q, seed=3),
        "residual": half(math.prod(pixels), P * p, seed=4),
    }


def _expected(x: Tensor, V: Tensor, W: Tensor, F: Tensor, residual: Tensor) -> Tensor:
    x, V, W, F, residual = (t.double() for t in (x, V, W, F, residual))
    if F.shape[2] == 1:
        return reference.phm_linear_factored(x, None, V, W, F[:, :, 0], residual=residual)
    geometry = ([1, 1], [1, 1], [1, 1])
    y = reference.phc_conv_factored(x.movedim(-1, 1), None, V, W, F.mT.unflatten(-1, (3, 3)), None, *geometry)
    return y.movedim(1, -1).flatten(0, -2) + residual


def _run(kernel: str, x: Tensor, V: Tensor, W: Tensor, F: Tensor, residual: Tensor) -> Tensor:
    """``x`` is X-hat (R, ...) for "epilogue"."""
    pixels = x[0] if kernel == "epilogue" else x
    if F.shape[2] == 1:
        window = rows_window(pixels.stride(0))
    else:
        window = Window((3, 3), (3, 3), (3, 3), padding=(1, 1), strides=pixels.stride()[:3])
    if kernel == "stream":
        # Three steps over q for each tap, in three parts.
        A = reference.structure(None, V, W)
        return stream_product(x, A, F, None, residual, None, False, window, TILE, 3)
    return rank_product(x, V, W if kernel == "fused" else None, F, None, residual, None, False, window, TILE)


_OF_ROWS = (("x", 0), ("x", 1), ("F", 0), ("F", 1), ("F", 3), ("residual", 0), ("residual", 1), ("out", 0))
_OF_IMAGES = (*(("x", i) for i in range(4)), ("F", 2))
CASES = [
    *((kernel, False, *case) for kernel in ("stream", "fused") for case in _OF_ROWS),
    *((kernel, True, *case) for kernel in ("stream", "fused") for case in _OF_IMAGES),
    *(("epilogue", image, "x", axis) for image, axes in ((False, 3), (True, 5)) for axis in range(axes)),
]


@pytest.mark.parametrize("kernel, image, which, axis", CASES)
def test_products(kernel, image, which, axis, far, monkeypatch):
    tensors = _arguments(image)
    expected = _expected(**tensors)
    if kernel == "epilogue":
        blocks = tensors["x"].unflatten(-1, (Q, q))
        tensors["x"] = torch.einsum("rl,...lq->r...q", tensors["W"], blocks)
    if which == "out":
        monkeypatch.setattr(_launch, "run", _redirected(_launch.run, far))
    else:
        t = tensors[which]
        steps = None
        if axis == t.dim() - 1 and (which, kernel) != ("x", "epilogue"):
            # From the first block of the input to the third; to the last feature of an output block.
            steps = {"x": 2 * q, "residual": p - 1}.get(which)
        tensors[which] = far(t, axis, steps)
    exact(_run(kernel, **tensors), expected)


def _redirected(run: Callable[..., None], far: Callable[..., Tensor]) -> Callable[..., None]:
    """Products write their rows, or the parts of a split sum, that far apart."""

    def redirected(kernel, grid, args, meta):
        values = dict(zip(inspect.signature(kernel.fn).parameters, args, strict=False))
        stride = next((name for name in ("out_b", "out_split") if name in values), None)
        if stride is None:
            return run(kernel, grid, args, meta)
        out, place = values["out"], far(torch.zeros_like(values["out"]), 0)
        values |= {"out": place, stride: place.stride(0)}
        run(kernel, grid, tuple(values.values()), meta)
        return out.copy_(place)

    return redirected
