"""What ``remember`` keeps of old data in JAX, against gradients of single samples in float64; what is refused."""

import doctest
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from adapters.jax import memory as memories
from adapters.jax import own_loop
from adapters.jax.data_loss import DataLoss
from adapters.jax.memory import coverage, load, remember, save
from adapters.jax.own_loop import merge, projected
from became_core import BecameError
from became_core.arrays import named_leaves
from became_core.curvature import Bernoulli, Categorical
from became_core.projection import NSCL, SGP, TRGP, InfLoRA, OLoRA
from tests.jax.own_loop import (
    CLASSES,
    HIDDEN,
    NETWORKS,
    WIDTH,
    cross_entropy,
    new_data,
    new_weights,
    perceptron,
    remembered,
    sample_gradients,
)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_remembers_the_mean_of_squared_gradients_of_single_samples(name: str) -> None:
    apply, params = NETWORKS[name]()
    batches = new_data(1)
    memory = remember(apply, params, iter(batches), check=name == "convolution")
    found = memory.posterior.precision.diagonal()
    expected = sample_gradients(cross_entropy, apply, params, batches)
    assert set(found) == set(expected) == set(memory.posterior.mean)
    for key, gradients in expected.items():
        np.testing.assert_allclose(found[key], (gradients**2).mean(0), rtol=1e-9, atol=1e-14, err_msg=key)
    if name == "convolution":
        assert memory.checked is not None
        assert memory.checked.findings[-2].what == "outputs if matrices move where the sample reads nothing"
    table = coverage(memory)
    assert [p.name for p in table.parameters] == list(named_leaves(params))
    protected = {p.name for p in table.parameters if p.treatment == "protected"}
    assert protected == {key for key in expected if key.endswith(("kernel", "last.weight", "conv"))}
    assert table.share("protected") + table.share("penalised") == pytest.approx(1)
    use = {p.name: p.use for p in table.parameters}
    if name == "perceptron":
        assert (use["first.kernel"], use["last.weight"]) == ("matrix, transposed", "matrix")


def test_a_function_in_half_precision_is_measured_to_its_rounding() -> None:
    params = new_weights()
    half = jax.tree.map(lambda value: np.asarray(value, jnp.bfloat16), params)
    memory = remember(lambda params, inputs: perceptron(params, inputs.astype(jnp.bfloat16)), half, new_data(1))
    expected = (sample_gradients(cross_entropy, perceptron, params, new_data(1))["last.weight"] ** 2).mean(0)
    found = memory.posterior.precision.diagonal()["last.weight"]
    np.testing.assert_allclose(found, expected, rtol=0.2, atol=0.02 * expected.max())


@pytest.mark.parametrize("seed", range(4))
def test_parameters_in_half_precision_pass_the_first_look_with_inputs_in_single_precision(seed: int) -> None:
    params = {"w": jax.random.normal(jax.random.key(seed), (6, 3), jnp.bfloat16)}
    batches = [(np.asarray(x, np.float32), y) for x, y in new_data(1)]
    memory = remember(lambda params, inputs: inputs @ params["w"], params, batches, "categorical")
    assert memory.checked is not None


