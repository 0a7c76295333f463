"""Parameterized hypercomplex layers and discriminant analysis as torch modules."""

from .discriminant_loss import DiscriminantLoss
from .kernel_discriminant import KernelDiscriminant
from .phc_conv import PHConv1d, PHConv2d, PHConv3d
from .phm_linear import PHMLinear
from .phydi_linear import PHYDILinear
from .phydi_residual import PHYDIResidual

__all__ = [
    "DiscriminantLoss",
    "KernelDiscriminant",
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHMLinear",
    "PHYDILinear",
    "PHYDIResidual",
]
