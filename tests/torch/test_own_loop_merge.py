"""Merges of ``Continual`` against brute force in double precision, by likelihoods and losses of all kinds."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.backend.batches import Reader
from adapters.torch import Continual
from adapters.torch.data_loss import DataLoss, TorchLoss
from became_core import BecameError, PaperClosedForm, Quadratic, Secant, optimal_alpha
from became_core.curvature import Bernoulli, Categorical, Gaussian
from tests.augmented import Augmented
from tests.torch.modules import CLASSES, WIDTH
from tests.torch.oracle import autograd_gradients, secant_by_brute_force
from tests.torch.own_loop import GroupedAdam, new_data, new_network, train, whole
from tests.torch.own_models import Of


def two_models(name: str, **settings: Any) -> tuple[nn.Module, Continual, dict[str, Tensor], dict[str, Tensor]]:
    """Return a network with the plastic weights, what is ready to merge it, and the stable and the plastic weights."""
    model, old, new = new_network(name), new_data(1, 4, 8), new_data(2, 4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    train(model, optimizer, old, epochs=10)
    learning = Continual(model, **settings)
    learning.remember(iter(old))
    with learning.stable(optimizer):
        train(model, optimizer, new)
    theta_gp = {key: value.detach().clone() for key, value in model.named_parameters()}
    with learning.plastic():
        train(model, optimizer, new, epochs=25)
    return model, learning, theta_gp, {key: value.detach().clone() for key, value in model.named_parameters()}


@pytest.mark.parametrize("name", ["perceptron", "encoder", "GRU", "stored"])
def test_the_merge_is_the_minimum_that_brute_force_finds(name: str) -> None:
    model, learning, theta_gp, theta_hat = two_models(name, estimator=Secant())
    new = new_data(2, 4, 8)
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
    inputs, targets = whole(new)
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


def test_a_batch_that_fails_tells_nothing_of_the_derivatives_that_there_are() -> None:
    _, learning, *_ = two_models("perceptron", estimator=Secant())
    new = new_data(2, 4, 8)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        learning.merge([*new, (new[0][0][:, :2], new[0][1])])
    assert learning.merge(new).curvature == "forward mode"


@pytest.mark.parametrize("trace", [1, -1])
def test_a_trace_without_both_ends_is_refused_before_a_batch_is_read(trace: int) -> None:
    model, batches = new_network("perceptron"), iter(new_data(2))
    learning = Continual(model, check=False)
    learning.remember(new_data(1))
    with learning.stable(torch.optim.SGD(model.parameters(), 0.1)):
        pass
    with learning.plastic():
        pass
    with pytest.raises(BecameError, match=f"trace is {trace}; give at least 2 points, both ends among them, or 0"):
        learning.merge(batches, trace=trace)
    assert len(list(batches)) == len(new_data(2))


def test_it_merges_by_the_papers_form_unless_told_otherwise() -> None:
    model, learning, theta_gp, theta_hat = two_models("perceptron")
    new = new_data(2, 4, 8)
    assert learning.posterior is not None
    fisher = {name: gradients.square().mean(0) for name, gradients in autograd_gradients(model, *whole(new)).items()}
    expected = float(optimal_alpha(theta_gp, theta_hat, learning.posterior.precision.diagonal(), fisher))
    assert 0 < expected < 1
    report = learning.merge(new)
    assert report.alpha == pytest.approx(expected, rel=1e-9)
    assert report.curvature == "the diagonal Fisher information"


def test_a_loss_of_ones_own_is_merged_by_slopes() -> None:
    """The cross-entropy, given as a callable, against the likelihood that it is of."""
    alphas = []
    for likelihood in ("categorical", functional.cross_entropy):
        model, old, new = new_network("perceptron"), new_data(1, 4, 8), new_data(2, 4, 8)
        optimizer = torch.optim.AdamW(model.parameters(), 0.02)
        train(model, optimizer, old, epochs=10)
        learning = Continual(model, likelihood, estimator=Secant())
        learning.remember(old)
        with learning.stable(optimizer):
            train(model, optimizer, new)
        with learning.plastic():
            train(model, optimizer, new, epochs=20)
        report = learning.merge(new, trace=2)
        alphas.append(report.alpha)
    assert report.curvature == "a difference of slopes"
    assert 0 < alphas[0] < 1
    # A difference of slopes sees all curvature, and not only the Gauss-Newton part that calibrates the old side.
    assert alphas[1] == pytest.approx(alphas[0], abs=0.1)
    with pytest.raises(BecameError, match=r"the loss has shape \[8\]; it must return one number"):
        Continual(model, lambda z, y: functional.cross_entropy(z, y, reduction="none")).remember(old)


def drawn_direction(data: DataLoss, seed: int) -> dict[str, Tensor]:
    """Return a direction from the weights, a tenth as long as standard normal numbers."""
    rng = np.random.default_rng(seed)
    weights = data.weights().items()
    return {name: torch.as_tensor(0.1 * rng.normal(size=value.shape)).to(value.dtype) for name, value in weights}


@pytest.mark.parametrize("share", [1.0, None])
def test_slopes_that_are_subtracted_are_of_the_same_samples(share: float | None) -> None:
    """Slopes of two passes over a loader that augments at random differ by more than a small step tells."""
    loader = Augmented(new_data(2, 70, 4))
    data = DataLoss(new_network("perceptron"), functional.cross_entropy, Reader(None, None), checks=False, shows=False)
    theta, directions = data.weights(), [drawn_direction(data, seed) for seed in (1, 2)]
    found, _ = data.along(loader, theta, directions, share)
    assert loader.passes == 1
    expected, _ = data.along(loader.given, theta, directions, share)
    np.testing.assert_allclose(found.slope, expected.slope, rtol=1e-12)
    np.testing.assert_allclose(found.curvature, expected.curvature, rtol=1e-12)
    assert all(torch.equal(value, theta[name]) for name, value in data.weights().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_difference_of_slopes_sees_curvature_in_half_precision(dtype: torch.dtype) -> None:
    """A step that is too short for the weights' digits would be lost in their rounding."""
    loss, network, batches = nn.functional.mse_loss, new_network("perceptron"), new_data(2, 4, 32)
    pairs = [(inputs, inputs[:, :CLASSES]) for inputs, _ in batches]
    curvatures = []
    for kind in (torch.float64, dtype):
        data = DataLoss(network.to(kind), loss, Reader(None, None), checks=False, shows=False)
        samples = [(inputs.to(kind), targets.to(kind)) for inputs, targets in pairs]
        quadratic, _ = data.along(samples, data.weights(), [drawn_direction(data, 1)])
        curvatures.append(float(quadratic.curvature[0, 0]))
    assert curvatures[1] == pytest.approx(curvatures[0], rel=0.1)


