"""``Continual`` around Keras models against brute force in double precision: taps, steps, merges, files."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from adapters.tensorflow import Continual
from adapters.tensorflow.parameters import parameters_of
from adapters.tensorflow.traced import samples_of
from became_core import BecameError
from became_core.projection import GPM
from tests.listening import totals_shown

L = keras.layers
CLASSES = 3
Batches = list[tuple[Any, Any]]


@pytest.fixture(autouse=True)
def _in_double_precision() -> Iterator[None]:
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")  # a model of another test may have fixed it
    keras.utils.set_random_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "taps do not know", UserWarning)
        yield
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)


def _row(shape: tuple[int, ...], *layers: Any, dtype: str | None = None) -> keras.Model:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers, L.Flatten(), L.Dense(CLASSES)])


def _shared() -> keras.Model:
    inputs, layer = keras.Input((5,)), L.Dense(5, activation="tanh")
    return keras.Model(inputs, L.Dense(CLASSES)(layer(layer(inputs))))


def _two_inputs() -> keras.Model:
    a, b = keras.Input((5,)), keras.Input((4,))
    return keras.Model([a, b], L.Dense(CLASSES)(L.Concatenate()([L.Dense(4)(a), L.Dense(2)(b)])))


def _attention() -> keras.Model:
    inputs = keras.Input((4, 6))
    return keras.Model(inputs, L.Dense(CLASSES)(L.Flatten()(L.MultiHeadAttention(2, 3)(inputs, inputs))))


def _batch_norm() -> keras.Model:
    model = _row((4, 4, 2), L.Conv2D(3, 2), L.BatchNormalization(), L.ReLU())
    model(np.random.default_rng(1).normal(size=(5, 4, 4, 2)), training=True)
    return model


def _replaced_call() -> keras.Model:
    """A layer whose call the user has replaced."""
    model = _row((5,), L.Dense(4, name="d"))
    layer = model.get_layer("d")
    own = layer.call
    layer.call = lambda x, **options: 0.5 * own(2 * x + 1, **options)
    return model


class Subclassed(keras.Model):  # type: ignore[misc, unused-ignore] # Keras is taken as untyped
    """A model with a weight of its own, and layers that act in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.body, self.drop, self.head = L.Dense(4, "tanh"), L.Dropout(0.5), L.Dense(CLASSES)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.head(self.drop(self.body(inputs), training=training)) * keras.ops.exp(self.scale)


def _subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros((1, 5)))
    return model


