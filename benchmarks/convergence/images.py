"""Tables 1 and 2 of PHYDI: epochs that PHResNets need, with standard, WKP, PHYDI and Fixup initialisation.

``python benchmarks/convergence/images.py`` trains every row of both on scikit-learn's digits (``--preset cpu``) and
prints the tables; ``--preset paper`` has the paper's sizes, on CIFAR-10. A call that was stopped, in any way, goes on
where it was: see runs.py. The cpu preset takes some 40 minutes of processor time, in two processes of one thread.

* M1 (Section 4.2): epochs until the accuracy on validation images first reaches 80 %.
* M2, "the number of epochs to beat a model with the proposed approach": the paper does not define it further. Here: the
  epochs a model needs until its validation accuracy exceeds that of the PHYDI model of the same depth, n, recipe and
  seed after that one's first epoch. The published figures agree with it: they are a few epochs even where M1 is 30, 1
  where the model is the faster one, and PHYDI's own rows have none.

A preset says how often an epoch is evaluated: four times in the cpu preset, whose epochs have 16 steps, and at its end,
as in the paper, in the paper preset with its 703. All methods have the same recipe. A run ends at the validation
accuracy ``stop_accuracy``, or at its cap of epochs; a run that ended without reaching a figure counts as the epochs it
had, and its row has a ">". Test images are used once, at the end of a run.
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
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from phydi_kernels import models
from phydi_kernels.demo import report
from phydi_kernels.demo.training import BATCH_NORM_IMAGES, TARGET_ACCURACY

RESULTS = Path(__file__).resolve().parent.parent / "results"
SUMMARY = RESULTS / "convergence_images.json"
METHODS = {"standard": "", "wkp": "+ WKP", "phydi": "+ PHYDI", "fixup": "+ Fixup"}
DIMENSIONS = (2, 3, 4)
DEPTHS = (18, 50, 152)
EVALUATION_IMAGES = 512


@dataclass(frozen=True)
class Preset:
    """Sizes and recipe of all runs.

    Args:
        epochs: the most, by depth.
        width: channels of the first stage.
        stop_accuracy: validation accuracy at which a run ends.
        calibrate: whether an evaluation first takes batch normalisation's statistics from 512 training images. The
            running averages lag by about ten steps a layer, the better part of an epoch of 16.
        augment: random crops and mirrored images, by which ResNet's recipe enlarges CIFAR-10.
        fixup: depths of further rows with Fixup, by table.
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


