"""The grid: rank-R linear layers of 256 to 4096 features against nn.Linear, for batches from 1 to 4096 and each plan.

``python benchmarks/grid.py`` measures it, in about a quarter of an hour, and writes results/grid.json;
results/grid_avx512.json and, to batch 128, results/grid_avx2.json are other machines'. ``--summary`` prints what stands
out in them or in ``--file``, ``--markdown`` the README's tables, ``--write README.md`` puts them there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from layers import PublishedLayer, dense_linear, structure_tensor
from rivals import Rival, check_results, forward, paired_times, shortest_of_first_calls
from torch import Tensor, nn

from phydi_kernels import optimize_for_inference, plans
from phydi_kernels.demo.layer_times import kronecker_sum
from phydi_kernels.kernels import cpu
from phydi_kernels.nn import PHMLinear
from phydi_kernels.nn.factored import FactoredPHMLinear
from phydi_kernels.plans import LINEAR_PLANS, Plan

RESULTS = Path(__file__).resolve().parent / "results" / "grid.json"
RECORDED = (RESULTS, RESULTS.with_name("grid_avx512.json"), RESULTS.with_name("grid_avx2.json"))
TERMS = (2, 4, 8)
FEATURES = (256, 512, 1024, 2048, 4096)
BATCHES = tuple(2**k for k in range(13))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# With two threads: a part, and no plan forced.
TWO_THREADS = {"n": (4,), "features": (1024, 4096), "batch": (1, 8, 64, 512, 4096)}
# Where the published layers run as well, for the chart.
PUBLISHED_N, PUBLISHED_FEATURES = 4, 1024
SECONDS_PER_POINT = 0.4
MIN_ROUNDS = 3
CHECKED_ROWS = 64
# Stream reads the rows anew for each of F's; plans.py never takes it beyond these.
STREAM_ROWS, STREAM_ENTRIES = 64, 1 << 18
# A plan that takes this many times the best one in its first calls takes no further part.
HOPELESS = 2.0
PROBES = 3
# How far the plan that plans.py chooses may be behind the best: this factor, or what a call from Python varies by.
ALLOWED = 1.15
ALLOWED_SECONDS = 2e-6


def chosen_plan(row: Mapping[str, Any], prepacked: bool, isa: str) -> str:
    """The plan of :mod:`phydi_kernels.plans` for a row, measured with the instruction set ``isa``."""
    n, rank, block = row["n"], row["rank"], row["features"] // row["n"]
    terms = rank if prepacked else n
    plan = plans.phm_linear_factored(
        row["batch"],
        terms,
        n,
        n,
        block,
        block,
        rank,
        contiguous=not prepacked and n * block**2 * DTYPES[row["dtype"]].itemsize >= plans.NEAR_BYTES,
        combines=not prepacked,
        bfloat16=row["dtype"] == "bfloat16",
        isa=isa,
    )
    return plan.name.lower()


def plan_ratios(row: Mapping[str, Any], prepacked: bool) -> dict[str, float]:
    """Time over the dense layer's for each plan measured."""
    prefix = "prepacked " if prepacked else ""
    names = {plan.name.lower(): f"{prefix}{plan.name.lower()}" for plan in LINEAR_PLANS}
    return {plan: row["ratio"][name] for plan, name in names.items() if name in row["ratio"]}


def regret(row: Mapping[str, Any], prepacked: bool, isa: str) -> float:
    """The time of the chosen plan over that of the best one."""
    ratios = plan_ratios(row, prepacked)
    return ratios[chosen_plan(row, prepacked, isa)] / min(ratios.values())


def is_behind(row: Mapping[str, Any], prepacked: bool, isa: str) -> bool:
    """Whether the chosen plan takes longer than it may."""
    best = min(plan_ratios(row, prepacked).values())
    behind = regret(row, prepacked, isa)
    return behind > ALLOWED and (behind - 1) * best * row["dense_seconds"] > ALLOWED_SECONDS


