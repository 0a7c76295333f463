"""``phydi-kernels info``: versions, devices, what was compiled, and the implementation each operator would run."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .kernels import cpu, cuda, gpu
from .plans_cuda import DTYPES, MAX_BLOCKS

_CONV_OPS = ("", "_input_grad", "_weight_grad", "_factored", "_factored_input_grad", "_factored_grad")
OPS = ("phm_linear", "phm_linear_weight_grad", "phm_linear_factored", "phm_linear_factored_grad") + tuple(
    f"phc_conv{d}d{suffix}" for d in (1, 2, 3) for suffix in _CONV_OPS
)
_WITH_TRITON_KERNELS = OPS
OPS += ("kernel_matrix", "gda_factor", "gda_apply", "symmetric_times", "eigh_small")
_WITH_CUDA_KERNELS = ("kernel_matrix", "gda_factor", "eigh_small")

_REFERENCE = "reference (composed torch ops)"
# Flags of /proc/cpuinfo on x86-64 and on aarch64 that matter to matrix kernels.
_FLAGS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2"),
)


def build_info() -> dict[str, Any] | None:
    """What the compiled parts were built from and for, or None where they were not compiled."""
    try:
        host = importlib.import_module("._host", __package__)
    except ImportError:
        return None
    return host.build_info()


def implementation(op: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """What ``torch.ops.phydi.<op>`` runs on tensors of a device and dtype, as ``info`` and ``selftest`` name it."""
    if device_type == "cuda" and op in _WITH_CUDA_KERNELS and not cuda.load():
        return "CUDA C++"
    if device_type == "cuda" and op in _WITH_TRITON_KERNELS and dtype in DTYPES and not gpu.status():
        return "Triton"
    if device_type != "cpu":
        return _REFERENCE
    return "reference (library not loaded)" if cpu.load() else f"C++ {cpu.isa()}"


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as plain types. No CUDA context is made where no CUDA device is available."""
    reason = cpu.load()
    model, instruction_sets = _processor()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cpu": {"model": model, "instruction_sets": instruction_sets, "threads": torch.get_num_threads()},
        "cuda": {"toolkit_of_torch": torch.version.cuda, "devices": _cuda_devices()},
        "library": {
            "path": str(cpu.LIBRARY),
            "loaded": not reason,
            "reason": reason,
            "instruction_set": None if reason else cpu.isa(),
        },
        "triton": _triton(),
        "build": build_info(),
        "ops": {op: {device: implementation(op, device) for device in ("cpu", "cuda")} for op in OPS},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    info = collect()
    print(json.dumps(info, indent=2) if args.json else _format(info))
    return 0


def _processor() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = (fields.get("flags") or fields.get("Features", "")).split()
    return fields.get("model name", platform.machine()), [flag for flag in _FLAGS if flag in flags]


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{d.name}, sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices]


def _triton() -> dict[str, Any]:
    """The kernels of kernels/gpu, what they take, and where their tiles come from."""
    why = gpu.status()
    result: dict[str, Any] = {"reason": why, "dtypes": [str(d).removeprefix("torch.") for d in DTYPES]}
    if not why:
        configs = importlib.import_module(".kernels.gpu.configs", __package__)
        measured = configs.load_cache(configs.cache_file())
        result["version"] = importlib.import_module("triton").__version__
        result["autotune"] = configs.autotunes()
        result["cache_file"] = str(configs.cache_file())
        result["measured"] = {card: {name: list(tile) for name, tile in of.items()} for card, of in measured.items()}
    return result


def _triton_rows(triton: dict[str, Any]) -> list[tuple[str, str]]:
    if triton["reason"]:
        return [("Triton", f"not used: {triton['reason']}")]
    rows = [("Triton", f"{triton['version']}, for {', '.join(triton['dtypes'])}")]
    rows.append(("", f"other or mixed dtypes and more than {MAX_BLOCKS} blocks or terms: {_REFERENCE}"))
    count = sum(map(len, triton["measured"].values()))
    source = "measured on this card" if triton["autotune"] else "from the package's table; PHYDI_AUTOTUNE=1 measures"
    rows.append(("GPU tiles", source))
    rows.append(("", f"{count} measured in {triton['cache_file']}"))
    for card, tiles in triton["measured"].items():
        rows += [
            ("", f"{card}: {name} {'x'.join(map(str, t[:3]))}, {t[3]} warps, {t[4]} stages")
            for name, t in tiles.items()
        ]
    return rows


def _format(info: dict[str, Any]) -> str:
    processor, library, build = info["cpu"], info["library"], info["build"]
    rows = [
        ("phydi_kernels", info["version"]),
        ("torch", info["torch"]),
        ("python", f"{info['python']} on {info['platform']}"),
        ("CPU", f"{processor['model']}, torch runs {processor['threads']} threads"),
        ("CPU supports", " ".join(processor["instruction_sets"]) or "unknown"),
        ("CUDA devices", "; ".join(info["cuda"]["devices"]) or "none"),
        *_triton_rows(info["triton"]),
        ("library", library["path"]),
        ("status", f"loaded, runs {library['instruction_set']}" if library["loaded"] else library["reason"]),
    ]
    if build is None:
        rows.append(("compiled for", "unknown, phydi_kernels._host was not built"))
    else:
        rows += [
            ("compiled by", f"{build['compiler']}, {build['build_type']}, headers of torch {build['torch_version']}"),
            ("compiled for", f"CPU {' '.join(build['instruction_sets'])}"),
            ("", f"CUDA {' '.join(build['cuda_architectures']) or 'none'}"),
        ]
        if build["version"] != info["version"]:
            rows.append(("", f"phydi_kernels {build['version']}, another version than this one: build it again"))
    lines = [f"{name:14}{value}".rstrip() for name, value in rows]
    table = [("operator", "on cpu", "on cuda"), *((op, d["cpu"], d["cuda"]) for op, d in info["ops"].items())]
    width = max(len(cpu_column) for _, cpu_column, _ in table)
    lines += ["", *(f"{op:32}{on_cpu:{width + 2}}{on_cuda}" for op, on_cpu, on_cuda in table)]
    return "\n".join(lines)
