"""Training runs that survive a kill, and their evaluation over seeds: what the experiments of this folder share.

An experiment names its runs and says how to build the task of one::

    run = Run("phresnet50-n4-phydi", {"depth": 50, "n": 4, "epochs": 6, "stop_at_target": True}, seed=0)
    results = run_all([run], out, build)  # build(settings, seed) -> Task, a function of a module

``settings`` holds everything that the result depends on, as JSON values; ``epochs`` (the most) and ``stop_at_target``
(whether the run ends at the first evaluation that reaches its target) are read here. Before ``build`` is called, the
random numbers of torch, numpy and Python are seeded by ``seed``.

The folder ``<out>/<run name>-seed<seed>`` of a run holds

* ``log.jsonl``, one line at each evaluation: epoch (a fraction within an epoch), step, train_loss (mean over the
  samples since the last line), what ``Task.evaluate`` returns, learning_rate, alphas (each parameter ``alpha``,
  ``alpha1`` or ``alpha2`` of the model by the name of its module) and seconds. A run whose loss or evaluation is not
  finite ends with ``{"diverged": true, "epoch": ...}``.
* ``checkpoint.pt`` and ``previous.pt``, the last two states: model, optimizer, scheduler, random numbers, position and
  log. They are replaced in one step, so that a kill at any moment leaves a whole one. A finished run keeps the first.
* ``result.json``, once finished: status ("reached", "diverged" or "not reached"), the epoch of the first two, what
  ``Task.test`` returns (None for a figure that is not finite), and the time of training and evaluation: seconds on the
  wall, cpu_seconds of the processor.

A state is saved after every step for which saving has taken less than ``save_share`` of the time of training, and after
each evaluation. The order of the samples is a function of seed and epoch, so that a run that goes on from a saved state
repeats the steps since then exactly: on the CPU its log and weights are those of a run never stopped, to the bit.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import queue
import random
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_data import MissingDataError
from torch import Tensor, nn
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent.parent / "results"
SAVE_SHARE = 0.05
MAX_EPOCHS = 10_000
INITS = ("fan", "reference")
ALPHAS = ("alpha", "alpha1", "alpha2")
MAGIC = b"phydi_kernels checkpoint 1\n"
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Run:
    """One training: its name and seed name its folder, ``settings`` (JSON values) say what it does."""

    name: str
    settings: Mapping[str, Any]
    seed: int

    def folder(self, out: Path) -> Path:
        return out / f"{self.name}-seed{self.seed}"


@dataclass
class Task:
    """What is trained, and how.

    Args:
        model: left in training mode by ``evaluate`` and ``test``.
        optimizer: of the model's parameters.
        batches: ``batches(epoch, generator)`` are the batches of an epoch, in an order drawn by ``generator`` alone.
        loss: ``loss(batch)`` is the mean loss over the samples (or tokens) of a batch, and their number.
        evaluate: figures on validation data.
        reached: whether the target is reached, from what ``evaluate`` returned.
        test: figures on test data, called once at the end.
        scheduler: stepped at each epoch's end, or with ``scheduled_steps`` after each step.
        clip: largest norm of the gradient of all parameters together.
        evaluations_per_epoch: at equal distances, the last at the epoch's end.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Callable[[int, torch.Generator], Sequence[Any]]
    loss: Callable[[Any], tuple[Tensor, int]]
    evaluate: Callable[[], dict[str, float]]
    reached: Callable[[Mapping[str, float]], bool]
    test: Callable[[], dict[str, float]]
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    scheduled_steps: bool = False
    clip: float | None = None
    evaluations_per_epoch: int = 1


class CorruptCheckpointError(ValueError):
    """A checkpoint that is not what was written."""


class CorruptResultError(ValueError):
    """The result or the log of a finished run that is not what was written."""


class SettingsMismatchError(ValueError):
    """A folder that holds a run of other settings."""


class InterruptedRunError(Exception):
    """The run was asked to stop; its last step is saved."""


