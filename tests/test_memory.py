"""phm_linear forms no more of H than the share 1/n that its weights hold.

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

def measure(op, features, rows, dtype, activation, optional):
    n, p = 4, features // 4
    shapes = dict(x=(rows, features), A=(n, n, n), F=(n, p, p), bias=(features,))
    if optional == "residual+alpha":
        shapes.update(residual=(rows, features), alpha=(1,))
    before = resident("VmRSS")
    tensors = {k: torch.full(s, 0.5, dtype=getattr(torch, dtype)).requires_grad_() for k, s in shapes.items()}
    forward, y = peak(lambda: op(**tensors, activation=activation))
    grad = torch.ones_like(y)
    backward, grads = peak(lambda: torch.autograd.grad(y, list(tensors.values()), grad))
    held = size([*tensors.values(), y])
    gradients = size([grad, *grads]) + (size([y]) if activation == "relu" else 0)
    return {"forward": forward - before - held, "backward": backward - before - held - gradients}

for name, features, *case in json.loads(sys.argv[1]):
    if os.fork():
        if os.wait()[1]:
            sys.exit(f"{name} {features} {case} failed")
    else:
        op = {"phm_linear": functional.phm_linear, "dense": reference.phm_linear}[name]
        measure(op, 64, *case)
        print(json.dumps(measure(op, features, *case)), flush=True)
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
DENSE = (2048, 64, "float32", "none", "none")


def _measure(cases: list[tuple]) -> list[dict[str, int]]:
    """Bytes beyond arguments, results and gradients at the peak of the forward and of the backward."""
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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory():
    dense, *measured = _measure([("dense", *DENSE), *(("phm_linear", *case) for case in CASES)])
    for value in dense.values():
        assert value > _bound(DENSE[0], DENSE[2]) + 4 * MIB, "H was formed and not seen: the measurement is blind"
    above = [
        f"{case} {phase}: {value / MIB:.1f} MiB beside the tensors, allowed {_bound(case[0], case[2]) / MIB:.1f}"
        for case, overhead in zip(CASES, measured, strict=True)
        for phase, value in overhead.items()
        if value > _bound(case[0], case[2])
    ]
    assert above == []
