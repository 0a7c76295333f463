"""Tile sizes of the products: a fixed table, or what PHYDI_AUTOTUNE=1 measured on the card at hand.

A key says nothing of the batch: a layer gives the same bits for a row at every batch of a plan, and nothing is
compiled again. plans_cuda, which knows the batch, chooses between kernels.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ...plans_cuda import architecture, dtype_class, stream_tile
from . import capability
from ._launch import precision


class Config(NamedTuple):
    block_m: int  # rows, or pixels
    block_n: int  # output features
    block_k: int  # input features of a step
    warps: int
    stages: int


# Kernel, type, most terms (n, or P for the kernels of R products) -> {architecture: tiles}; 0 where none is named.
TABLE: dict[tuple[str, str, int], dict[int, Config]] = {
    ("stream16", "16-bit", 4): {0: Config(16, 64, 64, 4, 3)},
    ("stream16", "16-bit", 8): {0: Config(16, 64, 32, 4, 3)},
    ("stream16", "tf32", 4): {0: Config(16, 64, 32, 4, 3)},
    ("stream16", "tf32", 8): {0: Config(16, 64, 16, 4, 3)},
    ("stream16", "ieee", 4): {0: Config(16, 64, 32, 4, 3)},
    ("stream16", "ieee", 8): {0: Config(16, 64, 16, 4, 3)},
    ("stream64", "16-bit", 4): {
        0: Config(64, 64, 32, 8, 3),
        90: Config(64, 64, 32, 4, 3),
        100: Config(64, 64, 32, 4, 3),
    },
    ("stream64", "16-bit", 8): {0: Config(64, 64, 16, 8, 3)},
    ("stream64", "tf32", 4): {0: Config(64, 64, 16, 8, 3)},
    ("stream64", "tf32", 8): {0: Config(64, 64, 16, 8, 2)},
    ("stream64", "ieee", 4): {0: Config(64, 64, 16, 8, 3)},
    ("stream64", "ieee", 8): {0: Config(64, 64, 16, 8, 2)},
    ("stream128", "16-bit", 4): {
        0: Config(128, 64, 32, 8, 3),
        90: Config(128, 128, 32, 8, 3),
        100: Config(128, 128, 32, 8, 3),
    },
    ("stream128", "16-bit", 8): {0: Config(64, 64, 16, 8, 3)},
    ("stream128", "tf32", 4): {0: Config(128, 64, 16, 8, 3)},
    ("stream128", "tf32", 8): {0: Config(64, 64, 16, 8, 2)},
    ("stream128", "ieee", 4): {0: Config(64, 64, 16, 8, 3)},
    ("stream128", "ieee", 8): {0: Config(64, 64, 16, 8, 2)},
    ("panel", "16-bit", 2): {
        0: Config(128, 64, 32, 8, 3),
        90: Config(128, 128, 32, 8, 3),
        100: Config(128, 128, 32, 8, 3),
    },
    ("panel", "16-bit", 4): {0: Config(128, 64, 32, 8, 3)},
    ("panel", "16-bit", 8): {0: Config(128, 32, 32, 8, 3)},
    ("panel", "tf32", 4): {0: Config(128, 64, 16, 8, 3)},
    ("panel", "tf32", 8): {0: Config(128, 32, 16, 8, 2)},
    ("panel", "ieee", 4): {0: Config(64, 32, 16, 8, 3)},
    ("panel", "ieee", 8): {0: Config(32, 32, 16, 8, 2)},
    ("fused", "16-bit", 2): {0: Config(128, 64, 32, 8, 3)},
    ("fused", "16-bit", 4): {0: Config(64, 128, 32, 8, 3)},
    ("fused", "tf32", 4): {0: Config(64, 64, 16, 8, 3)},
    ("fused", "ieee", 4): {0: Config(64, 32, 16, 8, 3)},
    ("epilogue", "16-bit", 2): {
        0: Config(128, 64, 32, 8, 3),
        90: Config(128, 128, 32, 8, 3),
        100: Config(128, 128, 32, 8, 3),
    },
    ("epilogue", "16-bit", 4): {0: Config(128, 64, 32, 8, 3)},
    ("epilogue", "tf32", 4): {0: Config(64, 64, 32, 8, 3)},
    ("epilogue", "ieee", 4): {0: Config(64, 32, 16, 8, 3)},
}


def stream_kernel(M: int) -> str:
    return f"stream{stream_tile(M)}"


def key(kernel: str, dtype: torch.dtype, n: int) -> tuple[str, str, int]:
    """The key of TABLE for ``n`` terms: the one of the fewest that holds them."""
    of_dtype = dtype_class(dtype, precision(dtype) == "tf32")
    return kernel, of_dtype, min(most for name, kind, most in TABLE if (name, kind) == (kernel, of_dtype) and n <= most)


def fixed(kernel: str, dtype: torch.dtype, n: int, p: int, arch: int) -> Config:
    """The table's entry; where a block has fewer features than a tile, the narrowest tile that holds it."""
    entry = TABLE[key(kernel, dtype, n)]
    tile = entry.get(arch, entry[0])
    # Of stream features are the rows of a product: on sm_90 a warpgroup's has 64.
    narrow = 32 if p <= 32 and not kernel.startswith("stream") else 64
    return tile._replace(block_n=min(tile.block_n, narrow)) if p <= 64 else tile


