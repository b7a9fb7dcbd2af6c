"""Merges of Keras models by ``Continual``, in double precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from adapters.tensorflow import Continual
from adapters.tensorflow.batches import Reader
from adapters.tensorflow.data_loss import DataLoss, KerasLoss
from became_core import BecameError, Secant
from tests.augmented import Augmented
from tests.tensorflow.own_loop import CLASSES, L, TwoHeads, compiled, fit, new_data, perceptron, row

pytestmark = pytest.mark.usefixtures("in_double_precision")


def _ensemble(end: str) -> keras.Model:
    inputs = keras.Input((6,))
    return keras.Model(inputs, L.Average()([L.Dense(CLASSES, end)(inputs), L.Dense(CLASSES, end)(inputs)]))


def _by_hand() -> keras.Model:
    inputs = keras.Input((6,))
    powers = keras.ops.exp(L.Dense(CLASSES)(inputs))
    return keras.Model(inputs, powers / keras.ops.sum(powers, -1, keepdims=True))


def test_probabilities_that_no_last_softmax_made_are_no_logits() -> None:
    targets = [(x, np.eye(CLASSES)[y]) for x, y in new_data(1, 1)]
    for model, likelihood, data in (
        (_ensemble("softmax"), "categorical", new_data(1, 1)),
        (_by_hand(), "categorical", new_data(1, 1)),
        (_ensemble("sigmoid"), "bernoulli", targets),
    ):
        with pytest.raises(BecameError, match=r"outputs are probabilities, and a \w+ is not its last operation"):
            Continual(model, likelihood).remember(data)
    zeros = keras.Sequential([keras.Input((6,)), L.Dense(4, "sigmoid"), L.Dense(CLASSES, kernel_initializer="zeros")])
    for likelihood, data in (("categorical", new_data(1, 1)), ("bernoulli", targets)):
        Continual(zeros, likelihood, check=False).remember(data)


def test_what_is_not_finite_is_named_and_not_merged() -> None:
    model, data = perceptron(), new_data(1, 1)
    learning = Continual(model)
    learning.remember(data)
    with learning.stable(keras.optimizers.SGD(0.1)):
        pass
    weight = model.trainable_variables[0]
    weight.assign(weight + 0.1)
    plastic = weight.numpy()
    with pytest.raises(BecameError, match=r"the Fisher information of 'first\.weight' is not finite; look for NaN"):
        learning.merge([(inputs * np.nan, targets) for inputs, targets in data])
    np.testing.assert_array_equal(weight.numpy(), plastic)
    weight.assign(weight * np.inf)
    with pytest.raises(BecameError, match=r"'first\.weight' is not finite in the stable or in the plastic model"):
        learning.merge(data)


def test_a_batch_that_fails_tells_nothing_of_the_derivatives_that_there_are() -> None:
    model, ((inputs, targets),) = perceptron(), new_data(1, 1)
    learning = Continual(model, estimator=Secant(), check=False)
    learning.remember([(inputs, targets)])
    with learning.stable(keras.optimizers.SGD(0.1)):
        pass
    model.trainable_variables[0].assign_add(model.trainable_variables[0] * 0.1)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6"):
        learning.merge([(inputs, targets), (inputs[:, :2], targets)])
    assert learning.merge([(inputs, targets)]).curvature == "forward mode"


def test_running_statistics_are_estimated_again_on_request() -> None:
    frozen = L.BatchNormalization(trainable=False)
    model = row((4, 4, 2), L.Conv2D(3, 2), L.BatchNormalization(momentum=0.5), L.ReLU(), frozen, L.Dropout(0.5))
    norm, optimizer = model.layers[1], keras.optimizers.SGD(0.1)
    data = [(np.random.default_rng(n).normal(size=(5, 4, 4, 2)), np.arange(5) % CLASSES) for n in range(3)]
    learning = Continual(model)
    learning.remember(data[:1])
    with learning.stable(optimizer):
        pass
    with learning.plastic():
        norm.gamma.assign(norm.gamma * 2.0)
    before = [value.numpy() for value in model.variables]
    with pytest.raises(BecameError, match="a batch is a str"):
        learning.merge(data, statistics=[data[0], "no batch"])
    assert all(np.array_equal(value, number) for value, number in zip(model.variables, before, strict=True))
    batches = iter(data)  # one iterator serves both
    learning.merge(batches, statistics=batches)
    seen = [model.layers[0](x).numpy() for x, _ in data]
    np.testing.assert_allclose(norm.moving_mean, np.mean([x.mean((0, 1, 2)) for x in seen], axis=0), rtol=1e-10)
    np.testing.assert_allclose(norm.moving_variance, np.mean([x.var((0, 1, 2)) for x in seen], axis=0), rtol=1e-10)
    assert np.array_equal(frozen.moving_mean, np.zeros(3))
    assert norm.momentum == 0.5
    assert "call" not in vars(norm)
    assert not tf.config.functions_run_eagerly()


def test_second_moments_of_an_optimizer_stand_for_old_data_with_a_warning() -> None:
    model = perceptron()
    model.compile(keras.optimizers.Adam(0.01, beta_2=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for x, y in new_data(1, 3):
        model.train_on_batch(x, y)
    learning = Continual(model)
    with pytest.warns(UserWarning, match="unfit after clipping"):
        learning.remember(optimizer=model.optimizer, samples=32)
    assert learning.posterior is not None
    (moment,) = (v for v in model.optimizer.variables if v.name.endswith("kernel_velocity") and v.shape == (6, 8))
    weight = next(name for name, p in learning._data.trained.items() if p.variable is model.layers[0].kernel)
    expected = moment.numpy().T / (1 - 0.9**3) * 32
    np.testing.assert_allclose(learning.posterior.precision.diagonal()[weight], expected, rtol=1e-6)
    with pytest.raises(BecameError, match="needs samples="):
        learning.remember(optimizer=model.optimizer)
    with pytest.raises(BecameError, match="no second moments"):
        learning.remember(optimizer=keras.optimizers.SGD(), samples=1)
    with pytest.raises(BecameError, match="either batches or an optimizer"):
        learning.remember()


def test_what_old_data_hold_by_curvature_stays_penalised_after_new_data_were_merged_or_observed() -> None:
    """Only data that are to be remembered say what can be protected: the old data's spaces are not known."""
    model = perceptron()
    model.compile(keras.optimizers.Adam(0.01, beta_2=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model, new_data(1, 3), 1)
    learning, new = Continual(model), new_data(2, 2)
    with pytest.warns(UserWarning, match="unfit after clipping"):
        learning.remember(optimizer=model.optimizer, samples=4)
    learning.observe(new[0])
    with learning.stable():
        fit(model, new, 1)
    with learning.plastic():
        fit(model, new, 1)
    learning.merge(new)
    learning.remember(new)
    assert {covered.treatment for covered in learning.coverage.parameters} == {"penalised"}


@pytest.mark.parametrize("ends", [("softmax", None), (None, "softmax"), ("softmax", "softmax")])
def test_each_head_is_taken_back_to_logits_as_it_ends_itself(ends: tuple[str | None, str | None]) -> None:
    model, old, new = TwoHeads(*ends), new_data(1, 1), new_data(2, 1)
    for model.task in (1, 0):
        model(old[0][0])
    learning = Continual(model, check=False)
    learning.remember(old)
    model.heads[0].trainable, model.task = False, 1
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=ends[1] is None))
    with learning.stable():
        fit(model, new, 1)
    with learning.plastic():
        fit(model, new, 1)
    expected = float(model.loss(new[0][1], model(new[0][0])))
    report = learning.merge(new, trace=2)
    np.testing.assert_allclose(report.trace[1][1], expected, rtol=1e-6)
    learning.remember(new)
    np.testing.assert_allclose(learning._data.mean(new), float(model.loss(new[0][1], model(new[0][0]))), rtol=1e-6)


