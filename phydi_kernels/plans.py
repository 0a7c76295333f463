"""Which plan computes a call: a pure function of shapes, types and instruction set, no timing at run time.

With x seen as Q blocks of q features and y as P blocks of p features, y_k = sum_{i,l} A[i,k,l] F_i x_l:

* stream: mix the few input rows (sum_l A[i,k,l] x_l), then read F once, straight from the parameter.
* mix: the same products in cache blocks, F packed once; output block k is an extra batch row. The weights' gradients
  follow from the mixed rows and from F_i^T g_k of the output's gradient g, n*P blocks of products in place of P*Q.
* panel: form a cache-sized panel of H while packing, multiply, drop it.
* rank: with A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l] known, R products of blocks in place of P*Q,
  y_k = sum_r V[r,k] (sum_i U[r,i] F_i)(sum_l W[r,l] x_l).
* direct: the same for a convolution, in one kernel of ours in place of R convolutions of torch's.
* pointwise: a convolution of one position as a linear layer, by the best plan of one; its rows are the pixels.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True)
class Rates:
    """Nanoseconds an entry, float32 on one core of an instruction set; only their ratios matter.

    benchmarks/plan_costs.py fits them to a processor.
    """

    product: float  # a multiplication in a packed product
    stream_product: float  # the same on F as it lies, and
    stream_product_in_cache: float  # where it stays in L2
    reduce: float  # the lanes of one result of stream added up
    # The same on F with its columns along p, in L2, in L3 and from memory; no lanes to add up.
    stream_lines_in_cache: float
    stream_lines: float
    stream_lines_nearly_far: float
    stream_lines_far: float
    read: float  # an entry of F read once
    pack: float  # an entry of F packed
    form: float  # one term of an entry of H formed and packed, with F's rows along q to be transposed
    form_transposed: float  # the same with F's columns along p, lines far apart
    mix: float  # one multiplication of the algebra with the input
    copy: float  # an entry of the input packed as it is
    write: float  # an entry of the output written, whole tiles at a time
    stream_update: float  # a multiplication of both weight gradients, both factors in cache
    stream_algebra: float  # a multiplication of dA's sum
    turn: float  # an entry of F packed for the R products,
    combine: float  # an entry of F-hat written, and
    combine_term: float  # for each term its share
    line: float  # both from F with its columns along p, whose lines are combined as they lie, and
    line_term: float  # for each term its share, for the numbers of LINE_TERMS
    add: float  # a multiplication of x or y-hat with V or W, and
    add_grad: float  # the same in the gradients, which pack x-hat and g-hat along the batch as well
    gather: float  # an entry of F-hat packed as it lies along p, lines far apart
    rank_split: float  # an entry of F-hat's gradient, and
    rank_split_term: float  # for each term its share in dU and dF
    split: float  # an entry of dL/dH, and
    split_term: float  # for each term its share in dA and dF
    turn_row: float  # an entry of the input or of y's gradient packed along the batch
    # Packing waits for an entry of F from memory: its lines, from nearly_far on, but not for rows of float32.
    lines_nearly_far: float
    lines_far: float
    bfloat16_rows_far: float
    bfloat16_lines_far: float
    # bfloat16 beside float32: a packed product (two in a lane), a stream (converted at each use), packing.
    bfloat16_product: float
    bfloat16_stream: float
    bfloat16_stream_lines: float
    bfloat16_pack: float
    mix_start: float  # what a row of one block and term takes to be mixed however short it is
    # The weights' gradients by mix, beside their products: an entry of the rows written and read, the calls.
    mixed_entry: float
    mixed_calls: float
    algebra_calls: float  # A formed from U, V and W, and its gradient split into theirs
    # Convolutions: a call of torch's own, a product of it and the channels that take twice that for each, an entry of H
    # formed and reordered, an entry of the mixed input written and read.
    conv_call: float
    conv_product: float
    conv_narrow: float
    conv_form: float
    conv_mix: float
    # Of the R convolutions of a factored one: an entry of F-hat formed, an entry read or written by the additions
    # around them, a call.
    term_form: float
    term_add: float
    term_add_bfloat16: float
    term_call: float
    # The same in one kernel.
    direct_product: float
    direct_form: float
    direct_add: float
    direct_add_bfloat16: float
    # The gradient of H by torch: a product, an entry of it formed and split, an entry of the images read.
    conv_grad_product: float
    conv_grad_form: float
    conv_grad_read: float
    conv_split: float  # of the weights' gradients without factors: an entry of H's split
    turn_image: float  # an entry of an image copied from planes into rows, or back; torch's convolutions do so as well
    bfloat16_convolution: float  # a multiplication of torch's in bfloat16, beside one in float32
    nearly_far: int  # bytes of weights from which lines wait: somewhat less than NEAR_BYTES, or L2
    lanes: int  # of a vector
    least_rows: int  # a register tile takes as long for fewer rows
    stream_rows: int  # of a register tile of stream


# Zen 5.
_AVX512_BF16 = Rates(
    product=0.0107,
    stream_product=0.0132,
    stream_product_in_cache=0.009,
    reduce=2.4,
    stream_lines_in_cache=0.0102,
    stream_lines=0.0122,
    stream_lines_nearly_far=0.0175,
    stream_lines_far=0.0293,
    read=0.01,
    pack=0.33,
    form=0.2,
    form_transposed=0.2,
    mix=0.04,
    copy=0.08,
    write=0.02,
    stream_update=0.1,
    stream_algebra=0.2,
    turn=0.08,
    combine=0.042,
    combine_term=0.012,
    line=0.062,
    line_term=0.002,
    add=0.04,
    add_grad=0.05,
    gather=0.08,
    rank_split=0.3,
    rank_split_term=0.025,
    split=0.1,
    split_term=0.07,
    turn_row=0.13,
    lines_nearly_far=0.16,
    lines_far=0.45,
    bfloat16_rows_far=0.12,
    bfloat16_lines_far=0.04,
    bfloat16_product=0.52,
    bfloat16_stream=1.35,
    bfloat16_stream_lines=1.12,
    bfloat16_pack=0.85,
    mix_start=2.675,
    mixed_entry=0.535,
    mixed_calls=80250.0,
    algebra_calls=50000.0,
    conv_call=40000.0,
    conv_product=0.0083,
    conv_narrow=8.0,
    conv_form=1.0,
    conv_mix=1.0,
    term_form=0.8,
    term_add=0.28,
    term_add_bfloat16=0.34,
    term_call=40000.0,
    direct_product=0.0093,
    direct_form=0.4,
    direct_add=0.2,
    direct_add_bfloat16=0.25,
    conv_grad_product=0.009,
    conv_grad_form=5.0,
    conv_grad_read=0.45,
    conv_split=0.8,
    turn_image=0.4,
    bfloat16_convolution=1.0,
    nearly_far=6 << 20,
    lanes=16,
    least_rows=6,
    stream_rows=4,
)
# Emerald Rapids: fitted to the recorded costs, then searched around for fewer misses in them and in the recorded grid.
# add_grad is half of what was measured: PANEL, up to 5 % faster for gradients, takes more memory.
_AVX512 = Rates(
    product=0.0134,
    stream_product=0.0183,
    stream_product_in_cache=0.0162,
    reduce=0.754,
    stream_lines_in_cache=0.0157,
    stream_lines=0.0209,
    stream_lines_nearly_far=0.0328,
    stream_lines_far=0.0497,
    read=0.00665,
    pack=0.419,
    form=0.147,
    form_transposed=0.263,
    mix=0.0306,
    copy=0.019,
    write=0.0624,
    stream_update=0.143,
    stream_algebra=0.769,
    turn=0.144,
    combine=0.0961,
    combine_term=0.0147,
    line=0.0482,
    line_term=0.0115,
    add=0.0489,
    add_grad=0.057,
    gather=0.0935,
    rank_split=0.48,
    rank_split_term=0.00805,
    split=0.364,
    split_term=0.111,
    turn_row=0.0278,
    lines_nearly_far=0.0734,
    lines_far=0.153,
    bfloat16_rows_far=0.0135,
    bfloat16_lines_far=0.113,
    bfloat16_product=1.65,
    bfloat16_stream=1.7,
    bfloat16_stream_lines=2.14,
    bfloat16_pack=0.874,
    mix_start=6.92,
    mixed_entry=1.38,
    mixed_calls=266000.0,
    algebra_calls=33500.0,
    conv_call=67400.0,
    conv_product=0.0112,
    conv_narrow=3.53,
    conv_form=1.1,
    conv_mix=2.65,
    term_form=2.34,
    term_add=0.767,
    term_add_bfloat16=0.359,
    term_call=68500.0,
    direct_product=0.0106,
    direct_form=0.894,
    direct_add=0.342,
    direct_add_bfloat16=0.452,
    conv_grad_product=0.0111,
    conv_grad_form=4.08,
    conv_grad_read=0.275,
    conv_split=2.63,
    turn_image=0.818,
    bfloat16_convolution=2.42,
    nearly_far=5 << 19,
    lanes=16,
    least_rows=6,
    stream_rows=4,
)
# Zen 3.
_AVX2 = Rates(
    product=0.0335,
    stream_product=0.0502,
    stream_product_in_cache=0.04,
    reduce=3.39,
    stream_lines_in_cache=0.0626,
    stream_lines=0.0795,
    stream_lines_nearly_far=0.145,
    stream_lines_far=0.166,
    read=0.034,
    pack=1.12,
    form=0.557,
    form_transposed=0.72,
    mix=0.0394,
    copy=0.0367,
    write=0.2,
    stream_update=0.275,
    stream_algebra=0.247,
    turn=0.299,
    combine=0.088,
    combine_term=0.0451,
    line=0.154,
    line_term=0.0315,
    add=0.0879,
    add_grad=0.126,
    gather=0.57,
    rank_split=1.27,
    rank_split_term=0.0795,
    split=0.461,
    split_term=0.145,
    turn_row=0.169,
    lines_nearly_far=0.03,
    lines_far=0.473,
    bfloat16_rows_far=0.004,
    bfloat16_lines_far=0.192,
    bfloat16_product=1.07,
    bfloat16_stream=1.64,
    bfloat16_stream_lines=1.12,
    bfloat16_pack=0.85,
    mix_start=8.375,
    mixed_entry=1.675,
    mixed_calls=251250.0,
    algebra_calls=100000.0,
    conv_call=100000.0,
    conv_product=0.02573,
    conv_narrow=8.0,
    conv_form=3.1,
    conv_mix=3.1,
    term_form=2.48,
    term_add=0.868,
    term_add_bfloat16=1.054,
    term_call=124000.0,
    direct_product=0.02883,
    direct_form=1.24,
    direct_add=0.62,
    direct_add_bfloat16=0.775,
    conv_grad_product=0.0279,
    conv_grad_form=15.5,
    conv_grad_read=1.395,
    conv_split=2.48,
    turn_image=1.24,
    bfloat16_convolution=1.0,
    nearly_far=6 << 20,
    lanes=8,
    least_rows=3,
    stream_rows=2,
)
BEST_ISA = "avx512_bf16"
# By instruction set of the compiled kernels; of two of them nothing was measured. A cycle of AMX has 512 products of
# bfloat16 for the 32 of float32: three fifths of that are assumed here, a third in torch's convolutions. With AVX512
# and AVX2 bfloat16 is multiplied as float32.
RATES = {
    "amx_bf16": replace(_AVX512, bfloat16_product=0.104, bfloat16_convolution=0.2, least_rows=8),
    BEST_ISA: _AVX512_BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "baseline": replace(_AVX2, lanes=4),
}
LINE_TERMS = (2, 3, 4, 8)  # lines of F are combined as they lie for these numbers of terms
# F of at most so many entries stays in L2 while stream reads it for each group of rows.
_STREAM_CACHED_ENTRIES = 1 << 17
# One core's share of L3: weights of more bytes come from memory.
NEAR_BYTES = 8 << 20
# Vectors of columns in a tile, and in one of stream where these lie along p.
_TILE_VECTORS = 2
_STREAM_VECTORS = 4
# Stream keeps its mixed rows in L2; their number is not bounded otherwise.
_STREAM_ENTRIES = 1 << 18
# A register tile of the direct kernel lies along a row of the result: fewer pixels leave units idle.
_DIRECT_PIXELS = 4.7
# A pixel of its mixed input takes 16, 32, 64 or 128 lanes, and so must what lies between two neighbouring outputs.
_DIRECT_STRIDES = (1, 2, 4)
_DIRECT_LANES = 128
_CONV_WEIGHT_GRAD = 1.3  # a weight gradient of few channels, relative to the convolution itself
_CONV_MIXED_PASSES = 2.5  # over the mixed input by the weights' gradients of a convolution, at the cost of mixing


class Plan(enum.IntEnum):
    """The numbers are the ones the compiled kernels know."""

    STREAM = 0
    MIX = 1
    PANEL = 2
    RANK = 3
    DIRECT = 4
    POINTWISE = 5


LINEAR_PLANS = (Plan.STREAM, Plan.MIX, Plan.PANEL, Plan.RANK)


def _padded(count: int, to: int) -> int:
    return -(-count // to) * to


def _bytes(n: int, p: int, q: int, bfloat16: bool) -> int:
    """Of F in bfloat16 or float32."""
    return n * p * q * (2 if bfloat16 else 4)


def cheapest(costs: dict[Plan, float]) -> Plan:
    """The plan of the least cost, the first of them in a draw."""
    return min(costs, key=costs.__getitem__)


def phm_linear_costs(
    rows: int, n: int, P: int, Q: int, p: int, q: int, contiguous: bool, bfloat16: bool, rates: Rates
) -> dict[Plan, float]:
    """Nanoseconds of each plan that serves the call; see phm_linear."""
    lanes = rates.lanes
    product = rates.product * (rates.bfloat16_product if bfloat16 else 1)
    in_cache, size = n * p * q <= _STREAM_CACHED_ENTRIES, _bytes(n, p, q, bfloat16)
    wide_q = _padded(q, lanes)
    terms = n * p * wide_q
    blocks = rows * P
    mixing = blocks * n * (wide_q * Q * rates.mix + rates.mix_start)
    tile = _TILE_VECTORS * lanes
    cost = {
        Plan.MIX: terms * rates.pack
        + blocks * (n * q * _padded(p, lanes) * product + _padded(p, tile) * rates.write)
        + mixing,
        Plan.PANEL: P * Q * terms * (rates.form if contiguous else rates.form_transposed)
        + rows * (Q * (q * _padded(P * p, lanes) * product + wide_q * rates.copy) + _padded(P * p, tile) * rates.write),
    }
    if not (contiguous or bfloat16) and size >= NEAR_BYTES:
        cost[Plan.MIX] += terms * rates.lines_far
    if blocks * (n * wide_q + 64) <= _STREAM_ENTRIES:
        tiles = _padded(blocks, rates.stream_rows) * n
        if contiguous:
            # Lanes along q, four columns at a time, one reduction a result.
            stream_product = rates.stream_product_in_cache if in_cache else rates.stream_product
            stream_product *= rates.bfloat16_stream if bfloat16 else 1
            products = tiles * _padded(p, 4) * wide_q * stream_product + blocks * _padded(p, 4) * rates.reduce
        else:
            stream_product = rates.stream_lines_in_cache if in_cache else rates.stream_lines
            if size >= rates.nearly_far:
                stream_product = rates.stream_lines_nearly_far if size < NEAR_BYTES else rates.stream_lines_far
            stream_product *= rates.bfloat16_stream_lines if bfloat16 else 1
            products = tiles * (_padded(p, _STREAM_VECTORS * lanes) if p > lanes else lanes) * q * stream_product
        cost[Plan.STREAM] = terms * rates.read + products + mixing
    return cost


@lru_cache(maxsize=4096)
def phm_linear(
    rows: int, n: int, P: int, Q: int, p: int, q: int, contiguous: bool, bfloat16: bool = False, isa: str = BEST_ISA
) -> Plan:
    """The plan of one phm_linear call: ``rows`` input rows, A (n, P, Q), F (n, p, q) ``contiguous`` along q or not.

    ``isa``, here and below, is the instruction set of the compiled kernels.
    """
    return cheapest(phm_linear_costs(rows, n, P, Q, p, q, contiguous, bfloat16, RATES[isa]))


def mixes_input(P: int, Q: int, p: int, q: int) -> bool:
    """Whether weight gradients by MIX mix x and multiply the output's gradient by F, or the other way round."""
    return P * q * (Q + p) <= Q * p * (P + q)


