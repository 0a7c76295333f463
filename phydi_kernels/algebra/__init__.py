"""Structure tensors of known and random algebras, and their bilinear algorithms."""

from .decompose import BilinearAlgorithm, DecompositionError, decompose, decompose_many, generic_rank
from .structure import clifford, complex_numbers, octonions, quaternions, random

__all__ = [
    "BilinearAlgorithm",
    "DecompositionError",
    "clifford",
    "complex_numbers",
    "decompose",
    "decompose_many",
    "generic_rank",
    "octonions",
    "quaternions",
    "random",
]
