"""optimize_for_inference: a model with its parameterized hypercomplex layers in rank-R form."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter
from tqdm import tqdm

from . import plans
from ._check import check_flag
from ._dataflow import Dataflow, is_plain
from ._table import table
from .algebra import BilinearAlgorithm, DecompositionError, decompose
from .kernels.phc_conv_factored import side_by_side
from .nn import PHConv1d, PHConv2d, PHConv3d, PHMEmbedding, PHMLinear, PHYDILinear
from .nn.factored import FactoredLayer, FactoredPHConv, FactoredPHMLinear
from .reference import compute_dtype, structure

__all__ = ["InferenceReport", "LayerReport", "optimize_for_inference"]

Conv = PHConv1d | PHConv2d | PHConv3d
Layer = PHMLinear | PHYDILinear | Conv
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

_LAYERS = (PHMLinear, PHYDILinear, PHConv1d, PHConv2d, PHConv3d)
_BATCH_NORM: dict[type, type] = {PHConv1d: nn.BatchNorm1d, PHConv2d: nn.BatchNorm2d, PHConv3d: nn.BatchNorm3d}


@dataclass(frozen=True)
class LayerReport:
    """What :func:`optimize_for_inference` did to one layer.

    Attributes:
        name: in the model, the first one of a shared layer.
        kind: the class that it had.
        n: number of terms of its algebra.
        rank: R, the number of block products; this and the next three are None where the layer was left.
        ratio: R/n^2, the multiplications over those of the dense layer.
        residual: |A - sum| / |A| of the decomposition.
        growth: sum_r |U_r| |V_r| |W_r| / |A|.
        folded: names of the batch normalisation and of the ReLU that the layer now computes as well.
        prepacked: whether it holds the combined weights.
        left: why the layer was left as it is; empty if it was not.
        not_folded: why the batch normalisation that follows was not folded; empty if there is none or it was.
    """

    name: str
    kind: str
    n: int
    rank: int | None = None
    ratio: float | None = None
    residual: float | None = None
    growth: float | None = None
    folded: tuple[str, ...] = ()
    prepacked: bool = False
    left: str = ""
    not_folded: str = ""


@dataclass(frozen=True)
class InferenceReport:
    """What :func:`optimize_for_inference` did to a model; ``str`` gives a table.

    Attributes:
        layers: one entry for each layer, in the order of the model.
        untraced: classes of modules that cannot be traced, so that nothing was folded in what they call.
    """

    layers: tuple[LayerReport, ...]
    untraced: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.layers:
            return "optimize_for_inference: no parameterized hypercomplex layer, the model is unchanged"
        rows = [("layer", "n", "R", "R/n^2", "residual", "growth", "weights", "folded"), *map(_row, self.layers)]
        lines = table(rows, sides="<>>>>><<")
        lines += [f"{layer.name or layer.kind} is left as it is: {layer.left}" for layer in self.layers if layer.left]
        lines += [f"{layer.name}: {layer.not_folded}" for layer in self.layers if layer.not_folded]
        if self.untraced:
            lines.append(f"nothing is folded in what these call, as they cannot be traced: {', '.join(self.untraced)}")
        optimized = sum(not layer.left for layer in self.layers)
        lines.append(f"{optimized} of {len(self.layers)} hypercomplex layers in rank-R form")
        return "\n".join(lines)


def optimize_for_inference(
    model: Module,
    *,
    inplace: bool = False,
    prepack: bool = False,
    fold_batchnorm: bool = True,
    fuse_relu: bool = True,
    seed: int = 0,
    starts: int | None = None,
    max_growth: float | None = None,
    progress: bool = True,
    verbose: bool = True,
) -> Module:
    r"""A model that computes the same with R block products in place of P*Q in each hypercomplex layer.

    .. math:: y_k = \sum_{r=1}^R V_{rk} \Bigl(\sum_i U_{ri} F_i\Bigr) \Bigl(\sum_l W_{rl} x_l\Bigr), \qquad
              w_i A_{ikl} = \sum_{r=1}^R U_{ri} V_{rk} W_{rl}

    with the exact decomposition that :func:`algebra.decompose` finds for the algebra of each layer, its kron_weights w
    included. Within a call equal algebras are decomposed once. A layer that learns U, V and W keeps this algorithm.
    Every PHMLinear, PHYDILinear and PHConv1d/2d/3d is replaced, a shared one at all its places, by a
    :class:`nn.factored.FactoredPHMLinear` or ``FactoredPHConv``, which need no gradients. Left as they are:
    embeddings, layers whose algebra has no algorithm with R < P*Q, subclasses, and layers with hooks or
    parametrizations. On the CPU a linear layer of float32 or float64 may hold T F and U T^-1 in place of F and U, with
    an invertible T such that n of its combined weights are T F itself.

    The model can be saved, copied, converted, compiled and exported. It takes the state_dict of another one, optimised
    from the same architecture, where the ranks and what was folded agree.

    A batch normalisation that alone takes the result of a convolution is folded into it: with s = gamma /
    sqrt(var + eps), s (h + b - mean) + beta = s (h + b'), b' = b - mean + beta/s, which is alpha = s, one for each
    channel, in the fused call. It is not folded where an s is 0 or underflows, or b' overflows. A ReLU module that
    alone takes the result of a layer is then applied in the same call, if every s is positive: relu(s h) = s relu(h).
    Both become :class:`torch.nn.Identity`. Calls are followed through the forward of each module by :mod:`torch.fx`;
    one that cannot be traced must by its source use the modules it holds only in calls ``self.name(...)``, or nothing
    in them is folded. What is folded assumes that later calls go the same way.

    Accuracy: for each position of the output, with |x| over the inputs that it depends on, |F| over all entries, and
    to first order in the unit roundoff u, the error is at most c u growth |A| |F| |x| + u |y|. c = 2 for bfloat16,
    where the factors are rounded to 16 bits; otherwise c is twice the number of roundings in a sum. Folding rounds s
    and b' to the layer's dtype.

    Args:
        model: in evaluation mode.
        inplace: replaces the layers in ``model`` itself; otherwise in a copy, and ``model`` stays as it is.
        prepack: a switch between memory and time. False holds F, with 1/n of the dense layer's weights, and combines at
            each call; True holds the R combined weights, R/(P*Q) of the dense layer's: 0.44 for 0.25 where n = 4.
        fold_batchnorm: folds batch normalisation into convolutions.
        fuse_relu: applies ReLU in the layer before it.
        seed, starts, max_growth: of :func:`algebra.decompose`.
        progress: shows a progress bar if the decompositions take more than a second.
        verbose: prints the report.

    Returns:
        The model, with an :class:`InferenceReport` in its attribute ``inference_report``. Without hypercomplex layers
        it is unchanged.

    Raises:
        TypeError: ``model`` is not a Module, or another argument has the wrong type.
        ValueError: ``model`` is in training mode, or is itself a layer with ``inplace``; a layer is on the meta device;
            an algebra holds NaN or infinity; or as :func:`algebra.decompose`.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    flags = {"inplace": inplace, "prepack": prepack, "fold_batchnorm": fold_batchnorm, "fuse_relu": fuse_relu}
    for name, flag in (*flags.items(), ("progress", progress), ("verbose", verbose)):
        check_flag(name, flag)
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first")
    if inplace and type(model) in _LAYERS:
        raise ValueError(f"inplace=True cannot replace the model itself, a {type(model).__name__}; use inplace=False")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (*_LAYERS, PHMEmbedding))}
    algorithms = _algorithms(layers, seed, starts, max_growth, progress)
    chosen = [name for name, found in algorithms.items() if isinstance(found, BilinearAlgorithm)]
    reports, untraced = [], dict[str, None]()
    dataflow = None
    if chosen and (fold_batchnorm or fuse_relu):
        try:
            dataflow = Dataflow(model)
        except Exception:  # whatever a copy raises: without one nothing is folded
            if not inplace:
                raise
            untraced[type(model).__name__] = None
    if not inplace:
        model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    uses = Counter(layer.F for layer in layers.values())
    shared: dict[Parameter, Parameter] = {}
    replacements: dict[Module, Module] = {}
    for name, layer in layers.items():
        algorithm = algorithms[name]
        kind = type(layer).__name__
        if isinstance(algorithm, str):
            reports.append(LayerReport(name, kind, layer.n, left=algorithm))
            continue
        fused = _Fused()
        if dataflow is not None:
            fused = _fuse(name, modules, dataflow, fold_batchnorm, fuse_relu)
            untraced.update(dict.fromkeys(dataflow.obstacles(name)))
        replacements[modules[name]] = _factored(
            cast(Layer, modules[name]), algorithm, fused, prepack, uses[layer.F] > 1, shared
        )
        replacements |= {modules[other]: nn.Identity() for other in fused.names}
        reports.append(
            LayerReport(
                name,
                kind,
                layer.n,
                rank=algorithm.rank,
                ratio=algorithm.rank / layer.n**2,
                residual=algorithm.residual,
                growth=algorithm.growth,
                folded=fused.names,
                not_folded=fused.reason,
                prepacked=prepack,
            )
        )
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child in replacements:
                parent._modules[key] = replacements[child]
    result = replacements.get(model, model)
    report = InferenceReport(tuple(reports), tuple(untraced))
    result.inference_report = report  # type: ignore[assignment]
    if verbose:
        print(report)
    return result


