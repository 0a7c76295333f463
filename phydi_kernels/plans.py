"""Which plan computes a call: a pure function of shapes and types, no timing at run time.

With x seen as Q blocks of q features and y as P blocks of p features, y_k = sum_{i,l} A[i,k,l] F_i x_l:

* stream: mix the few input rows (sum_l A[i,k,l] x_l), then read F once, straight from the parameter.
* mix: the same products in cache blocks, F packed once; output block k is an extra batch row.
* panel: form a cache-sized panel of H while packing, multiply, drop it.
"""

from __future__ import annotations

import enum
from functools import lru_cache

# Nanoseconds an entry, float32 on one AVX-512 core (Zen 5); only their ratios matter.
_PRODUCT = 0.0107  # a multiplication in a packed product
_STREAM_PRODUCT = 0.0124  # the same on F as it lies
_REDUCE = 3.0  # the lanes of one result of stream added up
_READ = 0.01  # an entry of F read once
_PACK = 0.28  # an entry of F packed
_FORM = 0.2  # one term of an entry of H formed and packed, with F's rows along q to be transposed
_FORM_TRANSPOSED = 0.24  # the same with F's columns along p, lines far apart
_MIX = 0.04  # one multiplication of the algebra with the input
_COPY = 0.08  # an entry of the input packed as it is
_STREAM_UPDATE = 0.1  # a multiplication of both weight gradients, both factors in cache
_STREAM_ALGEBRA = 0.2  # a multiplication of dA's sum
_SPLIT = 0.1  # an entry of dL/dH, and
_SPLIT_TERM = 0.07  # for each term its share in dA and dF
_LANES = 16
# Stream keeps its mixed rows in L2; their number is not bounded otherwise.
_STREAM_ENTRIES = 1 << 18
# Convolutions: torch's own rate, an entry of H formed and reordered, an entry of the mixed input written and read.
_CONV_PRODUCT = 0.0083
_CONV_FORM = 1.0
_CONV_MIX = 1.0


class Plan(enum.IntEnum):
    """The numbers are the ones the compiled kernels know."""

    STREAM = 0
    MIX = 1
    PANEL = 2


def _padded(count: int, to: int = _LANES) -> int:
    return -(-count // to) * to


@lru_cache(maxsize=4096)
def phm_linear(rows: int, n: int, P: int, Q: int, p: int, q: int, contiguous: bool) -> Plan:
    """The plan of one phm_linear call: ``rows`` input rows, A (n, P, Q), F (n, p, q) ``contiguous`` along q or not."""
    wide_q = _padded(q)
    terms = n * p * wide_q
    blocks = rows * P
    mixing = blocks * n * wide_q * Q * _MIX
    cost = {
        Plan.MIX: terms * _PACK + blocks * n * q * _padded(p) * _PRODUCT + mixing,
        Plan.PANEL: P * Q * terms * (_FORM if contiguous else _FORM_TRANSPOSED)
        + rows * Q * (q * _padded(P * p) * _PRODUCT + wide_q * _COPY),
    }
    if blocks * (n * q + 64) <= _STREAM_ENTRIES:
        tiles = _padded(blocks, 4) * n
        if contiguous:
            # Lanes along q, four columns at a time, one reduction a result.
            product = tiles * _padded(p, 4) * wide_q * _STREAM_PRODUCT + blocks * _padded(p, 4) * _REDUCE
        else:
            product = tiles * _padded(p) * q * _STREAM_PRODUCT
        cost[Plan.STREAM] = terms * _READ + product + mixing
    return min(cost, key=cost.__getitem__)


@lru_cache(maxsize=4096)
def phm_linear_weight_grad(rows: int, n: int, P: int, Q: int, p: int, q: int) -> Plan:
    """STREAM (F read and dF written once, term by term) or PANEL (dL/dH in cache-sized panels)."""
    wide_q = _padded(q)
    stream = rows * P * n * wide_q * (p * _STREAM_UPDATE + Q * _STREAM_ALGEBRA)
    panel = P * p * Q * wide_q * (_SPLIT + n * _SPLIT_TERM + rows * _PRODUCT)
    fits = rows * P * (2 * q + p) <= _STREAM_ENTRIES
    return Plan.STREAM if fits and stream < panel else Plan.PANEL


@lru_cache(maxsize=4096)
def phc_conv(pixels: int, outputs: int, n: int, P: int, Q: int, p: int, q: int, taps: int) -> Plan:
    """The plan of one convolution: ``pixels`` positions to mix, ``outputs`` positions that meet every weight."""
    mix = pixels * P * n * q * _CONV_MIX + outputs * P * p * n * q * taps * _CONV_PRODUCT
    panel = P * p * Q * q * taps * (_CONV_FORM + outputs * _CONV_PRODUCT)
    return Plan.MIX if mix < panel else Plan.PANEL
