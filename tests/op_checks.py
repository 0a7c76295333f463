"""The checks that every operator passes. A test module inherits OpChecks once per operator, with its OpCase."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    ROUNDING,
    assert_close,
    assert_exact,
    dtype_id,
    evaluate,
    even,
    normal,
    ternary,
    unit_error,
)
from hypothesis import given
from op_cases import OpCase, Problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from phydi_kernels import algebra, plans
from phydi_kernels.kernels import cpu

ACTIVATIONS = ("none", "relu")


def draw(problem: Problem, values=normal, dtype=torch.float64, device="cpu", omit=(), **given) -> dict[str, Tensor]:
    """Tensor arguments from ``values``; ``given`` ones are filled with a number instead.

    In place of normal numbers U, V and W have even ones: where a few of the R terms outweigh the others, the rounding
    error is not the random walk of all of them that assert_close takes it for.
    """
    tensors = {}
    for seed, (name, shape) in enumerate(problem.shapes.items()):
        if name not in omit:
            of_name = even if values is normal and name in ("U", "V", "W") else values
            value = torch.full(shape, given[name], dtype=torch.float64) if name in given else of_name(shape, seed)
            tensors[name] = value.to(device=device, dtype=dtype)
    return tensors


def double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous float64 copies on the CPU, for the reference."""
    return {
        name: t.to("cpu", torch.float64).clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }


def absolute(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.abs() for name, t in double(tensors).items()}


