"""The cost model of the GPU kernels: figures worked out by hand, and what binds where."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def model() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        return importlib.import_module("gpu_model")


@pytest.fixture(scope="module")
def h100(model: Any) -> Any:
    return next(card for card in model.CARDS if card.name == "H100")


@pytest.fixture(scope="module")
def layer(model: Any) -> Any:
    """4096 features, n = 4 of the generic rank, at a large batch."""
    return model.Layer(rows=8192, outputs=4096, inputs=4096, n=4, rank=7)


def step(model: Any, card: Any, kernel: Any) -> dict[str, float]:
    """Of a plain bfloat16 product."""
    arriving = (kernel.M + kernel.N) * kernel.K * 2
    return model.step_clocks(card, kernel, "bfloat16", arriving, model.operand_reads(card, kernel) * 2)


@pytest.mark.parametrize(
    "name, teraflops, tf32", (("A100", 312, 156), ("H100", 989.4, 494.7), ("H200", 989.4, 494.7), ("B200", 2250, 1125))
)
def test_cards_reach_their_data_sheets(model, name, teraflops, tf32):
    card = next(card for card in model.CARDS if card.name == name)
    peak = {dtype: 2e-12 * fma * card.sms * card.clock for dtype, fma in card.tensor_fma.items()}
    assert peak == pytest.approx({"bfloat16": teraflops, "tf32": tf32}, rel=0.005)


@pytest.mark.parametrize("M, warps", ((64, 4), (128, 8)))
@pytest.mark.parametrize("instructions", (490, 500))
def test_490_to_500_instructions_in_a_step_take_1_9_times_the_tensor_cores_time(model, h100, M, warps, instructions):
    # X-hat formed on load: 96 FFMA and 32 FMUL among them.
    loop = {"fma": 128, "other": instructions - 128}
    clocks = step(model, h100, model.Kernel(M, 128, 64, warps, loop))
    assert clocks["issue"] / clocks["tensor cores"] == pytest.approx(1.9, abs=0.06)
    # 7 of 16 products: the notes' 0.85 of a dense layer.
    assert 7 / 16 * clocks["issue"] / clocks["tensor cores"] == pytest.approx(0.85, abs=0.03)
    assert clocks["FP32 lanes"] == pytest.approx(128 * warps * 32 / 128)


def test_a_tile_of_64_by_128_draws_96_bytes_a_clock(model, h100):
    kernel = model.Kernel(64, 128, 64, 8)
    clocks = step(model, h100, kernel)
    assert clocks["tensor cores"] == 256
    assert (64 + 128) * 64 * 2 / clocks["tensor cores"] == 96
    # L2 delivers 40: the tile waits for it.
    assert clocks["L2"] / clocks["tensor cores"] == pytest.approx(96 / 38.8, rel=0.01)
    assert max(clocks, key=clocks.__getitem__) == "L2"


def test_dense_products_run_at_700_teraflops(model, h100, layer):
    bound = model.dense(h100, layer)
    assert bound.limit == "tensor cores"
    assert 2e-12 * 8192 * 4096 * 4096 / bound.seconds == pytest.approx(700, rel=0.01)
    assert bound.seconds == pytest.approx(0.39e-3, abs=0.005e-3)


def test_three_passes_at_4096_wide(model, h100, layer):
    dense, bound = model.dense(h100, layer), model.passes(h100, layer, prepacked=True)
    assert bound.seconds == pytest.approx(0.31e-3, abs=0.005e-3)
    assert bound.seconds / dense.seconds == pytest.approx(0.80, abs=0.015)
    pre_add, products, post_add = bound.kernels
    # (1 + R/n) times the bytes of x and of y.
    assert pre_add.seconds == post_add.seconds
    assert pre_add.seconds == pytest.approx((1 + 7 / 4) * 8192 * 4096 * 2 / (0.8 * 3.35e12))
    assert (pre_add.limit, products.limit, post_add.limit) == ("DRAM", "tensor cores", "DRAM")
    assert products.seconds / dense.seconds == pytest.approx(7 / 16, rel=0.01)


def test_three_passes_at_8192_wide(model, h100, layer):
    wide = replace(layer, outputs=8192, inputs=8192)
    # 0.61, and 0.64 where F-hat is formed at each call; by hand "about 0.65".
    ratios = [model.passes(h100, wide, prepacked).seconds / model.dense(h100, wide).seconds for prepacked in (1, 0)]
    assert ratios == pytest.approx([0.61, 0.64], abs=0.01)


def test_three_passes_of_rank_4(model, h100, layer):
    bound = model.passes(h100, replace(layer, rank=4), prepacked=True)
    assert bound.seconds / model.dense(h100, layer).seconds == pytest.approx(0.51, abs=0.01)


@pytest.mark.parametrize("batch", (1, 16, 64))
def test_small_batches_are_bound_by_the_weights(model, h100, layer, batch):
    few = replace(layer, rows=batch)
    dense, ours = model.dense(h100, few), model.passes(h100, few, prepacked=True)
    assert dense.limit == ours.limit == "DRAM"
    # F-hat is 7/16 of the dense weights, and F 1/4.
    assert ours.kernels[1].seconds / dense.seconds == pytest.approx(7 / 16)
    mixed = model.stream(h100, few, model.Kernel(16, 32, 64, 4), 1)
    assert mixed.kernels[0].by_resource["DRAM"] / dense.seconds == pytest.approx(1 / 4, abs=0.01)


@pytest.mark.parametrize(
    "name, tile, entries, in_registers",
    (
        # Each of the 64 rows' instructions reads the features anew; half as many have 128 rows.
        ("H100", (64, 128, 4), 64 + 128, 128),
        ("H100", (128, 128, 8), 128 + 2 * 128, 2 * 128),
        ("H100", (128, 256, 8), 128 + 2 * 256, 2 * 256),
        ("B200", (128, 256, 8), 128 + 256, 256),
        # Eight warps as 4 x 2: each reads 32 rows and 64 features.
        ("A100", (128, 128, 8), 8 * (32 + 64), 128),
    ),
)
def test_what_tensor_cores_read_from_shared_memory(model, name, tile, entries, in_registers):
    card = next(card for card in model.CARDS if card.name == name)
    M, N, warps = tile
    kernel = model.Kernel(M, N, 64, warps)
    assert model.operand_reads(card, kernel) == entries * 64
    assert model.operand_reads(card, kernel, in_registers=True) == in_registers * 64


def test_the_last_wave_of_tiles_counts_whole(model, h100):
    clocks = {"tensor cores": 256.0, "L2": 0.0}
    one, two = (model.bound(h100, "product", clocks, tiles, 10, 0.0).seconds for tiles in (132, 133))
    assert one == pytest.approx(2560 / (1.83e9 * 0.73))
    assert two == 2 * one


def test_small_buffers_stay_in_l2(model, h100):
    # 24 MB fit into half of 50 MB, 26 do not; weights are read for the first time.
    small, large = (model.combine(h100, "sum", [size]) for size in (24e6, 26e6))
    assert small.limit == "L2" and small.seconds == pytest.approx(24e6 / (5120 * 1.83e9 * 0.73))
    assert large.limit == "DRAM" and large.seconds == pytest.approx(26e6 / (3.35e12 * 0.8))
    assert model.combine(h100, "sum", [], weights=24e6).limit == "DRAM"


def test_a_stream_whose_sum_is_split_writes_its_parts(model, h100, layer):
    few = replace(layer, rows=64)
    kernel = model.Kernel(256, 128, 64, 8, {"fma": 256, "other": 292}, {"fma": 700, "other": 800})
    whole, split = (model.stream(h100, few, kernel, splits) for splits in (1, 4))
    assert [k.name for k in whole.kernels] == ["stream_product"]
    assert [k.name for k in split.kernels] == ["stream_product", "sum of parts"]
    # 32 tiles in 16 steps, or 128 in 4, and what is outside the steps, which no tensor core does.
    once = 1500 * 8 / 4
    clocks = [bound.kernels[0].by_resource["issue"] * 1.83e9 * 0.73 for bound in (whole, split)]
    assert clocks == pytest.approx([steps * 548 * 8 / 4 + once for steps in (16, 4)])
    clocks = [bound.kernels[0].by_resource["tensor cores"] * 1.83e9 * 0.73 for bound in (whole, split)]
    assert clocks == pytest.approx([steps * 1024 for steps in (16, 4)])
    parts = 4 * 64 * 4096 * 4
    assert split.kernels[1].by_resource["L2"] == pytest.approx((parts + 64 * 4096 * 2) / (5120 * 1.83e9 * 0.73))
    # Twice as many parts: half as many steps in a tile, and two tiles for the busiest SM.
    more = model.stream(h100, few, kernel, 8)
    clocks = more.kernels[0].by_resource["issue"] * 1.83e9 * 0.73
    assert clocks == pytest.approx(2 * (2 * 548 * 8 / 4 + once))
    # As stream_product: 7 parts of 16 steps are 3 steps each and 6 parts, 9 are 2 steps each and 8 parts.
    assert model.stream(h100, few, kernel, 7).kernels == model.stream(h100, few, kernel, 6).kernels
    assert model.stream(h100, few, kernel, 9).kernels == more.kernels


@pytest.mark.parametrize("batch, rows", ((1, 1), (64, 64), (100, 64)))
def test_a_tile_of_a_stream_draws_all_blocks_of_its_rows_and_features(model, h100, layer, batch, rows):
    (bound,) = model.stream(h100, replace(layer, rows=batch), model.Kernel(256, 128, 64, 8), 1).kernels
    # 32 tiles, or 64, fewer than SMs, in 16 steps: four blocks of 64 rows, or of those there are, and of 32 features,
    # the rows of two instructions, each of which reads all rows of the tile.
    arriving = (4 * rows + 4 * 32) * 64 * 2
    tensor_cores = (128 + 2 * 256) * 64 * 2
    clocks = {
        "tensor cores": 16 * 256 * 128 * 64 / 2048,
        "shared memory": 16 * (arriving + tensor_cores) / 128,
        "L2": (16 * arriving * 132 + batch * 4096 * 2) / 5120,
    }
    for resource, expected in clocks.items():
        assert bound.by_resource[resource] == pytest.approx(expected / (1.83e9 * 0.73))
    assert bound.by_resource["DRAM"] == pytest.approx(4096 * 4096 * 2 / 4 / (3.35e12 * 0.8))


def test_blocks_of_a_stream_are_filled_up_to_a_power_of_two(model, h100, layer):
    # 22 inputs and 1365 features of 3 blocks make 4 each: 88 rows, two tiles of 16 inputs, and 43 tiles of 32 features;
    # what fills up is not loaded. 22 steps of 64.
    few = replace(layer, rows=22, outputs=4095, inputs=4095, n=3)
    (bound,) = model.stream(h100, few, model.Kernel(64, 128, 64, 4), 1).kernels
    arriving = (3 * 16 + 3 * 32) * 64 * 2
    expected = (22 * arriving * 132 + 22 * 4095 * 2) / 5120
    assert bound.by_resource["L2"] == pytest.approx(expected / (1.83e9 * 0.73))
    assert bound.by_resource["tensor cores"] == pytest.approx(22 * 64 * 128 * 64 / 2048 / (1.83e9 * 0.73))


def test_a_stream_on_ampere_is_read_by_warps(model, layer):
    card = model.CARDS[0]
    (bound,) = model.stream(card, replace(layer, rows=64), model.Kernel(256, 128, 32, 8), 1).kernels
    # What comes in, and what eight warps read, two by four: 128 features four times, 256 rows twice.
    bytes = (256 + 128 + 4 * 128 + 2 * 256) * 32 * 2
    assert bound.by_resource["shared memory"] == pytest.approx(32 * bytes / 128 / (1.41e9 * 0.73))


def test_instructions_outside_the_steps_count_once(model, h100):
    outside = {"fma": 100, "load_shared": 60, "store_global": 10, "store_shared": 40, "other": 50}
    clocks = model.executed(h100, model.Kernel(256, 128, 64, 8), outside)
    # A warp issues one of its instructions in four clocks of eight warps; an FMA takes 32 of 128 lanes.
    assert clocks == {"issue": 260 * 8 / 4, "FP32 lanes": 100 * 8 / 4, "shared memory": 100 * 8}
    assert set(model.executed(h100, model.Kernel(256, 128, 64, 8), None).values()) == {0}


@pytest.mark.parametrize("name, wavefronts", (("H100", 60 * 8 + (128 + 2 * 128) * 16 * 2 / 128), ("A100", 60 * 8)))
def test_each_load_and_store_of_a_warp_takes_a_clock_of_shared_memory(model, name, wavefronts):
    card = next(card for card in model.CARDS if card.name == name)
    loop = {"load_global": 4, "async": 12, "load_shared": 30, "store_shared": 14, "tensor": 8, "fma": 256}
    kernel = model.Kernel(128, 128, 16, 8, loop)
    # What tensor cores of the A100 read are loads among those.
    reads = model.operand_reads(card, kernel) * 2
    assert model.step_clocks(card, kernel, "bfloat16", 0.0, reads)["shared memory"] == wavefronts
    # Where they are few and wide, bytes bind.
    wide = model.step_clocks(card, kernel, "bfloat16", 32768.0, 65536.0, staged=131072.0)
    assert wide["shared memory"] == (32768 + 65536 + 131072) / 128


def test_the_library_splits_sums_where_tiles_are_few(model, h100, layer):
    # 256 outputs: 4 tiles, whose SMs alone could not draw the weights as fast as DRAM delivers them.
    assert model.library(h100, replace(layer, rows=16), 256, 65536).limit == "DRAM"


def test_which_plans_serve_which_weights(model, h100, layer):
    def plans(form: str, n: int) -> dict[str, list[str]]:
        found = model.bounds(h100, replace(layer, n=n), form, lambda name: model.Kernel(128, 64, 32, 8))
        return {bound.plan: [kernel.name for kernel in bound.kernels] for bound in found}

    # A layer of 8192 rows; two panels of 16 MiB.
    built = ["H", "H", "library", "H", "H", "library"]
    assert plans("learned A", 4) == {"stream": ["stream_product"], "built": built}
    assert plans("prepacked", 4) == {
        "passes": ["pre-add", "library", "post-add"],
        "fused": ["rank_product"],
        "epilogue": ["pre-add", "rank_product"],
    }
    assert plans("factored", 4) == {
        "passes": ["F-hat", "pre-add", "library", "post-add"],
        "fused": ["F-hat", "rank_product"],
        "epilogue": ["F-hat", "pre-add", "rank_product"],
        "stream": ["structure", "stream_product"],
        "built": ["structure", *built],
    }
    # Eight results do not fit in registers.
    assert plans("factored", 8).keys() == {"passes", "stream", "built"}


def test_a_stream_has_the_tile_and_the_parts_of_its_rows(model, h100, layer):
    asked = []
    tile = model.Kernel(256, 128, 64, 8)

    def kernel(name: str) -> Any:
        asked.append(name)
        return tile

    few = replace(layer, rows=64)
    stream, *_ = model.bounds(h100, few, "learned A", kernel)
    # 64 rows of 4 blocks, and 1024 features of 4: 32 tiles, so 4 parts for 132 SMs.
    assert asked == ["stream256"]
    assert stream == model.stream(h100, few, tile, 4) != model.stream(h100, few, tile, 8)


def test_plans_are_those_of_the_model(model):
    """The choice at run time, by fewer figures, is mostly the best one of the model, and never far from it."""
    found = []
    for row in json.loads(model.RESULTS.read_text(encoding="utf-8"))["rows"]:
        n, form = row["n"], row["form"]
        card = {"A100": 80, "H100": 90, "H200": 90, "B200": 100}[row["card"]]
        sizes = (row["rows"], n, n, n, row["outputs"] // n, row["inputs"] // n)
        if form == "learned A":
            plan = model.plans_cuda.phm_linear(*sizes, torch.bfloat16, False, card)
        else:
            of_terms = (row["rank"], form == "factored", torch.bfloat16, False, card)
            plan = model.plans_cuda.phm_linear_factored(*sizes, *of_terms)
        # Prepacked weights may be streamed, which the model leaves out.
        if plan.value in row["plans"]:
            found.append(row["plans"][plan.value] / row["us in graph"])
    assert len(found) > 450 and max(found) < 1.5
    assert sum(ratio > 1.15 for ratio in found) < 0.03 * len(found)


def test_panels_of_h_are_written_once_and_multiplied_at_the_dense_rate(model, h100, layer):
    found, dense = model.built(h100, layer), model.dense(h100, layer)
    products = [kernel for kernel in found.kernels if kernel.name == "library"]
    assert sum(kernel.seconds for kernel in products) == pytest.approx(dense.seconds, rel=0.02)
    # F, 8.4 MB, comes from DRAM once; 33.6 MB of H stay in L2.
    from_dram = [kernel.by_resource["DRAM"] for kernel in found.kernels if kernel.name == "H"]
    assert from_dram[0] == pytest.approx(4 * 1024 * 1024 * 2 / (3.35e12 * 0.8)) and not any(from_dram[1:])
    written = sum(kernel.by_resource["L2"] for kernel in found.kernels if kernel.name == "H")
    assert written == pytest.approx((4096 * 4096 + 4 * 1024 * 1024) * 2 / (5120 * 1.83e9 * 0.73))


def test_forming_x_hat_on_load_draws_all_blocks_of_x(model, h100, layer):
    kernel = model.Kernel(64, 128, 64, 8)
    formed = model.rank_product(h100, layer, kernel, formed_on_load=True, prepacked=True)
    read = model.rank_product(h100, layer, kernel, formed_on_load=False, prepacked=True)
    assert formed.limit == read.limit == "L2"
    tiles, steps = 128 * 8, 7 * 16
    drawn = [math.ceil(tiles / 132) * 132 * steps * (blocks * 64 + 128) * 64 * 2 for blocks in (4, 1)]
    written = 8192 * 4096 * 2
    expected = [(bytes + written) / (5120 * 1.83e9 * 0.73) for bytes in drawn]
    assert [formed.seconds, read.seconds] == pytest.approx(expected)
    # All of x comes in and is read by threads; tensor cores find X-hat in registers, or beside F-hat.
    shared = [(2 * 4 * 64 + 2 * 128) * 64 * 2 / 128, (64 + 128 + 64 + 128) * 64 * 2 / 128]
    clocks = [math.ceil(tiles / 132) * steps * clocks for clocks in shared]
    found = [bound.by_resource["shared memory"] * 1.83e9 * 0.73 for bound in (formed, read)]
    assert found == pytest.approx(clocks)


def test_weights_are_combined_at_a_call_unless_prepacked(model, h100, layer):
    # 7/16 of 33.5 MB, which stay in L2 for the products; of 134 MB they do not.
    for width, resident in ((4096, True), (8192, False)):
        some = replace(layer, rows=16, outputs=width, inputs=width)
        packed, formed = (model.passes(h100, some, prepacked) for prepacked in (True, False))
        assert len(formed.kernels) == len(packed.kernels) + 1 and formed.kernels[0].name == "F-hat"
        weights = 7 / 16 * width * width * 2 / (3.35e12 * 0.8)
        assert packed.kernels[1].by_resource["DRAM"] == pytest.approx(weights)
        assert formed.kernels[2].by_resource["DRAM"] == pytest.approx(0 if resident else weights)


def test_a_gap_counts_for_each_kernel_and_for_the_dense_layer(model, h100, layer):
    for bound, kernels in ((model.dense(h100, layer), 1), (model.passes(h100, layer, prepacked=False), 4)):
        assert bound.seconds_in_graph - bound.seconds == pytest.approx(1.3e-6 * kernels)


@pytest.fixture(scope="module")
def results(model: Any) -> dict[str, Any]:
    return json.loads(model.RESULTS.read_text())


def test_the_stored_bounds_follow_from_the_machine_code(model, results):
    pytest.importorskip("triton")
    assert results["rows"] == list(model.rows(json.loads(model.STATIC.read_text())))


def test_the_machine_code_of_a_kernel_is_found(model, h100, layer):
    configs = pytest.importorskip("phydi_kernels.kernels.gpu.configs")
    tile = configs.fixed("stream256", torch.bfloat16, 4, 1024, 90)
    right = {
        "dtype": "bfloat16",
        "arch": 90,
        "case": "phm_linear stream n=4 4096 features batch 8192 epilogue",
        "tile": "x".join(map(str, tile[:3])),
        "warps": tile.warps,
        "loop": {"fma": 64},
        "outside": {"fma": 32},
    }
    others = {
        "dtype": "float16",
        "arch": 80,
        "case": "phm_linear stream n=4 4096 features batch 8192 transposed",
        "tile": "16x16x16",
        "warps": tile.warps + 1,
    }
    wrong = [right | {key: value, "loop": {}} for key, value in others.items()]
    wrong.append(right | {"case": "phm_linear built n=4 4096 features batch 8192 epilogue", "loop": {}})
    wrong.append(right | {"case": "phm_linear stream n=8 8192 features batch 8192 epilogue", "loop": {}})
    assert model.compiled({"rows": [*wrong, right]}, h100, layer, "stream256") == model.Kernel(
        *tile[:4], {"fma": 64}, {"fma": 32}
    )


def test_missing_machine_code_is_named(model, h100, layer):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"no figures of stream256 [\dx]+ for n=4, sm_90: run gpu_static.py"):
        model.row({"rows": []}, h100, layer, "learned A")


def test_the_best_plan_is_the_fastest_in_a_graph(results):
    for row in results["rows"]:
        assert row["plans"][row["plan"]] == row["us in graph"] == min(row["plans"].values())


def asked(model: Any, results: dict[str, Any]) -> dict[str, list[str]]:
    """The cells of the first table's rows, by layer and R."""
    table = [line.strip("| ").split(" | ") for line in model.markdown(results).splitlines()]
    return {f"{cells[0]}, R = {cells[1]}": cells[2:] for cells in table if cells[-1].startswith("<=")}


