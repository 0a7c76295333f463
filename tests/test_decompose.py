"""Bilinear algorithms of structure tensors: exact, of the known ranks, reproducible, and never unverified."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phydi_kernels import algebra
from phydi_kernels.algebra import DecompositionError, _search, decompose, decompose_many, generic_rank


def contract(U: torch.Tensor, V: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ri,rk,rl->ikl", U, V, W)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted(rank: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return contract(*(normal(rank, d, seed=seed + 10 * i) for i, d in enumerate(shape)))


def check(A: torch.Tensor, found: algebra.BilinearAlgorithm, max_growth: float = 8.0) -> None:
    """The algorithm is exact, and what it says of itself is so."""
    A = A.double()
    assert [tuple(f.shape) for f in (found.U, found.V, found.W)] == [(found.rank, d) for d in A.shape]
    assert {f.dtype for f in (found.U, found.V, found.W)} == {torch.float64}
    size = A.abs().max()
    residual = ((contract(found.U / size, found.V, found.W) - A / size).norm() / (A / size).norm()).item()
    assert residual <= 1e-12
    assert found.residual == pytest.approx(residual, abs=1e-14)
    terms = zip(found.U / size, found.V, found.W, strict=True)
    growth = sum((u.norm() * v.norm() * w.norm()).item() for u, v, w in terms) / (A / size).norm().item()
    assert found.growth == pytest.approx(growth, rel=1e-12)
    assert growth <= max_growth * (1 + 1e-9)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((1, 1, 1), 1),
        ((1, 5, 3), 3),
        ((2, 2, 2), 3),
        ((3, 3, 3), 5),
        ((4, 4, 4), 7),
        ((5, 5, 5), 10),
        ((6, 6, 6), 14),
        ((8, 8, 8), 24),
        ((16, 16, 16), 90),
        ((2, 3, 3), 4),
        ((4, 2, 3), 4),
        ((2, 2, 7), 4),
        ((3, 5, 5), 8),
        ((3, 7, 7), 11),
        ((5, 3, 3), 6),
    ],
)
def test_generic_rank(shape, rank):
    assert generic_rank(*shape) == rank
    assert generic_rank(*shape[::-1]) == rank


@pytest.mark.parametrize("shape", [(n, P, Q) for Q in range(1, 7) for P in range(1, Q + 1) for n in range(1, P + 1)])
def test_generic_rank_against_the_tangent_spaces(shape):
    # Terracini's lemma: almost every complex tensor has rank R once the tangent spaces of R random terms span all.
    def spans(rank: int) -> bool:
        U, V, W = (normal(rank, d, seed=i) for i, d in enumerate(shape))
        eyes = [torch.eye(d, dtype=torch.float64) for d in shape]
        tangents = [
            torch.einsum("xi,rk,rl->rxikl", eyes[0], V, W),
            torch.einsum("ri,xk,rl->rxikl", U, eyes[1], W),
            torch.einsum("ri,rk,xl->rxikl", U, V, eyes[2]),
        ]
        J = torch.cat([t.flatten(2).flatten(0, 1) for t in tangents])
        return int(torch.linalg.matrix_rank(J)) == math.prod(shape)

    a, b, c = sorted(shape)
    two_typical_ranks = a > 1 and c == (a - 1) * (b - 1) + 1
    rank = generic_rank(*shape) - two_typical_ranks
    assert spans(rank)
    assert rank == 1 or not spans(rank - 1)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_tensors_have_their_generic_rank(n, seed):
    A = normal(n, n, n, seed=seed)
    found = decompose(A)
    check(A, found)
    assert found.rank in ((2, 3) if n == 2 else (generic_rank(n, n, n),))


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 2, 4), (4, 6, 2), (3, 5, 5), (5, 3, 3), (2, 4, 4), (9, 2, 9)])
def test_rectangular_tensors(shape):
    A = normal(*shape)
    found = decompose(A)
    check(A, found)
    assert found.rank <= generic_rank(*shape)


def test_many_starts_are_tried_before_a_rank_is_given_up():
    started = []
    with pytest.raises(DecompositionError):
        decompose(normal(4, 4, 4), 6, progress=lambda rank, starts, residual: started.append((rank, starts)))
    assert {rank for rank, _ in started} == {6}
    assert max(starts for _, starts in started) >= 100


def test_more_terms_are_tried_where_the_growth_is_too_large():
    # A border rank of 2 and a rank of 3: at rank 2 there are approximations, whose terms grow without limit.
    A = torch.zeros(2, 2, 2, dtype=torch.float64)
    A[0, 0, 1] = A[0, 1, 0] = A[1, 0, 0] = 1
    found = decompose(A)
    check(A, found)
    assert found.rank == 3
    with pytest.raises(DecompositionError, match=r"no algorithm of rank 2 has a residual <= 1e-12 and a growth <= 8"):
        decompose(A, 2)


@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (algebra.complex_numbers, 3),
        (algebra.quaternions, 8),
        (lambda: algebra.clifford(0, 0), 1),
        (lambda: algebra.clifford(1, 0), 2),
        (lambda: algebra.clifford(2, 0), 7),
        (lambda: algebra.clifford(1, 1), 7),
        (lambda: algebra.clifford(3, 0), 21),
        (lambda: algebra.clifford(2, 1), 14),
        (lambda: algebra.clifford(1, 2), 21),
        (lambda: algebra.clifford(0, 3), 16),
        (lambda: algebra.clifford(4, 0), 56),
        (lambda: algebra.clifford(3, 1), 56),
        (lambda: algebra.clifford(2, 2), 56),
        (lambda: algebra.clifford(1, 3), 56),
        (lambda: algebra.clifford(0, 4), 56),
    ],
)
def test_clifford_algebras_have_closed_forms(make, rank):
    A = make()
    calls = []
    for scale in (1.0, -0.3):
        found = decompose(scale * A, progress=lambda *call: calls.append(call))
        check(scale * A, found, max_growth=max(8.0, 1.5 * A.shape[0]))
        assert found.rank == rank
    assert calls == []


def test_small_known_algorithms_are_exact():
    for A in (algebra.complex_numbers(), algebra.quaternions(), algebra.clifford(1, 0), algebra.clifford(1, 1)):
        found = decompose(A)
        assert torch.equal(contract(found.U, found.V, found.W), A)


def test_octonions():
    found = decompose(2.5 * algebra.octonions())
    check(2.5 * algebra.octonions(), found, max_growth=12.0)
    assert found.rank == 26


def test_a_table_that_is_no_clifford_algebra_is_searched():
    A = algebra.quaternions()
    A[1, 0, 1] = 1
    check(A, decompose(A))


def test_matrix_product_in_another_basis_needs_seven_terms():
    A = torch.einsum("ikl,ia,kb,lc->abc", algebra.clifford(1, 1), *(normal(4, 4, seed=s) for s in range(3)))
    found = decompose(A)
    check(A, found)
    assert found.rank == 7


@pytest.mark.parametrize(("n", "rank"), [(3, 3), (4, 2), (4, 4), (4, 5), (4, 6), (6, 6)])
def test_fewer_terms_than_the_generic_rank_are_found(n, rank):
    A = planted(rank, n, n, n)
    found = decompose(A)
    check(A, found)
    assert found.rank == rank


@pytest.mark.parametrize("shape", [(1, 4, 6), (5, 1, 3), (2, 3, 1), (1, 1, 1), (1, 100, 90)])
def test_one_slice_is_its_singular_value_decomposition(shape):
    A = normal(*shape)
    found = decompose(A)
    check(A, found, max_growth=max(8.0, 1.5 * math.sqrt(shape[1])))
    singular = torch.linalg.svdvals(A.squeeze()) if min(shape) > 1 or shape.count(1) == 1 else A.norm()[None]
    assert found.rank == len(singular)
    torch.testing.assert_close(torch.tensor(found.growth), (singular.sum() / A.norm()).float())


def test_slices_of_one_term_each_need_no_search():
    A = torch.zeros(3, 3, 3, dtype=torch.float64)
    A[range(3), range(3), range(3)] = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    calls = []
    found = decompose(A, progress=lambda *call: calls.append(call))
    check(A, found)
    assert (found.rank, calls) == (3, [])


def test_one_orthogonal_slice_may_grow_as_it_must():
    A = torch.eye(100, dtype=torch.float64)[None]
    assert decompose(A).growth == pytest.approx(10.0)


def test_zero():
    for rank in (None, 4):
        found = decompose(torch.zeros(3, 2, 4), rank)
        assert (found.rank, found.residual, found.growth) == (rank or 1, 0.0, 0.0)
        assert not contract(found.U, found.V, found.W).any()


def repeated_term(A):
    A[3] = A[2]


def zero_term(A):
    A[1] = 0


def deficient_in_every_mode(A):
    A[3] = A[0] - A[1]
    A[:, 1] = 2 * A[:, 2]
    A[:, :, 0] = 0


def slices_of_rank_one(A):
    A.copy_(torch.einsum("ik,il->ikl", A[0], A[1]))


def one_entry(A):
    A.zero_()[1, 2, 3] = -7


def nearly_repeated_term(A):
    A[3] = A[2] + 1e-6 * A[3]


@pytest.mark.parametrize(
    ("degrade", "rank"),
    [
        (repeated_term, 6),
        (zero_term, 6),
        (deficient_in_every_mode, 5),
        (slices_of_rank_one, 4),
        (one_entry, 1),
        (nearly_repeated_term, 8),
    ],
)
def test_degenerate_tensors(degrade, rank):
    A = normal(4, 4, 4)
    degrade(A)
    found = decompose(A)
    check(A, found)
    assert found.rank <= rank


@given(st.tuples(*[st.integers(1, 4)] * 3).flatmap(lambda shape: st.tuples(st.just(shape), entries(math.prod(shape)))))
def test_small_integers(drawn):
    shape, values = drawn
    A = torch.tensor(values, dtype=torch.float64).reshape(shape)
    found = decompose(A)
    if not A.any():
        assert found.rank == 1
        return
    check(A, found)
    unfoldings = [A.movedim(mode, 0).flatten(1) for mode in range(3)]
    assert found.rank >= max(int(torch.linalg.matrix_rank(unfolding)) for unfolding in unfoldings)
    smaller, middle, _ = sorted(shape)
    assert found.rank <= smaller * middle


def entries(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-2, 2), min_size=count, max_size=count)


@given(st.integers(1, 5), st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 2**32 - 1), st.floats(-200, 200))
def test_sums_of_terms_of_any_scale(rank, shape, seed, exponent):
    A = planted(rank, *shape, seed=seed) * 10.0**exponent
    found = decompose(A)
    check(A, found)
    assert found.rank <= generic_rank(*shape)


def test_more_entries_than_are_searched():
    A = normal(2, 65, 65)
    found = decompose(A)
    check(A, found, max_growth=1.5 * math.sqrt(130))
    assert found.rank == 130
    with pytest.raises(ValueError, match=r"rank=70 needs a search, which is limited to 8192 entries; A has 8450"):
        decompose(A, 70)


@pytest.mark.parametrize("rank", [7, 8, 16])
def test_exactly_the_rank_asked_for(rank):
    A = normal(4, 4, 4)
    found = decompose(A, rank)
    check(A, found)
    assert found.rank == rank


def test_terms_of_zero_fill_up_a_closed_form():
    found = decompose(algebra.quaternions(), 10)
    check(algebra.quaternions(), found)
    assert found.rank == 10
    assert not found.U[8:].any()


@pytest.mark.parametrize(("A", "rank"), [(algebra.quaternions(), 7), (normal(4, 4, 4), 6), (normal(1, 4, 4), 3)])
def test_a_rank_that_is_too_small_raises_with_the_least_residual(A, rank):
    with pytest.raises(DecompositionError, match=f"no algorithm of rank {rank} has a residual <= 1e-12") as raised:
        decompose(A, rank)
    assert raised.value.rank == rank
    assert 1e-4 < raised.value.residual < 1
    assert f"least residual {raised.value.residual:.1e}, with growth {raised.value.growth:.3g}" in str(raised.value)


def test_a_growth_that_is_too_large_raises():
    # The nuclear norm of an identity is the least growth of any algorithm.
    with pytest.raises(DecompositionError, match=r"rank 4 does not pass: residual .* growth 2 \(allowed 1.9\)"):
        decompose(torch.eye(4)[None], max_growth=1.9)


def test_what_cannot_be_verified_is_never_returned(monkeypatch):
    contract_batch = _search._contract
    monkeypatch.setattr(_search, "_contract", lambda X: contract_batch(X) / (1 + 1e-11))
    with pytest.raises(DecompositionError, match=r"does not pass: residual 1.0e-11 \(allowed 1e-12\)") as raised:
        decompose(normal(3, 3, 3))
    assert raised.value.residual == pytest.approx(1e-11, rel=1e-2)


def test_the_slices_remain_where_every_start_fails(monkeypatch):
    monkeypatch.setattr(_search, "_step", lambda A, T, X, ridge, damping: tuple(x * math.nan for x in X))
    A = normal(3, 3, 3)
    found = decompose(A)
    check(A, found)
    assert found.rank == 9


def same(one: algebra.BilinearAlgorithm, two: algebra.BilinearAlgorithm) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in "UVW")


def test_the_seed_decides(threads):
    A = normal(5, 5, 5)
    threads(1)
    before = torch.get_rng_state()
    one = decompose(A, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert same(one, decompose(A, seed=3))
    other = decompose(A, seed=4)
    check(A, other)
    assert not same(one, other)


def test_the_number_of_threads_does_not(threads):
    # 8 x 8 x 8 is large enough for LAPACK and BLAS to use the second thread.
    A = normal(8, 8, 8)
    threads(1)
    one = decompose(A, 24)
    threads(2)
    assert same(one, decompose(A, 24))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_values_of_any_dtype_are_met_in_float64(dtype):
    A = normal(3, 3, 3).to(dtype).requires_grad_()
    found = decompose(A)
    check(A.detach(), found)
    assert not found.U.requires_grad


def test_strided_tensors():
    A = normal(4, 6, 8)[::2, ::2].transpose(0, 2)
    assert same(decompose(A), decompose(A.contiguous()))


def test_progress_reports_the_residual():
    calls = []
    found = decompose(normal(4, 4, 4), 7, progress=lambda *call: calls.append(call))
    assert all(rank == 7 and 1 <= starts <= 128 and residual >= 0 for rank, starts, residual in calls)
    assert calls[-1][2] <= 1e-12
    assert found.rank == 7


def test_many_tensors():
    A, B = normal(3, 3, 3, seed=1), normal(3, 3, 3, seed=2)
    calls = []
    found = decompose_many(torch.stack([A, B, A]), seed=5, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert found[2] is found[0]
    assert same(found[0], decompose(A, seed=5))
    assert same(found[1], decompose(B, seed=5))
    mixed = decompose_many([A, normal(2, 3, 4), algebra.quaternions()])
    assert [f.rank for f in mixed] == [5, 4, 8]
    assert decompose_many([]) == []


def test_zero_of_two_shapes_is_not_the_same_tensor():
    one, two = decompose_many([torch.zeros(2, 3, 4), torch.zeros(4, 3, 2)])
    assert one.U.shape == (1, 2)
    assert two.U.shape == (1, 4)


@pytest.mark.parametrize(
    ("A", "options", "error", "message"),
    [
        (normal(4, 4, 4), {"rank": 0}, ValueError, r"rank=0 must be an integer >= 1"),
        (normal(4, 4, 4), {"rank": 17}, ValueError, r"rank=17 must be at most n\*min\(P, Q\) = 16 for A \(4, 4, 4\)"),
        (normal(2, 3, 5), {"rank": 7}, ValueError, r"rank=7 must be at most n\*min\(P, Q\) = 6 for A \(2, 3, 5\)"),
        (normal(4, 4, 4), {"rank": 7.0}, TypeError, r"rank=7.0 must be an integer >= 1, not float"),
        (normal(4, 4, 4), {"seed": -1}, ValueError, r"seed=-1 must be an integer >= 0"),
        (normal(4, 4, 4), {"starts": 0}, ValueError, r"starts=0 must be an integer >= 1"),
        (normal(4, 4, 4), {"max_growth": 0.0}, ValueError, r"max_growth=0.0 must be positive"),
        (normal(4, 4, 4), {"max_growth": math.nan}, ValueError, r"max_growth=nan must be a finite number"),
        (normal(4, 4), {}, ValueError, r"A has shape \(4, 4\); it must be \(n, P, Q\) without an empty dimension"),
        (normal(2, 2, 2, 2), {}, ValueError, r"A has shape \(2, 2, 2, 2\); it must be \(n, P, Q\)"),
        (normal(4, 0, 4), {}, ValueError, r"A has shape \(4, 0, 4\); .* without an empty dimension"),
        (torch.full((2, 2, 2), math.nan), {}, ValueError, r"A must be finite, and it holds NaN or infinity"),
        (torch.full((2, 2, 2), math.inf), {}, ValueError, r"A must be finite, and it holds NaN or infinity"),
        (torch.ones(2, 2, 2, dtype=torch.complex64), {}, TypeError, r"A has dtype torch.complex64; it must be real"),
        (torch.ones(2, 2, 2, dtype=torch.int64), {}, TypeError, r"A has dtype torch.int64; it must be real and"),
        (torch.ones(2, 2, 2, device="meta"), {}, ValueError, r"A is on the meta device"),
        ([[[1.0]]], {}, TypeError, r"A must be a torch.Tensor, not list"),
    ],
)
def test_bad_arguments(A, options, error, message):
    with pytest.raises(error, match=message):
        decompose(A, **options)


def test_bad_arguments_of_many():
    with pytest.raises(ValueError, match=r"tensors has shape \(3, 3, 3\); it must be \(count, n, P, Q\)"):
        decompose_many(normal(3, 3, 3))
    with pytest.raises(ValueError, match=r"tensors\[1\] has shape \(3, 3\); it must be \(n, P, Q\)"):
        decompose_many([normal(3, 3, 3), normal(3, 3)])
    with pytest.raises(ValueError, match=r"P=0 must be an integer >= 1"):
        generic_rank(2, 0, 2)
    with pytest.raises(TypeError, match=r"n=2.0 must be an integer >= 1, not float"):
        generic_rank(2.0, 2, 2)
