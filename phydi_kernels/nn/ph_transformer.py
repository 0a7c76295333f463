"""PHTransformer, its encoder and decoder and their layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter

from .._check import check_divisible, check_finite, check_integer, check_probability
from .._dataflow import has_hooks
from ._base import layer_options
from ._fixup import Scale, Shift, branch_scale
from .factored import FactoredLayer, linear_call
from .phm_linear import PHMLinear
from .phm_multihead_attention import PHMMultiheadAttention

_NORMS = ("post", "pre", "phydi", "fixup")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": nn.functional.relu, "gelu": nn.functional.gelu}
_RELUS = (nn.functional.relu, torch.relu)


def _does_nothing(dropout: Module) -> bool:
    """Whether a call of this module gives its input, and nothing watches it."""
    idle = isinstance(dropout, nn.Identity)
    if isinstance(dropout, nn.Dropout):
        idle = not (dropout.training and dropout.p > 0)
    return idle and not has_hooks(dropout)


# Linear layers of a branch: values and output of an attention, both of a feed-forward network.
_BRANCH_LAYERS = 2


class PHTransformerLayer(Module):
    """What the layers of encoder and decoder share: sub-layers, each with a residual connection."""

    num_sublayers: int

    def __init__(
        self,
        d_model: int,
        nhead: int,
        n: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm: str = "post",
        bias: bool = True,
        *,
        alphas: str = "shared",
        algebra_rank: int | str | None = None,
        kron_weights: bool = False,
        init: str | Tensor = "fan",
        learn_algebra: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_sublayers = self.num_sublayers
        options = layer_options(algebra_rank, kron_weights, init, learn_algebra, device, dtype)
        if norm not in _NORMS:
            raise ValueError(f"norm={norm!r} is not one of {', '.join(map(repr, _NORMS))}")
        if alphas not in ("shared", "separate"):
            raise ValueError(f'alphas={alphas!r} is not one of "shared", "separate"')
        if isinstance(activation, str):
            if activation not in _ACTIVATIONS:
                raise ValueError(
                    f"activation={activation!r} is not one of {', '.join(map(repr, _ACTIVATIONS))} or a callable"
                )
            activation = _ACTIVATIONS[activation]
        elif not callable(activation):
            raise TypeError(f'activation={activation!r} must be "relu", "gelu" or a callable')
        n = check_integer("n", n)
        d_model = check_divisible("d_model", d_model, n)
        dim_feedforward = check_divisible("dim_feedforward", dim_feedforward, n)
        nhead = check_integer("nhead", nhead)
        if d_model % nhead:
            raise ValueError(f"d_model={d_model} is not divisible by nhead={nhead}")
        self.norm, self.alphas, self.activation = norm, alphas, activation
        check_probability("dropout", dropout)
        check_finite("layer_norm_eps", layer_norm_eps)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        heads: dict[str, Any] = {"dropout": dropout, "bias": bias, "batch_first": batch_first, **options}
        self.self_attn = PHMMultiheadAttention(d_model, nhead, n, **heads)
        if num_sublayers == 3:
            self.multihead_attn = PHMMultiheadAttention(d_model, nhead, n, fused_qkv=False, **heads)
        self.linear1 = PHMLinear(d_model, dim_feedforward, n, bias, **options)
        self.linear2 = PHMLinear(dim_feedforward, d_model, n, bias, **options)
        self.dropout = nn.Dropout(dropout)
        names = [f"alpha{i}" if alphas == "separate" else "alpha" for i in range(1, num_sublayers + 1)]
        self._alpha_names = tuple(names) if norm == "phydi" else ()
        if norm == "phydi":
            for name in dict.fromkeys(names):
                self.register_parameter(name, Parameter(torch.zeros(1, **factory)))
        elif norm == "fixup":
            # Before and after each branch, and around the activation.
            self.shifts = nn.ModuleList(Shift(factory) for _ in range(2 * num_sublayers + 2))
            self.scales = nn.ModuleList(Scale(factory) for _ in range(num_sublayers))
        else:
            for i in range(1, num_sublayers + 1):
                self.register_module(f"norm{i}", nn.LayerNorm(d_model, layer_norm_eps, bias=bias, **factory))
        self.d_model = d_model
        self.scale_branches(num_sublayers)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        scalars = (*self.shifts, *self.scales) if self.norm == "fixup" else ()
        for module in (*self.children(), *scalars):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name in dict.fromkeys(self._alpha_names):
            nn.init.zeros_(getattr(self, name))

    def scale_branches(self, num_branches: int) -> None:
        """Fixup's start in a stack of ``num_branches``, now and whenever parameters are drawn."""
        if self.norm != "fixup":
            return
        scale = branch_scale(num_branches, _BRANCH_LAYERS)
        self.linear1.scale_start(scale, 1.0)
        self.linear2.scale_start(0.0, 0.0)
        for attention in (m for m in self.children() if isinstance(m, PHMMultiheadAttention)):
            *inner, last = attention.projections()
            last.scale_start(0.0, 0.0)
            for projection in inner:
                projection.scale_start(scale, 0.0)

    def _check_features(self, name: str, t: Tensor) -> None:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(t).__name__}")
        if t.dim() not in (2, 3) or t.shape[-1] != self.d_model:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; it must have two or three dimensions, "
                f"the last of d_model={self.d_model}"
            )

    def _connect(self, index: int, x: Tensor, branch: Callable[..., Tensor]) -> Tensor:
        """Sub-layer ``index`` from 1: ``branch(x, residual=..., alpha=...)`` and its connection to x.

        The last product of the branch takes the connection along, but where dropout comes between.
        """
        dropped = not _does_nothing(self.dropout)
        alpha = getattr(self, self._alpha_names[index - 1]) if self._alpha_names else None
        normalize: Module | None = getattr(self, f"norm{index}") if self.norm in ("post", "pre") else None
        inner = x if normalize is None or self.norm == "post" else normalize(x)
        if self.norm == "fixup":
            y = self.scales[index - 1](branch(self.shifts[2 * index - 2](inner)))
            return x + self.dropout(self.shifts[2 * index - 1](y))
        if dropped:
            y = self.dropout(branch(inner))
            y = x + (y if alpha is None else alpha.to(y.dtype) * y)
        else:
            y = branch(inner, residual=x, alpha=alpha)
        return normalize(y) if normalize is not None and self.norm == "post" else y

    def _feed_forward(self, x: Tensor, **connection: Any) -> Tensor:
        if self.norm == "fixup":
            hidden = self.shifts[-1](self.activation(self.shifts[-2](self.linear1(x))))
        elif self.activation in _RELUS:
            hidden = linear_call(self.linear1, x, activation="relu")
        else:
            hidden = self.activation(self.linear1(x))
        return linear_call(self.linear2, self.dropout(hidden), **connection)


