"""What the demo shows: the convergence plot, the tables, and the machine they are from."""

from __future__ import annotations

import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

from .. import info
from .training import TARGET_ACCURACY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .discriminant import Experiment

# Okabe and Ito's colours, told apart with any colour vision; line style and marker tell them apart in grey.
STYLES = {
    "standard": {"label": "standard", "color": "#0072B2", "linestyle": "--", "marker": "s"},
    "wkp": {"label": "WKP", "color": "#009E73", "linestyle": "-.", "marker": "^"},
    "phydi": {"label": "PHYDI", "color": "#D55E00", "linestyle": "-", "marker": "o"},
}
# Of the classes 0, 1 and 2.
CLASS_STYLES = (
    {"label": "class 1: disc", "color": "#0072B2", "marker": "s"},
    {"label": "class 2: inner ring", "color": "#009E73", "marker": "^"},
    {"label": "class 3: outer ring", "color": "#D55E00", "marker": "o"},
)


def environment() -> dict[str, Any]:
    """What ``phydi-kernels info`` knows, less the place of the library, with the versions of the demo's packages."""
    found = info.collect()
    del found["library"]["path"]
    found["packages"] = {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "matplotlib")}
    found["cpu"]["logical_cores"] = os.cpu_count()
    return found


def machine_line(environment: dict[str, Any]) -> str:
    processor = environment["cpu"]
    return (
        f"{processor['model']}, {processor['logical_cores']} logical cores, threads: {processor['threads']}, "
        f"torch {environment['torch']}, phm_linear: {environment['ops']['phm_linear']['cpu']}"
    )


def convergence_table(results: dict[str, Any]) -> str:
    """One row a run: M1, the last accuracy, the parameters, and their share of the dense model's."""
    lines = [
        f"M1: epochs to {TARGET_ACCURACY:.0%} test accuracy, evaluated {results['recipe']['evaluations_per_epoch']} "
        f"times an epoch; one run each, seed {results['arguments']['seed']}",
        f"{'n':>5}  {'initialisation':14}  {'M1':>6}  {'accuracy at end':>15}  {'parameters':>10}  {'of dense':>8}",
    ]
    for run in results["runs"]:
        lines.append(
            f"{run['n']:>5}  {STYLES[run['init']]['label']:14}  {format_m1(run['m1_epochs']):>6}  "
            f"{run['final_test_accuracy']:>15.1%}  {run['parameters']:>10,}  {run['parameters_over_dense']:>8.1%}"
        )
    lines.append(f"dense  {'(not trained)':14}  {'':>6}  {'':>15}  {results['dense_parameters']:>10,}  {1:>8.1%}")
    return "\n".join(lines)


def layer_table(rows: list[dict[str, Any]]) -> str:
    """One row a batch size: nn.Linear's median time, and the others' over it."""
    first = rows[0]
    titles = {
        "ours": "PHMLinear",
        "inference": f"for inference, R = {first['rank']}",
        "dense_h": "H built at every call",
    }
    lines = [
        f"Forward of one {first['features']}x{first['features']} layer, n = {first['n']}, float32, 1 thread, "
        "warm caches: median times over nn.Linear's",
        f"{'batch':>5}  {'nn.Linear':>12}  {'  '.join(titles.values())}",
    ]
    for row in rows:
        ratios = (f"{row['over_linear'][name]:>{len(title)}.2f}" for name, title in titles.items())
        lines.append(f"{row['batch']:>5}  {row['median_seconds']['linear'] * 1e6:>9,.0f} us  {'  '.join(ratios)}")
    lines += [
        "PHMLinear: as it is trained. For inference: the same after optimize_for_inference. H built at every call:",
        "sum_i kron(A_i, F_i), then F.linear, as published. All are within rounding of float64.",
    ]
    return "\n".join(lines)


def format_m1(epochs: float | None) -> str:
    return "-" if epochs is None else f"{epochs:.2f}"


