"""Exact CP decompositions of structure tensors: the bilinear algorithms behind the rank-R form of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._check import check_finite, check_integer
from . import _closed_form
from ._closed_form import Factors
from ._search import Outcome, search

Progress = Callable[[int, int, float], None]

_TOLERANCE = 1e-12
# The octonions have exact algorithms from rank 25 on; the growth is at least 8 at every rank, 17 at 25 and 10 at 26.
_OCTONION_RANK = 26
# J J^T has the square of this many entries, and takes a gigabyte with its factor.
_MOST_ENTRIES = 8192
# Up to 8 x 8 x 8, a search below the generic rank costs less than a second.
_MOST_ENTRIES_BELOW_GENERIC = 512


@dataclass(frozen=True, eq=False)
class BilinearAlgorithm:
    """A structure tensor as a sum of ``rank`` terms: A[i, k, l] = sum_r U[r, i] V[r, k] W[r, l].

    A layer with the algebra A then takes ``rank`` block products in place of P*Q:
    y_k = sum_r V[r, k] (sum_i U[r, i] F_i) (sum_l W[r, l] x_l).

    Attributes:
        U: ``(rank, n)``, float64, on the CPU.
        V: ``(rank, P)``, likewise.
        W: ``(rank, Q)``, likewise.
        rank: number of terms.
        residual: |A - sum| / |A|, at most 1e-12.
        growth: sum_r |U_r| |V_r| |W_r| / |A|, the factor by which the terms' rounding errors may exceed those of A.
    """

    U: Tensor
    V: Tensor
    W: Tensor
    rank: int
    residual: float
    growth: float


class DecompositionError(RuntimeError):
    """No algorithm was found that passes the verification.

    Attributes:
        rank: the last rank tried.
        residual: the least residual found at that rank.
        growth: of the sum with that residual.
    """

    def __init__(self, message: str, rank: int, residual: float, growth: float) -> None:
        super().__init__(message)
        self.rank = rank
        self.residual = residual
        self.growth = growth


def generic_rank(n: int, P: int, Q: int) -> int:
    """The number of terms that almost every real tensor (n, P, Q) needs at most.

    ceil(n P Q / (n + P + Q - 2)), the count of parameters, but for the exceptions: tensors with one long dimension,
    whose rank is that dimension as long as it is below the product of the others, and 3 x m x m for odd m, which needs
    (3 m + 1) / 2 (Strassen, Rank and optimal computation of generic tensors, 1983). Where tensors of two ranks have
    positive volume, such as m and m + 1 for 2 x m x m (ten Berge and Kiers, 1999), it is the larger.

    Args:
        n: number of terms of the algebra.
        P: output blocks.
        Q: input blocks.

    Returns:
        3 for (2, 2, 2), 5 for (3, 3, 3), 7 for (4, 4, 4), 24 for (8, 8, 8).

    Raises:
        TypeError: n, P or Q is not an integer.
        ValueError: n, P or Q is below 1.
    """
    a, b, c = sorted(check_integer(name, value) for name, value in (("n", n), ("P", P), ("Q", Q)))
    if c >= a * b:
        return a * b
    perfect = (a - 1) * (b - 1) + 1
    if c >= perfect:
        return c + (c == perfect)
    if a == 3 and b == c and c % 2:
        return (3 * c + 1) // 2
    return math.ceil(a * b * c / (a + b + c - 2))


def decompose(
    A: Tensor,
    rank: int | None = None,
    *,
    seed: int = 0,
    starts: int | None = None,
    max_growth: float | None = None,
    progress: Progress | None = None,
) -> BilinearAlgorithm:
    r"""An exact bilinear algorithm for a structure tensor, of the least rank that is found.

    .. math:: A_{ikl} = \sum_r U_{ri} V_{rk} W_{rl}

    Multiples of Clifford algebras (among them the complex numbers, 3 terms, and the quaternions, 8) have closed forms;
    so have tensors whose slices have few singular values. All others are searched by Levenberg-Marquardt, first at
    their generic rank, then below it where that succeeds and above it where it does not. Dimensions in which A is
    rank-deficient are removed before. A tensor of more than 8192 entries is not searched.

    The result depends on A and the arguments only, not on torch's global generator or the number of threads: torch is
    set to one thread for the time of the call. Everything is computed in float64 on the CPU. One thread takes about
    40 ms for n = 4, 1 s for n = 8 and one minute for n = 16.

    Args:
        A: ``(n, P, Q)``, real and finite, of any floating-point dtype and on any device.
        rank: exactly this number of terms, some of them zero if fewer are known to suffice.
        seed: of the random starts.
        starts: random starts for each rank before the next one is tried. By default 128 up to 4 x 4 x 4, and fewer
            for larger tensors: 46 for 5 x 5 x 5, 20 for 6 x 6 x 6, 5 for 8 x 8 x 8.
        max_growth: largest growth accepted. By default 8, and 1.5 m if m > 8 or if A is a multiple of a Clifford
            algebra or of the octonions, m = n for a cube and otherwise the geometric mean of the two smaller
            dimensions: no algorithm of the octonions has a growth below 8, none of an orthogonal matrix below m.
        progress: called after each iteration of the search with the rank, the number of starts begun at that rank, and
            the least residual of the current ones.

    Returns:
        The algorithm, verified: residual at most 1e-12 and growth at most ``max_growth``. A tensor of zeros has one
        term of zeros, residual 0 and growth 0.

    Raises:
        TypeError: A is no tensor or not of a floating-point dtype; rank, seed or starts is no integer.
        ValueError: A has not three dimensions, an empty one, or an entry that is NaN or infinite; rank is below 1 or
            above n min(P, Q), which always suffices; max_growth is not positive; a search for ``rank`` terms would
            exceed 8192 entries.
        DecompositionError: no algorithm passed the verification; it holds the least residual found. Without ``rank``
            and ``max_growth`` there always is one: the singular value decompositions of the slices.
    """
    tensor = _check_tensor("A", A)
    n, P, Q = tensor.shape
    if rank is not None:
        rank = check_integer("rank", rank)
        if rank > n * min(P, Q):
            raise ValueError(f"rank={rank} must be at most n*min(P, Q) = {n * min(P, Q)} for A {(n, P, Q)}")
    seed = check_integer("seed", seed, least=0)
    starts = None if starts is None else check_integer("starts", starts)
    if max_growth is not None and check_finite("max_growth", max_growth) <= 0:
        raise ValueError(f"max_growth={max_growth} must be positive")
    largest = tensor.abs().max()
    if largest == 0:
        U, V, W = (tensor.new_zeros(rank or 1, d) for d in tensor.shape)
        return BilinearAlgorithm(U, V, W, rank or 1, residual=0.0, growth=0.0)
    with _one_thread():
        factors, limit = _decompose(tensor / largest, rank, seed, starts, max_growth, progress)
        return _verify(tensor, [factor * largest.pow(1 / 3) for factor in factors], limit)


def decompose_many(
    tensors: Tensor | Iterable[Tensor],
    rank: int | None = None,
    *,
    seed: int = 0,
    starts: int | None = None,
    max_growth: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[BilinearAlgorithm]:
    """:func:`decompose` of each of many structure tensors; equal ones are decomposed once and share their result.

    Args:
        tensors: ``(count, n, P, Q)``, or tensors ``(n, P, Q)`` of any shapes.
        rank, seed, starts, max_growth: as in :func:`decompose`, the same for each.
        progress: called after each tensor with the number done and the number of all.

    Returns:
        The algorithms, in the order of the tensors; each is what :func:`decompose` returns for that tensor alone.

    Raises:
        TypeError, ValueError, DecompositionError: as :func:`decompose`.
    """
    if isinstance(tensors, Tensor) and tensors.dim() != 4:
        raise ValueError(f"tensors has shape {tuple(tensors.shape)}; it must be (count, n, P, Q) or several (n, P, Q)")
    checked = [_check_tensor(f"tensors[{i}]", A) for i, A in enumerate(tensors)]
    known: dict[Any, BilinearAlgorithm] = {}
    found = []
    for done, A in enumerate(checked, 1):
        content = A.shape, tuple(A.flatten().tolist())
        if content not in known:
            known[content] = decompose(A, rank, seed=seed, starts=starts, max_growth=max_growth)
        found.append(known[content])
        if progress is not None:
            progress(done, len(checked))
    return found


def _check_tensor(name: str, A: Any) -> Tensor:
    """A in float64 on the CPU, if it is a structure tensor."""
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(A).__name__}")
    if not A.is_floating_point():
        raise TypeError(f"{name} has dtype {A.dtype}; it must be real and of a floating-point dtype")
    if A.dim() != 3 or 0 in A.shape:
        raise ValueError(f"{name} has shape {tuple(A.shape)}; it must be (n, P, Q) without an empty dimension")
    if A.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values to decompose")
    tensor = A.detach().cpu().double().contiguous()
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, and it holds NaN or infinity")
    return tensor


@contextmanager
def _one_thread() -> Iterator[None]:
    """On the CPU; a sum split over threads rounds differently, and the search would take another path."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.device("cpu"):
            yield
    finally:
        torch.set_num_threads(threads)


