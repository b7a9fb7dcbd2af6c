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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapters.checkpoints.align import Leaf, is_statistic
from adapters.checkpoints.card import texts_beside
from adapters.checkpoints.digest import digest_of
from adapters.checkpoints.executors import Executor, Threads
from adapters.checkpoints.job import Job
from adapters.checkpoints.lora import PREFIX, combined, compressed
from adapters.checkpoints.opening import open_job
from adapters.checkpoints.plan import MergePlan
from adapters.checkpoints.resources import held_already
from adapters.checkpoints.rule import Solution
from adapters.checkpoints.tensors import StoredTensor, narrowed
from adapters.checkpoints.write import SYNC_SECONDS, Journal, Layout, OutputFolder, identity, layout_of
from adapters.runs.files import check_free
from became_core import BecameError
from became_core.laplace import Quadratic

__all__ = ["MEMORY", "MergePreview", "MergeReport", "merge_checkpoints", "preview"]

MEMORY = 512 * 2**20

# Told how many bytes of how many are done, and of which pass.
Progress = Callable[[str, int, int], None]


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
    begin, out = time.monotonic(), Path(out)
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
        passes = _Passes(job, executor, progress)
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


def preview(plan: MergePlan, *, memory: int = MEMORY, workers: int | None = None) -> MergePreview:
    """Return what a merge would do; nothing is written, and a few slabs or one leaf with factors are read.

    Raises:
        BecameError: as ``merge_checkpoints`` does, for what can be known beforehand.
    """
    job = open_job(plan)
    layout, _ = _layout(job)
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
        return layout_of(job.alignment.leaves, job.plan.shard_size), {}
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
    return layout_of(leaves, None, "adapter_model"), ranks


