"""The README's chart: time over nn.Linear's against the batch, from the grid. ``python benchmarks/chart.py [FILE]``."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report
from grid import DTYPES, PUBLISHED_FEATURES, PUBLISHED_N, RESULTS
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHART = Path(__file__).resolve().parent.parent / "docs" / "speed.png"
# Okabe and Ito's colours, told apart with any colour vision; the markers tell them apart in grey.
OURS = {2: ("#0072B2", "s"), 4: ("#D55E00", "o"), 8: ("#009E73", "^")}
OTHERS = {"published": ("#444444", "D"), "compiled": ("#808080", "v")}
LABELS = {"published": f"published,\nn = {PUBLISHED_N}", "compiled": "published,\ntorch.compile"}
TICKS = (0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)


def figure(results: Mapping[str, Any]) -> Figure:
    """A panel for each dtype: ours for each n, the published layer plain and compiled, nn.Linear and the limits."""
    rows = [row for row in results["rows"] if row["threads"] == 1 and row["features"] == PUBLISHED_FEATURES]
    fig = Figure(figsize=(10.5, 5.4), layout="constrained")
    panels = fig.subplots(1, len(DTYPES), sharey=True)
    for ax, dtype in zip(panels, DTYPES, strict=True):
        _panel(ax, [row for row in rows if row["dtype"] == dtype])
        ax.set_title(dtype, loc="left", fontsize=11)
    # Room for the name above the highest point.
    panels[0].set_ylim(top=1.6 * panels[0].get_ylim()[1])
    panels[0].set_ylabel("time / time of nn.Linear")
    fig.suptitle(
        f"{PUBLISHED_FEATURES}x{PUBLISHED_FEATURES} layer, inference, one thread: below 1 is faster than nn.Linear",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    fig.text(0.005, -0.03, report.machine_line({**results, "rows": rows}), fontsize=8, color="#555555")
    return fig


def _panel(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    last = max(row["batch"] for row in rows)
    ends = [(1.0, "nn.Linear", "black")]
    ax.axhline(1, color="black", linewidth=1.2)
    for name, (color, marker) in OTHERS.items():
        points = [(row["batch"], row["ratio"][name]) for row in rows if name in row["ratio"]]
        ax.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.2)
        # These two end at nn.Linear's line: named where they begin.
        ax.annotate(LABELS[name], points[0], (8, 6), textcoords="offset points", color=color, fontsize=9, linespacing=1)
    for n, (color, marker) in OURS.items():
        some = [row for row in rows if row["n"] == n]
        points = [(row["batch"], row["ratio"]["ours"]) for row in some]
        limit = some[0]["rank"] / n**2
        ax.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, linewidth=1.8)
        ax.axhline(limit, color=color, linestyle=(0, (4, 3)), linewidth=1)
        ends.append((points[-1][1], f"ours, n = {n}", color))
        ends.append((limit, f"R/n² = {some[0]['rank']}/{n**2}", color))
    for place, (_, label, color) in zip(_apart([end[0] for end in ends]), ends, strict=True):
        ax.text(last * 1.25, place, label, color=color, fontsize=9, va="center", clip_on=False)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlim(0.85, last * 1.15)
    ax.set_xticks([4**k for k in range(7)], [str(4**k) for k in range(7)])
    ax.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    ax.minorticks_off()
    ax.set_xlabel("batch size")
    ax.grid(color="#e5e5e5", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)


def _apart(values: Sequence[float], factor: float = 1.16) -> list[float]:
    """Places for labels on a logarithmic axis, each at least ``factor`` above the one below, close to their values.

    Labels that would meet form a group, whose mean stays where it was (pooling of adjacent violators).
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[float]] = []
    for rank, index in enumerate(order):
        groups.append([math.log(values[index], factor) - rank])
        while len(groups) > 1 and statistics.mean(groups[-2]) > statistics.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    levels = [statistics.mean(group) for group in groups for _ in group]
    places = {index: factor ** (level + rank) for rank, (index, level) in enumerate(zip(order, levels, strict=True))}
    return [places[index] for index in range(len(values))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS, help="results file (default: results/grid.json)")
    parser.add_argument("--output", type=Path, default=CHART, help="image to write (default: docs/speed.png)")
    args = parser.parse_args()
    figure(json.loads(args.file.read_text(encoding="utf-8"))).savefig(args.output, dpi=130, bbox_inches="tight")