def _weight_grad_panel_cost(rows: int, n: int, P: int, Q: int, p: int, q: int, rates: Rates) -> float:
    entries = P * p * Q * _padded(q, rates.lanes)
    cost = entries * (rates.split + n * rates.split_term + rows * rates.product)
    return cost + rows * (P * p + Q * q) * rates.turn_row


def phm_linear_weight_grad_costs(rows: int, n: int, P: int, Q: int, p: int, q: int, rates: Rates) -> dict[Plan, float]:
    """Nanoseconds of each plan that serves the call; see phm_linear_weight_grad."""
    wide_q = _padded(q, rates.lanes)
    cost = {Plan.PANEL: _weight_grad_panel_cost(rows, n, P, Q, p, q, rates)}
    if rows * P * (2 * q + p) <= _STREAM_ENTRIES:
        cost[Plan.STREAM] = rows * P * n * wide_q * (p * rates.stream_update + Q * rates.stream_algebra)
    if not mixes_input(P, Q, p, q):
        P, Q, p, q = Q, P, q, p
    mixed = rows * P
    cost[Plan.MIX] = mixed * n * Q * (_padded(q, rates.lanes) * rates.mix + q * rates.product)
    cost[Plan.MIX] += _weight_grad_panel_cost(mixed, n, 1, n, p, q, rates)
    cost[Plan.MIX] += min(phm_linear_costs(mixed, n, n, 1, q, p, False, False, rates).values())
    cost[Plan.MIX] += mixed * (n * (q + Q) + p) * rates.mixed_entry + rates.mixed_calls
    return cost


