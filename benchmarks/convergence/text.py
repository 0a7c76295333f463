"""Fig. 4 of the PHYDI paper: epochs to a perplexity, by depth, n and normalisation.

    python benchmarks/convergence/text.py --preset cpu|paper

trains PHTransformerLM with 12 to 96 encoder layers, n = 2, 3, 4, PostNorm, PreNorm and PHYDI, until the perplexity on
validation data is at most 200, the paper's threshold. It can be stopped at any moment and goes on where it was (see
runs.py). The figures of all of the cpu preset go to benchmarks/results/convergence_text.json, those of any other call
to summary.json in the folder of its logs, unless ``--file`` says where; plots.py and results_page.py show them.

``--preset paper`` has the settings of the paper and its code: WikiText-2, 128 features, 8 heads, 256 features within
the feed-forward networks, batches of 64 x 35 words, at most 50 epochs, evaluated once an epoch. n = 3 divides neither
128 nor 256: these models have 120 and 255, the nearest that n and the heads divide.

``--preset cpu`` is its reduction for two cores: Python's documentation topics (text_data.py), a fortieth of the words,
48 features, 3 heads (16 features each, as in the paper), 96 features within, batches of 16 x 35 words so that an epoch
has 94 steps where it would have 24, at most 3 epochs. It is evaluated four times an epoch, after 24, 47, 70 and 94
steps: what is measured are 0.26, 0.50, 0.74 and 1 of an epoch. Width, batch and number of epochs were chosen on models
of 12 layers, n = 4, so that PreNorm, the usual choice at that depth, is at 200 after about an epoch. A model that knows
how often each word occurs and nothing else is at 253 on the validation data: one that stays at 253 to 258 has learned
no more.

``--init reference``, default of the paper preset, draws weights as the published layers do: the variance of H is about
a tenth of a dense layer's at these sizes. ``--init fan``, default of the cpu preset, is this package's, with a dense
layer's variance. Which normalisation is first depends on them: in pilot runs, all of seed 0, PostNorm trained with the
small weights only, PHYDI in fewer steps without them.

Both presets: Adagrad with learning rate 0.01, times 0.9 after each epoch, gradients of norm at most 0.5, dropout 0.1.
The order of the text is kept, as in the published code: seeds differ in initial weights and dropout.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import runs
import text_data
import torch
from runs import RESULTS, Run, Task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from phydi_kernels.demo.report import environment, machine_line
from phydi_kernels.models import PHTransformerLM

SUMMARY = "convergence_text.json"
DEPTHS = (12, 16, 24, 32, 48, 64, 96)
NS = (2, 3, 4)
NORMS = {"post": "PostNorm", "pre": "PreNorm", "phydi": "PHYDI"}
SEEDS = 2
RECIPE = {
    "threshold": 200.0,
    "bptt": 35,
    "dropout": 0.1,
    "lr": 0.01,
    "lr_decay": 0.9,
    "clip": 0.5,
    "stop_at_target": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "data": "pydoc",
        "init": "fan",
        "d_model": 48,
        "nhead": 3,
        "dim_feedforward": 96,
        "batch": 16,
        "epochs": 3,
        "evaluations_per_epoch": 4,
    },
    "paper": {
        "data": "wikitext2",
        "init": "reference",
        "d_model": 128,
        "nhead": 8,
        "dim_feedforward": 256,
        "batch": 64,
        "epochs": 50,
        "evaluations_per_epoch": 1,
    },
}
# Lines read side by side in an evaluation.
EVALUATION_ROWS = 32

load = functools.lru_cache(maxsize=1)(text_data.load)


def grid(
    preset: str,
    data: text_data.Corpus,
    *,
    seeds: int,
    init: str | None = None,
    device: str = "cpu",
    depths: Sequence[int] = DEPTHS,
    ns: Sequence[int] = NS,
    norms: Sequence[str] = tuple(NORMS),
) -> list[Run]:
    """All runs, the longest first, so that the last ones to end are short."""
    common = {**RECIPE, **PRESETS[preset], "data": data.name, "digest": data.digest, "device": device}
    if init is not None:
        common["init"] = init

    def model(n: int) -> dict[str, int]:
        d_model, heads, inner = (common[key] for key in ("d_model", "nhead", "dim_feedforward"))
        return {
            "n": n,
            "d_model": nearest_multiple(d_model, math.lcm(n, heads)),
            "dim_feedforward": nearest_multiple(inner, n),
        }

    return [
        Run(
            f"{NORMS[norm].lower()}-n{n}-depth{depth}",
            {**common, **model(n), "norm": norm, "depth": depth},
            seed,
        )
        for depth in sorted(depths, reverse=True)
        for seed in range(seeds)
        for n in ns
        for norm in norms
    ]


def nearest_multiple(size: int, step: int) -> int:
    return max(round(size / step), 1) * step


def build(settings: Mapping[str, Any], seed: int, *, folder: Path) -> Task:
    """The task of one run; ``runs.train`` has seeded the random numbers."""
    corpus = load(settings["data"], folder)
    if corpus.digest != settings["digest"]:
        raise ValueError(f"the text of {corpus.name} has changed since the runs were listed")
    return task(settings, corpus)


def task(settings: Mapping[str, Any], corpus: text_data.Corpus) -> Task:
    """The model of ``settings``, and its training on ``corpus``."""
    device = torch.device(settings["device"])
    model = PHTransformerLM(
        len(corpus.vocabulary),
        settings["d_model"],
        settings["nhead"],
        settings["n"],
        settings["depth"],
        settings["dim_feedforward"],
        settings["dropout"],
        settings["norm"],
        init=settings["init"],
        device=device,
    )
    # A 96-layer model has a thousand small parameters: one call for all saves 25 ms of a step of 350.
    optimizer = torch.optim.Adagrad(model.parameters(), settings["lr"], fused=device.type == "cpu")
    batches = list(text_data.windows(corpus.train.to(device), settings["batch"], settings["bptt"]))

    def held_out(part: str) -> dict[str, float]:
        mean = mean_loss(model, getattr(corpus, part).to(device), settings["bptt"])
        return {f"{part}_loss": mean, f"{part}_perplexity": perplexity(mean)}

    return Task(
        model=model,
        optimizer=optimizer,
        batches=lambda epoch, generator: batches,
        loss=lambda batch: loss(model, *batch),
        evaluate=lambda: held_out("validation"),
        reached=lambda metrics: metrics["validation_perplexity"] <= settings["threshold"],
        test=lambda: held_out("test"),
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, settings["lr_decay"]),
        clip=settings["clip"],
        evaluations_per_epoch=settings["evaluations_per_epoch"],
    )


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """The mean of -log p(target) over the targets, and their number."""
    mean = cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=text_data.NO_TARGET)
    return mean, int((targets != text_data.NO_TARGET).sum())


@torch.no_grad()
def mean_loss(model: nn.Module, stream: Tensor, bptt: int) -> float:
    """The mean over all words of a stream but its first, without dropout. The model is left in training mode."""
    model.eval()
    total, words = 0.0, 0
    for inputs, targets in text_data.windows(stream, EVALUATION_ROWS, bptt):
        mean, count = loss(model, inputs, targets)
        total, words = total + mean.item() * count, words + count
    model.train()
    return total / words


def perplexity(mean: float) -> float:
    """exp of a mean loss; infinite where float64 cannot hold it."""
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def summary(preset: str, corpus: text_data.Corpus, found: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """What is kept of the finished runs: facts, one row a run, and alphas of the deepest PHYDI model's layers."""
    rows = []
    for run in found:
        settings = run["settings"]
        lines = [line for line in run["log"] if "validation_perplexity" in line]
        rows.append(
            {
                **{key: settings[key] for key in ("depth", "n", "norm")},
                **{key: run[key] for key in ("seed", "status", "epoch", "steps", "parameters", "test")},
                "seconds": round(run["seconds"], 1),
                "cpu_seconds": run.get("cpu_seconds"),
                "curve": [[line["epoch"], round(line["validation_perplexity"], 2)] for line in lines],
            }
        )
    common = {**RECIPE, **PRESETS[preset], "data": corpus.name, "init": found[0]["settings"]["init"]}
    return {
        "experiment": "text",
        "preset": preset,
        "command": command,
        "environment": environment(),
        "settings": common,
        "corpus": corpus.facts(),
        "seeds": len({run["seed"] for run in found}),
        "rows": sorted(rows, key=lambda row: (row["n"], row["depth"], list(NORMS).index(row["norm"]), row["seed"])),
        "alphas": alphas(found),
    }


