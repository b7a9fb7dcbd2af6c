"""Whose steps are projected: optimisers of every kind that ``stable`` is given, and where the weights are."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD, Adam

from adapters.torch import Continual
from adapters.torch.shared_model import beside
from became_core import BecameError
from became_core.arrays import named_leaves
from became_core.projection import GPM, NSCL, SGP
from tests.torch.own_models import Of
from tests.torch.stable_training import CLASSES, WIDTH, Case


def test_a_step_may_compute_its_gradients_itself() -> None:
    weights = []
    for by_closure in (True, False):
        case = Case()
        optimizer = Adam(case.model.parameters(), 0.05)
        with case.learning.stable(optimizer):
            for _ in range(3):
                if by_closure:
                    optimizer.step(case.closure)
                else:
                    case.train(optimizer, steps=1)
        case.check()
        weights.append(case.model[0].weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("projector", [GPM(1.0), SGP(1.0, scale=1e12), NSCL()])
def test_a_weight_of_three_axes_stands_still_for_what_old_data_read(projector: Any) -> None:
    equation = "bi,ihk->bhk"
    torch.manual_seed(0)
    model: Any = Of(
        lambda net, x: net.head(torch.einsum(equation, x, net.weight).flatten(1).tanh()),
        weight=torch.randn(WIDTH, 2, 4),
        head=nn.Linear(8, CLASSES),
    ).double()
    read = torch.randn(5, 3).double() @ torch.randn(3, WIDTH).double()
    learning = Continual(model, projector=projector, uncovered="frozen")
    learning.remember([(read, torch.arange(5) % CLASSES)])
    assert learning.coverage.parameters[0].treatment == "protected"
    before, optimizer = model.weight.detach().clone(), SGD(model.parameters(), 0.1)
    with learning.stable(optimizer):
        loss = functional.cross_entropy(model(torch.randn(5, WIDTH).double()), torch.arange(5) % CLASSES)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    step = model.weight.detach() - before
    assert float(step.abs().max()) > 1e-4
    assert float(torch.einsum(equation, read, step).abs().max()) < 1e-9


def test_a_step_that_is_many_steps_is_refused() -> None:
    case = Case()
    with (
        pytest.raises(BecameError, match="a step of LBFGS is many steps"),
        case.learning.stable(torch.optim.LBFGS(case.model.parameters())),
    ):
        pass


class Averaging(SGD):
    """A schedule-free optimizer, as facebook's are."""

    def train(self) -> None:
        """Let the model have the weights that are trained."""

    def eval(self) -> None:
        """Let the model have their averages."""


def test_an_optimizer_that_exchanges_weights_outside_of_its_steps_is_refused() -> None:
    case = Case()
    with (
        pytest.raises(
            BecameError, match=r"Averaging exchanges the weights outside of its steps, by its train\(\) and eval"
        ),
        case.learning.stable(Averaging(case.model.parameters(), 0.1)),
    ):
        pass
    with case.learning.stable(SGD(case.model.parameters(), 0.1)):  # nothing was left behind
        pass


def test_each_parameter_may_have_an_optimizer_that_steps_in_the_backward_pass() -> None:
    case = Case()
    own = {value: SGD([value], 0.1) for value in case.model.parameters()}

    def step(value: Any) -> None:
        own[value].step()
        own[value].zero_grad()

    handles = [value.register_post_accumulate_grad_hook(step) for value in own]
    with case.learning.stable(*own.values()):
        for _ in range(3):
            case.loss().backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    case.check()


def test_two_optimizers_may_step_in_turn_or_one_after_the_other() -> None:
    case = Case()
    body, head = Adam(case.model[0].parameters(), 0.05), SGD(case.model[2].parameters(), 0.1)
    with case.learning.stable(body, head):
        case.train(body, head)
    case.check()
    case = Case()
    first, second = (make(case.model.parameters(), 0.05) for make in (Adam, SGD))
    with case.learning.stable(first, second):
        case.train(first)
        case.train(second)
    case.check()


def test_an_optimizer_that_is_named_twice_pulls_back_once() -> None:
    weights = []
    for wrappers in (0, 1):
        case = Case()
        learning, optimizer = Continual(case.model, check=False), SGD(case.model.parameters(), 0.1)
        learning.remember([(case.old, torch.arange(2))])
        wrapped: Any = [SimpleNamespace(optimizer=optimizer)] * wrappers
        with learning.stable(optimizer, *wrapped):
            case.train(optimizer)
        weights.append(case.model[0].bias)
    assert torch.equal(*weights)


def test_layers_that_are_thawed_or_added_in_stable_training_are_projected() -> None:
    for adds in (False, True):
        case = Case()
        body = list(case.model[0].parameters())
        optimizer = SGD(case.model[2].parameters() if adds else case.model.parameters(), 0.3)
        case.model[0].requires_grad_(False)
        with case.learning.stable(optimizer):
            case.train(optimizer)
            case.model[0].requires_grad_(True)
            if adds:
                optimizer.add_param_group({"params": body})
            case.train(optimizer)
        case.check()