@lru_cache(maxsize=4096)
def phm_linear_weight_grad(rows: int, n: int, P: int, Q: int, p: int, q: int, isa: str = BEST_ISA) -> Plan:
    """STREAM (F read and dF written once, term by term), MIX (mixed rows) or PANEL (dL/dH in cache-sized panels)."""
    return cheapest(phm_linear_weight_grad_costs(rows, n, P, Q, p, q, RATES[isa]))


def _products(rows: int, p: int, q: int, R: int, bfloat16: bool, rates: Rates) -> float:
    product = rates.product * (rates.bfloat16_product if bfloat16 else 1)
    return R * max(rows, rates.least_rows) * q * _padded(p, rates.lanes) * product


def phm_linear_factored_costs(
    rows: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    R: int,
    contiguous: bool,
    combines: bool,
    bfloat16: bool,
    rates: Rates,
) -> dict[Plan, float]:
    """Nanoseconds of each plan that serves the call; see phm_linear_factored."""
    wide_q = _padded(q, rates.lanes)
    entries = p * wide_q
    if combines and not contiguous and n in LINE_TERMS:
        packing = R * entries * (rates.line + n * rates.line_term)
    else:
        packing = n * entries * (rates.turn if contiguous else rates.gather)
        packing += R * entries * (rates.combine + n * rates.combine_term) if combines else 0
    if bfloat16:
        packing *= rates.bfloat16_pack
    size = _bytes(n, p, q, bfloat16)
    if bfloat16 and size >= NEAR_BYTES:
        packing += n * entries * (rates.bfloat16_rows_far if contiguous else rates.bfloat16_lines_far)
    elif not bfloat16 and not contiguous and size >= rates.nearly_far:
        packing += n * entries * (rates.lines_nearly_far if size < NEAR_BYTES else rates.lines_far)
    additions = rows * R * (wide_q * Q + _padded(p, rates.lanes) * P) * rates.add
    cost = phm_linear_costs(rows, n, P, Q, p, q, contiguous, bfloat16, rates)
    cost[Plan.RANK] = packing + _products(rows, p, q, R, bfloat16, rates) + additions
    return cost


