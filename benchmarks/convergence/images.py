"""Tables 1 and 2 of PHYDI: epochs that PHResNets need, with standard, WKP, PHYDI and Fixup initialisation.

``python benchmarks/convergence/images.py`` trains every row of both on scikit-learn's digits (``--preset cpu``) and
prints the tables; ``--preset paper`` has the paper's sizes, on CIFAR-10. A call that was stopped, in any way, goes on
where it was: see runs.py. The figures of all of the cpu preset go to benchmarks/results/convergence_images.json, those
of any other call to summary.json in the folder of its logs, unless ``--file`` says where.

* M1 (Section 4.2): epochs until the accuracy on validation images first reaches 80 %.
* M2, "the number of epochs to beat a model with the proposed approach": the paper does not define it further. Here: the
  epochs a model needs until its validation accuracy exceeds that of the PHYDI model of the same depth, n, recipe and
  seed after that one's first epoch. The published figures roughly agree with it: they are a few epochs even where M1
  is 30, and PHYDI's own rows have none. On the digits, PHResNet152 with PHYDI is near 80 % after its first epoch: with
  152 layers M2 there says little that M1 does not.

A preset says how often an epoch is evaluated: four times in the cpu preset, whose epochs have 16 steps in Table 1 and 8
in Table 2, and at its end, as in the paper, in the paper preset with its 703. All methods have the same recipe. A run
ends at the validation accuracy ``stop_accuracy``, or at its cap of epochs. Where a seed does not reach a figure, each
seed's own is shown, ">" before the epochs that it had. Test images are used once, at the end of a run.

The paper preset follows "the recipe of the original real-valued ResNet paper" (He et al., 2016, Section 4.2) with the
paper's batch size and learning rate: weight decay 1e-4, learning rate / 10 after 32,000 and 48,000 steps, 64,000 steps
at most, images shifted and mirrored. The authors' code differs: weight decay 5e-4, a constant learning rate, no shifted
or mirrored images; the cpu preset has its weight decay and constant rate.

``--init fan``, default of the cpu preset, draws this package's weights, of He's variance; ``--init reference``, default
of the paper preset, those of the published layers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import image_data
import runs
import torch
from runs import RESULTS
from torch import Tensor, nn

from phydi_kernels import models
from phydi_kernels.demo import report
from phydi_kernels.demo.training import BATCH_NORM_IMAGES, TARGET_ACCURACY, accuracy

SUMMARY = RESULTS / "convergence_images.json"
METHODS = {"standard": "", "wkp": "+ WKP", "phydi": "+ PHYDI", "fixup": "+ Fixup"}
DIMENSIONS = (2, 3, 4)
DEPTHS = (18, 50, 152)


@dataclass(frozen=True)
class Preset:
    """Sizes and recipe of all runs.

    Args:
        data: name of the data set.
        epochs: the most, by depth, with batches of 64.
        width: channels of the first stage; where n does not divide it, PHResNet has those near it.
        seeds: runs of each row.
        evaluations_per_epoch: at equal distances, the last at the epoch's end.
        stop_accuracy: validation accuracy at which a run ends.
        calibrate: whether an evaluation first takes batch normalisation's statistics from 512 training images. The
            running averages lag by about ten steps a layer, the better part of an epoch of 16.
        augment: random crops and mirrored images, by which ResNet's recipe enlarges CIFAR-10; other data has none.
        fixup: depths of further rows with Fixup, by table.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        weight_init: of the convolutions: "fan" or "reference".
        lr_steps: after how many steps the learning rate is divided by 10.
        equal_steps: whether larger batches have more epochs in proportion, for as many steps.
    """

    data: str
    epochs: Mapping[int, int]
    width: int
    seeds: int
    evaluations_per_epoch: int
    stop_accuracy: float
    calibrate: bool
    augment: bool
    fixup: Mapping[str, tuple[int, ...]]
    momentum: float = 0.9
    weight_decay: float = 5e-4
    weight_init: str = "fan"
    lr_steps: tuple[int, ...] = ()
    equal_steps: bool = False


PRESETS = {
    # At 90 % M2 is known as well, which no PHYDI model has after one epoch.
    "cpu": Preset("digits", {18: 16, 50: 16, 152: 24}, 16, 3, 4, 0.9, True, False, {"1": (18,), "2": ()}),
    "paper": Preset(
        data="cifar10",
        # 64,000 steps of 64 among 45,000 images.
        epochs=dict.fromkeys(DEPTHS, 91),
        width=64,
        seeds=3,
        evaluations_per_epoch=1,
        stop_accuracy=TARGET_ACCURACY,
        calibrate=False,
        augment=True,
        fixup={"1": (), "2": ()},
        weight_decay=1e-4,
        weight_init="reference",
        lr_steps=(32_000, 48_000),
        equal_steps=True,
    ),
}
BATCH_SIZE = 64
# Depth, batch size and learning rate of each table's rows.
TABLES = {
    "1": tuple((depth, BATCH_SIZE, 0.01) for depth in DEPTHS),
    "2": ((18, 128, 0.1), (50, 128, 0.01)),
}


def table_rows(table: str, fixup: Sequence[int]) -> list[dict[str, Any]]:
    """The rows in the paper's order: n, then depth, then method."""
    return [
        {"depth": depth, "n": n, "init": init, "batch_size": batch_size, "learning_rate": learning_rate}
        for n in DIMENSIONS
        for depth, batch_size, learning_rate in TABLES[table]
        for init in METHODS
        if init != "fixup" or depth in fixup
    ]


