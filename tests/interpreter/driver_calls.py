"""Calls of the GPU drivers with what they should give, and the memory that their kernels may touch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_exact, normal, ternary
from op_cases import Problem
from op_checks import absolute, double, draw
from torch import Tensor
from triton.runtime import interpreter

from phydi_kernels import plans_cuda, reference
from phydi_kernels.kernels.gpu import phc_conv, phc_conv_factored, phm_linear, phm_linear_factored
from phydi_kernels.ops.phc_conv import reversed_kernel
from phydi_kernels.plans_cuda import CudaPlan

_DRIVERS = {
    name: getattr(module, name)
    for module, names in (
        (phm_linear, ("phm_linear", "phm_linear_weight_grad")),
        (phm_linear_factored, ("phm_linear_factored", "phm_linear_factored_grad")),
        (phc_conv, ("phc_conv", "phc_conv_input_grad", "phc_conv_weight_grad")),
        (phc_conv_factored, ("phc_conv_factored", "phc_conv_factored_input_grad", "phc_conv_factored_grad")),
    )
    for name in names
}


@dataclass(frozen=True)
class Call:
    """One call of a driver, and of the reference of that name.

    Attributes:
        plans: those the driver takes; None alone where it has no choice.
        like: the arguments of which the results have the type.
    """

    name: str
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]
    plans: tuple[CudaPlan | None, ...] = (None,)
    like: tuple[str, ...] = ("F",)

    def run(self, plan: CudaPlan | None) -> dict[str, Tensor]:
        chosen = {} if plan is None else {"plan": plan}
        return self._named(_DRIVERS[self.name](**self.tensors, **self.options, **chosen))

    def expected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._named(getattr(reference, self.name)(**tensors, **self.options))

    def _named(self, results: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(self.like, results if isinstance(results, tuple) else (results,), strict=True))

    def check_exact(self) -> None:
        expected = self.expected(double(self.tensors))
        for plan in self.plans:
            for name, value in self.run(plan).items():
                title = f"{self.name} {plan}, like {name}"
                assert_exact({title: value}, {title: expected[name]}, self.tensors[name].dtype)

    def check_close(self) -> None:
        expected, magnitude = self.expected(double(self.tensors)), self.expected(absolute(self.tensors))
        terms = self.expected({name: torch.ones_like(t) for name, t in double(self.tensors).items()})
        for plan in self.plans:
            for name, value in self.run(plan).items():
                # The interpreter truncates to bfloat16: twice the error of rounding.
                size = magnitude[name] * (2 if value.dtype is torch.bfloat16 else 1)
                assert_close(value, expected[name], size, terms[name].clamp(min=1), f"{self.name} {plan}, like {name}")


def _geometry(problem: Problem, dims: int) -> dict[str, list[int]]:
    def each(value: int | tuple[int, ...]) -> list[int]:
        return [value] * dims if isinstance(value, int) else list(value)

    default = {"stride": 1, "padding": 0, "dilation": 1}
    return {name: each(problem.options.get(name, value)) for name, value in default.items()}


def _plans(blocks: tuple[int, int, int], kernel: tuple[int, ...] | None, factored: bool) -> tuple[CudaPlan, ...]:
    """What plans_cuda may choose for A (n, P, Q); ``kernel``: None of a linear layer, () of no convolution."""
    n, P, Q = blocks
    streamed = (CudaPlan.STREAM,) if max(blocks) <= plans_cuda.MAX_STREAM else ()
    of_terms = (CudaPlan.EPILOGUE,) if P <= plans_cuda.MAX_RESULTS else ()
    if of_terms and Q <= plans_cuda.MAX_FUSED_INPUTS:
        of_terms += (CudaPlan.FUSED,)
    if kernel is None:
        dense = (*streamed, CudaPlan.BUILT)
        return (*dense, *of_terms, CudaPlan.PASSES) if factored else (*dense, CudaPlan.MIX)
    # No kernel is for three dimensions.
    implicit = len(kernel) in (1, 2)
    if factored:
        return (*(of_terms if implicit else ()), CudaPlan.PASSES)
    return (*(streamed if implicit else ()), CudaPlan.BUILT) if kernel else (CudaPlan.MIX,)


def calls(
    problem: Problem,
    values: Callable[..., Tensor] = ternary,
    dtype: torch.dtype = torch.float32,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    algebra: torch.dtype | None = None,
    omit: tuple[str, ...] = (),
    activation: str = "none",
) -> Iterator[Call]:
    """The operator's call and those of its gradients; A, or U, V and W, in the type ``algebra``."""
    one_alpha = {"alpha": 2.0} if values is ternary and problem.shapes["alpha"] in ((), (1,)) else {}
    tensors = draw(problem, values, dtype, omit=omit, **one_alpha)
    tensors["grad"] = values(problem.shapes["residual"], 99).to(dtype)
    tensors |= {name: t.to(algebra or dtype) for name, t in tensors.items() if name in ("A", "U", "V", "W")}
    tensors = {name: layout(t) for name, t in tensors.items()}
    F = tensors["F"]
    kernel = tuple(F.shape[3:])
    factored = "V" in tensors
    factors = [name for name in ("A", "U", "V", "W", "F") if name in tensors]
    blocks = tuple(tensors["A"].shape) if "A" in tensors else (len(F), tensors["V"].shape[1], tensors["W"].shape[1])
    name = ("phc_conv" if kernel else "phm_linear") + ("_factored" if factored else "")
    geometry = _geometry(problem, len(kernel)) if kernel else {}
    missing = dict.fromkeys(
        name for name in ("bias", "residual", "alpha", *(["U"] if factored else [])) if name not in tensors
    )

    def take(*names: str) -> dict[str, Tensor]:
        return {name: tensors[name] for name in names if name in tensors}

    forward = take("x", *factors, "bias", "residual", "alpha")
    plans = _plans(blocks, kernel or None, factored)
    yield Call(name, forward, {**missing, **geometry, "activation": activation}, plans)
    no_U = {"U": None} if factored and "U" not in tensors else {}
    if kernel:
        n, P, Q = blocks
        taken = _plans((n, Q, P), reversed_kernel(F, *geometry.values()), factored)
        options = {**no_U, **geometry, "input_size": list(tensors["x"].shape)}
        yield Call(f"{name}_input_grad", take("grad", *factors), options, taken)
    if not no_U:
        suffix, like = ("_grad", ("x", *factors)) if factored else ("_weight_grad", tuple(factors))
        of_weights = (None,) if kernel or factored else (CudaPlan.PASSES, CudaPlan.MIX)
        yield Call(f"{name}{suffix}", take("grad", "x", *factors), geometry, of_weights, like)


