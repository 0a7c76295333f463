"""The command that fits the rates of plans.py: what it times, what it fits, and what it recorded."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from phydi_kernels import plans
from phydi_kernels.plans import Plan

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
FUNCTIONS = (
    "phm_linear",
    "phm_linear_weight_grad",
    "phm_linear_factored",
    "phm_linear_factored_grad",
    "phc_conv",
    "phc_conv_weight_grad",
    "phc_conv_factored",
    "phc_conv_factored_grad",
)


@pytest.fixture(scope="module")
def plan_costs() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        import plan_costs

        return plan_costs


def test_every_plan_function_is_timed(plan_costs):
    chosen = {name.removesuffix("_costs") for name in vars(plans) if name.endswith("_costs") and name[0] != "_"}
    assert chosen == set(FUNCTIONS) == plan_costs.CALLS.keys()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_calls_are_the_same_at_each_run(function, plan_costs):
    calls = list(plan_costs.drawn(function, 40))
    assert calls == list(plan_costs.drawn(function, 40))
    assert len(set(calls)) == 40
    assert {call.dtype for call in calls} == {"float32", "bfloat16"}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_plan_of_a_call_is_timed(function, plan_costs):
    chosen = getattr(plans, function)
    for call in plan_costs.drawn(function, 3):
        row = plan_costs.measure(call, seconds=0.0)
        *sizes, rates = *row["sizes"], plans.RATES["avx2"]
        assert row["seconds"].keys() == {plan.name.lower() for plan in plan_costs.costs(function, sizes, rates)}
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert getattr(plans, function) is chosen
        assert isinstance(chosen(*sizes), Plan)


@pytest.mark.usefixtures("library")
def test_plans_are_forced_on_the_operator(plan_costs, monkeypatch):
    """Those that disagree are found out, which they can only be where each of them runs."""
    (call,) = plan_costs.drawn("phm_linear", 1)
    from phydi_kernels.kernels import cpu

    asked, correct = [], cpu.phm_linear

    def wrong_by_panel(*arguments):
        asked.append(arguments[-1])
        y = correct(*arguments)
        return 1.5 * y if arguments[-1] is Plan.PANEL else y

    monkeypatch.setattr(cpu, "phm_linear", wrong_by_panel)
    with pytest.raises(AssertionError, match="panel is off by 5.0e-01"):
        plan_costs.measure(call, seconds=0.0)
    assert Plan.PANEL in asked and Plan.MIX in asked


def _rows(plan_costs, rates, count):
    """Times as ``rates`` have them, for sizes of linear layers."""
    rng = random.Random(0)
    for _ in range(count):
        n, p, q, rows = rng.choice((2, 4, 8)), *(round(2 ** rng.uniform(3, 9)) for _ in range(3))
        sizes = [rows, n, n, n, p, q, rng.random() < 0.5, False]
        costs = plan_costs.costs("phm_linear", sizes, rates)
        seconds = {plan.name.lower(): 1e-9 * (ns + 5000) for plan, ns in costs.items()}
        yield {"function": "phm_linear", "sizes": sizes, "seconds": seconds}


def test_fit_finds_the_rates_behind_the_times(plan_costs):
    start = plans.RATES["avx2"]
    true = dataclasses.replace(start, product=1.5 * start.product, form=0.5 * start.form, mix=2 * start.mix)
    rows = list(_rows(plan_costs, true, 80))
    assert any(plan_costs.regret(row, start) > 1.15 for row in rows)
    found = plan_costs.fit(rows, start)
    for name in ("product", "form", "mix", "form_transposed"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.2)
    # No row depends on them.
    for name in ("conv_product", "bfloat16_product", "lanes", "stream_rows"):
        assert getattr(found, name) == pytest.approx(getattr(start, name), rel=1e-6)
    assert max(plan_costs.regret(row, found) for row in rows) < 1.05


def test_rates_are_put_into_the_source(plan_costs):
    source = Path(plans.__file__).read_text()
    rates = dataclasses.replace(plans.RATES["avx2"], product=0.123, mixed_calls=123456.0, lanes=5)
    replaced: dict = {"__name__": "replaced"}
    sys.modules["replaced"] = ModuleType("replaced")
    try:
        exec(compile(plan_costs.put_into(source, "_AVX2", rates), "plans.py", "exec"), replaced)
    finally:
        del sys.modules["replaced"]
    found, other = replaced["_AVX2"], replaced["_AVX512_BF16"]
    assert dataclasses.asdict(other) == dataclasses.asdict(plans.RATES["avx512_bf16"])
    for name, value in dataclasses.asdict(rates).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.005)
    assert found.lanes == 5 and found.product == 0.123
    with pytest.raises(ValueError, match="no _NEON = Rates"):
        plan_costs.put_into(source, "_NEON", rates)


@pytest.mark.parametrize("isa", ("avx2", "avx512"))
def test_choices_lose_little_on_the_recorded_times(isa, plan_costs):
    """Of random shapes, many of them small, one choice in eight may be behind; the grid's are held one by one."""
    recorded = json.loads((plan_costs.RESULTS / f"plan_costs_{isa}.json").read_text())
    assert recorded["machine"]["instruction_set"] == isa
    assert Counter(row["function"] for row in recorded["rows"]) == plan_costs.CALLS
    rates = plans.RATES[isa]
    for function in FUNCTIONS:
        rows = [row for row in recorded["rows"] if row["function"] == function]
        regrets = [plan_costs.regret(row, rates) for row in rows]
        assert statistics.geometric_mean(regrets) < 1.05, function
        assert sum(plan_costs.is_behind(row, rates) for row in rows) <= len(rows) / 8, function
        assert max(regrets) < 2.25, function
