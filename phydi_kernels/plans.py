"""Which plan computes a call: a pure function of shapes and types, no timing at run time.

With x seen as Q blocks of q features and y as P blocks of p features, y_k = sum_{i,l} A[i,k,l] F_i x_l:

* stream: mix the few input rows (sum_l A[i,k,l] x_l), then read F once, straight from the parameter.
* mix: the same products in cache blocks, F packed once; output block k is an extra batch row.
* panel: form a cache-sized panel of H while packing, multiply, drop it.
* rank: with A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l] known, R products of blocks in place of P*Q,
  y_k = sum_r V[r,k] (sum_i U[r,i] F_i)(sum_l W[r,l] x_l).
* direct: the same for a convolution, in one kernel of ours in place of R convolutions of torch's.
* pointwise: a convolution of one position as a linear layer, by the best plan of one; its rows are the pixels.
"""

from __future__ import annotations

import enum
from functools import lru_cache

# Nanoseconds an entry, float32 on one AVX-512 core (Zen 5); only their ratios matter.
_PRODUCT = 0.0107  # a multiplication in a packed product
_STREAM_PRODUCT = 0.0132  # the same on F as it lies, and
_STREAM_PRODUCT_IN_CACHE = 0.009  # where it stays in L2
_REDUCE = 2.4  # the lanes of one result of stream added up
# The same on F with its columns along p, in L2, in L3 and from memory; no lanes to add up.
_STREAM_LINES_IN_CACHE = 0.0102
_STREAM_LINES = 0.0122
_STREAM_LINES_NEARLY_FAR = 0.0175
_STREAM_LINES_FAR = 0.0293
_READ = 0.01  # an entry of F read once
_PACK = 0.33  # an entry of F packed
_FORM = 0.2  # one term of an entry of H formed and packed, with F's rows along q to be transposed
_FORM_TRANSPOSED = 0.2  # the same with F's columns along p, lines far apart
_MIX = 0.04  # one multiplication of the algebra with the input
_COPY = 0.08  # an entry of the input packed as it is
_STREAM_UPDATE = 0.1  # a multiplication of both weight gradients, both factors in cache
_STREAM_ALGEBRA = 0.2  # a multiplication of dA's sum
_TURN = 0.08  # an entry of F packed for the R products,
_COMBINE = 0.042  # an entry of F-hat written, and
_COMBINE_TERM = 0.012  # for each term its share
_LINE = 0.062  # both from F with its columns along p, whose lines are combined as they lie, and
_LINE_TERM = 0.002  # for each term its share,
LINE_TERMS = (2, 3, 4, 8)  # for these numbers of terms
_ADD = 0.04  # a multiplication of x or y-hat with V or W, and
_ADD_GRAD = 0.05  # the same in the gradients, which pack x-hat and g-hat along the batch as well
_GATHER = 0.08  # an entry of F-hat packed as it lies along p, lines far apart
_RANK_SPLIT = 0.3  # an entry of F-hat's gradient, and
_RANK_SPLIT_TERM = 0.025  # for each term its share in dU and dF
_SPLIT = 0.1  # an entry of dL/dH, and
_SPLIT_TERM = 0.07  # for each term its share in dA and dF
_TURN_ROW = 0.13  # an entry of the input or of y's gradient packed along the batch
# bfloat16 beside float32: a packed product (two in a lane), a stream (converted at each use), packing.
_BFLOAT16_PRODUCT = 0.52
_BFLOAT16_STREAM = 1.35
_BFLOAT16_STREAM_LINES = 1.12
_BFLOAT16_PACK = 0.85
_LANES = 16
# F of at most so many entries stays in L2 while stream reads it for each group of rows.
_STREAM_CACHED_ENTRIES = 1 << 17
# One core's share of L3: weights of more bytes come from memory.
NEAR_BYTES = 8 << 20
# Packing waits for an entry of F from there, of lines of float32 from somewhat less on, but not for rows of float32.
_NEARLY_FAR_BYTES = 6 << 20
_LINES_NEARLY_FAR = 0.16
_LINES_FAR = 0.45
_BFLOAT16_ROWS_FAR = 0.12
_BFLOAT16_LINES_FAR = 0.04
# Columns of a tile of stream where these lie along p.
_STREAM_COLUMNS = 64
# A register tile takes as long for fewer rows.
_LEAST_ROWS = 6
# Stream keeps its mixed rows in L2; their number is not bounded otherwise.
_STREAM_ENTRIES = 1 << 18
# Convolutions: torch's own rate, an entry of H formed and reordered, an entry of the mixed input written and read.
_CONV_PRODUCT = 0.0083
_CONV_FORM = 1.0
_CONV_MIX = 1.0
# Of the R convolutions of a factored one: an entry of F-hat formed, an entry read or written by the additions around
# them (bfloat16: beside twice the rate of products), a call.
_TERM_FORM = 0.8
_TERM_ADD = 0.28
_TERM_ADD_BFLOAT16 = 0.34
_TERM_CALL = 40000.0
# The same in one kernel, whose register tiles lie along a row of the result: fewer pixels leave units idle.
_DIRECT_PRODUCT = 0.0093
_DIRECT_PIXELS = 4.7
_DIRECT_FORM = 0.4
_DIRECT_ADD = 0.2
_DIRECT_ADD_BFLOAT16 = 0.25
# A pixel of its mixed input takes 16, 32, 64 or 128 lanes, and so must what lies between two neighbouring outputs.
_DIRECT_STRIDES = (1, 2, 4)
_DIRECT_LANES = 128
_CONV_WEIGHT_GRAD = 1.3  # a weight gradient of few channels, relative to the convolution itself
# The gradient of H by torch: a product, an entry of it formed and split, an entry of the images read.
_CONV_GRAD_PRODUCT = 0.009
_CONV_GRAD_FORM = 5.0
_CONV_GRAD_READ = 0.45
_TURN_IMAGE = 0.4  # an entry of an image copied from planes into rows, or back; torch's convolutions do so as well


