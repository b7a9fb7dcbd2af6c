"""Users' models of inputs [N, 6]: what makes each stands by its name in ``NETWORKS``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.torch.modules import CLASSES

Pairs = list[tuple[Tensor, Tensor]]


class Of(nn.Module):
    """A network made of a function, and of layers and parameters that it may use."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self._function = function

    def forward(self, inputs: Tensor) -> Any:
        return self._function(self, inputs)


def row(*layers: Any) -> nn.Module:
    return nn.Sequential(*layers)


def head(width: int) -> nn.Linear:
    return nn.Linear(width, CLASSES)


def keys(inputs: Tensor) -> Tensor:
    return (5 * inputs).round().clamp(-10, 10).long() + 10


def looked_up(**options: Any) -> nn.Module:
    """Words of which the inputs are keys."""
    words = nn.Embedding(21, 3, **options)
    return Of(lambda net, x: net.head(net.words(keys(x)).tanh().flatten(1)), words=words, head=head(18))


def bagged(**options: Any) -> nn.Module:
    return Of(lambda net, x: net.head(net.words(keys(x)).tanh()), words=nn.EmbeddingBag(21, 4, **options), head=head(4))


def bounded(look_up: Any, longest: float = 100.0) -> nn.Module:
    """Words whose rows a function shortens, at first none of them."""
    return Of(
        lambda net, x: net.head(look_up(keys(x), net.words, max_norm=longest).tanh().flatten(1)[:, :4]),
        words=torch.randn(21, 4),
        head=head(4),
    )


def tied() -> nn.Module:
    network: Any = row(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), head(6))
    network[2].weight = network[0].weight
    return network  # type: ignore[no-any-return]


def named_twice(last: nn.Module) -> nn.Module:
    network: Any = Of(lambda net, x: net.body(x), body=row(nn.Linear(6, 5), nn.Tanh(), last))
    network.head = network.body[2]
    return network  # type: ignore[no-any-return]


def repeated() -> nn.Module:
    layer = nn.Linear(6, 6)
    return row(layer, nn.Tanh(), layer, nn.Tanh(), head(6))


def listed() -> nn.Module:
    last = head(6)
    return Of(
        lambda net, x: sum(each(x.roll(index, 1)) for index, each in enumerate(net.heads)),
        heads=nn.ModuleList([last] * 3),
    )


def channels_last() -> nn.Module:
    layers = nn.Unflatten(1, (3, 1, 2)), nn.Conv2d(3, 4, (1, 2), padding=1), nn.GroupNorm(2, 4), nn.GELU()
    return row(*layers, nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), head(4)).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def transposed() -> nn.Module:
    convolution = nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2, output_padding=1, padding=1)
    return row(nn.Unflatten(1, (2, 3)), convolution, nn.Tanh(), nn.Flatten(), head(24))


def in_pieces(net: Any, x: Tensor) -> Any:
    """A block that is computed again in the backward pass."""
    return net.last(checkpoint(net.middle, net.first(x), use_reentrant=net.reentrant))


def checkpointed(reentrant: bool) -> nn.Module:
    network: Any = Of(in_pieces, first=nn.Linear(6, 5), middle=row(nn.Linear(5, 5), nn.Tanh()), last=head(5))
    network.reentrant = reentrant
    return network  # type: ignore[no-any-return]


def attended(net: Any, x: Tensor) -> Any:
    tokens, mask = x.reshape(-1, 3, 2).repeat(1, 1, 2), torch.ones(3, 3, dtype=torch.bool).triu(1)
    return net.head(net.attention(tokens, tokens, tokens, attn_mask=mask)[0].mean(1))


def placed(net: Any, x: Tensor) -> Any:
    """A class token, and positions that are looked up."""
    tokens = torch.cat([net.token.expand(len(x), -1, -1), net.body(x.reshape(-1, 3, 2))], 1)
    return net.head((tokens + net.places(torch.arange(4))).tanh()[:, 0] + tokens.mean(1))


def packed(net: Any, x: Tensor) -> Any:
    """Sequences of unequal lengths."""
    lengths = 1 + (x[:, :2] > 0).sum(1)
    steps = nn.utils.rnn.pack_padded_sequence(x.reshape(-1, 3, 2), lengths, batch_first=True, enforce_sorted=False)
    return net.head(net.cell(steps)[1][-1])


def step_by_step(net: Any, x: Tensor) -> Any:
    hidden = x.new_zeros(len(x), 4)
    for step in x.reshape(-1, 3, 2).unbind(1):
        hidden = net.cell(step, hidden)
    return net.head(hidden)


