"""Every operator in plain PyTorch: the specification of the compiled kernels.

Tests and benchmarks compare against these functions, and they run wherever no kernel is built for a device. The
hypercomplex ones build the dense weight H = sum_i A_i (x) F_i; 16-bit inputs are computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.grad as conv_grad
from torch import Tensor

_CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
_CONV_INPUT = {1: conv_grad.conv1d_input, 2: conv_grad.conv2d_input, 3: conv_grad.conv3d_input}
_CONV_WEIGHT = {1: conv_grad.conv1d_weight, 2: conv_grad.conv2d_weight, 3: conv_grad.conv3d_weight}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a kernel adds and multiplies in: float32 for the 16-bit types, else the type itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _up(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(compute_dtype(t.dtype)) for t in tensors]


def _like(arguments: Sequence[Tensor], *results: Tensor) -> Any:
    return tuple(t.to(a.dtype).contiguous() for a, t in zip(arguments, results, strict=True))


def dense_weight(A: Tensor, F: Tensor) -> Tensor:
    """H = sum_i A_i (x) F_i (PHYDI Eq. 1). A (n, P, Q), F (n, p, q, *kernel) -> (P*p, Q*q, *kernel)."""
    n, P, Q = A.shape
    _, p, q, *kernel = F.shape
    H = torch.einsum("ikl,irst->krlst", A, F.reshape(n, p, q, -1))
    return H.reshape(P * p, Q * q, *kernel)


def split_weight_grad(G: Tensor, A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """(dA, dF) from G = dL/dH: dA[i,k,l] = <F_i, G_kl>, dF_i = sum_kl A[i,k,l] G_kl."""
    n, P, Q = A.shape
    _, p, q = F.shape[:3]
    blocks = G.reshape(P, p, Q, q, -1)
    dA = torch.einsum("irst,krlst->ikl", F.reshape(n, p, q, -1), blocks)
    dF = torch.einsum("ikl,krlst->irst", A, blocks)
    return dA, dF.reshape(F.shape)


def structure(U: Tensor | None, V: Tensor, W: Tensor) -> Tensor:
    """A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l] from U (R, n), V (R, P), W (R, Q); without U, A[r,k,l] = V[r,k] W[r,l]."""
    # Products of matrices: of einsum small algebras would mostly wait for its analysis.
    VW = V.unsqueeze(2) * W.unsqueeze(1)
    return VW if U is None else (U.t() @ VW.flatten(1)).view(-1, *VW.shape[1:])


def split_structure_grad(dA: Tensor, U: Tensor, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dU, dV, dW) from the gradient of A = structure(U, V, W)."""
    VW, of_terms = structure(None, V, W), (U @ dA.flatten(1)).view(-1, *dA.shape[1:])  # sum_i U[r,i] dA_i
    dU = VW.flatten(1) @ dA.flatten(1).t()
    dV = (of_terms @ W.unsqueeze(2)).squeeze(2)
    dW = (V.unsqueeze(1) @ of_terms).squeeze(1)
    return dU, dV, dW


def epilogue(h: Tensor, residual: Tensor | None, alpha: Tensor | None, activation: str, spatial: int = 0) -> Tensor:
    """residual + alpha * act(h), alpha for all of h (..., channels, *spatial) or for each channel."""
    y = torch.relu(h) if activation == "relu" else h
    if alpha is not None:
        y = y * (alpha.reshape(()) if alpha.numel() == 1 else alpha.view(-1, *[1] * spatial))
    return y if residual is None else residual + y


