"""Structure tensors against hand-written multiplication tables and the laws of their algebras."""

from __future__ import annotations

import pytest
import torch

from phydi_kernels import algebra


def product(A: torch.Tensor, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ikl,i,l->k", A, w, x)


def basis(A: torch.Tensor) -> torch.Tensor:
    return torch.eye(A.shape[0], dtype=A.dtype)


def test_complex_numbers_multiply_as_two_by_two_matrices():
    a, b = 3.0, 5.0
    H = torch.einsum("ikl,i->kl", algebra.complex_numbers(), torch.tensor([a, b], dtype=torch.float64))
    assert H.tolist() == [[a, -b], [b, a]]


def test_quaternions_are_the_hamilton_product_from_the_left():
    a, b, c, d = 2.0, 3.0, 5.0, 7.0
    H = torch.einsum("ikl,i->kl", algebra.quaternions(), torch.tensor([a, b, c, d], dtype=torch.float64))
    assert H.tolist() == [
        [a, -b, -c, -d],
        [b, a, -d, c],
        [c, d, a, -b],
        [d, -c, b, a],
    ]


def test_octonions_multiplication_table():
    # Row i, column l: the signed index of e_i * e_l, in the Cayley-Dickson basis.
    table = [
        ["+0", "+1", "+2", "+3", "+4", "+5", "+6", "+7"],
        ["+1", "-0", "+3", "-2", "+5", "-4", "-7", "+6"],
        ["+2", "-3", "-0", "+1", "+6", "+7", "-4", "-5"],
        ["+3", "+2", "-1", "-0", "+7", "-6", "+5", "-4"],
        ["+4", "-5", "-6", "-7", "-0", "+1", "+2", "+3"],
        ["+5", "+4", "-7", "+6", "-1", "-0", "-3", "+2"],
        ["+6", "+7", "+4", "-5", "-2", "+3", "-0", "-1"],
        ["+7", "-6", "+5", "+4", "-3", "-2", "+1", "-0"],
    ]
    A = algebra.octonions()
    e = basis(A)
    for i in range(8):
        for j in range(8):
            sign, k = (1 if table[i][j][0] == "+" else -1), int(table[i][j][1])
            assert product(A, e[i], e[j]).tolist() == (sign * e[k]).tolist()


@pytest.mark.parametrize("make", [algebra.complex_numbers, algebra.quaternions, algebra.octonions])
def test_norm_is_multiplicative(make):
    A = make()
    w, x = torch.randn(2, A.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(product(A, w, x).norm(), w.norm() * x.norm(), rtol=1e-14, atol=0)


def test_octonions_are_alternative_and_not_associative():
    A = algebra.octonions()
    x, y, z = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(product(A, product(A, x, x), y), product(A, x, product(A, x, y)))
    torch.testing.assert_close(product(A, product(A, y, x), x), product(A, y, product(A, x, x)))
    associator = product(A, product(A, x, y), z) - product(A, x, product(A, y, z))
    assert associator.norm() > 0.1


@pytest.mark.parametrize(("p", "q"), [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (3, 0), (1, 3), (2, 2)])
def test_clifford_relations(p, q):
    A = algebra.clifford(p, q)
    n = 2 ** (p + q)
    assert A.shape == (n, n, n)
    e = basis(A)
    for i in range(p + q):
        for j in range(p + q):
            square = 2.0 * (i == j) * (1 if i < p else -1)
            anticommutator = product(A, e[1 << i], e[1 << j]) + product(A, e[1 << j], e[1 << i])
            assert anticommutator.tolist() == (square * e[0]).tolist()
    # Basis element b is the product of its generators in ascending order.
    for b in range(n):
        element = e[0]
        for i in range(p + q):
            if b >> i & 1:
                element = product(A, element, e[1 << i])
        assert element.tolist() == e[b].tolist()
    # Associative: left multiplications compose, H(v) H(w) = H(v * w).
    assert torch.equal(torch.einsum("ikm,jml->ijkl", A, A), torch.einsum("imj,mkl->ijkl", A, A))


def test_clifford_contains_the_complex_numbers_and_quaternions():
    assert torch.equal(algebra.clifford(0, 1), algebra.complex_numbers())
    assert torch.equal(algebra.clifford(0, 2), algebra.quaternions())


def test_random_has_variance_one_over_n():
    A = algebra.random(5, 40, 60, generator=torch.Generator().manual_seed(0))
    assert A.shape == (5, 40, 60)
    assert abs(A.mean()) < 0.02
    torch.testing.assert_close(A.var(), torch.tensor(0.2, dtype=torch.float64), rtol=0.05, atol=0)
    again = algebra.random(5, 40, 60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(A, again)


@pytest.mark.parametrize(
    "make",
    [
        algebra.complex_numbers,
        algebra.quaternions,
        algebra.octonions,
        lambda **options: algebra.clifford(1, 1, **options),
        lambda **options: algebra.random(2, 3, 4, **options),
    ],
)
def test_dtype_and_device(make):
    assert make().dtype == torch.float64
    assert make(dtype=torch.float16).dtype == torch.float16
    assert make(device="meta").device.type == "meta"


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"p=-1 must be an integer >= 0"):
        algebra.clifford(-1, 0)
    with pytest.raises(TypeError, match=r"q=0.5 must be an integer >= 0, not float"):
        algebra.clifford(0, 0.5)
    with pytest.raises(ValueError, match=r"Q=0 must be an integer >= 1"):
        algebra.random(2, 2, 0)


@pytest.mark.parametrize("make", [algebra.quaternions, lambda **o: algebra.clifford(1, 1, **o)])
def test_default_device_is_followed_and_can_be_overruled(make):
    with torch.device("meta"):
        assert make().is_meta
        assert torch.equal(make(device="cpu"), make(device="cpu"))
    assert make().device.type == "cpu"
