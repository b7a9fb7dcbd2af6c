"""What checkpoints are, and whether and how they can be merged.

Names and shapes are read, and of the tensors those that must be equal: integers, and heads beside their embeddings.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from adapters.checkpoints.align import align
from adapters.checkpoints.folders import Checkpoint, open_checkpoint
from adapters.checkpoints.lora import adapter_of, dense
from adapters.checkpoints.plan import layer_number
from adapters.checkpoints.tensors import size_text
from became_core import BecameError
from became_core.laplace import is_statistic

__all__ = ["describe", "inspect_checkpoints"]


def inspect_checkpoints(paths: Sequence[Path], *, pad_vocabulary: bool = False) -> list[str]:
    """Return a few lines on each checkpoint, and, of several, whether and how they can be merged.

    Raises:
        BecameError: if one cannot be read; that two cannot be merged is a line.
    """
    checkpoints = [open_checkpoint(path) for path in paths]
    lines = [line for checkpoint in checkpoints for line in describe(checkpoint)]
    if len(checkpoints) == 1:
        return lines
    return [*lines, *_together(checkpoints, pad_vocabulary)]


def describe(checkpoint: Checkpoint) -> list[str]:
    """Return a few lines on a checkpoint."""
    tensors = checkpoint.tensors.values()
    layers = {number for number in map(layer_number, checkpoint.tensors) if number is not None}
    dtypes = Counter(tensor.dtype for tensor in tensors)
    weights = sum(tensor.size for tensor in tensors if tensor.is_float)
    lines = [
        f"{checkpoint.path}: {checkpoint.kind}",
        f"  {len(checkpoint.tensors)} tensors, {weights:,} weights, {size_text(checkpoint.nbytes)}, "
        + ", ".join(f"{count} {word}" for word, count in sorted(dtypes.items())),
    ]
    if layers:
        lines.append(f"  {len(layers)} layers")
    if checkpoint.tied:
        lines.append("  tied: " + ", ".join(f"{name} to {owner}" for name, owner in checkpoint.tied.items()))
    if "became.fisher" in checkpoint.metadata:
        words = ", ".join(f"{name} {text}" for name, text in checkpoint.metadata.items() if name != "became.fisher")
        lines.append(f"  a Fisher file: {words}")
    if checkpoint.adapter is not None:
        adapter = adapter_of(checkpoint)
        ranks = sorted({factors.rank for factors in adapter.modules.values()})
        lines.append(f"  {len(adapter.modules)} modules of rank {', '.join(map(str, ranks))}")
    return lines


def _together(checkpoints: Sequence[Checkpoint], pad_vocabulary: bool) -> list[str]:
    adapters = [checkpoint.adapter is not None for checkpoint in checkpoints]
    try:
        if all(adapters):
            checkpoints = dense([adapter_of(checkpoint) for checkpoint in checkpoints])
        elif any(adapters):
            raise BecameError("LoRA adapters and whole models cannot be merged with each other.")
        alignment = align(checkpoints, pad_vocabulary=pad_vocabulary)
    except BecameError as error:
        return [f"They cannot be merged: {error}"]
    merged = sum(leaf.is_merged for leaf in alignment.leaves)
    statistics = sum(is_statistic(leaf.name) for leaf in alignment.leaves)
    lines = [f"They can be merged: {merged} tensors, and {len(alignment.leaves) - merged} that are equal or copied."]
    lines += [f"  {statistics} of them are batch statistics, which are averaged."] if statistics else []
    lines += [f"  {note}" for note in alignment.notes]
    lines.append("  By themselves: linear, slerp (two models), task_arithmetic (with a base model).")
    by_weight = "" if all(adapters) else ", fisher, imm-mode"
    lines.append(f"  With a Fisher file for each: became{by_weight}. `became fisher` makes them.")
    return lines
