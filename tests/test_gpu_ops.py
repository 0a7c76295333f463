"""The routes of torch.ops.phydi on CUDA tensors, without a card: on fake tensors, and on those of the CPU.

A fake CUDA tensor goes where a real one would until a kernel would start. The implementation of the CUDA key itself
runs on CPU tensors, with kernels that do nothing: what it asks plans_cuda, and what it gives back.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import every_second, normal, ternary, transposed
from op_cases import CASES, FACTORED, OpCase, Problem, conv, factored, linear
from op_checks import Recorder, draw, strides
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from phydi_kernels import nn, plans_cuda
from phydi_kernels.kernels import gpu
from phydi_kernels.kernels.phc_conv import memory_format
from phydi_kernels.plans_cuda import CudaPlan

PHYDI = torch.ops.phydi
DRIVERS = ("phm_linear", "phm_linear_factored", "phc_conv", "phc_conv_factored")
ON_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
ON_OTHERS = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
CARD = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="fake tensors ask a torch without CUDA for its devices"
)


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 3 else t


def as_it_is(t: Tensor) -> Tensor:
    return t


def tensors_of(results: Tensor | Sequence[Tensor | None]) -> list[Tensor | None]:
    return [results] if isinstance(results, Tensor) else list(results)


def describe(results: Tensor | Sequence[Tensor | None]) -> list[Any]:
    return [None if t is None else (t.shape, t.dtype, strides(t)) for t in tensors_of(results)]


def _given(t: Tensor | None) -> bool:
    return t is not None


def fake(argument: Any) -> Any:
    """On the fake card, in the layout of ``argument``; others than tensors as they are."""
    if not isinstance(argument, Tensor):
        return argument
    made = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="cuda")
    return made.requires_grad_(argument.requires_grad)


def call(case: OpCase, tensors: dict[str, Tensor], problem: Problem, activation: str) -> Tensor:
    return case.op(**tensors, **problem.options, activation=activation)


def calls(case: OpCase, problem: Problem, dtype: torch.dtype, layout: Callable = as_it_is) -> Iterator[tuple]:
    """(operator, arguments) of what a layer's values, gradients and second derivatives reach."""
    tensors = {name: layout(t) for name, t in draw(problem, ternary, dtype).items()}
    with Recorder() as recorder:
        for names in (case.differentiable, ("x",)):
            leaves = {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}
            wanted = [t for t in leaves.values() if t.requires_grad]
            y = call(case, leaves, problem, "relu")
            grads = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
    for op, args in recorder.calls:
        yield op, [a.detach() if isinstance(a, Tensor) else a for a in args]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


class Driver:
    """In the place of a module of drivers: keeps their arguments."""

    def __init__(self, results: Callable[[], Any]) -> None:
        self.results = results
        self.calls: list[tuple[str, tuple]] = []

    def __getattr__(self, name: str) -> Callable:
        def run(*args: Any) -> Any:
            self.calls.append((name, args))
            return self.results()

        return run


def replace_drivers(monkeypatch: pytest.MonkeyPatch, results: Callable[[], Any]) -> dict[str, Driver]:
    drivers = {name: Driver(results) for name in DRIVERS}
    for name, driver in drivers.items():
        monkeypatch.setattr(gpu, name, driver, raising=False)
    return drivers


@pytest.fixture
def no_drivers(monkeypatch):
    def refuse() -> None:
        raise AssertionError("a driver was called")

    return replace_drivers(monkeypatch, refuse)


@pytest.mark.parametrize(
    "layout", (as_it_is, pytest.param(channels_last, marks=needs_cuda_build), transposed, every_second)
)
def test_operators_on_a_fake_card_promise_what_the_cpu_gives(case, layout):
    for problem in case.small:
        reached = set()
        for op, args in calls(case, problem, torch.float16, layout):
            reached.add(op._schema.name.removeprefix("phydi::"))
            with torch.no_grad():
                expected = describe(op(*args))
                with FakeTensorMode():
                    results = op(*map(fake, args))
            assert {t.device for t in tensors_of(results)} == {CARD}
            assert describe(results) == expected, op
            image = args[1] if op._schema.name.endswith("_factored_grad") else args[0]
            if "weight_grad" not in op._schema.name and memory_format(image) is not torch.contiguous_format:
                assert memory_format(tensors_of(results)[0]) is memory_format(image), op
        assert reached == case.operators


