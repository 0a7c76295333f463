"""Networks of parameterized hypercomplex layers."""

from .phresnet import PHResNet, phresnet18, phresnet34, phresnet50, phresnet101, phresnet152

__all__ = ["PHResNet", "phresnet18", "phresnet34", "phresnet50", "phresnet101", "phresnet152"]