class Compiled(keras.Model):  # type: ignore[misc, unused-ignore]
    """A model that compiles its call, what the call uses, and an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = L.Dense(4, "tanh"), L.Dense(CLASSES)
        self.ending = tf.function(lambda hidden: self.head(hidden))

    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def encoded(self, inputs: Any) -> Any:
        return self.body(inputs)

    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def call(self, inputs: Any) -> Any:
        return self.ending(self.encoded(inputs))


def _compiled_by_the_user() -> keras.Model:
    model = Compiled()
    model(np.zeros((1, 5)))
    return model


def _masked() -> keras.Model:
    """Sequences whose zeros are padding, both ways in time."""
    words = L.Embedding(7, 2, mask_zero=True)
    return _row((4,), words, L.Bidirectional(L.SimpleRNN(2)), dtype="int32")


NETWORKS: dict[str, tuple[Callable[[], keras.Model], list[tuple[int, ...]]]] = {
    "dense": (lambda: _row((5,), L.Dense(4, activation="relu")), [(5,)]),
    "strided": (lambda: _row((6, 6, 2), L.Conv2D(4, 3, strides=2, padding="same", activation="tanh")), [(6, 6, 2)]),
    "grouped": (lambda: _row((5, 5, 2), L.Conv2D(4, 3, groups=2)), [(5, 5, 2)]),
    "depthwise": (lambda: _row((5, 5, 2), L.DepthwiseConv2D(3, depth_multiplier=2)), [(5, 5, 2)]),
    "embedding": (lambda: _row((4,), L.Embedding(7, 3), L.LayerNormalization(), dtype="int32"), []),
    "attention": (_attention, [(4, 6)]),
    "LSTM": (lambda: _row((4, 3), L.LSTM(2)), [(4, 3)]),
    "both ways in time, with a mask": (_masked, []),
    "subclassed": (_subclassed, [(5,)]),
    "compiled by the user": (_compiled_by_the_user, [(5,)]),
    "an einsum and groups": (
        lambda: _row((2, 3), L.EinsumDense("abc,cde->abde", (2, 2, 2), bias_axes="de"), L.GroupNormalization(2)),
        [(2, 3)],
    ),
    "shared": (_shared, [(5,)]),
    "two inputs": (_two_inputs, [(5,), (4,)]),
    "batch norm": (_batch_norm, [(4, 4, 2)]),
    "replaced call": (_replaced_call, [(5,)]),
    "noise": (
        lambda: _row((4, 4, 2), L.RandomFlip(), L.GaussianNoise(0.5), L.Conv2D(3, 2), L.Dropout(0.5)),
        [(4, 4, 2)],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_remembers_the_mean_of_squared_gradients_of_single_samples(name: str) -> None:
    make, shapes = NETWORKS[name]
    model, rng = make(), np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(0.1 * rng.normal(size=variable.shape))
    before = [variable.numpy() for variable in model.variables]
    inputs: Any = [tf.constant(rng.normal(size=(3, *shape))) for shape in shapes] or [
        tf.constant([[1, 2, 2, 6], [1, 2, 0, 0], [3, 0, 0, 0]])
    ]
    inputs = inputs[0] if len(inputs) == 1 else inputs
    labels = np.array([0, 2, 1])
    learning = Continual(model)
    learning.remember([(inputs, labels)])
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.variables, strict=True))
    assert learning.posterior is not None
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Through what is compiled a tape has no gradient by Keras's variables.
    tf.config.run_functions_eagerly(name == "compiled by the user")
    total: dict[str, Any] = {}
    trained = learning._data.network.trained
    for sample in range(3):
        at = slice(sample, sample + 1)
        with tf.GradientTape() as tape:
            value = loss(labels[at], model(samples_of(inputs, at), training=False))
        variables = [parameter.variable for parameter in trained.values()]
        for (key, parameter), gradient in zip(trained.items(), tape.gradient(value, variables), strict=True):
            total[key] = total.get(key, 0) + parameter.canonical(tf.convert_to_tensor(gradient)).numpy() ** 2 / 3
    tf.config.run_functions_eagerly(False)
    found = learning.posterior.precision.diagonal()
    assert set(found) == set(total)
    for key, expected in total.items():
        np.testing.assert_allclose(found[key], expected, rtol=1e-8, atol=1e-14)
    assert learning.checked is not None
    protected = {p.name for p in learning.coverage.parameters if p.treatment == "protected"}
    assert all(p.name in protected for p in learning.coverage.parameters if p.use.startswith("matrix"))
    if name == "compiled by the user":
        assert "call" not in vars(model)
        assert isinstance(model.ending, tf.types.experimental.PolymorphicFunction)
        model(inputs)  # by what the user compiled
    if name == "replaced call":
        assert "call" in vars(model.get_layer("d"))
        assert len(protected) == 2


def test_the_first_look_accepts_a_network_with_more_kinks_than_a_difference_can_avoid() -> None:
    """Layers with batch norm and ReLU6: no step is so short that a difference of outputs meets no kink."""
    keras.config.set_floatx("float32")  # in which a step must be long
    keras.config.set_dtype_policy("float32")
    layers = [layer for _ in range(5) for layer in (L.Dense(16), L.BatchNormalization(momentum=0.0), L.ReLU(6.0))]
    model, rng = _row((16,), *layers), np.random.default_rng(0)
    inputs = tf.constant(rng.normal(size=(64, 16)), tf.float32)
    model(inputs, training=True)
    learning = Continual(model)
    learning.remember([(inputs[:4], np.arange(4) % CLASSES)])
    assert learning.checked is not None
    assert learning.checked.findings[-1].difference < 1e-4


def _perceptron(end: str | None = None) -> keras.Model:
    layers = [L.Dense(8, activation="tanh", name="first"), L.GaussianNoise(0.1), L.Dense(CLASSES, end, name="last")]
    return keras.Sequential([keras.Input((6,)), *layers])


def _data(seed: int, batches: int, size: int = 4) -> Batches:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, 6)), rng.integers(0, CLASSES, size=size)) for _ in range(batches)]


def _fit(model: keras.Model, batches: Batches, epochs: int) -> None:
    inputs, targets = (np.concatenate(side) for side in zip(*batches, strict=True))
    model.fit(inputs, targets, batch_size=4, epochs=epochs, verbose=0)


@pytest.mark.parametrize(("optimizer", "eager"), [("SGD", False), ("AdamW", False), ("AdamW", True)])
def test_old_outputs_stand_still_in_stable_training_under_fit(optimizer: str, eager: bool) -> None:
    model, old, new = _perceptron("softmax"), _data(1, 1, 2), _data(2, 3)
    makers: dict[str, Any] = {
        "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        "AdamW": lambda: keras.optimizers.AdamW(0.05),
    }
    stepper = makers[optimizer]()
    model.compile(stepper, "sparse_categorical_crossentropy", run_eagerly=eager)
    _fit(model, new, 1)
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen", check=False)
    learning.remember(old)
    before, names, kernel = model(old[0][0]).numpy(), set(vars(stepper)), model.get_layer("first").kernel.numpy()
    with learning.stable():
        _fit(model, new, 2)
    np.testing.assert_allclose(model(old[0][0]), before, rtol=0, atol=1e-9)
    assert not np.array_equal(model.get_layer("first").kernel, kernel)
    assert set(vars(stepper)) == names
    with learning.plastic():
        _fit(model, new, 2)
    assert np.abs(model(old[0][0]).numpy() - before).max() > 1e-4
    report = learning.merge(new, trace=2)
    assert 0 <= report.alpha <= 1
    assert report.curvature == "forward mode"


def test_a_loop_of_ones_own_is_projected_and_a_step_compiled_before_is_noticed() -> None:
    model, old, new = _perceptron(), _data(1, 1, 2), _data(2, 2)
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
    compiled = tf.function(step)
    compiled(*new[0])
    with pytest.raises(BecameError, match=r"had compiled before stable training began"), learning.stable(optimizer):
        compiled(*new[0])
    with pytest.raises(ZeroDivisionError), learning.stable(optimizer):
        raise ZeroDivisionError
    assert "apply" not in vars(optimizer)


def _compiled(model: keras.Model, optimizer: Any = None) -> keras.Model:
    model.compile(optimizer or keras.optimizers.SGD(0.3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


CHANGED = r"changed in stable training by something else than the steps of the optimizers that stable\(\) was given"


def test_what_else_changes_weights_is_noticed() -> None:
    """A model that is compiled anew has another optimizer; and one of two optimizers may be forgotten."""
    model = _compiled(_perceptron())
    learning = Continual(model, check=False)
    learning.remember(_data(1, 1))
    with pytest.warns(UserWarning, match=r"have taken no step, and '\S*' has changed"), learning.stable():
        _fit(_compiled(model), _data(2, 1), 1)
    body, head = keras.optimizers.SGD(0.3), keras.optimizers.SGD(0.3)

    def step(inputs: Any, targets: Any) -> None:
        with tf.GradientTape() as tape:
            loss = model.loss(targets, model(inputs, training=True))
        pairs = list(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True))
        body.apply_gradients(pairs[:2])
        head.apply_gradients(pairs[2:])

    with pytest.raises(BecameError, match=f"'last.*{CHANGED}"), learning.stable(body):
        step(*_data(2, 1)[0])
    averaging = keras.optimizers.SGD(0.3, use_ema=True)
    with (
        pytest.raises(BecameError, match="overwrites the weights by their running mean"),
        learning.stable(averaging),
    ):
        pass


def test_one_model_is_in_stable_training_of_one_memory_at_a_time() -> None:
    """The second projection would undo what the first has projected out."""
    model = _compiled(_perceptron())
    one, other = Continual(model, check=False), Continual(model, check=False)
    for learning in (one, other):
        learning.remember(_data(1, 1))
    with one.stable(), pytest.raises(BecameError, match="is in stable training of another Continual"):
        other.stable().__enter__()
    with pytest.raises(BecameError, match="plastic training comes after stable training"), other.plastic():
        pass


def test_an_optimizer_that_is_given_gradients_alone_does_not_hide_another() -> None:
    """Without variables they are all that are trained, or it is asked for them."""
    model = _perceptron()
    learning, old, new = (
        Continual(model, projector=GPM(1.0), uncovered="frozen", check=False),
        _data(1, 1, 2),
        _data(2, 1),
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
    model, old, new = _perceptron(), _data(1, 1, 2), _data(2, 2)
    several = o.MultiOptimizer(o.OptimizerMap(o.SGD(0.3), {".*first/.*": o.Adam(0.05)}))
    _compiled(model, several)
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen", check=False)
    learning.remember(old)
    before = model(old[0][0]).numpy()
    with learning.stable():
        _fit(model, new, 2)
    np.testing.assert_allclose(model(old[0][0]), before, rtol=0, atol=1e-9)
    assert all("apply" not in vars(part) for part in several.optimizers)
    with pytest.warns(UserWarning, match="unfit after clipping"):
        learning.remember(optimizer=several, samples=4)


def test_fit_after_a_compilation_within_stable_training_uses_the_new_optimizer() -> None:
    model = _compiled(_perceptron())
    _fit(model, _data(2, 1), 1)
    learning = Continual(model, check=False)
    learning.remember(_data(1, 1))
    new = keras.optimizers.SGD(0.1)
    with learning.stable(new):
        _fit(_compiled(model, new), _data(2, 1), 1)
    before = int(new.iterations)
    _fit(model, _data(2, 1), 1)
    assert int(new.iterations) > before


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_weights_of_sixteen_bits_are_penalised_under_adam(policy: str) -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)
    # In this dtype the usual beta_2 is 1.
    model = _compiled(_perceptron(), keras.optimizers.Adam(0.01, beta_2=0.9))
    learning = Continual(model, check=False, penalty=0.1)
    learning.remember(_data(1, 1))
    before = model.get_layer("last").bias.numpy()
    with learning.stable():
        _fit(model, _data(2, 2), 2)
    assert not np.array_equal(model.get_layer("last").bias.numpy(), before)
    assert all(np.isfinite(variable.numpy().astype(float)).all() for variable in model.variables)


def test_the_pull_has_the_rate_of_the_step_that_was_taken() -> None:
    """A schedule's rate after the first step is zero here, so that a pull at that rate would be none."""
    model = _perceptron()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.5, 0.0])
    learning, optimizer = Continual(model, check=False, penalty=1e6), keras.optimizers.SGD(schedule)
    learning.remember(_data(1, 1))
    bias = model.get_layer("last").bias
    gradients = [tf.ones_like(variable) for variable in model.trainable_variables]
    with learning.stable(optimizer):
        optimizer.apply(gradients, model.trainable_variables)
    assert np.abs(bias.numpy()).max() < 0.01  # without the pull it is -0.5


