"""``Continual`` against brute force in double precision: what it remembers, what it projects, how it merges."""

import copy
import importlib
import importlib.util
import json
import math
import pickle
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import Continual
from adapters.torch.batches import to_device
from became_core import BecameError, Diagonal, Quadratic
from became_core.continual import Reservoir
from became_core.curvature import Bernoulli, Categorical, Gaussian
from became_core.projection import GPM, NSCL, SGP, TRGP
from tests.listening import totals_shown
from tests.torch.modules import CLASSES, WIDTH, Stored
from tests.torch.oracle import autograd_gradients, secant_by_brute_force


class _Encoder(nn.Module):
    """Attention over three tokens, with a linear layer for the result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, dropout=0.0)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.layer(torch.stack([x, x.cos(), x * x], 1)).mean(1))
        return outputs


class _Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell, self.head = kind(WIDTH, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.cell(torch.stack([x, x.cos(), x * x], 1))[0][:, -1])
        return outputs


class _Words(nn.Module):
    """Looks up rows of an embedding, many of which no input of one batch does."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(21, 3), nn.Linear(3 * WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        keys = (5 * x).round().clamp(-10, 10).long() + 10
        outputs: Tensor = self.head(self.words(keys).tanh().flatten(1))
        return outputs


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)),
    "convolutional": _convolutional,
    "encoder": _Encoder,
    "GRU": lambda: _Recurrent(nn.GRU),
    "LSTM": lambda: _Recurrent(nn.LSTM),
    "stored": Stored,
    "words": _Words,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 8)), nn.Tanh(), nn.Linear(8, CLASSES)
    ),
}
Pairs = list[tuple[Tensor, Tensor]]


def _network(name: str) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def _data(seed: int, batches: int = 2, size: int = 2) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, WIDTH, dtype=torch.float64, generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Pairs, epochs: int = 3) -> None:
    model.train()
    for _ in range(epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets, label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


@pytest.fixture(autouse=True)
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "taps do not know", UserWarning)
        yield


def _whole(batches: Pairs) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_remembers_the_mean_of_squared_gradients_of_single_samples(name: str) -> None:
    model, batches = _network(name), _data(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    model.eval() if name == "GRU" else None
    modes = [module.training for module in model.modules()]
    learning = Continual(model)
    learning.remember(batches)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    expected = autograd_gradients(model.eval(), *_whole(batches))
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()
    assert set(found) == set(expected)
    for key, gradients in expected.items():
        torch.testing.assert_close(found[key], gradients.square().mean(0), rtol=1e-9, atol=1e-14)
    assert learning.checked is not None
    assert learning.checked.findings[-2].what == "outputs if matrices move where the sample reads nothing"


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05),
    "Adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.02, momentum=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_old_outputs_stand_still_in_stable_training(name: str, optimizer: str) -> None:
    """All directions of the old data are protected, and what cannot be protected is frozen; then all is free."""
    model, old, new = _network(name), _data(1, batches=1), _data(2, batches=2, size=5)
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen", check=False)
    learning.remember(old)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    with torch.no_grad():
        before, theta = model.eval()(old[0][0]), {key: value.clone() for key, value in model.named_parameters()}
    with learning.stable(stepper):
        scheduler = torch.optim.lr_scheduler.StepLR(stepper, 1)
        _train(model, stepper, new)
        scheduler.step()
    if name == "convolutional":  # whose running statistics the user's own training changes
        model[2].reset_running_stats()
    torch.testing.assert_close(model.eval()(old[0][0]), before, rtol=0, atol=1e-9)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, theta[key])}
    assert moved
    assert moved <= {p.name for p in learning.coverage.parameters if p.treatment == "protected"}
    with learning.plastic():
        _train(model, stepper, new)
    assert float((model.eval()(old[0][0]) - before).detach().abs().max()) > 1e-4


