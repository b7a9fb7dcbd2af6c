"""That no use of a parameter is passed over: networks whose layers taps do not know, or know and must not trust."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

from adapters.torch import tapping
from adapters.torch.layers import constant_statistics
from adapters.torch.tapping import Layouts, collect_inputs, collect_taps, matrices_of
from became_core import BecameError
from became_core.curvature import batch_gradient, diagonal_fisher, input_grams, kronecker_factors, per_sample_gradients
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


class _Recurrent(nn.Module):
    """A recurrent layer over three steps."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.cell = kind(WIDTH, WIDTH, **settings)

    def forward(self, inputs: Tensor) -> Tensor:
        steps = torch.stack([inputs, inputs.sin(), inputs * inputs], 1 if self.cell.batch_first else 0)
        outputs: Tensor = self.cell(steps)[0]
        return outputs[:, -1] if self.cell.batch_first else outputs[-1]


class _Tokens(nn.Module):
    """A small language model: tied embeddings, positions that are looked up, and tokens made of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WIDTH, 6), nn.Embedding(5, 6)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
        self.head = nn.Linear(6, WIDTH, bias=False)
        self.head.weight = self.words.weight

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.argsort(1)[:, :3]
        hidden = self.words(tokens) + self.places(torch.arange(3, device=inputs.device))
        logits: Tensor = self.head(self.block(hidden))[:, -1]
        return logits


class _Experts(nn.Module):
    """Two experts, each of which sees the samples that are routed to it, and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        chosen = (inputs[:, 0] > 0).long()
        outputs = torch.zeros_like(inputs)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            outputs = outputs.index_add(0, rows, expert(inputs[rows]).tanh())
        return outputs