@needs_cuda_build
@pytest.mark.parametrize("activation", ("none", "relu"))
def test_gradients_on_a_fake_card_are_those_of_the_cpu(case, activation):
    """By the node that was recorded: autograd's engine asks for a card."""
    for problem in case.small:
        on_cpu = draw(problem, ternary, torch.bfloat16)
        names = [name for name in case.differentiable if name in on_cpu]
        y = call(case, {name: t.requires_grad_(name in names) for name, t in on_cpu.items()}, problem, activation)
        grads = torch.autograd.grad(y, [on_cpu[name] for name in names], y.detach())
        with FakeTensorMode():
            on_card = {name: fake(t) for name, t in on_cpu.items()}
            result = call(case, on_card, problem, activation)
            node = result.grad_fn
            of_inputs = node.apply(torch.empty_like(result, requires_grad=True))
            # An accumulation for each input that has a gradient, in the order of the arguments.
            inputs = [accumulation and accumulation.variable for accumulation, _ in node.next_functions]
        found = {id(t): g for t, g in zip([t for t in inputs if t is not None], filter(_given, of_inputs), strict=True)}
        assert len(found) == len(names)
        for name, expected in zip(names, grads, strict=True):
            gradient = found[id(on_card[name])]
            assert gradient.device == CARD and gradient.requires_grad
            assert describe(gradient) == describe(expected), name


@pytest.fixture
def nothing_starts(monkeypatch) -> list[Any]:
    """Kernels that do nothing: those that would have started."""
    from phydi_kernels.kernels.gpu import _launch

    started: list[Any] = []
    monkeypatch.setattr(_launch, "run", lambda kernel, grid, args, meta: started.append(kernel))
    return started


LEGAL = {
    "phm_linear": (CudaPlan.STREAM, CudaPlan.BUILT, CudaPlan.MIX),
    "phm_linear_factored": tuple(CudaPlan[name] for name in ("STREAM", "BUILT", "FUSED", "EPILOGUE", "PASSES")),
    "phc_conv": (CudaPlan.STREAM, CudaPlan.BUILT),
    "phc_conv_factored": (CudaPlan.FUSED, CudaPlan.EPILOGUE, CudaPlan.PASSES),
}


# Of convolutions in three dimensions.
IN_SPACE = (CudaPlan.BUILT, CudaPlan.PASSES)


def _function(case_name: str) -> str:
    """The function of plans_cuda that plans an operator."""
    return "".join("conv" if part.startswith("conv") else part for part in re.split(r"(_)", case_name))


@needs_triton
@pytest.mark.parametrize(
    ("name", "plan"),
    [(name, plan) for name in CASES for plan in LEGAL[_function(name)] if "3d" not in name or plan in IN_SPACE],
)
def test_drivers_give_what_the_fake_tensors_promise(name, plan, nothing_starts, monkeypatch):
    """The shapes, types and strides of every operator by every plan, for images of planes and in channels_last."""
    case, function = CASES[name], getattr(plans_cuda, _function(name))
    asked = inspect.signature(function)

    def choose(*args: Any) -> CudaPlan:
        # No kernel: what is asked for is no convolution.
        return plan if asked.bind(*args).arguments.get("kernel", True) else function(*args)

    monkeypatch.setattr(plans_cuda, _function(name), choose)
    problems = [case.small[0], case.small[-1]]
    if name.startswith("phm_linear"):
        several = linear((2, 3), 2, 2, 3, 2, 1)
        problems.append(factored(several, 3) if name in FACTORED else several)
    for problem in problems:
        for layout in (as_it_is, channels_last):
            for op, args in calls(case, problem, torch.bfloat16, layout):
                with torch.no_grad():
                    with FakeTensorMode():
                        promised = describe(op(*map(fake, args)))
                    nothing_starts.clear()
                    assert describe(op.redispatch(ON_CUDA, *args)) == promised, op
                    # Without an epilogue mix is torch's alone.
                    assert nothing_starts or plan is CudaPlan.MIX


@needs_triton
def test_no_rows_start_no_kernel_of_the_forward(monkeypatch, nothing_starts):
    for name in ("phm_linear", "phm_linear_factored", "phc_conv2d", "phc_conv2d_factored"):
        case = CASES[name]
        (problem,) = (p for p in case.problems if p.shapes["x"][0:1] == (0,))
        tensors = draw(problem, ternary, torch.float16)
        with Recorder() as recorder:
            call(case, tensors, problem, "relu")
        ((op, args),) = recorder.calls
        nothing_starts.clear()
        y = op.redispatch(ON_CUDA, *args)
        assert y.shape == problem.shapes["residual"] and y.numel() == 0
        # What is left combines the weights, or mixes nothing.
        assert all("product" not in kernel.__name__ for kernel in nothing_starts)