@lru_cache(maxsize=4096)
def phm_linear_factored(
    rows: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    R: int,
    contiguous: bool,
    combines: bool,
    bfloat16: bool = False,
    isa: str = BEST_ISA,
) -> Plan:
    """The plan of one phm_linear_factored call of R terms; ``combines``: the weights are sum_i U[r,i] F_i, not F.

    RANK, or a plan of phm_linear for A = sum_r U_r (x) V_r (x) W_r.
    """
    return cheapest(phm_linear_factored_costs(rows, n, P, Q, p, q, R, contiguous, combines, bfloat16, RATES[isa]))


def phm_linear_factored_grad_costs(
    rows: int, n: int, P: int, Q: int, p: int, q: int, R: int, bfloat16: bool, rates: Rates
) -> dict[Plan, float]:
    """Nanoseconds of each plan that serves the call; see phm_linear_factored_grad."""
    lanes = rates.lanes
    entries = R * p * _padded(q, lanes)
    rank = entries * (rates.rank_split + 2 * rates.combine + n * (rates.rank_split_term + 2 * rates.combine_term))
    # F-hat x-hat for dV, its transpose for dx and dW, the outer products for dU and dF; x and grad are mixed for each.
    rank += 3 * _products(rows, p, q, R, bfloat16, rates)
    rank += 3 * rows * R * (_padded(q, lanes) * Q + _padded(p, lanes) * P) * rates.add_grad
    of_weights = phm_linear_weight_grad_costs(rows, n, P, Q, p, q, rates)
    of_input = min(phm_linear_factored_costs(rows, n, Q, P, q, p, R, False, True, bfloat16, rates).values())
    cost = {plan: of_plan + of_input + rates.algebra_calls for plan, of_plan in of_weights.items()}
    cost[Plan.RANK] = rank
    return cost