def _ensemble(end: str) -> keras.Model:
    inputs = keras.Input((6,))
    return keras.Model(inputs, L.Average()([L.Dense(CLASSES, end)(inputs), L.Dense(CLASSES, end)(inputs)]))


def _by_hand() -> keras.Model:
    inputs = keras.Input((6,))
    powers = keras.ops.exp(L.Dense(CLASSES)(inputs))
    return keras.Model(inputs, powers / keras.ops.sum(powers, -1, keepdims=True))


def test_probabilities_that_no_last_softmax_made_are_no_logits() -> None:
    targets = [(x, np.eye(CLASSES)[y]) for x, y in _data(1, 1)]
    for model, likelihood, data in (
        (_ensemble("softmax"), "categorical", _data(1, 1)),
        (_by_hand(), "categorical", _data(1, 1)),
        (_ensemble("sigmoid"), "bernoulli", targets),
    ):
        with pytest.raises(BecameError, match=r"outputs are probabilities, and a \w+ is not its last operation"):
            Continual(model, likelihood).remember(data)
    zeros = keras.Sequential([keras.Input((6,)), L.Dense(4, "sigmoid"), L.Dense(CLASSES, kernel_initializer="zeros")])
    for likelihood, data in (("categorical", _data(1, 1)), ("bernoulli", targets)):
        Continual(zeros, likelihood, check=False).remember(data)


