"""The CUDA kernels: on the CPU under an emulated runtime, as nvcc compiles them, and on a card where there is one."""

from __future__ import annotations

import math
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import normal, ternary
from torch import Tensor

from phydi_kernels import info
from phydi_kernels.kernels import cpu, cuda
from phydi_kernels.ops.kernel_matrix import NAMES

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++, and there is no g++ here")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiles CUDA, and there is no nvcc here")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a card, and there is none here")

DOT = ("dot", "poly", "sigmoid")
PAIRWISE = ("dot", "squared_distance", "manhattan_distance", "chi2_distance")
# An error is allowed this many eps of the size of what was summed, times the square root of the number of terms.
ROUNDING = 8.0


def raw(*tensors: Tensor | None) -> bytes:
    return b"".join(t.contiguous().numpy().tobytes() for t in tensors if t is not None)


@dataclass(frozen=True)
class KernelMatrixCase:
    kernel: str
    dtype: torch.dtype = torch.float64
    gammas: int = 1
    batch: int = 1
    N: int = 70
    M: int | None = None  # None: X against itself
    d: int = 3
    degree: int = 3
    offset: float = 0.0
    integers: bool = False
    nan: bool = False
    twins: bool = False  # the second half of the points next to the first

    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor]:
        def points(count: int, seed: int) -> Tensor:
            shape = (self.batch, count, self.d)
            values = ternary(shape, seed) if self.integers else normal(shape, seed) + self.offset
            # chi2 is for counts; some features are 0 in both points.
            values = (values - 0.5).clamp_min(0) if self.kernel.startswith("chi2") else values
            return values.to(self.dtype)

        X = points(self.N, 1)
        if self.nan:
            X[:, 1, -1] = math.nan
        if self.twins:
            half = self.N // 2
            X[:, half:] = X[:, :half] * (1 + torch.finfo(self.dtype).eps * ternary((half, self.d), 4).to(self.dtype))
        gamma = 0.3 + torch.rand(self.gammas, self.batch, generator=torch.Generator().manual_seed(3))
        return X, None if self.M is None else points(self.M, 2), (gamma / max(1, self.d)).to(self.dtype)

    def encode(self) -> bytes:
        X, Y, gamma = self.inputs()
        numbers = (self.gammas, self.batch, self.N, X.shape[1] if Y is None else Y.shape[1], self.d)
        numbers += (NAMES.index(self.kernel), self.degree, Y is not None)
        return struct.pack("<10q", 0, self.dtype is torch.float64, *numbers) + struct.pack("<d", 0.5) + raw(X, Y, gamma)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.gammas, self.batch, self.N, self.N if self.M is None else self.M),)

    def run(self, device: torch.device) -> tuple[Tensor, ...]:
        X, Y, gamma = (None if t is None else t.to(device) for t in self.inputs())
        return (torch.ops.phydi_cuda.kernel_matrix(X, Y, gamma, NAMES.index(self.kernel), self.degree, 0.5),)

    def profile(self, s: Tensor, gamma: Tensor) -> Tensor:
        if self.kernel in PAIRWISE:
            return s.expand(gamma.shape[0], *s.shape)
        argument = gamma[..., None, None] * s
        if self.kernel == "poly":
            return (argument + 0.5) ** self.degree
        if self.kernel == "sigmoid":
            return (argument + 0.5).tanh()
        if self.kernel.startswith("matern"):
            nu2 = int(self.kernel[-2])
            r = (2 * argument).sqrt() * nu2**0.5
            return ({1: 1, 3: 1 + r, 5: 1 + r + r * r / 3}[nu2]) * (-r).exp()
        return (-argument).exp()

    def terms(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kernel in DOT:
            return x * y
        if self.kernel in ("manhattan_distance", "laplacian"):
            return (x - y).abs()
        if self.kernel.startswith("chi2"):
            return torch.where(x + y == 0, 0.0, (x - y) ** 2 / (x + y))
        return (x - y) ** 2

    def check(self, values: Tensor) -> None:
        X, Y, gamma = (None if t is None else t.double() for t in self.inputs())
        # Distances do not change with a common shift; the shifted points say how large the rounding errors may be.
        shift = X.mean(-2, keepdim=True) if self.offset else torch.zeros(1, dtype=torch.float64)
        x, y = (X - shift).unsqueeze(-2), ((X if Y is None else Y) - shift).unsqueeze(-3)
        s = self.terms(x, y).sum(-1).requires_grad_()
        expected = self.profile(s, gamma)
        if Y is None:
            assert torch.equal(values.nan_to_num(), values.mT.nan_to_num()), "not symmetric"
        if self.nan:
            # The mean spreads it to all centered points.
            spread = expected.isnan() | (self.kernel == "rbf" and self.d > 16)
            assert torch.equal(values.isnan(), spread), "NaN in other places"
            return
        if self.integers:
            assert torch.equal(values.double(), expected.detach()), "not exact on integers"
            return
        assert self.kernel in DOT or (values >= 0).all()
        eps = torch.finfo(self.dtype).eps
        expanded = not (
            self.kernel in DOT or "chi2" in self.kernel or self.kernel in ("manhattan_distance", "laplacian")
        )
        size = (x**2 + y**2).sum(-1) if expanded else self.terms(x, y).abs().sum(-1)
        for value, wanted in zip(values.double(), expected, strict=True):
            slope = torch.autograd.grad(wanted.sum(), s, retain_graph=True)[0].abs()
            # A matern kernel of a distance of exactly 0 has no slope.
            slope = torch.where(s == 0, 0, slope)
            allowed = ROUNDING * eps * (math.sqrt(self.d) * slope * size + wanted.detach().abs())
            error = (value - wanted.detach()).abs()
            assert (error <= allowed).all(), f"{float((error / allowed).max()):.2f} of the allowed error"
        if Y is None and self.kernel not in DOT:
            diagonal = values.diagonal(dim1=-2, dim2=-1)
            assert (diagonal == (0 if self.kernel in PAIRWISE else 1)).all(), "the diagonal is not exact"


@dataclass(frozen=True)
class ClassCenterCase:
    P: int
    N: int
    L: int
    dtype: torch.dtype = torch.float64
    one_K: bool = False
    unknown: bool = False  # a code that is no class

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(self.N)
        K = normal((1 if self.one_K else self.P, self.N, self.N), 5)
        # The last class is empty where there is more than one.
        codes = torch.randint(0, max(1, self.L - 1), (self.P, self.N), generator=generator)
        root = torch.rand(self.P, self.N, generator=generator, dtype=torch.float64).round(decimals=1)
        indicator = torch.nn.functional.one_hot(codes, self.L).double()
        counts = (indicator * root.unsqueeze(-1) ** 2).sum(-2)
        scale = 0.5 + torch.rand(self.P, self.L, generator=generator, dtype=torch.float64)
        if self.unknown:
            codes[:, -1] = self.L
            codes[:, 0] = -1
        return K.to(self.dtype), codes, *(t.to(self.dtype) for t in (root, counts, scale))

    def encode(self) -> bytes:
        sizes = (self.P, self.N, self.L, not self.one_K)
        return struct.pack("<6q", 1, self.dtype is torch.float64, *sizes) + raw(*self.inputs())

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.P, self.N, self.N), (self.P, self.N, self.L)

    def run(self, device: torch.device) -> tuple[Tensor, ...]:
        K, *rest = (t.to(device) for t in self.inputs())
        return torch.ops.phydi_cuda.class_center(K.expand(self.P, -1, -1), *rest)

    def check(self, centered: Tensor, means: Tensor) -> None:
        K, codes, root, counts, scale = (t if t.dtype is torch.int64 else t.double() for t in self.inputs())
        classes = torch.arange(self.L)
        weights = (codes.unsqueeze(-1) == classes) * root.unsqueeze(-1) ** 2
        share = torch.where(counts > 0, 1 / counts, 0).unsqueeze(-2)
        of_class = (codes.clamp(0, self.L - 1)).unsqueeze(-2).expand(-1, self.N, -1)
        weight = root.unsqueeze(-1) * root.unsqueeze(-2) * scale.gather(-1, of_class[:, 0]).unsqueeze(-2)
        known = ((codes >= 0) & (codes < self.L)).unsqueeze(-2).expand_as(of_class)
        eps = torch.finfo(self.dtype).eps
        expected, size = K @ weights * share, K.abs() @ weights * share
        allowed = ROUNDING * eps * math.sqrt(self.N) * size
        assert ((means.double() - expected).abs() <= allowed).all(), "means"
        allowed = weight * (allowed.gather(-1, of_class) + ROUNDING * eps * (K.abs() + size.gather(-1, of_class)))
        error = (centered.double() - weight * (K - expected.gather(-1, of_class))).abs()
        assert torch.equal(centered.isnan(), ~known), "NaN where, and only where, a code is no class"
        assert (error <= allowed)[known].all(), "centered"