def strides(t: Tensor) -> list[int]:
    """Those that reach memory: none of an empty tensor, none of dimensions of size 1."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1 and t.numel()]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every phydi operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "phydi":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class OpChecks:
    case: OpCase

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "problem" in metafunc.fixturenames:
            metafunc.parametrize("problem", self.case.problems, ids=str)
        if "small" in metafunc.fixturenames:
            metafunc.parametrize("small", self.case.small, ids=str)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES, ids=dtype_id)
        if "activation" in metafunc.fixturenames:
            metafunc.parametrize("activation", ACTIVATIONS)
        if "layout" in metafunc.fixturenames:
            layouts = {**LAYOUTS, **self.case.layouts}
            metafunc.parametrize("layout", layouts.values(), ids=layouts.keys())
        if "mapped" in metafunc.fixturenames:
            metafunc.parametrize("mapped", self.case.mapped, ids="+".join)

    def _grad_output(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], values=ternary) -> Tensor:
        shape = self.case.dense(**double(tensors), **options).shape
        first = next(iter(tensors.values()))
        return values(shape, 99).to(first)

    def _dense(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], grad: Tensor) -> dict[str, Tensor]:
        return evaluate(self.case.dense, double(tensors), options, self.case.differentiable, grad.cpu().double())

    def _check_exact(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], layout=None, only=None) -> None:
        grad = self._grad_output(tensors, options)
        if layout is not None:
            tensors = {name: layout(t) for name, t in tensors.items()}
            grad = layout(grad)
        wanted = self.case.differentiable if only is None else only
        actual = evaluate(self.case.op, tensors, options, wanted, grad)
        expected = self._dense(tensors, options, grad)
        exact = {"output", *wanted}
        if self._sums_rounded_parts(tensors, options, expected):
            exact.discard("alpha")
        assert_exact(*({name: t for name, t in r.items() if name in exact} for r in (actual, expected)), grad.dtype)

    def _sums_rounded_parts(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], expected) -> bool:
        """Whether the gradient of alpha need not be exact.

        It is the sum of another argument's gradient times that argument, or of the activated product times the
        gradient of the output, and those are of the call's dtype: integers above 2/eps may be rounded.
        """
        inner = {name: t for name, t in double(tensors).items() if name not in ("residual", "alpha")}
        parts = [expected[name] for name in inner if name != "x"] + [self.case.dense(**inner, **options)]
        return any(part.abs().gt(2 / torch.finfo(tensors["x"].dtype).eps).any() for part in parts)

    def test_integer_values_are_exact(self, problem, dtype, activation, device):
        tensors = draw(problem, ternary, dtype, device, alpha=2.0)
        self._check_exact(tensors, {**problem.options, "activation": activation})

    def test_values_and_gradients(self, problem, dtype, activation, device):
        tensors = draw(problem, normal, dtype, device)
        options = {**problem.options, "activation": activation}
        grad = self._grad_output(tensors, options, normal)
        if activation == "relu":
            grad = grad * self._away_from_kink(tensors, problem.options)
        actual = evaluate(self.case.op, tensors, options, self.case.differentiable, grad)
        self._check_close(actual, tensors, options, grad)

    @pytest.mark.parametrize("only", (True, False), ids=("alone", "left_out"))
    def test_gradient_of_the_input(self, problem, dtype, only, activation, device):
        """What frozen weights ask for, and a first layer, is less than all gradients and another operator."""
        wanted = [name for name in self.case.differentiable if (name == "x") is only]
        tensors = draw(problem, ternary, dtype, device, alpha=2.0)
        self._check_exact(tensors, {**problem.options, "activation": activation}, only=wanted)

    def _check_close(self, actual, tensors: Mapping[str, Tensor], options: Mapping[str, Any], grad: Tensor) -> None:
        self._check_each_close([actual], tensors, options, grad)

    def _check_each_close(self, runs, tensors: Mapping[str, Tensor], options: Mapping[str, Any], grad: Tensor) -> None:
        expected = self._dense(tensors, options, grad)
        magnitude = self._dense(absolute(tensors), options, grad.abs())
        # How many products each entry sums: the taps of a convolution miss some.
        terms = self._dense({name: torch.ones_like(t) for name, t in tensors.items()}, options, grad.ne(0))
        for name, value in itertools.chain.from_iterable(run.items() for run in runs):
            assert value.dtype is grad.dtype
            assert_close(value, expected[name], magnitude[name], terms[name].clamp(min=1), name)

    def _away_from_kink(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """False where rounding may move the argument of relu across 0: either one-sided derivative is right there."""
        inner = {name: t for name, t in tensors.items() if name not in ("residual", "alpha")}
        h = self.case.dense(**double(inner), **options).abs()
        terms = self.case.dense(**{name: torch.ones_like(t) for name, t in double(inner).items()}, **options)
        size = self.case.dense(**absolute(inner), **options) / terms.sqrt()
        return (h > ROUNDING * unit_error(tensors["x"].dtype, terms) * size).to(tensors["x"].device)

    @pytest.mark.parametrize("omitted", range(4))
    def test_optional_arguments(self, small, omitted, activation, device):
        for omit in itertools.combinations(self.case.optional, omitted):
            tensors = draw(small, ternary, torch.float32, device, omit=omit)
            self._check_exact(tensors, {**small.options, "activation": activation})

    def test_alpha_zero_returns_residual(self, small, activation, device):
        tensors = draw(small, normal, torch.float32, device, alpha=0.0)
        y = self.case.op(**tensors, **small.options, activation=activation)
        assert torch.equal(y, tensors["residual"])

    def test_layouts_between_nan(self, problem, layout, device):
        self._check_exact(draw(problem, ternary, torch.float32, device), problem.options, layout)

    def test_layouts_of_every_dtype(self, layout, dtype, device):
        for problem in self.case.problems[-2:]:
            self._check_exact(draw(problem, ternary, dtype, device), problem.options, layout)

    def test_reused_scratch_memory_is_not_read(self, problem, device):
        """Scratch that an earlier call filled with NaN must be written before it is read."""
        tensors = draw(problem, ternary, torch.float32, device)
        grad = self._grad_output(tensors, problem.options)
        poison = {name: torch.full_like(t, torch.nan) for name, t in tensors.items()}
        evaluate(self.case.op, poison, problem.options, self.case.differentiable, torch.full_like(grad, torch.nan))
        self._check_exact(tensors, problem.options)

    def test_inputs_are_not_written(self, problem, activation, device):
        tensors = draw(problem, normal, torch.float32, device)
        options = {**problem.options, "activation": activation}
        tensors["grad"] = self._grad_output(tensors, options, normal)
        before = {name: t.clone() for name, t in tensors.items()}
        inputs = {name: t for name, t in tensors.items() if name != "grad"}
        evaluate(self.case.op, inputs, options, self.case.differentiable, tensors["grad"])
        for name, t in tensors.items():
            assert torch.equal(t, before[name]), f"{name} was changed"

    @pytest.mark.parametrize("compiled", (True, False), ids=("kernels", "reference"))
    def test_result_may_be_changed_in_place(self, problem, compiled, device, monkeypatch):
        """An in-place ReLU often follows a layer: the result must not count as a view of something else."""
        if not compiled:
            monkeypatch.setattr(cpu, "available", lambda: False)
        tensors = draw(problem, normal, torch.float32, device)
        grads = []
        for relu in (torch.relu, torch.relu_):
            inputs = {name: t.clone().requires_grad_(name in self.case.differentiable) for name, t in tensors.items()}
            y = relu(self.case.op(**inputs, **problem.options))
            grads.append(torch.autograd.grad(y.sum(), list(inputs.values()), allow_unused=True))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_reruns_are_bitwise_equal(self, problem, device):
        tensors = draw(problem, normal, torch.float32, device)
        grad = self._grad_output(tensors, problem.options, normal)
        runs = [evaluate(self.case.op, tensors, problem.options, self.case.differentiable, grad) for _ in range(3)]
        for run in runs[1:]:
            for name, value in run.items():
                assert torch.equal(value, runs[0][name]), f"{name} differs between runs"

    def _with_one_and_two_threads(self, tensors, options, grad, threads) -> list[dict[str, Tensor]]:
        runs = []
        for count in (1, 2):
            threads(count)
            runs.append(evaluate(self.case.op, tensors, options, self.case.differentiable, grad))
        return runs

    def test_two_threads(self, problem, threads):
        tensors = draw(problem, normal, torch.float32)
        grad = self._grad_output(tensors, problem.options, normal)
        _, two = self._with_one_and_two_threads(tensors, problem.options, grad, threads)
        self._check_close(two, tensors, problem.options, grad)

    def test_any_shape(self, device):
        @given(self.case.any_problem)
        def check(problem: Problem) -> None:
            self._check_exact(draw(problem, ternary, torch.float32, device), problem.options)

        check()

    @pytest.mark.parametrize("alpha", (0.0, 0.7))
    @pytest.mark.parametrize("frozen", (False, True), ids=("trained", "frozen"))
    def test_numerical_derivatives(self, small, alpha, frozen, activation, device):
        tensors = draw(small, normal, torch.float64, device, alpha=alpha)
        names = list(tensors)

        def op(*args: Tensor) -> Tensor:
            return self.case.op(**dict(zip(names, args, strict=True)), **small.options, activation=activation)

        wanted = ("x",) if frozen else self.case.differentiable
        args = [t.requires_grad_(name in wanted) for name, t in tensors.items()]
        assert torch.autograd.gradcheck(op, args, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(op, args)

    def test_opcheck(self, small, activation, device):
        """Schema, fake, autograd registration and AOT dispatch of each operator a call and its derivatives reach."""
        tensors = draw(small, normal, torch.float64, device)
        with Recorder() as recorder:
            for names in (self.case.differentiable, ("x",)):
                leaves = {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}
                wanted = [t for t in leaves.values() if t.requires_grad]
                y = self.case.op(**leaves, **small.options, activation=activation)
                grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
                torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
        samples = {}
        for op, args in recorder.calls:
            samples.setdefault((op, tuple(a is None for a in args)), args)
        assert {op._schema.name.removeprefix("phydi::") for op, _ in samples} == self.case.operators
        for (op, _), args in samples.items():
            torch.library.opcheck(op, [self._leaf(a) for a in args])

    @staticmethod
    def _leaf(value: Any) -> Any:
        return value.detach().clone().requires_grad_() if isinstance(value, Tensor) else value

    def _compiled(self, problem: Problem, backend: Any, dynamic: bool | None, activation: str, device) -> None:
        options = {**problem.options, "activation": activation}

        def around(**tensors: Tensor) -> Tensor:
            return self.case.op(**tensors, **options) * 2 + 1

        # Code objects are shared by all cases, and so is dynamo's limit of graphs for each.
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(around, fullgraph=True, backend=counter, dynamic=dynamic)
        for batch in (11, 13) if dynamic else (3,):
            tensors = self._with_batch(draw(problem, ternary, torch.float32, device), batch)
            grad = self._grad_output(tensors, options)
            actual = evaluate(compiled, tensors, {}, self.case.differentiable, grad)
            expected = evaluate(around, tensors, {}, self.case.differentiable, grad)
            for name, value in actual.items():
                assert torch.equal(value, expected[name]), f"{name} of the compiled function differs"
        assert counter.frame_count == 1, "recompiled for another batch size"

    def _with_batch(self, tensors: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        return {
            name: torch.cat([t] * batch)[:batch].clone() if name in self.case.batched else t
            for name, t in tensors.items()
        }

    def test_compile(self, small, activation, device):
        self._compiled(small, "aot_eager", False, activation, device)

    def test_compile_dynamic_shapes(self, small, device):
        self._compiled(small, "aot_eager", True, "relu", device)

    def test_export_with_dynamic_batch(self, small, device):
        case = self.case

        class Layer(torch.nn.Module):
            def forward(self, tensors: dict[str, Tensor]) -> Tensor:
                return case.op(**tensors, **small.options, activation="relu")

        tensors = draw(small, ternary, torch.float32, device)
        batch = torch.export.Dim("batch")
        dynamic = {name: {0: batch} if name in case.batched else None for name in tensors}
        exported = torch.export.export(Layer(), (self._with_batch(tensors, 4),), dynamic_shapes=(dynamic,))
        for size in (2, 7):
            sized = self._with_batch(tensors, size)
            assert torch.equal(exported.module()(sized), Layer()(sized))

    def test_trace_records_the_operator(self, small, device):
        """Also without gradients, where an eager call goes past the dispatcher with a plan for its own batch."""
        tensors = draw(small, ternary, torch.float32, device)

        def op(*values: Tensor) -> Tensor:
            return self.case.op(**dict(zip(tensors, values, strict=True)), **small.options)

        with torch.no_grad():
            traced = torch.jit.trace(op, tuple(tensors.values()), check_trace=False)
            assert torch.equal(traced(*tensors.values()), op(*tensors.values()))
        kinds = {node.kind() for node in traced.graph.nodes()}
        assert {kind for kind in kinds if kind.startswith("phydi")} == {f"phydi::{min(self.case.operators, key=len)}"}

    def test_small_alpha_keeps_gradients_in_range(self, small, device):
        """Those of the algebra and the bias are multiplied by alpha before 16 bits have to hold them."""
        tensors = draw(small, ternary, torch.float16, device, x=1.0, alpha=2.0**-10)
        grad = torch.full_like(self._grad_output(tensors, small.options), 2.0**15)
        actual = evaluate(self.case.op, tensors, small.options, self.case.differentiable, grad)
        expected = self._dense(tensors, small.options, grad)
        assert expected["bias"].abs().max() * 2**10 > torch.finfo(torch.float16).max
        del actual["alpha"], expected["alpha"]  # beyond its range
        assert_exact(actual, expected, torch.float16)

    def test_vmap_of_no_samples(self, small, mapped, device):
        """Results have the shapes of a call's."""
        tensors = draw(small, ternary, torch.float32, device)
        dims = {name: 0 if name in mapped else None for name in tensors}
        batch = {name: t if dims[name] is None else t.new_empty((0, *t.shape)) for name, t in tensors.items()}

        def op(tensors: dict[str, Tensor]) -> Tensor:
            return self.case.op(**tensors, **small.options)

        y = op(tensors)
        assert torch.func.vmap(op, in_dims=(dims,))(batch).shape == (0, *y.shape)
        if "alpha" in mapped and tensors["alpha"].numel() == 1:
            return  # torch's own product of a tensor and no numbers fails
        grads = torch.func.vmap(torch.func.grad(lambda t: op(t).sum()), in_dims=(dims,))(batch)
        assert {name: g.shape for name, g in grads.items()} == {name: (0, *t.shape) for name, t in tensors.items()}

    @pytest.mark.parametrize("in_dim", (0, 1))
    def test_vmap(self, small, mapped, in_dim, activation, device):
        """Outputs, and gradients of each sample, equal a loop over the samples."""
        options = {**small.options, "activation": activation}
        samples = [draw(small, lambda s, i, b=b: ternary(s, 20 * b + i), torch.float32, device) for b in range(3)]
        shared = samples[0]
        rows = [{name: (s if name in mapped else shared)[name] for name in shared} for s in samples]
        dims = {name: min(in_dim, t.dim()) if name in mapped else None for name, t in shared.items()}
        batch = {n: t if dims[n] is None else torch.stack([r[n] for r in rows], dims[n]) for n, t in shared.items()}

        def op(tensors: dict[str, Tensor]) -> Tensor:
            return self.case.op(**tensors, **options)

        def loss(tensors: dict[str, Tensor]) -> Tensor:
            return op(tensors).square().sum()

        outputs = torch.func.vmap(op, in_dims=(dims,))(batch)
        assert torch.equal(outputs, torch.stack([op(r) for r in rows]))
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(dims,))(batch)
        looped = [torch.func.grad(loss)(r) for r in rows]
        for name in grads:
            assert torch.equal(grads[name], torch.stack([g[name] for g in looped])), name

    def test_nested_gradients(self, small, activation, device):
        """torch.func's gradient of a gradient is autograd's."""
        tensors = draw(small, ternary, torch.float64, device)
        fixed = {name: t for name, t in tensors.items() if name not in self.case.differentiable}
        varied = {name: t for name, t in tensors.items() if name in self.case.differentiable}

        def loss(varied: dict[str, Tensor]) -> Tensor:
            return self.case.op(**fixed, **varied, **small.options, activation=activation).pow(3).sum()

        def slope(varied: dict[str, Tensor]) -> Tensor:
            return torch.stack([g.square().sum() for g in torch.func.grad(loss)(varied).values()]).sum()

        leaves = {name: t.requires_grad_() for name, t in varied.items()}
        first = torch.autograd.grad(loss(leaves), tuple(leaves.values()), create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), tuple(leaves.values()))
        nested = torch.func.grad(slope)({name: t.detach() for name, t in varied.items()})
        for name, expected in zip(leaves, second, strict=True):
            assert torch.equal(nested[name], expected), name
        assert all(any(t.any() for t in of) for of in (first, second))

    def _abstract(self, tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        leaves = {name: t.detach().requires_grad_(name in self.case.differentiable) for name, t in tensors.items()}
        y = self.case.op(**leaves, **options)
        yield "output", y
        wanted = [name for name in leaves if name in self.case.differentiable]
        grads = torch.autograd.grad(y, [leaves[name] for name in wanted], torch.ones_like(y))
        yield from zip(wanted, grads, strict=True)

    def _check_abstract(self, problem: Problem, activation: str, device) -> None:
        options = {**problem.options, "activation": activation}
        for layout in (*LAYOUTS.values(), *self.case.layouts.values()):
            tensors = {name: layout(t) for name, t in draw(problem, ternary, torch.float16, device).items()}
            real = dict(self._abstract(tensors, options))
            meta = dict(self._abstract({name: t.to("meta") for name, t in tensors.items()}, options))
            with FakeTensorMode() as mode:
                fake = dict(self._abstract({name: mode.from_tensor(t) for name, t in tensors.items()}, options))
            for name, value in real.items():
                assert meta[name].is_meta
                assert fake[name].device == value.device
                assert strides(fake[name]) == strides(value), name
                for other in (meta[name], fake[name]):
                    assert (other.shape, other.dtype) == (value.shape, value.dtype), name

    def test_meta_and_fake_tensors(self, problem, activation, device):
        """The same shapes, strides and dtypes as real tensors give, without data."""
        self._check_abstract(problem, activation, device)

    def test_without_compiled_kernels(self, problem, activation, device, monkeypatch):
        """The reference, which serves devices and machines without kernels, keeps the same promises."""
        monkeypatch.setattr(cpu, "available", lambda: False)
        self._check_abstract(problem, activation, device)
        for layout in (*LAYOUTS.values(), *self.case.layouts.values()):
            tensors = draw(problem, ternary, torch.float32, device)
            self._check_exact(tensors, {**problem.options, "activation": activation}, layout)


ALGEBRA = ("U", "V", "W")


def _quaternion_like() -> Tensor:
    """Hamilton's product after some training: every entry has moved, none far."""
    return algebra.quaternions().double() + 0.1 * normal((4, 4, 4), 5)


# Structure tensors whose decompositions stand for those of layers: drawn, rectangular, trained away from a table, wide.
STRUCTURES: Mapping[str, Callable[[], Tensor]] = {
    "one_term": lambda: normal((1, 1, 1), 0),
    "2x2x2": lambda: normal((2, 2, 2), 1),
    "3x2x4": lambda: normal((3, 2, 4), 2),
    "3x3x3": lambda: normal((3, 3, 3), 3),
    "4x4x4": lambda: normal((4, 4, 4), 4),
    "quaternions": lambda: algebra.quaternions().double(),
    "trained_quaternions": _quaternion_like,
    "6x6x6": lambda: normal((6, 6, 6), 6),
}


@functools.cache
def decomposed(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A structure tensor and its U, V, W."""
    A = STRUCTURES[name]()
    found = algebra.decompose(A)
    return A, {"U": found.U, "V": found.V, "W": found.W}


def force_plan(monkeypatch: pytest.MonkeyPatch, plan: plans.Plan) -> None:
    """One plan for every factored call, also where the cost model would choose another."""
    for name in dir(plans):
        if "_factored" in name and callable(getattr(plans, name)):
            # The gradients of weights know no mix.
            chosen = plans.Plan.PANEL if plan is plans.Plan.MIX and name == "phm_linear_factored_grad" else plan
            monkeypatch.setattr(plans, name, lambda *sizes, chosen=chosen, **options: chosen)


class FactoredChecks(OpChecks):
    """Also what only an algebra of U, V and W promises. The other plans are those of the operator with A."""

    dense_case: OpCase  # of the operator with A

    @pytest.fixture(autouse=True)
    def rank_plan(self, monkeypatch):
        force_plan(monkeypatch, plans.Plan.RANK)

    @pytest.mark.parametrize("plan", (plans.Plan.RANK, plans.Plan.PANEL), ids=lambda plan: plan.name)
    def test_opcheck(self, small, activation, plan, device, monkeypatch):
        force_plan(monkeypatch, plan)
        super().test_opcheck(small, activation, device)

    def decomposable(self, n: int, P: int, Q: int) -> Problem:
        """The dense operator's shapes for an algebra (n, P, Q) that has been decomposed."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "half" in metafunc.fixturenames:
            metafunc.parametrize("half", (torch.bfloat16, torch.float16), ids=dtype_id)

    @staticmethod
    def _with_wide_algebra(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """U, V and W in float32, with digits that 16 bits do not hold."""
        return {name: t.float() * (1 + 2**-9) if name in ALGEBRA else t for name, t in tensors.items()}

    def test_gradients_of_a_float32_algebra_are_not_rounded(self, problem, half, activation, device):
        """Integers above 2/eps of the 16-bit type show it: those of U, V and W are exact in float32."""
        tensors = draw(problem, ternary, half, device, alpha=2.0)
        tensors |= {name: t.float() for name, t in tensors.items() if name in ALGEBRA}
        options = {**problem.options, "activation": activation}
        grad = self._grad_output(tensors, options)
        actual = evaluate(self.case.op, tensors, options, self.case.differentiable, grad)
        expected = self._dense(tensors, options, grad)
        if self._sums_rounded_parts(tensors, options, expected):
            del actual["alpha"], expected["alpha"]
        for dtype, names in ((torch.float32, ALGEBRA), (half, set(actual) - set(ALGEBRA))):
            parts = ({name: t for name, t in result.items() if name in names} for result in (actual, expected))
            assert_exact(*parts, dtype)

    def test_values_of_a_float32_algebra(self, problem, half, device):
        """Close to the result with U, V and W as they are."""
        tensors = self._with_wide_algebra(draw(problem, normal, half, device))
        grad = self._grad_output(tensors, problem.options, normal)
        actual = evaluate(self.case.op, tensors, problem.options, self.case.differentiable, grad)
        assert all(t.dtype is (torch.float32 if name in ALGEBRA else half) for name, t in actual.items())
        self._check_close({name: t.to(half) for name, t in actual.items()}, tensors, problem.options, grad)

    def test_second_derivatives_of_a_float32_algebra(self, small, half, activation, device):
        """Each has the dtype of its argument, and is exact."""
        tensors = draw(small, ternary, half, device, alpha=2.0)
        tensors |= {name: t.float() for name, t in tensors.items() if name in ALGEBRA}
        options = {**small.options, "activation": activation}

        def second(op: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            leaves = {name: t.detach().requires_grad_(name in self.case.differentiable) for name, t in tensors.items()}
            y = op(**leaves, **options)
            grad = ternary(y.shape, 99).to(y).requires_grad_()
            grads = torch.autograd.grad(y, list(leaves.values()), grad, create_graph=True)
            total = sum((g * ternary(g.shape, 100 + i).to(g)).sum() for i, g in enumerate(grads))
            wanted = {**leaves, "grad": grad}
            found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
            return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}

        actual, expected = second(self.case.op, tensors), second(self.case.dense, double(tensors))
        for dtype, names in ((torch.float32, ALGEBRA), (half, set(actual) - set(ALGEBRA))):
            parts = ({name: t for name, t in result.items() if name in names} for result in (actual, expected))
            assert_exact(*parts, dtype)

    @pytest.mark.parametrize("structure", STRUCTURES)
    @pytest.mark.parametrize("wide", (torch.float64, torch.float32), ids=dtype_id)
    @pytest.mark.parametrize("combined", (False, True), ids=("U", "without_U"))
    def test_decomposed_algebra_equals_the_dense_operator(self, structure, wide, combined, device):
        """By the norm of output and gradients: to 1e-12 in float64, to 10 eps sqrt(K) in float32, K terms in a sum."""
        A, found = decomposed(structure)
        problem = self.decomposable(*A.shape)
        shared = draw(problem, normal, torch.float64, device, omit=("A", "alpha"))
        grad = normal(problem.shapes["residual"], 99).to(device)
        wanted = ("x", "bias", "residual") if combined else ("x", "F", "bias", "residual")
        expected = evaluate(self.dense_case.dense, {**shared, "A": A.to(device)}, problem.options, wanted, grad)
        factors = {name: t.to(device) for name, t in found.items()}
        if combined:
            factors["F"] = torch.einsum("ri,i...->r...", factors.pop("U"), shared["F"])
        tensors = {name: t.to(wide) for name, t in {**shared, **factors}.items()}
        actual = evaluate(self.case.op, tensors, problem.options, wanted, grad.to(wide))
        for name, value in actual.items():
            products = self.dense_case.terms(shared | {"A": A}) * grad.numel()
            K = max(1.0, products / value.numel())
            allowed = 1e-12 if wide is torch.float64 else 10 * torch.finfo(wide).eps * math.sqrt(K)
            error = float((value.double() - expected[name]).norm() / expected[name].norm())
            assert error <= allowed, f"{name}: {error:.1e}, allowed {allowed:.1e}"
