"""The PHM layers of adapters' Compacter without their dense matrix."""

from __future__ import annotations

import torch
from adapters.context import ForwardContext
from adapters.methods import modeling
from torch import Tensor, nn

from .. import functional

LIBRARY = "adapters"


class PHMLayer(modeling.PHMLayer):
    """adapters' PHMLayer on the kernels: y = x (sum_i C_i (x) W_i) + b, with C its phm_rule."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.phm_dim
        C = self._weights("phm_rule", "phm_rule", self.shared_phm_rule, self.factorized_phm_rule)
        W = self._weights("W", f"W_{self.position}", self.shared_W_phm, self.factorized_phm_W)
        A = (torch.bmm(*C) if len(C) == 2 else C[0]).transpose(1, 2)
        if len(W) == 1:
            return functional.phm_linear(x, A, W[0].transpose(1, 2), self.b)
        left, right = W
        steps = n * left.shape[2] * (self.in_features + n * self.out_features)
        if 2 * steps > self.in_features * self.out_features:
            return functional.phm_linear(x, A, torch.bmm(left, right).transpose(1, 2), self.b)
        # Block l of x by every left factor, n * rank numbers each, and of the rest a matrix of as few columns.
        x = nn.functional.linear(x.unflatten(-1, (n, -1)), left.transpose(1, 2).flatten(0, 1)).flatten(-2)
        rest = torch.einsum("ikl,irs->kslir", A, right).flatten(2).flatten(0, 1)
        return nn.functional.linear(x, rest, self.b)

    def _weights(self, own: str, shared: str, is_shared: bool, factorized: bool) -> tuple[Tensor, ...]:
        """The weight of this name, or its two factors, from where the library keeps it."""
        suffixes = ("_left", "_right") if factorized else ("",)
        if is_shared:
            parameters = ForwardContext.get_context().shared_parameters[self.name]
            return tuple(parameters[shared + suffix] for suffix in suffixes)
        return tuple(getattr(self, own + suffix) for suffix in suffixes)


REPLACEMENTS = {modeling.PHMLayer: PHMLayer}


def why_left(layer: modeling.PHMLayer) -> str:
    """Why the layer computes as before; "" if it does not. What wraps the forward of ours runs it."""
    replaced = type(layer) is modeling.PHMLayer and "forward" in vars(layer)
    return "its forward was replaced in the instance" if replaced else ""
