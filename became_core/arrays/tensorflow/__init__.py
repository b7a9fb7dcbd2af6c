"""The Array API on TensorFlow, which array-api-compat does not know: what the core uses of it, and little more.

Convention: names, keywords, promotion and results are the standard's. Arrays are eager and symbolic tensors and
variables. Three things stay TensorFlow's own: operators do not promote dtypes (use ``astype``), tensors have no ``.T``
(use ``matrix_transpose``), and XLA's ``max`` and ``min`` may pass over a NaN. Default dtypes: float32 and int64.
"""

from math import e, inf, nan, pi

from became_core.arrays.tensorflow import linalg
from became_core.arrays.tensorflow.creation import *  # noqa: F403
from became_core.arrays.tensorflow.dtypes import *  # noqa: F403
from became_core.arrays.tensorflow.elementwise import *  # noqa: F403
from became_core.arrays.tensorflow.manipulation import *  # noqa: F403
from became_core.arrays.tensorflow.reductions import *  # noqa: F403
from became_core.arrays.tensorflow.searching import *  # noqa: F403

__all__ = ["e", "inf", "linalg", "nan", "newaxis", "pi"]

newaxis = None
