"""Users' functions of parameters and inputs: what makes each stands by its name in ``NETWORKS``.

Inputs are [2, 6]; parameters are drawn in NumPy, since JAX would compile the drawing of each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from flax import linen as nn
from flax import nnx, struct
from jax import lax
from jax import numpy as jnp
from jax.experimental import sparse

from tests.jax.drawn import drawn, of_equinox, of_linen, of_nnx

WIDTH, HIDDEN, CLASSES = 6, 4, 3
INPUTS = np.random.default_rng(1).normal(size=(2, WIDTH)) * np.array([[1.0], [-1.0]])
TARGETS = np.array([2, 0])


FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


DOUBLE = {"param_dtype": jnp.float64}


# A function and its parameters; inputs, if they are others than usual; and targets.
Case = tuple[Any, ...]


def weights() -> Any:
    return {"w": drawn(WIDTH, HIDDEN), "v": drawn(HIDDEN, CLASSES)}


def steps(inputs: Any) -> Any:
    return inputs.reshape(len(inputs), 3, 2)


def mean_of(outputs: Any) -> Any:
    return outputs.reshape(len(outputs), -1, CLASSES).mean(1)


# Of the three libraries.


def module_of_linen(module: Any, of_steps: bool = False) -> Case:
    """A module; what is no parameter is part of the function."""

    def given(inputs: Any) -> Any:
        return steps(inputs) if of_steps else inputs

    variables = of_linen(module, given(INPUTS))
    params = variables.pop("params")
    return lambda params, x: mean_of(module.apply({"params": params, **variables}, given(x))), params


class Block(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """A block of a residual network, which a scan repeats."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, hidden: Any, _: Any) -> Any:
        return hidden + nn.Dense(WIDTH, **FLOAT64)(jnp.tanh(nn.LayerNorm(**FLOAT64)(hidden))), None


class Residual(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """A stem that is frozen, batch norms with their own statistics, and a way around a block."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, images: Any) -> Any:
        images = lax.stop_gradient(nn.Conv(HIDDEN, (2,), name="stem", **FLOAT64)(images))
        hidden = nn.relu(nn.BatchNorm(use_running_average=True, **FLOAT64)(images))
        return nn.Dense(CLASSES, **FLOAT64)(images + nn.Conv(HIDDEN, (1,), **FLOAT64)(hidden))


class Spectral(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """A norm of weights with a state of its own."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, inputs: Any) -> Any:
        return nn.SpectralNorm(nn.Dense(CLASSES, **FLOAT64))(inputs, update_stats=False)


def blocks() -> Case:
    scan = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    return lambda p, x: scan.apply(p, x, None)[0][:, :CLASSES], of_linen(scan, INPUTS, None)


def of_unequal_lengths() -> Case:
    cells = nn.RNN(nn.LSTMCell(CLASSES, **FLOAT64))
    params = of_linen(cells, steps(INPUTS))
    return lambda p, x: cells.apply(p, steps(x), seq_lengths=1 + (x[:, 0] > 0)).mean(1), params


class Nnx(nnx.Module):  # type: ignore[misc] # flax is taken as untyped
    """Statistics, and dropout that is off."""

    def __init__(self, **dropout: Any) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(WIDTH, HIDDEN, **DOUBLE, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, use_running_average=True, **FLOAT64, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs, **dropout)
        self.last = nnx.Linear(HIDDEN, CLASSES, **DOUBLE, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(inputs)))))


