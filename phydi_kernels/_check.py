"""Checks of arguments, shared by functions, algebras, layers and models."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_integer(name: str, value: Any, *, least: int = 1) -> int:
    """``value`` as an int. TypeError if it is no integer, ValueError below ``least``."""
    # The exact type first: abstract base classes are slow, and convolutions come here at each call.
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name}={value!r} must be an integer >= {least}, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}={value} must be an integer >= {least}")
    return int(value)


def check_divisible(name: str, value: Any, n: int) -> int:
    """``value`` as an int >= 1 that n divides."""
    value = check_integer(name, value)
    if value % n:
        below = value // n * n
        nearest = f"{below} and {below + n} are the nearest sizes that are" if below else f"{n} is the smallest"
        raise ValueError(f"{name}={value} is not divisible by n={n}; {nearest}")
    return value


def check_row(name: str, value: Any, rows: int) -> int | None:
    """The index of one of ``rows``, from 0; from the end if negative. None stays None."""
    if value is None:
        return None
    if check_integer(name, value, least=-rows) >= rows:
        raise ValueError(f"{name}={value} must be None or from {-rows} to {rows - 1}")
    return int(value) % rows


def check_flag(name: str, value: Any) -> None:
    """TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False")


def check_per_dimension(name: str, value: Any, dims: int, *, least: int) -> tuple[int, ...]:
    """One integer for all spatial dimensions, or one for each, as a tuple."""
    several = isinstance(value, (tuple, list)) or (isinstance(value, Sequence) and not isinstance(value, str))
    values = tuple(value) if several else (value,) * dims
    if len(values) != dims:
        raise ValueError(f"{name}={value!r} has {len(values)} entries; it must be one integer or {dims} of them")
    return tuple(check_integer(name, v, least=least) for v in values)


def check_padding(padding: Any, stride: Sequence[int], dims: int) -> str | tuple[int, ...]:
    """``"valid"``, ``"same"`` (stride 1 only), or one integer >= 0 for each dimension."""
    if not isinstance(padding, str):
        return check_per_dimension("padding", padding, dims, least=0)
    if padding not in ("valid", "same"):
        raise ValueError(f'padding={padding!r} is not one of "valid", "same" or integers >= 0')
    if padding == "same" and any(s != 1 for s in stride):
        raise ValueError(f'padding="same" needs stride 1, not {tuple(stride)}')
    return padding


def check_probability(name: str, value: Any) -> float:
    """``value`` as a float from 0 to 1."""
    value = check_finite(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be a probability from 0 to 1")
    return value


def check_finite(name: str, value: Any) -> float:
    """``value`` as a float that is neither NaN nor infinite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a finite number, not {type(value).__name__}")
    # Not math.isfinite, nor float: under torch.compile a number may be a symbol.
    number: Any = value
    if number - number != 0:
        raise ValueError(f"{name}={value} must be a finite number")
    return number if type(number) is float else float(number)
