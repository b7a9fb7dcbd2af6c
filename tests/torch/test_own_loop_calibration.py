"""``Continual`` with calibration across tasks, against single samples' gradients and Jacobians in double precision."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.backend.batches import drawn
from adapters.torch import Continual
from became_core import BecameError, PaperClosedForm
from tests.torch.oracle import autograd_gradients
from tests.torch.own_loop import Pairs, new_data, new_network, train, whole

Weights = dict[str, Tensor]

TASKS = [new_data(seed, 4, 8) for seed in (1, 2, 3)]


def _weights(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _difference(end: Weights, begin: Weights) -> Weights:
    return {name: value - begin[name] for name, value in end.items()}


def _fisher(theta: Weights, data: Pairs) -> Weights:
    there = new_network("perceptron")
    there.load_state_dict(theta)
    return {name: value.square().mean(0) for name, value in autograd_gradients(there, *whole(data)).items()}


def _kappa(model: nn.Module, theta: Weights, data: Pairs, movement: Mapping[str, Tensor]) -> float:
    """d.GGN.d / d.F.d at theta, from the derivative of the logits along the movement."""
    inputs, _ = whole(data)

    def logits(theta: Weights) -> Any:
        return torch.func.functional_call(model, theta, (inputs,))

    both: Any = torch.func.jvp(logits, (theta,), (dict(movement),))
    outputs, along = both
    p = outputs.softmax(1)
    exact = float(((p * along.square()).sum(1) - (p * along).sum(1).square()).mean())
    fisher = _fisher(theta, data)
    return exact / sum(float((fisher[name] * movement[name].square()).sum()) for name in fisher)


class _Loop:
    """A model that learns tasks one after the other, and the weights at the ends of its stages."""

    def __init__(self, **settings: Any) -> None:
        self.model = new_network("perceptron")
        self.begin = _weights(self.model)
        self.learning = Continual(self.model, calibration="across", check=False, **settings)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.02)
        self.stable, self.plastic, self.merged = list[Weights](), list[Weights](), list[Weights]()

    def first(self) -> None:
        train(self.model, self.optimizer, TASKS[0], epochs=10)
        self.merged.append(_weights(self.model))
        self.learning.remember(TASKS[0])

    def trained(self, data: Pairs) -> None:
        with self.learning.stable(self.optimizer):
            train(self.model, self.optimizer, data)
        self.stable.append(_weights(self.model))
        with self.learning.plastic():
            train(self.model, self.optimizer, data, epochs=15)
        self.plastic.append(_weights(self.model))

    def merge(self, data: Any) -> float:
        alpha = self.learning.merge(data).alpha
        self.merged.append(_weights(self.model))
        return alpha

    @property
    def precision(self) -> Weights:
        assert self.learning.posterior is not None
        return {name: torch.as_tensor(value) for name, value in self.learning.posterior.precision.diagonal().items()}

    def assert_precision(self, terms: list[Weights]) -> None:
        for name, value in self.precision.items():
            torch.testing.assert_close(value, sum(term[name] for term in terms), rtol=1e-8, atol=1e-14)


def _times(kappa: float, fisher: Weights) -> Weights:
    return {name: kappa * value for name, value in fisher.items()}


@pytest.mark.parametrize("resumes", [False, True])
def test_each_task_is_calibrated_along_the_movement_of_the_task_before(resumes: bool, tmp_path: Path) -> None:
    """The first task has the kappa of the second, at its stable weights; a memory may be saved and loaded anywhere."""
    loop = _Loop()

    def pause() -> None:
        if resumes:
            loop.learning.save(tmp_path / "memory.safetensors")
            loop.learning = Continual.load(loop.model, tmp_path / "memory.safetensors", check=False)

    loop.first()
    pause()
    loop.trained(TASKS[1])
    loop.merge(iter(TASKS[1]))
    pause()
    loop.learning.remember(iter(TASKS[1]))
    pause()
    movements = [
        _difference(loop.merged[0], loop.begin),
        _difference(loop.plastic[0], loop.stable[0]),
    ]
    fishers = [_fisher(theta, data) for theta, data in zip(loop.merged, TASKS, strict=False)]
    kappas = [
        _kappa(loop.model, loop.stable[0], TASKS[1], movements[0]),
        _kappa(loop.model, loop.merged[1], TASKS[1], movements[0]),
    ]
    loop.assert_precision([_times(kappa, fisher) for kappa, fisher in zip(kappas, fishers, strict=True)])
    loop.trained(TASKS[2])
    loop.merge(TASKS[2])
    loop.learning.remember(TASKS[2])
    fishers.append(_fisher(loop.merged[2], TASKS[2]))
    kappas.append(_kappa(loop.model, loop.merged[2], TASKS[2], movements[1]))
    loop.assert_precision([_times(kappa, fisher) for kappa, fisher in zip(kappas, fishers, strict=True)])
    assert len({round(kappa, 2) for kappa in [1.0, *kappas]}) == 4


def test_the_merge_takes_the_old_side_as_it_is_calibrated() -> None:
    loop = _Loop()
    loop.first()
    loop.trained(TASKS[1])
    theta_gp, theta_hat = loop.stable[0], loop.plastic[0]
    delta = _difference(theta_hat, theta_gp)
    inputs, targets = whole(TASKS[1])

    def slope(theta: Weights) -> float:
        def loss(theta: Weights) -> Any:
            return functional.cross_entropy(torch.func.functional_call(loop.model, theta, (inputs,)), targets)

        gradient = torch.func.grad(loss)(theta)
        return sum(float((gradient[name] * delta[name]).sum()) for name in delta)

    kappa = _kappa(loop.model, theta_gp, TASKS[1], _difference(loop.merged[0], loop.begin))
    old = _times(kappa, _fisher(loop.merged[0], TASKS[0]))
    offset = _difference(theta_gp, loop.merged[0])
    b = slope(theta_gp) + sum(float((offset[name] * old[name] * delta[name]).sum()) for name in delta)
    c = slope(theta_hat) - slope(theta_gp) + sum(float((old[name] * delta[name].square()).sum()) for name in delta)
    assert 0 < -b / c < 1
    assert loop.merge(TASKS[1]) == pytest.approx(-b / c, rel=1e-6)


def test_what_is_remembered_in_parts_has_the_factor_of_the_first_part() -> None:
    loop = _Loop()
    loop.first()
    loop.learning.remember(TASKS[2])  # more of the first task
    loop.trained(TASKS[1])
    loop.merge(TASKS[1])
    first = [_fisher(loop.merged[0], data) for data in (TASKS[0], TASKS[2])]
    of_first = _kappa(loop.model, loop.stable[0], TASKS[1], _difference(loop.merged[0], loop.begin))
    parts = TASKS[1][:2], TASKS[1][2:]
    for part in parts:
        loop.learning.remember(part)
    kappa = _kappa(loop.model, loop.merged[1], parts[0], _difference(loop.merged[0], loop.begin))
    terms = [_times(of_first, fisher) for fisher in first]
    loop.assert_precision(terms + [_times(kappa, _fisher(loop.merged[1], part)) for part in parts])


def test_a_task_that_is_not_merged_is_calibrated_alike() -> None:
    """The first task then takes the kappa of the second at the weights at which that is remembered."""
    loop = _Loop()
    loop.first()
    for data in TASKS[1:]:
        with loop.learning.stable(loop.optimizer):
            train(loop.model, loop.optimizer, data)
        loop.merged.append(_weights(loop.model))
        loop.learning.remember(data)
    movements = [_difference(loop.merged[0], loop.begin), _difference(loop.merged[1], loop.merged[0])]
    kappas = [_kappa(loop.model, loop.merged[t], TASKS[t], movements[t - 1]) for t in (1, 2)]
    fishers = [_fisher(theta, data) for theta, data in zip(loop.merged, TASKS, strict=True)]
    factors = [kappas[0], *kappas]
    loop.assert_precision([_times(kappa, fisher) for kappa, fisher in zip(factors, fishers, strict=True)])


def test_a_part_of_many_batches_is_measured_as_it_is_remembered() -> None:
    """Both measurements are of the batches that are drawn: the factor is that of these alone."""
    loop, part = _Loop(), list(drawn(TASKS[1], 0.1, None))
    assert 0 < len(part) < len(TASKS[1])
    loop.first()
    loop.trained(TASKS[1])
    loop.merge(TASKS[1])
    before = loop.precision
    loop.learning.remember(TASKS[1], share=0.1)
    kappa = _kappa(loop.model, loop.merged[1], part, _difference(loop.merged[0], loop.begin))
    loop.assert_precision([before, _times(kappa, _fisher(loop.merged[1], part))])


def test_a_loss_of_ones_own_that_is_concave_along_a_movement_calibrates_nothing() -> None:
    """Its curvature is a difference of slopes, which may be negative; a precision may not."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False)).double()
    learning = Continual(model, lambda outputs, targets: -outputs.square().mean(), calibration="across", check=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    train(model, optimizer, TASKS[0])
    learning.remember(TASKS[0])
    with learning.stable(optimizer):
        train(model, optimizer, TASKS[1])
    assert learning.posterior is not None
    before = dict(learning.posterior.precision.diagonal())
    learning.remember(TASKS[1])
    new = Continual(model, lambda outputs, targets: -outputs.square().mean(), check=False)
    new.remember(TASKS[1])
    assert new.posterior is not None
    for name, value in new.posterior.precision.diagonal().items():
        torch.testing.assert_close(learning.posterior.precision.diagonal()[name], before[name] + value)


def test_what_cannot_be_calibrated_is_refused_before_any_work(tmp_path: Path) -> None:
    def no_batch(index: int) -> Any:
        raise AssertionError(f"batch {index} was asked for")

    model = new_network("perceptron")
    with pytest.raises(BecameError, match=r"has an estimator, Secant\(calibrates=False\); leave estimator= out"):
        Continual(model, calibration="across", estimator=PaperClosedForm())
    with pytest.raises(BecameError, match="the calibration is 'always'; choose across, or leave it out"):
        Continual(model, calibration="always")  # type: ignore[arg-type] # it must be refused
    learning = Continual(model, calibration="across", check=False)
    with pytest.raises(BecameError, match="none has moved; make Continual before the model is trained"):
        learning.remember(map(no_batch, [0]))
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    train(model, optimizer, TASKS[0])
    with pytest.raises(BecameError, match="measures old batches; give them, and no second moments"):
        learning.remember(optimizer=optimizer, samples=8)
    learning.remember(TASKS[0])
    file = tmp_path / "memory.safetensors"
    learning.save(file)
    with pytest.raises(BecameError, match=r"the memory in .* is calibrated across tasks; leave calibration= out"):
        Continual.load(model, file, calibration=None)
    merging = Continual(model, check=False)
    merging.remember(TASKS[0])
    merging.save(file)
    with pytest.raises(BecameError, match="is not calibrated across tasks; leave calibration= out"):
        Continual.load(model, file, calibration="across")


def test_a_merge_that_fails_changes_nothing_of_the_calibration() -> None:
    loop = _Loop()
    loop.first()
    loop.trained(TASKS[1])
    before = loop.precision

    def failing() -> Any:
        yield from TASKS[1]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        loop.learning.merge(failing())
    with pytest.raises(OSError, match="no more"):
        loop.learning.merge(TASKS[1], statistics=failing())
    loop.assert_precision([before])
    alpha = loop.merge(TASKS[1])
    other = _Loop()
    other.first()
    other.trained(TASKS[1])
    assert other.merge(TASKS[1]) == pytest.approx(alpha, rel=1e-12)
