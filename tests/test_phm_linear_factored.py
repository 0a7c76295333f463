"""phm_linear_factored: the shared checks, a result worked out by hand, every compiled plan, an error bound."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
from typing import Any

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_exact, dtype_id, evaluate, normal, ternary
from op_cases import CASES, FACTORED_PROBLEMS, factored, linear
from op_checks import ALGEBRA, STRUCTURES, FactoredChecks, absolute, decomposed, double, draw, force_plan

from phydi_kernels import functional, reference
from phydi_kernels.plans import LINEAR_PLANS, Plan

CASE = CASES["phm_linear_factored"]
PLANS = pytest.mark.parametrize("plan", LINEAR_PLANS, ids=lambda plan: plan.name)


class TestPHMLinearFactored(FactoredChecks):
    case = CASE
    dense_case = CASES["phm_linear"]

    def decomposable(self, n, P, Q):
        return linear((37,), n, P, Q, 19, 23)

    def test_compile_with_inductor(self, device):
        self._compiled(CASE.small[0], "inductor", False, "relu", device)


def test_complex_product_by_three_products():
    """Gauss: (2 + 3i)(5 + 7i) = (10 - 21) + ((2 + 3)(5 + 7) - 10 - 21) i from 2*5, 3*7 and 5*12."""
    U = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    V = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [0.0, 1.0]])
    F = torch.tensor([2.0, 3.0]).reshape(2, 1, 1)
    x = torch.tensor([5.0, 7.0])
    assert functional.phm_linear_factored(x, U, V, U, F).tolist() == [-11.0, 29.0]
    combined = torch.tensor([2.0, 3.0, 5.0]).reshape(3, 1, 1)
    assert functional.phm_linear_factored(x, None, V, U, combined).tolist() == [-11.0, 29.0]


def test_gradients_by_hand():
    """y = 3 (u v w f x + b), one feature: every derivative written out at u=2, v=-1, w=4, f=5, x=7, b=11, dy=1."""
    values = {"x": 7.0, "U": 2.0, "V": -1.0, "W": 4.0, "F": 5.0, "bias": 11.0, "alpha": 3.0}
    shapes = {"x": (1,), "F": (1, 1, 1), "bias": (1,), "alpha": ()}
    leaves = {name: torch.full(shapes.get(name, (1, 1)), v, requires_grad=True) for name, v in values.items()}
    y = functional.phm_linear_factored(**leaves)
    assert y.item() == -807.0
    grads = torch.autograd.grad(y, list(leaves.values()))
    assert [g.item() for g in grads] == [-120.0, -420.0, 840.0, -210.0, -168.0, 3.0, -269.0]


@functools.cache
def _exact(problem: str, values: Any, activation: str) -> dict[str, torch.Tensor]:
    """The float64 result; integers are the same in every dtype."""
    chosen = next(p for p in FACTORED_PROBLEMS if str(p) == problem)
    tensors = draw(chosen, values, alpha=2.0)
    grad = values(chosen.shapes["residual"], 99)
    return evaluate(CASE.dense, tensors, {"activation": activation}, CASE.differentiable, grad)


def _run(tensors, options, grad, wanted=CASE.differentiable):
    return evaluate(CASE.op, tensors, options, wanted, grad)


@pytest.mark.usefixtures("library")
@PLANS
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("problem", FACTORED_PROBLEMS, ids=str)
class TestPlans:
    """Every plan of the product and of its gradients serves every shape."""

    # The gradient of alpha sums parts that 16 bits may round.
    wanted = tuple(name for name in CASE.differentiable if name != "alpha")

    @pytest.mark.parametrize("count", (1, 2))
    def test_integer_values_are_exact(self, problem, dtype, plan, count, threads, monkeypatch):
        force_plan(monkeypatch, plan)
        threads(count)
        expected = _exact(str(problem), ternary, "relu")
        tensors = draw(problem, ternary, dtype, alpha=2.0)
        grad = ternary(problem.shapes["residual"], 99).to(dtype)
        for wanted in (self.wanted, ("x",)):
            actual = _run(tensors, {"activation": "relu"}, grad, wanted)
            assert_exact(actual, {name: expected[name] for name in actual}, dtype)

    def test_values(self, problem, dtype, plan, threads, monkeypatch):
        force_plan(monkeypatch, plan)
        checks = TestPHMLinearFactored()
        tensors = draw(problem, normal, dtype)
        grad = normal(problem.shapes["residual"], 99).to(dtype)
        runs = checks._with_one_and_two_threads(tensors, {}, grad, threads)
        checks._check_each_close(runs, tensors, {}, grad)


@pytest.mark.usefixtures("library")
@PLANS
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("problem", [p for p in FACTORED_PROBLEMS if math.prod(p.shapes["x"]) < 20000], ids=str)
def test_every_plan_takes_every_layout(problem, plan, layout, monkeypatch):
    """Between NaN, with F's unit stride along q, along p, along neither."""
    force_plan(monkeypatch, plan)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {name: layout(t) for name, t in draw(problem, ternary, dtype).items()}
        grad = layout(ternary(problem.shapes["residual"], 99).to(dtype))
        expected = evaluate(CASE.dense, double(tensors), {}, TestPlans.wanted, grad.double())
        assert_exact(_run(tensors, {}, grad, TestPlans.wanted), expected, dtype)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("rows", (112, 113, 128, 129))
