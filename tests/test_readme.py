"""The README's figures are those of the committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    (
        "report.py",
        "report.py --training",
        "report.py --adapters",
        "report.py --discriminant",
        "grid.py",
        "gda_errors.py",
    ),
)
def test_benchmark_tables_are_those_of_the_results_files(command):
    program, *options = command.split()
    table = subprocess.check_output([sys.executable, ROOT / "benchmarks" / program, *options, "--markdown"], text=True)
    shown = re.search(
        rf"<!-- python benchmarks/{re.escape(command)} --markdown -->\n(.*?)<!-- end -->",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    assert shown is not None and shown[1].strip() == table.strip()


def test_every_file_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\]\(([\w./-]+)\)", text) + re.findall(r"`([\w/-]+\.(?:py|md|h|cpp|toml))`", text)
    assert named
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "csrc" / "cpu" / name).exists()]
    assert missing == []
