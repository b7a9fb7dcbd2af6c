"""Models, optimizers and data that ``Continual`` refuses in a sentence, around Keras models."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from adapters.tensorflow import Continual
from became_core import BecameError
from became_core.projection import GPM, TRGP, InfLoRA, OLoRA
from tests.tensorflow.own_loop import CLASSES, L, compiled, fit, new_data, perceptron

pytestmark = pytest.mark.usefixtures("in_double_precision")


def test_there_is_a_warning_if_a_layer_took_the_place_of_one_that_was_remembered() -> None:
    model, old, new = perceptron(), new_data(1, 1), new_data(2, 2)
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen", check=False)
    learning.remember(old)
    before, layer = model(old[0][0]).numpy(), model.layers[-1]
    model.pop()
    model.add(other := L.Dense(CLASSES, name=layer.name))
    other.set_weights([value.copy() for value in layer.get_weights()])
    with learning.stable(compiled(model).optimizer):  # other variables, and the same values
        fit(model, new, 1)
    np.testing.assert_allclose(model(old[0][0]), before, rtol=0, atol=1e-12)
    assert not np.array_equal(other.kernel, layer.kernel)
    model.pop()
    model.add(L.Dense(CLASSES, name=layer.name))
    message = rf"'{layer.name}\.weight' is another parameter than when old data were remembered"
    with pytest.warns(UserWarning, match=message) as seen, learning.stable():
        pass
    assert seen[0].filename == __file__
    learning.remember(old)
    with learning.stable():
        pass


def test_a_layer_that_keras_has_given_another_number_is_refused() -> None:
    model = keras.Sequential([keras.Input((6,)), *(L.Dense(6) for _ in range(3))])
    learning = Continual(model, check=False)
    learning.remember(new_data(1, 1))
    kept = model.layers[1:]
    for _ in model.layers[:]:
        model.pop()
    for layer in (L.Dense(6), *kept):
        model.add(layer)
    message = "what was 'dense_1.weight' when old data were remembered is 'dense.weight' now"
    with pytest.raises(BecameError, match=message), learning.stable(keras.optimizers.SGD(0.1)):
        pass
    with pytest.raises(BecameError, match=message):
        learning.remember(new_data(1, 1))


def test_an_optimizer_of_another_model_is_refused() -> None:
    learning = Continual(perceptron(), check=False)
    learning.remember(new_data(1, 1))
    other = compiled(perceptron())
    with (
        pytest.raises(BecameError, match="the optimizer steps no variable of the model"),
        learning.stable(other.optimizer),
    ):
        fit(other, new_data(2, 1), 1)


def test_a_layer_that_was_frozen_when_old_data_were_remembered_is_refused() -> None:
    model = compiled(perceptron())
    model.get_layer("first").trainable = False
    learning = Continual(model, check=False)
    learning.remember(new_data(1, 1))
    model.get_layer("first").trainable = True
    with (
        pytest.raises(BecameError, match=r"'first\.weight' is trained now, and was not when old data"),
        learning.stable(),
    ):
        pass


def test_data_that_use_a_protected_matrix_otherwise_are_refused() -> None:
    """No projection of steps stands for a use as anything else, so the matrix may not go on to be called protected."""
    model, is_part = keras.Sequential([keras.Input((6,)), L.Dense(CLASSES, use_bias=False, name="only")]), [False]
    kernel = model.get_layer("only").kernel

    def apply(model: Any, batch: Any) -> Any:
        return model(batch[0]) + (tf.square(keras.ops.convert_to_tensor(kernel)[0]) if is_part[0] else 0)

    learning = Continual(model, apply=apply, targets=lambda batch: batch[1], check=False)
    learning.remember(new_data(1, 1))
    is_part[0] = True
    with pytest.raises(BecameError, match=r"'only\.weight' is protected as a matrix that is multiplied as a whole"):
        learning.remember(new_data(2, 1))


def test_what_cannot_be_done_is_said_in_a_sentence() -> None:
    model = perceptron()
    learning = Continual(model)
    with pytest.raises(BecameError, match="stable training needs a memory"), learning.stable():
        pass
    with pytest.raises(BecameError, match="there are no samples"):
        learning.remember([])
    with pytest.raises(BecameError, match="has no variables yet"):
        Continual(keras.Sequential([L.Dense(2)]))
    with pytest.raises(BecameError, match="needs a label for each row of logits"):
        learning.remember([(np.zeros((4, 6)), np.zeros((4, 2), np.int64))])
    for projector in (TRGP(), OLoRA(), InfLoRA()):
        with pytest.raises(BecameError, match=f"{type(projector).__name__} does more than to project steps"):
            Continual(perceptron(), projector=projector)
    with pytest.raises(BecameError, match="the loss is a sum over samples"):
        Continual(model, keras.losses.SparseCategoricalCrossentropy(reduction="sum"))
    with pytest.raises(BecameError, match="a function of Keras has the targets first"):
        Continual(model, keras.losses.sparse_categorical_crossentropy).remember(new_data(1, 1))
    with pytest.raises(BecameError, match="takes batches of 4 samples alone, and single samples are measured"):
        Continual(keras.Sequential([keras.Input((6,), batch_size=4), L.Dense(CLASSES)]))
    with pytest.raises(BecameError, match="a batch has three parts"):
        learning.remember([(np.zeros((4, 6)), np.zeros(4), np.ones(4))])
    with pytest.raises(BecameError, match="no axis of samples; give batches, of a"):
        learning.remember(tf.data.Dataset.from_tensor_slices(new_data(1, 1)[0]))
    own: dict[str, Any] = {"apply": lambda model, batch: model(batch[0]), "targets": lambda batch: batch[1]}
    for reader in ({}, own):
        for batches in (new_data(1, 1, 0), [*new_data(1, 1), *new_data(2, 1, 0)]):
            with pytest.raises(BecameError, match="a batch has no sample; leave empty batches out"):
                Continual(model, **reader).remember(batches)
    learning.remember(new_data(1, 1))
    with pytest.raises(BecameError, match="the model is not compiled"), learning.stable():
        pass
    with pytest.raises(BecameError, match="plastic training comes after stable"), learning.plastic():
        pass
    with pytest.raises(BecameError, match="a merge is of two models"):
        learning.merge(new_data(1, 1))


class Random(keras.Model):  # type: ignore[misc] # Keras is taken as untyped
    """A model that has the state of a random layer before it is built."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.drop, self.last = L.Dropout(0.5), L.Dense(CLASSES)

    def call(self, inputs: Any) -> Any:
        """Return logits."""
        return self.last(self.drop(inputs))


