"""A catalogue of users' Keras models: each runs as it is and learns, or is refused by layer and option.

To add a model, add a row to ``MODELS`` or to ``REFUSED``. Images are [N, 8, 8, 2].
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from adapters.tensorflow.keras_model import KerasBackbone
from adapters.tensorflow.layers import Pass
from adapters.tensorflow.learner import TensorFlowLearner
from became_core import BecameError
from became_core.continual import Annealed, Training
from became_core.curvature import diagonal_fisher, inputs_of_uses, kronecker_factors
from tests.own_models import check_it_learns_from
from tests.streams import prototype_stream

IMAGE = (2, 8, 8)
STREAM = prototype_stream(tasks=2, classes_per_task=2, per_class=8, channels=2, side=8)
TRAINING = Training(Annealed(0.05, 1), Annealed(0.05, 1), batch_size=11)  # a last chunk of one sample
IMAGES = tf.random.stateless_normal((5, 8, 8, 2), (0, 0))
pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`, which is deprecated"),
    pytest.mark.filterwarnings("ignore:Layer 'flatten:UserWarning"),
    # Taps of single samples are slower, and some models have no matrix to project; the learner says so.
    pytest.mark.filterwarnings("ignore:\\d+ % of the shared weights stand still:UserWarning"),
    pytest.mark.filterwarnings("ignore:taps do not know:UserWarning"),
]


def plain(*middle: Any, name: str = "last") -> keras.Model:
    """Return two layers with others between them."""
    first = [keras.Input((8, 8, 2)), layers.Conv2D(4, 3, strides=2, name="first")]
    return keras.Sequential([*first, *middle, layers.Flatten(), layers.Dense(6, activation="tanh", name=name)])


def with_statistics(model: keras.Model) -> keras.Model:
    """Return a model whose batch norms have statistics as pretrained ones have them."""
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(layer.moving_mean + 0.5)
            layer.moving_variance.assign(layer.moving_variance * 2)
    return model


def frozen(model: keras.Model, *names: str) -> keras.Model:
    for name in names:
        model.get_layer(name).trainable = False
    return model


def frozen_in_part(model: keras.Model) -> keras.Model:
    model.get_layer("last").kernel.trainable = False
    return model


def called(model: keras.Model, name: str = "last") -> keras.Model:
    layer = model.get_layer(name)
    own = layer.call
    layer.call = lambda inputs, **options: 0.5 * own(inputs, **options)
    return model


def masked() -> keras.Model:
    images = keras.Input((8, 8, 2))
    steps = layers.Masking()(layers.Reshape((8, 16))(images))
    return keras.Model(images, layers.Flatten()(layers.BatchNormalization(name="normalised")(steps)))


def twice() -> keras.Model:
    images, layer = keras.Input((8, 8, 2)), layers.Dense(128, name="again")
    return keras.Model(images, layer(layer(layers.Flatten()(images))))


def of_rows(*rest: Any) -> keras.Model:
    """Return a model of the rows of images as steps of time."""
    return keras.Sequential([keras.Input((8, 8, 2)), layers.Reshape((8, 16)), *rest])


def attending() -> keras.Model:
    images = keras.Input((8, 8, 2))
    steps = layers.Reshape((8, 16))(images)
    attended = layers.MultiHeadAttention(2, 4, dropout=0.1, name="attention")(steps, steps)
    return keras.Model(images, layers.GlobalAveragePooling1D()(attended))


class Places(keras.layers.Layer):  # type: ignore[misc] # Keras is taken as untyped
    """A row for each step of time."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.places = self.add_weight(shape=shape[1:], name="places")

    def call(self, steps: Any) -> Any:
        return keras.ops.tanh(steps + self.places)


