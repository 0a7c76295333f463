"""plans.py is a pure function of sizes that prefers what DESIGN says where it says it."""

from __future__ import annotations

import itertools

import pytest

from phydi_kernels import plans
from phydi_kernels.plans import LINEAR_PLANS, Plan

SIZES = tuple(itertools.product((0, 1, 8, 64, 2048), (1, 2, 4, 8), (1, 3, 33, 256, 1024)))


@pytest.mark.parametrize(("rows", "n", "p"), SIZES)
def test_every_size_has_a_plan(rows, n, p):
    for contiguous in (False, True):
        assert plans.phm_linear(rows, n, n, n, p, p, contiguous) in LINEAR_PLANS
    assert plans.phm_linear_weight_grad(rows, n, n, n, p, p) in (Plan.STREAM, Plan.MIX, Plan.PANEL)
    assert plans.phc_conv(rows, rows, n, n, n, p, p, 9) in (Plan.MIX, Plan.PANEL)
    assert plans.phc_conv_weight_grad(rows, rows, n, n, n, p, p, 9) in (Plan.MIX, Plan.PANEL)


@pytest.mark.parametrize("features", (512, 1024, 4096))
def test_one_row_streams_the_weights(features):
    """A matrix-vector product is bound by reading F: neither packing it nor forming H pays."""
    assert plans.phm_linear(1, 4, 4, 4, features // 4, features // 4, False) is Plan.STREAM


@pytest.mark.parametrize("features", (512, 1024, 4096))
def test_large_batches_form_panels(features):
    """n multiplications to form an entry of H vanish beside thousands of rows; mixing costs n products a row more."""
    assert plans.phm_linear(8192, 4, 4, 4, features // 4, features // 4, False) is Plan.PANEL
    assert plans.phm_linear_weight_grad(8192, 4, 4, 4, features // 4, features // 4) is Plan.PANEL


@pytest.mark.parametrize("isa", ("avx2", "avx512_bf16"))
@pytest.mark.parametrize("sizes", ((8, 8, 512, 512), (64, 64, 64, 64), (48, 64, 16, 172), (64, 48, 172, 16)), ids=str)
def test_one_term_of_many_blocks_is_mixed(sizes, isa):
    """A Kronecker product, as of LoKr: by mixing it takes 1/P or 1/Q of the dense layer's multiplications."""
    assert plans.phm_linear(1024, 1, *sizes, True, isa=isa) is Plan.MIX
    assert plans.phm_linear_weight_grad(1024, 1, *sizes, isa) is Plan.MIX


@pytest.mark.parametrize("sizes", ((8, 8, 512, 512), (64, 48, 172, 16), (3, 40, 2, 9), (40, 3, 9, 2)))
def test_weight_gradients_by_mixing_cost_the_same_transposed(sizes):
    P, Q, p, q = sizes
    rates = plans.RATES[plans.BEST_ISA]
    cost = plans.phm_linear_weight_grad_costs(64, 1, P, Q, p, q, rates)[Plan.MIX]
    assert plans.phm_linear_weight_grad_costs(64, 1, Q, P, q, p, rates)[Plan.MIX] == cost


@pytest.mark.parametrize("isa", ("avx2", "avx512_bf16"))
def test_short_blocks_form_panels(isa):
    """A block of a few features takes as long to start mixing as to mix, and there are n * P of them a row."""
    for rows in (64, 256, 2048):
        assert plans.phm_linear(rows, 8, 8, 8, 8, 8, True, isa=isa) is Plan.PANEL


@pytest.mark.parametrize("features", (512, 1024, 4096))
def test_panel_stays_chosen_as_the_batch_grows(features):
    p = features // 4
    chosen = [plans.phm_linear(rows, 4, 4, 4, p, p, False) is Plan.PANEL for rows in (1, 4, 16, 64, 256, 1024, 4096)]
    assert chosen == sorted(chosen)


def test_stream_keeps_its_mixed_rows_within_a_mebibyte():
    """Its scratch grows with the rows, where that of the other plans does not."""
    powers = (1, 16, 256, 4096, 65536)
    for rows, (n, P, Q), p, q in itertools.product(powers, ((1, 64, 64), (4, 4, 4), (2, 2, 2)), powers, powers):
        for contiguous in (False, True):
            if plans.phm_linear(rows, n, P, Q, p, q, contiguous) is Plan.STREAM:
                assert 4 * rows * P * n * q <= 1 << 20
        if plans.phm_linear_weight_grad(rows, n, P, Q, p, q) is Plan.STREAM:
            assert 4 * rows * P * (2 * q + p) <= 1 << 20


def test_convolution_of_many_pixels_forms_panels():
    assert plans.phc_conv(64 * 32 * 32, 64 * 32 * 32, 4, 4, 4, 16, 16, 9) is Plan.PANEL


@pytest.mark.parametrize("isa", ("avx2", "avx512_bf16"))
def test_weight_gradients_of_convolutions(isa):
    """By mixing they take 2n/Q of the products of the gradient of H: an eighth for one term, twice those for n = Q."""
    assert plans.phc_conv_weight_grad(2048, 2048, 1, 16, 16, 20, 20, 9, isa=isa) is Plan.MIX
    assert plans.phc_conv_weight_grad(2048, 2048, 4, 4, 4, 64, 64, 9, isa=isa) is Plan.PANEL


def test_convolution_of_few_pixels_forms_nothing():
    assert plans.phc_conv(1, 1, 4, 4, 4, 128, 128, 9) is Plan.MIX


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"))
def test_every_instruction_set_has_costs(isa):
    """Four rows of 2048 features are streamed where that was measured to be faster, packed for R products elsewhere."""
    sizes = (4, 4, 4, 4, 512, 512, 7)
    plan = plans.phm_linear_factored(*sizes, contiguous=False, combines=True, isa=isa)
    assert plan is (Plan.STREAM if isa == "avx512_bf16" else Plan.RANK)
    assert plans.phm_linear(1, 4, 4, 4, 512, 512, True, isa=isa) is Plan.STREAM
    # Pixels of channels_last images are rows as they lie.
    images = (512, 512, 4, 4, 4, 64, 64, 1, 7, False, (1, 8), (False, 0), isa)
    assert plans.phc_conv_factored(*images) is Plan.POINTWISE
