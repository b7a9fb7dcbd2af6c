"""The same weights in every run of a test; without TensorFlow there is nothing to collect here."""

import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("tensorflow") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Let Keras draw the weights of a test's own models by one seed, since a network may learn badly from some."""
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture
def in_double_precision() -> Iterator[None]:
    """Let Keras make models in double precision, of which taps may not know all parameters."""
    import keras

    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")  # a model of another test may have fixed it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "taps do not know", UserWarning)
        yield
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)
