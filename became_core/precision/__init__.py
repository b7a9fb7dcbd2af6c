"""Precisions: curvatures of a loss over its parameters, by structure; all answer the same questions, and they add."""

from became_core.precision.base import Precision
from became_core.precision.dense import Dense
from became_core.precision.diagonal import Diagonal
from became_core.precision.gram import GramRequest, gram_matrices
from became_core.precision.kronecker import Kronecker
from became_core.precision.low_rank import LowRank
from became_core.precision.sums import Isotropic, Sum
from became_core.precision.vectors import check_diagonal

__all__ = [
    "Dense",
    "Diagonal",
    "GramRequest",
    "Isotropic",
    "Kronecker",
    "LowRank",
    "Precision",
    "Sum",
    "check_diagonal",
    "gram_matrices",
]