def test_steps_under_autocast_with_a_scaler_and_accumulation_are_projected() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    old, new = ([(x.float(), y) for x, y in _data(seed)] for seed in (1, 2))
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen")
    learning.remember(old[:1])
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 0.05), torch.amp.GradScaler("cpu")
    before, weight = model(old[0][0]).detach(), model[0].weight.detach().clone()
    with learning.stable(optimizer):
        for _ in range(5):
            for inputs, targets in new:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = functional.cross_entropy(model(inputs), targets) / len(new)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert not torch.equal(model[0].weight, weight)
    torch.testing.assert_close(model(old[0][0]), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_what_is_not_covered_takes_a_proximal_step_to_the_old_mean(kind: Any) -> None:
    """Of an Adam the step is in its own metric, the root of its second moments."""
    model, old, new = _network("perceptron"), _data(1), _data(2)
    learning = Continual(model, penalty=30.0)
    learning.remember(old)
    assert learning.posterior is not None
    optimizer = kind(model.parameters(), 0.5)
    mean, precision = learning.posterior.mean["0.bias"], learning.posterior.precision.diagonal()["0.bias"]
    functional.cross_entropy(model(new[0][0]), new[0][1]).backward()  # type: ignore[no-untyped-call]
    bias: Any = model[0].bias
    # The first step of an Adam is as long everywhere, and its second moment is the gradient's square.
    scale = 1.0 if kind is torch.optim.SGD else bias.grad.abs() + 1e-8
    free = bias.detach() - 0.5 * bias.grad / scale
    with learning.stable(optimizer):
        optimizer.step()
    pull = 0.5 * 30.0 * precision / scale
    torch.testing.assert_close(bias.detach(), (free + pull * mean) / (1 + pull))
    stiff = Continual(model, penalty=1e12)
    stiff.remember(old)
    at = bias.detach().clone()
    with stiff.stable(optimizer):
        _train(model, optimizer, new)
    torch.testing.assert_close(bias.detach(), at, rtol=0, atol=1e-6)


def test_what_the_user_froze_is_never_touched() -> None:
    model = _network("convolutional")
    model[1].requires_grad_(False)
    kernel = model[1].weight.clone()
    learning = Continual(model)
    learning.remember(_data(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with learning.stable(optimizer):
        _train(model, optimizer, _data(2))
    with learning.plastic():
        _train(model, optimizer, _data(2))
    learning.merge(_data(2))
    assert torch.equal(model[1].weight, kernel)
    assert not model[1].weight.requires_grad
    treatments = {p.name: p.treatment for p in learning.coverage.parameters}
    assert treatments["1.weight"] == treatments["1.bias"] == "not trained"
    assert treatments["5.weight"] == "protected"
    assert treatments["2.weight"] == treatments["5.bias"] == "penalised"


@pytest.mark.parametrize("projector", [GPM(0.9), SGP(0.9), NSCL()])
def test_coverage_says_what_happens_to_every_parameter(projector: Any) -> None:
    model = _network("encoder")
    learning = Continual(model, projector=projector)
    learning.remember(_data(1))
    coverage = learning.coverage
    assert [p.name for p in coverage.parameters] == [name for name, _ in model.named_parameters()]
    by_name = {p.name: p for p in coverage.parameters}
    attention = by_name["layer.self_attn.in_proj_weight"]
    assert (attention.treatment, attention.use, attention.width) == ("protected", "matrix", WIDTH)
    assert by_name["layer.norm1.weight"].treatment == "penalised"
    assert by_name["layer.norm1.weight"].use == "other"
    assert coverage.share("protected") + coverage.share("penalised") == pytest.approx(1)
    text = str(coverage)
    assert "layer.norm1.weight" in text
    assert f"{100 * coverage.share('protected'):.1f} % protected" in text


@pytest.mark.parametrize("name", ["perceptron", "encoder", "GRU", "stored"])
def test_the_merge_is_the_minimum_that_brute_force_finds(name: str) -> None:
    model, old, new = _network(name), _data(1, 4, 8), _data(2, 4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    _train(model, optimizer, old, epochs=10)
    learning = Continual(model)
    learning.remember(iter(old))
    with learning.stable(optimizer):
        _train(model, optimizer, new)
    theta_gp = {key: value.detach().clone() for key, value in model.named_parameters()}
    with learning.plastic():
        _train(model, optimizer, new, epochs=25)
    theta_hat = {key: value.detach().clone() for key, value in model.named_parameters()}
    b, c = secant_by_brute_force(model, theta_gp, theta_hat, learning, new)
    expected = min(max(-b / c, 0.0), 1.0)
    report = learning.merge(iter(new), trace=3)
    assert report.alpha == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < report.alpha < 1
    assert report.promised
    assert report.is_convex
    assert report.slopes[0] < 0 < report.slopes[1]
    assert report.gain > 0
    assert report.curvature == "forward mode"
    for key, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), theta_gp[key] + report.alpha * (theta_hat[key] - theta_gp[key]))
    inputs, targets = _whole(new)
    for alpha, loss in report.trace:
        theta = {key: theta_gp[key] + alpha * (theta_hat[key] - theta_gp[key]) for key in theta_gp}
        outputs = torch.func.functional_call(model.eval(), theta, (inputs,))
        assert loss == pytest.approx(float(functional.cross_entropy(outputs, targets)))
    assert f"α* = {report.alpha:.3f}" in str(report)
    assert "keeps the stable model" in str(replace(report, alpha=0.0))
    assert "keeps the stable model" not in str(report)
    learning.remember(new)
    with pytest.raises(BecameError, match="a merge is of two models"):
        learning.merge(new)


def test_a_loss_of_ones_own_is_merged_by_slopes() -> None:
    """The cross-entropy, given as a callable, against the likelihood that it is of."""
    alphas = []
    for likelihood in ("categorical", functional.cross_entropy):
        model, old, new = _network("perceptron"), _data(1, 4, 8), _data(2, 4, 8)
        optimizer = torch.optim.AdamW(model.parameters(), 0.02)
        _train(model, optimizer, old, epochs=10)
        learning = Continual(model, likelihood)
        learning.remember(old)
        with learning.stable(optimizer):
            _train(model, optimizer, new)
        with learning.plastic():
            _train(model, optimizer, new, epochs=20)
        report = learning.merge(new, trace=2)
        alphas.append(report.alpha)
    assert report.curvature == "a difference of slopes"
    assert 0 < alphas[0] < 1
    # A difference of slopes sees all curvature, and not only the Gauss-Newton part that calibrates the old side.
    assert alphas[1] == pytest.approx(alphas[0], abs=0.1)
    with pytest.raises(BecameError, match=r"the loss has shape \[8\]; it must return one number"):
        Continual(model, lambda z, y: functional.cross_entropy(z, y, reduction="none")).remember(old)


@pytest.mark.parametrize("likelihood", [Gaussian(), Gaussian(0.5), Bernoulli()])
def test_regression_and_several_labels_are_remembered_and_merged(likelihood: Any) -> None:
    model, inputs = _network("perceptron"), [x for x, _ in _data(1, 3, 8)]
    kind = type(likelihood)
    old, new = (
        [(x, x[:, :3].sin() + s if kind is Gaussian else (x[:, :3] > s).double()) for x in inputs] for s in (0, 1)
    )
    learning = Continual(model, likelihood)
    learning.remember(old)
    assert learning.posterior is not None
    rows = []
    for x, y in old:
        for sample, target in zip(x, y, strict=True):
            z = model(sample[None])[0]
            if kind is Gaussian:
                assert isinstance(learning.likelihood, Gaussian)
                noise = learning.likelihood.noise
                assert noise is not None
                loss = (z - target).square().sum() / (2 * noise**2)
            else:
                loss = functional.binary_cross_entropy_with_logits(z, target, reduction="sum")
            rows.append(torch.autograd.grad(loss, model[0].weight)[0])
    expected = torch.stack(rows).square().mean(0)
    torch.testing.assert_close(learning.posterior.precision.diagonal()["0.weight"], expected)
    if likelihood == Gaussian():
        first = (model(old[0][0]) - old[0][1]).detach().square().mean().sqrt()
        assert isinstance(learning.likelihood, Gaussian)
        assert learning.likelihood.noise == pytest.approx(float(first))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)

    def train() -> None:
        for x, y in new * 10:
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

    with learning.stable(optimizer):
        train()
    with learning.plastic():
        train()
    assert 0 <= learning.merge(new).alpha <= 1


def test_the_fisher_information_may_be_of_the_models_own_targets() -> None:
    """The exact expectation is the diagonal of the GGN; what is drawn is near it; a loss of one's own has neither."""
    model, batches = _network("perceptron"), _data(1, 40, 8)
    found = []
    for kind in ("true", "sampled"):
        learning = Continual(model, fisher=kind)
        learning.remember(batches)
        assert learning.posterior is not None
        found.append(learning.posterior.precision.diagonal()["2.weight"])
    inputs, _ = _whole(batches)
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
    model, (batch, *_), nothing = _network("perceptron"), _data(1), cast("Any", lambda net, b: {})
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


def test_second_moments_of_an_optimizer_stand_for_old_data_with_a_warning() -> None:
    model, batches = _network("perceptron"), _data(1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, betas=(0.9, 0.99))
    _train(model, optimizer, batches, epochs=4)
    learning = Continual(model)
    with pytest.warns(UserWarning, match="unfit after clipping"):
        learning.remember(optimizer=optimizer, samples=32)
    assert learning.posterior is not None
    moment = optimizer.state[model[0].weight]["exp_avg_sq"]
    found = learning.posterior.precision.diagonal()["0.weight"]
    torch.testing.assert_close(found, moment / (1 - 0.99**8) * 32)
    assert learning.coverage.share("penalised") == 1
    with learning.stable(optimizer):
        _train(model, optimizer, _data(2))
    with learning.plastic():
        _train(model, optimizer, _data(2))
    assert 0 <= learning.merge(_data(2)).alpha <= 1
    with pytest.raises(BecameError, match="needs samples="):
        learning.remember(optimizer=optimizer)
    with pytest.raises(BecameError, match="no second moments"):
        learning.remember(optimizer=torch.optim.SGD(model.parameters(), 0.1), samples=1)
    with pytest.raises(BecameError, match="either batches or an optimizer"):
        learning.remember(batches, optimizer=optimizer, samples=1)


@pytest.mark.parametrize("share", [0.25, 0.75])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_projected_alike_in_place_and_not(share: float, layout: Any) -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, CLASSES)).double()
    model.to(memory_format=layout)
    learning = Continual(model, uncovered="free", check=False)
    images = torch.randn(8, 4, 4, 4, dtype=torch.float64)
    learning.remember([(images, torch.arange(8) % CLASSES)])
    ranks, arrays = learning.projector.rank, {"tasks": torch.tensor(1)}
    for name, (_, width) in ranks.items():
        basis = torch.randn(width, int(share * width), dtype=torch.float64)
        arrays[f"bases.{name}"] = torch.linalg.qr(basis)[0]
    learning.projector = GPM().with_arrays(arrays)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with learning.stable(optimizer):
        functional.cross_entropy(model(images), torch.arange(8) % CLASSES).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, value in model.named_parameters():
        step = -0.1 * (torch.zeros_like(value) if value.grad is None else value.grad)
        expected = before[name] + learning.projector.project({name: step})[name]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-14)