def row_run(row: Mapping[str, Any], preset: Preset, seed: int) -> runs.Run:
    more = row["batch_size"] // BATCH_SIZE if preset.equal_steps else 1
    settings = {
        **row,
        "data": preset.data,
        "epochs": preset.epochs[row["depth"]] * more,
        "width": preset.width,
        "momentum": preset.momentum,
        "weight_decay": preset.weight_decay,
        "evaluations_per_epoch": preset.evaluations_per_epoch,
        "stop_at_target": True,
        "stop_accuracy": preset.stop_accuracy,
        "calibrate": preset.calibrate,
        "augment": preset.augment and preset.data == "cifar10",
    }
    # Runs without them are the same as those from before there were these settings.
    if preset.weight_init != "fan":
        settings["weight_init"] = preset.weight_init
    if preset.lr_steps:
        settings["lr_steps"] = preset.lr_steps
    name = "phresnet{depth}-n{n}-{init}-batch{batch_size}-lr{learning_rate}".format(**row)
    return runs.Run(name, settings, seed)


def build(settings: Mapping[str, Any], seed: int, *, folder: Path, device: str) -> runs.Task:
    """The task of a run on the data set ``settings["data"]``, with CIFAR-10 in ``folder``."""
    return image_task(settings, image_data.load(settings["data"], seed, folder), device)


def image_task(settings: Mapping[str, Any], data: image_data.Images, device: str = "cpu") -> runs.Task:
    make_model = getattr(models, f"phresnet{settings['depth']}")
    model = make_model(
        settings["n"],
        image_data.CLASSES,
        data.channels,
        settings["init"],
        settings["width"],
        weight_init=settings.get("weight_init", "fan"),
        device=device,
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings["learning_rate"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
    )
    images, labels = data.train.images.to(device), data.train.labels.to(device)
    steps, batch_size = len(data.train) // settings["batch_size"], settings["batch_size"]
    if steps == 0:
        raise ValueError(f"batch_size={batch_size} is more than the {len(data.train)} training images")
    lr_steps = settings.get("lr_steps")

    def batches(epoch: int, generator: torch.Generator) -> Sequence[Tensor]:
        return torch.randperm(len(data.train), generator=generator).split(batch_size)[:steps]

    def loss(batch: Tensor) -> tuple[Tensor, int]:
        batch = batch.to(device)
        x = image_data.augmented(images[batch]) if settings["augment"] else images[batch]
        return nn.functional.cross_entropy(model(x), labels[batch]), len(batch)

    def measure(name: str, part: image_data.Part) -> dict[str, float]:
        calibration = images[:BATCH_NORM_IMAGES] if settings["calibrate"] else None
        return {f"{name}_accuracy": accuracy(model, part.images.to(device), part.labels.to(device), calibration)}

    return runs.Task(
        model,
        optimizer,
        batches,
        loss,
        evaluate=partial(measure, "validation", data.validation),
        reached=lambda metrics: metrics["validation_accuracy"] >= settings["stop_accuracy"],
        test=partial(measure, "test", data.test),
        scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, lr_steps) if lr_steps else None,
        scheduled_steps=True,
        evaluations_per_epoch=settings["evaluations_per_epoch"],
    )