def _of_many_terms(case: OpCase) -> Problem:
    """The shapes of an algebra of 33 terms, and of as many blocks."""
    d = len(case.small[0].shapes["F"]) - 3
    dense = linear((3,), 33, 33, 2, 2, 1) if d == 0 else conv((2,), (3,) * d, (2,) * d, 33, 33, 2, 1, 2)
    return factored(dense, 33) if "U" in case.differentiable else dense


def _composed(op: Any, args: Sequence[Any]) -> None:
    """The implementation for CUDA gives the bits of that for every other device."""
    with torch.no_grad():
        results = [tensors_of(op.redispatch(key, *args)) for key in (ON_CUDA, ON_OTHERS)]
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected) and describe(actual) == describe(expected)
        assert not actual.isnan().any()


def test_float64_is_composed(case, no_drivers):
    for op, args in calls(case, case.small[0], torch.float64):
        _composed(op, args)


def test_algebras_of_many_terms_are_composed(case, no_drivers):
    for op, args in calls(case, _of_many_terms(case), torch.float32):
        _composed(op, args)


@pytest.mark.parametrize("capability", (0, 75))
def test_on_older_cards_operators_are_composed(case, capability, no_drivers, monkeypatch):
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    for op, args in calls(case, case.small[0], torch.float32):
        _composed(op, args)


def promise(monkeypatch: pytest.MonkeyPatch, op: Any, args: Sequence[Any]) -> tuple[list[Any], dict[str, Driver]]:
    """What the fake of an operator promises, and drivers that give it."""
    with FakeTensorMode():
        promised = op(*map(fake, args))
    made = [torch.zeros(t.shape, dtype=t.dtype) for t in tensors_of(promised)]
    results = made[0] if isinstance(promised, Tensor) else tuple(made)
    return describe(promised), replace_drivers(monkeypatch, lambda: results)


class Route(NamedTuple):
    """A call of an operator, and where it goes."""

    op: str
    args: tuple[Any, ...]
    function: str  # of plans_cuda
    asked: dict[str, Any]
    module: str  # of drivers

    def __str__(self) -> str:
        return self.op


def _half(*shape: int) -> Tensor:
    return normal(shape, len(shape)).half()


