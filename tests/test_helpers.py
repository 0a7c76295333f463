"""The comparisons that judge the operators let rounding pass and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_close, assert_exact, dtype_id, expanded, normal, ternary

TERMS = 300


def _product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix product computed in ``dtype``, in float64, and over absolute values."""
    a, b = normal((70, TERMS), 0).to(dtype), normal((TERMS, 50), 1).to(dtype)
    work = torch.float64 if dtype is torch.float64 else torch.float32
    rounded = (a.to(work) @ b.to(work)).to(dtype)
    return rounded, a.double() @ b.double(), a.double().abs() @ b.double().abs()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
class TestAssertClose:
    def test_accepts_rounding(self, dtype):
        assert_close(*_product(dtype), TERMS)

    @pytest.mark.parametrize("defect", ("outlier", "scale", "offset", "sign", "nan", "zeros", "shape"))
    def test_rejects(self, dtype, defect):
        value, expected, magnitude = _product(dtype)
        eps = torch.finfo(dtype).eps
        size = magnitude / math.sqrt(TERMS)
        relative = 3 * (eps + math.sqrt(TERMS) * torch.finfo(torch.float32).eps)
        if defect == "outlier":
            value[3, 4] += 20 * relative * size[3, 4]
        elif defect == "scale":
            value = value * (1 + relative)
        elif defect == "offset":
            value = value + relative * size.mean()
        elif defect == "sign":
            value = -value
        elif defect == "nan":
            value[0, 0] = torch.nan
        elif defect == "zeros":
            value = torch.zeros_like(value)
        else:
            value = value[:1]
        with pytest.raises(AssertionError):
            assert_close(value.to(dtype), expected, magnitude, TERMS)


def test_assert_exact_sees_dtype_and_one_unit():
    expected = ternary((5, 7), 0)
    assert_exact({"y": expected.float()}, {"y": expected}, torch.float32)
    with pytest.raises(AssertionError, match="y has dtype"):
        assert_exact({"y": expected}, {"y": expected}, torch.float32)
    with pytest.raises(AssertionError, match="y: "):
        assert_exact({"y": expected.float() + 1e-6}, {"y": expected}, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("shape", ((), (1,), (5,), (3, 4), (2, 3, 4), (0, 3)))
def test_layouts_keep_values_between_nan(layout, shape):
    value = normal(shape, 0)
    t = layout(value)
    assert torch.equal(t, expanded(value) if layout is expanded else value)
    buffer = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    assert buffer.numel() == 0 or (buffer[0].isnan() and buffer[-1].isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_unwritten_memory_is_nan(dtype):
    """By every route a kernel allocates: Python, ATen's operators, resize, and so any C++ that calls ATen."""
    x = torch.zeros(3, dtype=dtype)
    allocated = [
        torch.empty(3, dtype=dtype),
        x.new_empty(3),
        torch.empty_like(x),
        torch.ops.aten.empty_strided.default([3], [2], dtype=dtype),
        torch.empty(0, dtype=dtype).resize_(3),
    ]
    assert all(t.isnan().all() for t in allocated)
