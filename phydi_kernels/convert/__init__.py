"""Dense layers and models as parameterized hypercomplex ones."""

from .dense import ConversionReport, LayerReport, convert_model, from_conv, from_linear

__all__ = ["ConversionReport", "LayerReport", "convert_model", "from_conv", "from_linear"]
