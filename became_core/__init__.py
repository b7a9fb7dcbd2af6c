"""BECAME: Bayesian continual learning with adaptive model merging, for any framework of the Array API.

The paper is ICML 2025, arXiv 2504.02666. ``optimal_alpha`` and ``merge`` serve two sets of weights in any framework;
the subpackages hold the rest of the method, and ``adapters`` run it on PyTorch, JAX or TensorFlow.
"""

from became_core.errors import BecameError
from became_core.laplace import (
    LaplacePosterior,
    Quadratic,
    layerwise_quadratic,
    merge,
    optimal_alpha,
    path_quadratic,
    subspace_quadratic,
    trace_path,
)

__all__ = [
    "BecameError",
    "LaplacePosterior",
    "Quadratic",
    "layerwise_quadratic",
    "merge",
    "optimal_alpha",
    "path_quadratic",
    "subspace_quadratic",
    "trace_path",
]
