"""Training a classifier on scikit-learn's handwritten digits, and the paper's measure of convergence."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

TARGET_ACCURACY = 0.8
BATCH_NORM_IMAGES = 512
# At a time.
EVALUATION_IMAGES = 512


@dataclass(frozen=True)
class Recipe:
    """PHYDI, Section 4.2 (batch size) and the authors' CIFAR-10 code (the rest), without augmentation."""

    epochs: int
    batch_size: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    evaluations_per_epoch: int = 4


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 8, 8)`` float32, standardised by the training images' mean and deviation; labels ``(N,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """1797 grey 8x8 images of ten classes; a fifth, stratified and drawn by ``seed``, is held out for testing."""
    from sklearn import datasets, model_selection

    bunch = datasets.load_digits()
    train, test, train_labels, test_labels = model_selection.train_test_split(
        bunch.images, bunch.target, test_size=0.2, stratify=bunch.target, random_state=seed
    )
    mean, deviation = train.mean(), train.std()

    def tensor(images: Any) -> Tensor:
        return torch.as_tensor((images - mean) / deviation, dtype=torch.float32).unsqueeze(1)

    return Digits(tensor(train), torch.as_tensor(train_labels), tensor(test), torch.as_tensor(test_labels))


def epochs_to_accuracy(history: list[dict[str, float]], accuracy: float = TARGET_ACCURACY) -> float | None:
    """M1 of PHYDI, Section 4.2: epochs until the test accuracy first reaches ``accuracy``; None if it never does."""
    return next((point["epoch"] for point in history if point["test_accuracy"] >= accuracy), None)


def evaluate(model: nn.Module, data: Digits) -> float:
    """Share of the test images classified correctly, with batch-norm statistics of 512 training images.

    The running averages of training lag by about ten steps a layer: little of CIFAR-10's 782 steps an epoch, half of
    the 22 here. With them a standard PHResNet50 has an M1 one epoch higher, PHYDI's one quarter.
    """
    return accuracy(model, data.test_images, data.test_labels, data.train_images[:BATCH_NORM_IMAGES])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_norm_images: Tensor | None) -> float:
    """Share of the images classified correctly, with batch-norm statistics of others; None keeps the running averages.

    The model is left in training mode.
    """
    if batch_norm_images is not None:
        update_bn([batch_norm_images], model)
    model.eval()
    batches = zip(images.split(EVALUATION_IMAGES), labels.split(EVALUATION_IMAGES), strict=True)
    correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    model.train()
    return correct / len(labels)


def train(model: nn.Module, data: Digits, recipe: Recipe, seed: int, description: str) -> dict[str, Any]:
    """Trains ``model`` in place, with a progress bar; the order of the images is drawn by ``seed``.

    Returns:
        ``history``: epoch, train_loss (mean since the last point) and test_accuracy, ``evaluations_per_epoch`` times
        an epoch; ``images_per_second`` of training, evaluations not counted; ``seconds`` of everything.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    steps = len(data.train_images) // recipe.batch_size
    used = steps * recipe.batch_size
    parts = recipe.evaluations_per_epoch
    evaluate_after = {round(steps * part / parts) for part in range(1, parts + 1)}
    history: list[dict[str, float]] = []
    losses: list[float] = []
    accuracy = math.nan
    evaluation_seconds = 0.0
    start = time.perf_counter()
    model.train()
    # A log file gets a line every 30 s, not ten a second.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=recipe.epochs * used, desc=description, unit="img", mininterval=interval) as bar:
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(data.train_images), generator=generator)[:used]
            for step, batch in enumerate(order.split(recipe.batch_size), start=1):
                loss = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                last_loss = losses[-1]
                if step in evaluate_after:
                    evaluation_start = time.perf_counter()
                    accuracy = evaluate(model, data)
                    evaluation_seconds += time.perf_counter() - evaluation_start
                    mean_loss = sum(losses) / len(losses)
                    history.append({"epoch": epoch + step / steps, "train_loss": mean_loss, "test_accuracy": accuracy})
                    losses.clear()
                bar.set_postfix(loss=f"{last_loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
                bar.update(len(batch))
    seconds = time.perf_counter() - start
    return {
        "history": history,
        "images_per_second": recipe.epochs * used / (seconds - evaluation_seconds),
        "seconds": seconds,
    }
