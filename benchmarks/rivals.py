"""What is timed, what its results must be, and how it is timed."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phydi_kernels.demo.layer_times import kronecker_sum

SECONDS_PER_CASE = 1.0
MIN_ROUNDS = 5
# Long against the clock's resolution, short against a busy moment of the machine.
SECONDS_PER_TURN = 1e-3
# Three roundings, of the largest of some 1e7 normally distributed results, which is five to six times their RMS.
ROUNDING = 8.0


@dataclass(frozen=True)
class Rival:
    """A call to time; ``results`` names the tensors it returns."""

    call: Callable[[], Sequence[Tensor]]
    results: tuple[str, ...] = ("output",)


def forward(layer: nn.Module, x: Tensor) -> Rival:
    return Rival(lambda: (layer(x),))


def forward_backward(layer: nn.Module, x: Tensor, grad_output: Tensor) -> Rival:
    """The gradients of x and of every parameter."""
    inputs = {"x": x, **dict(layer.named_parameters())}
    wanted = tuple(inputs.values())
    return Rival(lambda: torch.autograd.grad(layer(x), wanted, grad_output), tuple(inputs))


def expected_results(
    dense: Callable[[Tensor, Tensor, Tensor], Tensor], layer: nn.Module, x: Tensor, grad_output: Tensor | None
) -> dict[str, Tensor]:
    """Output and gradients of ``dense(x, H, bias)`` in float64, H formed whole from the parameters of ``layer``.

    ``weight`` is the gradient of H, which is the dense layer's weight; those of U, V and W come with that of A, the
    published layer's, where ``layer`` has them in its place.
    """
    inputs = {"x": x, **dict(layer.named_parameters())}
    inputs = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    with torch.set_grad_enabled(grad_output is not None):
        if "A" not in inputs:
            inputs["A"] = torch.einsum("ri,rk,rl->ikl", *(inputs[name] for name in ("U", "V", "W")))
        inputs["weight"] = kronecker_sum(inputs["A"], inputs["F"])
        y = dense(inputs["x"], inputs["weight"], inputs["bias"])
    if grad_output is None:
        return {"output": y}
    return dict(zip(inputs, torch.autograd.grad(y, tuple(inputs.values()), grad_output.double()), strict=True))


def check_results(name: str, rival: Rival, expected: Mapping[str, Tensor], terms: int) -> None:
    """Every entry within rounding of float64, relative to the RMS of its tensor; sums of ``terms`` products.

    Raises:
        AssertionError: a result that rounding does not explain.
    """
    for result, actual in zip(rival.results, rival.call(), strict=True):
        dtype, reference = actual.dtype, expected[result]
        work = torch.promote_types(dtype, torch.float32)
        allowed = ROUNDING * (torch.finfo(dtype).eps + math.sqrt(terms) * torch.finfo(work).eps)
        rms = reference.square().mean().sqrt()
        error = float((actual.double() - reference).abs().max() / rms)
        # Written so that a NaN fails.
        assert error <= allowed, f"{name}: {result} is off by {error:.1e} of its RMS, allowed {allowed:.1e}"


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def shortest_of_first_calls(rivals: Mapping[str, Rival], calls: int) -> dict[str, float]:
    """Seconds, to tell who need not be timed further."""

    def seconds(rival: Rival) -> float:
        start = time.perf_counter()
        rival.call()
        return time.perf_counter() - start

    return {name: min(seconds(rival) for _ in range(calls)) for name, rival in rivals.items()}


def paired_times(
    rivals: Mapping[str, Rival],
    device: torch.device,
    seconds: float = SECONDS_PER_CASE,
    min_rounds: int = MIN_ROUNDS,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of one call, a list of rounds for each rival; and how many calls a turn had.

    In each round every rival has one turn, in an order drawn anew: a slow moment of the machine meets all of them, and
    none of them always finds the cache as the same neighbour left it. A turn is as many calls as fill SECONDS_PER_TURN.
    """

    def turn(call: Callable[[], Sequence[Tensor]], calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, rival in rivals.items():
        turn(rival.call, 1)
        calls[name] = math.ceil(SECONDS_PER_TURN / turn(rival.call, 1))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(times[order[0]]) < min_rounds or time.perf_counter() < end:
            shuffle(order)
            for name in order:
                times[name].append(turn(rivals[name].call, calls[name]))
    finally:
        if collecting:
            gc.enable()
    return times, calls
