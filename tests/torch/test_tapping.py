"""That no use of a parameter is passed over: networks whose layers taps do not know, or know and must not trust."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from adapters.torch import tapping
from adapters.torch.layers import constant_statistics
from adapters.torch.tapping import collect_inputs, collect_taps, layers_with_samples_first
from became_core.curvature import batch_gradient, diagonal_fisher, input_grams, per_sample_gradients
from tests.torch.oracle import assert_exact, autograd_gradients, taps_of

WIDTH = 4


class _Network(nn.Module):
    """A network made of layers and a function of them and the inputs."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.scale = nn.Parameter(torch.tensor([1.5, -0.5, 2.0, 1.0]))
        self.double().eval()
        self._forward = forward

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self._forward(self, inputs)
        return outputs


def _fc() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def _tied() -> _Network:
    network: Any = _Network(lambda net, x: net.head(net.body(x).tanh()), body=_fc(), head=_fc())
    network.head.weight = network.body.weight
    tied: _Network = network
    return tied


def _by_time(net: Any, x: Tensor) -> Any:
    """Samples second for the layer: its first axis is time."""
    return net.fc(torch.stack([x, x.sin()])).tanh().sum(0)


def _in_one_axis(net: Any, x: Tensor) -> Any:
    """Samples and time in one axis."""
    return net.fc(torch.cat([x, x.sin()])).tanh().reshape(2, len(x), WIDTH).sum(0)


def _attended(net: Any, x: Tensor) -> Any:
    tokens = torch.stack([x, x.cos(), x * x], 1)
    return net.fc(net.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def _attention() -> nn.Module:
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True)