@lru_cache(maxsize=4096)
def phm_linear_factored_grad(
    rows: int, n: int, P: int, Q: int, p: int, q: int, R: int, bfloat16: bool = False, isa: str = BEST_ISA
) -> Plan:
    """RANK for all gradients, or a plan for those of the weights, and the input's by one of its own.

    Without RANK dU, dV and dW follow from the gradient of A = sum_r U_r (x) V_r (x) W_r.
    """
    return cheapest(phm_linear_factored_grad_costs(rows, n, P, Q, p, q, R, bfloat16, RATES[isa]))


def _conv_product(bfloat16: bool, rates: Rates) -> float:
    return rates.conv_product * (rates.bfloat16_convolution if bfloat16 else 1)


def _conv_grad_product(bfloat16: bool, rates: Rates) -> float:
    return rates.conv_grad_product * (rates.bfloat16_convolution if bfloat16 else 1)


def _narrow(p: int, q: int, rates: Rates) -> float:
    """What a multiplication of a convolution of q to p channels costs, relative to one of many channels."""
    return 1 + rates.conv_narrow / min(p, q)


def phc_conv_costs(
    pixels: int,
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    taps: int,
    bfloat16: bool,
    pointwise: tuple[bool, int] | None,
    rates: Rates,
) -> dict[Plan, float]:
    """Nanoseconds of each plan that serves the call; see phc_conv."""
    contiguous, copied = pointwise or (False, 0)
    product = outputs * taps * _conv_product(bfloat16, rates)
    mixed = P * p * n * q * product * _narrow(p, n * q, rates)
    formed = P * p * Q * q * (taps * rates.conv_form + product * _narrow(P * p, Q * q, rates))
    cost = {
        Plan.MIX: rates.conv_call + pixels * P * n * q * rates.conv_mix + mixed,
        Plan.PANEL: rates.conv_call + formed,
    }
    if pointwise:
        cost[Plan.POINTWISE] = min(phm_linear_costs(outputs, n, P, Q, p, q, contiguous, bfloat16, rates).values())
    return {plan: of_plan + copied * rates.turn_image for plan, of_plan in cost.items()}


