"""``Continual`` on PyTorch and on Keras: the same memory, merge and file for one perceptron, in double precision."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from adapters.tensorflow import Continual as KerasContinual  # noqa: E402
from adapters.torch import Continual as TorchContinual  # noqa: E402
from became_core import Secant  # noqa: E402
from became_core.projection import GPM  # noqa: E402


class _Perceptron(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.first(x)))


class _Words(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = torch.nn.Embedding(9, 2), torch.nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.last(self.words(x).flatten(1))


@pytest.fixture(autouse=True)
def _in_double_precision() -> Iterator[None]:
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")  # a model of another test may have fixed it
    with warnings.catch_warnings():
        yield
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)


def _weights(scale: float) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    shapes = {"first.weight": (8, 6), "first.bias": (8,), "last.weight": (3, 8), "last.bias": (3,)}
    first = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return {name: value + scale * rng.normal(size=shapes[name]) for name, value in first.items()}


def _set_keras(model: Any, weights: dict[str, Any]) -> None:
    for layer in ("first", "last"):
        model.get_layer(layer).set_weights([weights[f"{layer}.weight"].T, weights[f"{layer}.bias"]])


def _data(seed: int, batches: int = 2) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(8, 6)), rng.integers(0, 3, size=8)) for _ in range(batches)]


@pytest.mark.parametrize("estimator", [None, Secant()], ids=["paper", "secant"])
def test_both_remember_merge_and_save_the_same(tmp_path: Path, estimator: Any) -> None:
    layers = [keras.layers.Dense(8, "tanh", name="first"), keras.layers.Dense(3, name="last")]
    model, module = keras.Sequential([keras.Input((6,)), *layers]), _Perceptron().double()

    def in_torch(batches: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        return [tuple(map(torch.from_numpy, batch)) for batch in batches]

    def set_torch(weights: dict[str, Any]) -> None:
        module.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})

    old, new, by_keras, by_torch = _data(1, 6), _data(2), KerasContinual(model), TorchContinual(module)
    _set_keras(model, _weights(0.0))
    set_torch(_weights(0.0))
    by_keras.remember(old, share=0.5)  # all draw the same batches
    by_torch.remember(in_torch(old), share=0.5)
    assert by_keras.posterior is not None
    assert by_torch.posterior is not None
    for name, value in by_torch.posterior.precision.diagonal().items():
        np.testing.assert_allclose(by_keras.posterior.precision.diagonal()[name], value, rtol=1e-9)
    assert str(by_keras.coverage) == str(by_torch.coverage)
    # A memory of one framework is read by the other.
    files = tmp_path / "keras.safetensors", tmp_path / "torch.safetensors"
    by_keras.save(files[0])
    by_torch.save(files[1])
    by_torch = TorchContinual.load(module, files[0], estimator=estimator)
    by_keras = KerasContinual.load(model, files[1], estimator=estimator)
    assert str(by_keras.coverage) == str(by_torch.coverage)

    # Both have the same stable and plastic weights; how they were trained does not matter to a merge.
    def place(scale: float) -> None:
        _set_keras(model, _weights(scale))
        set_torch(_weights(scale))

    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    with (
        pytest.warns(UserWarning, match="have taken no step, and 'first.weight' has changed: unless it was loaded"),
        by_keras.stable(keras.optimizers.SGD(0.1)),
        by_torch.stable(optimizer),
    ):
        place(0.02)
    with by_keras.plastic(), by_torch.plastic():
        place(0.3)
    reports = by_keras.merge(new, trace=3), by_torch.merge(in_torch(new), trace=3)
    assert reports[0].alpha == pytest.approx(reports[1].alpha, rel=1e-8)
    assert reports[0].slopes == pytest.approx(reports[1].slopes, rel=1e-8)
    np.testing.assert_allclose(reports[0].trace, reports[1].trace, rtol=1e-8)
    np.testing.assert_allclose(model.get_layer("first").kernel.numpy().T, module.first.weight.detach(), rtol=1e-8)


def test_both_calibrate_across_tasks_alike(tmp_path: Path) -> None:
    """Three tasks, whose weights are set; after the first merge each goes on with the other's file."""
    layers = [keras.layers.Dense(8, "tanh", name="first"), keras.layers.Dense(3, name="last")]
    model, module = keras.Sequential([keras.Input((6,)), *layers]), _Perceptron().double()

    def place(scale: float) -> None:
        _set_keras(model, _weights(scale))
        module.load_state_dict({name: torch.from_numpy(value) for name, value in _weights(scale).items()})

    def in_torch(batches: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        return [tuple(map(torch.from_numpy, batch)) for batch in batches]

    place(0.0)
    by_keras = KerasContinual(model, calibration="across", check=False)
    by_torch = TorchContinual(module, calibration="across", check=False)
    place(0.1)
    by_keras.remember(_data(1))
    by_torch.remember(in_torch(_data(1)))
    for task, scale in ((2, 0.2), (3, 0.5)):
        new = _data(task, 4)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        with (
            pytest.warns(UserWarning, match="have taken no step"),
            by_keras.stable(keras.optimizers.SGD(0.1)),
            by_torch.stable(optimizer),
        ):
            place(scale)
        with by_keras.plastic(), by_torch.plastic():
            place(scale + 0.2)
        reports = by_keras.merge(new), by_torch.merge(in_torch(new))
        assert reports[0].alpha == pytest.approx(reports[1].alpha, rel=1e-8)
        assert reports[0].slopes == pytest.approx(reports[1].slopes, rel=1e-8)
        files = tmp_path / "keras.safetensors", tmp_path / "torch.safetensors"
        by_keras.save(files[0])
        by_torch.save(files[1])
        by_torch = TorchContinual.load(module, files[0], check=False)
        by_keras = KerasContinual.load(model, files[1], check=False)
        by_keras.remember(new, share=0.1)
        by_torch.remember(in_torch(new), share=0.1)
        assert by_keras.posterior is not None
        assert by_torch.posterior is not None
        for name, value in by_torch.posterior.precision.diagonal().items():
            np.testing.assert_allclose(by_keras.posterior.precision.diagonal()[name], value, rtol=1e-8)


def test_both_remember_the_same_of_an_adams_second_moments() -> None:
    layers = [keras.layers.Dense(8, "tanh", name="first"), keras.layers.Dense(3, name="last")]
    model, module, data = keras.Sequential([keras.Input((6,)), *layers]), _Perceptron().double(), _data(1)
    _set_keras(model, _weights(0.0))
    module.load_state_dict({name: torch.from_numpy(value) for name, value in _weights(0.0).items()})
    settings = {"learning_rate": 1e-2, "beta_2": 0.9}
    of_keras = keras.optimizers.AdamW(**settings, weight_decay=0.0, epsilon=1e-8)
    of_torch = torch.optim.AdamW(module.parameters(), 1e-2, betas=(0.9, 0.9), weight_decay=0.0)
    model.compile(of_keras, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for x, y in data * 2:
        model.train_on_batch(x, y)
        of_torch.zero_grad()
        torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        of_torch.step()
    by_keras, by_torch = KerasContinual(model), TorchContinual(module)
    for learning, optimizer in ((by_keras, of_keras), (by_torch, of_torch)):
        with pytest.warns(UserWarning, match="unfit after clipping"):
            learning.remember(optimizer=optimizer, samples=8)
        assert learning.coverage.share("penalised") == 1
    assert by_keras.posterior is not None
    assert by_torch.posterior is not None
    for name, value in by_torch.posterior.precision.diagonal().items():
        np.testing.assert_allclose(by_keras.posterior.precision.diagonal()[name], value, rtol=1e-5)
        assert float(value.abs().max()) > 0


def test_both_take_the_same_steps_of_an_adam() -> None:
    """What is penalised is pulled back in the Adam's own metric, in compiled steps of Keras too."""
    layers = [keras.layers.Dense(8, "tanh", name="first"), keras.layers.Dense(3, name="last")]
    model, module, old, new = keras.Sequential([keras.Input((6,)), *layers]), _Perceptron().double(), _data(1), _data(2)
    _set_keras(model, _weights(0.0))
    module.load_state_dict({name: torch.from_numpy(value) for name, value in _weights(0.0).items()})
    by_keras, by_torch = KerasContinual(model, check=False), TorchContinual(module, check=False)
    by_keras.remember(old)
    by_torch.remember([tuple(map(torch.from_numpy, batch)) for batch in old])
    of_torch = torch.optim.Adam(module.parameters(), 0.05, betas=(0.9, 0.99))
    of_keras = keras.optimizers.Adam(0.05, beta_2=0.99, epsilon=1e-8)
    model.compile(of_keras, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with by_keras.stable(), by_torch.stable(of_torch):
        for x, y in new * 2:
            model.train_on_batch(x, y)
            of_torch.zero_grad()
            torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            of_torch.step()
    # Keras keeps the learning rate and its powers of beta in single precision.
    for layer in ("first", "last"):
        kernel, bias = model.get_layer(layer).get_weights()
        np.testing.assert_allclose(kernel.T, getattr(module, layer).weight.detach(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(bias, getattr(module, layer).bias.detach(), rtol=1e-4, atol=1e-6)


def test_both_protect_the_same_rows_of_an_embedding() -> None:
    layers = [keras.layers.Embedding(9, 2, name="words"), keras.layers.Flatten(), keras.layers.Dense(3, name="last")]
    model, module = keras.Sequential([keras.Input((4,), dtype="int32"), *layers]), _Words().double()
    rng, old = np.random.default_rng(3), np.array([[1, 2, 1, 5], [5, 1, 7, 1]])
    words, last, bias = rng.normal(size=(9, 2)), rng.normal(size=(3, 8)), rng.normal(size=3)
    model.get_layer("words").set_weights([words])
    model.get_layer("last").set_weights([last.T, bias])
    module.load_state_dict(
        {
            "words.weight": torch.from_numpy(words),
            "last.weight": torch.from_numpy(last),
            "last.bias": torch.from_numpy(bias),
        }
    )
    by_keras, by_torch = (
        kind(net, projector=GPM(0.7)) for kind, net in ((KerasContinual, model), (TorchContinual, module))
    )
    by_keras.remember([(old.astype(np.int32), np.array([0, 2]))])
    by_torch.remember([(torch.from_numpy(old), torch.tensor([0, 2]))])
    assert str(by_keras.coverage) == str(by_torch.coverage)
    assert by_torch.projector.rank["words.weight"] == (2, 9)
    update = {"words.weight": np.ones((2, 9))}
    found = by_keras.projector.project({n: tf.constant(v) for n, v in update.items()})["words.weight"]
    np.testing.assert_array_equal(found, [[1, 0, 1, 1, 1, 0, 1, 1, 1]] * 2)
    optimizer = keras.optimizers.SGD(0.5)
    with by_keras.stable(optimizer):
        optimizer.apply([tf.ones((9, 2), "float64")], [model.get_layer("words").embeddings])
    moved = (model.get_layer("words").embeddings.numpy() != words).any(1)
    assert moved.tolist() == [True, False, True, True, True, False, True, True, True]
