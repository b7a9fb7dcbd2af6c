"""A Fisher file from data: exact per-sample diagonals of a PyTorch model, summed in a stream.

Every sample's own gradient is squared (``torch.func``: vmap over grad, in chunks), never a batch's mean. Kinds:
``empirical`` takes the labels in the data; ``sampled`` draws them from the model's own prediction, with a generator
that the seed and the sample's number determine; ``true`` sums over all labels, weighted by their probability. Per
sample the loss of a sequence is the sum over its tokens; per token each token's loss has a gradient of its own.

What is written are sums and counts. So files of disjoint data add, and a measurement that was stopped goes on: what has
been summed lies beside the file until it is whole.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from adapters.checkpoints.digest import digest_of
from adapters.checkpoints.fisher_files import write_fisher
from adapters.checkpoints.folders import Checkpoint, open_checkpoint
from became_core import BecameError

__all__ = ["FisherRequest", "Samples", "fisher_from_data", "load_model", "read_samples"]

Kind = Literal["empirical", "sampled", "true"]
# After so many chunks the sums so far are saved.
SAVE_EVERY = 32


@dataclass(frozen=True)
class FisherRequest:
    """How to measure.

    Attributes:
        kind: whose labels: ``empirical``, ``sampled`` or ``true``.
        per: ``sample`` or ``token``.
        samples: how many at most; None for all.
        chunk: how many samples' gradients are in memory at a time.
        seed: of sampled labels and of random tokens.
    """

    kind: Kind = "empirical"
    per: Literal["sample", "token"] = "sample"
    samples: int | None = None
    chunk: int = 8
    seed: int = 0


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
        tokens = np.random.default_rng(seed).integers(0, vocabulary, (count, length))
        note = (
            "Random tokens are no text: their curvature is that of a model that is lost, and differs from real data's."
        )
        return Samples(tokens[:, :-1], tokens[:, 1:], (note,))
    path = Path(data)
    if not path.is_file():
        raise BecameError(f"there is no file {path}.")
    if path.suffix == ".npz":
        arrays = {name: tensor.whole() for name, tensor in open_checkpoint(path).tensors.items()}
        if "tokens" in arrays and arrays["tokens"].ndim == 2:
            return Samples(arrays["tokens"][:, :-1], arrays["tokens"][:, 1:].astype(np.int64))
        if {"inputs", "targets"} <= arrays.keys() and len(arrays["inputs"]) == len(arrays["targets"]):
            return Samples(arrays["inputs"], arrays["targets"].astype(np.int64))
        raise BecameError(f"{path} has neither 'tokens' [samples, length] nor 'inputs' and as many 'targets'.")
    if path.suffix == ".txt" and tokenizer is not None:
        rows = [tokenizer(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [row for row in rows if len(row) > 1]
        if not rows:
            raise BecameError(f"{path} has no line of two tokens or more.")
        length = max(map(len, rows))
        inputs, targets = np.zeros((len(rows), length - 1), np.int64), np.full((len(rows), length - 1), -100)
        for k, row in enumerate(rows):
            inputs[k, : len(row) - 1], targets[k, : len(row) - 1] = row[:-1], row[1:]
        return Samples(inputs, targets)
    raise BecameError(f"{path} is no data that is known; give .npz, or .txt for a model with a tokenizer.")


def load_model(model: Path, loader: str | None) -> tuple[Any, Callable[[str], list[int]] | None]:
    """Return a PyTorch module with a model's weights, and its tokenizer if it has one.

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
        return module, None
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise BecameError("without --load, transformers loads the model; pip install transformers.") from None
    try:
        network = AutoModelForCausalLM.from_pretrained(model, local_files_only=True, attn_implementation="eager")
        names = {file.name for file in model.iterdir()} if model.is_dir() else set()
        if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"}:
            return network, None
        return network, AutoTokenizer.from_pretrained(model, local_files_only=True).encode
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160].rstrip(".")
        raise BecameError(f"transformers cannot load {model}: {reason}.") from None


