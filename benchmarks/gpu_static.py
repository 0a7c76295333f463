"""Registers, spills, memory and instructions of every GPU kernel, compiled ahead of time. No GPU is needed.

``python benchmarks/gpu_static.py`` compiles what CASES launch for every architecture and type into
results/gpu_static.json, and prints the table and what is wrong; results whose kernels are unchanged are kept.
``--markdown`` prints the table of that file, ``--write FILE`` puts it there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gpu_compile
import report
import torch
import triton
from gpu_compile import ARCHITECTURES, Launch
from torch import Tensor
from tqdm import tqdm

from phydi_kernels.kernels.gpu import combine, phc_conv, phc_conv_factored, phm_linear, phm_linear_factored
from phydi_kernels.plans_cuda import MAX_BLOCKS, MAX_RESULTS, CudaPlan

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_static.json"
# tf32: float32 tensors whose products torch's setting lets round so.
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The first in every variant.
TERMS = (4, 2, 8)
RANK = {2: 3, 4: 7, 8: 24}
# Features of a block, narrow and wide.
BLOCKS = (32, 64, 1024)
CONV_CHANNELS = 512
# Rows and columns of a tile from which on every architecture's own tensor-core instructions take it.
FULL_TILE = 64

Call = Callable[[torch.dtype], None]


def _tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _epilogue(residual: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
    """(bias, residual, alpha, activation), all there is."""
    features = residual.shape[1]
    return _tensor(residual.dtype, features), residual, _tensor(residual.dtype, 1), "relu"


NO_EPILOGUE = (None, None, None, "none")


def linear(plan: CudaPlan, sizes: Sequence[int], rows: int, variant: str, dtype: torch.dtype) -> None:
    """One phm_linear call of ``sizes`` n, P, Q, p, q; ``variant``: epilogue, or transposed, as the input's gradient."""
    n, P, Q, p, q = sizes
    x, A, F = _tensor(dtype, rows, Q * q), _tensor(dtype, n, P, Q), _tensor(dtype, n, p, q)
    if variant == "transposed":
        A, F = A.transpose(1, 2), F.transpose(1, 2)
    options = _epilogue(_tensor(dtype, rows, P * p)) if variant == "epilogue" else NO_EPILOGUE
    phm_linear.phm_linear(x, A, F, *options, plan)


def linear_grad(n: int, block: int, rows: int, dtype: torch.dtype) -> None:
    x, A, F = _tensor(dtype, rows, n * block), _tensor(dtype, n, n, n), _tensor(dtype, n, block, block)
    phm_linear.phm_linear_weight_grad(torch.empty_like(x), x, A, F, CudaPlan.PASSES)


def _factors(n: int) -> list[Tensor]:
    """U, V and W as modules keep them, in float32 beside every type."""
    return [_tensor(torch.float32, RANK[n], n) for _ in range(3)]


def linear_factored(plan: CudaPlan, n: int, block: int, rows: int, variant: str, dtype: torch.dtype) -> None:
    """The same of phm_linear_factored; ``variant`` prepacked: F holds F-hat."""
    x, (U, V, W) = _tensor(dtype, rows, n * block), _factors(n)
    F = _tensor(dtype, RANK[n] if variant == "prepacked" else n, block, block)
    if variant == "transposed":
        F = F.transpose(1, 2)
    options = _epilogue(_tensor(dtype, rows, n * block)) if variant == "epilogue" else NO_EPILOGUE
    phm_linear_factored.phm_linear_factored(x, None if variant == "prepacked" else U, V, W, F, *options, plan)


def linear_factored_grad(n: int, block: int, rows: int, dtype: torch.dtype) -> None:
    x, F = _tensor(dtype, rows, n * block), _tensor(dtype, n, block, block)
    phm_linear_factored.phm_linear_factored_grad(torch.empty_like(x), x, *_factors(n), F)


IMAGES, PIXELS = 32, 28
# (kernel size, stride)
CONVOLUTIONS = ((3, 1), (1, 1), (3, 2))