@pytest.mark.parametrize(
    "layer, limit",
    (
        ("4096 to 4096, batch 1, R = 7", 0.30),
        ("4096 to 4096, batch 16, R = 7", 0.30),
        ("4096 to 14336, batch 1, R = 7", 0.30),
        ("4096 to 14336, batch 16, R = 7", 0.30),
        ("8192 to 8192, batch 1, R = 7", 0.30),
        ("8192 to 8192, batch 16, R = 7", 0.30),
        ("4096 to 4096, batch 8192, R = 7", 0.80),
        ("8192 to 8192, batch 8192, R = 7", 0.66),
        ("4096 to 4096, batch 8192, R = 4", 0.52),
    ),
)
def test_what_is_asked_of_an_h100(model, results, layer, limit):
    *_, alone, _, _, verdict = asked(model, results)[layer]
    assert float(alone) <= limit
    assert verdict == f"<= {limit:.2f} met"


def test_what_is_asked_and_missed_says_so(model, results):
    for plan, alone, in_graph, limit, verdict in asked(model, results).values():
        assert float(in_graph) >= float(alone)
        assert limit in ("tensor cores", "issue", "FP32 lanes", "shared memory", "L2", "DRAM")
        assert plan.split(", ")[1] in model.FORMS
        assert verdict.endswith("MISSED") or float(alone) <= float(verdict.split()[1])


def test_the_tables_are_those_of_the_results(model, results):
    shown = re.search(
        r"<!-- python benchmarks/gpu_model.py --markdown -->\n(.*?)<!-- end -->", model.README.read_text(), re.DOTALL
    )
    assert shown is not None and shown[1].strip() == model.markdown(results)
    assert shown[1].startswith("**Bounds from a model, not measurements.**")