class _Bare(nn.Module):
    """Parameters that no layer holds: a class token, places, a weight that is cut, and one stored [d_in, d_out]."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 5, WIDTH))
        self.cut, self.stored = nn.Parameter(torch.randn(6, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.gamma, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = torch.stack([inputs, inputs.cos()], 1)
        tokens = torch.cat([self.token.expand(len(inputs), -1, -1), tokens], 1) + self.places[:, :3]
        first = functional.linear(tokens, self.cut[1:5]).tanh()
        second = torch.addmm(self.shift, first.flatten(0, 1), self.stored).reshape(first.shape)
        heads = torch.einsum("nld,dhk->nlhk", second, self.stored.view(WIDTH, 2, 2)).flatten(2)
        mixed = (heads * self.gamma[None, None]).transpose(1, 2) - self.shift.view(1, -1, 1)
        return mixed.tanh().mean(2)


def _hooked() -> _Network:
    network: Any = _Network(lambda net, x: net.fc(x).tanh(), fc=_fc())
    network.fc.register_forward_hook(lambda module, inputs, output: 2 * output.sin())
    network.fc.register_forward_pre_hook(lambda module, inputs: (inputs[0] * inputs[0],))
    hooked: _Network = network
    return hooked


def _patched() -> _Network:
    network: Any = _Network(lambda net, x: net.fc(x).tanh(), fc=_fc())
    own = network.fc.forward
    network.fc.forward = lambda x: own(x) * x
    patched: _Network = network
    return patched


def _pruned() -> nn.Module:
    pruned: nn.Module = prune.l1_unstructured(_fc(), "weight", 0.5)  # type: ignore[no-untyped-call]
    return pruned


def _inner(module: nn.Module) -> Callable[[], _Network]:
    return lambda: _Network(lambda net, x: net.fc(net.inner(x)), fc=_fc(), inner=module)


_WEIGHT_NORM = ["'fc.parametrizations.weight.original0'", "'fc.parametrizations.weight.original1'"]

# What the network is, and what its warning names; nothing where taps serve it all.
NETWORKS: dict[str, tuple[Callable[[], _Network], list[str]]] = {
    "a bare parameter": (lambda: _Network(lambda net, x: net.fc(x) * net.scale, fc=_fc()), []),
    "bare parameters of many forms": (lambda: _inner(_Bare())(), []),
    "a layer of another class": (
        lambda: _Network(lambda net, x: net.fc(net.pair(x, x)), fc=_fc(), pair=nn.Bilinear(WIDTH, WIDTH, WIDTH)),
        ["'pair.weight' (in the layer 'pair', a Bilinear, by Trilinear)"],
    ),
    "a parametrised layer": (
        lambda: _Network(lambda net, x: net.fc(x), fc=nn.utils.parametrizations.weight_norm(_fc())),
        _WEIGHT_NORM,
    ),
    "a pruned layer": (lambda: _Network(lambda net, x: net.fc(x), fc=_pruned()), ["'fc.weight_orig'"]),
    "a spectral norm": (
        lambda: _Network(lambda net, x: net.fc(x), fc=nn.utils.parametrizations.spectral_norm(_fc())),
        ["'fc.parametrizations.weight.original'"],
    ),
    "two matrices multiplied": (
        lambda: _Network(lambda net, x: x @ (net.a.weight @ net.b.weight), a=_fc(), b=_fc()),
        ["'a.weight'", "'b.weight'"],
    ),
    "two layers with one weight": (_tied, []),
    "a layer's weight used beside it": (
        lambda: _Network(lambda net, x: functional.linear(net.fc(x).tanh(), net.fc.weight), fc=_fc()),
        [],
    ),
    "attention": (lambda: _Network(_attended, fc=_fc(), attention=_attention()), []),
    "attention between two sequences": (
        lambda: _Network(
            lambda net, x: net.attention(torch.stack([x, x.cos()], 1), *[torch.stack([x.sin(), x * x, x], 1)] * 2)[0][
                :, 0
            ],
            attention=_attention(),
        ),
        [],
    ),
    "an encoder's layer": (
        lambda: _Network(
            lambda net, x: net.layer(torch.stack([x, x.cos()], 1)).mean(1),
            layer=nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True),
        ),
        [],
    ),
    "a GRU": (lambda: _inner(_Recurrent(nn.GRU, batch_first=True))(), []),
    "a GRU with time first": (lambda: _inner(_Recurrent(nn.GRU))(), []),
    "an LSTM of two layers": (lambda: _inner(_Recurrent(nn.LSTM, num_layers=2, batch_first=True))(), []),
    "tied embeddings": (lambda: _inner(_Tokens())(), []),
    "experts with hard routing": (lambda: _inner(_Experts())(), []),
    "hooks that change inputs and outputs": (_hooked, []),
    "a patched forward": (_patched, []),
    "samples on the second axis": (lambda: _Network(_by_time, fc=_fc()), []),
    "samples and time in one axis": (lambda: _Network(_in_one_axis, fc=_fc()), []),
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
    "what vmap cannot do": (
        lambda: _Network(
            lambda net, x: net.fc(x if x.abs().max().item() < 1e6 else 0 * x),
            fc=nn.utils.parametrizations.weight_norm(_fc()),
        ),
        _WEIGHT_NORM,
    ),
    "a compiled layer": (
        lambda: _Network(lambda net, x: net.fc(x), fc=torch.compile(_fc(), backend="eager")),  # type: ignore[arg-type]
        [],
    ),
}


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
@pytest.mark.parametrize("case", NETWORKS)
def test_fisher_is_exact_whatever_the_network_does_with_its_parameters(case: str, batch: int) -> None:
    torch.manual_seed(0)
    build, named = NETWORKS[case]
    network = build()
    samples, labels = torch.randn(batch, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (batch,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_exact(network, samples, labels)
    messages = [str(warning.message) for warning in caught if "taps do not know" in str(warning.message)]
    if case in ("two matrices multiplied", "a pruned layer") and batch == 1:
        return  # all rows are the one sample's
    assert len(messages) == bool(named)
    assert all(name in messages[0] for name in named)
    assert not messages or messages[0].count(" (in the layer") == len(named)


def _errors(one_hot: Tensor, logits: Tensor) -> list[Tensor]:
    return [logits.softmax(1) - one_hot]


def test_rows_are_given_to_their_samples_even_if_another_axis_is_as_long() -> None:
    """Two steps of time and two samples, with nothing in the shapes to tell them apart; then more samples."""
    torch.manual_seed(0)
    network = _Network(_by_time, fc=_fc())
    names = {module: name for name, module in network.named_modules()}
    layouts = Layouts()
    for batch in (2, 3, 2):
        samples, labels = torch.randn(batch, WIDTH, dtype=torch.float64), torch.arange(batch) % WIDTH
        one_hot = functional.one_hot(labels, WIDTH).double()
        (taps,) = collect_taps(network, names, (samples,), partial(_errors, one_hot), layouts=layouts)
        expected = autograd_gradients(network, samples, labels)
        for name, gradient in per_sample_gradients(taps).items():
            torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("case", NETWORKS)
def test_matrices_are_those_that_multiply_rows_of_the_samples(case: str) -> None:
    """Their steps within the complement of what they have seen change no logit; others are not called matrices."""
    torch.manual_seed(0)
    network = NETWORKS[case][0]()
    names = {module: name for name, module in network.named_modules()}
    samples = torch.randn(2, WIDTH, dtype=torch.float64)
    matrices = matrices_of(network, names, (samples,))
    expected = {name for name, value in network.named_parameters() if value.ndim == 2} & {
        "fc.weight",
        "head.weight",
        "body.weight",
        "attention.in_proj_weight",
        "inner.cell.weight_hh_l0",
        "inner.stored",
    }
    assert expected <= set(matrices) | {"inner.stored"}
    assert not any(name in " ".join(NETWORKS[case][1]) for name in matrices)
    before = network(samples).detach()
    passes = list(collect_inputs(network, names, (samples,), matrices))
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, transposed in matrices.items():
            seen = [{tap.weight_name(key): tap.inputs for key, tap in taps.items()} for taps in passes]
            rows = torch.cat([inputs[name].flatten(0, 1) for inputs in seen if name in inputs])
            values = parameters[name].flatten(1)
            if not rows.is_floating_point():  # the keys of an embedding, whose rows are one-hot vectors
                rows = nn.functional.one_hot(rows, len(values)).double()
            step = torch.randn(values.shape, dtype=torch.float64)
            step = step.T if transposed else step
            step -= step @ torch.linalg.pinv(rows) @ rows
            values.copy_(values + (step.T if transposed else step))
    torch.testing.assert_close(network(samples), before)


def test_a_warning_is_given_once() -> None:
    network = NETWORKS["a parametrised layer"][0]()
    samples, labels = torch.randn(3, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (3,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            taps_of(network, samples, labels)
    (warning,) = caught
    assert "'fc.parametrizations.weight.original0' (in the layer 'fc.parametrizations.weight', a" in str(
        warning.message
    )


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
    network = NETWORKS[case][0]()
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


@pytest.mark.parametrize("case", ["a layer that runs twice", "a linear layer"])
def test_kronecker_factors_count_the_inputs_of_a_batch_once_for_all_labels(case: str) -> None:
    torch.manual_seed(0)
    network: Any = NETWORKS[case][0]() if case in NETWORKS else nn.Sequential(_fc()).double()
    samples, labels = torch.randn(4, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (4,))
    taps = taps_of(network, samples, labels, "true")
    assert len(taps) == WIDTH
    (name,) = taps[0]
    runs = [samples] if case == "a linear layer" else [samples, network.fc(samples).tanh().detach()]
    factor, _ = kronecker_factors(taps, samples=4).factors[f"{name}.weight"]
    expected = sum(run.T @ run for run in runs) / (4 * len(runs))
    torch.testing.assert_close(factor, expected, rtol=1e-12, atol=1e-14)


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
    with pytest.warns(UserWarning, match=r"'fc\.(weight|bias)'"), pytest.raises(BecameError, match="inplace"):
        taps_of(network, samples, labels)


def test_inputs_alone_are_those_of_every_run() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    network = _Network(lambda net, x: net.conv(net.conv(x)).flatten(1), conv=conv)
    names = {module: name for name, module in network.named_modules()}
    images = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    taps = list(collect_inputs(network, names, (images,), ["conv.weight"]))
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
    whole = collect_taps(network, names, (images,), lambda logits: [torch.ones_like(logits)])
    inputs = collect_inputs(network, names, (images,), ["0.weight"])
    found, expected = (input_grams(taps, frozenset({"0.weight"}))["0.weight"] for taps in (inputs, whole))
    torch.testing.assert_close(found, expected)