def called(name: str) -> Callable[..., Any]:
    """Return the function that ``module:function`` names; raises a BecameError if there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError):
        raise BecameError(f"there is no function '{name}'; give module:function, as Python imports it.") from None


def fisher_from_data(
    model: Path,
    samples: Samples,
    out: Path,
    request: FisherRequest,
    network: Any,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Measure the diagonal Fisher information of a categorical model, and write it as a sum with its counts.

    Args:
        model: the checkpoint that the network was loaded from.
        samples: the data.
        out: the Fisher file; nothing may be there.
        request: how to measure.
        network: a ``torch.nn.Module`` from inputs to logits, [samples, classes] or [samples, positions, classes], or to
            an object with ``logits``.
        progress: is told how many samples of how many are done.

    Raises:
        BecameError: if ``out`` exists, the network's parameters are not the checkpoint's, or a gradient is not finite.
    """
    if out.exists():
        raise BecameError(f"{out} exists; nothing is overwritten.")
    checkpoint = open_checkpoint(model)
    digest = digest_of(checkpoint)
    names = _parameters(network, checkpoint)
    count = min(len(samples.inputs), request.samples or len(samples.inputs))
    partial = out.with_name(f".{out.name}.partial.safetensors")
    about = {"model": digest, "request": repr((request.kind, request.per, count, request.seed, len(samples.inputs)))}
    sums, done, tokens = _resumed(partial, about, names)
    squares = _Squares(network, request)
    for begin in range(done, count, request.chunk):
        end = min(begin + request.chunk, count)
        parts, number = squares(samples.inputs[begin:end], samples.targets[begin:end], begin)
        for name, values in parts.items():
            if not np.isfinite(values).all():
                raise BecameError(f"the gradient of '{name}' is not finite for a sample among {begin} to {end - 1}.")
            sums[name] = sums[name] + values if name in sums else values
        tokens += number
        if (begin // request.chunk + 1) % SAVE_EVERY == 0:
            _save(partial, sums, about | {"done": str(end), "tokens": str(tokens)})
        if progress is not None:
            progress(end, count)
    write_fisher(
        out,
        [(name, checkpoint.tensors[name].shape) for name in checkpoint.tensors if name in sums],
        lambda name, start, stop: sums[name].reshape(-1)[start:stop],
        kind=request.kind,
        unit="sum",
        per=request.per,
        counts={"samples": count, "tokens": tokens},
        model=digest,
    )
    partial.unlink(missing_ok=True)


def _parameters(network: Any, checkpoint: Checkpoint) -> set[str]:
    names = set()
    for name, parameter in network.named_parameters():
        owner = checkpoint.tied.get(name, name)
        if owner not in checkpoint.tensors or checkpoint.tensors[owner].shape != tuple(parameter.shape):
            raise BecameError(
                f"the network has '{name}' {list(parameter.shape)}, which {checkpoint.path} does not have."
            )
        names.add(name)
    return names


def _resumed(file: Path, about: Mapping[str, str], names: set[str]) -> tuple[dict[str, NDArray[Any]], int, int]:
    """Return what an earlier process has summed of the same measurement."""
    if not file.exists():
        return {}, 0, 0
    try:
        checkpoint = open_checkpoint(file)
        if {name: checkpoint.metadata.get(name) for name in about} != dict(about) or set(checkpoint.tensors) - names:
            return {}, 0, 0
        return dict(load_file(file)), int(checkpoint.metadata["done"]), int(checkpoint.metadata["tokens"])
    except (BecameError, KeyError, ValueError):
        return {}, 0, 0


def _save(file: Path, sums: Mapping[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    save_file({name: np.ascontiguousarray(values) for name, values in sums.items()}, temporary, metadata)
    temporary.replace(file)


class _Squares:
    """From a chunk of samples to the sums of their squared gradients."""

    def __init__(self, network: Any, request: FisherRequest) -> None:
        network.eval()
        self._network, self._request = network, request
        self._parameters = {name: value.detach().float() for name, value in network.named_parameters()}
        self._buffers = {name: value.detach() for name, value in network.named_buffers()}

    def __call__(self, inputs: NDArray[Any], labels: NDArray[Any], first: int) -> tuple[dict[str, NDArray[Any]], int]:
        """Return the sums by parameter, and how many tokens the chunk has; ``first`` is its first sample's number."""
        import torch

        rows = torch.from_numpy(np.array(inputs))
        targets = torch.from_numpy(np.array(labels)).reshape(len(rows), -1)
        total: dict[str, Any] = {}
        for target, weight in self._labels(rows, targets, first):
            for mask in self._masks(weight):
                for name, value in self._squared(rows, target, mask).items():
                    total[name] = total[name] + value if name in total else value
        return {name: value.numpy() for name, value in total.items()}, int((targets != -100).sum())

    def _logits(self, parameters: Any, row: Any) -> Any:
        """Of one sample, [positions, classes]."""
        from torch.func import functional_call

        result = functional_call(self._network, (parameters, self._buffers), (row[None],))
        logits = getattr(result, "logits", result)[0].float()
        return logits if logits.ndim == 2 else logits[None]

    def _loss(self, parameters: Any, row: Any, target: Any, weight: Any) -> Any:
        """The weighted sum over positions of the label's negative log-probability."""
        from torch.nn.functional import cross_entropy

        logits = self._logits(parameters, row)
        return (cross_entropy(logits, target, ignore_index=-100, reduction="none") * weight).sum()

    def _squared(self, rows: Any, targets: Any, weights: Any) -> dict[str, Any]:
        from torch.func import grad, vmap

        gradients = vmap(grad(self._loss), in_dims=(None, 0, 0, 0))(self._parameters, rows, targets, weights)
        return {name: (value.double() ** 2).sum(0) for name, value in gradients.items()}

    def _labels(self, rows: Any, targets: Any, first: int) -> Iterator[tuple[Any, Any]]:
        """Yield labels, [samples, positions], and the square roots of their weights."""
        import torch
        from torch.func import vmap

        known = (targets != -100).float()
        if self._request.kind == "empirical":
            yield targets, known
            return
        with torch.no_grad():
            probabilities = vmap(lambda row: self._logits(self._parameters, row).softmax(-1))(rows).double()
        if self._request.kind == "true":
            for label in range(probabilities.shape[-1]):
                yield torch.full_like(targets, label), known * probabilities[..., label].sqrt().float()
            return
        # Each sample has a generator of its own, so that neither chunks nor a resumption change what is drawn.
        seeds = [(self._request.seed, first + k) for k in range(len(rows))]
        draws = np.stack([np.random.default_rng(seed).random(targets.shape[1]) for seed in seeds])
        cumulative = probabilities.cumsum(-1)
        points = torch.from_numpy(draws)[..., None] * cumulative[..., -1:]
        yield torch.searchsorted(cumulative, points)[..., 0].clamp(max=probabilities.shape[-1] - 1), known

    def _masks(self, weight: Any) -> Iterator[Any]:
        """Yield the weights of the positions whose losses share a gradient: all of a sample's, or one at a time.

        Under the model's own labels the scores of two tokens are uncorrelated, so that the expectation over a
        sequence's labels is the sum of those over each token's.
        """
        import torch

        alone = self._request.per == "token" or self._request.kind == "true"
        if not alone or weight.shape[1] == 1:
            yield weight
            return
        for position in range(weight.shape[1]):
            mask = torch.zeros_like(weight)
            mask[:, position] = weight[:, position]
            yield mask
