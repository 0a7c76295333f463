"""plans_cuda.py is a pure function of sizes, types and capability, and chooses only what the kernels take."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phydi_kernels import plans_cuda
from phydi_kernels.plans_cuda import CudaPlan

CAPABILITIES = (80, 86, 89, 90, 100, 103, 120, 121)
TYPES = ((torch.bfloat16, False), (torch.float16, True), (torch.float32, False), (torch.float32, True))
# Features (out, in) of the projections of large language models, and the ranks of their algebras.
PROJECTIONS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
RANKS = {2: 3, 4: 7, 8: 24}
POWERS = [2**e for e in range(17)]

LINEAR = {CudaPlan.STREAM, CudaPlan.BUILT}
SUPPORTED = {"dtype": torch.bfloat16, "capability": 90}
BLOCKS = {"n": 4, "P": 4, "Q": 4}
# Each function, a call of it that is computed by kernels, and the most blocks that it takes.
CALLS = {
    plans_cuda.phm_linear: ({**BLOCKS, **SUPPORTED, "rows": 64, "p": 32, "q": 32, "tf32": False}, 32),
    plans_cuda.weight_grad: ({**BLOCKS, **SUPPORTED, "size": 4096}, 32),
    plans_cuda.phm_linear_weight_grad: ({**BLOCKS, **SUPPORTED, "size": 4096}, 32),
    plans_cuda.phm_linear_factored: (
        {**BLOCKS, **SUPPORTED, "rows": 64, "p": 32, "q": 32, "R": 7, "combines": True, "tf32": False},
        32,
    ),
    plans_cuda.factored_grad: ({**BLOCKS, **SUPPORTED, "R": 7, "size": 4096}, 32),
    plans_cuda.phc_conv: (
        {**BLOCKS, **SUPPORTED, "outputs": 64, "p": 32, "q": 32, "kernel": (3, 3), "tf32": False},
        32,
    ),
    plans_cuda.phc_conv_factored: (
        {
            **{**BLOCKS, **SUPPORTED, "pixels": 64, "outputs": 64, "p": 32, "q": 32, "kernel": (3, 3), "R": 7},
            **{"combines": True, "tf32": False},
        },
        32,
    ),
}


def _name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.fixture(params=CALLS, ids=_name)
def call(request):
    function = request.param
    arguments, most = CALLS[function]
    assert set(arguments) == set(inspect.signature(function).parameters)
    return function, arguments, most


def _features(n: int):
    return [(out // n, given // n) for out, given in PROJECTIONS]


@pytest.mark.parametrize(
    ("capability", "architecture"),
    (
        (0, 0),
        (75, 0),
        (80, 80),
        (86, 80),
        (89, 89),
        (90, 90),
        (100, 100),
        (103, 100),
        (110, 100),
        (120, 120),
        (121, 120),
    ),
)
def test_architecture_is_the_newest_that_a_card_is_at_least(capability, architecture):
    assert plans_cuda.architecture(capability) == architecture


def test_types_of_products():
    classes = [plans_cuda.dtype_class(dtype, tf32) for dtype, tf32 in TYPES]
    assert classes == ["16-bit", "16-bit", "ieee", "tf32"]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_supported_calls_are_computed_by_kernels(call, dtype, capability):
    function, arguments, _ = call
    assert function(**{**arguments, "dtype": dtype, "capability": capability}) is not CudaPlan.COMPOSED


@pytest.mark.parametrize(
    "change",
    ({"dtype": torch.float64}, {"dtype": None}, {"dtype": torch.complex64}, {"capability": 75}, {"capability": 0}),
    ids=str,
)
def test_other_types_and_older_cards_are_composed(call, change):
    function, arguments, _ = call
    assert function(**{**arguments, **change}) is CudaPlan.COMPOSED


def test_number_of_blocks_and_empty_features(call):
    function, arguments, most = call
    blocks = [name for name in ("n", "P", "Q", "R") if name in arguments]
    for name in blocks:
        assert function(**{**arguments, name: most}) is not CudaPlan.COMPOSED, name
        # Products of torch's own mix any number of blocks.
        mixes = function is plans_cuda.phm_linear and name == "Q"
        expected = CudaPlan.MIX if mixes else CudaPlan.COMPOSED
        assert function(**{**arguments, name: most + 1}) is expected, name
    empty = [name for name in ("p", "q", "size") if name in arguments]
    for name in blocks + empty:
        assert function(**{**arguments, name: 0}) is CudaPlan.COMPOSED, name


@pytest.mark.parametrize("dtype, tf32", TYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_few_rows_stream_the_weights(capability, dtype, tf32):
    """A product of a few rows is bound by reading F, which no other plan reads once."""
    for n, R in RANKS.items():
        for p, q in _features(n):
            for rows in (1, 4, 16):
                assert plans_cuda.phm_linear(rows, n, n, n, p, q, dtype, tf32, capability) is CudaPlan.STREAM
            for combines in (False, True):
                sizes = (1, n, n, n, p, q, R, combines)
                assert plans_cuda.phm_linear_factored(*sizes, dtype, tf32, capability) is CudaPlan.STREAM


@pytest.mark.parametrize("dtype, tf32", TYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_many_rows_form_panels_or_multiply_ranks(capability, dtype, tf32):
    """R products cost R / n^2 of the dense one, where those of a panel cost as much, and so do those of stream."""
    for p, q in _features(4):
        dense = plans_cuda.phm_linear(8192, 4, 4, 4, p, q, dtype, tf32, capability)
        # Up to Ada tensor cores bind a product of ours as they do the library's.
        assert dense is CudaPlan.BUILT or (dense is CudaPlan.STREAM and capability not in (90, 100, 103))
        plan = plans_cuda.phm_linear_factored(8192, 4, 4, 4, p, q, 7, False, dtype, tf32, capability)
        assert plan not in LINEAR
        if capability in (90, 100) and dtype is torch.bfloat16:
            assert plan is CudaPlan.PASSES


@pytest.mark.parametrize("dtype, tf32", TYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_more_rows_never_go_back_to_stream(capability, dtype, tf32):
    """But for what the last wave of tiles, which counts whole, makes of a tie with the dense product by panels."""
    for n, R in RANKS.items():
        for p, q in _features(n):
            sizes = (n, n, n, p, q)
            chosen = [plans_cuda.phm_linear_factored(rows, *sizes, R, True, dtype, tf32, capability) for rows in POWERS]
            later = [plan is not CudaPlan.STREAM for plan in chosen]
            assert later == sorted(later) and not later[0]
            costs = plans_cuda._Costs(dtype, tf32, capability)
            dense = [plans_cuda._linear_costs(costs, rows, *sizes) for rows in POWERS]
            ratios = [plans.pop(CudaPlan.STREAM) / min(plans.values()) for plans in dense]
            assert ratios[0] < 1
            left = next((i for i, ratio in enumerate(ratios) if ratio > 1), len(ratios))
            assert all(ratio > 0.9 for ratio in ratios[left:])


_blocks = st.integers(1, 40)
_features_of_block = st.integers(1, 5000)
_kernel = st.one_of(
    st.just(()), *(st.tuples(*[st.integers(1, 11)] * dimensions) for dimensions in (1, 2)), st.just((1, 1, 1))
)
_type = st.sampled_from([*TYPES, (torch.float64, False), (None, False)])
_capability = st.sampled_from((0, 75, *CAPABILITIES))


def _check_factored(plan: CudaPlan, n: int, P: int, Q: int, R: int, dtype, capability: int, dense: bool) -> None:
    supported = dtype in (torch.float32, torch.bfloat16, torch.float16) and capability >= 80
    assert (plan is CudaPlan.COMPOSED) == (not supported or max(n, P, Q, R) > 32)
    if plan in (CudaPlan.FUSED, CudaPlan.EPILOGUE):
        assert P <= 4
    if plan is CudaPlan.FUSED:
        assert Q <= 4
    if plan in LINEAR:
        assert dense and (plan is CudaPlan.BUILT or max(n, P, Q) <= 8)
    assert plan is not CudaPlan.MIX


@given(
    rows=st.integers(0, 10**6),
    blocks=st.tuples(*[_blocks] * 4),
    p=_features_of_block,
    q=_features_of_block,
    combines=st.booleans(),
    of_type=_type,
    capability=_capability,
)
def test_every_linear_layer_has_a_plan_that_takes_it(rows, blocks, p, q, combines, of_type, capability):
    n, P, Q, R = blocks
    dtype, tf32 = of_type
    plan = plans_cuda.phm_linear(rows, n, P, Q, p, q, dtype, tf32, capability)
    supported = dtype in (torch.float32, torch.bfloat16, torch.float16) and capability >= 80
    legal = set()
    if supported and max(n, P, Q) <= 32:
        legal |= LINEAR if max(n, P, Q) <= 8 else {CudaPlan.BUILT}
    if supported and n <= 32 and 4 * n <= Q:
        legal |= {CudaPlan.MIX}
    assert plan in (legal or {CudaPlan.COMPOSED})
    sizes = (rows, n, P, Q, p, q, R)
    plan = plans_cuda.phm_linear_factored(*sizes, combines, dtype, tf32, capability)
    _check_factored(plan, n, P, Q, R, dtype, capability, dense=True)
    size = n * p * q
    assert plans_cuda.factored_grad(n, P, Q, R, size, dtype, capability) is (
        CudaPlan.PASSES if supported and max(n, P, Q, R) <= 32 else CudaPlan.COMPOSED
    )
    of_weights = CudaPlan.PASSES if supported and max(n, P, Q) <= 32 else CudaPlan.COMPOSED
    assert plans_cuda.weight_grad(n, P, Q, size, dtype, capability) is of_weights
    mixes = supported and n <= 32 and 4 * n <= min(P, Q)
    plan = plans_cuda.phm_linear_weight_grad(n, P, Q, size, dtype, capability)
    assert plan is (CudaPlan.MIX if mixes else of_weights)


@pytest.mark.parametrize("dtype, tf32", TYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_one_term_of_many_blocks_is_mixed(capability, dtype, tf32):
    """A Kronecker product, as of LoKr: stream forms each F x_l once, but of eight blocks at most."""
    for rows in (1, 64, 4096):
        for P, Q, p, q in ((16, 16, 256, 256), (64, 64, 64, 64), (112, 64, 128, 64)):
            assert plans_cuda.phm_linear(rows, 1, P, Q, p, q, dtype, tf32, capability) is CudaPlan.MIX
        assert plans_cuda.phm_linear(rows, 1, 8, 8, 512, 512, dtype, tf32, capability) in (
            CudaPlan.STREAM,
            CudaPlan.MIX,
        )
    for P, Q in ((8, 8), (64, 64), (112, 64)):
        assert plans_cuda.phm_linear_weight_grad(1, P, Q, 4096, dtype, capability) is CudaPlan.MIX


@given(
    pixels=st.integers(0, 10**6),
    outputs=st.integers(0, 10**6),
    blocks=st.tuples(*[_blocks] * 4),
    p=_features_of_block,
    q=_features_of_block,
    kernel=_kernel,
    combines=st.booleans(),
    of_type=_type,
    capability=_capability,
)
def test_every_convolution_has_a_plan_that_takes_it(
    pixels, outputs, blocks, p, q, kernel, combines, of_type, capability
):
    n, P, Q, R = blocks
    dtype, tf32 = of_type
    implicit = 0 < len(kernel) < 3 and math.prod(kernel) <= 9
    supported = dtype in (torch.float32, torch.bfloat16, torch.float16) and capability >= 80
    plan = plans_cuda.phc_conv(outputs, n, P, Q, p, q, kernel, dtype, tf32, capability)
    if not supported or max(n, P, Q) > 32:
        assert plan is CudaPlan.COMPOSED
    else:
        assert plan in ((CudaPlan.BUILT, CudaPlan.STREAM) if kernel else (CudaPlan.MIX,))
        assert plan is not CudaPlan.STREAM or (implicit and max(n, P, Q) <= 8)
    sizes = (pixels, outputs, n, P, Q, p, q, kernel, R)
    plan = plans_cuda.phc_conv_factored(*sizes, combines, dtype, tf32, capability)
    _check_factored(plan, n, P, Q, R, dtype, capability, dense=False)
    assert implicit or plan in (CudaPlan.PASSES, CudaPlan.COMPOSED)


@pytest.mark.parametrize(
    ("kernel", "implicit"),
    (
        *(((1,), True), ((9,), True), ((10,), False), ((1, 1), True), ((3, 3), True), ((2, 5), False)),
        *(((5, 5), False), ((1, 1, 1), False), ((3, 3, 3), False), ((), False)),
    ),
)
def test_kernels_of_few_taps_are_implicit(kernel, implicit):
    """No input gradient of a stride is, for which the kernel is ()."""
    expected = CudaPlan.STREAM if implicit else CudaPlan.BUILT if kernel else CudaPlan.MIX
    assert plans_cuda.phc_conv(64, 4, 4, 4, 64, 1, kernel, torch.bfloat16, False, 90) is expected
    sizes = (4096, 4096, 4, 4, 4, 64, 8, kernel, 7)
    plan = plans_cuda.phc_conv_factored(*sizes, False, torch.bfloat16, False, 90)
    assert (plan is not CudaPlan.PASSES) == implicit


def test_large_algebras_are_not_streamed():
    """A tile of stream holds at most eight blocks."""
    for name in BLOCKS:
        blocks = {**BLOCKS, name: 9}
        few = {"rows": 1, "p": 1024, "q": 1024, "R": 7, "combines": False, "tf32": False}
        plan = plans_cuda.phm_linear_factored(**blocks, **SUPPORTED, **few)
        assert plan is not CudaPlan.STREAM
        for changed, expected in ((8, CudaPlan.STREAM), (9, CudaPlan.BUILT)):
            small = {"outputs": 64, "p": 64, "q": 8, "kernel": (1, 1), "tf32": False}
            assert plans_cuda.phc_conv(**{**BLOCKS, name: changed}, **SUPPORTED, **small) is expected


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_activations_that_outweigh_the_weights_are_read_once(capability):
    """X-hat and Y-hat of many narrow rows cost more than the library's faster product saves."""
    for P, Q, expected in ((4, 4, CudaPlan.FUSED), (4, 5, CudaPlan.EPILOGUE), (5, 4, CudaPlan.PASSES)):
        sizes = (4096, 4096, 4, P, Q, 64, 8, (1,), 7)
        assert plans_cuda.phc_conv_factored(*sizes, False, torch.float16, False, capability) is expected


