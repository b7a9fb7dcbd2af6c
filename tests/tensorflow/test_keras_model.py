"""A user's Keras model learns as a description does, and gives the same taps."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from adapters.networks import draw_masks
from adapters.tensorflow.keras_model import KerasBackbone
from adapters.tensorflow.layers import Pass
from adapters.tensorflow.learner import TensorFlowLearner
from became_core import BecameError
from became_core.continual import Learner, TaskStream
from tests.own_models import (
    IMAGE,
    check_it_has_the_taps_of_its_description,
    check_it_learns_as_its_description,
)
from tests.precision import check_a_run_learns, check_mixed_precision
from tests.streams import prototype_stream


def network() -> keras.Model:
    """What DESCRIPTION describes, with Keras's own way to padding and activations."""
    layers = keras.layers
    images = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, padding="same", name="conv1")(images)
    x = layers.ReLU()(layers.BatchNormalization(epsilon=1e-5, name="bn1")(x))
    x = layers.Dropout(0.25)(x)
    x = layers.Add()([x, layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv2")(x)])
    x = layers.Conv2D(6, 2, strides=2, name="conv3")(layers.MaxPooling2D()(x))
    x = layers.Flatten()(layers.Permute((3, 1, 2))(x))
    return keras.Model(images, layers.Dense(7, activation="relu", name="fc1")(x))


def make(backbone: Any, stream: TaskStream, seed: int) -> Learner:
    return TensorFlowLearner(backbone, stream, seed=seed)


def test_it_learns_as_its_description_does() -> None:
    check_it_learns_as_its_description(make, KerasBackbone.of(network(), IMAGE))


class Compiled(keras.Model):  # type: ignore[misc, unused-ignore] # Keras is taken as untyped
    """The network, in a call that the user has compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def call(self, images: Any, training: bool = False) -> Any:
        return self.network(images, training=training)


@pytest.mark.parametrize("make_model", [network, Compiled])
def test_its_taps_are_those_of_the_description(make_model: Any) -> None:
    check_it_has_the_taps_of_its_description(make, KerasBackbone.of(make_model(), IMAGE))


def in_precision(backbone: Any, stream: TaskStream, mixed: bool) -> TensorFlowLearner:
    return TensorFlowLearner(backbone, stream, mixed_precision=mixed)


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(in_precision, KerasBackbone.of(network(), IMAGE))


def test_it_learns_in_mixed_precision() -> None:
    check_a_run_learns(in_precision, KerasBackbone.of(network(), IMAGE))


def test_a_steps_products_are_of_bfloat16_and_its_statistics_of_float32() -> None:
    backbone, stream = KerasBackbone.of(network(), IMAGE), prototype_stream(tasks=2, channels=2, side=8)
    learner = in_precision(backbone, stream, True)
    rows, draw = stream.tasks[0].train[:10], np.random.default_rng(0)
    weights, masks = learner.naming.for_task(learner.parameters(), 0), draw_masks(backbone.masks, 10, draw)
    runs: Any = learner.network
    traced = runs._all_gradients.get_concrete_function(weights, learner._data, rows, masks, None)
    operands: dict[str, set[tf.DType]] = {}
    for operation in traced.graph.get_operations():
        operands.setdefault(operation.type, set()).update(each.dtype for each in operation.inputs)
    convolutions = (operands[f"Conv2D{way}"] - {tf.int32} for way in ("", "BackpropInput", "BackpropFilter"))
    assert all(each == {tf.bfloat16} for each in (operands["MatMul"], *convolutions))
    assert operands["Rsqrt"] == operands["SparseSoftmaxCrossEntropyWithLogits"] - {tf.int64} == {tf.float32}
    assert {each.dtype for each in tf.nest.flatten(traced.structured_outputs)} == {tf.float32}


def test_the_model_is_as_it_was_and_takes_weights_back() -> None:
    model = network()
    images = tf.random.stateless_normal((3, 8, 8, 2), (0, 0))
    before = model(images)
    backbone = KerasBackbone.of(model, (2, 8, 8))
    weights = backbone.weights()
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        name: each.shape for name, each in backbone.parameters.items()
    }
    np.testing.assert_array_equal(model(images), before)
    backbone.assign({name: value * 2 for name, value in weights.items()})
    for name, value in backbone.weights().items():
        np.testing.assert_array_equal(value, 2 * weights[name])


def test_a_model_in_another_precision_than_the_learner_is_refused() -> None:
    backbone = KerasBackbone.of(network(), (2, 8, 8))
    with pytest.raises(
        BecameError, match=r"variable '\S*conv1/kernel' is of float32, and the learner computes in float64"
    ):
        TensorFlowLearner(backbone, prototype_stream(tasks=2, channels=2, side=8), dtype="float64")


def test_norms_compute_as_keras_does() -> None:
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((8, 8, 2)), layers.Conv2D(4, 3), layers.LayerNormalization(), layers.Flatten(), layers.Dense(5)]
    )
    images = tf.random.stateless_normal((3, 8, 8, 2), (0, 0))
    backbone = KerasBackbone.of(model, (2, 8, 8))
    np.testing.assert_allclose(backbone(Pass(backbone.weights()), images), model(images), rtol=1e-4, atol=1e-5)