@dataclass(frozen=True)
class _Fused:
    """What a layer computes besides its own: alpha * act(H x + bias)."""

    names: tuple[str, ...] = ()
    alpha: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    reason: str = ""


def _algorithms(
    layers: Mapping[str, Layer | PHMEmbedding], seed: int, starts: int | None, max_growth: float | None, progress: bool
) -> dict[str, BilinearAlgorithm | str]:
    """The algorithm of each layer, or why it is left as it is."""
    found: dict[str, BilinearAlgorithm | str] = {}
    contents = {}
    for name, layer in layers.items():
        if isinstance(layer, PHMEmbedding):
            found[name] = "a lookup has too few multiplications to save some"
        elif type(layer) not in _LAYERS:
            found[name] = f"{type(layer).__name__} is a subclass or has parametrizations"
        elif not is_plain(layer):
            found[name] = "it has hooks or a forward of its own"
        elif layer.algebra_rank is not None:
            found[name] = _own_algorithm(name, layer)
        else:
            A = _values(name, layer, "A")
            contents[name] = A.shape, tuple(A.flatten().tolist())
    known: dict[object, BilinearAlgorithm | str] = {}
    with tqdm(
        total=len(set(contents.values())),
        desc="decompose algebras",
        delay=1,
        leave=False,
        miniters=0,
        disable=not progress,
    ) as bar:

        def advance(rank: int, start: int, residual: float) -> None:
            bar.set_postfix_str(f"rank {rank}, start {start}, residual {residual:.0e}", refresh=False)
            bar.update(0)

        for content in dict.fromkeys(contents.values()):
            shape, entries = content
            A = torch.tensor(entries, dtype=torch.float64, device="cpu").view(shape)
            try:
                known[content] = decompose(A, seed=seed, starts=starts, max_growth=max_growth, progress=advance)
            except DecompositionError as error:
                known[content] = str(error)
            bar.update()
    found |= {name: known[content] for name, content in contents.items()}
    return {name: _worthwhile(found[name], layer.n) for name, layer in layers.items()}


