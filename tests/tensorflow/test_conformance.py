"""The TensorFlow learner keeps the promises that every framework's learner makes, on networks of each kind of layer."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import tensorflow as tf

from adapters.networks import Backbone, Linear
from adapters.tensorflow.learner import TensorFlowLearner, TensorFlowNetwork
from adapters.tensorflow.run import BACKEND
from became_core.continual import Learner, TaskStream
from tests.conformance import BACKBONES, CHECKS, Make, conforms_where_all_is_compiled
from tests.conformance.running import check_every_method_runs_and_repeats
from tests.dropout import check_framework_masks
from tests.norms import CHECKS as NORM_CHECKS
from tests.norms import MakeNormalised
from tests.precision import check_mixed_precision

NETWORKS: dict[Any, TensorFlowNetwork] = {}


class QuickLearner(TensorFlowLearner):
    """Learners of one network with heads of one width share what is traced: functions of the weights that each has."""

    def _build(self, backbone: Backbone, stream: TaskStream, mixed_precision: bool, seed: int) -> None:
        self._widths = tuple(len(task.classes) for task in stream.tasks)
        super()._build(backbone, stream, mixed_precision, seed)

    def _network(self, backbone: Backbone, head: Linear, mixed_precision: bool) -> TensorFlowNetwork:
        key = self._widths, backbone, head, mixed_precision, self.likelihood
        if key not in NETWORKS:
            NETWORKS[key] = super()._network(backbone, head, mixed_precision)
        return NETWORKS[key]


# Every method runs in a test of its own, below.
PAIRS = [
    (check, backbone)
    for check in CHECKS
    for backbone in BACKBONES
    if (check, backbone) != (check_every_method_runs_and_repeats, "linear")
]


@pytest.mark.parametrize(("check", "backbone"), PAIRS)
def test_it_conforms(check: Callable[[Make], None], backbone: str) -> None:
    def make(stream: TaskStream, seed: int) -> Learner:
        return QuickLearner(BACKBONES[backbone](stream), stream, dtype="float64", seed=seed)

    conforms_where_all_is_compiled(check, make, backbone)


def test_one_network_is_traced_once_for_all_methods() -> None:
    """Whatever the task, the stage and the memory; also the methods run, as ``conforms_where_all_is_compiled`` says."""
    NETWORKS.clear()
    check_every_method_runs_and_repeats(
        lambda stream, seed: QuickLearner(BACKBONES["linear"](stream), stream, dtype="float64", seed=seed)
    )
    (network,) = NETWORKS.values()
    assert cast(Any, network)._all_gradients.experimental_get_tracing_count() == 1


@pytest.mark.timeout(1200)  # each compiles what it runs
@pytest.mark.parametrize("check", NORM_CHECKS)
def test_normalisation(check: Callable[[MakeNormalised], None]) -> None:
    check(lambda network, stream: QuickLearner(network, stream, dtype="float64"))


def test_the_framework_draws_masks_if_it_is_asked_to() -> None:
    check_framework_masks(lambda network, stream, masks: TensorFlowLearner(network, stream, dropout_masks=masks))


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(lambda network, stream, mixed: TensorFlowLearner(network, stream, mixed_precision=mixed))


def test_a_run_multiplies_float32_as_such() -> None:
    tf.config.experimental.enable_tensor_float_32_execution(True)
    BACKEND.prepare()
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