class Plan(enum.IntEnum):
    """The numbers are the ones the compiled kernels know."""

    STREAM = 0
    MIX = 1
    PANEL = 2
    RANK = 3
    DIRECT = 4
    POINTWISE = 5


LINEAR_PLANS = (Plan.STREAM, Plan.MIX, Plan.PANEL, Plan.RANK)


def _padded(count: int, to: int = _LANES) -> int:
    return -(-count // to) * to


def _bytes(n: int, p: int, q: int, bfloat16: bool) -> int:
    """Of F in bfloat16 or float32."""
    return n * p * q * (2 if bfloat16 else 4)


def _linear_costs(
    rows: int, n: int, P: int, Q: int, p: int, q: int, contiguous: bool, bfloat16: bool
) -> dict[Plan, float]:
    product = _PRODUCT * (_BFLOAT16_PRODUCT if bfloat16 else 1)
    in_cache, size = n * p * q <= _STREAM_CACHED_ENTRIES, _bytes(n, p, q, bfloat16)
    wide_q = _padded(q)
    terms = n * p * wide_q
    blocks = rows * P
    mixing = blocks * n * wide_q * Q * _MIX
    cost = {
        Plan.MIX: terms * _PACK + blocks * n * q * _padded(p) * product + mixing,
        Plan.PANEL: P * Q * terms * (_FORM if contiguous else _FORM_TRANSPOSED)
        + rows * Q * (q * _padded(P * p) * product + wide_q * _COPY),
    }
    if not (contiguous or bfloat16) and size >= NEAR_BYTES:
        cost[Plan.MIX] += terms * _LINES_FAR
    if blocks * (n * q + 64) <= _STREAM_ENTRIES:
        tiles = _padded(blocks, 4) * n
        if contiguous:
            # Lanes along q, four columns at a time, one reduction a result.
            stream_product = _STREAM_PRODUCT_IN_CACHE if in_cache else _STREAM_PRODUCT
            stream_product *= _BFLOAT16_STREAM if bfloat16 else 1
            products = tiles * _padded(p, 4) * wide_q * stream_product + blocks * _padded(p, 4) * _REDUCE
        else:
            stream_product = _STREAM_LINES_IN_CACHE if in_cache else _STREAM_LINES
            if size >= _NEARLY_FAR_BYTES:
                stream_product = _STREAM_LINES_NEARLY_FAR if size < NEAR_BYTES else _STREAM_LINES_FAR
            stream_product *= _BFLOAT16_STREAM_LINES if bfloat16 else 1
            products = tiles * (_padded(p, _STREAM_COLUMNS) if p > _LANES else _LANES) * q * stream_product
        cost[Plan.STREAM] = terms * _READ + products + mixing
    return cost


@lru_cache(maxsize=4096)
def phm_linear(rows: int, n: int, P: int, Q: int, p: int, q: int, contiguous: bool, bfloat16: bool = False) -> Plan:
    """The plan of one phm_linear call: ``rows`` input rows, A (n, P, Q), F (n, p, q) ``contiguous`` along q or not."""
    cost = _linear_costs(rows, n, P, Q, p, q, contiguous, bfloat16)
    return min(cost, key=cost.__getitem__)


def _weight_grad_costs(rows: int, n: int, P: int, Q: int, p: int, q: int) -> dict[Plan, float]:
    wide_q = _padded(q)
    cost = {Plan.PANEL: P * p * Q * wide_q * (_SPLIT + n * _SPLIT_TERM + rows * _PRODUCT)}
    cost[Plan.PANEL] += rows * (P * p + Q * q) * _TURN_ROW
    if rows * P * (2 * q + p) <= _STREAM_ENTRIES:
        cost[Plan.STREAM] = rows * P * n * wide_q * (p * _STREAM_UPDATE + Q * _STREAM_ALGEBRA)
    return cost


@lru_cache(maxsize=4096)
def phm_linear_weight_grad(rows: int, n: int, P: int, Q: int, p: int, q: int) -> Plan:
    """STREAM (F read and dF written once, term by term) or PANEL (dL/dH in cache-sized panels)."""
    cost = _weight_grad_costs(rows, n, P, Q, p, q)
    return min(cost, key=cost.__getitem__)


def _products(rows: int, p: int, q: int, R: int, bfloat16: bool) -> float:
    return R * max(rows, _LEAST_ROWS) * q * _padded(p) * _PRODUCT * (_BFLOAT16_PRODUCT if bfloat16 else 1)


def _linear_factored_costs(
    rows: int, n: int, P: int, Q: int, p: int, q: int, R: int, contiguous: bool, combines: bool, bfloat16: bool
) -> dict[Plan, float]:
    wide_q = _padded(q)
    entries = p * wide_q
    if combines and not contiguous and n in LINE_TERMS:
        packing = R * entries * (_LINE + n * _LINE_TERM)
    else:
        packing = n * entries * (_TURN if contiguous else _GATHER)
        packing += R * entries * (_COMBINE + n * _COMBINE_TERM) if combines else 0
    if bfloat16:
        packing *= _BFLOAT16_PACK
    size = _bytes(n, p, q, bfloat16)
    if bfloat16 and size >= NEAR_BYTES:
        packing += n * entries * (_BFLOAT16_ROWS_FAR if contiguous else _BFLOAT16_LINES_FAR)
    elif not bfloat16 and not contiguous and size >= _NEARLY_FAR_BYTES:
        packing += n * entries * (_LINES_NEARLY_FAR if size < NEAR_BYTES else _LINES_FAR)
    additions = rows * R * (wide_q * Q + _padded(p) * P) * _ADD
    cost = _linear_costs(rows, n, P, Q, p, q, contiguous, bfloat16)
    cost[Plan.RANK] = packing + _products(rows, p, q, R, bfloat16) + additions
    return cost


@lru_cache(maxsize=4096)
def phm_linear_factored(
    rows: int, n: int, P: int, Q: int, p: int, q: int, R: int, contiguous: bool, combines: bool, bfloat16: bool = False
) -> Plan:
    """The plan of one phm_linear_factored call of R terms; ``combines``: the weights are sum_i U[r,i] F_i, not F.

    RANK, or a plan of phm_linear for A = sum_r U_r (x) V_r (x) W_r.
    """
    cost = _linear_factored_costs(rows, n, P, Q, p, q, R, contiguous, combines, bfloat16)
    return min(cost, key=cost.__getitem__)


def _linear_factored_grad_costs(
    rows: int, n: int, P: int, Q: int, p: int, q: int, R: int, bfloat16: bool
) -> dict[Plan, float]:
    entries = R * p * _padded(q)
    rank = entries * (_RANK_SPLIT + 2 * _COMBINE + n * (_RANK_SPLIT_TERM + 2 * _COMBINE_TERM))
    # F-hat x-hat for dV, its transpose for dx and dW, the outer products for dU and dF; x and grad are mixed for each.
    rank += 3 * _products(rows, p, q, R, bfloat16) + 3 * rows * R * (_padded(q) * Q + _padded(p) * P) * _ADD_GRAD
    of_weights = _weight_grad_costs(rows, n, P, Q, p, q)
    of_input = min(_linear_factored_costs(rows, n, Q, P, q, p, R, False, True, bfloat16).values())
    cost = {plan: of_plan + of_input for plan, of_plan in of_weights.items()}
    cost[Plan.RANK] = rank
    return cost


@lru_cache(maxsize=4096)
def phm_linear_factored_grad(rows: int, n: int, P: int, Q: int, p: int, q: int, R: int, bfloat16: bool = False) -> Plan:
    """RANK for all gradients, or STREAM or PANEL for those of the weights, and the input's by a plan of its own.

    By STREAM and PANEL dU, dV and dW follow from the gradient of A = sum_r U_r (x) V_r (x) W_r.
    """
    cost = _linear_factored_grad_costs(rows, n, P, Q, p, q, R, bfloat16)
    return min(cost, key=cost.__getitem__)


def _conv_costs(pixels: int, outputs: int, n: int, P: int, Q: int, p: int, q: int, taps: int) -> dict[Plan, float]:
    return {
        Plan.MIX: pixels * P * n * q * _CONV_MIX + outputs * P * p * n * q * taps * _CONV_PRODUCT,
        Plan.PANEL: P * p * Q * q * taps * (_CONV_FORM + outputs * _CONV_PRODUCT),
    }


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
) -> Plan:
    """The plan of one convolution: ``pixels`` positions to mix, ``outputs`` positions that meet every weight.

    ``pointwise``, of a kernel of one position without padding: whether F is contiguous along q, and the entries of the
    images that are copied between planes and rows.
    """
    costs = _conv_costs(pixels, outputs, n, P, Q, p, q, taps)
    if pointwise:
        contiguous, copied = pointwise
        linear = _linear_costs(outputs, n, P, Q, p, q, contiguous, bfloat16)
        costs[Plan.POINTWISE] = min(linear.values())
        costs = {plan: cost + copied * _TURN_IMAGE for plan, cost in costs.items()}
    return min(costs, key=costs.__getitem__)


