"""Taps by operation against ``vmap(grad)``, for functions of every kind; all in double precision, on three samples."""

import doctest
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax import numpy as jnp

from adapters.jax import tapping
from adapters.jax.tapping import TappedFunction, trained_of
from adapters.jax.trees import leaves_of
from became_core import BecameError
from became_core.curvature import per_sample_gradients, per_sample_square_sum
from tests.jax.drawn import drawn, of_equinox, of_linen, of_nnx

INPUTS = np.random.default_rng(0).normal(size=(3, 5, 4))
KEYS = np.array([[1, 2, 2], [0, 6, 1], [3, 3, 3]])

Case = tuple[Callable[[Any, Any], Any], Any, Any]


def _of_linen(module: Any) -> Case:
    return module.apply, of_linen(module, INPUTS), INPUTS


class _Normed(nnx.Module):  # type: ignore[misc] # flax is taken as untyped
    """A layer of nnx and a norm."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.LayerNorm(3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, inputs: Any) -> Any:
        return self.norm(self.first(inputs))


def _attention() -> Any:
    return nnx.MultiHeadAttention(2, 4, 4, decode=False, deterministic=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0))


class _Words(eqx.Module):  # type: ignore[misc] # equinox is taken as untyped
    """A module for one sample, which looks up one word at a time."""

    words: Any
    last: Any

    def __init__(self) -> None:
        one, two = jax.random.split(jax.random.key(0))
        self.words, self.last = eqx.nn.Embedding(7, 4, key=one), eqx.nn.Linear(4, 3, key=two)

    def __call__(self, keys: Any) -> Any:
        return self.last(jnp.tanh(jax.vmap(self.words)(keys)).mean(0))


class _Convolved(eqx.Module):  # type: ignore[misc] # equinox is taken as untyped
    """A module with a static field, and a function among its leaves."""

    conv: Any
    norm: Any
    last: Any
    activation: Any
    height: int = eqx.field(static=True)

    def __init__(self) -> None:
        one, two = jax.random.split(jax.random.key(0))
        self.conv, self.norm = eqx.nn.Conv2d(1, 4, 2, key=one), eqx.nn.GroupNorm(2, 4)
        self.last, self.activation, self.height = eqx.nn.Linear(48, 3, key=two), jax.nn.gelu, 5

    def __call__(self, inputs: Any) -> Any:
        images = inputs.reshape(1, self.height, -1)
        return self.last(self.activation(self.norm(self.conv(images))).ravel())


class _Attending(eqx.Module):  # type: ignore[misc] # equinox is taken as untyped
    """Attention from rows to rows, a norm, and a row for each place."""

    attention: Any
    norm: Any
    places: Any
    dropout: Any

    def __init__(self) -> None:
        self.attention = eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=jax.random.key(0))
        self.norm, self.places = eqx.nn.LayerNorm(4), jnp.full((5, 4), 0.1)
        self.dropout = eqx.nn.Dropout(0.5, inference=True)

    def __call__(self, inputs: Any) -> Any:
        rows = jax.vmap(self.norm)(inputs + self.places)
        return self.dropout(rows + self.attention(rows, rows, rows))


class _Scanned(nn.Module):  # type: ignore[misc] # flax is taken as untyped
    """Two layers whose weights lie in one array each, one after the other."""

    @nn.compact  # type: ignore[untyped-decorator]
    def __call__(self, inputs: Any) -> Any:
        def one(layer: Any, hidden: Any, _: Any) -> tuple[Any, None]:
            return jnp.tanh(layer(hidden)), None

        scan = nn.scan(one, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(nn.Dense(4, **FLOAT64), inputs, None)[0]


def _routed(params: Any, inputs: Any) -> Any:
    """Each sample is seen by the expert that its router prefers."""
    mean = inputs.mean(1)
    shares = jax.nn.softmax(mean @ params["router"])
    best = shares.argmax(1)
    return jnp.einsum("nd,ndk->nk", mean, params["experts"][best]) * shares.max(1, keepdims=True)


def _tied(params: Any, keys: Any) -> Any:
    return jnp.tanh(params["table"][keys]).mean(1) @ params["table"].T


def _shared(params: Any, inputs: Any) -> Any:
    return jnp.tanh(inputs @ params["w"].T) @ params["w"].T


@jax.custom_jvp  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _doubled(weight: Any, inputs: Any) -> Any:
    return inputs @ weight


_doubled.defjvp(
    lambda primals, tangents: (_doubled(*primals), 2 * (primals[1] @ tangents[0]) + tangents[1] @ primals[0])
)

FLOAT64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}
CASES: dict[str, Callable[[], Case]] = {
    "dense": lambda: _of_linen(nn.Dense(3, **FLOAT64)),
    "convolution with a stride": lambda: _of_linen(nn.Conv(6, (3,), strides=2, **FLOAT64)),
    "convolution in groups": lambda: _of_linen(nn.Conv(6, (3,), feature_group_count=2, **FLOAT64)),
    "dilated convolution, output first": lambda: (
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), [(1, 0)], rhs_dilation=(2,), dimension_numbers=("NWC", "OIW", "NWC"), feature_group_count=2
        ),
        drawn(6, 2, 2),
        INPUTS,
    ),
    "transposed convolution": lambda: _of_linen(nn.ConvTranspose(2, (3,), strides=(2,), **FLOAT64)),
    "layer norm": lambda: _of_linen(nn.LayerNorm(**FLOAT64)),
    "attention": lambda: _of_linen(nn.MultiHeadDotProductAttention(2, **FLOAT64)),
    "recurrent, by a scan": lambda: _of_linen(nn.RNN(nn.SimpleCell(3, **FLOAT64))),
    "checkpointed": lambda: _of_linen(nn.remat(nn.Dense)(3, **FLOAT64)),
    "recurrent with gates, by a scan": lambda: _of_linen(nn.RNN(nn.GRUCell(3, **FLOAT64))),
    "layers by a scan": lambda: _of_linen(_Scanned()),
    "layers side by side": lambda: _of_linen(
        nn.vmap(
            nn.Dense, in_axes=None, out_axes=1, axis_size=2, variable_axes={"params": 0}, split_rngs={"params": True}
        )(3, **FLOAT64)
    ),
    "depthwise convolution": lambda: _of_linen(nn.Conv(4, (3,), feature_group_count=4, **FLOAT64)),
    "weight norm": lambda: _of_linen(nn.WeightNorm(nn.Dense(3, **FLOAT64), **FLOAT64)),
    "group norm and slopes": lambda: _of_linen(
        nn.Sequential([nn.GroupNorm(2, **FLOAT64), nn.PReLU(param_dtype=float)])
    ),
    "experts with hard routing": lambda: (_routed, {"router": drawn(4, 2), "experts": drawn(2, 4, 3)}, INPUTS),
    "equinox": lambda: (*of_equinox(lambda: eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))), INPUTS[:, 0]),
    "equinox with a convolution": lambda: (*of_equinox(_Convolved), INPUTS),
    "equinox with attention": lambda: (*of_equinox(_Attending), INPUTS),
    "nnx": lambda: (*of_nnx(_Normed), INPUTS),
    "nnx with attention": lambda: (*of_nnx(_attention), INPUTS),
    "embedding tied to the output": lambda: (_tied, {"table": drawn(7, 4)}, KEYS),
    "equinox with words": lambda: (*of_equinox(_Words), KEYS),
    "rows that are looked up one by one": lambda: (
        lambda p, keys: jax.vmap(jax.vmap(lambda key: jnp.tanh(p["rows"][key]).sum(1)))(keys),
        {"rows": drawn(7, 4, 2)},
        KEYS,
    ),
    "one matrix used twice": lambda: (_shared, {"w": drawn(4, 4)}, INPUTS),
    "matrix stored as [d_out, d_in], with a position": lambda: (
        lambda p, x: jax.vmap(lambda row: p["w"] @ row.T)(x + p["position"][:5]),
        {"w": drawn(2, 4), "position": drawn(9, 4)},
        INPUTS,
    ),
    "weight that is computed": lambda: (
        lambda p, x: x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"])),
        {"v": drawn(4, 2), "g": drawn(2)},
        INPUTS,
    ),
    "flat weight that is reshaped and cast": lambda: (
        lambda p, x: jax.jit(lambda w: x @ w.reshape(4, 3).astype(float))(p),
        drawn(12),
        INPUTS,
    ),
    "derivative of the user's own": lambda: (lambda p, x: _doubled(p, x), drawn(4, 3), INPUTS),
}
# What is explained as a whole matrix, and whether it is stored as [d_in, d_out]; and what no operation explains.
MATRICES = {
    "dense": {"params.kernel": True},
    "convolution with a stride": {"params.kernel": True},
    "transposed convolution": {"params.kernel": True},
    "attention": {f"params.{name}.kernel": True for name in ("query", "key", "value", "out")},
    "checkpointed": {"params.kernel": True},
    "one matrix used twice": {"w": False},
    "matrix stored as [d_out, d_in], with a position": {"w": False},
    "flat weight that is reshaped and cast": {"": True},
    "experts with hard routing": {"router": True},
    "equinox": {"layers.0.weight": False, "layers.1.weight": False},
    "equinox with a convolution": {"conv.weight": False, "last.weight": False},
    "equinox with words": {"words.weight": True, "last.weight": False},
    "equinox with attention": {f"attention.{name}_proj.weight": False for name in ("query", "key", "value", "output")},
}
_GATES = (
    "hn.bias",
    "hn.kernel",
    "hr.kernel",
    "hz.kernel",
    *(f"i{gate}.{own}" for gate in "nrz" for own in ("bias", "kernel")),
)
SLOW = {
    "convolution in groups": {"params.kernel": ["conv_general_dilated"]},
    "recurrent, by a scan": {f"params.cell.{name}": ["scan"] for name in ("h.kernel", "i.kernel", "i.bias")},
    "recurrent with gates, by a scan": {f"params.cell.{name}": ["scan"] for name in _GATES},
    "layers by a scan": {f"params.Dense_0.{name}": ["scan"] for name in ("bias", "kernel")},
    "layers side by side": {"params.kernel": ["dot_general"]},
    "depthwise convolution": {"params.kernel": ["conv_general_dilated"]},
    "weight norm": {f"params.layer_instance{name}": ["dot_general"] for name in (".kernel", "/kernel/scale")},
    "weight that is computed": {"v": ["dot_general"], "g": ["dot_general"]},
    "derivative of the user's own": {"": ["custom_jvp_call"]},
}


def _gradients(apply: Any, params: Any, inputs: Any, seed: Any) -> Any:
    """Return the gradients of single samples, and the outputs of each sample."""

    def loss(params: Any, sample: Any, seed: Any) -> Any:
        outputs = apply(params, sample[None])[0]
        return (outputs * seed).sum(), outputs

    return jax.jit(jax.vmap(jax.grad(loss, has_aux=True), (None, 0, 0)))(params, inputs, seed)


@pytest.mark.parametrize("name", CASES)
def test_taps_have_the_gradients_of_single_samples(name: str) -> None:
    apply, params, inputs = CASES[name]()
    tapped = TappedFunction(apply, params, inputs)
    found_outputs = tapped.outputs(params, inputs)
    seed = np.random.default_rng(1).normal(size=found_outputs.shape)
    expected, outputs = _gradients(apply, params, inputs, seed)
    np.testing.assert_allclose(found_outputs, outputs, rtol=1e-12, atol=1e-12)
    taps = jax.tree.map(np.asarray, tapped.taps(params, inputs, seed))  # JAX would compile what follows
    found, expected = per_sample_gradients(taps), leaves_of(expected)
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key].reshape(value.shape), value, rtol=1e-9, atol=1e-12, err_msg=key)
    if not name.startswith("nnx"):
        assert tapped.matrices == MATRICES.get(name, {})
        assert tapped.slow == SLOW.get(name, {})


def test_squares_of_words_that_are_looked_up_one_by_one_are_those_of_single_samples() -> None:
    """Some samples have a word several times, so that the square is of a sum."""
    apply, params, keys = CASES["equinox with words"]()
    seed = np.random.default_rng(1).normal(size=(3, 3))
    found = per_sample_square_sum(TappedFunction(apply, params, keys).taps(params, keys, seed))
    gradients, _ = _gradients(apply, params, keys, seed)
    for name, gradient in leaves_of(gradients).items():
        np.testing.assert_allclose(np.reshape(found[name], gradient.shape[1:]), (gradient**2).sum(0), rtol=1e-9)


def test_what_no_operation_explains_is_named_once() -> None:
    apply, params, inputs = CASES["derivative of the user's own"]()
    tapped = TappedFunction(apply, params, inputs)
    with pytest.warns(UserWarning, match=r"'' \(by custom_jvp_call\); their gradients are computed for each sample"):
        tapped.warn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TappedFunction(*CASES["dense"]()).warn()


def test_integers_have_no_taps_and_shared_inputs_are_no_samples() -> None:
    def apply(params: Any, inputs: Any) -> Any:
        return inputs["x"] @ params["w"] * inputs["scale"] + params["count"]

    params = {"w": drawn(4, 2), "count": jnp.array(3)}
    inputs = {"x": INPUTS[:, 0], "scale": jnp.array([0.5, 2.0])}
    tapped = TappedFunction(apply, params, inputs)
    assert list(tapped.taps(params, inputs, jnp.ones((3, 2)))) == ["w"]
    np.testing.assert_allclose(tapped.outputs(params, inputs), apply(params, inputs))


def test_a_tree_of_parameters_has_numbers_and_arrays_alone() -> None:
    (number,) = trained_of({"scale": 0.5, "count": 3}).values()
    assert number.shape == ()
    with pytest.raises(
        BecameError, match=r"'activation' of the parameters is a \w+ and no array; give a tree of arrays"
    ):
        trained_of(eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0)))


def test_what_is_no_number_of_a_tree_is_known_while_the_function_is_read() -> None:
    def apply(params: Any, inputs: Any) -> Any:
        return inputs @ params["w"] if params["is_on"] else inputs

    tapped = TappedFunction(apply, {"w": drawn(4, 3), "is_on": True}, INPUTS[:, 0])
    assert tapped.matrices == {"w": True}


def test_outputs_without_an_axis_of_samples_are_refused() -> None:
    with pytest.raises(BecameError, match="must return one array of outputs"):
        TappedFunction(lambda w, x: (x @ w).sum(), drawn(4, 2), INPUTS)


def test_the_examples_of_the_docstrings_run() -> None:
    assert doctest.testmod(tapping) == (0, 7)


def test_an_operation_without_results_may_look_at_a_parameter() -> None:
    def apply(params: Any, inputs: Any) -> Any:
        jax.debug.callback(lambda norm: None, jnp.linalg.norm(params["w"]))
        return inputs @ params["w"]

    assert TappedFunction(apply, {"w": drawn(4, 3)}, INPUTS[:, 0]).matrices == {"w": True}
