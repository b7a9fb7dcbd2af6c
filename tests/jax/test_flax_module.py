"""A user's flax module learns as a description does, and gives the same taps."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from adapters.backend import Step
from adapters.jax.flax_module import FlaxBackbone
from adapters.jax.layers import Pass
from adapters.jax.learner import JaxLearner
from adapters.networks import draw_masks
from became_core import BecameError
from became_core.continual import Learner, TaskStream
from tests.own_models import (
    IMAGE,
    check_it_has_the_taps_of_its_description,
    check_it_learns_as_its_description,
)
from tests.precision import check_a_run_learns, check_mixed_precision
from tests.streams import prototype_stream


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


def make(backbone: Any, stream: TaskStream, seed: int) -> Learner:
    return JaxLearner(backbone, stream, seed=seed)


def test_it_learns_as_its_description_does() -> None:
    check_it_learns_as_its_description(make, FlaxBackbone.of(Network(), IMAGE))


def test_its_taps_are_those_of_the_description() -> None:
    check_it_has_the_taps_of_its_description(make, FlaxBackbone.of(Network(), IMAGE))


def test_weights_go_there_and_back() -> None:
    backbone = FlaxBackbone.of(Network(), (2, 8, 8))
    variables = Network().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, jnp.ones((2, 8, 8, 2)))
    weights = backbone.weights(variables["params"], variables["batch_stats"])
    assert {name: value.shape for name, value in weights.items()} == {
        name: each.shape for name, each in backbone.parameters.items()
    }
    jax.tree.map(np.testing.assert_array_equal, backbone.batch_stats(weights), variables["batch_stats"])
    back = backbone.params(weights)
    jax.tree.map(np.testing.assert_array_equal, back, variables["params"])
    assert jax.tree.structure(back) == jax.tree.structure(variables["params"])


def in_precision(backbone: Any, stream: TaskStream, mixed: bool) -> JaxLearner:
    return JaxLearner(backbone, stream, mixed_precision=mixed)


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(in_precision, FlaxBackbone.of(Network(), IMAGE))


def test_it_learns_in_mixed_precision() -> None:
    check_a_run_learns(in_precision, FlaxBackbone.of(Network(), IMAGE))


def test_a_steps_products_are_of_bfloat16_and_its_statistics_of_float32() -> None:
    backbone, stream = FlaxBackbone.of(Network(), IMAGE), prototype_stream(tasks=2, channels=2, side=8)
    learner = in_precision(backbone, stream, True)
    rows, draw = stream.tasks[0].train[:10], np.random.default_rng(0)
    weights, batch = (
        learner.naming.for_task(learner.parameters(), 0),
        Step(rows, 0.1, draw_masks(backbone.masks, 10, draw), None),
    )
    traced = jax.make_jaxpr(learner.network.gradients)(weights, {}, {}, learner._data, batch)
    operands: dict[str, set[str]] = {}
    for equation in equations(traced.jaxpr):
        dtypes = {each.aval.dtype.name for each in equation.invars}
        operands.setdefault(equation.primitive.name, set()).update(dtypes)
    assert operands["dot_general"] == operands["conv_general_dilated"] == {"bfloat16"}
    assert operands["rsqrt"] == operands["exp"] == {"float32"}
    assert {value.aval.dtype.name for value in traced.jaxpr.outvars} == {"float32"}


def equations(jaxpr: Any) -> Iterator[Any]:
    """All of a program's, also within functions that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)


class Embedded(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """A layer that taps do not know."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
        return nn.DenseGeneral(3, axis=(1, 2, 3), name="general")(x)


def test_a_layer_that_taps_do_not_know_is_named() -> None:
    with pytest.raises(BecameError, match=r"the parameter 'general\.\w+'; on JAX they know BatchNorm, Conv, Dense"):
        FlaxBackbone.of(Embedded(), (2, 8, 8))


@pytest.mark.parametrize("transformed", [nn.remat, nn.jit])
def test_a_layer_inside_of_a_transformation_is_refused(transformed: Any) -> None:
    class Inside(nn.Module):  # type: ignore[misc, unused-ignore]
        @nn.compact  # type: ignore[untyped-decorator, unused-ignore]
        def __call__(self, images: Any) -> Any:
            return transformed(nn.Dense)(5)(images.reshape(len(images), -1))

    with pytest.raises(BecameError, match=r"a layer of the module Inside runs inside of nn\.jit, nn\.remat or another"):
        FlaxBackbone.of(Inside(), (2, 8, 8))


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
