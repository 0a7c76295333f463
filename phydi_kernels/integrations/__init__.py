"""Adapter layers of other libraries on the kernels of this package: LoKr of PEFT, Compacter of adapters."""

from .apply import IntegrationReport, LayerReport, apply_phydi_kernels

__all__ = ["IntegrationReport", "LayerReport", "apply_phydi_kernels"]