def test_few_rows_of_several_batches_have_the_spaces_of_all_rows_together() -> None:
    model, batches = nn.Linear(40, CLASSES).double(), [(torch.randn(3, 40).double(), torch.arange(3))]
    batches += [(torch.randn(2, 40).double(), torch.arange(2))]
    learning = Continual(model, projector=GPM(1.0))
    learning.remember(batches)
    assert learning.projector.rank == {"weight": (5, 40)}
    rows = torch.cat([x for x, _ in batches])
    assert float(learning.projector.project({"weight": rows})["weight"].abs().max()) < 1e-12


def test_of_an_embedding_the_rows_that_are_looked_up_most_are_protected() -> None:
    model: Any = nn.Sequential(nn.Embedding(6, 2, padding_idx=0), nn.Flatten(), nn.Linear(8, CLASSES)).double()
    keys = torch.tensor([[1, 2, 1, 0], [1, 2, 0, 0], [3, 0, 0, 0]])  # 0 is padding, which has no gradient
    learning = Continual(model, projector=GPM(0.8), uncovered="free")
    learning.remember([(keys, torch.tensor([0, 1, 2]))])
    assert learning.projector.rank["0.weight"] == (2, 6)
    before, optimizer = model[0].weight.detach().clone(), torch.optim.SGD(model.parameters(), 0.1)
    with learning.stable(optimizer):
        loss = functional.cross_entropy(model(torch.tensor([[1, 2, 3, 4]])), torch.tensor([0]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    moved = (model[0].weight.detach() != before).any(1)
    assert moved.tolist() == [False, False, False, True, True, False]


def test_a_second_task_adds_to_the_memory() -> None:
    model, first, second = _network("perceptron"), _data(1), _data(2)
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


class _Heads(nn.Module):
    """A body with several heads, of which one is used."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.body, self.heads, self.used = nn.Linear(WIDTH, 8), nn.ModuleList(), 0
        for _ in range(count):
            self.heads.append(nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.heads[self.used](self.body(x).tanh())
        return outputs


@pytest.mark.parametrize("is_new", [False, True])
def test_a_head_that_a_later_task_uses_is_free_and_then_protected(is_new: bool) -> None:
    model: Any = _Heads(1 if is_new else 2).double()
    learning = Continual(model, uncovered="frozen")
    learning.remember(_data(1))
    if is_new:
        model.heads.append(nn.Linear(8, CLASSES).double())
    model.used = 1
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    treatments = {p.name: p.treatment for p in learning.coverage.parameters}
    assert treatments["heads.1.weight"] == ("free" if is_new else "frozen")
    with learning.stable(optimizer):
        _train(model, optimizer, _data(2))
    assert torch.equal(model.heads[1].weight, before["heads.1.weight"]) == (not is_new)
    learning.remember(_data(2))
    rank = learning.projector.rank
    assert rank["heads.1.weight"][1] == rank["heads.0.weight"][1] == 8
    assert learning.posterior is not None
    expected = autograd_gradients(model.eval(), *_whole(_data(2)))["heads.1.weight"].square().mean(0)
    torch.testing.assert_close(learning.posterior.precision.diagonal()["heads.1.weight"], expected)


def test_a_parameter_that_old_data_hold_by_curvature_alone_goes_on_to_be_penalised() -> None:
    """A weight that was computed with is a matrix in the second task, whose space says nothing of the first."""
    model = nn.Linear(WIDTH, CLASSES).double()
    is_computed = [True]

    def run(net: Any, batch: Any) -> Tensor:
        return functional.linear(batch[0], net.weight.softmax(0) if is_computed[0] else net.weight, net.bias)

    learning = Continual(model, apply=run, targets=lambda batch: batch[1])
    learning.remember(_data(1))
    is_computed[0] = False
    learning.remember(_data(2))
    assert "weight" not in learning.projector.rank
    assert {p.treatment for p in learning.coverage.parameters} == {"penalised"}
    alone = Continual(model, apply=run, targets=lambda batch: batch[1])
    alone.remember(_data(2))
    assert "weight" in alone.projector.rank


def test_a_model_of_which_the_memory_says_too_little_is_refused() -> None:
    model = _network("perceptron")
    model[0].requires_grad_(False)
    learning, optimizer = Continual(model), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(_data(1))
    model[0].requires_grad_(True)
    with (
        pytest.raises(BecameError, match=r"'0\.weight' is trained now, and was not when old data were remembered"),
        learning.stable(optimizer),
    ):
        pass
    frozen = Continual(model, uncovered="frozen")
    model[0].requires_grad_(False)
    frozen.remember(_data(1))
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    with frozen.stable(optimizer):
        _train(model, optimizer, _data(2))
    assert torch.equal(model[0].weight, before)
    model[2] = nn.Linear(8, CLASSES + 2).double()
    message = r"'2\.weight' is \[5, 8\] now, and was \[3, 8\] when old data were remembered; leave it as it is"
    with pytest.raises(BecameError, match=message), frozen.stable(torch.optim.SGD(model.parameters(), 0.1)):
        pass
    with pytest.raises(BecameError, match=message):
        frozen.remember(_data(2))
    square = nn.Linear(WIDTH, WIDTH, bias=False).double()
    turned = [False]
    sides = Continual(
        square,
        apply=lambda net, batch: batch[0] @ (net.weight if turned[0] else net.weight.T),
        targets=lambda batch: batch[1],
    )
    sides.remember(_data(1))
    turned[0] = True
    with pytest.raises(BecameError, match="'weight' was multiplied from its other side in the memory"):
        sides.remember(_data(2))


class _Merging(nn.Linear):
    """A frozen layer with a low-rank adapter that it adds to its weight in evaluation mode, as loralib's do."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.ones(2, WIDTH)), nn.Parameter(torch.zeros(WIDTH, 2))
        self.is_merged = False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.is_merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.is_merged else super().forward(x) + x @ self.down.T @ self.up.T


def test_a_layer_that_changes_a_weight_in_evaluation_mode_is_refused() -> None:
    layer = _Merging().double()
    model = nn.Sequential(layer, nn.Linear(WIDTH, CLASSES).double())
    learning = Continual(model, check=False)
    learning.remember(_data(1))
    assert (layer.is_merged, layer.training) == (False, True)  # it merged nothing, as ``up`` is zero
    nn.init.ones_(layer.up)
    before = layer.weight.detach().clone()
    with pytest.raises(BecameError, match=r"changes '0\.weight' when it goes into evaluation mode"):
        learning.remember(_data(2))
    torch.testing.assert_close(layer.weight, before)


class _Directed(nn.Module):
    """A layer that divides by the norm of its weight, through which no gradient goes, as DoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x) / self.inner.weight.detach().norm()
        return outputs


def test_a_matrix_that_acts_where_no_gradient_shows_it_is_not_called_protected() -> None:
    with pytest.raises(BecameError, match=r"outputs if 'inner\.weight' moves where the sample reads nothing"):
        Continual(_Directed().double()).remember(_data(1))


class _Placed(nn.Module):
    """Words with positions that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, CLASSES)

    def forward(self, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = (self.words(keys) + self.places(torch.arange(keys.shape[1]))).tanh()
        outputs: Tensor = self.head(hidden.mean(1) if mask is None else (mask.double() @ hidden + hidden).mean(1))
        return outputs


@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (1, 1)])
def test_positions_are_no_samples_inputs_in_a_batch_of_one_either(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = _Placed().double()
    batches = [(torch.randint(9, (n, 6)), torch.randint(CLASSES, (n,))) for n in sizes]
    learning = Continual(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "taps do not know", UserWarning)
        learning.remember(batches)
    assert "places.weight" not in learning.projector.rank
    gradients = [
        torch.autograd.grad(functional.cross_entropy(model(x[at]), y[at]), model.places.weight)[0]
        for x, y in batches
        for at in (slice(n, n + 1) for n in range(len(x)))
    ]
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()["places.weight"]
    torch.testing.assert_close(found, torch.stack(gradients).square().mean(0))


def test_a_batch_as_long_as_an_input_that_all_samples_share_is_refused_in_a_sentence() -> None:
    batch = {"keys": torch.randint(9, (6, 6)), "mask": torch.eye(6), "labels": torch.randint(CLASSES, (6,))}
    with pytest.raises(BecameError, match=r"takes 6 samples and not a few of them .* batch of another length"):
        Continual(_Placed().double()).remember([batch])


def test_labels_that_are_no_integers_are_refused_at_a_merge_too() -> None:
    model, new = _network("perceptron"), _data(2)
    learning, optimizer = Continual(model, check=False), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(_data(1))
    with learning.stable(optimizer):
        _train(model, optimizer, new)
    with pytest.raises(BecameError, match="the categorical likelihood needs labels, which are integers"):
        learning.merge([(x, y.double()) for x, y in new])


def test_an_optimizer_without_a_rate_pulls_nothing_back() -> None:
    model = _network("perceptron")
    learning, optimizer = Continual(model, check=False), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(_data(1))
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(BecameError, match="has no learning rate of its own"), learning.stable(optimizer):
        pass
    learning.uncovered = "frozen"
    with learning.stable(optimizer):
        pass


class _Named(UserDict[str, Any]):
    """A batch whose entries are attributes, as a BatchEncoding is."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


def test_a_batch_keeps_its_class() -> None:
    moved = to_device(batch := _Named(x=torch.ones(2)), torch.device("meta"))
    assert (type(moved), moved.x.device.type, batch.x.device.type) == (_Named, "meta", "cpu")


def test_data_that_use_a_protected_matrix_otherwise_are_refused() -> None:
    """No projection of steps stands for a use as anything else, so the matrix may not go on to be called protected."""

    def learning() -> Continual:
        layer = nn.Linear(WIDTH, CLASSES, bias=False).double()

        def apply(_: nn.Module, batch: Any) -> Tensor:
            x = batch[0]
            outputs: Tensor = layer(x) if x.ndim == 2 else layer(x[:, 0]) + layer.weight[:, 0] ** 2
            return outputs

        return Continual(layer, apply=apply, targets=lambda batch: batch[1], check=False)

    whole: Any = _data(1)[0]
    part = whole[0][:, None], whole[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "taps do not know", UserWarning)
        memory = learning()
        memory.remember([whole])
        with pytest.raises(BecameError, match="'weight' is protected as a matrix that is multiplied as a whole, and"):
            memory.remember([part])
        with pytest.raises(BecameError, match="'weight' is multiplied as a whole in one batch and used in another way"):
            learning().remember([whole, part])
        mixed = learning()
        mixed.remember([part, whole])
    assert dict(mixed.projector.rank) == {}


def test_a_memory_comes_back_from_a_file(tmp_path: Path) -> None:
    model, old, new = _network("stored"), _data(1), _data(2)
    learning = Continual(model, Categorical(weights=(1.0, 2.0, 3.0)), projector=SGP(0.9), penalty=7.0, uncovered="free")
    learning.remember(old)
    file = tmp_path / "memory.safetensors"
    learning.save(file)
    again = Continual.load(model, file)
    assert again.likelihood == learning.likelihood
    assert (again.penalty, again.uncovered, again.decay) == (7.0, "free", 1.0)
    assert str(again.coverage) == str(learning.coverage)
    results = []
    theta = {name: value.detach().clone() for name, value in model.named_parameters()}
    for each in (learning, again):
        model.load_state_dict(theta)
        optimizer = torch.optim.AdamW(model.parameters(), 0.05)
        with each.stable(optimizer):
            _train(model, optimizer, new)
        with each.plastic():
            _train(model, optimizer, new)
        results.append((each.merge(new).alpha, model.weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    with pytest.raises(BecameError, match=r"the memory of another architecture: the memory has no '0\.weight'"):
        Continual.load(_network("perceptron"), file)
    wider = Stored().double()
    wider.head = nn.Linear(8, 4).double()
    with pytest.raises(BecameError, match=r"'head\.weight' is \[4, 8\] in the model and \[3, 8\] in the memory"):
        Continual.load(wider, file)
    with safe_open(file, "pt") as opened:
        later = json.loads(opened.metadata()["became"]) | {"format": 2}
    save_file(load_file(file), file, {"became": json.dumps(later)})
    with pytest.raises(BecameError, match="a memory of format 2, and this version reads format 1; load it with the"):
        Continual.load(model, file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(BecameError, match="is no memory that"):
        Continual.load(model, file)
    own = Continual(model, functional.cross_entropy)
    own.remember(old)
    own.save(file)
    with pytest.raises(BecameError, match="made with a loss of your own; give it as likelihood="):
        Continual.load(model, file)
    assert Continual.load(model, file, likelihood=functional.cross_entropy).coverage.share("protected") > 0


def test_running_statistics_are_estimated_again_on_request() -> None:
    model, old, new = _network("convolutional"), _data(1, 2, 8), _data(2, 3, 8)
    norm: Any = model[2]
    learning = Continual(model)
    learning.remember(old)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with learning.stable(optimizer):
        _train(model, optimizer, new)
    with learning.plastic():
        _train(model, optimizer, new)
    learning.merge(new, statistics=new)
    with torch.no_grad():
        seen = [model[1](model[0](x)) for x, _ in new]
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    assert norm.momentum == 0.1
    assert all(module.training for module in model.modules())


class _Random(nn.Module):
    def __init__(self, across: bool) -> None:
        super().__init__()
        self.fc, self.across = nn.Linear(WIDTH, CLASSES), across

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc(x)
        return outputs + outputs.mean(0) if self.across else functional.dropout(outputs, 0.5, training=True)


@pytest.mark.parametrize(("across", "what"), [(True, "outputs of a sample alone"), (False, "outputs, computed twice")])
def test_the_first_look_finds_what_makes_measurements_meaningless(across: bool, what: str) -> None:
    batches = _data(1, size=5)
    with pytest.raises(BecameError, match=rf"fails its first look: {what}"):
        Continual(_Random(across).double()).remember(batches)
    Continual(_Random(across).double(), check=False).remember(batches)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.full((4,), CLASSES), rf"has the label {CLASSES}; the model has {CLASSES} outputs, so labels go from 0"),
        (torch.full((4,), -1), "has the label -1"),
        (torch.zeros(4), "the targets are torch.float32; the categorical likelihood needs labels, which are integers"),
    ],
)
def test_targets_that_are_no_labels_are_refused(targets: Tensor, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        Continual(nn.Linear(3, CLASSES)).remember([(torch.randn(4, 3), targets)])


def test_inputs_that_are_no_numbers_are_named_as_the_cause() -> None:
    with pytest.raises(BecameError, match="are not finite for the first samples; look at the inputs"):
        Continual(nn.Linear(3, CLASSES)).remember([(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.long))])


def test_a_merge_takes_tokens_whose_gradients_are_squared_apart() -> None:
    batches = [(torch.randn(6, 5, 3), torch.randint(0, CLASSES, (6, 5)))]
    slopes = []
    for squares in ("sample", "token"):
        torch.manual_seed(0)
        model = nn.Linear(3, CLASSES)
        learning = Continual(model, Categorical(by="token", squares=squares))
        learning.remember(batches)
        with learning.stable(torch.optim.SGD(model.parameters(), 0.1)):
            pass
        with learning.plastic(), torch.no_grad():
            model.weight += 0.1
        slopes.append(learning.merge(batches).slopes[0])
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-5)


def test_the_first_look_accepts_a_network_with_more_kinks_than_a_difference_can_avoid() -> None:
    """A dozen layers with batch norm and ReLU6: no step is so short that a difference of outputs meets no kink."""
    torch.manual_seed(0)
    layers = [(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU6()) for _ in range(12)]
    model = nn.Sequential(*(layer for triple in layers for layer in triple), nn.Linear(16, CLASSES))
    model(torch.randn(64, 16))
    learning = Continual(model)
    learning.remember([(torch.randn(4, 16), torch.arange(4) % CLASSES)])
    assert learning.checked is not None
    assert learning.checked.findings[-1].what == "a derivative, by forward mode"
    assert learning.checked.findings[-1].difference < 1e-4


class _WrongTangent(torch.autograd.Function):
    """A sine whose derivative is right backwards, and half of it forwards."""

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return inputs.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, *_: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        result: Tensor = gradients[0] * ctx.saved_tensors[0].cos()
        return result

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        result: Tensor = tangents[0] * ctx.saved_tensors[0].cos() / 2
        return result


class _WrongForwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = _WrongTangent.apply(self.fc(x))  # type: ignore[no-untyped-call]
        return outputs


def test_the_first_look_refuses_a_derivative_that_is_wrong_forwards() -> None:
    with pytest.raises(BecameError, match="fails its first look: a derivative, by forward mode"):
        Continual(_WrongForwards().double()).remember(_data(1))


def test_a_copy_that_is_made_in_stable_training_is_in_none() -> None:
    model, batches = _network("perceptron"), _data(1)
    learning, optimizer = Continual(model), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(batches)
    with learning.stable(optimizer):
        copies = [pickle.loads(pickle.dumps(learning)), copy.deepcopy(learning)]
    for again in copies:
        again.remember(batches)
        optimizer = torch.optim.SGD(again.model.parameters(), 0.1)
        with again.stable(optimizer):
            _train(again.model, optimizer, batches)


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

    model, batches = Counting().double(), _data(1)
    learning, optimizer, last = Continual(model), torch.optim.SGD(model.parameters(), 0.1), model.last
    learning.remember(batches)
    assert model.last is last
    assert (int(model.calls), float(last.abs().max())) == (0, 0)
    with learning.stable(optimizer):
        _train(model, optimizer, batches)
    with learning.plastic():
        _train(model, optimizer, batches)
    calls, last = int(model.calls), model.last.clone()
    learning.merge(batches, trace=3)
    assert int(model.calls) == calls > 0
    torch.testing.assert_close(model.last, last, rtol=0, atol=0)


def test_no_two_memories_project_the_steps_of_one_parameter() -> None:
    """The second projection of a step could lead back into what the first one keeps it out of."""
    model, batches = _network("perceptron"), _data(1)
    optimizer, both = torch.optim.SGD(model.parameters(), 0.1), [Continual(model) for _ in range(2)]
    for learning in both:
        learning.remember(batches)
    with (
        both[0].stable(optimizer),
        pytest.raises(BecameError, match=r"'0\.weight' is in stable training of another Continual; let one of them"),
    ):
        both[1].stable(optimizer).__enter__()
    with pytest.raises(BecameError, match="plastic training comes after stable"), both[1].plastic():
        pass
    for learning in both:  # one after the other
        with learning.stable(optimizer):
            _train(model, optimizer, batches)


def test_what_cannot_be_done_is_said_in_a_sentence() -> None:
    model, batches = _network("perceptron"), _data(1)
    learning, optimizer = Continual(model), torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.raises(BecameError, match="stable training needs a memory of old data; call"),
        learning.stable(optimizer),
    ):
        pass
    with pytest.raises(BecameError, match="coverage needs a memory"):
        _ = learning.coverage
    with pytest.raises(BecameError, match="plastic training comes after stable"), learning.plastic():
        pass
    with pytest.raises(BecameError, match="there are no samples"):
        learning.remember([])
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(BecameError, match=f"the share of the batches is {share}; it must be above 0 and at most 1"):
            learning.remember(batches, share=share)
    with pytest.raises(
        BecameError, match=r"outputs of shape \[0, 3\] for a batch; they must be \[samples, ...\], of one"
    ):
        learning.remember([*batches, (batches[0][0][:0], batches[0][1][:0])])
    learning.remember(batches)
    acts: dict[str, Callable[[], object]] = {
        "remembering": lambda: learning.remember(batches),
        "a merge": lambda: learning.merge(batches),
        "plastic training": lambda: learning.plastic().__enter__(),
        "stable training": lambda: learning.stable(optimizer).__enter__(),
    }
    for what, act in acts.items():
        message = rf"{what} was asked for within learning\.stable"
        with pytest.raises(BecameError, match=message), learning.stable(optimizer):
            act()
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    with pytest.raises(BecameError, match="steps no parameter of the model"), learning.stable(other):
        pass
    with pytest.raises(BecameError, match="TRGP does more than to project steps"):
        Continual(model, projector=TRGP())
    with pytest.raises(BecameError, match="there is no likelihood 'poisson'"):
        Continual(model, "poisson")
    with pytest.raises(BecameError, match="the penalty is nan"):
        Continual(model, penalty=math.nan)
    with pytest.raises(BecameError, match="uncovered is 'thawed'"):
        Continual(model, uncovered="thawed")  # type: ignore[arg-type]
    with pytest.raises(BecameError, match="nothing to learn"):
        Continual(nn.Flatten())
    with pytest.raises(BecameError, match="the loss is a sum over samples"):
        Continual(model, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(BecameError, match=r"'0\.weight' has no shape yet; run the model on a batch"):
        Continual(nn.Sequential(nn.LazyLinear(3)))
    another = _network("perceptron")
    with pytest.raises(BecameError, match="the outputs depend on none of the parameters that are trained"):
        Continual(model, apply=lambda _, batch: another(batch[0]), targets=lambda batch: batch[1]).remember(batches)


class Unknown:
    """An estimator that finds no number."""

    def quadratic(self, subspace: object, losses: object) -> Quadratic:
        """Return a loss that is no number anywhere."""
        return Quadratic(torch.full((1,), math.nan), torch.full((1, 1), math.nan))


def test_what_is_not_finite_is_named_and_not_merged() -> None:
    model, batches = _network("perceptron"), _data(2)
    learning = Continual(model)
    learning.remember(batches)
    with learning.stable(torch.optim.SGD(model.parameters(), 0.1)):
        pass
    name, weight = next(iter(model.named_parameters()))
    weight.data += 0.1
    plastic = weight.detach().clone()
    broken = batches[0][0].clone()
    broken[-1, 0] = math.nan
    with pytest.raises(BecameError, match=f"the Fisher information of '{name}' is not finite; look for NaN in the bat"):
        learning.merge([batches[1], (broken, batches[0][1])])
    assert torch.equal(weight, plastic)
    weight.data[0, 0] = math.inf
    with pytest.raises(BecameError, match=f"'{name}' is not finite in the stable or in the plastic model: training"):
        learning.merge(batches)
    weight.data[0, 0] = plastic[0, 0]
    learning.estimator, estimator = Unknown(), learning.estimator
    with pytest.raises(BecameError, match="the loss of the new data is not finite along the way; look for NaN"):
        learning.merge(batches)
    assert torch.equal(weight, plastic)
    learning.estimator = estimator
    assert 0 <= learning.merge(batches).alpha <= 1


@pytest.mark.parametrize(
    ("total", "share", "expected"), [(64, None, 64), (90, None, 64), (400, None, 100), (40, 0.5, 20), (3, 0.01, 1)]
)
def test_of_many_batches_a_share_is_measured_and_stands_for_all(total: int, share: Any, expected: int) -> None:
    model, (inputs, targets) = _network("perceptron"), _data(1)[0]
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
        return iter([(x, y) for batch in _data(1) for x, y in zip(*batch, strict=True)])


def test_a_terminal_shows_how_far_a_pass_over_a_stream_is(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = totals_shown(monkeypatch)
    for loader in (torch.utils.data.DataLoader(_Stream(), batch_size=2), _data(1)):
        Continual(_network("perceptron"), check=False).remember(loader)
    Continual(_network("perceptron"), check=False, progress=False).remember(_data(1))
    assert totals == [None, 2]


def test_hooks_are_gone_after_training_whatever_happens() -> None:
    model, batches = _network("perceptron"), _data(1)
    learning, optimizer = Continual(model, uncovered="frozen"), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(batches)
    with pytest.raises(ZeroDivisionError), learning.stable(optimizer):
        raise ZeroDivisionError
    bias = model[0].bias.detach().clone()
    _train(model, optimizer, batches)
    assert not torch.equal(model[0].bias, bias)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_models_of_transformers_are_exact_and_covered() -> None:
    """GPT-2's matrices are stored as [d_in, d_out]; Llama has rotations and grouped heads; BERT is a classifier."""
    hf: Any = importlib.import_module("transformers")

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 32,
    }
    tokens, causal = torch.randint(0, 32, (4, 6)), Categorical(by="token", shift=True)
    cases: list[tuple[Any, Any, Any, float]] = [
        (
            hf.GPT2LMHeadModel(
                hf.GPT2Config(
                    vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
                )
            ),
            causal,
            tokens,
            0.7,
        ),
        (hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=1)), causal, tokens, 0.8),
        (hf.BertForSequenceClassification(hf.BertConfig(**sizes)), "categorical", tokens[:, 0] % 2, 0.15),
    ]
    for model, likelihood, labels, share in cases:
        learning = Continual(model.double(), likelihood)
        learning.remember([{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}])
        assert learning.checked is not None  # per-sample gradients against a loop, among others
        assert learning.coverage.share("protected") > share
        other = {p.name for p in learning.coverage.parameters if p.treatment != "protected" and p.use != "other"}
        assert not other


