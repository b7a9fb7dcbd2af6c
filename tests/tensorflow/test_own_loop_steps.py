"""Steps of Keras models in stable training, under ``fit`` and in own loops: what is projected and noticed."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from adapters.tensorflow import Continual
from became_core import BecameError
from became_core.projection import GPM
from tests.tensorflow.own_loop import CHANGED, CLASSES, L, TwoHeads, compiled, fit, new_data, perceptron, row

pytestmark = pytest.mark.usefixtures("in_double_precision")


@pytest.mark.parametrize(("optimizer", "eager"), [("SGD", False), ("AdamW", False), ("AdamW", True)])
def test_old_outputs_stand_still_in_stable_training_under_fit(optimizer: str, eager: bool) -> None:
    model, old, new = perceptron("softmax"), new_data(1, 1, 2), new_data(2, 3)
    makers: dict[str, Any] = {
        "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        "AdamW": lambda: keras.optimizers.AdamW(0.05),
    }
    stepper = makers[optimizer]()
    model.compile(stepper, "sparse_categorical_crossentropy", run_eagerly=eager)
    fit(model, new, 1)
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen", check=False)
    learning.remember(old)
    before, names, kernel = model(old[0][0]).numpy(), set(vars(stepper)), model.get_layer("first").kernel.numpy()
    with learning.stable():
        fit(model, new, 2)
    np.testing.assert_allclose(model(old[0][0]), before, rtol=0, atol=1e-9)
    assert not np.array_equal(model.get_layer("first").kernel, kernel)
    assert set(vars(stepper)) == names
    with learning.plastic():
        fit(model, new, 2)
    assert np.abs(model(old[0][0]).numpy() - before).max() > 1e-4
    report = learning.merge(new, trace=2)
    assert 0 <= report.alpha <= 1
    assert report.curvature == "the diagonal Fisher information"


@pytest.mark.parametrize("is_scaled", [False, True])
def test_steps_that_xla_compiles_are_projected_by_an_optimizer_that_has_taken_none(is_scaled: bool) -> None:
    """Keras chooses XLA by itself on a GPU; it makes no variables, such as an optimizer's first step needs."""
    model, old = perceptron(), new_data(1, 1, 2)
    optimizer: Any = keras.optimizers.AdamW(0.05)
    if is_scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    compiled(model, optimizer).jit_compile = True
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen", check=False)
    learning.remember(old)
    before, kernel = model(old[0][0]).numpy(), model.get_layer("first").kernel.numpy()
    with learning.stable():
        fit(model, new_data(2, 2), 2)
    np.testing.assert_allclose(model(old[0][0]), before, rtol=0, atol=1e-9)
    assert not np.array_equal(model.get_layer("first").kernel, kernel)