def test_names_of_layers_in_two_directions_and_of_statistics_do_not_depend_on_what_was_built_before() -> None:
    def names(frozen: bool) -> set[str]:
        scaled = L.Normalization(mean=0.0, variance=1.0)
        model = keras.Sequential([keras.Input((4, 3)), scaled, L.Bidirectional(L.LSTM(2)), L.Dense(CLASSES)])
        model.trainable = not frozen
        return set(parameters_of(model))

    first = names(frozen=False)
    assert names(frozen=True) == first
    assert "bidirectional.forward_lstm.lstm_cell.kernel" in first


def test_layers_may_be_thawed_and_frozen_in_stable_training() -> None:
    """A layer that is thawed is projected, one that is frozen stands still, and another optimizer is noticed."""
    model, old, new = _perceptron(), _data(1, 1, 2), _data(2, 1)
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
    _compiled(model)

    def thaw() -> None:
        with learning.stable():
            _fit(model, new, 1)
            first.trainable = True
            _fit(_compiled(model), new, 1)

    with pytest.raises(BecameError, match=f"'first.*{CHANGED}"):
        thaw()


def test_a_model_that_assigns_to_its_own_weights_in_training_is_refused() -> None:
    model = _row((6,), L.SpectralNormalization(L.Dense(4)))
    before = [variable.numpy() for variable in model.variables]
    with pytest.raises(BecameError, match=r"assigns to 'spectral_normalization\S*' when it runs in training mode"):
        Continual(model).remember(_data(1, 1))
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.variables, strict=True))


