"""A catalogue of users' flax modules: each runs as it is and learns, or is refused by layer and option.

To add a module, add a row to ``MODULES`` or to ``REFUSED``. Images are [N, 8, 8, 2].
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from adapters.jax.flax_module import FlaxBackbone
from adapters.jax.layers import Pass
from adapters.jax.learner import JaxLearner
from became_core import BecameError
from became_core.continual import Annealed, Training
from tests.own_models import check_it_learns_from
from tests.streams import prototype_stream

IMAGE = (2, 8, 8)
STREAM = prototype_stream(tasks=2, classes_per_task=2, per_class=8, channels=2, side=8)
TRAINING = Training(Annealed(0.05, 1), Annealed(0.05, 1), batch_size=11)  # a last chunk of one sample
IMAGES = np.random.default_rng(0).normal(size=(5, 8, 8, 2)).astype(np.float32)


def plain(*middle: Any) -> nn.Module:
    """Return two layers with others between them."""
    first, last = nn.Conv(4, (3, 3), strides=2, padding="VALID"), nn.Dense(6)
    return nn.Sequential([first, *middle, jnp.tanh, lambda x: x.reshape(len(x), -1), last])


class Named(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """Layers that have the names of our heads, and batch norm."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, images: Any) -> Any:
        seen = nn.Conv(4, (3, 3), strides=2, padding="VALID")(images)
        seen = nn.BatchNorm(use_running_average=True, momentum=0.5, name="head")(seen)
        return jnp.tanh(nn.Dense(6, name="heads")(seen.reshape(len(images), -1)))


