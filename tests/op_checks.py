"""The checks that every operator passes. A test module inherits OpChecks once per operator, with its OpCase."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_close, assert_exact, dtype_id, evaluate, normal, ternary
from hypothesis import given
from op_cases import OpCase, Problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from phydi_kernels.kernels import cpu

ACTIVATIONS = ("none", "relu")


def draw(problem: Problem, values=normal, dtype=torch.float64, device="cpu", omit=(), **given) -> dict[str, Tensor]:
    """Tensor arguments from ``values``; ``given`` ones are filled with a number instead."""
    tensors = {}
    for seed, (name, shape) in enumerate(problem.shapes.items()):
        if name not in omit:
            value = torch.full(shape, given[name], dtype=torch.float64) if name in given else values(shape, seed)
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

    def _check_exact(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], layout=None) -> None:
        grad = self._grad_output(tensors, options)
        if layout is not None:
            tensors = {name: layout(t) for name, t in tensors.items()}
            grad = layout(grad)
        actual = evaluate(self.case.op, tensors, options, self.case.differentiable, grad)
        assert_exact(actual, self._dense(tensors, options, grad), grad.dtype)

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

    def _check_close(self, actual, tensors: Mapping[str, Tensor], options: Mapping[str, Any], grad: Tensor) -> None:
        expected = self._dense(tensors, options, grad)
        magnitude = self._dense(absolute(tensors), options, grad.abs())
        products = self.case.terms(tensors) * expected["output"].numel()
        for name, value in actual.items():
            assert value.dtype is grad.dtype
            assert_close(value, expected[name], magnitude[name], max(1.0, products / max(1, value.numel())), name)

    def _away_from_kink(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """False where rounding may move the argument of relu across 0: either one-sided derivative is right there."""
        inner = {name: t for name, t in tensors.items() if name not in ("residual", "alpha")}
        h = self.case.dense(**double(inner), **options).abs()
        size = self.case.dense(**absolute(inner), **options)
        dtype = tensors["x"].dtype
        return (h > 4 * torch.finfo(dtype).eps * size).to(tensors["x"].device)

    @pytest.mark.parametrize("omitted", range(4))
    def test_optional_arguments(self, omitted, activation, device):
        for omit in itertools.combinations(self.case.optional, omitted):
            tensors = draw(self.case.small, ternary, torch.float32, device, omit=omit)
            self._check_exact(tensors, {**self.case.small.options, "activation": activation})

    def test_alpha_zero_returns_residual(self, activation, device):
        tensors = draw(self.case.small, normal, torch.float32, device, alpha=0.0)
        y = self.case.op(**tensors, **self.case.small.options, activation=activation)
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
    def test_numerical_derivatives(self, alpha, activation, device):
        problem = self.case.small
        tensors = draw(problem, normal, torch.float64, device, alpha=alpha)
        names = list(tensors)

        def op(*args: Tensor) -> Tensor:
            return self.case.op(**dict(zip(names, args, strict=True)), **problem.options, activation=activation)

        args = [t.requires_grad_(name in self.case.differentiable) for name, t in tensors.items()]
        assert torch.autograd.gradcheck(op, args, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(op, args)

    def test_opcheck(self, activation, device):
        """Schema, fake, autograd registration and AOT dispatch of each operator a call and its derivatives reach."""
        problem = self.case.small
        tensors = draw(problem, normal, torch.float64, device)
        leaves = {name: t.requires_grad_(name in self.case.differentiable) for name, t in tensors.items()}
        wanted = [leaves[name] for name in self.case.differentiable]
        with Recorder() as recorder:
            y = self.case.op(**leaves, **problem.options, activation=activation)
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

    def _compiled(self, backend: Any, dynamic: bool | None, activation: str, device) -> None:
        problem = self.case.small
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

    def test_compile(self, activation, device):
        self._compiled("aot_eager", False, activation, device)

    def test_compile_dynamic_shapes(self, device):
        self._compiled("aot_eager", True, "relu", device)

    def test_export_with_dynamic_batch(self, device):
        case, problem = self.case, self.case.small

        class Layer(torch.nn.Module):
            def forward(self, tensors: dict[str, Tensor]) -> Tensor:
                return case.op(**tensors, **problem.options, activation="relu")

        tensors = draw(problem, ternary, torch.float32, device)
        batch = torch.export.Dim("batch")
        dynamic = {name: {0: batch} if name in case.batched else None for name in tensors}
        exported = torch.export.export(Layer(), (self._with_batch(tensors, 4),), dynamic_shapes=(dynamic,))
        for size in (2, 7):
            sized = self._with_batch(tensors, size)
            assert torch.equal(exported.module()(sized), Layer()(sized))

    @pytest.mark.parametrize("in_dim", (0, 1))
    def test_vmap(self, mapped, in_dim, activation, device):
        """Outputs, and gradients of each sample, equal a loop over the samples."""
        problem = self.case.small
        options = {**problem.options, "activation": activation}
        samples = [draw(problem, lambda s, i, b=b: ternary(s, 20 * b + i), torch.float32, device) for b in range(3)]
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
        for name in self.case.differentiable:
            assert torch.equal(grads[name], torch.stack([g[name] for g in looped])), name

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
