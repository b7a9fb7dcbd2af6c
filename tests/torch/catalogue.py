"""Users' PyTorch networks, of many kinds: what makes each stands by its name in ``NETWORKS``.

Images are [N, 2, 8, 8].
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune


def plain(*middle: nn.Module, width: int = 6) -> nn.Sequential:
    """Return two layers with others between them, of images."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, bias=False), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(36, width), nn.Tanh()
    )


class Named(nn.Module):
    """A network with layers of these names, of which it uses the outputs together."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            layers = nn.ModuleList(nn.Linear(128, 3) for _ in range(2)) if name.endswith("s") else nn.Linear(128, 3)
            self.add_module(name, layers)

    def forward(self, images: Tensor) -> Tensor:
        flat, features = images.flatten(1), []
        for layer in self.children():
            features += [one(flat) for one in (layer if isinstance(layer, nn.ModuleList) else [layer])]
        return torch.cat(features, 1).tanh()


class KeptInEvaluation(nn.Sequential):
    """A network whose first norm stays in evaluation mode, as detection networks keep theirs."""

    def train(self, mode: bool = True) -> "KeptInEvaluation":
        super().train(mode)
        self[1].eval()
        return self


class LowRank(nn.Linear):
    """A frozen layer with a trained correction of low rank."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        corrected: Tensor = super().forward(inputs) + self.up(self.down(inputs))
        return corrected


class Counting(nn.Module):
    """A layer that stores what it saw, in place or in new tensors, and depends on it."""

    seen: Tensor
    passes: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("seen", torch.zeros(4) if how != "growing" else torch.zeros(1, 4))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            mean = images.detach().mean((0, 2, 3))
            if self.how == "in place":
                self.seen.mul_(0.9).add_(0.1 * mean)
            elif self.how == "anew":
                self.seen = 0.9 * self.seen + 0.1 * mean
            else:
                self.seen = torch.cat([self.seen, mean[None]])
            self.passes += 1
        return images - self.seen.reshape(-1, 4).mean(0)[:, None, None]


class Odd(nn.Module):
    """A layer that draws random numbers, or looks at the batch's other samples, in evaluation too."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, images: Tensor) -> Tensor:
        return images + torch.randn_like(images) if self.what == "noise" else images - images.mean(0)


def frozen(network: nn.Sequential, *layers: int) -> nn.Sequential:
    for layer in layers:
        network[layer].requires_grad_(False)
    return network


def in_evaluation(network: nn.Sequential, layer: int) -> nn.Sequential:
    network[layer].eval()
    return network


def biases_alone() -> nn.Sequential:
    network = plain()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return network


def patched(network: nn.Sequential) -> nn.Sequential:
    last: Any = network[-2]
    own = last.forward
    last.forward = lambda inputs: 0.5 * own(inputs)
    return network


def trained_norm() -> nn.BatchNorm2d:
    """Return a norm with statistics, as a pretrained one has them."""
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.running_mean, 0.5)  # type: ignore[arg-type]
    return norm


class OfRows(nn.Module):
    """A network of the rows of images as eight tokens [N, 8, 16], of which the mean is taken."""

    def __init__(self, body: nn.Module, *, places: bool = False, last: bool = False) -> None:
        super().__init__()
        self.body, self.last = body, last
        self.places = nn.Parameter(torch.randn(8, 16)) if places else None

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.transpose(1, 2).flatten(2)
        tokens = tokens if self.places is None else tokens + self.places
        outputs = self.body(tokens)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        mean: Tensor = outputs[:, -1] if self.last else outputs.mean(1)
        return mean


class Attending(nn.Module):
    """Attention from tokens to tokens, called with keywords."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        attended: Tensor = self.attention(query=tokens, key=tokens, value=tokens, need_weights=False)[0]
        return attended


