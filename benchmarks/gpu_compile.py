"""Triton kernels compiled ahead of time, and what their machine code holds. No GPU is needed.

:func:`record` collects the launches of a driver instead of running them, :func:`compile` compiles one of them for an
architecture with the argument types and hints of a real launch, :func:`problems` lists what is wrong with the result.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime.driver import driver

from phydi_kernels.kernels import gpu
from phydi_kernels.kernels.gpu import _launch

ARCHITECTURES = (80, 89, 90, 100, 120)
# Bytes of shared memory that one block can have; cards of 8.6 take the tiles of 80, and have that of 89.
SHARED_LIMIT = {80: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TENSOR_MEMORY_LIMIT = 512
TENSOR_CORE_OPCODE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 120: "HMMA"}
OPCODE_CLASSES = {
    "tensor": r"\w*MMA",
    "fma": r"[FHD](FMA|MUL|ADD)2?",
    "load_global": "LDG",
    "store_global": "STG|RED|UTMASTG|UTMAREDG",
    "async": "LDGSTS|UTMALDG|UBLKCP",
    "load_shared": "LDSM?",
    "store_shared": "STSM?",
    "tensor_memory": "LDTM|STTM|UTCCP",
    "local": "LDL|STL",
    "convert": "F2FP?|I2FP?|F2I|FRND",
}

INSTRUCTION = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@\S+\s+)?(?P<opcode>[A-Z]\w*)(?P<rest>[^;]*);"
)
LABEL = re.compile(r"(?P<name>\.L_x_\d+):")
BRANCH_TARGET = re.compile(r"`\((?P<name>\.L_x_\d+)\)")


class _StandIn(DriverBase):
    """What the compiler asks a driver: the architecture. Its number is the device's as well, since Triton keeps
    compiled kernels by device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty_to_cpp(ty)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("nothing runs on the stand-in driver")


@contextlib.contextmanager
def target(arch: int) -> Iterator[None]:
    """Triton compiles for ``arch``, one of :data:`ARCHITECTURES`, inside the block."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch={arch} is not one of {', '.join(map(str, ARCHITECTURES))}")
    # driver.active would look for a card where no driver is set.
    before = driver._active
    driver.set_active(_StandIn(arch))
    try:
        yield
    finally:
        driver.set_active(before)


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is started with; ``meta`` holds constexprs, num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: Mapping[str, Any]


def record(call: Callable[[], Any], arch: int = 90) -> list[Launch]:
    """The launches of ``call()`` on a card of ``arch``, none of which runs.

    Its tensors, on the cpu or the meta device, need their true shapes and strides: the compiler's hints come from them.
    """
    launches: list[Launch] = []

    def run(kernel: Any, grid: Sequence[int], args: Sequence[Any], meta: Mapping[str, Any]) -> None:
        launches.append(Launch(kernel, tuple(grid), tuple(args), dict(meta)))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_launch, "run", run))
        for module in _importers(gpu.capability):
            stack.enter_context(mock.patch.object(module, "capability", lambda device: arch))
        call()
    return launches


def _importers(function: Callable[..., Any]) -> list[types.ModuleType]:
    """The modules of the GPU kernels that know a function."""
    modules = [module for name, module in sys.modules.items() if name.startswith(gpu.__name__)]
    return [module for module in modules if vars(module).get(function.__name__) is function]


@dataclass(frozen=True)
class Compiled:
    """Figures of a kernel's machine code.

    ``registers`` of a thread; bytes of ``stack``, ``spill_stores`` and ``spill_loads``; ``warnings``: those of ptxas,
    and its advice on performance; bytes of ``shared`` memory of a block; columns of ``tensor_memory``; instructions by
    opcode, in the whole kernel and in the hottest loop (:func:`innermost_loop`).
    """

    name: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    warnings: tuple[str, ...]
    shared: int
    tensor_memory: int
    opcodes: Mapping[str, int]
    loop: Mapping[str, int]


def compile(launch: Launch, arch: int) -> Compiled:
    """Compiles a launch for ``arch``; a result in Triton's cache is taken from there."""
    if not isinstance(launch.kernel, triton.runtime.JITFunction):
        raise TypeError(f"kernel: got {type(launch.kernel).__name__}, not a compiled kernel; is TRITON_INTERPRET set?")
    with target(arch), knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = _keep_log_and_sass
        kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
    sass = parse(kernel.asm["sass"])
    return Compiled(
        name=kernel.metadata.name,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        **_resources(kernel.metadata.ptxas_log),
        shared=kernel.metadata.shared,
        tensor_memory=kernel.metadata.tmem_size,
        opcodes=_counts(sass),
        loop=_counts(innermost_loop(sass)),
    )


def problems(compiled: Compiled, expects_tensor_core: bool, small_tile: bool = False) -> list[str]:
    """What must not be: spills, compiler warnings, too much memory, other instructions than the tensor cores' own.

    A ``small_tile``, of fewer than 64 rows or columns, may take HMMA on every architecture.
    """
    found = []
    if compiled.spill_stores or compiled.spill_loads:
        found.append(f"spills: {compiled.spill_stores} bytes stored, {compiled.spill_loads} loaded")
    elif compiled.stack:
        found.append(f"stack frame of {compiled.stack} bytes")
    found += compiled.warnings
    if compiled.shared > SHARED_LIMIT[compiled.arch]:
        found.append(f"{compiled.shared} bytes of shared memory, {SHARED_LIMIT[compiled.arch]} are allowed")
    if compiled.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"{compiled.tensor_memory} columns of tensor memory, {TENSOR_MEMORY_LIMIT} are allowed")
    expected = OPCODE_CLASSES["tensor"] if small_tile else TENSOR_CORE_OPCODE[compiled.arch]
    if expects_tensor_core and not any(re.fullmatch(expected, opcode) for opcode in compiled.opcodes):
        others = [opcode for opcode in compiled.opcodes if re.fullmatch(OPCODE_CLASSES["tensor"], opcode)]
        found.append(
            f"no {expected.replace(chr(92) + 'w*', '*')}, but {' and '.join(others) or 'no tensor-core opcode'}"
        )
    return found