def scanned_by_nnx() -> Case:
    make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, **DOUBLE, rngs=rngs)))

    def run(layers: Any, inputs: Any) -> Any:
        one = nnx.scan(lambda hidden, layer: jnp.tanh(layer(hidden)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return one(inputs, layers)[:, :CLASSES]

    return of_nnx(lambda: make(nnx.Rngs(0)), run=run)


class Recurrent(eqx.Module):  # type: ignore[misc] # equinox is taken as untyped
    """A cell in a loop over time, whose size is no leaf."""

    cell: Any
    last: Any
    size: int = eqx.field(static=True)

    def __init__(self) -> None:
        key = jax.random.key(0)
        self.cell, self.last = eqx.nn.GRUCell(2, HIDDEN, key=key), eqx.nn.Linear(HIDDEN, CLASSES, key=key)
        self.size = HIDDEN

    def __call__(self, inputs: Any) -> Any:
        hidden, _ = lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(self.size), inputs.reshape(3, 2))
        return self.last(hidden)


class SharedWords(eqx.Module):  # type: ignore[misc] # equinox is taken as untyped
    """Words whose table is that of the outputs, too."""

    shared: Any

    def __init__(self) -> None:
        words = eqx.nn.Embedding(CLASSES, HIDDEN, key=jax.random.key(0))
        last = eqx.nn.Linear(HIDDEN, CLASSES, use_bias=False, key=jax.random.key(0))
        self.shared = eqx.nn.Shared((words, last), lambda both: both[1].weight, lambda both: both[0].weight)

    def __call__(self, inputs: Any) -> Any:
        words, last = self.shared()
        return last(jnp.tanh(words((inputs[0] > 0).astype(int))))


# Functions.


class Pair(NamedTuple):
    """A node whose children have names."""

    matrix: Any
    scales: Any


@struct.dataclass
class Held:
    """A node with something that is no leaf."""

    kernel: Any
    power: int = struct.field(pytree_node=False, default=2)


def nested() -> Case:
    """Nodes of every kind, scalars, an array without entries, one that is not used, and a number of Python's."""
    params = (
        Pair({"a": [None, drawn(WIDTH, HIDDEN)], "empty": {}}, (np.array(1.3), 0.7)),
        Held(drawn(HIDDEN, CLASSES)),  # type: ignore[call-arg] # flax is taken as untyped
        {10: drawn(CLASSES), 9: drawn(CLASSES, seed=1)},
        {"unused": drawn(3), "without": np.zeros((0, CLASSES))},
    )

    def apply(params: Any, inputs: Any) -> Any:
        pair, held, biases, rest = params
        hidden = jnp.tanh(inputs @ pair.matrix["a"][1]) * pair.scales[0]
        outputs = hidden**held.power @ held.kernel * pair.scales[1]
        return outputs + biases[10] - 2 * biases[9] + inputs[:, :0] @ rest["without"]

    return apply, params


def routed(p: Any, x: Any) -> Any:
    """Each sample goes through one of two branches."""
    shares = jax.nn.softmax(x @ p["r"])
    return shares.max() * lax.switch(shares.argmax(), [lambda x, e=e: x @ e for e in p["experts"]], x)


def equilibrium(p: Any, x: Any) -> Any:
    """What a layer leaves as it is, whose derivative is that of the implicit function."""

    def solve(function: Any, guess: Any) -> Any:
        return lax.fori_loop(0, 40, lambda _, hidden: hidden - function(hidden), guess)

    def solve_linear(function: Any, right: Any) -> Any:
        return jnp.linalg.solve(jax.jacobian(function)(right), right)

    hidden = lax.custom_root(lambda h: h - jnp.tanh(0.3 * h @ p["u"] + x), x, solve, solve_linear)
    return hidden @ p["w"] @ p["v"]


@jax.custom_vjp  # type: ignore[untyped-decorator] # JAX is taken as untyped
def doubled(weight: Any, inputs: Any, table: Any) -> Any:
    """What a backward pass multiplies with a constant's entries, one after the other."""
    del table
    return jnp.tanh(inputs @ weight)


def _doubled_back(kept: Any, gradient: Any) -> Any:
    (weight, inputs, table), outputs = kept
    gradient = lax.fori_loop(0, 2, lambda at, g: g * table[at], gradient * (1 - outputs**2))
    return inputs.T @ gradient, gradient @ weight.T, jnp.zeros(2)


doubled.defvjp(lambda *given: (doubled(*given), (given, doubled(*given))), _doubled_back)


def attended(p: Any, x: Any) -> Any:
    """A product whose parts are queries, keys and values."""
    query, key, value = jnp.split((steps(x) @ p["w"])[:, :, None], 3, -1)
    return jax.nn.dot_product_attention(query, key, value, is_causal=True).mean((1, 2))


def recurrence(p: Any, x: Any) -> Any:
    rates = jnp.broadcast_to(jax.nn.sigmoid(p["a"]), (len(x), 3, 2))
    states = lax.associative_scan(lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (rates, steps(x)), axis=1)[1]
    return states[:, -1] @ p["w"]


def dropped(p: Any, x: Any) -> Any:
    """Dropout by a key for each sample, which are among the inputs."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (HIDDEN,)))(x["keys"])
    return jnp.where(kept, jnp.tanh(x["x"] @ p["w"]), 0) @ p["v"]


def tokens(p: Any, keys: Any) -> Any:
    return jnp.tanh(p["words"][keys]) @ p["words"].T


def within(p: Any, x: Any) -> Any:
    """Functions that are compiled and checkpointed, within others."""
    inner = jax.jit(lambda w, x, turns: jnp.tanh(x @ w) if turns else x, static_argnums=2)
    saved = jax.checkpoint(lambda w, h: h @ w, policy=jax.checkpoint_policies.dots_saveable)
    return jax.jit(lambda w: saved(p["v"], inner(w, x, True)))(p["w"])


def looked_up(p: Any, x: Any) -> Any:
    """Slices at places that samples say, of rows and of columns, and a product with rows that are one-hot."""
    place = (x[:, 0] > 0).astype(int)
    rows = jax.vmap(lambda at: lax.dynamic_slice_in_dim(p["t"], at, 2, 0).sum(0))(place)
    return (rows + p["u"][:, place].T) @ p["v"] + jax.nn.one_hot(place, WIDTH) @ p["w"][:, :CLASSES]


NETWORKS: dict[str, Callable[[], Case]] = {
    # flax.linen
    "unequal lengths through an LSTM": of_unequal_lengths,
    "kernels of three axes": lambda: module_of_linen(
        nn.Sequential([nn.DenseGeneral((2, 2), **FLOAT64), jnp.tanh, nn.DenseGeneral(3, axis=(1, 2), **FLOAT64)])
    ),
    "blocks by a scan, checkpointed": blocks,
    "a frozen stem, and batch norm": lambda: module_of_linen(Residual(), of_steps=True),
    "spectral norm": lambda: module_of_linen(Spectral()),
    "a kernel for each place": lambda: module_of_linen(nn.ConvLocal(CLASSES, (2,), **FLOAT64), of_steps=True),
    "a convolution in a circle": lambda: module_of_linen(
        nn.Conv(CLASSES, (2,), padding="CIRCULAR", **FLOAT64), of_steps=True
    ),
    # flax.nnx
    "nnx with statistics and dropout": lambda: of_nnx(lambda: Nnx(deterministic=True)),
    "a module of nnx itself": lambda: (
        lambda module, x: module(x),
        nnx.Linear(WIDTH, CLASSES, **DOUBLE, rngs=nnx.Rngs(0)),
    ),
    "LoRA on a layer of nnx": lambda: of_nnx(
        lambda: nnx.LoRALinear(WIDTH, CLASSES, lora_rank=2, **DOUBLE, lora_param_dtype=float, rngs=nnx.Rngs(0)),
        nnx.LoRAParam,
    ),
    "layers by a scan of nnx": scanned_by_nnx,
    # equinox
    "a cell of equinox in a scan": lambda: of_equinox(Recurrent),
    "words that equinox shares": lambda: of_equinox(SharedWords),
    # Trees, and ways to use a parameter.
    "a tree of nodes of every kind": nested,
    "two inputs, and one that all share": lambda: (
        lambda p, x: (jnp.tanh(x[0] @ p["w"]) * (x[1]["more"] @ p["w"]) * x[2]) @ p["v"],
        weights(),
        (INPUTS, {"more": INPUTS[::-1].copy()}, np.ones(HIDDEN) / 2, None),
    ),
    "one matrix in two ways": lambda: (
        lambda p, x: x @ p["w"] + p["w"][0] * p["w"].sum(),
        {"w": drawn(WIDTH, CLASSES)},
    ),
    "halves of one matrix": lambda: (
        lambda p, x: jnp.tanh(x @ p["w"][:, :HIDDEN]) @ p["w"][:HIDDEN, HIDDEN:],
        {"w": drawn(WIDTH, HIDDEN + CLASSES)},
    ),
    "one matrix of queries, keys and values": lambda: (attended, {"w": drawn(2, 3 * CLASSES)}),
    "a product of three": lambda: (
        lambda p, x: jnp.einsum("ni,ijk,nj->nk", x, p["w"], x),
        {"w": drawn(WIDTH, WIDTH, CLASSES)},
    ),
    "weights that inputs make": lambda: (
        lambda p, x: jnp.einsum("ni,nik->nk", x, (jnp.tanh(x) @ p["w"]).reshape(-1, WIDTH, CLASSES)),
        {"w": drawn(WIDTH, WIDTH * CLASSES)},
    ),
    "LoRA, and weights that are rounded": lambda: (
        lambda p, x: (
            x @ (lax.stop_gradient(p["w"]) + p["a"] @ (p["b"] + lax.stop_gradient(jnp.round(p["b"]) - p["b"])))
        ),
        {"w": drawn(WIDTH, CLASSES), "a": drawn(WIDTH, 2), "b": drawn(2, CLASSES)},
    ),
    "weights that are cut to integers": lambda: (
        lambda p, x: x @ (4 * p["w"]).astype(int).astype(float) @ p["v"] + x @ p["u"].astype(int).astype(float),
        weights() | {"u": 3 * drawn(WIDTH, CLASSES)},
    ),
    "orthogonal weights": lambda: (lambda p, x: x @ jnp.linalg.qr(p["w"])[0], {"w": drawn(WIDTH, CLASSES)}),
    "sparse weights": lambda: (
        lambda p, x: x @ p["w"],
        {"w": sparse.BCOO((drawn(7), np.stack([np.arange(7) % 6, np.arange(7) % 3], 1)), shape=(WIDTH, CLASSES))},
    ),
    "words by the token": lambda: (
        tokens,
        {"words": drawn(WIDTH, HIDDEN)},
        np.array([[1, 2, 3], [0, 5, 5]]),
        np.array([[2, 3, 4], [5, 5, 1]]),
    ),
    "slices that samples choose": lambda: (looked_up, weights() | {"t": drawn(3, HIDDEN), "u": drawn(HIDDEN, 2)}),
    # Ways to compute.
    "an ensemble side by side": lambda: (
        lambda p, x: jax.vmap(lambda p: jnp.tanh(x @ p["w"]) @ p["v"])(p).mean(0),
        {"w": drawn(2, WIDTH, HIDDEN), "v": drawn(2, HIDDEN, CLASSES)},
    ),
    "experts by a switch": lambda: (
        lambda p, x: jax.vmap(routed, (None, 0))(p, x),
        {"r": drawn(WIDTH, 2), "experts": [drawn(WIDTH, CLASSES, seed=seed) for seed in (1, 2)]},
    ),
    "experts by a ragged product": lambda: (
        lambda p, x: lax.ragged_dot(x, p["experts"], jnp.array([0, len(x)])),
        {"experts": drawn(2, WIDTH, CLASSES)},
    ),
    "a loop": lambda: (
        lambda p, x: lax.fori_loop(0, 3, lambda _, hidden: jnp.tanh(hidden @ p["w"]), x)[:, :CLASSES],
        {"w": drawn(WIDTH, WIDTH)},
    ),
    "a linear recurrence": lambda: (recurrence, {"a": drawn(2), "w": drawn(2, CLASSES)}),
    "an equilibrium": lambda: (
        lambda p, x: jax.vmap(equilibrium, (None, 0))(p, x),
        weights() | {"u": drawn(WIDTH, WIDTH)},
    ),
    "a backward pass of the user's own": lambda: (
        lambda p, x: doubled(p["w"], x, jnp.array([1.0, 2.0])) @ p["v"],
        weights(),
    ),
    "a gradient of a gradient": lambda: (
        lambda p, x: jax.vmap(jax.grad(lambda x: (jnp.tanh(x @ p["w"]) @ p["v"]).sum()))(x)[:, :CLASSES],
        weights(),
    ),
    "a spectrum": lambda: (
        lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x) * lax.complex(p["re"], p["im"])) @ p["w"],
        {"re": drawn(4), "im": drawn(4, seed=1), "w": drawn(WIDTH, CLASSES)},
    ),
    "complex products": lambda: (lambda p, x: jnp.abs(jnp.exp(1j * x) @ p["w"]), {"w": drawn(WIDTH, CLASSES)}),
    "functions within functions": lambda: (within, weights()),
    "keys among the inputs": lambda: (
        dropped,
        weights(),
        {"x": INPUTS, "keys": jax.random.split(jax.random.key(0), 2)},
    ),
    "inputs that are changed in part": lambda: (
        lambda p, x: jnp.tanh(x.at[:, 0].set(1.0) @ p["w"]) @ p["v"],
        weights(),
    ),
    "an empty parameter": lambda: (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"] + p["none"].sum(),
        weights() | {"none": jnp.zeros((0, 4))},
    ),
}