def test_a_posterior_is_a_diagonal() -> None:
    learning = Continual(_network("perceptron"))
    learning.remember(_data(1))
    assert learning.posterior is not None
    assert isinstance(learning.posterior.precision, Diagonal)


def _arriving(changed_at: int, batches: int) -> Pairs:
    """Batches whose labels are of another rule from one place on."""
    generator, rule = torch.Generator().manual_seed(3), torch.randn(WIDTH, CLASSES, dtype=torch.float64)
    pairs = []
    for place in range(batches):
        inputs = torch.randn(16, WIDTH, dtype=torch.float64, generator=generator)
        pairs.append((inputs, (inputs @ (rule if place < changed_at else -rule)).argmax(1)))
    return pairs


def test_a_change_of_the_stream_is_observed_and_a_sample_of_what_came_before_is_there() -> None:
    model = _network("perceptron")
    learning, optimizer = Continual(model, check=False), torch.optim.Adam(model.parameters(), 0.02)
    learning.reservoir = Reservoir(8)
    stream, observed = _arriving(120, 200), []
    for place, batch in enumerate(stream):
        if learning.observe(batch):
            observed.append(place)
            before = learning.reservoir.batches
        _train(model, optimizer, [batch], 1)
    assert len(observed) == 1
    assert 122 <= observed[0] <= 130
    assert len(before) == 8
    assert all(any(batch is earlier for earlier in stream[:120]) for batch in before)
    # What is stored afterwards is of the new rule.
    assert all(any(batch is later for later in stream[observed[0] :]) for batch in learning.reservoir.batches)
    learning.remember(before)
    with learning.stable(optimizer):
        _train(model, optimizer, [stream[-1]], 1)