def test_sequences_of_several_lengths_are_remembered_by_the_token() -> None:
    """A mapping with labels, as transformers has it; one length is compiled after another."""
    rng = np.random.default_rng(0)
    shapes = {"table": (WIDTH, HIDDEN), "out": (HIDDEN, CLASSES)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def apply(params: Any, batch: Any) -> Any:
        hidden = params["table"][batch["ids"]] * batch["mask"][..., None]
        return jnp.tanh(jnp.cumsum(hidden, 1)) @ params["out"]

    batches = []
    for length in (4, 3):
        ids = rng.integers(0, WIDTH, size=(4, length))
        labels = np.where(rng.random(ids.shape) < 0.2, -100, ids % CLASSES)
        batches.append({"ids": ids, "mask": np.ones(ids.shape), "labels": labels})
    memory = remember(apply, params, batches, Categorical(by="token", shift=True), check=False)

    def loss(params: Any, ids: Any, mask: Any, labels: Any) -> Any:
        logits = apply(params, {"ids": ids[None], "mask": mask[None]})[0, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels[1:], 0))
        return jnp.where(labels[1:] >= 0, each, 0).sum()

    gradients_of = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0, 0)))
    rows = [gradients_of(params, *(batch[key] for key in ("ids", "mask", "labels"))) for batch in batches]
    count = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    for key in params:
        expected = sum((np.asarray(row[key]) ** 2).sum(0) for row in rows) / count
        np.testing.assert_allclose(memory.posterior.precision.diagonal()[key], expected, rtol=1e-9, atol=1e-14)
    assert {p.name: p.treatment for p in coverage(memory).parameters} == {"table": "protected", "out": "protected"}
    slope = sum(float((np.asarray(row[key]).sum(0) * np.asarray(params[key])).sum()) for row in rows for key in params)
    for squares in ("sample", "token"):  # the gradient of a batch does not depend on what is squared
        known = Categorical(by="token", shift=True, squares=squares)
        data = DataLoss(apply, params, known, fisher="empirical", checks=False, shows=False)
        assert data.slopes(batches, params, [params], [[0.0]]) == pytest.approx(np.array([[slope / count]]))


