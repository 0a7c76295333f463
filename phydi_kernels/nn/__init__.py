"""Parameterized hypercomplex layers as torch modules."""

from .phc_conv import PHConv1d, PHConv2d, PHConv3d
from .phm_linear import PHMLinear
from .phydi_linear import PHYDILinear
from .phydi_residual import PHYDIResidual

__all__ = ["PHConv1d", "PHConv2d", "PHConv3d", "PHMLinear", "PHYDILinear", "PHYDIResidual"]