def _worthwhile(found: BilinearAlgorithm | str, n: int) -> BilinearAlgorithm | str:
    if isinstance(found, str) or found.rank < n * n:
        return found
    return f"an algorithm of R = {found.rank} block products saves none of the n*n = {n * n}"


def _own_algorithm(name: str, layer: Layer) -> BilinearAlgorithm:
    """U, V and W of a layer with algebra_rank."""
    U, V, W = (_values(name, layer, key) for key in ("U", "V", "W"))
    A = structure(U, V, W).norm()
    terms = (U.norm(dim=1) * V.norm(dim=1) * W.norm(dim=1)).sum()
    return BilinearAlgorithm(U, V, W, len(U), residual=0.0, growth=(terms / A).item() if terms else 0.0)


def _values(name: str, layer: Layer, key: str) -> Tensor:
    """A parameter in float64 on the CPU; A and U with the kron_weights of their terms."""
    value = getattr(layer, key)
    if value.is_meta:
        raise ValueError(f"layer {name!r} is on the meta device: {key} holds no values")
    value = value.detach().cpu().double()
    if not value.isfinite().all():
        raise ValueError(f"{key} of layer {name!r} must be finite, and it holds NaN or infinity")
    if layer.kron_weights is None or key in ("V", "W", "kron_weights"):
        return value
    weights = _values(name, layer, "kron_weights")
    return value * (weights.view(-1, 1, 1) if key == "A" else weights)