def test_a_layer_that_is_frozen_in_stable_training_stands_still() -> None:
    case = Case()
    learning = Continual(case.model, check=False)
    learning.remember([(case.old, torch.arange(2))])
    optimizer = SGD(case.model.parameters(), 0.3)
    with learning.stable(optimizer):
        case.train(optimizer)
        case.model[0].requires_grad_(False)
        case.model.zero_grad()
        bias, head = case.model[0].bias.clone(), case.model[2].bias.clone()
        case.train(optimizer)
    assert torch.equal(case.model[0].bias, bias)
    assert not torch.equal(case.model[2].bias, head)


def test_a_layer_of_which_nothing_is_remembered_is_refused_when_it_is_thawed() -> None:
    case = Case()
    case.model[0].requires_grad_(False)
    learning = Continual(case.model, check=False)
    learning.remember([(case.old, torch.arange(2))])
    optimizer = SGD(case.model.parameters(), 0.3)
    message = "'0.weight' is trained now, and was not when old data were remembered"

    def train() -> None:
        with learning.stable(optimizer):
            case.train(optimizer)
            case.model[0].requires_grad_(True)
            case.train(optimizer)

    with pytest.raises(BecameError, match=message):
        train()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_a_compiled_step_is_projected() -> None:
    case = Case()
    optimizer = SGD(case.model.parameters(), 0.1)

    @torch.compile(backend="eager")  # type: ignore[untyped-decorator, unused-ignore]
    def step() -> None:
        optimizer.zero_grad()
        case.loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()  # compiled before
    case.learning.remember([(case.old, torch.arange(2))])
    case.before = case.model(case.old).detach()
    with case.learning.stable(optimizer):
        for _ in range(3):
            step()
    case.check()


def test_a_copy_goes_on_as_the_original_does() -> None:
    case = Case()
    learning = pickle.loads(pickle.dumps(case.learning))
    case.learning, case.model = learning, learning.model
    optimizer = SGD(case.model.parameters(), 0.1)
    with case.learning.stable(optimizer):
        case.train(optimizer)
    case.check()


def test_a_fused_step_that_a_scaler_skips_pulls_nothing() -> None:
    """It is skipped within the step, when an Adam's moments may not have begun."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, targets = 20 * torch.randn(8, 6), torch.arange(8) % 3
    learning = Continual(model)
    learning.remember([(inputs, targets)])
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-3, fused=True), torch.amp.GradScaler("cpu")
    with learning.stable(optimizer):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = functional.cross_entropy(model(inputs), targets, reduction="sum") * 1e6  # overflows
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 65536
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("samples", [2, 6])  # a space of less, and of more than half of the width
def test_a_step_within_autocast_is_projected_in_full_precision(samples: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    old, new, targets = torch.randn(samples, 8), torch.randn(5, 8), torch.arange(5) % 3
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen")
    learning.remember([(old, torch.arange(samples) % 3)])
    before, optimizer = model(old).detach(), Adam(model.parameters(), 0.01)
    with learning.stable(optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                functional.cross_entropy(model(new), targets).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    torch.testing.assert_close(model(old).detach(), before, rtol=0, atol=1e-5)


def test_a_layer_that_is_frozen_while_it_has_a_gradient_stands_still() -> None:
    case = Case()
    optimizer = SGD(case.model.parameters(), 0.1, momentum=0.9)
    with case.learning.stable(optimizer):
        case.train(optimizer)
        case.model[0].requires_grad_(False)
        frozen = case.model[0].weight.clone()
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            case.loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert torch.equal(case.model[0].weight, frozen)
    case.check()


@pytest.mark.parametrize("uncovered", ["penalised", "frozen"])
@pytest.mark.parametrize("projector", [GPM(0.5), GPM(1.0), SGP(), NSCL()])
def test_the_memory_follows_a_model_to_another_device(projector: Any, uncovered: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))
    learning = Continual(model, projector=projector, uncovered=uncovered)
    learning.remember([(torch.randn(4, 2) @ torch.randn(2, WIDTH), torch.arange(4) % CLASSES)])
    optimizer = SGD(model.parameters(), 0.1)
    guard = learning._guard(optimizer)
    guard.before_step()
    guard.after_step()
    # As a trainer moves it that begins to fit. On this device parameters are new ones; on a GPU they stay the same.
    model.to("meta")
    guard._names |= {value: name for name, value in model.named_parameters()}
    optimizer.param_groups[0]["params"] = list(model.parameters())
    guard.before_step()
    with torch.no_grad():
        guard._correct()
    for tree in (guard.projector, guard.penalised, guard.before):
        assert {str(value.device) for value in named_leaves(tree).values()} <= {"meta"}
    learning.posterior = None  # whose numbers are looked at wherever it is made
    learning._follow()
    assert {str(value.device) for value in named_leaves(learning.projector).values()} == {"meta"}


def test_the_memory_of_a_model_on_two_devices_is_where_each_weight_is() -> None:
    case = Case()
    owners = {name: value.to("meta" if name == "2.weight" else "cpu") for name, value in case.model.named_parameters()}
    posterior, here = case.learning.posterior, dict(case.model.named_parameters())
    assert posterior is not None
    for path, value in named_leaves(beside(case.learning.projector, owners)).items():
        assert value.device.type == ("meta" if "2.weight" in path else "cpu")
    assert beside(case.learning.projector, here) is case.learning.projector
    assert beside(posterior, here) is posterior
