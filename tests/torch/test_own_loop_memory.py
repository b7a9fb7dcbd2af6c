"""What ``Continual`` remembers, against gradients of single samples in double precision; and of which batches."""

import math
from collections import UserDict
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import Continual
from adapters.torch.batches import to_device
from became_core import BecameError, Diagonal
from became_core.curvature import Categorical, Gaussian
from became_core.projection import GPM, NSCL, SGP
from tests.listening import totals_shown
from tests.torch.modules import CLASSES, WIDTH
from tests.torch.oracle import autograd_gradients
from tests.torch.own_loop import NETWORKS, new_data, new_network, train, whole


@pytest.mark.filterwarnings("ignore:taps do not know:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_it_remembers_the_mean_of_squared_gradients_of_single_samples(name: str) -> None:
    model, batches = new_network(name), new_data(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    model.eval() if name == "GRU" else None
    modes = [module.training for module in model.modules()]
    learning = Continual(model)
    learning.remember(batches)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected = autograd_gradients(model.eval(), *whole(batches))
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()
    assert set(found) == set(expected)
    for key, gradients in expected.items():
        torch.testing.assert_close(found[key], gradients.square().mean(0), rtol=1e-9, atol=1e-14)
    assert learning.checked is not None
    assert learning.checked.findings[-2].what == "outputs if matrices move where the sample reads nothing"


def test_the_fisher_information_may_be_of_the_models_own_targets() -> None:
    """The exact expectation is the diagonal of the GGN; what is drawn is near it; a loss of one's own has neither."""
    model, batches = new_network("perceptron"), new_data(1, 40, 8)
    found = []
    for kind in ("true", "sampled"):
        learning = Continual(model, fisher=kind)
        learning.remember(batches)
        assert learning.posterior is not None
        found.append(learning.posterior.precision.diagonal()["2.weight"])
    inputs, _ = whole(batches)
    hidden, p = model[1](model[0](inputs)).detach(), model(inputs).detach().softmax(1)
    expected = (p * (1 - p)).T @ hidden.square() / len(inputs)
    torch.testing.assert_close(found[0], expected)
    assert float((found[1] - expected).norm()) < 0.3 * float(expected.norm())
    with pytest.raises(BecameError, match="a loss of your own has no targets of the model's own"):
        Continual(model, functional.cross_entropy, fisher="true").remember(batches)
    with pytest.raises(BecameError, match="the Fisher information is 'batch'; choose empirical, true or sampled"):
        Continual(model, fisher="batch")  # type: ignore[arg-type]


class _Language(nn.Module):
    """A causal language model with tied embeddings, called as those of ``transformers`` are."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, WIDTH), nn.Embedding(5, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, dropout=0.0)
        self.head = nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor, mask: Tensor) -> Any:
        length = input_ids.shape[1]
        hidden = self.words(input_ids) * mask[..., None] + self.places(torch.arange(length))
        causal = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
        logits = self.head(self.block(hidden, src_mask=causal))
        return type("Output", (), {"logits": logits})()


def test_tokens_of_a_language_model_are_remembered_by_the_sequence() -> None:
    torch.manual_seed(0)
    model = _Language().double().eval()
    batches = []
    for length in (4, 3, 4):
        tokens = torch.randint(0, 7, (3, length))
        labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.2, -100)
        batches.append({"input_ids": tokens, "mask": torch.ones(tokens.shape, dtype=torch.float64), "labels": labels})
    learning = Continual(model, Categorical(by="token", shift=True), projector=GPM(0.8))
    learning.remember(batches)
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    count = 0
    for batch in batches:
        for row in range(3):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            labels = one.pop("labels")[:, 1:]
            loss = functional.cross_entropy(model(**one).logits[:, :-1].transpose(1, 2), labels, reduction="sum")
            count += int((labels >= 0).sum())
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                loss, list(model.parameters()), allow_unused=True
            )
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += 0 if gradient is None else gradient.square()
    for name, value in total.items():
        torch.testing.assert_close(found[name], value / count, rtol=1e-9, atol=1e-14)
    by_name = {p.name: p for p in learning.coverage.parameters}
    assert by_name["words.weight"].treatment == "penalised"  # as an embedding and as a matrix
    assert by_name["block.self_attn.in_proj_weight"].treatment == "protected"


def test_batches_of_any_kind_are_read_by_the_users_own_functions() -> None:
    model, (batch, *_), nothing = new_network("perceptron"), new_data(1), cast("Any", lambda net, b: {})
    record = {"x": batch[0], "y": batch[1]}
    by_hand = Continual(model, apply=lambda net, b: net(b["x"]), targets=lambda b: b["y"])
    by_hand.remember([record])
    plain = Continual(model)
    plain.remember([batch])
    assert by_hand.posterior is not None
    assert plain.posterior is not None
    for name, value in plain.posterior.precision.diagonal().items():
        torch.testing.assert_close(by_hand.posterior.precision.diagonal()[name], value)
    with pytest.raises(BecameError, match="a batch has the keys x, y; it needs labels, or give apply= and targets="):
        Continual(model).remember([record])
    with pytest.raises(BecameError, match="a batch is a Tensor; give pairs"):
        Continual(model).remember([batch[0]])
    with pytest.raises(BecameError, match="both apply= and targets="):
        Continual(model, apply=lambda net, b: net(b)).remember([batch])
    with pytest.raises(BecameError, match="the model returned a dict, and no tensor"):
        Continual(nn.ModuleDict({"a": model}), apply=nothing, targets=lambda b: b[1]).remember([batch])


def test_a_second_task_adds_to_the_memory() -> None:
    model, first, second = new_network("perceptron"), new_data(1), new_data(2)
    learning = Continual(model, decay=0.5)
    learning.remember(first)
    assert learning.posterior is not None
    before, rank = learning.posterior.precision.diagonal(), dict(learning.projector.rank)
    with torch.no_grad():
        model[0].bias.add_(0.1)
    learning.remember(second)
    alone = Continual(model)
    alone.remember(second)
    assert alone.posterior is not None
    for name, value in alone.posterior.precision.diagonal().items():
        torch.testing.assert_close(learning.posterior.precision.diagonal()[name], value + 0.5 * before[name])
    torch.testing.assert_close(learning.posterior.mean["0.bias"], model[0].bias.detach())
    assert learning.projector.rank["0.weight"][0] > rank["0.weight"][0]


@pytest.mark.parametrize("projector", [GPM(), SGP(), NSCL()])
@pytest.mark.parametrize("broken", [0, 2])
def test_a_failed_remembering_leaves_no_trace(projector: Any, broken: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    regression = [(inputs, torch.randn(len(inputs), CLASSES).double()) for inputs, _ in new_data(1, batches=4)]
    learning, twin = (Continual(model, "gaussian", projector=projector) for _ in range(2))
    learning.remember(regression)
    damaged = [(inputs, targets.clone()) for inputs, targets in regression]
    damaged[broken][1][0] = math.nan
    with pytest.raises(BecameError, match=r"is not finite; look for NaN|the noise of a Gaussian likelihood is nan"):
        twin.remember(damaged)
    assert twin.posterior is None
    assert twin.projector is projector
    assert twin.likelihood == Gaussian()
    twin.remember(regression)
    assert twin.projector.rank == learning.projector.rank
    assert twin.likelihood == learning.likelihood
    update = {"0.weight": torch.randn(8, WIDTH).double()}
    torch.testing.assert_close(twin.projector.project(update), learning.projector.project(update), rtol=0, atol=1e-12)
    before, rank = twin.posterior, dict(twin.projector.rank)
    with pytest.raises(BecameError, match="is not finite; look for NaN in the batches"):
        twin.remember(damaged)
    assert twin.posterior is before
    assert twin.projector.rank == rank


class _Named(UserDict[str, Any]):
    """A batch whose entries are attributes, as a BatchEncoding is."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


def test_a_batch_keeps_its_class() -> None:
    moved = to_device(batch := _Named(x=torch.ones(2)), torch.device("meta"))
    assert (type(moved), moved.x.device.type, batch.x.device.type) == (_Named, "meta", "cpu")


def test_measurements_leave_buffers_as_they_were() -> None:
    """A model may change buffers in evaluation, in place or by another tensor."""

    class Counting(nn.Module):
        calls: Tensor
        last: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, CLASSES)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("last", torch.zeros(WIDTH), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x.detach().mean(0)
            outputs: Tensor = self.fc(x)
            return outputs

    model, batches = Counting().double(), new_data(1)
    learning, optimizer, last = Continual(model), torch.optim.SGD(model.parameters(), 0.1), model.last
    learning.remember(batches)
    assert model.last is last
    assert (int(model.calls), float(last.abs().max())) == (0, 0)
    with learning.stable(optimizer):
        train(model, optimizer, batches)
    with learning.plastic():
        train(model, optimizer, batches)
    calls, last = int(model.calls), model.last.clone()
    learning.merge(batches, trace=3)
    assert int(model.calls) == calls > 0
    torch.testing.assert_close(model.last, last, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("total", "share", "expected"), [(64, None, 64), (90, None, 64), (400, None, 100), (40, 0.5, 20), (3, 0.01, 1)]
)
def test_of_many_batches_a_share_is_measured_and_stands_for_all(total: int, share: Any, expected: int) -> None:
    model, (inputs, targets) = new_network("perceptron"), new_data(1)[0]
    # The batches come in a pattern of two kinds, as those of a loader that takes turns.
    batches = [(inputs * (1 + number % 2), targets, number) for number in range(total)]

    def fisher(batches: Any, share: float | None) -> tuple[Any, list[int]]:
        measured: list[int] = []

        def targets_of(batch: Any) -> Tensor:
            measured.append(batch[2])
            return cast("Tensor", batch[1])

        apply = cast("Any", lambda net, batch: net(batch[0]))
        learning = Continual(model, apply=apply, targets=targets_of, check=False, progress=False)
        learning.remember(batches, share=share)
        assert learning.posterior is not None
        return learning.posterior.precision.diagonal(), measured

    (_, every), (part, measured) = fisher(batches, 1), fisher(batches, share)
    assert every == list(range(total))
    assert measured[0] == 0
    assert measured == sorted(set(measured))
    assert 0.8 * expected <= len(measured) <= 1.2 * expected
    odd = sum(number % 2 for number in measured) / len(measured)
    assert expected < 10 or 0.3 <= odd <= 0.7
    kinds = [fisher(batches[kind : kind + 1], 1)[0] for kind in (0, 1)]
    for name, value in part.items():
        torch.testing.assert_close(value, (1 - odd) * kinds[0][name] + odd * kinds[1][name])
    # Of a stream of unknown length all are measured, unless the user says otherwise.
    assert fisher(iter(batches), share)[1] == (every if share is None else measured)


class _Stream(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(x, y) for batch in new_data(1) for x, y in zip(*batch, strict=True)])


def test_a_terminal_shows_how_far_a_pass_over_a_stream_is(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = totals_shown(monkeypatch)
    for loader in (torch.utils.data.DataLoader(_Stream(), batch_size=2), new_data(1)):
        Continual(new_network("perceptron"), check=False).remember(loader)
    Continual(new_network("perceptron"), check=False, progress=False).remember(new_data(1))
    assert totals == [None, 2]


def test_a_posterior_is_a_diagonal() -> None:
    learning = Continual(new_network("perceptron"))
    learning.remember(new_data(1))
    assert learning.posterior is not None
    assert isinstance(learning.posterior.precision, Diagonal)
