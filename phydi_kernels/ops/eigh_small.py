"""phydi::eigh_small: eigenvalues and eigenvectors of many small symmetric matrices, by the Jacobi method."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..kernels import cpu, cuda
from ._autograd import register_autograd
from ._family import LIB, define, leading

# Above, LAPACK's tridiagonal methods win.
LARGEST = 64


def _cpu(S: Tensor) -> tuple[Tensor, Tensor]:
    if S.shape[-1] > LARGEST or not cpu.available():
        return reference.eigh_small(S)
    return torch.ops.phydi_cpu.eigh_small.default(S)


def _cuda(S: Tensor) -> tuple[Tensor, Tensor]:
    if S.shape[-1] > LARGEST or not cuda.available():
        return reference.eigh_small(S)
    return torch.ops.phydi_cuda.eigh_small.default(S.contiguous())


def _fake(S):
    return S.new_empty(S.shape[:-1]), S.new_empty(S.shape)


eigh_small = define("eigh_small(Tensor S) -> (Tensor, Tensor)", reference.eigh_small, _cpu, _fake, cuda=_cuda)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output)


def _backward(ctx, d_values, d_vectors):
    values, vectors = ctx.saved_tensors
    inner = torch.diag_embed(d_values)
    if d_vectors is not None and values.shape[-1] > 0:
        gap = values.unsqueeze(-2) - values.unsqueeze(-1)
        # A basis of equal eigenvalues is arbitrary, and what depends on it has no derivative: 0, not NaN.
        equal = gap.abs() <= values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1)[..., None, None]
        inner = inner + torch.where(equal, 0, (vectors.mT @ d_vectors) / torch.where(equal, 1, gap))
    inner = (inner + inner.mT) / 2
    return vectors @ inner @ vectors.mT


register_autograd(LIB, eigh_small, _backward, _setup_context)


def _vmap(info, in_dims, S):
    values, vectors = eigh_small(leading(S, in_dims[0], info.batch_size).flatten(0, 1))
    shape = (info.batch_size, -1)
    return (values.unflatten(0, shape), vectors.unflatten(0, shape)), (0, 0)


torch.library.register_vmap(eigh_small, _vmap)
