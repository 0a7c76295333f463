"""Which plan computes a call on a CUDA device: a pure function of shapes, types and compute capability.

Plans of phm_linear, for y_k = sum_{i,l} A[i,k,l] F_i x_l:

* stream: every F_i x_l of a tile in one product, summed over i and l in registers.
* built: panels of H, multiplied by cuBLAS or cuDNN and dropped before they leave L2, where they fit in it.
* mix: sum_l A[i,k,l] x_l and its product with F, both by cuBLAS: n products in place of Q, for n of at most Q/4.

With A[i,k,l] = sum_r U[r,i] V[r,k] W[r,l] known, these for A, or y_k = sum_r V[r,k] F-hat_r x-hat_r by

* fused: one kernel that forms x-hat where it is used and adds each product to P results in registers;
* epilogue: X-hat first, then the same;
* passes: X-hat, a batched product by cuBLAS or cuDNN, and the sum over Y-hat with the epilogue.

Convolutions have stream and built, or the last three; input gradients that are no convolution have mix: torch's, of
mixed gradients, for any n. Everything else is composed of torch's operators: float64, mixed types, algebras of too many
terms, cards older than compute capability 8.0.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeGuard

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Blocks that combine adds in registers, that a tile of stream holds, results that a tile of products keeps there,
# and blocks of x that fused adds on the way.
MAX_BLOCKS = 32
MAX_STREAM = 8
MAX_RESULTS = 4
MAX_FUSED_INPUTS = 4
# Taps of an implicit GEMM; more make torch's transforms worth it.
MAX_TAPS = 9


class CudaPlan(enum.Enum):
    STREAM = "stream"
    BUILT = "built"
    MIX = "mix"
    FUSED = "fused"
    EPILOGUE = "epilogue"
    PASSES = "passes"
    COMPOSED = "composed"


class Card(NamedTuple):
    """What the choice rests on; benchmarks/gpu_model.py names the sources and models more."""

    processors: int
    products: float  # multiplications a microsecond in 16-bit tensor cores, all processors
    bandwidth: float  # bytes a microsecond of device memory,
    l2: float  # and of the L2 cache
    float32: float  # multiplications a microsecond in float32 units


CARDS = {
    80: Card(108, 156e6, 2.0e6, 7.2e6, 9.7e6),
    89: Card(128, 82e6, 1.0e6, 5.0e6, 41e6),
    90: Card(132, 495e6, 3.35e6, 9.4e6, 33e6),
    100: Card(148, 1125e6, 8.0e6, 19.0e6, 37e6),
    120: Card(170, 105e6, 1.8e6, 7.0e6, 52e6),
}
# What kernels reach of the products at best, for algebras of at most 2, 4 and 8 terms: bounds of gpu_model.py, where
# L2, shared memory and the instructions that form tiles hold them back. 89 and 120 have the tensor cores of 80, where
# stream is bound as the library is: a tenth less leaves ties to the library.
_OF_PRODUCTS: dict[str, dict[int, tuple[float, ...]]] = {
    "stream": {80: (0.66, 0.66, 0.66), 90: (0.59, 0.59, 0.59), 100: (0.39, 0.39, 0.39)},
    "fused": {80: (0.43, 0.36), 90: (0.17, 0.14), 100: (0.12, 0.11)},
    "epilogue": {80: (0.53, 0.53), 90: (0.42, 0.28), 100: (0.36, 0.24)},
}
# cuBLAS, and the L2 cache; device memory.
_SUSTAINED = 0.7
_MEMORY = 0.8
# Panels of H that stay in L2 while they are multiplied.
PANEL_BYTES = 16 << 20
# Microseconds from the end of a kernel to the start of the next.
_GAP = 1.5


def architecture(capability: int) -> int:
    """The newest architecture of the tables that a card of this capability is at least; 0 below 8.0."""
    return max((a for a in CARDS if a <= capability), default=0)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(a: int) -> int:
    """The smallest that is at least ``a``."""
    return 1 << (a - 1).bit_length()


def dtype_class(dtype: torch.dtype | None, tf32: bool) -> str:
    return "16-bit" if dtype is not torch.float32 else "tf32" if tf32 else "ieee"


class _Costs:
    """Microseconds of the parts of a plan."""

    def __init__(self, dtype: torch.dtype, tf32: bool, capability: int) -> None:
        self.capability, self.card = capability, CARDS[architecture(capability)]
        self.size = dtype.itemsize
        # Multiplications a microsecond of one processor.
        of_type = {"16-bit": self.card.products, "tf32": self.card.products / 2, "ieee": self.card.float32}
        self.kind = dtype_class(dtype, tf32)
        self.rate = of_type[self.kind] / self.card.processors

    def memory(self, entries: float) -> float:
        return entries * self.size / (self.card.bandwidth * _MEMORY)

    def l2(self, entries: float) -> float:
        return entries * self.size / (self.card.l2 * _SUSTAINED)

    def tiles(self, count: int, multiplications: float, efficiency: float) -> float:
        """``count`` tiles of a result, each of so many multiplications, on all processors, a whole number of times."""
        return cdiv(count, self.card.processors) * multiplications / (self.rate * efficiency)

    def library(self, batch: int, M: int, N: int, K: int) -> float:
        """A product, or a batch of them, by cuBLAS."""
        return self.tiles(batch * cdiv(M, 128) * cdiv(N, 128), 128 * 128 * K, _SUSTAINED)

    def stream(self, rows: int, n: int, P: int, Q: int, p: int, q: int, taps: int = 1) -> float:
        M, N, K = stream_size(rows, Q), stream_size(p, n), q * taps
        height = stream_tile(M, n, P, Q, p, q)
        # About the tiles of configs.py.
        tile = (min(height, 64) or 64, 64, 16) if self.kind == "ieee" or not height else (height, 128, 64)
        splits = stream_splits(M, N, K, tile, self.capability)
        tiles, entries = cdiv(M, tile[0]) * cdiv(N, tile[1]) * splits, tile[0] * tile[1]
        products = self.tiles(tiles, entries * cdiv(K, splits), self.reaches("stream", max(n, P, Q)))
        # Behind its products a tile forms P sums, and 1.5 for what else it does once, each in 2.3 instructions.
        sums = 2.3 * (P + 1.5) * entries * self.card.processors / (self.card.float32 * _SUSTAINED)
        if architecture(self.capability) == 100:
            # Two tiles fit in a processor: one sums while the other multiplies.
            sums /= 2
        # The parts are float32, written and read.
        parts = self.l2(2 * splits * rows * P * p * 4 / self.size) + _GAP if splits > 1 else 0.0
        return products + cdiv(tiles, self.card.processors) * sums + parts + _GAP

    def built(self, rows: int, P: int, features: int, K: int) -> float:
        """Panels are written and read in L2, by a kernel for each block; the epilogue reads and writes the result."""
        moved = self.l2(2 * features * K) + self.memory(2 * rows * features)
        kernels = P + cdiv(features * K * self.size, PANEL_BYTES) + 1
        return self.library(1, rows, features, K) + moved + kernels * _GAP

    def mix(self, rows: int, n: int, P: int, Q: int, p: int, q: int) -> float:
        """Small products for each row, of which the library pads what is less than 32 by 64, and one large product."""
        small = self.tiles(rows * cdiv(P * n, 32) * cdiv(q, 64), 32 * 64 * max(Q, 16), _SUSTAINED)
        mixing = max(small, self.memory(rows * (Q + P * n) * q))
        product = max(self.library(1, rows * P, p, n * q), self.memory(rows * P * (n * q + p)))
        return mixing + product + self.memory(2 * rows * P * p) + 3 * _GAP

    def reaches(self, kernel: str, terms: int) -> float:
        of_card = _OF_PRODUCTS[kernel]
        return of_card.get(architecture(self.capability), of_card[80])[0 if terms <= 2 else 1 if terms <= 4 else 2]


def _linear_costs(costs: _Costs, rows: int, n: int, P: int, Q: int, p: int, q: int) -> dict[CudaPlan, float]:
    memory = costs.memory(n * p * q + rows * (P * p + Q * q))
    result = {CudaPlan.BUILT: max(costs.built(rows, P, P * p, Q * q), memory)}
    if max(n, P, Q) <= MAX_STREAM:
        result[CudaPlan.STREAM] = max(costs.stream(rows, n, P, Q, p, q), memory)
    return result


def stream_size(count: int, blocks: int) -> int:
    """Rows of the stream plan's product, or its features: ``blocks`` for each, filled up to a power of two."""
    return count * power_of_two(blocks)