class PHTransformerEncoderLayer(PHTransformerLayer):
    r"""Self-attention and a feed-forward network, of parameterized hypercomplex products (PHYDI, section 3.2).

    With att(x) the attention of x to itself and ff(x) = H_2 act(H_1 x + b_1) + b_2, dropout after both and after the
    activation:

    * ``norm="post"``: h = LayerNorm(x + att(x)), y = LayerNorm(h + ff(h)) (Eq. 4; Vaswani et al., 2017).
    * ``norm="pre"``: h = x + att(LayerNorm(x)), y = h + ff(LayerNorm(h)) (Xiong et al., 2020).
    * ``norm="phydi"``: :math:`h = x + \alpha\, \mathrm{att}(x)`, :math:`y = h + \alpha\, \mathrm{ff}(h)`, one alpha a
      layer, 0 at the start, so that y = x (Eq. 5). The residual of the second is h, as in Fig. 3, where Eq. 5 prints x.
    * ``norm="fixup"``: h = x + att(x), y = h + ff(h) without normalisation (Zhang, Dauphin and Ma, 2019): scalar biases
      before and after each branch and around the activation, a scalar factor on each branch, the last product of each
      branch 0, and the others scaled by L^(-1/2) for L branches in the whole stack. y = x at the start.

    Args:
        d_model: features of input and output, divisible by nhead and n.
        nhead: number of heads.
        n: the dimension of the algebra.
        dim_feedforward: features within the feed-forward network, divisible by n.
        dropout: probability of a zero in training, after each sub-layer, the activation and in the attention.
        activation: ``"relu"``, ``"gelu"`` or a callable.
        layer_norm_eps: of the normalisations.
        batch_first: tensors are ``(batch, length, d_model)``, else ``(length, batch, d_model)``.
        norm: one of the four above.
        bias: adds biases in all products and normalisations.
        alphas: with ``norm="phydi"``, ``"shared"`` is one ``alpha`` for both sub-layers, ``"separate"`` is ``alpha1``
            and ``alpha2``, as in the published code.
        algebra_rank, kron_weights, init, learn_algebra, device, dtype: as in :class:`PHMLinear`, for each product.
            ``kron_weights=True`` is the paper's WKP.

    Submodules: ``self_attn``, ``linear1``, ``linear2``, ``dropout``, and ``norm1``, ``norm2`` or ``shifts`` and
    ``scales``. Another module may take the place of a linear layer; only our own take the connection along.

    Shapes: ``(length, batch, d_model)``, with ``batch_first`` ``(batch, length, d_model)``, or ``(length, d_model)`` to
    the same.

    Raises:
        TypeError, ValueError, DecompositionError: as :class:`PHMMultiheadAttention`; an unknown norm, alphas or
            activation.
    """

    num_sublayers = 2

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Masks as in :class:`PHMMultiheadAttention`, whose attn_mask ``src_mask`` is."""
        self._check_features("src", src)

        def attend(x: Tensor, **connection: Any) -> Tensor:
            return self.self_attn(x, x, x, src_key_padding_mask, False, src_mask, True, is_causal, **connection)[0]

        return self._connect(2, self._connect(1, src, attend), self._feed_forward)


class PHTransformerDecoderLayer(PHTransformerLayer):
    r"""Self-attention, attention to the encoder's result and a feed-forward network.

    As :class:`PHTransformerEncoderLayer`, with the attention to ``memory`` between the two, connected in the same way.
    With ``alphas="separate"`` there are ``alpha1``, ``alpha2`` and ``alpha3``.

    Args:
        d_model, nhead, n, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm, bias, alphas,
            algebra_rank, kron_weights, init, learn_algebra, device, dtype: as in :class:`PHTransformerEncoderLayer`.

    Submodules: ``self_attn``, ``multihead_attn``, ``linear1``, ``linear2``, ``dropout``, and ``norm1``, ``norm2``,
    ``norm3`` or ``shifts`` and ``scales``.

    Raises:
        TypeError, ValueError, DecompositionError: as :class:`PHTransformerEncoderLayer`.
    """

    num_sublayers = 3

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Masks as in :class:`PHMMultiheadAttention`."""
        self._check_features("tgt", tgt)
        self._check_features("memory", memory)

        def attend(x: Tensor, **connection: Any) -> Tensor:
            return self.self_attn(x, x, x, tgt_key_padding_mask, False, tgt_mask, True, tgt_is_causal, **connection)[0]

        def attend_memory(x: Tensor, **connection: Any) -> Tensor:
            masks = memory_key_padding_mask, False, memory_mask, True, memory_is_causal
            return self.multihead_attn(x, memory, memory, *masks, **connection)[0]

        x = self._connect(2, self._connect(1, tgt, attend), attend_memory)
        return self._connect(3, x, self._feed_forward)


