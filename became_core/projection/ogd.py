"""OGD, orthogonal gradient descent (Farajtabar, Azizan, Mott & Li, AISTATS 2020, arXiv 1910.07104, Algorithm 1).

With grad f_y(x; theta) the gradient of the true class's logit at a stored sample x, by all shared parameters at once:

    memory  R = the gradients of all tasks' samples, [k, parameters]
    update  g <- g - S^T S g,    S = T R orthonormal, T the inverse of the Cholesky factor of R R^T

What differs: the memory is bounded. Every task has an equal share of ``capacity``. If a task has more samples than its
share, it keeps the gradients that are farthest from the span of those kept already: one after another, each the one
with the longest part outside (a Cholesky factorisation with pivots). When a task is added, each earlier task gives up
those that it chose last. If the capacity is large enough for all samples, S spans the same space as in the paper.

The paper stores S; here R is stored, and T, which is small. Gradients by the weight of a layer with one position, such
as a fully connected one, are products of two vectors and are stored as those, which no combination of them would be.

Convention: R is stored parameter by parameter, in the order of the tasks and of the choice. T and what it is computed
from are float64; everything else is computed in the dtype of the gradients.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Array, Params, device, namespace, on_host, pytree, reduction_dtype, static
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask, Projector, TaskStart, integers
from became_core.projection.sample_gradients import Products, SampleGradients, Stacked
from became_core.registry import setting

__all__ = ["OGD", "SHARED"]

# The name, in ``rank`` and in messages, of the space of all shared parameters.
SHARED = "shared parameters"

# The arrays of a memory, by what their names begin with.
STACKED, LEFT, RIGHT = "gradients.", "left.", "right."

Gradients = dict[str, Any]  # of SampleGradients by parameter, all of the same samples


@pytree
@dataclass(frozen=True)
class OGD(Projector):
    """Orthogonal gradient descent: updates leave the span of old samples' logit gradients (Farajtabar 2020).

    The memory is gradients by all shared parameters, and what makes them orthonormal.

    Attributes:
        samples: how many training samples of each task give a gradient.
        capacity: how many gradients are kept in all, at most.
        blocks: how many of the gradients belong to each task, in the order of tasks.
        gradients: for each shared parameter, its part of the k gradients, ``Stacked`` or ``Products``.
        whitening: T [k, k], lower triangular.

    Raises:
        BecameError: if samples or capacity are below 1.

    Examples:
        >>> import numpy as np
        >>> class Task:
        ...     def logit_gradients(self, count):
        ...         yield {"w": np.array([[3.0, 0.0]]), "b": np.array([[4.0]])}  # one sample
        >>> memory = OGD().remember(Task())
        >>> memory.rank
        {'shared parameters': (1, 3)}
        >>> projected = memory.project({"w": np.array([3.0, 1.0]), "b": np.array([4.0])})
        >>> np.allclose(projected["w"], [0.0, 1.0]), np.allclose(projected["b"], [0.0])
        (True, True)
    """

    samples: int = setting(200, option="ogd_samples")
    capacity: int = setting(200, option="ogd_capacity")
    blocks: tuple[int, ...] = static(default=())
    gradients: Gradients = field(default_factory=dict)
    whitening: Array | None = None

    no_adapters: ClassVar[str] = (
        "its directions are gradients by whole weights, of all layers at once, which no step of a factor can avoid"
    )
    protects_all: ClassVar[bool] = True
    needs_labels: ClassVar[str] = "it remembers gradients of the true class's logit"

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, number in (("number of samples", self.samples), ("capacity", self.capacity)):
            if number < 1:
                raise BecameError(f"the OGD {name} is {number}; it must be at least 1.")

    def project(self, updates: Params) -> Params:
        """Return g - S^T S g = g - R^T T^T T R g.

        Args:
            updates: by name; a parameter without gradients is returned as it is, and a parameter that has gradients
                but no update counts as zero.
        """
        names = [name for name in updates if name in self.gradients]
        if not names:
            return dict(updates)
        rank, width = self.rank[SHARED]
        if rank >= width:
            return dict(updates) | {name: namespace(update=updates[name]).zeros_like(updates[name]) for name in names}
        t: Any = self.whitening
        xp: Any = namespace(whitening=t)
        along: Any = 0.0
        for name in names:
            along = xp.astype(self.gradients[name].along(updates[name]), t.dtype, copy=False) + along
        coefficients = xp.matmul(xp.matrix_transpose(t), xp.matmul(t, along))
        within = {name: self.gradients[name].combined(coefficients, updates[name]) for name in names}
        return dict(updates) | {name: updates[name] - within[name] for name in names}

    @property
    def rank(self) -> dict[str, tuple[int, int]]:
        """The number of directions, and the number of entries of all shared parameters."""
        width = sum(leaf.size for leaf in self.gradients.values())
        return {SHARED: (sum(self.blocks), width)} if self.gradients else {}

    def prepare(self, start: TaskStart) -> Self:
        """Return the projector as it is.

        Raises:
            BecameError: if the network has no shared weights, and so nothing to protect.
        """
        if not set(start.weights).difference(*start.heads):
            raise BecameError("OGD protects shared weights, and the network has none to train; choose another method.")
        return self

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task's gradients.

        Raises:
            BecameError: if there is no gradient, one is not finite, or they are not of the parameters that the memory
                knows.
        """
        tasks = len(self.blocks) + 1
        shares = [self.capacity // tasks + (number < self.capacity % tasks) for number in range(tasks)]
        blocks = [min(block, share) for block, share in zip(self.blocks, shares, strict=False)]
        gradients = self._first_of_each_task(blocks)
        if shares[-1]:
            gradients, gram = _extended(gradients, task.logit_gradients(self.samples), shares[-1])
        else:
            gram = _gram(gradients)
        array = next(leaf.arrays[0] for leaf in gradients.values())
        xp: Any = namespace(gradients=array)
        t = xp.asarray(_whitening(gram), dtype=xp.result_type(xp.float64), device=device(array))
        blocks.append(_count(gradients) - sum(blocks))
        return replace(self, blocks=tuple(blocks), gradients=gradients, whitening=t)

    def to_arrays(self) -> dict[str, Array]:
        """Return the gradients by parameter, T, and the number of gradients of each task."""
        arrays: dict[str, Array] = {}
        for name, leaf in self.gradients.items():
            for prefix, array in zip(_prefixes(leaf), leaf.arrays, strict=True):
                arrays[prefix + name] = array
        if self.whitening is not None:
            arrays["whitening"] = self.whitening
        return arrays | {"blocks": integers(self.blocks, arrays)}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return this projector with the memory that ``to_arrays`` returned.

        Raises:
            BecameError: if an array is no part of such a memory, or one is missing.
        """
        gradients: Gradients = {}
        missing = [] if "blocks" in arrays else ["'blocks', the number of gradients of each task"]
        for key, array in arrays.items():
            prefix, name = key[: key.find(".") + 1], key[key.find(".") + 1 :]
            if prefix == STACKED:
                gradients[name] = Stacked(array)
            elif prefix == LEFT and RIGHT + name in arrays:
                gradients[name] = Products(array, arrays[RIGHT + name])
            elif prefix in (LEFT, RIGHT):
                other = (RIGHT if prefix == LEFT else LEFT) + name
                missing += [] if other in arrays else [f"'{other}', the other factor of '{key}'"]
            elif key not in ("blocks", "whitening"):
                raise BecameError(f"the array '{key}' is no part of a memory of OGD.")
        if gradients and "whitening" not in arrays:
            missing.append("'whitening', which makes the gradients orthonormal")
        if missing:
            raise BecameError(f"the memory of OGD lacks {missing[0]}.")
        blocks = tuple(int(arrays["blocks"][i]) for i in range(arrays["blocks"].shape[0]))
        return replace(self, blocks=blocks, gradients=gradients, whitening=arrays.get("whitening"))

    def _first_of_each_task(self, blocks: Sequence[int]) -> Gradients:
        """The gradients, with only the first ``blocks[t]`` of those of each task t."""
        if list(self.blocks) == list(blocks):
            return self.gradients
        starts = [sum(self.blocks[:task]) for task in range(len(blocks))]
        first, *others = (slice(start, start + block) for start, block in zip(starts, blocks, strict=True))
        return {name: leaf[first].joined([leaf[other] for other in others]) for name, leaf in self.gradients.items()}


def _extended(
    known: Gradients, batches: Iterable[Mapping[str, Array | Products]], share: int
) -> tuple[Gradients, NDArray[np.float64]]:
    """Return what is known, and after it at most ``share`` gradients of batches; and the inner products of all.

    Gradients are chosen whenever there are more than twice the share, which bounds the memory by that and one batch.
    """
    old, gradients, given = _count(known), known, False
    for batch in batches:
        given, gradients = True, _joined(gradients, batch)
        if _count(gradients) - old > 2 * share:
            gradients, _ = _chosen(gradients, old, share)
    if not given:
        raise BecameError("OGD remembers a task by its samples' gradients; none was given.")
    return _chosen(gradients, old, share)


def _joined(known: Gradients, batch: Mapping[str, Array | Products]) -> Gradients:
    """Return a batch's gradients after those that are known.

    Raises:
        BecameError: if they are of other parameters, or of other shapes.
    """
    gradients: Gradients = {name: it if isinstance(it, Products) else Stacked(it) for name, it in batch.items()}
    for name in known | gradients if known else ():
        if name not in gradients or name not in known:
            where = "gradients" if name in known else "memory"
            raise BecameError(f"the {where} of OGD lack '{name}'; give the same shared parameters for every task.")
        gradients[name] = _after(name, known[name], gradients[name])
    return gradients


def _after(name: str, known: SampleGradients, new: SampleGradients) -> SampleGradients:
    # A layer has one position in one task and more in another only if its inputs' sizes differ.
    if isinstance(known, Products) and isinstance(new, Stacked):
        known = known.stacked(new.values.shape[1:])
    if isinstance(new, Products) and isinstance(known, Stacked):
        new = new.stacked(known.values.shape[1:])
    ours, theirs = ([tuple(array.shape[1:]) for array in leaf.arrays] for leaf in (known, new))
    if ours != theirs:
        raise BecameError(
            f"gradients of '{name}' have shape {', '.join(map(str, theirs))}; the memory's have "
            f"{', '.join(map(str, ours))}."
        )
    return known.joined([new])


def _chosen(gradients: Gradients, old: int, most: int) -> tuple[Gradients, NDArray[np.float64]]:
    """Return the first ``old`` gradients and at most so many others, those farthest from the span; and inner products.

    The inner products are of the gradients that are returned.
    """
    epsilon = max(_epsilon(array) for leaf in gradients.values() for array in leaf.arrays)
    # A gradient is a direction of its own if more than this share of its energy is outside the span. Rounding of an
    # inner product is ``epsilon``, and T magnifies it by the inverse root of the share.
    gram = _gram(gradients)
    if not np.isfinite(np.diag(gram)).all():
        raise BecameError("the gradients of the logits are not finite; look for NaN in the network.")
    chosen = [*range(old), *_farthest(gram, old, most, floor=epsilon**0.5)]
    if chosen == list(range(_count(gradients))):
        return gradients, gram
    taken = {}
    for name, leaf in gradients.items():
        xp: Any = namespace(gradients=leaf.arrays[0])
        taken[name] = leaf.take(xp.asarray(chosen, dtype=xp.int64, device=device(leaf.arrays[0])))
    return taken, gram[np.ix_(chosen, chosen)]


def _farthest(gram: NDArray[np.float64], old: int, most: int, floor: float) -> list[int]:
    """Return the numbers of at most so many rows, each with the longest part outside the span of those before it.

    Args:
        gram: inner products of rows, [m, m]; the first ``old`` are in the span from the beginning.
        old: how many these are; they are independent.
        most: how many rows to choose.
        floor: the share of a row's energy that must be outside.
    """
    energy = np.diag(gram)[old:]
    inverse = _inverse_lengths(gram)
    gram = gram * np.outer(inverse, inverse)
    inside = np.linalg.solve(np.linalg.cholesky(gram[:old, :old]), gram[:old, old:])
    products = gram[old:, old:] - inside.T @ inside
    share = np.diag(products).copy()
    factor = np.zeros((len(share), min(most, len(share))))
    chosen: list[int] = []
    for column in range(factor.shape[1]):
        best = int(np.argmax(np.where(share > floor, share * energy, -1.0)))
        if share[best] <= floor:
            break
        chosen.append(best)
        factor[:, column] = (products[:, best] - factor @ factor[best]) / np.sqrt(share[best])
        share = share - factor[:, column] ** 2
        share[best] = 0.0
    return [old + number for number in chosen]


def _whitening(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return T with T gram T^T = I, lower triangular, so that the directions are orthonormal in their order."""
    # The Cholesky factor is taken of rows of length 1, since lengths differ by many orders of magnitude.
    inverse = _inverse_lengths(gram)
    return np.linalg.inv(np.linalg.cholesky(gram * np.outer(inverse, inverse))) * inverse


def _inverse_lengths(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.sqrt(np.diag(gram))
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def _gram(gradients: Gradients) -> NDArray[np.float64]:
    """Return the inner products [k, k] of gradients over all parameters."""
    count = _count(gradients)
    total: NDArray[np.float64] = np.zeros((count, count))
    for leaf in gradients.values():
        total = total + on_host(leaf.inner())
    return total


def _count(gradients: Gradients) -> int:
    return next((int(leaf.arrays[0].shape[0]) for leaf in gradients.values()), 0)


def _epsilon(array: Array) -> float:
    xp: Any = namespace(gradients=array)
    return float(xp.finfo(reduction_dtype(xp, gradients=array)).eps)


def _prefixes(leaf: SampleGradients) -> tuple[str, ...]:
    return (LEFT, RIGHT) if isinstance(leaf, Products) else (STACKED,)
