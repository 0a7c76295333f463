"""PHMEmbedding."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from .._check import check_divisible, check_finite, check_integer, check_row
from ._base import HypercomplexLayer


class PHMEmbedding(HypercomplexLayer):
    r"""Embedding with 1/n of the parameters, whose table is never formed.

    .. math:: E = \sum_i w_i\, A_i \otimes F_i, \qquad y = E_v

    See :func:`phydi_kernels.functional.phm_embedding`: a lookup takes O(tokens * embedding_dim * n).

    Args:
        num_embeddings: number of rows of the table, divisible by n; indices are below it.
        embedding_dim: size of a row, divisible by n.
        n: the dimension of the algebra.
        padding_idx: an index, from the end if negative, whose row is 0 and has no gradient. In a
            :class:`torch.nn.Embedding` this row can be given other values; here rows share their parameters.
        std: standard deviation of the table's entries at the start. None means 1, that of :class:`torch.nn.Embedding`;
            ``init="reference"`` has its own, and takes no other.
        algebra_rank, kron_weights, init, learn_algebra, device, dtype: as in :class:`PHMLinear`. With
            ``algebra_rank`` A is formed from U, V and W at each call: a lookup has few multiplications to save.

    Parameters: ``A (n, n, n)``, or ``U``, ``V`` and ``W`` ``(R, n)``, ``F (n, num_embeddings/n, embedding_dim/n)``,
    ``kron_weights (n,)``. The options ``max_norm``, ``scale_grad_by_freq`` and ``sparse`` of
    :class:`torch.nn.Embedding` are about rows of their own, and absent.

    Shapes: indices of any shape, int32 or int64, to ``(*shape, embedding_dim)``.

    Raises:
        TypeError, ValueError, DecompositionError: as :class:`PHMLinear`; ``padding_idx`` out of range, or ``std`` not
            positive.
        IndexError: an index out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        n: int,
        padding_idx: int | None = None,
        *,
        std: float | None = None,
        algebra_rank: int | str | None = None,
        kron_weights: bool = False,
        init: str | Tensor = "fan",
        learn_algebra: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        n = check_integer("n", n)
        num_embeddings = check_divisible("num_embeddings", num_embeddings, n)
        embedding_dim = check_divisible("embedding_dim", embedding_dim, n)
        if std is not None and isinstance(init, str) and init == "reference":
            raise ValueError(f'std={std} must be None with init="reference", which has a scale of its own')
        std = 1.0 if std is None else check_finite("std", std)
        if std <= 0:
            raise ValueError(f"std={std} must be positive")
        padding_idx = check_row("padding_idx", padding_idx, num_embeddings)
        super().__init__(
            embedding_dim,
            num_embeddings,
            n,
            (),
            False,
            algebra_rank=algebra_rank,
            kron_weights=kron_weights,
            init=init,
            learn_algebra=learn_algebra,
            device=device,
            dtype=dtype,
        )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.std = padding_idx, std
        self.reset_parameters()

    def dense_weight(self) -> Tensor:
        """The table (num_embeddings, embedding_dim), its row ``padding_idx`` 0. Formed at each call."""
        E = super().dense_weight()
        return E if self.padding_idx is None else E.index_fill(0, torch.tensor(self.padding_idx, device=E.device), 0)

    def _variance(self) -> float:
        return self.std**2

    def forward(self, input: Tensor) -> Tensor:
        return functional.phm_embedding(input, self.structure(), self.F, padding_idx=self.padding_idx)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        options = self._repr_options().removeprefix(", bias=False")
        return f"{self.num_embeddings}, {self.embedding_dim}, n={self.n}{padding}, std={self.std:g}{options}"