BLOCKS = {"n": 2, "P": 3, "Q": 4, "dtype": torch.float16, "capability": 89}
SIZES = {**BLOCKS, "p": 6, "q": 7, "tf32": True}
TRANSPOSED = {**SIZES, "P": 4, "Q": 3, "p": 7, "q": 6}
A, U, V, W, F, F_HAT = _half(2, 3, 4), _half(5, 2), _half(5, 3), _half(5, 4), _half(2, 6, 7), _half(5, 6, 7)
x, y, bias, alpha = _half(2, 5, 28), _half(2, 5, 18), _half(18), _half(1)
# Images, the result of 3x2 filters with a stride, and the same without.
filters, images, image_size = _half(2, 6, 7, 3, 2), _half(2, 28, 9, 8), [2, 28, 9, 8]
strided, of_images, of_strided = ([2, 1], [1, 0], [1, 2]), _half(2, 18, 9, 6), _half(2, 18, 5, 6)
plain = ([1, 1], [1, 0], [1, 2])
# Padding that the filters just reach over, and that they do not.
reached, of_reached = ([1, 1], [2, 2], [1, 2]), _half(2, 18, 11, 10)
padded, of_padded = ([1, 1], [1, 3], [1, 2]), _half(2, 18, 9, 12)
IMAGES, FACTORED_IMAGES = {**BLOCKS, "size": 504}, {**SIZES, "pixels": 144, "R": 5, "combines": True}
ROUTES = (
    Route("phm_linear", (x, A, F, bias, y, alpha, "relu"), "phm_linear", {**SIZES, "rows": 10}, "phm_linear"),
    Route("phm_linear_weight_grad", (y, x, A, F), "phm_linear_weight_grad", {**BLOCKS, "size": 84}, "phm_linear"),
    Route(
        "phm_linear_factored",
        (x, U, V, W, F, None, y, None, "none"),
        "phm_linear_factored",
        {**SIZES, "rows": 10, "R": 5, "combines": True},
        "phm_linear_factored",
    ),
    Route(
        "phm_linear_factored",
        (x, None, V, W, F_HAT, bias, None, alpha, "relu"),
        "phm_linear_factored",
        {**SIZES, "n": 5, "rows": 10, "R": 5, "combines": False},
        "phm_linear_factored",
    ),
    Route(
        "phm_linear_factored_grad",
        (y, x, U, V, W, F),
        "factored_grad",
        {**BLOCKS, "R": 5, "size": 84},
        "phm_linear_factored",
    ),
    Route(
        "phc_conv2d",
        (images, A, filters, bias, *strided, of_strided, alpha, "relu"),
        "phc_conv",
        {**SIZES, "outputs": 60, "kernel": (3, 2)},
        "phc_conv",
    ),
    Route(
        "phc_conv2d_input_grad",
        (of_images, A, filters, image_size, *plain),
        "phc_conv",
        {**TRANSPOSED, "outputs": 144, "kernel": (3, 2)},
        "phc_conv",
    ),
    Route(
        "phc_conv2d_input_grad",
        (of_strided, A, filters, image_size, *strided),
        "phc_conv",
        {**TRANSPOSED, "outputs": 144, "kernel": ()},
        "phc_conv",
    ),
    Route(
        "phc_conv2d_input_grad",
        (of_padded, A, filters, image_size, *padded),
        "phc_conv",
        {**TRANSPOSED, "outputs": 144, "kernel": ()},
        "phc_conv",
    ),
    Route(
        "phc_conv2d_input_grad",
        (of_reached, A, filters, image_size, *reached),
        "phc_conv",
        {**TRANSPOSED, "outputs": 144, "kernel": (3, 2)},
        "phc_conv",
    ),
    Route("phc_conv2d_weight_grad", (of_strided, images, A, filters, *strided), "weight_grad", IMAGES, "phc_conv"),
    Route(
        "phc_conv2d_factored",
        (images, U, V, W, filters, None, *strided, of_strided, None, "none"),
        "phc_conv_factored",
        {**FACTORED_IMAGES, "outputs": 60, "kernel": (3, 2)},
        "phc_conv_factored",
    ),
    Route(
        "phc_conv2d_factored_input_grad",
        (of_images, U, V, W, filters, image_size, *plain),
        "phc_conv_factored",
        {**FACTORED_IMAGES, **TRANSPOSED, "pixels": 108, "outputs": 144, "kernel": (3, 2)},
        "phc_conv_factored",
    ),
    Route(
        "phc_conv2d_factored_input_grad",
        (of_strided, U, V, W, filters, image_size, *strided),
        "phc_conv_factored",
        {**FACTORED_IMAGES, **TRANSPOSED, "pixels": 60, "outputs": 144, "kernel": ()},
        "phc_conv_factored",
    ),
    Route(
        "phc_conv2d_factored_grad",
        (of_strided, images, U, V, W, filters, *strided),
        "factored_grad",
        {**BLOCKS, "R": 5, "size": 504},
        "phc_conv_factored",
    ),
)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_routes(route, monkeypatch):
    """What plans_cuda is asked, and that its answer and the arguments as they are go to the driver of that name."""
    op = getattr(PHYDI, route.op).default
    monkeypatch.setattr(gpu, "capability", lambda device: 89)
    monkeypatch.setattr(gpu, "tf32", lambda convolution=False: True)
    function, asked, plans = getattr(plans_cuda, route.function), [], []

    def plan(*args: Any) -> CudaPlan:
        asked.append(inspect.signature(function).bind(*args).arguments)
        plans.append(function(*args))
        return plans[-1]

    monkeypatch.setattr(plans_cuda, route.function, plan)
    promised, drivers = promise(monkeypatch, op, route.args)
    assert describe(op.redispatch(ON_CUDA, *route.args)) == promised
    assert asked == [route.asked]
    ((called, given),) = drivers.pop(route.module).calls
    assert not any(driver.calls for driver in drivers.values())
    assert called == route.op.replace("conv2d", "conv")
    told = route.args + tuple(plans) if route.function in (*LEGAL, "phm_linear_weight_grad") else route.args
    assert len(given) == len(told)
    assert all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(given, told, strict=True))