def train(
    run: Run,
    out: Path,
    build: Callable[[Mapping[str, Any], int], Task],
    *,
    save_share: float = SAVE_SHARE,
    tensorboard: bool = False,
    on_step: Callable[[float], bool] = lambda epoch: False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> dict[str, Any]:
    """Trains a run to its end, from where an earlier call was stopped; returns :func:`read` of it.

    Args:
        save_share: the part of the time of training that saving may take; ``math.inf`` saves every step.
        tensorboard: writes the log for TensorBoard as well.
        on_step: told the epoch after each step, as a fraction; returns whether to stop.
        say: told what a user should know, such as a corrupt checkpoint.

    Raises:
        SettingsMismatchError: the folder holds a run of other settings.
        CorruptResultError: the run is finished, its result or log cannot be read.
        InterruptedRunError: ``on_step`` asked to stop.
        ValueError: an epoch without batches.
        ModuleNotFoundError: ``tensorboard`` without the package.
    """
    folder = run.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        found = read(run, out)
        if found is not None:
            return found
        _seed(run.seed)
        training = _Training(run, folder, build(run.settings, run.seed), save_share)
        state = _newest_state(run, folder, say)
        if state is not None:
            training.load_state_dict(state)
        writer = _summary_writer(folder, training.steps) if tensorboard else None
        try:
            training.go_on(on_step, writer)
        finally:
            if writer is not None:
                writer.close()
        found = read(run, out)
        assert found is not None
        return found


class _Training:
    """The state of a run between two steps."""

    def __init__(self, run: Run, folder: Path, task: Task, save_share: float) -> None:
        self.run, self.folder, self.task, self.save_share = run, folder, task, save_share
        self.epoch = 0
        self.step = 0
        self.steps = 0
        self.loss_sum = 0.0
        self.samples = 0
        self.seconds = 0.0
        self.cpu_seconds: float | None = 0.0
        self.log = ""
        self.status = ""
        self.status_epoch: float | None = None
        self._trained = self._saved = 0.0

    def state_dict(self) -> dict[str, Any]:
        task = self.task
        return {
            "settings": json.dumps(self.run.settings),
            "model": task.model.state_dict(),
            "optimizer": task.optimizer.state_dict(),
            "scheduler": task.scheduler.state_dict() if task.scheduler is not None else None,
            "random": _random_state(),
            **{key: getattr(self, key) for key in _COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.task.model.load_state_dict(state["model"])
        self.task.optimizer.load_state_dict(state["optimizer"])
        if self.task.scheduler is not None:
            self.task.scheduler.load_state_dict(state["scheduler"])
        for key in _COUNTERS:
            # Unknown where the run was begun without a measurement of it.
            setattr(self, key, state.get(key) if key == "cpu_seconds" else state[key])
        _replace(self.folder / "log.jsonl", self.log.encode())
        _set_random_state(state["random"])

    def go_on(self, on_step: Callable[[float], bool], writer: Any) -> None:
        """From the next step to the end; writes the result."""
        task = self.task
        task.model.train()
        while not self.status:
            # Of a seed torch takes the lowest 32 bits.
            generator = torch.Generator().manual_seed(self.run.seed * MAX_EPOCHS + self.epoch)
            batches = task.batches(self.epoch, generator)
            if not batches:
                raise ValueError(f"{self.run.name}: epoch {self.epoch} has no batches; the training data is too small")
            for batch in batches[self.step :]:
                self._take_step(batch, len(batches), on_step, writer)
                if self.status:
                    break
        self._finish()

    def _take_step(self, batch: Any, steps: int, on_step: Callable[[float], bool], writer: Any) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        finite = self._train_step(batch)
        self.step += 1
        self.steps += 1
        epoch = self.epoch + self.step / steps
        points = self.task.evaluations_per_epoch
        evaluated = finite and self.step in {round(steps * point / points) for point in range(1, points + 1)}
        if evaluated:
            finite = self._evaluate(epoch, start, writer)
        if not finite:
            self.status, self.status_epoch = "diverged", epoch
            self._append({"diverged": True, "epoch": epoch})
        elif self.status_epoch is not None and self.run.settings["stop_at_target"]:
            self.status = "reached"
        elif self.step == steps:
            self._end_epoch()
        if self.task.scheduler is not None and self.task.scheduled_steps and finite:
            self.task.scheduler.step()
        spent = time.perf_counter() - start
        self.seconds += spent
        if self.cpu_seconds is not None:
            self.cpu_seconds += time.process_time() - cpu_start
        self._trained += spent
        stop = on_step(epoch)
        if evaluated or self.status or stop or self._saved <= self.save_share * self._trained:
            self._save()
        if stop:
            raise InterruptedRunError(f"{self.run.name}, seed {self.run.seed}, at epoch {epoch:.2f}")

    def _end_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        if self.task.scheduler is not None and not self.task.scheduled_steps:
            self.task.scheduler.step()
        if self.epoch == self.run.settings["epochs"]:
            self.status = "not reached" if self.status_epoch is None else "reached"

    def _train_step(self, batch: Any) -> bool:
        """Whether the loss is finite."""
        loss, samples = self.task.loss(batch)
        value = loss.item()
        if not math.isfinite(value):
            return False
        self.task.optimizer.zero_grad()
        loss.backward()
        if self.task.clip is not None:
            nn.utils.clip_grad_norm_(self.task.model.parameters(), self.task.clip)
        self.task.optimizer.step()
        self.loss_sum += value * samples
        self.samples += samples
        return True

    def _evaluate(self, epoch: float, start: float, writer: Any) -> bool:
        """Writes a line of the log; whether all figures are finite."""
        # An accuracy is finite whatever the weights are.
        if not all(bool(parameter.isfinite().all()) for parameter in self.task.model.parameters()):
            return False
        metrics = self.task.evaluate()
        if not all(map(math.isfinite, metrics.values())):
            return False
        if self.status_epoch is None and self.task.reached(metrics):
            self.status_epoch = epoch
        scalars = {
            "train_loss": self.loss_sum / self.samples,
            **metrics,
            "learning_rate": self.task.optimizer.param_groups[0]["lr"],
        }
        alphas = _alphas(self.task.model)
        self.loss_sum, self.samples = 0.0, 0
        seconds = self.seconds + time.perf_counter() - start
        self._append({"epoch": epoch, "step": self.steps, **scalars, "alphas": alphas, "seconds": seconds})
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, self.steps)
            for name, value in alphas.items():
                writer.add_scalar(f"alpha/{name}", value, self.steps)
        return True

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, allow_nan=False) + "\n"
        self.log += text
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(text)

    def _save(self) -> None:
        start = time.perf_counter()
        write_checkpoint(self.folder, self.state_dict())
        self._saved += time.perf_counter() - start

    def _finish(self) -> None:
        tested = self.task.test() if self.status != "diverged" else {}
        result = {
            "name": self.run.name,
            "seed": self.run.seed,
            "settings": dict(self.run.settings),
            "status": self.status,
            "epoch": self.status_epoch,
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "parameters": sum(p.numel() for p in self.task.model.parameters()),
            "test": {name: value if math.isfinite(value) else None for name, value in tested.items()},
        }
        # What was appended to the log may not have reached the disk; the result says that it has.
        _replace(self.folder / "log.jsonl", self.log.encode())
        _replace(self.folder / "result.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
        (self.folder / "previous.pt").unlink(missing_ok=True)


_COUNTERS = (
    *("epoch", "step", "steps", "loss_sum", "samples", "seconds", "cpu_seconds"),
    *("log", "status", "status_epoch"),
)


def read(run: Run, out: Path) -> dict[str, Any] | None:
    """The result of a finished run, with its log as a list ``"log"``; None where it is not finished.

    Raises:
        SettingsMismatchError: the folder holds a run of other settings.
        CorruptResultError: the result or the log cannot be read.
    """
    folder = run.folder(out)
    path = folder / "result.json"
    if not path.exists():
        return None
    [result] = _json_values(path, [path.read_text(encoding="utf-8")])
    _check_settings(path, result["settings"], run)
    log = folder / "log.jsonl"
    return {**result, "log": _json_values(log, log.read_text(encoding="utf-8").splitlines())}


def _json_values(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The values of ``texts``, which are from ``path``."""
    try:
        return [json.loads(text) for text in texts]
    except json.JSONDecodeError as error:
        raise CorruptResultError(
            f"{path} is corrupt ({error}): delete {path.with_name('result.json')}, and the run goes on from its "
            "last checkpoint"
        ) from None


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Replaces ``checkpoint.pt`` by ``state`` in one step; the one before becomes ``previous.pt``."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    checkpoint, previous = folder / "checkpoint.pt", folder / "previous.pt"
    if checkpoint.exists():
        link = folder / "previous.tmp"
        link.unlink(missing_ok=True)
        os.link(checkpoint, link)
        os.replace(link, previous)
    _replace(checkpoint, MAGIC, hashlib.sha256(content).digest(), content)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`write_checkpoint` wrote, on the CPU.

    Raises:
        CorruptCheckpointError: the file is not one of them, is cut short or has changed.
    """
    content = path.read_bytes()
    head = len(MAGIC) + DIGEST_BYTES
    if len(content) < head or not content.startswith(MAGIC):
        raise CorruptCheckpointError(f"{path} is no checkpoint: it does not begin as one")
    body = memoryview(content)[head:]
    if hashlib.sha256(body).digest() != content[len(MAGIC) : head]:
        raise CorruptCheckpointError(
            f"{path} is corrupt: its {len(body)} bytes do not have the checksum written with it"
        )
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def _newest_state(run: Run, folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    refused = False
    for name in ("checkpoint.pt", "previous.pt"):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path)
        except CorruptCheckpointError as error:
            say(str(error))
            refused = True
            continue
        _check_settings(path, json.loads(state["settings"]), run)
        if refused:
            say(f"{run.name}, seed {run.seed}: going on from {path}, step {state['steps']}")
        return state
    if refused:
        say(f"{run.name}, seed {run.seed}: no whole checkpoint, starting anew")
    (folder / "log.jsonl").unlink(missing_ok=True)
    return None


def _check_settings(path: Path, found: Mapping[str, Any], run: Run) -> None:
    now = json.loads(json.dumps(run.settings))
    keys = [key for key in {**found, **now} if key not in found or key not in now or found[key] != now[key]]
    if keys:
        differences = ", ".join(f"{key}: {found.get(key, 'absent')}, now {now.get(key, 'absent')}" for key in keys)
        raise SettingsMismatchError(
            f"{path} is of a run of other settings ({differences}): choose another folder, or start over by --fresh"
        )


def run_all(
    runs: Sequence[Run],
    out: Path,
    build: Callable[[Mapping[str, Any], int], Task],
    *,
    processes: int = 2,
    save_share: float = SAVE_SHARE,
    tensorboard: bool = False,
    fresh: bool = False,
) -> list[dict[str, Any]]:
    """Trains all runs, ``processes`` at a time with one thread each, in their order; finished ones are not repeated.

    A progress bar counts the epochs of all. At Ctrl-C each run in progress saves its last step, and the next call goes
    on from there.

    Args:
        fresh: deletes what earlier calls left of these runs.

    Returns:
        :func:`read` of each run.

    Raises:
        SettingsMismatchError: a folder holds a run of other settings.
        CorruptResultError: a result or log of a finished run cannot be read.
        ModuleNotFoundError: ``tensorboard`` without the package.
    """
    if tensorboard:
        check_tensorboard()
    if fresh:
        for run in runs:
            shutil.rmtree(run.folder(out), ignore_errors=True)
    unfinished = [run for run in runs if read(run, out) is None]
    # Read by the OpenMP and BLAS of the processes started below, as they load.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    context = multiprocessing.get_context("spawn")
    stop, messages = context.Event(), context.Queue()
    total = sum(run.settings["epochs"] for run in runs)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(stop, messages))
    with tqdm(
        total=total,
        initial=total - sum(run.settings["epochs"] for run in unfinished),
        bar_format="{percentage:3.0f}%|{bar}| {n:.1f}/{total:.0f} epochs [{elapsed}<{remaining}{postfix}]",
        mininterval=0.1 if sys.stderr.isatty() else 30.0,
    ) as bar:
        progress = _Progress(bar, len(unfinished))
        try:
            futures = {
                pool.submit(_train_in_worker, index, run, out, build, save_share, tensorboard): index
                for index, run in enumerate(unfinished)
            }
            pending: set[Future[None]] = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                progress.take(messages)
                for future in done:
                    future.result()
                    progress.finished(futures[future], unfinished[futures[future]].settings["epochs"])
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            progress.take(messages)
    return [result for run in runs if (result := read(run, out)) is not None]


class _Progress:
    """The bar of :func:`run_all`: epochs done, runs finished."""

    def __init__(self, bar: Any, runs: int) -> None:
        self.bar, self.start, self.runs, self.done = bar, bar.n, runs, 0
        self.epochs: dict[int, float] = {}

    def take(self, messages: Any) -> None:
        while True:
            try:
                index, message = messages.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, str):
                self.bar.write(message, file=sys.stderr)
            else:
                self._to(index, message)

    def finished(self, index: int, epochs: float) -> None:
        """A run that reached its target early counts in full."""
        self.done += 1
        self.bar.set_postfix_str(f"{self.done}/{self.runs} runs", refresh=False)
        self._to(index, epochs)

    def _to(self, index: int, epoch: float) -> None:
        self.epochs[index] = max(epoch, self.epochs.get(index, 0.0))
        # Differences would add up to a little more than the total.
        self.bar.n = self.start + sum(self.epochs.values())
        self.bar.update(0)


_worker: tuple[Any, Any]


def _start_worker(stop: Any, messages: Any) -> None:
    global _worker
    _worker = stop, messages
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole group of processes; the first one asks the others to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the first process is killed, its workers would train on beside the next call's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_in_worker(index: int, run: Run, out: Path, build: Any, save_share: float, tensorboard: bool) -> None:
    stop, messages = _worker

    def on_step(epoch: float) -> bool:
        messages.put((index, epoch))
        return stop.is_set()

    def say(text: str) -> None:
        messages.put((index, text))

    train(run, out, build, save_share=save_share, tensorboard=tensorboard, on_step=on_step, say=say)


def cell(values: Sequence[float | None], otherwise: Sequence[str]) -> str:
    """A figure in a table: mean ± standard error over seeds; where a seed has no value, each seed's own.

    ``otherwise`` says what is shown of a seed without a value; seeds that are shown alike are shown once.
    """
    known = [value for value in values if value is not None]
    if len(known) == len(values):
        mean, error = mean_and_error(known)
        return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"
    shown = [other if value is None else f"{value:.2f}" for value, other in zip(values, otherwise, strict=True)]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def processor_time(seconds: Sequence[float | None]) -> str:
    """What a caption says of the runs' ``cpu_seconds``; nothing where one is unknown."""
    known = [value for value in seconds if value is not None]
    return f"; {sum(known) / 60:.0f} processor minutes of training" if len(known) == len(seconds) else ""


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds and its standard error, std(ddof=1)/sqrt(k); no error of one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error


def check_tensorboard() -> None:
    """Raises ModuleNotFoundError where TensorBoard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ModuleNotFoundError("--tensorboard needs the package tensorboard: pip install tensorboard")


def _summary_writer(folder: Path, steps: int) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    # Steps that are repeated after a kill replace those written before.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1)


def _alphas(model: nn.Module) -> dict[str, float]:
    """By module, and with two alphas in one also by number."""
    found = {}
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        if last in ALPHAS and parameter.numel() == 1:
            found[module if last == "alpha" else name] = parameter.item()
    return found


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {"torch": torch.get_rng_state(), "numpy": (name, keys.tolist(), *rest), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _replace(path: Path, *parts: Any) -> None:
    """Writes a file in one step: a kill leaves the old one or the new one, whole."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    # The new name is on the disk once the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits until no other process trains the run of this folder."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def add_arguments(parser: argparse.ArgumentParser, presets: Iterable[str], data: Iterable[str]) -> None:
    """The arguments that the experiments share."""
    parser.add_argument("--preset", choices=presets, default="cpu", help="sizes of everything (default: cpu)")
    parser.add_argument("--data", choices=data, help="data set (default: the preset's)")
    parser.add_argument("--data-folder", type=Path, default=Path("data"), help="has the data sets (default: data)")
    parser.add_argument("--init", choices=INITS, help="initial weights (default: the preset's)")
    parser.add_argument("--seeds", type=positive, help="runs of each model (default: the preset's)")
    parser.add_argument("--processes", type=positive, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--device", default="cpu", help="of the models (default: cpu)")
    parser.add_argument("--out", type=Path, default=RESULTS / "convergence", help="folder of logs and checkpoints")
    parser.add_argument(
        "--file",
        type=Path,
        help="the figures (default: benchmarks/results/ for all of the cpu preset, else in the folder of the logs)",
    )
    parser.add_argument("--save-share", type=float, default=SAVE_SHARE, help="part of the time for checkpoints")
    parser.add_argument("--fresh", action="store_true", help="train again what is finished or in progress")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's logs as well")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the file, and train nothing")


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`run_all` among the arguments."""
    return {key: getattr(args, key) for key in ("processes", "save_share", "tensorboard", "fresh")}


@contextmanager
def exits(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the program with one line where a user can mend what is wrong, and at Ctrl-C."""
    try:
        yield
    except (MissingDataError, SettingsMismatchError, CorruptResultError, ModuleNotFoundError) as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "Stopped. The same command goes on from here.\n")


def write_figures(file: Path, figures: Mapping[str, Any]) -> None:
    """Writes a JSON file of one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, allow_nan=False) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """An argument of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return int(text)
