"""phm_linear and phm_linear_factored form no more of H than the share 1/n that its weights hold.

Bound, forward and backward: arguments + results + gradients + 1/n of H + 4 MiB. With relu the gradients include the one
of the pre-activation. Measured is the resident memory of a process, so that scratch the library allocates on its own
counts like tensors do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each case runs in a process of its own, forked before torch starts threads. VmHWM, the peak of the resident set, is
# reset by writing 5 to clear_refs. A first call on small tensors loads code pages and starts threads, which would count
# otherwise; what is left of such noise, some 0.2 MiB, comes out of the 4 MiB.
SCRIPT = """
import json, os, re, sys
import torch
from phydi_kernels import functional, reference

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def peak(call):
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    result = call()
    return resident("VmHWM"), result

def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)

ALGEBRAS = {"A": dict(A=(4, 4, 4)), "7 terms": dict(U=(7, 4), V=(7, 4), W=(7, 4))}
OPS = {
    "phm_linear": (functional.phm_linear, "A"),
    "phm_linear_factored": (functional.phm_linear_factored, "7 terms"),
    "dense": (reference.phm_linear, "A"),
}

def measure(name, features, rows, dtype, activation, optional):
    op, algebra = OPS[name]
    n, p = 4, features // 4
    shapes = dict(x=(rows, features), **ALGEBRAS[algebra], F=(n, p, p), bias=(features,))
    if optional == "residual+alpha":
        shapes.update(residual=(rows, features), alpha=(1,))
    before = resident("VmRSS")
    tensors = {k: torch.full(s, 0.5, dtype=getattr(torch, dtype)).requires_grad_() for k, s in shapes.items()}
    forward, y = peak(lambda: op(**tensors, activation=activation))
    grad = torch.ones_like(y)
    backward, grads = peak(lambda: torch.autograd.grad(y, list(tensors.values()), grad))
    held = size([*tensors.values(), y])
    gradients = size([grad, *grads]) + (size([y]) if activation == "relu" else 0)
    beside = {"forward": forward - before - held, "backward": backward - before - held - gradients}
    return {**beside, "training": max(forward, backward) - before}

for name, features, *case in json.loads(sys.argv[1]):
    if os.fork():
        if os.wait()[1]:
            sys.exit(f"{name} {features} {case} failed")
    else:
        measure(name, 64, *case)
        print(json.dumps(measure(name, features, *case)), flush=True)
        os._exit(0)
"""

MIB = 1 << 20
ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
CASES = (
    *((2048, rows, "float32", "none", "none") for rows in (64, 512, 2048)),
    *((4096, rows, "float32", "none", "none") for rows in (64, 2048)),
    (2048, 512, "bfloat16", "none", "none"),
    (4096, 64, "bfloat16", "none", "none"),
    (4096, 64, "float16", "none", "none"),
    (2048, 2048, "float32", "relu", "none"),
    (2048, 2048, "float32", "none", "residual+alpha"),
    (2048, 2048, "float32", "relu", "residual+alpha"),
)
FACTORED_CASES = (
    (2048, 64, "float32", "none", "none"),
    (4096, 64, "float32", "none", "none"),
    (4096, 64, "bfloat16", "none", "none"),
    (2048, 2048, "float32", "relu", "residual+alpha"),
)
DENSE = (2048, 64, "float32", "none", "none")


def _measure(cases: list[tuple]) -> list[dict[str, int]]:
    """Bytes beyond arguments, results and gradients at the peak of the forward and of the backward, and all bytes at
    the peak of both."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        # A fixed threshold: freed blocks return to the system at once.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def _bound(features: int, dtype: str) -> int:
    return features * features * ITEM_SIZE[dtype] // 4 + 4 * MIB


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


@needs_proc
def test_peak_memory():
    cases = [("phm_linear", *case) for case in CASES]
    cases += [("phm_linear_factored", *case) for case in FACTORED_CASES]
    dense, *measured = _measure([("dense", *DENSE), *cases])
    for phase in ("forward", "backward"):
        assert dense[phase] > _bound(DENSE[0], DENSE[2]) + 4 * MIB, (
            "H was formed and not seen: the measurement is blind"
        )
    above = [
        f"{op} {case} {phase}: {overhead[phase] / MIB:.1f} MiB beside the tensors, "
        f"allowed {_bound(case[0], case[2]) / MIB:.1f}"
        for (op, *case), overhead in zip(cases, measured, strict=True)
        for phase in ("forward", "backward")
        if overhead[phase] > _bound(case[0], case[2])
    ]
    assert above == []


@needs_proc
def test_training_of_seven_terms_peaks_below_that_of_a_dense_algebra():
    # At fewer rows the two differ by less than the noise: what both hold is arguments, results and gradients.
    cases = [(features, rows, "float32", "none", "none") for features, rows in ((1024, 512), (1024, 2048), (2048, 512))]
    ops = ("phm_linear", "phm_linear_factored")
    measured = iter(_measure([(op, *case) for case in cases for op in ops]))
    above = []
    for case in cases:
        dense, factored = next(measured)["training"], next(measured)["training"]
        if factored >= dense:
            above.append(f"{case}: {factored / MIB:.1f} MiB with seven terms, {dense / MIB:.1f} with A")
    assert above == []
