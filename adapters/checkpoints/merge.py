"""The merge of checkpoints in two streamed passes: measure, then write.

Pass 1 reads slabs of all inputs and adds up the quadratic of the losses, K + K^2 numbers for each tensor; its minimiser
is the coefficients. Pass 2 reads slabs of the models again, merges them in float32 or wider, and writes each at its
place. A rule whose coefficients are known beforehand needs pass 2 alone. Memory is a few slabs, whatever the model's
size.

The result depends on the plan and the inputs alone: not on the memory, the number of workers, who they are, or on how
often the merge was killed and went on. With Kronecker factors, whose products are matrix products, the last digits of
coefficients also depend on how many threads NumPy's library for linear algebra has.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from adapters.checkpoints.align import Leaf
from adapters.checkpoints.card import texts_beside
from adapters.checkpoints.executors import Executor, Threads
from adapters.checkpoints.job import Job
from adapters.checkpoints.lora import PREFIX, frozen_of
from adapters.checkpoints.opening import open_job
from adapters.checkpoints.passes import Passes, Progress
from adapters.checkpoints.plan import MergePlan, check_count, path_of
from adapters.checkpoints.resources import held_already
from adapters.checkpoints.rule import Solution
from adapters.checkpoints.tensors import StoredTensor
from adapters.checkpoints.write import Layout, OutputFolder, identity, layout_of, layout_of_models
from adapters.runs.files import check_free
from became_core import BecameError
from became_core.laplace import is_statistic

__all__ = ["MEMORY", "MergePreview", "MergeReport", "merge_checkpoints", "preview"]

MEMORY = 512 * 2**20
# How many files a note names.
MOST_NAMED = 12


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: where the merged model is.
        files: its files of weights.
        plan: what was asked for.
        coefficients: by group of tensors ("" is the whole model), of every model; empty where no rule measured any.
        gain: by how much the sum of the losses is predicted to be smaller than at the origin; None where not measured.
        slopes: of two models: of the sum of the losses, at the first and at the second.
        convex: whether the sum of the losses is convex between the models.
        digests: of every input, by its label.
        paths: of every input, by its label.
        notes: what else the user should know, in sentences.
        bytes_read: of weights and Fisher files, in both passes.
        bytes_written: of weights.
        seconds: from the beginning to the end, of this process.
        errors: of compressed LoRA adapters: the relative error of each module's difference, by its name.
    """

    out: Path
    files: Sequence[str]
    plan: MergePlan
    coefficients: Mapping[str, tuple[float, ...]]
    gain: float | None
    slopes: tuple[float, float] | None
    convex: bool | None
    digests: Mapping[str, str]
    paths: Mapping[str, str]
    notes: Sequence[str]
    bytes_read: int
    bytes_written: int
    seconds: float
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def alpha(self) -> float | dict[str, float] | None:
        """The second model's coefficient, of the whole model or by group; None where there are not two models."""
        if not self.coefficients or any(len(numbers) != 2 for numbers in self.coefficients.values()):
            return None
        if list(self.coefficients) == [""]:
            return self.coefficients[""][1]
        return {group: numbers[1] for group, numbers in self.coefficients.items()}


@dataclass(frozen=True)
class MergePreview:
    """What a merge would do.

    Attributes:
        bytes_to_read: in all passes.
        bytes_to_write: files and their headers.
        memory: an upper bound of what it needs beside the page cache, in bytes.
        seconds: an estimate, from a few slabs.
        passes: 1 or 2.
        notes: sentences.
    """

    bytes_to_read: int
    bytes_to_write: int
    memory: int
    seconds: float
    passes: int
    notes: Sequence[str]


