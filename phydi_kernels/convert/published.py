"""Checkpoints of the published layers and networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from .._check import check_flag
from ..algebra import decompose
from ..models import PHResNet, PHTransformerLM
from ..models.phresnet import ResidualBlock
from ..nn import PHConv1d, PHConv2d, PHConv3d, PHMMultiheadAttention, PHTransformerEncoderLayer
from ..nn._base import HypercomplexLayer

__all__ = ["IncompatibleKeys", "load_reference_state_dict"]

_CONVS = (PHConv1d, PHConv2d, PHConv3d)
# The beginnings of names in a module, ours and theirs; the first that fits counts.
_RENAMED: dict[type, dict[str, str]] = {
    PHResNet: {"stem.": ""},
    ResidualBlock: {
        "branch.": "",
        "shortcut.conv1.": "shortcut.0.",
        "shortcut.bn1.": "shortcut.1.",
        "alpha": "res_weight",
    },
    PHMMultiheadAttention: {"in_proj.bias": "in_proj_bias", "in_proj.": ""},
    PHTransformerEncoderLayer: {"alpha1": "res_weight1", "alpha2": "res_weight2", "norm1.": "ln1.", "norm2.": "ln2."},
    PHTransformerLM: {"embedding.": "src_tok_emb.embedding.", "encoder.": "transformer_encoder."},
}
_PARALLEL = "module."
# Sines and cosines, which PHTransformerLM computes.
_POSITIONS = "positional_encoding.pos_embedding"


class IncompatibleKeys(NamedTuple):
    """What :func:`load_reference_state_dict` did not load: as that of :meth:`Module.load_state_dict`.

    Attributes:
        missing_keys: of the module, and not in the checkpoint.
        unexpected_keys: of the checkpoint, and without a place in the module.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


@torch.no_grad()
def load_reference_state_dict(
    module: Module, state_dict: Mapping[str, Any], *, strict: bool = True
) -> IncompatibleKeys:
    """Loads a checkpoint of the published code, so that the module computes what the published one did.

    For the layers and networks of the repositories PHYDI (Mancanelli et al., 2023) and HyperNets (Grassucci et al.,
    2022), alone or inside any other module. P is the name of a submodule, theirs on the left:

    ================================================  ==============================================================
    in the checkpoint                                 here
    ================================================  ==============================================================
    P.A or P.a, P.S or P.s, P.bias, P.kron_weights    P.A, P.F, P.bias, P.kron_weights of linear layers, embeddings
    P.A or P.a, P.F or P.s, P.bias                    P.A, P.F of convolutions; P.bias is set to 0
    P.A, P.S, P.in_proj_bias, P.out_proj              P.in_proj, P.out_proj of attentions
    P.res_weight1, P.res_weight2, P.ln1, P.ln2        P.alpha1, P.alpha2, P.norm1, P.norm2 of encoder layers
    conv1, bn1, P.conv1 ..., P.shortcut.0, .1,        stem, P.branch, P.shortcut, P.alpha of
    P.res_weight, linear                              :class:`models.PHResNet` and its blocks P, linear
    src_tok_emb.embedding, transformer_encoder,       embedding, encoder, generator of
    generator                                         :class:`models.PHTransformerLM`
    ================================================  ==============================================================

    Everything else has the same name in both. A prefix ``module.`` of all keys, of DataParallel, is taken off.

    * The published convolutions hold a bias that their forward does not add: here it becomes 0. Build them with
      ``bias=False`` to train on without one. Those with kron_weights reshape the Kronecker product of A_i and all taps
      of F_i, which mixes taps with channels: no layer here computes that, and they are refused.
    * Networks are ``phresnet18(n, width=64)`` and its siblings with ``init="standard"``, or ``"phydi"`` for the ones
      with ``res_weight``.
    * The language model multiplies its embedding by sqrt(d) twice: F of the embedding takes one of the factors.
      Build it with ``alphas="separate"``, as its layers have two. With ``norm="pre"`` the published encoder has no last
      normalisation: set ``model.encoder.norm = None`` before. Its tokens are (length, batch), ours (batch, length).
    * A layer with ``algebra_rank`` gets U, V and W of an exact decomposition of A (:func:`algebra.decompose`).

    Args:
        module: whose parameters and buffers are written, in their own dtype and on their device.
        state_dict: the checkpoint; not changed.
        strict: whether keys that are missing, or that no parameter or buffer has a place for, are errors.

    Returns:
        The missing and the unexpected keys.

    Raises:
        TypeError: ``module`` is not a Module, or ``state_dict`` is not a mapping of names to tensors.
        RuntimeError: a tensor has another shape than its place; a convolution has kron_weights; with ``strict``, a
            missing or unexpected key. All are listed, and the module is unchanged.
        DecompositionError: an A has no algorithm of ``algebra_rank`` terms. The module is unchanged.
    """
    if not isinstance(module, Module):
        raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
    check_flag("strict", strict)
    wanted = module.state_dict()
    given = _tensors(state_dict, wanted)
    layers = {f"{name}." if name else "": m for name, m in module.named_modules(remove_duplicate=False)}
    names = {key: [name for name in _names(layers, key) if name in given] for key in wanted}
    dead = {key for key in wanted if _is_bias_of_convolution(layers, key)}
    problems, missing, found = [], [], {}
    for key, candidates in names.items():
        if key in dead:
            found[key] = torch.zeros_like(wanted[key])
        elif not candidates:
            missing.append(key)
        else:
            value, shape = given[candidates[0]], _shape(layers, key, wanted[key])
            if tuple(value.shape) != shape:
                problems.append(f"{candidates[0]} has shape {tuple(value.shape)}; {key} needs {shape}")
            found[key] = value
    taken = {candidates[0] for candidates in names.values() if candidates}
    unexpected = [name for name in given if name not in taken | _without_a_place(layers)]
    for prefix, layer in layers.items():
        weights = _theirs(layers, f"{prefix}kron_weights")
        if isinstance(layer, _CONVS) and weights in given:
            problems.append(f"{weights}: the published convolution with weights is no sum of Kronecker products")
    if strict:
        problems += [f"{' or '.join(_names(layers, key))} is missing, for {key}" for key in missing]
        problems += [f"{name} has no place in the module" for name in unexpected]
        if missing and given.keys() >= wanted.keys():
            problems.append("the checkpoint has the keys of this package: use module.load_state_dict")
    if problems:
        raise RuntimeError(f"the checkpoint does not fit {type(module).__name__}:\n  " + "\n  ".join(problems))
    for prefix, layer in layers.items():
        if isinstance(layer, PHTransformerLM) and f"{prefix}embedding.F" in found:
            found[f"{prefix}embedding.F"] = found[f"{prefix}embedding.F"] * math.sqrt(layer.d_model)
        if isinstance(layer, HypercomplexLayer) and layer.algebra_rank is not None and f"{prefix}U" in found:
            algorithm = decompose(found[f"{prefix}U"], layer.algebra_rank)
            found |= {f"{prefix}{name}": getattr(algorithm, name) for name in "UVW"}
    module.load_state_dict(found, strict=False)
    return IncompatibleKeys(missing, unexpected)


