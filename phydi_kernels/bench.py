"""``phydi-kernels bench``: the benchmarks, which come with a source checkout and not with the installed package."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", default="1,2", metavar="N[,N...]", help="torch's thread counts (default: 1,2)")
    parser.add_argument("-k", metavar="EXPRESSION", help="run only the benchmarks whose names match, as for pytest")


def run(args: argparse.Namespace) -> int:
    if not BENCHMARKS.is_dir():
        print(
            f"There are no benchmarks at {BENCHMARKS}: run this in a source checkout, installed with pip install -e ."
        )
        return 1
    if importlib.util.find_spec("pytest_benchmark") is None:
        print("pytest-benchmark is not installed: pip install pytest-benchmark")
        return 1
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--threads", args.threads]
    if args.k:
        command += ["-k", args.k]
    return subprocess.run(command, cwd=BENCHMARKS.parent).returncode