@lru_cache(maxsize=4096)
def phc_conv(
    pixels: int,
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    taps: int,
    bfloat16: bool = False,
    pointwise: tuple[bool, int] | None = None,
    isa: str = BEST_ISA,
) -> Plan:
    """The plan of one convolution: ``pixels`` positions to mix, ``outputs`` positions that meet every weight.

    ``pointwise``, of a kernel of one position without padding: whether F is contiguous along q, and the entries of the
    images that are copied between planes and rows.
    """
    return cheapest(phc_conv_costs(pixels, outputs, n, P, Q, p, q, taps, bfloat16, pointwise, RATES[isa]))


def phc_conv_weight_grad_costs(
    pixels: int, outputs: int, n: int, P: int, Q: int, p: int, q: int, taps: int, bfloat16: bool, rates: Rates
) -> dict[Plan, float]:
    """Nanoseconds of each plan that serves the call; see phc_conv_weight_grad."""
    product = _conv_grad_product(bfloat16, rates)
    mixed = pixels * P * n * q * rates.conv_mix * _CONV_MIXED_PASSES
    return {
        Plan.PANEL: rates.conv_call + P * p * Q * q * taps * (rates.conv_split + outputs * product),
        Plan.MIX: 2 * rates.conv_call + mixed + 2 * outputs * P * p * n * q * taps * product * _narrow(p, n * q, rates),
    }