def test_a_head_that_is_built_in_stable_training_is_merged() -> None:
    model, old, new = TwoHeads(), new_data(1, 1), new_data(2, 1)
    model(old[0][0])
    learning = Continual(model, check=False)
    learning.remember(old)
    model.heads[0].trainable, model.task = False, 1
    compiled(model)
    with learning.stable():
        fit(model, new, 1)
    stable = model.heads[1].kernel.numpy()
    with learning.plastic():
        fit(model, new, 1)
    plastic, alpha = model.heads[1].kernel.numpy(), learning.merge(new).alpha
    assert 0 <= alpha <= 1
    np.testing.assert_allclose(model.heads[1].kernel, stable + alpha * (plastic - stable), rtol=1e-6)


def test_gradients_of_a_loss_of_ones_own_are_as_exact_in_float16_as_a_single_samples() -> None:
    outputs = tf.constant(np.linspace(1e-4, 2e-4, 512, dtype=np.float16)[:, None])
    gradient = KerasLoss(lambda z, y: tf.reduce_mean((z - y) ** 2) / 2).gradient(outputs, 0 * outputs)
    np.testing.assert_array_equal(gradient, outputs)


def test_slopes_that_are_subtracted_are_of_the_same_samples() -> None:
    """Slopes of two passes over a loader that augments at random differ by more than a small step tells."""
    loader, loss = Augmented(new_data(2, 8)), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    data = DataLoss(perceptron(), loss, Reader(None, None), checks=False, shows=False)
    theta, rng = data.weights(), np.random.default_rng(0)
    directions = [{name: rng.normal(size=value.shape) for name, value in theta.items()} for _ in range(2)]
    found, _ = data.along(loader, theta, directions)
    assert loader.passes == 1
    expected, _ = data.along(loader.given, theta, directions)
    np.testing.assert_allclose(found.slope, expected.slope, rtol=1e-12)
    np.testing.assert_allclose(found.curvature, expected.curvature, rtol=1e-12)
    bent, _ = data.along(loader.given, theta, directions[::-1])
    np.testing.assert_allclose(bent.curvature, found.curvature.numpy()[::-1, ::-1], rtol=1e-6)
