"""Networks of parameterized hypercomplex layers."""

from .phresnet import PHResNet, phresnet18, phresnet34, phresnet50, phresnet101, phresnet152
from .phtransformer_lm import PHTransformerLM

__all__ = ["PHResNet", "PHTransformerLM", "phresnet18", "phresnet34", "phresnet50", "phresnet101", "phresnet152"]