def test_a_loop_of_ones_own_is_projected_and_a_step_compiled_before_is_noticed() -> None:
    model, old, new = perceptron(), new_data(1, 1, 2), new_data(2, 2)
    learning, optimizer = Continual(model, projector=GPM(1.0), uncovered="frozen"), keras.optimizers.SGD(0.5)
    learning.remember(old)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(inputs: Any, targets: Any) -> None:
        with tf.GradientTape() as tape:
            value = loss(targets, model(inputs, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    before = model(old[0][0]).numpy()
    with learning.stable(optimizer):
        step(*new[0])
    np.testing.assert_allclose(model(old[0][0]), before, rtol=0, atol=1e-12)
    traced = tf.function(step)
    traced(*new[0])
    with pytest.raises(BecameError, match=r"had compiled before stable training began"), learning.stable(optimizer):
        traced(*new[0])
    with pytest.raises(ZeroDivisionError), learning.stable(optimizer):
        raise ZeroDivisionError
    assert "apply" not in vars(optimizer)


@pytest.mark.parametrize("unseen_first", [False, True])
def test_a_step_compiled_before_is_noticed_among_others_that_are_seen(unseen_first: bool) -> None:
    """As when the last batch of an epoch has another shape, for which the step is compiled anew."""
    model, new = perceptron(), new_data(2, 1)[0]
    learning, optimizer = Continual(model, check=False), keras.optimizers.SGD(0.1)
    learning.remember(new_data(1, 1))

    def step(inputs: Any, targets: Any) -> None:
        with tf.GradientTape() as tape:
            value = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(targets, model(inputs, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    traced = tf.function(step)

    def steps(*sizes: int) -> None:
        for size in sizes:
            traced(*(tf.constant(part[:size]) for part in new))

    steps(4)
    with pytest.raises(BecameError, match="had compiled before stable training began"), learning.stable(optimizer):
        steps(*((4, 2) if unseen_first else (2, 4)))
    with learning.stable(optimizer):
        steps(3)


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")  # as it does where its length is unknown
@pytest.mark.parametrize("kind", ["plain", "several at a time", "eager", "accumulating", "scaled"])
def test_the_ends_of_data_and_skipped_steps_are_not_taken_for_steps_that_were_not_seen(kind: str) -> None:
    """Where Keras does not know how long the data are, it begins a step that gets no batch at their end."""
    model, new = perceptron(), new_data(2, 5)
    optimizer: Any = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2 if kind == "accumulating" else None)
    if kind == "scaled":  # its first step is skipped
        optimizer, new[0] = keras.optimizers.LossScaleOptimizer(optimizer), (new[0][0] * np.inf, new[0][1])
    compiled(model, optimizer).run_eagerly = kind == "eager"
    model.steps_per_execution = 2 if kind == "several at a time" else 1
    learning = Continual(model, check=False)
    learning.remember(new_data(1, 1))
    signature = tf.TensorSpec((None, 6), tf.float64), tf.TensorSpec((None,), tf.int64)
    with learning.stable():
        for _ in range(2):
            data = tf.data.Dataset.from_generator(lambda: iter(new), output_signature=signature)
            model.fit(data, epochs=2, verbose=0, shuffle=False)
    assert 0 < int(optimizer.iterations) <= 24


def test_a_state_that_is_loaded_in_stable_training_is_not_taken_for_steps() -> None:
    """As training that was killed goes on from a backup, which Keras loads when ``fit`` begins."""
    model = compiled(perceptron(), keras.optimizers.Adam(0.01))
    learning, optimizer = Continual(model, check=False), model.optimizer
    learning.remember(new_data(1, 1))
    optimizer.build(model.trainable_variables)
    state = {str(index): variable.numpy() for index, variable in enumerate(optimizer.variables)}
    with learning.stable():
        optimizer.load_own_variables(state | {"0": np.array(6)})
        fit(model, new_data(2, 3), 1)
    assert int(optimizer.iterations) == 9
    assert not {"apply", "load_own_variables"} & set(vars(optimizer))


def test_what_else_changes_weights_is_noticed() -> None:
    """A model that is compiled anew has another optimizer; and one of two optimizers may be forgotten."""
    model = compiled(perceptron())
    learning = Continual(model, check=False)
    learning.remember(new_data(1, 1))
    with pytest.warns(UserWarning, match=r"have taken no step, and '\S*' has changed"), learning.stable():
        fit(compiled(model), new_data(2, 1), 1)
    body, head = keras.optimizers.SGD(0.3), keras.optimizers.SGD(0.3)

    def step(inputs: Any, targets: Any) -> None:
        with tf.GradientTape() as tape:
            loss = model.loss(targets, model(inputs, training=True))
        pairs = list(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True))
        body.apply_gradients(pairs[:2])
        head.apply_gradients(pairs[2:])

    with pytest.raises(BecameError, match=f"'last.*{CHANGED}"), learning.stable(body):
        step(*new_data(2, 1)[0])
    averaging = keras.optimizers.SGD(0.3, use_ema=True)
    with (
        pytest.raises(BecameError, match="overwrites the weights by their running mean"),
        learning.stable(averaging),
    ):
        pass


class Centred(L.Layer):  # type: ignore[misc] # Keras is taken as untyped
    """A layer that takes a running mean of its own away."""

    def build(self, shape: Any) -> None:
        """Begin the mean at zero."""
        self.mean = self.add_weight(shape=shape[-1:], initializer="zeros", trainable=False, name="mean")

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Return the differences."""
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * tf.reduce_mean(inputs, 0))
        return inputs - self.mean


def test_a_running_mean_of_a_frozen_layer_is_taken_for_no_weight_that_was_changed() -> None:
    centred = Centred()
    model = compiled(row((6,), centred))
    centred.trainable = False
    learning = Continual(model, check=False)
    learning.remember(new_data(1, 1))
    compiled(model)
    with learning.stable():
        fit(model, new_data(2, 1), 1)
    assert np.any(centred.mean)


def test_one_model_is_in_stable_training_of_one_memory_at_a_time() -> None:
    """The second projection would undo what the first has projected out."""
    model = compiled(perceptron())
    one, other = Continual(model, check=False), Continual(model, check=False)
    for learning in (one, other):
        learning.remember(new_data(1, 1))
    with one.stable(), pytest.raises(BecameError, match="is in stable training of another Continual"):
        other.stable().__enter__()
    with pytest.raises(BecameError, match="plastic training comes after stable training"), other.plastic():
        pass


def test_an_optimizer_that_is_given_gradients_alone_does_not_hide_another() -> None:
    """Without variables they are all that are trained, or it is asked for them."""
    model = perceptron()
    learning, old, new = (
        Continual(model, projector=GPM(1.0), uncovered="frozen", check=False),
        new_data(1, 1, 2),
        new_data(2, 1),
    )
    learning.remember(old)
    before, variables = model(old[0][0]).numpy(), model.trainable_variables
    body, head = keras.optimizers.SGD(0.3), keras.optimizers.SGD(0.3)
    body.build(variables)
    head.build(variables[2:])

    def gradients() -> list[Any]:
        with tf.GradientTape() as tape:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(new[0][1], model(new[0][0]))
        return list(tape.gradient(loss, variables))

    with learning.stable(body):
        body.apply(gradients())
    np.testing.assert_allclose(model(old[0][0]), before, rtol=0, atol=1e-12)
    with pytest.raises(BecameError, match="2 gradients without their variables"), learning.stable(head):
        head.apply(gradients()[2:])


def test_several_optimizers_in_one_are_observed_each() -> None:
    o = keras.optimizers
    model, old, new = perceptron(), new_data(1, 1, 2), new_data(2, 2)
    several = o.MultiOptimizer(o.OptimizerMap(o.SGD(0.3), {".*first/.*": o.Adam(0.05)}))
    compiled(model, several)
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen", check=False)
    learning.remember(old)
    before = model(old[0][0]).numpy()
    with learning.stable():
        fit(model, new, 2)
    np.testing.assert_allclose(model(old[0][0]), before, rtol=0, atol=1e-9)
    assert all("apply" not in vars(part) for part in several.optimizers)
    with pytest.warns(UserWarning, match="unfit after clipping"):
        learning.remember(optimizer=several, samples=4)


def test_fit_after_a_compilation_within_stable_training_uses_the_new_optimizer() -> None:
    model = compiled(perceptron())
    fit(model, new_data(2, 1), 1)
    learning = Continual(model, check=False)
    learning.remember(new_data(1, 1))
    new = keras.optimizers.SGD(0.1)
    with learning.stable(new):
        fit(compiled(model, new), new_data(2, 1), 1)
    before = int(new.iterations)
    fit(model, new_data(2, 1), 1)
    assert int(new.iterations) > before


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_weights_of_sixteen_bits_are_penalised_under_adam(policy: str) -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)
    # In this dtype the usual beta_2 is 1.
    model = compiled(perceptron(), keras.optimizers.Adam(0.01, beta_2=0.9))
    learning = Continual(model, check=False, penalty=0.1)
    learning.remember(new_data(1, 1))
    before = model.get_layer("last").bias.numpy()
    with learning.stable():
        fit(model, new_data(2, 2), 2)
    assert not np.array_equal(model.get_layer("last").bias.numpy(), before)
    assert all(np.isfinite(variable.numpy().astype(float)).all() for variable in model.variables)


def test_a_penalised_parameter_whose_gradient_is_zero_stays_exactly_at_its_mean() -> None:
    model = row((6,), L.Dense(200, bias_initializer="random_normal", name="wide"))
    learning, optimizer = Continual(model, check=False), keras.optimizers.SGD(0.1)
    learning.remember([(np.ones((4, 6), np.float32), np.arange(4) % CLASSES)])
    before = model.get_layer("wide").bias.numpy()
    with learning.stable(optimizer):
        for _ in range(3):
            optimizer.apply(
                [tf.zeros_like(variable) for variable in model.trainable_variables], model.trainable_variables
            )
    np.testing.assert_array_equal(model.get_layer("wide").bias.numpy(), before)


def test_the_pull_has_the_rate_of_the_step_that_was_taken() -> None:
    """A schedule's rate after the first step is zero here, so that a pull at that rate would be none."""
    model = perceptron()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.5, 0.0])
    learning, optimizer = Continual(model, check=False, penalty=1e6), keras.optimizers.SGD(schedule)
    learning.remember(new_data(1, 1))
    bias = model.get_layer("last").bias
    gradients = [tf.ones_like(variable) for variable in model.trainable_variables]
    with learning.stable(optimizer):
        optimizer.apply(gradients, model.trainable_variables)
    assert np.abs(bias.numpy()).max() < 0.01  # without the pull it is -0.5


