"""Plain training loops, without this project: the AlexNet-like network in each framework.

Each function copies normalised images to a device once and returns a ``Plain``. They use what their framework offers:
its modules, its optimiser, its dropout, and one compiled step where there is a compiler.

Convention: float32; inputs [N, C, H, W] for PyTorch and [N, H, W, C] for the others; batch norm with batch statistics.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PLAIN", "Plain"]

Rows = Sequence[NDArray[np.int64]]
CONVOLUTIONS = ((64, 4, 0.2), (128, 3, 0.2), (256, 2, 0.5))  # filters, kernel, dropout
WIDTHS = (2048, 2048)
RATE = 0.01


class Plain(NamedTuple):
    """A plain loop.

    Attributes:
        train: takes an SGD step on each batch of rows and waits until the last one is done.
        evaluate: returns the share of rows that are classified correctly, batch by batch.
    """

    train: Callable[[Rows], None]
    evaluate: Callable[[Rows], float]


def torch_loop(
    images: NDArray[np.float32],
    targets: NDArray[np.int64],
    classes: int,
    device: str,
    *,
    compiled: bool = False,
    distributed: bool = False,
) -> Plain:
    """Return the loop of a sequential module, in the memory format in which it is fastest.

    The module is eager, compiled, or wrapped by ``DistributedDataParallel``; each process then gives its own rows.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    layers: list[nn.Module] = []
    channels, side = images.shape[1], images.shape[2]
    for filters, kernel, p in CONVOLUTIONS:
        norm = nn.BatchNorm2d(filters, track_running_stats=False)
        layers += [nn.Conv2d(channels, filters, kernel, bias=False), norm, nn.ReLU(), nn.Dropout(p), nn.MaxPool2d(2)]
        channels, side = filters, (side - kernel + 1) // 2
    layers.append(nn.Flatten())
    width = channels * side * side
    for units in WIDTHS:
        norm1 = nn.BatchNorm1d(units, track_running_stats=False)
        layers += [nn.Linear(width, units, bias=False), norm1, nn.ReLU(), nn.Dropout(0.5)]
        width = units
    network = nn.Sequential(*layers, nn.Linear(width, classes, bias=False))
    there = torch.device("cpu" if device == "cpu" else "cuda")
    network.to(there)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # PyTorch's own types lack it
    optimiser = torch.optim.SGD(network.parameters(), lr=RATE)
    forward: nn.Module | Any = torch.compile(network, mode="reduce-overhead") if compiled else network
    if distributed:
        forward = nn.parallel.DistributedDataParallel(network)
    x = torch.from_numpy(images).to(there).contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(targets).to(there)

    def on_device(rows: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(rows).to(there)

    def train(batches: Rows) -> None:
        network.train()
        for rows in map(on_device, batches):
            optimiser.zero_grad()
            functional.cross_entropy(forward(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        if there.type == "cuda":
            torch.cuda.synchronize()

    def evaluate(batches: Rows) -> float:
        network.eval()
        with torch.no_grad():
            correct = [(network(x[rows]).argmax(1) == y[rows]).sum() for rows in map(on_device, batches)]
        return float(sum(correct)) / sum(map(len, batches))

    return Plain(train, evaluate)


def jax_loop(images: NDArray[np.float32], targets: NDArray[np.int64], classes: int, device: str) -> Plain:
    """Return the loop of a flax module with optax: one compiled step, to which the old state's buffers are donated."""
    import jax
    import optax
    from jax import numpy as jnp

    network, optimiser = _flax_network(classes), optax.sgd(RATE)
    there = jax.devices("cpu" if device == "cpu" else "cuda")[0]
    x, y = jax.device_put((np.moveaxis(images, 1, -1), targets), there)
    variables = network.init(jax.random.key(0), x[:2], training=False)
    statistics = variables["batch_stats"]  # flax needs running statistics; nothing here reads them
    params = variables["params"]
    state = {"params": params, "optimiser": optimiser.init(params), "key": jax.random.key(1)}

    def step(state: dict[str, Any], rows: Any) -> dict[str, Any]:
        key, dropout_key = jax.random.split(state["key"])

        def loss(params: Any) -> Any:
            inputs, rngs = {"params": params, "batch_stats": statistics}, {"dropout": dropout_key}
            logits, _ = network.apply(inputs, x[rows], training=True, rngs=rngs, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        updates, after = optimiser.update(jax.grad(loss)(state["params"]), state["optimiser"])
        return {"params": optax.apply_updates(state["params"], updates), "optimiser": after, "key": key}

    def count_correct(params: Any, rows: Any) -> Any:
        inputs = {"params": params, "batch_stats": statistics}
        logits, _ = network.apply(inputs, x[rows], training=False, mutable=["batch_stats"])
        return jnp.sum(logits.argmax(1) == y[rows])

    compiled_step: Any = jax.jit(step, donate_argnums=0)
    compiled_count: Any = jax.jit(count_correct)

    def train(batches: Rows) -> None:
        for rows in batches:
            state.update(compiled_step(dict(state), rows))
        jax.block_until_ready(state["params"])

    def evaluate(batches: Rows) -> float:
        return float(sum(compiled_count(state["params"], rows) for rows in batches)) / sum(map(len, batches))

    return Plain(train, evaluate)


def _flax_network(classes: int) -> Any:
    from flax import linen as nn

    class Network(nn.Module):  # type: ignore[misc] # flax is taken as untyped
        @nn.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: Any, training: bool) -> Any:
            def regular(x: Any, p: float) -> Any:
                norm = nn.BatchNorm(use_running_average=False, use_fast_variance=True)
                return nn.Dropout(p, deterministic=not training)(nn.relu(norm(x)))

            for filters, kernel, p in CONVOLUTIONS:
                x = regular(nn.Conv(filters, (kernel, kernel), padding="VALID", use_bias=False)(x), p)
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = x.reshape(len(x), -1)
            for units in WIDTHS:
                x = regular(nn.Dense(units, use_bias=False)(x), 0.5)
            return nn.Dense(classes, use_bias=False)(x)

    return Network()


def tensorflow_loop(images: NDArray[np.float32], targets: NDArray[np.int64], classes: int, device: str) -> Plain:
    """Return the loop of a Keras model with a gradient tape in one ``tf.function``."""
    import keras
    import tensorflow as tf

    class ByBatch(keras.layers.BatchNormalization):  # type: ignore[misc]
        """Batch norm by the batch's statistics in evaluation too, as the other loops have it."""

        def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
            return super().call(inputs, training=True, mask=mask)

    layers: list[Any] = [keras.Input((*images.shape[2:], images.shape[1]))]
    for filters, kernel, p in CONVOLUTIONS:
        layers += [keras.layers.Conv2D(filters, kernel, use_bias=False), ByBatch()]
        layers += [keras.layers.ReLU(), keras.layers.Dropout(p), keras.layers.MaxPooling2D()]
    layers.append(keras.layers.Flatten())
    for units in WIDTHS:
        layers += [keras.layers.Dense(units, use_bias=False), ByBatch()]
        layers += [keras.layers.ReLU(), keras.layers.Dropout(0.5)]
    network = keras.Sequential([*layers, keras.layers.Dense(classes, use_bias=False)])
    optimiser = keras.optimizers.SGD(RATE)
    with tf.device("CPU:0" if device == "cpu" else "GPU:0"):
        x, y = tf.constant(np.moveaxis(images, 1, -1)), tf.constant(targets)

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
    def step(rows: Any) -> None:
        with tf.GradientTape() as tape:
            logits = network(tf.gather(x, rows), training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather(y, rows), logits))
        optimiser.apply_gradients(
            zip(tape.gradient(loss, network.trainable_variables), network.trainable_variables, strict=True)
        )

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
    def count_correct(rows: Any) -> Any:
        return tf.reduce_sum(
            tf.cast(tf.argmax(network(tf.gather(x, rows), training=False), 1) == tf.gather(y, rows), tf.int32)
        )

    def train(batches: Rows) -> None:
        for rows in batches:
            step(tf.constant(rows))
        network.trainable_variables[-1].numpy()

    def evaluate(batches: Rows) -> float:
        return float(sum(int(count_correct(tf.constant(rows))) for rows in batches)) / sum(map(len, batches))

    return Plain(train, evaluate)


# By framework. The arguments are images [N, C, H, W], targets [N], the number of classes, and "cpu" or "gpu".
PLAIN: dict[str, Callable[[NDArray[np.float32], NDArray[np.int64], int, str], Plain]] = {
    "torch": torch_loop,
    "jax": jax_loop,
    "tensorflow": tensorflow_loop,
}