class Case:
    """The layers of one n, width and dtype."""

    def __init__(self, n: int, features: int, dtype: str) -> None:
        self.n, self.features, self.dtype = n, features, dtype
        layer = PHMLinear(features, features, n, init=structure_tensor(n), dtype=DTYPES[dtype]).eval()
        options = {"progress": False, "verbose": False}
        self.ours = optimize_for_inference(layer, **options)
        self.prepacked = optimize_for_inference(layer, prepack=True, **options)
        self.H, self.bias = kronecker_sum(layer.A.double(), layer.F.double()).detach(), layer.bias.detach().double()
        self.dense = dense_linear(self.H, layer.bias)
        self.published = PublishedLayer(nn.functional.linear, layer.A, layer.F, layer.bias)

    def measure(self, batch: int, threads: int, seconds: float) -> dict[str, Any]:
        """Checks and times one point: ``ours``, ``prepacked`` and each plan of both, forced."""
        x = torch.randn(batch, self.features, dtype=DTYPES[self.dtype])
        layers: dict[str, nn.Module] = {"dense": self.dense, "ours": self.ours, "prepacked": self.prepacked}
        if (self.n, self.features, threads) == (PUBLISHED_N, PUBLISHED_FEATURES, 1):
            torch.compiler.reset()
            layers |= {"published": self.published, "compiled": torch.compile(self.published)}
        rivals = {name: forward(layer, x) for name, layer in layers.items()}
        if threads == 1:
            rivals |= self._plans("", self.ours, x) | self._plans("prepacked ", self.prepacked, x)
        self._check(rivals, x)
        once = shortest_of_first_calls(rivals, PROBES)
        fastest = min(once[name] for name in rivals if name not in layers) if threads == 1 else 0.0
        left_out = {name for name in rivals if name not in layers and once[name] > HOPELESS * fastest}
        times, _ = paired_times({k: v for k, v in rivals.items() if k not in left_out}, x.device, seconds, MIN_ROUNDS)
        ratio = {
            name: statistics.median(t / d for t, d in zip(times[name], times["dense"], strict=True))
            for name in times
            if name != "dense"
        }
        dense_seconds = statistics.median(times["dense"])
        return {
            "n": self.n,
            "rank": self.ours.rank,
            "features": self.features,
            "batch": batch,
            "dtype": self.dtype,
            "threads": threads,
            "rounds": len(times["dense"]),
            "dense_seconds": dense_seconds,
            "ratio": ratio | {name: once[name] / dense_seconds for name in sorted(left_out)},
        }

    def _plans(self, prefix: str, layer: FactoredPHMLinear, x: Tensor) -> dict[str, Rival]:
        """The operator with its plan given, without the module around it."""
        cpu.available()  # loads the library
        *tensors, _ = layer._tensors()

        def rival(plan: Plan) -> Rival:
            arguments = (x, *tensors, None, None, "none", plan)
            return Rival(lambda: (cpu.phm_linear_factored(*arguments),))

        streams = len(x) <= STREAM_ROWS or len(x) * self.n * self.features <= STREAM_ENTRIES
        chosen = [plan for plan in LINEAR_PLANS if plan is not Plan.STREAM or streams]
        return {prefix + plan.name.lower(): rival(plan) for plan in chosen}

    def _check(self, rivals: Mapping[str, Rival], x: Tensor) -> None:
        """Some rows of each result against float64; all entries must be finite."""
        rows = torch.linspace(0, len(x) - 1, min(len(x), CHECKED_ROWS)).round().long()
        expected = {"output": nn.functional.linear(x[rows].double(), self.H, self.bias)}

        for name, rival in rivals.items():
            (result,) = rival.call()
            assert result.isfinite().all(), f"{name}: the output is not finite"
            check_results(name, Rival(lambda some=result[rows]: (some,)), expected, self.features)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dtype, features, n in itertools.product(args.dtype, args.features, args.n):
        case = Case(n, features, dtype)
        for batch in args.batch:
            for threads in (1, 2):
                point = {"n": n, "features": features, "batch": batch}
                if threads == 1 or all(point[key] in values for key, values in TWO_THREADS.items()):
                    torch.set_num_threads(threads)
                    yield case.measure(batch, threads, args.seconds)


