"""A user's flax module learns as a description does, and gives the same taps."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from adapters.architectures import (
    Architecture,
    BatchNorm,
    Convolution,
    Dropout,
    Flatten,
    Linear,
    MaxPool,
    ReLU,
    Residual,
)
from adapters.jax.flax_module import FlaxBackbone
from adapters.jax.layers import Pass
from adapters.jax.learner import JaxLearner
from became_core import BecameError
from became_core.continual import Annealed, MethodSettings, Training, build_method, learn
from became_core.continual.measurement import Measurement
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=2, channels=2, side=8)
TRAINING = Training(Annealed(lr=0.1, epochs=2), Annealed(lr=0.1, epochs=1), batch_size=10)


class Network(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """What DESCRIPTION describes, with flax's own way to a convolution's padding."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn1")(nn.Conv(4, (3, 3), padding=1, name="conv1")(x)))
        x = nn.Dropout(0.25, deterministic=False)(x)
        x = x + nn.Conv(4, (3, 3), padding="SAME", use_bias=False, name="conv2")(x)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Conv(6, (2, 2), strides=2, padding="VALID", name="conv3")(x)
        x = jnp.moveaxis(x, -1, 1).reshape(len(x), -1)
        return nn.relu(nn.Dense(7, name="fc1")(x))


DESCRIPTION = Architecture(
    (
        *(Convolution("conv1", 4, 3, padding=1, bias=True), BatchNorm("bn1"), ReLU(), Dropout(0.25)),
        *(Residual((Convolution("conv2", 4, 3, padding=1),)), MaxPool(2)),
        *(Convolution("conv3", 6, 2, stride=2, bias=True), Flatten(), Linear("fc1", 7, bias=True), ReLU()),
    ),
    (2, 8, 8),
)


def test_a_module_learns_as_its_description_does() -> None:
    backbone = FlaxBackbone.of(Network(), (2, 8, 8))
    assert dict(backbone.parameters) == dict(DESCRIPTION.parameters)
    assert backbone.masks == DESCRIPTION.masks
    ours, theirs = (JaxLearner(each, STREAM, seed=3) for each in (backbone, DESCRIPTION))
    method = build_method("became", MethodSettings(threshold=0.9))
    records = [learn(learner, STREAM, method, TRAINING, seed=5) for learner in (ours, theirs)]
    np.testing.assert_array_equal(records[0].accuracy, records[1].accuracy)
    for name, value in theirs.parameters().items():
        np.testing.assert_allclose(ours.parameters()[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_its_taps_are_those_of_the_description() -> None:
    learners = [JaxLearner(each, STREAM, seed=3) for each in (FlaxBackbone.of(Network(), (2, 8, 8)), DESCRIPTION)]
    fishers = [
        Measurement(learner, STREAM.tasks[0], TRAINING, "true", 0, "merge").diagonal().values for learner in learners
    ]
    for name, value in fishers[1].items():
        np.testing.assert_allclose(fishers[0][name], value, rtol=1e-3, atol=1e-6, err_msg=name)


def test_weights_go_there_and_back() -> None:
    backbone = FlaxBackbone.of(Network(), (2, 8, 8))
    variables = Network().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, jnp.ones((2, 8, 8, 2)))
    weights = backbone.weights(variables["params"])
    assert {name: value.shape for name, value in weights.items()} == {
        name: each.shape for name, each in backbone.parameters.items()
    }
    back = backbone.params(weights)
    jax.tree.map(np.testing.assert_array_equal, back, variables["params"])
    assert jax.tree.structure(back) == jax.tree.structure(variables["params"])


class Embedded(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """A layer that taps do not know."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
        return nn.DenseGeneral(3, axis=(1, 2, 3), name="general")(x)


def test_a_layer_that_taps_do_not_know_is_named() -> None:
    with pytest.raises(BecameError, match=r"the parameter 'general\.\w+'; on JAX they know BatchNorm, Conv, Dense"):
        FlaxBackbone.of(Embedded(), (2, 8, 8))


class Norms(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """Layer and group norm."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
        x = nn.GroupNorm(num_groups=2)(nn.Conv(4, (3, 3))(x))
        return nn.LayerNorm()(nn.Dense(5)(x.reshape(len(x), -1)))


def test_norms_compute_as_flax_does() -> None:
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 2), "float32")
    variables = Norms().init(jax.random.key(1), images)
    backbone = FlaxBackbone.of(Norms(), (2, 8, 8))
    found = backbone(Pass(backbone.weights(variables["params"])), images)
    np.testing.assert_allclose(found, Norms().apply(variables, images), rtol=1e-5, atol=1e-5)