@dataclass(frozen=True)
class EighSmallCase:
    L: int
    dtype: torch.dtype = torch.float64
    kind: str = "indefinite"
    P: int = 2

    def inputs(self) -> tuple[Tensor]:
        A = normal((self.P, self.L, self.L), self.L)
        S = A + A.mT
        if self.kind == "equal":
            S = torch.ones_like(S)
        elif self.kind == "diagonal":
            S = torch.diag_embed(ternary((self.P, self.L), self.L))
        elif self.kind == "graded":
            grades = torch.logspace(0, -4, self.L, dtype=torch.float64)
            S = grades.unsqueeze(-1) * (A @ A.mT + self.L * torch.eye(self.L, dtype=torch.float64)) * grades
        elif self.kind == "huge":
            S = S * (torch.finfo(self.dtype).max / 1e3)
        elif self.kind in ("nan", "inf"):
            # In one problem of the batch, and off its diagonal.
            S[0, -1, 0] = float(self.kind)
        # Only the lower triangle is read.
        return (torch.where(torch.ones_like(S, dtype=torch.bool).tril(), S, math.nan).to(self.dtype),)

    def encode(self) -> bytes:
        return struct.pack("<4q", 2, self.dtype is torch.float64, self.P, self.L) + raw(*self.inputs())

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.P, self.L), (self.P, self.L, self.L)

    def run(self, device: torch.device) -> tuple[Tensor, ...]:
        return torch.ops.phydi_cuda.eigh_small(self.inputs()[0].to(device))

    def check(self, values: Tensor, vectors: Tensor) -> None:
        lower = self.inputs()[0].double().tril()
        if self.kind in ("nan", "inf"):
            assert values[0].isnan().all() and vectors[0].isnan().all(), "not all NaN"
            values, vectors, lower = values[1:], vectors[1:], lower[1:]
        if lower.numel() == 0:
            return
        # Scaled, so that the reference does not overflow either.
        scale = lower.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        S = (lower + lower.tril(-1).mT) / scale
        w, v = values.double() / scale, vectors.double()
        allowed = ROUNDING * torch.finfo(self.dtype).eps
        size = torch.linalg.matrix_norm(S)[:, None]
        expected = torch.linalg.eigvalsh(S)
        assert (w.diff() >= 0).all(), "not ascending"
        assert ((w - expected).abs() <= allowed * size).all(), "eigenvalues"
        assert ((S @ v - v * w.unsqueeze(-2)).norm(dim=-2) <= allowed * size).all(), "S v = w v"
        assert ((v.mT @ v - torch.eye(self.L)).abs() <= allowed).all(), "not orthonormal"
        assert (v.gather(-2, v.abs().argmax(-2, keepdim=True)) > 0).all(), "sign"
        if self.kind == "graded":
            assert ((w / expected - 1).abs() <= allowed * math.sqrt(self.L)).all(), "relative error of an eigenvalue"


