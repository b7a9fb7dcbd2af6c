"""What ``Continual`` remembers of Keras models, against gradients of single samples in double precision."""

from collections.abc import Callable
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
from became_core.curvature import Gaussian
from became_core.projection import SGP
from tests.listening import totals_shown
from tests.tensorflow.own_loop import CLASSES, L, TwoHeads, compiled, fit, new_data, perceptron, row

pytestmark = pytest.mark.usefixtures("in_double_precision")


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
    model = row((4, 4, 2), L.Conv2D(3, 2), L.BatchNormalization(), L.ReLU())
    model(np.random.default_rng(1).normal(size=(5, 4, 4, 2)), training=True)
    return model


def _replaced_call() -> keras.Model:
    """A layer whose call the user has replaced."""
    model = row((5,), L.Dense(4, name="d"))
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
    return row((4,), words, L.Bidirectional(L.SimpleRNN(2)), dtype="int32")


NETWORKS: dict[str, tuple[Callable[[], keras.Model], list[tuple[int, ...]]]] = {
    "dense": (lambda: row((5,), L.Dense(4, activation="relu")), [(5,)]),
    "strided": (lambda: row((6, 6, 2), L.Conv2D(4, 3, strides=2, padding="same", activation="tanh")), [(6, 6, 2)]),
    "grouped": (lambda: row((5, 5, 2), L.Conv2D(4, 3, groups=2)), [(5, 5, 2)]),
    "depthwise": (lambda: row((5, 5, 2), L.DepthwiseConv2D(3, depth_multiplier=2)), [(5, 5, 2)]),
    "embedding": (lambda: row((4,), L.Embedding(7, 3), L.LayerNormalization(), dtype="int32"), []),
    "attention": (_attention, [(4, 6)]),
    "LSTM": (lambda: row((4, 3), L.LSTM(2)), [(4, 3)]),
    "both ways in time, with a mask": (_masked, []),
    "subclassed": (_subclassed, [(5,)]),
    "compiled by the user": (_compiled_by_the_user, [(5,)]),
    "an einsum and groups": (
        lambda: row((2, 3), L.EinsumDense("abc,cde->abde", (2, 2, 2), bias_axes="de"), L.GroupNormalization(2)),
        [(2, 3)],
    ),
    "shared": (_shared, [(5,)]),
    "two inputs": (_two_inputs, [(5,), (4,)]),
    "batch norm": (_batch_norm, [(4, 4, 2)]),
    "replaced call": (_replaced_call, [(5,)]),
    "noise": (
        lambda: row((4, 4, 2), L.RandomFlip(), L.GaussianNoise(0.5), L.Conv2D(3, 2), L.Dropout(0.5)),
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
    model, rng = row((16,), *layers), np.random.default_rng(0)
    inputs = tf.constant(rng.normal(size=(64, 16)), tf.float32)
    model(inputs, training=True)
    learning = Continual(model)
    learning.remember([(inputs[:4], np.arange(4) % CLASSES)])
    assert learning.checked is not None
    assert learning.checked.findings[-1].difference < 1e-4


def test_names_of_layers_in_two_directions_and_of_statistics_do_not_depend_on_what_was_built_before() -> None:
    def names(frozen: bool) -> set[str]:
        scaled = L.Normalization(mean=0.0, variance=1.0)
        model = keras.Sequential([keras.Input((4, 3)), scaled, L.Bidirectional(L.LSTM(2)), L.Dense(CLASSES)])
        model.trainable = not frozen
        return set(parameters_of(model))

    first = names(frozen=False)
    assert names(frozen=True) == first
    assert "bidirectional.forward_lstm.lstm_cell.kernel" in first


def test_a_head_that_a_later_task_uses_is_measured_and_protected() -> None:
    """What Python chooses is looked at anew by each remember, and not as it was traced first."""
    inputs, used = keras.Input((6,)), [0]
    hidden = L.Dense(4, "tanh")(inputs)
    model = keras.Model(inputs, [L.Dense(CLASSES, name=name)(hidden) for name in ("one", "two")])
    learning = Continual(
        model, apply=lambda m, batch: m(batch[0])[used[0]], targets=lambda batch: batch[1], check=False
    )
    learning.remember(new_data(1, 1))
    used[0] = 1
    learning.remember(new_data(2, 1))
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()
    x, y = new_data(2, 1)[0]
    errors = tf.nn.softmax(model(x)[1]) - tf.one_hot(y, CLASSES, dtype=tf.float64)
    np.testing.assert_allclose(found["two.bias"], tf.reduce_mean(errors**2, 0), rtol=1e-8)
    assert {"one.weight", "two.weight"} <= learning.projector.rank.keys()


def test_a_model_in_mixed_precision_is_measured_to_its_rounding() -> None:
    model = row((6,), L.Dense(4, "tanh", name="half", dtype="mixed_bfloat16"))
    learning, (x, y) = Continual(model), new_data(1, 1)[0]
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


def test_a_failed_remembering_leaves_no_trace() -> None:
    model, rng, projector = perceptron(), np.random.default_rng(0), SGP()
    data = [(rng.normal(size=(4, 6)), rng.normal(size=(4, CLASSES))) for _ in range(4)]
    damaged = [*data[:2], (data[2][0], data[2][1] * np.nan), data[3]]
    learning, twin = (Continual(model, "gaussian", projector=projector) for _ in range(2))
    learning.remember(data)
    with pytest.raises(BecameError, match="is not finite; look for NaN in the batches"):
        twin.remember(damaged)
    assert twin.posterior is None
    assert twin.projector is projector
    assert twin.likelihood == Gaussian()
    twin.remember(data)
    assert twin.projector.rank == learning.projector.rank
    assert twin.likelihood == learning.likelihood
    update = {"first.weight": tf.constant(rng.normal(size=(8, 6)))}
    ours, theirs = (each.projector.project(update)["first.weight"] for each in (twin, learning))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_a_memory_comes_back_from_a_file_and_another_architecture_is_refused(tmp_path: Path) -> None:
    model, file = perceptron(), tmp_path / "memory.safetensors"
    learning = Continual(model, "bernoulli", penalty=7.0)
    learning.remember([(x, np.eye(CLASSES)[y]) for x, y in new_data(1, 2)])
    learning.save(file)
    again = Continual.load(perceptron(), file)
    assert str(again.coverage) == str(learning.coverage)
    assert (again.penalty, again.likelihood) == (7.0, learning.likelihood)
    with pytest.raises(BecameError, match=r"another architecture: the model has no 'first"):
        Continual.load(row((6,), L.Dense(4)), file)
    with pytest.raises(
        BecameError, match=r"the projector of the memory in .*memory\.safetensors is GPM, not SGP; give"
    ):
        Continual.load(perceptron(), file, projector=SGP())


class _Sequence(keras.utils.PyDataset):  # type: ignore[misc, unused-ignore] # Keras is taken as untyped
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return new_data(index, 1)[0]


def test_a_terminal_shows_how_far_a_pass_is(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = totals_shown(monkeypatch)
    endless = tf.data.Dataset.from_tensors(new_data(1, 1)[0]).repeat()
    for data in (_Sequence(), endless.take(3), endless.take(3).filter(lambda x, y: True)):
        Continual(perceptron(), check=False).remember(data)
    Continual(perceptron(), check=False, progress=False).remember(new_data(1, 1))
    assert totals == [2, 3, None]


@pytest.mark.filterwarnings("ignore:second moments of an optimizer:UserWarning")
def test_the_noise_of_a_regression_is_fitted_where_it_is_first_needed() -> None:
    model, rng = perceptron(), np.random.default_rng(0)
    data = [(rng.normal(size=(4, 6)), rng.normal(size=(4, CLASSES))) for _ in range(3)]

    def residual() -> Any:
        return pytest.approx(float(np.sqrt(np.mean((model(data[0][0]) - data[0][1]) ** 2))))

    learning = Continual(model, "gaussian", check=False)
    assert not learning.observe(data[0])
    assert learning.likelihood.noise == residual()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    fit(model, data, 2)
    learning = Continual(model, "gaussian", check=False)
    learning.remember(optimizer=model.optimizer, samples=4)
    assert learning.likelihood == Gaussian()
    with learning.stable():
        fit(model, data, 2)
    with learning.plastic():
        fit(model, data, 2)
    expected = residual()
    assert 0 <= learning.merge(data).alpha <= 1
    assert learning.likelihood.noise == expected


def test_a_change_of_the_stream_is_observed() -> None:
    model, rule = perceptron(), np.random.default_rng(7).normal(size=(6, CLASSES))
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


@pytest.mark.parametrize("uncovered", ["penalised", "frozen"])
def test_a_head_that_data_have_not_seen_is_as_free_after_a_load_as_before(uncovered: Any, tmp_path: Path) -> None:
    model, (old,), file = TwoHeads(), new_data(1, 1), tmp_path / "memory.safetensors"
    model(old[0])
    learning = Continual(model, uncovered=uncovered, check=False)
    learning.remember([old])
    model.task = 1
    model(old[0])
    learning.save(file)
    again = Continual.load(model, file, check=False)
    treatments = {parameter.name: parameter.treatment for parameter in again.coverage.parameters}
    assert (treatments["head0.bias"], treatments["head1.bias"]) == (uncovered, "free")
    head, bias = model.heads[1].kernel.numpy(), model.heads[0].bias.numpy()
    model.heads[0].trainable = False
    compiled(model)
    with again.stable():
        fit(model, new_data(2, 1), 1)
    assert np.any(model.heads[1].kernel.numpy() != head)
    np.testing.assert_array_equal(model.heads[0].bias, bias)