def _narrow(p: int, q: int) -> float:
    """What a multiplication of a convolution of q to p channels costs, relative to one of many channels."""
    return 1 + 8 / min(p, q)


def fits_direct(dims: int, stride: int, q: int) -> bool:
    """Whether the direct plan serves convolutions of q channels with this stride along the last of ``dims``."""
    return dims < 3 and stride in _DIRECT_STRIDES and q * stride <= _DIRECT_LANES


def _conv_factored_costs(
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
) -> dict[Plan, float]:
    product, weights = outputs * p * q * taps, p * q * taps
    added = (R + Q) * pixels * q + (R + P) * outputs * p
    cost = {Plan.RANK: R * (product * _CONV_PRODUCT * _narrow(p, q) + weights * _TERM_FORM + _TERM_CALL)}
    cost[Plan.RANK] += added * (_TERM_ADD_BFLOAT16 if bfloat16 else _TERM_ADD)
    stride, width = row or (0, 1)
    if fits_direct(2, stride, q):
        idle = max(1.0, _DIRECT_PIXELS / width)
        cost[Plan.DIRECT] = R * (outputs * _padded(p) * q * taps * idle * _DIRECT_PRODUCT + weights * _DIRECT_FORM)
        cost[Plan.DIRECT] += added * (_DIRECT_ADD_BFLOAT16 if bfloat16 else _DIRECT_ADD)
    dense = _conv_costs(pixels, outputs, n, P, Q, p, q, taps)
    contiguous, copied = pointwise or (False, 0)
    cost |= {plan: of_plan * _narrow(P * p, Q * q) + copied * _TURN_IMAGE for plan, of_plan in dense.items()}
    if pointwise:
        linear = _linear_factored_costs(outputs, n, P, Q, p, q, R, contiguous, True, bfloat16)
        cost[Plan.POINTWISE] = min(linear.values()) + copied * _TURN_IMAGE
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
) -> Plan:
    """The plan of one factored convolution of R terms, or of its input's gradient; see phc_conv.

    ``row``: stride along the last dimension and size of the result there, or None where the direct kernel does not
    serve: in three dimensions, and for the input's gradient of a stride.
    """
    cost = _conv_factored_costs(pixels, outputs, n, P, Q, p, q, taps, R, bfloat16, row, pointwise)
    return min(cost, key=cost.__getitem__)


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
) -> Plan:
    """RANK or POINTWISE for all gradients, or PANEL for those of the weights, through that of H.

    By PANEL the input's gradient has a plan of its own; ``row`` and ``pointwise`` are those of that plan.
    """
    of_input = _conv_factored_costs(outputs, outputs, n, Q, P, q, p, taps, R, bfloat16, row, pointwise)
    of_weights = P * p * Q * q * taps * (_CONV_GRAD_FORM + outputs * _CONV_GRAD_PRODUCT)
    of_weights += (pixels * Q * q + outputs * P * p) * _CONV_GRAD_READ
    cost = {Plan.PANEL: min(of_input.values()) + of_weights}
    if pointwise:
        # R convolutions of one position by torch are never faster. The input is copied as well.
        copied = pointwise[1] + outputs * Q * q if pointwise[1] else 0
        linear = _linear_factored_grad_costs(outputs, n, P, Q, p, q, R, bfloat16)
        cost[Plan.POINTWISE] = min(linear.values()) + copied * _TURN_IMAGE
    else:
        add = _TERM_ADD_BFLOAT16 if bfloat16 else _TERM_ADD
        product = outputs * p * q * taps * _CONV_PRODUCT * _narrow(p, q)
        # Before the convolutions, and for dV and dW; for dx.
        additions = 2 * (R + Q) * pixels * q * add + 2 * (R + P) * outputs * p * add + (R + Q) * pixels * q * add
        products = (2 + _CONV_WEIGHT_GRAD) * product + 3 * p * q * taps * _TERM_FORM + 3 * _TERM_CALL
        cost[Plan.RANK] = R * products + additions
    return min(cost, key=cost.__getitem__)