def _fuse(
    name: str, modules: Mapping[str, Module], dataflow: Dataflow, fold_batchnorm: bool, fuse_relu: bool
) -> _Fused:
    """What the layer ``name`` can take over from the modules after it."""
    layer = modules[name]
    fused = _Fused()
    if type(layer) is PHYDILinear:
        return fused  # its residual is added after alpha
    following = dataflow.successor(name)
    if fold_batchnorm and following is not None and type(modules[following]) is _BATCH_NORM.get(type(layer)):
        fused = _fold(following, cast(BatchNorm, modules[following]), cast(Conv, layer))
        if not fused.names:
            return fused
        following = dataflow.successor(following)
    if fuse_relu and following is not None and type(modules[following]) is nn.ReLU and is_plain(modules[following]):
        if fused.alpha is None or (fused.alpha > 0).all():
            fused = replace(fused, names=(*fused.names, following), activation="relu")
    return fused


def _fold(name: str, norm: BatchNorm, conv: Conv) -> _Fused:
    """s (H x + b - mean) + beta as alpha (H x + b'), if it can be written so."""
    refused = f"{name} is not folded: "
    if not is_plain(norm):
        return _Fused(reason=refused + "it has hooks or a forward of its own")
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return _Fused(reason=refused + "it normalises by the statistics of each batch")
    mean, var = (t.cpu().double() for t in (norm.running_mean, norm.running_var))
    if len(mean) != conv.out_channels:
        return _Fused(reason=refused + f"it has {len(mean)} channels for the {conv.out_channels} of {conv}")
    scale = (var + norm.eps).rsqrt()
    shift = -mean
    if conv.bias is not None:
        shift = shift + conv.bias.detach().cpu().double()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().cpu().double()
    if norm.bias is not None:
        shift = shift + norm.bias.detach().cpu().double() / scale
    alpha, bias = (t.to(conv.F.device, conv.F.dtype) for t in (scale, shift))
    if not alpha.all():
        return _Fused(reason=refused + f"{int((alpha == 0).sum())} of its factors are 0 in {alpha.dtype}")
    if not (alpha.isfinite().all() and bias.isfinite().all()):
        return _Fused(reason=refused + f"a factor, or the shift divided by it, is not finite in {alpha.dtype}")
    return _Fused((name,), alpha, bias)


