"""Autograd registration that torch.func's transforms accept.

torch.library.register_autograd makes a Function without setup_context, which torch.func.grad, jacrev and vmap around
them refuse (pytorch issues 168393, 170834 and 179652), and parses the schema at every recorded call. The kernel
registered here is what a C++ autograd function is: one level of gradient recording, below which the call goes on to the
next transform or to the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad


def autocast_enabled(device: torch.device) -> bool:
    # torch knows no autocast for meta tensors.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast does not reach into what runs on a device."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def register_autograd(library: torch.library.Library, op: Any, backward: Callable, setup_context: Callable) -> None:
    """Registers ``backward(ctx, *grads)`` and ``setup_context(ctx, inputs, output)`` for an operator of ``library``."""

    def below(*args: Any) -> Any:
        # Below view tracking too: a result that is a view of what a kernel made is not a view of an argument.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op(*args)

    def forward(*args: Any) -> Any:
        # A Function turns grad mode off, which the next level of torch.func needs to record.
        with torch.enable_grad():
            return below(*args)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"{op.name()} has no forward-mode derivative; use reverse mode (backward, jacrev)")

    def backward_as_forward(ctx: Any, *grads: Any) -> Any:
        given = next((g for g in grads if isinstance(g, Tensor)), None)
        with nullcontext() if given is None else without_autocast(given.device):
            return backward(ctx, *grads)

    members = {"forward": forward, "setup_context": setup_context, "backward": backward_as_forward, "jvp": jvp}
    function: Any = type(
        op.name().replace("::", "_"),
        (torch.autograd.function._SingleLevelFunction,),
        {name: staticmethod(member) for name, member in members.items()},
    )

    def kernel(*args: Any) -> Any:
        recording = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if recording or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():
                return function.apply(*args)
        return below(*args)

    library.impl(op.name().split("::")[1], kernel, "Autograd")


# Names of their own: each call of a small layer asks them all.
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_get_tracing_state = torch._C._get_tracing_state
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack


def may_skip_dispatch() -> bool:
    """Whether only a kernel would see a call of an operator: no recording, autocast, transform, mode or tracing."""
    return not (
        _is_grad_enabled()
        or _is_any_autocast_enabled()
        or _is_compiling()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack()
        or _peek_interpreter_stack() is not None
    )
