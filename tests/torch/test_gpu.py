"""On a GPU the learner measures and trains as on the CPU: the benchmarks' own networks, in double precision."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adapters.networks import Norm, build_network
from adapters.torch.learner import TorchLearner
from adapters.torch.operations import OPERATIONS
from became_core.continual import SGD, Batch, Constraint
from became_core.curvature import derivatives_along, diagonal_fisher, input_grams
from tests.backends import to_numpy
from tests.streams import prototype_stream

STREAM = prototype_stream(tasks=2, channels=3, side=32)
ROWS = STREAM.tasks[0].train[:8]


def _measured(network: str, norm: Norm, device: str) -> dict[str, NDArray[Any]]:
    """What a learner on a device measures, and its weights after two steps, by name."""
    learner = TorchLearner(build_network(network, (3, 32, 32), norm), STREAM, device=device, dtype="float64")
    rng = np.random.default_rng(0)
    taps = list(learner.taps(0, ROWS, 8, "empirical", rng))
    diagonal = diagonal_fisher(taps, learner.parameters(), "empirical", samples=len(ROWS))
    fisher = {f"fisher of {name}": value for name, value in diagonal.items()}
    grams = input_grams(learner.taps(0, ROWS, 8, "inputs", rng), learner.projectable)
    squared = {name: gram if gram.shape[0] == gram.shape[1] else gram.T @ gram for name, gram in grams.items()}
    direction = {name: 0.1 * (value + 0.5) for name, value in learner.parameters().items()}
    along = derivatives_along(learner.pushforward(0, ROWS, 8, [direction]), learner.likelihood)
    constraint = Constraint(frozenset(learner.parameters()) - learner.running_statistics)
    learner.train([Batch(0, ROWS)] * 2, np.full(2, 0.1), constraint, SGD(), rng)
    found = {**fisher, **{f"gram of {name}": value for name, value in squared.items()}, **learner.parameters()}
    return {name: np.asarray(to_numpy(value)) for name, value in found.items()} | {
        f"derivative {order}": np.asarray(to_numpy(value)) for order, value in enumerate(along)
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("norm", ["batch", "running", "group"])
@pytest.mark.parametrize("network", ["alexnet", "resnet18"])
def test_it_measures_and_trains_as_on_the_cpu(network: str, norm: Norm) -> None:
    on_cpu, on_gpu = _measured(network, norm, "cpu"), _measured(network, norm, "cuda")
    assert on_cpu.keys() == on_gpu.keys()
    for name, expected in on_cpu.items():
        np.testing.assert_allclose(on_gpu[name], expected, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("kind", ["Cudnn", "Miopen"])
def test_the_batch_norm_of_a_gpus_library_is_read_as_pytorchs_own(kind: str) -> None:
    inputs = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(0))
    node = SimpleNamespace(_saved_input=inputs, _saved_epsilon=0.1, _saved_training=True)  # as these nodes call them
    read = OPERATIONS[f"{kind}BatchNormBackward0", 1](node, torch.ones(3), ())
    assert read is not None
    normalised = torch.nn.functional.batch_norm(inputs, None, None, training=True, eps=0.1)
    np.testing.assert_allclose(read["inputs"](), normalised.movedim(1, -1).reshape(5, -1, 3), rtol=1e-12)
