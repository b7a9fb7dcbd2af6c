"""What else than the steps of the given optimizers changes weights in stable training is noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from adapters.torch import Continual
from became_core import BecameError
from became_core.projection import GPM, NSCL, SGP
from tests.torch.stable_training import CLASSES, WIDTH, Case

CHANGED = "was changed in stable training by something else than the steps of the optimizers that stable"


def test_weights_may_be_loaded_before_the_first_step() -> None:
    case = Case()
    optimizer = SGD(case.model.parameters(), 0.1)
    with case.learning.stable(optimizer):
        with torch.no_grad():
            case.model[0].weight.add_(1.0)  # as where a run is gone on with
        case.train(optimizer)


class Clipped(nn.Module):
    """A network whose forward pass clips its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.clamp_(-0.1, 0.1)
        outputs: Tensor = self.fc(inputs)
        return outputs


def by_a_forgotten_one(case: Case) -> None:
    body, head = SGD(case.model[0].parameters(), 0.1), SGD(case.model[2].parameters(), 0.1)
    with case.learning.stable(body):
        case.train(body, head)


def by_a_forgotten_one_at_the_end(case: Case) -> None:
    body, head = SGD(case.model[0].parameters(), 0.1), SGD(case.model[2].parameters(), 0.1)
    with case.learning.stable(body):
        case.train(body)
        case.train(head, steps=1)


def by_hand(case: Case) -> None:
    optimizer = SGD(case.model.parameters(), 0.1)
    with case.learning.stable(optimizer):
        for _ in range(2):
            case.train(optimizer, steps=1)
            with torch.no_grad():
                case.model[0].weight.clamp_(-0.1, 0.1)


def by_the_model(case: Case) -> None:
    case = Case(Clipped())
    optimizer = SGD(case.model.parameters(), 1.0)
    with case.learning.stable(optimizer):
        case.train(optimizer)


def late(case: Case, name: str) -> None:
    optimizer = SGD(case.model.parameters(), 0.1)
    with case.learning.stable(optimizer):
        case.train(optimizer)
        with torch.no_grad():
            case.model.get_parameter(name).mul_(1.001)
        case.train(optimizer)


def by_hand_and_late(case: Case) -> None:
    late(case, "0.weight")


def by_hand_and_late_what_stands_still(case: Case) -> None:
    late(case, "0.bias")


LATE = [by_hand_and_late, by_hand_and_late_what_stands_still]


@pytest.mark.parametrize("train", [by_a_forgotten_one, by_a_forgotten_one_at_the_end, by_hand, by_the_model, *LATE])
def test_what_else_changes_weights_is_noticed(train: Callable[[Case], None]) -> None:
    with pytest.raises(BecameError, match=CHANGED):
        train(Case())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projector", [GPM(1.0), SGP(1.0), NSCL()])
def test_many_steps_with_weight_decay_are_no_other_change(projector: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).to(dtype)
    learning = Continual(model, projector=projector, uncovered="frozen", check=False)
    learning.remember([(torch.randn(2, WIDTH).to(dtype), torch.arange(2))])
    first, new = model[0].weight.detach().clone(), torch.randn(5, WIDTH).to(dtype)
    body = torch.optim.AdamW(model[0].parameters(), 0.1, weight_decay=0.1)
    head = SGD(model[2].parameters(), 0.5, momentum=0.9, nesterov=True, weight_decay=0.01)
    with learning.stable(body, head):
        for _ in range(100):
            model.zero_grad()
            functional.cross_entropy(model(new), torch.arange(5) % CLASSES).backward()  # type: ignore[no-untyped-call]
            body.step()
            head.step()
    assert float((model[0].weight - first).detach().norm()) > 0.3 * float(first.norm())


def test_there_is_a_warning_if_weights_change_and_no_step_is_taken() -> None:
    """As where a trainer makes an optimiser of its own; or weights were loaded."""
    case = Case()
    with (
        pytest.warns(UserWarning, match="have taken no step, and '0.weight' has changed: unless it was loaded"),
        case.learning.stable(SGD(case.model.parameters(), 0.1)),
    ):
        case.train(SGD(case.model.parameters(), 0.1))


def test_parameters_that_nothing_trains_may_be_left_out() -> None:
    case = Case()
    optimizer = SGD(case.model[2].parameters(), 0.1)
    with case.learning.stable(optimizer):
        case.train(optimizer)
    torch.testing.assert_close(case.model(case.old).detach(), case.before, rtol=0, atol=1e-10)


def test_stable_training_needs_an_optimizer() -> None:
    with (
        pytest.raises(BecameError, match="stable training projects the steps of an optimizer; give stable"),
        Case().learning.stable(),
    ):
        pass


def test_what_a_hook_of_the_users_does_to_weights_is_part_of_the_step() -> None:
    """As when rows of an embedding are shortened there, and not by ``max_norm``."""
    case = Case()
    optimizer = SGD(case.model.parameters(), 0.3)

    def shorten(*_: Any) -> None:
        with torch.no_grad():
            case.model[0].weight.renorm_(2, 0, 0.3)

    optimizer.register_step_post_hook(shorten)
    with case.learning.stable(optimizer):
        case.train(optimizer)
    case.check()


def test_there_is_a_warning_if_a_layer_took_the_place_of_one_that_was_remembered() -> None:
    case = Case()
    case.model.load_state_dict({name: value.clone() for name, value in case.model.state_dict().items()}, assign=True)
    optimizer = SGD(case.model.parameters(), 0.1)
    with case.learning.stable(optimizer):  # other parameters, and the same values
        case.train(optimizer)
    case.check()
    case.model[0] = nn.Linear(WIDTH, 8).double()
    with (
        pytest.warns(UserWarning, match=r"'0\.weight' is another parameter than when old data were remembered") as seen,
        case.learning.stable(optimizer := SGD(case.model.parameters(), 0.1)),
    ):
        case.train(optimizer)
    assert seen[0].filename == __file__
    case.learning.remember([(case.old, torch.arange(2))])
    with case.learning.stable(optimizer):
        case.train(optimizer)


def under_another_name(model: Any) -> None:
    model[0] = nn.Sequential(model[0])


@pytest.mark.parametrize(
    "change", [lambda model: nn.utils.parametrizations.weight_norm(model[0]), under_another_name], ids=["norm", "name"]
)
def test_there_is_a_warning_if_a_remembered_parameter_is_gone(change: Callable[[Any], object]) -> None:
    case = Case()
    change(case.model)
    optimizer = SGD(case.model.parameters(), 0.1)
    with (
        pytest.warns(UserWarning, match=r"'0\.weight' was remembered, and is no parameter of the model now") as seen,
        case.learning.stable(optimizer),
    ):
        pass
    assert seen[0].filename == __file__