@pytest.mark.parametrize("likelihood", [Gaussian(), Gaussian(0.5), Bernoulli()])
def test_regression_and_several_labels_are_remembered_and_merged(likelihood: Any) -> None:
    model, inputs = new_network("perceptron"), [x for x, _ in new_data(1, 3, 8)]
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


@pytest.mark.filterwarnings("ignore:second moments of an optimizer:UserWarning")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("estimator", [Secant(), PaperClosedForm()])
def test_the_noise_of_a_regression_is_fitted_where_it_is_first_needed(check: bool, estimator: Any) -> None:
    model = new_network("perceptron")
    data = [(x, x[:, :3].sin()) for x, _ in new_data(1, 3, 8)]
    optimizer = torch.optim.Adam(model.parameters(), 0.02)

    def train() -> None:
        for x, y in data * 2:
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

    def residual() -> Any:
        return pytest.approx(float((model(data[0][0]) - data[0][1]).detach().square().mean().sqrt()))

    learning = Continual(model, "gaussian", check=check, estimator=estimator)
    assert not learning.observe(data[0])
    assert learning.likelihood.noise == residual()
    train()
    learning = Continual(model, "gaussian", check=check, estimator=estimator)
    learning.remember(optimizer=optimizer, samples=8)
    assert learning.likelihood == Gaussian()
    with learning.stable(optimizer):
        train()
    with learning.plastic():
        train()
    expected = residual()
    assert 0 <= learning.merge(data).alpha <= 1
    assert learning.likelihood.noise == expected


def test_second_moments_of_an_optimizer_stand_for_old_data_with_a_warning() -> None:
    model, batches = new_network("perceptron"), new_data(1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, betas=(0.9, 0.99))
    train(model, optimizer, batches, epochs=4)
    learning = Continual(model)
    with pytest.warns(UserWarning, match="unfit after clipping"):
        learning.remember(optimizer=optimizer, samples=32)
    assert learning.posterior is not None
    moment = optimizer.state[model[0].weight]["exp_avg_sq"]
    found = learning.posterior.precision.diagonal()["0.weight"]
    torch.testing.assert_close(found, moment / (1 - 0.99**8) * 32)
    assert learning.coverage.share("penalised") == 1
    with learning.stable(optimizer):
        train(model, optimizer, new_data(2))
    with learning.plastic():
        train(model, optimizer, new_data(2))
    assert 0 <= learning.merge(new_data(2)).alpha <= 1
    with pytest.raises(BecameError, match="needs samples="):
        learning.remember(optimizer=optimizer)
    with pytest.raises(BecameError, match="no second moments"):
        learning.remember(optimizer=torch.optim.SGD(model.parameters(), 0.1), samples=1)
    with pytest.raises(BecameError, match="either batches or an optimizer"):
        learning.remember(batches, optimizer=optimizer, samples=1)