def _factored(
    layer: Layer,
    algorithm: BilinearAlgorithm,
    fused: _Fused,
    prepack: bool,
    tied: bool,
    shared: dict[Parameter, Parameter],
) -> FactoredLayer:
    """The layer in rank-R form. ``shared`` keeps what layers have in common in common; ``tied``: F is such."""

    def frozen(p: Parameter) -> Parameter:
        if p not in shared:
            shared[p] = Parameter(
                _in_fast_order(p.detach(), layer) if p is layer.F else p.detach(), requires_grad=False
            )
        return shared[p]

    U, V, W, F = algorithm.U, algorithm.V, algorithm.W, frozen(layer.F)
    if not (prepack or tied or isinstance(layer, Conv)):
        U, F = _as_terms(U, V, W, F)
    alpha, bias = fused.alpha, fused.bias
    if bias is None and layer.bias is not None:
        bias = frozen(layer.bias)
    if isinstance(layer, PHYDILinear):
        return FactoredPHMLinear(U, V, W, F, bias, alpha=frozen(layer.alpha), residual=True, prepack=prepack)
    options: dict[str, Any] = {"alpha": alpha, "activation": fused.activation, "prepack": prepack}
    if isinstance(layer, PHMLinear):
        return FactoredPHMLinear(U, V, W, F, bias, **options)
    return FactoredPHConv(U, V, W, F, bias, layer.stride, layer.padding, layer.dilation, **options)


def _as_terms(U: Tensor, V: Tensor, W: Tensor, F: Parameter) -> tuple[Tensor, Parameter]:
    """(U', F') with U' F' = U F and F'_i the F-hat_r of n ranks r, which need no combination at a call.

    These ranks are the rows of an n x n submatrix of U whose volume no exchange of a row increases by 1 %, so that the
    entries of U' are at most 1.01. (U, F) where F' would be rounded twice, of 16 bits, or its rounding would more than
    double the error bound; and where F is not in the order in which the kernels read its terms as they lie.
    """
    n = len(F)
    if F.dtype != compute_dtype(F.dtype) or F.is_contiguous() or n not in plans.LINE_TERMS:
        return U, F
    if torch.linalg.matrix_rank(U) < n:
        return U, F
    rows = torch.linalg.lu(U)[0].argmax(0)[:n]  # of pivots
    while True:
        combined = torch.linalg.solve(U[rows], U, left=False)
        largest = int(combined.abs().argmax())
        if not combined.flatten()[largest].abs() > 1.01:
            break
        rows[largest % n] = largest // n
    combined[rows] = torch.eye(n, dtype=U.dtype)
    of_products, norms = V.norm(dim=1) * W.norm(dim=1), U.norm(dim=1)
    if not of_products @ (combined.abs() @ norms[rows]) <= 2 * of_products @ norms:
        return U, F
    terms = torch.einsum("si,iqp->sqp", U[rows], F.mT.double()).to(F.dtype)
    return combined, Parameter(terms.mT, requires_grad=False)


def _in_fast_order(F: Tensor, layer: Layer) -> Tensor:
    """F with the weights of all outputs beside each other in memory, where the CPU kernels combine them so.

    Not in a linear layer of so many bytes that they come from memory at each call, which is faster in their own order,
    nor in a convolution that the direct plan does not serve, or of a number of terms for which it would copy F back.
    """
    if isinstance(layer, Conv):
        combined = F[0, 0, 0].numel() > 1 and len(F) in plans.LINE_TERMS
        combined = combined and plans.fits_direct(len(layer.stride), layer.stride[-1], F.shape[2])
    else:
        combined = F.nbytes < plans.NEAR_BYTES
    return side_by_side(F) if F.is_cpu and combined else F


def _row(layer: LayerReport) -> tuple[str, ...]:
    name = layer.name or layer.kind
    if layer.left:
        return name, str(layer.n), "-", "-", "-", "-", "-", ""
    return (
        name,
        str(layer.n),
        str(layer.rank),
        f"{layer.ratio:.3f}",
        f"{layer.residual:.1e}",
        f"{layer.growth:.3g}",
        "F-hat" if layer.prepacked else "F",
        ", ".join(layer.folded),
    )
