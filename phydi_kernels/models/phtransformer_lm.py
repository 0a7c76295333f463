"""Language model of parameterized hypercomplex products (PHYDI, sections 3.2 and 4.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from .._check import check_divisible, check_integer
from ..nn import PHMEmbedding, PHMLinear, PHTransformerEncoder, PHTransformerEncoderLayer
from ..nn._base import layer_options


class PHTransformerLM(Module):
    r"""Predicts each token of a text from those before it.

    .. math:: x_0 = \sqrt{d}\, E_{\mathrm{token}} + P, \qquad \mathrm{logits} = H_G\, \mathrm{encoder}(x_0) + b_G

    with a table E of :class:`PHMEmbedding`, sinusoidal positions P (Vaswani et al., 2017), dropout, a causal
    :class:`PHTransformerEncoder` and a :class:`PHMLinear` generator, which has parameters of its own. The table starts
    with standard deviation 1/sqrt(d), but for ``init="reference"``. With ``norm="pre"`` the encoder ends with a
    LayerNorm (Xiong et al., 2020); the published code has none. With ``norm="fixup"`` all logits are 0 at the start.

    Args:
        num_tokens: size of the vocabulary, divisible by n.
        d_model: features of a token, divisible by nhead and n.
        nhead, n, dim_feedforward, dropout, norm, alphas: as in :class:`PHTransformerEncoderLayer`.
        algebra_rank, kron_weights, init, learn_algebra, device, dtype: as there, for embedding and generator too.
        num_layers: number of encoder layers.

    Submodules: ``embedding``, ``encoder``, ``generator``.

    Shapes: tokens ``(batch, length)``, int32 or int64, to the logits ``(batch, length, num_tokens)`` of the next token.

    Raises:
        TypeError, ValueError, DecompositionError: as :class:`PHTransformerEncoderLayer`.
        IndexError: a token that is not below ``num_tokens``.
    """

    def __init__(
        self,
        num_tokens: int,
        d_model: int = 128,
        nhead: int = 8,
        n: int = 4,
        num_layers: int = 12,
        dim_feedforward: int = 256,
        dropout: float = 0.1,
        norm: str = "phydi",
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
        n = check_integer("n", n)
        num_tokens = check_divisible("num_tokens", num_tokens, n)
        options = layer_options(algebra_rank, kron_weights, init, learn_algebra, device, dtype)
        layer = PHTransformerEncoderLayer(
            d_model, nhead, n, dim_feedforward, dropout, batch_first=True, norm=norm, alphas=alphas, **options
        )
        last = nn.LayerNorm(d_model, device=device, dtype=dtype) if norm == "pre" else None
        self.num_tokens, self.d_model = num_tokens, d_model
        std = None if isinstance(init, str) and init == "reference" else d_model**-0.5
        self.embedding = PHMEmbedding(num_tokens, d_model, n, std=std, **options)
        self.dropout = nn.Dropout(dropout)
        self.encoder = PHTransformerEncoder(layer, num_layers, last)
        self.generator = PHMLinear(d_model, num_tokens, n, **options)
        if norm == "fixup":
            self.generator.scale_start(0.0, 0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens must be a torch.Tensor, not {type(tokens).__name__}")
        if tokens.dim() != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; it must be (batch, length)")
        x = self.embedding(tokens) * math.sqrt(self.d_model)
        x = x + sinusoidal_positions(tokens.shape[1], self.d_model, x.dtype, x.device)
        return self.generator(self.encoder(self.dropout(x), is_causal=True))


def sinusoidal_positions(length: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(length, d)``: sin(t w) and cos(t w) by turns for position t, w = 10000^(-2j/d) for their j-th pair."""
    options: dict[str, Any] = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
    frequencies = torch.exp(torch.arange(0, d, 2, **options) * (-math.log(10000.0) / d))
    angles = torch.arange(length, **options).unsqueeze(1) * frequencies
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :d].to(dtype)