class Attribute(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """A list of layers called ``heads``, whose parameters are ``heads_0`` and ``heads_1``."""

    def setup(self) -> None:
        self.heads = [nn.Dense(3) for _ in range(2)]

    def __call__(self, images: Any) -> Any:
        flat = images.reshape(len(images), -1)
        return jnp.tanh(jnp.concatenate([head(flat) for head in self.heads], axis=1))


class Offset(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """A variable of the user's own, that is no parameter."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, images: Any) -> Any:
        offset = self.variable("constants", "offset", lambda: jnp.full((2,), 0.5))
        return images - offset.value


class Noise(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """Noise that is drawn from a generator of its own."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, images: Any) -> Any:
        return images + jax.random.normal(self.make_rng("noise"), images.shape)


class WeightNormed(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """A layer whose weights have a scale of their own."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, images: Any) -> Any:
        return nn.WeightNorm(nn.Dense(3))(images.reshape(len(images), -1))


class Places(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """A row for each step of time."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, steps: Any) -> Any:
        return steps + self.param("places", nn.initializers.normal(), steps.shape[1:])


class Scanned(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """Two layers whose weights lie in one array each, one after the other."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, steps: Any) -> Any:
        scan = nn.scan(
            lambda layer, hidden, _: (jnp.tanh(layer(hidden)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scan(nn.Dense(16), steps, None)[0]


def of_rows(layer: Any) -> nn.Module:
    """Return a layer of the rows of images as steps of time."""
    return nn.Sequential([lambda x: x.reshape(len(x), 8, 16), layer, lambda x: x.reshape(len(x), -1)])


MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "batch norm, called heads and head": Named,
    "an attribute called heads": Attribute,
    "layer norm": lambda: plain(nn.LayerNorm(use_bias=False)),
    "group norm": lambda: plain(nn.GroupNorm(2, epsilon=1e-3)),
    "group norm by size": lambda: plain(nn.GroupNorm(None, group_size=1)),
    "norm without weights": lambda: plain(nn.LayerNorm(use_bias=False, use_scale=False)),
    "dilated": lambda: plain(nn.Conv(3, (2, 2), kernel_dilation=2, padding=[(1, 0), (0, 1)])),
    "first values": lambda: plain(nn.Conv(3, (1, 1), kernel_init=nn.initializers.ones, precision="highest")),
    "dropout": lambda: plain(nn.Dropout(0.2, deterministic=True)),
    "own variables": lambda: nn.Sequential([Offset(), plain()]),
}

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "checkpointed": (lambda: plain(nn.remat(nn.Conv)(3, (2, 2))), "runs inside of nn.jit, nn.remat or another"),
    "norm over images": (
        lambda: plain(nn.LayerNorm(reduction_axes=(1, 2, 3))),
        r"reduction_axes=\(1, 2, 3\) of the layer",
    ),
    "scales of images": (
        lambda: plain(nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3))),
        "the option reduction_axes=",
    ),
    "groups over channels": (
        lambda: plain(nn.GroupNorm(2, reduction_axes=(3,))),
        r"reduction_axes=\(3,\) of the layer",
    ),
    "a bias alone": (lambda: plain(nn.LayerNorm(use_scale=False)), "the option use_scale=False of the layer"),
    "batch norm by position": (lambda: plain(nn.BatchNorm(True, axis=1)), "the option axis=1 of the layer"),
    "batch norm without weights": (
        lambda: plain(nn.BatchNorm(True, use_bias=False, use_scale=False)),
        "the option use_bias=False of the layer",
    ),
    "groups of channels": (
        lambda: plain(nn.Conv(4, (3, 3), feature_group_count=2)),
        "the option feature_group_count=2",
    ),
    "a masked kernel": (lambda: plain(nn.Conv(3, (2, 2), mask=jnp.ones((2, 2, 4, 3)))), "the option mask="),
    "own products": (lambda: plain(nn.Dense(3, dot_general=jax.lax.dot_general)), "the option dot_general="),
    "half precision": (lambda: plain(nn.Dense(3, dtype=jnp.bfloat16)), "the option dtype="),
    "integer kernel size": (lambda: plain(nn.Conv(3, 3)), "taps do not know the layer of the parameter"),
    "dropout of channels": (lambda: plain(nn.Dropout(0.5, broadcast_dims=(1, 2))), r"broadcast_dims=\(1, 2\)"),
    "noise": (
        lambda: nn.Sequential([Noise(), plain()]),
        "the module must run with images and its variables alone; flax",
    ),
    "attention": (lambda: of_rows(nn.MultiHeadDotProductAttention(2)), "the parameter '\\S*key.bias'"),
    "recurrent": (lambda: of_rows(nn.RNN(nn.GRUCell(3))), "'layers_1.cell.ir' runs twice in one pass"),
    "positions": (lambda: of_rows(Places()), "do not know the layer of the parameter '\\S*places'"),
    "depthwise": (lambda: plain(nn.Conv(4, (2, 2), feature_group_count=4)), "the option feature_group_count=4"),
    "transposed convolution": (lambda: plain(nn.ConvTranspose(2, (3, 3))), "the parameter '\\S*bias'; on JAX"),
    "slopes": (lambda: plain(nn.PReLU()), "the parameter '\\S*negative_slope'"),
    "layers side by side": (
        lambda: of_rows(nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(3)),
        r"'layers_1.bias' has the shape \[2, 3\], as nn.scan and nn.vmap make it",
    ),
    "layers by a scan": (lambda: of_rows(Scanned()), "as nn.scan and nn.vmap make it of several layers"),
    "a norm of weights": (WeightNormed, "do not know the layer of the parameter '\\S*WeightNorm"),
}


def initial(module: nn.Module) -> Any:
    """Return variables other than those that a look at the module would draw."""
    return jax.jit(module.init)({"params": jax.random.key(1), "dropout": jax.random.key(2)}, IMAGES)


@pytest.mark.parametrize("name", MODULES)
def test_it_runs_as_it_is(name: str) -> None:
    module = MODULES[name]()
    variables = initial(module)
    backbone = FlaxBackbone.of(module, IMAGE, variables)
    ours = jax.jit(lambda weights: backbone(Pass(weights), IMAGES))(backbone.initial)
    np.testing.assert_allclose(ours, jax.jit(module.apply)(variables, IMAGES), rtol=1e-4, atol=1e-5)


def test_it_learns_from_the_weights_that_it_has() -> None:
    module = MODULES["batch norm, called heads and head"]()
    variables = initial(module)
    backbone = FlaxBackbone.of(module, IMAGE, variables)
    learner = JaxLearner(backbone, STREAM)
    after = check_it_learns_from(backbone.initial, learner, STREAM, TRAINING)
    changed = {"params": backbone.params(after), "batch_stats": backbone.batch_stats(after)}
    theirs = jax.jit(module.apply)({**variables, **changed}, IMAGES)
    np.testing.assert_allclose(backbone(Pass(after), IMAGES), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_layer_and_option(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(BecameError, match=message):
        FlaxBackbone.of(make(), IMAGE)


def test_outputs_that_depend_on_other_samples_are_refused_unless_a_switch_says_no() -> None:
    backbone = FlaxBackbone.of(nn.Sequential([lambda x: x - x.mean(0), lambda x: x.reshape(len(x), -1)]), IMAGE)
    with pytest.raises(
        BecameError, match=r"(?s)outputs of a sample alone.*check=False leaves.*outputs, computed twice"
    ):
        JaxLearner(backbone, STREAM)
    assert JaxLearner(backbone, STREAM, check=False).checked is None


def test_without_variables_weights_are_drawn_by_the_seed() -> None:
    backbone = FlaxBackbone.of(plain(), IMAGE)
    first, again, other = (JaxLearner(backbone, STREAM, seed=seed).parameters() for seed in (0, 0, 1))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    assert any(not np.array_equal(value, other[name]) for name, value in first.items())