@lru_cache(maxsize=4096)
def phc_conv_weight_grad(
    pixels: int,
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    taps: int,
    bfloat16: bool = False,
    isa: str = BEST_ISA,
) -> Plan:
    """PANEL (that of H, split) or MIX (those of a convolution of the mixed input); see phc_conv."""
    return cheapest(phc_conv_weight_grad_costs(pixels, outputs, n, P, Q, p, q, taps, bfloat16, RATES[isa]))


def fits_direct(dims: int, stride: int, q: int) -> bool:
    """Whether the direct plan serves convolutions of q channels with this stride along the last of ``dims``."""
    return dims < 3 and stride in _DIRECT_STRIDES and q * stride <= _DIRECT_LANES


def phc_conv_factored_costs(
    pixels: int,
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    taps: int,
    R: int,
    bfloat16: bool,
    row: tuple[int, int] | None,
    pointwise: tuple[bool, int] | None,
    rates: Rates,
) -> dict[Plan, float]:
    """Nanoseconds of each plan that serves the call; see phc_conv_factored."""
    product, weights = outputs * p * q * taps, p * q * taps
    added = (R + Q) * pixels * q + (R + P) * outputs * p
    convolved = product * _conv_product(bfloat16, rates) * _narrow(p, q, rates)
    of_term = convolved + weights * rates.term_form + rates.term_call
    cost = {Plan.RANK: R * of_term + added * (rates.term_add_bfloat16 if bfloat16 else rates.term_add)}
    stride, width = row or (0, 1)
    if fits_direct(2, stride, q):
        idle = max(1.0, _DIRECT_PIXELS / width)
        of_term = outputs * _padded(p, rates.lanes) * q * taps * idle * rates.direct_product
        cost[Plan.DIRECT] = R * (of_term + weights * rates.direct_form)
        cost[Plan.DIRECT] += added * (rates.direct_add_bfloat16 if bfloat16 else rates.direct_add)
    contiguous, copied = pointwise or (False, 0)
    dense = phc_conv_costs(pixels, outputs, n, P, Q, p, q, taps, bfloat16, None, rates)
    cost |= {plan: of_plan + copied * rates.turn_image for plan, of_plan in dense.items()}
    if pointwise:
        linear = phm_linear_factored_costs(outputs, n, P, Q, p, q, R, contiguous, True, bfloat16, rates)
        cost[Plan.POINTWISE] = min(linear.values()) + copied * rates.turn_image
    return cost


