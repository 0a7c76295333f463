"""The rates of phydi_kernels/plans.py: every plan of many calls timed, and the rates of this processor fitted to them.

``python benchmarks/plan_costs.py`` times them, at one thread, in about a quarter of an hour, and writes
results/plan_costs_<instruction set>.json. ``--summary`` prints how far the plans that plans.py chooses are behind the
best ones, ``--fit`` fits the rates to the times and prints the same for them, ``--write`` puts them into plans.py.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from rivals import Rival, paired_times, shortest_of_first_calls
from scipy.optimize import least_squares
from torch import Tensor

import phydi_kernels.functional  # noqa: F401  defines the operators
from phydi_kernels import plans
from phydi_kernels.kernels import cpu
from phydi_kernels.plans import Plan, Rates

RESULTS = Path(__file__).resolve().parent / "results"
# Plan functions, and of how many calls each the plans are timed.
CALLS = {
    "phm_linear": 180,
    "phm_linear_weight_grad": 120,
    "phm_linear_factored": 200,
    "phm_linear_factored_grad": 100,
    "phc_conv": 120,
    "phc_conv_weight_grad": 80,
    "phc_conv_factored": 140,
    "phc_conv_factored_grad": 80,
}
RANKS = {2: 3, 3: 5, 4: 7, 8: 24}
# Of a dense layer of the same shape, and its weights.
MOST_MULTIPLICATIONS, LEAST_MULTIPLICATIONS = 1 << 31, 1 << 16
MOST_WEIGHTS = 1 << 24
SECONDS_PER_CALL = 0.2
MIN_ROUNDS = 3
# A plan that takes this many times the best one in its first calls takes no further part.
HOPELESS = 4.0
PROBES = 2
# Plans round at different places, and gradients of factors add up some ten thousand products.
ROUNDINGS = 100.0
# How far a chosen plan may be behind the best: this factor, or what a call from Python varies by.
ALLOWED = 1.15
ALLOWED_SECONDS = 5e-6
# Of the fit: what a time varies by, relative; how far apart two predicted times are where one is chosen for certain;
# what a choice may lose; by how many times a rate may be off from what it was, roughly. A plan at FAR times the time of
# the best is hardly ever chosen for what its time is off by.
NOISE = 0.3
DOUBT = 0.15
LOSS = 0.05
BELIEF = math.log(3.0)
FAR = 2.0
# Every so manieth call is left out of the fit, to judge it by.
HELD_OUT = 4


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an operator; ``shape`` is (rows,) of a linear layer, (batch, height, width) of a convolution."""

    function: str
    n: int
    P: int
    Q: int
    p: int
    q: int
    shape: tuple[int, ...]
    kernel: int
    stride: int
    dtype: str
    along_q: bool  # a linear layer's F contiguous along q
    channels_last: bool
    combines: bool  # with U

    @property
    def R(self) -> int:
        return RANKS.get(self.n, 0)

    def operator(self) -> tuple[Callable[..., Any], list[Any]]:
        """The operator and its arguments."""
        torch.manual_seed(0)
        name = self.function.replace("phc_conv", "phc_conv2d")
        x, grad = self._images(self.Q * self.q, 1), self._images(self.P * self.p, self.stride)
        weights = [*self._algebra(), self._weights()]
        geometry = [[self.stride] * 2, [self.kernel // 2] * 2, [1, 1]] if self.is_convolution else []
        if self.function.endswith("grad"):
            arguments = [grad, x, *weights, *geometry]
        else:
            bias = residual = alpha = None
            arguments = [x, *weights, bias, *geometry, residual, alpha, "none"]
        return getattr(torch.ops.phydi, name).default, arguments

    @property
    def is_convolution(self) -> bool:
        return self.function.startswith("phc_conv")

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(getattr(torch, self.dtype))

    def _images(self, channels: int, stride: int) -> Tensor:
        batch, *size = self.shape
        t = self._randn(batch, channels, *(-(-s // stride) for s in size))
        return t.contiguous(memory_format=torch.channels_last) if self.channels_last else t

    def _algebra(self) -> list[Tensor | None]:
        if "factored" not in self.function:
            return [self._randn(self.n, self.P, self.Q)]
        U = self._randn(self.R, self.n) if self.combines else None
        return [U, self._randn(self.R, self.P), self._randn(self.R, self.Q)]

    def _weights(self) -> Tensor:
        terms = self.R if "factored" in self.function and not self.combines else self.n
        if self.is_convolution:
            return self._randn(terms, self.p, self.q, self.kernel, self.kernel)
        if self.along_q:
            return self._randn(terms, self.p, self.q)
        return self._randn(terms, self.q, self.p).transpose(1, 2)


def drawn(function: str, count: int) -> Iterator[Call]:
    """``count`` calls, the same ones at each run."""
    rng = random.Random(function)
    while count:
        call = _draw(function, rng)
        pixels = math.prod(call.shape) / call.stride ** (len(call.shape) - 1)
        weights = call.P * call.p * call.Q * call.q * call.kernel**2
        if weights <= MOST_WEIGHTS and LEAST_MULTIPLICATIONS <= pixels * weights <= MOST_MULTIPLICATIONS:
            count -= 1
            yield call


def _draw(function: str, rng: random.Random) -> Call:
    convolution, factored, grad = (part in function for part in ("conv", "factored", "grad"))

    def size(least: int, most: int) -> int:
        """Small ones as often as large ones; half of them multiples of 8."""
        drawn = round(2 ** rng.uniform(math.log2(least), math.log2(most)))
        return -(-drawn // 8) * 8 if drawn > 8 and rng.random() < 0.5 else drawn

    n = rng.choice(tuple(RANKS))
    P = Q = n
    if not factored and rng.random() < 0.25:
        n, P, Q = 1, rng.choice((2, 4, 8, 16, 64)), rng.choice((2, 4, 8, 16, 64))
    p = size(4, 128 if convolution else 1024)
    q = p if rng.random() < 0.5 else size(4, 128 if convolution else 1024)
    side = size(4, 32)
    return Call(
        function,
        n,
        P,
        Q,
        p,
        q,
        (size(1, 32), side, side) if convolution else (size(1, 4096),),
        kernel=rng.choice((1, 3)) if convolution else 1,
        stride=rng.choice((1, 1, 1, 2)) if convolution else 1,
        dtype=rng.choice(("float32", "float32", "bfloat16")),
        along_q=rng.random() < 0.5,
        channels_last=convolution and rng.random() < 0.5,
        # Convolutions of the gradients always combine, and so do all layers but prepacked ones.
        combines=factored and (convolution or grad or rng.random() < 0.7),
    )


def measure(call: Call, seconds: float = SECONDS_PER_CALL) -> dict[str, Any]:
    """What plans.py is asked at this call, and the seconds of each plan that it could answer with."""
    operator, arguments = call.operator()
    choose = getattr(plans, call.function)
    asked: list[Any] = []

    def answering(answer: Callable[..., Plan]) -> Any:
        setattr(plans, call.function, answer)
        try:
            return operator(*arguments)
        finally:
            setattr(plans, call.function, choose)

    def record(*sizes: Any) -> Plan:
        asked.append(sizes)
        return choose(*sizes)

    answering(record)
    *sizes, isa = asked[0]
    assert isa == cpu.isa()

    def rival(plan: Plan) -> Rival:
        return Rival(lambda: (answering(lambda *_: plan),))

    rivals = {plan.name.lower(): rival(plan) for plan in costs(call.function, sizes, plans.RATES[isa])}
    _check(rivals, operator(*arguments), getattr(torch, call.dtype))
    once = shortest_of_first_calls(rivals, PROBES)
    hopeful = {name: rival for name, rival in rivals.items() if once[name] <= HOPELESS * min(once.values())}
    times, _ = paired_times(hopeful, torch.device("cpu"), seconds, MIN_ROUNDS)
    medians = {name: statistics.median(of_plan) for name, of_plan in times.items()}
    return {"function": call.function, "sizes": sizes, "seconds": once | medians}


def _check(rivals: Mapping[str, Rival], expected: Any, dtype: torch.dtype) -> None:
    """Every plan must compute the same; each tensor, in the norm, to what a plan may round."""
    for name, rival in rivals.items():
        (actual,) = rival.call()
        pairs = [(actual, expected)] if isinstance(actual, Tensor) else zip(actual, expected, strict=True)
        for ours, other in pairs:
            error = float((ours - other).double().norm() / other.double().norm())
            assert error <= ROUNDINGS * torch.finfo(dtype).eps, f"{name} is off by {error:.1e}"


def costs(function: str, sizes: Sequence[Any], rates: Rates) -> dict[Plan, float]:
    """Of plans.py, in nanoseconds."""
    of_plans: dict[Plan, float] = getattr(plans, f"{function}_costs")(*sizes, rates)
    return of_plans


def regret(row: Mapping[str, Any], rates: Rates) -> float:
    """The time of the plan chosen by these rates over that of the best one."""
    chosen = plans.cheapest(costs(row["function"], row["sizes"], rates)).name.lower()
    return row["seconds"][chosen] / min(row["seconds"].values())


def is_behind(row: Mapping[str, Any], rates: Rates) -> bool:
    """Whether the chosen plan takes longer than it may."""
    behind = regret(row, rates)
    return behind > ALLOWED and (behind - 1) * min(row["seconds"].values()) > ALLOWED_SECONDS


def fit(rows: Sequence[Mapping[str, Any]], rates: Rates) -> Rates:
    """The rates whose choices lose least on the times of the rows, and that explain the times, starting from ``rates``.

    Least squares, insensitive to outliers, of log(predicted / measured) and of what the choice loses, the logarithm of
    sum_k w_k t_k / min t, where plan k of measured time t_k is chosen with weight w_k ~ (predicted time)^(-1 / DOUBT).
    A predicted time is that of plans.py and a time that each call of a function takes whatever its plan. Rates that no
    row depends on stay as they are.
    """
    names = [field.name for field in dataclasses.fields(rates) if isinstance(getattr(rates, field.name), float)]
    functions = sorted({row["function"] for row in rows})
    shortest = [min(min(row["seconds"].values()) for row in rows if row["function"] == name) for name in functions]
    start = np.log([*(getattr(rates, name) for name in names), *(0.5e9 * seconds for seconds in shortest)])
    measured = []
    for row in rows:
        seconds = np.array([row["seconds"][plan.name.lower()] for plan in costs(row["function"], row["sizes"], rates)])
        measured.append((np.log(1e9 * seconds), np.minimum(1.0, FAR * seconds.min() / seconds) / NOISE))

    def at(logarithms: np.ndarray) -> tuple[Rates, dict[str, float]]:
        values = np.exp(logarithms).tolist()
        found = dataclasses.replace(rates, **dict(zip(names, values[: len(names)], strict=True)))
        return found, dict(zip(functions, values[len(names) :], strict=True))

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        found, calls = at(logarithms)
        off, lost = [], []
        for row, (times, weights) in zip(rows, measured, strict=True):
            of_plans = costs(row["function"], row["sizes"], found)
            predicted = np.log(np.array(list(of_plans.values())) + calls[row["function"]])
            off.append((predicted - times) * weights)
            chosen = np.exp((predicted.min() - predicted) / DOUBT)
            lost.append(math.log(chosen @ np.exp(times - times.min()) / chosen.sum()) / LOSS)
        return np.concatenate([*off, lost, (logarithms - start) / BELIEF])

    return at(least_squares(residuals, start, loss="soft_l1", max_nfev=30).x)[0]


def held_out(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The rows to fit to, and those to judge the fit by."""
    return [row for i, row in enumerate(rows) if i % HELD_OUT], list(rows[::HELD_OUT])


def summary(rows: Sequence[Mapping[str, Any]], rates: Rates) -> str:
    """A line for each function: calls, how many of their plans are behind, the mean and the worst regret."""
    lines = []
    for function in CALLS:
        some = [row for row in rows if row["function"] == function]
        if some:
            of_rows = [regret(row, rates) for row in some]
            behind = sum(is_behind(row, rates) for row in some)
            mean = statistics.geometric_mean(of_rows)
            lines.append(f"{function:26} {len(some):4} calls  {behind:3} behind  {mean:.3f}  worst {max(of_rows):.2f}")
    return "\n".join(lines)


def row_of(rates: Rates) -> str:
    """The arguments of Rates, as they stand in plans.py, to three digits."""
    values = {field.name: getattr(rates, field.name) for field in dataclasses.fields(rates)}
    return "".join(
        f"    {name}={float(f'{value:.3g}') if isinstance(value, float) else value},\n"
        for name, value in values.items()
    )


def put_into(source: str, name: str, rates: Rates) -> str:
    """The source of plans.py with other rates in ``name = Rates(...)``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            lines = source.splitlines(keepends=True)
            lines[node.lineno - 1 : node.end_lineno] = [f"{name} = Rates(\n{row_of(rates)})\n"]
            return "".join(lines)
    raise ValueError(f"no {name} = Rates(...)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="results file (default: that of this processor's instruction set)")
    parser.add_argument("--function", nargs="+", choices=CALLS, default=list(CALLS), help="only the plans of these")
    parser.add_argument("--seconds", type=float, default=SECONDS_PER_CALL, help="for each call (default: %(default)s)")
    parser.add_argument("--summary", action="store_true", help="print how good the choices of plans.py are")
    parser.add_argument("--fit", action="store_true", help="fit the rates, and print how good their choices are")
    parser.add_argument("--write", action="store_true", help="fit the rates, and put them into plans.py")
    args = parser.parse_args()
    if not cpu.available():
        parser.error("the compiled kernels, whose plans are timed, do not run: see `phydi-kernels info`")
    path = args.file or RESULTS / f"plan_costs_{cpu.isa()}.json"
    if not (args.summary or args.fit or args.write):
        torch.set_num_threads(1)
        rows = []
        with torch.no_grad():
            for function in args.function:
                for call in drawn(function, CALLS[function]):
                    rows.append(measure(call, args.seconds))
                    times = "  ".join(f"{name} {1e3 * s:.3f}" for name, s in rows[-1]["seconds"].items())
                    print(function, *rows[-1]["sizes"], "ms", times, flush=True)
        facts = report.machine(torch.device("cpu"))
        report.save({"machine": facts, "rows": [{**row, "threads": 1} for row in rows]}, path)
        return
    recorded = json.loads(path.read_text(encoding="utf-8"))
    isa = recorded["machine"]["instruction_set"]
    rows = [row for row in recorded["rows"] if row["function"] in args.function]
    print(report.machine_line(recorded), summary(rows, plans.RATES[isa]), sep="\n")
    if args.fit or args.write:
        rest, judged = held_out(rows)
        print(f"\nfitted to {len(rest)} calls, the other {len(judged)} before and after:")
        found = fit(rest, plans.RATES[isa])
        print(summary(judged, plans.RATES[isa]), summary(judged, found), f"\nall:\n{summary(rows, found)}", sep="\n")
        print(row_of(found))
        if args.write:
            source = Path(plans.__file__)
            replaced = put_into(source.read_text(encoding="utf-8"), f"_{isa.upper()}", found)
            source.write_text(replaced, encoding="utf-8")


if __name__ == "__main__":
    main()
