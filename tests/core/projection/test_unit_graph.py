"""The unit graph of the reference learner's network."""

import numpy as np

from became_core.continual import Annealed, Training
from became_core.continual.measurement import Measurement
from became_core.projection.unit_graph import UnitGraph, find_unit_graph
from reference.learner import ReferenceLearner
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=2)


def test_the_unit_graph_of_a_sequential_network_is_found_without_changing_weights() -> None:
    learner = ReferenceLearner(STREAM, bias=True)
    before = learner.parameters()
    layers, heads = ("fc1.weight", "fc2.weight"), ("heads.0.weight", "heads.1.weight")
    expected = UnitGraph(layers, ((), ("fc1.weight",), ("fc2.weight",)), heads)
    training = Training(Annealed(0.1, 1), Annealed(0.1, 1))
    start = Measurement(learner, STREAM.tasks[1], training, "empirical", 0, "start")
    assert find_unit_graph(start) == expected
    for name, value in learner.parameters().items():
        np.testing.assert_array_equal(value, before[name])