def phm_linear(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """residual + alpha * act(x H^T + bias); x (..., Q*q) -> (..., P*p)."""
    dtype = x.dtype
    x, A, F, bias, residual, alpha = _up(x, A, F, bias, residual, alpha)
    h = torch.nn.functional.linear(x, dense_weight(A, F), bias)
    return epilogue(h, residual, alpha, activation).to(dtype).contiguous()


def phm_linear_weight_grad(grad: Tensor, x: Tensor, A: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """(dA, dF) of <grad, x H^T>; grad (..., P*p), x (..., Q*q)."""
    dtype = x.dtype
    grad, x, A, F = _up(grad, x, A, F)
    G = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    dA, dF = split_weight_grad(G, A, F)
    return dA.to(dtype).contiguous(), dF.to(dtype).contiguous()


def phm_linear_factored(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """phm_linear with A = structure(U, V, W)."""
    dtype = x.dtype
    x, U, V, W, F, bias, residual, alpha = _up(x, U, V, W, F, bias, residual, alpha)
    return phm_linear(x, structure(U, V, W), F, bias, residual, alpha, activation).to(dtype)


def phm_linear_factored_grad(
    grad: Tensor, x: Tensor, U: Tensor, V: Tensor, W: Tensor, F: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dU, dV, dW, dF) of <grad, x H^T>."""
    arguments = (x, U, V, W, F)
    grad, x, U, V, W, F = _up(grad, *arguments)
    A = structure(U, V, W)
    dx = torch.nn.functional.linear(grad, dense_weight(A, F).t())
    dA, dF = phm_linear_weight_grad(grad, x, A, F)
    return _like(arguments, dx, *split_structure_grad(dA, U, V, W), dF)


def phc_conv(
    x: Tensor,
    A: Tensor,
    F: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """residual + alpha * act(conv(x, H) + bias) in one, two or three dimensions; x (B, Q*q, *spatial)."""
    dtype = x.dtype
    x, A, F, bias, residual, alpha = _up(x, A, F, bias, residual, alpha)
    h = _CONV[F.dim() - 3](x, dense_weight(A, F), bias, stride, padding, dilation)
    return epilogue(h, residual, alpha, activation, spatial=F.dim() - 3).to(dtype)


def phc_conv_input_grad(
    grad: Tensor,
    A: Tensor,
    F: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """d<grad, conv(x, H)>/dx, of size input_size."""
    dtype = grad.dtype
    grad, A, F = _up(grad, A, F)
    dx = _CONV_INPUT[F.dim() - 3](input_size, dense_weight(A, F), grad, stride, padding, dilation)
    return dx.to(dtype)


def phc_conv_weight_grad(
    grad: Tensor, x: Tensor, A: Tensor, F: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    """(dA, dF) of <grad, conv(x, H)>."""
    dtype = x.dtype
    grad, x, A, F = _up(grad, x, A, F)
    size = (A.shape[1] * F.shape[1], A.shape[2] * F.shape[2], *F.shape[3:])
    G = _CONV_WEIGHT[F.dim() - 3](x, size, grad, stride, padding, dilation)
    dA, dF = split_weight_grad(G, A, F)
    return dA.to(dtype).contiguous(), dF.to(dtype).contiguous()


def phc_conv_factored(
    x: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None = None,
    alpha: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """phc_conv with A = structure(U, V, W)."""
    dtype = x.dtype
    x, U, V, W, F, bias, residual, alpha = _up(x, U, V, W, F, bias, residual, alpha)
    A = structure(U, V, W)
    return phc_conv(x, A, F, bias, stride, padding, dilation, residual, alpha, activation).to(dtype)


def phc_conv_factored_input_grad(
    grad: Tensor,
    U: Tensor | None,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """d<grad, conv(x, H)>/dx, of size input_size."""
    dtype = grad.dtype
    grad, U, V, W, F = _up(grad, U, V, W, F)
    return phc_conv_input_grad(grad, structure(U, V, W), F, input_size, stride, padding, dilation).to(dtype)


def phc_conv_factored_grad(
    grad: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    W: Tensor,
    F: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dU, dV, dW, dF) of <grad, conv(x, H)>."""
    arguments = (x, U, V, W, F)
    grad, x, U, V, W, F = _up(grad, *arguments)
    A = structure(U, V, W)
    dx = phc_conv_input_grad(grad, A, F, list(x.shape), stride, padding, dilation)
    dA, dF = phc_conv_weight_grad(grad, x, A, F, stride, padding, dilation)
    return _like(arguments, dx, *split_structure_grad(dA, U, V, W), dF)


# Differences keep the digits of neighbours among distant points; each is a pass over the distances, so of few only.
_DIRECT_FEATURES = 4
# A median of so many points stays where it is with fewer than half of them far off.
_MIDDLE_POINTS = 9


def middle(points: Tensor) -> Tensor:
    """In each feature the median (..., 1, d) of at most nine points (..., N, d), of what is finite.

    Distances are rounded at the size of the points less this: a point far off does not cost the others their digits.
    """
    N = points.shape[-2]
    if N == 0:
        return points.new_zeros((*points.shape[:-2], 1, points.shape[-1]))
    some = points.detach().index_select(-2, torch.arange(_MIDDLE_POINTS, device=points.device) * N // _MIDDLE_POINTS)
    finite = some.isfinite()
    ordered = torch.where(finite, some, torch.inf).sort(dim=-2).values
    median = ordered.gather(-2, (finite.sum(-2, keepdim=True) - 1).clamp_min(0) // 2)
    return torch.where(median.isfinite(), median, 0)


def squared_distance(X: Tensor, Y: Tensor | None) -> Tensor:
    """|x_i - y_j|^2 (..., N, M), by differences of few features, or products of the points less their middle.

    0 on the diagonal where Y is None.
    """
    if X.shape[-1] <= _DIRECT_FEATURES:
        return _sum_over_features(X, Y, lambda x, y: (x - y) ** 2)
    center = middle(X if Y is None else Y)
    X = X - center
    Z = X if Y is None else Y - center
    lengths = (X * X).sum(-1).unsqueeze(-1) + (Z * Z).sum(-1).unsqueeze(-2)
    distance = (lengths - 2 * (X @ Z.mT)).clamp_min(0)
    if Y is None:
        distance = ((distance + distance.mT) / 2).clone()
        distance.diagonal(dim1=-2, dim2=-1).zero_()
    return distance


def _sum_over_features(X: Tensor, Y: Tensor | None, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """sum_f term(x_if, y_jf) (..., N, M), one feature at a time."""
    Z = X if Y is None else Y
    total = X.new_zeros((*X.shape[:-1], Z.shape[-2]))
    for f in range(X.shape[-1]):
        total = total + term(X[..., f].unsqueeze(-1), Z[..., f].unsqueeze(-2))
    return total


def manhattan_distance(X: Tensor, Y: Tensor | None) -> Tensor:
    """sum_f |x_if - y_jf| (..., N, M)."""
    return _sum_over_features(X, Y, lambda x, y: (x - y).abs())


def chi2_distance(X: Tensor, Y: Tensor | None) -> Tensor:
    """sum_f (x_if - y_jf)^2 / (x_if + y_jf) (..., N, M), without the terms 0/0."""

    def term(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return torch.where(total == 0, 0, (x - y) ** 2 / torch.where(total == 0, 1, total))

    return _sum_over_features(X, Y, term)


def dot(X: Tensor, Y: Tensor | None) -> Tensor:
    """<x_i, y_j> (..., N, M), exactly symmetric where Y is None."""
    if Y is not None:
        return X @ Y.mT
    product = X @ X.mT
    return (product + product.mT) / 2


def matern_radius(distance: Tensor, gamma: Tensor) -> Tensor:
    """r = sqrt(2 gamma |x - y|^2), with gradient 0 at 0."""
    r2 = 2 * gamma * distance
    return torch.where(r2 == 0, 0, torch.where(r2 == 0, 1, r2).sqrt())


def _matern(coefficients: Sequence[float], s: Tensor, gamma: Tensor) -> Tensor:
    """exp(-c r) (1 + c r + ...), c^2 = 2 nu, with the polynomial's coefficients of (c r)^1, (c r)^2."""
    z = matern_radius(s, gamma) * math.sqrt(1 + 2 * len(coefficients))
    polynomial = 1 + sum(c * z ** (i + 1) for i, c in enumerate(coefficients))
    return (-z).exp() * polynomial


PAIRWISE: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "dot": dot,
    "squared_distance": squared_distance,
    "manhattan_distance": manhattan_distance,
    "chi2_distance": chi2_distance,
}
# A kernel as a function of a pairwise quantity s: its name, and f(s, gamma, degree, coef0).
KERNELS: dict[str, tuple[str, Callable[[Tensor, Tensor, int, float], Tensor]]] = {
    "poly": ("dot", lambda s, gamma, degree, coef0: (gamma * s + coef0) ** degree),
    "sigmoid": ("dot", lambda s, gamma, degree, coef0: (gamma * s + coef0).tanh()),
    "rbf": ("squared_distance", lambda s, gamma, degree, coef0: (-gamma * s).exp()),
    "matern12": ("squared_distance", lambda s, gamma, degree, coef0: _matern((), s, gamma)),
    "matern32": ("squared_distance", lambda s, gamma, degree, coef0: _matern((1,), s, gamma)),
    "matern52": ("squared_distance", lambda s, gamma, degree, coef0: _matern((1, 1 / 3), s, gamma)),
    "laplacian": ("manhattan_distance", lambda s, gamma, degree, coef0: (-gamma * s).exp()),
    "chi2": ("chi2_distance", lambda s, gamma, degree, coef0: (-gamma * s).exp()),
}


def kernel_matrix(X: Tensor, Y: Tensor | None, gamma: Tensor, kernel: str, degree: int, coef0: float) -> Tensor:
    """X (B, N, d), Y (B, M, d) or None for X, gamma (G, B) -> (G, B, N, M); G = 1 and gamma unused for PAIRWISE."""
    if kernel in PAIRWISE:
        return PAIRWISE[kernel](X, Y).unsqueeze(0).contiguous()
    pairwise, profile = KERNELS[kernel]
    return profile(PAIRWISE[pairwise](X, Y), gamma[..., None, None], degree, coef0).contiguous()


class Classes(NamedTuple):
    """What the labels and weights of P problems say.

    Attributes:
        codes: the classes, (P, N) in 0 ... L - 1.
        root: square roots of the sample weights, (P, N); 0 leaves a sample out.
        counts: sums of the weights of each class N_j, (P, L).
        weighting: of the classes' scatter, "paper" or "standard".
        indicator: F = Z D_b^-1/2 of weighted samples, (P, N, L): root_i / sqrt(N_j) for the class j of sample i.
        scatter: the factor on the scatter of each sample's class, (P, N): N_j (paper, Eq. 3) or 1 (standard).
        between: F Q with Q an orthonormal basis of the complement of sqrt(N_j / N), (P, N, L - 1).
    """

    codes: Tensor
    root: Tensor
    counts: Tensor
    weighting: str
    indicator: Tensor
    scatter: Tensor
    between: Tensor


def class_structure(codes: Tensor, root: Tensor, classes: int, weighting: str) -> Classes:
    """codes (P, N) in 0 ... classes - 1, root (P, N)."""
    one_hot = (codes.unsqueeze(-1) == torch.arange(classes, device=codes.device)).to(root.dtype)
    count = ((root * root).unsqueeze(-1) * one_hot).sum(-2)
    indicator = root.unsqueeze(-1) * one_hot * torch.where(count > 0, count, 1).rsqrt().unsqueeze(-2)
    scale = count if weighting == "paper" else (count > 0).to(count.dtype)
    total = count.sum(-1, keepdim=True)
    s = (count / torch.where(total > 0, total, 1)).sqrt()
    # A Householder reflection that maps s to the last axis; its other columns are the basis.
    v = s.clone()
    v[..., -1] += 1
    basis = torch.eye(classes, dtype=root.dtype, device=root.device)[:, :-1] - (
        v.unsqueeze(-1) * v[..., :-1].unsqueeze(-2) * (2 / (v * v).sum(-1))[..., None, None]
    )
    return Classes(codes, root, count, weighting, indicator, scale.gather(-1, codes), indicator @ basis)


def within_scatter(K: Tensor, c: Classes) -> Tensor:
    """K D_w K (GDA Eq. 20) of weighted samples, W^1/2 K W^1/2 in the place of K; (P, N, N)."""
    weighted = c.root.unsqueeze(-1) * K * c.root.unsqueeze(-2)
    centered = weighted - (weighted @ c.indicator) @ c.indicator.mT
    return (centered * c.scatter.unsqueeze(-2)) @ centered.mT


def gda_solve(
    K: Tensor, codes: Tensor, root: Tensor, tau: Tensor, classes: int, weighting: str
) -> tuple[Tensor, Tensor]:
    """(coefficients (P, N, L - 1), eigenvalues (P, L - 1)) by the generalised eigenproblem of GDA Eq. 18 to 22.

    K (P, N, N), codes and root (P, N), tau (P,). G_w = R R^T, and the eigenvectors of R^-1 S_b R^-T.
    """
    c = class_structure(codes, root, classes, weighting)
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    R = torch.linalg.cholesky(within_scatter(K, c) + tau[..., None, None] * identity)
    between = c.root.unsqueeze(-1) * (K @ (c.root.unsqueeze(-1) * c.between))
    reduced = torch.linalg.solve_triangular(R, between, upper=False)
    eigenvalues, vectors = torch.linalg.eigh(reduced @ reduced.mT)
    vectors = torch.linalg.solve_triangular(R.mT, vectors.flip(-1)[..., : classes - 1], upper=True)
    return c.root.unsqueeze(-1) * vectors, eigenvalues.flip(-1)[..., : classes - 1]


def eigh_small(S: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues (P, L) ascending, eigenvectors (P, L, L) in columns) of S (P, L, L), its lower triangle.

    Each vector has its first largest entry positive. NaN or infinity in a matrix gives NaN.
    """
    finite = S.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], S, 0))
    values = torch.where(finite[:, None], values, torch.nan)
    if S.shape[-1] == 0:
        return values, vectors
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = torch.where(largest < 0, -vectors, vectors)
    return values, torch.where(finite[:, None, None], vectors, torch.nan).contiguous()
