"""Many steps as one program are the steps one by one."""

from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from adapters.jax.learner import JaxLearner, JaxNetwork
from adapters.networks import Architecture, BatchNorm, Convolution, Dropout, Flatten, Linear, MaxPool, ReLU
from became_core.arrays import named_leaves
from became_core.continual import (
    SGD,
    Adam,
    Annealed,
    Augmentation,
    Batch,
    Constraint,
    Optimiser,
    Penalty,
    Training,
    build_method,
    learn,
)
from became_core.continual.training import epoch_batches
from became_core.laplace import Diagonal, LaplacePosterior
from became_core.projection import GPM, TrustRegion
from became_core.projection.subspace import Subspace
from tests.streams import prototype_stream

# 90 samples of each task for training: five whole batches, and one of ten.
STREAM = prototype_stream(tasks=2)
NETWORK = Architecture(
    (
        *(Convolution("conv1", 4, 3, padding=1, bias=True), BatchNorm("bn1"), ReLU(), Dropout(0.1), MaxPool(2)),
        *(Flatten(), Linear("fc1", 24, bias=True), ReLU(), Dropout(0.1)),
    ),
    (1, 6, 6),
)
REGION = ("conv1.weight@0", "fc1.weight@0")


def stages(one: JaxLearner) -> dict[str, Constraint]:
    """A stage of each kind: projected, in a trust region that is trained, and penalised."""
    draw, theta = np.random.default_rng(0), one.parameters()
    widths = {"conv1.weight": 9, "fc1.weight": 36}
    bases = {name: np.linalg.qr(draw.normal(size=(width, 3)))[0] for name, width in widths.items()}
    arrays = {f"bases.{name}": jax.numpy.asarray(basis, theta[name].dtype) for name, basis in bases.items()}
    memory = GPM(threshold=0.9).with_arrays(arrays | {"tasks": jax.numpy.asarray(1)})
    identity = jax.numpy.eye(3, dtype=theta["conv1.weight"].dtype)
    region = TrustRegion({f"{name}@0": arrays[f"bases.{name}"] for name in bases}, dict.fromkeys(REGION, identity))
    mean = {name: value - 0.25 for name, value in theta.items()}
    posterior = LaplacePosterior(mean, Diagonal({name: value * value + 0.1 for name, value in theta.items()}))
    trainable = frozenset(theta) - one.heads[1]
    return {
        "projected": Constraint(trainable, memory),
        "in a region": Constraint(trainable, memory, region=region, trains_scales=True),
        "penalised": Constraint(trainable, penalty=Penalty(posterior, 2.0)),
    }


@pytest.mark.parametrize(
    ("stage", "optimiser", "augmentation"),
    [("projected", SGD(momentum=0.9), Augmentation(1)), ("in a region", SGD(), None), ("penalised", Adam(), None)],
)
def test_an_epoch_as_one_program_is_its_steps(
    stage: str, optimiser: Optimiser, augmentation: Augmentation | None
) -> None:
    """To rounding: a compiler may order a sum in another way. The last batch is smaller."""
    rows = STREAM.tasks[0].train
    batches = epoch_batches(STREAM.tasks[:1], 16, np.random.default_rng(0), augmentation)
    assert [len(batch.indices) for batch in batches] == [16] * 5 + [len(rows) - 80]
    results = []
    for whole in (False, True):
        one = JaxLearner(NETWORK, STREAM, dtype="float64", dropout_masks="framework")
        one.whole_epochs = whole
        constraint = stages(one)[stage]
        scales = {} if constraint.region is None else constraint.region.scales
        begun = optimiser.initial(one.parameters() | scales)
        rates = np.linspace(0.05, 0.02, len(batches))
        loss, after, region = one.train(batches, rates, constraint, begun, np.random.default_rng(1))
        results.append({"loss": loss, **named_leaves(after), **named_leaves(region), **one.parameters()})
    by_step, at_once = results
    assert set(by_step) == set(at_once)
    for name, value in by_step.items():
        np.testing.assert_allclose(np.asarray(at_once[name]), np.asarray(value), rtol=1e-8, atol=1e-10, err_msg=name)