def test_nothing_is_observed_in_a_stream_that_stays_as_it_is() -> None:
    model = _network("perceptron")
    learning, optimizer = Continual(model), torch.optim.Adam(model.parameters(), 0.02)
    for batch in _arriving(200, 200):
        assert not learning.observe(batch)
        _train(model, optimizer, [batch], 1)
    assert learning.reservoir.offered > 190


def test_observing_changes_neither_the_model_nor_its_mode() -> None:
    model = _network("convolutional").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning = Continual(model)
    for batch in _data(0, batches=25, size=4):
        learning.observe(batch)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_is_no_observation() -> None:
    model = _network("perceptron")
    learning = Continual(model)
    for batch in _data(0, batches=20):
        learning.observe(batch)
    model[2].weight.data[0] = math.nan
    with pytest.raises(BecameError, match="a loss that is watched for changes is not finite"):
        learning.observe(_data(1)[0])


class _Pooled(nn.Module):
    """Words, of which a maximum over positions passes a gradient to few."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(60, 8), nn.Conv1d(8, 4, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        mixed: Tensor = self.mix(self.words(words).transpose(1, 2)).relu().amax(2)
        return cast(Tensor, self.head(mixed))


def test_words_that_are_looked_up_are_protected_whether_or_not_they_have_a_gradient() -> None:
    torch.manual_seed(0)
    model = _Pooled().double()
    old, new = torch.randint(0, 30, (4, 12)), torch.randint(0, 60, (16, 12))
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen")
    learning.remember([(old, torch.arange(4) % CLASSES)])
    assert learning.projector.rank["words.weight"] == (len(set(old.flatten().tolist())), 60)
    before, optimizer = model(old).detach(), torch.optim.AdamW(model.parameters(), 0.01)
    with learning.stable(optimizer):
        _train(model, optimizer, [(new, torch.arange(16) % CLASSES)])
    torch.testing.assert_close(model(old).detach(), before, rtol=0, atol=1e-10)


def test_a_memory_with_a_protected_embedding_comes_back_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 2), nn.Flatten(), nn.Linear(8, CLASSES))
    learning = Continual(model)
    learning.remember([(torch.randint(0, 6, (4, 4)), torch.arange(4) % CLASSES)])
    learning.save(tmp_path / "memory")
    assert Continual.load(model, tmp_path / "memory").projector.rank == learning.projector.rank


def test_a_merge_says_nothing_of_what_the_memory_protects() -> None:
    """A memory of second moments holds by curvature alone, after a merge as before."""
    model, data = _network("perceptron"), _data(1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    _train(model, optimizer, data)
    learning = Continual(model)
    with pytest.warns(UserWarning, match="second moments of an optimizer stand for"):
        learning.remember(optimizer=optimizer, samples=4)
    with learning.stable(optimizer):
        _train(model, optimizer, _data(2))
    with learning.plastic():
        _train(model, optimizer, _data(2))
    learning.merge(_data(2))
    learning.remember(_data(2))
    assert learning.coverage.share("protected") == 0


def test_tied_words_with_padding_pass_the_first_look() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, words: Tensor) -> Tensor:
            return cast(Tensor, self.head(self.words(words).tanh()))

    learning = Continual(Tied().double(), Categorical(by="token"))
    learning.remember([(torch.randint(0, 9, (3, 4)), torch.randint(0, 9, (3, 4)))])
    assert learning.checked


@pytest.mark.parametrize("uncovered", ["frozen", "penalised"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_layer_that_a_task_froze_is_thawed_only_once_that_task_is_remembered_with_it(
    tmp_path: Path, uncovered: Any, loaded: bool
) -> None:
    model, first, second = _network("perceptron").double(), _data(1), _data(2)
    first, second = ([(x.double(), y) for x, y in batches] for batches in (first, second))
    learning = Continual(model, uncovered=uncovered)
    learning.remember(first)
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    name = next(name for name, value in model.named_parameters() if value is layer.bias)
    assert learning.posterior is not None
    before = learning.posterior.precision.diagonal()[name].clone()
    layer.requires_grad_(False)
    learning.remember(second)
    assert torch.equal(learning.posterior.precision.diagonal()[name], before)  # what the first task knows is kept
    if loaded:
        learning.save(tmp_path / "memory")
        learning = Continual.load(model, tmp_path / "memory")
    layer.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(BecameError, match="is trained now, and was not when"), learning.stable(optimizer):
        pass
    learning.remember(second)
    assert learning.posterior is not None
    assert bool(torch.all(learning.posterior.precision.diagonal()[name] >= before))
    with learning.stable(optimizer):
        pass
