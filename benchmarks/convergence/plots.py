"""Plots of the experiments' figures, in the paper's style: ``python benchmarks/convergence/plots.py``.

Reads what images.py, text.py and gradient_norms.py have written to benchmarks/results, and writes a PNG beside each:

* convergence_text.png, convergence_text_reference.png: Fig. 4, epochs to the perplexity against depth, for each n.
* convergence_images.png: Fig. 1, validation accuracy against epochs, for each depth and n of Table 1.
* convergence_alphas.png: how alpha grows in each layer of the deepest PHYDI models.
* gradient_norms.png: gradients in each layer before the first step.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import text
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from runs import mean_and_error

from phydi_kernels.demo.report import STYLES
from phydi_kernels.demo.training import TARGET_ACCURACY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DATA_NAMES = {
    "pydoc": "Python's documentation topics",
    "wikitext2": "WikiText-2",
    "digits": "scikit-learn's digits",
    "mnist5k": "5,000 images of MNIST",
    "cifar10": "CIFAR-10",
}
NORM_STYLES: dict[str, dict[str, Any]] = {
    "post": {**STYLES["standard"], "label": "PostNorm"},
    "pre": {**STYLES["wkp"], "label": "PreNorm"},
    "phydi": STYLES["phydi"],
}
INIT_STYLES: dict[str, dict[str, Any]] = {
    **STYLES,
    "fixup": {"label": "Fixup", "color": "#CC79A7", "linestyle": ":", "marker": "v"},
}
GREY = "0.35"


def text_figure(results: Mapping[str, Any]) -> Figure:
    """Epochs to the threshold against depth, a panel for each n, a curve for each normalisation.

    Error bars are standard errors over seeds. Runs that did not reach the threshold are above a line at the cap, one
    mark a seed; diverged ones are crosses.
    """
    groups = text.groups(results)
    ns, depths = sorted({n for n, _ in groups}), sorted({depth for _, depth in groups})
    cap = results["settings"]["epochs"]
    figure = Figure(figsize=(4.2 * len(ns), 4.3), layout="constrained")
    panels = figure.subplots(1, len(ns), sharey=True, squeeze=False)[0]
    # A band above the cap has a line for each normalisation, so that marks do not hide each other.
    levels = {norm: cap * (1.06 + 0.06 * index) for index, norm in enumerate(text.NORMS)}
    top = cap * 1.32
    for n, panel in zip(ns, panels, strict=True):
        for norm, style in NORM_STYLES.items():
            _depth_curve(panel, [(d, groups[n, d][norm]) for d in depths if norm in groups.get((n, d), {})], style)
            for depth in depths:
                rows = groups.get((n, depth), {}).get(norm, [])
                _missed(panel, depth, levels[norm], [row["status"] for row in rows], style)
        panel.axhspan(cap, top, color="0.93", zorder=0)
        panel.set_title(f"n = {n}", fontsize=12)
        panel.set_xlabel("encoder layers", fontsize=12)
        panel.set_xscale("log", base=2)
        panel.set_xticks(depths, [str(depth) for depth in depths])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlim(depths[0] / 1.2, depths[-1] * 1.2)
        panel.set_ylim(0, top)
        panel.set_yticks(_ticks(cap))
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
        panel.text(0.02, cap * 1.23, f"not reached in {cap} epochs", transform=panel.get_yaxis_transform(), color=GREY)
    panels[0].set_ylabel(f"epochs to a perplexity of {results['settings']['threshold']:g}", fontsize=12)
    diverged = any(row["status"] == "diverged" for row in results["rows"])
    _legend(figure, NORM_STYLES.values(), ["diverged"] if diverged else [])
    settings = results["settings"]
    figure.suptitle(
        f"PH language models on {DATA_NAMES[settings['data']]}, {settings['d_model']} features, "
        f'init "{settings["init"]}", mean and standard error of {results["seeds"]} seeds',
        fontsize=13,
    )
    return figure


def _ticks(cap: int) -> list[float]:
    step = next(step for step in (0.5, 1, 2, 5, 10, 20) if cap / step <= 10)
    return [step * i for i in range(int(cap / step) + 1)]


def _depth_curve(panel: Axes, points: Sequence[tuple[int, Sequence[Mapping[str, Any]]]], style: dict[str, Any]) -> None:
    """Means of the seeds that reached the threshold, hollow where some did not, which interrupts the line."""
    reached = [
        (depth, [row["epoch"] for row in rows if row["status"] == "reached"], len(rows)) for depth, rows in points
    ]
    whole = [(depth, *mean_and_error(values)) for depth, values, count in reached if len(values) == count]
    partly = [(depth, *mean_and_error(values)) for depth, values, count in reached if 0 < len(values) < count]
    means = {depth: mean for depth, mean, _ in whole}
    panel.plot(
        [depth for depth, _, _ in reached],
        [means.get(depth, math.nan) for depth, _, _ in reached],
        color=style["color"],
        linestyle=style["linestyle"],
        linewidth=2,
    )
    for some, face in ((whole, style["color"]), (partly, "white")):
        for depth, mean, error in some:
            panel.errorbar(
                depth,
                mean,
                yerr=error or 0,
                color=style["color"],
                marker=style["marker"],
                markerfacecolor=face,
                markersize=6,
                capsize=3,
            )


def _missed(panel: Axes, depth: int, level: float, statuses: Sequence[str], style: dict[str, Any]) -> None:
    """A mark for each seed that did not reach the threshold, side by side at the height ``level``."""
    missed = [status for status in statuses if status != "reached"]
    for index, status in enumerate(missed):
        x = depth * 1.07 ** (index - (len(missed) - 1) / 2)
        marker = "x" if status == "diverged" else style["marker"]
        panel.plot(x, level, color=style["color"], marker=marker, markersize=5, markerfacecolor="white", linestyle="")


def _legend(figure: Figure, styles: Iterable[dict[str, Any]], crosses: Sequence[str] = ()) -> None:
    handles = [Line2D([], [], linewidth=2, markersize=6, **style) for style in styles]
    handles += [Line2D([], [], color=GREY, marker="x", linestyle="", label=label) for label in crosses]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=12)


def images_figure(results: Mapping[str, Any]) -> Figure:
    """Validation accuracy against epochs: a panel for each depth and n of Table 1, a curve for each initialisation.

    Thick: the mean over seeds, in which a run that has ended goes on with its last accuracy; thin: every seed.
    """
    rows = results["tables"]["1"]
    depths, ns = sorted({row["depth"] for row in rows}), sorted({row["n"] for row in rows})
    figure = Figure(figsize=(4.2 * len(ns), 2.9 * len(depths) + 1), layout="constrained")
    panels = figure.subplots(len(depths), len(ns), sharex="row", sharey=True, squeeze=False)
    for i, depth in enumerate(depths):
        for j, n in enumerate(ns):
            panel = panels[i][j]
            some = [row for row in rows if (row["depth"], row["n"]) == (depth, n)]
            for row in some:
                _accuracy_curve(panel, row)
            panel.axhline(TARGET_ACCURACY, color=GREY, linestyle=(0, (5, 3)), linewidth=1)
            panel.set_title(f"PHResNet{depth}, n = {n}" + ("" if some else ": not measured"), fontsize=11)
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.set_ylim(0, 1)
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
            panel.grid(color="0.9")
            if i == len(depths) - 1:
                panel.set_xlabel("training time (epochs)", fontsize=11)
        panels[i][0].set_ylabel("validation accuracy", fontsize=11)
        # Once all panels, which share it, have their curves: a limit on one side fixes the other.
        panels[i][0].set_xlim(left=0)
    _legend(figure, [INIT_STYLES[init] for init in INIT_STYLES if any(row["init"] == init for row in rows)])
    preset = results["preset"]
    figure.suptitle(
        f"PHResNets on {DATA_NAMES[preset['data']]}, width {preset['width']}\n"
        f"thick: mean over seeds, ended runs with their last accuracy; thin: each seed; dashed: the "
        f"{TARGET_ACCURACY:.0%} of M1",
        fontsize=12,
    )
    return figure


def _accuracy_curve(panel: Axes, row: Mapping[str, Any]) -> None:
    style = INIT_STYLES[row["init"]]
    curves = [(curve["epoch"], curve["validation_accuracy"]) for curve in row["curves"] if curve["epoch"]]
    for epochs, accuracies in curves:
        panel.plot(epochs, accuracies, color=style["color"], linewidth=0.7, alpha=0.45)
    epochs = max((epochs for epochs, _ in curves), key=len, default=[])
    filled = [accuracies + accuracies[-1:] * (len(epochs) - len(accuracies)) for _, accuracies in curves]
    means = [sum(accuracies) / len(accuracies) for accuracies in zip(*filled, strict=True)]
    panel.plot(epochs, means, color=style["color"], linestyle=style["linestyle"], linewidth=2.2)
    if means:
        panel.plot(epochs[-1], means[-1], color=style["color"], marker=style["marker"], markersize=6)


def alphas_figure(traces: Sequence[tuple[str, Sequence[float], Sequence[Sequence[float]]]]) -> Figure:
    """|alpha| of each layer over epochs, from 0: a panel for each (title, epochs, alphas at each of them by layer)."""
    figure = Figure(figsize=(5.6 * len(traces), 4.2), layout="constrained")
    panels = figure.subplots(1, len(traces), squeeze=False)[0]
    colors = colormaps["viridis"]
    for (title, epochs, values), panel in zip(traces, panels, strict=True):
        layers = len(values[0])
        for layer in range(layers):
            curve = [0.0, *(abs(line[layer]) for line in values)]
            color = colors(layer / max(layers - 1, 1))
            panel.plot([0.0, *epochs], curve, color=color, linewidth=1, alpha=0.8)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("training time (epochs)", fontsize=11)
        panel.set_ylabel("|α| of a layer", fontsize=11)
        panel.set_xlim(0, epochs[-1])
        panel.set_ylim(bottom=0)
        panel.grid(color="0.9")
        scale = ScalarMappable(Normalize(1, layers), colors)
        figure.colorbar(
            scale, ax=panel, label="layer (1: next to the input)", ticks=sorted({1, (layers + 1) // 2, layers})
        )
    return figure


def alpha_traces(
    text_results: Mapping[str, Any] | None, image_results: Mapping[str, Any] | None
) -> list[tuple[str, Sequence[float], Sequence[Sequence[float]]]]:
    """Of the deepest language model and the deepest PHResNet that were measured, n the largest."""
    traces: list[tuple[str, Sequence[float], Sequence[Sequence[float]]]] = []
    if text_results is not None and text_results["alphas"] is not None:
        found = text_results["alphas"]
        title = f"language model, {found['depth']} layers, n = {found['n']}, seed {found['seed']}"
        traces.append((title, found["epochs"], found["values"]))
    rows = [row for row in image_results["tables"].get("1", ()) if row.get("alphas")] if image_results else []
    if image_results and rows:
        row = max(rows, key=lambda row: (row["depth"], row["n"]))
        title = f"PHResNet{row['depth']} (a layer is a block), n = {row['n']}, seed {row['seeds'][0]}"
        traces.append((title, row["curves"][0]["epoch"], row["alphas"]))
    return traces


def gradients_figure(results: Mapping[str, Any]) -> Figure:
    """Norms of dL/dx_j, and of the gradients of each layer's parameters, over the layers."""
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for norm, style in NORM_STYLES.items():
        found = results["norms"][norm]
        line = {**style, "linewidth": 1.8, "markersize": 5, "markevery": max(1, results["depth"] // 12)}
        left.plot(range(len(found["outputs"])), found["outputs"], **line)
        right.plot(range(1, len(found["parameters"]) + 1), found["parameters"], **line)
    left.set_title("output of layer j:  ‖∂L/∂x$_j$‖", fontsize=12)
    right.set_title("all parameters of layer j:  ‖∂L/∂θ$_j$‖", fontsize=12)
    left.set_xlabel("j, 0 is the embedding", fontsize=12)
    right.set_xlabel("j", fontsize=12)
    left.set_ylabel("norm of the gradient", fontsize=12)
    for panel in (left, right):
        panel.set_yscale("log")
        panel.grid(color="0.9")
    _legend(figure, NORM_STYLES.values())
    figure.suptitle(
        f"Before the first step: language model of {results['depth']} layers, n = {results['n']}, init "
        f'"{results["init"]}", geometric mean of {results["seeds"]} seeds',
        fontsize=13,
    )
    return figure


def figures(folder: Path) -> dict[str, Figure]:
    """The figures that can be made of the results in ``folder``, by the name of their file."""

    def read(name: str) -> dict[str, Any] | None:
        path = folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    sources: dict[str, Callable[[Any], Figure]] = {
        "convergence_text": text_figure,
        "convergence_text_reference": text_figure,
        "convergence_images": images_figure,
        "gradient_norms": gradients_figure,
    }
    results = {name: read(name) for name in sources}
    made = {name: make(results[name]) for name, make in sources.items() if results[name] is not None}
    traces = alpha_traces(results["convergence_text"], results["convergence_images"])
    if traces:
        made["convergence_alphas"] = alphas_figure(traces)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=text.RESULTS, help="default: benchmarks/results")
    args = parser.parse_args()
    made = figures(args.folder)
    if not made:
        parser.exit(1, f"{args.folder} has no results of images.py, text.py or gradient_norms.py\n")
    for name, figure in made.items():
        path = args.folder / f"{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        print(f"Written: {path}")


if __name__ == "__main__":
    main()
