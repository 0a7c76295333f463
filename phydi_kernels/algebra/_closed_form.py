"""Bilinear algorithms that are known in closed form: Clifford algebras, and tensors given by their slices.

An algorithm is a triple (U, V, W) of float64 matrices with A[i, k, l] = sum_r U[r, i] V[r, k] W[r, l].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .structure import clifford, octonions

Factors = tuple[Tensor, Tensor, Tensor]
_Rows = Sequence[Sequence[float]]


def growth(U: Tensor, V: Tensor, W: Tensor) -> Tensor:
    """sum_r |U_r| |V_r| |W_r| over the last two dimensions: the growth where |A| = 1."""
    return (U.norm(dim=-1) * V.norm(dim=-1) * W.norm(dim=-1)).sum(-1)


def table(A: Tensor) -> tuple[float, Tensor] | None:
    """(c, T) with A = c T and T[0, 0, 0] = 1 if A may be a signed table of 2**m basis elements, else None."""
    n = A.shape[0]
    scale = A.reshape(-1)[0].item()
    if set(A.shape) != {n} or n & (n - 1) or scale == 0 or int(A.count_nonzero()) != n * n:
        return None
    return scale, A / scale


def is_octonions(A: Tensor) -> bool:
    """Whether A (8, 8, 8) is a multiple of the octonions' structure tensor."""
    found = table(A) if A.shape[0] == 8 else None
    return found is not None and torch.equal(found[1], octonions())


def clifford_algorithm(A: Tensor, max_growth: float) -> Factors | None:
    """The smallest algorithm with at most ``max_growth`` if A is a multiple of a Clifford algebra, else None."""
    found = table(A)
    if found is None:
        return None
    scale, T = found
    m = A.shape[0].bit_length() - 1
    p = next((p for p in range(m + 1) if torch.equal(T, clifford(p, m - p))), None)
    if p is None:
        return None
    for U, V, W in _clifford(p, m - p):
        if growth(U, V, W) <= max_growth * T.norm():
            return scale * U, V, W
    return None


def slices(A: Tensor) -> Factors:
    """Singular value decompositions of the slices, along the mode with the fewest terms, then with the least growth."""
    found: list[Factors] = []
    for mode in range(3):
        L, S, Rh = torch.linalg.svd(A.movedim(mode, 0), full_matrices=False)
        index, term = (S > 1e-14 * S.max()).nonzero(as_tuple=True)
        root = S[index, term].pow(1 / 3)[:, None]
        matrices = [L[index, :, term] * root, Rh[index, term] * root]
        matrices.insert(mode, torch.eye(A.shape[mode], dtype=A.dtype)[index] * root)
        found.append((matrices[0], matrices[1], matrices[2]))
    return min(found, key=lambda factors: (len(factors[0]), growth(*factors)))


def _clifford(p: int, q: int) -> list[Factors]:
    """Algorithms of Cl(p, q), least rank first.

    Cl(p, q) is the tensor product of a Clifford algebra of two generators f1, f2 and one of the others (Lounesto,
    Clifford Algebras and Spinors, ch. 16): another generator e becomes e' (x) f1 f2, with e'^2 = e^2 / (f1 f2)^2.
    """
    if (p, q) in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)):
        return _small(p, q)
    best: dict[int, Factors] = {}
    for s, t in ((1, 1), (2, 0), (0, 2)):
        if s > p or t > q:
            continue
        # (f1 f2)^2 = -f1^2 f2^2 is 1 for one generator of each sign; otherwise the others change sign.
        rest = (p - 1, q - 1) if s == t else (q - t, p - s)
        basis = _tensor_product_basis(p, q, s, t, *rest)
        for one, two in itertools.product(_clifford(*rest), _small(s, t)):
            U, V, W = (torch.kron(a, b) @ basis for a, b in zip(one, two, strict=True))
            rank = len(U)
            if rank not in best or growth(U, V, W) < growth(*best[rank]):
                best[rank] = U, V, W
    return [best[rank] for rank in sorted(best)]