@pytest.mark.filterwarnings("ignore:second moments of an optimizer:UserWarning")
def test_an_adam_may_count_the_steps_of_a_group_and_is_none_if_it_counts_no_steps() -> None:
    model, batches = new_network("perceptron"), new_data(1)
    optimizer, learning = GroupedAdam(model.parameters(), 0.01), Continual(model)
    train(model, optimizer, batches, epochs=4)
    learning.remember(optimizer=optimizer, samples=32)
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()["0.weight"]
    moment = optimizer.state[model[0].weight]["exp_avg_sq"]
    torch.testing.assert_close(found, moment / (1 - 0.99**8) * 32)
    del optimizer.param_groups[0]["step"]
    with pytest.raises(BecameError, match="no second moments"):
        learning.remember(optimizer=optimizer, samples=32)


def test_labels_that_are_no_integers_are_refused_at_a_merge_too() -> None:
    model, new = new_network("perceptron"), new_data(2)
    learning, optimizer = Continual(model, check=False), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(new_data(1))
    with learning.stable(optimizer):
        train(model, optimizer, new)
    with pytest.raises(BecameError, match="the categorical likelihood needs labels, which are integers"):
        learning.merge([(x, y.double()) for x, y in new])


def test_a_merge_takes_tokens_whose_gradients_are_squared_apart() -> None:
    batches = [(torch.randn(6, 5, 3), torch.randint(0, CLASSES, (6, 5)))]
    slopes = []
    for squares in ("sample", "token"):
        torch.manual_seed(0)
        model = nn.Linear(3, CLASSES)
        learning = Continual(model, Categorical(by="token", squares=squares), estimator=Secant())
        learning.remember(batches)
        with learning.stable(torch.optim.SGD(model.parameters(), 0.1)):
            pass
        with learning.plastic(), torch.no_grad():
            model.weight += 0.1
        slopes.append(learning.merge(batches).slopes[0])
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-5)


class Unknown:
    """An estimator that finds no number."""

    def quadratic(self, subspace: object, losses: object) -> Quadratic:
        """Return a loss that is no number anywhere."""
        return Quadratic(torch.full((1,), math.nan), torch.full((1, 1), math.nan))


def test_what_is_not_finite_is_named_and_not_merged() -> None:
    model, batches = new_network("perceptron"), new_data(2)
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


def test_a_merge_says_nothing_of_what_the_memory_protects() -> None:
    """A memory of second moments holds by curvature alone, after a merge as before."""
    model, data = new_network("perceptron"), new_data(1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, data)
    learning = Continual(model)
    with pytest.warns(UserWarning, match="second moments of an optimizer stand for"):
        learning.remember(optimizer=optimizer, samples=4)
    with learning.stable(optimizer):
        train(model, optimizer, new_data(2))
    with learning.plastic():
        train(model, optimizer, new_data(2))
    learning.merge(new_data(2))
    learning.remember(new_data(2))
    assert learning.coverage.share("protected") == 0


def test_a_model_need_not_be_on_the_users_default_device(tmp_path: Path) -> None:
    """A tensor of ours that followed the default would have no numbers here."""
    body, weight = new_network("encoder"), torch.randn(WIDTH, CLASSES, 2)
    model: Any = Of(lambda net, x: net.body(x) + (x @ net.weight.flatten(1))[:, :CLASSES], body=body, weight=weight)
    old, new = new_data(1), new_data(2)
    optimizer = torch.optim.AdamW(model.double().parameters(), 0.01)
    with torch.device("meta"):
        learning = Continual(model)
        learning.observe(old[0])
        learning.remember(old)
        with learning.stable(optimizer):
            train(model, optimizer, new)
        with learning.plastic():
            train(model, optimizer, new)
        assert 0 < learning.merge(new, trace=2).alpha < 1
        learning.save(tmp_path / "memory.safetensors")
        again = Continual.load(model, tmp_path / "memory.safetensors")
    assert str(again.coverage) == str(learning.coverage)


def test_gradients_of_a_loss_of_ones_own_are_as_exact_in_float16_as_a_single_samples() -> None:
    outputs = torch.as_tensor(np.linspace(1e-4, 2e-4, 512, dtype=np.float16)[:, None])
    gradient = TorchLoss(lambda z, y: torch.mean((z - y) ** 2) / 2).gradient(outputs, 0 * outputs)
    np.testing.assert_array_equal(gradient, outputs)


@pytest.mark.parametrize("estimator", [PaperClosedForm(), Secant()])
def test_where_only_a_new_head_is_trained_old_data_keep_nothing_back(estimator: Any) -> None:
    model: Any = nn.Sequential(nn.Linear(WIDTH, CLASSES)).double()
    old, new = new_data(1), new_data(2)
    learning = Continual(model, estimator=estimator, check=False)
    learning.remember(old)
    model[0].requires_grad_(False)
    model.append(nn.Linear(CLASSES, CLASSES).double())
    optimizer = torch.optim.SGD(model[1].parameters(), 0.05)
    with learning.stable(optimizer):
        train(model, optimizer, new)
    with learning.plastic():
        train(model, optimizer, new)
    plastic = model[1].weight.detach().clone()
    report = learning.merge(new)
    if isinstance(estimator, PaperClosedForm):
        assert report.alpha == 1
        assert torch.equal(model[1].weight.detach(), plastic)
    assert 0 < report.alpha <= 1