class Experts(nn.Module):
    """Two experts, each of which sees the images that are routed to it, and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(128, 2), nn.ModuleList(nn.Linear(128, 6) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        shares = self.router(flat).softmax(1)
        best, output = shares.argmax(1), flat.new_zeros(len(flat), 6)
        for number, expert in enumerate(self.experts):
            mine = best == number
            output[mine] = expert(flat[mine]) * shares[mine, number, None]
        return output.tanh()


class Residual(nn.Module):
    """A block of a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        inner: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu()))
        return (images + inner).relu()


class Pair(nn.Module):
    """A bilinear layer of an input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(128, 128, 2)

    def forward(self, flat: Tensor) -> Tensor:
        product: Tensor = self.pair(flat, flat.cos())
        return product.tanh()


class Tied(nn.Module):
    """One matrix that is used forward and back, and a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 128) / 12), nn.Parameter(torch.zeros(128))

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.linear(images.flatten(1), self.weight).tanh()
        return functional.linear((hidden @ self.weight + self.bias).tanh(), self.weight)


class OfTransformers(nn.Module):
    """A model of ``transformers``, from its configuration, of the rows of images for embedded tokens, or of images."""

    def __init__(self, kind: str, *, lora: bool = False) -> None:
        super().__init__()
        transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        self.takes_images = kind == "ViT"
        if kind == "GPT2":
            config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_inner=8, n_positions=8, vocab_size=4)
        elif kind == "ViT":
            config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=2)
        else:
            grouped = {"num_key_value_heads": 1} if kind == "Llama" else {}
            config = getattr(transformers, f"{kind}Config")(**sizes, **grouped, vocab_size=4, max_position_embeddings=8)
        options = {} if kind in ("GPT2", "Llama") else {"add_pooling_layer": False}
        model = getattr(transformers, f"{kind}Model")(config, **options)
        if lora:
            peft: Any = pytest.importorskip("peft", reason="peft is not installed")
            names = ["c_attn"] if kind == "GPT2" else ["query", "value"]
            settings = peft.LoraConfig(
                r=2, target_modules=names, fan_in_fan_out=kind == "GPT2", init_lora_weights=False
            )
            model = peft.get_peft_model(model, settings)
        self.model = model
        for name, value in self.model.named_parameters():
            if any(table in name for table in ("wte", "embed_tokens", "word_embeddings")):
                value.requires_grad_(False)  # no token is looked up

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.transpose(1, 2).flatten(2)
        given = {"pixel_values": images} if self.takes_images else {"inputs_embeds": tokens}
        mean: Tensor = self.model(**given).last_hidden_state.mean(1)
        return mean