def line(row: Mapping[str, Any]) -> str:
    ratios = "  ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items())
    return (
        f"{row['dtype']:8}  n={row['n']}  {row['features']:>4}  B={row['batch']:<4}  threads {row['threads']}  "
        f"{1e3 * row['dense_seconds']:>9.4f} ms  {ratios}"
    )


def ranges(rows: Sequence[Mapping[str, Any]]) -> str:
    """From the best to the worst ratio."""
    found = sorted(row["ratio"]["ours"] for row in rows)
    return f"{found[0]:.2f} to {found[-1]:.2f}" if found else ""


def markdown(results: Mapping[str, Any]) -> str:
    """The README's table: the range of ours/dense, at one thread."""
    rows = [row for row in results["rows"] if row["threads"] == 1]
    title = f"ours / nn.Linear, batch 1 to {max(row['batch'] for row in rows)}, {results['machine']['instruction_set']}"
    lines = [f"| {title} | float32 | bfloat16 |", "|---|--:|--:|"]
    for n in sorted({row["n"] for row in rows}):
        for name, wide in (("1024 features and more", True), ("256 and 512 features", False)):
            some = [row for row in rows if row["n"] == n and (row["features"] >= 1024) is wide]
            cells = [ranges([row for row in some if row["dtype"] == dtype]) for dtype in DTYPES]
            lines.append(f"| n = {n}, R = {some[0]['rank']}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(results: Mapping[str, Any]) -> str:
    """Points that are slower than they should be: than dense, with two threads than with one, than the best plan."""
    alone = {_key(row): row for row in results["rows"] if row["threads"] == 1}
    lines, isa = [report.machine_line(results)], results["machine"]["instruction_set"]
    for row in results["rows"]:
        limit = 1.0 if row["features"] >= 1024 else 1.3
        if row["ratio"]["ours"] > limit:
            lines.append(f"above {limit} of nn.Linear: {line(row)}")
        if row["threads"] > 1 and row["ratio"]["ours"] > alone[_key(row)]["ratio"]["ours"] + 0.1:
            lines.append(f"{alone[_key(row)]['ratio']['ours']:.2f} with one thread: {line(row)}")
    for row in alone.values():
        for prepacked in (False, True):
            if is_behind(row, prepacked, isa):
                plan = ("prepacked " if prepacked else "") + chosen_plan(row, prepacked, isa)
                lines.append(f"{plan} takes {regret(row, prepacked, isa):.2f} times the best plan: {line(row)}")
    return "\n".join(lines)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("dtype", "n", "features", "batch"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="results file (default: results/grid.json; to print, all recorded)")
    parser.add_argument("--summary", action="store_true", help="print what stands out in the results")
    parser.add_argument("--markdown", action="store_true", help="print the README's tables of the results")
    parser.add_argument("--write", type=Path, metavar="README", help="put the README's tables into this file")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS_PER_POINT, help="for each point (default: %(default)s)"
    )
    for name, values in (("n", TERMS), ("features", FEATURES), ("batch", BATCHES)):
        parser.add_argument(f"--{name}", type=int, nargs="+", choices=values, default=values, help="measure only these")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="measure only these")
    args = parser.parse_args()
    if args.summary or args.markdown or args.write:
        recorded = [json.loads(path.read_text(encoding="utf-8")) for path in ([args.file] if args.file else RECORDED)]
        printed = "\n\n".join(map(summary if args.summary else markdown, recorded))
        if args.write:
            report.write_into(args.write, "python benchmarks/grid.py --markdown", printed)
        else:
            print(printed)
        return
    rows = []
    with torch.no_grad():
        for row in measure(args):
            print(line(row), flush=True)
            rows.append(row)
    report.save({"machine": report.machine(torch.device("cpu")), "rows": rows}, args.file or RESULTS)


if __name__ == "__main__":
    main()
