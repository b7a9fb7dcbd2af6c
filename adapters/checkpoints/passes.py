"""The two passes of a merge over its inputs: what is read, in which order, and what is written down to go on from.

A journal in the unfinished folder has an entry for each measured leaf, and in pass 2 one every few seconds. A merge
that was killed goes on after the last one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adapters.checkpoints.align import Leaf
from adapters.checkpoints.digest import digest_of
from adapters.checkpoints.executors import Executor
from adapters.checkpoints.job import Job
from adapters.checkpoints.lora import PREFIX, combined, compressed, frozen_of
from adapters.checkpoints.rule import Solution
from adapters.checkpoints.tensors import StoredTensor, narrowed, ranges
from adapters.checkpoints.write import SYNC_SECONDS, Journal, OutputFolder
from became_core import BecameError
from became_core.laplace import Quadratic, is_statistic

__all__ = ["Passes", "Progress"]

# Told which pass it is, and how much of how much is done: elements, or modules of adapters.
Progress = Callable[[str, int, int], None]


class Passes:
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
        self.bytes_read += sum(map(self._bytes_of, begun))  # by the process that was killed, in the same merge
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
        for name, tensor in frozen_of(job.adapters).items():
            for start, stop in ranges(tensor.nbytes):
                folder.write(name, start, tensor.read_bytes(start, stop))
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
