"""phm_embedding and PHMEmbedding against rows of the table that they never form."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from dense_twins import TOLERANCE, Record, randomize
from helpers import normal
from op_cases import dense_weight
from torch import nn

from phydi_kernels import algebra, functional
from phydi_kernels.nn import PHMEmbedding

# (n, P, Q, p, q): those of layers have n = P = Q.
SIZES = [(1, 1, 1, 6, 5), (2, 2, 2, 3, 4), (3, 3, 3, 2, 1), (4, 4, 4, 5, 3), (1, 4, 2, 3, 5), (2, 3, 5, 4, 1)]
each_size = pytest.mark.parametrize(("n", "P", "Q", "p", "q"), SIZES)
each_index_dtype = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])

OPTIONS = {
    "A": {},
    "weighted": {"kron_weights": True},
    "terms": {"algebra_rank": 5},
    "weighted_terms": {"algebra_rank": "generic", "kron_weights": True},
    "quaternions": {"init": algebra.quaternions(), "learn_algebra": False},
}
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def parameters(n, P, Q, p, q, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return normal((n, P, Q), 0).to(dtype).requires_grad_(), normal((n, p, q), 1).to(dtype).requires_grad_()


def draw_indices(rows: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def test_a_row_by_hand():
    """E = A_1 (x) F_1, row 3 = 1*2 + 1: block 1 of two rows."""
    A = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    F = torch.tensor([[[1.0, 10.0, 100.0], [5.0, 6.0, 7.0]]])
    y = functional.phm_embedding(torch.tensor(3), A, F)
    assert y.tolist() == [15.0, 18.0, 21.0, 20.0, 24.0, 28.0]


@each_size
@each_index_dtype
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 0), (2, 1, 3)], ids=str)
def test_rows_of_the_table(n, P, Q, p, q, index_dtype, shape):
    A, F = parameters(n, P, Q, p, q)
    index = draw_indices(P * p, *shape, dtype=index_dtype)
    y = functional.phm_embedding(index, A, F)
    expected = nn.functional.embedding(index.long(), dense_weight(A, F))
    assert y.shape == (*shape, Q * q)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    weights = normal(y.shape, 3)
    grads = torch.autograd.grad((y * weights).sum(), (A, F))
    for actual, reference in zip(grads, torch.autograd.grad((expected * weights).sum(), (A, F)), strict=True):
        torch.testing.assert_close(actual, reference, **TOLERANCE)


@each_size
def test_every_row_of_the_table(n, P, Q, p, q):
    A, F = parameters(n, P, Q, p, q)
    index = torch.arange(P * p)
    torch.testing.assert_close(functional.phm_embedding(index, A, F), dense_weight(A, F), **TOLERANCE)
    strided = torch.stack([index, index.flip(0)], -1)[:, 1]
    torch.testing.assert_close(functional.phm_embedding(strided, A, F), dense_weight(A, F).flip(0), **TOLERANCE)


@pytest.mark.parametrize("padding_idx", [None, 4, -1])
def test_second_derivatives(padding_idx):
    A, F = parameters(3, 3, 2, 4, 2)
    index = draw_indices(12, 2, 3)
    index[0, 0] = 12 - 1 if padding_idx == -1 else 4

    def call(A, F):
        return functional.phm_embedding(index, A, F, padding_idx=padding_idx)

    assert torch.autograd.gradcheck(call, (A, F))
    assert torch.autograd.gradgradcheck(call, (A, F))


@pytest.mark.parametrize(("padding_idx", "row"), [(0, 0), (7, 7), (19, 19), (-1, 19), (-20, 0)])
def test_padding_is_zero_and_has_no_gradient(padding_idx, row):
    A, F = parameters(4, 4, 4, 5, 3)
    index = torch.tensor([[row, 3], [row, row]])
    y = functional.phm_embedding(index, A, F, padding_idx=padding_idx)
    assert not y[0, 0].any() and not y[1].any()
    torch.testing.assert_close(y[0, 1], dense_weight(A, F)[3], **TOLERANCE)
    grads = torch.autograd.grad(y.sum(), (A, F))
    alone = torch.autograd.grad(functional.phm_embedding(index[0, 1], A, F).sum(), (A, F))
    for actual, expected in zip(grads, alone, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE)


@each_options
@pytest.mark.parametrize("padding_idx", [None, 2, -3])
def test_layer(options, padding_idx, device):
    layer = PHMEmbedding(12, 8, 4, padding_idx, **options, dtype=torch.float64)
    randomize(layer)
    assert layer.padding_idx == {None: None, 2: 2, -3: 9}[padding_idx]
    table = dense_weight(layer.structure(), layer.F)
    rows = [row for row in range(12) if row != layer.padding_idx]
    torch.testing.assert_close(layer.dense_weight()[rows], table[rows], **TOLERANCE)
    assert padding_idx is None or not layer.dense_weight()[padding_idx].any()
    index = torch.tensor([[0, 9, 2], [11, 9, 5]])
    padding = None if padding_idx is None else padding_idx % 12
    expected = table[index] * (1 if padding is None else (index != padding).unsqueeze(-1))
    learned = [p for p in layer.parameters() if p.requires_grad]
    weights = normal(expected.shape, 4)
    reference = torch.autograd.grad((expected * weights).sum(), learned)
    y = layer.to(device)(index.to(device))
    torch.testing.assert_close(y.cpu(), expected, **TOLERANCE)
    learned = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad((y * weights.to(device)).sum(), learned)
    for actual, of_table in zip(grads, reference, strict=True):
        torch.testing.assert_close(actual.cpu(), of_table, **TOLERANCE)


def test_parameters():
    assert {name: tuple(p.shape) for name, p in PHMEmbedding(12, 8, 4, kron_weights=True).named_parameters()} == {
        "A": (4, 4, 4),
        "F": (4, 3, 2),
        "kron_weights": (4,),
    }
    assert list(PHMEmbedding(12, 8, 4, algebra_rank=7).state_dict()) == ["U", "V", "W", "F"]
    assert repr(PHMEmbedding(12, 8, 4, 2)).startswith("PHMEmbedding(12, 8, n=4, padding_idx=2")


@each_options
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_standard_deviation_at_the_start(options, std):
    torch.manual_seed(0)
    tables = [PHMEmbedding(200, 64, 4, std=std, **options).dense_weight() for _ in range(60)]
    assert torch.stack(tables).square().mean().sqrt().item() == pytest.approx(std, rel=0.05)


def test_reset_parameters_draws_all_anew():
    layer = PHMEmbedding(4000, 64, 4, std=0.3, kron_weights=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(math.nan)
    layer.reset_parameters()
    assert layer.kron_weights.tolist() == [1.0] * 4
    assert layer.dense_weight().square().mean().sqrt().item() == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(("n", "P", "p", "Q", "q"), [(2, 400, 400, 16, 32), (1, 400, 400, 16, 32)])
def test_table_is_not_formed(n, P, p, Q, q):
    """1.6e5 rows of 512: 328 MB in float32. Nothing is larger than the parameters or n times the rows looked up."""
    A, F = torch.ones(n, P, Q, requires_grad=True), torch.ones(n, p, q, requires_grad=True)
    index = draw_indices(P * p, 100)
    with Record() as record:
        y = functional.phm_embedding(index, A, F, padding_idx=0)
        torch.autograd.grad(y.sum(), (A, F))
    assert any("embedding" in name or "index" in name for name in record.names)
    assert record.largest <= max(A.numel(), F.numel(), 100 * n * Q * q)


@each_index_dtype
@pytest.mark.parametrize(("bad", "low", "high"), [(12, 1, 12), (-1, -1, 1), (2**31 - 1, 1, 2**31 - 1)])
def test_index_out_of_range(bad, low, high, index_dtype):
    layer = PHMEmbedding(12, 8, 4)
    with pytest.raises(IndexError, match=rf"input holds indices from {low} to {high}; .* from 0 to 11"):
        layer(torch.tensor([[1, bad]], dtype=index_dtype))


FUNCTION_ERRORS = [
    ({"input": torch.ones(3)}, TypeError, "input has dtype torch.float32; .*torch.int32 or torch.int64"),
    ({"input": torch.ones(3, dtype=torch.bool)}, TypeError, "input has dtype torch.bool"),
    ({"input": torch.ones(3, dtype=torch.int16)}, TypeError, "input has dtype torch.int16"),
    ({"input": [1, 2]}, TypeError, "input must be a torch.Tensor, not list"),
    ({"A": [1, 2]}, TypeError, "A must be a .*Tensor, not list"),
    ({"F": None}, TypeError, "F must be a torch.Tensor, not NoneType"),
    ({"A": torch.ones(4, 4, 4, dtype=torch.float64)}, TypeError, "A has dtype torch.float64 but F has torch.float32"),
    ({"F": torch.ones(4, 3, 2, dtype=torch.int64)}, TypeError, "F has dtype torch.int64"),
    ({"F": torch.ones(3, 2)}, ValueError, r"F has shape \(3, 2\); it must be \(n, p, q\)"),
    ({"F": torch.ones(5, 3, 2)}, ValueError, r"A \(4, 4, 4\) and F \(5, 3, 2\) must have the same number of terms"),
    ({"A": torch.ones(4, 4)}, ValueError, r"A has shape \(4, 4\)"),
    ({"input": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, "input is on meta but F is on cpu"),
    ({"padding_idx": 12}, ValueError, "padding_idx=12 must be None or from -12 to 11"),
    ({"padding_idx": -13}, ValueError, "padding_idx=-13"),
    ({"padding_idx": 1.0}, TypeError, "padding_idx=1.0"),
]


@pytest.mark.parametrize(("given", "error", "message"), FUNCTION_ERRORS)
def test_errors_of_a_call(given, error, message):
    arguments = {"input": torch.tensor([1]), "A": torch.ones(4, 4, 4), "F": torch.ones(4, 3, 2), **given}
    with pytest.raises(error, match=message):
        functional.phm_embedding(**arguments)


LAYER_ERRORS = [
    (
        lambda: PHMEmbedding(10, 8, 4),
        ValueError,
        "num_embeddings=10 is not divisible by n=4; 8 and 12 are the nearest sizes that are",
    ),
    (lambda: PHMEmbedding(12, 7, 4), ValueError, "embedding_dim=7 is not divisible by n=4; 4 and 8 are the nearest"),
    (lambda: PHMEmbedding(12, 3, 4), ValueError, "embedding_dim=3 is not divisible by n=4; 4 is the smallest"),
    (lambda: PHMEmbedding(0, 8, 4), ValueError, "num_embeddings=0 must be an integer >= 1"),
    (lambda: PHMEmbedding(12, 8.0, 4), TypeError, "embedding_dim=8.0 must be an integer >= 1, not float"),
    (lambda: PHMEmbedding(12, 8, 0), ValueError, "n=0 must be an integer >= 1"),
    (lambda: PHMEmbedding(12, 8, 4, 12), ValueError, "padding_idx=12"),
    (lambda: PHMEmbedding(12, 8, 4, -13), ValueError, "padding_idx=-13"),
    (lambda: PHMEmbedding(12, 8, 4, 1.0), TypeError, "padding_idx=1.0"),
    (lambda: PHMEmbedding(12, 8, 4, std=0.0), ValueError, "std=0.0"),
    (lambda: PHMEmbedding(12, 8, 4, std=math.nan), ValueError, "std=nan"),
    (lambda: PHMEmbedding(12, 8, 4, std="1"), TypeError, "std='1'"),
    (lambda: PHMEmbedding(12, 8, 4, algebra_rank=17), ValueError, "algebra_rank=17"),
    (lambda: PHMEmbedding(12, 8, 4, init="xavier"), ValueError, "init='xavier'"),
    (lambda: PHMEmbedding(12, 8, 4, dtype=torch.int64), TypeError, "dtype=torch.int64"),
]


@pytest.mark.parametrize(("make", "error", "message"), LAYER_ERRORS)
def test_constructor_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@each_options
def test_copies_compute_the_same(options):
    layer = randomize(PHMEmbedding(12, 8, 4, 3, **options))
    index = draw_indices(12, 2, 5)
    y = layer(index)
    y.sum().backward()
    fresh = PHMEmbedding(12, 8, 4, 3, **options)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(index), y)


@pytest.mark.parametrize(("options", "padding_idx"), [("A", None), ("weighted_terms", 3)])
def test_compile_and_export(options, padding_idx):
    layer = randomize(PHMEmbedding(12, 8, 4, padding_idx, **OPTIONS[options]))
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(layer, (draw_indices(12, 4, 5),), dynamic_shapes=dynamic).module()
    index = draw_indices(12, 6, 5)
    y = layer(index)
    torch.testing.assert_close(compiled(index), y)
    torch.testing.assert_close(exported(index), y)
    learned = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(compiled(index).square().sum(), learned)
    for actual, expected in zip(grads, torch.autograd.grad(y.square().sum(), learned), strict=True):
        torch.testing.assert_close(actual, expected)


def test_vmap():
    """Over indices, over parameters, and gradients of each sample."""
    A, F = (torch.stack([t.detach(), 2 * t.detach() + 1]) for t in parameters(4, 4, 4, 5, 3))
    index = draw_indices(20, 2, 3)
    for dims in ((0, None, None), (None, 0, 0), (0, 0, 0), (1, None, None)):
        given = [t if dim is not None else t[0] for t, dim in zip((index, A, F), dims, strict=True)]
        mapped = torch.func.vmap(functional.phm_embedding, in_dims=dims)(*given)
        count = mapped.shape[0]
        rows = [[t if d is None else t.select(d, b) for t, d in zip(given, dims, strict=True)] for b in range(count)]
        expected = torch.stack([functional.phm_embedding(*row) for row in rows])
        torch.testing.assert_close(mapped, expected, **TOLERANCE)

    def loss(A, F, index):
        return functional.phm_embedding(index, A, F, padding_idx=4).pow(3).sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(A, F, index)
    looped = [torch.func.grad(loss, argnums=(0, 1))(*row) for row in zip(A, F, index, strict=True)]
    for actual, *expected in zip(grads, *looped, strict=True):
        torch.testing.assert_close(actual, torch.stack(expected), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype):
    layer = PHMEmbedding(64, 32, 4, dtype=dtype)
    double = copy.deepcopy(layer).double()
    # So many that a sum over the tokens in 16 bits would lose most of them.
    index = draw_indices(64, 20_000)
    y, exact = layer(index), double(index)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert ((y - exact).abs() <= exact.abs() * eps).all()
    # Powers of two, whose products are exact, and sums far below the largest float16.
    for t in (y, exact):
        (t.sum() / 256).backward()
    for name in ("A", "F"):
        actual, expected = getattr(layer, name).grad, getattr(double, name).grad
        assert actual.dtype == dtype
        assert (actual - expected).norm() <= eps * expected.norm()


@pytest.mark.parametrize("options", [{}, {"algebra_rank": 7}, {"kron_weights": True}])
def test_autocast_changes_nothing(options):
    layer = PHMEmbedding(64, 32, 4, **options)
    index = draw_indices(64, 50)
    expected, table = layer(index), layer.dense_weight()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(index)
        assert torch.equal(layer.dense_weight(), table)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


def test_index_out_of_range_under_vmap():
    layer = PHMEmbedding(12, 8, 4)
    with pytest.raises(IndexError, match="input holds an index out of range; indices must be from 0 to 11"):
        torch.vmap(layer)(torch.tensor([[0], [12]]))


def test_scale_of_the_published_start_is_its_own():
    with pytest.raises(ValueError, match='std=2.0 must be None with init="reference"'):
        PHMEmbedding(12, 8, 4, std=2.0, init="reference")


def test_meta_device():
    layer = PHMEmbedding(12, 8, 4, 1, device="meta", kron_weights=True)
    y = layer(torch.empty(2, 3, dtype=torch.int64, device="meta"))
    assert y.is_meta and y.shape == (2, 3, 8)
    concrete = layer.to_empty(device="cpu")
    concrete.reset_parameters()
    assert concrete(torch.tensor([1, 2])).isfinite().all()