# What the network is, and what its warnings name; none where taps serve it all.
UNKNOWN: dict[str, tuple[Callable[[], _Network], list[str]]] = {
    "a bare parameter": (lambda: _Network(lambda net, x: net.fc(x) * net.scale, fc=_fc()), ["'scale'"]),
    "a layer of another class": (
        lambda: _Network(lambda net, x: net.fc(net.pair(x, x)), fc=_fc(), pair=nn.Bilinear(WIDTH, WIDTH, WIDTH)),
        ["'pair.weight' is used, in the layer 'pair', a Bilinear", "'pair.bias'"],
    ),
    "a parametrised layer": (
        lambda: _Network(lambda net, x: net.fc(x), fc=nn.utils.parametrizations.weight_norm(_fc())),
        ["'fc.bias'", "'fc.parametrizations.weight.original0'", "'fc.parametrizations.weight.original1'"],
    ),
    "two layers with one weight": (_tied, ["'body.weight'", "'body.bias'", "'head.bias'"]),
    "a layer's weight used beside it": (
        lambda: _Network(lambda net, x: functional.linear(net.fc(x).tanh(), net.fc.weight), fc=_fc()),
        ["'fc.weight'", "'fc.bias'"],
    ),
    "attention": (
        lambda: _Network(_attended, fc=_fc(), attention=_attention()),
        [f"'attention.{name}'" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")],
    ),
    "samples on the second axis": (lambda: _Network(_by_time, fc=_fc()), ["'fc.weight'", "'fc.bias'"]),
    "samples and time in one axis": (lambda: _Network(_in_one_axis, fc=_fc()), ["'fc.weight'", "'fc.bias'"]),
    "a layer that runs twice": (lambda: _Network(lambda net, x: net.fc(net.fc(x).tanh()), fc=_fc()), []),
    "a layer whose output is not used": (
        lambda: _Network(lambda net, x: net.fc(x) + 0 * net.idle(x).detach(), fc=_fc(), idle=_fc()),
        [],
    ),
    "an output overwritten in place": (
        lambda: _Network(lambda net, x: net.head(net.act(net.fc(x))), fc=_fc(), head=_fc(), act=nn.ReLU(inplace=True)),
        [],
    ),
    "a norm that runs twice": (
        lambda: _Network(lambda net, x: net.fc(net.norm(x) + net.norm(x * x)), fc=_fc(), norm=nn.LayerNorm(WIDTH)),
        [],
    ),
    "an embedding that runs twice": (
        lambda: _Network(
            lambda net, x: net.fc(net.words((x > 0).long()).sum(1) * net.words((x > 1).long()).sum(1)),
            fc=_fc(),
            words=nn.Embedding(2, WIDTH),
        ),
        [],
    ),
}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("case", UNKNOWN)
def test_fisher_is_exact_whatever_the_network_does_with_its_parameters(case: str, batch: int) -> None:
    torch.manual_seed(0)
    build, named = UNKNOWN[case]
    network = build()
    samples, labels = torch.randn(batch, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (batch,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_exact(network, samples, labels)
    messages = [str(warning.message) for warning in caught if "taps do not know" in str(warning.message)]
    if case == "samples and time in one axis" or (case == "samples on the second axis" and batch == 1):
        return  # what is warned of depends on the batch
    assert len(messages) == len(named)
    assert all(any(name in message for message in messages) for name in named)


def test_a_layer_with_another_axis_first_is_found_even_if_it_is_as_long() -> None:
    """Two steps of time and two samples, with nothing in the shapes to tell them apart."""
    torch.manual_seed(0)
    network = _Network(_by_time, fc=_fc())
    names = {module: name for name, module in network.named_modules()}
    samples = torch.randn(2, WIDTH, dtype=torch.float64)
    assert layers_with_samples_first(network, names, (samples,)) == frozenset()
    other = _Network(lambda net, x: net.fc(x), fc=_fc())
    names = {module: name for name, module in other.named_modules()}
    assert layers_with_samples_first(other, names, (samples,)) == {other.fc}


def test_a_warning_is_given_once() -> None:
    network = UNKNOWN["a bare parameter"][0]()
    samples, labels = torch.randn(3, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (3,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            taps_of(network, samples, labels)
    (warning,) = caught
    assert "the parameter 'scale' is used, in the network itself, a _Network; its" in str(warning.message)


@pytest.mark.filterwarnings("ignore:taps do not know:UserWarning")
def test_lone_gradients_take_the_batchs_statistics_and_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameter stands before a batch norm that keeps no statistics; the norm runs twice."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)
    network = _Network(lambda net, x: net.fc(net.norm(net.norm(x * net.scale).tanh() * net.scale)), fc=_fc(), norm=norm)
    samples, labels = torch.randn(5, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (5,))
    with constant_statistics(network) as used:
        network(samples)
    (taps,) = taps_of(network, samples, labels)
    monkeypatch.setattr(tapping, "CHUNK", 8)  # two samples at a time
    (in_chunks,) = taps_of(network, samples, labels)
    found = per_sample_gradients(taps)
    torch.testing.assert_close(per_sample_gradients(in_chunks), found)
    for index in range(5):
        with constant_statistics(network, used):
            loss = functional.cross_entropy(network(samples[index : index + 1]), labels[index : index + 1])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        for (name, _), gradient in zip(network.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(found[name][index].reshape(gradient.shape), gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.filterwarnings("ignore:taps do not know:UserWarning")
@pytest.mark.parametrize("case", ["a bare parameter", "attention", "a layer that runs twice"])
def test_the_expectation_over_labels_is_the_diagonal_ggn(case: str) -> None:
    """Against a dense Jacobian: diag(J^T (diag p - p p^T) J), a mean over samples."""
    torch.manual_seed(0)
    network = UNKNOWN[case][0]()
    samples, labels = torch.randn(4, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (4,))
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    taps = taps_of(network, samples, labels, "true")
    found = diagonal_fisher(taps, parameters, "true", samples=4)
    with sdpa_kernel(SDPBackend.MATH):  # jacrev knows no other kernel of attention
        jacobian = torch.func.jacrev(lambda theta: torch.func.functional_call(network, theta, (samples,)))(parameters)
    p = network(samples).detach().softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    for name, value in found.items():
        j = jacobian[name].flatten(2)
        torch.testing.assert_close(
            value.flatten(), torch.einsum("nci,ncd,ndi->i", j, hessian, j) / 4, rtol=1e-9, atol=1e-14
        )


def test_without_per_sample_gradients_there_is_the_batchs() -> None:
    """In training mode: batch statistics are part of the gradient, and a lone parameter has one gradient for all."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)
    network = _Network(lambda net, x: net.fc(net.norm(x) * net.scale), fc=_fc(), norm=norm).train()
    samples, labels = torch.randn(5, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (5,))
    names = {module: name for name, module in network.named_modules()}
    one_hot = functional.one_hot(labels, WIDTH).double()
    (taps,) = collect_taps(network, names, (samples,), lambda z: [z.softmax(1) - one_hot], per_sample=False)
    loss = functional.cross_entropy(network(samples), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    found = batch_gradient(taps)
    assert set(found) == {name for name, _ in network.named_parameters()}
    for (name, _), gradient in zip(network.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(found[name].reshape(gradient.shape), gradient, rtol=1e-9, atol=1e-13)


def test_inputs_that_are_overwritten_later_are_not_trusted() -> None:
    """Autograd refuses such a network in training; its taps would be of the wrong inputs."""
    network = _Network(lambda net, x: net.fc(y := x * 1.0) + y.mul_(2.0), fc=_fc())
    samples, labels = torch.randn(3, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (3,))
    with pytest.raises(RuntimeError, match="inplace operation"):
        autograd_gradients(network, samples, labels)
    with pytest.warns(UserWarning, match=r"'fc\.(weight|bias)'"), pytest.raises(RuntimeError):
        taps_of(network, samples, labels)


def test_inputs_alone_are_those_of_every_run_as_they_were() -> None:
    """A layer that runs twice gives two; what is overwritten afterwards is not what was seen."""

    def forward(net: Any, x: Tensor) -> Tensor:
        first = net.conv(x)
        seen = first.clone()
        second = net.conv(first)
        first.zero_()  # overwritten after it was seen
        outputs: Tensor = (second + seen).flatten(1)
        return outputs

    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    network = _Network(forward, conv=conv)
    names = {module: name for name, module in network.named_modules()}
    images = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    taps = list(collect_inputs(network, names, (images,), [conv]))
    rows = [images, conv(images).detach()]
    expected = (_patch_gram(rows[0]) + _patch_gram(rows[1])) / (2 * 3 * 4 * 5)
    found = input_grams(taps, frozenset({"conv.weight"}))["conv.weight"]
    torch.testing.assert_close(found, expected)


def _patch_gram(images: Tensor) -> Tensor:
    patches = functional.unfold(images, 3, padding=1).transpose(1, 2).flatten(0, 1)
    return patches.T @ patches


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(2, 3, 2, dilation=2), nn.Linear(5, 2)])
def test_inputs_alone_give_the_gram_matrices_of_taps(layer: nn.Module) -> None:
    network = nn.Sequential(layer.double(), nn.Flatten())
    names = {module: name for name, module in network.named_modules()}
    images = torch.randn(3, 2, 6, 5, dtype=torch.float64)
    whole = collect_taps(network, names, (images,), lambda logits: [torch.ones_like(logits)], layers=[layer])
    inputs = collect_inputs(network, names, (images,), [layer])
    found, expected = (input_grams(taps, frozenset({"0.weight"}))["0.weight"] for taps in (inputs, whole))
    torch.testing.assert_close(found, expected)