def _tensor_product_basis(p: int, q: int, s: int, t: int, rest_p: int, rest_q: int) -> Tensor:
    """Column b: basis element b of Cl(p, q) in Cl(rest_p, rest_q) (x) Cl(s, t), a signed permutation."""
    product = torch.kron(clifford(rest_p, rest_q), clifford(s, t))
    n = product.shape[0]
    unit = torch.eye(n, dtype=product.dtype)
    kept = s == t
    others_plus = [(1 << (i if kept else rest_p + i)) * 4 + 3 for i in range(p - s)]
    others_minus = [(1 << (rest_p + i if kept else i)) * 4 + 3 for i in range(q - t)]
    pair = [1, 2]
    generators = [*others_plus, *pair[:s], *others_minus, *pair[s:]]
    basis = unit.clone()
    for b in range(1, n):
        last = b.bit_length() - 1
        basis[:, b] = torch.einsum("ikl,i,l->k", product, basis[:, b ^ (1 << last)], unit[generators[last]])
    return basis


def _small(p: int, q: int) -> list[Factors]:
    """Algorithms of a Clifford algebra of at most two generators, least rank first."""
    if (p, q) == (0, 0):
        return [_factors([[1]], [[1]], [[1]])]
    if (p, q) == (1, 0):
        idempotents = [[1, 1], [1, -1]]
        return [_factors(idempotents, [[0.5, 0.5], [0.5, -0.5]], idempotents)]
    if (p, q) == (0, 1):
        return [_gauss(), _three_angles()]
    if (p, q) == (0, 2):
        return [_howell_lafon()]
    # Two by two real matrices: 1, e_1, e_2, e_1 e_2 as columns of matrix units.
    sign = 1 if (p, q) == (2, 0) else -1
    units = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, sign, -sign], [1, -1, 0, 0]], dtype=torch.float64)
    if sign < 0:
        units[:, 3] = torch.tensor([0, 1, 1, 0], dtype=torch.float64)
    return [(U @ units, V @ units / 2, W @ units) for U, V, W in (_strassen(), _rows_by_columns())]


def _factors(U: _Rows, V: _Rows, W: _Rows) -> Factors:
    return tuple(torch.tensor(rows, dtype=torch.float64) for rows in (U, V, W))  # type: ignore[return-value]


def _gauss() -> Factors:
    """Complex product from ac, bd and (a + b)(c + d)."""
    pre = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    return _factors(pre, [[1, -1], [-1, -1], [0, 1]], pre)


def _three_angles() -> Factors:
    """Complex product from three real parts, 120 degrees apart: the least growth, 2, where Gauss's has 2.41."""
    h = math.sqrt(3) / 2
    pre = [[1.0, 0.0], [-0.5, h], [-0.5, -h]]
    return _factors(pre, [[4 / 3 * a, -4 / 3 * b] for a, b in pre], pre)


def _howell_lafon() -> Factors:
    """Quaternion product in eight multiplications (Howell and Lafon, 1975)."""
    h = 0.5
    U = [[1, 1, 0, 0], [0, 0, -1, 1], [1, -1, 0, 0], [0, 0, 1, 1]]
    U += [[0, 1, 0, 1], [0, 1, 0, -1], [1, 0, 1, 0], [1, 0, -1, 0]]
    W = [[1, 1, 0, 0], [0, 0, 1, -1], [0, 0, 1, 1], [1, -1, 0, 0]]
    W += [[0, 1, 1, 0], [0, 1, -1, 0], [1, 0, 0, -1], [1, 0, 0, 1]]
    V: list[list[float]] = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    V += [[-h, -h, h, h], [-h, -h, -h, -h], [h, -h, h, -h], [h, -h, -h, h]]
    return _factors(U, V, W)


def _strassen() -> Factors:
    """Two by two matrix product in seven multiplications (Strassen, 1969), in row-major matrix units."""
    U = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [-1, 0, 1, 0], [0, 1, 0, -1]]
    W = [[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, -1], [-1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    V = [[1, 0, 0, 1], [0, 0, 1, -1], [0, 1, 0, 1], [1, 0, 1, 0], [-1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    return _factors(U, V, W)


def _rows_by_columns() -> Factors:
    """Two by two matrix product in eight multiplications, in row-major matrix units; growth 2.83, Strassen's 5.24."""
    i, j, k = (index.reshape(-1) for index in torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij"))
    unit = torch.eye(4, dtype=torch.float64)
    return unit[2 * i + j], unit[2 * i + k], unit[2 * j + k]