def residual_with_frozen_stem() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), trained_norm(), nn.ReLU())
    stem.requires_grad_(False)
    return nn.Sequential(stem, Residual(), Residual(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def normed(how: Any) -> nn.Sequential:
    network = plain()
    how(network[-2])
    return network


def hooked(network: nn.Sequential) -> nn.Sequential:
    """Return a network with hooks that change a layer's inputs and another's outputs."""
    network[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
    network[-2].register_forward_pre_hook(lambda layer, inputs: (inputs[0].sin(),))
    return network


# By name: what makes a network that must learn.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "without weights": nn.Flatten,
    "called heads": lambda: Named("heads"),
    "called head": lambda: Named("head"),
    "called heads and head": lambda: Named("heads", "head", "heads_s", "backbone"),
    "frozen first layer": lambda: frozen(plain(), 0),
    "frozen last layer": lambda: frozen(plain(), -2),
    "frozen throughout": lambda: frozen(plain(trained_norm()), 0, 1, -2),
    "frozen weights": biases_alone,
    "frozen norm": lambda: frozen(plain(trained_norm()), 1),
    "norm in evaluation": lambda: in_evaluation(plain(trained_norm()), 1),
    "norm kept in evaluation": lambda: KeptInEvaluation(*plain(trained_norm())),
    "dropout in evaluation": lambda: in_evaluation(plain(nn.Dropout(0.5)), 1),
    "all in evaluation": lambda: plain(trained_norm()).eval(),
    "low rank": lambda: nn.Sequential(nn.Flatten(), LowRank(128, 6), nn.Tanh()),
    "batch norm": lambda: plain(nn.BatchNorm2d(4)),
    "batch norm without momentum": lambda: plain(nn.BatchNorm2d(4, momentum=None)),
    "batch norm without weights": lambda: plain(nn.BatchNorm2d(4, affine=False)),
    "batch norm without statistics": lambda: plain(nn.BatchNorm2d(4, track_running_stats=False)),
    "flat batch norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.BatchNorm1d(6)),
    "flat batch norm without statistics": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(128, 6), nn.BatchNorm1d(6, track_running_stats=False)
    ),
    "instance norm": lambda: plain(nn.InstanceNorm2d(4, affine=True)),
    "instance norm with statistics": lambda: plain(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "group norm": lambda: plain(nn.GroupNorm(2, 4)),
    "layer norm": lambda: plain(nn.LayerNorm(3)),
    "dropout": lambda: plain(nn.Dropout(0.2)),
    "buffers in place": lambda: plain(Counting("in place")),
    "buffers anew": lambda: plain(Counting("anew")),
    "buffers that grow": lambda: plain(Counting("growing")),
    "patched": lambda: patched(plain()),
    "channels last": lambda: plain(nn.BatchNorm2d(4)).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(6)),
    "in double precision": lambda: plain().double(),
    "hooks": lambda: hooked(plain()),
    "attention": lambda: OfRows(Attending()),
    "attention without biases": lambda: OfRows(Attending(bias=False, kdim=16, vdim=16, dropout=0.1)),
    "an encoder's layer": lambda: OfRows(nn.TransformerEncoderLayer(16, 2, 8, dropout=0.1, batch_first=True)),
    "an encoder with norms first": lambda: OfRows(
        nn.TransformerEncoderLayer(16, 2, 8, 0.0, batch_first=True, norm_first=True), places=True
    ),
    "LSTM": lambda: OfRows(nn.LSTM(16, 5, batch_first=True), last=True),
    "LSTM both ways": lambda: OfRows(nn.LSTM(16, 3, bidirectional=True, batch_first=True)),
    "GRU": lambda: OfRows(nn.GRU(16, 5, batch_first=True), last=True),
    "GRU of two layers": lambda: OfRows(nn.GRU(16, 3, num_layers=2, batch_first=True), places=True),
    "experts with hard routing": Experts,
    "residual with a frozen stem": residual_with_frozen_stem,
    "weight norm": lambda: normed(nn.utils.parametrizations.weight_norm),
    "orthogonal": lambda: normed(nn.utils.parametrizations.orthogonal),
    "pruned": lambda: normed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),  # type: ignore[no-untyped-call]
    "depthwise": lambda: plain(nn.Conv2d(4, 8, 2, groups=4, padding=1), nn.Conv2d(8, 4, 2)),
    "transposed convolution": lambda: plain(nn.ConvTranspose2d(4, 4, 3, padding=1)),
    "dilated": lambda: plain(nn.Conv2d(4, 4, 2, dilation=2, padding=1)),
    "slopes": lambda: plain(nn.PReLU(4)),
    "a bilinear layer": lambda: nn.Sequential(nn.Flatten(), Pair()),
    "one matrix forward and back": Tied,
    "GPT-2": lambda: OfTransformers("GPT2"),
    "BERT": lambda: OfTransformers("Bert"),
    "Llama": lambda: OfTransformers("Llama"),
    "ViT": lambda: OfTransformers("ViT"),
    "GPT-2 with LoRA": lambda: OfTransformers("GPT2", lora=True),
    "BERT with LoRA": lambda: OfTransformers("Bert", lora=True),
    "positions": lambda: OfRows(nn.Linear(16, 5), places=True),
}