def _decompose(
    A: Tensor, rank: int | None, seed: int, starts: int | None, max_growth: float | None, progress: Progress | None
) -> tuple[Factors, float]:
    """An algorithm that is still to be verified, and the growth it may have. A is not zero."""
    smaller, middle, _ = sorted(A.shape)
    size = math.sqrt(smaller * middle)
    limit = max_growth or max(8.0, 1.5 * size)
    closed = _closed_form.clifford_algorithm(A, limit)
    if closed is not None and (rank is None or len(closed[0]) <= rank):
        return _pad(closed, rank), limit
    octonions = _closed_form.is_octonions(A)
    if closed is None and not octonions and size <= 8:
        limit = max_growth or 8.0
    norm = A.norm()
    core, bases = _compress(A / norm)
    entries = core.numel()
    starts = starts or min(128, max(2, int(128 * (64 / entries) ** 1.5)))
    batch = min(8, max(1, 512 // entries))
    attempt = partial(
        search,
        core,
        batch=batch,
        max_growth=limit,
        generator=torch.Generator().manual_seed(seed),
        progress=progress,
    )
    best = _closed_form.slices(core)
    if rank is not None:
        best = _pad(best, rank) if len(best[0]) <= rank else _exactly(attempt, rank, starts, limit, entries)
    elif entries <= _MOST_ENTRIES:
        first = _OCTONION_RANK if octonions else generic_rank(*core.shape)
        searched = (attempt(terms, starts=starts).factors for terms in range(first, len(best[0])))
        best = next((factors for factors in searched if factors is not None), best)
        if len(best[0]) <= first and entries <= _MOST_ENTRIES_BELOW_GENERIC and not octonions:
            best = _fewer_terms(best, max(core.shape), lambda terms: attempt(terms, starts=batch).factors)
    U, V, W = (factor if basis is None else factor @ basis.mT for factor, basis in zip(best, bases, strict=True))
    return (U * norm, V, W), limit


def _exactly(attempt: Callable[..., Outcome], rank: int, starts: int, limit: float, entries: int) -> Factors:
    if entries > _MOST_ENTRIES:
        raise ValueError(f"rank={rank} needs a search, which is limited to {_MOST_ENTRIES} entries; A has {entries}")
    outcome = attempt(rank, starts=starts)
    if outcome.factors is None:
        raise DecompositionError(
            f"no algorithm of rank {rank} has a residual <= {_TOLERANCE:g} and a growth <= {limit:g} after {starts} "
            f"starts: least residual {outcome.residual:.1e}, with growth {outcome.growth:.3g}",
            rank,
            outcome.residual,
            outcome.growth,
        )
    return outcome.factors


def _fewer_terms(best: Factors, least: int, attempt: Callable[[int], Factors | None]) -> Factors:
    """Tries one term less and, if that succeeds, bisects between the multilinear rank and the rank found."""
    low, high = least, len(best[0]) - 1
    terms = high
    while low <= high:
        found = attempt(terms)
        if found is not None:
            best, high = found, terms - 1
        elif terms == high:
            break
        else:
            low = terms + 1
        terms = (low + high) // 2
    return best


def _compress(A: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The core of A in the modes where its unfolding is rank-deficient, and an orthonormal basis (d, d') of each."""
    core = A
    bases: list[Tensor | None] = []
    for mode in range(3):
        L, S, _ = torch.linalg.svd(A.movedim(mode, 0).flatten(1), full_matrices=False)
        kept = int((S > _TOLERANCE / 10 * S[0]).sum())
        if kept == A.shape[mode]:
            bases.append(None)
        else:
            bases.append(L[:, :kept])
            core = torch.tensordot(core, L[:, :kept], dims=([mode], [0])).movedim(-1, mode)
    return core.contiguous(), bases


def _pad(factors: Factors, rank: int | None) -> Factors:
    """The same algorithm with zero terms up to ``rank``."""
    U, V, W = (torch.nn.functional.pad(f, (0, 0, 0, (rank or len(f)) - len(f))) for f in factors)
    return U, V, W


def _verify(A: Tensor, factors: Sequence[Tensor], limit: float) -> BilinearAlgorithm:
    """The algorithm, if it passes; otherwise DecompositionError."""
    U, V, W = factors
    scale = A.abs().max()
    norm = (A / scale).norm()
    residual = ((torch.einsum("ri,rk,rl->ikl", U, V, W) - A) / scale).norm().item() / norm.item()
    growth = (_closed_form.growth(U, V, W) / scale / norm).item()
    rank = len(U)
    if not (residual <= _TOLERANCE and growth <= limit * (1 + 1e-9)):
        raise DecompositionError(
            f"the algorithm of rank {rank} does not pass: residual {residual:.1e} (allowed {_TOLERANCE:g}), "
            f"growth {growth:.3g} (allowed {limit:g})",
            rank,
            residual,
            growth,
        )
    return BilinearAlgorithm(U.contiguous(), V.contiguous(), W.contiguous(), rank, residual, growth)
