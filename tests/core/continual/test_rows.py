"""Networks in a row are told from others by trying."""

import numpy as np

from became_core.continual.rows import layers_in_a_row
from reference.learner import ReferenceLearner
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=2)


def test_the_layers_of_a_network_in_a_row_are_found_and_it_keeps_its_weights() -> None:
    learner = ReferenceLearner(STREAM, bias=True)
    before = learner.parameters()
    order, heads = layers_in_a_row(learner, STREAM.tasks[1])
    assert order == ("fc1.weight", "fc2.weight")
    assert heads == ("heads.0.weight", "heads.1.weight")
    for name, value in learner.parameters().items():
        np.testing.assert_array_equal(value, before[name])