def test_a_second_task_adds_to_the_memory_and_may_have_a_head_of_its_own() -> None:
    rng = np.random.default_rng(0)
    shapes = {"kernel": (WIDTH, HIDDEN), "head1": (HIDDEN, CLASSES), "head2": (HIDDEN, CLASSES)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def apply(task: int, params: Any, inputs: Any) -> Any:
        return jnp.tanh(inputs @ params["kernel"]) @ params[f"head{task}"]

    first = remember(partial(apply, 1), params, new_data(1), decay=0.5, penalty=7.0, check=False)
    assert {p.name: p.treatment for p in coverage(first).parameters}["head2"] == "penalised"
    moved = jax.tree.map(lambda value: np.asarray(value) + 0.1, params)
    second = remember(partial(apply, 2), moved, new_data(2), memory=first, check=False)
    alone = remember(partial(apply, 2), moved, new_data(2), check=False)
    before = first.posterior.precision.diagonal()
    for name, value in alone.posterior.precision.diagonal().items():
        expected = np.asarray(value) + 0.5 * np.asarray(before[name])
        np.testing.assert_allclose(second.posterior.precision.diagonal()[name], expected, rtol=1e-12)
    assert (second.penalty, second.decay) == (7.0, 0.5)
    assert second.projector.rank["kernel"][0] > first.projector.rank["kernel"][0]
    assert {p.name for p in coverage(second).parameters if p.treatment == "protected"} == set(params)
    np.testing.assert_allclose(second.posterior.mean["head1"], moved["head1"])
    assert remember(partial(apply, 2), moved, new_data(2), memory=first, penalty=3.0, check=False).penalty == 3.0
    with pytest.raises(BecameError, match="the memory has a projector of its own"):
        remember(partial(apply, 2), moved, new_data(2), memory=first, projector=SGP(), check=False)
    with pytest.raises(BecameError, match=r"of another architecture: the memory has no 'head3'"):
        remember(partial(apply, 2), moved | {"head3": jnp.ones(2)}, new_data(2), memory=first, check=False)


def test_a_memory_comes_back_from_a_file(tmp_path: Path) -> None:
    params, file = new_weights(), tmp_path / "memory.safetensors"
    likelihood = Categorical(weights=(1.0, 2.0, 3.0))
    memory = remember(
        perceptron, params, new_data(1), likelihood, projector=SGP(0.9), penalty=7.0, uncovered="free", check=False
    )
    save(memory, file)
    again = load(params, file)
    assert again.likelihood == memory.likelihood
    assert again.parameters == memory.parameters
    assert (again.penalty, again.uncovered, again.decay, again.fisher) == (7.0, "free", 1.0, "empirical")
    assert str(coverage(again)) == str(coverage(memory))
    for one, other in zip(*map(jax.tree.leaves, (memory, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(again) == jax.tree.structure(memory)
    other = load(params, file, "bernoulli", projector=SGP(0.5), uncovered="frozen", penalty=2.0)
    assert (other.uncovered, other.penalty, other.decay) == ("frozen", 2.0, 1.0)
    assert (other.likelihood, type(other.projector)) == (Bernoulli(), SGP)
    assert other.projector.rank == memory.projector.rank
    with pytest.raises(
        BecameError, match=r"the projector of the memory in .*memory\.safetensors is SGP, not NSCL; give"
    ):
        load(params, file, projector=NSCL())
    with pytest.raises(BecameError, match=r"the memory of another architecture: the memory has no 'w'"):
        load({"w": jnp.ones(3)}, file)
    wider = params | {"last": {"weight": jnp.ones((4, 8)), "bias": jnp.ones(4)}}
    with pytest.raises(BecameError, match=r"'last\.weight' is \[4, 8\] in the model and \[3, 8\] in the memory"):
        load(wider, file)
    with pytest.raises(BecameError, match="uncovered is 'thawed'"):
        load(params, file, uncovered="thawed")  # type: ignore[arg-type]
    file.write_bytes(b"no safetensors")
    with pytest.raises(TypeError, match="pennalty"):
        load(params, file, pennalty=2.0)  # type: ignore[call-arg]
    with pytest.raises(BecameError, match="is no memory that"):
        load(params, file)
    save(remember(perceptron, params, new_data(1), cross_entropy, check=False), file)
    with pytest.raises(BecameError, match="made with a loss of your own; give it as likelihood="):
        load(params, file)
    assert load(params, file, likelihood=cross_entropy).likelihood is cross_entropy


def test_the_first_look_accepts_a_network_with_more_kinks_than_a_difference_can_avoid() -> None:
    rng = np.random.default_rng(0)
    params = {f"layer{index}": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) * 0.6) for index in range(12)}

    def apply(params: Any, inputs: Any) -> Any:
        for weight in params.values():
            inputs = jnp.maximum(inputs @ weight, 0.0) - 0.3
        return inputs

    memory = remember(apply, params, [(rng.normal(size=(4, WIDTH)), np.zeros(4, int))])
    assert memory.checked is not None
    assert memory.checked.findings[-1].difference < 1e-3


def test_the_first_look_finds_what_makes_measurements_meaningless() -> None:
    params, rng = new_weights(), np.random.default_rng(0)

    def across(params: Any, inputs: Any) -> Any:
        outputs = perceptron(params, inputs)
        return outputs + outputs.mean(0)

    def at_random(params: Any, inputs: Any) -> Any:
        outputs = perceptron(params, inputs)
        return outputs * rng.normal(size=outputs.shape)

    shared = [({"x": x, "scale": np.arange(1.0, 4.0)}, y) for x, y in new_data(1)]
    remember(lambda params, inputs: perceptron(params, inputs["x"]) * inputs["scale"], params, shared)
    with pytest.raises(BecameError, match="fails its first look: outputs of a sample alone"):
        remember(across, params, new_data(1))
    with pytest.raises(BecameError, match=r"fails its first look: outputs of the user.s own pass, in evaluation"):
        remember(at_random, params, new_data(1))
    assert remember(across, params, new_data(1), check=False).checked is None


def test_what_cannot_be_done_is_said_in_a_sentence() -> None:
    params, batches = new_weights(), new_data(1)
    go = partial(remember, perceptron, params, check=False)
    memory = remembered()
    transformation = projected(memory, 0.1)
    with pytest.raises(BecameError, match="a schedule-free optimizer takes means of its steps"):
        projected(memory, 0.1, optax.contrib.schedule_free_sgd(0.1)).init(params)
    with pytest.raises(BecameError, match=r"an optimizer for its learning rate; call projected\(memory, learning"):
        projected(memory, optax.sgd(0.1))  # type: ignore[arg-type, unused-ignore]
    with pytest.raises(BecameError, match=r"projected needs the parameters; call optimizer\.update"):
        transformation.update(params, transformation.init(params))
    with pytest.raises(BecameError, match=r"another architecture: the memory has no 'w'"):
        transformation.init({"w": jnp.ones(3)})
    with pytest.raises(BecameError, match=r"another architecture: the memory has no 'w'"):
        transformation.update({"w": jnp.ones(3)}, transformation.init(params), {"w": jnp.ones(3)})
    with pytest.raises(BecameError, match=r"another architecture: the memory has no 'w'"):
        merge(perceptron, memory, {"w": jnp.ones(3)}, params, batches)
    with pytest.raises(BecameError, match=r"another architecture: the model has no 'last\.weight'"):
        merge(perceptron, memory, params, {"first": params["first"]}, batches)
    with pytest.raises(BecameError, match="there are no samples"):
        go([])
    with pytest.raises(BecameError, match="a batch has the keys x; it needs labels, or a generator"):
        go([{"x": batches[0][0]}])
    with pytest.raises(BecameError, match="a batch is a ndarray; give pairs"):
        go([batches[0][0]])
    for projector in (TRGP(), OLoRA(), InfLoRA()):
        with pytest.raises(BecameError, match=f"{type(projector).__name__} does more than to project steps"):
            go(batches, projector=projector)
    with pytest.raises(BecameError, match="there is no likelihood 'poisson'"):
        go(batches, "poisson")
    with pytest.raises(BecameError, match="the penalty is nan"):
        go(batches, penalty=math.nan)
    with pytest.raises(BecameError, match="there is nothing to learn"):
        remember(perceptron, {"count": jnp.array(3)}, batches)
    with pytest.raises(BecameError, match="'w' is complex; let apply make it of two arrays"):
        remember(perceptron, {"w": jnp.ones(3, complex)}, batches)
    with pytest.raises(BecameError, match="must return one array of outputs"):
        remember(lambda params, x: perceptron(params, x).sum(), params, batches)
    with pytest.raises(BecameError, match="the parameters are one array without a name; put it in a dict"):
        save(remember(lambda w, x: x @ w, jnp.eye(WIDTH), batches, check=False), "nowhere")
    with pytest.raises(BecameError, match=r"another architecture: the model has no 'first\.kernel'"):
        optax.masked(transformation, jax.tree.map(lambda _: False, params)).init(params)
    turned = {"w": jnp.eye(WIDTH)}
    other = remember(lambda p, x: x @ p["w"], turned, [(x, y) for x, y in batches], check=False)
    with pytest.raises(BecameError, match="'w' was multiplied from its other side in the memory"):
        remember(lambda p, x: x @ p["w"].T, turned, batches, memory=other, check=False)


def test_data_that_use_a_protected_matrix_otherwise_are_refused() -> None:
    """No projection of steps stands for a use as anything else, so the matrix may not go on to be called protected."""
    params = {"w": jnp.eye(WIDTH)}
    whole = new_data(1)[0]
    part = whole[0][:, None], whole[1]

    def apply(params: Any, x: Any) -> Any:
        return x @ params["w"] if x.ndim == 2 else x[:, 0] @ params["w"] + params["w"][:1] ** 2

    memory = remember(apply, params, [whole], check=False)
    message = "'w' is protected as a matrix that is multiplied as a whole, and these data use it in another way"
    with pytest.raises(BecameError, match=message):
        remember(apply, params, [part], memory=memory, check=False)
    with pytest.raises(BecameError, match=message):
        remember(apply, params, [whole, part], check=False)
    mixed = remember(apply, params, [part, whole], check=False)  # penalised
    assert (dict(mixed.matrices), dict(mixed.projector.rank)) == ({}, {})


def test_the_examples_of_the_docstrings_run() -> None:
    assert doctest.testmod(memories) == (0, 4)
    assert doctest.testmod(own_loop) == (0, 19)