class _Stack(Module):
    """Layers one after the other, and a module after the last; ``name`` is the layer's as an argument."""

    def __init__(self, name: str, layer: Module, num_layers: int, norm: Module | None) -> None:
        super().__init__()
        if not isinstance(layer, Module):
            raise TypeError(f"{name} must be a torch.nn.Module, not {type(layer).__name__}")
        if norm is not None and not isinstance(norm, Module):
            raise TypeError(f"norm={norm!r} must be a torch.nn.Module or None; the layer has the place of its own")
        fixed = next((m for m in layer.modules() if isinstance(m, FactoredLayer)), None)
        if fixed is not None:
            raise TypeError(f"{name} holds a {type(fixed).__name__}, which cannot be drawn anew; optimise the stack")
        self.num_layers = check_integer("num_layers", num_layers)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(self.num_layers))
        self.norm = norm
        for own in self.layers:
            if isinstance(own, PHTransformerLayer):
                own.scale_branches(own.num_sublayers * self.num_layers)
            reset: Callable[[], None] | None = getattr(own, "reset_parameters", None)
            if reset is not None:
                reset()


class PHTransformerEncoder(_Stack):
    """``num_layers`` layers one after the other.

    Unlike those of :class:`torch.nn.TransformerEncoder` the layers do not start with equal values: each copy of
    ``encoder_layer`` is drawn anew, if it has a method ``reset_parameters``. There are no nested tensors, and so no
    ``enable_nested_tensor`` and ``mask_check``.

    Args:
        encoder_layer: the layer, which is copied.
        num_layers: number of copies.
        norm: a module for the result, or None.

    Raises:
        TypeError, ValueError: a layer or ``norm`` that is no module, a layer that cannot be drawn anew, or
            ``num_layers`` not an integer >= 1.
    """

    def __init__(self, encoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        super().__init__("encoder_layer", encoder_layer, num_layers, norm)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The masks go to every layer; ``is_causal`` None means False."""
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, bool(is_causal))
        return src if self.norm is None else self.norm(src)


class PHTransformerDecoder(_Stack):
    """``num_layers`` layers one after the other, each attending to the encoder's result.

    Args:
        decoder_layer: the layer, which is copied; the copies are drawn anew as in :class:`PHTransformerEncoder`.
        num_layers: number of copies.
        norm: a module for the result, or None.

    Raises:
        TypeError, ValueError: as :class:`PHTransformerEncoder`.
    """

    def __init__(self, decoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        super().__init__("decoder_layer", decoder_layer, num_layers, norm)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The masks go to every layer; ``tgt_is_causal`` None means False."""
        masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        for layer in self.layers:
            tgt = layer(tgt, memory, *masks, bool(tgt_is_causal), memory_is_causal)
        return tgt if self.norm is None else self.norm(tgt)


class PHTransformer(Module):
    """Encoder and decoder of parameterized hypercomplex products.

    Called as :class:`torch.nn.Transformer`, which has no n; ``norm`` takes the place of ``norm_first``, and own stacks
    are put together from :class:`PHTransformerEncoder` and :class:`PHTransformerDecoder` in place of
    ``custom_encoder`` and ``custom_decoder``.

    Args:
        d_model: features of source and target, divisible by nhead and n.
        nhead: number of heads.
        n: the dimension of the algebra.
        num_encoder_layers, num_decoder_layers: number of layers.
        dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm, bias, alphas, algebra_rank,
            kron_weights, init, learn_algebra, device, dtype: as in :class:`PHTransformerEncoderLayer`. With
            ``norm="post"`` and ``"pre"``, a LayerNorm follows the last layer of encoder and of decoder.

    Submodules: ``encoder`` and ``decoder``.

    Raises:
        TypeError, ValueError, DecompositionError: as :class:`PHTransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        n: int = 4,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm: str = "post",
        bias: bool = True,
        *,
        alphas: str = "shared",
        algebra_rank: int | str | None = None,
        kron_weights: bool = False,
        init: str | Tensor = "fan",
        learn_algebra: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = layer_options(algebra_rank, kron_weights, init, learn_algebra, device, dtype)
        num_encoder_layers = check_integer("num_encoder_layers", num_encoder_layers)
        num_decoder_layers = check_integer("num_decoder_layers", num_decoder_layers)
        sizes = d_model, nhead, n, dim_feedforward
        shared: tuple[Any, ...] = dropout, activation, layer_norm_eps, batch_first, norm, bias

        def last() -> Module | None:
            if norm not in ("post", "pre"):
                return None
            return nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        encoder_layer = PHTransformerEncoderLayer(*sizes, *shared, alphas=alphas, **options)
        decoder_layer = PHTransformerDecoderLayer(*sizes, *shared, alphas=alphas, **options)
        self.encoder = PHTransformerEncoder(encoder_layer, num_encoder_layers, last())
        self.decoder = PHTransformerDecoder(decoder_layer, num_decoder_layers, last())
        self.d_model, self.nhead, self.n, self.batch_first = d_model, nhead, n, batch_first

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The decoder's result for ``tgt``, given the encoder's for ``src``; masks as in the layers."""
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        return self.decoder(tgt, memory, *masks, tgt_is_causal, memory_is_causal)

    @staticmethod
    def generate_square_subsequent_mask(
        sz: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The causal mask ``(sz, sz)``: 0 where a query may attend, -inf elsewhere."""
        return nn.Transformer.generate_square_subsequent_mask(sz, device, dtype)