def _retyped(route: Route, names: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments, those of these names in the schema in another type."""
    schema = getattr(PHYDI, route.op).default._schema
    return tuple(
        value.to(dtype) if argument.name in names.split() and isinstance(value, Tensor) else value
        for argument, value in zip(schema.arguments, route.args, strict=True)
    )


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_calls_of_several_types_are_composed(route, no_drivers):
    op = getattr(PHYDI, route.op).default
    for name in ("x", "grad", "F", "bias", "residual", "alpha"):
        args = _retyped(route, name, torch.float32)
        if any(a is not b for a, b in zip(args, route.args, strict=True)):
            _composed(op, args)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_an_algebra_may_be_float32(route, monkeypatch):
    """Beside halves, as under autocast; not one of another type."""
    op = getattr(PHYDI, route.op).default
    _, drivers = promise(monkeypatch, op, route.args)
    op.redispatch(ON_CUDA, *_retyped(route, "A U V W", torch.float32))
    assert len(drivers[route.module].calls) == 1


@pytest.fixture
def a_card(monkeypatch) -> Iterator[Callable[[int, int], None]]:
    """Sets the compute capability of a card that is not there."""

    def set_capability(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")

    gpu.capability.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    yield set_capability
    gpu.capability.cache_clear()


@pytest.mark.parametrize(("major", "minor", "capability"), ((8, 0, 80), (8, 6, 86), (9, 0, 90), (12, 1, 121)))
def test_capability_of_a_card(a_card, major, minor, capability, recwarn):
    a_card(major, minor)
    assert gpu.reason(capability) == ""
    assert gpu.capability(CARD) == capability
    assert not recwarn.list


def test_an_older_card_is_named_once(a_card, recwarn):
    a_card(7, 5)
    with pytest.warns(UserWarning, match=r"Some Card: compute capability 7\.5 is below 8\.0; the plain PyTorch"):
        assert gpu.capability(CARD) == 0
    assert gpu.capability(CARD) == 0
    assert not recwarn.list


def test_without_triton_the_card_is_not_used(a_card, monkeypatch):
    a_card(9, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"Some Card: triton is not installed; the plain PyTorch"):
        assert gpu.capability(CARD) == 0


def test_common_dtype():
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    assert gpu.common_dtype((half, None, half), (half,)) is torch.float16
    assert gpu.common_dtype((half, half), (single, None, single)) is torch.float16
    assert gpu.common_dtype((half, half), (single, half)) is torch.float16
    assert gpu.common_dtype((half, single), (half,)) is None
    assert gpu.common_dtype((half, half), (double,)) is None
    assert gpu.common_dtype((single, single), (half,)) is None


def test_products_of_float32_follow_torch(monkeypatch):
    matmul, precision = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    before = matmul.fp32_precision
    try:
        for value, expected in (("none", False), ("ieee", False), ("tf32", True)):
            matmul.fp32_precision = value
            assert gpu.tf32() is expected
        for value, expected in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(value)
            assert gpu.tf32() is expected
        # Convolutions follow cuDNN's setting, as torch's do.
        assert gpu.tf32(convolution=True) is (torch.backends.cudnn.conv.fp32_precision == "tf32")
        monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="ieee"))
        assert not gpu.tf32(convolution=True)
    finally:
        torch.set_float32_matmul_precision(precision)
        matmul.fp32_precision = before


MODULES = {
    "PHMLinear": (lambda device: nn.PHMLinear(8, 6, 2, device=device), (8,)),
    "factored": (lambda device: nn.PHMLinear(8, 6, 2, algebra_rank=3, device=device), (8,)),
    "PHConv2d": (lambda device: nn.PHConv2d(8, 6, 3, 2, stride=2, padding=1, device=device), (8, 7, 5)),
    "PHYDILinear": (lambda device: nn.PHYDILinear(8, 2, device=device), (8,)),
}


@needs_cuda_build
@pytest.mark.parametrize("name", MODULES)
def test_layers_compile_for_a_card(name):
    """Forward: autograd's engine, which aot_eager calls to trace a backward, asks for a card."""
    make, shape = MODULES[name]
    torch._dynamo.reset()
    with torch.no_grad():
        expected = make("cpu")(torch.zeros(5, *shape))
        with FakeTensorMode():
            compiled = torch.compile(make("cuda"), fullgraph=True, backend="aot_eager", dynamic=True)
            results = [compiled(torch.empty(batch, *shape, device="cuda")) for batch in (5, 7)]
    for batch, result in zip((5, 7), results, strict=True):
        assert result.device == CARD and result.dtype is expected.dtype
        assert result.shape == (batch, *expected.shape[1:])


@needs_cuda_build
@pytest.mark.parametrize("name", MODULES)
def test_layers_export_for_a_card(name):
    make, shape = MODULES[name]
    with torch.no_grad():
        expected = make("cpu")(torch.zeros(5, *shape))
        with FakeTensorMode():
            layer, inputs = make("cuda"), (torch.empty(5, *shape, device="cuda"),)
            exported = torch.export.export(layer, inputs, dynamic_shapes=({0: torch.export.Dim("batch")},))
            (node,) = (n for n in exported.graph.nodes if n.op == "call_function" and n.target.namespace == "phydi")
            result = node.meta["val"]
    assert result.device == CARD and result.dtype is expected.dtype
    assert result.shape[1:] == expected.shape[1:] and isinstance(result.shape[0], torch.SymInt)