MODELS: dict[str, Callable[[], keras.Model]] = {
    "plain": plain,
    "called heads": lambda: plain(name="heads"),
    "called head": lambda: plain(layers.Conv2D(3, 1, name="heads.0"), name="head"),
    "frozen layer": lambda: frozen(plain(), "first"),
    "frozen norm": lambda: frozen(with_statistics(plain(layers.BatchNormalization(name="norm"))), "norm"),
    "frozen odd layer": lambda: frozen(plain(layers.Conv2DTranspose(2, 3, name="up")), "up"),
    "frozen throughout": lambda: frozen(plain(), "first", "last"),
    "batch norm": lambda: with_statistics(plain(layers.BatchNormalization(momentum=0.5))),
    "batch norm by its last axis": lambda: plain(layers.BatchNormalization(axis=3, epsilon=1e-2)),
    "layer norm": lambda: plain(layers.LayerNormalization(center=False)),
    "dilated": lambda: plain(layers.Conv2D(3, 2, dilation_rate=2, padding="same", activation="relu")),
    "first values": lambda: plain(layers.Conv2D(3, 1, kernel_initializer="ones")),
    "dropout": lambda: plain(layers.Dropout(0.2, seed=3)),
    # Their layers run as they are.
    "a replaced call": lambda: called(plain()),
    "a layer that runs twice": twice,
    "a part frozen": lambda: frozen_in_part(plain()),
    "root mean squares": lambda: plain(layers.LayerNormalization(rms_scaling=True)),
    "norm over images": lambda: plain(layers.LayerNormalization(axis=(1, 2, 3))),
    "groups of channels": lambda: plain(layers.Conv2D(4, 3, groups=2)),
    "depthwise": lambda: plain(layers.DepthwiseConv2D(3)),
    "separable": lambda: plain(layers.SeparableConv2D(4, 3)),
    "transposed convolution": lambda: plain(layers.Conv2DTranspose(2, 3, name="up")),
    "group norm": lambda: plain(layers.GroupNormalization(2)),
    "slopes": lambda: plain(layers.PReLU()),
    "an einsum": lambda: plain(layers.EinsumDense("abcd,de->abce", output_shape=(3, 3, 5))),
    "by time": lambda: of_rows(layers.TimeDistributed(layers.Dense(3)), layers.Flatten()),
    "attention": attending,
    "positions": lambda: of_rows(Places(), layers.GlobalAveragePooling1D()),
    "GRU": lambda: of_rows(layers.GRU(4)),
    "LSTM": lambda: of_rows(layers.LSTM(4)),
    "both ways in time": lambda: of_rows(layers.Bidirectional(layers.SimpleRNN(3))),
    "a layer that is a model": lambda: plain(keras.Sequential([keras.Input((3, 3, 4)), layers.Conv2DTranspose(3, 1)])),
}