def test_weights_to_combine_speak_for_the_plans_of_A():
    """stream and built read F itself: where weights to combine change the plan, they change it to one of these."""
    changed = 0
    for n, rows in itertools.product(RANKS, POWERS):
        for p, q in _features(n):
            sizes = (rows, n, n, n, p, q, RANKS[n])
            without, combining = (
                plans_cuda.phm_linear_factored(*sizes, combines, torch.bfloat16, False, 90)
                for combines in (False, True)
            )
            assert without is combining or combining in LINEAR
            changed += without is not combining
    assert changed


def test_blocks_of_a_stream_fill_up_powers_of_two():
    assert [plans_cuda.stream_size(3, Q) for Q in range(1, 9)] == [3, 6, 12, 12, 24, 24, 24, 24]
    assert plans_cuda.stream_size(0, 4) == 0


@pytest.mark.parametrize(
    ("M", "rows"),
    ((0, 16), (1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (128, 128), (129, 256), (10**6, 256)),
)
def test_rows_of_a_tile(M, rows):
    assert plans_cuda.stream_tile(M, 4, 4, 4, 1024, 512) == rows
    assert plans_cuda.stream_tile(M, 4, 4, 4, 32, 16) == rows


@pytest.mark.parametrize(
    "sizes",
    ((4, 4, 8, 64, 64), (4, 2, 4, 64, 64), (1, 4, 4, 64, 64), (4, 4, 4, 65, 64), (4, 4, 4, 64, 3), (4, 4, 4, 16, 64)),
)
def test_other_sizes_have_small_tiles(sizes):
    """Several numbers of blocks, sizes that 16 does not divide, and few features."""
    assert plans_cuda.stream_tile(10**4, *sizes) == 0


@given(
    M=st.integers(0, 10**5),
    N=_features_of_block,
    q=_features_of_block,
    tile=st.tuples(*[st.sampled_from((16, 32, 64, 128))] * 3),
    capability=st.sampled_from(CAPABILITIES),
)
def test_splits_fill_the_card_and_no_more(M, N, q, tile, capability):
    splits = plans_cuda.stream_splits(M, N, q, tile, capability)
    rows, columns, step = tile
    tiles = max(1, math.ceil(M / rows) * math.ceil(N / columns))
    processors = plans_cuda.CARDS[plans_cuda.architecture(capability)].processors
    # One part holds a step at least, and combine adds 32 of them.
    assert 1 <= splits <= min(math.ceil(q / step), 32)
    assert splits == 1 or tiles * splits <= processors
    # One part more is more than the card has room for, or there is none.
    more = splits + 1
    assert tiles * more > processors or more > min(math.ceil(q / step), 32)


def test_split_sums_of_a_decoded_token():
    """4096 features of n = 4: 32 tiles of 32 for each i, four parts of 256 on the 132 processors of an H100."""
    assert plans_cuda.stream_splits(4, 4096, 1024, (16, 128, 64), 90) == 4
    assert plans_cuda.stream_splits(4, 4096, 1024, (16, 128, 64), 80) == 3
    assert plans_cuda.stream_splits(4, 4096, 128, (16, 128, 64), 90) == 2
    assert plans_cuda.stream_splits(4, 256, 8192, (16, 128, 64), 90) == 32
