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
DISCRIMINANT = RESULTS.with_name("gda_cpu.json")
TRAINING = RESULTS.with_name("training_cpu.json")
ADAPTERS = RESULTS.with_name("adapters_cpu.json")
# Columns of further rivals, as ratios to the dense layer; rows without one of them have an empty cell.
RIVALS = ("published", "prepacked", "learned A", "dense folded", "stream", "mix", "panel")
HEADER = (
    "layer",
    "n",
    "algebra",
    "pass",
    "dtype",
    "threads",
    "dense ms",
    "ours ms",
    "ours/dense",
    "quartiles",
    "asked",
    *RIVALS,
)
LEFT_ALIGNED = ("layer", "algebra", "pass", "dtype", "asked")
# The README's tables: a row for each layer, n and algebra, whose cells are ratios at one thread.
DTYPES = ("float32", "bfloat16")
PASSES = {"forward": "Inference", "forward+backward": "Training step"}
KINDS = ("linear", "conv2d", "PHResNet18")


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


def speedup(ours: Sequence[float], rival: Sequence[float]) -> dict[str, Any]:
    """Medians of the rounds. How many times faster ours is, is formed inside each round, its median taken after."""
    ratios = [r / o for o, r in zip(ours, rival, strict=True)]
    return {
        "rounds": len(ours),
        "median_seconds": {"ours": statistics.median(ours), "rival": statistics.median(rival)},
        "faster": statistics.median(ratios),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set": cpu.isa() if cpu.available() else "no compiled library",
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
    return "\n".join([machine_line(results), *(row.rstrip() for row in aligned)])


def speedup_text(results: Mapping[str, Any]) -> str:
    """The machine line and the table of the discriminant analysis."""
    cells = [("case", "against", "threads", "rival ms", "ours ms", "faster", "asked")]
    for row in results["rows"]:
        seconds, asked = row["median_seconds"], row["asked"]
        verdict = "" if asked is None else f">= {asked:g} {_verdict(row['faster'] >= asked)}"
        times = (f"{1e3 * seconds['rival']:.1f}", f"{1e3 * seconds['ours']:.1f}", f"{row['faster']:.2f}x")
        cells.append((row["case"], row["against"], str(row["threads"]), *times, verdict))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([machine_line(results), *lines])


def markdown(results: Mapping[str, Any]) -> str:
    """The README's tables: times over the dense layer's at one thread, and the machine line."""
    single = [row for row in results["rows"] if row["threads"] == 1]

    def tables(factored: bool) -> list[str]:
        some = [row for row in single if (row["rank"] is not None) is factored]
        return [_pivot([row for row in some if row["pass"] == name], title) for name, title in PASSES.items()]

    details = ["<details><summary>Layers that learn A, as they are</summary>", *tables(False), "</details>"]
    return "\n\n".join([*tables(True), *details, machine_line({**results, "rows": single})])


def training_markdown(results: Mapping[str, Any]) -> str:
    """The README's table of whole networks: times over the dense network's at one thread."""
    single = [row for row in results["rows"] if row["threads"] == 1]
    rivals = ("ours", "learned A", "published")
    lines = [f"| {PASSES['forward+backward']} | n | algebra | {' | '.join(rivals)} |", "|---|---|---|" + "--:|" * 3]
    for row in single:
        if row["pass"] == "forward+backward":
            ratios = [f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "" for name in rivals]
            cells = (row["layer"], str(row["n"]), _algebra(row), f"**{ratios[0]}**", *ratios[1:])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", machine_line({**results, "rows": single})])


def adapters_markdown(results: Mapping[str, Any]) -> str:
    """The README's table of adapter layers: times over those of the dense layer at one thread, pass by pass."""
    single = [row for row in results["rows"] if row["threads"] == 1]
    by_layer: dict[str, dict[str, Mapping[str, float]]] = {}
    for row in single:
        by_layer.setdefault(row["layer"], {})[row["pass"]] = row["ratio"]
    titles = [f"{title}, {who}" for title in PASSES.values() for who in ("ours", "the library")]
    lines = [f"| Adapter | {' | '.join(titles)} |", "|---|" + "--:|" * len(titles)]
    for layer, ratios in by_layer.items():
        cells = [f"**{ratios[name]['ours']:.2f}** | {ratios[name]['published']:.2f}" for name in PASSES]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", machine_line({**results, "rows": single})])


def speedup_markdown(results: Mapping[str, Any]) -> str:
    """The README's table of the discriminant analysis, at one thread, and the machine line."""
    single = [row for row in results["rows"] if row["threads"] == 1]
    lines = ["| ours | against | times faster |", "|---|---|--:|"]
    lines += [
        f"| {row['case']} | {row['against']} | **{row['faster']:.{1 if row['faster'] >= 2 else 2}f}** |"
        for row in single
    ]
    return "\n".join([*lines, "", machine_line({**results, "rows": single})])


def _pivot(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """A table with the dtypes side by side, convolutions after linear layers, networks last."""
    groups: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: KINDS.index(row["layer"].split()[0])):
        groups.setdefault((row["layer"], str(row["n"]), _algebra(row)), {})[row["dtype"]] = row
    columns = [f"ours, {dtype}" for dtype in DTYPES] + [f"published, {dtype}" for dtype in DTYPES]
    lines = [f"| {title} | n | algebra | {' | '.join(columns)} |", "|---|---|---|" + "--:|" * len(columns)]
    for key, by_dtype in groups.items():
        ratios = [by_dtype[dtype]["ratio"] if dtype in by_dtype else {} for dtype in DTYPES]
        ours = [f"**{ratio['ours']:.2f}**" if ratio else "" for ratio in ratios]
        published = [f"{ratio['published']:.2f}" if "published" in ratio else "" for ratio in ratios]
        lines.append(f"| {' | '.join([*key, *ours, *published])} |")
    return "\n".join(lines)


def _algebra(row: Mapping[str, Any]) -> str:
    return "A" if row["rank"] is None else f"R = {row['rank']}"


def machine_line(results: Mapping[str, Any]) -> str:
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
        "" if row["n"] is None else str(row["n"]),
        "" if row["n"] is None else _algebra(row),
        row["pass"],
        row["dtype"],
        str(row["threads"]),
        f"{1e3 * seconds['dense']:.4f}",
        f"{1e3 * seconds['ours']:.4f}",
        f"{ratio['ours']:.2f}",
        f"{low:.2f}-{high:.2f}",
        _asked(row),
        *(f"{ratio[name]:.2f}" if name in ratio else "" for name in RIVALS),
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


def write_into(readme: Path, command: str, markdown: str) -> None:
    """Puts what ``command`` prints between the marks that name it."""
    begin, end = f"<!-- {command} -->\n", "<!-- end -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{readme} has no lines {begin.strip()!r} and {end!r}")
    readme.write_text(f"{before}{begin}{markdown}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="results file (default: results/cpu.json)")
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--discriminant", action="store_true", help="the discriminant analysis (results/gda_cpu.json)")
    tables.add_argument("--training", action="store_true", help="whole networks (results/training_cpu.json)")
    tables.add_argument("--adapters", action="store_true", help="adapter layers (results/adapters_cpu.json)")
    parser.add_argument("--markdown", action="store_true", help="the README's tables")
    parser.add_argument("--write", type=Path, metavar="README", help="put the README's tables into this file")
    args = parser.parse_args()
    if args.discriminant:
        option, path, as_text, as_markdown = "--discriminant ", DISCRIMINANT, speedup_text, speedup_markdown
    elif args.training:
        option, path, as_text, as_markdown = "--training ", TRAINING, text, training_markdown
    elif args.adapters:
        option, path, as_text, as_markdown = "--adapters ", ADAPTERS, text, adapters_markdown
    else:
        option, path, as_text, as_markdown = "", RESULTS, text, markdown
    found = json.loads((args.file or path).read_text(encoding="utf-8"))
    if args.write:
        write_into(args.write, f"python benchmarks/report.py {option}--markdown", as_markdown(found))
    else:
        print((as_markdown if args.markdown else as_text)(found))
