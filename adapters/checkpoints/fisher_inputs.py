"""What a Fisher file is measured of: samples from a file, and the network of a checkpoint.

Samples are read whole. The network is a PyTorch module in float32, which a function of the user's or ``transformers``
loads.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.folders import open_checkpoint
from became_core import BecameError
from became_core.errors import first_line

__all__ = ["IGNORED", "Samples", "called", "load_model", "read_samples"]

# The target of a position that does not count, as PyTorch and transformers have it.
IGNORED = -100
# Random tokens are held in memory, eight bytes each.
MOST_TOKENS = 10**8


@dataclass(frozen=True)
class Samples:
    """Data in memory.

    Attributes:
        inputs: [samples, ...].
        targets: class numbers, [samples], or [samples, positions]; of a language model the next tokens.
        notes: sentences.
    """

    inputs: NDArray[Any]
    targets: NDArray[np.int64]
    notes: tuple[str, ...] = ()


def read_samples(data: str, tokenizer: Callable[[str], list[int]] | None = None, seed: int = 0) -> Samples:
    """Return the samples of a file.

    Args:
        data: a NumPy archive with ``inputs`` and ``targets``, or with ``tokens`` [samples, length]; a text file, a
            sample a line, for which there must be a tokenizer; or ``random:SAMPLESxLENGTHxVOCABULARY`` for random
            tokens.
        tokenizer: from a text to token numbers.
        seed: of random tokens.

    Raises:
        BecameError: if it is none of these.
    """
    if data.startswith("random:"):
        sizes = data.removeprefix("random:").split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and 0 < int(size) < 10**9 for size in sizes):
            raise BecameError(f"random tokens are random:SAMPLESxLENGTHxVOCABULARY, not '{data[:60]}'.")
        count, length, vocabulary = map(int, sizes)
        if count * length > MOST_TOKENS:
            raise BecameError(f"'{data[:60]}' has {count * length:,} tokens; give at most {MOST_TOKENS:,}.")
        tokens = np.random.default_rng(seed).integers(0, vocabulary, (count, length))
        note = (
            "Random tokens are no text: their curvature is that of a model that is lost, and differs from real data's."
        )
        return replace(_next_tokens(tokens, data), notes=(note,))
    path = Path(data)
    if not path.is_file():
        raise BecameError(f"there is no file {path}.")
    if path.suffix == ".npz":
        arrays = {name: tensor.whole() for name, tensor in open_checkpoint(path).tensors.items()}
        if "tokens" in arrays and arrays["tokens"].ndim == 2:
            return _next_tokens(arrays["tokens"], data)
        lengths = [np.shape(arrays[name])[:1] for name in ("inputs", "targets") if name in arrays]
        if len(lengths) == 2 and lengths[0] and lengths[0] == lengths[1]:
            return Samples(arrays["inputs"], _labels(arrays["targets"], data))
        raise BecameError(f"{path} has neither 'tokens' [samples, length] nor 'inputs' and as many 'targets'.")
    if path.suffix == ".txt" and tokenizer is not None:
        return _read_text(path, tokenizer)
    raise BecameError(f"{path} is no data that is known; give .npz, or .txt for a model with a tokenizer.")


def _read_text(path: Path, tokenizer: Callable[[str], list[int]]) -> Samples:
    """Return the samples of a text, a line each, padded to the longest."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise BecameError(f"cannot read {path} as text in UTF-8.") from None
    rows = [tokenizer(line) for line in text.splitlines() if line.strip()]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise BecameError(f"{path} has no line of two tokens or more.")
    length = max(map(len, rows))
    inputs, targets = np.zeros((len(rows), length - 1), np.int64), np.full((len(rows), length - 1), IGNORED)
    for k, row in enumerate(rows):
        inputs[k, : len(row) - 1], targets[k, : len(row) - 1] = row[:-1], row[1:]
    return Samples(inputs, targets)


def _next_tokens(tokens: NDArray[Any], where: str) -> Samples:
    """Return samples whose targets are the tokens after their inputs."""
    if tokens.shape[1] < 2:
        raise BecameError(
            f"{where} has sequences of {tokens.shape[1]} tokens; give at least two, an input and a target."
        )
    labels = _labels(tokens, where)
    return Samples(labels[:, :-1], labels[:, 1:])


def _labels(targets: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Return class numbers as integers.

    Raises:
        BecameError: if there are none, or they are no class numbers.
    """
    if len(targets) == 0:
        raise BecameError(f"{where} has no samples.")
    if targets.dtype.kind not in "iu" or ((targets < 0) & (targets != IGNORED)).any():
        raise BecameError(
            f"{where} has targets that are no class numbers: integers from 0, and {IGNORED} for a position that does "
            "not count."
        )
    return targets.astype(np.int64)


def load_model(model: Path, loader: str | None) -> tuple[Any, Callable[[str], list[int]] | None]:
    """Return a PyTorch module with a model's weights in float32, and its tokenizer if it has one.

    Args:
        model: the checkpoint.
        loader: ``module:function``, called with the path and returning the module; without it ``transformers`` loads
            the model.

    Raises:
        BecameError: if a package or the function is missing, or it returns no module.
    """
    try:
        from torch.nn import Module
    except ModuleNotFoundError:
        raise BecameError("a Fisher file from data needs PyTorch; pip install torch.") from None
    if loader is not None:
        module = called(loader)(model)
        if not isinstance(module, Module):
            raise BecameError(f"{loader} returned {type(module).__name__}, not a torch.nn.Module.")
        return module.float().requires_grad_(True), None
    if not (model / "config.json").is_file():  # otherwise transformers would look for it on the internet
        raise BecameError(
            f"transformers loads a folder with a config.json, which {model} is not; give --load module:function."
        )
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise BecameError("without --load, transformers loads the model; pip install transformers.") from None
    try:
        network = AutoModelForCausalLM.from_pretrained(model, local_files_only=True).float()
        names = {file.name for file in model.iterdir()}
        if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"}:
            return network, None
        return network, AutoTokenizer.from_pretrained(model, local_files_only=True).encode
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise BecameError(f"transformers cannot load {model}: {first_line(error)}.") from None


def called(name: str) -> Callable[..., Any]:
    """Return the function that ``module:function`` names, in a module that is installed or in the working directory.

    Raises:
        BecameError: if there is none, or its module cannot be imported.
    """
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # an installed command does not look there by itself
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise BecameError(
            f"there is no function '{name}' ({first_line(error)}); give module:function, as Python imports it."
        ) from None
    if not callable(found):
        raise BecameError(f"'{name}' is a {type(found).__name__} and no function; give module:function.")
    return found  # type: ignore[no-any-return]
