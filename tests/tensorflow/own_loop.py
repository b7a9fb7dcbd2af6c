"""Networks, data and training that tests of ``Continual`` around Keras models share."""

from typing import Any

import keras
import numpy as np

__all__ = ["CHANGED", "CLASSES", "Batches", "L", "TwoHeads", "compiled", "fit", "new_data", "perceptron", "row"]

L = keras.layers
CLASSES = 3
Batches = list[tuple[Any, Any]]
CHANGED = r"changed in stable training by something else than the steps of the optimizers that stable\(\) was given"


def row(shape: tuple[int, ...], *layers: Any, dtype: str | None = None) -> keras.Model:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers, L.Flatten(), L.Dense(CLASSES)])


class TwoHeads(keras.Model):  # type: ignore[misc] # Keras is taken as untyped
    """A model that has the head of one task at a time, which is built when it is first called."""

    def __init__(self, *ends: str | None) -> None:
        """Begin with the first task.

        Args:
            ends: what each head makes of its logits; nothing if not given.
        """
        super().__init__()
        self.body = L.Dense(5, "tanh", name="body")
        self.heads = [L.Dense(CLASSES, end, name=f"head{task}") for task, end in enumerate(ends or (None, None))]
        self.task = 0

    def build(self, shape: Any) -> None:
        """Build what the first call uses."""
        self.body.build(shape)
        self.heads[self.task].build((None, 5))

    def call(self, inputs: Any) -> Any:
        """Return what the present task's head makes of the body's outputs."""
        return self.heads[self.task](self.body(inputs))


def perceptron(end: str | None = None) -> keras.Model:
    layers = [L.Dense(8, activation="tanh", name="first"), L.GaussianNoise(0.1), L.Dense(CLASSES, end, name="last")]
    return keras.Sequential([keras.Input((6,)), *layers])


def new_data(seed: int, batches: int, size: int = 4) -> Batches:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, 6)), rng.integers(0, CLASSES, size=size)) for _ in range(batches)]


def fit(model: keras.Model, batches: Batches, epochs: int) -> None:
    inputs, targets = (np.concatenate(side) for side in zip(*batches, strict=True))
    model.fit(inputs, targets, batch_size=4, epochs=epochs, verbose=0)


def compiled(model: keras.Model, optimizer: Any = None) -> keras.Model:
    model.compile(optimizer or keras.optimizers.SGD(0.3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