PRESETS = {
    # At 90 % M2 is known as well, which no PHYDI model has after one epoch.
    "cpu": Preset("digits", {18: 16, 50: 16, 152: 24}, 16, 3, 4, 0.9, True, False, {"1": (18,), "2": ()}),
    # The authors' runs end at 80 %; the slowest row needs 33 epochs on average.
    "paper": Preset("cifar10", {18: 60, 50: 60, 152: 60}, 64, 3, 1, TARGET_ACCURACY, False, True, {"1": (), "2": ()}),
}
# Depth, batch size and learning rate of each table's rows.
TABLES = {
    "1": tuple((depth, 64, 0.01) for depth in DEPTHS),
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
    settings = {
        **row,
        "data": preset.data,
        "epochs": preset.epochs[row["depth"]],
        "width": preset.width,
        "momentum": preset.momentum,
        "weight_decay": preset.weight_decay,
        "evaluations_per_epoch": preset.evaluations_per_epoch,
        "stop_at_target": True,
        "stop_accuracy": preset.stop_accuracy,
        "calibrate": preset.calibrate,
        "augment": preset.augment,
    }
    name = "phresnet{depth}-n{n}-{init}-batch{batch_size}-lr{learning_rate}".format(**row)
    return runs.Run(name, settings, seed)


def build(settings: Mapping[str, Any], seed: int, *, folder: Path, device: str) -> runs.Task:
    """The task of a run on the data set ``settings["data"]``, with CIFAR-10 in ``folder``."""
    return image_task(settings, image_data.load(settings["data"], seed, folder), device)


def image_task(settings: Mapping[str, Any], data: image_data.Images, device: str = "cpu") -> runs.Task:
    make_model = getattr(models, f"phresnet{settings['depth']}")
    model = make_model(
        settings["n"], image_data.CLASSES, data.channels, settings["init"], settings["width"], device=device
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings["learning_rate"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
    )
    images, labels = data.train.images.to(device), data.train.labels.to(device)
    steps, batch_size = len(data.train) // settings["batch_size"], settings["batch_size"]

    def batches(epoch: int, generator: torch.Generator) -> Sequence[Tensor]:
        return torch.randperm(len(data.train), generator=generator).split(batch_size)[:steps]

    def loss(batch: Tensor) -> tuple[Tensor, int]:
        batch = batch.to(device)
        x = image_data.augmented(images[batch]) if settings["augment"] else images[batch]
        return nn.functional.cross_entropy(model(x), labels[batch]), len(batch)

    def measure(name: str, part: image_data.Part) -> dict[str, float]:
        with torch.no_grad():
            if settings["calibrate"]:
                update_bn([images[:BATCH_NORM_IMAGES]], model)
            model.eval()
            correct = sum(
                (model(x.to(device)).argmax(1).cpu() == y).sum().item()
                for x, y in zip(part.images.split(EVALUATION_IMAGES), part.labels.split(EVALUATION_IMAGES), strict=True)
            )
        model.train()
        return {f"{name}_accuracy": correct / len(part)}

    return runs.Task(
        model,
        optimizer,
        batches,
        loss,
        evaluate=partial(measure, "validation", data.validation),
        reached=lambda metrics: metrics["validation_accuracy"] >= settings["stop_accuracy"],
        test=partial(measure, "test", data.test),
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
                _with_error([100 * accuracy for accuracy in row["test_accuracy"] if accuracy is not None], 1),
            ]
        )
    return lines


def figure(row: Mapping[str, Any], key: str) -> str:
    """Mean and standard error over seeds: "> 5.25 ± 0.14" where some run ended before, and how many diverged before."""
    values, diverged = [], 0
    for value, epochs, diverges in zip(row[key], row["epochs"], row["diverged"], strict=True):
        if value is None and diverges:
            diverged += 1
        else:
            values.append((epochs if value is None else value, value is None))
    text = _with_error([value for value, _ in values], 2)
    if any(capped for _, capped in values):
        text = f"> {text}"
    if diverged:
        note = f"{diverged} of {len(row[key])} diverged"
        text = f"{text} ({note})" if values else note
    return text


def _with_error(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean, error = runs.mean_and_error(values)
    return f"{mean:.{digits}f}" if error is None else f"{mean:.{digits}f} ± {error:.{digits}f}"


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
            f"the end of a run, which is at {preset['stop_accuracy']:.0%} validation accuracy.",
            "",
            table(name, rows),
            "",
        ]
    seconds = sum(sum(row["seconds"]) for rows in results["tables"].values() for row in rows)
    lines.append(f"{report.machine_line(results['environment'])}; {seconds / 60:.0f} min of training")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes of everything (default: cpu)")
    parser.add_argument("--table", choices=TABLES, action="append", help="measure this one (default: both)")
    parser.add_argument("--depth", type=int, choices=DEPTHS, nargs="+", help="these depths only")
    parser.add_argument("--n", type=int, choices=DIMENSIONS, nargs="+", help="these n only")
    parser.add_argument(
        "--with-fixup", action="store_true", help="Fixup in every row (without it: depth 18 of Table 1, cpu preset)"
    )
    parser.add_argument("--data", choices=image_data.LOADERS, help="data set (default: the preset's)")
    parser.add_argument("--data-folder", type=Path, default=Path("data"), help="where CIFAR-10 lies (default: data)")
    parser.add_argument("--seeds", type=runs.positive, help="runs of each row (default: the preset's)")
    parser.add_argument("--processes", type=runs.positive, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--device", default="cpu", help="of the models (default: cpu)")
    parser.add_argument("--out", type=Path, default=RESULTS / "convergence", help="folder of logs and checkpoints")
    parser.add_argument(
        "--file",
        type=Path,
        help=f"the figures (default: results/{SUMMARY.name} for all of the cpu preset, else in the folder of the logs)",
    )
    parser.add_argument("--save-share", type=float, default=runs.SAVE_SHARE, help="part of the time for checkpoints")
    parser.add_argument("--fresh", action="store_true", help="train again what is finished or in progress")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's logs as well")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the file, and train nothing")
    args = parser.parse_args()
    if args.markdown:
        print(text(json.loads((args.file or SUMMARY).read_text(encoding="utf-8")), table_markdown))
        return
    preset = PRESETS[args.preset]
    preset = replace(preset, data=args.data or preset.data, seeds=args.seeds or preset.seeds)
    out = args.out / f"images-{args.preset}-{preset.data}"
    complete = replace(preset, seeds=PRESETS["cpu"].seeds) == PRESETS["cpu"] and not (
        args.table or args.depth or args.n
    )
    file = args.file or (SUMMARY if complete else out / "summary.json")
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/convergence/images.py", *sys.argv[1:]]),
        "environment": report.environment(),
        "preset": asdict(preset),
        "tables": {},
    }
    try:
        image_data.load(preset.data, 0, args.data_folder)
        for table in args.table or TABLES:
            rows = [
                row
                for row in table_rows(table, DEPTHS if args.with_fixup else preset.fixup[table])
                if row["depth"] in (args.depth or DEPTHS) and row["n"] in (args.n or DIMENSIONS)
            ]
            if not rows:
                continue
            results["tables"][table] = measure_table(
                preset,
                rows,
                out,
                folder=args.data_folder,
                device=args.device,
                processes=args.processes,
                save_share=args.save_share,
                tensorboard=args.tensorboard,
                fresh=args.fresh,
            )
    except (image_data.MissingDataError, runs.SettingsMismatchError, ModuleNotFoundError) as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Stopped. The same command goes on from here.\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(f"{text(results, table_text)}\nWritten: {file}; logs: {out}")


if __name__ == "__main__":
    main()
