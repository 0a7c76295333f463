"""Options of the benchmarks, the fixture that checks, times and records one case, and the table at the end."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import report
import torch
from rivals import MIN_ROUNDS, Rival, check_results, paired_times, synchronize
from threadpoolctl import threadpool_limits

HERE = Path(__file__).resolve().parent
ROWS = pytest.StashKey[list[dict[str, Any]]]()
TRAINING = pytest.StashKey[list[dict[str, Any]]]()
ADAPTERS = pytest.StashKey[list[dict[str, Any]]]()
OUTRUN = pytest.StashKey[list[dict[str, Any]]]()
# How far a ratio to the dense layer may be above that of the same row with one thread.
MORE_THREADS = 0.1


def _limits(
    asked: Mapping[str, float], case: Mapping[str, Any], threads: int, rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """``asked`` at one thread; with more, a ratio is held to that of the same case at one thread."""
    if threads == 1:
        return dict(asked)
    for row in rows:
        if "ratio" in row["asked"] and row["threads"] == 1 and case.items() <= row.items():
            return {"ratio": row["ratio"]["ours"] + MORE_THREADS}
    return {}


def _thread_counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers >= 1 such as 1 or 1,2")
    return [int(word) for word in words]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--threads",
        type=_thread_counts,
        default=[1],
        metavar="N[,N...]",
        help="torch's thread counts to run the benchmarks with (default: 1)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    # Its own tables have one row a test and no ratios; --benchmark-verbose brings them back.
    config.option.benchmark_quiet = True
    config.stash[ROWS] = []
    config.stash[TRAINING] = []
    config.stash[ADAPTERS] = []
    config.stash[OUTRUN] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "threads" in metafunc.fixturenames:
        counts = metafunc.config.getoption("threads")
        metafunc.parametrize("threads", counts, indirect=True, scope="session", ids=lambda n: f"threads{n}")


@pytest.fixture(scope="session")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def release_settings() -> Iterator[None]:
    """The settings of a release run, where the tests in the same process chose others; float32 means float32."""
    # The tests fill every empty tensor with NaN, which costs a pass over memory.
    fill = torch.utils.deterministic.fill_uninitialized_memory
    convolution = torch.backends.cudnn.conv.fp32_precision
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = convolution
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def compare(benchmark, threads: int, device: torch.device, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Checks every rival against float64, times all of them in turns, and records a row of the table.

    pytest-benchmark times ``ours`` once more, by itself: its --benchmark-save and --benchmark-compare work.
    """

    def compare(
        case: Mapping[str, Any],
        rivals: Mapping[str, Rival],
        expected: Mapping[str, torch.Tensor],
        *,
        terms: int,
        asked: Mapping[str, float],
    ) -> None:
        for name, rival in rivals.items():
            check_results(name, rival, expected, terms)

        def ours() -> None:
            rivals["ours"].call()
            synchronize(device)

        if not benchmark.enabled:
            benchmark(ours)
            return
        times, calls = paired_times(rivals, device)
        own = {"bench_training.py": TRAINING, "bench_adapters.py": ADAPTERS}
        rows = request.config.stash[own.get(request.path.name, ROWS)]
        stated = _limits(asked, case, threads, rows) if device.type == "cpu" else {}
        row = {**case, "threads": threads, **report.summary(times), "asked": stated}
        benchmark.extra_info.update(row)
        rows.append(row)
        benchmark.pedantic(ours, rounds=MIN_ROUNDS, iterations=calls["ours"])

    return compare


@pytest.fixture
def outrun(benchmark, threads: int, device: torch.device, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Checks ours against one rival, times both in turns, and records how many times faster ours is."""

    def outrun(
        case: str,
        against: str,
        *,
        ours: Rival,
        rival: Rival,
        asked: float,
        factor: float = 1.0,
        check: bool = True,
        tolerance: float = 1e-8,
        once: bool = False,
    ) -> None:
        """``factor`` times the rival's time counts; results agree within ``tolerance`` of the largest.

        A rival of the better part of a minute has one round, in which its results are checked as well.
        """
        with threadpool_limits(threads):
            times: dict[str, list[float]] = {"ours": [], "rival": []}
            if check:
                results = []
                for name, side in (("ours", ours), ("rival", rival)):
                    start = time.perf_counter()
                    results.append(side.call())
                    times[name].append(time.perf_counter() - start)
                for name, a, b in zip(ours.results, *results, strict=True):
                    error = float((a - b).abs().max() / b.abs().max())
                    # Written so that a NaN fails.
                    assert error <= tolerance, f"{name}: off by {error:.1e} of the largest, allowed {tolerance:.1e}"
            if not benchmark.enabled:
                benchmark(ours.call)
                return
            if not once:
                times, _ = paired_times({"ours": ours, "rival": rival}, device)
            row = {
                "case": case,
                "against": against,
                "threads": threads,
                **report.speedup(times["ours"], [factor * t for t in times["rival"]]),
                "asked": asked if threads == 1 else None,
            }
            benchmark.extra_info.update(row)
            request.config.stash[OUTRUN].append(row)
            benchmark.pedantic(ours.call, rounds=1 if once else MIN_ROUNDS)

    return outrun


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    folders = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    for rows, table, file, source in (
        (config.stash[ROWS], report.text, f"{device.type}.json", HERE),
        (config.stash[TRAINING], report.text, f"training_{device.type}.json", HERE / "bench_training.py"),
        (config.stash[ADAPTERS], report.text, f"adapters_{device.type}.json", HERE / "bench_adapters.py"),
        (config.stash[OUTRUN], report.speedup_text, f"gda_{device.type}.json", HERE / "bench_gda.py"),
    ):
        if not rows:
            continue
        results = {"machine": report.machine(device), "rows": rows}
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(table(results))
        complete = (HERE in folders or source in folders) and not terminalreporter.stats.get("deselected")
        if exitstatus == 0 and complete:
            path = HERE / "results" / file
            report.save(results, path)
            terminalreporter.write_line(f"Written to {path.relative_to(HERE.parent)}.")
        else:
            terminalreporter.write_line("Not written to benchmarks/results: a part of the benchmarks, or a failure.")