def alphas(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Each layer's alpha at each evaluation, in the PHYDI run with most layers, then most n, then the first seed."""
    candidates = [run for run in found if run["settings"]["norm"] == "phydi"]
    if not candidates:
        return None
    run = max(candidates, key=lambda run: (run["settings"]["depth"], run["settings"]["n"], -run["seed"]))
    lines = [line for line in run["log"] if "alphas" in line]
    return {
        **{key: run["settings"][key] for key in ("depth", "n")},
        "seed": run["seed"],
        "epochs": [line["epoch"] for line in lines],
        "values": [[round(alpha, 6) for alpha in line["alphas"].values()] for line in lines],
    }


def cell(rows: Sequence[Mapping[str, Any]], cap: int) -> str:
    """Epochs to the threshold over seeds: mean ± standard error, or each seed's where one did not reach it."""
    return runs.cell(
        [reached_after(row) for row in rows],
        ["diverged" if row["status"] == "diverged" else f"> {cap}" for row in rows],
    )


def reached_after(row: Mapping[str, Any]) -> float | None:
    """Epochs to the threshold; None where it was not reached."""
    return row["epoch"] if row["status"] == "reached" else None


def epochs(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean epochs to the threshold over seeds, infinite where a seed did not reach it."""
    values = [math.inf if (epoch := reached_after(row)) is None else epoch for row in rows]
    return sum(values) / len(values)


def groups(summary: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, list[Mapping[str, Any]]]]:
    """The rows of each (n, depth), by normalisation."""
    found: dict[tuple[int, int], dict[str, list[Mapping[str, Any]]]] = {}
    for row in summary["rows"]:
        found.setdefault((row["n"], row["depth"]), {}).setdefault(row["norm"], []).append(row)
    return found


def markdown(summary: Mapping[str, Any]) -> str:
    """Fig. 4 as a table, the least of each row in bold."""
    cap = summary["settings"]["epochs"]
    lines = [f"| n | layers | {' | '.join(NORMS.values())} |", "|--:|--:|" + "--:|" * len(NORMS)]
    for (n, depth), by_norm in groups(summary).items():
        least = min(map(epochs, by_norm.values()))
        cells = []
        for norm in NORMS:
            text = cell(by_norm[norm], cap) if norm in by_norm else ""
            best = norm in by_norm and epochs(by_norm[norm]) == least < math.inf
            cells.append(f"**{text}**" if best else text)
        lines.append(f"| {n} | {depth} | {' | '.join(cells)} |")
    return "\n".join(lines)


def text(summary: Mapping[str, Any]) -> str:
    """The table, what it is and where it was measured."""
    settings, corpus = summary["settings"], summary["corpus"]
    time = runs.processor_time([row["cpu_seconds"] for row in summary["rows"]])
    return (
        f"Epochs to a validation perplexity of {settings['threshold']:g} on {corpus['name']} "
        f"({corpus['words']['train']:,} words, vocabulary {corpus['vocabulary']:,}), "
        f'init "{settings["init"]}", at most {settings["epochs"]}, evaluated {settings["evaluations_per_epoch"]} times '
        f"an epoch; mean ± standard error over {summary['seeds']} seeds.\n\n{markdown(summary)}\n\n"
        f"{machine_line(summary['environment'])}{time}"
    )


def whole_preset(args: argparse.Namespace) -> bool:
    """Whether the arguments ask for all of the cpu preset and nothing else, whose figures are committed."""
    preset = PRESETS["cpu"]
    chosen = (args.preset, args.data, args.init, args.seeds, args.device)
    grids = ((args.depth, DEPTHS), (args.n, NS), (args.norm, NORMS))
    return chosen == ("cpu", preset["data"], preset["init"], SEEDS, "cpu") and all(set(a) == set(b) for a, b in grids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_arguments(parser, PRESETS, text_data.MINIMUM_COUNTS)
    parser.add_argument("--depth", type=runs.positive, nargs="+", default=DEPTHS, help="these numbers of layers only")
    parser.add_argument("--n", type=int, choices=NS, nargs="+", default=NS, help="these n only")
    parser.add_argument("--norm", choices=NORMS, nargs="+", default=tuple(NORMS), help="these only")
    args = parser.parse_args()
    args.data = args.data or PRESETS[args.preset]["data"]
    args.init = args.init or PRESETS[args.preset]["init"]
    args.seeds = args.seeds or SEEDS
    out = args.out / f"text-{args.preset}-{args.data}-{args.init}"
    file = args.file or (RESULTS / SUMMARY if whole_preset(args) else out / "summary.json")
    if args.markdown:
        print(text(json.loads(file.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    folder = args.data_folder / text_data.WIKITEXT2_FOLDER
    with runs.exits(parser):
        corpus = load(args.data, folder)
        jobs = grid(
            args.preset,
            corpus,
            seeds=args.seeds,
            init=args.init,
            device=args.device,
            depths=args.depth,
            ns=args.n,
            norms=args.norm,
        )
        found = runs.run_all(jobs, out, functools.partial(build, folder=folder), **runs.run_options(args))
    command = shlex.join(["python", "benchmarks/convergence/text.py", *sys.argv[1:]])
    results = summary(args.preset, corpus, found, command)
    runs.write_figures(file, results)
    print(f"{text(results)}\nWritten: {file}; logs: {out}")


if __name__ == "__main__":
    main()
