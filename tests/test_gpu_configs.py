"""Tile sizes: the fixed table names every kernel that a driver starts, and PHYDI_AUTOTUNE=1 keeps the fastest."""

from __future__ import annotations

import inspect
import itertools
import json
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the configurations are those of Triton kernels")

from phydi_kernels import plans_cuda  # noqa: E402
from phydi_kernels.kernels.gpu import _launch, configs, phm_linear, phm_linear_factored  # noqa: E402
from phydi_kernels.kernels.gpu.configs import Config  # noqa: E402
from phydi_kernels.plans_cuda import CudaPlan  # noqa: E402

CUDA = torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (0, 1, 4, 16, 17, 64, 65, 300, 8192)


@pytest.fixture(params=("ieee", "tf32"))
def precision(request, monkeypatch):
    monkeypatch.setattr(_launch, "tf32", lambda convolution: request.param == "tf32")
    return request.param


def _asked_for() -> set[tuple[str, torch.dtype, int]]:
    """(kernel, type, n) of every configuration that the drivers can ask for, on the terms of plans_cuda."""
    streams = {f"stream{height}" for height in (0, 16, 64, 128, 256)}
    several = {plan.value for plan in (CudaPlan.FUSED, CudaPlan.EPILOGUE)}
    asked = set(itertools.product(streams, DTYPES, range(1, plans_cuda.MAX_STREAM + 1)))
    return asked | set(itertools.product(several, DTYPES, range(1, plans_cuda.MAX_RESULTS + 1)))


def test_every_call_has_an_entry_and_every_entry_a_call(monkeypatch):
    keys = set()
    for tf32 in (False, True):
        monkeypatch.setattr(_launch, "tf32", lambda convolution, tf32=tf32: tf32)
        keys |= {configs.key(*asked) for asked in _asked_for()}
    assert keys == set(configs.TABLE)


def test_entries_are_tiles_that_products_take(precision):
    for (kernel, dtype, n), arch, p in itertools.product(_asked_for(), plans_cuda.CARDS, (1, 32, 33, 64, 65, 4096)):
        tile = configs.fixed(kernel, dtype, n, p, arch)
        for size in tile[:3]:
            assert size >= 16 and size & (size - 1) == 0
        assert tile.warps in (4, 8) and 2 <= tile.stages <= 4


def test_narrow_blocks_have_narrow_tiles(precision):
    """The narrowest of 32 and 64 that holds a block; those of stream hold several."""
    for (kernel, dtype, n), arch in itertools.product(_asked_for(), plans_cuda.CARDS):
        wide = configs.fixed(kernel, dtype, n, 65, arch)
        assert wide == configs.fixed(kernel, dtype, n, 4096, arch)
        for p, most in ((1, 32), (32, 32), (33, 64), (64, 64)):
            narrow = wide if kernel.startswith("stream") else wide._replace(block_n=min(wide.block_n, most))
            assert configs.fixed(kernel, dtype, n, p, arch) == narrow


def test_entries_are_those_of_architectures_that_plans_know():
    assert all(0 in entry and set(entry) <= {0, *plans_cuda.CARDS} for entry in configs.TABLE.values())


def test_a_key_is_that_of_the_fewest_terms_that_hold_a_call(precision):
    for kernel, dtype, n in _asked_for():
        name, kind, most = configs.key(kernel, dtype, n)
        assert (name, kind) == (kernel, precision if dtype is torch.float32 else "16-bit")
        assert n <= most and not any((name, kind, fewer) in configs.TABLE for fewer in range(n, most))


def test_the_key_says_nothing_of_the_batch(monkeypatch):
    """The tiles of a layer are those of its weights, but for stream's height: rows change the number of programs."""
    assert list(inspect.signature(configs.key).parameters) == ["kernel", "dtype", "n", "convolution"]
    started = []
    monkeypatch.setattr(_launch, "run", lambda kernel, grid, args, meta: started.append(meta))
    A, F, V = torch.zeros(4, 4, 4), torch.zeros(4, 48, 48), torch.zeros(7, 4)
    metas, heights = [], []
    for rows in ROWS[1:]:
        x = torch.zeros(rows, 192)
        started.clear()
        if plans_cuda.stream_size(rows, 4) > 128:
            phm_linear.phm_linear(x, A, F, None, None, None, "none", CudaPlan.STREAM)
            # What follows adds the parts of a sum.
            heights.append(started[0])
            started.clear()
        for plan in (CudaPlan.FUSED, CudaPlan.EPILOGUE, CudaPlan.PASSES):
            phm_linear_factored.phm_linear_factored(x, V.mT[:4].mT, V, V, F, None, None, None, "none", plan)
        metas.append(list(started))
    assert len(metas[0]) >= 4 and all(meta == metas[0] for meta in metas[1:])
    assert len(heights) >= 4 and all(meta == heights[0] for meta in heights[1:])


