"""A catalogue of users' functions around a memory, in double precision: each is exact, or refused in a sentence.

Of each, Fisher information is held against a loop of ``jax.grad`` over single samples, and a step that is projected
leaves the outputs for old data as they were. To add a function, add a row to ``NETWORKS`` of
``tests/jax/own_functions.py``, or to ``REFUSED``.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from adapters.jax.memory import remember
from adapters.jax.tapping import trained_of
from adapters.jax.trees import leaves_of, with_leaves_of
from became_core import BecameError
from became_core.curvature import Categorical
from became_core.projection import GPM
from tests.jax.drawn import drawn, of_nnx
from tests.jax.own_functions import CLASSES, FLOAT64, INPUTS, NETWORKS, TARGETS, WIDTH, Case, Nnx

# Those whose first look is a test of the look.
LOOKED_AT = {"two inputs, and one that all share", "sparse weights", "keys among the inputs"} | {
    "inputs that are changed in part"
}


# What is protected as a whole matrix; in what is not here, nothing is.
MATRICES: dict[str, set[str]] = {
    "kernels of three axes": {"layers_0.kernel", "layers_2.kernel"},
    "a frozen stem, and batch norm": {"stem.kernel", "Conv_0.kernel", "Dense_0.kernel"},
    "a convolution in a circle": {"kernel"},
    "nnx with statistics and dropout": {"first.kernel", "last.kernel"},
    "a module of nnx itself": {"kernel"},
    "LoRA on a layer of nnx": {"lora.lora_a", "lora.lora_b"},
    "a cell of equinox in a scan": {"last.weight"},
    "a tree of nodes of every kind": {"0.matrix.a.1", "1.kernel"},
    "two inputs, and one that all share": {"w", "v"},
    "one matrix of queries, keys and values": {"w"},
    "a product of three": {"w"},
    "weights that inputs make": {"w"},
    "weights that are cut to integers": {"v"},
    "slices that samples choose": {"v"},
    "experts by a switch": {"r"},
    "a linear recurrence": {"w"},
    "an equilibrium": {"w", "v"},
    "a backward pass of the user's own": {"v"},
    "a spectrum": {"w"},
    "functions within functions": {"w", "v"},
    "keys among the inputs": {"w", "v"},
    "inputs that are changed in part": {"w", "v"},
    "an empty parameter": {"w", "v"},
}


def of_sample(inputs: Any, number: int) -> Any:
    """The inputs of one sample; an array of another length is shared by all."""
    return jax.tree.map(lambda leaf: leaf[number : number + 1] if len(leaf) == len(TARGETS) else leaf, inputs)


@pytest.mark.filterwarnings("ignore:taps do not know:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_measured_exactly_and_old_outputs_stand_still(name: str) -> None:
    apply, params, *rest = NETWORKS[name]()
    inputs, targets = rest[0] if rest else INPUTS, rest[1] if len(rest) > 1 else TARGETS
    likelihood = Categorical(by="token" if targets.ndim > 1 else "sample")
    memory = remember(apply, params, [(inputs, targets)], likelihood, projector=GPM(1.0), check=name in LOOKED_AT)
    theta = {key: np.asarray(value) for key, value in trained_of(params).items()}

    def loss(theta: Any, inputs: Any, targets: Any) -> Any:
        outputs = apply(with_leaves_of(params, leaves_of(params) | theta), inputs)
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], -1).sum(), outputs

    gradient_of = jax.jit(jax.grad(loss, has_aux=True))

    def one_by_one(theta: Any) -> tuple[list[Any], Any]:
        found = [gradient_of(theta, of_sample(inputs, n), targets[n : n + 1]) for n in (0, 1)]
        return [gradients for gradients, _ in found], np.concatenate([outputs for _, outputs in found])

    gradients, before = one_by_one(theta)
    found = memory.posterior.precision.diagonal()
    assert set(found) == set(theta)
    for key in theta:
        expected = sum(np.square(gradient[key]) for gradient in gradients) / targets.size
        np.testing.assert_allclose(found[key], expected, rtol=1e-9, atol=1e-25, err_msg=key)
    assert set(memory.matrices) == MATRICES.get(name, set())
    step, protected = {}, {}
    projector = jax.tree.map(np.asarray, memory.projector)  # JAX would compile a product for each shape
    for key, is_transposed in memory.matrices.items():
        step[key], width = drawn(*theta[key].shape, seed=1), projector.rank[key][1]
        matrix = step[key].reshape(width, -1).T if is_transposed else step[key].reshape(-1, width)
        rows = projector.project({key: matrix})[key]
        protected[key] = theta[key] + (rows.T if is_transposed else rows).reshape(step[key].shape)
    np.testing.assert_allclose(one_by_one(theta | protected)[1], before, rtol=0, atol=1e-10)
    if step:
        free = {key: theta[key] + value for key, value in step.items()}
        assert np.abs(one_by_one(theta | free)[1] - before).max() > 1e-3


def of_linen_with_dropout() -> Case:
    module = nn.Sequential([nn.Dense(CLASSES, **FLOAT64), nn.Dropout(0.5, deterministic=False)])
    return module.apply, {"params": {"layers_0": {"kernel": drawn(WIDTH, CLASSES), "bias": drawn(CLASSES)}}}


# What is refused, and what the message says.
ALONE = "cannot be compiled and run with parameters and inputs alone"
REFUSED: dict[str, tuple[Callable[[], Case], str]] = {
    "dropout without a key": (of_linen_with_dropout, rf'{ALONE} \(layers_1 needs PRNG for "dropout"\); give one'),
    "dropout of nnx": (lambda: of_nnx(Nnx), f"{ALONE} .Cannot mutate RngCount"),
    "a choice by an input": (
        lambda: (lambda p, x: x["x"] @ p if x["turns"] else x["x"], drawn(6, 3), {"x": INPUTS, "turns": True}),
        f"{ALONE} .Attempted boolean conversion",
    ),
    "words of text": (
        lambda: (lambda p, x: x["x"] @ p, drawn(6, 3), {"x": INPUTS, "text": "words"}),
        "a batch holds what is no array of numbers .Value 'words'",
    ),
    "a loop of unknown length": (
        lambda: (lambda p, x: lax.while_loop(lambda h: h.sum() < 0, lambda h: h @ p, x), drawn(6, 6)),
        "gradients cannot be taken .Reverse-mode differentiation does not work for lax.while_loop",
    ),
    "a call of NumPy": (
        lambda: (lambda p, x: jax.pure_callback(np.tanh, jax.ShapeDtypeStruct((2, 3), float), x @ p), drawn(6, 3)),
        "gradients cannot be taken .Pure callbacks do not support JVP",
    ),
    "parameters that are not used": (
        lambda: (lambda p, x: x @ np.ones((6, 3)), drawn(6, 3)),
        "the outputs depend on none of the parameters",
    ),
    "one size of a batch": (
        lambda: (lambda p, x: x.reshape(2, 6) @ p, drawn(6, 3)),
        r"the function takes the whole batch, but not one sample of it \(",
    ),
    "an empty batch": (lambda: (lambda p, x: x @ p, drawn(6, 3), INPUTS[:0]), "a batch has no sample"),
    "two outputs": (lambda: (lambda p, x: (x @ p, x), drawn(6, 3)), "must return one array of outputs"),
    "classes as outputs": (
        lambda: (lambda p, x: (x @ p).argmax(1)[:, None], drawn(6, 3)),
        "the outputs have dtype int64; they must be real floating-point numbers",
    ),
    "complex outputs": (lambda: (lambda p, x: 1j * (x @ p), drawn(6, 3)), "the outputs have dtype complex128"),
    "two parameters of one name": (
        lambda: (lambda p, x: x @ p["a.b"] + p["a"]["b"], {"a.b": drawn(6, 3), "a": {"b": drawn(3)}}),
        "two leaves of a tree have the same dotted path",
    ),
    "derivatives that are not finite": (
        lambda: (lambda p, x: x @ p * jnp.linalg.norm(0 * x @ p), drawn(6, 3)),
        "outputs or their derivatives are not finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_a_sentence(name: str) -> None:
    make, message = REFUSED[name]
    apply, params, *rest = make()
    with pytest.raises(BecameError, match=message):
        remember(apply, params, [(rest[0] if rest else INPUTS, TARGETS)])


def test_what_all_samples_share_may_be_as_long_as_a_later_batch() -> None:
    def apply(params: Any, inputs: Any) -> Any:
        return (inputs["x"] @ params["w"] * inputs["scales"]) @ params["v"]

    x, targets = np.concatenate([INPUTS, 2 * INPUTS[:1]]), np.array([2, 0, 1])
    params, scales = {"w": drawn(WIDTH, 2), "v": drawn(2, CLASSES)}, np.array([1.0, 3.0])
    together, *pairs = (
        ({"x": x[rows], "scales": scales}, targets[rows]) for rows in ([0, 1, 2], [0, 1], [1, 2], [0, 2])
    )
    expected, found = (
        remember(apply, params, batches, check=False).posterior.precision.diagonal()
        for batches in ([together], [together, *pairs])  # each sample once, and each thrice
    )
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12)
    with pytest.raises(BecameError, match=r"an input has shape \[2\] in a batch of 3 samples, and was as long as"):
        remember(apply, params, [pairs[0], together], check=False)