def stream_tile(M: int, n: int, P: int, Q: int, p: int, q: int) -> int:
    """The height of the stream plan's tiles for M of its rows; 0: small ones, for which all sizes leave registers."""
    if not n == P == Q or p % 16 or q % 16 or stream_size(p, n) <= 64:
        return 0
    return next((height for height in (16, 64, 128) if M <= height), 256)


def stream_splits(M: int, N: int, q: int, tile: Sequence[int], capability: int) -> int:
    """In how many parts the stream plan sums over q, so that its tiles of M rows by N features occupy the card."""
    tiles = max(1, cdiv(M, tile[0]) * cdiv(N, tile[1]))
    return max(1, min(cdiv(q, tile[2]), MAX_BLOCKS, CARDS[architecture(capability)].processors // tiles))


def _supported(dtype: torch.dtype | None, capability: int, sizes: Sequence[int]) -> TypeGuard[torch.dtype]:
    """Whether the kernels take these types and numbers of blocks."""
    return dtype in DTYPES and architecture(capability) > 0 and min(sizes) > 0 and max(sizes) <= MAX_BLOCKS


def _few(n: int, blocks: int) -> bool:
    """Whether n terms are so few that mixing as many blocks saves most of the products."""
    return 4 * n <= blocks


def _best(cost: dict[CudaPlan, float]) -> CudaPlan:
    return min(cost, key=cost.__getitem__, default=CudaPlan.COMPOSED)


@lru_cache(maxsize=4096)
def phm_linear(
    rows: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    dtype: torch.dtype | None,
    tf32: bool,
    capability: int,
) -> CudaPlan:
    """The plan of one phm_linear call: ``rows`` input rows, A (n, P, Q), F (n, p, q), of these types."""
    # torch's own products: of the numbers of blocks only n is bounded.
    mixes = _few(n, Q) and P * p * q > 0
    if not _supported(dtype, capability, (n,) if mixes else (n, P, Q)) or not p * q:
        return CudaPlan.COMPOSED
    costs, sizes = _Costs(dtype, tf32, capability), (rows, n, P, Q, p, q)
    result = _linear_costs(costs, *sizes) if max(P, Q) <= MAX_BLOCKS else {}
    return _best(result | {CudaPlan.MIX: costs.mix(*sizes)} if mixes else result)


@lru_cache(maxsize=4096)
def phm_linear_weight_grad(n: int, P: int, Q: int, size: int, dtype: torch.dtype | None, capability: int) -> CudaPlan:
    """MIX: of mixed rows, and of the output's gradient times F; or as weight_grad."""
    if size and _few(n, min(P, Q)) and _supported(dtype, capability, (n,)):
        return CudaPlan.MIX
    return weight_grad(n, P, Q, size, dtype, capability)


@lru_cache(maxsize=4096)
def weight_grad(n: int, P: int, Q: int, size: int, dtype: torch.dtype | None, capability: int) -> CudaPlan:
    """PASSES: panels of dL/dH by cuBLAS or cuDNN, split into dA and dF; ``size`` entries of F."""
    return CudaPlan.PASSES if size and _supported(dtype, capability, (n, P, Q)) else CudaPlan.COMPOSED


def _factored_costs(
    costs: _Costs,
    pixels: int,
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    taps: int,
    R: int,
    combines: bool,
) -> dict[CudaPlan, float]:
    weights = p * q * taps
    form = costs.memory((n + R) * weights) + _GAP if combines else 0.0
    X, X_hat, Y, Y_hat = pixels * Q * q, R * pixels * q, outputs * P * p, R * outputs * p
    read = R * weights
    passes = costs.library(R, outputs, p, q * taps)
    passes = max(passes, costs.memory(X_hat + read + Y_hat)) + costs.memory(X + X_hat + Y_hat + Y) + 3 * _GAP
    result = {CudaPlan.PASSES: passes + form}
    if P <= MAX_RESULTS:
        K, tile = R * q * taps, 128 * 64
        count = cdiv(outputs, 128) * cdiv(p, 64)
        products = costs.tiles(count, tile * K, costs.reaches("epilogue", P))
        products = max(products, costs.memory(X_hat + read + Y)) + costs.memory(X + X_hat) + 2 * _GAP
        result[CudaPlan.EPILOGUE] = products + form
        if Q <= MAX_FUSED_INPUTS:
            count = cdiv(outputs, 64) * cdiv(p, 128)
            products = costs.tiles(count, tile * K, costs.reaches("fused", P))
            result[CudaPlan.FUSED] = max(products, costs.memory(X + read + Y)) + _GAP + form
    return result


@lru_cache(maxsize=4096)
def phm_linear_factored(
    rows: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    R: int,
    combines: bool,
    dtype: torch.dtype | None,
    tf32: bool,
    capability: int,
) -> CudaPlan:
    """The plan of one phm_linear_factored call of R terms; ``combines``: the weights are sum_i U[r,i] F_i, not F."""
    if not _supported(dtype, capability, (n, P, Q, R)) or not p * q:
        return CudaPlan.COMPOSED
    costs = _Costs(dtype, tf32, capability)
    result = _factored_costs(costs, rows, rows, n, P, Q, p, q, 1, R, combines)
    return _best(result | {plan: cost + _GAP for plan, cost in _linear_costs(costs, rows, n, P, Q, p, q).items()})


@lru_cache(maxsize=4096)
def factored_grad(n: int, P: int, Q: int, R: int, size: int, dtype: torch.dtype | None, capability: int) -> CudaPlan:
    """PASSES: X-hat, G-hat and three batched products, of linear layers and of convolutions; ``size`` entries of F."""
    return CudaPlan.PASSES if size and _supported(dtype, capability, (n, P, Q, R)) else CudaPlan.COMPOSED


def _implicit(kernel: Sequence[int]) -> bool:
    return len(kernel) < 3 and math.prod(kernel) <= MAX_TAPS


@lru_cache(maxsize=4096)
def phc_conv(
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    kernel: tuple[int, ...],
    dtype: torch.dtype | None,
    tf32: bool,
    capability: int,
) -> CudaPlan:
    """The plan of one convolution, or of its input's gradient as one of reversed filters: ``outputs`` pixels.

    ``kernel`` is empty where that gradient is not a convolution: of a stride, or of more padding than filters.
    """
    if not _supported(dtype, capability, (n, P, Q)) or not p * q * math.prod(kernel):
        return CudaPlan.COMPOSED
    if not kernel:
        return CudaPlan.MIX
    costs, taps = _Costs(dtype, tf32, capability), math.prod(kernel)
    result = {CudaPlan.BUILT: costs.built(outputs, P, P * p, Q * q * taps)}
    if _implicit(kernel) and max(n, P, Q) <= MAX_STREAM:
        result[CudaPlan.STREAM] = costs.stream(outputs, n, P, Q, p, q, taps)
    return _best(result)


@lru_cache(maxsize=4096)
def phc_conv_factored(
    pixels: int,
    outputs: int,
    n: int,
    P: int,
    Q: int,
    p: int,
    q: int,
    kernel: tuple[int, ...],
    R: int,
    combines: bool,
    dtype: torch.dtype | None,
    tf32: bool,
    capability: int,
) -> CudaPlan:
    """The plan of one factored convolution; ``kernel`` as for phc_conv."""
    if not _supported(dtype, capability, (n, P, Q, R)) or not p * q:
        return CudaPlan.COMPOSED
    if not kernel or not _implicit(kernel):
        return CudaPlan.PASSES
    costs = _Costs(dtype, tf32, capability)
    return _best(_factored_costs(costs, pixels, outputs, n, P, Q, p, q, math.prod(kernel), R, combines))
