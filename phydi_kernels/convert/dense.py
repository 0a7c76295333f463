"""Dense layers, and all those of a model, as the nearest parameterized hypercomplex ones.

With W (n*p, n*q, ...) in blocks W_kl (p, q, ...), |W - sum_i A_i (x) F_i| = |R - sum_i vec(A_i) vec(F_i)^T| for the
matrix R (n*n, p*q*...) whose row k*n + l holds the entries of W_kl (Van Loan and Pitsianis, Approximation with
Kronecker products, 1993). So the nearest sum is a truncated singular value decomposition of R. Its left vectors are
those of the triangle T in R^T = Q T, which is updated block by block: as accurate as R itself, where R R^T would square
the ratio of its singular values, and it never holds more than one block in float64.
"""

from __future__ import annotations

import copy
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy
from torch.nn.utils import skip_init
from tqdm import tqdm

from .. import reference
from .._check import DTYPES, check_flag, check_integer
from .._dataflow import is_plain
from .._table import table
from ..algebra import DecompositionError
from ..nn import PHConv1d, PHConv2d, PHConv3d, PHMLinear
from ..nn._init import check_rank, check_structure

__all__ = ["ConversionReport", "LayerReport", "convert_model", "from_conv", "from_linear"]

Dense = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Conv = PHConv1d | PHConv2d | PHConv3d
Layer = PHMLinear | Conv
Skip = str | type[Module] | Iterable[str | type[Module]] | Callable[[Module, str], bool]

_CONVS: dict[type, type] = {nn.Conv1d: PHConv1d, nn.Conv2d: PHConv2d, nn.Conv3d: PHConv3d}
_KINDS: dict[type, type] = {nn.Linear: PHMLinear, **_CONVS}
# They pass weights of the layers that they hold to fused kernels of torch.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# Of float64 in one block: it stays in cache, which makes the factorisation five times as fast as that of R whole.
_BLOCK_ENTRIES = 2**19


