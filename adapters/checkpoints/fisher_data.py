"""A Fisher file from data: exact per-sample diagonals of a PyTorch model, or Kronecker factors, summed in a stream.

Every sample's own gradient is squared, never a batch's mean. It comes from the taps of ``adapters/torch``, as that of
``Continual`` does, and what they do not know is computed sample by sample, with one warning that names it. Kinds:
``empirical`` takes the labels in the data; ``sampled`` draws them from the model's own prediction, in the samples'
order, so that chunks do not matter; ``true`` sums over all labels, weighted by their probability. Per sample the loss
of a sequence is the sum over its tokens; per token each token's loss has a gradient of its own, and a backward pass.

With Kronecker factors, a weight that is used as a matrix, in one way alone, has those of ``fisher_files``, unless they
are larger than ``LARGEST_FACTOR``. Every other parameter has its diagonal: biases, scales, embeddings, a head that is
tied to one, grouped convolutions, and what taps do not know.

What is written are sums and counts. So files of disjoint data add, and a measurement that was stopped goes on: what has
been summed lies beside the file until it is whole.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from adapters.checkpoints.digest import digest_of
from adapters.checkpoints.fisher_files import FACTORS, write_fisher
from adapters.checkpoints.fisher_inputs import Samples
from adapters.checkpoints.folders import Checkpoint, open_checkpoint
from adapters.runs.files import check_free, digest
from became_core import BecameError
from became_core.curvature import Categorical, FisherTargets, Tap, kronecker_factors, per_sample_square_sum
from became_core.errors import first_line

__all__ = ["FisherRequest", "fisher_from_data"]

# After so many chunks the sums so far are saved.
SAVE_EVERY = 32
# The most rows of a Kronecker factor, which is a square: at 2^13 it has 512 MiB while it is summed.
LARGEST_FACTOR = 2**13


@dataclass(frozen=True)
class FisherRequest:
    """How to measure.

    Attributes:
        kind: whose labels: ``empirical``, ``sampled`` or ``true``.
        per: ``sample`` or ``token``.
        samples: how many at most; None for all.
        chunk: how many samples run at a time.
        seed: of sampled labels and of random tokens.
        factors: ``diagonal``, or ``kronecker`` for Kronecker factors of matrices.
    """

    kind: FisherTargets = "empirical"
    per: Literal["sample", "token"] = "sample"
    samples: int | None = None
    chunk: int = 8
    seed: int = 0
    factors: Literal["diagonal", "kronecker"] = "diagonal"


def fisher_from_data(
    model: Path,
    samples: Samples,
    out: Path,
    request: FisherRequest,
    network: Any,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Measure the Fisher information of a categorical model, and write it as a sum with its counts.

    Args:
        model: the checkpoint that the network was loaded from.
        samples: the data.
        out: the Fisher file; nothing may be there.
        request: how to measure.
        network: a ``torch.nn.Module`` from inputs to logits, [samples, classes] or [samples, positions, classes], or to
            an object with ``logits``. Its gradients have its parameters' dtype, and those that need none get none.
        progress: is told how many samples of how many are done.

    Returns:
        Sentences on what is not as the request says.

    Raises:
        BecameError: if ``out`` exists, the network's parameters are not the checkpoint's, or a gradient is not finite.
    """
    import torch

    from adapters.backend.batches import Reader
    from adapters.torch.batches import in_evaluation
    from adapters.torch.data_loss import DataLoss

    _check_request(samples, out)
    checkpoint = open_checkpoint(model)
    model_digest = digest_of(checkpoint)
    owners = _owners(network, checkpoint)
    count = min(len(samples.inputs), request.samples or len(samples.inputs))
    partial = out.with_name(f".{out.name}.partial.safetensors")
    wanted = (request.kind, request.per, count, request.seed, len(samples.inputs), request.factors)
    shapes = _shapes(checkpoint, owners)
    # Under the model's own labels the gradients of two tokens are uncorrelated, so that the expectation of a sequence's
    # square over its labels is the sum of those over each token's.
    apart = request.per == "token" or request.kind == "true"
    likelihood = Categorical(squares="token" if apart else "sample")
    # Errors of the network are told of samples by their numbers, below.
    reader: Reader[Any] = Reader(apply=lambda network, batch: network(batch[0]), targets=itemgetter(1))
    data = DataLoss(network, likelihood, reader, checks=False, shows=False, fisher=request.kind)
    with in_evaluation(network):
        logits = _logits_of_first(lambda one: data.run(one)[0], samples)
        _check_labels(logits, samples, str(model))
        # What an earlier process has summed of other samples, or by another network, is not gone on with. The last of
        # four digits may differ on another machine, where the measurement begins anew.
        kinds = repr([(array.dtype.str, array.shape) for array in (samples.inputs, samples.targets)])
        computed = "" if logits is None else f"{logits.shape} {np.abs(logits).sum():.3e} {logits.clip(0).sum():.3e}"
        about = {
            "model": model_digest,
            "request": repr(wanted),
            "data": digest(kinds.encode(), samples.inputs, samples.targets),
            "network": digest(f"{network!r} {computed}".encode()),
        }
        sums, done, tokens, rng = _resumed(partial, about, set(shapes), request.seed)
        for begin in range(done, count, request.chunk):
            end = min(begin + request.chunk, count)
            inputs, targets = samples.inputs[begin:end], samples.targets[begin:end]
            passes = data.passes((torch.from_numpy(inputs.copy()), torch.from_numpy(targets.copy())), rng)
            try:
                for number, (taps, _) in enumerate(passes):
                    for name, suffix, part in _parts(taps, request.factors, with_inputs=number == 0):
                        owner = owners[name] + suffix
                        total = sums.setdefault(owner, np.zeros(shapes[owner]))
                        total += part.cpu().double().numpy().reshape(total.shape)
            except (IndexError, RuntimeError) as error:  # a token or a label beyond the last, another dtype or shape
                raise BecameError(
                    f"{model} cannot take the samples {begin} to {end - 1}: {first_line(error)}."
                ) from error
            _check_finite(sums, begin, end)
            tokens += int((targets != likelihood.ignored).sum())
            if (begin // request.chunk + 1) % SAVE_EVERY == 0:
                _save(partial, sums, about, end, tokens, rng)
            if progress is not None:
                progress(end, count)
    twice = next((name for name in sums if any(name + suffix in sums for suffix in FACTORS)), None)
    if twice is not None:
        raise BecameError(
            f"some samples use '{twice}' in another way than others, so it has no Kronecker factors that hold for all "
            "samples; leave --factors kronecker out."
        )
    write_fisher(
        out,
        [(name, shape) for name, shape in shapes.items() if name in sums],
        lambda name, start, stop: sums[name].reshape(-1)[start:stop],
        kind=request.kind,
        unit="sum",
        per=request.per,
        counts={"samples": count, "tokens": tokens},
        model=model_digest,
        factors=request.factors,
    )
    partial.unlink(missing_ok=True)
    large = [name for name in sums if len(shapes[name]) == 2 and max(shapes[name]) > LARGEST_FACTOR]
    if request.factors == "diagonal" or not large:
        return []
    names = ", ".join(f"'{name}'" for name in large)
    return [f"matrices with a side above {LARGEST_FACTOR:,} have the diagonal of their curvature, no factors: {names}."]


def _check_request(samples: Samples, out: Path) -> None:
    """Refuse what cannot be measured or written, and make the folder of the file."""
    check_free(out)
    if not len(samples.inputs):
        raise BecameError("there are no samples; give at least one.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BecameError(f"cannot write {out}: {error.strerror}.") from None


def _logits_of_first(run: Callable[[Any], Any], samples: Samples) -> NDArray[Any] | None:
    """Return the logits of the first sample; None if the network cannot take it, which is said of the first chunk."""
    import torch

    try:
        with torch.no_grad():
            logits = run((torch.from_numpy(samples.inputs[:1].copy()), torch.from_numpy(samples.targets[:1])))
    except (IndexError, RuntimeError):
        return None
    return logits.cpu().double().numpy()  # type: ignore[no-any-return]


def _check_labels(logits: NDArray[Any] | None, samples: Samples, model: str) -> None:
    """Refuse a label beyond the last class of the logits, which would count as no class at all."""
    largest = int(samples.targets.max())
    if logits is not None and largest >= logits.shape[-1]:
        raise BecameError(f"the data have a label {largest}, and {model} has the classes 0 to {logits.shape[-1] - 1}.")


def _check_finite(sums: Mapping[str, NDArray[Any]], begin: int, end: int) -> None:
    for name, total in sums.items():
        if not np.isfinite(total).all():
            raise BecameError(f"what is summed for '{name}' is not finite for a sample of {begin} to {end - 1}.")


def _parts(taps: Mapping[str, Any], factors: str, *, with_inputs: bool) -> Iterator[tuple[str, str, Any]]:
    """Yield what one backward pass adds to the file: a parameter's name; nothing, ``@A`` or ``@G``; and the numbers.

    Args:
        taps: of the pass, by layer.
        factors: ``diagonal`` or ``kronecker``.
        with_inputs: whether A, which is the same for all passes over the same samples, is among it.
    """
    import torch

    for layer, tap in taps.items():
        as_stored = replace(tap, transposed=False)
        sides = (tap.inputs.shape[-1], tap.output_gradients.shape[-1])
        if factors == "diagonal" or not as_stored.is_plain_matrix or max(sides) > LARGEST_FACTOR:
            yield from ((name, "", square) for name, square in per_sample_square_sum({layer: tap}).items())
            continue
        name = tap.weight_name(layer)
        a, g = kronecker_factors([{layer: as_stored}], samples=1).factors[name]
        of_inputs, of_outputs = reversed(FACTORS) if tap.transposed else FACTORS
        if with_inputs:
            yield name, of_inputs, a
        yield name, of_outputs, g
        if tap.has_bias:
            gradient = tap.output_gradients.sum(1, keepdim=True)
            bias = Tap("gradient", gradient, torch.ones_like(gradient[..., :1]))
            yield f"{layer}.bias", "", per_sample_square_sum({f"{layer}.bias": bias})[f"{layer}.bias"]


def _shapes(checkpoint: Checkpoint, owners: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a Fisher file may have, in the order of the checkpoint's."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in owners.values():
            shapes[name] = tensor.shape
            if len(tensor.shape) > 1:
                for suffix, size in zip(FACTORS, (prod(tensor.shape[1:]), tensor.shape[0]), strict=True):
                    shapes[name + suffix] = (size, size)
    return shapes


def _owners(network: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the checkpoint's name of each of the network's parameters.

    A file of transformers may be that of the model without its head, as GPT-2's is: its names then lack what the names
    of the network's body begin with, or have it where the network is the body alone.
    """
    owners: dict[str, str] = {}
    body = f"{getattr(network, 'base_model_prefix', '')}."
    for name, parameter in network.named_parameters():
        spellings = (checkpoint.tied.get(each, each) for each in (name, name.removeprefix(body), body + name))
        owner = next((each for each in spellings if each in checkpoint.tensors), name)
        if owner not in checkpoint.tensors or checkpoint.tensors[owner].shape != tuple(parameter.shape):
            raise BecameError(
                f"the network has '{name}' {list(parameter.shape)}, which {checkpoint.path} does not have; if it was "
                "renamed or joined with others as it was loaded, give a function that keeps it as it is (--load)."
            )
        if owner in owners.values():
            raise BecameError(f"'{name}' is a parameter of its own in the network, but tied in {checkpoint.path}.")
        owners[name] = owner
    return owners


def _resumed(
    file: Path, about: Mapping[str, str], names: set[str], seed: int
) -> tuple[dict[str, NDArray[Any]], int, int, np.random.Generator]:
    """Return what an earlier process has summed of the same measurement, and the generator as it left it."""
    rng = np.random.default_rng(seed)
    try:
        checkpoint = open_checkpoint(file)
        words = checkpoint.metadata
        if {name: words.get(name) for name in about} == dict(about) and not set(checkpoint.tensors) - names:
            rng.bit_generator.state = json.loads(words["generator"])
            return dict(load_file(file)), int(words["done"]), int(words["tokens"]), rng
    except (BecameError, KeyError, ValueError, TypeError):
        pass
    return {}, 0, 0, np.random.default_rng(seed)


def _save(
    file: Path,
    sums: Mapping[str, NDArray[Any]],
    about: Mapping[str, str],
    done: int,
    tokens: int,
    rng: np.random.Generator,
) -> None:
    words = {"done": str(done), "tokens": str(tokens), "generator": json.dumps(rng.bit_generator.state)}
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        save_file(dict(sums), temporary, {**about, **words})
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise BecameError(f"cannot write {file}: {error}.") from None
