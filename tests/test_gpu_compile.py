"""Every Triton kernel compiled ahead of time: the recorded figures, a sample of them anew, and what takes them."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="this torch has no Triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from phydi_kernels.kernels.gpu import _launch  # noqa: E402
from phydi_kernels.kernels.gpu.configs import TABLE  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)


def _benchmark(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(Path(__file__).resolve().parent.parent / "benchmarks"), *sys.path])
        return importlib.import_module(name)


gpu_compile = _benchmark("gpu_compile")
gpu_static = _benchmark("gpu_static")
# Kernels that are compiled again, the others for one architecture.
PRODUCTS = ("stream_product_kernel", "rank_product_kernel")
OTHERS = ("combine_kernel", "block_dots_kernel", "structure_kernel")


@triton.jit
def matmul_kernel(
    a, b, c, K, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + m * stride + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * stride + n[None, :])
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(c + m * stride + n[None, :], acc)


@triton.jit
def copy_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < size), mask=i < size)


def _matmul(
    dtype: torch.dtype = torch.bfloat16, columns: int = 128, warps: int = 8, stages: int = 3, precision: str = "ieee"
) -> Any:
    x = torch.empty((512, 512), dtype=dtype, device="meta")
    blocks = {"BLOCK_M": 128, "BLOCK_N": columns, "BLOCK_K": 32 if precision == "tf32" else 64}
    meta = {**blocks, "PRECISION": precision, "num_warps": warps, "num_stages": stages}
    return gpu_compile.Launch(matmul_kernel, (1,), (x, x, x, 512, x.stride(0)), meta)


def _copy(size: int) -> Any:
    x = torch.empty(1024, device="meta")
    return gpu_compile.Launch(copy_kernel, (1,), (x, x, size), {"BLOCK": 1024, "num_warps": 4})


# One instruction of a warp (HMMA 16x8x16, TF32 16x8x8), of four warps (HGMMA 64x128x16) or of all (UTCHMMA 128x128x16).
@pytest.mark.parametrize(
    ("arch", "opcode", "count"),
    [(80, "HMMA", 64), (89, "HMMA", 64), (90, "HGMMA", 4), (100, "UTCHMMA", 4), (120, "HMMA", 64)],
)
def test_a_product_is_counted_in_tensor_core_instructions(arch, opcode, count):
    compiled = gpu_compile.compile(_matmul(), arch)
    assert gpu_compile.problems(compiled, expects_tensor_core=True) == []
    assert compiled.loop[opcode] == count
    assert gpu_compile.by_class(compiled.loop)["tensor"] == count
    assert gpu_compile.by_class(compiled.loop)["async"] == (128 + 128) * 64 * 2 // 16 // 256
    assert sum(compiled.loop.values()) < sum(compiled.opcodes.values())
    assert compiled.num_warps == 8
    assert 32 <= compiled.registers <= 255
    # Two buffers of both operands; on some architectures three.
    assert compiled.shared >= 2 * (128 + 128) * 64 * 2
    assert (compiled.tensor_memory > 0) == (arch == 100)


def test_float32_products_use_multiply_adds_unless_tf32_is_asked_for():
    exact = gpu_compile.compile(_matmul(torch.float32, columns=32), 90)
    assert exact.loop["FFMA"] == 128 * 32 * 64 // 256
    assert gpu_compile.problems(exact, expects_tensor_core=False) == []
    assert gpu_compile.problems(exact, expects_tensor_core=True) == ["no HGMMA, but no tensor-core opcode"]
    tf32 = gpu_compile.compile(_matmul(torch.float32, precision="tf32"), 80)
    assert tf32.loop["HMMA"] == 128 * 128 * 32 // (16 * 8 * 8) // 8
    assert gpu_compile.problems(tf32, expects_tensor_core=True) == []


def test_spills_and_serialized_products_are_reported():
    compiled = gpu_compile.compile(_matmul(columns=256, warps=4), 90)
    assert compiled.spill_stores > compiled.spill_loads > 1000
    assert compiled.registers == 255
    spills, warning = gpu_compile.problems(compiled, expects_tensor_core=True)
    assert spills == f"spills: {compiled.spill_stores} bytes stored, {compiled.spill_loads} loaded"
    assert "(C7511)" in warning
    assert gpu_compile.by_class(compiled.opcodes)["local"] > 100


def test_shared_memory_over_the_limit_is_reported():
    # Three buffers of 48 KB: more than sm_89 has, while sm_90 has room.
    large = _matmul(columns=256, stages=4)
    compiled = gpu_compile.compile(large, 89)
    assert compiled.shared >= 3 * (128 + 256) * 64 * 2
    assert gpu_compile.problems(compiled, True) == [f"{compiled.shared} bytes of shared memory, 101376 are allowed"]
    large = _matmul(columns=256, stages=3, warps=8)
    assert not any("shared" in problem for problem in gpu_compile.problems(gpu_compile.compile(large, 90), True))


def test_other_findings_are_reported():
    compiled = gpu_compile.compile(_matmul(), 100)
    for change, found in {
        "stack": (8, "stack frame of 8 bytes"),
        "tensor_memory": (576, "576 columns of tensor memory, 512 are allowed"),
        "opcodes": ({"HMMA": 4, "FFMA": 1}, "no UTC*MMA, but HMMA"),
        "warnings": (("ptxas warning : odd",), "ptxas warning : odd"),
    }.items():
        assert gpu_compile.problems(dataclasses.replace(compiled, **{change: found[0]}), True) == [found[1]]


def test_hints_are_those_of_the_arguments():
    """A size of which 16 is a factor lets a masked load take 16 bytes at a time."""
    for size, loads in ((1024, 2), (1000, 8)):
        opcodes = gpu_compile.compile(_copy(size), 80).opcodes
        assert (opcodes["LDG"], opcodes["STG"]) == (loads, loads)


def test_a_kernel_from_the_cache_has_the_same_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.delenv("TRITON_DUMP_PTXAS_LOG", raising=False)
    environment = dict(os.environ)
    found = []
    for _ in range(2):
        # What this process compiled before is forgotten.
        copy_kernel.device_caches.clear()
        compiled = gpu_compile.compile(_copy(512), 80)
        found.append((compiled, {path: path.stat().st_mtime_ns for path in tmp_path.rglob("copy_kernel.*")}))
    assert found[0] == found[1]
    assert {path.suffix for path in found[0][1]} >= {".cubin", ".sass"}
    assert dict(os.environ) == environment


def test_recording_runs_nothing():
    original = _launch.run
    x, y = torch.ones(4), torch.zeros(4)
    (entry,) = gpu_compile.record(lambda: _launch.launch(copy_kernel, (1,), x, y, 4, BLOCK=4, num_warps=1))
    assert _launch.run is original
    assert y.eq(0).all()
    assert (entry.kernel, entry.grid, entry.meta) == (copy_kernel, (1,), {"BLOCK": 4, "num_warps": 1})
    assert [a is b for a, b in zip(entry.args, (x, y, 4), strict=True)] == [True] * 3


def test_the_driver_that_was_there_is_restored():
    before = driver._active
    with pytest.raises(KeyError), gpu_compile.target(90):
        assert driver.active.get_current_target() == GPUTarget("cuda", 90, 32)
        with gpu_compile.target(120):
            assert driver.active.get_current_device() == 120
        assert driver.active.get_current_device() == 90
        raise KeyError
    assert driver._active is before
    with pytest.raises(ValueError, match=r"arch=75 is not one of 80, 89, 90, 100, 120"), gpu_compile.target(75):
        pass


def test_only_compiled_kernels_are_taken():
    launch = dataclasses.replace(_copy(512), kernel=copy_kernel.fn)
    with pytest.raises(TypeError, match="kernel: got function, not a compiled kernel; is TRITON_INTERPRET set"):
        gpu_compile.compile(launch, 80)


def _opcodes(sass: str) -> str:
    return " ".join(instruction.opcode for instruction in gpu_compile.innermost_loop(gpu_compile.parse(sass)))


def test_the_hottest_loop_of_a_listing():
    """A loop, and two in each other with an early exit, a skipped part and a wait behind the kernel's end."""
    listing = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 EXIT ;
