"""Bounds on the time of PHM layers on GPUs, from tile shapes, machine code and public figures. Nothing is measured.

A kernel takes at least the time of its scarcest resource. Per K step of a tile, in clocks of one SM:

* tensor cores   M N K / (multiply-adds a clock)
* issue          (instructions in the loop) * warps / 4
* FP32 lanes     (FFMA, FMUL, FADD in the loop) * warps * 32 / lanes
* shared memory  (bytes that come in, that threads write and read, that tensor cores read) / 128, or a clock for each of
                 a warp's loads and stores; L1 is the same memory
* L2             (bytes loaded) * SMs / (bytes a clock of the whole L2)

The busiest SM has ceil(tiles / SMs) tiles. Instructions of a tile outside its main loop (addresses before it; behind
it the sums over blocks, the epilogue and the stores) count once a tile, of a library's kernels not at all; that a lone
tile's products have to end before its sums begin does not count. DRAM: bytes / bandwidth, weights always, and
activations which do not fit in half of L2 (a cache line may be there twice, once for each half of the chip). A layer
is the sum of its kernels, and of a gap for each. The dense layer has the same rules, and the same two fractions of the
peak figures:

* SUSTAINED of everything on the chip: 700 of 989 TFLOP/s for large products on an H100, with the tiles' last wave
* MEMORY_SUSTAINED of DRAM: 2.7 of 3.35 TB/s

Residuals and biases count on neither side. Prepacked weights can be streamed as well: that reads what passes reads, in
as many kernels, and is left out.

``python benchmarks/gpu_model.py`` prints the tables, ``--write`` puts them into results/gpu_model.json and README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch

from phydi_kernels import plans_cuda

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_model.json"
STATIC = RESULTS.with_name("gpu_static.json")
README = Path(__file__).resolve().parent / "README.md"

SUSTAINED = 0.73
MEMORY_SUSTAINED = 0.80
# Seconds from one kernel to the next in a CUDA graph, H100 (Spector et al., "Look Ma, No Bubbles!", 2025).
LAUNCH_GAP = 1.3e-6
# Of one SM, in a clock; the same on all four cards (CUDA C++ Programming Guide, "Compute Capabilities").
ISSUE_SLOTS = 4
SHARED_BYTES = 128
WARP = 32
# Instructions that pass through L1 or shared memory: each of a warp's takes a clock of it at least, a wavefront (Nsight
# Compute documentation, "Memory Tables").
ACCESSES = ("load_global", "async", "load_shared", "store_shared")
# Outputs and inputs of the projections of 7 to 70 billion parameter language models, batches, n and its usual rank.
SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192))
BATCHES = (1, 16, 64, 256, 8192)
RANKS = {2: 3, 4: 7, 8: 24}
FORMS = ("learned A", "factored", "prepacked")
# What is asked of an H100 at n = 4: (outputs, inputs, batch, rank) -> the largest ratio to the dense bound.
ASKED = {(*shape, batch, 7): 0.30 for shape in SHAPES for batch in (1, 16, 64)}
ASKED |= {(4096, 4096, 8192, 7): 0.80, (8192, 8192, 8192, 7): 0.66, (4096, 4096, 8192, 4): 0.52}
HEADING = "**Bounds from a model, not measurements.**"
UNITS = ("us", "us in graph")
# Rows of the result that one warpgroup's instruction makes on sm_90, and all of a block's on sm_100.
WARPGROUP_ROWS = 64


@dataclass(frozen=True)
class Card:
    """Peak figures. ``tensor_fma``: multiply-adds in a clock of one SM, dense matrices; ``l2_bytes`` in a clock, of all
    SMs together; ``dram`` in bytes a second."""

    name: str
    capability: int
    sms: int
    clock: float
    tensor_fma: Mapping[str, int]
    fp32_lanes: int
    l2_bytes: int
    l2_size: float
    dram: float


CARDS = (
    # NVIDIA A100 Tensor Core GPU Architecture (white paper, 2020), tables 4 and 5: 312 TFLOP/s, L2 5120 bytes a clock.
    Card("A100", 80, 108, 1.41e9, {"bfloat16": 1024, "tf32": 512}, 64, 5120, 40e6, 2.039e12),
    # NVIDIA H100 Tensor Core GPU Architecture (white paper, 2022), table 2: 989.4 TFLOP/s at 1830 MHz. L2 bandwidth is
    # not public: as in the A100; measured 5.5 to 7 TB/s (Chips and Cheese, 2023), which is SUSTAINED of it.
    Card("H100", 90, 132, 1.83e9, {"bfloat16": 2048, "tf32": 1024}, 128, 5120, 50e6, 3.35e12),
    # NVIDIA H200 data sheet: the H100 with other memory.
    Card("H200", 90, 132, 1.83e9, {"bfloat16": 2048, "tf32": 1024}, 128, 5120, 50e6, 4.8e12),
    # NVIDIA Blackwell data sheet (HGX B200): 2250 TFLOP/s; the driver reports 148 SMs, 126.5 MB and 7.67 TB/s
    # (pytorch/ao, pull request 4002). L2 bandwidth is not public: an H100's for each of its two dies.
    Card("B200", 100, 148, 1.86e9, {"bfloat16": 4096, "tf32": 2048}, 128, 10240, 126.5e6, 7.67e12),
)
H100 = CARDS[1]


@dataclass(frozen=True)
class Kernel:
    """A tile of ``M`` rows by ``N`` features, ``K`` deep in a step of the main loop, by ``warps`` warps.

    ``loop``: instructions of a warp in a step by class, ``outside``: in a tile before and after its steps; without
    them (a library's kernel) only data bound it.
    """

    M: int
    N: int
    K: int
    warps: int
    loop: Mapping[str, int] | None = None
    outside: Mapping[str, int] | None = None


@dataclass(frozen=True)
class KernelBound:
    """Seconds a kernel takes at least, by resource."""

    name: str
    by_resource: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return max(self.by_resource.values())

    @property
    def limit(self) -> str:
        return max(self.by_resource, key=self.by_resource.__getitem__)


@dataclass(frozen=True)
class LayerBound:
    """The kernels of a plan, one after the other."""

    plan: str
    kernels: tuple[KernelBound, ...]

    @property
    def seconds(self) -> float:
        """Without the gaps between kernels."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def seconds_in_graph(self) -> float:
        return self.seconds + LAUNCH_GAP * len(self.kernels)

    @property
    def limit(self) -> str:
        """What binds the longest kernel."""
        return max(self.kernels, key=lambda kernel: kernel.seconds).limit


@dataclass(frozen=True)
class Layer:
    """``rows`` inputs of a layer with n x n blocks of p = outputs / n by q = inputs / n, and R = ``rank`` terms."""

    rows: int
    outputs: int
    inputs: int
    n: int
    rank: int
    dtype: str = "bfloat16"

    @property
    def p(self) -> int:
        return self.outputs // self.n

    @property
    def q(self) -> int:
        return self.inputs // self.n

    @property
    def bytes(self) -> int:
        return {"bfloat16": 2, "tf32": 4}[self.dtype]


def operand_reads(card: Card, kernel: Kernel, in_registers: bool = False, transposed: bool = False) -> int:
    """Entries that tensor cores read from shared memory for one product of a step.

    ``in_registers``: its first operand, the M x K one, or the N x K one of a ``transposed`` product, is not there.
    """
    first, second = (kernel.N, kernel.M) if transposed else (kernel.M, kernel.N)
    if card.capability < 90:
        # Warps lie as (rows, columns); each reads what it needs.
        ways = [(kernel.warps >> i, 1 << i) for i in range(kernel.warps.bit_length())]
        return min((0 if in_registers else first * c) + second * r for r, c in ways) * kernel.K
    # The first operand is cut into the rows of instructions; each of these reads the second.
    rows = WARPGROUP_ROWS if card.capability < 100 else 2 * WARPGROUP_ROWS
    return ((0 if in_registers else first) + math.ceil(first / rows) * second) * kernel.K


def executed(card: Card, kernel: Kernel, instructions: Mapping[str, int] | None) -> dict[str, float]:
    """Clocks of one SM by resource for ``instructions`` of each of a tile's warps."""
    counts = instructions or {}
    return {
        "issue": sum(counts.values()) * kernel.warps / ISSUE_SLOTS,
        "FP32 lanes": counts.get("fma", 0) * kernel.warps * WARP / card.fp32_lanes,
        "shared memory": sum(counts.get(access, 0) for access in ACCESSES) * kernel.warps,
    }


def step_clocks(
    card: Card, kernel: Kernel, dtype: str, arriving: float, reads: float, staged: float = 0.0
) -> dict[str, float]:
    """Clocks of one SM for a step by resource: ``arriving`` bytes from L2, ``reads`` of shared memory by the tensor
    cores, bytes that are ``staged`` in it: written or read by threads."""
    loop = executed(card, kernel, kernel.loop)
    # Up to Ada threads load what tensor cores read.
    apart = reads / SHARED_BYTES if card.capability in (90, 100) else 0.0
    return {
        "tensor cores": kernel.M * kernel.N * kernel.K / card.tensor_fma[dtype],
        **loop,
        "shared memory": max((arriving + staged + reads) / SHARED_BYTES, loop["shared memory"] + apart),
        "L2": arriving * card.sms / card.l2_bytes,
    }


def bound(
    card: Card,
    name: str,
    step: Mapping[str, float],
    tiles: int,
    steps: int,
    dram: float,
    l2: float = 0.0,
    once: Mapping[str, float] | None = None,
) -> KernelBound:
    """A product: ``step`` in clocks, ``steps`` for each tile, and ``once`` a tile; bytes of DRAM, and of L2 outside the
    main loop."""
    of_tile = {resource: steps * clocks + (once or {}).get(resource, 0.0) for resource, clocks in step.items()}
    clocks = {resource: math.ceil(tiles / card.sms) * clocks for resource, clocks in of_tile.items()}
    clocks["L2"] += l2 / card.l2_bytes
    seconds = {resource: value / (card.clock * SUSTAINED) for resource, value in clocks.items()}
    return KernelBound(name, seconds | {"DRAM": dram / (card.dram * MEMORY_SUSTAINED)})


def from_dram(card: Card, *activations: float) -> float:
    """The bytes of those buffers that do not stay in L2 between two kernels."""
    return sum(size for size in activations if size > card.l2_size / 2)


def of_weights(card: Card, size: float, formed: bool) -> float:
    """The bytes of weights that come from DRAM: all, or those that do not stay in L2 after they were formed."""
    return from_dram(card, size) if formed else size


def combine(card: Card, name: str, activations: Iterable[float], weights: float = 0.0) -> KernelBound:
    """Weighted sums of blocks: every buffer is read or written once."""
    activations = tuple(activations)
    dram = from_dram(card, *activations) + weights
    return bound(card, name, {"L2": 0.0}, 0, 0, dram, sum(activations) + weights)


LIBRARY_TILES = tuple(
    Kernel(M, N, 64, 8 if M * N >= 128 * 128 else 4)
    for M in (16, 32, 64, 128, 256)
    for N in (64, 128, 256)
    if M * N <= 128 * 256
)
LIBRARY_SPLITS = (1, 2, 4, 8, 16)


def library(card: Card, layer: Layer, outputs: int, inputs: int, batch: int = 1, formed: bool = False) -> KernelBound:
    """``batch`` products of (rows, inputs) with (inputs, outputs) by cuBLAS: its best tile and split of the sum.

    From sm_90 on two blocks share the tiles of the wider side; adding up the parts of a split costs no kernel.
    ``formed``: the kernel before has written the weights.
    """
    size, shares = layer.bytes, 2 if card.capability >= 90 else 1
    read, written = batch * layer.rows * inputs * size, batch * layer.rows * outputs * size
    dram = from_dram(card, read, written) + of_weights(card, batch * inputs * outputs * size, formed)
    bounds = []
    for kernel in LIBRARY_TILES:
        narrow, wide = sorted((kernel.M, kernel.N))
        arriving = (narrow + wide / shares) * kernel.K * size
        reads = operand_reads(card, kernel) * size
        if card.capability >= 100:
            reads -= (shares - 1) * wide / shares * kernel.K * size
        step = step_clocks(card, kernel, layer.dtype, arriving, reads)
        tiles = batch * math.ceil(layer.rows / kernel.M) * math.ceil(outputs / kernel.N)
        for splits in LIBRARY_SPLITS:
            steps = math.ceil(inputs / kernel.K / splits)
            parts = 8 * splits * batch * layer.rows * outputs if splits > 1 else 0
            bounds.append(bound(card, "library", step, tiles * splits, steps, dram, parts + written))
    return min(bounds, key=lambda found: found.seconds)


def dense(card: Card, layer: Layer) -> LayerBound:
    return LayerBound("dense", (library(card, layer, layer.outputs, layer.inputs),))


def weights_hat(card: Card, layer: Layer, prepacked: bool) -> tuple[KernelBound, ...]:
    """F-hat_r = sum_i U[r,i] F_i, if it is not there already."""
    block = layer.p * layer.q * layer.bytes
    return () if prepacked else (combine(card, "F-hat", [layer.rank * block], layer.n * block),)


def pre_add(card: Card, layer: Layer) -> KernelBound:
    """X-hat_r = sum_l W[r,l] x_l: n blocks in, R out."""
    block = layer.rows * layer.q * layer.bytes
    return combine(card, "pre-add", [layer.n * block, layer.rank * block])


def passes(card: Card, layer: Layer, prepacked: bool) -> LayerBound:
    """Pre-add, R products by the library, post-add y_k = sum_r V[r,k] y-hat_r."""
    block = layer.rows * layer.p * layer.bytes
    products = library(card, layer, layer.p, layer.q, layer.rank, formed=not prepacked)
    post_add = combine(card, "post-add", [layer.rank * block, layer.n * block])
    return LayerBound("passes", (*weights_hat(card, layer, prepacked), pre_add(card, layer), products, post_add))


def rank_product(card: Card, layer: Layer, kernel: Kernel, formed_on_load: bool, prepacked: bool) -> KernelBound:
    """R products for each tile, added up in n accumulators; a step loads n tiles of x or one of X-hat, one of F-hat."""
    size, blocks = layer.bytes, layer.n if formed_on_load else 1
    x = blocks * kernel.M * kernel.K * size
    arriving = x + kernel.N * kernel.K * size
    reads = operand_reads(card, kernel, in_registers=formed_on_load) * size
    step = step_clocks(card, kernel, layer.dtype, arriving, reads, staged=x if formed_on_load else 0.0)
    tiles = math.ceil(layer.rows / kernel.M) * math.ceil(layer.p / kernel.N)
    read = layer.rows * layer.q * size * (layer.n if formed_on_load else layer.rank)
    written = layer.rows * layer.outputs * size
    weights = layer.rank * layer.p * layer.q * size
    dram = from_dram(card, read, written) + of_weights(card, weights, not prepacked)
    steps = layer.rank * math.ceil(layer.q / kernel.K)
    return bound(card, "rank_product", step, tiles, steps, dram, written, executed(card, kernel, kernel.outside))


def fused(card: Card, layer: Layer, kernel: Kernel, prepacked: bool) -> LayerBound:
    """One kernel: X-hat formed on load, nothing written but y."""
    return LayerBound(
        "fused", (*weights_hat(card, layer, prepacked), rank_product(card, layer, kernel, True, prepacked))
    )


def epilogue(card: Card, layer: Layer, kernel: Kernel, prepacked: bool) -> LayerBound:
    """Pre-add, then the products with the V-combination: no Y-hat."""
    last = (pre_add(card, layer), rank_product(card, layer, kernel, False, prepacked))
    return LayerBound("epilogue", (*weights_hat(card, layer, prepacked), *last))


def stream(card: Card, layer: Layer, kernel: Kernel, splits: int) -> LayerBound:
    """Every F_i x_l of a tile in one product, features (i, r) by rows (l, b), and the sum over i and l in registers.

    A tile reads n blocks of F and of x once. The parts of a split sum, float32, take a second kernel.
    """
    size, n = layer.bytes, layer.n
    rows, features = plans_cuda.stream_size(layer.rows, n), plans_cuda.stream_size(layer.p, n)
    x = n * min(kernel.M * layer.rows // rows, layer.rows) * kernel.K
    F = n * min(kernel.N * layer.p // features, layer.p) * kernel.K
    step = step_clocks(card, kernel, layer.dtype, (x + F) * size, operand_reads(card, kernel, transposed=True) * size)
    tiles = math.ceil(rows / kernel.M) * math.ceil(features / kernel.N)
    read, written = layer.rows * layer.inputs * size, layer.rows * layer.outputs * size
    steps = math.ceil(math.ceil(layer.q / kernel.K) / splits)
    splits = math.ceil(math.ceil(layer.q / kernel.K) / steps)
    parts = 4 * splits * layer.rows * layer.outputs
    out = written if splits == 1 else parts
    dram = from_dram(card, read, out) + n * layer.p * layer.q * size
    kernels = (
        bound(card, "stream_product", step, tiles * splits, steps, dram, out, executed(card, kernel, kernel.outside)),
    )
    if splits > 1:
        kernels += (combine(card, "sum of parts", [parts, written]),)
    return LayerBound("stream", kernels)


def built(card: Card, layer: Layer) -> LayerBound:
    """Panels of H, a kernel for each of the n blocks of outputs, and the library's product with each panel."""
    F, block = layer.n * layer.p * layer.q * layer.bytes, layer.p * layer.inputs * layer.bytes
    most = max(1, plans_cuda.PANEL_BYTES // block)
    kernels: list[KernelBound] = []
    for first in range(0, layer.n, most):
        count = min(most, layer.n - first)
        # F comes from DRAM once, if it stays in L2.
        kernels += [combine(card, "H", [block], 0 if i else of_weights(card, F, first > 0)) for i in range(count)]
        kernels.append(library(card, layer, count * layer.p, layer.inputs, formed=True))
    return LayerBound("built", tuple(kernels))


def structure(card: Card, layer: Layer) -> KernelBound:
    """A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l]: n^3 numbers."""
    return combine(card, "structure", [4 * layer.n**3])


def bounds(card: Card, layer: Layer, form: str, kernel: Callable[[str], Kernel]) -> list[LayerBound]:
    """Every plan of the package for a layer whose weights have this ``form``, one of FORMS.

    ``kernel(name)``: the compiled kernel of this name in the table of tiles, for the card and the layer.
    """
    if form == "learned A":
        M, N = (plans_cuda.stream_size(count, layer.n) for count in (layer.rows, layer.p))
        of_stream = kernel(f"stream{plans_cuda.stream_tile(M, *[layer.n] * 3, layer.p, layer.q)}")
        tile = (of_stream.M, of_stream.N, of_stream.K)
        splits = plans_cuda.stream_splits(M, N, layer.q, tile, card.capability)
        return [stream(card, layer, of_stream, splits), built(card, layer)]
    found = [passes(card, layer, form == "prepacked")]
    if layer.n <= plans_cuda.MAX_RESULTS:
        found.append(fused(card, layer, kernel("fused"), form == "prepacked"))
        found.append(epilogue(card, layer, kernel("epilogue"), form == "prepacked"))
    if form == "factored":
        of_A = bounds(card, layer, "learned A", kernel)
        found += [replace(plan, kernels=(structure(card, layer), *plan.kernels)) for plan in of_A]
    return found


def compiled(static: Mapping[str, Any], card: Card, layer: Layer, name: str) -> Kernel:
    """From the figures of gpu_static.py: the kernel of this name that the table of tiles has for blocks so wide."""
    # The table is next to the kernels, which need triton; what this module stores can be read without.
    from phydi_kernels.kernels.gpu.configs import fixed

    tile = fixed(name, torch.bfloat16, layer.n, layer.p, card.capability)
    sizes = "x".join(map(str, tile[:3]))
    plan = name.rstrip("0123456789")
    case = f"phm_linear{'_factored' * (plan in ('fused', 'epilogue'))} {plan} n={layer.n} "
    for row in static["rows"]:
        if (row["dtype"], row["arch"], row["tile"], row["warps"]) == (layer.dtype, card.capability, sizes, tile.warps):
            if row["case"].startswith(case) and row["case"].endswith(" epilogue"):
                return Kernel(*tile[:4], row["loop"], row["outside"])
    raise ValueError(f"no figures of {name} {sizes} for n={layer.n}, sm_{card.capability}: run gpu_static.py")


def rows(static: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All cards, shapes, batches, n and forms, and what else is asked."""
    points = itertools.product(CARDS, SHAPES, BATCHES, RANKS.items(), FORMS)
    for card, shape, batch, (n, rank), form in points:
        yield row(static, card, Layer(batch, *shape, n, rank), form)
    for *shape, batch, rank in ASKED:
        if rank != RANKS[4]:
            yield from (row(static, H100, Layer(batch, *shape, 4, rank), form) for form in FORMS)


def row(static: Mapping[str, Any], card: Card, layer: Layer, form: str) -> dict[str, Any]:
    """The dense layer and the best plan, in microseconds, and every plan's in a CUDA graph."""
    reference, found = dense(card, layer), bounds(card, layer, form, partial(compiled, static, card, layer))
    best = min(found, key=lambda plan: plan.seconds_in_graph)
    figures = {"card": card.name, **asdict(layer), "form": form, "plan": best.plan}
    for prefix, some in (("dense ", reference), ("", best)):
        figures |= {f"{prefix}us": _us(some.seconds), f"{prefix}us in graph": _us(some.seconds_in_graph)}
        figures[f"{prefix}limit"] = some.limit
    return figures | {"plans": {plan.plan: _us(plan.seconds_in_graph) for plan in found}}


def _us(seconds: float) -> float:
    return float(f"{1e6 * seconds:.4g}")


def ratio(row: Mapping[str, Any], unit: str = "us in graph") -> float:
    """To the dense layer; ``unit`` us: without the gaps between kernels."""
    return row[unit] / row[f"dense {unit}"]


def markdown(results: Mapping[str, Any]) -> str:
    """The README's tables."""
    lines = [HEADING, "", "| H100, n = 4 | R | plan | kernels alone | in a graph | limit | asked |"]
    lines.append("|---|--:|---|--:|--:|---|--:|")
    for (*shape, batch, rank), asked in ASKED.items():
        best = _best(results, "H100", Layer(batch, *shape, 4, rank), FORMS)
        verdict = f"<= {asked:.2f} {'met' if ratio(best, 'us') <= asked else 'MISSED'}"
        cells = (f"{_shape(shape)}, batch {batch}", str(rank), f"{best['plan']}, {best['form']}")
        lines.append(f"| {' | '.join([*cells, *(f'{ratio(best, u):.2f}' for u in UNITS), best['limit'], verdict])} |")
    for card in CARDS:
        header = [f"n = {n}, {what}" for n, rank in RANKS.items() for what in ("learned A", f"R = {rank}")]
        lines += ["", f"<details{' open' * (card is H100)}><summary>{card.name}</summary>", ""]
        lines += [f"| features | batch | dense us | {' | '.join(header)} |", "|---|--:|--:|" + "---|" * len(header)]
        for shape, batch in itertools.product(SHAPES, BATCHES):
            layers = [Layer(batch, *shape, n, rank) for n, rank in RANKS.items()]
            best = [_best(results, card.name, layer, some) for layer in layers for some in (FORMS[:1], FORMS[1:])]
            cells = [f"**{ratio(b):.2f}** {b['plan']}, {b['limit']}" for b in best]
            lines.append(f"| {_shape(shape)} | {batch} | {best[0]['dense us in graph']:.1f} | {' | '.join(cells)} |")
        lines += ["", "</details>"]
    return "\n".join(lines)


def _shape(shape: Sequence[int]) -> str:
    return f"{shape[1]} to {shape[0]}"


def _best(results: Mapping[str, Any], card: str, layer: Layer, forms: Sequence[str]) -> Mapping[str, Any]:
    facts = {"card": card, **asdict(layer)}.items()
    return min((r for r in results["rows"] if facts <= r.items() and r["form"] in forms), key=ratio)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", type=Path, default=STATIC, help="machine code's figures (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the tables of results/gpu_model.json")
    parser.add_argument("--write", action="store_true", help="store the bounds and put their tables into README.md")
    args = parser.parse_args()
    if args.markdown:
        print(markdown(json.loads(RESULTS.read_text(encoding="utf-8"))))
    else:
        found = {"rows": list(rows(json.loads(args.static.read_text(encoding="utf-8"))))}
        print(markdown(found))
        if args.write:
            report.save(found, RESULTS)
            report.write_into(README, "python benchmarks/gpu_model.py --markdown", markdown(found))