@pytest.mark.parametrize(("capability", "arch"), ((89, 89), (90, 90), (121, 120)))
def test_a_call_has_the_entry_of_its_card(monkeypatch, capability, arch):
    monkeypatch.setattr(configs, "capability", lambda device: capability)
    own = {0: TILE, arch: TILE._replace(stages=4)}
    monkeypatch.setitem(configs.TABLE, configs.key("epilogue", torch.bfloat16, 4), own)
    tile = configs.config("epilogue", torch.bfloat16, 4, 4096, torch.device("cpu"), lambda tile: None)
    assert tile == own[arch]


class Card:
    """A CUDA device whose kernels take a time of ours."""

    def __init__(self) -> None:
        self.name = "Card A"
        self.capturing = False
        self.times: dict[Config, float | Exception] = {}
        self.ran: list[Config] = []

    def run(self, tile: Config) -> None:
        self.ran.append(tile)

    def measure(self, run) -> float:
        run()
        time = self.times.get(self.ran[-1], 1.0)
        if isinstance(time, Exception):
            raise time
        return time

    def config(self, p: int = 4096, kernel: str = "epilogue") -> Config:
        """As in a process that has not called it before."""
        configs._known.cache_clear()
        return configs.config(kernel, torch.bfloat16, 4, p, CUDA, self.run)


@pytest.fixture
def card(monkeypatch, tmp_path):
    card = Card()
    monkeypatch.setenv("PHYDI_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "capability", lambda device: 89)
    tiles = {("epilogue", "16-bit", 4): {0: TILE}, ("stream16", "16-bit", 8): {0: Config(16, 64, 32, 4, 4)}}
    monkeypatch.setattr(configs, "TABLE", tiles)
    monkeypatch.setattr(configs, "measure", card.measure)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card.name)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    return card


NAME = "epilogue/16-bit/4/128"
TILE = Config(64, 128, 32, 8, 3)
FASTEST = list(configs.neighbours(TILE))[5]


def test_neighbours_have_the_width_of_the_tile():
    tiles = list(configs.neighbours(TILE))
    assert TILE not in tiles and len(set(tiles)) == len(tiles) > 10
    assert {tile.block_n for tile in tiles} == {TILE.block_n}


def test_the_fastest_is_chosen_and_kept(card):
    card.times[FASTEST] = 0.5
    assert card.config() == FASTEST
    assert set(card.ran) == {TILE, *configs.neighbours(TILE)}
    assert json.loads(configs.cache_file().read_text()) == {"Card A": {NAME: list(FASTEST)}}
    # The next process finds it there.
    card.ran.clear()
    assert card.config() == FASTEST and not card.ran


def test_of_equals_the_fixed_tile_is_chosen(card):
    assert card.config() == TILE


def test_the_file_lies_in_the_folder_for_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configs.cache_file() == tmp_path / "phydi_kernels" / "gpu_configs.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert configs.cache_file() == Path.home() / ".cache" / "phydi_kernels" / "gpu_configs.json"


def test_cards_and_layers_have_entries_of_their_own(card):
    card.config()
    card.times[FASTEST] = 0.5
    card.name = "Card B"
    assert card.config() == FASTEST
    card.config(p=64)
    card.config(kernel="stream16")
    stored = configs.load_cache(configs.cache_file())
    assert stored["Card A"] == {NAME: TILE}
    assert set(stored["Card B"]) == {NAME, "epilogue/16-bit/4/64", "stream16/16-bit/8/64"}
    card.name = "Card A"
    assert card.config() == TILE


def test_what_another_process_stored_meanwhile_stays(card):
    """While this one measured: what it read before does not overwrite the file."""
    path, other = configs.cache_file(), Config(32, 64, 32, 4, 2)

    def run(tile: Config) -> None:
        card.run(tile)
        if len(card.ran) == 1:
            configs.save_cache(path, "Card A", {"other/key": other})
            configs.save_cache(path, "Card B", {"other/key": other})

    configs.config("epilogue", torch.bfloat16, 4, 4096, CUDA, run)
    stored = configs.load_cache(path)
    assert stored["Card B"] == {"other/key": other}
    assert stored["Card A"] == {"other/key": other, NAME: TILE}
    assert not list(path.parent.glob("*.part"))


