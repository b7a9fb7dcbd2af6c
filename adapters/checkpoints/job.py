"""A merge, once its inputs are open: which tensors there are, and how one slab is read, measured and merged.

Convention: an *input* is a checkpoint, a Fisher file, a gradient or a mean; a *block* is a leaf and a range of its
elements, and blocks are in the order in which they are written. A leaf whose curvature has Kronecker factors is
measured as one block, because the factors couple all of its elements; it is read in slabs all the same.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.align import Alignment, Leaf, tensor_or_tied
from adapters.checkpoints.digest import print_of
from adapters.checkpoints.fisher_files import FisherFile, factor_values, fisher_values
from adapters.checkpoints.folders import Checkpoint
from adapters.checkpoints.lora import Adapter, Factors
from adapters.checkpoints.plan import MergePlan
from adapters.checkpoints.resources import held_already
from adapters.checkpoints.rule import Rule, Slab, Solution
from adapters.checkpoints.tensors import (
    DTYPES,
    SLAB,
    StoredTensor,
    finite,
    narrowed,
    ranges,
    scratch,
    size_text,
    widened,
)
from became_core import BecameError
from became_core.laplace import Quadratic, is_statistic

__all__ = ["Block", "Extra", "Job", "Measured", "Prints"]

# From an input's label and a tensor's name to the prints of the slabs that were read, in their order.
Prints = dict[tuple[str, str], list[int]]
# What a block adds to the rule's sums, prints, and the labels of the Fisher files that are not zero there.
Measured = tuple[Quadratic | None, Prints, set[str]]


class Block(NamedTuple):
    """A range of the elements of a leaf."""

    leaf: Leaf
    start: int
    stop: int


@dataclass(frozen=True)
class Extra:
    """What a plan gives beside a model: its Fisher file, its loss's gradient, or the point of its expansion.

    Attributes:
        label: what it is, for messages.
        checkpoint: its tensors.
    """

    label: str
    checkpoint: Checkpoint

    def tensor(self, leaf: Leaf) -> StoredTensor:
        """Return its tensor of a leaf; raises a BecameError if it has none, or in another shape."""
        tensor = tensor_or_tied(self.checkpoint, leaf.name)
        if tensor is None or tensor.shape != leaf.shape or not tensor.is_float:
            shape = "none" if tensor is None else f"one of shape {list(tensor.shape)} and dtype {tensor.dtype}"
            raise BecameError(
                f"{self.checkpoint.path} should have '{leaf.name}' as numbers of shape {list(leaf.shape)}, "
                f"but has {shape}."
            )
        return tensor


@dataclass(frozen=True)
class Job:
    """A merge whose inputs are open and fit together.

    Attributes:
        plan: what the user asks for.
        rule: how it is done.
        checkpoints: the models; the base model first if there is one.
        alignment: which tensors belong together.
        fishers: by the number of the plan's model; and so are the next two.
        gradients: of the models' losses.
        means: where the models' losses are expanded.
        grams: the Gram matrices of the models' inputs, by the number of the plan's model.
        adapters: the LoRA adapters whose differences the checkpoints are; none for whole models.
    """

    plan: MergePlan
    rule: Rule
    checkpoints: Sequence[Checkpoint]
    alignment: Alignment
    fishers: Mapping[int, FisherFile] = field(default_factory=dict)
    gradients: Mapping[int, Extra] = field(default_factory=dict)
    means: Mapping[int, Extra] = field(default_factory=dict)
    grams: Mapping[int, Checkpoint] = field(default_factory=dict)
    adapters: Sequence[Adapter] = ()
    _last_grams: dict[str, Any] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def has_base(self) -> bool:
        """Whether the first checkpoint is a base model."""
        return self.plan.base_model is not None

    @property
    def stored(self) -> Sequence[Checkpoint]:
        """The models as they lie on the disk."""
        return [adapter.checkpoint for adapter in self.adapters] or self.checkpoints

    def factors_of(self, leaf: Leaf) -> list[Factors]:
        """Return the factors of a leaf's module in each LoRA adapter that has it; none of whole models."""
        module = leaf.name.removesuffix(".weight")
        return [adapter.modules[module] for adapter in self.adapters if module in adapter.modules]

    @cached_property
    def inputs(self) -> Mapping[str, Checkpoint]:
        """All that is read, by a label."""
        models = self.stored
        inputs = {"base model": models[0]} if self.has_base else {}
        inputs |= {f"model {k + 1}": model for k, model in enumerate(models[int(self.has_base) :])}
        inputs |= {f"Fisher {k + 1}": fisher.checkpoint for k, fisher in self.fishers.items()}
        inputs |= {f"Gram {k + 1}": grams for k, grams in self.grams.items()}
        inputs |= {f"gradient {k + 1}": extra.checkpoint for k, extra in self.gradients.items()}
        return inputs | {f"mean {k + 1}": extra.checkpoint for k, extra in self.means.items()}

    def blocks(self, leaves: Iterable[Leaf]) -> list[Block]:
        """Return the blocks of leaves, in their order."""
        return [Block(leaf, start, stop) for leaf in leaves for start, stop in ranges(leaf.size)]

    @cached_property
    def measured(self) -> list[Leaf]:
        """The leaves that a rule measures: all parameters. Statistics are no parameters, so no Fisher file has them."""
        if not self.rule.measures:
            return []
        return [leaf for leaf in self.alignment.leaves if leaf.is_merged and not is_statistic(leaf.name)]

    @cached_property
    def factored(self) -> Mapping[str, Sequence[tuple[StoredTensor, StoredTensor] | None]]:
        """The Kronecker factors of every measured leaf that has some, of each of the plan's models."""
        if not any(fisher.factors == "kronecker" for fisher in self.fishers.values()):
            return {}
        factored = {}
        for leaf in self.measured:
            owned = ((k, self._own(k, leaf)) for k in self.fishers)
            factors = [self.fishers[k].factors_of(leaf.name, own, leaf.shape) for k, own in owned]
            if leaf.size and any(pair is not None for pair in factors):
                factored[leaf.name] = factors
        return factored

    def measured_blocks(self, leaves: Iterable[Leaf]) -> Iterator[Block]:
        """Yield the blocks in which leaves are measured, in their order."""
        for leaf in leaves:
            yield from [Block(leaf, 0, leaf.size)] if leaf.name in self.factored else self.blocks([leaf])

    def _own(self, k: int, leaf: Leaf) -> StoredTensor:
        """Return the plan's k-th model's own tensor of a leaf."""
        return tensor_or_tied(self.checkpoints[k + int(self.has_base)], leaf.name) or leaf.tensors[0]

    @cached_property
    def block_bytes(self) -> int:
        """An upper bound of the memory that one block needs while it is merged."""
        inputs = len(self.checkpoints) + len(self.fishers) + len(self.gradients) + len(self.means)
        # For a block of an adapter's difference both of its factors may be read whole, and widened.
        adapters = self.adapters if self.rule.measures else ()
        factors = sum(max(each.nbytes + 8 * each.size for each in a.modules.values()) for a in adapters)
        return SLAB * (inputs * (8 + 4 + 8) + 6 * 8) + factors

    def read(self, block: Block, *, losses: bool, printed: bool = True) -> tuple[Slab, Prints]:
        """Return a slab of every model, and the prints of the bytes that were read.

        Args:
            block: which.
            losses: whether what is known about the losses is read too.
            printed: whether the bytes are to be printed.

        Raises:
            BecameError: if a number is not finite, a Fisher's is negative, or a Fisher is missing where models differ.
        """
        leaf, start, stop = block
        prints: Prints = {}

        def values(tensor: StoredTensor, label: str) -> NDArray[Any]:
            stored = tensor.slab(start, stop)
            if printed and self.inputs[label].tensors.get(leaf.name) is tensor:
                prints[label, leaf.name] = [print_of(stored.view(np.uint8))]
            return stored

        labels = list(self.inputs)
        models = [
            finite(values(tensor, label), tensor)
            for tensor, label in zip(leaf.tensors, labels[: len(self.checkpoints)], strict=True)
        ]
        if len({model.dtype for model in models}) > 1:
            models = [widened(model, np.float64) for model in models]
        count = len(self.plan.models)
        fishers: list[Any] = [None] * count
        gradients, means = list(fishers), list(fishers)
        if losses and not is_statistic(leaf.name):
            for k in range(count):
                fisher = self.fishers[k].tensor(leaf.name, self._own(k, leaf), leaf.shape)
                if fisher is not None:
                    fishers[k] = fisher_values(values(fisher, f"Fisher {k + 1}"), fisher)
                for extras, label, numbers in (
                    (self.gradients, "gradient", gradients),
                    (self.means, "mean", means),
                ):
                    if k in extras:
                        tensor = extras[k].tensor(leaf)
                        numbers[k] = finite(values(tensor, f"{label} {k + 1}"), tensor)
        weights = [model.weight.at(leaf.name, leaf.depth) for model in self.plan.models]
        slab = Slab(leaf.name, models, weights, fishers, gradients, means, leaf.depth, self.has_base)
        if losses and not is_statistic(leaf.name):
            self._check_known(slab)
        return slab, prints

    def _check_known(self, slab: Slab) -> None:
        """Refuse a Fisher file that lacks a tensor in which the models differ."""
        factors = self.factored.get(slab.name, (None,) * len(slab.fishers))
        for k, (fisher, pair) in enumerate(zip(slab.fishers, factors, strict=True)):
            if fisher is None and pair is None and not slab.agrees:
                raise BecameError(f"{self.fishers[k].path} has no '{slab.name}', in which the models differ.")

    def read_whole(self, leaf: Leaf) -> tuple[Slab, Prints]:
        """Return a leaf with Kronecker factors, whole and in float64, and the prints of the bytes that were read.

        Raises:
            BecameError: as ``read`` does, or if a factor is not symmetric or has a negative diagonal.
        """
        prints: Prints = {}
        arrays: dict[tuple[str, int], Any] = {}
        for block in self.blocks([leaf]):
            with scratch.block():
                slab, more = self.read(block, losses=True)
                for what in ("models", "fishers", "gradients", "means"):
                    for k, values in enumerate(getattr(slab, what)):
                        if values is not None:
                            whole = arrays.setdefault((what, k), np.empty(leaf.shape))
                            whole.reshape(-1)[block.start : block.stop] = values
            for key, numbers in more.items():
                prints.setdefault(key, []).extend(numbers)
        factors: list[tuple[Any, Any] | None] = []
        for k, pair in enumerate(self.factored[leaf.name]):
            if pair is None:
                factors.append(None)
                continue
            matrices = []
            for tensor in pair:
                content = np.empty(tensor.size, DTYPES[tensor.dtype])
                numbers = prints[f"Fisher {k + 1}", tensor.name] = []
                for start, stop in ranges(tensor.size):
                    content[start:stop] = tensor.slab(start, stop)
                    numbers.append(print_of(content[start:stop].view(np.uint8)))
                matrices.append(factor_values(content, tensor))
            factors.append((matrices[0] / self.fishers[k].samples, matrices[1]))
        wholes: dict[str, Any] = {
            what: [arrays.get((what, k)) for k in range(len(getattr(slab, what)))]
            for what in ("models", "fishers", "gradients", "means")
        }
        return replace(slab, **wholes, factors=factors), prints

    def measure(self, block: Block) -> Measured:
        """Return what a slab adds to the rule's sums, prints, and the labels of the Fisher files that are not zero."""
        with scratch.block():
            return self._measure(block)

    def _measure(self, block: Block) -> Measured:
        if block.leaf.name in self.factored:
            slab, prints = self.read_whole(block.leaf)
        else:
            slab, prints = self.read(block, losses=self.rule.needs_fisher)
        factors = slab.factors or (None,) * len(slab.fishers)
        known = {f"Fisher {k + 1}" for k, f in enumerate(slab.fishers) if f is not None and f.any()}
        known |= {f"Fisher {k + 1}" for k, f in enumerate(factors) if f is not None and f[0].any() and f[1].any()}
        nothing = [fisher is None and pair is None for fisher, pair in zip(slab.fishers, factors, strict=True)]
        if self.rule.needs_fisher and any(nothing):
            return None, prints, known
        with np.errstate(over="ignore", invalid="ignore"):
            quadratic = self.rule.measure(slab)
        slope, curvature = np.asarray(quadratic.slope, np.float64), np.asarray(quadratic.curvature, np.float64)
        if not (np.isfinite(slope).all() and np.isfinite(curvature).all()):
            raise BecameError(f"the curvature along '{block.leaf.name}' is too large; rescale the Fisher files.")
        return Quadratic(slope, curvature), prints, known

    def merge(self, block: Block, solution: Solution) -> tuple[NDArray[np.uint8], Prints, set[str]]:
        """Return the bytes of a merged slab as they are written, prints, and which Fisher files are not zero.

        The bytes are valid until this thread's next block.
        """
        with scratch.block():
            return self._merge(block, solution)

    def _merge(self, block: Block, solution: Solution) -> tuple[NDArray[np.uint8], Prints, set[str]]:
        leaf = block.leaf
        if not leaf.is_merged:
            return leaf.tensors[0].slab(block.start, block.stop).view(np.uint8), {}, set()
        # What pass 1 has looked at already is neither read nor printed again.
        first = not self.rule.measures
        slab, prints = self.read(block, losses=self.rule.needs_fisher and first, printed=first)
        known = {f"Fisher {k + 1}" for k, f in enumerate(slab.fishers) if f is not None and f.any()}
        if self.has_grams(leaf):
            return self._merge_rows(block, solution), prints, known
        with np.errstate(over="ignore", invalid="ignore"):
            merged = self.rule.merge(slab, solution)
        return narrowed(merged, leaf.dtype, leaf.name).view(np.uint8), prints, known

    def has_grams(self, leaf: Leaf) -> bool:
        """Whether a leaf has Gram matrices."""
        return bool(self.grams) and leaf.name in self.grams[0].tensors

    def _merge_rows(self, block: Block, solution: Solution) -> NDArray[np.uint8]:
        """Return a merged slab of a leaf with Gram matrices, from the whole rows that it is a part of."""
        leaf, start, stop = block
        width = leaf.shape[1]
        top, bottom = start // width, -(-stop // width)
        slab, _ = self.read(Block(leaf, top * width, bottom * width), losses=False, printed=False)
        grams, inverse = self._grams_of(leaf, slab.weights)
        merged = self.rule.merge(replace(slab, grams=grams, gram_inverse=inverse), solution)
        return narrowed(merged[start - top * width : stop - top * width], leaf.dtype, leaf.name).view(np.uint8)

    def _grams_of(self, leaf: Leaf, weights: Sequence[float]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
        """Return the Gram matrices of a leaf and the pseudo-inverse of their sum; those of the last leaf are kept."""
        with self._lock:
            if self._last_grams.get("leaf") != leaf.name:
                grams = [self.grams[k].tensors[leaf.name].whole().astype(np.float64) for k in sorted(self.grams)]
                total = sum(weight * gram for weight, gram in zip(weights, grams, strict=True))
                inverse = np.linalg.pinv(total, rcond=1e-10, hermitian=True)
                self._last_grams.update(leaf=leaf.name, grams=grams, inverse=inverse)
            return self._last_grams["grams"], self._last_grams["inverse"]

    @cached_property
    def bytes_beside(self) -> int:
        """An upper bound of the memory that is needed beside the blocks, by what is held whole."""
        widest = max((leaf.shape[1] for leaf in self.alignment.leaves if self.has_grams(leaf)), default=0)
        grams = widest**2 * 8 * (len(self.grams) + 4)
        return max(grams, self._factored_bytes(), self._adapter_bytes())

    def _factored_bytes(self) -> int:
        """What it takes to measure the largest leaf with Kronecker factors."""
        extras = len(self.gradients) + len(self.means)
        most = 0
        for leaf in self.measured:
            if leaf.name in self.factored:
                pairs = [pair for pair in self.factored[leaf.name] if pair is not None]
                kept = sum(tensor.size for pair in pairs for tensor in pair)
                largest = max(tensor.size for pair in pairs for tensor in pair)
                diagonals = len(self.factored[leaf.name]) - len(pairs)
                # The models, then the directions, and what their products with the factors need.
                arrays = 5 * len(self.checkpoints) + extras + diagonals
                most = max(most, 8 * (leaf.size * arrays + kept * 2 + largest * 3))
        return most

    def _adapter_bytes(self) -> int:
        """What it takes to combine, and to compress, the factors of the largest module."""
        sizes = (sum(each.size for each in self.factors_of(leaf)) for leaf in self.alignment.leaves)
        # As they are read, widened, and put together; then in double precision, with their bases and LAPACK's copies.
        return max(sizes, default=0) * (16 if self.plan.rank is None else 48)

    def ahead(self, memory: int, workers: int) -> int:
        """Return how many blocks may be in memory at a time.

        Raises:
            BecameError: if not even one fits.
        """
        room = memory - held_already() - self.bytes_beside
        if room < self.block_bytes:
            least = size_text(memory - room + self.block_bytes)
            raise BecameError(f"this merge needs at least {least} of memory; give --memory more than that.")
        return max(1, min(2 * workers, room // self.block_bytes))