def test_a_model_with_random_layers_that_is_not_built_is_refused_as_such() -> None:
    with pytest.raises(BecameError, match="has no variables yet; call it on a batch"):
        Continual(Random())


def test_data_without_an_end_are_refused() -> None:
    inputs, targets = new_data(1, 1)[0]
    data = tf.data.Dataset.from_tensors((inputs, targets))
    learning = Continual(perceptron(), check=False)
    with pytest.raises(BecameError, match=r"the data set has no end, as after repeat\(\)"):
        learning.remember(data.repeat())
    learning.remember(data.repeat(2))


def test_a_constraint_that_a_correction_would_break_is_refused() -> None:
    model = keras.Sequential(
        [keras.Input((5,)), L.Dense(4, kernel_constraint="non_neg", name="first"), L.Dense(CLASSES)]
    )
    compiled(model)
    learning = Continual(model)
    learning.remember([(np.ones((2, 5)), np.array([0, 1]))])
    with pytest.raises(BecameError, match=r"'first\.weight' has a constraint, which a projected"), learning.stable():
        pass


def test_batch_norms_that_follow_the_new_data_are_named() -> None:
    """No weight needs to move for old outputs to change with them; if they are not trained they stay."""
    norm = L.BatchNormalization()
    model = keras.Sequential([keras.Input((8,)), L.Dense(8), norm, L.ReLU(), L.Dense(CLASSES)])
    inputs, labels = np.random.default_rng(0).normal(size=(16, 8)), np.arange(16) % CLASSES
    learning = Continual(model, uncovered="frozen", check=False)
    learning.remember([(inputs, labels)])
    compiled(model)
    with pytest.warns(UserWarning, match=f"statistics of '{norm.name}' have changed") as seen:  # noqa: SIM117
        with learning.stable():
            model(inputs + 1, training=True)
    assert seen[0].filename == __file__
    norm.trainable = False
    learning.remember([(inputs, labels)])
    with learning.stable():
        model(inputs + 1, training=True)
