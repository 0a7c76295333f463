"""Every driver with every plan that it takes, against the reference in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from driver_calls import calls, check_close, check_exact
from helpers import DTYPES, LAYOUTS, assert_exact, dtype_id, normal
from op_cases import CASES, conv, factored, linear, per_channel
from op_checks import double

from phydi_kernels.kernels.gpu import phm_linear

pytestmark = pytest.mark.usefixtures("guarded", "small_tiles")

# Tiles are 32 rows, 16 features and 8 steps: fewer than one, several, and more rows of them than share weights in L2.
LINEAR = (
    linear((2, 5), 3, 2, 4, 17, 9),
    linear((), 1, 1, 1, 1, 1),
    linear((0,), 2, 3, 2, 3, 5),
    per_channel(linear((37,), 2, 3, 1, 17, 17)),
    linear((3,), 8, 8, 8, 1, 9),
    linear((270,), 2, 1, 2, 17, 3),
)
LINEAR_FACTORED = (
    *(factored(problem, R) for problem, R in zip(LINEAR, (6, 1, 2, 5, 9, 3), strict=True)),
    factored(linear((5,), 4, 4, 3, 17, 9), 4, U=False),
    factored(linear((3,), 2, 11, 7, 5, 9), 32),
)
CONV = (
    conv((2,), (4, 5), (3, 3), 2, 2, 3, 3, 5, padding=1),
    per_channel(conv((2,), (7, 6), (3, 3), 2, 3, 2, 5, 3, stride=2, padding=1)),
    conv((1,), (5, 8), (5, 1), 1, 2, 1, 17, 9, stride=(1, 2), padding=(2, 0)),
    conv((2,), (6, 9), (2, 3), 2, 1, 2, 3, 5, padding=(1, 4), dilation=(3, 2)),
    conv((3,), (3, 4), (1, 1), 2, 2, 3, 17, 9),
    conv((2,), (4, 3), (1, 1), 2, 3, 2, 3, 5, stride=(2, 1), padding=(0, 2)),
    conv((2,), (11,), (3,), 4, 4, 4, 3, 5, padding=2, dilation=2),
    conv((2,), (9,), (5,), 2, 3, 1, 9, 1, stride=3, padding=6),
    conv((2,), (3, 4, 5), (3, 2, 1), 2, 3, 2, 3, 5, stride=(1, 2, 1), padding=(1, 0, 1), dilation=(1, 2, 1)),
    conv((0,), (3, 4), (3, 3), 2, 2, 2, 3, 3, padding=1),
)
CONV_FACTORED = (
    *(factored(problem, R) for problem, R in zip(CONV, (3, 3, 2, 4, 5, 3, 7, 2, 4, 3), strict=True)),
    factored(conv((2,), (3, 4), (2, 1), 3, 2, 4, 5, 3, padding=1), 3, U=False),
)
PROBLEMS = (*LINEAR, *LINEAR_FACTORED, *CONV, *CONV_FACTORED)
_LINEAR, _CONV = linear((3,), 2, 3, 2, 3, 9), conv((2,), (2, 4), (1, 2), 2, 3, 2, 3, 5, padding=(0, 1))
SMALL = (_LINEAR, factored(_LINEAR, 3), _CONV, factored(_CONV, 3))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_integer_values_are_exact(problem):
    check_exact(problem)


@pytest.mark.parametrize("blocks", (1, 2))
@pytest.mark.parametrize("activation", ("none", "relu"))
@pytest.mark.parametrize("problem", (LINEAR[0], LINEAR[3], LINEAR_FACTORED[0], CONV[1], CONV[8]), ids=str)
def test_panels_of_some_output_blocks(problem, activation, blocks, monkeypatch):
    """The last of them with fewer blocks; bias, residual and alpha are those of a panel's features."""
    F = problem.shapes["F"]
    Q = problem.shapes["x"][-1 if len(F) == 3 else 1] // F[2]
    monkeypatch.setattr(phm_linear, "PANEL_BYTES", blocks * math.prod(F[1:]) * Q * 4)
    check_exact(problem, activation=activation)


@pytest.mark.parametrize("problem", (LINEAR[0], CONV[1]), ids=str)
def test_panels_without_an_epilogue(problem, monkeypatch):
    monkeypatch.setattr(phm_linear, "PANEL_BYTES", 1)
    for omit in (("residual", "alpha"), ("bias", "residual", "alpha")):
        check_exact(problem, omit=omit)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=dtype_id)
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_integer_values_are_exact_in_16_bits(problem, dtype):
    check_exact(problem, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=dtype_id)
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_algebra_in_float32(problem, dtype):
    check_exact(problem, dtype=dtype, algebra=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("problem", (LINEAR[3], LINEAR_FACTORED[3], CONV[4], CONV_FACTORED[4]), ids=str)
def test_values(problem, dtype):
    check_close(problem, dtype)


@pytest.mark.parametrize("activation", ("none", "relu"))
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_options(problem, activation):
    optional = ("bias", "residual", "alpha")
    for omit in itertools.chain.from_iterable(itertools.combinations(optional, k) for k in range(4)):
        for variant in (problem, *([] if "alpha" in omit else [per_channel(problem)])):
            next(calls(variant, omit=omit, activation=activation)).check_exact()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_layouts_between_nan(problem, layout):
    check_exact(per_channel(problem), layout=layout)


@pytest.mark.parametrize("problem", (CONV[1], CONV[8], CONV_FACTORED[1], CONV_FACTORED[8]), ids=str)
def test_channels_last(problem):
    dims = len(problem.shapes["x"]) - 2
    (layout,) = CASES[f"phc_conv{dims}d"].layouts.values()
    check_exact(problem, layout=layout)


@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_reruns_are_bitwise_equal(problem):
    for call in calls(problem, normal):
        before = {name: t.clone() for name, t in call.tensors.items()}
        for plan in call.plans:
            first, second = call.run(plan), call.run(plan)
            assert all(torch.equal(value, second[name]) for name, value in first.items()), plan
        for name, t in call.tensors.items():
            assert torch.equal(t, before[name]), f"{name} was changed"


@pytest.mark.parametrize("problem", (LINEAR[3], LINEAR_FACTORED[3], CONV[1], CONV_FACTORED[1]), ids=str)
def test_nan_stays_in_its_sample(problem):
    call = next(calls(problem))
    expected = call.expected(double(call.tensors))
    call.tensors["x"][1] = torch.nan
    for plan in call.plans:
        for name, y in call.run(plan).items():
            assert y[1].isnan().any()
            kept = [i for i in range(len(y)) if i != 1]
            assert_exact({name: y[kept]}, {name: expected[name][kept]}, y.dtype)