def merge_checkpoints(
    plan: MergePlan,
    out: Path | str,
    *,
    memory: int = MEMORY,
    workers: int | None = None,
    scheduler: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge checkpoints into a new folder.

    Args:
        plan: what to merge, and how.
        out: the folder; it must not exist, and appears whole or not at all.
        memory: the bytes that may be held beside the page cache. What the calling program holds itself does not count,
            but for its first 128 MiB.
        workers: how many threads read, merge and write; as many as there are cores, and at most four, if None.
        scheduler: the address or the file of a Dask cluster's scheduler, whose workers then read, merge and write, with
            as much memory each; all must see the inputs and ``out``. It needs the extra ``dask``.
        command: what made the merge, for the model card.
        progress: is told how far it is.

    Raises:
        BecameError: if the inputs do not fit together, are damaged, or there is no room; nothing is overwritten, and
            nothing is left in ``out``. Or if both ``workers`` and ``scheduler`` are given, there is no such scheduler,
            it goes away, or one of its workers has another version of this package or sees other files.

    Example::

        plan = MergePlan((PlannedModel("A", fisher="FA.safetensors"), PlannedModel("B", fisher="FB.safetensors")))
        report = merge_checkpoints(plan, "merged")
        print(report.alpha, report.gain)
    """
    _check_arguments(plan, memory, workers)
    _check_helpers(scheduler, progress)
    begin, out = time.monotonic(), path_of(out, "out")
    check_free(out)
    if workers is not None and scheduler is not None:
        raise BecameError("--workers are threads of this machine, and --scheduler has workers of its own; give one.")
    job = open_job(plan)
    layout, ranks = _layout(job)
    folder = OutputFolder(out, layout)
    with (
        _executor(job, folder, memory, workers, scheduler) as executor,
        folder.opened(identity(job)) as journal,
    ):
        passes = Passes(job, executor, progress)
        solution = passes.measure(journal)
        write = passes.write_factors if ranks else passes.write
        errors = write(journal, folder, solution)
        report = MergeReport(
            out=out,
            files=list(layout.files),
            plan=plan,
            coefficients=solution.coefficients if solution.groups else {},
            gain=solution.gain,
            slopes=_slopes(solution),
            convex=None if solution.total is None else bool(solution.total.is_convex),
            digests=passes.digests(),
            paths={label: str(checkpoint.path) for label, checkpoint in job.inputs.items()},
            notes=[*job.alignment.notes, *_notes(job)],
            bytes_read=passes.bytes_read,
            bytes_written=layout.nbytes,
            seconds=time.monotonic() - begin,
            errors=errors,
        )
        base = next(iter(job.inputs.values()))
        copies = {file.relative_to(base.path).as_posix(): file for file in base.companions}
        folder.finish(journal, texts_beside(job, report, ranks, command), copies)
    return report


def preview(
    plan: MergePlan, out: Path | str | None = None, *, memory: int = MEMORY, workers: int | None = None
) -> MergePreview:
    """Return what a merge would do; nothing is written, and a few slabs or one leaf with factors are read.

    Args:
        plan: what would be merged, and how.
        out: the folder that would be written, if it is to be checked that it does not exist and that there is room.
        memory: as in ``merge_checkpoints``, like the next one.
        workers: how many threads.

    Raises:
        BecameError: as ``merge_checkpoints`` does, for what can be known beforehand.
    """
    _check_arguments(plan, memory, workers)
    folder = None if out is None else path_of(out, "out")
    if folder is not None:
        check_free(folder)
    job = open_job(plan)
    layout, _ = _layout(job)
    if folder is not None:
        OutputFolder(folder, layout).check_room()
    workers = workers or min(4, os.cpu_count() or 1)
    ahead = job.ahead(memory, workers)
    models = sum(checkpoint.nbytes for checkpoint in job.stored)
    everything = sum(checkpoint.nbytes for checkpoint in job.inputs.values())
    to_read = everything + models if job.rule.measures else everything
    blocks = list(job.measured_blocks(leaf for leaf in job.alignment.leaves if leaf.is_merged))
    # A leaf with Kronecker factors is one block, which takes long; one of them must do.
    tried = blocks[:: max(1, len(blocks) // 8)][: 1 if job.factored else 8]
    workers = 1 if job.factored else workers  # as they are measured one at a time
    begin = time.monotonic()
    measured = {leaf.name for leaf in job.measured}
    for block in tried:
        # Reading and measuring cost about what reading, merging and writing do.
        job.measure(block) if block.leaf.name in measured else job.read(block, losses=job.rule.needs_fisher)
    elements = sum(block.stop - block.start for block in tried)
    whole = sum(leaf.size for leaf in job.alignment.leaves) * (1 + job.rule.measures)
    seconds = (time.monotonic() - begin) * whole / max(elements, 1) / workers
    notes = [*job.alignment.notes, *_notes(job)]
    held = held_already() + ahead * job.block_bytes + job.bytes_beside
    return MergePreview(to_read, layout.nbytes, held, seconds, 1 + job.rule.measures, notes)


def _check_arguments(plan: Any, memory: Any, workers: Any) -> None:
    if not isinstance(plan, MergePlan):
        raise BecameError(f"the plan is of type {type(plan).__name__}; give a MergePlan, as read_plan returns one.")
    if isinstance(memory, bool) or not isinstance(memory, Real):
        raise BecameError(f"memory is of type {type(memory).__name__}; give a number of bytes.")
    if workers is not None:
        check_count(workers, "the number of workers")


def _check_helpers(scheduler: Any, progress: Any) -> None:
    if not (scheduler is None or isinstance(scheduler, str)) or not (progress is None or callable(progress)):
        raise BecameError("scheduler is the address of a Dask scheduler as a text, and progress a function.")


def _executor(
    job: Job, folder: OutputFolder, memory: int, workers: int | None, scheduler: str | None
) -> AbstractContextManager[Executor]:
    """Return who carries out the passes, for the time of a context."""
    workers = workers or min(4, os.cpu_count() or 1)
    ahead = job.ahead(memory, workers)
    if scheduler is None:
        return nullcontext(Threads(job, folder, workers, ahead))
    from adapters.checkpoints.cluster import Cluster  # needs Dask, which is an extra

    return Cluster(job, folder, scheduler, memory)


def _layout(job: Job) -> tuple[Layout, dict[str, int]]:
    """Return where the merged tensors will lie; and of LoRA adapters the ranks of the merged modules."""
    if not job.adapters:
        return layout_of_models(job), {}
    leaves, ranks = [], {}
    for leaf in job.alignment.leaves:
        module = leaf.name.removesuffix(".weight")
        owners = [adapter for adapter in job.adapters if module in adapter.modules]
        factors = owners[0].modules[module]
        rank = sum(adapter.modules[module].rank for adapter in owners)
        if job.plan.rank is not None:
            rank = min(job.plan.rank, rank)
        ranks[module] = rank
        word = job.plan.out_dtype or factors.down.dtype
        down = (rank, *factors.down.shape[1:])
        up = (factors.up.shape[0], rank, *factors.up.shape[2:])
        for suffix, shape in zip(owners[0].suffixes[module], (down, up), strict=True):
            stored = StoredTensor(PREFIX + module + suffix, word, shape, factors.down.file, factors.down.read_bytes)
            leaves.append(Leaf(stored.name, shape, word, (stored,), leaf.depth))
    for name, tensor in frozen_of(job.adapters).items():
        leaves.append(Leaf(name, tensor.shape, tensor.dtype, (tensor,), 0.0))
    return layout_of(leaves, None, "adapter_model"), ranks


def _slopes(solution: Solution) -> tuple[float, float] | None:
    total = solution.total
    if total is None or total.directions != 1:
        return None
    return float(total.slope_at(0.0)[0]), float(total.slope_at(1.0)[0])


def _notes(job: Job) -> Iterator[str]:
    if any(is_statistic(leaf.name) for leaf in job.alignment.leaves):
        yield "Batch statistics were averaged; estimate them anew by a pass over data."
    base = next(iter(job.inputs.values()))
    if base.left_out:
        yield f"Folders of {base.path} with weights of their own were not copied: {', '.join(base.left_out)}."
    if base.strangers:
        named, more = base.strangers[:MOST_NAMED], len(base.strangers[MOST_NAMED:])
        rest = f" and {more} more" if more else ""
        yield f"What stands beside the weights of {base.path} and was not copied: {', '.join(named)}{rest}."
    if job.adapters and job.fishers:
        yield "That the Fisher files were measured with these adapters could not be checked."
    bases = {str((adapter.checkpoint.adapter or {}).get("base_model_name_or_path")) for adapter in job.adapters}
    if len(bases) > 1:
        yield f"The adapters name different base models: {', '.join(sorted(bases))}."