def test_two_tasks_of_equal_shapes_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of their steps only the last, on fewer samples, is one by itself."""
    traced = count_programs(monkeypatch)
    one = JaxLearner(NETWORK, STREAM, dropout_masks="framework")
    one.whole_epochs = True
    training = Training(Annealed(0.02, 2), Annealed(0.02, 1), batch_size=16)
    learn(one, STREAM, build_method("finetune"), training)
    assert traced == {"traced": 1, "epochs": 2 * 2, "steps": 2 * 2}  # two epochs of each task


def count_programs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often a program of several steps is traced, and how often one runs, or a step by itself."""
    counts = Counter[str]()
    whole, step = JaxNetwork.many_steps, JaxNetwork.step

    def traced(*arguments: Any) -> Any:
        counts["traced"] += 1
        return whole.__wrapped__(*arguments)

    compiled = jax.jit(traced, static_argnums=0)

    def many_steps(*arguments: Any) -> Any:
        counts["epochs"] += 1
        return compiled(*arguments)

    def one_step(network: JaxNetwork, state: Any, *arguments: Any) -> Any:
        counts["steps"] += not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state))
        return step(network, state, *arguments)

    monkeypatch.setattr(JaxNetwork, "many_steps", many_steps)
    monkeypatch.setattr(JaxNetwork, "step", one_step)
    return counts


@pytest.mark.parametrize(("source", "joint", "epochs"), [("framework", 0, 1), ("numpy", 0, 0), ("framework", 1, 0)])
def test_masks_from_the_host_and_joint_training_come_step_by_step(
    source: Any, joint: int, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = count_programs(monkeypatch)
    one = JaxLearner(NETWORK, STREAM, dropout_masks=source)
    one.whole_epochs = True
    rows = STREAM.tasks[0].train[:48]
    batches = [Batch(0, rows[start : start + 16]) for start in range(0, len(rows), 16)] + [Batch(1, rows[:16])] * joint
    everything = Constraint(frozenset(one.parameters()))
    one.train(batches, np.full(len(batches), 0.1), everything, SGD(), np.random.default_rng(0))
    assert (counts["epochs"], counts["steps"]) == (epochs, 0 if epochs else len(batches))


@pytest.mark.parametrize(("optimiser", "of_fc1"), [(SGD(momentum=0.5), 13), (SGD(weight_decay=0.1), 24), (Adam(), 24)])
def test_a_linear_layers_inputs_are_projected_if_nothing_comes_between(
    optimiser: Optimiser, of_fc1: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirteen samples' inputs instead of a gradient of 24 rows; a convolution's gradient in any case."""
    project, seen = Subspace.project_rows, dict[str, int]()

    def counted(self: Subspace, name: str, rows: Any) -> Any:
        seen[name] = rows.shape[0]
        return project(self, name, rows)

    monkeypatch.setattr(Subspace, "project_rows", counted)
    one, draw = JaxLearner(NETWORK, STREAM), np.random.default_rng(0)
    widths = {"conv1.weight": 9, "fc1.weight": 36}
    bases = {name: np.linalg.qr(draw.normal(size=(width, 3)))[0] for name, width in widths.items()}
    arrays = {f"bases.{name}": jax.numpy.asarray(basis, "float32") for name, basis in bases.items()}
    # Of a threshold that no other test has, so that it is compiled here.
    memory = GPM(threshold=0.775).with_arrays(arrays | {"tasks": jax.numpy.asarray(1)})
    before = one.parameters()
    constraint = Constraint(one.projectable | one.heads[1], memory)
    begun = optimiser.initial({name: before[name] for name in constraint.trainable})
    batch = Batch(1, STREAM.tasks[1].train[:13])
    one.train([batch, batch], np.full(2, 0.1), constraint, begun, draw)
    assert seen == {"conv1.weight": 4, "fc1.weight": of_fc1}
    for name, basis in bases.items():
        step = np.asarray(one.parameters()[name] - before[name]).reshape(len(before[name]), -1)
        assert np.linalg.norm(step @ basis) <= 1e-5 * np.linalg.norm(step) != 0
