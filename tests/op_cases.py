"""Every public operator with a float64 reference that shares no code with the package, and the shapes to test it on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from phydi_kernels import functional


@dataclass(frozen=True)
class Problem:
    """One call: the shapes of the tensor arguments and the values of the others."""

    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        epilogue = ("bias", "residual", *(["alpha"] if self.shapes["alpha"] in ((), (1,)) else []))
        shapes = [f"{k}{'x'.join(map(str, v))}" for k, v in self.shapes.items() if k not in epilogue]
        return "-".join([*shapes, *(f"{k}{v}" for k, v in self.options.items())]).replace(" ", "")


@dataclass(frozen=True)
class OpCase:
    """What the shared checks know about one operator.

    Attributes:
        op: the public function, called with keywords only.
        dense: the same function of float64 tensors, by a route of its own.
        terms: the number of products in one entry of the result.
        operators: the names under ``torch.ops.phydi`` that a call with first and second derivatives reaches.
        problems: shapes for values and gradients.
        small: shapes for numerical derivatives, tracing and transforms; ``batched`` have the batch first in them.
        any_problem: shapes for hypothesis.
        optional: tensor arguments that a call may leave out.
        differentiable: arguments with a gradient.
        mapped: sets of arguments to vmap over.
        layouts: memory layouts beyond those of every operator.
    """

    op: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    terms: Callable[[Mapping[str, Tensor]], int]
    operators: frozenset[str]
    problems: tuple[Problem, ...]
    small: tuple[Problem, ...]
    any_problem: st.SearchStrategy[Problem]
    optional: tuple[str, ...] = ("bias", "residual", "alpha")
    differentiable: tuple[str, ...] = ("x", "A", "F", "bias", "residual", "alpha")
    batched: tuple[str, ...] = ("x", "residual")
    mapped: tuple[tuple[str, ...], ...] = (("x",), ("x", "residual"), ("A", "F", "bias"), ("x", "alpha"))
    layouts: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


def dense_weight(A: Tensor, F: Tensor) -> Tensor:
    """sum_i kron(A_i, F_i); kernel positions of a convolution meet dimensions of size 1 in A."""
    ones = (1,) * (F.dim() - 3)
    return torch.stack([torch.kron(a.reshape(*a.shape, *ones), f) for a, f in zip(A, F, strict=True)]).sum(0)


def _epilogue(h: Tensor, residual: Tensor | None, alpha: Tensor | None, activation: str, channel: int) -> Tensor:
    y = torch.relu(h) if activation == "relu" else h
    if alpha is not None:
        channels_last = y.movedim(channel, -1)
        y = (alpha.reshape(-1).expand(channels_last.shape[-1]) * channels_last).movedim(-1, channel)
    return y if residual is None else residual + y


def _dense_linear(x, A, F, bias=None, residual=None, alpha=None, activation="none"):
    return _epilogue(torch.nn.functional.linear(x, dense_weight(A, F), bias), residual, alpha, activation, -1)


def _dense_conv(x, A, F, bias=None, residual=None, alpha=None, activation="none", **geometry):
    d = F.dim() - 3
    conv = getattr(torch.nn.functional, f"conv{d}d")
    return _epilogue(conv(x, dense_weight(A, F), bias, **geometry), residual, alpha, activation, -d - 1)


def structure(U: Tensor | None, V: Tensor, W: Tensor) -> Tensor:
    """A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l]; one term r for each i where U is missing."""
    A = torch.einsum("rk,rl->rkl", V, W) if U is None else torch.einsum("ri,rk,rl->ikl", U, V, W)
    return A.clone(memory_format=torch.contiguous_format)  # kron refuses some strides of dimensions of size 1


def of_factors(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A dense function of A as one of U, V and W."""
    return lambda x, V, W, F, U=None, **others: dense(x, structure(U, V, W), F, **others)


def _factored(name: str) -> Callable[..., Tensor]:
    """The public function with U among the arguments that may be left out."""
    function = getattr(functional, name)
    return lambda U=None, **others: function(U=U, **others)


