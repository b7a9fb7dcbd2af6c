"""Precisions: curvatures of a loss over its parameters, by structure; all answer the same questions, and they add."""

from became_core.laplace.precision.base import Precision
from became_core.laplace.precision.dense import Dense
from became_core.laplace.precision.diagonal import Diagonal, Isotropic
from became_core.laplace.precision.kronecker import Kronecker
from became_core.laplace.precision.low_rank import LowRank
from became_core.laplace.precision.sums import Sum
from became_core.laplace.precision.vectors import check_diagonal

__all__ = ["Dense", "Diagonal", "Isotropic", "Kronecker", "LowRank", "Precision", "Sum", "check_diagonal"]