def test_writers_wait_for_each_other(card, monkeypatch):
    """One that comes between reading and writing of another loses nothing."""
    path, load, writers = configs.cache_file(), configs.load_cache, []

    def load_while_another_writes(file: Path):
        stored = load(file)
        if not writers:
            writers.append(threading.Thread(target=configs.save_cache, args=(path, "Card B", {"key": TILE})))
            writers[0].start()
            writers[0].join(0.2)
        return stored

    monkeypatch.setattr(configs, "load_cache", load_while_another_writes)
    configs.save_cache(path, "Card A", {"key": TILE})
    writers[0].join()
    assert load(path) == {"Card A": {"key": TILE}, "Card B": {"key": TILE}}


def test_a_file_that_cannot_be_written_is_named(card, tmp_path):
    (tmp_path / "phydi_kernels").write_text("in the way")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert card.config() == TILE
    assert "what PHYDI_AUTOTUNE measured cannot be kept in" in str(caught[-1].message)


def test_a_call_reads_no_file(card, monkeypatch):
    card.config()
    monkeypatch.setattr(configs, "load_cache", None)
    assert configs.config("epilogue", torch.bfloat16, 4, 4096, CUDA, card.run) == TILE


@pytest.mark.parametrize(
    "content",
    (
        *(b"", b"{", b"[]", b"\xff\xfe", b'{"Card A": 3}', b'{"Card A": {"key": 3}}', b'{"Card A": {"key": null}}'),
        *(b'{"Card A": {"key": [64, 64, 32]}}', b'{"Card A": {"key": [64, 64, 32, 4, "three"]}}'),
        *(b'{"Card A": {"key": [3, 0, -1, 5, 9]}}', b'{"Card A": {"key": [64, 64, 32, 4, Infinity]}}', b"[" * 100_000),
    ),
)
def test_a_file_of_something_else_is_named_and_counts_as_empty(card, content):
    path = configs.cache_file()
    path.parent.mkdir()
    path.write_bytes(content)
    card.times[FASTEST] = 0.5
    with pytest.warns(UserWarning, match=r"gpu_configs.json is not a cache of PHYDI_AUTOTUNE .*: measuring again"):
        assert card.config() == FASTEST
    assert configs.load_cache(path) == {"Card A": {NAME: FASTEST}}


def test_tiles_that_the_card_cannot_run_are_left_out(card):
    tiles = [TILE, *configs.neighbours(TILE)]
    too_large = triton.runtime.errors.OutOfResources(250000, 232448, "shared memory")
    card.times = dict.fromkeys(tiles, too_large) | {
        tiles[1]: triton.CompilationError("", None, "no such product"),
        tiles[2]: triton.runtime.errors.PTXASError("too many registers"),
        tiles[3]: RuntimeError("PassManager::run failed"),
        tiles[7]: 3.0,
        tiles[9]: 2.0,
    }
    assert card.config() == tiles[9]
    card.name = "Card B"
    card.times = dict.fromkeys(tiles, too_large)
    assert card.config() == TILE


def test_a_defect_of_a_kernel_is_not_hidden(card):
    card.times[FASTEST] = IndexError("a defect")
    with pytest.raises(IndexError, match="a defect"):
        card.config()
    assert not configs.cache_file().exists()


def test_nothing_is_measured_while_a_graph_is_captured(card):
    card.times[FASTEST] = 0.5
    card.capturing = True
    assert card.config() == TILE
    assert not card.ran and not configs.cache_file().exists()
    card.capturing = False
    assert card.config() == FASTEST
    card.capturing = True
    assert card.config() == FASTEST


@pytest.mark.parametrize("value", (None, "", "0", "true"))
def test_nothing_is_measured_or_read_without_the_variable(card, monkeypatch, value, recwarn):
    path = configs.cache_file()
    path.parent.mkdir()
    path.write_text("not a cache")
    if value is None:
        monkeypatch.delenv("PHYDI_AUTOTUNE")
    else:
        monkeypatch.setenv("PHYDI_AUTOTUNE", value)
    assert card.config() == TILE
    assert not card.ran and not recwarn.list


def test_nothing_is_measured_where_no_card_computes(card):
    tile = configs.config("epilogue", torch.bfloat16, 4, 4096, torch.device("cpu"), card.run)
    assert tile == TILE and not card.ran