def _tensors(state_dict: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """The checkpoint, without the prefix of DataParallel unless the module has names with it."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, not {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{name!r}] must be a tensor, not {type(value).__name__}")
    parallel = all(name.startswith(_PARALLEL) for name in state_dict)
    parallel = parallel and not any(name.startswith(_PARALLEL) for name in wanted)
    return {name.removeprefix(_PARALLEL) if parallel else name: value for name, value in state_dict.items()}


def _names(layers: dict[str, Module], key: str) -> list[str]:
    """The names that ``key`` of the module can have in a checkpoint."""
    prefix, _, last = key.rpartition(".")
    prefix = f"{prefix}." if prefix else ""
    layer = layers[prefix]
    names = [last]
    if isinstance(layer, HypercomplexLayer):
        if last in "AUVW":
            names = ["A", "a"]
        elif last == "F":
            names = ["F" if isinstance(layer, _CONVS) else "S", "s"]
    return [_theirs(layers, f"{prefix}{name}") for name in names]


def _theirs(layers: dict[str, Module], key: str) -> str:
    """``key`` with the names that the modules around it have in a checkpoint, the innermost first."""
    name = key
    for prefix in sorted((p for p in layers if key.startswith(p)), key=len, reverse=True):
        kinds = [kind for kind in _RENAMED if isinstance(layers[prefix], kind)]
        for ours, theirs in _RENAMED[kinds[0]].items() if kinds else ():
            if key.startswith(prefix + ours):
                name = prefix + theirs + name[len(prefix + ours) :]
                break
    return name


def _is_bias_of_convolution(layers: dict[str, Module], key: str) -> bool:
    prefix, _, last = key.rpartition(".")
    return last == "bias" and isinstance(layers[f"{prefix}." if prefix else ""], _CONVS)


def _shape(layers: dict[str, Module], key: str, t: Tensor) -> tuple[int, ...]:
    """What the checkpoint has to hold for ``key``: A in the place of U, V and W."""
    prefix, _, last = key.rpartition(".")
    layer = layers[f"{prefix}." if prefix else ""]
    if isinstance(layer, HypercomplexLayer) and last in "UVW":
        return (layer.n,) * 3
    return tuple(t.shape)


def _without_a_place(layers: dict[str, Module]) -> set[str]:
    """What a checkpoint holds and nothing computes with."""
    biases = {_theirs(layers, f"{prefix}bias") for prefix, layer in layers.items() if isinstance(layer, _CONVS)}
    positions = {
        _theirs(layers, prefix + _POSITIONS) for prefix, layer in layers.items() if isinstance(layer, PHTransformerLM)
    }
    return biases | positions
