"""Weighted sums of blocks, their dot products and the algebra of factors, by the kernels of combine.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_close, assert_exact, dtype_id, expanded, normal, red_zone, ternary
from torch import Tensor

from phydi_kernels import reference
from phydi_kernels.kernels.gpu import combine as module
from phydi_kernels.kernels.gpu.combine import block_dots, combine, structure

pytestmark = pytest.mark.usefixtures("guarded")

WRITABLE = {name: layout for name, layout in LAYOUTS.items() if layout is not expanded}


class Sum(NamedTuple):
    C: int
    T: int
    M: int
    J: int
    ones: bool = False  # no coefficients

    def tensors(self, values=ternary, dtype: torch.dtype = torch.float32, layout=lambda t: t) -> dict[str, Tensor]:
        C, T, M, J, ones = self
        shapes = {"x": (T, M, J), "residual": (C, M, J), "coefficients": (C, T)}
        result = {name: layout(values(shape, i).to(dtype)) for i, (name, shape) in enumerate(shapes.items())}
        if ones:
            result["coefficients"] = torch.ones(C, T, dtype=dtype)
        # These are contiguous.
        return {**result, **{name: red_zone(values((C * J,), 7 + i).to(dtype)) for i, name in enumerate(PER_FEATURE)}}

    def run(self, tensors: dict[str, Tensor], out: Tensor | None = None, relu: bool = False) -> Tensor:
        out = self.result() if out is None else out
        given = {name: t for name, t in tensors.items() if name != "coefficients"}
        result = combine(**given, coefficients=None if self.ones else tensors["coefficients"], out=out, relu=relu)
        assert result is out
        return out

    def result(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((self.C, self.M, self.J), math.nan, dtype=dtype)


PER_FEATURE = ("bias", "alpha")
# Tiles of 1024 or, of more than 8 terms, 512 entries, of up to 128 columns.
SUMS = (
    Sum(1, 1, 1, 1),
    Sum(3, 2, 5, 7),
    Sum(2, 8, 9, 129),
    Sum(2, 9, 5, 129),
    Sum(5, 3, 300, 3),
    Sum(32, 2, 3, 5),
    Sum(4, 32, 3, 33),
    Sum(2, 32, 3, 5, ones=True),
    Sum(2, 3, 0, 5),
)
DOTS = ((1, 1, 1, 1), (3, 2, 5, 7), (37, 3, 3, 130), (2, 32, 70, 3), (33, 31, 2, 5), (5, 33, 3, 3), (3, 2, 0, 5))


def weighted_sum(
    x: Tensor,
    coefficients: Tensor,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    h = (coefficients[..., None, None] * x).sum(-3)

    def rows(t: Tensor | None) -> Tensor | float:
        return 0.0 if t is None else t if t.numel() == 1 else t.view(len(h), 1, -1)

    h = h + rows(bias)
    h = torch.relu(h) if relu else h
    h = h if alpha is None else rows(alpha) * h
    return h if residual is None else residual + h


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in tensors.items()}


def exact(actual: Tensor, expected: Tensor) -> None:
    assert_exact({"": actual}, {"": expected}, actual.dtype)


@pytest.mark.parametrize("of", SUMS, ids=str)
@pytest.mark.parametrize("relu", (False, True))
def test_combine(of, relu):
    tensors = of.tensors()
    exact(of.run(tensors, relu=relu), weighted_sum(**double(tensors), relu=relu))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("of", (SUMS[1], SUMS[8]), ids=str)
def test_combine_layouts_of_inputs(of, layout):
    tensors = of.tensors(layout=layout)
    exact(of.run(tensors), weighted_sum(**double(tensors)))


@pytest.mark.parametrize("layout", WRITABLE.values(), ids=WRITABLE.keys())
@pytest.mark.parametrize("of", (SUMS[1], SUMS[8]), ids=str)
def test_combine_layouts_of_the_result(of, layout):
    tensors = of.tensors()
    exact(of.run(tensors, layout(of.result())), weighted_sum(**double(tensors)))


@pytest.mark.parametrize("missing", ("bias", "residual", "alpha"))
def test_combine_options(missing):
    tensors = SUMS[1].tensors()
    del tensors[missing]
    exact(SUMS[1].run(tensors, relu=True), weighted_sum(**double(tensors), relu=True))


def test_combine_one_alpha():
    tensors = {**SUMS[1].tensors(), "alpha": red_zone(torch.tensor([2.0]))}
    exact(SUMS[1].run(tensors), weighted_sum(**double(tensors)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("out", DTYPES[1:], ids=dtype_id)
def test_combine_values(dtype, out):
    of = SUMS[2]
    tensors = of.tensors(normal, dtype)
    # The interpreter truncates to bfloat16: twice the error of rounding.
    magnitude = weighted_sum(**{k: t.abs() for k, t in double(tensors).items()}) * (2 if out is torch.bfloat16 else 1)
    assert_close(of.run(tensors, of.result(out)), weighted_sum(**double(tensors)), magnitude, of.T + 2)


def test_relu_keeps_nan():
    x = torch.tensor([math.nan, -1.0, math.inf]).view(1, 1, 3)
    y = combine(x, None, torch.empty(1, 1, 3), relu=True)
    torch.testing.assert_close(y, torch.relu(x), equal_nan=True)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("cmj,tmj->ct", a.double(), b.double())


@pytest.mark.parametrize("programs", (1, 3, 1024))
@pytest.mark.parametrize("shape", DOTS, ids=str)
def test_block_dots(shape, programs, monkeypatch):
    """Tiles of 256 entries, dealt to programs."""
    monkeypatch.setattr(module, "_DOTS_PROGRAMS", programs)
    C, T, M, J = shape
    a, b = (red_zone(ternary((k, M, J), k).float()) for k in (C, T))
    exact(block_dots(a, b), _dots(a, b))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_block_dots_layouts(layout, dtype):
    a, b = (layout(ternary((k, 37, 9), k).to(dtype)) for k in (5, 3))
    exact(block_dots(a, b), _dots(a, b))


def test_block_dots_are_the_same_at_every_call(monkeypatch):
    monkeypatch.setattr(module, "_DOTS_PROGRAMS", 3)
    a, b = normal((3, 70, 33), 0).float(), normal((2, 70, 33), 1).float()
    D = block_dots(a, b)
    assert_close(D, _dots(a, b), _dots(a.abs(), b.abs()), 70 * 33)
    assert torch.equal(D, block_dots(a, b))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("U", (False, True), ids=("without_U", "U"))
@pytest.mark.parametrize("sizes", ((1, 1, 1, 1), (5, 3, 2, 4), (11, 8, 8, 8)), ids=str)
def test_structure(sizes, U, layout):
    R, *columns = sizes
    factors: list[Any] = [layout(ternary((R, k), i).half()) for i, k in enumerate(columns)]
    if not U:
        factors[0] = None
    exact(structure(*factors), reference.structure(*(None if t is None else t.double() for t in factors)))
