"""phc_conv1d, 2d and 3d: the shared checks, a result worked out by hand, padding by name, every compiled plan."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_exact, dtype_id, evaluate, ternary
from op_cases import CASES, conv, dense_weight
from op_checks import OpChecks, double, draw

from phydi_kernels import functional, plans
from phydi_kernels.kernels import phc_conv
from phydi_kernels.ops.phc_conv import pointwise_sizes


class TestPHCConv1d(OpChecks):
    case = CASES["phc_conv1d"]


class TestPHCConv2d(OpChecks):
    case = CASES["phc_conv2d"]


class TestPHCConv3d(OpChecks):
    case = CASES["phc_conv3d"]


def test_complex_filter():
    """The filter (1, i) over the complex sequence 1, 2i, 3: f_0 x_t + f_1 x_{t+1} = 1 + i*2i, 2i + i*3."""
    A = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]]])
    F = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 1, 1, 2)
    x = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]])
    y = functional.phc_conv1d(x, A, F)
    assert y.tolist() == [[-1.0, 0.0], [0.0, 5.0]]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # from the reference, torch's own convolution
@pytest.mark.parametrize("d", (1, 2, 3))
@pytest.mark.parametrize("padding", ("valid", "same"))
@pytest.mark.parametrize("dilation", (1, 2))
def test_padding_by_name(d, padding, dilation, device):
    problem = conv((2,), (7,) * d, (2,) + (3,) * (d - 1), 2, 2, 2, 3, 1)
    tensors = draw(problem, ternary, torch.float32, device, omit=("residual",))
    y = getattr(functional, f"phc_conv{d}d")(**tensors, padding=padding, dilation=dilation)
    plain = getattr(torch.nn.functional, f"conv{d}d")
    weight = dense_weight(tensors["A"], tensors["F"])
    expected = plain(tensors["x"], weight, tensors["bias"], padding=padding, dilation=dilation) * tensors["alpha"]
    assert torch.equal(y, expected)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", (plans.Plan.MIX, plans.Plan.PANEL, plans.Plan.POINTWISE), ids=lambda plan: plan.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", ("phc_conv1d", "phc_conv2d", "phc_conv3d"))
def test_every_plan(name, dtype, plan, monkeypatch):
    """Every plan serves every shape, also where the cost model would not choose it; but pointwise one position."""
    monkeypatch.setattr(plans, "phc_conv", lambda *sizes: plan)
    of_weights = plans.Plan.MIX if plan is plans.Plan.MIX else plans.Plan.PANEL
    monkeypatch.setattr(plans, "phc_conv_weight_grad", lambda *sizes: of_weights)
    case = CASES[name]
    for problem in case.problems:
        if plan is plans.Plan.POINTWISE and (set(problem.shapes["F"][3:]) != {1} or problem.options.get("padding")):
            continue
        for layout in (torch.Tensor.contiguous, *case.layouts.values()):
            tensors = {key: layout(t) for key, t in draw(problem, ternary, dtype).items()}
            grad = layout(ternary(problem.shapes["residual"], 99).to(dtype))
            actual = evaluate(case.op, tensors, problem.options, case.differentiable, grad)
            expected = evaluate(case.dense, double(tensors), problem.options, case.differentiable, grad.double())
            assert_exact(actual, expected, dtype)


@pytest.mark.parametrize("d", (1, 2, 3))
def test_convolution_without_onednn(d, monkeypatch):
    shapes = ((2, 3, *(7,) * d), (5, 3, *(2,) * d), (5,))
    tensors = [ternary(shape, seed) for seed, shape in enumerate(shapes)]
    geometry = ([2] * d, [1] * d, [2] * d)
    expected = getattr(torch.nn.functional, f"conv{d}d")(*tensors, *geometry)
    for enabled in (False, True):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        assert torch.equal(phc_conv.convolution(*(t.float() for t in tensors), *geometry).double(), expected)


@pytest.mark.usefixtures("library")
def test_an_image_of_one_pixel_is_a_row_as_it_lies():
    x, F = ternary((3, 6, 1, 1), 0).float(), ternary((2, 2, 3, 1, 1), 1).float()
    stride = [1, 1]
    y = phc_conv.pointwise(x, x.shape, lambda rows, residual: rows, stride, stride)
    assert y.shape == x.shape
    assert y.data_ptr() == x.data_ptr()
    assert phc_conv.image_of_rows(x.view(3, 1, 6), x.shape, stride, torch.contiguous_format).data_ptr() == x.data_ptr()
    assert pointwise_sizes(x, F, [0, 0], 99) == (True, 0)
    assert pointwise_sizes(x.expand(3, 6, 2, 1).contiguous(), F, [0, 0], 99) == (True, 99)


@pytest.mark.parametrize("count", (1, 3, 8))
@pytest.mark.parametrize("block_bytes", (4, 1 << 20, 3 << 20, 4 << 20, 9 << 20))
def test_panels_of_h_stay_within_four_mebibytes_or_one_block(count, block_bytes):
    panels = phc_conv._blocks(count, block_bytes // 4, 4)
    assert [i for panel in panels for i in range(panel.start, panel.stop)] == list(range(count))
    assert all((panel.stop - panel.start) * block_bytes <= max(4 << 20, block_bytes) for panel in panels)
