"""plans.py against the times that benchmarks/grid.py recorded of each plan."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TERMS, FEATURES, DTYPES = (2, 4, 8), (256, 512, 1024, 2048, 4096), ("float32", "bfloat16")
# A file for each instruction set whose costs plans.py has from measurements, and its largest batch.
GRIDS = {"avx512_bf16": ("grid.json", 4096), "avx512": ("grid_avx512.json", 4096), "avx2": ("grid_avx2.json", 128)}
# The points, features and batch, that miss it: streams from beyond L2, whose speed the rates know in three steps alone.
BEHIND = {
    ("avx512", 2, "float32", True): {(4096, 1), (4096, 2)},
    ("avx512", 4, "float32", False): {(2048, 2)},
    ("avx512", 8, "float32", False): {(4096, 8)},
    ("avx512", 4, "bfloat16", True): {(2048, 1)},
}


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        import grid

        return grid


@pytest.fixture(scope="module", params=GRIDS)
def isa(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def rows(isa) -> list[dict[str, Any]]:
    """The grid at one thread."""
    recorded = json.loads((BENCHMARKS / "results" / GRIDS[isa][0]).read_text())
    assert recorded["machine"]["instruction_set"] == isa
    return [row for row in recorded["rows"] if row["threads"] == 1]


def test_grid_is_complete(isa, rows):
    batches = [2**k for k in range(GRIDS[isa][1].bit_length())]
    points = Counter((row["n"], row["features"], row["batch"], row["dtype"]) for row in rows)
    assert points == Counter(itertools.product(TERMS, FEATURES, batches, DTYPES))


@pytest.mark.parametrize("prepacked", (False, True), ids=("F", "F-hat"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", TERMS)
def test_chosen_plan_is_within_15_percent_of_the_best(n, dtype, prepacked, grid, isa, rows):
    """Or within two microseconds of it, which is what a call from Python varies by."""
    assert (grid.ALLOWED, grid.ALLOWED_SECONDS) == (1.15, 2e-6)
    some = [row for row in rows if row["n"] == n and row["dtype"] == dtype and grid.is_behind(row, prepacked, isa)]
    behind = {(row["features"], row["batch"]): grid.regret(row, prepacked, isa) for row in some}
    assert behind.keys() == BEHIND.get((isa, n, dtype, prepacked), set()), behind


@pytest.mark.usefixtures("library")
def test_a_point_can_be_measured(grid):
    row = grid.Case(2, 256, "float32").measure(batch=2, threads=1, seconds=0.0)
    names = {plan.name.lower() for plan in grid.LINEAR_PLANS}
    assert row["ratio"].keys() == {"ours", "prepacked"} | names | {f"prepacked {name}" for name in names}
    assert all(ratio > 0 for ratio in row["ratio"].values())
