"""The table of a benchmark run. ``python benchmarks/report.py [FILE]`` prints it again from a results file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import phydi_kernels
from phydi_kernels.kernels import cpu

RESULTS = Path(__file__).resolve().parent / "results" / "cpu.json"
PLANS = ("stream", "mix", "panel")
HEADER = (
    "layer, n = 4",
    "pass",
    "dtype",
    "threads",
    "dense ms",
    "ours ms",
    "ours/dense",
    "quartiles",
    "asked",
    "published/dense",
    *PLANS,
)
LEFT_ALIGNED = ("layer, n = 4", "pass", "dtype", "asked")


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians of the rounds. A ratio or a difference is formed inside each round, its median taken after."""
    dense = times["dense"]
    ratios = {name: sorted(t / d for t, d in zip(times[name], dense, strict=True)) for name in times if name != "dense"}
    low, _, high = statistics.quantiles(ratios["ours"], n=4, method="inclusive")
    return {
        "rounds": len(dense),
        "median_seconds": {name: statistics.median(t) for name, t in times.items()},
        "ratio": {name: statistics.median(r) for name, r in ratios.items()},
        "ours_quartiles": [low, high],
        "extra_seconds": statistics.median(o - d for o, d in zip(times["ours"], dense, strict=True)),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set": torch.ops.phydi_cpu.isa() if cpu.available() else "no compiled library",
        "torch": torch.__version__,
        "phydi_kernels": phydi_kernels.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if device.type != "cpu":
        facts["device"] = torch.get_device_module(device).get_device_name(device)
    return facts


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def text(results: Mapping[str, Any]) -> str:
    """The machine line and the table."""
    rows = results["rows"]
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align = [str.ljust if name in LEFT_ALIGNED else str.rjust for name in HEADER]
    aligned = ["  ".join(fit(cell, w) for fit, cell, w in zip(align, row, widths, strict=True)) for row in cells]
    return "\n".join([_machine_line(results), *(row.rstrip() for row in aligned)])


def markdown(results: Mapping[str, Any]) -> str:
    """The README's table: times over the dense layer's at one thread, and the machine line."""
    rows = [row for row in results["rows"] if row["threads"] == 1]
    rows.sort(key=lambda row: row["layer"].startswith("conv"))
    lines = ["| layer, n = 4 | pass | dtype | ours / dense | published / dense |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = row["ratio"]
        cells = (row["layer"], row["pass"], row["dtype"], f"**{ratio['ours']:.2f}**", f"{ratio['published']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _machine_line({**results, "rows": rows})])


def _machine_line(results: Mapping[str, Any]) -> str:
    facts, threads = results["machine"], sorted({row["threads"] for row in results["rows"]})
    return " | ".join(
        [
            *([facts["device"]] if "device" in facts else []),
            facts["processor"],
            f"{facts['cores']} cores",
            facts["instruction_set"],
            f"torch {facts['torch']}",
            f"threads {', '.join(map(str, threads))}",
            facts["date"],
        ]
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    ratio, seconds = row["ratio"], row["median_seconds"]
    low, high = row["ours_quartiles"]
    return (
        row["layer"],
        row["pass"],
        row["dtype"],
        str(row["threads"]),
        f"{1e3 * seconds['dense']:.4f}",
        f"{1e3 * seconds['ours']:.4f}",
        f"{ratio['ours']:.2f}",
        f"{low:.2f}-{high:.2f}",
        _asked(row),
        f"{ratio['published']:.2f}",
        *(f"{ratio[plan]:.2f}" if plan in ratio else "" for plan in PLANS),
    )


def _asked(row: Mapping[str, Any]) -> str:
    if "ratio" in row["asked"]:
        limit = row["asked"]["ratio"]
        return f"<= {limit:.2f} {_verdict(row['ratio']['ours'] <= limit)}"
    if "extra_seconds" in row["asked"]:
        limit, extra = 1e6 * row["asked"]["extra_seconds"], 1e6 * row["extra_seconds"]
        return f"<= +{limit:.0f} us, is {extra:+.1f} {_verdict(extra <= limit)}"
    return ""


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def save(results: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS, help="results file (default: results/cpu.json)")
    parser.add_argument("--markdown", action="store_true", help="the README's table")
    args = parser.parse_args()
    print((markdown if args.markdown else text)(json.loads(args.file.read_text(encoding="utf-8"))))
