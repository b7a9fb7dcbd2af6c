"""Networks of Hugging Face's hub as backbones: a model of the package ``transformers``, seen as samples to features.

Convention: a network reads images at its own size and with its own number of channels, so that images are resized
(bilinearly, with antialiasing) and one channel is repeated. Pretrained weights see images normalised by the mean and
standard deviation of ``preprocessor_config.json`` if the folder has one, and by the data set's otherwise. Text is
bytes, which are given as the numbers of tokens. A matrix that GPT-2 stores as [d_in, d_out] becomes a linear layer's
[d_out, d_in], which a projector can protect. Features are:

| the network's last hidden state | features |
| --- | --- |
| [N, tokens, d] of images | the class token's, the first; the mean if there is none |
| [N, d, H, W] of images | the mean over places |
| [N, L, d] of text, a label for each byte | all positions'; no position may depend on a later byte |
| [N, L, d] of text, a label for each text | the last position's if the network is causal, else the mean |

Code that comes with a network is never run, and weights are read from safetensors files alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.networks import HubNetwork
from became_core import BecameError
from became_core.continual import TaskStream
from became_core.errors import first_line

__all__ = ["HubBackbone", "hub_backbone"]

BYTES = 256

# What networks of images call the parameter of their class token.
CLASS_TOKENS = frozenset({"cls_token", "class_token", "class_embedding"})


class HubBackbone(nn.Module):
    """A model of ``transformers`` as a backbone: images [N, C, H, W] or bytes [N, L] to features."""

    image_factor: Tensor
    image_shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        stream: TaskStream,
        *,
        channels: int = 3,
        size: Sequence[int] | None = None,
        known: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        """Keep the model.

        Args:
            model: its outputs have a ``last_hidden_state``.
            stream: what it will learn.
            channels: how many an image of the model has.
            size: the height and width of its images; None if it takes any.
            known: the mean and the standard deviation [C] by which its weights know images to be normalised, from 0 to
                1; None for those of the stream.
        """
        super().__init__()
        self.model, self.channels = model, channels
        self.size = None if size is None else (size[0], size[1])
        self.per_position = stream.dataset.predicts_bytes
        self.is_causal = False
        names = (name.rpartition(".")[2] for name, _ in model.named_parameters())
        self.has_class_token = not CLASS_TOKENS.isdisjoint(names)
        factor, shift = (torch.ones(()), torch.zeros(())) if known is None else _rescaled(stream, *known)
        self.register_buffer("image_factor", factor, persistent=False)
        self.register_buffer("image_shift", shift, persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        """Return the features [N, features] or [N, L, features]."""
        if samples.ndim == 2:
            hidden = self._hidden(samples)
            if self.per_position:
                return hidden
            return hidden[:, -1] if self.is_causal else hidden.mean(1)
        images = samples * self.image_factor + self.image_shift
        if images.shape[1] == 1:
            images = images.expand(-1, self.channels, -1, -1)
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = functional.interpolate(images, self.size, mode="bilinear", antialias=True)
        return self._features(images)

    def _features(self, images: Tensor) -> Tensor:
        hidden = self._hidden(images)
        if hidden.ndim == 4:
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.has_class_token else hidden.mean(1)

    def _hidden(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.model(inputs).last_hidden_state
        return hidden

    @torch.no_grad()
    def find_causality(self, length: int) -> None:
        """Find out whether no position of a text of this length depends on a later byte."""
        texts = torch.arange(2 * length).reshape(2, length) % BYTES
        texts[1, :-1] = texts[0, :-1]
        texts[1, -1] = (texts[0, -1] + 1) % BYTES
        first, second = self._hidden(texts)
        self.is_causal = bool(torch.allclose(first[:-1], second[:-1], rtol=1e-4, atol=1e-5))

    def try_on(self, shape: Sequence[int], source: str) -> None:
        """Run once on samples of a shape; of text, find out whether the network is causal.

        Raises:
            BecameError: if the network, which the message calls by its source, cannot take them.
        """
        try:
            if len(shape) == 1:
                self.find_causality(shape[0])
            else:
                with torch.no_grad():
                    self(torch.zeros(2, *shape))
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise BecameError(
                f"the network '{source}' cannot take samples {list(shape)}: {first_line(error)}."
            ) from None


def hub_backbone(network: HubNetwork, stream: TaskStream, seed: int) -> HubBackbone:
    """Return a network of the hub as a backbone for a stream.

    Args:
        network: which.
        stream: what it will learn.
        seed: draws the weights if they are not pretrained.

    Raises:
        BecameError: if the package ``transformers`` is missing, the network cannot be read, or it cannot learn these
            samples.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise BecameError(f"the package '{error.name}' is missing; pip install 'became[transformers]'.") from None
    source, shape = network.source, stream.dataset.images.shape[1:]
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            _check(network, config, is_text=len(shape) == 1)
            if network.pretrained:
                words = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
                model, found = transformers.AutoModel.from_pretrained(source, **words)
                _check_weights(source, found)
            else:
                model = transformers.AutoModel.from_config(config, dtype=torch.float32)
        except (BecameError, MemoryError):
            raise
        # No such folder or name, no network, a configuration of another kind, or a damaged one: many classes of errors.
        except Exception as error:
            raise BecameError(f"the network '{source}' cannot be read: {first_line(error)}.") from None
    expected = "input_ids" if len(shape) == 1 else "pixel_values"
    if model.main_input_name != expected:
        samples = "text" if len(shape) == 1 else "images"
        raise BecameError(f"the network '{source}' reads {model.main_input_name}, not {samples}; choose another.")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, transformers.pytorch_utils.Conv1D):
            model.set_submodule(name, _linear(layer))
    size, known = getattr(config, "image_size", None), _known_images(network) if network.pretrained else None
    size = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    backbone = HubBackbone(model.eval(), stream, channels=channels, size=size, known=known)
    backbone.try_on(shape, source)
    if backbone.per_position and not backbone.is_causal:
        raise BecameError(
            f"the network '{source}' sees the byte that it is to predict; a benchmark of next bytes needs one whose "
            "positions depend on earlier bytes alone, such as GPT-2's."
        )
    return backbone.train()