def measure_table(
    preset: Preset,
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    folder: Path,
    device: str,
    **options: Any,
) -> list[dict[str, Any]]:
    """Trains all seeds of all rows; ``options`` are those of :func:`runs.run_all`. Returns the rows with figures."""
    # The deepest first, so that none of them is left alone at the end.
    jobs = [row_run(row, preset, seed) for row in rows for seed in range(preset.seeds)]
    jobs.sort(key=lambda job: -job.settings["depth"])
    found = runs.run_all(jobs, out, partial(build, folder=folder, device=device), **options)
    results: dict[str, list[dict[str, Any]]] = {}
    for result in found:
        results.setdefault(result["name"], []).append(result)
    names = [(row_run(row, preset, 0).name, row_run({**row, "init": "phydi"}, preset, 0).name) for row in rows]
    return [
        with_figures(row, results[name], results.get(phydi)) for row, (name, phydi) in zip(rows, names, strict=True)
    ]


def with_figures(
    row: Mapping[str, Any], results: Sequence[Mapping[str, Any]], phydi: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """A row with M1, M2 and how its runs ended, by seed, and its curves; ``phydi`` are PHYDI's runs of the same seeds.

    A figure that a run did not reach is None.
    """
    figures = {
        **row,
        "seeds": [result["seed"] for result in results],
        "parameters": results[0]["parameters"],
        "m1": [epochs_until(result, lambda accuracy: accuracy >= TARGET_ACCURACY) for result in results],
        "m2": None,
        "epochs": [result["log"][-1]["epoch"] for result in results],
        "diverged": [result["status"] == "diverged" for result in results],
        "test_accuracy": [result["test"].get("test_accuracy") for result in results],
        "seconds": [result["seconds"] for result in results],
        "cpu_seconds": [result.get("cpu_seconds") for result in results],
        "curves": [
            {
                key: [round(line[key], 5) for line in result["log"] if "step" in line]
                for key in ("epoch", "train_loss", "validation_accuracy")
            }
            for result in results
        ],
    }
    if row["init"] == "phydi":
        lines = [line for line in results[0]["log"] if "step" in line]
        figures["alphas"] = [[float(f"{alpha:.4g}") for alpha in line["alphas"].values()] for line in lines]
    elif phydi is not None:
        figures["m2"] = [epochs_to_beat(result, rival) for result, rival in zip(results, phydi, strict=True)]
    return figures


def epochs_until(result: Mapping[str, Any], condition: Callable[[float], bool]) -> float | None:
    """Epoch of the first evaluation whose validation accuracy meets the condition; None where none does."""
    lines = (line for line in result["log"] if "step" in line)
    return next((line["epoch"] for line in lines if condition(line["validation_accuracy"])), None)


def epochs_to_beat(result: Mapping[str, Any], phydi: Mapping[str, Any]) -> float | None:
    """M2: epoch at which the validation accuracy first exceeds PHYDI's after its first epoch.

    A PHYDI run that was over before counts with its last accuracy, with 0 where it diverged before any.
    """
    accuracies = [line["validation_accuracy"] for line in phydi["log"] if line["epoch"] <= 1 and "step" in line]
    limit = accuracies[-1] if accuracies else 0.0
    return epochs_until(result, lambda accuracy: accuracy > limit)


def table_text(table: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """In the paper's layout, aligned, without marks."""
    cells = [[cell.replace("**", "") for cell in row] for row in table_cells(table, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def table_markdown(table: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """In the paper's layout: the least M1 of each model and n is bold."""
    header, *body = table_cells(table, rows)
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_cells(table: str, rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    recipe = ["btc-sz", "lr"] if table == "2" else []
    lines = [["Model", "n", *recipe, "M1", "M2", "test, %"]]
    for row in rows:
        same = [other for other in rows if (other["depth"], other["n"]) == (row["depth"], row["n"])]
        m1 = figure(row, "m1")
        if None not in row["m1"] and sum(row["m1"]) == min(sum(r["m1"]) for r in same if None not in r["m1"]):
            m1 = f"**{m1}**"
        lines.append(
            [
                METHODS[row["init"]] or f"PHResNet{row['depth']}",
                str(row["n"]),
                *([str(row["batch_size"]), f"{row['learning_rate']:g}"] if recipe else []),
                m1,
                "-" if row["m2"] is None else figure(row, "m2"),
                held_out_figure(row),
            ]
        )
    return lines


def figure(row: Mapping[str, Any], key: str) -> str:
    """M1 or M2: mean ± standard error over seeds, or each seed's where one did not reach it."""
    ends = [
        "diverged" if diverged else f"> {epochs:.2f}"
        for epochs, diverged in zip(row["epochs"], row["diverged"], strict=True)
    ]
    return runs.cell(row[key], ends)


def held_out_figure(row: Mapping[str, Any]) -> str:
    """Test accuracy over the seeds that did not diverge, in percent, and how many diverged, at any epoch."""
    values = [100 * accuracy for accuracy in row["test_accuracy"] if accuracy is not None]
    diverged = f"{sum(row['diverged'])} of {len(row['diverged'])} diverged"
    if not values:
        return diverged
    mean, error = runs.mean_and_error(values)
    shown = f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}"
    return f"{shown} ({diverged})" if any(row["diverged"]) else shown


def text(results: Mapping[str, Any], table: Callable[[str, Sequence[Mapping[str, Any]]], str]) -> str:
    """All tables, each made by ``table``, with what they are and where they were measured."""
    preset = results["preset"]
    lines = []
    for name, rows in results["tables"].items():
        seeds = max(len(row["seeds"]) for row in rows)
        lines += [
            f"Table {name}: {preset['data']}, width {preset['width']}, seeds: {seeds}, evaluated "
            f"{preset['evaluations_per_epoch']} times an epoch. M1: epochs to {TARGET_ACCURACY:.0%} validation "
            "accuracy, M2: epochs to beat PHYDI after one epoch; mean ± standard error over seeds. Test: accuracy at "
            f"the end of a run, at {preset['stop_accuracy']:.0%} validation accuracy or after its most epochs.",
            "",
            table(name, rows),
            "",
        ]
    lines.append(machine_and_time(results))
    return "\n".join(lines)


def machine_and_time(results: Mapping[str, Any]) -> str:
    """Where the runs were, and their processor time where it is known."""
    seconds = [value for rows in results["tables"].values() for row in rows for value in row["cpu_seconds"]]
    return report.machine_line(results["environment"]) + runs.processor_time(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_arguments(parser, PRESETS, image_data.LOADERS)
    parser.add_argument("--table", choices=TABLES, nargs="+", default=tuple(TABLES), help="measure these only")
    parser.add_argument("--depth", type=int, choices=DEPTHS, nargs="+", default=DEPTHS, help="these depths only")
    parser.add_argument("--n", type=int, choices=DIMENSIONS, nargs="+", default=DIMENSIONS, help="these n only")
    parser.add_argument(
        "--with-fixup", action="store_true", help="Fixup in every row (without it: depth 18 of Table 1, cpu preset)"
    )
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    preset = replace(
        preset,
        data=args.data or preset.data,
        seeds=args.seeds or preset.seeds,
        weight_init=args.init or preset.weight_init,
    )
    out = args.out / "-".join(
        ["images", args.preset, preset.data, *([preset.weight_init] if preset.weight_init != "fan" else [])]
    )
    grids = ((args.table, TABLES), (args.depth, DEPTHS), (args.n, DIMENSIONS))
    whole = all(set(chosen) == set(every) for chosen, every in grids) and not args.with_fixup
    whole = whole and preset == PRESETS["cpu"] and args.device == "cpu"
    file = args.file or (SUMMARY if whole else out / "summary.json")
    if args.markdown:
        print(text(json.loads(file.read_text(encoding="utf-8")), table_markdown))
        return
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/convergence/images.py", *sys.argv[1:]]),
        "environment": report.environment(),
        "preset": asdict(preset),
        "tables": {},
    }
    with runs.exits(parser):
        image_data.load(preset.data, 0, args.data_folder)
        for table in args.table:
            rows = [
                row
                for row in table_rows(table, DEPTHS if args.with_fixup else preset.fixup[table])
                if row["depth"] in args.depth and row["n"] in args.n
            ]
            if rows:
                results["tables"][table] = measure_table(
                    preset, rows, out, folder=args.data_folder, device=args.device, **runs.run_options(args)
                )
    runs.write_figures(file, results)
    print(f"{text(results, table_text)}\nWritten: {file}; logs: {out}")


if __name__ == "__main__":
    main()
