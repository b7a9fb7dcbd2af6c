"""The same weights in every run of a test; without TensorFlow there is nothing to collect here."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("tensorflow") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Let Keras draw the weights of a test's own models by one seed, since a network may learn badly from some."""
    import keras

    keras.utils.set_random_seed(0)
