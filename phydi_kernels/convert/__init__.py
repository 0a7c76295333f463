"""From dense layers and models, and from checkpoints of the published code, to parameterized hypercomplex ones."""

from .dense import ConversionReport, LayerReport, convert_model, from_conv, from_linear
from .published import load_reference_state_dict

__all__ = [
    "ConversionReport",
    "LayerReport",
    "convert_model",
    "from_conv",
    "from_linear",
    "load_reference_state_dict",
]