@lru_cache(maxsize=4096)
def phc_conv_factored(
    pixels: int,
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    taps: int,
    R: int,
    bfloat16: bool,
    row: tuple[int, int] | None = None,
    pointwise: tuple[bool, int] | None = None,
    isa: str = BEST_ISA,
) -> Plan:
    """The plan of one factored convolution of R terms, or of its input's gradient; see phc_conv.

    ``row``: stride along the last dimension and size of the result there, or None where the direct kernel does not
    serve: in three dimensions, and for the input's gradient of a stride.
    """
    sizes = (pixels, outputs, n, P, Q, p, q, taps, R, bfloat16, row, pointwise)
    return cheapest(phc_conv_factored_costs(*sizes, RATES[isa]))


def phc_conv_factored_grad_costs(
    pixels: int,
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    taps: int,
    R: int,
    bfloat16: bool,
    row: tuple[int, int] | None,
    pointwise: tuple[bool, int] | None,
    rates: Rates,
) -> dict[Plan, float]:
    """Nanoseconds of each plan that serves the call; see phc_conv_factored_grad."""
    of_input = phc_conv_factored_costs(outputs, outputs, n, Q, P, q, p, taps, R, bfloat16, row, pointwise, rates)
    of_weights = P * p * Q * q * taps * (rates.conv_grad_form + outputs * _conv_grad_product(bfloat16, rates))
    of_weights += (pixels * Q * q + outputs * P * p) * rates.conv_grad_read
    cost = {Plan.PANEL: min(of_input.values()) + of_weights + rates.conv_call + rates.algebra_calls}
    if pointwise:
        # R convolutions of one position by torch are never faster. The input is copied as well.
        copied = pointwise[1] + outputs * Q * q if pointwise[1] else 0
        linear = phm_linear_factored_grad_costs(outputs, n, P, Q, p, q, R, bfloat16, rates)
        cost[Plan.POINTWISE] = min(linear.values()) + copied * rates.turn_image
    else:
        add = rates.term_add_bfloat16 if bfloat16 else rates.term_add
        product = outputs * p * q * taps * _conv_product(bfloat16, rates) * _narrow(p, q, rates)
        # Before the convolutions, and for dV and dW; for dx.
        additions = 2 * (R + Q) * pixels * q * add + 2 * (R + P) * outputs * p * add + (R + Q) * pixels * q * add
        products = (2 + _CONV_WEIGHT_GRAD) * product + 3 * p * q * taps * rates.term_form + 3 * rates.term_call
        cost[Plan.RANK] = R * products + additions
    return cost


@lru_cache(maxsize=4096)
def phc_conv_factored_grad(
    pixels: int,
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    taps: int,
    R: int,
    bfloat16: bool,
    row: tuple[int, int] | None = None,
    pointwise: tuple[bool, int] | None = None,
    isa: str = BEST_ISA,
) -> Plan:
    """RANK or POINTWISE for all gradients, or PANEL for those of the weights, through that of H.

    By PANEL the input's gradient has a plan of its own; ``row`` and ``pointwise`` are those of that plan.
    """
    sizes = (pixels, outputs, n, P, Q, p, q, taps, R, bfloat16, row, pointwise)
    return cheapest(phc_conv_factored_grad_costs(*sizes, RATES[isa]))
