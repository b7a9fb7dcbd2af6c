"""Fisher files: the diagonal curvature of a loss, by the model's own names, and what is known about it.

A Fisher file is safetensors. Its metadata say of which kind the estimate is, in which unit, over how many samples, and
of which model. What cannot be compared is not merged: a mean with a sum, a token with a sample, one kind with another,
or a file of another model. Files of disjoint data add: sums add, and means add by their counts.

Convention: ``unit`` is ``mean`` or ``sum``, ``per`` is ``sample``, ``token`` or ``step``: what a sum goes over.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.align import padded, tensor_or_tied
from adapters.checkpoints.folders import Checkpoint, open_checkpoint
from adapters.checkpoints.tensors import StoredTensor, ranges, safetensors_header, widened
from became_core import BecameError

__all__ = ["FisherFile", "add_fisher_files", "check_comparable", "fisher_values", "open_fisher", "write_fisher"]

FORMAT = "became.fisher"
UNITS, PERS = ("mean", "sum"), ("sample", "token", "step")
COUNTS = {"sample": "samples", "token": "tokens", "step": "steps"}


@dataclass(frozen=True)
class FisherFile:
    """The diagonal curvature of a loss.

    Attributes:
        checkpoint: its tensors.
        kind: ``empirical``, ``sampled``, ``true`` or ``adam``; None for a file that does not say.
        unit: ``mean`` or ``sum``.
        per: what the mean or the sum is over: samples, tokens or an optimiser's steps.
        counts: samples, tokens and steps, as far as they are known.
        model: the digest of the model that it was measured at; None where it is not known.
    """

    checkpoint: Checkpoint
    kind: str | None = None
    unit: str = "mean"
    per: str = "sample"
    counts: Mapping[str, int] | None = None
    model: str | None = None

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.checkpoint.path

    def tensor(self, name: str, own: StoredTensor, shape: tuple[int, ...]) -> StoredTensor | None:
        """Return the values for a tensor of its model, None if it has none.

        Args:
            name: the tensor.
            own: the model's own tensor.
            shape: of the merged tensor, which has more rows if the vocabulary was padded: there the values are zero.

        Raises:
            BecameError: if they have another shape than the model's tensor, or are no floating-point numbers.
        """
        # Where the model's tensor is tied to another one, its own name is that one's.
        values = self.checkpoint.tensors.get(name) or self.checkpoint.tensors.get(own.name)
        if values is None:
            return None
        if not values.is_float:
            raise BecameError(f"{values} has dtype {values.dtype}; a Fisher file holds floating-point numbers.")
        if values.shape != own.shape:
            raise BecameError(f"{values} has shape {list(values.shape)}, but its model's tensor {list(own.shape)}.")
        return values if own.shape == shape else padded(values, None, shape)


def open_fisher(path: Path, model: Checkpoint | None) -> FisherFile:
    """Return a Fisher file of a model; of a part of it, such as a LoRA adapter, if the model is None.

    Raises:
        BecameError: if it cannot be read, its metadata contradict themselves, or it has a tensor that the model lacks.
    """
    fisher = _described(open_checkpoint(path))
    for name in fisher.checkpoint.tensors:
        if model is not None and tensor_or_tied(model, name) is None:
            raise BecameError(f"'{name}' is in {path} but not in its model {model.path}.")
    return fisher


def _described(checkpoint: Checkpoint) -> FisherFile:
    words, path = checkpoint.metadata, checkpoint.path
    if FORMAT not in words:
        return FisherFile(checkpoint)
    if words[FORMAT] != "1":
        raise BecameError(f"{path} is a Fisher file of format '{words[FORMAT][:20]}'; this version reads format 1.")
    unit, per = words.get("unit", ""), words.get("per", "")
    if unit not in UNITS or per not in PERS:
        raise BecameError(
            f"{path} has unit '{unit[:20]}' per '{per[:20]}'; known are mean and sum per {', '.join(PERS)}."
        )
    counts = {}
    for name in COUNTS.values():
        if name in words:
            if not words[name].isdecimal() or len(words[name]) > 18:
                raise BecameError(f"{path} has '{words[name][:20]}' as its number of {name}.")
            counts[name] = int(words[name])
    return FisherFile(checkpoint, words.get("kind"), unit, per, counts, words.get("model"))


def check_comparable(fishers: Sequence[FisherFile]) -> None:
    """Refuse Fisher files that differ in what they measure.

    Raises:
        BecameError: if their kinds, their units or what they count differ; the message names two of them.
    """
    first = fishers[0]
    for fisher in fishers[1:]:
        for what in ("kind", "unit", "per"):
            one, other = getattr(first, what), getattr(fisher, what)
            if one != other:
                raise BecameError(
                    f"{first.path} has {what} '{one}' and {fisher.path} has '{other}'; Fisher files of one merge must "
                    "be alike."
                )


def fisher_values(values: NDArray[Any], tensor: StoredTensor) -> NDArray[Any]:
    """Return a slab of a Fisher file in float32 or wider.

    Raises:
        BecameError: if an entry is negative, infinite or not a number.
    """
    wide = widened(values)
    if wide.size and not (wide.min() >= 0 and wide.max() < np.inf):
        raise BecameError(f"{tensor} has an entry that is negative, infinite or not a number; a Fisher is at least 0.")
    return wide


def write_fisher(
    out: Path,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    slabs: Any,
    *,
    kind: str,
    unit: str,
    per: str,
    counts: Mapping[str, int],
    model: str | None,
    remarks: Mapping[str, str] | None = None,
) -> None:
    """Write a Fisher file in float32.

    Args:
        out: where; nothing may be there.
        tensors: the name and shape of each.
        slabs: from a name, a first and a last element to the values there, at least 0.
        kind: as in ``FisherFile``, like all that follows.
        unit: ``mean`` or ``sum``.
        per: what it is over.
        counts: samples, tokens and steps.
        model: the digest of the model.
        remarks: more metadata.

    Raises:
        BecameError: if there is something already, or it cannot be written.
    """
    if out.exists():
        raise BecameError(f"{out} exists; nothing is overwritten.")
    words = {FORMAT: "1", "kind": kind, "unit": unit, "per": per, **{n: str(count) for n, count in counts.items()}}
    words |= ({"model": model} if model else {}) | dict(remarks or {})
    entries = [(name, "F32", shape) for name, shape in tensors]
    header, _ = safetensors_header(entries, words)
    temporary = out.with_name(f".{out.name}.writing")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(header)
            for name, _, shape in entries:
                for start, stop in ranges(int(np.prod(shape, dtype=object))):
                    file.write(np.asarray(slabs(name, start, stop), dtype=np.float32).tobytes())
        temporary.rename(out)
    except OSError as error:
        raise BecameError(f"cannot write {out}: {error.strerror}.") from None
    finally:
        temporary.unlink(missing_ok=True)


def add_fisher_files(paths: Sequence[Path], out: Path) -> None:
    """Write the Fisher file of the union of disjoint data: sums add, means are weighted by their counts.

    Raises:
        BecameError: if the files are of different models, kinds or units, a mean has no count, or ``out`` exists.
    """
    if len(paths) < 2:
        raise BecameError("to add Fisher files, give at least two.")
    fishers = [_described(open_checkpoint(path)) for path in paths]
    check_comparable(fishers)
    first = fishers[0]
    names = {name: tensor.shape for name, tensor in first.checkpoint.tensors.items()}
    for fisher in fishers:
        if fisher.model != first.model:
            raise BecameError(f"{fisher.path} is of another model than {first.path}; they cannot be added.")
        for name in names.keys() ^ fisher.checkpoint.tensors.keys():
            raise BecameError(f"'{name}' is in only one of {first.path} and {fisher.path}.")
        for name, shape in names.items():
            tensor = fisher.checkpoint.tensors[name]
            if tensor.shape != shape or not tensor.is_float:
                raise BecameError(f"{tensor} has shape {list(tensor.shape)}, but that of {first.path} {list(shape)}.")
    counts = [(fisher.counts or {}).get(COUNTS[first.per]) for fisher in fishers]
    if first.unit == "mean" and not all(counts):
        missing = fishers[counts.index(next(count for count in counts if not count))].path
        raise BecameError(f"{missing} is a mean over an unknown number of {COUNTS[first.per]}; it cannot be added.")
    whole = sum(count or 0 for count in counts)
    weights = [(count or 0) / whole if first.unit == "mean" else 1.0 for count in counts]

    def slabs(name: str, start: int, stop: int) -> NDArray[Any]:
        parts = [fisher.checkpoint.tensors[name] for fisher in fishers]
        wide = [fisher_values(part.slab(start, stop), part).astype(np.float64) for part in parts]
        return np.asarray(sum(weight * values for weight, values in zip(weights, wide, strict=True)))

    totals = {
        name: sum((fisher.counts or {})[name] for fisher in fishers)
        for name in COUNTS.values()
        if all(name in (fisher.counts or {}) for fisher in fishers)
    }
    write_fisher(
        out,
        names.items(),
        slabs,
        kind=first.kind or "unknown",
        unit=first.unit,
        per=first.per,
        counts=totals,
        model=first.model,
    )