@dataclass(frozen=True)
class LayerReport:
    """What :func:`convert_model` did to one layer.

    Attributes:
        name: in the model, the first one of a shared layer.
        kind: the class that it had.
        before: number of its parameters.
        replacement: the class that it has now; this and the next two are None where the layer was left.
        after: number of its parameters now.
        error: |W - H| / |W| (Frobenius) of the dense weight W and the new one H; None with new weights as well.
        left: why the layer was left as it is; empty if it was not.
    """

    name: str
    kind: str
    before: int
    replacement: str | None = None
    after: int | None = None
    error: float | None = None
    left: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_model` did to a model; ``str`` gives a table.

    Attributes:
        layers: one entry for each linear layer and convolution, in the order of the model.
    """

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "convert_model: no linear layer and no convolution, the model is unchanged"
        rows = [("layer", "was", "is", "before", "parameters", "|W-H|/|W|"), *map(_row, self.layers)]
        lines = table(rows, sides="<<<>>>")
        lines += [f"{layer.name or layer.kind} is left as it is: {layer.left}" for layer in self.layers if layer.left]
        converted = [layer for layer in self.layers if not layer.left]
        before, after = sum(layer.before for layer in converted), sum(layer.after or 0 for layer in converted)
        lines.append(
            f"{len(converted)} of {len(self.layers)} layers converted: {after:,} parameters in place of {before:,}"
        )
        return "\n".join(lines)


def from_linear(
    linear: nn.Linear,
    n: int,
    *,
    algebra: Tensor | None = None,
    algebra_rank: int | str | None = None,
    learn_algebra: bool | None = None,
) -> PHMLinear:
    r"""The PHM layer nearest to a dense linear layer.

    .. math:: \min_{A, F} \Bigl\| W - \sum_{i=1}^n A_i \otimes F_i \Bigr\|_F

    (Van Loan and Pitsianis, Approximation with Kronecker products, 1993; the sum is PHYDI's Eq. 1). This is the global
    minimum, from one singular value decomposition. A weight that is such a sum is recovered to rounding. Most are
    not: of a trained dense layer much of W is lost, and the model needs training again (:func:`convert_model` reports
    the relative error).

    A and F are determined up to an invertible n x n matrix between their terms. Here the terms of A are orthogonal and
    of norm sqrt(n) each, and F holds the singular values: A has the variance 1/n of a new layer, and a gradient step of
    F moves all terms of H alike, those that start at zero included. The first entry of A_i that is at least half as
    large as its largest is positive. Where singular values coincide, their terms are one of many equally good choices.

    Everything is computed in float64 on the CPU and rounded once. F is optimal for A, or U, V and W, as rounded.

    Args:
        linear: of which ``weight (n*p, n*q)`` and ``bias`` are read; not changed.
        n: the dimension of the algebra; it divides both sizes.
        algebra: a structure tensor ``(n, n, n)``, such as ``algebra.quaternions()``, for A; only F is fitted then, and
            of the minima of linearly dependent terms it is the one of least norm.
        algebra_rank: R, as in :class:`nn.PHMLinear`: the layer holds U, V and W, an exact decomposition of the A
            above, by :func:`algebra.decompose`. ``"generic"``, 7 for n = 4, suffices for almost every fitted A.
        learn_algebra: as in :class:`nn.PHMLinear`. By default an A that was fitted is learned, and one that was given
            is not.

    Returns:
        The layer, in training or evaluation mode as ``linear`` is, with its dtype, device and bias. The parameters
        share no memory with it. A, F and the bias require gradients where ``weight`` and ``bias`` do.

    Raises:
        TypeError: ``linear`` is no nn.Linear or has no real floating-point dtype, n is no integer, or another argument
            has the wrong type.
        ValueError: n is below 1 or does not divide a size; the weight is on the meta device, not yet initialised, NaN
            or infinite, or so large that F, of up to sqrt(n) times its size, overflows; ``algebra`` is not
            ``(n, n, n)``, not finite, or zero; ``algebra_rank`` is out of range.
        DecompositionError: no algorithm of ``algebra_rank`` terms was found.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be a torch.nn.Linear, not {type(linear).__name__}")
    return cast(PHMLinear, _nearest("linear", linear, _Options(n, algebra, algebra_rank, learn_algebra))[0])


def from_conv(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    n: int,
    *,
    algebra: Tensor | None = None,
    algebra_rank: int | str | None = None,
    learn_algebra: bool | None = None,
) -> PHConv1d | PHConv2d | PHConv3d:
    r"""The PH convolution nearest to a dense one: :func:`from_linear` for W ``(n*p, n*q, *kernel_size)``.

    Stride, padding and dilation are kept, and F lies in memory as W does: contiguous or channels_last.

    Args:
        conv: with ``groups=1`` and ``padding_mode="zeros"``; otherwise as ``linear`` of :func:`from_linear`.
        n, algebra, algebra_rank, learn_algebra: as in :func:`from_linear`.

    Returns:
        A layer of as many spatial dimensions, otherwise as from :func:`from_linear`.

    Raises:
        TypeError, ValueError, DecompositionError: as :func:`from_linear`; ValueError also for other ``groups`` or
            another ``padding_mode``.
    """
    if not isinstance(conv, tuple(_CONVS)):
        raise TypeError(f"conv must be a torch.nn.Conv1d, Conv2d or Conv3d, not {type(conv).__name__}")
    if reason := _other_convolution(conv):
        raise ValueError(f"conv cannot be a PH convolution: {reason}")
    return cast(Conv, _nearest("conv", conv, _Options(n, algebra, algebra_rank, learn_algebra))[0])


def convert_model(
    model: Module,
    n: int,
    *,
    algebra: Tensor | None = None,
    algebra_rank: int | str | None = None,
    learn_algebra: bool | None = None,
    weights: str = "nearest",
    skip: Skip = (),
    inplace: bool = False,
    progress: bool = True,
    verbose: bool = True,
) -> Module:
    """A model with PHM layers and PH convolutions in place of its dense ones, with about 1/n of their parameters.

    Every nn.Linear and nn.Conv1d/2d/3d is replaced, a shared one at all its places, by the layer that
    :func:`from_linear` or :func:`from_conv` finds. A generic dense weight is no sum of n Kronecker products, so that a
    trained model computes something else afterwards and needs training again; the report has each layer's relative
    error. Optimizers must be made anew, from the parameters of the result.

    Left as they are, with the reason in the report: what ``skip`` names; subclasses, and layers with hooks,
    parametrizations or a forward of their own; layers inside nn.MultiheadAttention and nn.TransformerEncoderLayer,
    which read their weights; weights that another module holds as well; grouped convolutions and other padding modes
    than zeros; sizes that n does not divide; and layers that would not have fewer parameters. A forward that reads the
    ``weight`` of a layer it holds fails afterwards: name that layer in ``skip``.

    Args:
        model: in training or evaluation mode.
        n: the dimension of the algebra.
        algebra, algebra_rank, learn_algebra: as in :func:`from_linear`, for every layer. A layer whose fitted A has no
            algorithm of ``algebra_rank`` terms is left as it is.
        weights: ``"nearest"`` fits each layer's weights; ``"new"`` draws them, and the bias, as the constructors do,
            for training from scratch.
        skip: names or classes of modules to leave, with all that they hold: ``skip=("head", nn.Conv1d)``. A name is
            the whole one, ``"encoder.head"``, or its last parts, ``"head"``. Or a function of a layer and its name,
            true for the layers to leave.
        inplace: replaces the layers in ``model`` itself; otherwise in a copy, and ``model`` stays as it is.
        progress: shows a progress bar if this takes more than a second.
        verbose: prints the report.

    Returns:
        The model, with a :class:`ConversionReport` in its attribute ``conversion_report``.

    Raises:
        TypeError: ``model`` is not a Module, or another argument has the wrong type.
        ValueError: ``model`` is itself a layer with ``inplace``; ``skip`` has a name that no module has; ``weights`` is
            unknown; with ``"nearest"``, the weight of a layer is on the meta device, NaN or infinite; or as
            :func:`from_linear`. The model is unchanged then.
        DecompositionError: ``algebra`` has no algorithm of ``algebra_rank`` terms.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, flag in (("inplace", inplace), ("progress", progress), ("verbose", verbose)):
        check_flag(name, flag)
    if weights not in ("nearest", "new"):
        raise ValueError(f'weights={weights!r} must be "nearest" or "new"')
    if inplace and type(model) in _KINDS:
        raise ValueError(f"inplace=True cannot replace the model itself, a {type(model).__name__}; use inplace=False")
    options = _Options(n, algebra, algebra_rank, learn_algebra)
    left = _left(model, skip, options)
    replacements: dict[Module, Layer] = {}
    reports = []
    modules = dict(model.named_modules())
    for name in tqdm(left, desc="convert layers", delay=1, leave=False, disable=not progress):
        dense, reason, error = cast(Dense, modules[name]), left[name], None
        if not reason and weights == "new":
            replacements[dense] = _counterpart(dense, options)
        elif not reason:
            try:
                replacements[dense], error = _nearest(f"layer {name!r}", dense, options)
            except DecompositionError as failure:
                reason = str(failure)
        reports.append(_report(name, dense, replacements.get(dense), error, reason))
    if inplace:
        for parent in list(model.modules()):
            for key, child in list(parent._modules.items()):
                if child in replacements:
                    parent._modules[key] = replacements[child]
        result = model
    else:
        # What is replaced counts as copied already.
        result = copy.deepcopy(model, {id(dense): layer for dense, layer in replacements.items()})
    report = ConversionReport(tuple(reports))
    result.conversion_report = report  # type: ignore[assignment]
    if verbose:
        print(report)
    return result


class _Options:
    """The checked arguments that all layers share."""

    def __init__(self, n: int, algebra: Tensor | None, algebra_rank: int | str | None, learn: bool | None) -> None:
        self.n = check_integer("n", n)
        self.algebra_rank = check_rank("algebra_rank", algebra_rank, self.n)
        allowed = f"None or a real floating-point tensor of shape (n, n, n) = ({self.n}, {self.n}, {self.n})"
        self.algebra = None if algebra is None else check_structure("algebra", algebra, self.n, allowed).cpu().double()
        if learn is not None:
            check_flag("learn_algebra", learn)
        self.learn_algebra = algebra is None if learn is None else learn
        self.given = None if self.algebra is None else self.parameters(self.algebra)

    def parameters(self, A: Tensor) -> dict[str, Tensor]:
        """A, or U, V and W, under their names, as a layer starts from A."""
        with torch.random.fork_rng(devices=[]):
            smallest = PHMLinear(
                *(self.n,) * 3, bias=False, algebra_rank=self.algebra_rank, init=A, device="cpu", dtype=torch.float64
            )
        return {name: p.detach() for name, p in smallest.named_parameters() if name != "F"}


def _counterpart(dense: Dense, options: _Options, *, empty: bool = False) -> Layer:
    """The layer that replaces ``dense``, newly drawn or without values."""
    weight, bias = dense.weight, dense.bias
    outputs, inputs, *kernel = weight.shape
    sizes: tuple[Any, ...] = inputs, outputs, options.n
    if not isinstance(dense, nn.Linear):
        sizes = inputs, outputs, kernel, options.n, dense.stride, dense.padding, dense.dilation
    kind = next(ours for theirs, ours in _KINDS.items() if isinstance(dense, theirs))
    layer = (functools.partial(skip_init, kind) if empty else kind)(
        *sizes,
        bias=bias is not None,
        algebra_rank=options.algebra_rank,
        init="fan" if options.algebra is None else options.algebra,
        learn_algebra=options.learn_algebra,
        device=weight.device,
        dtype=weight.dtype,
    )
    layer.F = Parameter(_in_format_of(weight, layer.F.detach()))
    for p in layer.parameters():
        p.requires_grad_(p.requires_grad and weight.requires_grad)
    if bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    return layer.train(dense.training)


def _in_format_of(weight: Tensor, F: Tensor) -> Tensor:
    """F, in channels_last if W is."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if layout is None or not weight.is_contiguous(memory_format=layout):
        return F
    return F.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, F.shape[:2])


@torch.no_grad()
def _nearest(name: str, dense: Dense, options: _Options) -> tuple[Layer, float]:
    """The nearest layer, and |W - H| / |W|."""
    if is_lazy(dense.weight):
        raise ValueError(f"the weight of {name} is not initialised yet; call the layer once before")
    weight = dense.weight.detach()
    if weight.is_meta:
        raise ValueError(f"the weight of {name} is on the meta device and holds no values")
    if not weight.isfinite().all():
        raise ValueError(f"the weight of {name} must be finite, and it holds NaN or infinity")
    layer = _counterpart(dense, options, empty=True)
    parameters = options.given or options.parameters(_nearest_algebra(weight, options.n))
    for key, value in parameters.items():
        layer.get_parameter(key).copy_(value)
    if dense.bias is not None:
        cast(Parameter, layer.bias).copy_(dense.bias)
    factors = [layer.get_parameter(key).cpu().double() for key in parameters]
    terms = (factors[0] if len(factors) == 1 else reference.structure(*factors)).flatten(1)
    solve = torch.linalg.pinv(terms.mT)
    parts, errors, sizes = [], [], []
    for block in _blocks(weight, options.n):
        parts.append((solve @ block).to(weight.dtype))
        errors.append((block - terms.mT @ parts[-1].double()).norm())
        sizes.append(block.norm())
    F = torch.cat(parts, 1)
    if not F.isfinite().all():
        raise ValueError(f"the weight of {name} is too large: F does not fit into {weight.dtype}")
    layer.F.copy_(F.view(layer.F.shape))
    size = torch.stack(sizes).norm().item()
    return layer, torch.stack(errors).norm().item() / size if size else 0.0


def _nearest_algebra(weight: Tensor, n: int) -> Tensor:
    """sqrt(n) times the n first left singular vectors of R, (n, n, n), on the CPU."""
    triangle = torch.empty(0, n * n, dtype=torch.float64, device="cpu")
    for block in _blocks(weight, n):
        triangle = torch.linalg.qr(torch.cat([triangle, block.mT]), mode="r").R
    # Of fewer than n columns, the remaining vectors are those of singular values 0.
    columns = torch.nn.functional.pad(triangle.mT, (0, max(0, n - len(triangle))))
    vectors = torch.linalg.svd(columns, full_matrices=False).U[:, :n].mT
    # Not the largest entry itself: in a known algebra many are equally large but for rounding.
    large = vectors.abs() >= vectors.abs().amax(1, keepdim=True) / 2
    signs = vectors.gather(1, large.int().argmax(1, keepdim=True)).sign()
    return (math.sqrt(n) * signs * vectors).view(n, n, n)


def _blocks(weight: Tensor, n: int) -> Iterator[Tensor]:
    """R by some of its columns at a time, in float64 on the CPU."""
    blocks = weight.unflatten(0, (n, -1)).unflatten(2, (n, -1)).transpose(0, 1)
    # At least as many columns as the triangle has, which is factorised with them.
    rows = max(_BLOCK_ENTRIES, n**4) // blocks[0].numel()
    for part in blocks.split(max(1, rows)):
        yield part.permute(1, 2, 0, *range(3, part.dim())).cpu().double().reshape(n * n, -1)


def _left(model: Module, skip: Skip, options: _Options) -> dict[str, str]:
    """Why each layer of the model is left as it is, by its name; empty if it is not."""
    modules = dict(model.named_modules())
    skipped = _skipped(model, skip)
    read = {child: type(m).__name__ for m in modules.values() if isinstance(m, _READERS) for child in m.children()}
    owners: dict[Parameter, list[str]] = {}
    for name, m in modules.items():
        for key, p in m.named_parameters(recurse=False):
            owners.setdefault(p, []).append(f"{name}.{key}")

    def reason(name: str, dense: Dense) -> str:
        kind = type(dense)
        if skipped(dense, name):
            return "it is in skip"
        if kind not in _KINDS:
            return f"{kind.__name__} is a subclass or has parametrizations"
        if not is_plain(dense):
            return "it has hooks or a forward of its own"
        if dense in read:
            return f"{read[dense]} reads its weight"
        for key, p in dense.named_parameters(recurse=False):
            others = [owner for owner in owners[p] if owner != f"{name}.{key}"]
            if others:
                return f"its {key} is that of {others[0]}"
        return _unfit(dense, options)

    return {name: reason(name, cast(Dense, m)) for name, m in modules.items() if isinstance(m, tuple(_KINDS))}


def _skipped(model: Module, skip: Skip) -> Callable[[Module, str], bool]:
    """The predicate that ``skip`` is or stands for."""
    if callable(skip) and not isinstance(skip, (type, Module)):
        return skip
    named = dict(model.named_modules(remove_duplicate=False))
    held: set[Module] = set()
    entries = skip if isinstance(skip, Iterable) and not isinstance(skip, (str, Module)) else (skip,)
    for entry in entries:
        if isinstance(entry, str):
            found = [m for name, m in named.items() if name == entry or name.endswith(f".{entry}")]
            if not found:
                close = difflib.get_close_matches(entry, named, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"skip has {entry!r}, and no module has this name{hint}")
        elif isinstance(entry, type) and issubclass(entry, Module):
            found = [m for m in named.values() if isinstance(m, entry)]
        else:
            raise TypeError(f"skip must be names or classes of modules, or a function; it has a {type(entry).__name__}")
        held.update(inner for m in found for inner in m.modules())
    return lambda module, name: module in held


def _unfit(dense: Dense, options: _Options) -> str:
    """Why no smaller PH layer does what ``dense`` does; empty if one does."""
    weight, n = dense.weight, options.n
    outputs, inputs = weight.shape[:2]
    if not isinstance(dense, nn.Linear) and (reason := _other_convolution(dense)):
        return reason
    if weight.dtype not in DTYPES:
        return f"its dtype {weight.dtype} is not one of {', '.join(map(str, DTYPES))}"
    unit = "features" if isinstance(dense, nn.Linear) else "channels"
    for name, size in ((f"in_{unit}", inputs), (f"out_{unit}", outputs)):
        if size % n:
            return f"{name}={size} is not divisible by n={n}"
    algebra = n**3 if options.algebra_rank is None else 3 * n * options.algebra_rank
    if algebra + weight.numel() // n >= weight.numel():
        return f"its weight has {weight.numel():,} parameters, and would have {algebra + weight.numel() // n:,}"
    return ""


def _other_convolution(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str:
    if conv.groups != 1:
        return f"groups={conv.groups} is not 1"
    return "" if conv.padding_mode == "zeros" else f'padding_mode="{conv.padding_mode}" is not "zeros"'


def _report(name: str, dense: Module, layer: Layer | None, error: float | None, reason: str) -> LayerReport:
    kind, before = type(dense).__name__, _count(dense)
    if layer is None:
        return LayerReport(name, kind, before, left=reason)
    return LayerReport(name, kind, before, type(layer).__name__, _count(layer), error)


def _count(module: Module) -> int:
    return sum(0 if is_lazy(p) else p.numel() for p in module.parameters())


def _row(layer: LayerReport) -> tuple[str, ...]:
    name = layer.name or layer.kind
    if layer.after is None:
        return name, layer.kind, "-", f"{layer.before:,}", "-", "-"
    error = "-" if layer.error is None else f"{layer.error:.2g}"
    return name, layer.kind, str(layer.replacement), f"{layer.before:,}", f"{layer.after:,}", error