class _Passes:
    """The two passes over the inputs of a merge."""

    def __init__(self, job: Job, executor: Executor, progress: Progress | None) -> None:
        self.job = job
        self.bytes_read = 0
        self._executor = executor
        self._progress = progress or (lambda *_: None)
        self._prints: dict[tuple[str, str], list[int]] = {}
        self._nonzero: set[str] = set()

    def measure(self, journal: Journal) -> Solution:
        """Pass 1: return the coefficients."""
        job = self.job
        sums: dict[str, Quadratic] = {}
        finished = set()
        for entry in journal.entries:
            if "measured" in entry:
                finished.add(entry["measured"])
                if entry["slope"] is not None:
                    sums[entry["measured"]] = Quadratic(np.asarray(entry["slope"]), np.asarray(entry["curvature"]))
                self._remember(entry)
        # Leaves are measured in their order, so that the finished ones are the first.
        begun, rest = job.measured[: len(finished)], job.measured[len(finished) :]
        done, whole = (sum(leaf.size for leaf in leaves) for leaves in (begun, job.measured))
        first = sum(1 for _ in job.measured_blocks(begun))
        results = self._executor.measure(list(job.measured_blocks(job.measured)), first)
        for leaf in rest:
            total: Any = 0
            prints: dict[tuple[str, str], list[int]] = {}
            nonzero: set[str] = set()
            for _ in job.measured_blocks([leaf]):
                quadratic, more, known = next(results)
                total = total if quadratic is None else total + quadratic
                nonzero |= known
                for key, numbers in more.items():
                    prints.setdefault(key, []).extend(numbers)
            done += leaf.size
            self.bytes_read += self._bytes_of(leaf)
            measured = None if isinstance(total, int) else total
            if measured is not None:
                sums[leaf.name] = measured
            entry = {
                "measured": leaf.name,
                "slope": None if measured is None else measured.slope.tolist(),
                "curvature": None if measured is None else measured.curvature.tolist(),
                "prints": [[*key, numbers] for key, numbers in prints.items()],
                "nonzero": sorted(nonzero),
            }
            journal.append(entry)
            self._remember(entry)
            self._progress("measuring", done, whole)
        if job.measured:
            self._check_fishers()
        return job.rule.solve(sums)

    def write(self, journal: Journal, folder: OutputFolder, solution: Solution) -> dict[str, float]:
        """Pass 2: merge every block and write it at its place; return no errors, for nothing is compressed."""
        job = self.job
        blocks = job.blocks(folder.layout.leaves)
        begin = 0
        for entry in journal.entries:
            if "written" in entry:
                begin = int(entry["written"])
                self._remember(entry)

        whole = sum(block.stop - block.start for block in blocks)
        done = sum(block.stop - block.start for block in blocks[:begin])
        news: dict[tuple[str, str], list[int]] = {}
        nonzero: set[str] = set()
        last = time.monotonic()
        results = self._executor.write(blocks, begin, solution)
        for count, (block, (prints, known)) in enumerate(zip(blocks[begin:], results, strict=True), begin + 1):
            done += block.stop - block.start
            nonzero |= known
            for key, numbers in prints.items():
                news.setdefault(key, []).extend(numbers)
            if time.monotonic() - last > SYNC_SECONDS or count == len(blocks):
                folder.sync()
                entry = {
                    "written": count,
                    "prints": [[*key, numbers] for key, numbers in news.items()],
                    "nonzero": sorted(nonzero),
                }
                journal.append(entry, lasting=True)
                self._remember(entry)
                news, last = {}, time.monotonic()
            self._progress("writing", done, whole)
        once = job.rule.needs_fisher and not job.rule.measures  # else pass 1 has read the Fisher files
        for leaf in folder.layout.leaves:
            models = leaf.tensors[: None if leaf.is_merged else 1]
            fishers = self._fishers_of(leaf) if once and leaf.is_merged and not is_statistic(leaf.name) else []
            self.bytes_read += sum(tensor.nbytes for tensor in (*models, *fishers))
        if not job.measured:
            self._check_fishers()
        return {}

    def write_factors(self, journal: Journal, folder: OutputFolder, solution: Solution) -> dict[str, float]:
        """Pass 2 of LoRA adapters, module by module; return the error of each module's smaller rank."""
        job = self.job
        errors: dict[str, float] = {}
        begin, whole = 0, len(job.alignment.leaves)
        for entry in journal.entries:
            if "modules" in entry:
                begin = int(entry["modules"])
                errors |= entry["errors"]
        learned = job.adapters[int(job.has_base) :]
        leaves = {leaf.name: leaf for leaf in folder.layout.leaves}
        last = time.monotonic()
        for count, leaf in enumerate(job.alignment.leaves[begin:], begin + 1):
            module = leaf.name.removesuffix(".weight")
            weights = [model.weight.at(leaf.name, leaf.depth) for model in job.plan.models]
            shares = job.rule.shares(leaf.name, leaf.depth, weights, solution) or []
            coefficients = dict(zip(map(id, learned), shares, strict=True))
            rest = 1.0 - sum(shares) if job.has_base and job.rule.takes_base else 0.0
            down, up = combined(job.adapters, module, [coefficients.get(id(a), rest) for a in job.adapters])
            owner = next(adapter for adapter in job.adapters if module in adapter.modules)
            names = [PREFIX + module + suffix for suffix in owner.suffixes[module]]
            rank = leaves[names[0]].shape[0]
            if rank < down.shape[0]:
                down, up, errors[module] = compressed(down, up, rank)
            for name, values in zip(names, (down, up), strict=True):
                content = narrowed(values.reshape(-1), leaves[name].dtype, name)
                folder.write(name, 0, np.ascontiguousarray(content).view(np.uint8))
            if time.monotonic() - last > SYNC_SECONDS or count == whole:
                folder.sync()
                journal.append({"modules": count, "errors": errors}, lasting=True)
                last = time.monotonic()
            self._progress("writing", count, whole)
        self.bytes_read += sum(adapter.checkpoint.nbytes for adapter in job.adapters)
        return errors

    def digests(self) -> dict[str, str]:
        """Return the digest of every input; what no pass has read of it is read now."""
        if not hasattr(self, "_digests"):
            self._digests = {
                label: digest_of(checkpoint, self._prints_of(label)) for label, checkpoint in self.job.inputs.items()
            }
        return self._digests

    def _prints_of(self, label: str) -> dict[str, Sequence[int]]:
        return {name: numbers for (owner, name), numbers in self._prints.items() if owner == label}

    def _remember(self, entry: Mapping[str, Any]) -> None:
        for label, name, numbers in entry["prints"]:
            self._prints.setdefault((label, name), []).extend(numbers)
        self._nonzero |= set(entry["nonzero"])

    def _bytes_of(self, leaf: Leaf) -> int:
        """The bytes of a leaf that pass 1 reads: of an adapter, its factors."""
        models = self.job.factors_of(leaf) or leaf.tensors
        factors = [tensor for pair in self.job.factored.get(leaf.name, ()) if pair is not None for tensor in pair]
        return sum(part.nbytes for part in (*models, *self._fishers_of(leaf), *factors))

    def _fishers_of(self, leaf: Leaf) -> list[StoredTensor]:
        found = (fisher.checkpoint.tensors.get(leaf.name) for fisher in self.job.fishers.values())
        return [tensor for tensor in found if tensor is not None]

    def _check_fishers(self) -> None:
        """Refuse Fisher files that are zero throughout, or that were measured at other weights."""
        for k, fisher in self.job.fishers.items():
            if f"Fisher {k + 1}" not in self._nonzero:
                raise BecameError(f"{fisher.path} is zero in all tensors that are merged; it says nothing.")
            label = f"model {k + 1}"
            # A Fisher file of an adapter is measured at the base model with the adapter in it, which is not at hand.
            if not self.job.adapters and fisher.model is not None and fisher.model != self.digests()[label]:
                raise BecameError(
                    f"{fisher.path} was measured at another model than {self.job.inputs[label].path}: its digest is "
                    f"{fisher.model[:8]}…, the model's is {self.digests()[label][:8]}…."
                )


def _slopes(solution: Solution) -> tuple[float, float] | None:
    total = solution.total
    if total is None or total.directions != 1:
        return None
    return float(total.slope_at(0.0)[0]), float(total.slope_at(1.0)[0])


def _notes(job: Job) -> Iterator[str]:
    if any(leaf.name.endswith("running_var") for leaf in job.alignment.leaves):
        yield "Batch statistics were averaged; estimate them anew by a pass over data."
    base = next(iter(job.inputs.values()))
    if base.left_out:
        yield f"Folders of {base.path} with weights of their own were not copied: {', '.join(base.left_out)}."
    if job.adapters and job.fishers:
        yield "That the Fisher files were measured with these adapters could not be checked."
    bases = {str((adapter.checkpoint.adapter or {}).get("base_model_name_or_path")) for adapter in job.adapters}
    if len(bases) > 1:
        yield f"The adapters name different base models: {', '.join(sorted(bases))}."
