"""Fisher files: the curvature of a loss, by the model's own names, and what is known about it.

A Fisher file is safetensors. Its metadata say of which kind the estimate is, in which unit, over how many samples, and
of which model. What cannot be compared is not merged: a mean with a sum, a token with a sample, one kind with another,
or a file of another model. Files of disjoint data add: sums add, and means add by their counts.

A diagonal file has a tensor for each of the model's, of its shape. In a file with Kronecker factors (K-FAC, Martens and
Grosse 2015, arXiv 1503.05671, "expand" of Eschenhagen et al. 2023, arXiv 2311.00636) a weight ``w`` that is read as a
matrix [d_out, d_in] has two tensors instead: ``w@A``, the sum over samples of the mean over positions of a a^T
[d_in, d_in], and ``w@G``, the sum over samples and positions of g g^T [d_out, d_out], of the inputs a and the output
gradients g of its layer. The curvature of the sum of the losses is (A / samples) x G. Of a weight that is stored as
[d_in, d_out], A and G have changed places, so that A always belongs to the columns. All other tensors are diagonals.

Convention: ``unit`` is ``mean`` or ``sum``, ``per`` is ``sample``, ``token`` or ``step``: what a sum goes over. Factors
are sums.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.align import padded, tensor_or_tied
from adapters.checkpoints.folders import Checkpoint, open_checkpoint
from adapters.checkpoints.plan import path_of
from adapters.checkpoints.tensors import StoredTensor, finite, ranges, safetensors_header, widened
from adapters.runs.files import check_free
from adapters.runs.lock import locked
from became_core import BecameError

__all__ = [
    "FACTORS",
    "FisherFile",
    "add_fisher_files",
    "check_comparable",
    "factor_values",
    "fisher_values",
    "open_fisher",
    "write_fisher",
]

FORMAT = "became.fisher"
UNITS, PERS = ("mean", "sum"), ("sample", "token", "step")
# What the names of the two factors of a weight end with.
FACTORS = ("@A", "@G")
COUNTS = {"sample": "samples", "token": "tokens", "step": "steps"}


@dataclass(frozen=True)
class FisherFile:
    """The curvature of a loss.

    Attributes:
        checkpoint: its tensors.
        kind: ``empirical``, ``sampled``, ``true`` or ``adam``; None for a file that does not say.
        unit: ``mean`` or ``sum``.
        per: what the mean or the sum is over: samples, tokens or an optimiser's steps.
        counts: samples, tokens and steps, as far as they are known.
        model: the digest of the model that it was measured at; None where it is not known.
        factors: ``diagonal``, or ``kronecker`` where matrices have Kronecker factors.
    """

    checkpoint: Checkpoint
    kind: str | None = None
    unit: str = "mean"
    per: str = "sample"
    counts: Mapping[str, int] | None = None
    model: str | None = None
    factors: str = "diagonal"

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

    @property
    def samples(self) -> int:
        """The number of samples, by which A of a file with factors is divided."""
        return (self.counts or {})["samples"]

    def factors_of(
        self, name: str, own: StoredTensor, shape: tuple[int, ...]
    ) -> tuple[StoredTensor, StoredTensor] | None:
        """Return A [d_in, d_in] and G [d_out, d_out] of a tensor of its model, None if it has no factors.

        Args:
            name: the tensor.
            own: the model's own tensor, [d_out, ...], whose trailing axes are d_in.
            shape: of the merged tensor.

        Raises:
            BecameError: if one factor is missing, they do not fit the tensor, or they are no floating-point numbers.
        """
        tensors = self.checkpoint.tensors
        owner = name if any(name + suffix in tensors for suffix in FACTORS) else own.name
        a, g = (tensors.get(owner + suffix) for suffix in FACTORS)
        if a is None and g is None:
            return None
        if a is None or g is None:
            raise BecameError(f"{self.path} has only one of '{owner}@A' and '{owner}@G'; it is damaged.")
        rows, columns = (shape[0], prod(shape[1:])) if shape else (1, 1)
        if own.shape != shape or a.shape != (columns,) * 2 or g.shape != (rows,) * 2:
            raise BecameError(
                f"{a} and '{g.name}' have shapes {list(a.shape)} and {list(g.shape)}, which do not fit the merged "
                f"tensor {list(shape)}."
            )
        if not (a.is_float and g.is_float):
            raise BecameError(f"{a} or '{g.name}' holds no floating-point numbers.")
        return a, g


def open_fisher(path: Path, model: Checkpoint | None) -> FisherFile:
    """Return a Fisher file of a model; of a part of it, such as a LoRA adapter, if the model is None.

    Raises:
        BecameError: if it cannot be read, its metadata contradict themselves, or it has a tensor that the model lacks.
    """
    fisher = _described(open_checkpoint(path))
    for name in fisher.checkpoint.tensors:
        owner = name[:-2] if fisher.factors == "kronecker" and name.endswith(FACTORS) else name
        if model is not None and tensor_or_tied(model, owner) is None:
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
    factors = words.get("factors", "diagonal")
    if factors not in ("diagonal", "kronecker"):
        raise BecameError(f"{path} has factors '{factors[:20]}'; known are diagonal and kronecker.")
    if factors == "kronecker" and (unit != "sum" or not counts.get("samples")):
        raise BecameError(f"{path} has Kronecker factors, which must be sums over a known number of samples.")
    return FisherFile(checkpoint, words.get("kind"), unit, per, counts, words.get("model"), factors)


def check_comparable(fishers: Sequence[FisherFile]) -> None:
    """Refuse Fisher files that differ in what they measure.

    Raises:
        BecameError: if their kinds, their units or what they count differ; the message names two of them.
    """
    first = fishers[0]
    for fisher in fishers[1:]:
        for what in ("kind", "unit", "per", "factors"):
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


def factor_values(content: NDArray[Any], tensor: StoredTensor) -> NDArray[np.float64]:
    """Return a whole factor in float64, exactly symmetric.

    Raises:
        BecameError: if it has an entry that is no finite number, is not symmetric, or has a negative diagonal.
    """
    matrix = content.reshape(tensor.shape).astype(np.float64)
    diagonal = np.diagonal(matrix)
    if not np.isfinite(matrix).all() or (diagonal.size and diagonal.min() < 0):
        raise BecameError(f"{tensor} has an entry that is infinite or not a number, or a negative one on its diagonal.")
    scale = float(diagonal.max()) if diagonal.size else 0.0
    largest = float(np.abs(matrix - matrix.T).max()) if diagonal.size else 0.0
    # Float32 rounds sums of squares to 6e-8 of them; bfloat16 to 4e-3.
    if largest > 1e-2 * scale:
        raise BecameError(f"{tensor} is not symmetric; a Kronecker factor is a sum of x x^T.")
    return (matrix + matrix.T) / 2


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
    factors: str = "diagonal",
    remarks: Mapping[str, str] | None = None,
) -> None:
    """Write a Fisher file in float32.

    Args:
        out: where; nothing may be there.
        tensors: the name and shape of each.
        slabs: from a name, a first and a last element to the values there; those of a diagonal are at least 0.
        kind: as in ``FisherFile``, like all that follows.
        unit: ``mean`` or ``sum``.
        per: what it is over.
        counts: samples, tokens and steps.
        model: the digest of the model.
        factors: ``diagonal`` or ``kronecker``.
        remarks: more metadata.

    Raises:
        BecameError: if there is something already, a value is not finite, another process writes it, or it cannot be
            written.
    """
    words = {FORMAT: "1", "kind": kind, "unit": unit, "per": per, **{n: str(count) for n, count in counts.items()}}
    words |= ({"model": model} if model else {}) | ({"factors": factors} if factors != "diagonal" else {})
    words |= dict(remarks or {})
    entries = [(name, "F32", shape) for name, shape in tensors]
    header, _ = safetensors_header(entries, words)
    temporary = out.with_name(f".{out.name}.writing")
    check_free(out)
    with locked(out.with_name(f".{out.name}.lock")):
        try:
            with temporary.open("wb") as file:
                file.write(header)
                for name, _, shape in entries:
                    for start, stop in ranges(int(np.prod(shape, dtype=object))):
                        with np.errstate(over="ignore"):
                            values = np.asarray(slabs(name, start, stop), dtype=np.float32)
                        if not np.isfinite(values).all():
                            raise BecameError(f"'{name}' of {out} would have an entry that is no finite number.")
                        file.write(values.tobytes())
            check_free(out)
            temporary.rename(out)
        except OSError as error:
            raise BecameError(f"cannot write {out}: {error.strerror}.") from None
        finally:
            temporary.unlink(missing_ok=True)


def add_fisher_files(paths: Sequence[Path | str], out: Path | str) -> None:
    """Write the Fisher file of the union of disjoint data: sums add, means are weighted by their counts.

    Raises:
        BecameError: if the files are of different models, kinds or units, a mean has no count, or ``out`` exists.
    """
    if not isinstance(paths, list | tuple):
        raise BecameError(f"to add Fisher files, give a list of their paths, not one {type(paths).__name__}.")
    out = path_of(out, "out")
    fishers = _addable([path_of(path, "paths") for path in paths])
    first = fishers[0]
    names = {name: tensor.shape for name, tensor in first.checkpoint.tensors.items()}
    counts = [(fisher.counts or {}).get(COUNTS[first.per]) for fisher in fishers]
    if first.unit == "mean" and not all(counts):
        missing = fishers[counts.index(next(count for count in counts if not count))].path
        raise BecameError(f"{missing} is a mean over an unknown number of {COUNTS[first.per]}; it cannot be added.")
    whole = sum(count or 0 for count in counts)
    weights = [(count or 0) / whole if first.unit == "mean" else 1.0 for count in counts]

    def slabs(name: str, start: int, stop: int) -> NDArray[Any]:
        parts = [fisher.checkpoint.tensors[name] for fisher in fishers]
        is_factor = first.factors == "kronecker" and name.endswith(FACTORS)
        read = finite if is_factor else fisher_values
        wide = [read(part.slab(start, stop), part).astype(np.float64) for part in parts]
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
        factors=first.factors,
    )


def _addable(paths: Sequence[Path]) -> list[FisherFile]:
    """Return Fisher files that are of the same model and alike."""
    if len(paths) < 2:
        raise BecameError("to add Fisher files, give at least two.")
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise BecameError(f"{path} is given twice; files are added whose data are disjoint.")
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
    return fishers
