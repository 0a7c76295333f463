"""Kernel matrices and the regularised solve of GDA, "Nonlinear Multiclass Discriminant Analysis" (Ma et al., 2003).

The public names are those of phydi_kernels.functional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import check_finite, check_integer
from .kernels.gda_solve import asymmetry, plan
from .ops._autograd import autocast_enabled, without_autocast
from .ops.eigh_small import eigh_small
from .ops.gda_solve import gda_apply, gda_factor, symmetric_times
from .ops.kernel_matrix import kernel_matrix as _kernel_matrix
from .reference import class_structure, middle

KERNELS = ("linear", "poly", "rbf", "laplacian", "sigmoid", "cosine", "matern", "chi2")
_WITH_LENGTHSCALE = ("rbf", "laplacian", "matern")
_MATERN = {0.5: "matern12", 1.5: "matern32", 2.5: "matern52"}
WEIGHTINGS = ("paper", "standard")
SOLVERS = ("cholesky", "qr", "eigh", "pinv", "cg")
# The conditioning that each dtype inverts well with one step of refinement.
C_ALLOW = {torch.float64: 1e8, torch.float32: 1e5}
# Kernel values between new and training points that are held at a time.
BLOCK_ENTRIES = 1 << 22
# Factors and solutions of one step of a batch, in elements.
_CHUNK = 1 << 26


def _check_matrix(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} is nested or has layout {value.layout}; it must be a dense tensor")
    if value.dtype not in C_ALLOW:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are torch.float32, torch.float64")
    if value.dim() < 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have at least two dimensions")


def _readable(t: Tensor) -> bool:
    """Whether values can be looked at without a copy between devices and outside of tracing."""
    return (
        t.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _check_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def float32_under_autocast(t: Any) -> Any:
    """torch.cdist and torch.linalg run in float32 under autocast, and so do these functions."""
    casts = isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16) and autocast_enabled(t.device)
    return t.float() if casts else t


class _Batch:
    """Splits the broadcast batch dimensions of one call into those of the small argument alone, and the others."""

    def __init__(self, small: Sequence[int], *others: Sequence[int]) -> None:
        self.shape = torch.broadcast_shapes(small, *others)
        rank = len(self.shape)
        alone = [all(d < rank - len(o) or o[d - rank + len(o)] == 1 for o in others) for d in range(rank)]
        self.outer = [d for d in range(rank) if alone[d]]
        self.inner = [d for d in range(rank) if not alone[d]]
        self.T = math.prod([self.shape[d] for d in self.outer])
        self.P = math.prod([self.shape[d] for d in self.inner])

    def of_small(self, t: Tensor) -> Tensor:
        """(*batch) -> (T, P)."""
        return t.expand(self.shape).permute(self.outer + self.inner).reshape(self.T, self.P)

    def of_other(self, t: Tensor, dims: int) -> Tensor:
        """(*batch, dims) -> (P, dims), a view where it can be."""
        batch, rest = t.shape[: t.dim() - dims], list(t.shape[t.dim() - dims :])
        sizes = [1] * (len(self.shape) - len(batch)) + list(batch)
        t = t.reshape([sizes[d] for d in self.inner] + rest)
        return t.expand([self.shape[d] for d in self.inner] + rest).reshape(self.P, *rest)

    def result(self, t: Tensor) -> Tensor:
        """(T, P, ...) -> (*batch, ...)."""
        order = self.outer + self.inner
        t = t.reshape([self.shape[d] for d in order] + list(t.shape[2:]))
        back = sorted(range(len(order)), key=order.__getitem__)
        return t.permute(back + list(range(len(order), t.dim())))


def kernel_matrix(
    X: Tensor,
    Y: Tensor | None = None,
    *,
    kernel: str = "rbf",
    gamma: float | Tensor | None = None,
    degree: int = 3,
    coef0: float = 1.0,
    lengthscale: float | Tensor | None = None,
    nu: float = 1.5,
) -> Tensor:
    r"""The kernel (Gram) matrix K(x_i, y_j) (GDA, Eq. 19), of many problems and many gammas at once.

    ============= ==========================================================================
    ``linear``    :math:`x \cdot y`
    ``poly``      :math:`(\gamma\, x \cdot y + c_0)^{degree}`
    ``sigmoid``   :math:`\tanh(\gamma\, x \cdot y + c_0)`
    ``cosine``    :math:`x \cdot y / (|x| |y|)`, 0 where x or y is 0
    ``rbf``       :math:`\exp(-\gamma |x - y|^2)`
    ``laplacian`` :math:`\exp(-\gamma |x - y|_1)`
    ``matern``    of smoothness nu, with :math:`r^2 = 2 \gamma |x - y|^2` and :math:`z = \sqrt{2 \nu}\, r`:
                  :math:`e^{-z}` (1/2), :math:`(1 + z) e^{-z}` (3/2), :math:`(1 + z + z^2/3) e^{-z}` (5/2); the rbf
                  of the same gamma is its limit
    ``chi2``      :math:`\exp(-\gamma \sum_f (x_f - y_f)^2 / (x_f + y_f))`, entries >= 0
    ============= ==========================================================================

    A vector of gammas takes one pass over the distances: gamma (3,) with X (N, d) gives (3, N, M). With Y left out the
    lower triangle is computed and mirrored, distances of a point to itself are exactly 0 and K is exactly symmetric.
    Squared distances are formed from centred points, or by differences where features are few, so that an offset of the
    data costs no digits. Differentiable twice in X, Y, gamma and lengthscale; the derivatives of ``laplacian`` and
    ``matern`` 1/2 at x = y are taken as 0.

    Args:
        X: points ``(..., N, d)``.
        Y: points ``(..., M, d)``; None for X itself.
        kernel: one of the names above.
        gamma: a number, or a tensor ``(...)``, > 0; None is 1/d.
        degree: of ``poly``, an integer >= 1.
        coef0: :math:`c_0` of ``poly`` and ``sigmoid``.
        lengthscale: in the place of gamma, for ``rbf``, ``laplacian`` and ``matern``: a number or ``(d,)``, > 0, in the
            units of the features. ``rbf`` is then :math:`\exp(-|(x - y)/l|^2 / 2)`, ``laplacian``
            :math:`\exp(-|(x - y)/l|_1)`, and ``matern`` has :math:`r = |(x - y)/l|`.
        nu: of ``matern``: 0.5, 1.5 or 2.5.

    Returns:
        ``(*batch, N, M)``, batch the broadcast batch dimensions of X, Y and gamma; dtype and device of X. Parameters
        that a kernel has no use for are ignored.

    Raises:
        TypeError: arguments that are not tensors, or of a dtype other than float32 and float64 (16-bit tensors are cast
            to float32 under autocast, as by ``torch.cdist``), or of mixed dtypes.
        ValueError: shapes or devices that do not fit, an unknown kernel, gamma or lengthscale <= 0 (read in tensors on
            the CPU only), both of them, negative entries for ``chi2``.
    """
    X, Y = float32_under_autocast(X), float32_under_autocast(Y)
    _check_matrix("X", X)
    if Y is not None:
        _check_matrix("Y", Y)
        _check_like("Y", Y, X)
        if Y.shape[-1] != X.shape[-1]:
            raise ValueError(f"Y has {Y.shape[-1]} features (last dimension) but X has {X.shape[-1]}")
    _check_one_of("kernel", kernel, KERNELS)
    check_integer("degree", degree)
    coef0 = check_finite("coef0", coef0)
    if kernel == "matern" and nu not in _MATERN:
        raise ValueError(f"nu={nu!r} is not one of 0.5, 1.5, 2.5")
    name = {"linear": "dot", "cosine": "dot", "matern": _MATERN.get(nu, "")}.get(kernel, kernel)
    if kernel in ("linear", "cosine"):
        gamma = None
    if lengthscale is not None and kernel in _WITH_LENGTHSCALE:
        if gamma is not None:
            raise ValueError(f"gamma={gamma!r} and lengthscale={lengthscale!r} are both given; give one of them")
        scale = _positive("lengthscale", lengthscale, X)
        if scale.dim() and scale.shape != X.shape[-1:]:
            raise ValueError(
                f"lengthscale has shape {tuple(scale.shape)}; it must be a number or (d,) = ({X.shape[-1]},)"
            )
        if X.numel() > 0:
            # Rounded at the size of the data and not of its offset.
            center = middle((X if Y is None else Y).flatten(0, -2))
            X, Y = X - center, None if Y is None else Y - center
        X, Y = X / scale, None if Y is None else Y / scale
        gamma = 1.0 if kernel == "laplacian" else 0.5
    if kernel == "cosine":
        X, Y = _normalized(X), None if Y is None else _normalized(Y)
    if kernel == "chi2":
        for label, t in (("X", X), ("Y", Y)):
            if t is not None and _readable(t) and bool((t < 0).any()):
                raise ValueError(f'{label} has negative entries (least {float(t.min())}); kernel="chi2" needs >= 0')
    scale = _positive("gamma", 1 / max(X.shape[-1], 1) if gamma is None else gamma, X)
    batch = _Batch(scale.shape, X.shape[:-2], *([] if Y is None else [Y.shape[:-2]]))
    K = _kernel_matrix(
        batch.of_other(X, 2), None if Y is None else batch.of_other(Y, 2), batch.of_small(scale), name, degree, coef0
    )
    return batch.result(K)


def _check_like(name: str, t: Tensor, X: Tensor) -> None:
    if t.dtype != X.dtype:
        raise TypeError(f"{name} has dtype {t.dtype} but X has {X.dtype}; all tensors of a call share one dtype")
    if t.device != X.device:
        raise ValueError(f"{name} is on {t.device} but X is on {X.device}; all tensors of a call share one device")


def _positive(name: str, value: Any, X: Tensor) -> Tensor:
    """A number or tensor > 0 as a tensor beside X."""
    if not isinstance(value, Tensor):
        if isinstance(value, (list, tuple)) or type(value).__module__ == "numpy":
            value = torch.as_tensor(value, dtype=X.dtype, device=X.device)
        else:
            number = check_finite(name, value)
            if number <= 0:
                raise ValueError(f"{name}={value} must be > 0")
            return torch.full((), number, dtype=X.dtype, device=X.device)
    _check_like(name, value, X)
    if _readable(value) and not bool((value > 0).all()):
        raise ValueError(f"{name} has the entry {float(value.min())}; it must be > 0")
    return value


def _normalized(X: Tensor) -> Tensor:
    """x / |x|, and 0 for 0."""
    square = (X * X).sum(-1, keepdim=True)
    return torch.where(square == 0, 0, X * torch.where(square == 0, 1, square).rsqrt())


class GDASolution(NamedTuple):
    """What :func:`gda_solve` returns.

    Attributes:
        coefficients: A, ``(..., N, l)``: ``kernel_matrix(X_new, X) @ coefficients`` projects new points (Eq. 14).
        eigenvalues: of G_w^-1 S_b, ``(..., l)``, largest first.
        tau: the conditioning coefficient used, ``(...)``.
        info: ``(...)``, int32. 0: solved as asked. k > 0: tau was multiplied k times by 10 until G_w could be factored.
            -1: not solved (NaN in K, or no convergence with ``solver="cg"``); coefficients and eigenvalues are NaN.
    """

    coefficients: Tensor
    eigenvalues: Tensor
    tau: Tensor
    info: Tensor


def encode_labels(labels: Any, device: torch.device) -> tuple[Tensor, int]:
    """(codes 0 ... L-1 of the sorted distinct labels, L)."""
    if not isinstance(labels, Tensor):
        if type(labels).__module__ == "numpy" and labels.dtype.kind in "biuf":
            labels = torch.as_tensor(labels)
        else:
            nested = labels.tolist() if hasattr(labels, "tolist") else labels
            shape: list[int] = []
            flat = list(nested)
            while flat and isinstance(flat[0], (list, tuple)):
                shape.append(len(flat))
                flat = [entry for row in flat for entry in row]
            if any(label != label for label in flat):
                raise ValueError("labels contain NaN")
            order = {label: code for code, label in enumerate(sorted(set(flat)))}
            codes = torch.tensor([order[label] for label in flat], device=device)
            return codes.reshape(*shape, -1) if shape else codes, len(order)
    if labels.is_floating_point() and _readable(labels) and bool(labels.isnan().any()):
        raise ValueError("labels contain NaN")
    values, codes = labels.to(device).unique(return_inverse=True)
    return codes, len(values)


def gda_solve(
    K: Tensor,
    labels: Any,
    *,
    tau: float | str | Tensor | None = None,
    c_allow: float | None = None,
    tau_min: float = 0.0,
    n_components: int | None = None,
    weighting: str = "paper",
    solver: str = "cholesky",
    sample_mask: Any = None,
    sample_weight: Any = None,
    num_classes: int | None = None,
) -> GDASolution:
    r"""Nonlinear multiclass discriminant analysis (GDA, Eq. 18 to 28): the leading eigenvectors of G_w^-1 S_b.

    .. math:: G_w = K D_w K + \tau I, \qquad S_b = K \Omega D_b \Omega^T K, \qquad
              S_b A = G_w A \Lambda, \quad A^T G_w A = I

    found without an N x N eigenproblem. S_b = V V^T has rank L - 1, so with :math:`T = V^T G_w^{-1} V = U \Lambda U^T`
    the eigenvectors are :math:`A = G_w^{-1} V U \Lambda^{-1/2}`: one symmetric product, one Cholesky factorisation, one
    step of refinement with the unformed operator (more where it is large), and an eigenproblem of size L - 1.

    Args:
        K: kernel matrices ``(..., N, N)``, symmetric; float32 or float64.
        labels: ``(..., N)``, a tensor, array or sequence of anything that can be sorted. Every problem of a batch is
            solved for all the classes that occur; one that is missing from a problem costs it a component, whose
            eigenvalue and coefficients are 0.
        tau: the conditioning coefficient >= 0: a number, a tensor ``(...)``, or a rule: None is
            :math:`\max(\lambda_{max}(S_w) / c_{allow}, \tau_{min})` (Eq. 23, by the Lanczos method), ``"one_norm"`` the
            same with the one-norm of S_w. The rules carry no gradient.
        c_allow: the condition that G_w may have (> 1); None is 1e8 in float64, 1e5 in float32.
        tau_min: the least tau of the rules.
        n_components: l, from 1 to L - 1; None is L - 1.
        weighting: of the classes' scatter in S_w: ``"paper"`` by N_j (Eq. 3), ``"standard"`` by 1 (textbook LDA). They
            agree where all classes have as many samples.
        solver: ``"cholesky"``; ``"qr"`` of [B^T; sqrt(tau) I], which never squares the condition; ``"eigh"`` of S_w,
            which serves any number of taus; ``"pinv"``, the pseudo-inverse of S_w in the place of a tau (Sec. IV);
            ``"cg"``, conjugate gradients with K alone in memory, for smooth problems or large tau.
        sample_mask: ``(..., N)``, bool; samples with False are left out and have coefficients 0.
        sample_weight: ``(..., N)`` >= 0. A sample of weight w counts as w equal samples.
        num_classes: L, if ``labels`` is an integer tensor of 0 ... L-1 already; needed to trace the function whole.

    Returns:
        :class:`GDASolution`, batched over the broadcast batch dimensions of K, labels, sample_mask, sample_weight and
        tau. A problem that cannot be factored gets a larger tau, reported in ``info``, and does not disturb the others.
        Signs: the entries of U's columns that are largest are positive. Eigenvalues and coefficients are differentiable
        in K and tau any number of times (not with ``"pinv"``); where eigenvalues are equal the coefficients are
        determined up to a rotation, and derivatives are right for what does not depend on it, the sum of eigenvalues
        (the criterion, Eq. 18) above all.

    Raises:
        TypeError: a K that is no tensor, or of another dtype.
        ValueError: a K that is not square, not finite or not symmetric beyond rounding, labels of another length or of
            one class, tau < 0, c_allow <= 1, tau_min < 0, n_components outside 1 ... L-1, an unknown name.
    """
    K = float32_under_autocast(K)
    _check_matrix("K", K)
    N = K.shape[-1]
    if K.shape[-2] != N:
        raise ValueError(f"K has shape {tuple(K.shape)}; it must be square in its last two dimensions")
    _check_one_of("weighting", weighting, WEIGHTINGS)
    _check_one_of("solver", solver, SOLVERS)
    codes, classes = _codes(labels, num_classes, N, K.device)
    components = classes - 1 if n_components is None else check_integer("n_components", n_components)
    if components > classes - 1:
        raise ValueError(f"n_components={components} must be at most {classes - 1} for {classes} classes")
    root = _root_weights(sample_mask, sample_weight, K)
    coefficient, rule = _conditioning_argument(tau, K, solver)
    c_allow = C_ALLOW[K.dtype] if c_allow is None else check_finite("c_allow", c_allow)
    if c_allow <= 1:
        raise ValueError(f"c_allow={c_allow} must be > 1")
    tau_min = check_finite("tau_min", tau_min)
    if tau_min < 0:
        raise ValueError(f"tau_min={tau_min} must be >= 0")
    if solver == "pinv" and torch.is_grad_enabled() and K.requires_grad:
        raise ValueError('solver="pinv" has no gradient; detach K or choose another solver')
    _check_symmetric(K)
    batch = _Batch(() if coefficient is None else coefficient.shape, K.shape[:-2], codes.shape[:-1], root.shape[:-1])
    problem = _Problems(
        batch.of_other(K, 2), batch.of_other(codes, 1), batch.of_other(root, 1), classes, weighting, solver
    )
    taus = None if coefficient is None else batch.of_small(coefficient)
    with without_autocast(K.device):
        solution = _solve_all(problem, taus, rule, c_allow, tau_min, components)
    return GDASolution(*(batch.result(t) for t in solution))


class _Problems(NamedTuple):
    K: Tensor
    codes: Tensor
    root: Tensor
    classes: int
    weighting: str
    solver: str


def _codes(
    labels: Any, num_classes: int | None, N: int, device: torch.device, samples: str = "as in K"
) -> tuple[Tensor, int]:
    if num_classes is None:
        codes, classes = encode_labels(labels, device)
    else:
        classes = check_integer("num_classes", num_classes)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            raise TypeError("labels must be a tensor of integers 0 ... num_classes - 1 where num_classes is given")
        codes = labels.to(device=device, dtype=torch.int64)
        if _readable(codes) and codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < classes:
            raise ValueError(
                f"labels lie in {int(codes.min())} ... {int(codes.max())}; they must be in 0 ... {classes - 1}"
            )
    if codes.dim() < 1 or codes.shape[-1] != N:
        raise ValueError(f"labels have shape {tuple(codes.shape)}; the last dimension must be N = {N}, {samples}")
    if classes < 2:
        raise ValueError(f"labels hold {classes} class; discriminant analysis needs at least 2")
    return codes, classes


def _root_weights(sample_mask: Any, sample_weight: Any, K: Tensor) -> Tensor:
    """Square roots of the weights (..., N)."""
    N = K.shape[-1]
    root = K.new_ones(N)
    if sample_weight is not None:
        weight = torch.as_tensor(sample_weight, dtype=K.dtype, device=K.device)
        if weight.dim() < 1 or weight.shape[-1] != N:
            raise ValueError(f"sample_weight has shape {tuple(weight.shape)}; the last dimension must be N = {N}")
        if _readable(weight) and not bool(((weight >= 0) & weight.isfinite()).all()):
            raise ValueError("sample_weight has negative entries, NaN or infinity; it must be finite and >= 0")
        root = weight.detach().sqrt()
    if sample_mask is not None:
        mask = torch.as_tensor(sample_mask, device=K.device)
        if mask.dtype != torch.bool:
            raise TypeError(f"sample_mask has dtype {mask.dtype}; it must be torch.bool")
        if mask.dim() < 1 or mask.shape[-1] != N:
            raise ValueError(f"sample_mask has shape {tuple(mask.shape)}; the last dimension must be N = {N}")
        root = torch.where(mask, root, 0)
    return root


def _conditioning_argument(tau: Any, K: Tensor, solver: str) -> tuple[Tensor | None, str]:
    """(tau as a tensor, or None and the rule)."""
    if solver == "pinv":
        if tau is not None:
            raise ValueError(f'tau={tau!r} cannot be given with solver="pinv", which takes its place')
        return None, "lambda_max"
    if tau is None:
        return None, "lambda_max"
    if isinstance(tau, str):
        _check_one_of("tau", tau, ("one_norm",))
        return None, tau
    if not isinstance(tau, Tensor):
        if isinstance(tau, (list, tuple)) or type(tau).__module__ == "numpy":
            tau = torch.as_tensor(tau, dtype=K.dtype, device=K.device)
        else:
            tau = torch.full((), check_finite("tau", tau), dtype=K.dtype, device=K.device)
    if tau.dtype != K.dtype or tau.device != K.device:
        raise TypeError(f"tau has dtype {tau.dtype} on {tau.device}; it must be as K, {K.dtype} on {K.device}")
    if _readable(tau) and not bool((tau >= 0).all() & tau.isfinite().all()):
        raise ValueError(f"tau has the entry {float(tau.min())}; it must be finite and >= 0")
    return tau, "given"


def _check_symmetric(K: Tensor) -> None:
    if not _readable(K) or K.numel() == 0:
        return
    largest, difference = asymmetry(K.detach())
    if not math.isfinite(largest):
        raise ValueError("K has NaN or infinite entries")
    # Rounding of sums of any length: a kernel matrix from another library need not be symmetric to the last bit.
    if difference > 1e3 * torch.finfo(K.dtype).eps * largest:
        raise ValueError(f"K is not symmetric: entries differ from their mirror images by up to {difference}")


def _solve_all(
    problem: _Problems, taus: Tensor | None, rule: str, c_allow: float, tau_min: float, components: int
) -> Sequence[Tensor]:
    """The solutions (T, P, ...), so many at a time that the factors of one step stay in bounds."""
    K = problem.K
    P, N, _ = K.shape
    T = 1 if taus is None else taus.shape[0]
    step_P = max(1, min(P, _CHUNK // max(1, N * N)))
    # A path of taus shares one factorisation, and should not be split.
    shared = plan(K, T, problem.solver) != "cholesky"
    step_T = T if shared else max(1, min(T, _CHUNK // max(1, N * N * step_P)))
    rows = []
    for p in range(0, P, step_P):
        part = problem._replace(
            K=K[p : p + step_P], codes=problem.codes[p : p + step_P], root=problem.root[p : p + step_P]
        )
        part, kept = _without_left_out(part)
        columns = []
        for t in range(0, T, step_T):
            some = None if taus is None else taus[t : t + step_T, p : p + step_P]
            columns.append(_solve(part, some, rule, c_allow, tau_min, components))
        found = [torch.cat(c, 0) if len(c) > 1 else c[0] for c in zip(*columns, strict=True)]
        if kept is not None:
            index = kept[None, :, :, None].expand(T, -1, -1, components)
            found[0] = found[0].new_zeros((T, len(kept), N, components)).scatter(2, index, found[0])
        rows.append(found)
    if len(rows) == 1:
        return rows[0]
    if not rows:
        empty = K.new_empty((T, 0))
        return [K.new_empty((T, 0, N, components)), K.new_empty((T, 0, components)), empty, empty.to(torch.int32)]
    return [torch.cat(parts, 1) for parts in zip(*rows, strict=True)]


def _without_left_out(problem: _Problems) -> tuple[_Problems, Tensor | None]:
    """The problems of the samples with a weight alone, and their numbers (P, n); None where nothing is gained."""
    root = problem.root
    if not _readable(root):
        return problem, None
    n = int((root > 0).sum(-1).max()) if root.numel() else 0
    if n == root.shape[-1] or n == 0:
        return problem, None
    # In the given order; problems with fewer samples are filled up with left-out ones.
    kept = (root == 0).to(torch.int8).argsort(stable=True)[:, :n].sort(-1).values
    K = torch.stack([k[i][:, i] for k, i in zip(problem.K, kept, strict=True)])
    return problem._replace(K=K, codes=problem.codes.gather(-1, kept), root=root.gather(-1, kept)), kept


def _solve(
    problem: _Problems, taus: Tensor | None, rule: str, c_allow: float, tau_min: float, components: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K, codes, root, classes, weighting, solver = problem
    solver = plan(K, 1 if taus is None else len(taus), solver)
    structure = (codes, root, classes, weighting)
    given = None if taus is None else taus.detach()
    *factor, tau, info = gda_factor(K.detach(), *structure, given, rule, c_allow, tau_min, solver)
    if taus is not None and taus.requires_grad:
        tau = taus + (tau - taus).detach()
    c = class_structure(codes, root, classes, weighting)
    weight = root.unsqueeze(-1)
    V = (weight * symmetric_times(K, weight * c.between)).expand(tau.shape[0], -1, -1, -1)
    X, reduced = gda_apply(K, *structure, tau, *factor, V, solver)
    T, P = tau.shape
    eigenvalues, U = (t.unflatten(0, (T, P)) for t in eigh_small(reduced.flatten(0, 1)))
    eigenvalues, U = eigenvalues.flip(-1)[..., :components], U.flip(-1)[..., :components]
    # An eigenvalue that is zero to rounding belongs to no discriminant direction.
    least = classes * torch.finfo(K.dtype).eps * eigenvalues[..., :1].detach()
    real = (eigenvalues > least) | eigenvalues.isnan()
    scale = torch.where(real, torch.where(real, eigenvalues, 1).rsqrt(), 0)
    coefficients = weight * (X @ (U * scale.unsqueeze(-2)))
    failed = (info < 0) | eigenvalues.isnan().any(-1)
    info = torch.where(failed, -1, info)
    return (
        torch.where(failed[..., None, None], torch.nan, coefficients),
        torch.where(failed[..., None], torch.nan, torch.where(real, eigenvalues, 0)),
        tau,
        info,
    )


def discriminant_criterion(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    tau: float | None = None,
    c_allow: float = 1e4,
    tau_min: float = 1e-6,
    weighting: str = "standard",
    kind: str = "trace",
) -> Tensor:
    r"""How well a batch of features separates its classes (GDA, Eq. 2 to 4 and 22), in the features' own space.

    .. math:: J = \mathrm{Tr}\{(S_w + \tau I)^{-1} S_b\}, \quad \text{or} \quad \log\det(I + (S_w + \tau I)^{-1} S_b)

    with :math:`S_w = \sum_i w_i \sum_k (x_k^i - m_i)(x_k^i - m_i)^T`, :math:`w_i = N_i/N` (``"paper"``, Eq. 3) or
    :math:`1/N` (``"standard"``), and :math:`S_b = \sum_i \frac{N_i}{N} (m_i - m)(m_i - m)^T`. One linear solve and no
    eigenvector: differentiable any number of times in the features, also where eigenvalues are equal.

    Args:
        features: ``(N, d)``.
        labels: ``(N,)``, integers in 0 ... num_classes - 1. Classes that do not occur add nothing; with fewer than two
            J is 0.
        num_classes: L.
        tau: the conditioning coefficient > 0; None is :math:`\max(\lambda_{max}(S_w)/c_{allow}, \tau_{min})` (Eq. 23),
            taken as a constant in derivatives.
        c_allow: the condition that :math:`S_w + \tau I` may have (> 1).
        tau_min: the least tau of the rule, > 0.
        weighting: ``"standard"`` or ``"paper"``. The paper's makes J smaller by the size of the classes, and its
            gradients with it.
        kind: ``"trace"``, or ``"logdet"``, which rewards a separation of all classes rather than of the easiest.

    Returns:
        J, a scalar of the dtype of ``features``; NaN where they have NaN or infinity.

    Raises:
        TypeError: features that are no float32 or float64 tensor (16-bit ones are cast to float32 under autocast), or
            labels that are no integer tensor.
        ValueError: shapes or devices that do not fit, labels outside 0 ... num_classes - 1 (read on the CPU only),
            tau <= 0, c_allow <= 1, tau_min <= 0, an unknown name.
    """
    features = float32_under_autocast(features)
    _check_matrix("features", features)
    if features.dim() != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; they must be (N, d)")
    _check_one_of("weighting", weighting, WEIGHTINGS)
    _check_one_of("kind", kind, ("trace", "logdet"))
    N, d = features.shape
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, not {type(labels).__name__}")
    if labels.device != features.device:
        raise ValueError(f"labels are on {labels.device} but features on {features.device}")
    codes, classes = _codes(labels, num_classes, N, features.device, "one for each row of features")
    if codes.dim() != 1:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; they must be (N,) = ({N},)")
    for name, value, least in (("tau", tau, 0), ("c_allow", c_allow, 1), ("tau_min", tau_min, 0)):
        if value is not None and check_finite(name, value) <= least:
            raise ValueError(f"{name}={value} must be > {least}")
    with without_autocast(features.device):
        # Not torch's one_hot, which reads the labels' values and cannot be mapped by vmap.
        one_hot = (codes.unsqueeze(-1) == torch.arange(classes, device=codes.device)).to(features.dtype)
        count = one_hot.sum(0)
        means = (one_hot.mT @ features) / count.clamp_min(1).unsqueeze(-1)
        within = features - one_hot @ means
        weight = (one_hot @ count if weighting == "paper" else torch.ones_like(one_hot[:, 0])) / max(N, 1)
        S = within.mT @ (weight.unsqueeze(-1) * within)
        center = features.mean(0) if N else features.new_zeros(d)
        V = ((means - center) * (count / max(N, 1)).sqrt().unsqueeze(-1)).mT
        if tau is None:
            # NaN and infinity are left to S: the criterion of such features is NaN, as other losses are.
            spectrum = torch.linalg.eigvalsh(S.detach().nan_to_num(0, 0, 0)) if d else S.new_zeros(1)
            ridge = (spectrum[-1] / c_allow).clamp_min(tau_min)
        else:
            ridge = S.new_full((), tau)
        X = torch.linalg.solve_ex(S + ridge * torch.eye(d, dtype=S.dtype, device=S.device), V).result
        if kind == "trace":
            return (V * X).sum()
        return torch.linalg.slogdet(torch.eye(classes, dtype=S.dtype, device=S.device) + V.mT @ X).logabsdet
