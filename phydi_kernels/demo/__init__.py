"""``phydi-kernels demo``: how PHYDI's initialisation speeds up convergence, on real images; GDA on three classes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import models
from . import discriminant, layer_times, report, training

DIMENSIONS = (2, 4)
INITS = ("standard", "wkp", "phydi")
WIDTH = 16
EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--depth",
        type=int,
        choices=(18, 34, 50, 101, 152),
        default=50,
        help="layers of the PHResNet; PHYDI gains with depth (default: 50)",
    )
    parser.add_argument("--epochs", type=_positive, default=4, help="epochs of each of the six runs (default: 4)")
    parser.add_argument(
        "--seed", type=_natural, default=0, help="of the split, the weights and the order of images (default: 0)"
    )
    # Images this small gain little from a second thread, and a busy machine then makes each of them wait for the other.
    parser.add_argument("--threads", type=_positive, default=1, help="torch's threads in training (default: 1)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder of the plots and the JSON (default: results)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains every n and initialisation, prints the tables, writes ``demo.json`` and the two plots.

    The JSON is written after each run, so that an interrupted demo keeps what is finished.

    Returns:
        The exit status: 0, or 1 where scikit-learn or matplotlib is missing.
    """
    missing = [name for module, name in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"phydi-kernels demo needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    json_path, *plot_paths = (args.output / name for name in ("demo.json", "convergence.png", "discriminant.png"))
    make_model = getattr(models, f"phresnet{args.depth}")
    recipe = training.Recipe(args.epochs)
    data = training.load_digits(args.seed)
    dense_parameters = _parameters(make_model(1, in_channels=1, width=WIDTH))

    with _threads(args.threads):
        results: dict[str, Any] = {
            "environment": report.environment(),
            "arguments": {"depth": args.depth, "epochs": args.epochs, "seed": args.seed, "threads": args.threads},
            "model": f"PHResNet{args.depth} of width {WIDTH}",
            "data": {
                "name": "scikit-learn digits, 8x8 grey, zero channels in front up to n",
                "train_images": len(data.train_images),
                "test_images": len(data.test_images),
            },
            "recipe": asdict(recipe),
            "dense_parameters": dense_parameters,
            "runs": [],
        }
        print(f"{results['model']}, {len(data.train_images)} training and {len(data.test_images)} test images")
        for n in DIMENSIONS:
            for init in INITS:
                torch.manual_seed(args.seed)
                model = make_model(n, in_channels=1, init=init, width=WIDTH)
                trained = training.train(model, data, recipe, args.seed, f"n={n} {report.STYLES[init]['label']:8}")
                results["runs"].append(
                    {
                        "n": n,
                        "init": init,
                        "seed": args.seed,
                        "parameters": _parameters(model),
                        "parameters_over_dense": _parameters(model) / dense_parameters,
                        "m1_epochs": training.epochs_to_accuracy(trained["history"]),
                        "final_test_accuracy": trained["history"][-1]["test_accuracy"],
                        **trained,
                    }
                )
                _write(json_path, results)
    report.convergence_figure(results).savefig(plot_paths[0], dpi=160)
    print(f"\n{report.convergence_table(results)}\n", flush=True)

    with _threads(1):
        results["layer_times"] = layer_times.time_layers()
        experiment = discriminant.run(args.seed)
    results["discriminant"] = experiment.summary
    print(report.layer_table(results["layer_times"]))
    report.discriminant_figure(experiment).savefig(plot_paths[1], dpi=160)
    print(f"\n{report.discriminant_table(experiment.summary)}")
    results["seconds"] = time.perf_counter() - start
    _write(json_path, results)
    print(f"\n{report.machine_line(results['environment'])}; {results['seconds']:.0f} s")
    print(f"Written: {', '.join(map(str, plot_paths))} and {json_path}")
    return 0


def _natural(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= {least}")
    return int(text)


def _positive(text: str) -> int:
    return _natural(text, least=1)


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _write(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=2) + "\n")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