def linear(leading: tuple[int, ...], n: int, P: int, Q: int, p: int, q: int) -> Problem:
    shapes = {"x": (*leading, Q * q), "A": (n, P, Q), "F": (n, p, q)}
    return Problem({**shapes, "bias": (P * p,), "residual": (*leading, P * p), "alpha": (1,)})


def conv(
    batch: tuple[int, ...],
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    **geometry: int | tuple[int, ...],
) -> Problem:
    shapes = {"x": (*batch, Q * q, *size), "A": (n, P, Q), "F": (n, p, q, *kernel), "bias": (P * p,), "alpha": ()}
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name != "alpha"}
    return Problem({**shapes, "residual": tuple(_dense_conv(**meta, **geometry).shape)}, geometry)


def per_channel(problem: Problem) -> Problem:
    """The same problem with an alpha for each output."""
    return Problem({**problem.shapes, "alpha": problem.shapes["bias"]}, problem.options)


def factored(problem: Problem, R: int, *, U: bool = True) -> Problem:
    """The same problem with an algebra of R terms; without U as many terms in F."""
    _, P, Q = problem.shapes["A"]
    n, *weights = problem.shapes["F"]
    shapes = {name: shape for name, shape in problem.shapes.items() if name != "A"}
    shapes |= {"V": (R, P), "W": (R, Q), "F": (n if U else R, *weights)} | ({"U": (R, n)} if U else {})
    return Problem(shapes, problem.options)


# Rows, blocks and block sizes on both sides of the kernels' tiles: small batches, inner dimensions beyond one and two
# blocks of 256, and sizes that no vector width divides.
LINEAR_PROBLEMS = (
    linear((), 4, 4, 4, 7, 3),
    linear((0,), 2, 2, 2, 3, 7),
    linear((2, 0, 3), 3, 3, 3, 1, 1),
    linear((1,), 1, 1, 1, 1, 1),
    linear((3,), 1, 3, 2, 7, 17),
    linear((5,), 1, 7, 33, 17, 1),
    linear((2,), 2, 2, 2, 33, 3),
    linear((2, 3, 4), 3, 3, 3, 17, 33),
    linear((1,), 4, 4, 4, 64, 80),
    linear((5,), 4, 4, 4, 16, 129),
    linear((63,), 3, 2, 3, 17, 33),
    linear((64,), 4, 4, 4, 32, 64),
    linear((129,), 4, 4, 4, 33, 65),
    linear((129,), 8, 8, 8, 17, 33),
    linear((300,), 5, 2, 5, 7, 7),
    linear((300,), 6, 6, 6, 3, 1),
    linear((300,), 4, 4, 3, 150, 7),
    linear((300,), 4, 4, 4, 1, 145),
    linear((530,), 2, 3, 2, 3, 5),
    per_channel(linear((5,), 3, 2, 3, 7, 9)),
    per_channel(linear((115,), 2, 4, 2, 19, 5)),
)
# The same sides of tiles and blocks, and those of the ranks: fewer than n, more than n^2, more than one group of them
# beside the rows (q > 1024), summations in one part and in several (q > 256, in pairs > 512), more strips of p than are
# packed at a time, and columns of the weights' gradient in several passes (large R * p).
FACTORED_PROBLEMS = (
    factored(linear((), 4, 4, 4, 7, 3), 7),
    factored(linear((0,), 2, 2, 2, 3, 7), 3),
    factored(linear((2, 0, 3), 3, 3, 3, 1, 1), 2, U=False),
    factored(linear((1,), 1, 1, 1, 1, 1), 1),
    factored(linear((3,), 1, 3, 2, 7, 17), 4, U=False),
    factored(linear((5,), 1, 7, 33, 17, 1), 3),
    factored(linear((2,), 4, 2, 2, 33, 3), 2),
    factored(linear((2, 3, 4), 3, 3, 3, 17, 33), 11),
    per_channel(factored(linear((1,), 4, 4, 4, 64, 80), 7)),
    factored(linear((5,), 4, 4, 4, 16, 129), 7, U=False),
    factored(linear((37,), 3, 2, 3, 17, 300), 5),
    factored(linear((9,), 2, 3, 2, 40, 1050), 3),
    factored(linear((112,), 4, 4, 4, 32, 64), 7),
    per_channel(factored(linear((129,), 4, 3, 5, 33, 65), 19, U=False)),
    factored(linear((113,), 2, 2, 2, 65, 530), 3),
    factored(linear((227,), 2, 2, 2, 5, 1100), 3),
    factored(linear((227,), 2, 2, 3, 3, 1100), 5, U=False),
    factored(linear((300,), 2, 9, 2, 300, 9), 3),
    factored(linear((115,), 2, 33, 2, 70, 5), 6),
    factored(linear((5,), 8, 2, 2, 257, 70), 64),
    factored(linear((530,), 2, 3, 2, 3, 5), 4),
    factored(linear((300,), 8, 8, 8, 7, 9), 24),
)


