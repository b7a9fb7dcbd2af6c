"""What one process with four processor devices checks of learners that share each batch: the work of ``test_mesh.py``.

Convention: whole runs in double precision are compared with those of the reference, which compiles nothing, or with
those of one device.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from adapters.jax.learner import JaxLearner
from adapters.networks import (
    Architecture,
    BatchNorm,
    Convolution,
    Dropout,
    Flatten,
    Linear,
    MaxPool,
    ReLU,
)
from became_core.continual import Annealed, Augmentation, EpochEnd, Learner, TaskStream, Training, build_method, learn
from reference.learner import ReferenceLearner
from tests.listening import Listening
from tests.streams import prototype_stream

# Batches of 12, which four devices share, in training, in testing and in what is measured.
STREAM = prototype_stream(tasks=2, classes_per_task=2, per_class=24, seed=2)
TRAINING = Training(
    Annealed(lr=0.3, epochs=4), Annealed(lr=0.3, epochs=2), batch_size=12, projector_samples=12, curvature_samples=12
)
# One of each kind; the region of TRGP is beside a memory of GPM.
METHODS = {
    "became+nscl": {},
    "became+trgp": {"threshold": 0.8},
    "ewc": {},
    "hat": {},
}


def run(learner: Learner, method: str, training: Training = TRAINING, stream: TaskStream = STREAM) -> dict[str, Any]:
    """What comes out of a run: alpha, accuracies, losses, and the last weights."""
    losses: list[float] = []

    def observe(event: Any) -> None:
        if isinstance(event, EpochEnd):
            losses.append(event.loss)

    record = learn(
        learner, stream, build_method(method, METHODS.get(method, {})), training, callbacks=[Listening(observe)]
    )
    weights = {name: np.asarray(value) for name, value in learner.parameters().items()}
    alpha = [np.nan if alpha is None else alpha for alpha in record.alpha]
    return weights | {"alpha": np.asarray(alpha), "accuracy": record.accuracy, "losses": np.asarray(losses)}


def check_equal(what: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=f"{what}: {name}")


def check_methods() -> None:
    # Layers of one shape, for which the core's operations are compiled once.
    layers = Flatten(), Linear("fc1", 36, bias=True), ReLU(), Linear("fc2", 36, bias=True), ReLU()
    for method in METHODS:
        reference = ReferenceLearner(STREAM, hidden=(36, 36), bias=True)
        learner = JaxLearner(Architecture(layers, (1, 6, 6)), STREAM, device="cpu:all", dtype="float64")
        learner.assign(reference.parameters())
        check_equal(method, run(learner, method), run(reference, method))
        for name, value in learner.parameters().items():
            assert value.sharding.is_fully_replicated, f"{method}: {name}"
    check_sharing(learner)


def check_sharing(learner: JaxLearner) -> None:
    """Each device has a quarter of what the samples of a batch make."""
    rows = STREAM.tasks[0].train[:12]
    (taps,) = learner.taps(0, rows, 12, "empirical", np.random.default_rng(0))
    for array in (taps["fc1"].inputs, taps["fc1"].output_gradients, taps["heads.0"].inputs):
        assert [len(part.data) for part in array.addressable_shards] == [3] * 4
    assert learner.logits(rows, 12).sharding.is_fully_replicated


def check_batch_norm() -> None:
    """Statistics are of the whole batch, masks and augmentation drawn for it; the last batch, of 7, is not shared."""
    stream = prototype_stream(tasks=2, classes_per_task=2, per_class=24, validation=0.14)
    layers = Convolution("conv1", 3, 3), BatchNorm("bn1", running=True), ReLU(), Dropout(0.25), MaxPool(2), Flatten()
    training = replace(TRAINING, stage1=Annealed(lr=0.1, epochs=2), augmentation=Augmentation(padding=1))
    mesh = jax.make_mesh((4, 1), ("data", "model"))  # its axes may be explicit, and then are taken for automatic ones

    def learned(*, spread: bool) -> dict[str, Any]:
        learner = JaxLearner(
            Architecture(layers, (1, 6, 6)), stream, device="cpu", dtype="float64", dropout_masks="framework"
        )
        if spread:
            learner.spread(mesh)
            learner.whole_epochs = True
        return run(learner, "finetune", training, stream)

    check_equal("batch norm", learned(spread=True), learned(spread=False))


def main() -> None:
    """Run every check."""
    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 4
    check_methods()
    check_batch_norm()


if __name__ == "__main__":
    main()
