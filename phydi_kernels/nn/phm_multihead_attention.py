"""PHMMultiheadAttention."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn import functional as torch_functional

from .._check import check_divisible, check_flag, check_integer, check_probability
from ..ops._autograd import autocast_enabled
from ._base import layer_options
from .factored import linear_call
from .phm_linear import PHMLinear


class PHMMultiheadAttention(Module):
    r"""Multi-head attention with parameterized hypercomplex projections (PHYDI, section 3.2).

    .. math:: \mathrm{softmax}\Bigl(\frac{Q_h K_h^T}{\sqrt{d_h}} + M\Bigr) V_h, \qquad
              Q, K, V = H_Q x_Q + b_Q,\; H_K x_K + b_K,\; H_V x_V + b_V

    for each head h of :math:`d_h` = embed_dim/num_heads features, the heads side by side, and then the output
    projection. The interface is that of :class:`torch.nn.MultiheadAttention`, the products and the attention of
    :class:`PHMLinear` and :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        embed_dim: features of query and output, divisible by num_heads and n.
        num_heads: number of heads.
        n: the dimension of the algebra.
        dropout: probability with which an attention weight is 0 in training.
        bias: adds b to all projections; they start at 0.
        add_bias_kv: adds a learned position to keys and values.
        add_zero_attn: adds a position of zeros to keys and values.
        kdim, vdim: features of key and value; None means embed_dim.
        batch_first: tensors are ``(batch, length, features)``, else ``(length, batch, features)``.
        fused_qkv: one :class:`PHMLinear` ``in_proj`` to 3*embed_dim features, of query, key and value in this order,
            with one algebra; else three: ``q_proj``, ``k_proj`` and ``v_proj``. Which tensors are the same
            goes by identity: fused, a call whose key is its value but not its query multiplies twice as much as needed,
            one with three tensors three times. None means True where kdim and vdim are embed_dim.
        algebra_rank, kron_weights, init, learn_algebra, device, dtype: as in :class:`PHMLinear`, for each projection.

    Submodules: ``in_proj``, or ``q_proj``, ``k_proj`` and ``v_proj``; ``out_proj``. Parameters of its own: ``bias_k``
    and ``bias_v`` ``(1, 1, embed_dim)`` with ``add_bias_kv``.

    Raises:
        TypeError, ValueError, DecompositionError: as :class:`PHMLinear`; a ``dropout`` that is no probability, sizes
            that num_heads or n do not divide, or ``fused_qkv`` with other kdim or vdim.
    """

    bias_k: Parameter | None
    bias_v: Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        n: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        fused_qkv: bool | None = None,
        algebra_rank: int | str | None = None,
        kron_weights: bool = False,
        init: str | Tensor = "fan",
        learn_algebra: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n = check_integer("n", n)
        embed_dim = check_divisible("embed_dim", embed_dim, n)
        num_heads = check_integer("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}")
        self.embed_dim, self.num_heads, self.n = embed_dim, num_heads, n
        self.kdim = embed_dim if kdim is None else check_divisible("kdim", kdim, n)
        self.vdim = embed_dim if vdim is None else check_divisible("vdim", vdim, n)
        self.dropout = check_probability("dropout", dropout)
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn
        flags = {"add_zero_attn": add_zero_attn, "add_bias_kv": add_bias_kv, "batch_first": batch_first}
        for name, flag in flags.items() if fused_qkv is None else {**flags, "fused_qkv": fused_qkv}.items():
            check_flag(name, flag)
        same = self.kdim == self.vdim == embed_dim
        if fused_qkv and not same:
            raise ValueError(
                f"fused_qkv=True needs kdim and vdim to be embed_dim={embed_dim}, not {self.kdim} and {self.vdim}"
            )
        self.fused_qkv = same if fused_qkv is None else fused_qkv
        options = layer_options(algebra_rank, kron_weights, init, learn_algebra, device, dtype)
        if self.fused_qkv:
            self.in_proj = PHMLinear(embed_dim, 3 * embed_dim, n, bias, **options)
        else:
            self.q_proj = PHMLinear(embed_dim, embed_dim, n, bias, **options)
            self.k_proj = PHMLinear(self.kdim, embed_dim, n, bias, **options)
            self.v_proj = PHMLinear(self.vdim, embed_dim, n, bias, **options)
        self.out_proj = PHMLinear(embed_dim, embed_dim, n, bias, **options)
        for name in ("bias_k", "bias_v"):
            added = Parameter(torch.empty(1, 1, embed_dim, device=device, dtype=dtype)) if add_bias_kv else None
            self.register_parameter(name, added)
        for projection in self.projections():
            projection.scale_start(1.0, 0.0)
        self._reset_added()

    def projections(self) -> list[PHMLinear]:
        """The projections of query, key and value, and last that of the output."""
        inner = [self.in_proj] if self.fused_qkv else [self.q_proj, self.k_proj, self.v_proj]
        return [*inner, self.out_proj]

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as the constructor does."""
        for projection in self.projections():
            projection.reset_parameters()
        self._reset_added()

    def _reset_added(self) -> None:
        for added in (self.bias_k, self.bias_v):
            if added is not None:
                torch.nn.init.xavier_normal_(added)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        residual: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of each query to all keys.

        Args:
            query: ``(L, N, embed_dim)``, or ``(N, L, embed_dim)`` with batch_first, or unbatched ``(L, embed_dim)``.
            key: ``(S, N, kdim)``, and alike.
            value: ``(S, N, vdim)``, and alike.
            key_padding_mask: ``(N, S)`` or unbatched ``(S,)``: True where a key is not attended, or numbers of query's
                dtype, under autocast of any floating one, to be added to the scores.
            need_weights: whether to return the weights. Without them
                :func:`torch.nn.functional.scaled_dot_product_attention` runs, whose fused kernels do not form them and
                have no second derivatives: take those under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
            attn_mask: ``(L, S)`` or ``(N * num_heads, L, S)``, of the same two kinds.
            average_attn_weights: returns their mean over the heads.
            is_causal: a query attends to no later key. With ``attn_mask`` both hold; in torch it only says that
                ``attn_mask`` is causal.
            residual: of the result's shape; the result is residual + alpha * output, in one call with the output
                projection.
            alpha: one element.

        Returns:
            The output, of query's shape, and the weights ``(N, L, S)``, or ``(N, num_heads, L, S)`` where not averaged,
            or None. A query without a key it may attend to gets NaN or 0, as in torch.

        Raises:
            TypeError: masks of another dtype than bool or query's.
            ValueError: shapes that do not fit.
        """
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and not isinstance(mask, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor or None, not {type(mask).__name__}")
        q, k, v, batched = self._project(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat((t, b.expand(t.shape[0], -1, -1)), 1) for t, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (torch_functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
        N, L, S = q.shape[0], q.shape[1], k.shape[1]
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        explicit = need_weights or added > 0 or key_padding_mask is not None or attn_mask is not None
        causal = _causal_mask(L, S - added, q) if is_causal and explicit else None
        mask = self._mask(query.dtype, key_padding_mask, attn_mask, causal, (N, L, S - added), batched)
        if mask is not None:
            # Autocast may have changed the dtype of the products; the added keys are attended by all.
            mask = torch_functional.pad(mask, (0, added)).to(q.dtype)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = torch_functional.dropout(weights, dropout)
            attended = weights @ v
        else:
            attended = torch_functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal and not explicit)
        attended = attended.transpose(1, 2).flatten(2)
        if not batched:
            attended = attended.squeeze(0)
        elif not self.batch_first:
            attended = attended.transpose(0, 1)
        y = linear_call(self.out_proj, attended, residual=residual, alpha=alpha)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return y, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
        """q (N, L, embed_dim), k and v (N, S, embed_dim), and whether the arguments had a batch dimension."""
        sizes = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (t, _) in sizes.items():
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, not {type(t).__name__}")
        for name, (t, size) in sizes.items():
            if t.dim() != query.dim() or t.dim() not in (2, 3) or t.shape[-1] != size:
                dims = "(length, batch, " if not self.batch_first else "(batch, length, "
                raise ValueError(
                    f"{name} has shape {tuple(t.shape)}; it must be {dims}{size}) or, as all three, (length, {size})"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} must have the same length and batch"
            )
        batched, axis = query.dim() == 3, 0 if self.batch_first else 1
        if batched and query.shape[axis] != key.shape[axis]:
            raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must have the same batch size")
        E = self.embed_dim
        if not self.fused_qkv:
            parts = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        elif key is value:
            of_query = self.in_proj(query)
            of_key = of_query if key is query else self.in_proj(key)
            parts = of_query[..., :E], of_key[..., E : 2 * E], of_key[..., 2 * E :]
        else:
            projected = [self.in_proj(t) for t in (query, key, value)]
            parts = tuple(t[..., i * E : (i + 1) * E] for i, t in enumerate(projected))
        if not batched:
            q, k, v = (t.unsqueeze(0) for t in parts)
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in parts)
        else:
            q, k, v = parts
        return q, k, v, batched

    def _mask(
        self,
        dtype: torch.dtype,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        causal: Tensor | None,
        sizes: tuple[int, int, int],
        batched: bool,
    ) -> Tensor | None:
        """What is added to the scores (N, heads, L, S), of a shape that broadcasts, or None."""
        N, L, S = sizes
        masks = [] if causal is None else [causal]
        if key_padding_mask is not None:
            of_keys = (N, S) if batched else (S,)
            if key_padding_mask.shape != of_keys:
                raise ValueError(f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be {of_keys}")
            masks.append(_additive("key_padding_mask", key_padding_mask, dtype)[..., None, None, :])
        if attn_mask is not None:
            every = (N * self.num_heads, L, S)
            if attn_mask.shape not in ((L, S), every):
                raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}; it must be {(L, S)} or {every}")
            additive = _additive("attn_mask", attn_mask, dtype)
            masks.append(additive if attn_mask.dim() == 2 else additive.unflatten(0, (N, self.num_heads)))
        return sum(masks[1:], start=masks[0]) if masks else None

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, n={self.n}, batch_first={self.batch_first}"


def _causal_mask(L: int, S: int, like: Tensor) -> Tensor:
    return torch.full((L, S), -math.inf, dtype=like.dtype, device=like.device).triu(1)


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    if mask.is_floating_point() and autocast_enabled(mask.device):
        return mask
    if mask.dtype != dtype:
        raise TypeError(f"{name} has dtype {mask.dtype}; it must be torch.bool or {dtype}")
    return mask
