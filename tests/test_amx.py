"""The kernels for AMX, in a program in which plain C++ stands in for the instructions, on every processor."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
import torch
from helpers import ternary
from torch import Tensor

from phydi_kernels import reference
from phydi_kernels.plans import Plan

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "amx_emulation"
SOURCES = [ROOT / "csrc" / "cpu" / f"phm_linear{part}.cpp" for part in ("", "_factored", "_weight_grad")]
FEATURES = ("F16C", "AVX2", "AVX512F", "AVX512BW", "AVX512VL", "AVX512DQ", "AVX512BF16", "AMX_BF16")
CALLS = ("linear", "factored", "factored_grad", "weight_grad")

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++, and there is no g++ here"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels for AMX are compiled for x86-64 alone"),
]


@dataclass(frozen=True)
class Case:
    """A call of the compiled kernels; the fields are those that tests/amx_emulation/main.cpp reads."""

    call: str
    plan: Plan
    threads: int
    rows: int
    n: int
    P: int
    Q: int
    p: int
    q: int
    R: int
    along_p: bool = False

    def __str__(self) -> str:
        sizes = "x".join(map(str, (self.n, self.P, self.Q, self.p, self.q)))
        layout = "-transposed" if self.along_p else ""
        return f"{self.call}-{self.plan.name.lower()}-B{self.rows}-{sizes}-R{self.R}-threads{self.threads}{layout}"

    def inputs(self) -> dict[str, Tensor]:
        shapes = {
            "x": (self.rows, self.Q * self.q),
            "F": (self.n, self.p, self.q),
            "bias": (self.P * self.p,),
            "other": (self.rows, self.P * self.p),
            "A": (self.n, self.P, self.Q),
            "U": (self.R, self.n),
            "V": (self.R, self.P),
            "W": (self.R, self.Q),
        }
        drawn = {name: ternary(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
        # No factor of a term is zero.
        return drawn | {name: 2 * drawn[name].abs() - 1 for name in "UVW"}

    def expected(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Results of the type of x, and results in float32."""
        x, F, bias, other, A, U, V, W = self.inputs().values()
        fused = (bias, other, torch.tensor(0.5, dtype=torch.float64), "relu")
        if self.call == "linear":
            return (reference.phm_linear(x, A, F, *fused),), ()
        if self.call == "factored":
            return (reference.phm_linear_factored(x, U, V, W, F, *fused),), ()
        if self.call == "weight_grad":
            dA, dF = reference.phm_linear_weight_grad(other, x, A, F)
            return (dF,), (dA,)
        dx, dU, dV, dW, dF = reference.phm_linear_factored_grad(other, x, U, V, W, F)
        return (dx, dF), (dU, dV, dW)

    def run(self, program: Path) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        tensors = self.inputs()
        if self.along_p:
            tensors["F"] = tensors["F"].mT
        numbers = (CALLS.index(self.call), *astuple(self)[1:])
        given = struct.pack(f"<{len(numbers)}q", *map(int, numbers))
        for name, t in tensors.items():
            values = t.to(torch.float32 if name in "AUVW" else torch.bfloat16).contiguous()
            given += values.view(torch.uint8).numpy().tobytes()
        done = subprocess.run([program], input=given, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        y, dx, dF, dA, dU, dV, dW = self._decode(done.stdout)
        by_call = {
            "linear": ((y,), ()),
            "factored": ((y,), ()),
            "weight_grad": ((dF,), (dA,)),
            "factored_grad": ((dx, dF), (dU, dV, dW)),
        }
        return by_call[self.call]

    def _decode(self, written: bytes) -> list[Tensor]:
        t = self.inputs()
        results = []
        for name in ("other", "x", "F", "A", "U", "V", "W"):
            dtype = torch.float32 if name in "AUVW" else torch.bfloat16
            size = t[name].numel() * dtype.itemsize
            results.append(torch.frombuffer(bytearray(written[:size]), dtype=dtype).view(t[name].shape))
            written = written[size:]
        assert not written
        return results


def _cases() -> list[Case]:
    # Rows of one tile of each compiled size, of several, and of several blocks; widths of less than a tile, of whole
    # ones, and with lanes left over for vectors.
    sizes = ((1, 16, 32), (9, 33, 64), (17, 32, 47), (31, 64, 96), (40, 5, 33), (97, 40, 64), (260, 64, 70))
    forward = [Case("factored", Plan.RANK, 1, rows, 4, 4, 4, p, q, 7) for rows, p, q in sizes]
    forward += [
        Case("factored", Plan.RANK, 2, 100, 4, 4, 4, 48, 544, 7),  # more lanes than one part of a sum
        Case("factored", Plan.RANK, 2, 130, 5, 3, 2, 31, 35, 6, along_p=True),  # lines not combined as they lie
        Case("factored", Plan.RANK, 2, 64, 4, 4, 4, 40, 64, 7, along_p=True),
        Case("linear", Plan.MIX, 2, 30, 2, 2, 3, 40, 75, 1),
        Case("linear", Plan.MIX, 1, 9, 4, 4, 4, 16, 32, 1, along_p=True),
        Case("linear", Plan.PANEL, 2, 130, 4, 4, 4, 24, 64, 1),
        Case("linear", Plan.PANEL, 1, 100, 4, 4, 4, 24, 64, 1),  # tiles of two sizes in one task
        Case("linear", Plan.PANEL, 1, 33, 3, 2, 4, 17, 21, 1, along_p=True),
        Case("linear", Plan.STREAM, 1, 3, 4, 4, 4, 17, 35, 1),
    ]
    gradients = [
        Case("factored_grad", Plan.RANK, 2, 70, 4, 4, 4, 40, 48, 7),
        Case("factored_grad", Plan.RANK, 1, 33, 3, 2, 4, 17, 21, 6),
        Case("factored_grad", Plan.RANK, 1, 530, 2, 2, 2, 16, 32, 3),  # more rows than one part of a sum
        Case("weight_grad", Plan.PANEL, 2, 130, 4, 4, 4, 24, 64, 1),
        Case("weight_grad", Plan.PANEL, 1, 47, 3, 2, 4, 17, 21, 1),
        Case("weight_grad", Plan.STREAM, 1, 3, 4, 4, 4, 17, 35, 1),
    ]
    return forward + gradients


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amx")
    flags = ["-std=c++17", "-O1", "-fsanitize=address", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    flags += [f"-I{EMULATION}", f"-I{ROOT / 'csrc' / 'cpu'}", "-DPHYDI_ISA=amx_bf16"]
    flags += [f"-D__{feature}__" for feature in FEATURES]

    def compiled(source: Path) -> str:
        to = folder / f"{source.stem}.o"
        subprocess.run(["g++", *flags, "-c", source, "-o", to], check=True)
        return str(to)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*SOURCES, EMULATION / "main.cpp"]))
    subprocess.run(["g++", "-fsanitize=address", "-pthread", *objects, "-o", folder / "run"], check=True)
    return folder / "run"


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_integers_exactly(case: Case, program: Path) -> None:
    expected_activations, expected_algebra = case.expected()
    activations, of_algebra = case.run(program)
    for found, expected in zip(activations, expected_activations, strict=True):
        assert torch.equal(found, expected.to(torch.bfloat16))
    for found, expected in zip(of_algebra, expected_algebra, strict=True):
        assert torch.equal(found, expected.to(torch.float32))