def config(
    kernel: str, dtype: torch.dtype, n: int, p: int, device: torch.device, run: Callable[[Config], object]
) -> Config:
    """The tiles of a call: the table's, or with PHYDI_AUTOTUNE=1 the fastest of its neighbours, by ``run``.

    What was measured is kept in cache_file(), for each card, and read again by every process that sets the variable.
    """
    tile = fixed(kernel, dtype, n, p, architecture(capability(device)))
    if not autotunes() or device.type != "cuda":
        return tile
    card = torch.cuda.get_device_name(device)
    name = "/".join(map(str, (*key(kernel, dtype, n), tile.block_n)))
    known = load_cache(cache_file()).get(card, {})
    if name not in known and not torch.cuda.is_current_stream_capturing():
        known = {name: fastest(neighbours(tile), run)}
        save_cache(cache_file(), card, known)
    return known.get(name, tile)


def autotunes() -> bool:
    return os.environ.get("PHYDI_AUTOTUNE") == "1"


def cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phydi_kernels" / "gpu_configs.json"


def neighbours(tile: Config) -> Iterator[Config]:
    """The tile first: of equals it wins."""
    yield tile
    for block_m in (tile.block_m, tile.block_m * 2):
        for block_k in (tile.block_k, tile.block_k * 2):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    other = Config(block_m, tile.block_n, block_k, warps, stages)
                    if other != tile:
                        yield other


def measure(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def fastest(tiles: Iterable[Config], run: Callable[[Config], object]) -> Config:
    """Of those that the card can run."""
    times: dict[Config, float] = {}
    for tile in tiles:
        try:
            times[tile] = measure(functools.partial(run, tile))
        except (triton.runtime.errors.TritonError, triton.CompilationError):
            continue  # more shared memory or registers than there are
    return min(times, key=times.__getitem__)


def load_cache(path: Path) -> dict[str, dict[str, Config]]:
    """{card: {key: tiles}}. A file that cannot be read is named in a warning, and counts as empty."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {card: {name: Config(*map(int, tile)) for name, tile in of.items()} for card, of in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not a cache of PHYDI_AUTOTUNE ({error}): measuring again", stacklevel=2)
        return {}


def save_cache(path: Path, card: str, tiles: dict[str, Config]) -> None:
    """Adds to what other processes stored; one that reads it sees the old file or the new one."""
    stored = load_cache(path)
    stored[card] = {**stored.get(card, {}), **tiles}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(stored, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(part, path)
