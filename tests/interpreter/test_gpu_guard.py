"""That the guard of kernels sees what it is to see."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers import every_second

from phydi_kernels.kernels.gpu import _launch

pytestmark = pytest.mark.usefixtures("guarded")


@triton.jit
def copy_kernel(x, out, size, x_stride, last_read, last_written, FROM_OUT: tl.constexpr):
    i = tl.arange(0, 16)
    value = tl.load(x + i * x_stride, mask=i < last_read, other=0.0)
    if FROM_OUT:
        value += tl.load(out + i, mask=i < size, other=0.0)
    tl.store(out + i, value, mask=i < last_written)


def _copy(stride=2, last_read=5, last_written=5, from_out=False):
    x, out = every_second(torch.arange(5.0)), torch.zeros(5)
    _launch.launch(copy_kernel, (1,), x, out, 5, stride, last_read, last_written, FROM_OUT=from_out)
    return out


def test_guard_accepts():
    assert _copy().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "defect, message",
    (
        ({"last_read": 6}, "reads beside its inputs at 1 of 6"),
        ({"stride": 1}, "reads beside its inputs at 2 of 5"),
        ({"from_out": True}, "reads beside its inputs at 5 of 5"),
        ({"last_written": 7}, "writes beside its output at 2 of 7"),
    ),
    ids=str,
)
def test_guard_rejects(defect, message):
    with pytest.raises(triton.runtime.errors.InterpreterError, match=f"copy_kernel {message}"):
        _copy(**defect)
