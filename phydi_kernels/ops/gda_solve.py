"""phydi::gda_factor and phydi::gda_apply: the steps of GDA's regularised solve; and phydi::symmetric_times, the product
of a symmetric matrix with few columns that they share.

The factor carries no gradient: it only serves to solve. gda_apply, X = G_w^-1 R with T = R^T G_w^-1 R, is
differentiated by solving again with the same factor, and so is its derivative; T alone needs no further solve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import gda_solve as kernels
from ..kernels.gda_solve import Factor
from ..reference import Classes, class_structure
from ._autograd import register_autograd
from ._family import LIB, define, register_vmap_by_sample

_STRUCTURE = "Tensor K, Tensor codes, Tensor root, int classes, str weighting"


def _factor(K, codes, root, classes, weighting, tau, rule, c_allow, tau_min, solver):
    c = class_structure(codes, root, classes, weighting)
    if solver == "pinv":
        tau = K.new_zeros((1, K.shape[0]))
    elif tau is None:
        tau = kernels.conditioning(K, c, rule, c_allow, tau_min)
    f, used, info = kernels.factor(K, c, tau, solver)
    return *f, used.clone() if used is tau else used, info


def _factor_fake(K, codes, root, classes, weighting, tau, rule, c_allow, tau_min, solver):
    P, N, _ = K.shape
    T = 1 if tau is None or solver == "pinv" else tau.shape[0]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "cholesky": [(T, P, N, N), (0,), (0,)],
        "qr": [(T, P, N, N), (0,), (0,)],
        "band": [
            (T, P, N, kernels.BANDWIDTH + 1),
            (P, N, N),
            (P, max((N - 1) // kernels.BANDWIDTH, 0), kernels.BANDWIDTH, kernels.BANDWIDTH),
        ],
        "eigh": [(P, N), (P, N, N), (0,)],
        "pinv": [(P, N), (P, N, N), (0,)],
        "cg": [(0,), (0,), (0,)],
    }
    info = torch.empty((T, P), dtype=torch.int32, device=K.device)
    return *(K.new_empty(shape) for shape in shapes[solver]), K.new_empty((T, P)), info


gda_factor = define(
    f"gda_factor({_STRUCTURE}, Tensor? tau, str rule, float c_allow, float tau_min, str solver) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _factor,
    _factor,
    _factor_fake,
)


def _apply(K, codes, root, classes, weighting, tau, values, vectors, blocks, rhs, solver):
    c = class_structure(codes, root, classes, weighting)
    X, T = kernels.apply(K, c, tau, Factor(values, vectors, blocks), rhs, solver)
    return X.contiguous(), T.contiguous()


def _apply_fake(K, codes, root, classes, weighting, tau, values, vectors, blocks, rhs, solver):
    T, P, _, m = rhs.shape
    return rhs.new_empty(rhs.shape), rhs.new_empty((T, P, m, m))


gda_apply = define(
    f"gda_apply({_STRUCTURE}, Tensor tau, Tensor values, Tensor vectors, Tensor blocks, Tensor rhs, str solver) "
    "-> (Tensor, Tensor)",
    _apply,
    _apply,
    _apply_fake,
)


symmetric_times = define(
    "symmetric_times(Tensor K, Tensor x) -> Tensor",
    kernels.times,
    kernels.times,
    lambda K, x: x.new_empty(x.shape),
)


def _times_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _times_backward(ctx, grad):
    K, x = ctx.saved_tensors
    need_K, need_x = ctx.needs_input_grad
    return grad @ x.mT if need_K else None, symmetric_times(K, grad) if need_x else None


register_autograd(LIB, symmetric_times, _times_backward, _times_setup)


def _form_grad(K: Tensor, c: Classes, Y: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """(d/dK, d/dtau) of <Y, G_w X> for G_w = K D_w K + tau I, with Y and X fixed."""

    def outer(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("tpim,tpjm->pij", a, b)

    of_Y, of_X = (kernels.half_within_times(K, c, t, symmetric_times) for t in (Y, X))
    weight = c.root.unsqueeze(-1)
    return outer(weight * Y, weight * of_X) + outer(weight * of_Y, weight * X), (Y * X).sum((-2, -1))


def _apply_setup(ctx, inputs, output):
    K, codes, root, ctx.classes, ctx.weighting, tau, values, vectors, blocks, _, ctx.solver = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(K, codes, root, tau, values, vectors, blocks, output[0])


def _apply_backward(ctx, d_X, d_T):
    K, codes, root, tau, values, vectors, blocks, X = ctx.saved_tensors
    # The two sides of the form <Y, dG X>, and the gradient of R.
    left, right, d_rhs = [], [], None
    if d_X is not None:
        structure = (K, codes, root, ctx.classes, ctx.weighting)
        d_rhs, _ = gda_apply(*structure, tau, values, vectors, blocks, d_X, ctx.solver)
        left, right = [d_rhs], [X]
    if d_T is not None:
        # dT = dR^T X + X^T dR - X^T dG X: T is stationary in X, and needs no solve.
        scaled = X @ (d_T + d_T.mT)
        d_rhs = scaled if d_rhs is None else d_rhs + scaled
        left, right = [*left, X], [*right, scaled / 2]
    d_K = d_tau = None
    if left and (ctx.needs_input_grad[0] or ctx.needs_input_grad[5]):
        c = class_structure(codes, root, ctx.classes, ctx.weighting)
        d_K, d_tau = (-g for g in _form_grad(K, c, torch.cat(left, -1), torch.cat(right, -1)))
    return d_K, None, None, None, None, d_tau, None, None, None, d_rhs, None


register_autograd(LIB, gda_apply, _apply_backward, _apply_setup)

for _op in (gda_factor, gda_apply, symmetric_times):
    register_vmap_by_sample(_op)