def test_there_is_a_warning_if_a_layer_took_the_place_of_one_that_was_remembered() -> None:
    model, old, new = _perceptron(), _data(1, 1), _data(2, 2)
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen", check=False)
    learning.remember(old)
    before, layer = model(old[0][0]).numpy(), model.layers[-1]
    model.pop()
    model.add(other := L.Dense(CLASSES, name=layer.name))
    other.set_weights([value.copy() for value in layer.get_weights()])
    with learning.stable(_compiled(model).optimizer):  # other variables, and the same values
        _fit(model, new, 1)
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
    learning.remember(_data(1, 1))
    kept = model.layers[1:]
    for _ in model.layers[:]:
        model.pop()
    for layer in (L.Dense(6), *kept):
        model.add(layer)
    message = "what was 'dense_1.weight' when old data were remembered is 'dense.weight' now"
    with pytest.raises(BecameError, match=message), learning.stable(keras.optimizers.SGD(0.1)):
        pass
    with pytest.raises(BecameError, match=message):
        learning.remember(_data(1, 1))


def test_an_optimizer_of_another_model_is_refused() -> None:
    learning = Continual(_perceptron(), check=False)
    learning.remember(_data(1, 1))
    other = _compiled(_perceptron())
    with (
        pytest.raises(BecameError, match="the optimizer steps no variable of the model"),
        learning.stable(other.optimizer),
    ):
        _fit(other, _data(2, 1), 1)


def test_a_layer_that_was_frozen_when_old_data_were_remembered_is_refused() -> None:
    model = _compiled(_perceptron())
    model.get_layer("first").trainable = False
    learning = Continual(model, check=False)
    learning.remember(_data(1, 1))
    model.get_layer("first").trainable = True
    with (
        pytest.raises(BecameError, match=r"'first\.weight' is trained now, and was not when old data"),
        learning.stable(),
    ):
        pass


def test_a_head_that_a_later_task_uses_is_measured_and_protected() -> None:
    """What Python chooses is looked at anew by each remember, and not as it was traced first."""
    inputs, used = keras.Input((6,)), [0]
    hidden = L.Dense(4, "tanh")(inputs)
    model = keras.Model(inputs, [L.Dense(CLASSES, name=name)(hidden) for name in ("one", "two")])
    learning = Continual(
        model, apply=lambda m, batch: m(batch[0])[used[0]], targets=lambda batch: batch[1], check=False
    )
    learning.remember(_data(1, 1))
    used[0] = 1
    learning.remember(_data(2, 1))
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()
    x, y = _data(2, 1)[0]
    errors = tf.nn.softmax(model(x)[1]) - tf.one_hot(y, CLASSES, dtype=tf.float64)
    np.testing.assert_allclose(found["two.bias"], tf.reduce_mean(errors**2, 0), rtol=1e-8)
    assert {"one.weight", "two.weight"} <= learning.projector.rank.keys()