def test_layers_may_be_thawed_and_frozen_in_stable_training() -> None:
    """A layer that is thawed is projected, one that is frozen stands still, and another optimizer is noticed."""
    model, old, new = perceptron(), new_data(1, 1, 2), new_data(2, 1)
    first, last = model.get_layer("first"), model.get_layer("last")
    learning, optimizer = Continual(model, projector=GPM(1.0), check=False), keras.optimizers.SGD(0.5)
    optimizer.build(model.trainable_variables)
    learning.remember(old)

    def step() -> None:
        with tf.GradientTape() as tape:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(new[0][1], model(new[0][0]))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    before, first.trainable = old[0][0] @ first.kernel.numpy(), False
    with learning.stable(optimizer):
        step()
        kernel = first.kernel.numpy()
        first.trainable = True
        step()
        assert not np.array_equal(first.kernel, kernel)
        first.trainable = False
        bias, other = first.bias.numpy(), last.bias.numpy()
        step()
    np.testing.assert_allclose(old[0][0] @ first.kernel.numpy(), before, rtol=0, atol=1e-12)
    assert np.array_equal(first.bias, bias)
    assert not np.array_equal(last.bias, other)
    compiled(model)

    def thaw() -> None:
        with learning.stable():
            fit(model, new, 1)
            first.trainable = True
            fit(compiled(model), new, 1)

    with pytest.raises(BecameError, match=f"'first.*{CHANGED}"):
        thaw()


