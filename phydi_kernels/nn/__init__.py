"""Parameterized hypercomplex layers and discriminant analysis as torch modules."""

from .discriminant_loss import DiscriminantLoss
from .kernel_discriminant import KernelDiscriminant
from .ph_transformer import (
    PHTransformer,
    PHTransformerDecoder,
    PHTransformerDecoderLayer,
    PHTransformerEncoder,
    PHTransformerEncoderLayer,
)
from .phc_conv import PHConv1d, PHConv2d, PHConv3d
from .phm_embedding import PHMEmbedding
from .phm_linear import PHMLinear
from .phm_multihead_attention import PHMMultiheadAttention
from .phydi_linear import PHYDILinear
from .phydi_residual import PHYDIResidual

__all__ = [
    "DiscriminantLoss",
    "KernelDiscriminant",
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHMEmbedding",
    "PHMLinear",
    "PHMMultiheadAttention",
    "PHTransformer",
    "PHTransformerDecoder",
    "PHTransformerDecoderLayer",
    "PHTransformerEncoder",
    "PHTransformerEncoderLayer",
    "PHYDILinear",
    "PHYDIResidual",
]