def test_data_that_use_a_protected_matrix_otherwise_are_refused() -> None:
    """No projection of steps stands for a use as anything else, so the matrix may not go on to be called protected."""
    model, is_part = keras.Sequential([keras.Input((6,)), L.Dense(CLASSES, use_bias=False, name="only")]), [False]
    kernel = model.get_layer("only").kernel

    def apply(model: Any, batch: Any) -> Any:
        return model(batch[0]) + (tf.square(keras.ops.convert_to_tensor(kernel)[0]) if is_part[0] else 0)

    learning = Continual(model, apply=apply, targets=lambda batch: batch[1], check=False)
    learning.remember(_data(1, 1))
    is_part[0] = True
    with pytest.raises(BecameError, match=r"'only\.weight' is protected as a matrix that is multiplied as a whole"):
        learning.remember(_data(2, 1))


def test_a_model_in_mixed_precision_is_measured_to_its_rounding() -> None:
    model = _row((6,), L.Dense(4, "tanh", name="half", dtype="mixed_bfloat16"))
    learning, (x, y) = Continual(model), _data(1, 1)[0]
    learning.remember([(x, y)])
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()["half.bias"]
    model.get_layer("half").dtype_policy = "float32"
    total = 0.0
    for place in range(len(y)):
        with tf.GradientTape() as tape:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
                y[place : place + 1], model(x[place : place + 1])
            )
        total += tape.gradient(loss, model.get_layer("half").bias.value).numpy() ** 2 / len(y)
    np.testing.assert_allclose(found, total, rtol=0.1, atol=0.01 * np.max(total))


def test_a_memory_comes_back_from_a_file_and_another_architecture_is_refused(tmp_path: Path) -> None:
    model, file = _perceptron(), tmp_path / "memory.safetensors"
    learning = Continual(model, "bernoulli", penalty=7.0)
    learning.remember([(x, np.eye(CLASSES)[y]) for x, y in _data(1, 2)])
    learning.save(file)
    again = Continual.load(_perceptron(), file)
    assert str(again.coverage) == str(learning.coverage)
    assert (again.penalty, again.likelihood) == (7.0, learning.likelihood)
    with pytest.raises(BecameError, match=r"another architecture: the memory has no 'dense"):
        Continual.load(_row((6,), L.Dense(4)), file)


def test_what_cannot_be_done_is_said_in_a_sentence() -> None:
    model = _perceptron()
    learning = Continual(model)
    with pytest.raises(BecameError, match="stable training needs a memory"), learning.stable():
        pass
    with pytest.raises(BecameError, match="there are no samples"):
        learning.remember([])
    with pytest.raises(BecameError, match="has no variables yet"):
        Continual(keras.Sequential([L.Dense(2)]))
    with pytest.raises(BecameError, match="needs a label for each row of logits"):
        learning.remember([(np.zeros((4, 6)), np.zeros((4, 2), np.int64))])
    with pytest.raises(BecameError, match="the loss is a sum over samples"):
        Continual(model, keras.losses.SparseCategoricalCrossentropy(reduction="sum"))
    with pytest.raises(BecameError, match="a function of Keras has the targets first"):
        Continual(model, keras.losses.sparse_categorical_crossentropy).remember(_data(1, 1))
    with pytest.raises(BecameError, match="takes batches of 4 samples alone, and single samples are measured"):
        Continual(keras.Sequential([keras.Input((6,), batch_size=4), L.Dense(CLASSES)]))
    with pytest.raises(BecameError, match="a batch has three parts"):
        learning.remember([(np.zeros((4, 6)), np.zeros(4), np.ones(4))])
    with pytest.raises(BecameError, match="no axis of samples; give batches, of a"):
        learning.remember(tf.data.Dataset.from_tensor_slices(_data(1, 1)[0]))
    learning.remember(_data(1, 1))
    with pytest.raises(BecameError, match="the model is not compiled"), learning.stable():
        pass
    with pytest.raises(BecameError, match="plastic training comes after stable"), learning.plastic():
        pass
    with pytest.raises(BecameError, match="a merge is of two models"):
        learning.merge(_data(1, 1))


