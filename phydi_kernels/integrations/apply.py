"""apply_phydi_kernels: the adapter layers of a model computed by the operators of this package, in place."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from dataclasses import dataclass

from torch.nn import Module

from .._check import check_flag
from .._table import table

# Their modules, and ours that replace layers of them. Where theirs is not imported, no model has such a layer.
_BRIDGES = {"peft.tuners.lokr.layer": "lokr", "adapters.methods.modeling": "compacter"}


@dataclass(frozen=True)
class LayerReport:
    """What :func:`apply_phydi_kernels` did to one layer.

    Attributes:
        name: in the model, the first one of a shared layer.
        kind: the class of the other library.
        left: why it computes as before; empty if it does not.
    """

    name: str
    kind: str
    left: str = ""


@dataclass(frozen=True)
class IntegrationReport:
    """What :func:`apply_phydi_kernels` did to a model; ``str`` gives a table.

    Attributes:
        layers: one entry for each LoKr or Compacter layer, in the order of the model.
    """

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "apply_phydi_kernels: no LoKr layer of peft and no PHMLayer of adapters, the model is unchanged"
        kinds = Counter(layer.kind for layer in self.layers)
        applied = Counter(layer.kind for layer in self.layers if not layer.left)
        rows = [("layers", "on the kernels", "of"), *((str(kinds[k]), str(applied[k]), k) for k in kinds)]
        lines = table(rows, sides=">><")
        lines += [f"{layer.name or layer.kind} is left as it is: {layer.left}" for layer in self.layers if layer.left]
        return "\n".join(lines)


def apply_phydi_kernels(model: Module, *, verbose: bool = True) -> Module:
    r"""Computes the LoKr and Compacter layers of a model without their Kronecker matrices, in place.

    LoKr (``peft.LoKrConfig``) adds :math:`s\,(w_1 \otimes w_2)\,x` to a layer, s = alpha / r. PEFT forms the matrix,
    as large as the layer's own weight, at each call, and multiplies again. Here it is one call of
    :func:`functional.phm_linear`, or of a convolution, with A = s w_1 of one term and F = w_2:

    .. math:: y_k = F \sum_l A_{kl} x_l

    With w_1 (P, Q) and w_2 (p, q) these are 1/Q + 1/p of the matrix's multiplications. Where w_2 is the product of
    two factors and they are small, x is multiplied by one after the other.

    Compacter (``adapters.CompacterConfig`` and other bottleneck adapters with ``phm_layer``) multiplies a row x by
    :math:`\sum_i C_i \otimes W_i`, C its ``phm_rule``. That is a PHM layer with A_i = C_i^T and F_i = W_i^T; the
    factors of W_i are used one after the other as well.

    Only the class of these layers changes, to a subclass of their own. Parameters, their names and dtypes, optimizers
    that hold them, hooks, ``save_pretrained``, merging, switching and later added adapters are as before, and so are
    dropouts, which draw the same random numbers. Results agree up to rounding; a 16-bit LoKr matrix is not rounded,
    as it does not exist. Layers added later need another call. A model pickled whole needs this package where it is
    loaded; its state_dict and its adapters do not.

    Left as they are, with the reason in the report: subclasses; convolutions in groups; PEFT's ``Conv1d`` with a
    whole w_2, which PEFT multiplies by a matrix that is no Kronecker product of channels; and a Compacter layer whose
    forward was replaced in the instance.

    Sources: Yeh et al., Navigating text-to-image customization: from LyCORIS fine-tuning to model evaluation, 2024
    (LoKr); Mahabadi, Henderson, Ruder, Compacter: efficient low-rank hypercomplex adapter layers, 2021.

    Args:
        model: any module that holds such layers, as ``peft.get_peft_model`` returns it, or after ``adapters.init`` and
            ``add_adapter``.
        verbose: prints the report.

    Returns:
        ``model``, with an :class:`IntegrationReport` in its attribute ``integration_report``. Layers on the kernels
        already stay there.

    Raises:
        ImportError: peft is older than 0.19.
        TypeError: ``model`` is not a Module, or ``verbose`` not a bool.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    check_flag("verbose", verbose)
    bridges = [
        importlib.import_module(f".{ours}", __package__) for theirs, ours in _BRIDGES.items() if theirs in sys.modules
    ]
    layers = []
    for name, module in model.named_modules():
        for bridge in bridges:
            theirs = next((theirs for theirs in bridge.REPLACEMENTS if isinstance(module, theirs)), None)
            if theirs is None:
                continue
            ours = bridge.REPLACEMENTS[theirs]
            known = type(module) in (theirs, ours)
            left = bridge.why_left(module) if known else f"{type(module).__name__} is a subclass"
            if not left:
                module.__class__ = ours
            layers.append(LayerReport(name, f"{bridge.LIBRARY} {theirs.__name__}", left))
    report = IntegrationReport(tuple(layers))
    model.integration_report = report  # type: ignore[assignment]
    if verbose:
        print(report)
    return model
