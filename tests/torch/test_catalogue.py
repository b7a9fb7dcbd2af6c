"""A catalogue of users' PyTorch networks: each learns exactly, and is as it was but for its weights, or is refused.

To add a network, add a row to ``NETWORKS`` of ``tests/torch/catalogue.py``, or to ``REFUSED``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from adapters.torch.learner import TorchLearner
from became_core import BecameError
from became_core.continual import Annealed, Callback, RunState, Training, build_method, learn
from became_core.continual.callbacks import CallbackList
from became_core.continual.measurement import Measurement
from tests.streams import prototype_stream
from tests.torch.catalogue import NETWORKS, Odd, plain, trained_norm

STREAM = prototype_stream(tasks=2, classes_per_task=2, per_class=12, channels=2, side=8, validation=0.2)
TRAINING = Training(Annealed(0.05, 1), Annealed(0.05, 1), batch_size=7)  # some last batches have one sample


# These take gradients of single samples apart, with a warning that says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:taps do not know:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by peft itself
    pytest.mark.filterwarnings("ignore:\\d+ % of the shared weights stand still:UserWarning"),
]


def built(name: str) -> nn.Module:
    torch.manual_seed(3)
    return NETWORKS[name]()


@dataclass(frozen=True)
class Looks:
    """What of a network is no one's but the user's."""

    modes: list[bool]
    frozen: list[bool]
    strides: list[tuple[int, ...]]
    settings: list[dict[str, Any]]
    constants: dict[str, Tensor]

    @classmethod
    def of(cls, network: nn.Module) -> "Looks":
        modules = list(network.modules())
        constants: dict[str, Tensor] = {
            name: value for name, value in network.named_parameters() if not value.requires_grad
        }
        for name, norm in network.named_modules():
            is_trained = norm.training and any(weight.requires_grad for weight in norm.parameters())
            if isinstance(norm, nn.BatchNorm2d) and network.training and norm.affine and not is_trained:
                constants |= {f"{name}.{own}": value for own, value in norm.named_buffers()}
        return cls(
            [module.training for module in modules],
            [parameter.requires_grad for parameter in network.parameters()],
            [parameter.stride() for parameter in network.parameters()],
            [
                {own: value for own, value in vars(module).items() if not (own[0] == "_" or isinstance(value, Tensor))}
                for module in modules
            ],
            {name: value.detach().clone() for name, value in constants.items()},
        )


class Kept(Callback):
    """Stores the state in the middle of the second task."""

    state: RunState | None = None

    def on_state(self, state: RunState) -> None:
        if state.task == 1 and state.in_stage(1):
            self.state = state


@pytest.mark.parametrize("name", NETWORKS)
def test_it_learns_and_is_left_as_it_was(name: str) -> None:
    network = built(name)
    network(torch.zeros(2, 2, 8, 8, dtype=torch.float64 if name == "in double precision" else torch.float32))
    network = built(name) if name != "lazy" else network
    before = Looks.of(network)
    learner = TorchLearner(network, STREAM, dtype=torch.float64)
    assert Looks.of(network).settings == before.settings
    theta, own = learner.parameters(), {f"{name}.": value for name, value in network.state_dict().items()}
    assert {name.removesuffix(".") for name in own if "num_batches_tracked" not in name} <= set(theta)
    kept = Kept()
    assert learner.checked is not None
    assert all(finding.difference <= 1e-6 for finding in learner.checked.findings)
    record = learn(learner, STREAM, build_method("became"), TRAINING, callbacks=[kept])
    assert np.isfinite(record.accuracy[-1]).all()
    assert record.alpha[1] is not None
    assert 0 <= record.alpha[1] <= 1
    after = Looks.of(network)
    assert (after.modes, after.frozen, after.strides, after.settings) == (
        before.modes,
        before.frozen,
        before.strides,
        before.settings,
    )
    for constant, value in before.constants.items():
        torch.testing.assert_close(after.constants[constant], value.to(after.constants[constant].dtype), rtol=0, atol=0)
    learned = learner.parameters()
    moved = {name for name, value in learned.items() if not torch.equal(value, theta[name])}
    weights = set(theta) - learner.constants - learner.running_statistics
    assert weights <= moved  # each of them
    safetensors.torch.save(learned)
    if name not in ("channels last", "orthogonal"):  # which safetensors did not save before
        safetensors.torch.save(network.state_dict())
    check_it_goes_on(name, kept.state, learned)
    check_measuring_changes_nothing(learner)


def check_it_goes_on(name: str, state: RunState | None, expected: dict[str, Tensor]) -> None:
    network = built(name)
    learner = TorchLearner(network, STREAM, dtype=torch.float64)
    learn(learner, STREAM, build_method("became"), TRAINING, state=state)
    for entry, value in learner.parameters().items():
        torch.testing.assert_close(value, expected[entry], rtol=0, atol=0)


def check_measuring_changes_nothing(learner: TorchLearner) -> None:
    before = learner.parameters()
    for kind in ("batch", "empirical"):
        measurement = Measurement(learner, STREAM.tasks[0], TRAINING, kind, 0, "merge")
        measurement.diagonal()
        measurement.along([measurement.mean])
        measurement.loss()
    for name, value in learner.parameters().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["gpm", "ewc"])
@pytest.mark.parametrize("name", ["called heads and head", "frozen first layer", "frozen norm", "low rank", "patched"])
def test_it_learns_under_other_methods(name: str, method: str) -> None:
    network = built(name)
    before = Looks.of(network)
    learner = TorchLearner(network, STREAM, dtype=torch.float64)
    record = learn(learner, STREAM, build_method(method), TRAINING)
    assert np.isfinite(record.accuracy[-1]).all()
    for constant, value in before.constants.items():
        torch.testing.assert_close(Looks.of(network).constants[constant].to(value.dtype), value, rtol=0, atol=0)


def test_a_networks_own_norm_learns_statistics_again() -> None:
    norm: Any = nn.BatchNorm2d(4)
    network = plain(norm)
    learn(TorchLearner(network, STREAM), STREAM, build_method("finetune"), TRAINING)
    before, count = norm.running_mean.clone(), int(norm.num_batches_tracked)
    network.train()(torch.randn(20, 2, 8, 8) + 5)
    assert not torch.equal(norm.running_mean, before)
    assert int(norm.num_batches_tracked) == count + 1


def learned(network: nn.Module, method: str = "became", **changes: Any) -> None:
    learn(TorchLearner(network, STREAM), STREAM, build_method(method), replace(TRAINING, **changes))


# By name: what is refused, before anything begins, and what the message says.
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "randomness in evaluation": (lambda: learned(plain(Odd("noise"))), "outputs of the user's own pass, in evaluation"),
    "samples that see each other": (
        lambda: learned(plain(Odd("batch"))),
        "fails its first look: outputs of a sample alone",
    ),
    "images for features": (partial(learned, nn.Conv2d(2, 4, 3)), r"to features \[N, features\]; of 2 images it made"),
    "batches of one": (
        lambda: learned(built("flat batch norm"), batch_size=1),
        "the batch size is 1, and the network normalises by statistics over the samples",
    ),
    "nothing to gate": (lambda: learned(nn.Flatten(), "hat"), "HAT gates linear and convolutional layers"),
    "nothing to protect": (
        lambda: learned(nn.Flatten(), "ogd"),
        "OGD protects shared weights, and the network has none",
    ),
    "nothing left to protect": (
        lambda: learned(built("frozen throughout"), "ogd"),
        "and the network has none to train",
    ),
    "nothing left to gate": (lambda: learned(built("frozen throughout"), "hat"), "HAT gates linear and convolutional"),
}


def test_a_switch_leaves_the_check_out() -> None:
    assert TorchLearner(plain(Odd("batch")), STREAM, check=False).checked is None


def test_the_check_leaves_a_network_and_what_is_drawn_as_they_were() -> None:
    network = plain(trained_norm(), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(5)
    drawn = torch.random.get_rng_state()
    with_check = TorchLearner(network, STREAM).parameters()
    after_check = torch.random.get_rng_state()
    torch.random.set_rng_state(drawn)
    without = TorchLearner(network, STREAM, check=False).parameters()
    assert torch.equal(torch.random.get_rng_state(), after_check)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    for name, value in with_check.items():
        torch.testing.assert_close(value, without[name], rtol=0, atol=0)


@pytest.fixture
def _nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_run_begin(*_: Any) -> None:
        raise AssertionError("the run has begun")

    monkeypatch.setattr(CallbackList, "on_run_begin", on_run_begin)


@pytest.mark.usefixtures("_nothing_begins")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_anything_begins(name: str) -> None:
    act, message = REFUSED[name]
    with pytest.raises(BecameError, match=message):
        act()
