"""Tile sizes of the products: a fixed table, or what PHYDI_AUTOTUNE=1 measured on the card at hand.

A key says nothing of the batch: nothing is compiled again for another one. plans_cuda, which knows it, chooses between
the kernels, and for stream between five tiles and the parts of the sum.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ...plans_cuda import architecture, dtype_class
from . import capability
from ._launch import precision


class Config(NamedTuple):
    block_m: int  # rows, or pixels; of stream (input block, row)
    block_n: int  # output features; of stream (block of F, feature)
    block_k: int  # input features of a step
    warps: int
    stages: int


# Kernel, type, most terms (n, or P for the kernels of R products) -> {architecture: tiles}; 0 where none is named.
TABLE: dict[tuple[str, str, int], dict[int, Config]] = {
    ("stream0", "16-bit", 8): {0: Config(64, 64, 32, 4, 3)},
    ("stream0", "tf32", 8): {0: Config(64, 64, 16, 4, 3), 80: Config(64, 64, 16, 8, 3)},
    ("stream0", "ieee", 8): {0: Config(64, 64, 16, 4, 3), 90: Config(64, 64, 16, 8, 3)},
    ("stream16", "16-bit", 8): {0: Config(16, 128, 64, 4, 4), 89: Config(16, 128, 32, 4, 4)},
    ("stream16", "tf32", 8): {0: Config(16, 128, 32, 4, 4)},
    ("stream16", "ieee", 8): {0: Config(16, 64, 16, 4, 3), 120: Config(16, 64, 32, 4, 3)},
    ("stream64", "16-bit", 8): {0: Config(64, 128, 64, 4, 4)},
    ("stream64", "tf32", 8): {0: Config(64, 128, 32, 4, 4)},
    ("stream64", "ieee", 8): {0: Config(64, 64, 16, 4, 3)},
    # On sm_100 four warps sum over l without shared memory.
    ("stream128", "16-bit", 8): {0: Config(128, 128, 64, 8, 3), 100: Config(128, 128, 64, 4, 3)},
    ("stream128", "tf32", 8): {0: Config(128, 128, 32, 8, 3), 100: Config(128, 128, 32, 4, 3)},
    ("stream128", "ieee", 8): {0: Config(64, 64, 16, 4, 3)},
    ("stream256", "16-bit", 8): {
        0: Config(256, 128, 32, 8, 3),
        90: Config(256, 128, 64, 8, 3),
        100: Config(128, 128, 64, 4, 3),
    },
    ("stream256", "tf32", 8): {
        0: Config(128, 128, 32, 8, 3),
        90: Config(256, 128, 32, 8, 3),
        100: Config(128, 128, 32, 4, 3),
    },
    ("stream256", "ieee", 8): {0: Config(64, 64, 16, 4, 3)},
    ("fused", "16-bit", 2): {0: Config(128, 64, 32, 8, 3)},
    ("fused", "16-bit", 4): {0: Config(64, 128, 32, 8, 3)},
    ("fused", "tf32", 4): {0: Config(64, 64, 16, 8, 3), 120: Config(64, 32, 16, 8, 3)},
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


# The kernels of R products, whose tiles have one block of features; those of stream have n.
SEVERAL = ("fused", "epilogue")


def key(kernel: str, dtype: torch.dtype, n: int, convolution: bool = False) -> tuple[str, str, int]:
    """The key of TABLE for ``n`` terms: the one of the fewest that holds them."""
    kind = dtype_class(dtype, precision(dtype, convolution) == "tf32")
    return kernel, kind, min(most for most in (2, 4, 8) if n <= most and (kernel, kind, most) in TABLE)


def fixed(kernel: str, dtype: torch.dtype, n: int, p: int, arch: int, convolution: bool = False) -> Config:
    """The table's entry; where a block has fewer features than a tile, the narrowest tile that holds it."""
    entry = TABLE[key(kernel, dtype, n, convolution)]
    tile = entry.get(arch, entry[0])
    return tile._replace(block_n=min(tile.block_n, 32 if p <= 32 else 64)) if p <= 64 and kernel in SEVERAL else tile


def config(
    kernel: str,
    dtype: torch.dtype,
    n: int,
    p: int,
    device: torch.device,
    run: Callable[[Config], object],
    convolution: bool = False,
) -> Config:
    """The tiles of a call: the table's, or with PHYDI_AUTOTUNE=1 the fastest of its neighbours, by ``run``.

    What was measured is kept in cache_file(), for each card, and read again by every process that sets the variable.
    """
    tile = fixed(kernel, dtype, n, p, architecture(capability(device)), convolution)
    if not autotunes() or device.type != "cuda":
        return tile
    card = torch.cuda.get_device_name(device)
    name = "/".join(map(str, (*key(kernel, dtype, n, convolution), tile.block_n)))
    name += "/convolution" if convolution else ""
    file = cache_file()
    known = _known(file, card)
    if name not in known:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return tile
            known[name] = fastest(tile, run)
        save_cache(file, card, {name: known[name]})
    return known[name]


@functools.cache
def _known(file: Path, card: str) -> dict[str, Config]:
    """What this process knows: a call must not read a file."""
    return load_cache(file).get(card, {})


def autotunes() -> bool:
    return os.environ.get("PHYDI_AUTOTUNE") == "1"


def cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phydi_kernels" / "gpu_configs.json"


def neighbours(tile: Config) -> Iterator[Config]:
    for block_m in (tile.block_m, tile.block_m * 2):
        for block_k in (tile.block_k, tile.block_k * 2):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    other = Config(block_m, tile.block_n, block_k, warps, stages)
                    if other != tile:
                        yield other


def measure(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def fastest(tile: Config, run: Callable[[Config], object]) -> Config:
    """Of a tile and its neighbours the fastest that the card can run; of equals the tile."""
    times: dict[Config, float] = {}
    for other in (tile, *neighbours(tile)):
        try:
            times[other] = measure(functools.partial(run, other))
        except (triton.runtime.errors.TritonError, RuntimeError):
            continue  # more shared memory or registers than there are, or a pass of the compiler failed
    return min(times, key=times.__getitem__, default=tile)


def load_cache(path: Path) -> dict[str, dict[str, Config]]:
    """{card: {key: tiles}}. A file that cannot be read is named in a warning, and counts as empty."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {card: {name: _stored_tile(tile) for name, tile in of.items()} for card, of in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{path} is not a cache of PHYDI_AUTOTUNE ({error}): measuring again", stacklevel=2)
        return {}


def _stored_tile(entry: list[int]) -> Config:
    tile = Config(*entry)
    if not all(isinstance(size, int) and size > 0 for size in tile) or any(size & (size - 1) for size in tile[:4]):
        raise ValueError(f"{entry} are no tiles")
    return tile


def save_cache(path: Path, card: str, tiles: dict[str, Config]) -> None:
    """Adds to what other processes stored; one that reads it sees the old file or the new one.

    Where it cannot be written a warning says so, and the next process measures again.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            stored = load_cache(path)
            stored[card] = {**stored.get(card, {}), **tiles}
            descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(stored, file, indent=1, sort_keys=True)
            os.replace(part, path)
    except OSError as error:
        warnings.warn(f"what PHYDI_AUTOTUNE measured cannot be kept in {path}: {error}", stacklevel=2)
