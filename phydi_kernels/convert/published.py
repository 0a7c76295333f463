"""Checkpoints of the published hypercomplex layers and models."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from .._check import check_flag
from ..algebra import DecompositionError
from ..models.phresnet import PHResNet, ResidualBlock
from ..models.phtransformer_lm import PHTransformerLM, sinusoidal_positions
from ..nn import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHMMultiheadAttention,
    PHTransformerDecoderLayer,
    PHTransformerEncoderLayer,
)
from ..nn._base import HypercomplexLayer
from ..nn._fixup import Shift
from ..nn._init import balanced_terms, spare_terms
from ..nn.factored import FactoredLayer

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys

# Published names of submodules and entries, where they are not ours; one of a submodule's own is relative to it.
_NAMES: dict[type[Module], dict[str, str]] = {
    PHResNet: {"stem": ""},
    ResidualBlock: {"branch": "", "shortcut.conv1": "0", "shortcut.bn1": "1", "alpha": "res_weight"},
    PHTransformerLM: {"embedding": "src_tok_emb.embedding", "encoder": "transformer_encoder"},
    PHTransformerEncoderLayer: {"norm1": "ln1", "norm2": "ln2", "alpha1": "res_weight1", "alpha2": "res_weight2"},
    PHMMultiheadAttention: {"in_proj": "", "in_proj.bias": "in_proj_bias"},
}
_CONVS = (PHConv1d, PHConv2d, PHConv3d)
_FACTORS = ("U", "V", "W")
# PHYDI's configuration gives ln_vers as the text "None", for which layers are made with normalisations they do not use.
_IDLE_NORMS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")
_POSITIONS = "positional_encoding.pos_embedding"
# They are computed in float32, and may have been stored in 16 bits.
_POSITIONS_TOLERANCE = 1e-2


def load_reference_state_dict(
    module: Module, state_dict: Mapping[str, Any], *, strict: bool = True
) -> _IncompatibleKeys:
    r"""Loads a checkpoint of the published layers into this package's, which then compute what those did.

    The published code is that of PHYDI (Mancanelli et al., 2023) and of HyperNets (Grassucci et al., 2022). Values are
    copied into the parameters that the module has, whose dtype and device stay, as
    :meth:`torch.nn.Module.load_state_dict` does.

    The mapping goes by the modules: these take their entries from other names, wherever in ``module`` they are, and
    every other module takes its own unchanged.

    =====================================================  ===========================================================
    ours                                                   published, after the same prefix
    =====================================================  ===========================================================
    each hypercomplex layer: ``A``, or ``U, V, W``         ``A`` or ``a``
    ``PHConv1d``, ``2d``, ``3d``: ``F``                    ``F`` or ``s``
    ``PHConv1d``, ``2d``, ``3d``: ``bias``                 ``bias``, its values replaced by 0
    each other hypercomplex layer: ``F``                   ``S`` or ``s``
    ``PHMMultiheadAttention``: ``in_proj.*``               ``A``, ``S``, ``in_proj_bias``
    ``PHTransformerEncoderLayer``: ``norm1``, ``norm2``    ``ln1``, ``ln2``
    ``PHTransformerEncoderLayer``: ``alpha1``, ``alpha2``  ``res_weight1``, ``res_weight2``
    ``PHTransformerLM``: ``embedding``, ``encoder``        ``src_tok_emb.embedding``, ``transformer_encoder``
    ``PHResNet``: ``stem.conv1``, ``stem.bn1``             ``conv1``, ``bn1``
    its blocks: ``branch.conv1``..., ``alpha``             ``conv1``..., ``res_weight``
    its blocks: ``shortcut.conv1``, ``shortcut.bn1``       ``shortcut.0``, ``shortcut.1``
    =====================================================  ===========================================================

    A published convolution holds a bias that it never adds. Here it is left out, and a convolution of ours that has a
    bias gets zeros: build it with ``bias=False``, as :class:`PHResNet` does, or it is learned from there.

    A layer with ``algebra_rank`` gets an algorithm of the published A (:func:`phydi_kernels.algebra.decompose`), the
    factors of each term with equal norms. Terms that A does not need have U[r] = 0 and the V[r] and W[r] that the layer
    has: they add nothing, and learn.

    Which model to build:

    * ``PHCResNet18``, ``34``, ``50``, ``101`` and ``152`` with n = 2 or 4: ``phresnet18(n, num_classes)`` and so on,
      their ``...Large`` the same with n = 3; with ``rezero=True`` ``init="phydi"``, else ``init="standard"``. The
      zero channel in front of RGB is added by ours; ``in_channels=4`` for images that have it already. For images of
      32 x 32, as theirs. Real networks, ``ResNet18`` and so on, are those with n = 1.
    * ``EncTransformer``: ``PHTransformerLM(src_vocab_size, emb_size, nhead, n, num_encoder_layers, dim_feedforward,
      dropout, norm)``, whose tokens are ``(batch, length)``, not ``(length, batch)``; with ``rezero=True``
      ``norm="phydi", alphas="separate"``, else ``norm=ln_vers``. ``"pre"`` has no LayerNorm after the last layer
      there: set ``model.encoder.norm = None`` before. The entries do not tell ``"pre"`` from ``"post"``, nor from
      ``ln_vers`` ``"gpt2"`` or none, which ours has not. Embeddings are scaled there by sqrt(d) twice and here
      once: the second goes into F, whose gradients are larger by as much. Positions are not held here.
    * layers in a model of your own: the same model with layers of this package in the places of theirs.

    Their sound event detection saves ``{"model_state_dict": ...}``, which may be given as it is, and older ones of it
    have "module." before each name, which is taken off.

    Not loaded: convolutions with ``kron_weights`` (WKP), which are no Kronecker products there; ``kron_res``; Fixup,
    which cannot be built there; decoder layers. A linear layer with ``kron_weights`` takes those of WKP. A checkpoint
    of this package is one for ``module.load_state_dict``: here its names are not expected, but for those of a
    convolution alone, whose bias would be lost.

    Args:
        module: a layer, a model, or any module that holds some.
        state_dict: the published one; it is not changed.
        strict: whether all names must match.

    Returns:
        A named tuple of ``missing_keys`` and ``unexpected_keys``, both lists of published names.

    Raises:
        TypeError: ``module`` is not a Module, ``state_dict`` not a mapping from names, or ``strict`` not a bool.
        RuntimeError: with all that does not fit, and nothing is loaded: names, if ``strict``, and in any case shapes,
            what is not loaded, and an A without an algorithm of the layer's rank.
    """
    if not isinstance(module, Module):
        raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping from names to tensors, not {type(state_dict).__name__}")
    check_flag("strict", strict)
    own = module.state_dict()
    given = _unwrapped(state_dict, own)
    places = {place.own: place for place in _places(module)}
    entries = {key: _entry(key, value, places) for key, value in own.items()}
    found = {key: name for key, entry in entries.items() if (name := entry.source(given)) is not None}
    missing = list(dict.fromkeys(entry.names[0] for key, entry in entries.items() if key not in found))
    expected = {*found.values(), *(name for place in places.values() for name in _without_effect(place))}
    unexpected = [name for name in given if name not in expected]
    problems = [problem for place in places.values() for problem in _refusals(place, given)]
    problems += [problem for key, name in found.items() for problem in _misfits(key, entries[key], name, given[name])]
    if strict:
        problems = _mismatches(missing, unexpected, own, places.values()) + problems
    _raise(module, problems)
    values = _values(module, {key: (entries[key], name, given[name]) for key, name in found.items()})
    result = module.load_state_dict(values, strict=False)
    return result._replace(missing_keys=missing, unexpected_keys=unexpected)


@dataclass(frozen=True)
class _Place:
    """A module, the prefixes of its entries, and the published names of those entries and submodules that have others.

    ``scale`` is what its F is multiplied by.
    """

    module: Module
    own: str
    published: str
    names: Mapping[str, str]
    scale: float


@dataclass(frozen=True)
class _Entry:
    """The names of which an entry of ours has one, the shape that the tensor has there, and its value for that one."""

    names: tuple[str, ...]
    shape: tuple[int, ...] | None
    value: Callable[[Any], Any] = field(default=lambda published: published)

    def source(self, given: Collection[str]) -> str | None:
        return next((name for name in self.names if name in given), None)


def _unwrapped(state_dict: Mapping[str, Any], own: Collection[str]) -> Mapping[str, Any]:
    """The entries themselves, under the names that they have without torch.nn.DataParallel."""
    inner = state_dict.get("model_state_dict")
    given = inner if isinstance(inner, Mapping) else state_dict
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"state_dict has an entry {name!r}; its names must be str, not {type(name).__name__}")
    if any(name.startswith("module.") for name in own) or not all(name.startswith("module.") for name in given):
        return given
    return {name.removeprefix("module."): value for name, value in given.items()}


def _places(
    module: Module, own: str = "", published: str = "", names: Mapping[str, str] | None = None, scale: float = 1.0
) -> Iterator[_Place]:
    """The module and all within it."""
    known = next((table for kind, table in _NAMES.items() if isinstance(module, kind)), {})
    names = {**(names or {}), **known}
    yield _Place(module, own, published, names, scale)
    for name, child in module._modules.items():
        if child is None:
            continue
        inner = {key.removeprefix(f"{name}."): other for key, other in names.items() if key.startswith(f"{name}.")}
        other = names.get(name, name)
        factor = math.sqrt(module.d_model) if isinstance(module, PHTransformerLM) and name == "embedding" else 1.0
        yield from _places(child, f"{own}{name}.", f"{published}{other}." if other else published, inner, factor)


def _entry(key: str, value: Any, places: Mapping[str, _Place]) -> _Entry:
    """Of our entry ``key``, which has this value now."""
    head, dot, leaf = key.rpartition(".")
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    place = places.get(head + dot)
    if place is None:
        return _Entry((key,), shape)
    same = (place.published + place.names.get(leaf, leaf),)
    if not isinstance(place.module, HypercomplexLayer):
        return _Entry(same, shape)
    if leaf in ("A", *_FACTORS):
        names = (place.published + "A", place.published + "a")
        if leaf == "A":
            return _Entry(names, shape)
        n = value.shape[1]
        return _Entry(names, (n, n, n), partial(_factor, _FACTORS.index(leaf), value))
    conv = isinstance(place.module, _CONVS)
    if leaf == "F":
        names = (place.published + ("F" if conv else "S"), place.published + "s")
        return _Entry(names, shape, partial(_scaled, place.scale))
    return _Entry(same, shape, torch.zeros_like) if conv and leaf == "bias" else _Entry(same, shape)


def _factor(index: int, own: Tensor, A: Tensor) -> Tensor:
    """U, V or W of A, by its index; ``own`` is what the layer holds in its place."""
    terms = balanced_terms(A, len(own))
    factor = terms[index].clone()
    if index > 0 and not own.is_meta:
        spare = spare_terms(terms[0])
        # Of a layer whose values were never drawn, none that would turn a zero into NaN.
        factor[spare] = own[spare].to(factor).nan_to_num(0.0, 0.0, 0.0)
    return factor


def _scaled(scale: float, F: Tensor) -> Tensor:
    return F if scale == 1 else F.to(torch.promote_types(F.dtype, torch.float32)) * scale


def _without_effect(place: _Place) -> list[str]:
    """Published names of which ours has nothing, since they do nothing or the same without being held."""
    names: tuple[str, ...] = ()
    if isinstance(place.module, _CONVS):
        names = ("bias",)
    elif isinstance(place.module, PHTransformerLM):
        names = (_POSITIONS,)
    elif isinstance(place.module, PHTransformerEncoderLayer) and place.module.norm == "phydi":
        names = _IDLE_NORMS
    return [place.published + name for name in names]


def _refusals(place: _Place, given: Mapping[str, Any]) -> Iterator[str]:
    """What the checkpoint holds for a module of ours that does not compute the same."""
    module, name = place.module, place.own.removesuffix(".") or type(place.module).__name__

    def holds(*entries: str) -> bool:
        return any(place.published + entry in given for entry in entries)

    if isinstance(module, HypercomplexLayer):
        if holds("kron_weights") and isinstance(module, _CONVS):
            yield f"{name}: a published convolution with kron_weights is no sum of Kronecker products, as all are here"
        if holds("A2"):
            yield f"{name}: kron_res adds a second sum of Kronecker products, for which no layer here has parameters"
    elif isinstance(module, FactoredLayer):
        if holds("A", "a"):
            yield f"{name}: a layer of optimize_for_inference takes no A; load the model before that"
    elif isinstance(module, PHMMultiheadAttention):
        if holds("A") and not module.fused_qkv:
            yield f"{name}: query, key and value have one projection in the checkpoint; make it with fused_qkv=True"
    elif isinstance(module, PHTransformerEncoderLayer):
        yield from (f"{name}: {reason}" for reason in _layer_refusals(place, module, given))
    elif isinstance(module, PHTransformerDecoderLayer):
        if holds("linear1.A"):
            yield f"{name}: published decoder layers compute what none here does, and are not loaded"
    elif isinstance(module, PHResNet):
        if holds("linear.weight") and isinstance(module.shift, Shift):
            yield f'{name}: init="fixup" has no checkpoints, since the published Fixup networks cannot be built'
    elif isinstance(module, PHTransformerLM):
        if holds(_POSITIONS) and not _sinusoidal(given[place.published + _POSITIONS], module.d_model):
            yield f"{place.published}{_POSITIONS} are not the sinusoids of d_model={module.d_model}, which {name} adds"


def _layer_refusals(place: _Place, layer: PHTransformerEncoderLayer, given: Mapping[str, Any]) -> Iterator[str]:
    if layer.norm == "fixup" and place.published + "linear1.A" in given:
        yield 'the published layers have no norm="fixup"'
    if layer.norm != "phydi":
        return
    if layer.alphas == "shared" and place.published + "res_weight1" in given:
        yield 'the published layers have an alpha for each sub-layer; make it with alphas="separate"'
    starts = {place.published + name: 1 if name.endswith("weight") else 0 for name in _IDLE_NORMS}
    if any(name in given and (torch.as_tensor(given[name]) != start).any() for name, start in starts.items()):
        yield 'ln1 and ln2 of the checkpoint were trained, and norm="phydi" has no normalisation'


def _sinusoidal(positions: Any, d: int) -> bool:
    if not isinstance(positions, Tensor) or positions.shape[-1:] != (d,):
        return False
    rows = positions.detach().flatten(0, -2).float()
    return torch.allclose(rows, sinusoidal_positions(len(rows), d, rows.dtype, rows.device), 0, _POSITIONS_TOLERANCE)


def _misfits(key: str, entry: _Entry, name: str, value: Any) -> Iterator[str]:
    if entry.shape is None:
        return
    if not isinstance(value, Tensor):
        yield f"{name} must be a torch.Tensor, not {type(value).__name__}"
    elif tuple(value.shape) != entry.shape:
        yield f"{name} has shape {tuple(value.shape)}; it must be {entry.shape}, for {key}"


def _mismatches(
    missing: Collection[str], unexpected: Collection[str], own: Collection[str], places: Iterable[_Place]
) -> list[str]:
    """Names that do not match, and the reasons that are known for it."""
    problems = []
    if unexpected:
        problems.append(f"unexpected names: {', '.join(unexpected)}")
    if missing:
        problems.append(f"missing names: {', '.join(missing)}")
    if set(unexpected) & set(own):
        problems.append("some of the unexpected names are this package's own: its checkpoints go to load_state_dict")
    for place in places:
        if isinstance(place.module, PHTransformerLM) and f"{place.published}transformer_encoder.norm.weight" in missing:
            problems.append(
                f"the published encoders end without a LayerNorm: set {place.own}encoder.norm = None before"
            )
    return problems


def _values(module: Module, sources: Mapping[str, tuple[_Entry, str, Any]]) -> dict[str, Any]:
    """Our entries; RuntimeError with all that an algebra lacks."""
    values: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for key, (entry, name, published) in sources.items():
        if name in failures:
            continue
        try:
            values[key] = entry.value(published)
        except (DecompositionError, ValueError) as error:
            failures[name] = f"{name}, for {key}: {error}"
    _raise(module, failures.values())
    return values


def _raise(module: Module, problems: Collection[str]) -> None:
    if problems:
        lines = "".join(f"\n\t{problem}" for problem in problems)
        raise RuntimeError(f"the published checkpoint cannot be loaded into {type(module).__name__}:{lines}")