@pytest.mark.parametrize("uncovered", ["frozen", "penalised"])
def test_a_head_that_is_newer_than_the_memory_is_free_as_coverage_says(uncovered: Any) -> None:
    model, (inputs, _) = TwoHeads(), new_data(1, 1)[0]
    model(inputs)
    learning = Continual(model, uncovered=uncovered, check=False)
    learning.remember(new_data(1, 1))
    model.task, model.heads[0].trainable = 1, False
    model(inputs)
    before = {variable.path: variable.numpy() for variable in model.variables}
    compiled(model)
    with learning.stable():
        fit(model, new_data(2, 2), 1)
    treatments = [covered.treatment for covered in learning.coverage.parameters]
    assert treatments == ["protected", uncovered, "not trained", "not trained", "free", "free"]
    assert all(not np.array_equal(head, before[head.path]) for head in model.heads[1].variables)
    assert np.array_equal(model.body.bias, before[model.body.bias.path]) == (uncovered == "frozen")


def test_a_model_that_assigns_to_its_own_weights_in_training_is_refused() -> None:
    model = row((6,), L.SpectralNormalization(L.Dense(4)))
    before = [variable.numpy() for variable in model.variables]
    with pytest.raises(BecameError, match=r"assigns to 'spectral_normalization\S*' when it runs in training mode"):
        Continual(model).remember(new_data(1, 1))
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.variables, strict=True))
