"""The regularised solve of GDA: G_w X = R for G_w = K D_w K + tau I (Eq. 20 and 22), by five methods.

K (P, N, N) holds P problems, tau (T, P) T conditioning coefficients of each, and R (T, P, N, m) the right-hand sides.
Samples of weight w_i enter through W^1/2 K W^1/2 in the place of K, so that a weight equals as many repetitions of a
sample and a weight of 0 leaves it out. D_w = Delta (I - F F^T) is never formed: see reference.Classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Classes
from . import cpu, cuda

# A failed factorisation is tried again with ten times the conditioning coefficient, this often.
_RAISES = 12
# Steps of iterative refinement. One brings the factor's solution to that of a QR factorisation; more are taken where
# the factor is worse: G_w at a condition of 1e13.
_REFINEMENTS = 4
_LANCZOS_STEPS = 80
BANDWIDTH = 32  # kBandwidth in csrc/cpu/kernels.h
# From these sizes on, one reduction to a band is faster than a factorisation for each tau.
BAND_TAUS = 8
BAND_SAMPLES = 128


_cpu = torch.ops.phydi_cpu


def _compiled(K: Tensor) -> bool:
    return K.is_cpu and cpu.available()


class Factor(NamedTuple):
    """What is kept of a factorisation; the unused tensors are empty.

    Attributes:
        values: "cholesky" and "qr": L (T, P, N, N) with L L^T = G_w. "eigh" and "pinv": eigenvalues of S_w (P, N).
            "band": factors (T, P, N, BANDWIDTH + 1) of T_w + tau I, where S_w = Q T_w Q^T.
        vectors: "eigh" and "pinv": eigenvectors of S_w (P, N, N). "band": with ``blocks``, Q.
        blocks: "band": (P, panels, BANDWIDTH, BANDWIDTH).
    """

    values: Tensor
    vectors: Tensor
    blocks: Tensor


def plan(K: Tensor, taus: int, solver: str) -> str:
    """The method that serves a solver: a Cholesky factorisation for each tau, or a band for many of them.

    Reducing to a band takes 4/3 N^3 operations, as four Cholesky factorisations, and more time for each of them.
    """
    several = taus >= BAND_TAUS and K.shape[-1] >= BAND_SAMPLES
    return "band" if solver == "cholesky" and several and _compiled(K) else solver


Product = Callable[[Tensor, Tensor], Tensor]


def times(K: Tensor, x: Tensor) -> Tensor:
    """K x for x (P, N, m) of few columns."""
    return _cpu.times.default(K, x) if _compiled(K) else K @ x


def _weighted_times(K: Tensor, root: Tensor, x: Tensor, product: Product) -> Tensor:
    """W^1/2 K W^1/2 x for x (T, P, N, m): one product for all T."""
    T, P, N, m = x.shape
    scale = root.unsqueeze(-1)
    columns = (scale * x).permute(1, 2, 0, 3).reshape(P, N, T * m)
    return (scale * product(K, columns)).view(P, N, T, m).permute(2, 0, 1, 3)


def centered(c: Classes, x: Tensor) -> Tensor:
    """(I - F F^T) x, twice: the rounding of class means left by the first would meet K x again, and cost digits."""
    for _ in range(2):
        x = x - c.indicator @ (c.indicator.mT @ x)
    return x


def within_times(K: Tensor, c: Classes, x: Tensor, product: Product = times) -> tuple[Tensor, Tensor]:
    """(D_w K x, K D_w K x) for x (T, P, N, m), from products with K alone."""
    h = half_within_times(K, c, x, product)
    return h, _weighted_times(K, c.root, h, product)


def half_within_times(K: Tensor, c: Classes, x: Tensor, product: Product) -> Tensor:
    """D_w K x for x (T, P, N, m)."""
    return c.scatter.unsqueeze(-1) * centered(c, _weighted_times(K, c.root, x, product))


def asymmetry(K: Tensor) -> tuple[float, float]:
    """The largest |K_ij| and |K_ij - K_ji| of K (..., N, N)."""
    if _compiled(K):
        largest, difference = _cpu.asymmetry.default(K.reshape(-1, *K.shape[-2:])).amax(0).tolist()
        return largest, difference
    return float(K.abs().max()), float((K - K.mT).abs().max())


def centered_kernel(K: Tensor, c: Classes) -> Tensor:
    """B = K Delta^1/2 (I - F F^T) (P, N, N), so that S_w = B B^T."""
    if K.is_cuda and cuda.available():
        center = torch.ops.phydi_cuda.class_center.default
        # One matrix for all problems, with a stride of 0, stays one.
        if K.stride()[1:] != (K.shape[-1], 1):
            K = K.clone(memory_format=torch.contiguous_format)
        return center(K, c.codes.contiguous(), c.root.contiguous(), c.counts, _scatter_root(c))[0]
    weighted = c.root.unsqueeze(-1) * K * c.root.unsqueeze(-2)
    return (weighted - (weighted @ c.indicator) @ c.indicator.mT) * c.scatter.sqrt().unsqueeze(-2)


def _scatter_root(c: Classes) -> Tensor:
    return c.counts.sqrt() if c.weighting == "paper" else torch.ones_like(c.counts)


def within_scatter(K: Tensor, c: Classes) -> Tensor:
    """S_w = K D_w K (P, N, N), its lower triangle."""
    if _compiled(K):
        return _cpu.within_scatter.default(K, c.codes, c.root, c.counts, _scatter_root(c))[0]
    B = centered_kernel(K, c)
    return B @ B.mT


def largest_eigenvalue(K: Tensor, c: Classes) -> Tensor:
    """lambda_max of S_w (P,), by the Lanczos method on the unformed operator: power steps that are all kept.

    NaN for a problem with NaN or infinity in it.
    """
    P, N, _ = K.shape
    start = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0), device="cpu")
    v = (start.to(K) * (c.root > 0)).unsqueeze(-1)
    scale = v.norm(dim=-2, keepdim=True)
    v = v / torch.where(scale > 0, scale, 1)
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    below: list[Tensor] = []
    found = torch.zeros(P, dtype=K.dtype, device=K.device)
    lost = torch.zeros(P, dtype=torch.bool, device=K.device)
    for _ in range(min(N, _LANCZOS_STEPS)):
        basis.append(v)
        w = within_times(K, c, v.unsqueeze(0))[1][0]
        lost = lost | ~w.isfinite().all(-2).all(-1)
        w = torch.where(lost[:, None, None], 0, w)
        diagonal.append((v * w).sum((-2, -1)))
        Q = torch.cat(basis, -1)
        for _ in range(2):  # once more against the rounding of the first
            w = w - Q @ (Q.mT @ w)
        # Scaled, so that no square overflows or vanishes: S_w goes with the square of K.
        scale = w.abs().amax(-2, keepdim=True)
        scale = torch.where(scale > 0, scale, 1)
        size = scale * (w / scale).norm(dim=-2, keepdim=True)
        below.append(size[:, 0, 0])
        projected = torch.diag_embed(torch.stack(diagonal, -1))
        if len(basis) > 1:
            off = torch.diag_embed(torch.stack(below[:-1], -1), offset=-1)
            projected = projected + off + off.mT
        values, vectors = torch.linalg.eigh(projected)
        found = values[:, -1].clamp_min(0)
        # The residual of the Ritz pair bounds the error of its value.
        error = below[-1] * vectors[:, -1, -1].abs()
        if bool((error <= torch.finfo(K.dtype).eps ** 0.5 * found).all()):
            break
        v = w / torch.where(size > 0, size, 1)
    return torch.where(lost, torch.nan, found)


def one_norm(K: Tensor, c: Classes) -> Tensor:
    """The largest column sum of |S_w| (P,), in blocks of columns; a sample of weight w counts as w samples."""
    P, N, _ = K.shape
    largest = torch.zeros(P, dtype=K.dtype, device=K.device)
    identity = torch.eye(N, dtype=K.dtype, device=K.device)
    for block, root in zip(identity.split(256, dim=1), c.root.split(256, dim=-1), strict=True):
        columns = within_times(K, c, block.expand(1, P, N, -1))[1][0]
        # within_times scales rows and columns by the roots of the weights: here rows by w, columns not at all.
        sums = (c.root.unsqueeze(-1) * columns.abs()).sum(-2)
        largest = torch.maximum(largest, torch.where(root > 0, sums / root, 0).amax(-1))
    return largest


def conditioning(K: Tensor, c: Classes, rule: str, c_allow: float, tau_min: float) -> Tensor:
    """tau = max(lambda_max / c_allow, tau_min) (Eq. 23) (1, P); for lambda_max the one-norm where the rule says so."""
    largest = one_norm(K, c) if rule == "one_norm" else largest_eigenvalue(K, c)
    return (largest / c_allow).clamp_min(tau_min).unsqueeze(0)


def _factor(K: Tensor, *tensors: Tensor) -> Factor:
    return Factor(*tensors, *(K.new_empty(0) for _ in range(3 - len(tensors))))


def _with_raises(
    attempt: Callable[[Tensor], tuple[Factor, Tensor]], K: Tensor, c: Classes, tau: Tensor
) -> tuple[Factor, Tensor, Tensor]:
    """(factor, tau, info) of attempt(tau) -> (factor, failed), with a raised tau where it fails."""
    found, failed = attempt(tau)
    raises = torch.zeros_like(failed, dtype=torch.int32)
    for step in range(_RAISES):
        if not bool(failed.any()):
            break
        if step == 0:
            # Not below the rounding of S_w, and above 0 where that is all rounding.
            N, info = K.shape[-1], torch.finfo(K.dtype)
            of_K = (info.eps * K.abs().amax((-2, -1))) ** 2
            least = info.eps * largest_eigenvalue(K, c) + N * of_K + info.tiny
        tau = torch.where(failed, torch.maximum(10 * tau, least), tau)
        raises = raises + failed
        found, failed = attempt(tau)
    return found, tau, torch.where(failed, -1, raises)


def _cholesky(G: Tensor) -> tuple[Tensor, Tensor]:
    """(L, failed) of G (T, P, N, N), which is overwritten."""
    if _compiled(G):
        return G, _cpu.cholesky_.default(G.flatten(0, 1)).view(G.shape[:2]) != 0
    L, info = torch.linalg.cholesky_ex(G)
    return L.contiguous(), info != 0


def _by_cholesky(K: Tensor, c: Classes, tau: Tensor) -> tuple[Factor, Tensor, Tensor]:
    kept: list[Tensor] = []

    def attempt(tau: Tensor) -> tuple[Factor, Tensor]:
        S = kept[0] if kept else within_scatter(K, c)
        if len(tau) == 1:
            G = S.unsqueeze(0)  # overwritten: S_w is formed again in the rare case that the factorisation fails
        else:
            kept[:] = [S]
            G = S.expand(len(tau), *S.shape).clone()
        G.diagonal(dim1=-2, dim2=-1).add_(tau.unsqueeze(-1))
        L, failed = _cholesky(G)
        return _factor(K, L), failed

    return _with_raises(attempt, K, c, tau)


def _by_band(K: Tensor, c: Classes, tau: Tensor) -> tuple[Factor, Tensor, Tensor]:
    S = within_scatter(K, c)
    band, blocks = _cpu.band_reduce_.default(S)
    S.tril_()

    def attempt(tau: Tensor) -> tuple[Factor, Tensor]:
        L, failed = _cpu.band_cholesky.default(band, tau)
        return Factor(L, S, blocks), failed != 0

    return _with_raises(attempt, K, c, tau)


def _by_qr(K: Tensor, c: Classes, tau: Tensor) -> tuple[Factor, Tensor, Tensor]:
    """L = R^T of [B^T; sqrt(tau) I] = Q R: the condition of G_w is never squared."""
    B = centered_kernel(K, c).mT

    def attempt(tau: Tensor) -> tuple[Factor, Tensor]:
        ridge = tau.sqrt()[..., None, None] * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
        R = torch.linalg.qr(torch.cat((B.expand_as(ridge), ridge), -2), mode="r").R
        pivots = R.diagonal(dim1=-2, dim2=-1).abs()
        # The negation of `>`, not `<=`: NaN fails.
        singular = ~(pivots.amin(-1) > K.shape[-1] * torch.finfo(K.dtype).eps * pivots.amax(-1))
        return _factor(K, R.mT.contiguous()), singular

    return _with_raises(attempt, K, c, tau)


def factor(K: Tensor, c: Classes, tau: Tensor, solver: str) -> tuple[Factor, Tensor, Tensor]:
    """(factor, tau, info) for one of the solvers."""
    if solver == "band":
        return _by_band(K, c, tau)
    if solver == "cholesky":
        return _by_cholesky(K, c, tau)
    if solver == "qr":
        return _by_qr(K, c, tau)
    good = torch.zeros(tau.shape, dtype=torch.int32, device=K.device)
    if solver == "cg":
        return _factor(K), tau, good
    S = within_scatter(K, c).tril()
    finite = S.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], S, 0))
    kept = _factor(K, values, vectors.contiguous())
    if solver == "pinv":
        return kept, tau, torch.where(finite, good, -1)
    least, largest = values.amin(-1).clamp_min(0), values.amax(-1)

    def attempt(tau: Tensor) -> tuple[Factor, Tensor]:
        # The negation of `>`, not `<=`: NaN fails.
        return kept, ~((least + tau > torch.finfo(K.dtype).eps * largest) & (least + tau > 0) & finite)

    return _with_raises(attempt, K, c, tau)


def _by_factor(f: Factor, tau: Tensor, rhs: Tensor, solver: str) -> Tensor:
    if solver in ("cholesky", "qr"):
        if _compiled(rhs):
            return _cpu.cholesky_solve.default(f.values.flatten(0, 1), rhs.flatten(0, 1)).view(rhs.shape)
        return torch.cholesky_solve(rhs, f.values)
    if solver == "band":
        return _cpu.band_solve.default(f.values, f.vectors, f.blocks, rhs)
    if solver == "pinv":
        largest = f.values.abs().amax(-1, keepdim=True)
        kept = f.values > f.values.shape[-1] * torch.finfo(f.values.dtype).eps * largest
        inverse = torch.where(kept, 1 / torch.where(kept, f.values, 1), 0).expand(*tau.shape, -1)
    else:
        inverse = 1 / (f.values.clamp_min(0) + tau.unsqueeze(-1))
    return f.vectors @ (inverse.unsqueeze(-1) * (f.vectors.mT @ rhs))


def _by_conjugate_gradients(K: Tensor, c: Classes, tau: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """(X, whether each problem converged), each column by its own iteration on the unformed operator."""
    x, r = torch.zeros_like(rhs), rhs.clone()
    p = r.clone()
    square = (r * r).sum(-2, keepdim=True)
    goal = square * (100 * torch.finfo(K.dtype).eps) ** 2
    for _ in range(10 * K.shape[-1]):
        running = square > goal  # false for NaN, which ends the loop
        if not bool(running.any()):
            break
        q = within_times(K, c, p)[1] + tau[..., None, None] * p
        curvature = (p * q).sum(-2, keepdim=True)
        step = torch.where(running & (curvature > 0), square / torch.where(curvature > 0, curvature, 1), 0)
        x = x + step * p
        r = r - step * q
        before, square = square, torch.where(running, (r * r).sum(-2, keepdim=True), square)
        p = r + torch.where(before > 0, square / torch.where(before > 0, before, 1), 0) * p
    return x, (square <= goal).all(-1).all(-1)


def _large(correction: Tensor, X: Tensor) -> Tensor:
    """Which problems (T, P) a further step would change above rounding: it would change X by the square of this one."""
    # NaN is not large: no step mends it.
    return (correction.norm(dim=-2) > torch.finfo(X.dtype).eps ** (1 / 3) * X.norm(dim=-2)).any(-1)


def apply(K: Tensor, c: Classes, tau: Tensor, f: Factor, rhs: Tensor, solver: str) -> tuple[Tensor, Tensor]:
    """X = G_w^-1 R and T = R^T G_w^-1 R (T, P, m, m); NaN where the solver found none.

    With B^T X = Delta^1/2 (I - F F^T) K X, the residual E of X and its correction D = G_w^-1 E,
    T = |B^T X|^2 + tau |X|^2 + X^T E + E^T X + E^T D, whose large terms are sums of squares: an error of X enters T
    only in higher order. The step that refines X has all of them at hand.
    """
    if solver == "cg":
        X, converged = _by_conjugate_gradients(K, c, tau, rhs)
        X = torch.where(converged[..., None, None], X, torch.nan)
    else:
        X = _by_factor(f, tau, rhs, solver)
    ridge, scatter = tau[..., None, None], c.scatter.unsqueeze(-1)
    root = torch.where(scatter > 0, scatter, 1).rsqrt()
    correction = None
    for _ in range(_REFINEMENTS):
        weighted, product = within_times(K, c, X)
        residual = rhs - product - ridge * X
        if solver not in ("cholesky", "band", "eigh"):
            break
        correction = _by_factor(f, tau, residual, solver)
        large = _large(correction, X)
        if not bool(large.any()):
            break
        # Where it is not, X stays: a problem's solution does not depend on its neighbours.
        X = torch.where(large[..., None, None], X + correction, X)
    half = root * weighted
    cross = X.mT @ residual
    T = half.mT @ half + ridge * (X.mT @ X) + cross + cross.mT
    if correction is None:
        return X, T
    last = residual.mT @ correction
    return X + correction, T + (last + last.mT) / 2