def _convolution(
    dtype: torch.dtype, n: int, block: int, kernel: int, stride: int, inputs: int | None = None
) -> tuple[Any, ...]:
    """(x, y, F, [stride, padding, dilation]), of blocks of ``block`` channels, or ``inputs`` in x."""
    pixels, inputs = (PIXELS - 1) // stride + 1, inputs or block
    x = _tensor(dtype, IMAGES, PIXELS, PIXELS, n * inputs).movedim(-1, 1)
    y = _tensor(dtype, IMAGES, pixels, pixels, n * block).movedim(-1, 1)
    F = _tensor(dtype, n, block, inputs, kernel, kernel)
    return x, y, F, [[stride] * 2, [kernel // 2] * 2, [1] * 2]


def conv(
    plan: CudaPlan,
    n: int,
    block: int,
    kernel: int,
    stride: int,
    variant: str,
    dtype: torch.dtype,
    inputs: int | None = None,
) -> None:
    x, y, F, geometry = _convolution(dtype, n, block, kernel, stride, inputs)
    bias, *rest = _epilogue(y) if variant == "epilogue" else NO_EPILOGUE
    phc_conv.phc_conv(x, _tensor(dtype, n, n, n), F, bias, *geometry, *rest, plan)


def conv_grads(plan: CudaPlan, n: int, block: int, kernel: int, stride: int, dtype: torch.dtype) -> None:
    x, y, F, geometry = _convolution(dtype, n, block, kernel, stride)
    A = _tensor(dtype, n, n, n)
    phc_conv.phc_conv_input_grad(y, A, F, list(x.shape), *geometry, plan)
    phc_conv.phc_conv_weight_grad(y, x, A, F, *geometry)


def conv_factored(
    plan: CudaPlan, n: int, block: int, kernel: int, stride: int, variant: str, dtype: torch.dtype
) -> None:
    x, y, F, geometry = _convolution(dtype, n, block, kernel, stride)
    bias, *rest = _epilogue(y) if variant == "epilogue" else NO_EPILOGUE
    phc_conv_factored.phc_conv_factored(x, *_factors(n), F, bias, *geometry, *rest, plan)


def conv_factored_grads(plan: CudaPlan, n: int, block: int, kernel: int, stride: int, dtype: torch.dtype) -> None:
    x, y, F, geometry = _convolution(dtype, n, block, kernel, stride)
    factors = _factors(n)
    phc_conv_factored.phc_conv_factored_input_grad(y, *factors, F, list(x.shape), *geometry, plan)
    phc_conv_factored.phc_conv_factored_grad(y, x, *factors, F, *geometry)


def _linear_cases(n: int, block: int) -> Iterator[tuple[str, Call]]:
    size, sizes = f"n={n} {n * block} features", (n, n, n, block, block)
    fused = [CudaPlan.FUSED, CudaPlan.EPILOGUE] if n <= MAX_RESULTS else []
    wide = block == BLOCKS[-1]
    every = wide and n == TERMS[0]
    # What needs most registers, and what reads F along p.
    variants = ("epilogue", "transposed") if every else ("epilogue",)
    # Rows of each tile of stream.
    for rows, variant in itertools.product((1, 64 // n, 128 // n, 256), variants):
        name = f"phm_linear stream {size} batch {rows} {variant}"
        yield name, partial(linear, CudaPlan.STREAM, sizes, rows, variant)
    for plan, variant in itertools.product(fused, variants):
        name = f"phm_linear_factored {plan.value} {size} batch 256 {variant}"
        yield name, partial(linear_factored, plan, n, block, 256, variant)
    if wide:
        name = f"phm_linear stream {size} batch 8192 epilogue"
        yield name, partial(linear, CudaPlan.STREAM, sizes, 8192, "epilogue")
        name = f"phm_linear_factored passes {size} batch 256 epilogue"
        yield name, partial(linear_factored, CudaPlan.PASSES, n, block, 256, "epilogue")
    if every:
        name = f"phm_linear_factored stream {size} batch 256 epilogue"
        yield name, partial(linear_factored, CudaPlan.STREAM, n, block, 256, "epilogue")
        for plan in fused:
            name = f"phm_linear_factored {plan.value} {size} batch 256 prepacked"
            yield name, partial(linear_factored, plan, n, block, 256, "prepacked")
        yield (
            f"phm_linear built {size} batch 8192 epilogue",
            partial(linear, CudaPlan.BUILT, sizes, 8192, "epilogue"),
        )
        yield f"phm_linear_weight_grad {size} batch 256", partial(linear_grad, n, block, 256)
        yield f"phm_linear_factored_grad {size} batch 256", partial(linear_factored_grad, n, block, 256)


def _conv_cases(n: int) -> Iterator[tuple[str, Call]]:
    block = CONV_CHANNELS // n
    fused = [CudaPlan.FUSED, CudaPlan.EPILOGUE] if n <= MAX_RESULTS else []
    every = n == TERMS[0]
    for kernel, stride in CONVOLUTIONS if every else CONVOLUTIONS[:1]:
        shape = f"{kernel}x{kernel} stride {stride} n={n} {n * block} channels epilogue"
        for plan in (CudaPlan.STREAM, *([CudaPlan.BUILT] if every else [])):
            yield f"phc_conv {plan.value} {shape}", partial(conv, plan, n, block, kernel, stride, "epilogue")
        for plan in (*([CudaPlan.PASSES] if every else []), *fused):
            name = f"phc_conv_factored {plan.value} {shape}"
            yield name, partial(conv_factored, plan, n, block, kernel, stride, "epilogue")
    if every:
        # plans_cuda: implicit GEMM where the input's gradient is a convolution of reversed filters.
        kernel, stride = CONVOLUTIONS[0]
        shape = f"{kernel}x{kernel} stride {stride} n={n} {n * block} channels"
        for plan in (CudaPlan.STREAM, CudaPlan.MIX):
            yield f"phc_conv gradients {plan.value} {shape}", partial(conv_grads, plan, n, block, kernel, stride)
        for plan in (CudaPlan.PASSES, *fused):
            name = f"phc_conv_factored gradients {plan.value} {shape}"
            yield name, partial(conv_factored_grads, plan, n, block, kernel, stride)


def structure_of_most_terms(dtype: torch.dtype) -> None:
    combine.structure(*(_tensor(torch.float32, MAX_BLOCKS, MAX_BLOCKS) for _ in range(3)))


def _cases() -> Iterator[tuple[str, Call]]:
    for n in TERMS:
        for block in BLOCKS if n == TERMS[0] else BLOCKS[-1:]:
            yield from _linear_cases(n, block)
        yield from _conv_cases(n)
    # Sizes that 16 does not divide, numbers of blocks that differ, and images of few channels.
    for n, P, Q, p, q in ((4, 4, 4, 1001, 1001), (2, 2, 2, 1001, 1001), (8, 8, 8, 501, 501), (3, 3, 3, 333, 333)):
        name = f"phm_linear stream n={n} P={P} Q={Q} p={p} q={q}"
        yield name, partial(linear, CudaPlan.STREAM, (n, P, Q, p, q), 256, "epilogue")
    for n, P, Q in ((1, 8, 1), (1, 1, 8), (1, 4, 4), (8, 8, 2), (4, 8, 1), (3, 5, 7)):
        sizes = (n, P, Q, 1024, 1024)
        yield f"phm_linear stream n={n} P={P} Q={Q}", partial(linear, CudaPlan.STREAM, sizes, 256, "epilogue")
    for n, q, p in ((3, 1, 32), (2, 2, 32), (4, 1, 16), (8, 8, 8)):
        name = f"phc_conv stream n={n} of {n * q} channels"
        yield name, partial(conv, CudaPlan.STREAM, n, p, 3, 1, "epilogue", inputs=q)
    # The most that plans_cuda lets through.
    size = f"n={MAX_BLOCKS} {MAX_BLOCKS * BLOCKS[0]} features batch 256"
    sizes = (*[MAX_BLOCKS] * 3, *[BLOCKS[0]] * 2)
    yield f"phm_linear built {size}", partial(linear, CudaPlan.BUILT, sizes, 256, "epilogue")
    yield f"phm_linear_weight_grad {size}", partial(linear_grad, MAX_BLOCKS, BLOCKS[0], 256)
    yield f"structure {size}", structure_of_most_terms


# {name: call of a driver, given a type}
CASES: dict[str, Call] = dict(_cases())


@dataclass(frozen=True)
class Work:
    """The launch number ``index`` of a case."""

    case: str
    dtype: str
    arch: int
    index: int


@contextlib.contextmanager
def float32_products(dtype: str) -> Iterator[None]:
    """Those of "tf32" round so, all others are exact."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def launches(case: str, dtype: str, arch: int) -> list[Launch]:
    with float32_products(dtype):
        return gpu_compile.record(partial(CASES[case], DTYPES[dtype]), arch)


def all_work(progress: bool = False) -> dict[str, Work]:
    """{key: one launch of each machine code}: what the cases launch for all architectures and types."""
    found: dict[str, Work] = {}
    # Their operands' type apart, machine codes of float16 are those of bfloat16: the largest layers' are enough.
    widest = f"n={TERMS[0]} {TERMS[0] * BLOCKS[-1]} features"
    combinations = [
        (case, dtype, arch)
        for case, dtype, arch in itertools.product(CASES, DTYPES, ARCHITECTURES)
        if dtype != "float16" or widest in case
    ]
    for case, dtype, arch in tqdm(combinations, disable=not progress):
        for index, launch in enumerate(launches(case, dtype, arch)):
            found.setdefault(key(launch, arch), Work(case, dtype, arch, index))
    return found


def key(launch: Launch, arch: int) -> str:
    """Of a machine code: the kernel's source, constants, types, hints and architecture."""
    facts = (_source(launch.kernel), [_hint(a) for a in launch.args], sorted(launch.meta.items(), key=str), arch)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _hint(argument: Any) -> str:
    """What the compiler knows of an argument: its type, whether it is 1, whether 16 is a factor."""
    if isinstance(argument, Tensor):
        return f"{argument.dtype}{' aligned' * (argument.data_ptr() % 16 == 0)}"
    if not isinstance(argument, int):
        return repr(argument)
    wide = "i32" if -(2**31) <= argument < 2**31 else "i64"
    return "1" if argument == 1 else f"{wide}{' aligned' * (argument % 16 == 0)}"


@lru_cache
def _source(kernel: Any) -> tuple[str, ...]:
    """Of a kernel and of what it calls, without comments and layout."""
    sources: dict[str, str] = {}
    todo = [kernel]
    while todo:
        function = todo.pop()
        if function.__name__ in sources:
            continue
        tokens = tokenize.generate_tokens(io.StringIO(function.src).readline)
        sources[function.__name__] = " ".join(t.string for t in tokens if t.type not in _LAYOUT and t.string.strip())
        for name in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(name)
            if isinstance(value, triton.language.constexpr):
                sources[name] = repr(value.value)
            elif isinstance(value, triton.runtime.JITFunction) and value.__module__.startswith("phydi_kernels"):
                todo.append(value)
    return tuple(f"{name}: {source}" for name, source in sorted(sources.items()))


_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)


def expects_tensor_core(launch: Launch) -> bool:
    """Whether a kernel multiplies matrices, and not in float32."""
    exact = launch.meta.get("DOT") is triton.language.float32 and launch.meta["PRECISION"] == "ieee"
    return "DOT" in launch.meta and not exact


def row(work: Work) -> dict[str, Any]:
    """The figures of one launch, or why there are none."""
    launch = launches(work.case, work.dtype, work.arch)[work.index]
    sizes = [launch.meta[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_J") if name in launch.meta]
    found = {
        "kernel": launch.kernel.__name__,
        "dtype": work.dtype,
        "arch": work.arch,
        "case": work.case,
        "index": work.index,
        "tile": "x".join(map(str, sizes)),
        "warps": launch.meta.get("num_warps"),
        "stages": launch.meta.get("num_stages"),
        "key": key(launch, work.arch),
    }
    try:
        compiled = gpu_compile.compile(launch, work.arch)
    except (triton.CompilationError, triton.runtime.errors.TritonError, RuntimeError) as error:
        return {**found, "problems": [f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"]}
    small_tile = min(sizes[:2], default=0) < FULL_TILE
    return {
        **found,
        "registers": compiled.registers,
        "spills": compiled.spill_stores + compiled.spill_loads,
        "shared": compiled.shared,
        "tensor_memory": compiled.tensor_memory,
        "tensor_core": {o: c for o, c in compiled.opcodes.items() if gpu_compile.by_class({o: c})["tensor"]},
        "loop": _classes(compiled.loop),
        "outside": _classes(Counter(compiled.opcodes) - Counter(compiled.loop)),
        "problems": gpu_compile.problems(compiled, expects_tensor_core(launch), small_tile),
    }


def _classes(opcodes: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in gpu_compile.by_class(opcodes).items() if count}


def rows(work: Sequence[Work], processes: int) -> Iterator[dict[str, Any]]:
    """Those of ``work``, as they are finished; what is wrong with one is printed at once."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(row, one) for one in work]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="compiling"):
                entry = future.result()
                if entry["problems"]:
                    tqdm.write(wrong({"rows": [entry]}))
                yield entry
        finally:
            pool.shutdown(cancel_futures=True)


def load(file: Path) -> dict[str, dict[str, Any]]:
    """{key: row} of a results file of this Triton."""
    if not file.exists():
        return {}
    results = json.loads(file.read_text(encoding="utf-8"))
    return {row["key"]: row for row in results["rows"]} if results["triton"] == triton.__version__ else {}


def save(rows: Iterable[Mapping[str, Any]], file: Path) -> None:
    """One row a line, in an order of their own."""
    lines = sorted(json.dumps(row) for row in rows)
    head = f'{{\n"triton": "{triton.__version__}",\n"rows": [\n'
    part = file.with_suffix(".part")
    part.write_text(head + ",\n".join(lines) + "\n]\n}\n", encoding="utf-8")
    os.replace(part, file)


def table(results: Mapping[str, Any]) -> str:
    """Markdown: for each kernel and type the bytes that all its configurations spill, and for each architecture the
    most registers and shared memory of one, and their tensor-core instructions."""
    groups: dict[tuple[str, str], dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for entry in results["rows"]:
        groups[entry["kernel"], entry["dtype"]][entry["arch"]].append(entry)
    order = list(DTYPES)
    lines = [
        f"| kernel | type | codes | spilled | {' | '.join(f'sm_{arch}' for arch in ARCHITECTURES)} |",
        f"|---|---|---:|---:|{'---|' * len(ARCHITECTURES)}",
    ]
    for kernel, dtype in sorted(groups, key=lambda group: (group[0], order.index(group[1]))):
        by_arch = groups[kernel, dtype]
        cells = [_cell(by_arch[arch]) for arch in ARCHITECTURES]
        entries = [entry for entries in by_arch.values() for entry in entries]
        spilled = sum(entry.get("spills", 0) for entry in entries)
        name = kernel.removesuffix("_kernel")
        lines.append(f"| {name} | {dtype} | {len(entries)} | {spilled} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(entries: Iterable[Mapping[str, Any]]) -> str:
    compiled = [entry for entry in entries if "registers" in entry]
    if not compiled:
        return ""
    most = {name: max(entry[name] for entry in compiled) for name in ("registers", "shared")}
    parts = [str(most["registers"]), f"{most['shared'] / 1024:.0f} KB"]
    counts: dict[str, list[int]] = defaultdict(list)
    for opcode, count in itertools.chain.from_iterable(entry["tensor_core"].items() for entry in compiled):
        counts[opcode].append(count)
    for opcode, numbers in sorted(counts.items()):
        low, high = min(numbers), max(numbers)
        parts.append(f"{low} {opcode}" if low == high else f"{low}-{high} {opcode}")
    return ", ".join(parts)


def wrong(results: Mapping[str, Any]) -> str:
    """A line for each row with problems."""
    lines = [
        f"{entry['kernel']} sm_{entry['arch']} {entry['dtype']} {entry['tile']} {entry['warps']} warps "
        f"{entry['stages']} stages ({entry['case']}): {'; '.join(entry['problems'])}"
        for entry in results["rows"]
        if entry["problems"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", metavar="REGEX", help="compile only cases that it is found in, write nothing")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="with --case: these types")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES, help="with --case")
    parser.add_argument("--processes", type=int, default=2, help="at a time (default: 2)")
    parser.add_argument("--fresh", action="store_true", help="compile everything again")
    parser.add_argument("--file", type=Path, default=RESULTS, help="results file (default: results/gpu_static.json)")
    parser.add_argument("--markdown", action="store_true", help="print the table of the results file")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table of the results file into this page")
    args = parser.parse_args()
    if args.markdown or args.write:
        markdown = table(json.loads(args.file.read_text(encoding="utf-8")))
        if args.write:
            report.write_into(args.write, "python benchmarks/gpu_static.py --markdown", markdown)
        else:
            print(markdown)
        return
    begin = time.perf_counter()
    work = all_work(progress=True)
    if args.case:
        chosen = [
            w for w in work.values() if re.search(args.case, w.case) and w.dtype in args.dtype and w.arch in args.arch
        ]
        results = {"rows": list(rows(chosen, args.processes))}
    else:
        known = {} if args.fresh else load(args.file)
        finished = {name: known[name] for name in work if name in known}
        for count, entry in enumerate(rows([w for name, w in work.items() if name not in known], args.processes)):
            finished[entry["key"]] = entry
            if count % 100 == 99:
                save(finished.values(), args.file)
        save(finished.values(), args.file)
        results = json.loads(args.file.read_text(encoding="utf-8"))
    print(table(results))
    count = sum(bool(entry["problems"]) for entry in results["rows"])
    print(f"{len(results['rows'])} machine codes, {count} with problems, {time.perf_counter() - begin:.0f} s")
    if count:
        print(wrong(results))
    sys.exit(count > 0)


if __name__ == "__main__":
    main()