def test_what_is_not_finite_is_named_and_not_merged() -> None:
    model, data = _perceptron(), _data(1, 1)
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


def test_running_statistics_are_estimated_again_on_request() -> None:
    frozen = L.BatchNormalization(trainable=False)
    model = _row((4, 4, 2), L.Conv2D(3, 2), L.BatchNormalization(momentum=0.5), L.ReLU(), frozen, L.Dropout(0.5))
    norm, optimizer = model.layers[1], keras.optimizers.SGD(0.1)
    data = [(np.random.default_rng(n).normal(size=(5, 4, 4, 2)), np.arange(5) % CLASSES) for n in range(3)]
    learning = Continual(model)
    learning.remember(data[:1])
    with learning.stable(optimizer):
        pass
    with learning.plastic():
        norm.gamma.assign(norm.gamma * 2.0)
    learning.merge(data, statistics=data)
    seen = [model.layers[0](x).numpy() for x, _ in data]
    np.testing.assert_allclose(norm.moving_mean, np.mean([x.mean((0, 1, 2)) for x in seen], axis=0), rtol=1e-10)
    np.testing.assert_allclose(norm.moving_variance, np.mean([x.var((0, 1, 2)) for x in seen], axis=0), rtol=1e-10)
    assert np.array_equal(frozen.moving_mean, np.zeros(3))
    assert norm.momentum == 0.5
    assert "call" not in vars(norm)
    assert not tf.config.functions_run_eagerly()


def test_second_moments_of_an_optimizer_stand_for_old_data_with_a_warning() -> None:
    model = _perceptron()
    model.compile(keras.optimizers.Adam(0.01, beta_2=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for x, y in _data(1, 3):
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


class _Sequence(keras.utils.PyDataset):  # type: ignore[misc, unused-ignore] # Keras is taken as untyped
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return _data(index, 1)[0]


def test_a_terminal_shows_how_far_a_pass_is(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = totals_shown(monkeypatch)
    endless = tf.data.Dataset.from_tensors(_data(1, 1)[0]).repeat()
    for data in (_Sequence(), endless.take(3), endless.take(3).filter(lambda x, y: True)):
        Continual(_perceptron(), check=False).remember(data)
    Continual(_perceptron(), check=False, progress=False).remember(_data(1, 1))
    assert totals == [2, 3, None]


def test_a_change_of_the_stream_is_observed() -> None:
    model, rule = _perceptron(), np.random.default_rng(7).normal(size=(6, CLASSES))
    inputs = np.random.default_rng(8).normal(size=(60, 16, 6))
    labels = (inputs @ rule).argmax(-1)
    model.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(np.concatenate(inputs), np.concatenate(labels), batch_size=16, epochs=4, verbose=0)
    learning = Continual(model)
    new = np.random.default_rng(9).normal(size=(60, 16, 6))
    stream = [(x, (x @ (rule if place < 50 else -rule)).argmax(-1)) for place, x in enumerate(new)]
    observed = [place for place, batch in enumerate(stream[:53]) if learning.observe(batch)]
    assert observed == [52]
    assert len(learning.reservoir.batches) == 20
    assert all(any(batch is earlier for earlier in stream[:50]) for batch in learning.reservoir.batches)


def test_a_constraint_that_a_correction_would_break_is_refused() -> None:
    model = keras.Sequential(
        [keras.Input((5,)), L.Dense(4, kernel_constraint="non_neg", name="first"), L.Dense(CLASSES)]
    )
    _compiled(model)
    learning = Continual(model)
    learning.remember([(np.ones((2, 5)), np.array([0, 1]))])
    with pytest.raises(BecameError, match=r"'first\.weight' has a constraint, which a projected"), learning.stable():
        pass