def _check(network: HubNetwork, config: Any, *, is_text: bool) -> None:
    """Refuse what a configuration says that it cannot do, before weights are read."""
    if getattr(config, "is_encoder_decoder", False):
        raise BecameError(
            f"the network '{network.source}' is an encoder with a decoder; choose an encoder or a decoder alone."
        )
    tokens = getattr(config, "vocab_size", None)
    if not is_text or tokens is None:
        return
    if tokens < BYTES:
        raise BecameError(f"the network '{network.source}' knows {tokens} tokens; text is bytes and needs {BYTES}.")
    if network.pretrained and tokens != BYTES:
        raise BecameError(
            f"the weights of '{network.source}' know {tokens:,} tokens of a tokenizer, and text is bytes here; leave "
            "--pretrained out."
        )


def _check_weights(source: str, found: Mapping[str, Any]) -> None:
    """Refuse a file that lacks weights of the network, which would be random; that of a pooler is never used.

    Args:
        source: what a message calls the network.
        found: what ``from_pretrained`` says of the file.
    """
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name.split("."))
    if missing:
        raise BecameError(
            f"the weights of '{source}' lack '{missing[0]}' ({len(missing)} in all); give weights of this "
            "architecture, or leave --pretrained out."
        )


def _linear(layer: Any) -> nn.Linear:
    """Return the linear layer that computes what a Conv1D of ``transformers`` does, a W + b with W [d_in, d_out]."""
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # which draws no weights
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    return linear


def _known_images(network: HubNetwork) -> tuple[Sequence[float], Sequence[float]] | None:
    """Return the mean and the standard deviation of images that pretrained weights know; None if nothing says so."""
    from transformers import AutoImageProcessor

    try:
        known = AutoImageProcessor.from_pretrained(network.source)
    except (ImportError, OSError, ValueError):
        return None
    mean, std = getattr(known, "image_mean", None), getattr(known, "image_std", None)
    return None if mean is None or std is None else (mean, std)


def _rescaled(stream: TaskStream, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return what a stream's normalised images are multiplied by, and what is then added, for other statistics."""
    own_mean, own_std, of_mean, of_std = (
        torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
        for values in (stream.dataset.mean, stream.dataset.std, mean, std)
    )
    return own_std / of_std, (own_mean - of_mean) / of_std


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Let ``transformers`` say errors alone for the time of a context, and draw no bars."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