def convergence_figure(results: dict[str, Any]) -> Figure:
    """Test accuracy against epochs, one panel an n, one curve an initialisation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    runs = results["runs"]
    ns = sorted({run["n"] for run in runs})
    figure = Figure(figsize=(5 * len(ns), 4.2), layout="constrained")
    panels = figure.subplots(1, len(ns), sharey=True, squeeze=False)[0]
    for n, panel in zip(ns, panels, strict=True):
        for run in (run for run in runs if run["n"] == n):
            style = dict(STYLES[run["init"]])
            style["label"] += f" (M1 = {format_m1(run['m1_epochs'])})"
            epochs = [point["epoch"] for point in run["history"]]
            accuracies = [point["test_accuracy"] for point in run["history"]]
            panel.plot(epochs, accuracies, linewidth=2, markersize=5, **style)
            share = run["parameters_over_dense"]
        panel.axhline(TARGET_ACCURACY, color="0.35", linestyle=(0, (5, 3)), linewidth=1)
        panel.text(
            0.02, TARGET_ACCURACY + 0.01, f"{TARGET_ACCURACY:.0%}", transform=panel.get_yaxis_transform(), color="0.35"
        )
        panel.set_title(f"n = {n}: {share:.0%} of the dense model's parameters", fontsize=12)
        panel.set_xlabel("training time (epochs)", fontsize=12)
        panel.set_xlim(left=0)
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.grid(color="0.9")
        panel.legend(loc="lower right", fontsize=11, title="initialisation", title_fontsize=11)
    panels[0].set_ylabel("test accuracy (% of images)", fontsize=12)
    figure.suptitle(f"{results['model']} on scikit-learn's digits, seed {results['arguments']['seed']}", fontsize=13)
    return figure


def discriminant_table(summary: dict[str, Any]) -> str:
    """Held-out errors of LDA and GDA, and what GDA's solution is."""
    first, second = summary["eigenvalues"]
    return "\n".join(
        [
            f"Kernel discriminant analysis (GDA) of three classes that no line separates: {summary['train_points']} "
            f"training points, {summary['held_out_points']:,} held out",
            "The paper does not publish the points of its Fig. 1: these are a disc in two rings.",
            f"{'Gaussian classes, pooled covariance, in':54}  {'error, held out':>15}",
            f"{'the two input features (Fig. 1), LDA, Eq. 1-4':54}  {summary['error']['lda']:>15.1%}",
            f"{'the two features extracted by GDA (Fig. 2), Eq. 8-23':54}  {summary['error']['gda']:>15.1%}",
            f"eigenvalues {first:.4g} and {second:.4g}, tau = {summary['tau']:.2g} (Eq. 23), rbf kernel with gamma = "
            f"{summary['gamma']:g}, fitted in {1e3 * summary['fit_seconds']:.0f} ms",
        ]
    )


def discriminant_figure(experiment: Experiment) -> Figure:
    """The held-out points before (GDA, Fig. 1) and after (Fig. 2) the extraction of two features, one mark a class."""
    from matplotlib.figure import Figure

    summary = experiment.summary
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, points in zip(panels, (experiment.points, experiment.extracted), strict=True):
        for label, style in enumerate(CLASS_STYLES):
            some = points[experiment.labels == label]
            panel.scatter(*some.T.tolist(), s=14, alpha=0.7, linewidths=0, **style)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
    before, after = panels
    before.set_title(f"The problem (Fig. 1): LDA's error {summary['error']['lda']:.1%}", fontsize=12)
    before.set_xlabel("$x_1$", fontsize=12)
    before.set_ylabel("$x_2$", fontsize=12)
    before.set_aspect("equal")
    after.set_title(f"Two features extracted by GDA (Fig. 2): error {summary['error']['gda']:.1%}", fontsize=12)
    for set_label, index, eigenvalue in zip(
        (after.set_xlabel, after.set_ylabel), (1, 2), summary["eigenvalues"], strict=True
    ):
        set_label(f"$y'_{index}$ (Eq. 16), eigenvalue {eigenvalue:.3g}", fontsize=12)
    figure.legend(*before.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=11, markerscale=2)
    figure.suptitle(
        f"Kernel discriminant analysis, rbf kernel: {summary['held_out_points']:,} held-out points "
        f"(fitted to {summary['train_points']} others)",
        fontsize=13,
    )
    return figure