def check_exact(problem: Problem, **given: Any) -> None:
    for call in calls(problem, **given):
        call.check_exact()


def check_close(problem: Problem, dtype: torch.dtype) -> None:
    for call in calls(problem, normal, dtype):
        call.check_close()


def _addresses(*tensors: Tensor) -> np.ndarray:
    """Of all entries, in order."""
    parts = [np.empty(0, np.int64)]
    for t in tensors:
        offsets = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(t.shape, t.stride(), strict=True):
            offsets = offsets.unsqueeze(-1) + stride * torch.arange(size)
        parts.append((t.data_ptr() + t.element_size() * offsets).flatten().numpy())
    return np.unique(np.concatenate(parts))


def _checked(access: Callable[..., Any], mask: int, allowed: np.ndarray, what: str) -> Callable[..., Any]:
    """A load or a store of the interpreter, ``mask`` its argument of that name."""

    def checked(*args: Any) -> Any:
        touched = args[0].data[args[mask].data.astype(bool)].astype(np.int64)
        if touched.size:
            place = np.searchsorted(allowed, touched).clip(max=max(0, len(allowed) - 1))
            wrong = allowed[place] != touched if len(allowed) else np.ones_like(touched, bool)
            assert not wrong.any(), f"{what} at {int(wrong.sum())} of {wrong.size} places"
        return access(*args)

    return checked


def guard(run: Callable[..., None]) -> Callable[..., None]:
    """``run`` of _launch, of kernels that read entries of their other tensors and write entries of ``out``."""
    builder = interpreter.interpreter_builder

    def guarded(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        tensors = dict(zip(inspect.signature(kernel.fn).parameters, args, strict=False))
        out = _addresses(tensors.pop("out"))
        inputs = _addresses(*(t for t in tensors.values() if isinstance(t, Tensor)))
        name = kernel.fn.__name__
        load = _checked(builder.create_masked_load, 1, inputs, f"{name} reads beside its inputs")
        store = _checked(builder.create_masked_store, 2, out, f"{name} writes beside its output")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "create_masked_load", load)
            patch.setattr(builder, "create_masked_store", store)
            run(kernel, grid, args, meta)

    return guarded
