"""Who measures and writes the blocks of a merge: threads of this process here, or a Dask cluster in ``cluster``.

What is done with a block is a function of the plan, the coefficients and the block's number. So a merge is the same to
the bit whoever does it: an executor returns what came of each block, and the merge adds it up in the order of blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters.checkpoints.job import Block, Job, Measured, Prints
from adapters.checkpoints.resources import in_order
from adapters.checkpoints.rule import Solution
from adapters.checkpoints.tensors import DTYPES
from adapters.checkpoints.write import OutputFolder

__all__ = ["Executor", "Threads", "Written", "written"]

# Of a block that is written: prints, and the labels of the Fisher files that are not zero.
Written = tuple[Prints, set[str]]


class Executor(Protocol):
    """Carries out the two passes; results come in the order of the blocks."""

    def measure(self, blocks: Sequence[Block], first: int) -> Iterator[Measured]:
        """Yield what each block adds to the rule's sums.

        Args:
            blocks: all blocks of the pass.
            first: the number of the first that is still to be done.
        """

    def write(self, blocks: Sequence[Block], first: int, solution: Solution) -> Iterator[Written]:
        """Yield the prints of each block once it lies in the files of the folder, whose lengths are as they will be."""


@dataclass(frozen=True)
class Threads:
    """Threads of this process.

    Attributes:
        job: the merge.
        folder: where it is made, opened.
        workers: how many threads.
        ahead: how many blocks may be in memory at a time.
    """

    job: Job
    folder: OutputFolder
    workers: int
    ahead: int

    def measure(self, blocks: Sequence[Block], first: int) -> Iterator[Measured]:
        """Yield what each block adds; leaves with factors are measured one at a time, so that memory is bounded."""
        return in_order(self.job.measure, blocks[first:], 1 if self.job.factored else self.workers, self.ahead)

    def write(self, blocks: Sequence[Block], first: int, solution: Solution) -> Iterator[Written]:
        """Yield the prints of each block that was written."""
        write = lambda block: written(self.job, self.folder, block, solution)  # noqa: E731
        return in_order(write, blocks[first:], self.workers, self.ahead)


def written(job: Job, folder: OutputFolder, block: Block, solution: Solution) -> Written:
    """Merge a block and write it at its place."""
    content, prints, nonzero = job.merge(block, solution)
    folder.write(block.leaf.name, block.start * DTYPES[block.leaf.dtype].itemsize, content)
    return prints, nonzero
