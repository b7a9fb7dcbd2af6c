"""A catalogue of users' models around ``Continual``, in double precision: each is exact, or refused in a sentence.

Of each, Fisher information and the slopes and curvature of a merge are held against brute force, and old outputs stand
still in stable training. To add a model, add a row to ``NETWORKS`` of ``tests/torch/own_models.py``, or to ``REFUSED``.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import Continual
from became_core import BecameError, Secant
from became_core.projection import GPM
from tests.torch.modules import CLASSES, WIDTH
from tests.torch.oracle import autograd_gradients, secant_by_brute_force
from tests.torch.own_models import NETWORKS, Of, Pairs, bagged, bounded, checkpointed, head, looked_up


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = make().double()
    network(torch.randn(9, WIDTH, dtype=torch.float64))  # statistics
    return network.eval()


def data(seed: int, *sizes: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, WIDTH, dtype=torch.float64, generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def train(network: nn.Module, optimizer: torch.optim.Optimizer, batches: Pairs) -> None:
    for inputs, targets in batches:
        optimizer.zero_grad()
        functional.cross_entropy(network(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


pytestmark = [
    pytest.mark.filterwarnings("ignore:taps do not know:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_measured_exactly_and_old_outputs_stand_still(name: str) -> None:
    network, old, new = built(NETWORKS[name]), data(1, 5, 3, 1), data(2, 4, 4)
    learning = Continual(network, estimator=Secant())
    learning.remember(old)
    network = getattr(network, "_orig_mod", network)  # names are those of what was compiled
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()
    expected = autograd_gradients(network, *(torch.cat(side) for side in zip(*old, strict=True)))
    assert set(found) == set(expected)
    for key, gradients in expected.items():
        # Where a softmax lets nothing move, both are rounding.
        torch.testing.assert_close(found[key], gradients.square().mean(0), rtol=1e-9, atol=1e-25)
    optimizer = torch.optim.SGD(network.parameters(), 0.2)
    few = data(3, 2)
    still = Continual(network, projector=GPM(1.0), uncovered="frozen", check=False)
    still.remember(few)
    before = network(few[0][0]).detach()
    with still.stable(optimizer):
        train(network, optimizer, new * 2)
    torch.testing.assert_close(network(few[0][0]).detach(), before, rtol=0, atol=1e-10)
    with learning.stable(optimizer):
        train(network, optimizer, new)
    theta_gp = {key: value.detach().clone() for key, value in network.named_parameters()}
    with learning.plastic():
        train(network, optimizer, new * 2)
    theta_hat = {key: value.detach().clone() for key, value in network.named_parameters()}
    b, c = secant_by_brute_force(network, theta_gp, theta_hat, learning, new)
    report = learning.merge(new)
    assert report.slopes == pytest.approx((b, b + c), rel=1e-5, abs=1e-8)


SEVERAL = ["tied layers", "a layer of two names", "a layer of two names that computes its weight"]


@pytest.mark.parametrize("name", [*SEVERAL, "a layer that comes twice", "a layer three times in a list"])
def test_parameters_that_stand_in_several_places_stay_those_of_the_model(name: str) -> None:
    network = built(NETWORKS[name])
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    learning = Continual(network, uncovered="free")
    learning.remember(data(1, 5, 3))
    with learning.stable(optimizer):
        train(network, optimizer, data(2, 4))
    with learning.plastic():
        train(network, optimizer, data(2, 4))
    learning.merge(data(2, 4))
    after = dict(network.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[key] is value for key, value in parameters.items())
    before = {key: value.detach().clone() for key, value in parameters.items()}
    train(network, optimizer, data(3, 4))
    assert not any(torch.equal(after[key], value) for key, value in before.items())


# What is refused, and what the message says.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "checkpointed by reentrant passes": (
        lambda: checkpointed(True),
        r"gradients cannot be taken \(When use_reentrant=True",
    ),
    "an input that is overwritten": (
        lambda: Of(lambda net, x: net.fc(y := x * 1.0) + y[:, :3].mul_(2.0).sum(), fc=head(6)),
        "gradients cannot be taken .* modified by an inplace operation",
    ),
    "gradients that are divided by counts": (
        lambda: looked_up(scale_grad_by_freq=True),
        "fails its first look: a derivative, by forward mode",
    ),
    "words of bounded lengths": (lambda: looked_up(max_norm=0.5), r"'words' shortens its rows .* \(max_norm=0\.5\)"),
    "bags of words of bounded lengths": (lambda: bagged(max_norm=2), r"'words' shortens its rows .* \(max_norm=2\)"),
    "words of bounded lengths, by a function": (
        lambda: bounded(functional.embedding),
        r"a lookup in '.*words' shortens its rows .* \(max_norm=100\)",
    ),
    "bags of words of bounded lengths, by a function": (
        lambda: bounded(functional.embedding_bag),
        r"a lookup in '.*words' shortens its rows .* \(max_norm=100\)",
    ),
    "words of bounded lengths, by a function that is compiled": (
        lambda: cast("nn.Module", torch.compile(bounded(functional.embedding), backend="eager")),
        r"a lookup in '.*words' shortens its rows .* \(max_norm=100\)",
    ),
    "complex parameters": (
        lambda: Of(lambda net, x: (torch.fft.rfft(x) @ net.w).real, w=torch.randn(4, 3, dtype=torch.complex128)),
        "'w' is complex; let torch.view_as_complex make it",
    ),
    "a dict": (lambda: Of(lambda net, x: {"logits": net.fc(x)}, fc=head(6)), "returned a dict, and no tensor"),
    "a tuple": (lambda: Of(lambda net, x: (net.fc(x), x), fc=head(6)), "returned a tuple, and no tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_a_sentence(name: str) -> None:
    make, message = REFUSED[name]
    network = make() if name == "complex parameters" else make().double()
    with pytest.raises(BecameError, match=message):
        Continual(network).remember(data(1, 5))


@pytest.mark.parametrize("make", [lambda: looked_up(max_norm=0.5), lambda: bounded(functional.embedding, 0.5)])
def test_words_of_bounded_lengths_may_be_frozen(make: Callable[[], nn.Module]) -> None:
    """Shortening rows that are looked up changes nothing of what the network computes."""
    network: Any = make().double()
    network.words.requires_grad_(False)
    before = copy.deepcopy(network)
    learning = Continual(network)
    learning.remember(data(1, 5))
    assert learning.posterior is not None
    assert set(learning.posterior.mean) == {"head.weight", "head.bias"}
    for inputs, _ in data(1, 5):
        assert torch.equal(network(inputs), before(inputs))


def test_samples_on_another_axis_of_the_inputs_are_refused() -> None:
    network = Of(lambda net, x: net.cell(x)[0][-1], cell=nn.GRU(2, CLASSES)).double()
    batch = torch.randn(4, 5, 2, dtype=torch.float64), torch.arange(5) % CLASSES
    with pytest.raises(
        BecameError, match="the first of 5 samples has 5 rows of outputs by itself; samples must lie on"
    ):
        Continual(network).remember([batch])


def test_what_all_samples_share_may_be_as_long_as_the_few_that_are_looked_at() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = head(WIDTH)

        def forward(self, inputs: Tensor, scales: Tensor) -> Tensor:
            scaled: Tensor = self.fc(inputs) * scales
            return scaled

    scales = torch.arange(1.0, 4.0, dtype=torch.float64)
    learning = Continual(Scaled().double())
    learning.remember([((inputs, scales), targets) for inputs, targets in data(1, 5)])
    assert learning.checked is not None


def half_of(dtype: torch.dtype) -> nn.Module:
    """A layer in this dtype and one in float32."""
    body = nn.Linear(6, 8).to(dtype)
    return Of(lambda net, x: net.head(net.body(x.to(dtype)).float().tanh()), body=body, head=head(8))


def under_autocast() -> nn.Module:
    def run(net: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return net.head(net.body(x).tanh())

    return Of(run, body=nn.Linear(6, 8), head=head(8))


@pytest.mark.parametrize(
    "make",
    [lambda: half_of(torch.bfloat16), lambda: half_of(torch.float16), under_autocast],
    ids=["bf16", "f16", "autocast"],
)
def test_a_network_in_half_precision_is_measured_to_its_rounding(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network, old = make(), [(x.float(), y) for x, y in data(1, 6, 6)]
    learning = Continual(network)
    learning.remember(old)
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()["body.weight"]
    expected = autograd_gradients(network, *(torch.cat(side) for side in zip(*old, strict=True)))["body.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float().square().mean(0), rtol=0.05, atol=0.01 * float(found.max()))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with learning.stable(optimizer):
        train(network, optimizer, old)
    with learning.plastic():
        train(network, optimizer, old * 3)
    assert 0 <= learning.merge(old).alpha <= 1
    assert [value.dtype for value in network.parameters()] == [value.dtype for value in make().parameters()]


class _Ragged(nn.Module):
    """Rows of each sample as many as its length says, cut apart again after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
        counts = lengths.tolist()
        hidden = self.first(torch.cat([rows[i, :count] for i, count in enumerate(counts)])).tanh()
        return cast(Tensor, self.second(torch.stack([part.mean(0) for part in hidden.split(counts)])))


def test_rows_that_a_later_batch_cuts_elsewhere_are_found_anew() -> None:
    torch.manual_seed(0)
    model = _Ragged().double()
    rows, targets = torch.randn(3, 3, 4, 5).double(), torch.arange(3)
    lengths = [torch.tensor(each) for each in ([4, 4, 4], [3, 2, 4], [2, 3, 1])]
    learning = Continual(model)
    learning.remember([((each, length), targets) for each, length in zip(rows, lengths, strict=True)])
    expected: dict[str, Tensor] = {name: torch.zeros_like(value).detach() for name, value in model.named_parameters()}
    for each, length in zip(rows, lengths, strict=True):
        for sample in range(3):
            model.zero_grad()
            one = slice(sample, sample + 1)
            functional.cross_entropy(model(each[one], length[one]), targets[one]).backward()  # type: ignore[no-untyped-call]
            for name, value in model.named_parameters():
                assert value.grad is not None
                expected[name] = expected[name] + value.grad**2 / 9
    assert learning.posterior is not None
    fisher = learning.posterior.precision.diagonal()
    for name, mean in expected.items():
        torch.testing.assert_close(fisher[name], mean, rtol=1e-9, atol=1e-12)