.L_x_6:
        /*0018*/                   HADD2.F32 R1, -RZ, R2.H0_H0 ;
        /*0019*/               @P5 BRA `(.L_x_6) ;
.L_x_0:
        /*0020*/                   IMAD.MOV.U32 R1, RZ, RZ, R2 ;
.L_x_1:
        /*0030*/                   LDS.128 R4, [R2] ;
        /*0040*/                   BRA.U UP0, `(.L_x_2) ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0058*/                   HMMA.16816.F32.BF16 R6, R8, R14, R6 ;
.L_x_2:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR16], R15 ;
        /*0070*/              @!P6 BRA `(.L_x_4) ;
.L_x_3:
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   FFMA R1, R1, R2, R3 ;
        /*00a0*/               @P2 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   NANOSLEEP 0x64 ;
        /*00d0*/              @!P6 BRA `(.L_x_4) ;
        /*00e0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5);
        /*0100*/                   NOP;
"""
    inner = "LDS BRA {0} {0} SYNCS BRA BRA NANOSLEEP BRA BRA"
    assert _opcodes(listing) == inner.format("HMMA")
    assert _opcodes(listing.replace("HADD2", "HMMA")) == inner.format("HMMA")
    # Without tensor cores the multiply-adds decide, without these the access to memory.
    assert _opcodes(listing.replace("HMMA", "FADD")) == inner.format("FADD")
    outer = "IMAD LDS BRA {0} {0} SYNCS BRA BRA {1} BRA NANOSLEEP BRA BRA"
    assert _opcodes(listing.replace("HMMA", "MUFU").replace("HADD2", "MUFU")) == outer.format("MUFU", "FFMA")
    without = listing.replace("HMMA", "MUFU").replace("HADD2", "MUFU").replace("FFMA", "IADD3")
    assert _opcodes(without) == inner.format("MUFU")
    assert _opcodes("        /*0000*/                   EXIT ;") == ""


def test_every_opcode_has_one_class():
    counts = dict.fromkeys(("HMMA", "UTCHMMA", "FFMA2", "HFMA2", "DFMA", "FADD", "LDG", "LDGSTS", "UTMALDG"), 1)
    counts |= dict.fromkeys(("LDSM", "LDS", "STS", "STG", "LDL", "F2FP", "I2F", "LDTM", "IMAD", "LDGDEPBAR", "FSEL"), 2)
    found = {name: count for name, count in gpu_compile.by_class(counts).items() if count}
    expected = {"tensor": 2, "fma": 4, "load_global": 1, "async": 2, "load_shared": 4, "store_shared": 2}
    assert found == expected | {"store_global": 2, "local": 2, "convert": 4, "tensor_memory": 2, "other": 6}


def _meta_copy(size: int, dtype: torch.dtype = torch.float32, offset: int = 0, **meta: int) -> Any:
    x = torch.empty(1024, dtype=dtype)[offset:]
    return gpu_compile.Launch(copy_kernel, (1,), (x, x, size), {"BLOCK": 1024, **meta})


def test_a_key_tells_machine_codes_apart():
    """Each key stands for one: Triton compiles as many as there are keys."""
    variants = [_meta_copy(512), _meta_copy(1), _meta_copy(500), _meta_copy(2**40), _meta_copy(512, offset=1)]
    variants += [_meta_copy(512, torch.bfloat16), _meta_copy(512, num_warps=8), _meta_copy(512, BLOCK=512)]
    same = [_meta_copy(64), _meta_copy(768, offset=4), dataclasses.replace(_meta_copy(512), grid=(7,))]
    copy_kernel.device_caches.clear()
    with gpu_compile.target(80):
        hashes = [v.kernel.warmup(*v.args, grid=v.grid, **v.meta).hash for v in variants + same]
    keys = [gpu_static.key(v, 80) for v in variants + same]
    assert len(set(keys)) == len(set(hashes)) == len(variants)
    assert set(keys[len(variants) :]) == {keys[0]}
    assert gpu_static.key(variants[0], 90) != keys[0]


@triton.jit
def _twice(x):
    return 2 * x


@triton.jit
def calling_kernel(x):
    tl.store(x, _twice(tl.load(x)))


def test_a_key_follows_the_source_of_a_kernel_and_of_what_it_calls(monkeypatch):
    def key(kernel: Any) -> str:
        gpu_static._source.cache_clear()
        return gpu_static.key(gpu_compile.Launch(kernel, (1,), (), {}), 80)

    before = key(calling_kernel)
    monkeypatch.setattr(_twice, "__module__", "phydi_kernels.twice")
    with_callee = key(calling_kernel)
    assert with_callee != before
    source = _twice.src
    monkeypatch.setattr(_twice, "_src", source.replace("2 * x", "2 * x  # exact"))
    assert key(calling_kernel) == with_callee
    monkeypatch.setattr(_twice, "_src", source.replace("2 * x", "3 * x"))
    assert key(calling_kernel) not in (before, with_callee)


@pytest.fixture(scope="module")
def results() -> Any:
    return json.loads(gpu_static.RESULTS.read_text(encoding="utf-8"))


def test_every_kernel_has_recorded_figures(results):
    """Of the present source, for every case, type and architecture."""
    recorded = {entry["key"]: entry["case"] for entry in results["rows"]}
    work = gpu_static.all_work()
    missing = sorted({f"{w.case} {w.dtype} sm_{w.arch}" for name, w in work.items() if name not in recorded})
    left_over = sorted({case for name, case in recorded.items() if name not in work})
    assert (missing, left_over) == ([], []), "run python benchmarks/gpu_static.py"
    assert {entry["kernel"] for entry in results["rows"]} == {*PRODUCTS, *OTHERS}


def test_every_tile_of_the_table_has_recorded_figures(results):
    names = ("dtype", "arch", "tile", "warps", "stages")
    recorded = {tuple(entry[name] for name in names) for entry in results["rows"]}
    types = {"16-bit": "bfloat16", "tf32": "tf32", "ieee": "float32"}
    for (_, kind, _), entries in TABLE.items():
        for arch in gpu_compile.ARCHITECTURES:
            tile = entries.get(arch, entries[0])
            assert (types[kind], arch, "x".join(map(str, tile[:3])), tile.warps, tile.stages) in recorded


def test_no_kernel_spills_or_exceeds_the_hardware(results):
    assert gpu_static.wrong(results) == ""


SAMPLE = [*itertools.product(PRODUCTS, gpu_compile.ARCHITECTURES), *zip(OTHERS, (80, 100, 90), strict=True)]


@pytest.mark.parametrize(("kernel", "arch"), SAMPLE)
def test_recorded_figures_are_those_of_a_compilation(results, kernel, arch):
    """Of one configuration, as good as drawn: keys are hashes."""
    entries = [entry for entry in results["rows"] if (entry["kernel"], entry["arch"]) == (kernel, arch)]
    entry = min(entries, key=lambda entry: entry["key"])
    row = gpu_static.row(gpu_static.Work(entry["case"], entry["dtype"], arch, entry["index"]))
    assert row["problems"] == []
    if results["triton"] == triton.__version__:
        assert row == entry


def _entry(**changes: Any) -> dict[str, Any]:
    entry = {"kernel": "stream_product_kernel", "dtype": "tf32", "arch": 90, "case": "layer", "index": 0}
    entry |= {"tile": "64x32x16", "warps": 4, "stages": 3, "key": "00", "registers": 96, "spills": 0, "shared": 2048}
    return entry | {"tensor_memory": 0, "tensor_core": {"HGMMA": 4}, "loop": {"tensor": 4}, "problems": []} | changes


def test_the_table_has_the_worst_of_each_kernel_and_type():
    more = _entry(key="01", registers=128, shared=1024, tensor_core={"HGMMA": 12, "HMMA": 2})
    failed = {**_entry(key="02", problems=["CompilationError: no"])}
    del failed["registers"]
    rows = [_entry(), more, failed, _entry(dtype="float32", arch=80, tensor_core={}, spills=24)]
    assert gpu_static.table({"rows": rows}).splitlines()[2:] == [
        "| stream_product | float32 | 1 | 24 | 96, 2 KB |  |  |  |  |",
        "| stream_product | tf32 | 3 | 0 |  |  | 128, 2 KB, 4-12 HGMMA, 2 HMMA |  |  |",
    ]
    line = "stream_product_kernel sm_90 tf32 64x32x16 4 warps 3 stages (layer): CompilationError: no"
    assert gpu_static.wrong({"rows": rows}) == line


def test_the_page_shows_the_recorded_figures():
    results = json.loads(gpu_static.RESULTS.read_text(encoding="utf-8"))
    page = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
    assert gpu_static.table(results) in page.read_text(encoding="utf-8")


def test_results_are_kept_for_the_same_triton_only(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    assert gpu_static.load(file) == {}
    rows = [_entry(key="01"), _entry()]
    gpu_static.save(rows, file)
    assert gpu_static.load(file) == {"00": rows[1], "01": rows[0]}
    text = file.read_text()
    gpu_static.save(rows[::-1], file)
    assert file.read_text() == text
    monkeypatch.setattr(triton, "__version__", "0")
    assert gpu_static.load(file) == {}