def mixed(net: Any, x: Tensor) -> Any:
    shares = net.router(x).softmax(1)
    return sum(shares[:, place, None] * expert(x) for place, expert in enumerate(net.experts))


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "words with padding": lambda: looked_up(padding_idx=3),
    "words with sparse gradients": lambda: looked_up(sparse=True),
    "bags of words": lambda: bagged(mode="mean", padding_idx=10),
    "tied layers": tied,
    "a layer of two names": lambda: named_twice(head(5)),
    "a layer of two names that computes its weight": lambda: named_twice(
        Of(lambda net, x: functional.linear(x, net.w.softmax(0)), w=random(CLASSES, 5))
    ),
    "a layer that comes twice": repeated,
    "a layer three times in a list": listed,
    "a list of parameters": lambda: Of(
        lambda net, x: net.head(sum((x @ weight).tanh() for weight in net.weights)),
        weights=nn.ParameterList([random(6, 5) / 3 for _ in range(3)]),
        head=head(5),
    ),
    "a dict of parameters": lambda: Of(
        lambda net, x: (x @ net.own["w"] + net.own["b"]) * net.own["s"],
        own=nn.ParameterDict({"w": random(6, CLASSES), "b": random(CLASSES), "s": torch.tensor(1.3)}),
    ),
    "rows in a list in a dict": lambda: Of(
        lambda net, x: net.ends["out"](torch.cat([body(x) for body in net.bodies], 1)),
        bodies=nn.ModuleList([row(nn.Linear(6, 4), nn.Tanh()), row(nn.Linear(6, 3), nn.ReLU())]),
        ends=nn.ModuleDict({"out": head(7)}),
    ),
    "channels last": channels_last,
    "a transposed convolution in groups": transposed,
    "a circular convolution": lambda: row(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), head(12)
    ),
    "a convolution in space and time": lambda: row(
        nn.Unflatten(1, (1, 1, 2, 3)), nn.Conv3d(1, 3, (1, 2, 2)), nn.Flatten(), head(6)
    ),
    "one kernel at two strides": lambda: Of(
        lambda net, x: net.head(
            torch.cat(
                [functional.conv1d(x.reshape(-1, 2, 3), net.kernel, stride=s, padding=1).flatten(1) for s in (1, 2)], 1
            ).tanh()
        ),
        kernel=random(2, 2, 3),
        head=head(10),
    ),
    "einsum by hand": lambda: Of(
        lambda net, x: torch.einsum("bhi,hio->bo", x.reshape(-1, 2, 3).tanh(), net.w) + torch.einsum("bi,oi", x, net.v),
        w=random(2, 3, CLASSES),
        v=random(CLASSES, 6),
    ),
    "heads by einsum": lambda: Of(
        lambda net, x: net.head(torch.einsum("bi,ihk->bhk", x, net.w).flatten(1).tanh()),
        w=random(6, 2, 4),
        head=head(8),
    ),
    "heads by tensordot, of two axes": lambda: Of(
        lambda net, x: net.head(torch.tensordot(x, net.w, dims=1).flatten(1).tanh()), w=random(6, 2, 2, 2), head=head(8)
    ),
    "heads by a view": lambda: Of(
        lambda net, x: net.head((x @ net.w.view(6, 8)).tanh()), w=random(6, 2, 4), head=head(8)
    ),
    "heads that are as wide as the inputs": lambda: Of(
        lambda net, x: net.head(torch.einsum("bi,ihk->bhk", x, net.w).flatten(1).tanh()),
        w=random(6, 1, 6),
        head=head(6),
    ),
    "a weight that is computed": lambda: Of(
        lambda net, x: functional.linear((x @ net.w.softmax(0)).tanh(), net.fc.weight / net.fc.weight.norm()),
        w=random(6, 5),
        fc=nn.Linear(5, CLASSES, bias=False),
    ),
    "a weight of low rank": lambda: Of(lambda net, x: x @ (net.u @ net.v), u=random(6, 2), v=random(2, CLASSES)),
    "weights that a network makes": lambda: Of(
        lambda net, x: torch.bmm(net.maker(x).reshape(-1, 3, 4), net.body(x).tanh()[:, :, None])[:, :, 0],
        maker=nn.Linear(6, 12),
        body=nn.Linear(6, 4),
    ),
    "cosines": lambda: Of(
        lambda net, x: functional.linear(functional.normalize(x), functional.normalize(net.w)) * net.scale,
        w=random(CLASSES, 6),
        scale=torch.tensor(5.0),
    ),
    "distances to prototypes": lambda: Of(lambda net, x: -torch.cdist(x, net.w), w=random(CLASSES, 6)),
    "orthogonal": lambda: row(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh(), head(6)),
    "spectral norm": lambda: row(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), head(6)),
    "a bilinear layer": lambda: Of(lambda net, x: net.pair(x[:, :4], x[:, 2:]), pair=nn.Bilinear(4, 4, CLASSES)),
    "checkpointed": lambda: checkpointed(False),
    "compiled": lambda: torch.compile(row(nn.Linear(6, 6), nn.Tanh(), head(6)), backend="eager"),  # type: ignore[dict-item, return-value]
    "masked attention with keys of its own": lambda: Of(
        attended, attention=nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True), head=head(4)
    ),
    "a whole transformer": lambda: Of(
        lambda net, x: net.head(net.body(*[x.reshape(-1, 3, 2).repeat(1, 1, 2)] * 2).mean(1)),
        body=nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True),
        head=head(4),
    ),
    "a token and places": lambda: Of(
        placed, token=random(1, 1, 4), body=nn.Linear(2, 4), places=nn.Embedding(4, 4), head=head(4)
    ),
    "packed sequences": lambda: Of(packed, cell=nn.GRU(2, 5, batch_first=True), head=head(5)),
    "a cell step by step": lambda: Of(step_by_step, cell=nn.GRUCell(2, 4), head=head(4)),
    "an LSTM with projections": lambda: Of(
        lambda net, x: net.head(net.cell(x.reshape(-1, 3, 2))[0][:, -1]),
        cell=nn.LSTM(2, 5, proj_size=3, num_layers=2, batch_first=True),
        head=head(3),
    ),
    "experts with soft routing": lambda: Of(mixed, router=nn.Linear(6, 2), experts=nn.ModuleList([head(6), head(6)])),
    "gates, dropout and a norm": lambda: row(
        nn.Linear(6, 8), nn.GLU(), nn.Dropout(0.3), nn.LayerNorm(4), nn.Linear(4, CLASSES)
    ),
    "root mean squares": lambda: row(nn.Linear(6, 5), nn.RMSNorm(5), nn.PReLU(), head(5)),
    "a batch norm without weights": lambda: row(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), head(5)),
    "complex numbers of two real ones": lambda: Of(
        lambda net, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(net.w), n=6)[:, :CLASSES],
        w=random(4, 2),
    ),
    "a matrix in two halves": lambda: Of(
        lambda net, x: x[:, :3].tanh() @ net.w[:3] + x[:, 3:] @ net.w[3:], w=random(6, 3)
    ),
    "a matrix from its left": lambda: Of(lambda net, x: (net.w @ x.T + net.b[:, None]).T, w=random(3, 6), b=random(3)),
    "a matrix for each sample": lambda: Of(lambda net, x: torch.vmap(lambda one: net.w @ one)(x), w=random(3, 6)),
    "rows of a parameter by their numbers": lambda: Of(
        lambda net, x: x @ net.w[:, [2, 0, 1]] + net.table[keys(x)[:, 0]], w=random(6, 3), table=random(21, 3)
    ),
    "parts put together": lambda: Of(
        lambda net, x: functional.linear(x, torch.cat([net.a, net.b]), torch.cat([net.c, net.c.new_zeros(2)])),
        a=random(1, 6),
        b=random(2, 6),
        c=random(1),
    ),
    "a choice": lambda: Of(lambda net, x: torch.where(x[:, :3] > 0, net.a, net.b * x[:, :3]), a=random(3), b=random(3)),
    "a part that is cut off": lambda: Of(
        lambda net, x: net.head(net.body(x).detach()), body=nn.Linear(6, 4), head=head(4)
    ),
    "a part that is not used": lambda: Of(lambda net, x: net.head(x), body=nn.Linear(6, 4), head=head(6)),
    "a matrix of no inputs": lambda: Of(
        lambda net, x: net.head(x) + x[:, :0] @ net.right + functional.linear(x[:, :0], net.left, net.bias),
        right=random(0, CLASSES),
        left=random(CLASSES, 0),
        bias=random(CLASSES),
        head=head(6),
    ),
    "an empty parameter": lambda: Of(lambda net, x: net.head(x) + net.none.sum(), none=random(0, 4), head=head(6)),
}