@st.composite
def _any_linear(draw) -> Problem:
    size = st.integers(1, 40)
    rows, pair = st.tuples(st.integers(0, 140)), st.tuples(st.integers(0, 4), st.integers(0, 9))
    leading = draw(st.one_of(st.tuples(), rows, pair))
    blocks = [draw(st.integers(1, 8)) for _ in "nPQ"]
    problem = linear(leading, *blocks, draw(size), draw(size))
    return per_channel(problem) if draw(st.booleans()) else problem


@st.composite
def _any_factored(draw, any_problem: st.SearchStrategy[Problem]) -> Problem:
    return factored(draw(any_problem), draw(st.integers(1, 12)), U=draw(st.booleans()))


@st.composite
def _any_conv(draw, d: int) -> Problem:
    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(d))

    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 2), each(1, 2)
    size = tuple(e * (k - 1) + 1 + draw(st.integers(0, 5)) for k, e in zip(kernel, dilation, strict=True))
    channels = [draw(st.integers(1, 4)) for _ in "nPQpq"]
    batch = draw(st.one_of(st.tuples(), st.tuples(st.integers(0, 3))))
    problem = conv(batch, size, kernel, *channels, stride=stride, padding=padding, dilation=dilation)
    return per_channel(problem) if draw(st.booleans()) else problem