Case = KernelMatrixCase | ClassCenterCase | EighSmallCase
DTYPES = (torch.float64, torch.float32)
DISTANCES = [name for name in NAMES if name == "rbf" or name.startswith(("squared", "matern"))]
CASES: list[Case] = [
    # Two tiles in a row, and the squared distances by differences; then other shapes, and by centered products.
    *(KernelMatrixCase(k, t, gammas=1 if k in PAIRWISE else 2, batch=2) for k in NAMES for t in DTYPES),
    *(KernelMatrixCase(k, t, gammas=1 if k in PAIRWISE else 3, N=65, M=130, d=19) for k in NAMES for t in DTYPES),
    *(KernelMatrixCase(k, t, batch=2, N=130, d=35, offset=1000.0) for k in DISTANCES for t in DTYPES),
    *(KernelMatrixCase("rbf", t, N=9, M=66, d=d, offset=1000.0) for d in (1, 16, 17) for t in DTYPES),
    *(KernelMatrixCase(k, N=n, d=d) for k in NAMES for n in (1, 2) for d in (1, 17)),
    *(KernelMatrixCase(k, t, d=40, twins=True) for k in ("squared_distance", "matern12") for t in DTYPES),
    KernelMatrixCase("rbf", N=1, M=1, d=1),
    *(KernelMatrixCase("poly", degree=degree) for degree in (1, 2, 7)),
    *(KernelMatrixCase(k, t, d=9, integers=True) for k in PAIRWISE[:3] for t in DTYPES),
    *(KernelMatrixCase(k, d=d, nan=True) for k in ("dot", "rbf", "laplacian", "chi2") for d in (2, 18)),
    *(KernelMatrixCase(k, batch=2, N=130, d=0) for k in NAMES),
    KernelMatrixCase("rbf", batch=0),
    KernelMatrixCase("rbf", N=0, d=20),
    KernelMatrixCase("rbf", N=5, M=0, d=20),
    ClassCenterCase(2, 70, 9),
    ClassCenterCase(3, 33, 2, torch.float32),
    ClassCenterCase(1, 1, 1),
    ClassCenterCase(1, 40, 300),
    ClassCenterCase(1, 1030, 4, torch.float32),
    ClassCenterCase(3, 20, 3, one_K=True),
    ClassCenterCase(2, 20, 3, unknown=True),
    ClassCenterCase(0, 5, 2),
    *(EighSmallCase(L, t) for L in (1, 2, 3, 10, 31, 33, 64) for t in DTYPES),
    # Not in float64: the reference does not have that relative accuracy itself.
    *(EighSmallCase(L, torch.float32, "graded") for L in (9, 32)),
    *(EighSmallCase(L, t, kind) for L in (2, 9) for t in DTYPES for kind in ("equal", "diagonal", "huge")),
    *(EighSmallCase(L, kind=kind) for L in (1, 9) for kind in ("nan", "inf")),
    *(EighSmallCase(9, kind=kind, P=7) for kind in ("indefinite", "nan")),
    EighSmallCase(5, P=0),
    EighSmallCase(0),
]