def test_one_block_of_many_rows(rows, dtype, monkeypatch):
    """Packed weights of more than 16 MiB are used at once for p/8 rows, as for few."""
    force_plan(monkeypatch, Plan.RANK)
    R, n, p, q = 3, 2, 1024, 3000
    shapes = {"x": (rows, 2 * q), "U": (R, n), "V": (R, 2), "W": (R, 2), "F": (n, p, q), "residual": (rows, 2 * p)}
    tensors = {name: ternary(shape, seed).to(dtype) for seed, (name, shape) in enumerate(shapes.items())}
    expected = reference.phm_linear_factored(**double(tensors), bias=None, alpha=None, activation="none")
    assert_exact({"y": functional.phm_linear_factored(**tensors)}, {"y": expected}, dtype)


def before_guard_page(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, contiguous, and the process ends where something reads on behind it."""
    size = math.prod(shape) * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=pages - size).view(shape)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("n", (2, 3, 4, 8))
@pytest.mark.parametrize(("p", "q"), ((7, 5), (16, 3), (32, 65), (33, 4), (64, 1), (70, 33)))
def test_terms_of_unit_rows(p, q, n, dtype, monkeypatch):
    """U with unit rows, in any order and twice, and with what only looks like one; F along p, between NaN."""
    force_plan(monkeypatch, Plan.RANK)
    eye = torch.eye(n, dtype=torch.float64)
    others = torch.stack((-eye[0], 2 * eye[1], torch.ones(n).double(), 0 * eye[0], eye[0] - eye[1]))
    U = torch.cat((eye[1:].flip(0), others[:2], eye, others[2:])).to(dtype)
    V, W = (ternary((len(U), blocks), seed).to(dtype) for seed, blocks in enumerate((3, 2)))
    held = torch.full((n, q, p + 5), torch.nan, dtype=dtype)
    held[:, :, :p] = ternary((n, q, p), 2)
    F = held[:, :, :p].mT
    last = before_guard_page((n, q, p), dtype)
    last.copy_(held[:, :, :p])
    for rows, weights in itertools.product((1, 8, 15, 112, 113), (F, last.mT)):
        x = ternary((rows, 2 * q), rows).to(dtype)
        y = functional.phm_linear_factored(x, U, V, W, weights)
        expected = functional.phm_linear_factored(*(t.double() for t in (x, U, V, W, F.contiguous())))
        assert_exact({"y": y}, {"y": expected}, dtype)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("rows", (255, 256, 257, 511, 512, 513, 769, 1025))
def test_gradients_beside_whole_blocks_of_rows(rows, dtype, monkeypatch):
    """The gradients of weights add up blocks of 256 rows, in bfloat16 of 512, in pairs."""
    force_plan(monkeypatch, Plan.RANK)
    tensors = draw(factored(linear((rows,), 2, 3, 2, 5, 3), 4), ternary, dtype, alpha=2.0)
    grad = ternary((rows, 15), 99).to(dtype)
    expected = evaluate(CASE.dense, double(tensors), {}, TestPlans.wanted, grad.double())
    assert_exact(_run(tensors, {}, grad, TestPlans.wanted), expected, dtype)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=dtype_id)
@pytest.mark.parametrize("factor", ALGEBRA)
def test_float32_algebra_is_not_rounded_to_16_bits(half, factor, monkeypatch):
    """s + 1 and -s, s = 2/eps, add up to 1; rounded, to 0."""
    force_plan(monkeypatch, Plan.RANK)
    s = 2 / torch.finfo(half).eps
    one = torch.tensor([[1.0, 0.0]])
    factors = {name: one for name in ALGEBRA} | {factor: torch.tensor([[s + 1, -s]])}
    x, F = (ternary(shape, seed).to(half) for seed, shape in enumerate(((9, 35), (5, 35))))
    h = x @ F.T
    residual = torch.cat([-s * h, torch.zeros_like(h)], 1) if factor == "V" else None
    y = functional.phm_linear_factored(x.repeat(1, 2), **factors, F=F.repeat(2, 1, 1), residual=residual)
    assert torch.equal(y[:, :5], h)


def _bound(tensors: dict[str, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    """The error bound of test_rounding_in_bfloat16, entry by entry."""
    u, single = 2.0**-8, 2.0**-24
    x, U, V, W, F = (tensors[name] for name in ("x", "U", "V", "W", "F"))
    n, _, q = F.shape
    blocks = x.reshape(len(x), -1, q)
    x_hat = torch.einsum("rl,bls->brs", W, blocks).abs()
    F_hat = torch.einsum("ri,ipq->rpq", U, F).abs()
    products = torch.einsum("rk,brp->bkp", V.abs(), torch.einsum("rpq,brq->brp", F_hat, x_hat)).reshape(y.shape)
    # Additions and products of a sum in float32: n of F-hat, Q of x-hat, q of their product, R of the result.
    gamma = 2 * (n + blocks.shape[1] + q + len(V)) * single
    magnitude = CASE.dense(**absolute(tensors))
    return u * y.abs() + (1 + u) * ((2 * u + u * u) * products + gamma * magnitude)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rows", (3, 150))
@pytest.mark.parametrize("q", (1, 2, 65))
def test_rounding_in_bfloat16(structure, rows, q, monkeypatch):
    """An error bound for every entry, u = 2^-8 the unit roundoff of bfloat16:

        |y - H x| <= u |H x| + (1 + u) ((2u + u^2) B + gamma M),
        B_k = sum_r |V[r,k]| |F-hat_r| |x-hat_r|,    M = |V| |U| |W| |F| |x| summed alike,

    F-hat and x-hat are summed in float32 and rounded once, their entries become F-hat (1 + d) and x-hat (1 + e) with
    |d|, |e| <= u: a product of two is off by at most 2u + u^2 of itself, and their sum, weighted with V, by that of B.
    Each entry passes at most n + Q + q + R additions and as many multiplications in float32, all together below gamma M
    with gamma = 2 (n + Q + q + R) 2^-24 to first order, which the second order, 1e-9 of M, does not reach. At last the
    sum z, off by e, is rounded: |z (1 + d) - H x| <= e + u |z| <= u |H x| + (1 + u) e.
    """
    force_plan(monkeypatch, Plan.RANK)
    A, found = decomposed(structure)
    n, P, Q = A.shape
    p = 33
    tensors = draw(linear((rows,), n, P, Q, p, q), normal, torch.bfloat16, omit=("A", "bias", "residual", "alpha"))
    # Decompositions may have entries of 1, which round nothing.
    tensors |= {name: t.float() * scale for (name, t), scale in zip(found.items(), (1.3, 0.7, 1.1), strict=True)}
    y = functional.phm_linear_factored(**tensors)
    exact = double(tensors)
    expected = CASE.dense(**exact)
    excess = (y.double() - expected).abs() - _bound(exact, expected)
    assert excess.max() <= 0


def _direct(op: str, change: dict[str, Any]) -> Any:
    tensors: dict[str, Any] = {"x": torch.zeros(5, 8), "U": torch.zeros(3, 2), "V": torch.zeros(3, 2)}
    tensors |= {"W": torch.zeros(3, 2), "F": torch.zeros(2, 3, 4)}
    if op == "phm_linear_factored":
        tensors |= {"bias": torch.zeros(6), "residual": torch.zeros(5, 6), "alpha": torch.zeros(1)}
        tensors |= {"relu": False, "plan": 3}
    else:
        tensors["grad"] = torch.zeros(5, 6)
    return getattr(torch.ops.phydi_cpu, op)(**{**tensors, **change})


def _changed(value: Any) -> str:
    if isinstance(value, str):
        return ""
    ((name, to),) = value.items()
    return f"{name}{'x'.join(map(str, to.shape))}" if isinstance(to, torch.Tensor) else f"{name}{to}"


BOTH = ("phm_linear_factored", "phm_linear_factored_grad")


@pytest.mark.usefixtures("library")
class TestDirectCalls:
    """The public function names the argument; the kernel itself must not read what is not there."""

    @pytest.mark.parametrize("plan", (0, 1, 2, 3))
    def test_fitting_shapes_run(self, plan):
        _direct("phm_linear_factored", {"plan": plan})
        _direct("phm_linear_factored_grad", {})

    @pytest.mark.parametrize("op", BOTH)
    @pytest.mark.parametrize(
        ("change", "message"),
        (
            ({"x": torch.zeros(5, 7)}, "last dimension"),
            ({"x": torch.zeros(5, 8, dtype=torch.float64)}, "dtype of x"),
            ({"F": torch.zeros(3, 3, 4)}, "U must be"),
            ({"F": torch.zeros(2, 3, 0)}, "not empty"),
            ({"F": torch.zeros(2, 12)}, "F must be"),
            ({"U": torch.zeros(2, 2)}, "U must be"),
            ({"U": torch.zeros(3, 3)}, "U must be"),
            ({"U": torch.zeros(6)}, "U must be"),
            ({"V": torch.zeros(2, 2)}, "V must be"),
            ({"V": torch.zeros(6)}, "V must be"),
            ({"V": torch.zeros(3, 0)}, "V must be"),
            ({"W": torch.zeros(4, 2)}, "V must be"),
            ({"W": torch.zeros(3, 2, 1)}, "V must be"),
            ({"W": torch.zeros(3, 3)}, "last dimension"),
        ),
        ids=_changed,
    )
    def test_factors_that_do_not_fit(self, op, change, message):
        with pytest.raises(RuntimeError, match=message):
            _direct(op, change)

    @pytest.mark.parametrize(
        ("change", "message"),
        (
            ({"U": None}, "U must be"),
            ({"bias": torch.zeros(5)}, "another dtype or size"),
            ({"bias": torch.zeros(6, dtype=torch.float64)}, "another dtype or size"),
            ({"residual": torch.zeros(5, 5)}, "another dtype or size"),
            ({"alpha": torch.zeros(2)}, "another dtype or size"),
            ({"alpha": torch.zeros(0)}, "another dtype or size"),
            ({"plan": 4}, "unknown plan"),
            ({"plan": -1}, "unknown plan"),
        ),
        ids=_changed,
    )
    def test_forward_arguments_that_do_not_fit(self, change, message):
        with pytest.raises(RuntimeError, match=message):
            _direct("phm_linear_factored", change)

    @pytest.mark.parametrize(
        ("change", "message"),
        (
            ({"grad": torch.zeros(5, 5)}, "last dimension"),
            ({"grad": torch.zeros(4, 6)}, "another dtype or size"),
            ({"grad": torch.zeros(5, 6, dtype=torch.float64)}, "one dtype"),
        ),
        ids=_changed,
    )
    def test_gradient_that_does_not_fit(self, change, message):
        with pytest.raises(RuntimeError, match=message):
            _direct("phm_linear_factored_grad", change)
