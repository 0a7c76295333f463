"""Tiles, splits and precision of the products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from driver_calls import calls
from helpers import assert_exact, every_second, red_zone, ternary
from op_cases import factored, linear
from op_checks import double, draw

from phydi_kernels import reference
from phydi_kernels.kernels.gpu import _launch, configs
from phydi_kernels.kernels.gpu.configs import TABLE, Config
from phydi_kernels.kernels.gpu.stream_product import stream_product
from phydi_kernels.kernels.gpu.window import GROUP, rows_window, tile_of
from phydi_kernels.plans_cuda import CudaPlan, power_of_two

pytestmark = pytest.mark.usefixtures("guarded")


@triton.jit
def tiles_kernel(out, tiles_b, tiles_w):
    program = tl.program_id(0)
    b, w = tile_of(program, tiles_b, tiles_w)
    tl.store(out + 2 * program, b)
    tl.store(out + 2 * program + 1, w)


@pytest.mark.parametrize("tiles_b, tiles_w", ((1, 1), (1, 5), (7, 3), (8, 2), (9, 1), (17, 3), (23, 4)))
def test_every_tile_has_one_program(tiles_b, tiles_w):
    count = tiles_b * tiles_w
    out = torch.zeros((count, 2), dtype=torch.int32)
    _launch.launch(tiles_kernel, (count,), out, tiles_b, tiles_w)
    assert sorted(map(tuple, out.tolist())) == [(b, w) for b in range(tiles_b) for w in range(tiles_w)]
    # The programs of a group of rows are neighbours.
    assert (out[:, 0] // GROUP.value).diff().ge(0).all()


@pytest.mark.parametrize("splits", (1, 2, 3, 4, 5, 9))
@pytest.mark.parametrize("sizes", ((2, 3, 2), (5, 2, 4)), ids=("few_terms", "many_terms"))
def test_split_sums(sizes, splits):
    """Five steps over q, the last of them a part of one; the last part has fewer steps where they do not divide."""
    tensors = draw(linear((13,), *sizes, 17, 33), ternary, torch.float32)
    # Bias and alpha are contiguous.
    tensors = {name: (red_zone if name in ("bias", "alpha") else every_second)(t) for name, t in tensors.items()}
    for activation in ("none", "relu"):
        x, A, F, *rest = tensors.values()
        window = rows_window(x.stride(0))
        y = stream_product(x, A, F.unsqueeze(2), *rest, activation == "relu", window, Config(32, 16, 8, 4, 2), splits)
        expected = reference.phm_linear(**double(tensors), activation=activation)
        assert_exact({"y": y}, {"y": expected}, torch.float32)


_PLANS = {"stream": CudaPlan.STREAM, "fused": CudaPlan.FUSED, "epilogue": CudaPlan.EPILOGUE}
ENTRIES = {
    (kernel.rstrip("0123456789"), of_type == "16-bit", most, tile)
    for (kernel, of_type, most), entries in TABLE.items()
    for tile in entries.values()
}


@pytest.mark.parametrize("kernel, half, most, tile", sorted(ENTRIES), ids=lambda v: str(v).replace(", ", "-"))
def test_tiles_of_the_table(kernel, half, most, tile, monkeypatch):
    """A little more than one of them in each direction."""
    monkeypatch.setattr(configs, "fixed", lambda *key: tile)
    terms = most // 2 + 1
    n, P = (2, terms) if kernel in ("fused", "epilogue") else (terms, 2)
    rows, p = tile.block_m + 1, tile.block_n + 1
    if kernel == "stream":
        # Two blocks of inputs, n of features.
        rows, p = tile.block_m // 2 + 1, tile.block_n // power_of_two(n) + 1
    problem = linear((rows,), n, P, 2, p, tile.block_k + 1)
    if kernel in ("fused", "epilogue"):
        problem = factored(problem, 3)
    call = next(calls(problem, dtype=torch.float16 if half else torch.float32))
    replace(call, plans=(_PLANS[kernel],)).check_exact()


@pytest.mark.parametrize("p", (5, 40, 70))
def test_chosen_tiles(p):
    for problem in (linear((5,), 2, 3, 2, p, 17), factored(linear((5,), 2, 3, 2, p, 17), 3)):
        next(calls(problem)).check_exact()


@pytest.fixture
def precisions(monkeypatch):
    """The precision of every product that is started, by the type of its operands."""
    started, run = [], _launch.run

    def record(kernel, grid, args, meta):
        if "PRECISION" in meta:
            started.append((args[0].dtype, meta["PRECISION"]))
        run(kernel, grid, args, meta)

    monkeypatch.setattr(_launch, "run", record)
    before = torch.get_float32_matmul_precision()
    yield started
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting, expected", (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")))
def test_precision_follows_torch(setting, expected, precisions):
    torch.set_float32_matmul_precision(setting)
    assert _launch.precision(torch.float32) == expected
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        precisions.clear()
        call = next(calls(factored(linear((3,), 2, 3, 2, 3, 5), 3), dtype=dtype))
        call.check_exact()
        assert {plan.value for plan in call.plans} == {"stream", "built", "fused", "epilogue", "passes"}
        assert precisions == [(dtype, expected if dtype is torch.float32 else "ieee")] * 3


def test_float32_products_are_exact_by_default():
    assert _launch.precision(torch.float32) == "ieee"
