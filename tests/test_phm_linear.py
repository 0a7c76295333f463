"""phm_linear: the shared checks, results worked out by hand, every compiled plan."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_close, assert_exact, dtype_id, evaluate, normal, ternary
from op_cases import CASES, LINEAR_PROBLEMS
from op_checks import ACTIVATIONS, OpChecks, absolute, double, draw

from phydi_kernels import functional, plans
from phydi_kernels.kernels import cpu
from phydi_kernels.plans import Plan

CASE = CASES["phm_linear"]


class TestPHMLinear(OpChecks):
    case = CASE

    def test_compile_with_inductor(self, device):
        self._compiled(CASE.small[0], "inductor", False, "relu", device)

    def test_two_threads_add_in_the_same_order(self, problem, threads):
        tensors = draw(problem, normal, torch.float32)
        grad = self._grad_output(tensors, problem.options, normal)
        one, two = self._with_one_and_two_threads(tensors, problem.options, grad, threads)
        for name, value in two.items():
            assert torch.equal(value, one[name]), f"{name} depends on the number of threads"


def test_complex_product():
    """A of the complex numbers and 1x1 weights: (2 + 3i)(5 + 7i) = -11 + 29i."""
    A = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]]])
    F = torch.tensor([2.0, 3.0]).reshape(2, 1, 1)
    y = functional.phm_linear(torch.tensor([5.0, 7.0]), A, F)
    assert y.tolist() == [-11.0, 29.0]


def test_two_terms_of_two_by_two_weights():
    """H = [[1, 2], [3, 4]] (x) [[1, 0], [2, 1]] + [[0, 1], [1, 0]] (x) [[5, 6], [7, 8]], written out."""
    A = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]])
    F = torch.tensor([[[1.0, 0.0], [2.0, 1.0]], [[5.0, 6.0], [7.0, 8.0]]])
    H = torch.tensor([[1.0, 0, 7, 6], [2, 1, 11, 10], [8, 6, 4, 0], [13, 11, 8, 4]])
    assert torch.equal(functional.phm_linear(torch.eye(4), A, F), H.T)
    x, bias, residual = torch.tensor([1.0, 2, 3, -4]), torch.tensor([1.0, 0, 0, 5]), torch.tensor([10.0, 20, 30, 40])
    y = functional.phm_linear(x, A, F, bias, residual=residual, alpha=torch.tensor(2.0), activation="relu")
    # H x = (-2, -3, 32, 43).
    assert y.tolist() == [10.0, 20.0, 94.0, 136.0]


def test_quaternion_product():
    """Hamilton's product (1 + 2i + 3j + 4k)(5 + 6i + 7j + 8k) = -60 + 12i + 30j + 24k."""
    A = torch.tensor(
        [
            [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
            [[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]],
            [[0.0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]],
            [[0.0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
        ]
    )
    F = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    y = functional.phm_linear(torch.tensor([5.0, 6.0, 7.0, 8.0]), A, F)
    assert y.tolist() == [-60.0, 12.0, 30.0, 24.0]


def test_gradients_by_hand():
    """y = 3 (a f x + b), one feature: every derivative written out at a=2, f=5, x=7, b=11, dy=1."""
    shapes = ((1,), (1, 1, 1), (1, 1, 1), (1,), ())
    args = [torch.full(s, v, requires_grad=True) for s, v in zip(shapes, (7.0, 2.0, 5.0, 11.0, 3.0), strict=True)]
    x, A, F, bias, alpha = args
    y = functional.phm_linear(x, A, F, bias, alpha=alpha)
    grads = torch.autograd.grad(y, args)
    assert y.item() == 243.0
    assert [g.item() for g in grads] == [30.0, 105.0, 42.0, 3.0, 81.0]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", (Plan.STREAM, Plan.MIX, Plan.PANEL), ids=lambda plan: plan.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("problem", LINEAR_PROBLEMS, ids=str)
class TestPlans:
    """Every plan serves every shape, also where the cost model would not choose it."""

    @staticmethod
    def _run(tensors, plan, activation="none"):
        args = (tensors.get(name) for name in ("x", "A", "F", "bias", "residual", "alpha"))
        return {"output": cpu.phm_linear(*args, activation, plan)}

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_integer_values_are_exact(self, problem, dtype, plan, activation):
        for omit in ((), ("bias", "residual", "alpha")):
            tensors = draw(problem, ternary, dtype, alpha=2.0, omit=omit)
            expected = CASE.dense(**double(tensors), activation=activation)
            assert_exact(self._run(tensors, plan, activation), {"output": expected}, dtype)

    def test_layouts_between_nan(self, problem, dtype, plan):
        for layout in LAYOUTS.values():
            tensors = {name: layout(t) for name, t in draw(problem, ternary, dtype).items()}
            assert_exact(self._run(tensors, plan), {"output": CASE.dense(**double(tensors))}, dtype)

    def test_values(self, problem, dtype, plan):
        tensors = draw(problem, normal, dtype)
        expected, magnitude = CASE.dense(**double(tensors)), CASE.dense(**absolute(tensors))
        assert_close(self._run(tensors, plan)["output"], expected, magnitude, CASE.terms(tensors))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", (Plan.STREAM, Plan.MIX, Plan.PANEL), ids=lambda plan: plan.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("problem", LINEAR_PROBLEMS, ids=str)
class TestWeightGradPlans:
    """The same for the weight gradients."""

    @staticmethod
    def _run(tensors, grad, plan):
        dA, dF = cpu.phm_linear_weight_grad(grad, tensors["x"], tensors["A"], tensors["F"], plan)
        return {"A": dA, "F": dF}

    @staticmethod
    def _dense(tensors, grad):
        gradients = evaluate(CASE.dense, tensors, {}, ("A", "F"), grad)
        return {name: gradients[name] for name in ("A", "F")}

    @staticmethod
    def _draw(problem, values, dtype):
        tensors = draw(problem, values, dtype, omit=("bias", "residual", "alpha"))
        return tensors, values(problem.shapes["residual"], 99).to(dtype)

    def test_layouts_between_nan(self, problem, dtype, plan):
        for layout in LAYOUTS.values():
            tensors, grad = self._draw(problem, ternary, dtype)
            tensors, grad = {name: layout(t) for name, t in tensors.items()}, layout(grad)
            expected = self._dense(double(tensors), grad.double())
            assert_exact(self._run(tensors, grad, plan), expected, dtype)

    def test_values(self, problem, dtype, plan):
        tensors, grad = self._draw(problem, normal, dtype)
        expected = self._dense(double(tensors), grad.double())
        magnitude = self._dense(absolute(tensors), grad.double().abs())
        products = CASE.terms(tensors) * grad.numel()
        for name, value in self._run(tensors, grad, plan).items():
            assert_close(value, expected[name], magnitude[name], max(1.0, products / value.numel()), name)


@pytest.mark.parametrize("samples", (1, 2, 5))
def test_gradient_of_a_by_mixing_adds_up_some_samples_at_a_time(samples, monkeypatch):
    n, P, Q = 2, 3, 4
    products, x = ternary((5, P * n, 7), 0).float(), ternary((5, Q, 7), 1).float()
    monkeypatch.setattr(plans, "NEAR_BYTES", samples * P * n * Q * 4)
    dA = cpu.algebra_grad(products, x, n)
    assert torch.equal(dA, torch.einsum("bkis,bls->ikl", products.view(5, P, n, 7), x))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"A": torch.zeros(2, 2, 2, dtype=torch.float64)}, "share one dtype"),
        ({"F": torch.zeros(3, 3, 4)}, "not empty"),
        ({"x": torch.zeros(5, 7)}, "last dimension"),
        ({"bias": torch.zeros(5)}, "another dtype or size"),
        ({"bias": torch.zeros(2, 6)}, "another dtype or size"),
        ({"residual": torch.zeros(5, 5)}, "another dtype or size"),
        ({"residual": torch.zeros(6, 5)}, "last dimension"),
        ({"alpha": torch.zeros(2)}, "another dtype or size"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_direct_calls_of_the_operator_stay_in_bounds(library, change, message):
    """The public function names the argument; the kernel itself must not read what is not there."""
    tensors = {"x": torch.zeros(5, 8), "A": torch.zeros(2, 2, 2), "F": torch.zeros(2, 3, 4)}
    tensors |= {"bias": torch.zeros(6), "residual": torch.zeros(5, 6), "alpha": torch.zeros(1), **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.phydi.phm_linear(**tensors, activation="none")