def start_of(sanitizer: str, folder: Path) -> list[str]:
    """How to start a program of a sanitizer: ThreadSanitizer may need fixed addresses."""
    program = folder / "nothing"
    program.with_suffix(".cpp").write_text("int main() {}")
    command = ["g++", f"-fsanitize={sanitizer}", str(program.with_suffix(".cpp")), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"g++ does not link -fsanitize={sanitizer} here: {done.stderr.strip().splitlines()[-1]}")
    for start in ([], ["setarch", "-R"]):
        if start and shutil.which(start[0]) is None:
            continue
        if subprocess.run([*start, str(program)], capture_output=True).returncode == 0:
            return start
    pytest.skip(f"a program with -fsanitize={sanitizer} does not start here")


def build(sanitizer: str | None, folder: Path, sources: Sequence[Path] = SOURCES) -> Path:
    """The program of tests/cuda_emulation with the kernels."""
    flags = ["-std=c++17", "-O2" if sanitizer is None else "-O1", "-g", f"-I{EMULATION}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    sanitize = [] if sanitizer is None else [f"-fsanitize={sanitizer}"]
    tsan = ["-DEMULATE_WITH_TSAN"] if sanitizer == "thread" else []
    scheduler, program = folder / "emulation.o", folder / "emulated"
    for command in (
        [*flags, *tsan, "-c", EMULATION / "emulation.cpp", "-o", scheduler],
        [*flags, *sanitize, "-x", "c++", *sources, EMULATION / "main.cpp", "-x", "none", scheduler, "-o", program],
    ):
        done = subprocess.run(["g++", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return program


def run(start: Sequence[str], program: Path, cases: Sequence[Case]) -> subprocess.CompletedProcess[str]:
    program.with_suffix(".in").write_bytes(b"".join(case.encode() for case in cases))
    command = [*start, str(program), str(program.with_suffix(".in")), str(program.with_suffix(".out"))]
    return subprocess.run(command, capture_output=True, text=True)


def check_results(program: Path, cases: Sequence[Case]) -> None:
    data, offset = program.with_suffix(".out").read_bytes(), 0
    for case in cases:
        results = []
        for shape in case.shapes():
            size = math.prod(shape) * case.dtype.itemsize
            results.append(torch.frombuffer(bytearray(data[offset : offset + size] or 8), dtype=case.dtype))
            results[-1] = results[-1][: math.prod(shape)].view(shape)
            offset += size
        case.check(*results)
    assert offset == len(data)


@needs_compiler
@pytest.mark.parametrize("sanitizer", [None, "address", "thread"])
def test_emulated_kernels(sanitizer, tmp_path):
    start = [] if sanitizer is None else start_of(sanitizer, tmp_path)
    program = build(sanitizer, tmp_path)
    done = run(start, program, CASES)
    assert done.returncode == 0, done.stderr
    check_results(program, CASES)


def without(source: str, text: str, folder: Path) -> list[Path]:
    """The sources, one of them changed: the first occurrence of a text is left out."""
    (original,) = (path for path in SOURCES if path.stem == source)
    code = original.read_text()
    assert text in code
    changed = folder / original.name
    changed.write_text(code.replace(text, "", 1))
    return [path for path in SOURCES if path != original] + [changed]


@needs_compiler
@pytest.mark.parametrize(
    "sanitizer, source, text, report, case",
    [
        ("thread", "class_center", "__syncthreads();", "data race", ClassCenterCase(1, 40, 3)),
        ("address", "kernel_matrix", "row < count && ", "heap-buffer-overflow", KernelMatrixCase("dot", N=65)),
    ],
)
def test_the_emulation_reports_a_defect(sanitizer, source, text, report, case, tmp_path):
    start = start_of(sanitizer, tmp_path)
    done = run(start, build(sanitizer, tmp_path, without(source, text, tmp_path)), [case])
    assert done.returncode != 0 and report in done.stderr


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiled_kernels_spill_nothing(source, tmp_path):
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100a")]
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        *codes,
        "-Xptxas",
        "-v",
        "-c",
        str(source),
        "-o",
        str(tmp_path / "kernels.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    shared = [int(size) for size in re.findall(r"(\d+) bytes smem", done.stderr)]
    assert len(spills) == len(re.findall("Compiling entry function", done.stderr)) >= 6
    assert set(spills) == {("0", "0", "0")}, done.stderr
    # More has to be asked for at the launch, as eigh_small does; the emulation refuses what no card would grant.
    assert len(shared) == len(spills) and max(shared) <= 48 << 10


def test_schemas_are_those_of_the_cpu_kernels():
    for name in ("kernel_matrix", "eigh_small"):
        on_cpu, on_cuda = (getattr(getattr(torch.ops, lib), name).default for lib in ("phydi_cpu", "phydi_cuda"))
        assert str(on_cuda._schema).replace("phydi_cuda", "phydi_cpu") == str(on_cpu._schema)


def test_load_says_whether_the_library_has_cuda_kernels():
    build_info = info.build_info()
    if cpu.load() or build_info is None:
        pytest.skip(f"inspects the compiled library: {cpu.load() or 'phydi_kernels._host was not built'}")
    expected = "" if build_info["cuda_architectures"] else "was built without CUDA kernels"
    assert expected in cuda.load() and bool(expected) == bool(cuda.load())


def test_missing_kernels_are_named_once(monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda: "the library has none")
    cuda.available.cache_clear()
    with pytest.warns(UserWarning, match="the library has none; the plain PyTorch implementation runs instead"):
        assert not cuda.available()
    assert not cuda.available()
    cuda.available.cache_clear()


@needs_card
def test_kernels_on_a_card():
    assert cuda.load() == ""
    for case in CASES:
        case.check(*(t.cpu() for t in case.run(torch.device("cuda"))))


@needs_card
def test_operators_on_a_card_refuse_other_arguments():
    X = torch.zeros(1, 5, 3, device="cuda")
    gamma = torch.ones(1, 1, device="cuda")
    for Y, G, message in (
        (X[..., :2], gamma, "shape"),
        (X.double(), gamma, "dtype"),
        (X.cpu(), gamma, "device"),
        (None, gamma[:0], "gamma must not be empty"),
        (X.mT.contiguous().mT, gamma, "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.phydi_cuda.kernel_matrix(X, Y, G, 0, 3, 1.0)
    with pytest.raises(RuntimeError, match="more than 64 rows"):
        torch.ops.phydi_cuda.eigh_small(torch.zeros(1, 65, 65, device="cuda"))