CONV_PROBLEMS = {
    1: (
        conv((2,), (19,), (3,), 4, 4, 4, 3, 5, padding=1),
        conv((3,), (33,), (5,), 3, 2, 3, 7, 1, stride=2, padding=2, dilation=2),
        per_channel(conv((), (9,), (1,), 2, 2, 2, 3, 3)),
        conv((2,), (7,), (1,), 2, 3, 2, 5, 3, stride=2),
        conv((0,), (9,), (3,), 2, 2, 2, 3, 3),
    ),
    2: (
        conv((2,), (9, 7), (3, 3), 4, 4, 4, 8, 8, padding=1),
        conv((3,), (8, 8), (3, 3), 4, 4, 4, 17, 3, stride=2, padding=1),
        conv((2,), (11, 10), (2, 3), 1, 3, 2, 7, 5, stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
        conv((5,), (4, 4), (1, 1), 3, 3, 3, 33, 17),
        conv((3,), (5, 7), (1, 1), 2, 3, 2, 5, 7, stride=(2, 3)),
        per_channel(conv((2,), (5, 4), (3, 2), 2, 3, 2, 5, 3, padding=1)),
        conv((1,), (2, 2), (3, 3), 2, 2, 2, 33, 33, padding=1),
        conv((), (5, 6), (3, 3), 2, 2, 2, 1, 3, padding=1),
        conv((0,), (5, 6), (3, 3), 2, 2, 2, 3, 3, padding=1),
    ),
    3: (
        conv((2,), (5, 4, 6), (3, 3, 3), 2, 2, 2, 3, 3, padding=1),
        conv((1,), (5, 6, 7), (1, 2, 3), 3, 2, 3, 5, 1, stride=(1, 2, 1), dilation=(1, 1, 2)),
        per_channel(conv((2,), (3, 2, 4), (2, 2, 1), 2, 3, 2, 3, 5)),
        conv((2,), (3, 4, 2), (1, 1, 1), 2, 2, 3, 5, 3, stride=(1, 2, 1)),
        conv((0,), (3, 3, 3), (1, 1, 1), 2, 2, 2, 1, 3),
    ),
}
# Ranks for the problems above, in turn; n + 1 and more, and at least one below n.
_RANKS = (7, 2, 5, 1, 3)
_SMALL_CONV = {
    1: conv((2,), (5,), (3,), 2, 3, 2, 1, 2, stride=2, padding=1),
    2: conv((2,), (4, 3), (2, 3), 2, 2, 3, 1, 1, stride=(2, 1), padding=1),
    3: conv((2,), (3, 2, 2), (2, 1, 2), 2, 2, 1, 1, 2, padding=(1, 0, 0)),
}
_CHANNELS_LAST: dict[int, Mapping[str, Callable[[Tensor], Tensor]]] = {
    1: {},
    2: {"channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t},
    3: {"channels_last_3d": lambda t: t.contiguous(memory_format=torch.channels_last_3d) if t.dim() == 5 else t},
}


def _conv_case(d: int) -> OpCase:
    name = f"phc_conv{d}d"
    return OpCase(
        op=getattr(functional, name),
        dense=_dense_conv,
        terms=lambda t: t["A"].shape[2] * t["F"][0, 0].numel(),
        operators=frozenset({name, f"{name}_input_grad", f"{name}_weight_grad"}),
        problems=CONV_PROBLEMS[d],
        small=(_SMALL_CONV[d], per_channel(_SMALL_CONV[d])),
        any_problem=_any_conv(d),
        layouts=_CHANNELS_LAST[d],
    )


def _factored_terms(tensors: Mapping[str, Tensor]) -> int:
    """R n Q q, times the kernel's positions; without U each of the R terms has a single F."""
    (R, Q), F = tensors["W"].shape, tensors["F"]
    return R * (len(F) if "U" in tensors else 1) * Q * F[0, 0].numel()


def _factored_case(name: str, case: OpCase, problems: tuple[Problem, ...], gradients: tuple[str, ...]) -> OpCase:
    """The factored form of an operator; its small problems are with U, with an alpha for each output, without U."""
    first, second = case.small
    return replace(
        case,
        op=_factored(name),
        dense=of_factors(case.dense),
        terms=_factored_terms,
        operators=frozenset({name, *(name + suffix for suffix in gradients)}),
        problems=problems,
        small=(factored(first, 3), factored(second, 2), factored(first, 2, U=False)),
        any_problem=_any_factored(case.any_problem),
        differentiable=("x", "U", "V", "W", "F", "bias", "residual", "alpha"),
        mapped=(("x",), ("x", "residual"), ("U", "V", "W", "F", "bias"), ("x", "alpha")),
    )


_LINEAR = OpCase(
    op=functional.phm_linear,
    dense=_dense_linear,
    terms=lambda t: t["x"].shape[-1],
    operators=frozenset({"phm_linear", "phm_linear_weight_grad"}),
    problems=LINEAR_PROBLEMS,
    small=(linear((3,), 2, 2, 3, 2, 1), per_channel(linear((3,), 2, 2, 3, 2, 1))),
    any_problem=_any_linear(),
)
_CONV = {d: _conv_case(d) for d in (1, 2, 3)}
CASES = {
    "phm_linear": _LINEAR,
    **{f"phc_conv{d}d": case for d, case in _CONV.items()},
    "phm_linear_factored": _factored_case("phm_linear_factored", _LINEAR, FACTORED_PROBLEMS, ("_grad",)),
    **{
        f"phc_conv{d}d_factored": _factored_case(
            f"phc_conv{d}d_factored",
            case,
            tuple(
                factored(problem, R, U=i % 3 != 1)
                for i, (problem, R) in enumerate(zip(case.problems, itertools.cycle(_RANKS), strict=False))
            ),
            ("_input_grad", "_grad"),
        )
        for d, case in _CONV.items()
    },
}
FACTORED = tuple(name for name in CASES if name.endswith("_factored"))