REFUSED: dict[str, tuple[Callable[[], keras.Model], str]] = {
    "batch norm by position": (lambda: plain(layers.BatchNormalization(axis=1)), "the option axis=1 of the layer"),
    "batch norm without scales": (lambda: plain(layers.BatchNormalization(scale=False)), "the option scale=False of"),
    "regulariser": (lambda: plain(layers.Conv2D(3, 1, kernel_regularizer="l2")), "adds a loss of its own"),
    "regulariser of outputs": (lambda: plain(layers.ActivityRegularization(l2=0.1)), "adds a loss of its own"),
    "constraint": (lambda: plain(layers.Conv2D(3, 1, bias_constraint="non_neg")), "has a constraint"),
    "half precision": (lambda: plain(layers.Conv2D(3, 1, dtype="mixed_bfloat16")), "computes in bfloat16"),
    "dropout of channels": (lambda: plain(layers.Dropout(0.5, noise_shape=(None, 1, 1, 4))), "the option noise_shape="),
    "spatial dropout": (lambda: plain(layers.SpatialDropout2D(0.5, name="spatial")), "'spatial' draws random numbers"),
    "noise": (lambda: plain(layers.GaussianNoise(0.5, name="noise")), "the layer 'noise' draws random numbers"),
    "augmentation": (lambda: plain(layers.RandomFlip(name="flip")), "the layer 'flip' draws random numbers"),
    "a batch norm with a replaced call": (
        lambda: called(plain(layers.BatchNormalization(name="norm")), "norm"),
        "the layer 'norm' changes its variable '\\S*norm/moving_mean' in training",
    ),
    "a mask": (masked, "the mask that the layer 'normalised' is given"),
    "spectral norm": (
        lambda: plain(layers.SpectralNormalization(layers.Conv2D(3, 1))),
        "the layer 'spectral_normalization\\w*' changes its variable '.*' in training",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_runs_as_it_is(name: str) -> None:
    model = MODELS[name]()
    before, own = [variable.numpy() for variable in model.variables], model(IMAGES, training=False)
    backbone = KerasBackbone.of(model, IMAGE)
    np.testing.assert_allclose(backbone(Pass(backbone.initial), IMAGES), own, rtol=1e-4, atol=1e-5)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize(
    "name", ["called head", "frozen norm", "batch norm", "a replaced call", "a part frozen", "attention", "GRU"]
)
def test_it_learns_from_the_weights_that_it_has(name: str) -> None:
    model = MODELS[name]()
    frozen_before = {variable.path: variable.numpy() for variable in model.non_trainable_variables}
    backbone = KerasBackbone.of(model, IMAGE)
    learner = TensorFlowLearner(backbone, STREAM)
    after = check_it_learns_from(backbone.initial, learner, STREAM, TRAINING)
    for variable in model.non_trainable_variables:
        np.testing.assert_array_equal(variable.numpy(), frozen_before[variable.path])
    if name == "a replaced call":
        assert "call" in vars(model.get_layer("last"))
    backbone.assign(after)
    np.testing.assert_allclose(backbone(Pass(after), IMAGES), model(IMAGES, training=False), rtol=1e-4, atol=1e-5)


# TensorFlow has no gradient of the first on a CPU, and compiles those of the second for each shape.
NOT_IN_DOUBLE_PRECISION = {"dilated", "groups of channels"}


@pytest.fixture
def _in_double_precision() -> Iterator[None]:
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.usefixtures("_in_double_precision")
@pytest.mark.parametrize("name", sorted(set(MODELS) - NOT_IN_DOUBLE_PRECISION))
def test_its_fisher_information_is_that_of_a_loop_over_the_samples(name: str) -> None:
    backbone = KerasBackbone.of(MODELS[name](), IMAGE)
    learner: Any = TensorFlowLearner(backbone, STREAM, dtype="float64")
    rows = STREAM.tasks[0].train[:3]
    taps = learner.taps(0, rows, 2, "empirical", np.random.default_rng(0))  # a last batch of one
    ours = diagonal_fisher(taps, learner.parameters(), "empirical", samples=3)
    everything = learner.naming.for_task(learner.parameters(), 0)
    theta = {own: value for own, value in everything.items() if own not in learner.running_statistics}
    expected = dict.fromkeys(theta, 0.0)
    for row in rows:
        with tf.GradientTape() as tape:
            tape.watch(theta)
            images = learner._data.normalised(np.array([row]))
            logits = learner.network.logits(Pass(everything | theta), images)
            loss = learner.likelihood.mean_loss(logits, learner.targets(np.array([row])))
        for entry, gradient in tape.gradient(loss, theta, unconnected_gradients="zero").items():
            expected[entry] += tf.convert_to_tensor(gradient) ** 2 / len(rows)
    for entry, value in expected.items():
        np.testing.assert_allclose(
            ours[f"{learner.naming.name(0)}.weight" if entry == f"{learner.naming.one}.weight" else entry],
            value,
            rtol=1e-9,
            atol=1e-12,
            err_msg=entry,
        )


@pytest.mark.parametrize("name", ["a replaced call", "attention"])
def test_passes_of_one_batch_share_the_inputs_of_layers_that_run_as_they_are(name: str) -> None:
    """So Kronecker factors count a batch's inputs once, as those of a batch's only pass are counted."""
    learner: Any = TensorFlowLearner(KerasBackbone.of(MODELS[name](), IMAGE), STREAM)
    rows = STREAM.tasks[0].train[:4]
    every, once = (list(learner.taps(0, rows, 4, mode, np.random.default_rng(0))) for mode in ("true", "empirical"))
    assert (len(every), len(once)) == (2, 1)
    shared = inputs_of_uses(every[0])
    assert any(each.own_name and each.is_plain_matrix for each in every[0].values()) or name != "a replaced call"
    for layer, inputs in inputs_of_uses(every[1]).items():
        assert all(first is second for first, second in zip(inputs, shared[layer], strict=True)), layer
    found, expected = (kronecker_factors(batches, samples=4).factors for batches in (every, once))
    assert found.keys() == expected.keys()
    for weight, (a, _) in found.items():
        np.testing.assert_allclose(a, expected[weight][0], rtol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_layer_and_option(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    before = model(IMAGES, training=False)
    with pytest.raises(BecameError, match=message):
        KerasBackbone.of(model, IMAGE)
    np.testing.assert_array_equal(model(IMAGES, training=False), before)


def test_outputs_that_depend_on_other_samples_are_refused_unless_a_switch_says_no() -> None:
    backbone = KerasBackbone.of(plain(layers.Lambda(lambda x: x - tf.reduce_mean(x, 0))), IMAGE)
    with pytest.raises(
        BecameError, match=r"(?s)outputs of a sample alone.*check=False leaves.*outputs, computed twice"
    ):
        TensorFlowLearner(backbone, STREAM)
    assert TensorFlowLearner(backbone, STREAM, check=False).checked is None


def test_images_are_scaled_once() -> None:
    backbone = KerasBackbone.of(plain(layers.Rescaling(1 / 255, name="scaled")), IMAGE)
    with pytest.raises(
        BecameError, match=r"scales its images itself, in the layer 'scaled', and the data set prototypes"
    ):
        TensorFlowLearner(backbone, STREAM)
    as_they_are = replace(STREAM.dataset, mean=(0.0, 0.0), std=(1 / 255, 1 / 255))
    learner = TensorFlowLearner(backbone, replace(STREAM, dataset=as_they_are))
    rows = np.arange(4)
    images = np.moveaxis(STREAM.dataset.images[rows], 1, -1).astype(np.float32)
    own = backbone.model(images, training=False).numpy() @ np.asarray(learner.parameters()["heads.0.weight"]).T
    np.testing.assert_allclose(learner.logits(rows, 4)[:, 0], own, rtol=1e-4, atol=1e-5)
