"""Networks, data and a loop of training that tests of own loops in JAX share, in float64.

JAX compiles every operation for every shape, which is most of what a test costs: so all networks have matrices of 6 x 8
and 8 x 3, all batches have four samples, and what several tests need is made once.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

from adapters.jax.memory import Memory, remember
from became_core.arrays import named_leaves

__all__ = [
    "CLASSES",
    "HIDDEN",
    "NETWORKS",
    "WIDTH",
    "Batches",
    "cross_entropy",
    "new_data",
    "new_weights",
    "perceptron",
    "remembered",
    "sample_gradients",
    "train",
]

WIDTH, HIDDEN, CLASSES = 6, 8, 3
Batches = list[tuple[Any, Any]]


def new_data(seed: int, batches: int = 2, size: int = 4) -> Batches:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(size, WIDTH)), rng.integers(0, CLASSES, size=size)) for _ in range(batches)]


def perceptron(params: Any, inputs: Any) -> Any:
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["weight"].T + params["last"]["bias"]


def new_weights(seed: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    kernel, bias, weight = (
        jnp.asarray(rng.normal(size=shape) / 3) for shape in ((WIDTH, HIDDEN), (HIDDEN,), (CLASSES, HIDDEN))
    )
    return {"first": {"kernel": kernel, "bias": bias}, "last": {"weight": weight, "bias": jnp.zeros(CLASSES)}}


@cache
def remembered() -> Memory:
    """What a perceptron remembers of the first data."""
    return remember(perceptron, new_weights(), new_data(1), check=False)


def convolution(params: Any, inputs: Any) -> Any:
    """A kernel [width, in, out], whose first two axes are the inputs', and a scale that no projector protects."""
    images = inputs.reshape(-1, 2, 3)
    hidden = lax.conv_general_dilated(images, params["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.tanh(hidden * params["scale"]).reshape(len(inputs), -1) @ params["kernel"]


def new_kernels() -> Any:
    rng = np.random.default_rng(5)
    shapes = {"conv": (2, 3, 4), "scale": (4,), "kernel": (HIDDEN, CLASSES)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


NETWORKS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "perceptron": lambda: (perceptron, new_weights()),
    "convolution": lambda: (convolution, new_kernels()),
}


@jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
def cross_entropy(outputs: Any, targets: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def train(apply: Any, params: Any, batches: Batches, optimizer: Any, epochs: int = 3) -> Any:
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, inputs: Any, targets: Any) -> Any:
        gradients = jax.grad(lambda params: cross_entropy(apply(params, inputs), targets))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(np.array, params)  # a copy, which may be given away
    state = jax.jit(optimizer.init)(params)
    for inputs, targets in batches * epochs:
        params, state = step(params, state, inputs, targets)
    return params


@cache
def _of_samples(loss: Any, apply: Any) -> Any:
    def of_sample(params: Any, x: Any, y: Any) -> Any:
        return loss(apply(params, x[None]), y[None])

    return jax.jit(jax.vmap(jax.grad(of_sample), (None, 0, 0)))


def sample_gradients(loss: Any, apply: Any, params: Any, batches: Batches) -> Any:
    """The gradients of single samples' losses by parameter, [samples, ...]."""
    inputs, targets = (np.concatenate(side) for side in zip(*batches, strict=True))
    gradients = _of_samples(loss, apply)(params, inputs, targets)
    return {name: np.asarray(value) for name, value in named_leaves(gradients).items()}