def by_class(opcodes: Mapping[str, int]) -> dict[str, int]:
    """Instructions of each of :data:`OPCODE_CLASSES`, and of all others under ``other``."""
    counts = dict.fromkeys([*OPCODE_CLASSES, "other"], 0)
    for opcode, count in opcodes.items():
        counts[_class(opcode)] += count
    return counts


@functools.cache
def _class(opcode: str) -> str:
    return next((name for name, pattern in OPCODE_CLASSES.items() if re.fullmatch(pattern, opcode)), "other")


@dataclass(frozen=True)
class Instruction:
    """``successors`` are the indices of the instructions that may follow."""

    opcode: str
    successors: tuple[int, ...]


def parse(sass: str) -> list[Instruction]:
    """The instructions in nvdisasm's listing. A call is followed by what comes after its return."""
    matches: list[re.Match[str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label["name"]] = len(matches)
        elif match := INSTRUCTION.match(line):
            matches.append(match)
    instructions = []
    for index, match in enumerate(matches):
        opcode, guarded = match["opcode"], bool(match["guard"])
        following = [index + 1] if index + 1 < len(matches) else []
        if opcode == "BRA" and (to := BRANCH_TARGET.search(match["rest"])):
            # The condition is a guard in front or an operand before the target.
            conditional = guarded or "," in match["rest"]
            following = [labels[to["name"]], *(following if conditional else [])]
        elif opcode in ("EXIT", "RET") and not guarded:
            following = []
        instructions.append(Instruction(opcode, tuple(following)))
    return instructions


def innermost_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The loop with the most tensor-core instructions; in a kernel without these in loops, with the most
    multiply-adds, or else the most loads, stores and conversions. A loop counts where none inside it has any of these.

    Everything on a way around the loop belongs to it once: both sides of a branch, and loops without such work, as the
    waits for a barrier that ptxas puts behind the kernel's end.
    """
    loops = _loops(instructions)
    classes = {header: by_class(_counts(instructions[i] for i in loop)) for header, loop in loops.items()}
    for work in (["tensor"], ["fma"], list(OPCODE_CLASSES)):
        amount = {header: sum(classes[header][name] for name in work) for header in loops}
        busy = [header for header in loops if amount[header]]
        inner = [h for h in busy if not any(loops[other] < loops[h] for other in busy)]
        if inner:
            return [instructions[index] for index in sorted(loops[max(inner, key=amount.__getitem__)])]
    return []


def _loops(instructions: Sequence[Instruction]) -> dict[int, set[int]]:
    """The natural loops that can be reached from the kernel's entry, by their first instruction."""
    predecessors: list[list[int]] = [[] for _ in instructions]
    loops: dict[int, set[int]] = {}
    back_edges: list[tuple[int, int]] = []
    state = ["new"] * len(instructions)
    stack = [(0, iter(instructions[0].successors))] if instructions else []
    while stack:
        index, successors = stack[-1]
        state[index] = "open"
        for successor in successors:
            predecessors[successor].append(index)
            if state[successor] == "open":
                back_edges.append((index, successor))
            elif state[successor] == "new":
                stack.append((successor, iter(instructions[successor].successors)))
                break
        else:
            state[index] = "done"
            stack.pop()
    for end, header in back_edges:
        loop = loops.setdefault(header, {header})
        todo = [end]
        while todo:
            index = todo.pop()
            if index not in loop:
                loop.add(index)
                todo += predecessors[index]
    return loops


def _counts(instructions: Iterable[Instruction]) -> dict[str, int]:
    return dict(sorted(Counter(instruction.opcode for instruction in instructions).items()))


def _resources(log: str) -> dict[str, Any]:
    """Registers, stack, spills and warnings from the log of ptxas -v, summed over the kernel's functions."""

    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log))),
        "stack": total(r"(\d+) bytes stack frame"),
        "spill_stores": total(r"(\d+) bytes spill stores"),
        "spill_loads": total(r"(\d+) bytes spill loads"),
        "warnings": tuple(line.strip() for line in log.splitlines() if re.search(r"\(C7\d+\)|warning", line)),
    }


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        command = [knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _keep_log_and_sass(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> tuple[str, str]:
    """Triton's hook into its stages: ptxas runs once, and its log and the disassembly lie in Triton's cache as well.

    Called without stages, it names its effect on them for the cache.
    """
    if stages is not None:
        assemble = stages["cubin"]

        def cubin(ptx: str, metadata: dict[str, Any]) -> bytes:
            with contextlib.redirect_stdout(io.StringIO()) as log, knobs.nvidia.scope():
                knobs.nvidia.dump_ptxas_log = True
                binary = assemble(ptx, metadata)
            metadata["ptxas_log"] = log.getvalue()
            return binary

        stages["cubin"] = cubin
        stages["sass"] = lambda cubin, metadata: _disassemble(cubin)
    return _HOOK_KEY, _HOOK_KEY


_HOOK_KEY = hashlib.sha256(
    "".join(inspect.getsource(function) for function in (_disassemble, _keep_log_and_sass)).encode()
).hexdigest()
